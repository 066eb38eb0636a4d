// Delta and scaled delta: the bit length of the ordered difference, and k bits below its leading one, are the symbol; the
// bits below those and the sign are the remainder. Stage header: no STL.
//
// The hard thing: bit lengths and shifts that differ from word to word, for which instruction sets differ most. Whatever
// hangs on the symbol is computed from it rather than looked up.
#pragma once

#include "bits.h"
#include "isa.h"
#include "model.h"
#include "predict_misfits.h"
#include "predict_scales.h"

TRICOMP_BEGIN

// The context of each word: the exponent of what it is taken from, in a window.
template <class Word, bool IS_FLOAT>
void window_contexts(const Model& model, const Word* words, size_t n, uint8_t* contexts) {
    const Magnitude<Word> magnitude(model.kind);
    const uint32_t m = model.kind.mantissa_bits;
    const int32_t base = model.context_base, shift = int32_t(model.context_shift), last = int32_t(model.n_contexts) - 1;
    for (size_t i = 0; i < n; i++) {
        const Word body = magnitude.of(words[i]);
        const int32_t exponent = IS_FLOAT ? int32_t(Word(body >> m)) : int32_t(bit_length(LaneOf<Word>(body)));
        const int32_t place = (exponent - base) >> shift;
        contexts[i] = uint8_t(place < 0 ? 0 : place > last ? last : place);
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
    const Order<Word> order(model.kind);
    for (size_t i = 0; i < n_padded; i++) tile.predicted[i] = order.ordered(reference[i]);
    if (model.n_contexts > 1) {
        if (model.kind.is_float) {
            window_contexts<Word, true>(model, reference, n_padded, tile.contexts);
        } else {
            window_contexts<Word, false>(model, reference, n_padded, tile.contexts);
        }
    }
}

template <class Word, bool HAS_SIGN>
void split_delta_words(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    typedef LaneOf<Word> Lane;
    constexpr uint32_t LANE_BITS = BITS<Lane>;
    alignas(64) uint8_t flags[TILE];
    const Order<Word> order(model.kind);
    const uint32_t k = model.k, base = uint32_t(model.base), n_places = model.n_symbols - 1;
    const uint32_t n_symbols = model.n_contexts > 1 ? model.n_symbols : 0;
    for (size_t i = 0; i < n; i++) {
        const Word change = Word(order.ordered(words[i]) - tile.predicted[i]);
        const Word sign = Word(change >> (BITS<Word> - 1));
        const Lane size = Word((change ^ Word(0 - sign)) + sign);
        const Lane length = bit_length(size);
        const Lane lead = (size << ((LANE_BITS - length) & (LANE_BITS - 1))) >> (LANE_BITS - 1 - k);  // 1, then k bits
        uint32_t code = (uint32_t(length - 1) << k) + uint32_t(lead);
        if (!HAS_SIGN) code = code * 2 + uint32_t(sign);
        const uint32_t place = code - base - 1;  // one less than the symbol, so that one comparison checks both ends
        const bool is_same = size == 0, is_misfit = (size != 0) & (place >= n_places);
        const uint32_t symbol = is_same | is_misfit ? 0 : place + 1;
        const Lane n_low = length > k + 1 ? length - (k + 1) : 0;
        Lane remainder = size & ((Lane(1) << n_low) - 1);
        if (HAS_SIGN) remainder |= Lane(sign) << n_low;
        tile.rows[i] = uint16_t((n_symbols ? uint32_t(tile.contexts[i]) * n_symbols : 0) + symbol);
        tile.remainders[i] = Word(remainder);
        tile.lengths[i] = uint8_t(is_same ? 0 : uint32_t(n_low) + HAS_SIGN);
        flags[i] = is_misfit;
    }
    collect_flags(flags, n, misfits);
}

template <class Word, bool HAS_SIGN>
void merge_delta_words(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    typedef LaneOf<Word> Lane;
    constexpr uint32_t LANE_BITS = BITS<Lane>;
    const Order<Word> order(model.kind);
    const uint32_t k = model.k, base = uint32_t(model.base), below = (1u << k) - 1;
    for (size_t i = 0; i < n; i++) {
        uint32_t code = tile.symbols[i] + base;
        Word sign = Word(code & 1);
        if (!HAS_SIGN) code >>= 1;
        const uint32_t length = code >> k < BITS<Word> ? code >> k : BITS<Word>;
        const Lane lead = Lane((code & below) | (below + 1)) << (LANE_BITS - 1 - k);
        const Lane top = lead >> ((LANE_BITS - length) & (LANE_BITS - 1));
        const Lane n_low = length > k + 1 ? length - (k + 1) : 0, remainder = tile.remainders[i];
        Word size = Word(top | (remainder & ((Lane(1) << n_low) - 1)));
        if (HAS_SIGN) sign = Word(remainder >> n_low & 1);
        size = (tile.symbols[i] == 0) | (length == 0) ? Word(0) : size;
        words[i] = order.unordered(Word(tile.predicted[i] + Word((size ^ Word(0 - sign)) + sign)));
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
