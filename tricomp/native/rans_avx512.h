// rANS for AVX-512 with VBMI2. Stage header, included by rans.h alone: no STL.
//
// The hard thing: what a step looks up. A gather instruction takes longer than all the rest, so tables of one context lie
// in registers, and others are read one number at a time.
#pragma once

#include <cstring>

#include "lanes.h"
#include "rans_state.h"
#include "tables.h"

TRICOMP_BEGIN

// One context: everything that a step looks up lies in registers. States are two registers of 16-bit halves, so that one
// instruction covers 32 lanes.

struct Halves {  // of the states of 32 lanes
    __m512i low, high;
};

INLINE Halves load_states(const uint32_t* states) {
    const __m512i a = load_512(states), b = load_512(states + 16);
    return {pick_16(a, b, SEPARATE_16[0]), pick_16(a, b, SEPARATE_16[1])};
}

INLINE void store_states(const Halves& states, uint32_t* out) {
    store_512(out, pick_16(states.low, states.high, INTERLEAVE_16[0]));
    store_512(out + 16, pick_16(states.low, states.high, INTERLEAVE_16[1]));
}

// A table of 64 N numbers; N is 1 or 2.
template <size_t N>
struct Table16 {
    __m512i part[2 * N];

    INLINE void load(const uint16_t* numbers) {
        for (size_t i = 0; i < 2 * N; ++i) part[i] = load_512(numbers + 32 * i);
    }

    INLINE __m512i at(__m512i indices) const {
        __m512i found[N];
        for (size_t i = 0; i < N; ++i) found[i] = _mm512_permutex2var_epi16(part[2 * i], indices, part[2 * i + 1]);
        if constexpr (N == 1) return found[0];
        const __mmask32 is_late = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(64));
        return _mm512_mask_blend_epi16(is_late, found[0], found[N - 1]);
    }
};

// A RankTable of up to 64 N ranks, in registers.
template <size_t N>
struct RankLookup {
    __m512i bases[2], symbols[N];
    Table16<2> begins;
    Table16<N> freqs, starts;

    INLINE void load(const RankTable& table) {
        for (size_t i = 0; i < 2; ++i) bases[i] = load_512(table.bases + 64 * i);
        for (size_t i = 0; i < N; ++i) symbols[i] = load_512(table.symbols + 64 * i);
        begins.load(table.begins);
        freqs.load(table.freqs);
        starts.load(table.starts);
    }

    // The ranks that own slots: of the bucket's first slot, and one more for every rank that begins up to this slot.
    INLINE __m512i ranks(__m512i slots) const {
        const __m512i buckets = _mm512_srli_epi16(slots, 4);
        const __m512i base = _mm512_maskz_permutex2var_epi8(0x5555555555555555u, bases[0], buckets, bases[1]);
        const __m512i n_after = _mm512_ternarylogic_epi32(slots, slots, _mm512_set1_epi16(15), 0x0A);
        return _mm512_add_epi16(base, _mm512_popcnt_epi16(_mm512_sllv_epi16(begins.at(buckets), n_after)));
    }

    // Bytes: from ranks to symbols.
    INLINE __m512i symbols_of(__m512i ranks) const {
        return _mm512_permutex2var_epi8(symbols[0], ranks, symbols[N - 1]);
    }
};

// freqs * (states >> prob_bits) + offsets
INLINE Halves advanced(const Halves& states, __m512i freqs, __m512i offsets, __m512i shift, __m128i shift_count) {
    const __m512i low = _mm512_shrdv_epi16(states.low, states.high, shift);
    const __m512i high = _mm512_srl_epi16(states.high, shift_count);
    const __m512i sum = _mm512_add_epi16(_mm512_mullo_epi16(freqs, low), offsets);
    const __m512i top = _mm512_add_epi16(_mm512_mulhi_epu16(freqs, low), _mm512_mullo_epi16(freqs, high));
    const __mmask32 carries = _mm512_cmplt_epu16_mask(sum, offsets);
    return {sum, _mm512_mask_sub_epi16(top, carries, top, _mm512_set1_epi16(-1))};
}

// Lanes below 2^15 take the next words, in order. Returns how many did.
INLINE size_t renormalise(Halves& states, const uint8_t* words) {
    // high | (low & 0x8000) is 0
    const __m512i top = _mm512_ternarylogic_epi32(states.high, states.low, _mm512_set1_epi16(int16_t(0x8000)), 0xF8);
    const __mmask32 is_low = _mm512_testn_epi16_mask(top, top);
    states.high = _mm512_mask_mov_epi16(states.high, is_low, states.low);
    states.low = _mm512_mask_expand_epi16(states.low, is_low, load_512(words));
    return static_cast<size_t>(_mm_popcnt_u32(is_low));
}

