// Products of many rows of codes with integer weights: a panel of up to 64 rows at a time, a lane for each row. Needs
// AVX512 with VNNI; multiply_plain.h has the same functions for other processors. Stage header: no STL.
//
// Weights are read as they are saved, 4 bytes of an output at a time, for all rows at once, so no sum runs across lanes and
// nobody lays weights out anew. The hard thing: VNNI multiplies unsigned by signed bytes, so weights are made unsigned by
// adding 128 (or 8) as they are read; sums start at what that adds, taken off: of a row, or of a row in a group.
#pragma once

#include "multiply_codes.h"

#if TRICOMP_HAS_AVX512

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t PANEL_ROWS = 64;
constexpr size_t STRIP = 48;  // outputs that are kept until 16 rows of 16 are turned round

// A panel: float scales[64] and int32 starts[64] of its rows, 0 beyond n_rows; then in steps, of 4 bytes of weights each,
// 4 codes of each row, rows in lanes, by 16 rows: int8[steps][vectors][16][4]. At 4 bits the 4 codes of even places of a
// step are followed by those of odd places, which takes as much again. In groups: int32 starts[groups][vectors][16].
constexpr size_t PANEL_HEAD = PANEL_ROWS * 8;

INLINE size_t panel_steps(const Multiplying& task) { return (task.row_bytes() + 3) / 4; }
INLINE size_t panel_step_bytes(const Multiplying& task) { return task.bits == 8 ? 64 : 128; }  // of 16 rows
INLINE size_t panel_vectors(size_t n_rows) { return (n_rows + 15) / 16; }

// Bytes of a panel, which starts at a multiple of MULTIPLY_ALIGN.
INLINE size_t panel_bytes(const Multiplying& task) {
    const size_t starts = task.has_groups() ? task.n_groups() * 64 : 0;
    return PANEL_HEAD + PANEL_ROWS / 16 * (panel_steps(task) * panel_step_bytes(task) + starts);
}

// Lanes of rows become rows of lanes: 16 vectors of 16 words of 32 bits.
INLINE void turn_round(__m512i* v) {
    __m512i pairs[16], fours[16];
    for (size_t i = 0; i < 8; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (size_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < 2; j++) {
            fours[4 * i + 2 * j] = _mm512_unpacklo_epi64(pairs[4 * i + j], pairs[4 * i + 2 + j]);
            fours[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[4 * i + j], pairs[4 * i + 2 + j]);
        }
    }
    for (size_t i = 0; i < 4; i++) {  // fours[4 * k + i]: words i of each quarter, of vectors 4 * k to 4 * k + 3
        const __m512i low = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xDD);
        const __m512i low_2 = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
        const __m512i high_2 = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xDD);
        v[i] = _mm512_shuffle_i32x4(low, low_2, 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(high, high_2, 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(low, low_2, 0xDD);
        v[12 + i] = _mm512_shuffle_i32x4(high, high_2, 0xDD);
    }
}

// Rows 16 * i to 16 * i + 15 of a panel of n_rows, of which n_here are there. codes: int8[n_here][stride].
INLINE void lay_sixteen(const Multiplying& task, const int8_t* codes, size_t stride, size_t n_here, size_t i, size_t n_rows,
                        uint8_t* panel) {
    const size_t n_steps = panel_steps(task), step_bytes = panel_step_bytes(task) * panel_vectors(n_rows);
    const __m512i even_then_odd = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    uint8_t* to = panel + PANEL_HEAD + i * 64;
    for (size_t at = 0; at < task.n_in; at += 64) {
        const size_t left = task.n_in - at;
        const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        __m512i words[16];
        for (size_t r = 0; r < 16; r++) {
            words[r] = r < n_here ? _mm512_maskz_loadu_epi8(mask, codes + r * stride + at) : _mm512_setzero_si512();
            if (task.bits == 4) words[r] = _mm512_shuffle_epi8(words[r], even_then_odd);
        }
        turn_round(words);
        const size_t first = task.bits == 8 ? at / 4 : at / 8, n_vectors = panel_vectors(n_rows);
        for (size_t w = 0; w < 16; w++) {
            const size_t step = first + (task.bits == 8 ? w : w / 2);
            if (step >= n_steps) break;
            const size_t odd = task.bits == 4 && w % 2 ? n_vectors * 64 : 0;
            _mm512_store_si512(to + step * step_bytes + odd, words[w]);
        }
    }
}

