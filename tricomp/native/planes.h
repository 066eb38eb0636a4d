// Byte planes of remainders: byte p of every remainder side by side, and back. Stage header: isa.h, model.h and lanes.h
// only, no STL.
//
// The hard thing: bytes must cross a whole register. All planes are therefore made in one pass, so that each register
// of remainders is loaded or stored once, and the number of planes is known when the loops are compiled.
#pragma once

#include "lanes.h"

TRICOMP_BEGIN

#if TRICOMP_HAS_AVX512

// Two registers hold 128 / word_bytes remainders, and as bytes of planes they are word_bytes *pieces* of that many
// bytes, plane after plane. split: where the bytes of the pieces are in the remainders; join: the inverse.
template <size_t word_bytes>
struct PieceIndices {
    LaneIndices<uint8_t> split[2], join[2];
};

template <size_t word_bytes>
constexpr PieceIndices<word_bytes> piece_indices() {
    constexpr size_t N = 128 / word_bytes;
    PieceIndices<word_bytes> indices{};
    for (size_t i = 0; i < 128; ++i) {
        indices.split[i / 64].at[i % 64] = static_cast<uint8_t>(i % N * word_bytes + i / N);
        indices.join[i / 64].at[i % 64] = static_cast<uint8_t>(i % word_bytes * N + i / word_bytes);
    }
    return indices;
}

template <size_t word_bytes>
static constexpr PieceIndices<word_bytes> PIECE_INDICES = piece_indices<word_bytes>();

INLINE __m512i shift_up(__m512i words, __m128i by, uint16_t) { return _mm512_sll_epi16(words, by); }
INLINE __m512i shift_up(__m512i words, __m128i by, uint32_t) { return _mm512_sll_epi32(words, by); }
INLINE __m512i shift_up(__m512i words, __m128i by, uint64_t) { return _mm512_sll_epi64(words, by); }
INLINE __m512i shift_down(__m512i words, __m128i by, uint16_t) { return _mm512_srl_epi16(words, by); }
INLINE __m512i shift_down(__m512i words, __m128i by, uint32_t) { return _mm512_srl_epi32(words, by); }
INLINE __m512i shift_down(__m512i words, __m128i by, uint64_t) { return _mm512_srl_epi64(words, by); }

// A register of pieces, of `count` planes (any more are 0).
template <size_t word_bytes, int count>
INLINE __m512i load_pieces(const uint8_t* const* planes, size_t at) {
    if constexpr (count <= 0) {
        return _mm512_setzero_si512();
    } else if constexpr (word_bytes == 2) {
        return load_512(planes[0] + at);
    } else if constexpr (word_bytes == 4) {
        __m512i pieces = _mm512_zextsi256_si512(load_256(planes[0] + at));
        if constexpr (count > 1) pieces = _mm512_inserti64x4(pieces, load_256(planes[1] + at), 1);
        return pieces;
    } else {
        __m512i pieces = _mm512_zextsi128_si512(load_128(planes[0] + at));
        if constexpr (count > 1) pieces = _mm512_inserti32x4(pieces, load_128(planes[1] + at), 1);
        if constexpr (count > 2) pieces = _mm512_inserti32x4(pieces, load_128(planes[2] + at), 2);
        if constexpr (count > 3) pieces = _mm512_inserti32x4(pieces, load_128(planes[3] + at), 3);
        return pieces;
    }
}

template <size_t word_bytes, int count>
INLINE void store_pieces(__m512i pieces, uint8_t* const* planes, size_t at) {
    if constexpr (count <= 0) {
        return;
    } else if constexpr (word_bytes == 2) {
        store_512(planes[0] + at, pieces);
    } else if constexpr (word_bytes == 4) {
        store_256(planes[0] + at, _mm512_castsi512_si256(pieces));
        if constexpr (count > 1) store_256(planes[1] + at, _mm512_extracti64x4_epi64(pieces, 1));
    } else {
        store_128(planes[0] + at, _mm512_castsi512_si128(pieces));
        if constexpr (count > 1) store_128(planes[1] + at, _mm512_extracti32x4_epi32(pieces, 1));
        if constexpr (count > 2) store_128(planes[2] + at, _mm512_extracti32x4_epi32(pieces, 2));
        if constexpr (count > 3) store_128(planes[3] + at, _mm512_extracti32x4_epi32(pieces, 3));
    }
}

