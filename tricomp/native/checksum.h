// The checksum of stored bytes: XXH3 with 64 bits, seed 0 and the default secret, for any length.
//
// Written from the published description of XXH3; equal to the xxhash package. Imports no STL. The hard thing: nothing
// but the given bytes is read, so short inputs have formulas of their own and long ones end with a stripe that overlaps
// the one before.
#pragma once

#include <cstring>

#include "model.h"
#include "chunk.h"
#include "isa.h"

TRICOMP_BEGIN

constexpr uint64_t XXH_PRIME32_1 = 0x9E3779B1, XXH_PRIME32_2 = 0x85EBCA77, XXH_PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t XXH_PRIME64_1 = 0x9E3779B185EBCA87, XXH_PRIME64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t XXH_PRIME64_3 = 0x165667B19E3779F9, XXH_PRIME64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t XXH_PRIME64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t XXH_MIX_1 = 0x165667919E3779F9, XXH_MIX_2 = 0x9FB21C651E98DF25;
constexpr size_t XXH_STRIPE = 64, XXH_BLOCK = 1024, XXH_SECRET_BYTES = 192;

alignas(64) constexpr uint8_t XXH_SECRET[XXH_SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

INLINE uint64_t xxh_u64(const uint8_t* bytes) {
    uint64_t value;
    memcpy(&value, bytes, 8);
    return value;
}

INLINE uint64_t xxh_u32(const uint8_t* bytes) {
    uint32_t value;
    memcpy(&value, bytes, 4);
    return value;
}

INLINE uint64_t xxh_rotate(uint64_t x, unsigned n_bits) { return x << n_bits | x >> (64 - n_bits); }

// Both halves of the 128-bit product, one upon the other.
INLINE uint64_t xxh_fold(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 Product;
    const Product product = static_cast<Product>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

INLINE uint64_t xxh_avalanche(uint64_t x) {
    x = (x ^ x >> 37) * XXH_MIX_1;
    return x ^ x >> 32;
}

// The finaliser of XXH64, which XXH3 keeps for the shortest inputs.
INLINE uint64_t xxh_avalanche_64(uint64_t x) {
    x = (x ^ x >> 33) * XXH_PRIME64_2;
    x = (x ^ x >> 29) * XXH_PRIME64_3;
    return x ^ x >> 32;
}

INLINE uint64_t xxh_mix_16(const uint8_t* bytes, const uint8_t* secret) {
    return xxh_fold(xxh_u64(bytes) ^ xxh_u64(secret), xxh_u64(bytes + 8) ^ xxh_u64(secret + 8));
}

// 0 to 16 bytes.
inline uint64_t xxh_tiny(const uint8_t* bytes, size_t n_bytes) {
    const uint8_t* secret = XXH_SECRET;
    if (n_bytes > 8) {
        const uint64_t low = xxh_u64(bytes) ^ xxh_u64(secret + 24) ^ xxh_u64(secret + 32);
        const uint64_t high = xxh_u64(bytes + n_bytes - 8) ^ xxh_u64(secret + 40) ^ xxh_u64(secret + 48);
        return xxh_avalanche(n_bytes + __builtin_bswap64(low) + high + xxh_fold(low, high));
    }
    if (n_bytes >= 4) {
        uint64_t x = xxh_u32(bytes + n_bytes - 4) + (xxh_u32(bytes) << 32);
        x ^= xxh_u64(secret + 8) ^ xxh_u64(secret + 16);
        x ^= xxh_rotate(x, 49) ^ xxh_rotate(x, 24);
        x *= XXH_MIX_2;
        x ^= (x >> 35) + n_bytes;
        x *= XXH_MIX_2;
        return x ^ x >> 28;
    }
    if (n_bytes > 0) {
        const uint32_t first = bytes[0], middle = bytes[n_bytes >> 1], last = bytes[n_bytes - 1];
        const uint32_t all = first << 16 | middle << 24 | last | static_cast<uint32_t>(n_bytes << 8);
        return xxh_avalanche_64(all ^ xxh_u32(secret) ^ xxh_u32(secret + 4));
    }
    return xxh_avalanche_64(xxh_u64(secret + 56) ^ xxh_u64(secret + 64));
}

// 17 to 240 bytes.
inline uint64_t xxh_short(const uint8_t* bytes, size_t n_bytes) {
    const uint8_t* secret = XXH_SECRET;
    uint64_t sum = n_bytes * XXH_PRIME64_1;
    if (n_bytes <= 128) {
        for (size_t i = (n_bytes - 1) / 32 + 1; i-- > 0;) {
            sum += xxh_mix_16(bytes + 16 * i, secret + 32 * i);
            sum += xxh_mix_16(bytes + n_bytes - 16 * (i + 1), secret + 32 * i + 16);
        }
        return xxh_avalanche(sum);
    }
    for (size_t i = 0; i < 8; i++) sum += xxh_mix_16(bytes + 16 * i, secret + 16 * i);
    sum = xxh_avalanche(sum);
    for (size_t i = 8; i < n_bytes / 16; i++) sum += xxh_mix_16(bytes + 16 * i, secret + 16 * (i - 8) + 3);
    return xxh_avalanche(sum + xxh_mix_16(bytes + n_bytes - 16, secret + 136 - 17));
}

// Eight sums of 64 bits. A stripe of eight words adds each word to its neighbour's sum, and to its own the product of
// the two halves of word ^ secret. Neighbours are swapped once a block, not once a stripe.
#if TRICOMP_HAS_AVX512

struct XxhSums {
    __m512i sums, words, products;

    INLINE void begin(const uint64_t* first) {
        sums = _mm512_loadu_si512(first);
        words = products = _mm512_setzero_si512();
    }
    INLINE void take(const uint8_t* stripe, const uint8_t* secret) {
        const __m512i word = _mm512_loadu_si512(stripe);
        const __m512i keyed = _mm512_xor_si512(word, _mm512_loadu_si512(secret));
        words = _mm512_add_epi64(words, word);
        products = _mm512_add_epi64(products, _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32)));
    }
    INLINE void gather() {
        sums = _mm512_add_epi64(sums, _mm512_add_epi64(products, _mm512_shuffle_epi32(words, _MM_PERM_BADC)));
        words = products = _mm512_setzero_si512();
    }
    INLINE void scramble(const uint8_t* secret) {
        gather();
        const __m512i mixed = _mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47));
        const __m512i keyed = _mm512_xor_si512(mixed, _mm512_loadu_si512(secret));
        const __m512i prime = _mm512_set1_epi64(XXH_PRIME32_1);
        const __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime), 32);
        sums = _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), high);
    }
    INLINE void end(uint64_t* last) {
        gather();
        _mm512_storeu_si512(last, sums);
    }
};

