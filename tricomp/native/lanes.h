// The values that the 32 lanes handle in one step, in registers, and the way between them and rows in position order.
// Includes isa.h and model.h only, no STL.
//
// The hard thing: lane l holds positions 4 l .. 4 l + 3 of a row, one a step. Four steps are loaded and stored at a
// time, so that memory is touched in whole registers; what lies between is a transposition of 32 by 4.
#pragma once

#include "isa.h"
#include "model.h"

#include <cstring>

TRICOMP_BEGIN

constexpr size_t STEPS = ROW / LANES;  // of a row

#if TRICOMP_HAS_AVX2
INLINE __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
INLINE __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE void store_128(void* to, __m128i value) { _mm_storeu_si128(static_cast<__m128i*>(to), value); }
INLINE void store_256(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
#endif

#if TRICOMP_HAS_AVX512

INLINE __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
INLINE void store_512(void* to, __m512i value) { _mm512_storeu_si512(to, value); }

struct Lanes16 {  // 32 numbers of 16 bits
    __m512i all;
};

struct Lanes32 {  // 32 numbers of 32 bits
    __m512i low, high;  // lanes 0 .. 15, 16 .. 31
};

template <class Unit>
struct alignas(64) LaneIndices {
    Unit at[64 / sizeof(Unit)];
};

// Of two registers one after the other: their units a0 b0 a1 b1 .., from number `first` of each on.
template <class Unit>
constexpr LaneIndices<Unit> interleaving(size_t first) {
    constexpr size_t N = 64 / sizeof(Unit);
    LaneIndices<Unit> indices{};
    for (size_t i = 0; i < N; ++i) indices.at[i] = static_cast<Unit>(first + i / 2 + (i % 2) * N);
    return indices;
}

// Of two registers one after the other: every second unit, from number `first` on.
template <class Unit>
constexpr LaneIndices<Unit> every_second(size_t first) {
    LaneIndices<Unit> indices{};
    for (size_t i = 0; i < 64 / sizeof(Unit); ++i) indices.at[i] = static_cast<Unit>(first + 2 * i);
    return indices;
}

// Of a row of bytes: those of step k, each in the low half of 16 bits (the high halves are masked off).
constexpr LaneIndices<uint8_t> bytes_of_step(size_t k) {
    LaneIndices<uint8_t> indices{};
    for (size_t i = 0; i < 64; ++i) indices.at[i] = static_cast<uint8_t>(i / 2 * STEPS + k);
    return indices;
}

static constexpr LaneIndices<uint16_t> INTERLEAVE_16[2] = {interleaving<uint16_t>(0), interleaving<uint16_t>(16)};
static constexpr LaneIndices<uint32_t> INTERLEAVE_32[2] = {interleaving<uint32_t>(0), interleaving<uint32_t>(8)};
static constexpr LaneIndices<uint64_t> INTERLEAVE_64[2] = {interleaving<uint64_t>(0), interleaving<uint64_t>(4)};
static constexpr LaneIndices<uint16_t> SEPARATE_16[2] = {every_second<uint16_t>(0), every_second<uint16_t>(1)};
static constexpr LaneIndices<uint32_t> SEPARATE_32[2] = {every_second<uint32_t>(0), every_second<uint32_t>(1)};
static constexpr LaneIndices<uint64_t> SEPARATE_64[2] = {every_second<uint64_t>(0), every_second<uint64_t>(1)};
static constexpr LaneIndices<uint8_t> STEP_BYTES[STEPS] = {bytes_of_step(0), bytes_of_step(1), bytes_of_step(2),
                                                            bytes_of_step(3)};

INLINE __m512i pick_8(__m512i a, __m512i b, const LaneIndices<uint8_t>& indices) {
    return _mm512_permutex2var_epi8(a, _mm512_load_si512(indices.at), b);
}

INLINE __m512i pick_16(__m512i a, __m512i b, const LaneIndices<uint16_t>& indices) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(indices.at), b);
}

