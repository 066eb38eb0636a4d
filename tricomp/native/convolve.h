// Convolutions of float pictures with integer weights. Stage header: no STL.
//
// A sample becomes padded rows of codes, channels last. Then 4 codes (or 2) beside each other are multiplied with those of
// many outputs at once, so weights are packed as [step][output][4] for the time of a call; no patch is copied. The hard
// thing: VNNI multiplies unsigned by signed bytes, so codes of inputs have 128 added, and each sum starts at -128 times
// the sum of its weights. Every sum is exact, and its way to a float is fixed: all instruction sets give the same bits.
#pragma once

#include <cstring>

#include "convolve_kernels.h"
#include "isa.h"

TRICOMP_BEGIN
namespace convolving {

#if TRICOMP_HAS_AVX512
typedef uint8_t Code;
typedef int8_t Packed;  // code of a weight
constexpr size_t LANES = 16, VECTORS = 4;  // outputs of a vector, vectors of a tile
constexpr Code ZERO = 128;
#else
typedef int16_t Code;
typedef int16_t Packed;
constexpr size_t LANES = TRICOMP_HAS_AVX2 ? 8 : 4, VECTORS = 2;
constexpr Code ZERO = 0;
#endif
constexpr size_t STEP = 4 / sizeof(Code);  // codes of inputs that are multiplied at a time
constexpr size_t POSITIONS = 6;            // of a tile
constexpr size_t CHUNK = CONVOLVE_CHUNK;
constexpr size_t BYTES = 4 * LANES;
constexpr size_t HEAD = 3 * BYTES;  // of a packed vector: what sums start at, scales, biases
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef float Floats __attribute__((vector_size(BYTES)));

template <class T>
INLINE T read(const void* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE size_t rounded_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// ---- Where things are

// Inputs of a kernel are read in runs that stand in a row: a row of the kernel, or else one place of it.
struct Runs {
    size_t n, length, n_steps;
    bool is_row;
};

INLINE Runs runs_of(const Convolving& task) {
    const bool is_row = task.dilation_width == 1 && task.groups == 1;
    const size_t length = is_row ? task.kernel_width * task.n_in : task.in_each();
    return {is_row ? task.kernel_height : task.n_taps(), length, (length + STEP - 1) / STEP, is_row};
}

INLINE size_t n_steps(const Convolving& task) {
    const Runs runs = runs_of(task);
    return runs.n * runs.n_steps;
}

INLINE size_t steps_bytes(const Convolving& task) { return rounded_up(4 * n_steps(task), CONVOLVE_ALIGN); }
INLINE size_t vector_bytes(const Convolving& task) { return rounded_up(HEAD + n_steps(task) * BYTES, CONVOLVE_ALIGN); }
INLINE size_t vectors_each(const Convolving& task) { return (task.out_each() + LANES - 1) / LANES; }

static size_t packed_bytes(const Convolving& task) {
    return steps_bytes(task) + task.groups * vectors_each(task) * vector_bytes(task);
}

INLINE size_t sample_codes(const Convolving& task) { return task.padded_height() * task.padded_width() * task.n_in; }

// Behind a sample there is room for a pixel that no output reads, and for the rest of a step.
static size_t code_bytes(const Convolving& task) {
    return rounded_up((sample_codes(task) + task.n_in + STEP) * sizeof(Code), CONVOLVE_ALIGN);
}

// ---- Weights

static void pack_steps(const Convolving& task, uint8_t* packed) {
    const Runs runs = runs_of(task);
    for (size_t i = 0; i < runs.n; i++) {
        const size_t row = runs.is_row ? i : i / task.kernel_width, column = runs.is_row ? 0 : i % task.kernel_width;
        const size_t pixel = row * task.dilation_height * task.padded_width() + column * task.dilation_width;
        for (size_t step = 0; step < runs.n_steps; step++) {
            const uint32_t offset = uint32_t((pixel * task.n_in + step * STEP) * sizeof(Code));
            memcpy(packed, &offset, 4);
            packed += 4;
        }
    }
}

#if TRICOMP_HAS_AVX512

// Rows become columns: 16 vectors of 16 lanes.
INLINE void transpose(__m512i* v) {
    __m512i pairs[16], fours[16];
    for (size_t i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (size_t i = 0; i < 4; i++) {
        const __m512i even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xDD);
        const __m512i even_next = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
        const __m512i odd_next = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xDD);
        v[i] = _mm512_shuffle_i32x4(even, even_next, 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(even, even_next, 0xDD);
        v[4 + i] = _mm512_shuffle_i32x4(odd, odd_next, 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(odd, odd_next, 0xDD);
    }
}

// Channels in fours, and so few places of a kernel that fours of all of them fit a vector.
INLINE bool is_packed_fast(const Convolving& task) {
    return task.in_each() % 4 == 0 && (task.is_codes_last || task.n_taps() <= 16);
}

// n_here rows of codes from `rows` on, a step of all of them side by side.
INLINE void pack_fast(const Convolving& task, const uint8_t* rows, size_t n_here, uint8_t* to) {
    const size_t n_taps = task.is_codes_last ? 1 : task.n_taps();
    const size_t n_fours = task.in_each() * task.n_taps() / 4 / n_taps, n_codes = task.in_each() * task.n_taps();
    const size_t fours_each = 16 / n_taps;
    uint8_t order[64] = {};  // of bytes [four][4][tap] as [four][tap][4]
    for (size_t i = 0; i < fours_each * n_taps * 4; i++) {
        const size_t four = i / 4 / n_taps, tap = i / 4 % n_taps;
        order[i] = uint8_t((4 * four + i % 4) * n_taps + tap);
    }
    const __m512i picks = _mm512_loadu_si512(order);
    for (size_t four = 0; four < n_fours; four += fours_each) {
        const size_t at = four * 4 * n_taps, left = n_codes - at;
        const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        __m512i v[16];
        for (size_t o = 0; o < 16; o++) {
            v[o] = _mm512_setzero_si512();
            if (o < n_here) v[o] = _mm512_maskz_loadu_epi8(mask, rows + o * n_codes + at);
            v[o] = _mm512_permutexvar_epi8(picks, v[o]);
        }
        transpose(v);
        const size_t n = n_fours - four < fours_each ? n_fours - four : fours_each;
        for (size_t i = 0; i < 16; i++)
            if (i < n * n_taps) _mm512_store_si512(to + (i % n_taps * n_fours + four + i / n_taps) * 64, v[i]);
    }
}

#endif

INLINE void pack_plain(const Convolving& task, const uint8_t* rows, size_t n_here, uint8_t* to) {
    const Runs runs = runs_of(task);
    const size_t n_codes = task.in_each() * task.n_taps(), each = task.in_each();
    memset(to, 0, runs.n * runs.n_steps * BYTES);
    for (size_t i = 0; i < runs.n; i++) {
        for (size_t at = 0; at < runs.length; at++) {
            const size_t tap = runs.is_row ? i * task.kernel_width + at / each : i;
            const size_t channel = runs.is_row ? at % each : at;
            const uint8_t* from = rows + (task.is_codes_last ? tap * each + channel : channel * task.n_taps() + tap);
            uint8_t* step = to + (i * runs.n_steps + at / STEP) * BYTES + at % STEP * sizeof(Packed);
            for (size_t o = 0; o < n_here; o++) {
                const Packed code = int8_t(from[o * n_codes]);
                memcpy(step + 4 * o, &code, sizeof code);
            }
        }
    }
}

static void pack(const Convolving& task, size_t first_vector, size_t last_vector, uint8_t* packed) {
    const size_t each = vectors_each(task);
    for (size_t vector = first_vector; vector < last_vector; vector++) {
        uint8_t* to = packed + steps_bytes(task) + vector * vector_bytes(task);
        const size_t inside = vector % each * LANES, output = vector / each * task.out_each() + inside;
        const size_t n_here = task.out_each() - inside < LANES ? task.out_each() - inside : LANES;
        const uint8_t* rows = task.codes + output * task.in_each() * task.n_taps();
        memset(to, 0, HEAD);
        memcpy(to + BYTES, task.scales + 4 * output, 4 * n_here);
        if (task.bias != nullptr) memcpy(to + 2 * BYTES, task.bias + 4 * output, 4 * n_here);
#if TRICOMP_HAS_AVX512
        if (is_packed_fast(task))
            pack_fast(task, rows, n_here, to + HEAD);
        else
            pack_plain(task, rows, n_here, to + HEAD);
        __m512i sum = _mm512_setzero_si512();
        for (size_t i = 0, n = n_steps(task); i < n; i++)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(int8_t(ZERO)), _mm512_load_si512(to + HEAD + i * BYTES));
        _mm512_store_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
#else
        pack_plain(task, rows, n_here, to + HEAD);
#endif
    }
}

// ---- Inputs

static float largest(const uint8_t* input, size_t n) {
    uint32_t found = 0;  // as integers, magnitudes of floats compare alike, and NaNs are above all
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = read<uint32_t>(input + 4 * i) & 0x7FFFFFFFu;
        found = bits > found ? bits : found;
    }
    return read<float>(&found);
}

constexpr float ROUNDER = 0x1.8p23f;  // a float below 2^22 plus this has its nearest integer in its low bits; ties to even
constexpr float LEAST = 0x1p-100f;    // below it, a sample is one of zeros: 127 / largest must be finite

INLINE Code code_of(float x, float factor) {
    const float shifted = x * factor + ROUNDER;
    return Code(int8_t(read<uint32_t>(&shifted))) + ZERO;
}

INLINE void fill_zeros(Code* codes, size_t n) {
    for (size_t i = 0; i < n; i++) codes[i] = ZERO;
}

// So many pixels of channels that stand n_pixels apart, each to its own place.
INLINE void quantize_pixels(
    const Convolving& task, const uint8_t* input, size_t n_here, float factor, Code* const* places
) {
    size_t channel = 0;
#if TRICOMP_HAS_AVX512
    const size_t plane = 4 * task.n_pixels();
    const __mmask16 mask = __mmask16((1u << n_here) - 1);
    const __m512 factors = _mm512_set1_ps(factor), rounder = _mm512_set1_ps(ROUNDER);
    const __m512i low = _mm512_set1_epi32(0xFF), flip = _mm512_set1_epi8(int8_t(ZERO));
    const auto code = [&](size_t c) {
        const __m512 x = _mm512_maskz_loadu_ps(mask, input + c * plane);
        return _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(x, factors), rounder));
    };
    const auto four = [&](size_t c) {  // codes of 4 channels of each pixel
        const __m512i first = _mm512_and_si512(code(c), low);
        const __m512i second = _mm512_slli_epi32(_mm512_and_si512(code(c + 1), low), 8);
        const __m512i third = _mm512_slli_epi32(_mm512_and_si512(code(c + 2), low), 16);
        const __m512i fourth = _mm512_slli_epi32(code(c + 3), 24);
        const __m512i all = _mm512_or_si512(_mm512_or_si512(first, second), _mm512_or_si512(third, fourth));
        return _mm512_xor_si512(all, flip);
    };
    for (; channel + 16 <= task.n_in; channel += 16) {
        const __m512i a = four(channel), b = four(channel + 4), c = four(channel + 8), d = four(channel + 12);
        const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
        alignas(64) uint8_t found[4][64];  // pixel 4 * j + i is [i][16 * j]
        _mm512_store_si512(found[0], _mm512_unpacklo_epi64(ab, cd));
        _mm512_store_si512(found[1], _mm512_unpackhi_epi64(ab, cd));
        _mm512_store_si512(found[2], _mm512_unpacklo_epi64(ab_high, cd_high));
        _mm512_store_si512(found[3], _mm512_unpackhi_epi64(ab_high, cd_high));
        for (size_t i = 0; i < n_here; i++) memcpy(places[i] + channel, found[i % 4] + i / 4 * 16, 16);
    }
    for (; channel + 4 <= task.n_in; channel += 4) {
        alignas(64) uint8_t found[16][4];
        _mm512_store_si512(found, four(channel));
        for (size_t i = 0; i < n_here; i++) memcpy(places[i] + channel, found[i], 4);
    }
