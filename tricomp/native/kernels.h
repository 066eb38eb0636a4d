// The functions that exist once for every instruction set, and which set is in use. Baseline code calls these alone.
#pragma once

#include "chunk.h"
#include "convolve_kernels.h"
#include "multiply_kernels.h"
#include "quantize_kernels.h"
#include "stats_kernels.h"

namespace tricomp {


struct Kernels {
    const char* name;  // "avx512", "avx2", "portable"
    void (*encode_chunk)(const Model&, const EncodeChunk&, EncodeScratch&, Payload&);
    void (*lay_down)(Payload&, uint8_t* out);
    void (*decode_chunks)(const Model&, DecodeChunk*, size_t n_chunks, DecodeScratch&);
    uint64_t (*xxh3_64)(const uint8_t*, size_t n_bytes);
    void (*xxh3_take)(Xxh3&, const uint8_t*, size_t n_bytes);
    uint64_t (*xxh3_end)(Xxh3&, const uint8_t*, size_t n_bytes);
    uint64_t (*digest_sum)(const uint8_t*, size_t n_bytes, uint64_t first_byte);
    bool (*is_equal)(const uint8_t*, const uint8_t*, size_t n_bytes);
    size_t (*encode_stream)(const Tables&, const uint16_t* rows, size_t n_rows, uint8_t* end, uint8_t* states);
    bool (*decode_stream)(const Tables&, const uint8_t* states, const uint8_t* words, size_t n_words, uint8_t* symbols,
                          size_t n_rows);
    PriceTables* price_tables;
    Majority* majority;
    QuantizeKernels quantizing;
    MultiplyKernels multiplying;
    ConvolveKernels convolving;
    Stats stats[4];  // of words of 8, 16, 32 and 64 bits
};

extern const Kernels portable_kernels;
#ifdef TRICOMP_X86
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// The best set that this processor has, or the one that the environment variable TRICOMP_ISA names; null if it does not
// have that one.
const Kernels* chosen_kernels();

// The same, once it is known to be there: the module refuses to load otherwise.
const Kernels& kernels();

}  // namespace tricomp
