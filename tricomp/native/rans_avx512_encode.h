// rANS encoding for AVX-512 with VBMI2. Stage header, included by rans.h alone: no STL.
//
// The hard thing: one chunk is encoded at a time, so a step waits for the one before it; the chain from state to state
// is kept short, and everything else is done beside it.
#pragma once

#include <cstring>

#include "rans_avx512.h"
#include "rans_state.h"
#include "tables.h"

TRICOMP_BEGIN

// States are Pairs, because multiplication takes every second number of 32 bits.

INLINE Pairs load_pairs(const uint32_t* states) {
    const __m512i first = load_512(states), last = load_512(states + 16);
    return {pick_32(first, last, SEPARATE_32[0]), pick_32(first, last, SEPARATE_32[1])};
}

INLINE void store_pairs(const Pairs& pairs, uint32_t* states) {
    store_512(states, pick_32(pairs.even, pairs.odd, INTERLEAVE_32[0]));
    store_512(states + 16, pick_32(pairs.even, pairs.odd, INTERLEAVE_32[1]));
}

// The high 32 bits of 64-bit numbers: of `even` in the even places, of `odd` in the odd ones.
INLINE __m512i high_words(__m512i even, __m512i odd) {
    return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
}

// What a step multiplies by, and adds.
struct Terms {
    Pairs low, high;  // reciprocals of the lanes in even and in odd places: the lower half of every 64 bits
    Pairs others;  // the upper halves of divisors, of every lane
};

// What encoding needs to know of prob_bits.
struct EncodeShape {
    __m512i rests;  // where 2^prob_bits - frequency stands
    __m128i shift;

    INLINE explicit EncodeShape(uint32_t prob_bits) {
        rests = _mm512_set1_epi32(static_cast<int32_t>(((1u << prob_bits) - 1) << (31 - prob_bits)));
        shift = _mm_cvtsi32_si128(static_cast<int>(31 - prob_bits));
    }
};

// All ones where a state must put a word out: state + (2^prob_bits - frequency << 31 - prob_bits) is 2^31 or more.
// Arithmetic instead of a comparison: a mask register would take twice as long, and the next step waits for this.
INLINE __m512i are_high(__m512i states, __m512i others, const EncodeShape& shape) {
    return _mm512_srai_epi32(_mm512_add_epi32(states, _mm512_and_si512(others, shape.rests)), 31);
}

// (x // f << prob_bits) + x mod f + start = x + x // f * (2^prob_bits - f) + start, of half the lanes, after x >> 16
// for those that are high. low, high: reciprocals of those in the even and in the odd places; others: see Terms.
INLINE __m512i pushed(__m512i states, __m512i is_high, __m512i low, __m512i high, __m512i others,
                      const EncodeShape& shape) {
    states = _mm512_ternarylogic_epi32(is_high, _mm512_srli_epi32(states, 16), states, 0xCA);
    const __m512i products =
        high_words(_mm512_mul_epu32(states, low), _mm512_mul_epu32(_mm512_srli_epi64(states, 32), high));
    const __m512i shifts = _mm512_and_si512(_mm512_srli_epi32(others, 12), _mm512_set1_epi32(15));
    const __m512i quotients = _mm512_srlv_epi32(products, shifts);
    const __m512i gains = _mm512_mullo_epi32(quotients, _mm512_srl_epi32(others, shape.shift));
    const __m512i starts = _mm512_and_si512(others, _mm512_set1_epi32(0xFFF));
    return _mm512_add_epi32(gains, _mm512_add_epi32(states, starts));
}

struct Circle {  // 32 places from anywhere on, around the end
    alignas(64) uint16_t at[2 * LANES];
};

constexpr Circle circle() {
    Circle circle{};
    for (size_t i = 0; i < 2 * LANES; ++i) circle.at[i] = static_cast<uint16_t>(i % LANES);
    return circle;
}

static constexpr Circle CIRCLE = circle();

// Writes the chosen ones of 32 words below `words`; returns where they begin. They are turned to the upper end of the
// register, as a store of all of it costs less than one under a mask.
INLINE uint8_t* put_words(uint8_t* words, __m512i values, __mmask32 is_chosen) {
    const size_t n = static_cast<size_t>(_mm_popcnt_u32(is_chosen));
    const __m512i chosen = _mm512_maskz_compress_epi16(is_chosen, values);
    store_512(words - 64, _mm512_permutex2var_epi16(chosen, load_512(CIRCLE.at + n), chosen));
    return words - 2 * n;
}

