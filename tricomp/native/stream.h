// One rANS stream outside of any chunk: the vectors of a side section. Stage header: no STL.
//
// The hard thing: both calls take plain pointers, as types of a stage have another name in every instruction set.
#pragma once

#include <cstring>

#include "isa.h"
#include "model.h"
#include "rans.h"

TRICOMP_BEGIN

// Encodes rows of 128 positions with a table of one context. end: where the words end; 2 bytes a position and SLACK below
// it are room for them. states: 32 of them, as stored. Returns the number of words, which begin 2 bytes each before end.
inline size_t encode_stream(const Tables& tables, const uint16_t* rows, size_t n_rows, uint8_t* end, uint8_t* states) {
    RansEncoder encoder;
    for (size_t lane = 0; lane < LANES; lane++) encoder.states[lane] = LOWEST_STATE;
    encoder.words = end;
    rans_encode(tables, encoder, rows, n_rows);
    memcpy(states, encoder.states, STATE_BYTES);
    return static_cast<size_t>(end - encoder.words) / 2;
}

// Decodes rows of 128 symbols. words: SLACK bytes after them may be read. False: the stream does not end as an encoder
// begins, and the symbols mean nothing.
inline bool decode_stream(const Tables& tables, const uint8_t* states, const uint8_t* words, size_t n_words,
                          uint8_t* symbols, size_t n_rows) {
    RansDecoder decoder;
    memcpy(decoder.states, states, STATE_BYTES);
    decoder.words = words;
    decoder.n_words = n_words;
    decoder.at = 0;
    RansDecoder* const decoders[1] = {&decoder};
    uint8_t* const targets[1] = {symbols};
    rans_decode(tables, decoders, 1, nullptr, targets, n_rows);
    uint32_t differences = 0;
    for (size_t lane = 0; lane < LANES; lane++) differences |= decoder.states[lane] ^ LOWEST_STATE;
    return differences == 0 && decoder.at == n_words;
}

TRICOMP_END
