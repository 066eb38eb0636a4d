// rANS for AVX2. Stage header, included by rans.h alone: no STL. States are four registers of eight lanes.
//
// The hard thing: nothing here packs or spreads lanes under a mask. So the places that lanes go to are looked up by the
// mask of eight lanes.
#pragma once

#include <cstring>

#include "isa.h"
#include "lanes.h"
#include "model.h"
#include "rans_state.h"
#include "tables.h"

TRICOMP_BEGIN

constexpr size_t PARTS = 4;  // registers of eight lanes

struct MaskPlaces {
    uint8_t spread[256][8];  // by mask: which of the next words goes to each lane that is in the mask
    uint8_t packed[256][16];  // by mask: the bytes of 8 words that are in the mask, at the upper end
};

constexpr MaskPlaces mask_places() {
    MaskPlaces places{};
    for (size_t mask = 0; mask < 256; ++mask) {
        size_t n = 0, n_all = 0;
        for (size_t lane = 0; lane < 8; ++lane) n_all += mask >> lane & 1;
        for (size_t lane = 0; lane < 8; ++lane) {
            if (!(mask >> lane & 1)) continue;
            places.spread[mask][lane] = static_cast<uint8_t>(n);
            places.packed[mask][2 * (8 - n_all + n)] = static_cast<uint8_t>(2 * lane);
            places.packed[mask][2 * (8 - n_all + n) + 1] = static_cast<uint8_t>(2 * lane + 1);
            ++n;
        }
    }
    return places;
}

alignas(64) static constexpr MaskPlaces PLACES = mask_places();

INLINE __m128i load_64(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

// Decoding.

INLINE __m128i look_up_four(const uint32_t* slots, uint64_t ab, uint64_t cd) {
    __m128i four = _mm_cvtsi32_si128(static_cast<int>(slots[static_cast<uint32_t>(ab)]));
    four = _mm_insert_epi32(four, static_cast<int>(slots[ab >> 32]), 1);
    four = _mm_insert_epi32(four, static_cast<int>(slots[static_cast<uint32_t>(cd)]), 2);
    return _mm_insert_epi32(four, static_cast<int>(slots[cd >> 32]), 3);
}

// Entries of eight lanes; indices are loaded two at a time, because a processor keeps count of few loads.
INLINE __m256i look_up_lanes(const uint32_t* slots, const uint32_t* indices) {
    uint64_t pairs[4];
    for (size_t i = 0; i < 4; ++i) {
        std::memcpy(&pairs[i], indices + 2 * i, 8);
        asm("" : "+r"(pairs[i]));  // or they would be loaded again as halves
    }
    const __m128i low = look_up_four(slots, pairs[0], pairs[1]), high = look_up_four(slots, pairs[2], pairs[3]);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// Lanes below 2^15 take the next words, in order. Returns the states; moves words on.
INLINE __m256i renormalised(__m256i states, const uint8_t*& words) {
    // Unsigned comparison, for states that no encoder would have written.
    const __m256i is_low = _mm256_cmpeq_epi32(_mm256_srli_epi32(states, 15), _mm256_setzero_si256());
    const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_low)));
    const __m256i places = _mm256_cvtepu8_epi32(load_64(PLACES.spread[mask]));
    const __m256i next = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(load_128(words)), places);
    words += 2 * _mm_popcnt_u32(mask);
    return _mm256_blendv_epi8(states, _mm256_or_si256(_mm256_slli_epi32(states, 16), next), is_low);
}

template <size_t N_CHUNKS>
inline void decode_by_slots(const Tables& tables, RansDecoder* const* chunks, const uint8_t* const* contexts,
                            uint8_t* const* symbols, size_t n_rows) {
    const uint32_t* slots = tables.slots;
    const __m256i mask = _mm256_set1_epi32((1 << tables.prob_bits) - 1);
    const __m256i top_octet = _mm256_set1_epi32(int32_t(0xFF000000));
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(tables.prob_bits));
    alignas(32) uint32_t states[N_CHUNKS][LANES];
    alignas(32) uint32_t row_symbols[N_CHUNKS][LANES];  // four octets a lane, which come in from the top
    // Of the next step: other chunks' work lies between a store and the loads from it.
    alignas(32) uint32_t indices[N_CHUNKS][LANES];
    size_t at[N_CHUNKS];
    for (size_t c = 0; c < N_CHUNKS; ++c) {
        std::memcpy(states[c], chunks[c]->states, sizeof states[c]);
        std::memset(row_symbols[c], 0, sizeof row_symbols[c]);
        at[c] = chunks[c]->at;
        for (size_t lane = 0; lane < LANES; ++lane) {
            const uint32_t context = contexts ? contexts[c][STEPS * lane] : 0u;
            indices[c][lane] = (context << tables.prob_bits) + (states[c][lane] & ((1u << tables.prob_bits) - 1));
        }
    }
    const size_t n_steps = STEPS * n_rows;
    for (size_t step = 0; step < n_steps; ++step) {
        const size_t next = step + 1 < n_steps ? step + 1 : step;
        const __m128i octet = _mm_cvtsi32_si128(static_cast<int>(8 * (next % STEPS)));
        for_each<N_CHUNKS>(EACH(c) {
            const size_t clamped = at[c] < chunks[c]->n_words ? at[c] : chunks[c]->n_words;
            const uint8_t* first = chunks[c]->words + 2 * clamped;
            const uint8_t* words = first;
            for_each<PARTS>(EACH(part) {
                const __m256i entries = look_up_lanes(slots, indices[c] + 8 * part);
                __m256i* row_part = reinterpret_cast<__m256i*>(row_symbols[c] + 8 * part);
                const __m256i symbol = _mm256_and_si256(_mm256_slli_epi32(entries, 12), top_octet);
                const __m256i others = _mm256_srli_epi32(_mm256_load_si256(row_part), 8);
                _mm256_store_si256(row_part, _mm256_or_si256(others, symbol));
                __m256i* state_part = reinterpret_cast<__m256i*>(states[c] + 8 * part);
                const __m256i quotients = _mm256_srl_epi32(_mm256_load_si256(state_part), shift);
                const __m256i advanced = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_srli_epi32(entries, 20), quotients),
                                                          _mm256_and_si256(entries, _mm256_set1_epi32(0xFFF)));
                const __m256i state = renormalised(advanced, words);
                _mm256_store_si256(state_part, state);
                __m256i index = _mm256_and_si256(state, mask);
                if (contexts) {
                    const __m256i four = load_256(contexts[c] + ROW * (next / STEPS) + 32 * part);
                    const __m256i context = _mm256_and_si256(_mm256_srl_epi32(four, octet), _mm256_set1_epi32(0xFF));
                    index = _mm256_or_si256(index, _mm256_sll_epi32(context, shift));
                }
                _mm256_store_si256(reinterpret_cast<__m256i*>(indices[c] + 8 * part), index);
            });
            at[c] += static_cast<size_t>(words - first) / 2;
            if (step % STEPS == STEPS - 1)
                std::memcpy(symbols[c] + ROW * (step / STEPS), row_symbols[c], ROW);
        });
        asm("" : "+m"(indices));  // or the compiler takes registers apart instead of loading
    }
    for (size_t c = 0; c < N_CHUNKS; ++c) {
        std::memcpy(chunks[c]->states, states[c], sizeof states[c]);
        chunks[c]->at = at[c];
    }
}

