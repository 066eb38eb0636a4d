// What all predictions share: whole rows, look-ups by symbol, and the words that do not fit. Stage header: no STL.
//
// The hard thing: misfits are rare, but must cost next to nothing where there are none. Loops flag them as bits; only
// where a bit is set are symbol, remainder and length of that word written again.
#pragma once

#include <cstring>

#include "isa.h"
#include "model.h"
#include "vectors.h"

TRICOMP_BEGIN

constexpr size_t whole_rows(size_t n) { return (n + ROW - 1) / ROW * ROW; }

// The words themselves if they fill whole rows, else a copy with zeros after them.
template <class Word>
INLINE const Word* stage(const Word* words, size_t n, Word* staged) {
    const size_t n_padded = whole_rows(n);
    if (n == n_padded || !words) return words;
    std::memcpy(staged, words, n * sizeof(Word));
    std::memset(staged + n, 0, (n_padded - n) * sizeof(Word));
    return staged;
}

// Whether split_full writes places in the dictionary at once, with 0 for words that do not fit: these are only patches
// then, and nothing is mended.
INLINE bool splits_to_places(const Model& model) {
    return model.predict == FULL && model.is_run && model.remainder != STACK;
}

// One bit a word of a tile, position order.
struct Misfits {
    uint64_t bits[TILE / 64];
};

#if TRICOMP_HAS_AVX2 && !TRICOMP_HAS_AVX512
// A byte of a table in parts of 16 bytes for each index; 0 from the last part on.
INLINE __m256i look_up_parts(const __m256i* parts, size_t n_parts, __m256i index) {
    const __m256i sixteen = _mm256_set1_epi8(16), saturate = _mm256_set1_epi8(0x70);
    __m256i found = _mm256_setzero_si256();
    for (size_t i = 0; i < n_parts; i++) {
        // The top bit, which makes a shuffle give 0, is set in all that is not in this part.
        const __m256i here = _mm256_adds_epu8(index, saturate);
        found = _mm256_or_si256(found, _mm256_shuffle_epi8(parts[i], here));
        index = _mm256_sub_epi8(index, sixteen);
    }
    return found;
}
#endif

// out[i] = table[symbols[i]], symbols below n_symbols. table: 256 bytes; whatever the symbols are, nothing else is
// read. n: a multiple of 128. out may be symbols.
INLINE void look_up_whole(const uint8_t* table, size_t n_symbols, const uint8_t* symbols, size_t n, uint8_t* out) {
#if TRICOMP_HAS_AVX512
    __m512i parts[4];
    for (size_t i = 0; i < 4; i++) parts[i] = _mm512_loadu_si512(table + 64 * i);
    for (size_t i = 0; i < n; i += 64) {
        const __m512i symbol = _mm512_loadu_si512(symbols + i);
        __m512i found = _mm512_permutex2var_epi8(parts[0], symbol, parts[1]);
        if (n_symbols > 128) {
            const __m512i high = _mm512_permutex2var_epi8(parts[2], symbol, parts[3]);
            found = _mm512_mask_mov_epi8(found, _mm512_movepi8_mask(symbol), high);
        }
        _mm512_storeu_si512(out + i, found);
    }
#elif TRICOMP_HAS_AVX2
    __m256i parts[16];
    const size_t n_parts = (n_symbols + 15) / 16;
    for (size_t i = 0; i < n_parts; i++)
        parts[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table + i));
    for (size_t i = 0; i < n; i += 32) {
        const __m256i symbol = _mm256_loadu_si256((const __m256i*)(symbols + i));
        _mm256_storeu_si256((__m256i*)(out + i), look_up_parts(parts, n_parts, symbol));
    }
#else
    (void)n_symbols;
    for (size_t i = 0; i < n; i++) out[i] = table[symbols[i]];
#endif
}

// The same in a table of n_symbols bytes, at most 256.
INLINE void look_up(const uint8_t* values, size_t n_symbols, const uint8_t* symbols, size_t n, uint8_t* out) {
    alignas(64) uint8_t table[256] = {};
    std::memcpy(table, values, n_symbols);
    look_up_whole(table, n_symbols, symbols, n, out);
}