// As much as two registers hold. keep: of each remainder, shifted down, the bits that there are.
template <int n_planes, class Word>
INLINE void split_some(const Word* remainders, size_t at, __m128i down, __m512i keep, uint8_t* const* planes) {
    constexpr size_t SIZE = sizeof(Word), HALF = SIZE / 2;
    __m512i a = load_512(remainders + at), b = load_512(remainders + at + 64 / SIZE);
    a = _mm512_and_si512(shift_down(a, down, Word()), keep);
    b = _mm512_and_si512(shift_down(b, down, Word()), keep);
    store_pieces<SIZE, n_planes>(pick_8(a, b, PIECE_INDICES<SIZE>.split[0]), planes, at);
    store_pieces<SIZE, n_planes - int(HALF)>(pick_8(a, b, PIECE_INDICES<SIZE>.split[1]), planes + HALF, at);
}

template <int n_planes, class Word>
INLINE void join_some(const uint8_t* const* planes, size_t at, __m128i up, Word* remainders) {
    constexpr size_t SIZE = sizeof(Word), HALF = SIZE / 2;
    __m512i low = load_pieces<SIZE, n_planes>(planes, at);
    __m512i high = load_pieces<SIZE, n_planes - int(HALF)>(planes + HALF, at);
    store_512(remainders + at, shift_up(pick_8(low, high, PIECE_INDICES<SIZE>.join[0]), up, Word()));
    store_512(remainders + at + 64 / SIZE, shift_up(pick_8(low, high, PIECE_INDICES<SIZE>.join[1]), up, Word()));
}

INLINE __m512i broadcast(uint16_t word) { return _mm512_set1_epi16(static_cast<short>(word)); }
INLINE __m512i broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
INLINE __m512i broadcast(uint64_t word) { return _mm512_set1_epi64(static_cast<long long>(word)); }

template <int n_planes, class Word>
INLINE void split_all(const Word* remainders, size_t n, uint32_t shift, Word keep, uint8_t* const* planes) {
    const __m128i down = _mm_cvtsi32_si128(static_cast<int>(shift));
    const __m512i kept = broadcast(keep);
    for (size_t at = 0; at < n; at += 128 / sizeof(Word)) split_some<n_planes>(remainders, at, down, kept, planes);
}

template <int n_planes, class Word>
INLINE void join_all(const uint8_t* const* planes, size_t n, uint32_t shift, Word* remainders) {
    const __m128i up = _mm_cvtsi32_si128(static_cast<int>(shift));
    for (size_t at = 0; at < n; at += 128 / sizeof(Word)) join_some<n_planes>(planes, at, up, remainders);
}

#else

template <int n_planes, class Word>
INLINE void split_all(const Word* __restrict remainders, size_t n, uint32_t shift, Word keep, uint8_t* const* planes) {
    for (int plane = 0; plane < n_planes; ++plane) {
        uint8_t* __restrict octets = planes[plane];
        const uint32_t down = shift + 8 * static_cast<uint32_t>(plane);
        const uint8_t mask = static_cast<uint8_t>(keep >> 8 * plane);
        if (down)
            for (size_t i = 0; i < n; ++i) octets[i] = static_cast<uint8_t>(remainders[i] >> down) & mask;
        else  // a shift whose distance is not known would be done in 32 bits
            for (size_t i = 0; i < n; ++i) octets[i] = static_cast<uint8_t>(remainders[i]) & mask;
    }
}

template <int n_planes, class Word>
INLINE void join_all(const uint8_t* const* planes, size_t n, uint32_t shift, Word* __restrict remainders) {
    const uint8_t* from[n_planes];
    for (int plane = 0; plane < n_planes; ++plane) from[plane] = planes[plane];
    const uint32_t factor = 1u << shift % 32;  // see above; a product may be short
    for (size_t i = 0; i < n; ++i) {
        Word word = 0;
#pragma GCC unroll 8
        for (int plane = 0; plane < n_planes; ++plane)
            word |= static_cast<Word>(static_cast<Word>(from[plane][i]) << 8 * plane);
        remainders[i] = static_cast<Word>(sizeof(Word) == 2 ? word * factor : word << shift);
    }
}

#if TRICOMP_HAS_AVX2

// 32 remainders at a time. Registers work in halves, so that bytes are put in an order first that comes out right.