// What sums of steps first to last start at, of the 16 rows of vector i: -128 (or -8) times the sum of their codes.
INLINE __m512i start_of(const Multiplying& task, const uint8_t* panel, size_t n_vectors, size_t i, size_t first, size_t last) {
    const size_t n_halves = task.bits == 8 ? 1 : 2;
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (size_t at = first * n_halves; at < last * n_halves; at++)
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(panel + PANEL_HEAD + (at * n_vectors + i) * 64));
    return _mm512_mullo_epi32(sum, _mm512_set1_epi32(-offset_of(task)));
}

INLINE size_t group_steps(const Multiplying& task) {  // a group is a multiple of 16 codes
    return task.has_groups() ? task.group * task.bits / 32 : panel_steps(task);
}

// The rest of a panel, after all its rows. scales: float[n_rows], what the codes of each row are multiplied by.
INLINE void lay_heads(const Multiplying& task, const float* scales, size_t n_rows, uint8_t* panel) {
    const size_t n_vectors = panel_vectors(n_rows), n_steps = panel_steps(task), each = group_steps(task);
    memset(panel, 0, PANEL_HEAD);
    memcpy(panel, scales, 4 * n_rows);
    uint8_t* starts = panel + PANEL_ROWS * 4;
    if (task.has_groups()) starts = panel + PANEL_HEAD + n_steps * panel_step_bytes(task) * n_vectors;
    for (size_t first = 0; first < n_steps; first += each) {
        const size_t last = n_steps - first < each ? n_steps : first + each;
        for (size_t i = 0; i < n_vectors; i++, starts += 64)
            _mm512_store_si512(starts, start_of(task, panel, n_vectors, i, first, last));
    }
}

// Codes int8[n_rows][stride], of which n_in are used, as a panel; n_rows at most PANEL_ROWS. scales: of each row.
INLINE void lay_out(const Multiplying& task, const int8_t* codes, size_t stride, const float* scales, size_t n_rows,
                    uint8_t* panel) {
    for (size_t i = 0; 16 * i < n_rows; i++) {
        const size_t n_here = n_rows - 16 * i < 16 ? n_rows - 16 * i : 16;
        lay_sixteen(task, codes + 16 * i * stride, stride, n_here, i, n_rows, panel);
    }
    lay_heads(task, scales, n_rows, panel);
}

// ---- Panels by outputs

// 4 bytes of weights, for all lanes; n_held of them at the end of a row, where no more may be read.
INLINE __m512i four_bytes(const uint8_t* from, size_t n_held) {
    uint32_t bytes = 0;
    memcpy(&bytes, from, n_held);
    return _mm512_set1_epi32(int32_t(bytes));
}

// One step of C vectors of rows by O outputs.
template <size_t C, size_t O, uint32_t BITS>
INLINE void panel_step(const uint8_t* codes, const uint8_t* const* weights, size_t at, size_t n_held, __m512i (*sums)[C]) {
    const __m512i flip = _mm512_set1_epi8(BITS == 8 ? int8_t(-128) : int8_t(0x88)), low = _mm512_set1_epi8(15);
    __m512i x[C], odd[C];
    UNROLLED for (size_t c = 0; c < C; c++) x[c] = _mm512_load_si512(codes + c * 64);
    UNROLLED for (size_t c = 0; BITS == 4 && c < C; c++) odd[c] = _mm512_load_si512(codes + (C + c) * 64);
    UNROLLED for (size_t o = 0; o < O; o++) {
        const __m512i w = _mm512_xor_si512(four_bytes(weights[o] + at, n_held), flip);
        if (BITS == 8) {
            UNROLLED for (size_t c = 0; c < C; c++) sums[o][c] = _mm512_dpbusd_epi32(sums[o][c], w, x[c]);
        } else {
            const __m512i even_codes = _mm512_and_si512(w, low);
            const __m512i odd_codes = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
            UNROLLED for (size_t c = 0; c < C; c++) sums[o][c] = _mm512_dpbusd_epi32(sums[o][c], even_codes, x[c]);
            UNROLLED for (size_t c = 0; c < C; c++) sums[o][c] = _mm512_dpbusd_epi32(sums[o][c], odd_codes, odd[c]);
        }
    }
}

