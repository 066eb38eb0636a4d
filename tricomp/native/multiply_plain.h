// Products of panels of rows of codes with integer weights, for any processor: the functions of multiply_panels.h where
// there is no VNNI. Stage header: no STL.
#pragma once

#include "multiply_codes.h"

#if !TRICOMP_HAS_AVX512

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t PANEL_ROWS = 64;
constexpr size_t STRIP = 48;
constexpr size_t PANEL_CODES = 512;  // codes of weights that are unpacked at a time

// A panel: float scales[64], then int8 codes[64][padded].
constexpr size_t PANEL_HEAD = PANEL_ROWS * 4;

INLINE size_t padded(const Multiplying& task) { return rounded_up(task.n_in, 64); }
INLINE size_t panel_bytes(const Multiplying& task) { return PANEL_HEAD + PANEL_ROWS * padded(task); }

INLINE void lay_out(const Multiplying& task, const int8_t* codes, size_t stride, const float* scales, size_t n_rows,
                    uint8_t* panel) {
    memcpy(panel, scales, 4 * n_rows);
    for (size_t r = 0; r < n_rows; r++) memcpy(panel + PANEL_HEAD + r * padded(task), codes + r * stride, task.n_in);
}

INLINE void unpack(const uint8_t* from, size_t n, int8_t* codes) {
    for (size_t i = 0; i < n; i++) {
        const int8_t two = int8_t(from[i / 2]);
        codes[i] = int8_t(i % 2 ? two >> 4 : int8_t(uint8_t(two) << 4) >> 4);
    }
}

INLINE int32_t dot(const int8_t* a, const int8_t* b, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += int32_t(a[i]) * int32_t(b[i]);
    return sum;
}

INLINE void multiply_panel(const Multiplying& task, const uint8_t* panel, size_t n_rows, size_t first, size_t last,
                           const Places& places) {
    const size_t n_each = task.has_groups() ? task.group : task.n_in;
    const int8_t* rows = reinterpret_cast<const int8_t*>(panel + PANEL_HEAD);
    for (size_t o = first; o < last; o++) {
        const uint8_t* weights = task.codes + o * task.row_bytes();
        const uint8_t* scales = task.scales + o * task.scale_bytes();
        float found[PANEL_ROWS] = {};
        for (size_t begin = 0, i_group = 0; begin < task.n_in; begin += n_each, i_group++) {
            const size_t end = task.n_in - begin < n_each ? task.n_in : begin + n_each;
            int32_t sums[PANEL_ROWS] = {};
            for (size_t at = begin; at < end; at += PANEL_CODES) {
                const size_t n = end - at < PANEL_CODES ? end - at : PANEL_CODES;
                int8_t unpacked[PANEL_CODES];
                const int8_t* codes = reinterpret_cast<const int8_t*>(weights + at);
                if (task.bits == 4) {
                    unpack(weights + at / 2, n, unpacked);
                    codes = unpacked;
                }
                for (size_t m = 0; m < n_rows; m++) sums[m] += dot(rows + m * padded(task) + at, codes, n);
            }
            const float scale = scale_at(task.scale_format, scales, i_group);
            for (size_t m = 0; m < n_rows; m++) found[m] += float(sums[m]) * scale;
        }
        const float bias = task.bias == nullptr ? 0.0f : float_at(task.bias, o);
        for (size_t m = 0; m < n_rows; m++) {
            const float sum = found[m] * float_at(panel, m) + bias;
            memcpy(places.of(m, o).at, &sum, 4);
        }
    }
}

// Puts found, float[n_outputs][64], where it belongs.
INLINE void put_strip(const float* found, size_t n_rows, size_t n_outputs, const Places& places) {
    for (size_t m = 0; m < n_rows; m++)
        for (size_t o = 0; o < n_outputs; o++) memcpy(places.of(m, o).at, found + o * PANEL_ROWS + m, 4);
}

}  // namespace multiplying
TRICOMP_END

#endif