template <int n_planes>
INLINE void split_all(const uint16_t* remainders, size_t n, uint32_t shift, uint16_t keep, uint8_t* const* planes) {
    const __m128i down = _mm_cvtsi32_si128(static_cast<int>(shift));
    const __m256i kept = _mm256_set1_epi16(static_cast<short>(keep)), low = _mm256_set1_epi16(255);
    for (size_t at = 0; at < n; at += 32) {
        __m256i a = _mm256_and_si256(_mm256_srl_epi16(load_256(remainders + at), down), kept);
        __m256i b = _mm256_and_si256(_mm256_srl_epi16(load_256(remainders + at + 16), down), kept);
        if constexpr (n_planes > 1) {
            __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
            store_256(planes[1] + at, _mm256_permute4x64_epi64(high, 0xD8));
            a = _mm256_and_si256(a, low);
            b = _mm256_and_si256(b, low);
        }
        store_256(planes[0] + at, _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8));
    }
}

template <int n_planes>
INLINE void join_all(const uint8_t* const* planes, size_t n, uint32_t shift, uint16_t* remainders) {
    const __m128i up = _mm_cvtsi32_si128(static_cast<int>(shift));
    for (size_t at = 0; at < n; at += 32) {
        __m256i low = _mm256_permute4x64_epi64(load_256(planes[0] + at), 0xD8), high = _mm256_setzero_si256();
        if constexpr (n_planes > 1) high = _mm256_permute4x64_epi64(load_256(planes[1] + at), 0xD8);
        store_256(remainders + at, _mm256_sll_epi16(_mm256_unpacklo_epi8(low, high), up));
        store_256(remainders + at + 16, _mm256_sll_epi16(_mm256_unpackhi_epi8(low, high), up));
    }
}

template <int n_planes>
INLINE void split_all(const uint32_t* remainders, size_t n, uint32_t shift, uint32_t keep, uint8_t* const* planes) {
    const __m128i down = _mm_cvtsi32_si128(static_cast<int>(shift));
    const __m256i kept = _mm256_set1_epi32(static_cast<int>(keep)), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i by_plane =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (size_t at = 0; at < n; at += 32) {
        __m256i part[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) {
            __m256i words = _mm256_and_si256(_mm256_srl_epi32(load_256(remainders + at + 8 * i), down), kept);
            part[i] = _mm256_shuffle_epi8(words, by_plane);
        }
        transpose_halves(part[0], part[1], part[2], part[3]);
#pragma GCC unroll 4
        for (int plane = 0; plane < n_planes; ++plane)
            store_256(planes[plane] + at, _mm256_permutevar8x32_epi32(part[plane], order));
    }
}

template <int n_planes>
INLINE __m256i load_plane(const uint8_t* const* planes, int plane, size_t at, __m256i order) {
    if (plane >= n_planes) return _mm256_setzero_si256();
    return _mm256_permutevar8x32_epi32(load_256(planes[plane] + at), order);
}

template <int n_planes>
INLINE void join_all(const uint8_t* const* planes, size_t n, uint32_t shift, uint32_t* remainders) {
    const __m128i up = _mm_cvtsi32_si128(static_cast<int>(shift));
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (size_t at = 0; at < n; at += 32) {
        __m256i a = load_plane<n_planes>(planes, 0, at, order), b = load_plane<n_planes>(planes, 1, at, order);
        __m256i c = load_plane<n_planes>(planes, 2, at, order), d = load_plane<n_planes>(planes, 3, at, order);
        __m256i e = _mm256_unpacklo_epi8(a, b), f = _mm256_unpackhi_epi8(a, b);
        __m256i g = _mm256_unpacklo_epi8(c, d), h = _mm256_unpackhi_epi8(c, d);
        store_256(remainders + at, _mm256_sll_epi32(_mm256_unpacklo_epi16(e, g), up));
        store_256(remainders + at + 8, _mm256_sll_epi32(_mm256_unpackhi_epi16(e, g), up));
        store_256(remainders + at + 16, _mm256_sll_epi32(_mm256_unpacklo_epi16(f, h), up));
        store_256(remainders + at + 24, _mm256_sll_epi32(_mm256_unpackhi_epi16(f, h), up));
    }
}

// The halves of words of 64 bits, a row at a time, are remainders of 32 bits.