#endif
    for (; channel < task.n_in; channel++) {
        Code found[16];
        const uint8_t* from = input + 4 * channel * task.n_pixels();
        for (size_t i = 0; i < n_here; i++) found[i] = code_of(read<float>(from + 4 * i), factor);
        for (size_t i = 0; i < n_here; i++) places[i][channel] = found[i];
    }
}

static float quantize(
    const Convolving& task, const uint8_t* sample, float largest, size_t first, size_t last, uint8_t* memory
) {
    Code* codes = reinterpret_cast<Code*>(memory);
    const bool is_zero = largest < LEAST;
    const float factor = is_zero ? 0.0f : 127.0f / largest;
    const size_t padded_width = task.padded_width(), n = task.n_in, width = task.width, row_codes = padded_width * n;
    const size_t held_width = width + task.left <= padded_width ? width
                              : task.left < padded_width        ? padded_width - task.left
                                                                : 0;
    const size_t begin = first > task.top ? first - task.top : 0;  // rows of the sample
    const size_t wanted = last > task.top ? last - task.top : 0, end = wanted < task.height ? wanted : task.height;
    if (begin >= end || held_width != padded_width || end - begin != last - first)
        fill_zeros(codes + first * row_codes, (last - first) * row_codes);
    if (task.is_input_last) {
        for (size_t row = begin; row < end; row++) {
            const uint8_t* from = sample + 4 * row * width * n;
            Code* to = codes + (row + task.top) * row_codes + task.left * n;
            for (size_t i = 0; i < held_width * n; i++) to[i] = code_of(read<float>(from + 4 * i), factor);
        }
    } else if (begin < end) {
        Code* const nowhere = codes + sample_codes(task);
        size_t row = begin, column = 0;
        for (size_t pixel = begin * width; pixel < end * width; pixel += 16) {
            const size_t n_here = end * width - pixel < 16 ? end * width - pixel : 16;
            Code* places[16];
            for (size_t i = 0; i < n_here; i++) {
                places[i] = column < held_width ? codes + (row + task.top) * row_codes + (column + task.left) * n : nowhere;
                if (++column == width) column = 0, row++;
            }
            quantize_pixels(task, sample + 4 * pixel, n_here, factor, places);
        }
    }
    return is_zero ? 1.0f : largest / 127.0f;
}

