// Entropy stage: interleaved rANS over rows of 128 positions, for tables of up to 8 contexts. Stage header: no STL.
//
// The hard thing: a lane cannot begin a step before its last one ends, so speed comes from 32 lanes a step, several
// chunks at a time, and look-ups that do not go to memory where a table is small enough to lie in registers.
#pragma once

#include <cstring>

#include "isa.h"
#include "lanes.h"
#include "model.h"
#include "tables.h"

TRICOMP_BEGIN

// states: of every lane. words: where the words written so far begin; they grow downwards.
struct RansEncoder {
    alignas(64) uint32_t states[LANES];
    uint8_t* words;
};

// words: of the stream, n_words of them. at: how many were taken; past n_words it counts on, but reads stay near.
struct RansDecoder {
    alignas(64) uint32_t states[LANES];
    const uint8_t* words;
    size_t n_words, at;
};

// Where the next words are read: at most 32 of them, so never more than 64 bytes past the last.
INLINE const uint8_t* next_words(const RansDecoder& decoder) {
    const size_t at = decoder.at < decoder.n_words ? decoder.at : decoder.n_words;
    return decoder.words + 2 * at;
}

// Plain code, for every processor.

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
            const bool is_low = state < LOWEST_STATE;
            decoder.states[lane] = is_low ? state << 16 | word : state;
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
            const bool is_high = state >> (31 - prob_bits) >= freq;
            const uint16_t word = static_cast<uint16_t>(state);
            std::memcpy(encoder.words - 2, &word, 2);
            encoder.words -= is_high ? 2 : 0;
            state = is_high ? state >> 16 : state;
            // (x / f << p) + x mod f + start, with one multiplication less
            encoder.states[lane] = state + state / freq * (size - freq) + (entry & 0xFFFF);
        }
    }
}

// Encodes rows of 128 positions, the last first. rows: context * n_symbols + symbol, in position order, of frequency
// above 0. Up to SLACK bytes below the words may be overwritten.
inline void rans_encode(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    for (size_t row = n_rows; row-- > 0;) encode_row_plainly(tables, encoder, rows + ROW * row);
}

// Decodes n_rows rows of 128 positions of each of up to MAX_GROUP chunks. contexts: of every position, each below
// n_contexts; null: one context. Whatever the words are, no more than 64 bytes past them are read.
inline void rans_decode(const Tables& tables, RansDecoder* const* chunks, size_t n_chunks, const uint8_t* const* contexts,
                        uint8_t* const* symbols, size_t n_rows) {
    for (size_t c = 0; c < n_chunks; ++c)
        for (size_t row = 0; row < n_rows; ++row)
            decode_row_plainly(tables, *chunks[c], contexts ? contexts[c] + ROW * row : nullptr, symbols[c] + ROW * row);
}

TRICOMP_END