template <size_t N_CHUNKS, size_t N>
inline void decode_by_ranks(const Tables& tables, RansDecoder* const* chunks, uint8_t* const* symbols, size_t n_rows) {
    RankLookup<N> lookup;
    lookup.load(tables.fast->ranks);
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1u << tables.prob_bits) - 1));
    const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(tables.prob_bits));
    const __m128i shift_count = _mm_cvtsi32_si128(static_cast<int>(tables.prob_bits));
    Halves states[N_CHUNKS];
    size_t at[N_CHUNKS];
    for_each<N_CHUNKS>(EACH(c) {
        states[c] = load_states(chunks[c]->states);
        at[c] = chunks[c]->at;
    });
    for (size_t row = 0; row < n_rows; ++row) {
        Lanes16 ranks[N_CHUNKS][STEPS];
        for_each<STEPS>(EACH(step) {
            for_each<N_CHUNKS>(EACH(c) {
                const __m512i slots = _mm512_and_si512(states[c].low, mask);
                const __m512i found = lookup.ranks(slots);
                const __m512i offsets = _mm512_sub_epi16(slots, lookup.starts.at(found));
                states[c] = advanced(states[c], lookup.freqs.at(found), offsets, shift, shift_count);
                const size_t clamped = at[c] < chunks[c]->n_words ? at[c] : chunks[c]->n_words;
                at[c] += renormalise(states[c], chunks[c]->words + 2 * clamped);
                ranks[c][step].all = found;
            });
        });
        for_each<N_CHUNKS>(EACH(c) {
            uint8_t* out = symbols[c] + ROW * row;
            store_row(ranks[c], out);
            store_512(out, lookup.symbols_of(load_512(out)));
            store_512(out + 64, lookup.symbols_of(load_512(out + 64)));
        });
    }
    for_each<N_CHUNKS>(EACH(c) {
        store_states(states[c], chunks[c]->states);
        chunks[c]->at = at[c];
    });
}

// Several contexts: tables are too large for registers, so every lane's slot is looked up in memory, one by one: a gather
// instruction takes longer.

struct Pairs {  // numbers of 32 bits, of even and of odd lanes
    __m512i even, odd;
};

// Of two registers of 32-bit numbers: the low halves, as 32 words in the order of lanes.
INLINE __m512i low_halves(const Pairs& numbers) {
    return _mm512_mask_blend_epi16(0xAAAAAAAA, numbers.even, _mm512_slli_epi32(numbers.odd, 16));
}

INLINE __m128i look_up_four(const uint32_t* slots, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    __m128i four = _mm_cvtsi32_si128(static_cast<int>(slots[a]));
    four = _mm_insert_epi32(four, static_cast<int>(slots[b]), 1);
    four = _mm_insert_epi32(four, static_cast<int>(slots[c]), 2);
    return _mm_insert_epi32(four, static_cast<int>(slots[d]), 3);
}

