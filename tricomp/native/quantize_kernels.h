// What is asked of floats that become integers, and of integers that become floats: the functions of quantize.h, once for
// every instruction set. Plain data: no STL.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tricomp {

enum class FloatFormat : uint32_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };
constexpr uint32_t N_FLOAT_FORMATS = 4;

inline size_t float_bytes(FloatFormat format) { return format == FloatFormat::FLOAT64 ? 8 : format == FloatFormat::FLOAT32 ? 4 : 2; }

// Rows of n elements, of which `group` in a row share a scale. Addresses need not be aligned.
struct Quantizing {
    FloatFormat format = FloatFormat::FLOAT32, scale_format = FloatFormat::FLOAT32;  // scales: FLOAT32 or BFLOAT16
    uint32_t bits = 8;                                     // of a code: 4 to 8
    bool is_clipped = true;                                // whether scales below the largest are tried
    size_t n = 0, group = 1;

    size_t n_groups() const { return n <= group ? 1 : (n + group - 1) / group; }
};

struct QuantizeKernels {
    // Codes and scales of one row; or, if elements are no finite float32, how many, and nothing is written.
    uint64_t (*quantize_row)(const Quantizing&, const uint8_t* words, int8_t* codes, uint8_t* scales);
    void (*dequantize_row)(const Quantizing&, const int8_t* codes, const uint8_t* scales, uint8_t* words);
};

}  // namespace tricomp
