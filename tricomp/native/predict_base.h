// Sparse and cast: words that are those of a base but for patches. Stage header: no STL.
//
// The base is the reference, its words rounded to another dtype, or one word throughout. The hard thing: half of the
// words may be patches, or none of thousands; both must be fast.
#pragma once

#include <cstring>

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "predict_misfits.h"
#include "vectors.h"

TRICOMP_BEGIN

// The base of words [first, first + n) of what reference points at: words of this dtype, or of the source for cast.
template <class Word>
void base_words(const Model& model, const void* reference, size_t first, size_t n, Word* words) {
    if (model.predict == CAST) {
        cast<Word>(reference, model.source, first, n, model.kind, words);
    } else if (reference) {
        std::memcpy(words, static_cast<const Word*>(reference) + first, n * sizeof(Word));
    } else {
        for (size_t i = 0; i < n; i++) words[i] = Word(model.word);
    }
}

// Which of up to TILE words differ from that base: patches of the tile.
template <class Word>
void base_patches(const Model& model, const Word* words, const void* reference, size_t first, size_t n,
                  Tile<Word>& tile) {
    const Word* base = tile.predicted;
    if (model.predict == SPARSE && reference) {
        base = static_cast<const Word*>(reference) + first;
    } else {
        base_words<Word>(model, reference, first, n, tile.predicted);
    }
    typedef EvenLane<Word> Lane;
    typedef Vector<Lane> Vec;
    size_t n_patches = 0, i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        uint32_t bits = 0;
        for (size_t j = 0; j < BLOCK; j += Vec::N) {
            const Vec change = load<Lane>(words + i + j) ^ load<Lane>(base + i + j);
            bits |= bits_of(has_common(change, change)) << j;
        }
        if (bits) n_patches += append_positions(bits, i, tile.patches + n_patches);
    }
    for (size_t rest = n - i; rest; rest--, i++)
        if (words[i] != base[i]) tile.patches[n_patches++] = uint16_t(i);
    tile.n_patches = n_patches;
}

TRICOMP_END
