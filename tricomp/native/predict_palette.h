// Palette: a word's symbol is its place in a short ascending list. Stage header: no STL.
//
// The hard thing: finding the place without a branch a word; how depends on the word's width and the list's length.
#pragma once

#include "isa.h"
#include "model.h"
#include "predict_misfits.h"
#include "vectors.h"

TRICOMP_BEGIN

// Bits of flags, each 0 or 1.
INLINE void collect_flags(const uint8_t* flags, size_t n, Misfits& misfits) {
    for (size_t i = 0; i < n; i += 64) {
        uint64_t eight, bits = 0;
        for (size_t j = 0; j < 64; j += 8) {
            std::memcpy(&eight, flags + i + j, 8);
            bits |= (eight * 0x0102040810204080u >> 56) << j;  // eight flags to eight bits, the first lowest
        }
        misfits.bits[i / 64] = bits;
    }
}

// By a table of all words of 8 bits.
inline void split_bytes(const Model& model, const uint8_t* words, size_t n, Tile<uint8_t>& tile, Misfits& misfits) {
    alignas(64) uint8_t places[256] = {}, is_missing[256], flags[TILE];
    std::memset(is_missing, 1, sizeof is_missing);
    const uint8_t* palette = static_cast<const uint8_t*>(model.palette);
    for (uint32_t i = 0; i < model.n_symbols; i++) {
        places[palette[i]] = uint8_t(i);
        is_missing[palette[i]] = 0;
    }
    look_up_whole(places, 256, words, n, tile.symbols);
    look_up_whole(is_missing, 256, words, n, flags);
    for (size_t i = 0; i < n; i++) tile.rows[i] = tile.symbols[i];
    collect_flags(flags, n, misfits);
}

// By comparing with every word of a short list.
template <class Word>
void split_short(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    typedef EvenLane<Word> Lane;
    typedef Vector<Lane> Vec;
    const Word* palette = static_cast<const Word*>(model.palette);
    for (size_t i = 0; i < n; i += BLOCK) {
        Vec places[Vec::A_BLOCK];
        uint32_t bits = 0;
        for (size_t j = 0; j < Vec::A_BLOCK; j++) {
            const Vec word = load<Lane>(words + i + j * Vec::N);
            Vec place = all<Lane>(0), nearest = word ^ all<Lane>(palette[0]);  // nearest: 0 once the word is found
            for (uint32_t s = 1; s < model.n_symbols; s++) {
                const Vec change = word ^ all<Lane>(palette[s]);
                nearest = smaller(nearest, change);
                place = select(has_common(change, change), place, all<Lane>(Lane(s)));
            }
            places[j] = place;
            bits |= bits_of(has_common(nearest, nearest)) << (j * Vec::N % BLOCK);
        }
        std::memcpy(reinterpret_cast<uint8_t*>(misfits.bits) + i / 8, &bits, sizeof bits);
        store_block(places, tile.rows + i);
    }
}

// By halves; the list is filled up to a power of two, so that no end needs looking after.
template <class Word>
void split_long(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    alignas(64) uint8_t flags[TILE];
    Word palette[256];
    std::memcpy(palette, model.palette, model.n_symbols * sizeof(Word));
    for (uint32_t i = model.n_symbols; i < 256; i++) palette[i] = palette[model.n_symbols - 1];
    uint32_t half = 1;
    while (2 * half < model.n_symbols) half *= 2;
    for (size_t i = 0; i < n; i += 8) {
        const Word* places[8];  // of the last word that is not above each; eight, because steps wait for one another
        for (size_t j = 0; j < 8; j++) places[j] = palette;
        for (uint32_t step = half; step; step /= 2)
            for (size_t j = 0; j < 8; j++) places[j] += places[j][step] <= words[i + j] ? step : 0;
        for (size_t j = 0; j < 8; j++) {
            const bool is_misfit = *places[j] != words[i + j];
            const uint32_t place = uint32_t(places[j] - palette), last = model.n_symbols - 1;
            tile.rows[i + j] = uint16_t(is_misfit ? 0 : place < last ? place : last);
            flags[i + j] = is_misfit;
        }
    }
    collect_flags(flags, n, misfits);
}

template <class Word>
void split_palette(const Model& model, const Word* words, size_t n, Tile<Word>& tile, Misfits& misfits) {
    if constexpr (sizeof(Word) == 1) return split_bytes(model, words, n, tile, misfits);
    else if (model.n_symbols <= 2 * Vector<EvenLane<Word>>::N) return split_short(model, words, n, tile, misfits);
    else return split_long(model, words, n, tile, misfits);
}

template <class Word>
void merge_palette(const Model& model, size_t n, const Tile<Word>& tile, Word* words) {
    const Word* palette = static_cast<const Word*>(model.palette);
    if constexpr (sizeof(Word) == 1) return look_up(palette, model.n_symbols, tile.symbols, n, words);
    for (size_t i = 0; i < n; i++) words[i] = palette[tile.symbols[i]];
}

TRICOMP_END
