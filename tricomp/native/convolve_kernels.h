// What is asked of convolutions of float pictures with integer weights: the functions of convolve.h, once for every
// instruction set. Plain data: no STL.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tricomp {

// out[n][o][y][x] = bias[o] + scale[n] * scale[o] * sum of code[o][c][i][j] * code of
// input[n][c][y * stride - top + i * dilation][x * stride - left + j * dilation], which is 0 outside. Codes of weights
// are a byte each; those of a sample are found by its largest magnitude. Addresses need not be aligned.
struct Convolving {
    size_t n_samples = 0, n_in = 0, height = 0, width = 0, n_out = 0, out_height = 0, out_width = 0, groups = 1;
    size_t kernel_height = 1, kernel_width = 1, stride_height = 1, stride_width = 1;
    size_t dilation_height = 1, dilation_width = 1, top = 0, left = 0;
    // Whether channels stand last: input [n][y][x][c], output [n][y][x][o], codes [o][i][j][c].
    bool is_input_last = false, is_out_last = false, is_codes_last = false;
    const uint8_t *input = nullptr, *codes = nullptr, *scales = nullptr, *bias = nullptr;  // bias: float32, or null

    size_t n_taps() const { return kernel_height * kernel_width; }
    size_t in_each() const { return n_in / groups; }
    size_t out_each() const { return n_out / groups; }
    size_t n_pixels() const { return height * width; }
    size_t n_positions() const { return out_height * out_width; }
    // What is read of a sample, padding included.
    size_t padded_height() const { return (out_height - 1) * stride_height + dilation_height * (kernel_height - 1) + 1; }
    size_t padded_width() const { return (out_width - 1) * stride_width + dilation_width * (kernel_width - 1) + 1; }
};

constexpr size_t CONVOLVE_ALIGN = 64;     // bytes, of what is packed
constexpr size_t CONVOLVE_CHUNK = 48;     // positions of the output that are worth a call
constexpr size_t CONVOLVE_MOST = 1 << 16;  // weights of an output, so that an int32 holds their sum of products

struct ConvolveKernels {
    // Outputs of so many channels of a group are packed together.
    size_t lanes;
    size_t (*packed_bytes)(const Convolving&);
    // Bytes that the codes of one sample take.
    size_t (*code_bytes)(const Convolving&);
    // Weights, a few outputs at a time, for all positions; steps: once, where the first tile of a kernel finds its inputs.
    void (*pack_steps)(const Convolving&, uint8_t* packed);
    void (*pack)(const Convolving&, size_t first_vector, size_t last_vector, uint8_t* packed);
    // The largest magnitude of so many floats, NaN if there is one.
    float (*largest)(const uint8_t* input, size_t n);
    // Rows first to last of a padded sample; returns the scale.
    float (*quantize)(const Convolving&, const uint8_t* sample, float largest, size_t first, size_t last, uint8_t* codes);
    // Positions first to last of all outputs of samples whose codes stand in a row. out: of the first of them.
    void (*convolve)(const Convolving&, const uint8_t* packed, const uint8_t* codes, const float* scales, size_t first,
                     size_t last, size_t first_vector, size_t last_vector, uint8_t* out);
};

}  // namespace tricomp
