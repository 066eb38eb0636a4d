// Vectors of lanes: as many as the instruction set holds at a time, with the few operations that predictions need.
// Stage header: no STL.
//
// Plain arithmetic is the compiler's own vector types; only what these lack, or do badly, is written for each
// instruction set. Loops work on blocks of 32 words, several vectors each, so that narrow results are stored together.
// The hard thing: words of 8 or 16 bits may sit in wider lanes, because not all sets shift narrow ones by a count a
// lane.
#pragma once

#include <cstring>

#include "bits.h"
#include "isa.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

TRICOMP_BEGIN

constexpr size_t BLOCK = 32;  // words
constexpr size_t VECTOR_BYTES = TRICOMP_HAS_AVX512 ? 64 : TRICOMP_HAS_AVX2 ? 32 : 16;
#if TRICOMP_HAS_AVX2
typedef uint16_t NarrowLane;  // the narrowest with shifts by a count a lane
#else
typedef uint32_t NarrowLane;
#endif

// Of words of a width: the lane for shifts by a count a lane; the lane where all shift alike.
template <class Word> struct LanesOf { typedef Word Shifting, Even; };
template <> struct LanesOf<uint8_t> { typedef NarrowLane Shifting; typedef uint16_t Even; };
template <> struct LanesOf<uint16_t> { typedef NarrowLane Shifting; typedef uint16_t Even; };
template <class Word> using ShiftingLane = typename LanesOf<Word>::Shifting;
template <class Word> using EvenLane = typename LanesOf<Word>::Even;

template <class Lane>
struct Vector {
    typedef typename Widths<Lane>::Signed SignedLane;
    typedef Lane Raw __attribute__((vector_size(VECTOR_BYTES)));
    typedef SignedLane SignedRaw __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr size_t N = VECTOR_BYTES / sizeof(Lane), A_BLOCK = BLOCK / N;
    Raw raw;

    INLINE SignedRaw as_signed() const { return SignedRaw(raw); }
    friend INLINE Vector operator+(Vector a, Vector b) { return {a.raw + b.raw}; }
    friend INLINE Vector operator-(Vector a, Vector b) { return {a.raw - b.raw}; }
    friend INLINE Vector operator&(Vector a, Vector b) { return {a.raw & b.raw}; }
    friend INLINE Vector operator|(Vector a, Vector b) { return {a.raw | b.raw}; }
    friend INLINE Vector operator^(Vector a, Vector b) { return {a.raw ^ b.raw}; }
    friend INLINE Vector operator~(Vector a) { return {~a.raw}; }
    friend INLINE Vector operator<<(Vector a, uint32_t n) { return {a.raw << n}; }  // n below the lane's bits
    friend INLINE Vector operator>>(Vector a, uint32_t n) { return {a.raw >> n}; }
};

// The compiler would copy several vectors at a time through general registers.
template <class Lane>
INLINE void store(Vector<Lane> a, void* out) {
    typedef typename Vector<Lane>::Raw Anywhere __attribute__((aligned(1), may_alias));
    *static_cast<Anywhere*>(out) = a.raw;
}
template <class Lane>
INLINE void store_same(const Vector<Lane>* a, Lane* out) {
    for (size_t j = 0; j < Vector<Lane>::A_BLOCK; j++) store(a[j], out + j * Vector<Lane>::N);
}

template <class Lane>
INLINE Vector<Lane> all(Lane x) {
    return {typename Vector<Lane>::Raw{} + x};
}

// Which lanes.
#if TRICOMP_HAS_AVX512
template <size_t N> struct MaskBits;
template <> struct MaskBits<32> { typedef __mmask32 Raw; };
template <> struct MaskBits<16> { typedef __mmask16 Raw; };
template <> struct MaskBits<8> { typedef __mmask8 Raw; };
template <class Lane> using MaskOf = typename MaskBits<Vector<Lane>::N>::Raw;
#else
template <class Lane> using MaskOf = typename Vector<Lane>::SignedRaw;
#endif
template <class Lane>
struct Mask {
    MaskOf<Lane> raw;

    friend INLINE Mask operator&(Mask a, Mask b) { return {MaskOf<Lane>(a.raw & b.raw)}; }
    friend INLINE Mask operator^(Mask a, Mask b) { return {MaskOf<Lane>(a.raw ^ b.raw)}; }
    friend INLINE Mask operator~(Mask a) { return {MaskOf<Lane>(~a.raw)}; }
};

#if TRICOMP_HAS_AVX512

