// Floats to integer codes and scales, and back. Mirrors reference/quantize.py; FORMAT.md, "Integers". Stage header: no STL.
//
// The hard thing: every machine must find the same codes. So each float operation is a single one (this is compiled with
// -ffp-contract=off), errors are summed as integers, and the only decisions are comparisons of single doubles. The lanes
// of a vector are the candidates for a scale, so that nothing is summed across lanes, however small a group is.
#pragma once

#include <cstring>

#include "isa.h"
#include "quantize_kernels.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

TRICOMP_BEGIN
namespace quantizing {

constexpr size_t VECTOR = TRICOMP_HAS_AVX512 ? 64 : TRICOMP_HAS_AVX2 ? 32 : 16;  // bytes
constexpr size_t LANES = VECTOR / 4;
constexpr size_t BLOCK = 512;     // elements that are looked at a time
constexpr size_t N_SQUARES = 32;  // that a lane adds up before it is emptied: each is at most 2^26
typedef float Floats __attribute__((vector_size(VECTOR)));
typedef int32_t Ints __attribute__((vector_size(VECTOR)));
typedef uint32_t Uints __attribute__((vector_size(VECTOR)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR / 2)));  // as many as there are lanes

// Frozen with the definition, as in the reference: what the largest magnitude is multiplied by, in 64ths.
constexpr size_t CANDIDATES = 16, CANDIDATE_VECTORS = CANDIDATES / LANES;
struct Grid {
    int16_t most;  // the largest code
    const float* shares;
};
constexpr float WIDE_SHARES[CANDIDATES] = {64, 63, 62, 61, 60, 59, 58, 56, 54, 52, 50, 48, 44, 40, 36, 32};
constexpr float NARROW_SHARES[CANDIDATES] = {64, 60, 56, 52, 48, 44, 41, 38, 35, 32, 29, 26, 23, 20, 18, 16};
INLINE Grid grid_of(uint32_t bits) {
    return {static_cast<int16_t>((1 << (bits - 1)) - 1), bits >= 6 ? WIDE_SHARES : NARROW_SHARES};
}
constexpr int PARTS_LOG2 = 6;  // of a code, in which errors are counted
constexpr float LEAST_SCALE = 0x1p-112f;

// A float below 2^22 plus this has its nearest integer in its low bits; halves go to the even one.
constexpr float ROUNDER = 0x1.8p23f;
constexpr int32_t ROUNDER_BITS = 0x4B400000;  // its low 16 bits are 0
constexpr uint32_t INFINITE = 0x7F800000u;

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE Floats same(float x) { return Floats{} + x; }
INLINE Uints same(uint32_t x) { return Uints{} + x; }

// Numbers of each format as float32, infinite where that has no such number; and back, from what the format can hold.
// Integers alone decide on subnormals.
struct Float32 {
    typedef float Word;
    static constexpr float LARGEST = 0x1.fffffep127f;
};

struct Bfloat16 {
    typedef uint16_t Word;
    static INLINE Floats read(Uints words) { return Floats(words << 16); }
    static INLINE Uints write(Floats x) {
        const Uints bits = Uints(x);
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    static constexpr float LARGEST = 0x1.fep127f;
};

struct Float16 {
    typedef uint16_t Word;
    static constexpr uint32_t BIAS = 112u << 23, SMALL = 1u << 23;  // float32's less float16's; below: subnormal
    static INLINE Floats read(Uints words) {
        const Uints sign = (words & 0x8000) << 16, body = (words & 0x7FFF) << 13;
        const Uints small = Uints(Floats(body + (BIAS + SMALL)) - 0x1p-14f);  // the mantissa, in 2^-24
        const Uints usual = body >= same(31 * SMALL) ? body | INFINITE : body + BIAS;
        return Floats(sign | (body < same(SMALL) ? small : usual));
    }
    static INLINE Uints write(Floats x) {
        const Uints bits = Uints(x), body = bits & 0x7FFFFFFF;
        const Uints small = Uints(Floats(body) + 0.5f) - 0x3F000000u;  // in 2^-24
        const Uints usual = (body - BIAS + 0xFFF + (body >> 13 & 1)) >> 13;
        return (bits >> 16 & 0x8000) | (body < same(BIAS + SMALL) ? small : usual);
    }
    static constexpr float LARGEST = 65504.0f;
};

struct Float64 {
    typedef double Word;
    static constexpr float LARGEST = Float32::LARGEST;
};

template <class Format> constexpr size_t WORD_BYTES = sizeof(typename Format::Word);
constexpr size_t ROOM = BLOCK + 16;  // elements, so that a block ends with a whole vector

// n elements as float32, and zeros up to a whole number of vectors. n: at most BLOCK.
template <class Format>
INLINE void load(const uint8_t* words, size_t n, float* out) {
    typedef typename Format::Word Anywhere __attribute__((aligned(1), may_alias));
    const Anywhere* from = reinterpret_cast<const Anywhere*>(words);
    for (size_t i = 0; i < n; i++) out[i] = static_cast<float>(from[i]);
    for (size_t i = n; i % LANES; i++) out[i] = 0;
}

template <class Format>
INLINE void load_halves(const uint8_t* words, size_t n, float* out) {
    Halves some;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        memcpy(&some, words + 2 * i, sizeof some);
        const Floats found = Format::read(__builtin_convertvector(some, Uints));
        memcpy(out + i, &found, VECTOR);
    }
    if (i == n) return;
    some = Halves{};
    memcpy(&some, words + 2 * i, 2 * (n - i));
    const Floats found = Format::read(__builtin_convertvector(some, Uints));
    memcpy(out + i, &found, VECTOR);
}

