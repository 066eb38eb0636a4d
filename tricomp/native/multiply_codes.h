// Inputs of products as codes of 8 bits, and what else products with integer weights read. Stage header: no STL.
//
// The hard thing: a code is what division by the row's scale rounds to. Multiplying by the reciprocal is several times
// faster and can differ only where the quotient is all but halfway between two codes; there it is divided after all.
#pragma once

#include <cstring>

#include "isa.h"
#include "multiply_kernels.h"

// Of loops over an array of sums, which would else lie in memory.
#define UNROLLED _Pragma("GCC unroll 16")

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t LANES = TRICOMP_HAS_AVX512 ? 16 : TRICOMP_HAS_AVX2 ? 8 : 4;
typedef float Floats __attribute__((vector_size(LANES * 4)));

INLINE float float_at(const uint8_t* from, size_t i) {
    float x;
    memcpy(&x, from + 4 * i, 4);
    return x;
}

INLINE float scale_at(FloatFormat format, const uint8_t* scales, size_t i) {
    if (format == FloatFormat::FLOAT32) return float_at(scales, i);
    uint16_t half;
    memcpy(&half, scales + 2 * i, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE size_t rounded_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

INLINE int32_t offset_of(const Multiplying& task) { return task.bits == 8 ? 128 : 8; }

// Where results go: of row m and output o, to at + 4 * (m * row + o * output).
struct Places {
    uint8_t* at;
    size_t row, output;

    Places of(size_t m, size_t o) const { return {at + 4 * (m * row + o * output), row, output}; }
};

// The largest magnitude, NaN if there is one: as integers, magnitudes of floats compare alike, and NaNs are above all.
INLINE float largest_of(const uint8_t* input, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, input + 4 * i, 4);
        bits &= 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    float x;
    memcpy(&x, &largest, 4);
    return x;
}

// What the codes of a row are multiplied by.
INLINE float scale_of(const uint8_t* input, size_t n) {
    const float scale = largest_of(input, n) / 127.0f;
    return scale == 0.0f ? 1.0f : scale;
}

constexpr float ROUNDER = 0x1.8p23f;  // a float below 2^22 plus this has its nearest integer in its low bits; ties to even

INLINE void divided_to_codes(const uint8_t* input, size_t n, float scale, int8_t* codes) {
    for (size_t i = 0; i < n; i++) {
        const float shifted = float_at(input, i) / scale + ROUNDER;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        codes[i] = int8_t(bits);
    }
}

#if TRICOMP_HAS_AVX512

// Quotients are at most 127, and products with the reciprocal less than 3e-5 from them: two roundings of 2^-24 each.
constexpr float NEAR_HALF = 0.4999f;

INLINE void to_codes(const uint8_t* input, size_t n, float scale, int8_t* codes) {
    size_t at = 0;
    if (scale > 1e-30f && scale < 1e30f) {  // the reciprocal is a normal number
        const __m512 reciprocal = _mm512_set1_ps(1.0f / scale), half = _mm512_set1_ps(NEAR_HALF);
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (; at + 64 <= n; at += 64) {
            __m512i whole[4];
            __m512 farthest = _mm512_setzero_ps();
            for (size_t i = 0; i < 4; i++) {
                const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(input + 4 * (at + 16 * i)), reciprocal);
                farthest = _mm512_range_ps(farthest, _mm512_reduce_ps(x, 0), 11);  // the larger magnitude
                whole[i] = _mm512_cvtps_epi32(x);
            }
            const __m512i low = _mm512_packs_epi32(whole[0], whole[1]), high = _mm512_packs_epi32(whole[2], whole[3]);
            _mm512_storeu_si512(codes + at, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
            if (_mm512_cmp_ps_mask(farthest, half, _CMP_GT_OQ)) divided_to_codes(input + 4 * at, 64, scale, codes + at);
        }
    }
    divided_to_codes(input + 4 * at, n - at, scale, codes + at);
}

#else

INLINE void to_codes(const uint8_t* input, size_t n, float scale, int8_t* codes) {
    divided_to_codes(input, n, scale, codes);
}

#endif

}  // namespace multiplying
TRICOMP_END
