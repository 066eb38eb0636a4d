// What is asked of products of float rows with integer weights: the functions of multiply.h, once for every instruction
// set. Plain data: no STL.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quantize_kernels.h"

namespace tricomp {

// out[m][o] = bias[o] + sum over i of input[m][i] * code[o][i] * scale of code[o][i]; scales are shared by `group` codes of
// a row. Codes lie as they are saved: a byte each, or two a byte, the first in the low bits. Addresses need not be aligned.
struct Multiplying {
    size_t n_rows = 0, n_in = 0, n_out = 0, group = 1;
    uint32_t bits = 8;                                // 8 or 4
    FloatFormat scale_format = FloatFormat::FLOAT32;  // or BFLOAT16
    bool is_dynamic = false;                          // whether rows of input become codes of 8 bits too, by their largest
    const uint8_t *codes = nullptr, *scales = nullptr, *bias = nullptr;  // bias: float32, or null

    size_t n_groups() const { return n_in <= group ? 1 : (n_in + group - 1) / group; }
    bool has_groups() const { return n_groups() > 1; }
    size_t row_bytes() const { return bits == 8 ? n_in : (n_in + 1) / 2; }
    size_t scale_bytes() const { return n_groups() * float_bytes(scale_format); }
};

constexpr size_t MULTIPLY_ALIGN = 64;      // bytes, of prepared blocks of rows and of scratch
constexpr size_t MULTIPLY_OUTPUTS = 16;    // outputs are shared among threads by multiples of so many
constexpr size_t MULTIPLY_MOST = 1 << 16;  // codes of a row, so that an int32 holds their sum of products

// How rows are made ready: in blocks of so many, the last of fewer; each takes so much memory, a multiple of
// MULTIPLY_ALIGN. scratch_bytes: what each thread needs besides.
struct MultiplyBlocks {
    size_t n_rows, n_bytes, scratch_bytes;
};

struct MultiplyKernels {
    MultiplyBlocks (*blocks)(const Multiplying&);
    // A block of n_rows rows of input, float32[n_rows][n_in], made ready.
    void (*prepare)(const Multiplying&, const uint8_t* input, size_t n_rows, uint8_t* scratch, uint8_t* block);
    // Outputs first to last of n_rows rows in whole blocks, but for the last. out: float32[n_rows][n_out].
    void (*multiply)(const Multiplying&, const uint8_t* blocks, size_t n_rows, size_t first, size_t last, uint8_t* scratch,
                     uint8_t* out);
};

}  // namespace tricomp