// ---- Products

// Each lane: the sum and the products of STEP codes of inputs, the same in all lanes, with as many of weights.
INLINE Ints dot(const Ints& sum, int32_t inputs, const Ints& weights) {
#if TRICOMP_HAS_AVX512
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), _mm512_set1_epi32(inputs), __m512i(weights)));
#elif TRICOMP_HAS_AVX2
    return sum + Ints(_mm256_madd_epi16(_mm256_set1_epi32(inputs), __m256i(weights)));
#else
    const Ints low = Ints(Words(weights) << 16) >> 16, high = weights >> 16;
    return sum + low * int32_t(int16_t(inputs)) + high * (inputs >> 16);
#endif
}

// J vectors of outputs at P positions. to: rows of VECTORS * LANES.
template <size_t J, size_t P>
INLINE void tile(const uint8_t* steps, size_t n, const uint8_t* vectors, size_t vector_bytes, const uint8_t* const* places,
                 const float* scales, float* to) {
    const uint8_t* from[P];
    for (size_t p = 0; p < P; p++) from[p] = places[p];
    Ints sums[J][P];
    for (size_t j = 0; j < J; j++)
        for (size_t p = 0; p < P; p++) sums[j][p] = read<Ints>(vectors + j * vector_bytes);
    const uint8_t* weights = vectors + HEAD;
    for (size_t i = 0; i < n; i++, weights += BYTES) {
        const size_t offset = read<uint32_t>(steps + 4 * i);
        Ints w[J];
        for (size_t j = 0; j < J; j++) w[j] = read<Ints>(weights + j * vector_bytes);
        for (size_t p = 0; p < P; p++) {
            const int32_t x = read<int32_t>(from[p] + offset);
            for (size_t j = 0; j < J; j++) sums[j][p] = dot(sums[j][p], x, w[j]);
        }
    }
    for (size_t j = 0; j < J; j++) {
        const Floats of_outputs = read<Floats>(vectors + j * vector_bytes + BYTES);
        const Floats bias = read<Floats>(vectors + j * vector_bytes + 2 * BYTES);
        for (size_t p = 0; p < P; p++) {
            const Floats made = __builtin_convertvector(sums[j][p], Floats) * of_outputs * scales[p] + bias;
            memcpy(to + p * VECTORS * LANES + j * LANES, &made, sizeof made);
        }
    }
}

