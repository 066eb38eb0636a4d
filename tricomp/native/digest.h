// The 64-bit digest of decoded words: a sum that may be taken in parts, in any order, by any thread.
//
// Mirrors reference/digest.py; FORMAT.md, "Digest". Imports no STL. The hard thing: keys are never stored. The high half
// of a key is a product of row and column modulo 2^32, so a whole row's pieces are summed times the column's factor and
// then multiplied once; the low half must be cut to 32 bits before it meets its piece, so it costs a product a piece.
#pragma once

#include <cstring>

#include "model.h"
#include "isa.h"

TRICOMP_BEGIN

constexpr size_t DIGEST_COLUMNS = 128, DIGEST_ROWS = 4096;
constexpr size_t DIGEST_ROW_BYTES = 4 * DIGEST_COLUMNS;

INLINE constexpr uint32_t digest_mix32(uint32_t x) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

INLINE constexpr uint64_t digest_mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

struct DigestColumns {
    alignas(64) uint32_t low[DIGEST_COLUMNS];
    alignas(64) uint32_t high[DIGEST_COLUMNS];
};

constexpr DigestColumns digest_columns() {
    DigestColumns columns = {};
    for (uint32_t j = 0; j < DIGEST_COLUMNS; j++) {
        columns.low[j] = digest_mix32(j + 1) | 1;
        columns.high[j] = digest_mix32(j + 129) | 1;
    }
    return columns;
}

constexpr DigestColumns DIGEST_KEYS = digest_columns();

INLINE uint32_t digest_low_row(uint32_t row) { return digest_mix32(row ^ 0x9E3779B9u) | 1; }
INLINE uint32_t digest_high_row(uint32_t row) { return digest_mix32(row ^ 0x7F4A7C15u) | 1; }

#if TRICOMP_HAS_AVX2