// Rows that the tables or the dictionary lack. n: a multiple of 128.
INLINE void add_missing(const Model& model, const uint16_t* rows, size_t n, Misfits& misfits) {
#if TRICOMP_HAS_AVX512
    const __m512i low = _mm512_loadu_si512(model.missing), high = _mm512_loadu_si512(model.missing + 32);
    const __m512i one = _mm512_set1_epi16(1), fifteen = _mm512_set1_epi16(15);
    for (size_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (size_t j = 0; j < 64; j += 32) {
            const __m512i row = _mm512_loadu_si512(rows + i + j);
            const __m512i word = _mm512_permutex2var_epi16(low, _mm512_srli_epi16(row, 4), high);
            const __m512i bit = _mm512_sllv_epi16(one, _mm512_and_si512(row, fifteen));
            bits |= uint64_t(_mm512_test_epi16_mask(word, bit)) << j;
        }
        misfits.bits[i / 64] |= bits;
    }
#elif TRICOMP_HAS_AVX2
    const __m256i bit_of = _mm256_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0,
                                            1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i seven = _mm256_set1_epi16(7);
    __m256i parts[8];
    const size_t n_parts = (model.n_contexts * model.n_symbols + 127) / 128;
    for (size_t i = 0; i < n_parts; i++)
        parts[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)model.missing + i));
    for (size_t i = 0; i < n; i += 32) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)(rows + i));
        const __m256i high = _mm256_loadu_si256((const __m256i*)(rows + i + 16));
        const __m256i place = _mm256_packus_epi16(_mm256_srli_epi16(low, 3), _mm256_srli_epi16(high, 3));
        const __m256i which = _mm256_packus_epi16(_mm256_and_si256(low, seven), _mm256_and_si256(high, seven));
        const __m256i hit = _mm256_and_si256(look_up_parts(parts, n_parts, place), _mm256_shuffle_epi8(bit_of, which));
        const __m256i is_there = _mm256_cmpeq_epi8(_mm256_permute4x64_epi64(hit, 0xD8), _mm256_setzero_si256());
        misfits.bits[i / 64] |= uint64_t(~uint32_t(_mm256_movemask_epi8(is_there))) << i % 64;
    }
#else
    for (size_t i = 0; i < n; i += 64) {
        uint32_t any = 0;
        for (size_t j = i; j < i + 64; j++) any |= model.missing[rows[j] / 16] >> rows[j] % 16;
        for (size_t j = 0; (any & 1) && j < 64; j++) {
            const uint32_t row = rows[i + j];
            misfits.bits[i / 64] |= uint64_t(model.missing[row / 16] >> row % 16 & 1) << j;
        }
    }
#endif
}

// Appends first + i for each of 32 bits i that is set. Returns how many; may write 32 positions whatever the bits are.
INLINE size_t append_positions(uint32_t bits, size_t first, uint16_t* positions) {
    const size_t n_bits = size_t(__builtin_popcount(bits));
#if TRICOMP_HAS_AVX512
    const __m512i all = _mm512_add_epi16(_mm512_set1_epi16(short(first)), counting());
    _mm512_storeu_si512(positions, _mm512_maskz_compress_epi16(bits, all));
#else
    for (size_t n = 0; bits; bits &= bits - 1) positions[n++] = uint16_t(first + size_t(__builtin_ctz(bits)));
#endif
    return n_bits;
}

// The same of 64 bits, in a tile: in AVX-512, where most of them are clear, in the time of 32.
INLINE size_t append_tile_positions(uint64_t bits, size_t first, uint16_t* positions) {
#if TRICOMP_HAS_AVX512
    const size_t n_bits = size_t(__builtin_popcountll(bits));
    if (n_bits <= 32) {
        const __m512i found = _mm512_maskz_compress_epi8(bits, counting_bytes());
        const __m512i places = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(found));
        _mm512_storeu_si512(positions, _mm512_add_epi16(places, _mm512_set1_epi16(short(first))));
        return n_bits;
    }
#endif
    const size_t n_low = append_positions(uint32_t(bits), first, positions);
    return n_low + append_positions(uint32_t(bits >> 32), first + 32, positions + n_low);
}

// What stands in the place of a patch, by context.
struct StandIns {
    alignas(64) uint16_t rows[32], lengths[32];

    explicit StandIns(const Model& model) {
        for (size_t c = 0; c < 8; c++) {
            rows[c] = uint16_t(c * model.n_symbols + model.stand_ins[c]);
            lengths[c] = model.lengths[model.stand_ins[c]];
        }
    }
};

