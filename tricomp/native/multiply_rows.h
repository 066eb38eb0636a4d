// Products of few rows of codes with integer weights: rows of both are read side by side. Stage header: no STL.
//
// Weights are read as they are saved. The hard thing: VNNI multiplies unsigned by signed bytes, so weights are made
// unsigned by adding 128 (or 8) as they are read, and 128 times the sum of the inputs is taken off again: once a row where
// a row has one scale; in groups, lane by lane before each step.
#pragma once

#include "multiply_codes.h"

#if TRICOMP_HAS_AVX512

TRICOMP_BEGIN
namespace multiplying {

constexpr size_t ROWS = 4;  // rows at a time, where there is more than one

// A prepared row of codes: its head, int8[padded(n_in)], 0 beyond n_in; then in groups int32[padded / 4 or / 8], what each
// lane of each step starts at. At 4 bits codes stand 64 of even places before 64 of odd ones, as weights come apart.
struct Head {
    float scale;
    int32_t sum;
    uint8_t rest[56];
};
static_assert(sizeof(Head) == MULTIPLY_ALIGN, "rows stay aligned");

INLINE size_t step_of(const Multiplying& task) { return task.bits == 8 ? 64 : 128; }  // codes in 64 bytes of weights
INLINE size_t padded(const Multiplying& task) { return rounded_up(task.n_in, step_of(task)); }

INLINE void prepare_codes(const Multiplying& task, const uint8_t* input, uint8_t* prepared) {
    const size_t n = padded(task);
    Head head = {};
    head.scale = scale_of(input, task.n_in);
    int8_t* codes = reinterpret_cast<int8_t*>(prepared + sizeof head);
    if (task.bits == 8) {
        to_codes(input, task.n_in, head.scale, codes);
        memset(codes + task.n_in, 0, n - task.n_in);
    } else {
        int8_t block[128];
        for (size_t at = 0; at < n; at += 128) {
            const size_t held = task.n_in - at < 128 ? task.n_in - at : 128;
            memset(block, 0, sizeof block);
            to_codes(input + 4 * at, held, head.scale, block);
            for (size_t i = 0; i < 64; i++) {
                codes[at + i] = block[2 * i];
                codes[at + 64 + i] = block[2 * i + 1];
            }
        }
    }
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += codes[i];
    head.sum = sum;
    if (task.has_groups()) {
        uint8_t* starts = prepared + sizeof head + n;
        for (size_t at = 0; at < n; at += step_of(task)) {
            for (size_t lane = 0; lane < 16; lane++) {
                int32_t inside = 0;
                for (size_t i = 4 * lane; i < 4 * lane + 4; i++)
                    inside += codes[at + i] + (task.bits == 4 ? codes[at + 64 + i] : 0);
                inside *= -offset_of(task);
                memcpy(starts, &inside, 4);
                starts += 4;
            }
        }
    }
    memcpy(prepared, &head, sizeof head);
}

INLINE size_t code_bytes(const Multiplying& task) {
    const size_t starts = task.has_groups() ? padded(task) / step_of(task) * 64 : 0;
    return sizeof(Head) + padded(task) + starts;
}

// Sums of the lanes of 16 vectors, in their order.
INLINE __m512i sums_of(const __m512i* v) {
    __m512i pairs[8], fours[4], eights[2];
    for (size_t i = 0; i < 8; i++)
        pairs[i] = _mm512_add_epi32(
            _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (size_t i = 0; i < 4; i++)
        fours[i] = _mm512_add_epi32(
            _mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]), _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    for (size_t i = 0; i < 2; i++)
        eights[i] = _mm512_add_epi32(
            _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x88),
            _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xDD));
    return _mm512_add_epi32(
        _mm512_shuffle_i32x4(eights[0], eights[1], 0x88), _mm512_shuffle_i32x4(eights[0], eights[1], 0xDD));
}