// Encoding.

// The divisors of one step: of eight lanes, the even ones and the odd ones.
struct StepDivisors {
    alignas(32) uint64_t at[PARTS][2][4];

    INLINE void load(const uint64_t* divisors, const uint16_t* rows) {
        for_each<PARTS>(EACH(part) {
            for_each<4>(EACH(i) {
                const uint16_t* row = rows + STEPS * (8 * part + 4 * (i % 2) + i / 2);
                const __m128i low = load_64(divisors + row[0]), high = load_64(divisors + row[2 * STEPS]);
                __m128i* two = reinterpret_cast<__m128i*>(&at[part][i / 2][2 * (i % 2)]);
                _mm_store_si128(two, _mm_unpacklo_epi64(low, high));
            });
        });
    }
};

// The high 32 bits of 64-bit numbers: of `even` in the even places, of `odd` in the odd ones.
INLINE __m256i high_words(__m256i even, __m256i odd) {
    return _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
}

// One step of eight lanes. even, odd: their divisors; rests: where those have 2^prob_bits - frequency, shift bits up.
INLINE __m256i encoded(__m256i states, __m256i even, __m256i odd, __m256i rests, __m128i shift, uint8_t*& words) {
    const __m256i others = high_words(even, odd);
    // state >= frequency << (31 - prob_bits)
    const __m256i is_high = _mm256_srai_epi32(_mm256_add_epi32(states, _mm256_and_si256(others, rests)), 31);
    const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_high)));
    const __m256i low = _mm256_and_si256(states, _mm256_set1_epi32(0xFFFF));
    const __m128i lows = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 16), _mm_shuffle_epi8(lows, load_128(PLACES.packed[mask])));
    words -= 2 * _mm_popcnt_u32(mask);
    states = _mm256_blendv_epi8(states, _mm256_srli_epi32(states, 16), is_high);
    // (x // f << prob_bits) + x mod f + start = x + x // f * (2^prob_bits - f) + start
    const __m256i products =
        high_words(_mm256_mul_epu32(states, even), _mm256_mul_epu32(_mm256_srli_epi64(states, 32), odd));
    const __m256i shifts = _mm256_and_si256(_mm256_srli_epi32(others, 12), _mm256_set1_epi32(15));
    const __m256i gains = _mm256_mullo_epi32(_mm256_srlv_epi32(products, shifts), _mm256_srl_epi32(others, shift));
    const __m256i starts = _mm256_and_si256(others, _mm256_set1_epi32(0xFFF));
    return _mm256_add_epi32(gains, _mm256_add_epi32(states, starts));
}

inline void encode_by_divisors(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    const uint64_t* divisors = tables.fast->divisors;
    const uint32_t size = 1u << tables.prob_bits;
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(31 - tables.prob_bits));
    const __m256i rests = _mm256_set1_epi32(static_cast<int32_t>((size - 1) << (31 - tables.prob_bits)));
    __m256i states[PARTS];
    for_each<PARTS>(EACH(part) { states[part] = load_256(encoder.states + 8 * part); });
    uint8_t* words = encoder.words;
    // Look-ups run a step ahead, so that what they stored has reached the cache when registers are loaded from it.
    StepDivisors steps[2];
    const size_t n_steps = STEPS * n_rows;
    steps[(n_steps - 1) % 2].load(divisors, rows + ROW * (n_rows - 1) + STEPS - 1);
    for (size_t step = n_steps; step-- > 0;) {
        const size_t next = step ? step - 1 : 0;
        steps[(step + 1) % 2].load(divisors, rows + ROW * (next / STEPS) + next % STEPS);
        const StepDivisors& now = steps[step % 2];
        for_each<PARTS>(EACH(i) {
            constexpr size_t part = PARTS - 1 - size_t(i);
            const __m256i even = load_256(now.at[part][0]), odd = load_256(now.at[part][1]);
            states[part] = encoded(states[part], even, odd, rests, shift, words);
        });
    }
    for_each<PARTS>(EACH(part) { store_256(encoder.states + 8 * part, states[part]); });
    encoder.words = words;
}

TRICOMP_END