// All rows of a panel, in C vectors, by O outputs: float found[O][64], scaled, with bias. weights, scales: of each output.
template <size_t C, size_t O, uint32_t BITS, bool IN_GROUPS>
INLINE void panel_tile(const Multiplying& task, const uint8_t* panel, const uint8_t* const* weights,
                       const uint8_t* const* scales, const float* biases, const uint8_t* ahead, float* found) {
    constexpr size_t STEP_BYTES = (BITS == 8 ? 64 : 128) * C;
    const size_t n_steps = panel_steps(task), each = group_steps(task), n_whole = task.row_bytes() / 4;
    const uint8_t* codes = panel + PANEL_HEAD;
    const uint8_t* starts = IN_GROUPS ? codes + n_steps * STEP_BYTES : panel + PANEL_ROWS * 4;
    for (size_t step = 0, i_group = 0; step < n_steps; i_group++) {
        const size_t end = n_steps - step < each ? n_steps : step + each, whole = end < n_whole ? end : n_whole;
        __m512i sums[O][C];
        UNROLLED for (size_t c = 0; c < C; c++) {
            const __m512i start = _mm512_load_si512(starts + (i_group * C + c) * 64);
            UNROLLED for (size_t o = 0; o < O; o++) sums[o][c] = start;
        }
        for (; step + 4 <= whole; step += 4) {
            for (size_t line = 0; line < (O + 3) / 4; line++)
                _mm_prefetch(reinterpret_cast<const char*>(ahead + step * 4 * O + line * 64), _MM_HINT_T0);
            UNROLLED for (size_t i = 0; i < 4; i++)
                panel_step<C, O, BITS>(codes + (step + i) * STEP_BYTES, weights, (step + i) * 4, 4, sums);
        }
        for (; step < whole; step++) panel_step<C, O, BITS>(codes + step * STEP_BYTES, weights, step * 4, 4, sums);
        if (step < end) {
            panel_step<C, O, BITS>(codes + step * STEP_BYTES, weights, step * 4, task.row_bytes() - step * 4, sums);
            step++;
        }
        UNROLLED for (size_t o = 0; o < O; o++) {
            const __m512 scale = _mm512_set1_ps(scale_at(task.scale_format, scales[o], i_group));
            const __m512 bias = _mm512_set1_ps(biases[o]);
            UNROLLED for (size_t c = 0; c < C; c++) {
                float* to = found + o * PANEL_ROWS + c * 16;
                const __m512 sum = _mm512_cvtepi32_ps(sums[o][c]), factors = _mm512_load_ps(panel + c * 64);
                __m512 scaled;  // of groups so far: floats have no room in registers
                if (IN_GROUPS && i_group)
                    scaled = _mm512_fmadd_ps(sum, scale, _mm512_load_ps(to));
                else
                    scaled = _mm512_mul_ps(sum, scale);
                _mm512_store_ps(to, end < n_steps ? scaled : _mm512_fmadd_ps(scaled, factors, bias));
            }
        }
    }
}

