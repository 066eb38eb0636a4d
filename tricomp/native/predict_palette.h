// Palette: a word's symbol is its place in a short ascending list. Stage header: no STL.
//
// The hard thing: finding the place without a branch a word. The list is searched by halves; its length, not a word,
// decides how often.
#pragma once

#include "isa.h"
#include "model.h"
#include "predict_misfits.h"

TRICOMP_BEGIN

// Bits of flags, each 0 or 1.
INLINE void collect_flags(const uint8_t* flags, size_t n, Misfits& misfits) {
    for (size_t i = 0; i < n; i += 64) {
        uint64_t eight, bits = 0;
        for (size_t j = 0; j < 64; j += 8) {
            std::memcpy(&eight, flags + i + j, 8);
            bits |= (eight * 0x0102040810204080u >> 56) << j;  // eight flags to eight bits, the first lowest
        }
        misfits.bits[i / 64] = bits;
    }
}

template <class Word>
void split_palette(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    alignas(64) uint8_t flags[TILE];
    const Word* palette = static_cast<const Word*>(model.palette);
    uint32_t half = 1;
    while (2 * half < model.n_symbols) half *= 2;
    for (size_t i = 0; i < n; i++) {
        uint32_t place = 0;  // of the last word that is not above this one
        for (uint32_t step = half; step; step /= 2) {
            const uint32_t next = place + step < model.n_symbols ? place + step : place;
            place = palette[next] <= words[i] ? next : place;
        }
        const bool is_misfit = palette[place] != words[i];
        tile.rows[i] = uint16_t(is_misfit ? 0 : place);
        flags[i] = is_misfit;
    }
    collect_flags(flags, n, misfits);
}

template <class Word>
void merge_palette(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    const Word* palette = static_cast<const Word*>(model.palette);
    for (size_t i = 0; i < n; i++) words[i] = palette[tile.symbols[i]];
}

TRICOMP_END