#elif TRICOMP_HAS_AVX2

struct XxhSums {
    __m256i sums[2], words[2], products[2];

    static INLINE __m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
    INLINE void begin(const uint64_t* first) {
        for (int half = 0; half < 2; half++) {
            sums[half] = load(first + 4 * half);
            words[half] = products[half] = _mm256_setzero_si256();
        }
    }
    INLINE void take(const uint8_t* stripe, const uint8_t* secret) {
        for (int half = 0; half < 2; half++) {
            const __m256i word = load(stripe + 32 * half);
            const __m256i keyed = _mm256_xor_si256(word, load(secret + 32 * half));
            const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            words[half] = _mm256_add_epi64(words[half], word);
            products[half] = _mm256_add_epi64(products[half], product);
        }
    }
    INLINE void gather() {
        for (int half = 0; half < 2; half++) {
            const __m256i swapped = _mm256_shuffle_epi32(words[half], _MM_SHUFFLE(1, 0, 3, 2));
            sums[half] = _mm256_add_epi64(sums[half], _mm256_add_epi64(products[half], swapped));
            words[half] = products[half] = _mm256_setzero_si256();
        }
    }
    INLINE void scramble(const uint8_t* secret) {
        gather();
        const __m256i prime = _mm256_set1_epi64x(XXH_PRIME32_1);
        for (int half = 0; half < 2; half++) {
            const __m256i mixed = _mm256_xor_si256(sums[half], _mm256_srli_epi64(sums[half], 47));
            const __m256i keyed = _mm256_xor_si256(mixed, load(secret + 32 * half));
            const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime), 32);
            sums[half] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), high);
        }
    }
    INLINE void end(uint64_t* last) {
        gather();
        for (int half = 0; half < 2; half++)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(last + 4 * half), sums[half]);
    }
};