INLINE __m512i pick_32(__m512i a, __m512i b, const LaneIndices<uint32_t>& indices) {
    return _mm512_permutex2var_epi32(a, _mm512_load_si512(indices.at), b);
}

INLINE __m512i pick_64(__m512i a, __m512i b, const LaneIndices<uint64_t>& indices) {
    return _mm512_permutex2var_epi64(a, _mm512_load_si512(indices.at), b);
}

// Bytes of a row, as numbers.

INLINE void load_row(const uint8_t* row, Lanes16* steps) {
    __m512i low = load_512(row), high = load_512(row + 64);
    for (size_t k = 0; k < STEPS; ++k) {
        __m512i places = _mm512_load_si512(STEP_BYTES[k].at);
        steps[k].all = _mm512_maskz_permutex2var_epi8(0x5555555555555555u, low, places, high);
    }
}

INLINE void load_row(const uint8_t* row, Lanes32* steps) {
    __m512i low = load_512(row), high = load_512(row + 64), mask = _mm512_set1_epi32(255);
    for (size_t k = 0; k < STEPS; ++k) {
        steps[k] = {_mm512_and_si512(low, mask), _mm512_and_si512(high, mask)};
        low = _mm512_srli_epi32(low, 8);
        high = _mm512_srli_epi32(high, 8);
    }
}

INLINE void store_row(const Lanes16* steps, uint8_t* row) {
    __m512i first = _mm512_or_si512(steps[0].all, _mm512_slli_epi16(steps[1].all, 8));
    __m512i last = _mm512_or_si512(steps[2].all, _mm512_slli_epi16(steps[3].all, 8));
    store_512(row, pick_16(first, last, INTERLEAVE_16[0]));
    store_512(row + 64, pick_16(first, last, INTERLEAVE_16[1]));
}

// Words of a row.

INLINE void load_row(const uint16_t* row, Lanes16* steps) {
    __m512i a = load_512(row), b = load_512(row + 32), c = load_512(row + 64), d = load_512(row + 96);
    for (size_t half = 0; half < 2; ++half) {  // steps 0 and 1, then 2 and 3
        __m512i low = pick_32(a, b, SEPARATE_32[half]), high = pick_32(c, d, SEPARATE_32[half]);
        steps[2 * half].all = pick_16(low, high, SEPARATE_16[0]);
        steps[2 * half + 1].all = pick_16(low, high, SEPARATE_16[1]);
    }
}

INLINE void store_row(const Lanes16* steps, uint16_t* row) {
    for (size_t half = 0; half < 2; ++half) {  // lanes 0 .. 15, 16 .. 31
        __m512i first = pick_16(steps[0].all, steps[1].all, INTERLEAVE_16[half]);
        __m512i last = pick_16(steps[2].all, steps[3].all, INTERLEAVE_16[half]);
        store_512(row + 64 * half, pick_32(first, last, INTERLEAVE_32[0]));
        store_512(row + 64 * half + 32, pick_32(first, last, INTERLEAVE_32[1]));
    }
}

// Sixteen lanes, four steps of 32 bits each.
INLINE void load_half_row(const uint32_t* row, __m512i (&steps)[STEPS]) {
    __m512i a = load_512(row), b = load_512(row + 16), c = load_512(row + 32), d = load_512(row + 48);
    for (size_t half = 0; half < 2; ++half) {
        __m512i low = pick_64(a, b, SEPARATE_64[half]), high = pick_64(c, d, SEPARATE_64[half]);
        steps[2 * half] = pick_32(low, high, SEPARATE_32[0]);
        steps[2 * half + 1] = pick_32(low, high, SEPARATE_32[1]);
    }
}

