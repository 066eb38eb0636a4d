// Words of a tile to symbols, contexts and remainders, and back: for every prediction of format 1. Stage header: no
// STL.
//
//     derive(model)                              once a frame (derive.h)
//     prepare_tile(model, reference, first, n, tile)     what both sides know: predicted or levels, and contexts
//     split_tile(model, words, n, tile)          encoding: rows (for an index: symbols, as places in the dictionary),
//                                                remainders, lengths (only of a stack), patches
//     measure_tile(model, n, tile)               decoding: lengths, for a stack
//     merge_tile(model, n, tile, words)          decoding: words from symbols, remainders, predicted or levels
//     base_patches, base_words                   sparse and cast: what differs from the base, and the base
//
// reference and words point at the tile's own n words (n at most TILE), and exactly those are read or written; `first`
// is the tile's position in the frame. Contexts are written only where the plan has several. Padding is filled in as
// FORMAT.md says.
//
// The hard thing: speed for every width and plan. Plans are told apart outside of the loops, by templates; the loops
// work on whole rows of 128, so that they have no rest; a word that does not fit is flagged by the loop and mended
// afterwards.
#pragma once

#include <cstring>

#include "bits.h"
#include "derive.h"
#include "isa.h"
#include "model.h"
#include "predict_base.h"
#include "predict_delta.h"
#include "predict_full.h"
#include "predict_palette.h"

TRICOMP_BEGIN

template <class Word>
void prepare_tile(const Model& model, const Word* reference, uint64_t first, size_t n, Tile<Word>& tile) {
    const size_t n_padded = whole_rows(n);
    if (model.predict == FULL && model.n_columns) {
        prepare_full<Word>(model, first, n, tile);
    } else if (model.predict == DELTA || model.predict == SCALED_DELTA) {
        alignas(64) Word staged[TILE];
        prepare_delta<Word>(model, stage(reference, n, staged), first, n, tile);
    }
    if (model.n_contexts > 1) std::memset(tile.contexts + n, 0, n_padded - n);
}

template <class Word>
void split_tile(const Model& model, const Word* words, size_t n, Tile<Word>& tile) {
    const size_t n_padded = whole_rows(n);
    alignas(64) Word staged[TILE];
    words = stage(words, n, staged);
    Misfits misfits;
    if (model.predict == FULL) {
        split_full<Word>(model, words, n_padded, tile, misfits);
    } else if (model.predict == PALETTE) {
        split_palette<Word>(model, words, n_padded, tile, misfits);
    } else {
        split_delta<Word>(model, words, n_padded, tile, misfits);
    }
    mend_misfits<Word>(model, n, tile, misfits);
}

template <class Word>
void measure_tile(const Model& model, size_t n, Tile<Word>& tile) {
    const size_t n_padded = whole_rows(n);
    look_up_whole(model.lengths, model.n_symbols, tile.symbols, n_padded, tile.lengths);
    std::memset(tile.lengths + n, 0, n_padded - n);
}

template <class Word>
void merge_tile(const Model& model, size_t n, Tile<Word>& tile, Word* words) {
    const size_t n_padded = whole_rows(n);
    alignas(64) Word staged[TILE];
    Word* out = n == n_padded ? words : staged;
    if (model.predict == FULL) {
        merge_full<Word>(model, n_padded, tile, out);
    } else if (model.predict == PALETTE) {
        merge_palette<Word>(model, n_padded, tile, out);
    } else {
        merge_delta<Word>(model, n_padded, tile, out);
    }
    if (out != words) std::memcpy(words, out, n * sizeof(Word));
}

TRICOMP_END
