// Full: a float's exponent and the k bits below, less its level, are the symbol; the rest is the remainder.
// Stage header: no STL.
//
// The hard thing: a hostile plan may put base and levels anywhere; places are computed wide enough, or modulo a power
// of two where FORMAT.md counts low bits only, so that every plan gives what the reference gives.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "predict_misfits.h"
#include "predict_scales.h"
#include "vectors.h"

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

template <class Word, class Lane, bool HAS_LEVELS, bool HAS_SIGN>
void split_full_words(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    typedef Vector<Lane> Vec;
    const uint32_t k = model.k, n_low = model.kind.mantissa_bits - k;
    const Vec base = all<Lane>(Lane(model.base)), n_places = all<Lane>(Lane(model.n_symbols - 1)), one = all<Lane>(1);
    const Vec body = all<Lane>(Word(~TOP_BIT<Word>)), low = all<Lane>(Lane((Lane(1) << n_low) - 1));
    const Vec sign = all<Lane>(Lane(Lane(HAS_SIGN) << n_low)), width = all<Lane>(Lane(n_low + HAS_SIGN));
    const Vec most = all<Lane>(Lane((1u << 14) >> k));
    const bool is_stack = model.remainder == STACK, has_places = splits_to_places(model);
    const Vec first = all<Lane>(Lane(has_places ? model.dictionary[0] : 0)), n_run = all<Lane>(Lane(model.n_dictionary));
    const uint8_t* contexts = HAS_LEVELS && model.n_contexts > 1 ? tile.contexts : nullptr;
    for (size_t i = 0; i < n; i += BLOCK) {
        Vec symbols[Vec::A_BLOCK], remainders[Vec::A_BLOCK];
        uint32_t bits = 0;
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const size_t at = i + j * Vec::N;
            const Vec word = load<Lane>(words + at);
            Vec place = ((word & body) >> n_low) - base;
            if (HAS_LEVELS) {
                Vec octave = load<Lane>(tile.levels + at);
                if constexpr (sizeof(Lane) == 2) {
                    // What is further off than this fits no symbol, and stays so.
                    octave = larger_signed(smaller_signed(shift_signed(octave, 3), most), Vec{-most.raw}) << k;
                } else {
                    octave = shift_signed(octave, 3) << k;
                }
                place = place - octave;
            }
            if (!HAS_SIGN) place = place | ((word & ~body) << (BITS<Lane> - BITS<Word>));
            const Mask<Lane> is_some = has_common(word, word), fits = is_less(place, n_places) & is_some;
            symbols[j] = keep(fits, place + one);
            remainders[j] = choose_bits(low, word, (word >> (BITS<Word> - 1 - n_low)) & sign);
            Mask<Lane> is_misfit = is_some ^ fits;
            if (has_places) {
                const Vec index = symbols[j] - first;
                const Mask<Lane> is_inside = is_less(index, n_run) & ~is_misfit;
                symbols[j] = keep(is_inside, index);
                remainders[j] = keep(is_inside, remainders[j]);
                is_misfit = ~is_inside;
            }
            bits |= bits_of(is_misfit) << (j * Vec::N % BLOCK);
        }
        std::memcpy(reinterpret_cast<uint8_t*>(misfits.bits) + i / 8, &bits, sizeof bits);
        store_words(remainders, tile.remainders + i);
        if (has_places) {
            store_block(symbols, tile.symbols + i);
            continue;
        }
        store_rows(symbols, contexts ? contexts + i : nullptr, model.n_symbols, tile.rows + i);
        if (is_stack) {
            Vec lengths[Vec::A_BLOCK];
            for (size_t j = 0; j < Vec::A_BLOCK; j++) lengths[j] = keep(has_common(symbols[j], symbols[j]), width);
            store_block(lengths, tile.lengths + i);
        }
    }
}

template <class Word, class Lane, bool HAS_LEVELS, bool HAS_SIGN>
void merge_full_words(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    typedef Vector<Lane> Vec;
    const uint32_t k = model.k, n_low = model.kind.mantissa_bits - k;
    const Vec before = all<Lane>(Lane(model.base - 1)), top = all<Lane>(TOP_BIT<Word>);
    const Vec low = all<Lane>(Lane((Lane(1) << n_low) - 1));
    const Vec kept = all<Lane>(model.n_planes || model.remainder == STACK ? Lane(~Lane(0)) : Lane(0));
    for (size_t i = 0; i < n; i += BLOCK) {
        Vec out[Vec::A_BLOCK];
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const size_t at = i + j * Vec::N;
            const Vec symbol = load<Lane>(tile.symbols + at), remainder = load<Lane>(tile.remainders + at) & kept;
            Vec high = symbol + before;
            // Modulo the lane: of the high part only its low bits count.
            if (HAS_LEVELS) high = high + (shift_signed(load<Lane>(tile.levels + at), 3) << k);
            const Vec body = choose_bits(low, remainder, high << n_low);
            const Vec sign = HAS_SIGN ? remainder << (BITS<Word> - 1 - n_low) : all<Lane>(0);
            out[j] = keep(has_common(symbol, symbol), choose_bits(top, sign, body));
        }
        store_words(out, words + i);
    }
}

// Lanes of 16 bits hold every place near the symbols only if the base is not far off.
template <class Word, bool HAS_LEVELS, bool HAS_SIGN>
void split_full_as(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    typedef EvenLane<Word> Lane;
    const bool is_near = model.base >= -(1 << 13) && model.base <= 1 << 13;
    if (sizeof(Lane) > 2 || is_near) {
        split_full_words<Word, Lane, HAS_LEVELS, HAS_SIGN>(model, words, n, tile, misfits);
    } else {
        split_full_words<Word, LaneOf<Word>, HAS_LEVELS, HAS_SIGN>(model, words, n, tile, misfits);
    }
}

template <class Word>
void split_full(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    if (model.n_columns) {
        if (model.has_sign) return split_full_as<Word, true, true>(model, words, n, tile, misfits);
        return split_full_as<Word, true, false>(model, words, n, tile, misfits);
    }
    if (model.has_sign) return split_full_as<Word, false, true>(model, words, n, tile, misfits);
    return split_full_as<Word, false, false>(model, words, n, tile, misfits);
}

template <class Word>
void merge_full(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    typedef EvenLane<Word> Lane;
    if (model.n_columns) {
        if (model.has_sign) return merge_full_words<Word, Lane, true, true>(model, n, tile, words);
        return merge_full_words<Word, Lane, true, false>(model, n, tile, words);
    }
    if (model.has_sign) return merge_full_words<Word, Lane, false, true>(model, n, tile, words);
    return merge_full_words<Word, Lane, false, false>(model, n, tile, words);
}

TRICOMP_END