#else

struct XxhSums {
    uint64_t sums[8];

    INLINE void begin(const uint64_t* first) { memcpy(sums, first, sizeof sums); }
    INLINE void take(const uint8_t* stripe, const uint8_t* secret) {
        for (size_t i = 0; i < 8; i++) {
            const uint64_t word = xxh_u64(stripe + 8 * i), keyed = word ^ xxh_u64(secret + 8 * i);
            sums[i ^ 1] += word;
            sums[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
        }
    }
    INLINE void scramble(const uint8_t* secret) {
        for (size_t i = 0; i < 8; i++)
            sums[i] = (sums[i] ^ sums[i] >> 47 ^ xxh_u64(secret + 8 * i)) * XXH_PRIME32_1;
    }
    INLINE void end(uint64_t* last) const { memcpy(last, sums, sizeof sums); }
};

#endif

// Take what is there of the bytes, of which n_bytes have come; the last block waits for the end.
inline void xxh3_take(Xxh3& state, const uint8_t* bytes, size_t n_bytes) {
    const uint8_t* secret = XXH_SECRET;
    const size_t n_blocks = n_bytes ? (n_bytes - 1) / XXH_BLOCK : 0;
    const uint64_t first[8] = {XXH_PRIME32_3, XXH_PRIME64_1, XXH_PRIME64_2, XXH_PRIME64_3,
                               XXH_PRIME64_4, XXH_PRIME32_2, XXH_PRIME64_5, XXH_PRIME32_1};
    XxhSums sums;
    sums.begin(state.n_blocks ? state.sums : first);
    for (; state.n_blocks < n_blocks; state.n_blocks++) {
        const uint8_t* stripes = bytes + XXH_BLOCK * state.n_blocks;
#pragma GCC unroll 16
        for (size_t i = 0; i < XXH_BLOCK / XXH_STRIPE; i++) sums.take(stripes + XXH_STRIPE * i, secret + 8 * i);
        sums.scramble(secret + XXH_SECRET_BYTES - XXH_STRIPE);
    }
    sums.end(state.sums);
}

// XXH3, 64 bits, of all n_bytes bytes. bytes may be null where there are none.
inline uint64_t xxh3_end(Xxh3& state, const uint8_t* bytes, size_t n_bytes) {
    if (n_bytes <= 240) return n_bytes <= 16 ? xxh_tiny(bytes, n_bytes) : xxh_short(bytes, n_bytes);
    xxh3_take(state, bytes, n_bytes);
    const uint8_t* secret = XXH_SECRET;
    XxhSums sums;
    sums.begin(state.sums);
    const uint8_t* stripes = bytes + XXH_BLOCK * state.n_blocks;
    const size_t n_stripes = (n_bytes - 1 - XXH_BLOCK * state.n_blocks) / XXH_STRIPE;
    for (size_t i = 0; i < n_stripes; i++) sums.take(stripes + XXH_STRIPE * i, secret + 8 * i);
    sums.take(bytes + n_bytes - XXH_STRIPE, secret + XXH_SECRET_BYTES - XXH_STRIPE - 7);
    uint64_t last[8];
    sums.end(last);
    uint64_t sum = n_bytes * XXH_PRIME64_1;
    for (size_t i = 0; i < 4; i++) {
        const uint8_t* keys = secret + 11 + 16 * i;
        sum += xxh_fold(last[2 * i] ^ xxh_u64(keys), last[2 * i + 1] ^ xxh_u64(keys + 8));
    }
    return xxh_avalanche(sum);
}

// XXH3, 64 bits, of n_bytes bytes. bytes may be null where there are none.
inline uint64_t xxh3_64(const uint8_t* bytes, size_t n_bytes) {
    Xxh3 state = {};
    return xxh3_end(state, bytes, n_bytes);
}

TRICOMP_END
