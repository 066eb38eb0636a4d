// rANS decoding for AVX-512 with VBMI2. Stage header, included by rans.h alone: no STL.
//
// The hard thing: what a step looks up. A gather instruction takes longer than all the rest, so small tables of one
// context lie in registers, and others are read one number at a time.
#pragma once

#include <cstring>

#include "rans_avx512.h"
#include "rans_state.h"
#include "tables.h"

TRICOMP_BEGIN

// States are two registers of 16-bit halves, so that one instruction covers 32 lanes.

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

// Up to 128 symbols of one context: everything that a step looks up lies in registers.

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

template <size_t N_CHUNKS>
inline void decode_chunks_by_ranks(const Tables& tables, RansDecoder* const* chunks, uint8_t* const* symbols,
                                   size_t n_rows) {
    const uint32_t n_ranks = tables.fast->ranks.n_ranks;
    if (n_ranks <= 64) return decode_by_ranks<N_CHUNKS, 1>(tables, chunks, symbols, n_rows);
    return decode_by_ranks<N_CHUNKS, 2>(tables, chunks, symbols, n_rows);
}

// Other tables are too large for registers: every lane's slot is looked up in memory.

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

template <size_t N_CHUNKS>
inline void decode_by_slots(const Tables& tables, RansDecoder* const* chunks, const uint8_t* const* contexts,
                            uint8_t* const* symbols, size_t n_rows) {
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1u << tables.prob_bits) - 1));
    const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(tables.prob_bits));
    const __m128i shift_count = _mm_cvtsi32_si128(static_cast<int>(tables.prob_bits));
    const uint32_t* slots = tables.slots;
    // Where the table of every position's context begins: of a row, and of the next row's first step.
    alignas(64) uint16_t firsts[N_CHUNKS][STEPS + 1][LANES] = {};
    alignas(64) uint16_t found_symbols[N_CHUNKS][STEPS][LANES];
    // Of the next step: other chunks' work lies between a store and the loads from it.
    alignas(64) uint32_t indices[N_CHUNKS][LANES / 2];
    Halves states[N_CHUNKS];
    size_t at[N_CHUNKS];
    for_each<N_CHUNKS>(EACH(c) {
        states[c] = load_states(chunks[c]->states);
        at[c] = chunks[c]->at;
        Lanes16 steps[STEPS] = {};
        if (contexts) load_row(contexts[c], steps);
        const __m512i first = _mm512_sll_epi16(steps[0].all, shift_count);
        store_512(indices[c], _mm512_add_epi16(_mm512_and_si512(states[c].low, mask), first));
    });
    asm("" : "+m"(indices));  // or the compiler takes registers apart instead of loading
    for (size_t row = 0; row < n_rows; ++row) {
        if (contexts) {
            const size_t next_row = row + 1 < n_rows ? row + 1 : row;
            for_each<N_CHUNKS>(EACH(c) {
                Lanes16 steps[STEPS], next_steps[STEPS];
                load_row(contexts[c] + ROW * row, steps);
                load_row(contexts[c] + ROW * next_row, next_steps);
                for_each<STEPS>(EACH(k) { store_512(firsts[c][k], _mm512_sll_epi16(steps[k].all, shift_count)); });
                store_512(firsts[c][STEPS], _mm512_sll_epi16(next_steps[0].all, shift_count));
            });
        }
        for (size_t step = 0; step < STEPS; ++step) {
            for_each<N_CHUNKS>(EACH(c) {
                const Pairs found = look_up_lanes(slots, indices[c]);
                const __m512i offsets = _mm512_and_si512(low_halves(found), _mm512_set1_epi16(0xFFF));
                const __m512i freqs = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(found.even, 20),
                                                              _mm512_srli_epi32(found.odd, 4));
                store_512(found_symbols[c][step],
                          _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(found.even, 12),
                                                  _mm512_slli_epi32(found.odd, 4)));
                states[c] = advanced(states[c], freqs, offsets, shift, shift_count);
                const size_t clamped = at[c] < chunks[c]->n_words ? at[c] : chunks[c]->n_words;
                at[c] += renormalise(states[c], chunks[c]->words + 2 * clamped);
                const __m512i first = load_512(firsts[c][step + 1]);
                store_512(indices[c], _mm512_add_epi16(_mm512_and_si512(states[c].low, mask), first));
            });
            asm("" : "+m"(indices));
        }
        for_each<N_CHUNKS>(EACH(c) {
            Lanes16 steps[STEPS];
            for_each<STEPS>(EACH(k) {
                steps[k].all = _mm512_and_si512(load_512(found_symbols[c][k]), _mm512_set1_epi16(0xFF));
            });
            store_row(steps, symbols[c] + ROW * row);
        });
    }
    for_each<N_CHUNKS>(EACH(c) {
        store_states(states[c], chunks[c]->states);
        chunks[c]->at = at[c];
    });
}

TRICOMP_END