INLINE __m512i joined(const __m128i* parts) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[2]), parts[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Two indices are loaded at a time, because a processor keeps count of few loads.
INLINE Pairs look_up_lanes(const uint32_t* slots, const uint32_t (&pairs)[LANES / 2]) {
    __m128i even[4], odd[4];
    for_each<4>(EACH(i) {
        uint32_t two[4];
        for_each<4>(EACH(j) {
            two[j] = pairs[4 * i + j];
            asm("" : "+r"(two[j]));  // or they would be loaded again as halves
        });
        even[i] = look_up_four(slots, two[0] & 0xFFFF, two[1] & 0xFFFF, two[2] & 0xFFFF, two[3] & 0xFFFF);
        odd[i] = look_up_four(slots, two[0] >> 16, two[1] >> 16, two[2] >> 16, two[3] >> 16);
    });
    return {joined(even), joined(odd)};
}

// One block of rows.
template <size_t N_CHUNKS>
inline void decode_block_by_slots(const Tables& tables, RansDecoder* const* chunks, const uint8_t* const* contexts,
                                  uint8_t* const* symbols, size_t n_rows) {
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1u << tables.prob_bits) - 1));
    const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(tables.prob_bits));
    const __m128i shift_count = _mm_cvtsi32_si128(static_cast<int>(tables.prob_bits));
    const uint32_t* slots = tables.slots;
    // Where the table of every position's context begins; then, its symbol. One more is read than there are.
    alignas(64) uint16_t steps[N_CHUNKS][TILE_ROWS * STEPS + 1][LANES];
    // Of the next step: other chunks' work lies between a store and the loads from it.
    alignas(64) uint32_t indices[N_CHUNKS][LANES / 2];
    Halves states[N_CHUNKS];
    size_t at[N_CHUNKS];
    for_each<N_CHUNKS>(EACH(c) {
        states[c] = load_states(chunks[c]->states);
        at[c] = chunks[c]->at;
        if (!contexts) std::memset(steps[c], 0, sizeof steps[c]);
        for (size_t row = 0; contexts && row < n_rows; ++row) {
            Lanes16 values[STEPS];
            load_row(contexts[c] + ROW * row, values);
            for (size_t step = 0; step < STEPS; ++step)
                store_512(steps[c][STEPS * row + step], _mm512_sll_epi16(values[step].all, shift_count));
        }
        store_512(steps[c][STEPS * n_rows], _mm512_setzero_si512());
        store_512(indices[c], _mm512_add_epi16(_mm512_and_si512(states[c].low, mask), load_512(steps[c][0])));
    });
    asm("" : "+m"(indices));  // or the compiler takes registers apart instead of loading
    for (size_t step = 0; step < STEPS * n_rows; ++step) {
        for_each<N_CHUNKS>(EACH(c) {
            const Pairs found = look_up_lanes(slots, indices[c]);
            const __m512i offsets = _mm512_and_si512(low_halves(found), _mm512_set1_epi16(0xFFF));
            const __m512i freqs = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(found.even, 20),
                                                          _mm512_srli_epi32(found.odd, 4));
            store_512(steps[c][step], _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(found.even, 12),
                                                              _mm512_slli_epi32(found.odd, 4)));
            states[c] = advanced(states[c], freqs, offsets, shift, shift_count);
            const size_t clamped = at[c] < chunks[c]->n_words ? at[c] : chunks[c]->n_words;
            at[c] += renormalise(states[c], chunks[c]->words + 2 * clamped);
            const __m512i firsts = load_512(steps[c][step + 1]);
            store_512(indices[c], _mm512_add_epi16(_mm512_and_si512(states[c].low, mask), firsts));
        });
        asm("" : "+m"(indices));
    }
    for_each<N_CHUNKS>(EACH(c) {
        store_states(states[c], chunks[c]->states);
        chunks[c]->at = at[c];
        for (size_t row = 0; row < n_rows; ++row) {
            Lanes16 values[STEPS];
            for (size_t step = 0; step < STEPS; ++step)
                values[step].all = _mm512_and_si512(load_512(steps[c][STEPS * row + step]), _mm512_set1_epi16(0xFF));
            store_row(values, symbols[c] + ROW * row);
        }
    });
}

template <size_t N_CHUNKS>
inline void decode_by_slots(const Tables& tables, RansDecoder* const* chunks, const uint8_t* const* contexts,
                            uint8_t* const* symbols, size_t n_rows) {
    for (size_t row = 0; row < n_rows; row += TILE_ROWS) {
        const uint8_t* block_contexts[N_CHUNKS] = {};
        uint8_t* block_symbols[N_CHUNKS];
        for (size_t c = 0; c < N_CHUNKS; ++c) {
            if (contexts) block_contexts[c] = contexts[c] + ROW * row;
            block_symbols[c] = symbols[c] + ROW * row;
        }
        const size_t n = n_rows - row < TILE_ROWS ? n_rows - row : TILE_ROWS;
        decode_block_by_slots<N_CHUNKS>(tables, chunks, contexts ? block_contexts : nullptr, block_symbols, n);
    }
}

// Encoding. States are two registers, of even and of odd lanes: multiplication takes every second number of 32 bits.

// The high 32 bits of 64-bit numbers: of `even` in the even places, of `odd` in the odd ones.
INLINE __m512i high_words(__m512i even, __m512i odd) {
    return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
}

// The divisors of one step: of lanes 4 i, 4 i + 1, 4 i + 2, 4 i + 3.
struct StepDivisors {
    alignas(64) uint64_t at[4][8];

    INLINE void load(const uint64_t* divisors, const uint16_t* rows) {
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) {
#pragma GCC unroll 4
            for (size_t j = 0; j < 8; j += 2) {
                const uint16_t* row = rows + STEPS * (4 * j + i);
                const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(divisors + row[0]));
                const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(divisors + row[4 * STEPS]));
                _mm_store_si128(reinterpret_cast<__m128i*>(&at[i][j]), _mm_unpacklo_epi64(low, high));
            }
        }
    }
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