template <class Lane>
INLINE __m512i zmm(Vector<Lane> a) {
    return __m512i(a.raw);
}
template <class Lane>
INLINE Vector<Lane> vector_of(__m512i a) {
    return {typename Vector<Lane>::Raw(a)};
}

INLINE __m512i counting() {  // 0 to 31
    return _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                                                 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
}

INLINE __m512i counting_bytes() {  // 0 to 63
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(counting()));
    return _mm512_or_si512(_mm512_shuffle_i64x2(low, low, 0x44), _mm512_setr_epi64(0, 0, 0, 0, 0x2020202020202020,
                           0x2020202020202020, 0x2020202020202020, 0x2020202020202020));
}

template <class Lane>
INLINE Mask<Lane> is_less(Vector<Lane> a, Vector<Lane> b) {
    if constexpr (sizeof(Lane) == 2) return {_mm512_cmplt_epu16_mask(zmm(a), zmm(b))};
    if constexpr (sizeof(Lane) == 4) return {_mm512_cmplt_epu32_mask(zmm(a), zmm(b))};
    if constexpr (sizeof(Lane) == 8) return {_mm512_cmplt_epu64_mask(zmm(a), zmm(b))};
}
template <class Lane>
INLINE Mask<Lane> has_common(Vector<Lane> a, Vector<Lane> b) {  // a & b is not 0
    if constexpr (sizeof(Lane) == 2) return {_mm512_test_epi16_mask(zmm(a), zmm(b))};
    if constexpr (sizeof(Lane) == 4) return {_mm512_test_epi32_mask(zmm(a), zmm(b))};
    if constexpr (sizeof(Lane) == 8) return {_mm512_test_epi64_mask(zmm(a), zmm(b))};
}
template <class Lane>
INLINE Mask<Lane> is_negative(Vector<Lane> a) {
    if constexpr (sizeof(Lane) == 2) return {_mm512_movepi16_mask(zmm(a))};
    if constexpr (sizeof(Lane) == 4) return {_mm512_movepi32_mask(zmm(a))};
    if constexpr (sizeof(Lane) == 8) return {_mm512_movepi64_mask(zmm(a))};
}
template <class Lane>
INLINE uint32_t bits_of(Mask<Lane> mask) {
    return uint32_t(mask.raw);
}
template <class Lane>
INLINE Vector<Lane> keep(Mask<Lane> mask, Vector<Lane> a) {  // a, or 0 elsewhere
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_maskz_mov_epi16(mask.raw, zmm(a)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_maskz_mov_epi32(mask.raw, zmm(a)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_maskz_mov_epi64(mask.raw, zmm(a)));
}
template <class Lane>
INLINE Vector<Lane> subtract_where(Mask<Lane> mask, Vector<Lane> a, Vector<Lane> b) {  // a - b, or a elsewhere
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_mask_sub_epi16(zmm(a), mask.raw, zmm(a), zmm(b)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_mask_sub_epi32(zmm(a), mask.raw, zmm(a), zmm(b)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_mask_sub_epi64(zmm(a), mask.raw, zmm(a), zmm(b)));
}
template <class Lane>
INLINE Vector<Lane> absolute(Vector<Lane> a) {
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_abs_epi16(zmm(a)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_abs_epi32(zmm(a)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_abs_epi64(zmm(a)));
}
template <class Lane>
INLINE Vector<Lane> smaller(Vector<Lane> a, Vector<Lane> b) {
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_min_epu16(zmm(a), zmm(b)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_min_epu32(zmm(a), zmm(b)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_min_epu64(zmm(a), zmm(b)));
}
template <class Lane>
INLINE Vector<Lane> excess(Vector<Lane> a, Vector<Lane> b) {  // a - b, at least 0
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_subs_epu16(zmm(a), zmm(b)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_max_epu32(zmm(a), zmm(b))) - b;
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_max_epu64(zmm(a), zmm(b))) - b;
}
template <class Lane>
INLINE Vector<Lane> sign_fill(Vector<Lane> a) {
    return {typename Vector<Lane>::Raw(a.as_signed() >> int(BITS<Lane> - 1))};
}
// By a count a lane; from the lane's bits on, 0.
template <class Lane>
INLINE Vector<Lane> shift_up(Vector<Lane> a, Vector<Lane> n) {
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_sllv_epi16(zmm(a), zmm(n)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_sllv_epi32(zmm(a), zmm(n)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_sllv_epi64(zmm(a), zmm(n)));
}
// All bits from bit n on; n below the lane's bits.
template <class Lane>
INLINE Vector<Lane> ones_from(Vector<Lane> n) {
    return shift_up(all<Lane>(Lane(~Lane(0))), n);
}
// The bits of a where mask has ones, of b elsewhere.
template <class Lane>
INLINE Vector<Lane> choose_bits(Vector<Lane> mask, Vector<Lane> a, Vector<Lane> b) {
    return vector_of<Lane>(_mm512_ternarylogic_epi64(zmm(mask), zmm(a), zmm(b), 0xCA));
}
template <class Lane>
INLINE Vector<Lane> leading_zeros(Vector<Lane> a) {
    if constexpr (sizeof(Lane) == 2) {
        // Each half of 32 bits apart; a bit below it ends the count at 16.
        const __m512i end = _mm512_set1_epi32(0x8000);
        const __m512i low = _mm512_lzcnt_epi32(_mm512_or_si512(_mm512_slli_epi32(zmm(a), 16), end));
        const __m512i high = _mm512_lzcnt_epi32(_mm512_or_si512(zmm(a), end));
        return vector_of<Lane>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_lzcnt_epi32(zmm(a)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_lzcnt_epi64(zmm(a)));
}
template <class Lane>
INLINE Vector<Lane> bit_length(Vector<Lane> a) {
    return all<Lane>(BITS<Lane>) - leading_zeros(a);
}
// Of the low halves of lanes.
INLINE Vector<uint64_t> product(Vector<uint64_t> a, Vector<uint64_t> b) {
    return vector_of<uint64_t>(_mm512_mul_epu32(zmm(a), zmm(b)));
}
template <class Lane>
INLINE Vector<Lane> select(Mask<Lane> mask, Vector<Lane> a, Vector<Lane> b) {
    if constexpr (sizeof(Lane) == 2) return vector_of<Lane>(_mm512_mask_mov_epi16(zmm(b), mask.raw, zmm(a)));
    if constexpr (sizeof(Lane) == 4) return vector_of<Lane>(_mm512_mask_mov_epi32(zmm(b), mask.raw, zmm(a)));
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_mask_mov_epi64(zmm(b), mask.raw, zmm(a)));
}

template <class Lane>
INLINE void store_block(const Vector<Lane>* a, uint8_t* out) {
    for (size_t j = 0; j < Vector<Lane>::A_BLOCK; j++) {
        if constexpr (sizeof(Lane) == 2) _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi16_epi8(zmm(a[0])));
        if constexpr (sizeof(Lane) == 4) _mm_storeu_si128((__m128i*)out + j, _mm512_cvtepi32_epi8(zmm(a[j])));
        if constexpr (sizeof(Lane) == 8) _mm_storel_epi64((__m128i*)(out + 8 * j), _mm512_cvtepi64_epi8(zmm(a[j])));
    }
}
template <class Lane>
INLINE Vector<uint16_t> halves(const Vector<Lane>* a) {  // the low 16 bits of a block's lanes
    if constexpr (sizeof(Lane) == 2) return a[0];
    if constexpr (sizeof(Lane) == 4) {
        const __m512i even = _mm512_slli_epi16(counting(), 1);
        return vector_of<uint16_t>(_mm512_permutex2var_epi16(zmm(a[0]), even, zmm(a[1])));
    }
    if constexpr (sizeof(Lane) == 8) {
        const __m256i low = _mm512_cvtepi64_epi32(zmm(a[0])), next = _mm512_cvtepi64_epi32(zmm(a[1]));
        const __m256i third = _mm512_cvtepi64_epi32(zmm(a[2])), high = _mm512_cvtepi64_epi32(zmm(a[3]));
        const Vector<uint32_t> both[2] = {
            vector_of<uint32_t>(_mm512_inserti64x4(_mm512_castsi256_si512(low), next, 1)),
            vector_of<uint32_t>(_mm512_inserti64x4(_mm512_castsi256_si512(third), high, 1))};
        return halves(both);
    }
}
template <class Lane>
INLINE void store_block(const Vector<Lane>* a, uint16_t* out) {
    const Vector<uint16_t> low = halves(a);
    store(low, out);
}
INLINE void store_block(const Vector<uint64_t>* a, uint32_t* out) {
    for (size_t j = 0; j < 4; j++) _mm256_storeu_si256((__m256i*)out + j, _mm512_cvtepi64_epi32(zmm(a[j])));
}
INLINE void store_block(const Vector<uint32_t>* a, uint32_t* out) { store_same(a, out); }
INLINE void store_block(const Vector<uint64_t>* a, uint64_t* out) { store_same(a, out); }

#else  // AVX2 or portable

template <class Lane>
INLINE Mask<Lane> is_less(Vector<Lane> a, Vector<Lane> b) {
    return {a.raw < b.raw};
}
template <class Lane>
INLINE Mask<Lane> has_common(Vector<Lane> a, Vector<Lane> b) {
    return {(a.raw & b.raw) != typename Vector<Lane>::Raw{}};
}
template <class Lane>
INLINE Mask<Lane> is_negative(Vector<Lane> a) {
    return {a.as_signed() < typename Vector<Lane>::SignedRaw{}};
}
template <class Lane>
INLINE uint32_t bits_of(Mask<Lane> mask) {
#if TRICOMP_HAS_AVX2
    if constexpr (sizeof(Lane) == 4) return uint32_t(_mm256_movemask_ps(__m256(mask.raw)));
    if constexpr (sizeof(Lane) == 8) return uint32_t(_mm256_movemask_pd(__m256d(mask.raw)));
    const __m256i bytes = _mm256_packs_epi16(__m256i(mask.raw), _mm256_setzero_si256());
    const uint32_t both = uint32_t(_mm256_movemask_epi8(bytes));
    return (both & 0xFF) | (both >> 8 & 0xFF00);
#elif defined(__SSE2__)
    if constexpr (sizeof(Lane) == 4) return uint32_t(_mm_movemask_ps(__m128(mask.raw)));
    if constexpr (sizeof(Lane) == 8) return uint32_t(_mm_movemask_pd(__m128d(mask.raw)));
    return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(__m128i(mask.raw), _mm_setzero_si128())));
#else
    uint32_t bits = 0;
    for (size_t i = 0; i < Vector<Lane>::N; i++) bits |= uint32_t(mask.raw[i] & 1) << i;
    return bits;
#endif
}
template <class Lane>
INLINE Vector<Lane> keep(Mask<Lane> mask, Vector<Lane> a) {
    return {a.raw & typename Vector<Lane>::Raw(mask.raw)};
}
template <class Lane>
INLINE Vector<Lane> subtract_where(Mask<Lane> mask, Vector<Lane> a, Vector<Lane> b) {
    return a - keep(mask, b);
}
template <class Lane>
INLINE Vector<Lane> sign_fill(Vector<Lane> a) {
    return {typename Vector<Lane>::Raw(is_negative(a).raw)};
}
template <class Lane>
INLINE Vector<Lane> absolute(Vector<Lane> a) {
#if TRICOMP_HAS_AVX2
    if constexpr (sizeof(Lane) == 2) return {typename Vector<Lane>::Raw(_mm256_abs_epi16(__m256i(a.raw)))};
    if constexpr (sizeof(Lane) == 4) return {typename Vector<Lane>::Raw(_mm256_abs_epi32(__m256i(a.raw)))};
#endif
    const Vector<Lane> fill = sign_fill(a);
    return (a ^ fill) - fill;
}
template <class Lane>
INLINE Vector<Lane> smaller(Vector<Lane> a, Vector<Lane> b) {
#if TRICOMP_HAS_AVX2
    typedef typename Vector<Lane>::Raw Raw;
    if constexpr (sizeof(Lane) == 2) return {Raw(_mm256_min_epu16(__m256i(a.raw), __m256i(b.raw)))};
    if constexpr (sizeof(Lane) == 4) return {Raw(_mm256_min_epu32(__m256i(a.raw), __m256i(b.raw)))};
#endif
    return {a.raw < b.raw ? a.raw : b.raw};
}
template <class Lane>
INLINE Vector<Lane> excess(Vector<Lane> a, Vector<Lane> b) {
#if TRICOMP_HAS_AVX2
    typedef typename Vector<Lane>::Raw Raw;
    if constexpr (sizeof(Lane) == 2) return {Raw(_mm256_subs_epu16(__m256i(a.raw), __m256i(b.raw)))};
    if constexpr (sizeof(Lane) == 4) return {Raw(_mm256_max_epu32(__m256i(a.raw), __m256i(b.raw))) - b.raw};
#endif
    return {a.raw < b.raw ? typename Vector<Lane>::Raw{} : a.raw - b.raw};
}
#if TRICOMP_HAS_AVX2
// 1 << n in lanes of 16 bits, 0 for 16: a shuffle finds the one in the low byte, or in the high byte 8 counts on.
INLINE Vector<uint16_t> power_of_2(Vector<uint16_t> n) {
    const __m256i bit = _mm256_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0,
                                         1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0);
    // 16 reaches the top bit of the low byte, which gives 0.
    const Vector<uint16_t>::Raw both = n.raw * 0x0101 + 0x0870;
    return {Vector<uint16_t>::Raw(_mm256_shuffle_epi8(bit, __m256i(both)))};
}
#endif
template <class Lane>
INLINE Vector<Lane> shift_up(Vector<Lane> a, Vector<Lane> n) {
#if TRICOMP_HAS_AVX2
    typedef typename Vector<Lane>::Raw Raw;
    if constexpr (sizeof(Lane) == 2) return {a.raw * power_of_2(n).raw};
    if constexpr (sizeof(Lane) == 4) return {Raw(_mm256_sllv_epi32(__m256i(a.raw), __m256i(n.raw)))};
    if constexpr (sizeof(Lane) == 8) return {Raw(_mm256_sllv_epi64(__m256i(a.raw), __m256i(n.raw)))};
#else
#ifdef __SSE2__
    if constexpr (sizeof(Lane) == 4) {  // there is no such shift: multiply by a power of two, made as a float
        typedef typename Vector<Lane>::Raw Raw;
        const Raw power = Raw(_mm_cvttps_epi32(__m128((n.raw + 127) << 23)));
        return {a.raw * power & Raw(is_less(n, all<Lane>(32)).raw)};
    }
#endif
    const Vector<Lane> bits = all<Lane>(BITS<Lane>);
    return {(a.raw << (n.raw & (BITS<Lane> - 1))) & typename Vector<Lane>::Raw(is_less(n, bits).raw)};
#endif
}
template <class Lane>
INLINE Vector<Lane> ones_from(Vector<Lane> n) {
#if TRICOMP_HAS_AVX2
    if constexpr (sizeof(Lane) == 2) return {-power_of_2(n).raw};
#endif
    return shift_up(all<Lane>(Lane(~Lane(0))), n);
}
template <class Lane>
INLINE Vector<Lane> choose_bits(Vector<Lane> mask, Vector<Lane> a, Vector<Lane> b) {
    return (mask & a) | (~mask & b);
}
template <class Lane>
INLINE Vector<Lane> select(Mask<Lane> mask, Vector<Lane> a, Vector<Lane> b) {
    return choose_bits(Vector<Lane>{typename Vector<Lane>::Raw(mask.raw)}, a, b);
}
INLINE Vector<uint64_t> product(Vector<uint64_t> a, Vector<uint64_t> b) {
#if TRICOMP_HAS_AVX2
    return {Vector<uint64_t>::Raw(_mm256_mul_epu32(__m256i(a.raw), __m256i(b.raw)))};
#else
    return {(a.raw & 0xFFFFFFFF) * (b.raw & 0xFFFFFFFF)};
#endif
}
#if TRICOMP_HAS_AVX2
// By shuffles: of the high and the low half of each byte, then of the high and the low byte. 16: there is no one.
INLINE Vector<uint16_t> leading_zeros(Vector<uint16_t> a) {
    typedef Vector<uint16_t>::Raw Raw;
    const __m256i high_zeros = _mm256_setr_epi8(16, 3, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0,
                                                16, 3, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i low_zeros = _mm256_setr_epi8(16, 7, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4,
                                               16, 7, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4);
    const Vector<uint16_t> half = all<uint16_t>(0x0F0F), low = a & half, high = (a >> 4) & half;
    const __m256i bytes = _mm256_min_epu8(_mm256_shuffle_epi8(high_zeros, __m256i(high.raw)),
                                          _mm256_shuffle_epi8(low_zeros, __m256i(low.raw)));
    const Vector<uint16_t> zeros = {Raw(bytes)};
    const Vector<uint16_t> below = (zeros & all<uint16_t>(0xFF)) + all<uint16_t>(8);
    return smaller(smaller(zeros >> 8, below), all<uint16_t>(16));
}
#endif
// There is no instruction for it, so the exponent of a float tells. It is exact: with the bit below the leading one
// cleared no rounding can carry, and 32 bits fit a double.
template <class Lane>
INLINE Vector<Lane> bit_length(Vector<Lane> a) {
#if TRICOMP_HAS_AVX2
    if constexpr (sizeof(Lane) == 2) return all<Lane>(16) - leading_zeros(a);
#endif
    if constexpr (sizeof(Lane) == 4) {
        typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
        typedef typename Vector<Lane>::SignedRaw Signed;
        const Floats value = __builtin_convertvector(Signed((a & ~(a >> 1)).raw), Floats);
        const Vector<Lane> field = {typename Vector<Lane>::Raw(Signed(value)) >> 23};
        // From 2^31 on the float is negative, and the field so large that the minimum tells.
        return smaller(excess(field, all<Lane>(126)), all<Lane>(32));
    }
    if constexpr (sizeof(Lane) == 8) {
        typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
        typedef typename Vector<Lane>::Raw Raw;
        const Raw magic = all<Lane>(uint64_t(1075) << 52).raw, high = a.raw >> 32;  // 2^52
        const Raw is_high = Raw(high != Raw{}), part = ((high & is_high) | (a.raw & ~is_high)) & 0xFFFFFFFF;
        const Doubles value = Doubles(part | magic) - Doubles(magic);
        const Vector<Lane> field = {Raw(value) >> 52};
        return {excess(field, all<Lane>(1022)).raw + (is_high & 32)};
    }
}

template <class Lane>
INLINE Vector<Lane> leading_zeros(Vector<Lane> a) {
    return all<Lane>(BITS<Lane>) - bit_length(a);
}

#if TRICOMP_HAS_AVX2
// Two vectors of 64-bit lanes as one of their low 32 bits.
INLINE Vector<uint32_t> low_lanes(Vector<uint64_t> a, Vector<uint64_t> b) {
    const __m256 both = _mm256_shuffle_ps(__m256(a.raw), __m256(b.raw), 0x88);
    return {Vector<uint32_t>::Raw(_mm256_permute4x64_epi64(__m256i(both), 0xD8))};
}
INLINE void store_block(const Vector<uint16_t>* a, uint8_t* out) {
    const __m256i bytes = _mm256_packus_epi16(__m256i(a[0].raw), __m256i(a[1].raw));
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(bytes, 0xD8));
}
INLINE void store_block(const Vector<uint32_t>* a, uint8_t* out) {
    const __m256i low = _mm256_packus_epi32(__m256i(a[0].raw), __m256i(a[1].raw));
    const __m256i high = _mm256_packus_epi32(__m256i(a[2].raw), __m256i(a[3].raw));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)out, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
}
INLINE void store_block(const Vector<uint16_t>* a, uint16_t* out) { store_same(a, out); }
INLINE void store_block(const Vector<uint32_t>* a, uint16_t* out) {
    for (size_t j = 0; j < 2; j++) {
        const __m256i both = _mm256_packus_epi32(__m256i(a[2 * j].raw), __m256i(a[2 * j + 1].raw));
        _mm256_storeu_si256((__m256i*)out + j, _mm256_permute4x64_epi64(both, 0xD8));
    }
}
INLINE void store_block(const Vector<uint32_t>* a, uint32_t* out) { store_same(a, out); }
template <class Word>
INLINE void store_block(const Vector<uint64_t>* a, Word* out) {
    Vector<uint32_t> low[4];
    for (size_t j = 0; j < 4; j++) low[j] = low_lanes(a[2 * j], a[2 * j + 1]);
    store_block(low, out);
}
INLINE void store_block(const Vector<uint64_t>* a, uint64_t* out) { store_same(a, out); }
#else
template <class Lane, class Word>
INLINE void store_block(const Vector<Lane>* a, Word* out) {
    Lane lanes[BLOCK];
    std::memcpy(lanes, a, sizeof lanes);
    for (size_t i = 0; i < BLOCK; i++) out[i] = Word(lanes[i]);
}
#endif

