// Fixed widths: values of 1 to 8 bits packed vertically, byte planes of remainders (planes.h), and the zero bits at the
// bottom of rows. Stage header: isa.h, model.h, lanes.h and planes.h only, no STL.
//
// The hard thing: the four values of a lane in a row stand side by side in memory, as bytes of one u32, and side by
// side in the lane's bit string, as a *quad* of 4 b bits. So packing is squeezing four bytes into a quad, and moving
// quads by distances known when this is compiled; lanes never mix. Eight rows fill b words of a lane exactly.
#pragma once

#include "planes.h"

TRICOMP_BEGIN

// A register of lanes, and one anywhere in memory.
#if TRICOMP_HAS_AVX512
constexpr size_t REGISTER_BYTES = 64;
#elif TRICOMP_HAS_AVX2
constexpr size_t REGISTER_BYTES = 32;
#else
constexpr size_t REGISTER_BYTES = 16;
#endif
typedef uint32_t Quads __attribute__((vector_size(REGISTER_BYTES)));
typedef uint32_t StoredQuads __attribute__((vector_size(REGISTER_BYTES), aligned(1), may_alias));

INLINE Quads load_quads(const uint8_t* from) { return *reinterpret_cast<const StoredQuads*>(from); }
INLINE void store_quads(uint8_t* to, Quads quads) { *reinterpret_cast<StoredQuads*>(to) = quads; }

// Four bytes below 2^n_bits each, without the bits between them.
template <unsigned n_bits>
INLINE Quads squeeze(Quads bytes) {
#if TRICOMP_HAS_AVX512
    const __m512i one_and_up = _mm512_set1_epi16(static_cast<short>(1 | 1 << (8 + n_bits)));  // as bytes
    const __m512i pairs = _mm512_maddubs_epi16(one_and_up, reinterpret_cast<__m512i>(bytes));
    return reinterpret_cast<Quads>(_mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 1 << (16 + 2 * n_bits))));
#elif TRICOMP_HAS_AVX2
    const __m256i one_and_up = _mm256_set1_epi16(static_cast<short>(1 | 1 << (8 + n_bits)));  // as bytes
    const __m256i pairs = _mm256_maddubs_epi16(one_and_up, reinterpret_cast<__m256i>(bytes));
    return reinterpret_cast<Quads>(_mm256_madd_epi16(pairs, _mm256_set1_epi32(1 | 1 << (16 + 2 * n_bits))));
#else
    constexpr uint32_t BYTES = ((1u << n_bits) - 1) * 0x10001, PAIR = (1u << 2 * n_bits) - 1;
    bytes = (bytes & BYTES) | (bytes >> (8 - n_bits) & BYTES << n_bits);
    return (bytes & PAIR) | (bytes >> (16 - 2 * n_bits) & PAIR << 2 * n_bits);
#endif
}

#if TRICOMP_HAS_AVX512
// Where each byte's bits begin, in pairs of quads.
template <unsigned n_bits>
constexpr LaneIndices<uint8_t> value_places() {
    LaneIndices<uint8_t> places{};
    for (unsigned i = 0; i < 64; ++i) places.at[i] = static_cast<uint8_t>(i / 4 % 2 * 32 + i % 4 * n_bits);
    return places;
}
template <unsigned n_bits>
static constexpr LaneIndices<uint8_t> VALUE_PLACES = value_places<n_bits>();
#endif

// The inverse; bits above the quads do not matter.
template <unsigned n_bits>
INLINE Quads spread(Quads quads) {
#if TRICOMP_HAS_AVX512
    const __m512i places = _mm512_load_si512(VALUE_PLACES<n_bits>.at);
    const __m512i bytes = _mm512_multishift_epi64_epi8(places, reinterpret_cast<__m512i>(quads));
    return reinterpret_cast<Quads>(_mm512_and_si512(bytes, _mm512_set1_epi8((1 << n_bits) - 1)));
#else
    constexpr uint32_t BYTES = ((1u << n_bits) - 1) * 0x10001, PAIR = (1u << 2 * n_bits) - 1;
    quads = (quads & PAIR) | (quads & PAIR << 2 * n_bits) << (16 - 2 * n_bits);
    return (quads & BYTES) | (quads & BYTES << n_bits) << (8 - n_bits);
#endif
}

