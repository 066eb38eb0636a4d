// Entropy stage: interleaved rANS over rows of 128 positions, for tables of up to 8 contexts. Stage header: no STL.
//
// The hard thing: a lane cannot begin a step before its last one ends, so speed comes from 32 lanes a step, several
// chunks at a time, and look-ups that do not go to memory where a table is small enough to lie in registers.
#pragma once

#include "isa.h"
#include "rans_plain.h"
#if TRICOMP_HAS_AVX512
#include "rans_avx512_decode.h"
#include "rans_avx512_encode.h"
#elif TRICOMP_HAS_AVX2
#include "rans_avx2.h"
#endif

TRICOMP_BEGIN

// Encodes rows of 128 positions, the last first. rows: context * n_symbols + symbol, in position order, of frequency
// above 0. Up to SLACK bytes below the words may be overwritten.
inline void rans_encode(const Tables& tables, RansEncoder& encoder, const uint16_t* rows, size_t n_rows) {
    if (!tables.fast) return encode_rows_slowly(tables, encoder, rows, n_rows);
#if TRICOMP_HAS_AVX2
    encode_by_divisors(tables, encoder, rows, n_rows);
#else
    encode_rows_plainly(tables, encoder, rows, n_rows);
#endif
}

// Decodes n_rows rows of 128 positions of each of 1 to MAX_GROUP chunks. contexts: of every position, each below
// n_contexts; null: one context. Whatever the words are, no more than 64 bytes past them are read.
inline void rans_decode(const Tables& tables, RansDecoder* const* chunks, size_t n_chunks,
                        const uint8_t* const* contexts, uint8_t* const* symbols, size_t n_rows) {
#if TRICOMP_HAS_AVX512
    if (!contexts && tables.fast && tables.fast->ranks.n_ranks && tables.fast->ranks.n_ranks <= 128) {
        switch (n_chunks) {
            case 4: return decode_chunks_by_ranks<4>(tables, chunks, symbols, n_rows);
            case 3: return decode_chunks_by_ranks<3>(tables, chunks, symbols, n_rows);
            case 2: return decode_chunks_by_ranks<2>(tables, chunks, symbols, n_rows);
            default: return decode_chunks_by_ranks<1>(tables, chunks, symbols, n_rows);
        }
    }
#endif
#if TRICOMP_HAS_AVX2
    switch (n_chunks) {
        case 4: return decode_by_slots<4>(tables, chunks, contexts, symbols, n_rows);
        case 3: return decode_by_slots<3>(tables, chunks, contexts, symbols, n_rows);
        case 2: return decode_by_slots<2>(tables, chunks, contexts, symbols, n_rows);
        default: return decode_by_slots<1>(tables, chunks, contexts, symbols, n_rows);
    }
#else
    for (size_t c = 0; c < n_chunks; ++c)
        decode_rows_plainly(tables, *chunks[c], contexts ? contexts[c] : nullptr, symbols[c], n_rows);
#endif
}

TRICOMP_END

#undef EACH