// (x // f << prob_bits) + x mod f + start = x + x // f * (2^prob_bits - f) + start, of half the lanes, after x >> 16 for
// those that are high. low, high: divisors of those in the even and in the odd places; others: their upper halves.
INLINE __m512i pushed(__m512i states, __m512i is_high, __m512i low, __m512i high, __m512i others, const EncodeShape& shape) {
    states = _mm512_ternarylogic_epi32(is_high, _mm512_srli_epi32(states, 16), states, 0xCA);
    const __m512i products = high_words(_mm512_mul_epu32(states, low), _mm512_mul_epu32(_mm512_srli_epi64(states, 32), high));
    const __m512i shifts = _mm512_and_si512(_mm512_srli_epi32(others, 12), _mm512_set1_epi32(15));
    const __m512i gains = _mm512_mullo_epi32(_mm512_srlv_epi32(products, shifts), _mm512_srl_epi32(others, shape.shift));
    const __m512i starts = _mm512_and_si512(others, _mm512_set1_epi32(0xFFF));
    return _mm512_add_epi32(gains, _mm512_add_epi32(states, starts));
}

alignas(64) static constexpr uint16_t CIRCLE[2 * LANES] = {
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Writes the chosen ones of 32 words below `words`; returns where they begin. They are turned to the upper end of the
// register, as a store of all of it costs less than one under a mask.
INLINE uint8_t* put_words(uint8_t* words, __m512i values, __mmask32 is_chosen) {
    const size_t n = static_cast<size_t>(_mm_popcnt_u32(is_chosen));
    const __m512i chosen = _mm512_maskz_compress_epi16(is_chosen, values);
    store_512(words - 64, _mm512_permutex2var_epi16(chosen, load_512(CIRCLE + n), chosen));
    return words - 2 * n;
}

INLINE void encode_step(Pairs& states, const StepDivisors& divisors, const EncodeShape& shape, uint8_t*& words) {
    const __m512i a = load_512(divisors.at[0]), b = load_512(divisors.at[1]);
    const __m512i c = load_512(divisors.at[2]), d = load_512(divisors.at[3]);
    const Pairs others = {high_words(a, c), high_words(b, d)};
    const Pairs is_high = {are_high(states.even, others.even, shape), are_high(states.odd, others.odd, shape)};
    words = put_words(words, low_halves(states),
                      _mm512_movepi16_mask(_mm512_mask_blend_epi16(0xAAAAAAAA, is_high.even, is_high.odd)));
    states = {pushed(states.even, is_high.even, a, c, others.even, shape),
              pushed(states.odd, is_high.odd, b, d, others.odd, shape)};
}

inline void encode_by_divisors(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    const uint64_t* divisors = tables.fast->divisors;
    const EncodeShape shape(tables.prob_bits);
    const __m512i first = load_512(encoder.states), last = load_512(encoder.states + 16);
    Pairs states = {pick_32(first, last, SEPARATE_32[0]), pick_32(first, last, SEPARATE_32[1])};
    uint8_t* words = encoder.words;
    // Look-ups run a row ahead, so that what they stored has reached the cache when registers are loaded from it.
    StepDivisors steps[2][STEPS];
    for (size_t step = 0; step < STEPS; ++step) steps[n_rows & 1][step].load(divisors, rows + ROW * (n_rows - 1) + step);
    for (size_t row = n_rows; row-- > 0;) {
        StepDivisors* now = steps[(row + 1) & 1];
        StepDivisors* next = steps[row & 1];
        const uint16_t* next_row = rows + ROW * (row ? row - 1 : 0);
        for (size_t step = STEPS; step-- > 0;) {
            next[step].load(divisors, next_row + step);
            encode_step(states, now[step], shape, words);
        }
    }
    store_512(encoder.states, pick_32(states.even, states.odd, INTERLEAVE_32[0]));
    store_512(encoder.states + 16, pick_32(states.even, states.odd, INTERLEAVE_32[1]));
    encoder.words = words;
}

template <size_t N_CHUNKS>
inline void decode_chunks_by_ranks(const Tables& tables, RansDecoder* const* chunks, uint8_t* const* symbols, size_t n_rows) {
    const uint32_t n_ranks = tables.fast->ranks.n_ranks;
    if (n_ranks <= 64) return decode_by_ranks<N_CHUNKS, 1>(tables, chunks, symbols, n_rows);
    return decode_by_ranks<N_CHUNKS, 2>(tables, chunks, symbols, n_rows);
}

TRICOMP_END
