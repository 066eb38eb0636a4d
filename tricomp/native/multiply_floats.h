// Products of float rows with integer weights that become floats, for as long as they are used. Stage header: no STL.
//
// Few rows are multiplied side by side with weights; many stand in panels, a row in each lane, as codes do. The hard
// thing: floats take four times the room of codes, so panels are gone through by parts that stay in the cache.
#pragma once

#include "multiply_panels.h"
#include "multiply_plain.h"

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t FLOAT_ROWS = 4, TILE = 4;  // rows and outputs at a time, of few rows
constexpr size_t FLOAT_VECTORS = TRICOMP_HAS_AVX512 ? 4 : 2, FLOAT_PANEL = FLOAT_VECTORS * LANES;  // rows of a panel
constexpr size_t FLOAT_PART = 512;  // inputs of a panel that stay in the cache

// ---- Weights to floats

// Codes of 4 bits, the first in the low bits of a byte.
INLINE void nibbles_to_floats(const uint8_t* codes, size_t n, float scale, float* floats) {
    size_t i = 0;
#if TRICOMP_HAS_AVX512
    const __m512i lows = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i highs = _mm512_add_epi32(lows, _mm512_set1_epi32(8));
    for (; i + 32 <= n; i += 32) {
        const __m512i two = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
        const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(two, 28), 28);
        const __m512i odd = _mm512_srai_epi32(_mm512_slli_epi32(two, 24), 28);
        const __m512 scales = _mm512_set1_ps(scale);
        const __m512 first = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(even, lows, odd));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(even, highs, odd));
        _mm512_storeu_ps(floats + i, _mm512_mul_ps(first, scales));
        _mm512_storeu_ps(floats + i + 16, _mm512_mul_ps(second, scales));
    }
#endif
    for (; i < n; i++) {
        const uint32_t two = codes[i / 2];
        floats[i] = float(int32_t(two << (i % 2 ? 24 : 28)) >> 28) * scale;
    }
}

// Weights first to last of an output; first is a multiple of 16.
INLINE void to_floats(const Multiplying& task, size_t output, size_t first, size_t last, float* floats) {
    const uint8_t* codes = task.codes + output * task.row_bytes();
    const uint8_t* scales = task.scales + output * task.scale_bytes();
    const size_t each = task.has_groups() ? task.group : task.n_in;
    for (size_t at = first; at < last;) {
        const size_t i_group = at / each, end = (i_group + 1) * each < last ? (i_group + 1) * each : last;
        const float scale = scale_at(task.scale_format, scales, i_group);
        float* to = floats + (at - first);
        if (task.bits == 8)
            for (size_t i = 0; i < end - at; i++) to[i] = float(int8_t(codes[at + i])) * scale;
        else
            nibbles_to_floats(codes + at / 2, end - at, scale, to);
        at = end;
    }
}

// ---- Few rows

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