template <> INLINE void load<Bfloat16>(const uint8_t* words, size_t n, float* out) { load_halves<Bfloat16>(words, n, out); }
template <> INLINE void load<Float16>(const uint8_t* words, size_t n, float* out) { load_halves<Float16>(words, n, out); }

// n float32 as words. n: at most BLOCK.
template <class Format>
INLINE void store(const float* elements, size_t n, uint8_t* words) {
    typedef typename Format::Word Anywhere __attribute__((aligned(1), may_alias));
    Anywhere* out = reinterpret_cast<Anywhere*>(words);
    for (size_t i = 0; i < n; i++) out[i] = elements[i];
}

template <class Format>
INLINE void store_halves(const float* elements, size_t n, uint8_t* words) {
    for (size_t i = 0; i < n; i += LANES) {
        Floats some;
        memcpy(&some, elements + i, VECTOR);
        const Halves found = __builtin_convertvector(Format::write(some), Halves);
        if (n - i >= LANES) {
            memcpy(words + 2 * i, &found, sizeof found);
        } else {
            memcpy(words + 2 * i, &found, 2 * (n - i));
        }
    }
}

template <> INLINE void store<Bfloat16>(const float* x, size_t n, uint8_t* words) { store_halves<Bfloat16>(x, n, words); }
template <> INLINE void store<Float16>(const float* x, size_t n, uint8_t* words) { store_halves<Float16>(x, n, words); }

INLINE Floats vector_at(const float* p) {
    Floats found;
    memcpy(&found, p, VECTOR);
    return found;
}

INLINE Ints minimum(Ints a, Ints b) { return a < b ? a : b; }
INLINE Ints maximum(Ints a, Ints b) { return a > b ? a : b; }

// The largest magnitude among n elements as bits of a float, and the magnitudes in place of the elements.
INLINE uint32_t take_magnitudes(float* elements, size_t n) {
    Ints most = {};
    for (size_t i = 0; i < n; i += LANES) {
        Ints bits;
        memcpy(&bits, elements + i, VECTOR);
        bits &= 0x7FFFFFFF;
        memcpy(elements + i, &bits, VECTOR);
        most = maximum(most, bits);
    }
    int32_t found[LANES];
    memcpy(found, &most, VECTOR);
    for (size_t n_left = LANES / 2; n_left; n_left /= 2)
        for (size_t i = 0; i < n_left; i++) found[i] = found[i] > found[i + n_left] ? found[i] : found[i + n_left];
    return static_cast<uint32_t>(found[0]);
}

// Of numbers of 16 bits: the square of each even one plus that of the odd one behind it.
INLINE Uints squares(Shorts x) {
#if TRICOMP_HAS_AVX512
    return Uints(_mm512_madd_epi16(__m512i(x), __m512i(x)));
#elif TRICOMP_HAS_AVX2
    return Uints(_mm256_madd_epi16(__m256i(x), __m256i(x)));
#elif defined(__SSE2__)
    return Uints(_mm_madd_epi16(__m128i(x), __m128i(x)));
#else
    const Ints both = Ints(x), low = both << 16 >> 16, high = both >> 16;
    return Uints(low * low + high * high);
#endif
}

