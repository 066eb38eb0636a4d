// rANS for AVX-512 with VBMI2: what encoding and decoding share. Stage header, included by rans.h alone: no STL.
#pragma once

#include "lanes.h"

TRICOMP_BEGIN

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

struct Pairs {  // numbers of 32 bits, of even and of odd lanes
    __m512i even, odd;
};

// Of two registers of 32-bit numbers: the low halves, as 32 words in the order of lanes.
INLINE __m512i low_halves(const Pairs& numbers) {
    return _mm512_mask_blend_epi16(0xAAAAAAAA, numbers.even, _mm512_slli_epi32(numbers.odd, 16));
}

TRICOMP_END