// Of places and scales there are POSITIONS - 1 more than n, any.
template <size_t J>
INLINE void tiles(const Convolving& task, const uint8_t* steps, const uint8_t* vectors, const uint8_t* const* places,
                  const float* scales, size_t n, float* to) {
    const size_t n_steps_ = n_steps(task), bytes = vector_bytes(task);
    size_t at = 0;
    for (; at + POSITIONS <= n; at += POSITIONS)
        tile<J, POSITIONS>(steps, n_steps_, vectors, bytes, places + at, scales + at, to + at * VECTORS * LANES);
    const size_t left = n - at;
    to += at * VECTORS * LANES;
    if (left == 1)
        tile<J, 1>(steps, n_steps_, vectors, bytes, places + at, scales + at, to);
    else if (left == 2)
        tile<J, 2>(steps, n_steps_, vectors, bytes, places + at, scales + at, to);
    else if (left == 3 || left == 4)
        tile<J, 4>(steps, n_steps_, vectors, bytes, places + at, scales + at, to);
    else if (left == 5)
        tile<J, POSITIONS>(steps, n_steps_, vectors, bytes, places + at, scales + at, to);
}

// n positions of n_outputs outputs to where they belong. out: the first output of the first position.
INLINE void put(const Convolving& task, const float* found, size_t n, size_t n_outputs, uint8_t* out) {
    if (task.is_out_last) {
        for (size_t p = 0; p < n; p++) memcpy(out + 4 * p * task.n_out, found + p * VECTORS * LANES, 4 * n_outputs);
        return;
    }
    const size_t plane = 4 * task.n_positions();
#if TRICOMP_HAS_AVX512
    for (size_t o = 0; o < n_outputs; o += 16) {
        const size_t n_here = n_outputs - o < 16 ? n_outputs - o : 16;
        for (size_t p = 0; p < n; p += 16) {
            const __mmask16 mask = n - p >= 16 ? 0xFFFF : __mmask16((1u << (n - p)) - 1);
            __m512i v[16];
            for (size_t i = 0; i < 16; i++) v[i] = _mm512_load_si512(found + (p + i) * VECTORS * LANES + o);
            transpose(v);
            for (size_t i = 0; i < 16; i++)
                if (i < n_here) _mm512_mask_storeu_epi32(out + (o + i) * plane + 4 * p, mask, v[i]);
        }
    }
#else
    for (size_t o = 0; o < n_outputs; o++)
        for (size_t p = 0; p < n; p++) memcpy(out + o * plane + 4 * p, found + p * VECTORS * LANES + o, 4);
#endif
}

