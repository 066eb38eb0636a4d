// Delta and scaled delta: the bit length of the ordered difference, and k bits below its leading one, are the symbol;
// the bits below those and the sign are the remainder. Stage header: no STL.
//
// The hard thing: bit lengths and shifts that differ from word to word, for which instruction sets differ most.
// Whatever hangs on the symbol is computed from it rather than looked up.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "predict_misfits.h"
#include "predict_scales.h"
#include "vectors.h"

TRICOMP_BEGIN

// Exponents of floats take no shift by a count a lane; bit lengths of integers do.
template <class Word, bool IS_FLOAT> struct ContextLane { typedef EvenLane<Word> Lane; };
template <class Word> struct ContextLane<Word, false> { typedef ShiftingLane<Word> Lane; };

// What the difference is taken from, ordered, and the contexts: its exponents in a window. words: null: zeros.
template <class Word, bool IS_FLOAT>
void prepare_delta_words(const Model& model, const Word* words, size_t n, Tile<Word>& tile) {
    typedef EvenLane<Word> Even;
    typedef Vector<Even> EvenVec;
    typedef typename ContextLane<Word, IS_FLOAT>::Lane Lane;
    typedef Vector<Lane> Vec;
    const OrderOf<Word, Even> order(model.kind);
    const uint32_t m = model.kind.mantissa_bits, shift = model.context_shift;
    const bool is_signed = model.kind.is_signed, has_contexts = model.n_contexts > 1;
    const Vec body = all<Lane>(IS_FLOAT ? Word(~TOP_BIT<Word>) : Word(~Word(0)));
    const Vec base = all<Lane>(Lane(model.context_base)), last = all<Lane>(Lane(model.n_contexts - 1));
    for (size_t i = 0; i < n; i += BLOCK) {
        EvenVec ordered[EvenVec::A_BLOCK];
        for (size_t j = 0; j < EvenVec::A_BLOCK; j++)
            ordered[j] = order.ordered(load_signed<Even>(words + i + j * EvenVec::N));
        store_words(ordered, tile.predicted + i);
        if (!has_contexts) continue;
        Vec places[Vec::A_BLOCK];
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const Vec word = load_signed<Lane>(words + i + j * Vec::N);
            Vec exponent = word & body;
            if constexpr (IS_FLOAT) exponent = exponent >> m;
            else exponent = bit_length(is_signed ? absolute(word) : exponent);
            const Vec place = exponent - base;
            places[j] = smaller((place & ~sign_fill(place)) >> shift, last);  // below the window: 0
        }
        store_block(places, tile.contexts + i);
    }
}

// reference: whole rows, or null: zeros.
template <class Word>
void prepare_delta(const Model& model, const Word* reference, uint64_t first, size_t n, Tile<Word>& tile) {
    const size_t n_padded = whole_rows(n);
    alignas(64) Word scaled[TILE];
    if (model.predict == SCALED_DELTA) {
        scale_reference<Word>(model, reference, first, n, n_padded, scaled);
        reference = scaled;
    } else if (!reference) {
        std::memset(scaled, 0, n_padded * sizeof(Word));
        reference = scaled;
    }
    if (model.kind.is_float) {
        prepare_delta_words<Word, true>(model, reference, n_padded, tile);
    } else {
        prepare_delta_words<Word, false>(model, reference, n_padded, tile);
    }
}