INLINE void store_half_row(__m512i k0, __m512i k1, __m512i k2, __m512i k3, uint32_t* row) {
    for (size_t half = 0; half < 2; ++half) {
        __m512i first = pick_32(k0, k1, INTERLEAVE_32[half]), last = pick_32(k2, k3, INTERLEAVE_32[half]);
        store_512(row + 32 * half, pick_64(first, last, INTERLEAVE_64[0]));
        store_512(row + 32 * half + 16, pick_64(first, last, INTERLEAVE_64[1]));
    }
}

INLINE void load_row(const uint32_t* row, Lanes32* steps) {
    __m512i low[STEPS], high[STEPS];
    load_half_row(row, low);
    load_half_row(row + 64, high);
    for (size_t k = 0; k < STEPS; ++k) steps[k] = {low[k], high[k]};
}

INLINE void store_row(const Lanes32* steps, uint32_t* row) {
    store_half_row(steps[0].low, steps[1].low, steps[2].low, steps[3].low, row);
    store_half_row(steps[0].high, steps[1].high, steps[2].high, steps[3].high, row + 64);
}

// Words of 64 bits, as their low and high halves.

INLINE void load_row(const uint64_t* row, Lanes32* low, Lanes32* high) {
    for (size_t half = 0; half < 2; ++half) {
        __m512i lows[STEPS], highs[STEPS], first[STEPS], last[STEPS];
        // The low halves of 64 words stand as 64 words of 32 bits do, and so do the high ones.
        for (size_t i = 0; i < STEPS; ++i) {
            __m512i a = load_512(row + 64 * half + 16 * i), b = load_512(row + 64 * half + 16 * i + 8);
            first[i] = pick_32(a, b, SEPARATE_32[0]);
            last[i] = pick_32(a, b, SEPARATE_32[1]);
        }
        for (size_t j = 0; j < 2; ++j) {
            __m512i a = pick_64(first[0], first[1], SEPARATE_64[j]), b = pick_64(first[2], first[3], SEPARATE_64[j]);
            lows[2 * j] = pick_32(a, b, SEPARATE_32[0]);
            lows[2 * j + 1] = pick_32(a, b, SEPARATE_32[1]);
            __m512i c = pick_64(last[0], last[1], SEPARATE_64[j]), d = pick_64(last[2], last[3], SEPARATE_64[j]);
            highs[2 * j] = pick_32(c, d, SEPARATE_32[0]);
            highs[2 * j + 1] = pick_32(c, d, SEPARATE_32[1]);
        }
        for (size_t k = 0; k < STEPS; ++k) {
            (half ? low[k].high : low[k].low) = lows[k];
            (half ? high[k].high : high[k].low) = highs[k];
        }
    }
}

INLINE void store_row(const Lanes32* low, const Lanes32* high, uint64_t* row) {
    alignas(64) uint32_t lows[ROW], highs[ROW];
    store_row(low, lows);
    store_row(high, highs);
    for (size_t i = 0; i < ROW; i += 16) {
        __m512i a = load_512(lows + i), b = load_512(highs + i);
        store_512(row + i, pick_32(a, b, INTERLEAVE_32[0]));
        store_512(row + i + 8, pick_32(a, b, INTERLEAVE_32[1]));
    }
}

#elif TRICOMP_HAS_AVX2

struct Lanes32 {  // 32 numbers of 32 bits, or of fewer
    __m256i part[4];  // eight lanes each
};
using Lanes16 = Lanes32;

INLINE void load_row(const uint8_t* row, Lanes32* steps) {
    __m256i mask = _mm256_set1_epi32(255);
    for (size_t p = 0; p < 4; ++p) {
        __m256i four = load_256(row + 32 * p);
        steps[0].part[p] = _mm256_and_si256(four, mask);
        steps[1].part[p] = _mm256_and_si256(_mm256_srli_epi32(four, 8), mask);
        steps[2].part[p] = _mm256_and_si256(_mm256_srli_epi32(four, 16), mask);
        steps[3].part[p] = _mm256_srli_epi32(four, 24);
    }
}