INLINE void encode_step(Pairs& states, const Terms& terms, const EncodeShape& shape, uint8_t*& words) {
    const Pairs is_high = {are_high(states.even, terms.others.even, shape),
                           are_high(states.odd, terms.others.odd, shape)};
    words = put_words(words, low_halves(states),
                      _mm512_movepi16_mask(_mm512_mask_blend_epi16(0xAAAAAAAA, is_high.even, is_high.odd)));
    states = {pushed(states.even, is_high.even, terms.low.even, terms.high.even, terms.others.even, shape),
              pushed(states.odd, is_high.odd, terms.low.odd, terms.high.odd, terms.others.odd, shape)};
}

// Divisors of more than 64 rows lie in memory. Those of one step: of lanes 4 i, 4 i + 1, 4 i + 2, 4 i + 3.
struct StepDivisors {
    alignas(64) uint64_t at[4][8];

    INLINE void load(const uint64_t* divisors, const uint16_t* rows) {
        for_each<4>(EACH(i) {
            for_each<4>(EACH(j) {
                const uint16_t* row = rows + STEPS * (8 * j + i);
                const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(divisors + row[0]));
                const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(divisors + row[4 * STEPS]));
                _mm_store_si128(reinterpret_cast<__m128i*>(&at[i][2 * j]), _mm_unpacklo_epi64(low, high));
            });
        });
    }

    INLINE Terms terms() const {
        const __m512i a = load_512(at[0]), b = load_512(at[1]), c = load_512(at[2]), d = load_512(at[3]);
        return {{a, b}, {c, d}, {high_words(a, c), high_words(b, d)}};
    }
};

// Divisors of up to 64 rows, in registers, as tables of 16 bits.
struct DivisorLookup {
    Table16<1> quarters[4];

    INLINE void load(const uint64_t* divisors) {
        for_each<2>(EACH(i) {
            uint16_t words[ROW];
            std::memcpy(words, divisors + LANES * i, sizeof words);
            Lanes16 parts[4];
            load_row(words, parts);  // as if 32 lanes had four words each
            for_each<4>(EACH(k) { quarters[k].part[i] = parts[k].all; });
        });
    }

    INLINE Terms terms(__m512i rows) const {
        const Pairs reciprocals = joined_halves(quarters[0].at(rows), quarters[1].at(rows));
        return {reciprocals,
                {_mm512_srli_epi64(reciprocals.even, 32), _mm512_srli_epi64(reciprocals.odd, 32)},
                joined_halves(quarters[2].at(rows), quarters[3].at(rows))};
    }

    static INLINE Pairs joined_halves(__m512i low, __m512i high) {
        return {_mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_slli_epi32(high, 16)),
                _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high)};
    }
};

inline void encode_in_registers(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    const EncodeShape shape(tables.prob_bits);
    DivisorLookup lookup;
    lookup.load(tables.fast->divisors);
    Pairs states = load_pairs(encoder.states);
    uint8_t* words = encoder.words;
    for (size_t row = n_rows; row-- > 0;) {
        Lanes16 steps[STEPS];
        load_row(rows + ROW * row, steps);
        for_each<STEPS>(EACH(i) { encode_step(states, lookup.terms(steps[STEPS - 1 - i].all), shape, words); });
    }
    store_pairs(states, encoder.states);
    encoder.words = words;
}

inline void encode_from_memory(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    const uint64_t* divisors = tables.fast->divisors;
    const EncodeShape shape(tables.prob_bits);
    Pairs states = load_pairs(encoder.states);
    uint8_t* words = encoder.words;
    // Look-ups run two steps ahead, so that what they stored has reached the cache when registers are loaded from it.
    constexpr size_t AHEAD = 2;
    StepDivisors steps[AHEAD + 1];
    const size_t n_steps = STEPS * n_rows;
    for (size_t i = 0; i < AHEAD; ++i)
        steps[i].load(divisors, rows + ROW * (n_rows - 1) + (STEPS - 1 - i));
    size_t now = 0;
    for (size_t step = n_steps; step-- > 0;) {
        const size_t next = step >= AHEAD ? step - AHEAD : 0;
        steps[(now + AHEAD) % (AHEAD + 1)].load(divisors, rows + ROW * (next / STEPS) + next % STEPS);
        encode_step(states, steps[now].terms(), shape, words);
        now = now == AHEAD ? 0 : now + 1;
    }
    store_pairs(states, encoder.states);
    encoder.words = words;
}

inline void encode_by_divisors(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    if (tables.n_contexts * tables.n_symbols <= 64) return encode_in_registers(tables, encoder, rows, n_rows);
    return encode_from_memory(tables, encoder, rows, n_rows);
}

TRICOMP_END