// Add the squared errors of up to BLOCK magnitudes, in parts of a code, for each candidate. inverses: of their scales,
// times the parts of a code. Magnitudes in scale are so small that 16 bits hold their parts.
INLINE void add_errors(const float* magnitudes, size_t n, const float* inverses, int16_t most, uint64_t* errors) {
    const Shorts largest = Shorts{} + most;
    for (size_t v = 0; v < CANDIDATE_VECTORS; v++) {
        const Floats factor = vector_at(inverses + v * LANES), rounder = same(ROUNDER);
        for (size_t first = 0; first < n; first += N_SQUARES) {
            const size_t end = n - first < N_SQUARES ? n : first + N_SQUARES;
            Uints sums = {};
            for (size_t i = first; i < end; i += 2) {
                const Uints one = Uints(factor * magnitudes[i] + rounder);
                const Uints other = Uints(factor * magnitudes[i + 1] + rounder);
                const Shorts parts = Shorts((one & 0xFFFF) | other << 16);
                Shorts code = (parts + (1 << (PARTS_LOG2 - 1))) >> PARTS_LOG2;
                code = code < largest ? code : largest;
                sums += squares(parts - (code << PARTS_LOG2));
            }
            uint32_t found[LANES];
            memcpy(found, &sums, VECTOR);
            for (size_t i = 0; i < LANES; i++) errors[v * LANES + i] += found[i];
        }
    }
}

// Codes of up to BLOCK elements.
INLINE void write_codes(const float* elements, size_t n, float inverse, int16_t most, int8_t* codes) {
    int32_t found[ROOM];
    const Floats factor = same(inverse), rounder = same(ROUNDER);
    const Ints largest = Ints{} + most;
    for (size_t i = 0; i < n; i += LANES) {
        const Ints code = Ints(vector_at(elements + i) * factor + rounder) - ROUNDER_BITS;
        const Ints kept = maximum(minimum(code, largest), -largest);
        memcpy(found + i, &kept, VECTOR);
    }
    for (size_t i = 0; i < n; i++) codes[i] = static_cast<int8_t>(found[i]);
}

// Scales of all candidates as they are stored.
INLINE void round_scales(float* scales, FloatFormat format) {
    for (size_t v = 0; v < CANDIDATE_VECTORS; v++) {
        Floats some = vector_at(scales + v * LANES);
        some = some > same(LEAST_SCALE) ? some : same(LEAST_SCALE);
        if (format == FloatFormat::BFLOAT16) some = Bfloat16::read(Bfloat16::write(some));
        memcpy(scales + v * LANES, &some, VECTOR);
    }
}

// The scale of n elements with the largest magnitude top_bits. magnitudes: of all of them, if they are one block.
template <class Format>
INLINE float best_scale(const Quantizing& task, const Grid& grid, const uint8_t* words, size_t n, uint32_t top_bits,
                        const float* magnitudes) {
    const float top = float_of(top_bits) / static_cast<float>(grid.most);
    alignas(64) float scales[CANDIDATES], inverses[CANDIDATES], block[ROOM];
    for (size_t i = 0; i < CANDIDATES; i++) scales[i] = top * (grid.shares[i] / 64);
    round_scales(scales, task.scale_format);
    if (!task.is_clipped) return scales[0];
    for (size_t i = 0; i < CANDIDATES; i++) inverses[i] = 1 / scales[i] * (1 << PARTS_LOG2);
    uint64_t errors[CANDIDATES] = {};
    if (n <= BLOCK) {
        add_errors(magnitudes, n, inverses, grid.most, errors);
    } else {
        for (size_t first = 0; first < n; first += BLOCK) {
            const size_t n_here = n - first < BLOCK ? n - first : BLOCK;
            load<Format>(words + first * WORD_BYTES<Format>, n_here, block);
            take_magnitudes(block, n_here);
            add_errors(block, n_here, inverses, grid.most, errors);
        }
    }
    double found[CANDIDATES];
    for (size_t i = 0; i < CANDIDATES; i++) {
        const double scale = scales[i], square = scale * scale;
        found[i] = static_cast<double>(errors[i]) * square;
    }
    size_t best = 0;
    for (size_t i = 1; i < CANDIDATES; i++) best = found[i] < found[best] ? i : best;  // of equal ones the larger scale
    return scales[best];
}