INLINE void store_row(const Lanes32* steps, uint8_t* row) {
    for (size_t p = 0; p < 4; ++p) {
        __m256i first = _mm256_or_si256(steps[0].part[p], _mm256_slli_epi32(steps[1].part[p], 8));
        __m256i last = _mm256_or_si256(steps[2].part[p], _mm256_slli_epi32(steps[3].part[p], 8));
        store_256(row + 32 * p, _mm256_or_si256(first, _mm256_slli_epi32(last, 16)));
    }
}

INLINE void load_row(const uint16_t* row, Lanes32* steps) {
    __m256i mask = _mm256_set1_epi32(0xFFFF);
    for (size_t p = 0; p < 4; ++p) {
        __m256 a = _mm256_castsi256_ps(load_256(row + 32 * p)), b = _mm256_castsi256_ps(load_256(row + 32 * p + 16));
        __m256i first = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));  // lanes 0 1 4 5 2 3 6 7
        __m256i last = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
        first = _mm256_permute4x64_epi64(first, 0xD8);
        last = _mm256_permute4x64_epi64(last, 0xD8);
        steps[0].part[p] = _mm256_and_si256(first, mask);
        steps[1].part[p] = _mm256_srli_epi32(first, 16);
        steps[2].part[p] = _mm256_and_si256(last, mask);
        steps[3].part[p] = _mm256_srli_epi32(last, 16);
    }
}

INLINE void store_row(const Lanes32* steps, uint16_t* row) {
    for (size_t p = 0; p < 4; ++p) {
        __m256i first = _mm256_or_si256(steps[0].part[p], _mm256_slli_epi32(steps[1].part[p], 16));
        __m256i last = _mm256_or_si256(steps[2].part[p], _mm256_slli_epi32(steps[3].part[p], 16));
        __m256i a = _mm256_unpacklo_epi32(first, last);  // lanes 0 1 4 5
        __m256i b = _mm256_unpackhi_epi32(first, last);
        store_256(row + 32 * p, _mm256_permute2x128_si256(a, b, 0x20));
        store_256(row + 32 * p + 16, _mm256_permute2x128_si256(a, b, 0x31));
    }
}

// Transposes four by four numbers in each half of the registers.
INLINE void transpose_halves(__m256i& a, __m256i& b, __m256i& c, __m256i& d) {
    __m256i e = _mm256_unpacklo_epi32(a, b), f = _mm256_unpackhi_epi32(a, b);
    __m256i g = _mm256_unpacklo_epi32(c, d), h = _mm256_unpackhi_epi32(c, d);
    a = _mm256_unpacklo_epi64(e, g);
    b = _mm256_unpackhi_epi64(e, g);
    c = _mm256_unpacklo_epi64(f, h);
    d = _mm256_unpackhi_epi64(f, h);
}

// Eight lanes: e, f, g, h hold two lanes' four numbers each.
INLINE void load_part(__m256i e, __m256i f, __m256i g, __m256i h, Lanes32* steps, size_t p) {
    __m256i a = _mm256_permute2x128_si256(e, g, 0x20), b = _mm256_permute2x128_si256(e, g, 0x31);  // lanes 0 4; 1 5
    __m256i c = _mm256_permute2x128_si256(f, h, 0x20), d = _mm256_permute2x128_si256(f, h, 0x31);
    transpose_halves(a, b, c, d);
    steps[0].part[p] = a;
    steps[1].part[p] = b;
    steps[2].part[p] = c;
    steps[3].part[p] = d;
}

INLINE void store_part(const Lanes32* steps, size_t p, uint32_t* row) {
    __m256i a = steps[0].part[p], b = steps[1].part[p], c = steps[2].part[p], d = steps[3].part[p];
    transpose_halves(a, b, c, d);
    store_256(row, _mm256_permute2x128_si256(a, b, 0x20));
    store_256(row + 8, _mm256_permute2x128_si256(c, d, 0x20));
    store_256(row + 16, _mm256_permute2x128_si256(a, b, 0x31));
    store_256(row + 24, _mm256_permute2x128_si256(c, d, 0x31));
}

