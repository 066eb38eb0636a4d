// What the rANS coders of every instruction set share: their states, and loops over registers. Stage header: no STL.
#pragma once

#include "isa.h"
#include "model.h"

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

template <size_t I>
struct Number {
    constexpr operator size_t() const { return I; }
};

// Runs body(0) .. body(N - 1), with constants: a loop that is unrolled late leaves arrays of registers in memory.
template <size_t N, size_t I = 0, class Body>
INLINE void for_each(const Body& body) {
    if constexpr (I < N) {
        body(Number<I>());
        for_each<N, I + 1>(body);
    }
}

#define EACH(name) [&](auto name) __attribute__((always_inline))

TRICOMP_END