// Mend the words of [first, first + 64) whose bit is set. Returns how many.
template <class Word>
INLINE size_t mend_bits(const StandIns& stand_ins, const uint8_t* contexts, size_t first, uint64_t bits,
                        Tile<Word>& tile) {
    uint16_t* patches = tile.patches + tile.n_patches;
#if TRICOMP_HAS_AVX512
    const __m512i rows = _mm512_load_si512(stand_ins.rows), lengths = _mm512_load_si512(stand_ins.lengths);
    size_t n_patches = 0;
    for (size_t i = first; i < first + 64; i += 32, bits >>= 32) {
        const __mmask32 mask = uint32_t(bits);
        __m512i context = _mm512_setzero_si512();
        if (contexts) context = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(contexts + i)));
        n_patches += append_positions(mask, i, patches + n_patches);  // there are fewer than i so far: 32 more fit
        _mm512_mask_storeu_epi16(tile.rows + i, mask, _mm512_permutexvar_epi16(context, rows));
        const __m256i length = _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(context, lengths));
        _mm256_mask_storeu_epi8(tile.lengths + i, mask, length);
        const __m512i zero = _mm512_setzero_si512();
        Word* remainders = tile.remainders + i;
        if constexpr (sizeof(Word) == 1) _mm256_mask_storeu_epi8(remainders, mask, _mm256_setzero_si256());
        if constexpr (sizeof(Word) == 2) _mm512_mask_storeu_epi16(remainders, mask, zero);
        for (size_t j = 0; sizeof(Word) == 4 && j < 32; j += 16)
            _mm512_mask_storeu_epi32(remainders + j, __mmask16(mask >> j), zero);
        for (size_t j = 0; sizeof(Word) == 8 && j < 32; j += 8)
            _mm512_mask_storeu_epi64(remainders + j, __mmask8(mask >> j), zero);
    }
    return n_patches;
#else
    size_t n_patches = 0;
    for (; bits; bits &= bits - 1) {
        const size_t i = first + size_t(__builtin_ctzll(bits)), context = contexts ? contexts[i] : 0;
        patches[n_patches++] = uint16_t(i);
        tile.rows[i] = stand_ins.rows[context];
        tile.lengths[i] = uint8_t(stand_ins.lengths[context]);
        tile.remainders[i] = 0;
    }
    return n_patches;
#endif
}

// Rows outside of a dictionary that is a run of symbols. n: a multiple of 128.
INLINE void add_outside(const Model& model, const uint16_t* rows, size_t n, Misfits& misfits) {
    const uint16_t first = model.dictionary[0], n_inside = uint16_t(model.n_dictionary);
#if TRICOMP_HAS_AVX512
    const __m512i low = _mm512_set1_epi16(short(first)), most = _mm512_set1_epi16(short(n_inside));
    for (size_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (size_t j = 0; j < 64; j += 32) {
            const __m512i place = _mm512_sub_epi16(_mm512_loadu_si512(rows + i + j), low);
            bits |= uint64_t(_mm512_cmpge_epu16_mask(place, most)) << j;
        }
        misfits.bits[i / 64] |= bits;
    }
#else
    for (size_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (size_t j = 0; j < 64; j++) bits |= uint64_t(uint16_t(rows[i + j] - first) >= n_inside) << j;
        misfits.bits[i / 64] |= bits;
    }
#endif
}

// Patches take their context's stand-in, and a remainder of 0; so does padding, in context 0 and without length.
template <class Word>
void mend_misfits(const Model& model, size_t n, Tile<Word>& tile, Misfits& misfits) {
    const size_t n_padded = whole_rows(n), n_bits = (n + 63) / 64;
    const bool has_places = splits_to_places(model);
    if (model.has_missing && !has_places) {
        if (model.is_run) add_outside(model, tile.rows, n_padded, misfits);
        else add_missing(model, tile.rows, n_padded, misfits);
    }
    if (n % 64) misfits.bits[n / 64] &= (uint64_t(1) << n % 64) - 1;
    uint64_t any = 0;
    for (size_t i = 0; i < n_bits; i++) any |= misfits.bits[i];
    tile.n_patches = 0;
    if (any && has_places) {
        // There are at least 32 fewer positions so far than there is room for.
        // Without asking whether there are any: that would be guessed wrong too often.
        for (size_t i = 0; i < n_bits; i++)
            tile.n_patches += append_tile_positions(misfits.bits[i], 64 * i, tile.patches + tile.n_patches);
    } else if (any) {
        const StandIns stand_ins(model);
        const uint8_t* contexts = model.n_contexts > 1 ? tile.contexts : nullptr;
        for (size_t i = 0; i < n_bits; i++)
            if (misfits.bits[i]) tile.n_patches += mend_bits(stand_ins, contexts, 64 * i, misfits.bits[i], tile);
    }
    if (model.entropy == INDEX) {
        const uint8_t first = model.is_run ? model.dictionary[0] : 0;
        for (size_t i = 0; i < n_padded && !has_places; i++) tile.symbols[i] = uint8_t(tile.rows[i] - first);
        if (!model.is_run) look_up_whole(model.places, model.n_symbols, tile.symbols, n_padded, tile.symbols);
        std::memset(tile.symbols + n, 0, n_padded - n);
    }
    for (size_t i = n; i < n_padded; i++) tile.rows[i] = model.stand_ins[0];
    std::memset(tile.remainders + n, 0, (n_padded - n) * sizeof(Word));
    std::memset(tile.lengths + n, 0, n_padded - n);
}

TRICOMP_END