INLINE __m512 float_sums_of(const __m512* v) {
    __m512 pairs[8], fours[4], eights[2];
    for (size_t i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(
            _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (size_t i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (size_t i = 0; i < 2; i++)
        eights[i] = _mm512_add_ps(
            _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
            _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xDD));
    return _mm512_add_ps(
        _mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xDD));
}

// Up to 16 scales in a row, 0 beyond n.
INLINE __m512 scales_from(FloatFormat format, const uint8_t* from, size_t n) {
    const __mmask16 mask = n >= 16 ? 0xFFFF : __mmask16((1u << n) - 1);
    if (format == FloatFormat::FLOAT32) return _mm512_maskz_loadu_ps(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// The scales of the 16 lanes of a step: lane i holds codes of the group first + picks[i].
INLINE __m512 lane_scales(const Multiplying& task, const uint8_t* scales, size_t first, __m512i picks) {
    const uint8_t* from = scales + first * float_bytes(task.scale_format);
    return _mm512_permutexvar_ps(picks, scales_from(task.scale_format, from, task.n_groups() - first));
}

// What lane m * O + o of a tile holds of row m, or of output o.
template <size_t M>
INLINE __m512i lanes_of_rows() {
    return _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), M == 1 ? 4 : 2);
}

template <size_t M>
INLINE __m512 by_output(__m512 of_outputs) {
    return M == 1 ? of_outputs : _mm512_shuffle_f32x4(of_outputs, of_outputs, 0);
}

// M rows, of which n_held are kept, by 16 / M outputs, of which n_outputs are. BITS of a weight; IN_GROUPS: whether scales
// change within a row. out: of the first row.
template <size_t M, uint32_t BITS, bool IN_GROUPS>
INLINE void code_tile(const Multiplying& task, const uint8_t* const* rows, const uint8_t* const* weights,
                      const uint8_t* const* scales, size_t output, size_t n_held, size_t n_outputs, uint8_t* out) {
    constexpr size_t O = 16 / M, STEP = BITS == 8 ? 64 : 128;
    const __m512i flip = _mm512_set1_epi8(BITS == 8 ? int8_t(-128) : 8), low = _mm512_set1_epi8(15);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const size_t n_bytes = task.row_bytes(), n = padded(task);
    __m512i whole[16];
    __m512 scaled[16];
    UNROLLED for (size_t i = 0; i < 16; i++) {
        whole[i] = _mm512_setzero_si512();
        scaled[i] = _mm512_setzero_ps();
    }
    // One row of input: memory is what it waits for, so each row of weights is read to its end.
    for (size_t o = 0; M == 1 && !IN_GROUPS && o < O; o++) {
        __m512i sum = _mm512_setzero_si512();
        size_t at = 0, i_byte = 0;
        for (; i_byte + 64 <= n_bytes; at += STEP, i_byte += 64) {
            const uint8_t* codes = rows[0] + sizeof(Head) + at;
            const __m512i w = _mm512_loadu_si512(weights[o] + i_byte);
            const __m512i even = _mm512_xor_si512(BITS == 8 ? w : _mm512_and_si512(w, low), flip);
            sum = _mm512_dpbusd_epi32(sum, even, _mm512_load_si512(codes));
            if (BITS == 4) {
                const __m512i odd = _mm512_xor_si512(_mm512_and_si512(_mm512_srli_epi16(w, 4), low), flip);
                sum = _mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(codes + 64));
            }
        }
        if (i_byte < n_bytes) {
            const uint8_t* codes = rows[0] + sizeof(Head) + at;
            const __m512i w = _mm512_maskz_loadu_epi8((__mmask64(1) << (n_bytes - i_byte)) - 1, weights[o] + i_byte);
            const __m512i even = _mm512_xor_si512(BITS == 8 ? w : _mm512_and_si512(w, low), flip);
            sum = _mm512_dpbusd_epi32(sum, even, _mm512_load_si512(codes));
            if (BITS == 4) {
                const __m512i odd = _mm512_xor_si512(_mm512_and_si512(_mm512_srli_epi16(w, 4), low), flip);
                sum = _mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(codes + 64));
            }
        }
        whole[o] = sum;
    }
    for (size_t at = 0, i_step = 0; (M != 1 || IN_GROUPS) && at < n; at += STEP, i_step++) {
        const size_t i_byte = i_step * 64, left = n_bytes - i_byte;
        const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        __m512i x[M], odd[M], starts[M];
        UNROLLED for (size_t m = 0; m < M; m++) {
            const uint8_t* codes = rows[m] + sizeof(Head) + at;
            x[m] = _mm512_load_si512(codes);
            if (BITS == 4) odd[m] = _mm512_load_si512(codes + 64);
            starts[m] = IN_GROUPS ? _mm512_load_si512(rows[m] + sizeof(Head) + n + i_step * 64) : _mm512_setzero_si512();
        }
        size_t first = 0;
        __m512i picks = lane;
        if (IN_GROUPS) {  // lane i holds codes from at + i * STEP / 16 on
            first = at / task.group;
            const uint32_t inside = uint32_t(at - first * task.group);
            const __m512 place = _mm512_cvtepi32_ps(_mm512_add_epi32(
                _mm512_mullo_epi32(lane, _mm512_set1_epi32(STEP / 16)), _mm512_set1_epi32(int32_t(inside))));
            picks = _mm512_cvttps_epi32(_mm512_div_ps(place, _mm512_set1_ps(float(task.group))));
        }
        UNROLLED for (size_t o = 0; o < O; o++) {
            _mm_prefetch(reinterpret_cast<const char*>(weights[o] + 2 * O * n_bytes + i_byte), _MM_HINT_T0);
            __m512i w = _mm512_maskz_loadu_epi8(mask, weights[o] + i_byte), high = w;
            if (BITS == 4) {
                high = _mm512_xor_si512(_mm512_and_si512(_mm512_srli_epi16(w, 4), low), flip);
                w = _mm512_and_si512(w, low);
            }
            w = _mm512_xor_si512(w, flip);
            __m512 scale = _mm512_setzero_ps();
            if (IN_GROUPS) scale = lane_scales(task, scales[o], first, picks);
            UNROLLED for (size_t m = 0; m < M; m++) {
                __m512i sum = IN_GROUPS ? starts[m] : whole[m * O + o];
                sum = _mm512_dpbusd_epi32(sum, w, x[m]);
                if (BITS == 4) sum = _mm512_dpbusd_epi32(sum, high, odd[m]);
                if (IN_GROUPS)
                    scaled[m * O + o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, scaled[m * O + o]);
                else
                    whole[m * O + o] = sum;
            }
        }
    }
    // What each row's head says, in the lanes of that row.
    const __m512i of_row = lanes_of_rows<M>();
    __m128i heads[2] = {_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[0])), _mm_setzero_si128()};
    if (M == 4) {
        const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[M > 1 ? 1 : 0]));
        const __m128i third = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[M > 2 ? 2 : 0]));
        const __m128i fourth = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[M > 3 ? 3 : 0]));
        heads[0] = _mm_unpacklo_epi32(heads[0], second);
        heads[1] = _mm_unpacklo_epi32(third, fourth);
    } else {
        heads[0] = _mm_shuffle_epi32(heads[0], 0x50);  // scale twice, sum twice
    }
    const __m512i factors = _mm512_castsi128_si512(_mm_unpacklo_epi64(heads[0], heads[1]));
    const __m512i row_sums = _mm512_castsi128_si512(_mm_unpackhi_epi64(heads[0], heads[1]));
    __m512 sums;
    if (IN_GROUPS) {
        sums = float_sums_of(scaled);
    } else {
        const __m512i offset = _mm512_set1_epi32(offset_of(task));
        const __m512i offsets = _mm512_mullo_epi32(_mm512_permutexvar_epi32(of_row, row_sums), offset);
        const __m512 of_outputs = scales_from(task.scale_format, scales[0], n_outputs);
        sums = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums_of(whole), offsets)), by_output<M>(of_outputs));
    }
    __m512 bias = _mm512_setzero_ps();
    if (task.bias != nullptr) bias = by_output<M>(scales_from(FloatFormat::FLOAT32, task.bias + 4 * output, n_outputs));
    sums = _mm512_fmadd_ps(sums, _mm512_castsi512_ps(_mm512_permutexvar_epi32(of_row, factors)), bias);
    if (M == 1) {
        _mm512_mask_storeu_ps(out + 4 * output, __mmask16(n_outputs == 16 ? 0xFFFF : (1u << n_outputs) - 1), sums);
        return;
    }
    float found[16];
    _mm512_storeu_ps(found, sums);
    for (size_t r = 0; r < n_held; r++) memcpy(out + 4 * (r * task.n_out + output), found + r * O, 4 * n_outputs);
}