#endif

#if TRICOMP_HAS_AVX2
// Numbers of 16 bits as floats cut off after 7 bits of mantissa: above these the bit length + 126; 0 for 0. The fastest
// way to a bit length and the bits below the leading one, where no instruction counts zeros in lanes of 16 bits.
INLINE Vector<uint16_t> cut_floats(Vector<uint16_t> a) {
#if TRICOMP_HAS_AVX512
    const __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(zmm(a), _mm512_set1_epi32(0xFFFF)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_srli_epi32(zmm(a), 16));
    const __m512i first = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
    return vector_of<uint16_t>(_mm512_mask_mov_epi16(first, 0xAAAAAAAA, _mm512_castps_si512(high)));
#else
    const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(__m256i(a.raw), _mm256_set1_epi32(0xFFFF)));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(__m256i(a.raw), 16));
    const __m256i first = _mm256_srli_epi32(_mm256_castps_si256(low), 16);
    return {Vector<uint16_t>::Raw(_mm256_blend_epi16(first, _mm256_castps_si256(high), 0xAA))};
#endif
}
#endif

// N words in lanes that may be wider: Word unsigned, or signed to fill up with the sign.
template <class Lane, class Word>
INLINE Vector<Lane> load(const Word* words) {
    typedef typename Vector<Lane>::Raw Raw;
    constexpr size_t N = Vector<Lane>::N, RATIO = sizeof(Lane) / sizeof(Word);
    [[maybe_unused]] constexpr bool IS_SIGNED = Word(-1) < Word(0);
    Word narrow __attribute__((vector_size(N * sizeof(Word))));
    std::memcpy(&narrow, words, sizeof narrow);
    if constexpr (RATIO == 1) return {Raw(narrow)};
#if TRICOMP_HAS_AVX512
    // The compiler widens by one power of two at a time.
    if constexpr (RATIO == 4 && sizeof(Word) == 1 && IS_SIGNED) return {Raw(_mm512_cvtepi8_epi32(__m128i(narrow)))};
    if constexpr (RATIO == 4 && sizeof(Word) == 1) return {Raw(_mm512_cvtepu8_epi32(__m128i(narrow)))};
    if constexpr (RATIO == 4 && IS_SIGNED) return {Raw(_mm512_cvtepi16_epi64(__m128i(narrow)))};
    if constexpr (RATIO == 4) return {Raw(_mm512_cvtepu16_epi64(__m128i(narrow)))};
    if constexpr (RATIO == 8 && IS_SIGNED) return {Raw(_mm512_cvtepi8_epi64(_mm_loadu_si64(words)))};
    if constexpr (RATIO == 8) return {Raw(_mm512_cvtepu8_epi64(_mm_loadu_si64(words)))};
    if constexpr (RATIO == 2) return {Raw(__builtin_convertvector(narrow, typename Vector<Lane>::SignedRaw))};
#elif TRICOMP_HAS_AVX2
    uint64_t low = 0;
    std::memcpy(&low, words, RATIO == 2 ? 8 : N * sizeof(Word));
    [[maybe_unused]] const __m128i few = _mm_cvtsi64_si128(int64_t(low));
    if constexpr (RATIO == 4 && sizeof(Word) == 1 && IS_SIGNED) return {Raw(_mm256_cvtepi8_epi32(few))};
    if constexpr (RATIO == 4 && sizeof(Word) == 1) return {Raw(_mm256_cvtepu8_epi32(few))};
    if constexpr (RATIO == 4 && IS_SIGNED) return {Raw(_mm256_cvtepi16_epi64(few))};
    if constexpr (RATIO == 4) return {Raw(_mm256_cvtepu16_epi64(few))};
    if constexpr (RATIO == 8 && IS_SIGNED) return {Raw(_mm256_cvtepi8_epi64(few))};
    if constexpr (RATIO == 8) return {Raw(_mm256_cvtepu8_epi64(few))};
    if constexpr (RATIO == 2) return {Raw(__builtin_convertvector(narrow, typename Vector<Lane>::SignedRaw))};
#elif defined(__SSE2__)
    // Words go to the tops of lanes first.
    uint64_t few = 0;
    std::memcpy(&few, words, N * sizeof(Word));
    const __m128i zero = _mm_setzero_si128();
    __m128i wide = _mm_set_epi64x(0, int64_t(few));
    if constexpr (sizeof(Word) == 1) wide = _mm_unpacklo_epi8(zero, wide);
    if constexpr (sizeof(Word) <= 2 && sizeof(Lane) >= 4) wide = _mm_unpacklo_epi16(zero, wide);
    if constexpr (sizeof(Word) <= 4 && sizeof(Lane) == 8) wide = _mm_unpacklo_epi32(zero, wide);
    constexpr int SPARE = 8 * int(sizeof(Lane) - sizeof(Word));
    if constexpr (IS_SIGNED) return {Raw(typename Vector<Lane>::SignedRaw(wide) >> SPARE)};
    else return {Raw(wide) >> SPARE};
#else
    if constexpr (RATIO == 2) return {Raw(__builtin_convertvector(narrow, typename Vector<Lane>::SignedRaw))};
    Vector<Lane> wide;
    for (size_t i = 0; i < N; i++) wide.raw[i] = Lane(typename Vector<Lane>::SignedLane(words[i]));
    return wide;
#endif
}