// Eight rows.
template <unsigned n_bits>
INLINE void pack_rows(const uint8_t* values, uint8_t* out) {
    for (size_t at = 0; at < ROW; at += REGISTER_BYTES) {
        Quads words[n_bits + 1] = {};
#pragma GCC unroll 8
        for (unsigned row = 0; row < TILE_ROWS; ++row) {
            const unsigned word = row * 4 * n_bits / 32, offset = row * 4 * n_bits % 32;
            const Quads quads = squeeze<n_bits>(load_quads(values + row * ROW + at));
            words[word] |= quads << offset;
            if (offset + 4 * n_bits > 32) words[word + 1] |= quads >> (32 - offset) % 32;
        }
#pragma GCC unroll 8
        for (unsigned word = 0; word < n_bits; ++word) store_quads(out + word * ROW + at, words[word]);
    }
}

template <unsigned n_bits>
INLINE void unpack_rows(const uint8_t* packed, uint8_t* values) {
    for (size_t at = 0; at < ROW; at += REGISTER_BYTES) {
#pragma GCC unroll 8
        for (unsigned row = 0; row < TILE_ROWS; ++row) {
            const unsigned word = row * 4 * n_bits / 32, offset = row * 4 * n_bits % 32;
            Quads quads = load_quads(packed + word * ROW + at) >> offset;
            if (offset + 4 * n_bits > 32) quads |= load_quads(packed + (word + 1) * ROW + at) << (32 - offset) % 32;
            store_quads(values + row * ROW + at, spread<n_bits>(quads));
        }
    }
}

// Rows eight at a time; what is left over through a buffer, filled up with zeros.
template <unsigned n_bits>
void pack_width(const uint8_t* values, size_t n_rows, uint8_t* out) {
    for (; n_rows >= TILE_ROWS; n_rows -= TILE_ROWS) {
        pack_rows<n_bits>(values, out);
        values += TILE;
        out += n_bits * ROW;
    }
    if (!n_rows) return;
    alignas(64) uint8_t rows[TILE], words[n_bits * ROW];
    std::memcpy(rows, values, n_rows * ROW);
    std::memset(rows + n_rows * ROW, 0, (TILE_ROWS - n_rows) * ROW);
    pack_rows<n_bits>(rows, words);
    std::memcpy(out, words, (n_rows * n_bits + 7) / 8 * ROW);
}

template <unsigned n_bits>
void unpack_width(const uint8_t* packed, size_t n_rows, uint8_t* values) {
    for (; n_rows >= TILE_ROWS; n_rows -= TILE_ROWS) {
        unpack_rows<n_bits>(packed, values);
        packed += n_bits * ROW;
        values += TILE;
    }
    if (!n_rows) return;
    alignas(64) uint8_t rows[TILE], words[n_bits * ROW] = {};
    std::memcpy(words, packed, (n_rows * n_bits + 7) / 8 * ROW);
    unpack_rows<n_bits>(words, rows);
    std::memcpy(values, rows, n_rows * ROW);
}

// Pack rows of values of n_bits (1 to 8) each, nothing above them. out: 128 * ceil(n_rows * n_bits / 8) bytes.
inline void pack_bits(const uint8_t* values, size_t n_rows, unsigned n_bits, uint8_t* out) {
    switch (n_bits) {
        case 1: return pack_width<1>(values, n_rows, out);
        case 2: return pack_width<2>(values, n_rows, out);
        case 3: return pack_width<3>(values, n_rows, out);
        case 4: return pack_width<4>(values, n_rows, out);
        case 5: return pack_width<5>(values, n_rows, out);
        case 6: return pack_width<6>(values, n_rows, out);
        case 7: return pack_width<7>(values, n_rows, out);
        default: std::memcpy(out, values, n_rows * ROW);
    }
}