INLINE void multiply_few_floats(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first,
                                size_t last, uint8_t* scratch, uint8_t* out) {
    const size_t n = rounded_up(task.n_in, 16);
    float* weights = reinterpret_cast<float*>(scratch);
    for (size_t o = 0; o < TILE; o++)
        for (size_t i = task.n_in; i < n; i++) weights[o * n + i] = 0;
    for (size_t at = first; at < last; at += TILE) {
        const size_t n_here = last - at < TILE ? last - at : TILE;
        for (size_t o = 0; o < n_here; o++) to_floats(task, at + o, 0, task.n_in, weights + o * n);
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

// ---- Many rows

// A panel: float[n_in][vectors * LANES], rows in lanes, 0 beyond n_rows.
INLINE size_t float_vectors(size_t n_rows) { return (n_rows + LANES - 1) / LANES; }

INLINE void lay_out_floats(const Multiplying& task, const uint8_t* input, size_t n_rows, uint8_t* panel) {
    const size_t width = float_vectors(n_rows) * LANES;
#if TRICOMP_HAS_AVX512
    for (size_t row = 0; row < width; row += 16) {
        for (size_t at = 0; at < task.n_in; at += 16) {
            const size_t n_here = task.n_in - at < 16 ? task.n_in - at : 16;
            __m512i words[16];
            for (size_t r = 0; r < 16; r++) {
                const __mmask16 mask = row + r < n_rows ? __mmask16((1u << n_here) - 1) : __mmask16(0);
                words[r] = _mm512_maskz_loadu_epi32(mask, input + 4 * ((row + r) * task.n_in + at));
            }
            turn_round(words);
            for (size_t i = 0; i < n_here; i++) _mm512_store_si512(panel + 4 * ((at + i) * width + row), words[i]);
        }
    }
#else
    float* to = reinterpret_cast<float*>(panel);
    for (size_t r = 0; r < width; r++)
        for (size_t i = 0; i < task.n_in; i++) to[i * width + r] = r < n_rows ? float_at(input, r * task.n_in + i) : 0.0f;
#endif
}

// n_here inputs of C vectors of rows by O outputs, whose weights stand FLOAT_PART apart: float found[O][PANEL_ROWS], added
// to unless is_first.
template <size_t C, size_t O>
INLINE void float_panel_tile(const float* panel, const float* weights, size_t n_here, bool is_first, float* found) {
    Floats sums[O][C];
    UNROLLED for (size_t o = 0; o < O; o++)
        UNROLLED for (size_t c = 0; c < C; c++) {
            sums[o][c] = Floats{};
            if (!is_first) memcpy(&sums[o][c], found + o * PANEL_ROWS + c * LANES, sizeof(Floats));
        }
    for (size_t i = 0; i < n_here; i++) {
        Floats x[C];
        UNROLLED for (size_t c = 0; c < C; c++) memcpy(&x[c], panel + (i * C + c) * LANES, sizeof(Floats));
        UNROLLED for (size_t o = 0; o < O; o++) {
            const Floats w = weights[o * FLOAT_PART + i] - Floats{};
            UNROLLED for (size_t c = 0; c < C; c++) sums[o][c] = multiplied(x[c], w, sums[o][c]);
        }
    }
    UNROLLED for (size_t o = 0; o < O; o++)
        UNROLLED for (size_t c = 0; c < C; c++)
            memcpy(found + o * PANEL_ROWS + c * LANES, &sums[o][c], sizeof(Floats));
}

template <size_t C>
static void float_panel_by_outputs(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first,
                                   size_t last, uint8_t* scratch, const Places& places) {
    constexpr size_t O = TRICOMP_HAS_AVX512 ? (C > 2 ? 6 : 8) : 4;  // sums fit the registers
    static_assert(STRIP % O == 0, "strips are made of tiles");
    const float* panel = reinterpret_cast<const float*>(prepared);
    float* weights = reinterpret_cast<float*>(scratch);
    alignas(64) float found[STRIP * PANEL_ROWS];
    for (size_t strip = first; strip < last; strip += STRIP) {
        const size_t n_held = last - strip < STRIP ? last - strip : STRIP;
        for (size_t part = 0; part < task.n_in; part += FLOAT_PART) {
            const size_t end = task.n_in - part < FLOAT_PART ? task.n_in : part + FLOAT_PART;
            for (size_t at = 0; at < n_held; at += O) {
                for (size_t o = 0; o < O; o++) {  // beyond the last: the last again, not kept
                    const size_t output = strip + at + o < last ? strip + at + o : last - 1;
                    to_floats(task, output, part, end, weights + o * FLOAT_PART);
                }
                float_panel_tile<C, O>(panel + part * C * LANES, weights, end - part, part == 0, found + at * PANEL_ROWS);
            }
        }
        for (size_t o = 0; task.bias != nullptr && o < n_held; o++)
            for (size_t m = 0; m < n_rows; m++) found[o * PANEL_ROWS + m] += float_at(task.bias, strip + o);
        put_strip(found, n_rows, n_held, places.of(0, strip));
    }
}

INLINE void multiply_float_panel(const Multiplying& task, const uint8_t* panel, size_t n_rows, size_t first, size_t last,
                                 uint8_t* scratch, const Places& places) {
    const size_t n_vectors = float_vectors(n_rows);
    n_vectors == 1   ? float_panel_by_outputs<1>(task, panel, n_rows, first, last, scratch, places)
    : n_vectors == 2 ? float_panel_by_outputs<2>(task, panel, n_rows, first, last, scratch, places)
    : n_vectors == 3 ? float_panel_by_outputs<FLOAT_VECTORS == 4 ? 3 : 2>(task, panel, n_rows, first, last, scratch, places)
                     : float_panel_by_outputs<FLOAT_VECTORS>(task, panel, n_rows, first, last, scratch, places);
}

}  // namespace multiplying
TRICOMP_END