template <class Lane, class Word>
INLINE Vector<Lane> load_signed(const Word* words) {
    return load<Lane>(reinterpret_cast<const typename Widths<Word>::Signed*>(words));
}

// The same bits as lanes of another width.
INLINE Vector<uint64_t> wide_of(Vector<uint32_t> a) { return {Vector<uint64_t>::Raw(a.raw)}; }
INLINE Vector<uint32_t> narrow_of(Vector<uint64_t> a) { return {Vector<uint32_t>::Raw(a.raw)}; }

// Even lanes of a, odd lanes of b.
INLINE Vector<uint32_t> interleave(Vector<uint32_t> a, Vector<uint32_t> b) {
#if TRICOMP_HAS_AVX512
    return vector_of<uint32_t>(_mm512_mask_mov_epi32(zmm(a), 0xAAAA, zmm(b)));
#elif TRICOMP_HAS_AVX2
    return {Vector<uint32_t>::Raw(_mm256_blend_epi32(__m256i(a.raw), __m256i(b.raw), 0xAA))};
#else
    const uint64_t low = 0xFFFFFFFF;
    return narrow_of(choose_bits(all<uint64_t>(low), wide_of(a), wide_of(b)));
#endif
}

// With the sign, as numbers are divided by powers of two. Lanes of 16 or 32 bits.
template <class Lane>
INLINE Vector<Lane> shift_signed(Vector<Lane> a, int n) {
    return {typename Vector<Lane>::Raw(a.as_signed() >> n)};
}

