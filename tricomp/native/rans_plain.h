// rANS in plain code, for every processor. Stage header, included by rans.h alone: no STL.
#pragma once

#include <cstring>

#include "lanes.h"
#include "rans_state.h"
#include "tables.h"

TRICOMP_BEGIN

INLINE void decode_row_plainly(const Tables& tables, RansDecoder& decoder, const uint8_t* contexts, uint8_t* symbols) {
    const uint32_t prob_bits = tables.prob_bits, mask = (1u << prob_bits) - 1;
    for (size_t step = 0; step < STEPS; ++step) {
        const uint8_t* words = next_words(decoder);
        size_t n_taken = 0;
        for (size_t lane = 0; lane < LANES; ++lane) {
            const size_t position = STEPS * lane + step;
            const uint32_t context = contexts ? contexts[position] : 0u;
            uint32_t state = decoder.states[lane];
            const uint32_t slot = tables.slots[(context << prob_bits) + (state & mask)];
            symbols[position] = static_cast<uint8_t>(slot >> 12);
            state = (slot >> 20) * (state >> prob_bits) + (slot & 0xFFF);
            uint16_t word;
            std::memcpy(&word, words + 2 * n_taken, 2);
            // Without a branch: it would be guessed wrong as often as a word is taken.
            const uint32_t is_low = state < LOWEST_STATE;
            decoder.states[lane] = state << (is_low << 4) | (word & (0u - is_low));
            n_taken += is_low;
        }
        decoder.at += n_taken;
    }
}

INLINE void encode_row_plainly(const Tables& tables, RansEncoder& encoder, const uint16_t* rows) {
    const uint32_t prob_bits = tables.prob_bits, size = 1u << prob_bits;
    for (size_t step = STEPS; step-- > 0;) {
        for (size_t lane = LANES; lane-- > 0;) {
            const uint32_t entry = tables.entries[rows[STEPS * lane + step]], freq = entry >> 16;
            uint32_t state = encoder.states[lane];
            const uint32_t is_high = state >> (31 - prob_bits) >= freq;
            const uint16_t word = static_cast<uint16_t>(state);
            std::memcpy(encoder.words - 2, &word, 2);
            encoder.words -= 2 * is_high;
            state >>= is_high << 4;
            // (x // f << prob_bits) + x mod f + start, with one multiplication less
            encoder.states[lane] = state + state / freq * (size - freq) + (entry & 0xFFFF);
        }
    }
}

TRICOMP_END
