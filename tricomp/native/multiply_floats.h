// Products of float rows with integer weights that become floats, some outputs at a time. Stage header: no STL.
#pragma once

#include "multiply_codes.h"

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t FLOAT_ROWS = 4, TILE = 4;  // rows and outputs at a time

INLINE void to_floats(const Multiplying& task, size_t output, float* floats) {
    const uint8_t* codes = task.codes + output * task.row_bytes();
    const uint8_t* scales = task.scales + output * task.scale_bytes();
    const size_t each = task.has_groups() ? task.group : task.n_in;
    for (size_t at = 0, i_group = 0; at < task.n_in; at += each, i_group++) {
        const float scale = scale_at(task.scale_format, scales, i_group);
        const size_t n = task.n_in - at < each ? task.n_in - at : each;
        if (task.bits == 8) {
            for (size_t i = 0; i < n; i++) floats[at + i] = float(int8_t(codes[at + i])) * scale;
        } else {
            for (size_t i = 0; i < n / 2; i++) {
                const uint8_t two = codes[at / 2 + i];
                floats[at + 2 * i] = float(int32_t(uint32_t(two) << 28) >> 28) * scale;
                floats[at + 2 * i + 1] = float(int32_t(int8_t(two)) >> 4) * scale;
            }
            if (n % 2) floats[at + n - 1] = float(int32_t(uint32_t(codes[(at + n) / 2]) << 28) >> 28) * scale;
        }
    }
}

// a * b + c; in one rounding where there is an instruction for it.
INLINE Floats multiplied(const Floats& a, const Floats& b, const Floats& c) {
#if TRICOMP_HAS_AVX512
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif TRICOMP_HAS_AVX2
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
}

INLINE float sum_of(const Floats& lanes) {
    float sum = 0;
    for (size_t i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

template <size_t M>
INLINE void float_tile(const float* const* rows, const float* weights, size_t n, float (*sums)[TILE]) {
    Floats lanes[M][TILE] = {};
    for (size_t i = 0; i < n; i += LANES) {
        Floats w[TILE], x;
        for (size_t o = 0; o < TILE; o++) memcpy(&w[o], weights + o * n + i, sizeof x);
        for (size_t m = 0; m < M; m++) {
            memcpy(&x, rows[m] + i, sizeof x);
            for (size_t o = 0; o < TILE; o++) lanes[m][o] = multiplied(x, w[o], lanes[m][o]);
        }
    }
    for (size_t m = 0; m < M; m++)
        for (size_t o = 0; o < TILE; o++) sums[m][o] = sum_of(lanes[m][o]);
}

INLINE void multiply_floats(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first, size_t last,
                            uint8_t* scratch, uint8_t* out) {
    const size_t n = rounded_up(task.n_in, 16);
    float* weights = reinterpret_cast<float*>(scratch);
    for (size_t o = 0; o < TILE; o++)
        for (size_t i = task.n_in; i < n; i++) weights[o * n + i] = 0;
    for (size_t at = first; at < last; at += TILE) {
        const size_t n_here = last - at < TILE ? last - at : TILE;
        for (size_t o = 0; o < n_here; o++) to_floats(task, at + o, weights + o * n);
        for (size_t m = 0; m < n_rows; m += FLOAT_ROWS) {
            const float* rows[FLOAT_ROWS];
            const size_t n_held = n_rows - m < FLOAT_ROWS ? n_rows - m : FLOAT_ROWS;
            for (size_t r = 0; r < FLOAT_ROWS; r++)  // beyond the last: the last again, not kept
                rows[r] = reinterpret_cast<const float*>(prepared + (m + (r < n_held ? r : n_held - 1)) * n * 4);
            float sums[FLOAT_ROWS][TILE];
            if (n_held == 1)
                float_tile<1>(rows, weights, n, sums);
            else
                float_tile<FLOAT_ROWS>(rows, weights, n, sums);
            for (size_t r = 0; r < n_held; r++) {
                for (size_t o = 0; o < n_here; o++) {
                    const float sum = sums[r][o] + (task.bias == nullptr ? 0.0f : float_at(task.bias, at + o));
                    memcpy(out + 4 * ((m + r) * task.n_out + at + o), &sum, 4);
                }
            }
        }
    }
}

}  // namespace multiplying
TRICOMP_END