template <class Lane>
INLINE Vector<Lane> smaller_signed(Vector<Lane> a, Vector<Lane> b) {
#if TRICOMP_HAS_AVX512
    if constexpr (sizeof(Lane) == 8) return vector_of<Lane>(_mm512_min_epi64(zmm(a), zmm(b)));
#endif
    return {typename Vector<Lane>::Raw(a.as_signed() < b.as_signed() ? a.as_signed() : b.as_signed())};
}
template <class Lane>
INLINE Vector<Lane> larger_signed(Vector<Lane> a, Vector<Lane> b) {
    return {typename Vector<Lane>::Raw(a.as_signed() < b.as_signed() ? b.as_signed() : a.as_signed())};
}

// A block of words from lanes that may be wider, and then hold more than the word.
template <class Lane, class Word>
INLINE void store_words(Vector<Lane>* a, Word* out) {
    if (sizeof(Word) < sizeof(Lane) && !TRICOMP_HAS_AVX512)
        for (size_t j = 0; j < Vector<Lane>::A_BLOCK; j++) a[j] = a[j] & all<Lane>(Word(~Word(0)));
    store_block(a, out);
}

// context * n_symbols + symbol of a block; contexts null: all 0.
template <class Lane>
INLINE void store_rows(const Vector<Lane>* symbols, const uint8_t* contexts, uint32_t n_symbols, uint16_t* out) {
    typedef Vector<uint16_t> Halves;
    if constexpr (sizeof(Lane) == 2) {
        for (size_t j = 0; j < Vector<Lane>::A_BLOCK; j++) {
            Halves row = symbols[j];
            if (contexts) row.raw += load<uint16_t>(contexts + j * Halves::N).raw * uint16_t(n_symbols);
            store(row, out + j * Halves::N);
        }
        return;
    }
    store_block(symbols, out);
    for (size_t j = 0; contexts && j < BLOCK; j += Halves::N) {
        Halves row = load<uint16_t>(out + j);
        row.raw += load<uint16_t>(contexts + j).raw * uint16_t(n_symbols);
        store(row, out + j);
    }
}

// A word's value in a wider lane, filled up with its sign.
template <class Word, class Lane>
INLINE Vector<Lane> wrap(Vector<Lane> a) {
    constexpr int SPARE = int(BITS<Lane> - BITS<Word>);
    if constexpr (SPARE == 0) return a;
    else return shift_signed(a << SPARE, SPARE);
}

// As Order; words of fewer bits than the lane are filled up with their sign, and so are the results.
template <class Word, class Lane>
struct OrderOf {
    Vector<Lane> fill, top;

    explicit OrderOf(const Kind& kind)
        : fill(all<Lane>(kind.is_signed && kind.is_float ? Lane(~Lane(0)) : Lane(0))),
          top(all<Lane>(kind.is_signed ? Lane(~Lane(0)) << (BITS<Word> - 1) : 0)) {}
    INLINE Vector<Lane> ordered(Vector<Lane> x) const { return x ^ ((sign_fill(x) & fill) | top); }
    INLINE Vector<Lane> unordered(Vector<Lane> x) const { return x ^ ((~sign_fill(x) & fill) | top); }
};

TRICOMP_END