template <int n_planes>
INLINE void split_all(const uint64_t* remainders, size_t n, uint32_t shift, uint64_t keep, uint8_t* const* planes) {
    constexpr int LOW_PLANES = n_planes < 4 ? n_planes : 4;
    const __m128i down = _mm_cvtsi32_si128(static_cast<int>(shift));
    alignas(32) uint32_t low[ROW], high[ROW];
    for (size_t at = 0; at < n; at += ROW) {
        for (size_t i = 0; i < ROW; i += 8) {
            __m256 a = _mm256_castsi256_ps(_mm256_srl_epi64(load_256(remainders + at + i), down));
            __m256 b = _mm256_castsi256_ps(_mm256_srl_epi64(load_256(remainders + at + i + 4), down));
            __m256i lows = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
            __m256i highs = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
            store_256(low + i, _mm256_permute4x64_epi64(lows, 0xD8));
            store_256(high + i, _mm256_permute4x64_epi64(highs, 0xD8));
        }
        uint8_t* here[n_planes];
        for (int plane = 0; plane < n_planes; ++plane) here[plane] = planes[plane] + at;
        split_all<LOW_PLANES>(low, ROW, 0, static_cast<uint32_t>(keep), here);
        if constexpr (n_planes > 4) split_all<n_planes - 4>(high, ROW, 0, static_cast<uint32_t>(keep >> 32), here + 4);
    }
}

template <int n_planes>
INLINE void join_all(const uint8_t* const* planes, size_t n, uint32_t shift, uint64_t* remainders) {
    constexpr int LOW_PLANES = n_planes < 4 ? n_planes : 4;
    const __m128i up = _mm_cvtsi32_si128(static_cast<int>(shift));
    alignas(32) uint32_t low[ROW], high[ROW] = {};
    for (size_t at = 0; at < n; at += ROW) {
        const uint8_t* here[n_planes];
        for (int plane = 0; plane < n_planes; ++plane) here[plane] = planes[plane] + at;
        join_all<LOW_PLANES>(here, ROW, 0, low);
        if constexpr (n_planes > 4) join_all<n_planes - 4>(here + 4, ROW, 0, high);
        for (size_t i = 0; i < ROW; i += 8) {
            __m256i lows = load_256(low + i), highs = load_256(high + i);
            __m256i a = _mm256_sll_epi64(_mm256_unpacklo_epi32(lows, highs), up);
            __m256i b = _mm256_sll_epi64(_mm256_unpackhi_epi32(lows, highs), up);
            store_256(remainders + at + i, _mm256_permute2x128_si256(a, b, 0x20));
            store_256(remainders + at + i + 4, _mm256_permute2x128_si256(a, b, 0x31));
        }
    }
}

#endif
#endif

// Words of 8 bits have one plane: eight of them are shifted at a time, and masks take off what crossed over.

INLINE uint64_t in_eight(uint32_t byte) { return 0x0101010101010101u * byte; }

INLINE void split_bytes(const uint8_t* remainders, size_t n, uint32_t shift, uint8_t keep, uint8_t* octets) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, remainders + i, 8);
        eight = eight >> shift & in_eight(keep);
        std::memcpy(octets + i, &eight, 8);
    }
}

INLINE void join_bytes(const uint8_t* octets, size_t n, uint32_t shift, uint8_t* remainders) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, octets + i, 8);
        eight = (eight & in_eight(0xFFu >> shift)) << shift;
        std::memcpy(remainders + i, &eight, 8);
    }
}

// Cut remainders into planes. n: a multiple of ROW. planes: n bytes each, in position order.
template <class Word, int n_planes = 1>
void split_planes(const Model& model, const Word* remainders, size_t n, uint8_t* const* planes) {
    if (model.n_planes > n_planes) {
        if constexpr (n_planes < sizeof(Word)) split_planes<Word, n_planes + 1>(model, remainders, n, planes);
    } else if (model.n_planes == n_planes) {
        const uint32_t n_bits = 8 * (n_planes - 1) + model.plane_widths[n_planes - 1];  // 1 to the word's width
        const Word keep = static_cast<Word>(~static_cast<Word>(0)) >> (8 * sizeof(Word) - n_bits);
        if constexpr (sizeof(Word) == 1)
            split_bytes(remainders, n, model.shift, keep, planes[0]);
        else
            split_all<n_planes>(remainders, n, model.shift, keep, planes);
    }
}

// The inverse. All planes must be there, also those of one value.
template <class Word, int n_planes = 1>
void join_planes(const Model& model, const uint8_t* const* planes, size_t n, Word* remainders) {
    if (model.n_planes > n_planes) {
        if constexpr (n_planes < sizeof(Word)) join_planes<Word, n_planes + 1>(model, planes, n, remainders);
    } else if (model.n_planes == 0) {
        std::memset(remainders, 0, n * sizeof(Word));
    } else if constexpr (sizeof(Word) == 1) {
        join_bytes(planes[0], n, model.shift, remainders);
    } else {
        join_all<n_planes>(planes, n, model.shift, remainders);
    }
}

TRICOMP_END