// Codes and scale of one group. Returns false, and writes nothing, if an element is not finite.
template <class Format>
INLINE bool quantize_group(const Quantizing& task, const Grid& grid, const uint8_t* words, size_t n, int8_t* codes,
                           uint8_t* scale_at) {
    alignas(64) float block[ROOM];
    uint32_t top_bits = 0;
    for (size_t first = 0; first < n; first += BLOCK) {
        const size_t n_here = n - first < BLOCK ? n - first : BLOCK;
        load<Format>(words + first * WORD_BYTES<Format>, n_here, block);
        const uint32_t here = take_magnitudes(block, n_here);
        top_bits = here > top_bits ? here : top_bits;
    }
    if (top_bits >= INFINITE) return false;
    const float scale = best_scale<Format>(task, grid, words, n, top_bits, block), inverse = 1 / scale;
    if (task.scale_format == FloatFormat::BFLOAT16) {
        const uint16_t word = static_cast<uint16_t>(bits_of(scale) >> 16);
        memcpy(scale_at, &word, 2);
    } else {
        memcpy(scale_at, &scale, 4);
    }
    for (size_t first = 0; first < n; first += BLOCK) {
        const size_t n_here = n - first < BLOCK ? n - first : BLOCK;
        load<Format>(words + first * WORD_BYTES<Format>, n_here, block);
        write_codes(block, n_here, inverse, grid.most, codes + first);
    }
    return true;
}

template <class Format>
uint64_t quantize_row_of(const Quantizing& task, const uint8_t* words, int8_t* codes, uint8_t* scales) {
    const Grid grid = grid_of(task.bits);
    bool is_finite = true;
    for (size_t i = 0; is_finite && i < task.n_groups(); i++) {
        const size_t first = i * task.group, left = task.n - first;
        is_finite = quantize_group<Format>(task, grid, words + first * WORD_BYTES<Format>,
                                           left < task.group ? left : task.group, codes + first,
                                           scales + i * float_bytes(task.scale_format));
    }
    uint64_t n_bad = 0;
    for (size_t first = 0; !is_finite && first < task.n; first += BLOCK) {
        const size_t n_here = task.n - first < BLOCK ? task.n - first : BLOCK;
        float block[ROOM];
        load<Format>(words + first * WORD_BYTES<Format>, n_here, block);
        for (size_t i = 0; i < n_here; i++) n_bad += (bits_of(block[i]) & 0x7FFFFFFF) >= INFINITE;
    }
    return n_bad;
}

template <class Format>
void dequantize_row_of(const Quantizing& task, const int8_t* codes, const uint8_t* scales, uint8_t* words) {
    for (size_t i = 0; i < task.n_groups(); i++) {
        const size_t begin = i * task.group, end = task.n - begin < task.group ? task.n : begin + task.group;
        float scale;
        if (task.scale_format == FloatFormat::BFLOAT16) {
            uint16_t word;
            memcpy(&word, scales + 2 * i, 2);
            scale = float_of(static_cast<uint32_t>(word) << 16);
        } else {
            memcpy(&scale, scales + 4 * i, 4);
        }
        alignas(64) float block[ROOM];
        for (size_t first = begin; first < end; first += BLOCK) {
            const size_t n_here = end - first < BLOCK ? end - first : BLOCK;
            for (size_t j = 0; j < n_here; j++) {
                const float x = static_cast<float>(codes[first + j]) * scale;
                const float low = x > Format::LARGEST ? Format::LARGEST : x;
                block[j] = low < -Format::LARGEST ? -Format::LARGEST : low;
            }
            store<Format>(block, n_here, words + first * WORD_BYTES<Format>);
        }
    }
}

inline uint64_t quantize_row(const Quantizing& task, const uint8_t* words, int8_t* codes, uint8_t* scales) {
    switch (task.format) {
        case FloatFormat::BFLOAT16: return quantize_row_of<Bfloat16>(task, words, codes, scales);
        case FloatFormat::FLOAT16: return quantize_row_of<Float16>(task, words, codes, scales);
        case FloatFormat::FLOAT64: return quantize_row_of<Float64>(task, words, codes, scales);
        default: return quantize_row_of<Float32>(task, words, codes, scales);
    }
}

inline void dequantize_row(const Quantizing& task, const int8_t* codes, const uint8_t* scales, uint8_t* words) {
    switch (task.format) {
        case FloatFormat::BFLOAT16: return dequantize_row_of<Bfloat16>(task, codes, scales, words);
        case FloatFormat::FLOAT16: return dequantize_row_of<Float16>(task, codes, scales, words);
        case FloatFormat::FLOAT64: return dequantize_row_of<Float64>(task, codes, scales, words);
        default: return dequantize_row_of<Float32>(task, codes, scales, words);
    }
}

}  // namespace quantizing
TRICOMP_END
