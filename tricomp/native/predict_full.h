// Full: a float's exponent and the k bits below, less its level, are the symbol; the rest is the remainder.
// Stage header: no STL.
//
// The hard thing: a hostile plan may put base and levels anywhere; places are computed wide enough, or modulo a power of
// two where FORMAT.md counts low bits only, so that every plan gives what the reference gives.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "predict_misfits.h"
#include "predict_scales.h"

TRICOMP_BEGIN

// Levels of a tile, and their phases as contexts.
template <class Word>
void prepare_full(const Model& model, uint64_t first, size_t n, Tile<Word>& tile) {
    spread_scales(model.level_rows, model.level_columns, model.n_columns, first, n, tile.levels,
                  [](int32_t row, int32_t column) { return int16_t(row + column); }, int16_t(0));
    for (size_t i = n; i < whole_rows(n); i++) tile.levels[i] = 0;
    if (model.n_contexts > 1) {
        const uint32_t shift = 3 - uint32_t(__builtin_ctz(model.n_contexts));
        for (size_t i = 0; i < whole_rows(n); i++) tile.contexts[i] = uint8_t((tile.levels[i] & 7) >> shift);
    }
}

template <class Word, bool HAS_LEVELS, bool HAS_SIGN>
void split_full_words(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    alignas(64) uint8_t flags[TILE];
    const uint32_t n_low = model.kind.mantissa_bits - model.k, n_places = model.n_symbols - 1;
    const int32_t step = 1 << model.k, base = model.base;
    const Word low = Word((Word(1) << n_low) - 1);
    const uint8_t width = uint8_t(n_low + HAS_SIGN);
    const uint16_t n_symbols = uint16_t(model.n_contexts > 1 ? model.n_symbols : 0);
    for (size_t i = 0; i < n; i++) {
        const Word word = words[i], sign = Word(word >> (BITS<Word> - 1));
        int32_t place = int32_t(Word(word & Word(~TOP_BIT<Word>)) >> n_low) - base;
        if (HAS_LEVELS) place -= (tile.levels[i] >> 3) * step;
        const bool is_zero = word == 0;
        const bool is_misfit = (word != 0) & ((uint32_t(place) >= n_places) | (HAS_SIGN ? false : sign != 0));
        const uint32_t symbol = is_zero | is_misfit ? 0 : uint32_t(place) + 1;
        const uint32_t start = HAS_LEVELS && n_symbols ? uint32_t(tile.contexts[i]) * n_symbols : 0;
        tile.rows[i] = uint16_t(start + symbol);
        tile.remainders[i] = Word((word & low) | (HAS_SIGN ? Word(sign << n_low) : 0));
        tile.lengths[i] = symbol ? width : 0;
        flags[i] = is_misfit;
    }
    collect_flags(flags, n, misfits);
}

template <class Word, bool HAS_LEVELS, bool HAS_SIGN>
void merge_full_words(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    const uint32_t n_low = model.kind.mantissa_bits - model.k;
    const int32_t step = 1 << model.k, before = model.base - 1;
    const uint32_t high_bits = (1u << (model.kind.exponent_bits + model.k)) - 1;
    const Word low = Word((Word(1) << n_low) - 1);
    const bool has_remainder = model.n_planes || model.remainder == STACK;
    const Word kept = Word(has_remainder ? ~Word(0) : 0);
    for (size_t i = 0; i < n; i++) {
        int32_t high = tile.symbols[i] + before;
        if (HAS_LEVELS) high += (tile.levels[i] >> 3) * step;
        const Word remainder = tile.remainders[i] & kept;
        Word word = Word(Word(uint32_t(high) & high_bits) << n_low) | Word(remainder & low);
        if (HAS_SIGN) word |= Word(Word(remainder >> n_low) << (BITS<Word> - 1));
        words[i] = tile.symbols[i] ? word : Word(0);
    }
}

template <class Word>
void split_full(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    if (model.n_columns) {
        if (model.has_sign) return split_full_words<Word, true, true>(model, words, n, tile, misfits);
        return split_full_words<Word, true, false>(model, words, n, tile, misfits);
    }
    if (model.has_sign) return split_full_words<Word, false, true>(model, words, n, tile, misfits);
    return split_full_words<Word, false, false>(model, words, n, tile, misfits);
}

template <class Word>
void merge_full(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    if (model.n_columns) {
        if (model.has_sign) return merge_full_words<Word, true, true>(model, n, tile, words);
        return merge_full_words<Word, true, false>(model, n, tile, words);
    }
    if (model.has_sign) return merge_full_words<Word, false, true>(model, n, tile, words);
    return merge_full_words<Word, false, false>(model, n, tile, words);
}

TRICOMP_END