static void convolve(const Convolving& task, const uint8_t* packed, const uint8_t* codes, const float* scales, size_t first,
                     size_t last, size_t first_vector, size_t last_vector, uint8_t* out) {
    const size_t each = vectors_each(task), n_positions = task.n_positions(), sample_bytes = code_bytes(task);
    const size_t pixel_bytes = task.n_in * sizeof(Code), row_bytes = task.padded_width() * pixel_bytes;
    alignas(64) float found[(CHUNK + 16) * VECTORS * LANES];
    for (size_t vector = first_vector, n_vectors; vector < last_vector; vector += n_vectors) {
        const size_t group = vector / each, inside = vector % each;
        n_vectors = each - inside < VECTORS ? each - inside : VECTORS;
        if (last_vector - vector < n_vectors) n_vectors = last_vector - vector;
        const size_t output = group * task.out_each() + inside * LANES;
        const size_t left = task.out_each() - inside * LANES, n_outputs = left < n_vectors * LANES ? left : n_vectors * LANES;
        const uint8_t* vectors = packed + steps_bytes(task) + vector * vector_bytes(task);
        size_t sample = first / n_positions, row = first % n_positions / task.out_width, column = first % task.out_width;
        for (size_t at = first; at < last; at += CHUNK) {
            const size_t n = last - at < CHUNK ? last - at : CHUNK, first_sample = sample;
            const uint8_t* places[CHUNK + POSITIONS - 1];
            float of_places[CHUNK + POSITIONS - 1];
            for (size_t i = 0; i < n; i++) {
                places[i] = codes + sample * sample_bytes + row * task.stride_height * row_bytes +
                            (column * task.stride_width * task.n_in + group * task.in_each()) * sizeof(Code);
                of_places[i] = scales[sample];
                if (++column == task.out_width) {
                    column = 0;
                    if (++row == task.out_height) row = 0, sample++;
                }
            }
            for (size_t i = n; i < n + POSITIONS - 1; i++) places[i] = places[n - 1], of_places[i] = of_places[n - 1];
            if (n_vectors == 1)
                tiles<1>(task, packed, vectors, places, of_places, n, found);
            else if (n_vectors == 2)
                tiles<2>(task, packed, vectors, places, of_places, n, found);
#if TRICOMP_HAS_AVX512
            else if (n_vectors == 3)
                tiles<3>(task, packed, vectors, places, of_places, n, found);
            else
                tiles<4>(task, packed, vectors, places, of_places, n, found);
#endif
            for (size_t done = 0, i_sample = first_sample; done < n; i_sample++) {
                const size_t within = i_sample == first_sample ? at % n_positions : 0;
                const size_t n_here = n_positions - within < n - done ? n_positions - within : n - done;
                uint8_t* to = out + 4 * i_sample * n_positions * task.n_out;
                to += 4 * (task.is_out_last ? within * task.n_out + output : output * n_positions + within);
                put(task, found + done * VECTORS * LANES, n_here, n_outputs, to);
                done += n_here;
            }
        }
    }
}

}  // namespace convolving
TRICOMP_END