INLINE void load_row(const uint32_t* row, Lanes32* steps) {
    for (size_t p = 0; p < 4; ++p) {
        const uint32_t* at = row + 32 * p;
        load_part(load_256(at), load_256(at + 8), load_256(at + 16), load_256(at + 24), steps, p);
    }
}

INLINE void store_row(const Lanes32* steps, uint32_t* row) {
    for (size_t p = 0; p < 4; ++p) store_part(steps, p, row + 32 * p);
}

INLINE void load_row(const uint64_t* row, Lanes32* low, Lanes32* high) {
    for (size_t p = 0; p < 4; ++p) {
        __m256i lows[4], highs[4];
        for (size_t i = 0; i < 4; ++i) {
            __m256i a = load_256(row + 32 * p + 8 * i), b = load_256(row + 32 * p + 8 * i + 4);  // a lane each
            __m256 c = _mm256_castsi256_ps(_mm256_permute2x128_si256(a, b, 0x20));
            __m256 d = _mm256_castsi256_ps(_mm256_permute2x128_si256(a, b, 0x31));
            lows[i] = _mm256_castps_si256(_mm256_shuffle_ps(c, d, 0x88));
            highs[i] = _mm256_castps_si256(_mm256_shuffle_ps(c, d, 0xDD));
        }
        load_part(lows[0], lows[1], lows[2], lows[3], low, p);
        load_part(highs[0], highs[1], highs[2], highs[3], high, p);
    }
}

INLINE void store_row(const Lanes32* low, const Lanes32* high, uint64_t* row) {
    for (size_t p = 0; p < 4; ++p) {
        alignas(32) uint32_t lows[32], highs[32];
        store_part(low, p, lows);
        store_part(high, p, highs);
        for (size_t i = 0; i < 32; i += 8) {
            __m256i a = load_256(lows + i), b = load_256(highs + i);
            __m256i c = _mm256_unpacklo_epi32(a, b), d = _mm256_unpackhi_epi32(a, b);
            store_256(row + 32 * p + i, _mm256_permute2x128_si256(c, d, 0x20));
            store_256(row + 32 * p + i + 4, _mm256_permute2x128_si256(c, d, 0x31));
        }
    }
}

#else

struct Lanes32 {
    uint32_t lane[LANES];
};
using Lanes16 = Lanes32;

template <class Word>
INLINE void load_row(const Word* row, Lanes32* steps) {
    for (size_t lane = 0; lane < LANES; ++lane)
        for (size_t k = 0; k < STEPS; ++k) steps[k].lane[lane] = row[STEPS * lane + k];
}

template <class Word>
INLINE void store_row(const Lanes32* steps, Word* row) {
    for (size_t lane = 0; lane < LANES; ++lane)
        for (size_t k = 0; k < STEPS; ++k) row[STEPS * lane + k] = static_cast<Word>(steps[k].lane[lane]);
}

INLINE void load_row(const uint64_t* row, Lanes32* low, Lanes32* high) {
    for (size_t lane = 0; lane < LANES; ++lane)
        for (size_t k = 0; k < STEPS; ++k) {
            low[k].lane[lane] = static_cast<uint32_t>(row[STEPS * lane + k]);
            high[k].lane[lane] = static_cast<uint32_t>(row[STEPS * lane + k] >> 32);
        }
}

INLINE void store_row(const Lanes32* low, const Lanes32* high, uint64_t* row) {
    for (size_t lane = 0; lane < LANES; ++lane)
        for (size_t k = 0; k < STEPS; ++k)
            row[STEPS * lane + k] = low[k].lane[lane] | static_cast<uint64_t>(high[k].lane[lane]) << 32;
}

#endif

TRICOMP_END
