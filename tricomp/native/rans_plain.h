// rANS in plain code, for every processor. Stage header, included by rans.h alone: no STL.
//
// The hard thing: no branch may depend on whether a lane takes a word; it would be guessed wrong as often as not.
#pragma once

#include <cstring>

#include "lanes.h"
#include "rans_state.h"
#include "tables.h"

TRICOMP_BEGIN

INLINE uint32_t load_word(const uint8_t* words) {
    uint16_t word;
    std::memcpy(&word, words, 2);
    return word;
}

inline void decode_rows_plainly(const Tables& tables, RansDecoder& decoder, const uint8_t* contexts, uint8_t* symbols,
                                size_t n_rows) {
    const uint32_t prob_bits = tables.prob_bits, mask = (1u << prob_bits) - 1;
    const uint32_t* slots = tables.slots;
    uint32_t states[LANES];  // no pointer to these: a store of symbols cannot change them
    std::memcpy(states, decoder.states, sizeof states);
    for (size_t step = 0; step < STEPS * n_rows; ++step) {
        const uint8_t* words = next_words(decoder);
        const size_t first = ROW * (step / STEPS) + step % STEPS;
        ptrdiff_t n_taken = 0;
        for (size_t lane = 0; lane < LANES; ++lane) {
            const size_t position = first + STEPS * lane;
            const uint32_t context = contexts ? contexts[position] : 0u;
            const uint32_t entry = slots[(context << prob_bits) + (states[lane] & mask)];
            symbols[position] = static_cast<uint8_t>(entry >> 12);
            const uint32_t state = (entry >> 20) * (states[lane] >> prob_bits) + (entry & 0xFFF);
            const uint32_t is_low = 0u - (state < LOWEST_STATE);  // all ones or 0
            const uint32_t longer = state << 16 | load_word(words + 2 * n_taken);
            states[lane] = state ^ ((state ^ longer) & is_low);
            n_taken -= static_cast<int32_t>(is_low);
        }
        decoder.at += static_cast<size_t>(n_taken);
    }
    std::memcpy(decoder.states, states, sizeof states);
}

// With divisors; see tables.h.
inline void encode_rows_plainly(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    const uint32_t shift = 31 - tables.prob_bits, rests = ((1u << tables.prob_bits) - 1) << shift;
    const uint64_t* divisors = tables.fast->divisors;
    uint8_t* words = encoder.words;
    uint32_t states[LANES];
    std::memcpy(states, encoder.states, sizeof states);
    for (size_t step = STEPS * n_rows; step-- > 0;) {
        const uint16_t* step_rows = rows + ROW * (step / STEPS) + step % STEPS;
        for (size_t lane = LANES; lane-- > 0;) {
            const uint64_t divisor = divisors[step_rows[STEPS * lane]];
            const uint32_t others = static_cast<uint32_t>(divisor >> 32);
            uint32_t state = states[lane];
            const uint16_t word = static_cast<uint16_t>(state);
            std::memcpy(words - 2, &word, 2);
            // state >= frequency << (31 - prob_bits), as all ones or 0
            const int32_t is_high = static_cast<int32_t>(state + (others & rests)) >> 31;
            words += 2 * is_high;
            state ^= (state ^ state >> 16) & static_cast<uint32_t>(is_high);
            const uint64_t product = uint64_t(state) * static_cast<uint32_t>(divisor);
            const uint32_t quotient = static_cast<uint32_t>(product >> (32 + (others >> 12 & 15)));
            // (x // f << prob_bits) + x mod f + start = x + x // f * (2^prob_bits - f) + start
            states[lane] = state + quotient * (others >> shift) + (others & 0xFFF);
        }
    }
    std::memcpy(encoder.states, states, sizeof states);
    encoder.words = words;
}

// The same without divisors, slowly.
inline void encode_rows_slowly(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    const uint32_t prob_bits = tables.prob_bits, size = 1u << prob_bits;
    for (size_t step = STEPS * n_rows; step-- > 0;) {
        for (size_t lane = LANES; lane-- > 0;) {
            const uint32_t entry = tables.entries[rows[ROW * (step / STEPS) + STEPS * lane + step % STEPS]];
            const uint32_t freq = entry >> 16;
            uint32_t& state = encoder.states[lane];
            if (state >> (31 - prob_bits) >= freq) {
                const uint16_t word = static_cast<uint16_t>(state);
                encoder.words -= 2;
                std::memcpy(encoder.words, &word, 2);
                state >>= 16;
            }
            state += state / freq * (size - freq) + (entry & 0xFFFF);
        }
    }
}

TRICOMP_END