template <size_t M, uint32_t BITS, bool IN_GROUPS>
INLINE void multiply_codes(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first, size_t last,
                           uint8_t* out) {
    constexpr size_t O = 16 / M;
    const size_t row_bytes = code_bytes(task);
    for (size_t at = first; at < last; at += O) {
        const uint8_t *weights[O], *scales[O];
        const size_t n_here = last - at < O ? last - at : O;
        for (size_t o = 0; o < O; o++) {
            const size_t output = at + (o < n_here ? o : n_here - 1);  // beyond the last: the last again, not kept
            weights[o] = task.codes + output * task.row_bytes();
            scales[o] = task.scales + output * task.scale_bytes();
        }
        for (size_t m = 0; m < n_rows; m += M) {
            const uint8_t* rows[M];
            const size_t n_held = n_rows - m < M ? n_rows - m : M;
            for (size_t r = 0; r < M; r++) rows[r] = prepared + (m + (r < n_held ? r : n_held - 1)) * row_bytes;
            code_tile<M, BITS, IN_GROUPS>(task, rows, weights, scales, at, n_held, n_here, out + 4 * m * task.n_out);
        }
    }
}

template <size_t M>
INLINE void multiply_rows_by(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first, size_t last,
                             uint8_t* out) {
    if (task.bits == 8)
        task.has_groups() ? multiply_codes<M, 8, true>(task, prepared, n_rows, first, last, out)
                          : multiply_codes<M, 8, false>(task, prepared, n_rows, first, last, out);
    else
        task.has_groups() ? multiply_codes<M, 4, true>(task, prepared, n_rows, first, last, out)
                          : multiply_codes<M, 4, false>(task, prepared, n_rows, first, last, out);
}

INLINE void multiply_rows(const Multiplying& task, const uint8_t* prepared, size_t n_rows, size_t first, size_t last,
                          uint8_t* out) {
    n_rows == 1 ? multiply_rows_by<1>(task, prepared, n_rows, first, last, out)
                : multiply_rows_by<ROWS>(task, prepared, n_rows, first, last, out);
}

}  // namespace multiplying
TRICOMP_END

#endif