// Puts found, float[n_outputs][64], where it belongs.
INLINE void put_strip(const float* found, size_t n_rows, size_t n_outputs, const Places& places) {
    if (places.row == 1) {
        for (size_t o = 0; o < n_outputs; o++) memcpy(places.of(0, o).at, found + o * PANEL_ROWS, 4 * n_rows);
        return;
    }
    for (size_t first = 0; first < n_outputs; first += 16) {
        const size_t n_here = n_outputs - first < 16 ? n_outputs - first : 16;
        const __mmask16 mask = __mmask16((1u << n_here) - 1);
        for (size_t row = 0; row < n_rows; row += 16) {
            __m512i words[16];
            for (size_t o = 0; o < 16; o++) words[o] = _mm512_loadu_si512(found + (first + o) * PANEL_ROWS + row);
            turn_round(words);
            uint8_t* to = places.of(row, first).at;
            if (places.output == 1 && n_here == 16 && n_rows - row >= 16) {
                for (size_t r = 0; r < 16; r++) _mm512_storeu_si512(to + 4 * r * places.row, words[r]);
                continue;
            }
            for (size_t r = 0; r < 16 && row + r < n_rows; r++, to += 4 * places.row) {
                if (places.output == 1) {
                    _mm512_mask_storeu_epi32(to, mask, words[r]);
                } else {
                    uint32_t each[16];
                    _mm512_storeu_si512(each, words[r]);
                    for (size_t o = 0; o < n_here; o++) memcpy(to + 4 * o * places.output, each + o, 4);
                }
            }
        }
    }
}

template <size_t C, size_t O, uint32_t BITS, bool IN_GROUPS>
INLINE void panel_outputs(const Multiplying& task, const uint8_t* panel, size_t n_rows, size_t first, size_t last,
                          const Places& places) {
    static_assert(STRIP % O == 0, "strips are made of tiles");
    alignas(64) float found[STRIP * PANEL_ROWS];
    for (size_t strip = first; strip < last; strip += STRIP) {
        const size_t n_held = last - strip < STRIP ? last - strip : STRIP;
        for (size_t at = 0; at < n_held; at += O) {
            if (places.output == 1)  // what is to be written comes to the cache in time, some rows with each tile
                for (size_t row = at * PANEL_ROWS / STRIP; row < (at + O) * PANEL_ROWS / STRIP && row < n_rows; row++)
                    for (size_t line = 0; line < STRIP; line += 16)
                        _mm_prefetch(reinterpret_cast<const char*>(places.of(row, strip + line).at), _MM_HINT_T1);
            const uint8_t *weights[O], *scales[O];
            float biases[O];
            for (size_t o = 0; o < O; o++) {  // beyond the last: the last again, not kept
                const size_t output = strip + at + o < last ? strip + at + o : last - 1;
                weights[o] = task.codes + output * task.row_bytes();
                scales[o] = task.scales + output * task.scale_bytes();
                biases[o] = task.bias == nullptr ? 0.0f : float_at(task.bias, output);
            }
            panel_tile<C, O, BITS, IN_GROUPS>(task, panel, weights, scales, biases, weights[0] + O * task.row_bytes(),
                                              found + at * PANEL_ROWS);
        }
        put_strip(found, n_rows, n_held, places.of(0, strip));
    }
}

template <size_t C>
static void panel_vectors_by_outputs(const Multiplying& task, const uint8_t* panel, size_t n_rows, size_t first, size_t last,
                                     const Places& places) {
    constexpr size_t O = C == 1 ? 8 : C == 2 ? 6 : 4;  // sums fit the registers
    if (task.bits == 8)
        task.has_groups() ? panel_outputs<C, O, 8, true>(task, panel, n_rows, first, last, places)
                          : panel_outputs<C, O, 8, false>(task, panel, n_rows, first, last, places);
    else
        task.has_groups() ? panel_outputs<C, O, 4, true>(task, panel, n_rows, first, last, places)
                          : panel_outputs<C, O, 4, false>(task, panel, n_rows, first, last, places);
}

// The rows of a panel by outputs first to last. places: of row 0 of the panel and output 0.
INLINE void multiply_panel(const Multiplying& task, const uint8_t* panel, size_t n_rows, size_t first, size_t last,
                           const Places& places) {
    const size_t n_vectors = panel_vectors(n_rows);
    n_vectors == 1   ? panel_vectors_by_outputs<1>(task, panel, n_rows, first, last, places)
    : n_vectors == 2 ? panel_vectors_by_outputs<2>(task, panel, n_rows, first, last, places)
    : n_vectors == 3 ? panel_vectors_by_outputs<3>(task, panel, n_rows, first, last, places)
                     : panel_vectors_by_outputs<4>(task, panel, n_rows, first, last, places);
}

}  // namespace multiplying
TRICOMP_END

#endif