// A vector of pieces; the 64-bit operations see them in pairs.
#if TRICOMP_HAS_AVX512
using DigestVector = __m512i;
INLINE DigestVector digest_load(const void* pieces) { return _mm512_loadu_si512(pieces); }
INLINE void digest_store(void* pieces, DigestVector a) { _mm512_storeu_si512(pieces, a); }
INLINE DigestVector digest_same(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
INLINE DigestVector digest_add32(DigestVector a, DigestVector b) { return _mm512_add_epi32(a, b); }
INLINE DigestVector digest_add64(DigestVector a, DigestVector b) { return _mm512_add_epi64(a, b); }
INLINE DigestVector digest_times32(DigestVector a, DigestVector b) { return _mm512_mullo_epi32(a, b); }
INLINE DigestVector digest_times_even(DigestVector a, DigestVector b) { return _mm512_mul_epu32(a, b); }
INLINE DigestVector digest_odd(DigestVector a) { return _mm512_srli_epi64(a, 32); }
#else
using DigestVector = __m256i;
INLINE DigestVector digest_load(const void* pieces) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(pieces));
}
INLINE void digest_store(void* pieces, DigestVector a) { _mm256_storeu_si256(static_cast<__m256i*>(pieces), a); }
INLINE DigestVector digest_same(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
INLINE DigestVector digest_add32(DigestVector a, DigestVector b) { return _mm256_add_epi32(a, b); }
INLINE DigestVector digest_add64(DigestVector a, DigestVector b) { return _mm256_add_epi64(a, b); }
INLINE DigestVector digest_times32(DigestVector a, DigestVector b) { return _mm256_mullo_epi32(a, b); }
INLINE DigestVector digest_times_even(DigestVector a, DigestVector b) { return _mm256_mul_epu32(a, b); }
INLINE DigestVector digest_odd(DigestVector a) { return _mm256_srli_epi64(a, 32); }
#endif

// The sum of n_rows whole rows of one block, the first of them its row number `row`.
inline uint64_t digest_rows(const uint8_t* bytes, size_t n_rows, uint32_t row) {
    constexpr size_t WIDTH = sizeof(DigestVector) / 4;
    DigestVector even = digest_same(0), odd = digest_same(0), high = digest_same(0);
    for (; n_rows > 0; n_rows--, row++, bytes += DIGEST_ROW_BYTES) {
        const DigestVector low_row = digest_same(digest_low_row(row));
        DigestVector high_of_row = digest_same(0);
#pragma GCC unroll 4
        for (size_t j = 0; j < DIGEST_COLUMNS; j += WIDTH) {
            const DigestVector pieces = digest_load(bytes + 4 * j);
            const DigestVector keys = digest_times32(low_row, digest_load(DIGEST_KEYS.low + j));
            even = digest_add64(even, digest_times_even(pieces, keys));
            odd = digest_add64(odd, digest_times_even(digest_odd(pieces), digest_odd(keys)));
            high_of_row = digest_add32(high_of_row, digest_times32(pieces, digest_load(DIGEST_KEYS.high + j)));
        }
        high = digest_add32(high, digest_times32(high_of_row, digest_same(digest_high_row(row))));
    }
    uint64_t low_sums[WIDTH / 2], low_sum = 0;
    uint32_t high_sums[WIDTH], high_sum = 0;
    digest_store(low_sums, digest_add64(even, odd));
    digest_store(high_sums, high);
    for (size_t i = 0; i < WIDTH / 2; i++) low_sum += low_sums[i];
    for (size_t i = 0; i < WIDTH; i++) high_sum += high_sums[i];
    return low_sum + (static_cast<uint64_t>(high_sum) << 32);
}

#else

// The sum of n_rows whole rows of one block, the first of them its row number `row`.
inline uint64_t digest_rows(const uint8_t* bytes, size_t n_rows, uint32_t row) {
    uint64_t low_sum = 0;
    uint32_t high_sum = 0;
    for (size_t q = 0; q < n_rows; q++, row++, bytes += DIGEST_ROW_BYTES) {
        const uint32_t low_row = digest_low_row(row);
        uint32_t pieces[DIGEST_COLUMNS];
        memcpy(pieces, bytes, DIGEST_ROW_BYTES);
        uint32_t high_of_row = 0;
        for (size_t j = 0; j < DIGEST_COLUMNS; j++) {
            low_sum += static_cast<uint64_t>(pieces[j]) * (low_row * DIGEST_KEYS.low[j]);
            high_of_row += pieces[j] * DIGEST_KEYS.high[j];
        }
        high_sum += high_of_row * digest_high_row(row);
    }
    return low_sum + (static_cast<uint64_t>(high_sum) << 32);
}

#endif

// What bytes that stand at first_byte of a leaf add to its sum. first_byte: a multiple of 512. Unless they are the
// leaf's last, n_bytes must be a multiple of 4 (of 512, if what follows is to be added by another call).
inline uint64_t digest_sum(const uint8_t* bytes, size_t n_bytes, uint64_t first_byte) {
    uint64_t sum = 0;
    uint64_t row = first_byte / DIGEST_ROW_BYTES;
    while (n_bytes > 0) {
        const uint32_t row_in_block = static_cast<uint32_t>(row % DIGEST_ROWS);
        const size_t rows_left = DIGEST_ROWS - row_in_block, whole_rows = n_bytes / DIGEST_ROW_BYTES;
        size_t n_rows = whole_rows < rows_left ? whole_rows : rows_left, n_taken = n_rows * DIGEST_ROW_BYTES;
        uint64_t part;
        if (n_rows > 0) {
            part = digest_rows(bytes, n_rows, row_in_block);
        } else {
            uint8_t last[DIGEST_ROW_BYTES] = {};
            memcpy(last, bytes, n_bytes);
            part = digest_rows(last, 1, row_in_block);
            n_rows = 1;
            n_taken = n_bytes;
        }
        sum += part * (digest_mix64(row / DIGEST_ROWS) | 1);
        row += n_rows;
        bytes += n_taken;
        n_bytes -= n_taken;
    }
    return sum;
}

// The digest of a leaf of n_bytes bytes from the sum of all of its parts.
inline uint64_t digest_end(uint64_t sum, uint64_t n_bytes) {
    return digest_mix64(sum + n_bytes * 0x9E3779B97F4A7C15u);
}

TRICOMP_END