template <class Word, bool HAS_SIGN>
void split_delta_words(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    typedef ShiftingLane<Word> Lane;
    typedef Vector<Lane> Vec;
    constexpr uint32_t LANE_BITS = BITS<Lane>;
    const OrderOf<Word, Lane> order(model.kind);
    // Codes come by a way that adds something to all but 0: see cut_floats, and below.
    constexpr bool IS_CUT = TRICOMP_HAS_AVX2 && sizeof(Lane) == 2;
    const uint32_t k = model.k, down = LANE_BITS - 1 - k;
    const Vec one = all<Lane>(1), ones = all<Lane>(Lane(~Lane(0))), most_low = all<Lane>(Lane(LANE_BITS - 1 - k));
    [[maybe_unused]] const Vec least_cut = all<Lane>(Lane(127 + k));
    // One less than the symbol is the place, so that one comparison checks both ends; that of 0 is far from any.
    const Lane added = IS_CUT ? Lane(Lane(126) << k) : Lane(-(Lane(LANE_BITS - 1) << k));
    const Vec before = all<Lane>(Lane(Lane(model.base) + 1 + (HAS_SIGN ? added : 2 * added)));
    const Vec n_places = all<Lane>(Lane(model.n_symbols - 1));
    const uint8_t* contexts = model.n_contexts > 1 ? tile.contexts : nullptr;
    for (size_t i = 0; i < n; i += BLOCK) {
        Vec symbols[Vec::A_BLOCK], remainders[Vec::A_BLOCK], lengths[Vec::A_BLOCK];
        uint32_t found = 0;
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const size_t at = i + j * Vec::N;
            const Vec word = order.ordered(load_signed<Lane>(words + at));
            const Vec change = wrap<Word>(word - load_signed<Lane>(tile.predicted + at));
            const Mask<Lane> is_below = is_negative(change);
            const Vec size = absolute(change);
            Vec code, n_low;
#if TRICOMP_HAS_AVX2
            if constexpr (IS_CUT) {
                const Vec cut = cut_floats(size);
                code = cut >> (7 - k);
                n_low = excess(cut >> 7, least_cut);
            } else
#endif
            {
                const Vec zeros = leading_zeros(size);
                code = (shift_up(size, zeros) >> down) - (zeros << k);  // the leading one counts as 1 << k
                n_low = excess(most_low, zeros);
            }
            if (!HAS_SIGN) code = subtract_where(is_below, code + code, ones);
            const Vec place = code - before;
            const Mask<Lane> is_some = has_common(size, size), fits = is_less(place, n_places);
            const Vec above = ones_from(n_low);
            const Vec remainder = size & ~above;
            symbols[j] = keep(fits, place + one);
            remainders[j] = HAS_SIGN ? subtract_where(is_below, remainder, above) : remainder;  // adds 1 << n_low
            lengths[j] = HAS_SIGN ? subtract_where(is_some, n_low, ones) : n_low;
            found |= (bits_of(is_some) & ~bits_of(fits)) << (j * Vec::N % BLOCK);
        }
        std::memcpy(reinterpret_cast<uint8_t*>(misfits.bits) + i / 8, &found, sizeof found);
        store_rows(symbols, contexts ? contexts + i : nullptr, model.n_symbols, tile.rows + i);
        store_words(remainders, tile.remainders + i);
        store_block(lengths, tile.lengths + i);
    }
}

template <class Word, bool HAS_SIGN>
void merge_delta_words(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    typedef ShiftingLane<Word> Lane;
    typedef Vector<Lane> Vec;
    const OrderOf<Word, Lane> order(model.kind);
    const Vec negative = all<Lane>(0x80);
    alignas(64) uint8_t leads[TILE], n_lows[TILE];
    look_up_whole(model.leads, model.n_symbols, tile.symbols, n, leads);
    look_up_whole(model.n_low, model.n_symbols, tile.symbols, n, n_lows);
    for (size_t i = 0; i < n; i += BLOCK) {
        Vec out[Vec::A_BLOCK];
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const size_t at = i + j * Vec::N;
            const Vec given = load<Lane>(leads + at), n_low = load<Lane>(n_lows + at);
            const Vec remainder = load<Lane>(tile.remainders + at), predicted = load_signed<Lane>(tile.predicted + at);
            const Vec above = ones_from(n_low), lead = HAS_SIGN ? given : given & ~negative;
            const Mask<Lane> is_below = HAS_SIGN ? has_common(remainder, above) : has_common(given, negative);
            const Vec size = choose_bits(above, shift_up(lead, n_low), remainder);
            out[j] = order.unordered(wrap<Word>(subtract_where(is_below, predicted + size, size + size)));
        }
        store_words(out, words + i);
    }
}

template <class Word>
void split_delta(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    if (model.has_sign) return split_delta_words<Word, true>(model, words, n, tile, misfits);
    return split_delta_words<Word, false>(model, words, n, tile, misfits);
}

template <class Word>
void merge_delta(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    if (model.has_sign) return merge_delta_words<Word, true>(model, n, tile, words);
    return merge_delta_words<Word, false>(model, n, tile, words);
}

TRICOMP_END
