// Fixed widths: values of 1 to 8 bits packed vertically, byte planes of remainders (planes.h), and the zero bits at the
// bottom of rows. Stage header: isa.h, model.h, lanes.h and planes.h only, no STL.
//
// The hard thing: the four values of a lane in a row stand side by side in memory, as bytes of one u32, and side by side in
// the lane's bit string, as a *quad* of 4 b bits. So packing is squeezing four bytes into a quad, and moving quads by
// distances known when this is compiled; lanes never mix. Eight rows fill b words of a lane exactly.
#pragma once

#include "planes.h"

TRICOMP_BEGIN

using Lane = uint32_t __attribute__((may_alias, aligned(1)));  // in any buffer

// Four bytes below 2^n_bits each, without the bits between them.
template <unsigned n_bits>
INLINE uint32_t squeeze(uint32_t bytes) {
    constexpr uint32_t BYTE = (1u << n_bits) - 1, PAIR = (1u << 2 * n_bits) - 1;
    bytes = (bytes & BYTE * 0x10001) | (bytes >> (8 - n_bits) & (BYTE * 0x10001) << n_bits);
    return (bytes & PAIR) | (bytes >> (16 - 2 * n_bits) & PAIR << 2 * n_bits);
}

// The inverse; bits above the quad do not matter.
template <unsigned n_bits>
INLINE uint32_t spread(uint32_t quad) {
    constexpr uint32_t BYTE = (1u << n_bits) - 1, PAIR = (1u << 2 * n_bits) - 1;
    quad = (quad & PAIR) | (quad & PAIR << 2 * n_bits) << (16 - 2 * n_bits);
    return (quad & BYTE * 0x10001) | (quad & (BYTE * 0x10001) << n_bits) << (8 - n_bits);
}

// Eight rows.
template <unsigned n_bits>
INLINE void pack_rows(const uint8_t* __restrict values, uint8_t* __restrict out) {
    const Lane* from = reinterpret_cast<const Lane*>(values);
    Lane* to = reinterpret_cast<Lane*>(out);
    for (size_t lane = 0; lane < LANES; ++lane) {
        uint32_t words[n_bits + 1] = {};
#pragma GCC unroll 8
        for (unsigned row = 0; row < TILE_ROWS; ++row) {
            uint32_t quad = squeeze<n_bits>(from[row * LANES + lane]);
            unsigned first = row * 4 * n_bits / 32, offset = row * 4 * n_bits % 32;
            words[first] |= quad << offset;
            if (offset + 4 * n_bits > 32) words[first + 1] |= quad >> (32 - offset) % 32;
        }
#pragma GCC unroll 8
        for (unsigned word = 0; word < n_bits; ++word) to[word * LANES + lane] = words[word];
    }
}

template <unsigned n_bits>
INLINE void unpack_rows(const uint8_t* __restrict packed, uint8_t* __restrict values) {
    const Lane* from = reinterpret_cast<const Lane*>(packed);
    Lane* to = reinterpret_cast<Lane*>(values);
    for (size_t lane = 0; lane < LANES; ++lane) {
#pragma GCC unroll 8
        for (unsigned row = 0; row < TILE_ROWS; ++row) {
            unsigned first = row * 4 * n_bits / 32, offset = row * 4 * n_bits % 32;
            uint32_t quad = from[first * LANES + lane] >> offset;
            if (offset + 4 * n_bits > 32) quad |= from[(first + 1) * LANES + lane] << (32 - offset) % 32;
            to[row * LANES + lane] = spread<n_bits>(quad);
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

INLINE uint8_t trailing_zeros_of(uint64_t word) { return static_cast<uint8_t>(word ? __builtin_ctzll(word) : 64); }

// Drop the zero bits at the bottom of every row of remainders, at most as many as the row's longest length, and fewer than
// the word has; lengths shrink by as many. shifts: how many, a byte a row.
template <class Word>
void take_block_shifts(Word* __restrict remainders, uint8_t* __restrict lengths, size_t n_rows, uint8_t* shifts) {
    for (size_t row = 0; row < n_rows; ++row, remainders += ROW, lengths += ROW) {
        Word joined = 0;
        uint8_t longest = 0;
        for (size_t i = 0; i < ROW; ++i) joined |= remainders[i];
        for (size_t i = 0; i < ROW; ++i) longest = longest > lengths[i] ? longest : lengths[i];
        uint8_t most = longest < 8 * sizeof(Word) ? longest : 8 * sizeof(Word) - 1;
        uint8_t zeros = trailing_zeros_of(joined), shift = zeros < most ? zeros : most;
        shifts[row] = shift;
        if (!shift) continue;
        for (size_t i = 0; i < ROW; ++i) remainders[i] = static_cast<Word>(remainders[i] >> shift);
        for (size_t i = 0; i < ROW; ++i) lengths[i] = lengths[i] > shift ? lengths[i] - shift : 0;
    }
}

// What the stack holds of each length. shifts: less than the word's width each.
template <class Word>
void shorten_lengths(const uint8_t* shifts, size_t n_rows, uint8_t* __restrict lengths) {
    for (size_t row = 0; row < n_rows; ++row, lengths += ROW) {
        const uint8_t shift = shifts[row];
        for (size_t i = 0; i < ROW; ++i) lengths[i] = lengths[i] > shift ? lengths[i] - shift : 0;
    }
}

// Put back the zero bits that were dropped.
template <class Word>
void put_block_shifts(const uint8_t* shifts, size_t n_rows, Word* remainders) {
    for (size_t row = 0; row < n_rows; ++row, remainders += ROW) {
        const uint8_t shift = shifts[row];
        if (!shift) continue;
        for (size_t i = 0; i < ROW; ++i) remainders[i] = static_cast<Word>(remainders[i] << shift);
    }
}

TRICOMP_END