inline void unpack_bits(const uint8_t* packed, size_t n_rows, unsigned n_bits, uint8_t* values) {
    switch (n_bits) {
        case 1: return unpack_width<1>(packed, n_rows, values);
        case 2: return unpack_width<2>(packed, n_rows, values);
        case 3: return unpack_width<3>(packed, n_rows, values);
        case 4: return unpack_width<4>(packed, n_rows, values);
        case 5: return unpack_width<5>(packed, n_rows, values);
        case 6: return unpack_width<6>(packed, n_rows, values);
        case 7: return unpack_width<7>(packed, n_rows, values);
        default: std::memcpy(values, packed, n_rows * ROW);
    }
}

// Whether all n >= 1 values are equal.
inline bool is_one_value(const uint8_t* values, size_t n) {
    constexpr size_t BLOCK = 512;
    const uint8_t first = values[0];
    uint8_t differs = 0;
    for (; n >= BLOCK && !differs; n -= BLOCK, values += BLOCK)
        for (size_t i = 0; i < BLOCK; ++i) differs |= values[i] ^ first;
    if (differs) return false;
    for (size_t i = 0; i < n; ++i) differs |= values[i] ^ first;
    return !differs;
}

// Words of any width are shifted eight bytes at a time: no bit that is set crosses over to the next word, see below.
using EightBytes = uint64_t __attribute__((may_alias, aligned(1)));

INLINE uint8_t trailing_zeros_of(uint64_t word) { return static_cast<uint8_t>(word ? __builtin_ctzll(word) : 64); }

INLINE void shorten_row(uint8_t* lengths, uint8_t shift) {
    for (size_t i = 0; i < ROW; ++i) lengths[i] = lengths[i] > shift ? lengths[i] - shift : 0;
}

// Drop the zero bits at the bottom of every row of remainders, at most as many as the row's longest length, and fewer
// than the word has; lengths shrink by as many. shifts: how many, a byte a row.
template <class Word>
void take_block_shifts(Word* remainders, uint8_t* lengths, size_t n_rows, uint8_t* shifts) {
    for (size_t row = 0; row < n_rows; ++row, remainders += ROW, lengths += ROW) {
        Word joined = 0;
        uint8_t longest = 0;
        for (size_t i = 0; i < ROW; ++i) joined |= remainders[i];
        for (size_t i = 0; i < ROW; ++i) longest = longest > lengths[i] ? longest : lengths[i];
        const uint8_t most = longest < 8 * sizeof(Word) ? longest : 8 * sizeof(Word) - 1;
        const uint8_t zeros = trailing_zeros_of(joined), shift = zeros < most ? zeros : most;
        shifts[row] = shift;
        if (!shift) continue;
        EightBytes* words = reinterpret_cast<EightBytes*>(remainders);  // the lowest bits of all are 0
        for (size_t i = 0; i < ROW * sizeof(Word) / 8; ++i) words[i] >>= shift;
        shorten_row(lengths, shift);
    }
}

// What the stack holds of each length. shifts: less than the word's width each.
template <class Word>
void shorten_lengths(const uint8_t* shifts, size_t n_rows, uint8_t* lengths) {
    for (size_t row = 0; row < n_rows; ++row)
        if (shifts[row]) shorten_row(lengths + row * ROW, shifts[row]);
}

// Put back the zero bits that were dropped. remainders: of shortened lengths.
template <class Word>
void put_block_shifts(const uint8_t* shifts, size_t n_rows, Word* remainders) {
    for (size_t row = 0; row < n_rows; ++row) {
        const uint8_t shift = shifts[row];
        if (!shift) continue;
        EightBytes* words = reinterpret_cast<EightBytes*>(remainders + row * ROW);  // the highest bits of all are 0
        for (size_t i = 0; i < ROW * sizeof(Word) / 8; ++i) words[i] <<= shift;
    }
}

TRICOMP_END
