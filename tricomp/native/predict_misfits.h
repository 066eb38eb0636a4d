// What all predictions share: whole rows, look-ups by symbol, and the words that do not fit. Stage header: no STL.
//
// The hard thing: misfits are rare, but must cost next to nothing where there are none. Loops flag them as bits; only
// where a bit is set are symbol, remainder and length of that word written again.
#pragma once

#include <cstring>

#include "isa.h"
#include "model.h"

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

// One bit a word of a tile, position order.
struct Misfits {
    uint64_t bits[TILE / 64];
};

// Bits of flags, each 0 or 1.
INLINE void collect_flags(const uint8_t* flags, size_t n, Misfits& misfits) {
    for (size_t i = 0; i < n; i += 64) {
        uint64_t any = 0, eight, bits = 0;
        for (size_t j = 0; j < 64; j += 8) {
            std::memcpy(&eight, flags + i + j, 8);
            any |= eight;
        }
        for (size_t j = 0; any && j < 64; j += 8) {
            std::memcpy(&eight, flags + i + j, 8);
            bits |= (eight * 0x0102040810204080u >> 56) << j;  // eight flags to eight bits, the first lowest
        }
        misfits.bits[i / 64] = bits;
    }
}

// out[i] = table[symbols[i]]. table: 256 bytes; symbols below n_symbols, but whatever they are, nothing else is read.
INLINE void look_up(const uint8_t* table, size_t n_symbols, const uint8_t* symbols, size_t n, uint8_t* out) {
    (void)n_symbols;
    for (size_t i = 0; i < n; i++) out[i] = table[symbols[i]];
}

// Rows that the tables or the dictionary lack.
INLINE void add_missing(const Model& model, const uint16_t* rows, size_t n, Misfits& misfits) {
    for (size_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (size_t j = 0; j < 64; j++) {
            const uint32_t row = rows[i + j];
            bits |= uint64_t(model.missing[row / 16] >> row % 16 & 1) << j;
        }
        misfits.bits[i / 64] |= bits;
    }
}

// Patches take their context's stand-in, and a remainder of 0; so does padding, in context 0 and without length.
template <class Word>
void mend_misfits(const Model& model, size_t n, Tile<Word>& tile, Misfits& misfits) {
    const size_t n_padded = whole_rows(n);
    if (model.has_missing) add_missing(model, tile.rows, n_padded, misfits);
    size_t n_patches = 0;
    for (size_t first = 0; first < n; first += 64) {
        uint64_t bits = misfits.bits[first / 64];
        if (n - first < 64) bits &= (uint64_t(1) << (n - first)) - 1;
        for (; bits; bits &= bits - 1) {
            const size_t i = first + size_t(__builtin_ctzll(bits));
            const uint32_t context = model.n_contexts > 1 ? tile.contexts[i] : 0, symbol = model.stand_ins[context];
            tile.patches[n_patches++] = uint16_t(i);
            tile.rows[i] = uint16_t(context * model.n_symbols + symbol);
            tile.remainders[i] = 0;
            tile.lengths[i] = model.lengths[symbol];
        }
    }
    tile.n_patches = n_patches;
    if (model.entropy == INDEX) {
        for (size_t i = 0; i < n; i++) tile.symbols[i] = model.places[tile.rows[i]];
        std::memset(tile.symbols + n, 0, n_padded - n);
    }
    for (size_t i = n; i < n_padded; i++) tile.rows[i] = model.stand_ins[0];
    std::memset(tile.remainders + n, 0, (n_padded - n) * sizeof(Word));
    std::memset(tile.lengths + n, 0, n_padded - n);
}

TRICOMP_END
