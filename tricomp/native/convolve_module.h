// Convolutions with integer weights for the Python module _core. Limited API of Python 3.11.
//
// module.cpp includes this and no one else does. convolve.py packs what is given. The hard thing: how work is shared. With
// many samples each thread takes some from their floats to their outputs, which stay in its cache; with few, all threads
// share each sample.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <vector>

#include "multiply_module.h"

namespace tricomp {
namespace {

constexpr size_t CONVOLVE_SHARE = size_t(1) << 21;  // products that are worth a thread
constexpr size_t CONVOLVE_PART = size_t(1) << 13;   // floats that are read at a time where threads share a sample

// A task, its memory and who does what.
class Convolution {
  public:
    Convolution(const Convolving& task, size_t n_threads, uint8_t* out)
        : task_(task),
          kernels_(tricomp::kernels().convolving),
          out_(out),
          n_vectors_(task.groups * ((task.out_each() + kernels_.lanes - 1) / kernels_.lanes)),
          sample_bytes_(kernels_.code_bytes(task)),
          packed_(kernels_.packed_bytes(task)) {
        const double n_products = double(task.n_samples) * double(task.n_positions()) * double(task.n_out) *
                                  double(task.in_each() * task.n_taps());
        const double worth = n_products / double(CONVOLVE_SHARE);
        n_threads_ = worth < 2 ? 1 : worth < double(n_threads) ? size_t(worth) : n_threads;
    }

    void run() {
        kernels_.pack_steps(task_, packed_.start);
        if (n_threads_ == 1 || task_.n_samples >= 2 * n_threads_)
            by_samples();
        else
            together();
    }

  private:
    // Call work(item) for all items, in any order, by all threads.
    template <class Work>
    void share_out(size_t n, const Work& work) {
        std::atomic<size_t> next{0};
        in_threads(std::min(n_threads_, n), [&] {
            for (size_t item = next++; item < n; item = next++) work(item);
        });
    }

    const uint8_t* sample(size_t i) const { return task_.input + 4 * i * task_.n_in * task_.n_pixels(); }
    uint8_t* out_of(size_t i) const { return out_ + 4 * i * task_.n_out * task_.n_positions(); }

    void by_samples() {
        share_out(n_vectors_, [&](size_t i) { kernels_.pack(task_, i, i + 1, packed_.start); });
        const size_t n_positions = task_.n_positions(), most = (task_.n_samples + n_threads_ - 1) / n_threads_;
        const size_t each = std::min((CONVOLVE_CHUNK + n_positions - 1) / n_positions, most);
        Aligned codes(n_threads_ * each * sample_bytes_);
        std::vector<float> scales(n_threads_ * each);
        std::atomic<size_t> next{0}, i_thread{0};
        in_threads(n_threads_, [&] {
            const size_t mine = (i_thread++) * each;
            uint8_t* const my_codes = codes.start + mine * sample_bytes_;
            for (size_t first = each * next++; first < task_.n_samples; first = each * next++) {
                const size_t n = std::min(task_.n_samples - first, each);
                for (size_t i = 0; i < n; i++) {
                    const float largest = kernels_.largest(sample(first + i), task_.n_in * task_.n_pixels());
                    scales[mine + i] = kernels_.quantize(task_, sample(first + i), largest, 0, task_.padded_height(),
                                                         my_codes + i * sample_bytes_);
                }
                kernels_.convolve(task_, packed_.start, my_codes, scales.data() + mine, 0, n * n_positions, 0, n_vectors_,
                                  out_of(first));
            }
        });
    }

    void together() {
        const size_t n = task_.n_samples, n_floats = task_.n_in * task_.n_pixels();
        const size_t n_slices = std::min(2 * n_threads_, n_floats / CONVOLVE_PART + 1);
        Aligned codes(n * sample_bytes_);
        std::vector<float> found(n * n_slices), scales(n);
        share_out(n_vectors_ + n * n_slices, [&](size_t i) {
            if (i < n_vectors_) return kernels_.pack(task_, i, i + 1, packed_.start);
            i -= n_vectors_;
            const size_t slice = i % n_slices, from = n_floats * slice / n_slices, to = n_floats * (slice + 1) / n_slices;
            found[i] = kernels_.largest(sample(i / n_slices) + 4 * from, to - from);
        });
        std::vector<float> largest(n);
        for (size_t i = 0; i < n; i++)  // of magnitudes again, so that NaN is the largest
            largest[i] = kernels_.largest(reinterpret_cast<const uint8_t*>(found.data() + i * n_slices), n_slices);
        const size_t height = task_.padded_height(), rows = CONVOLVE_PART / (task_.padded_width() * task_.n_in) + 1;
        const size_t n_parts = (height + rows - 1) / rows;
        share_out(n * n_parts, [&](size_t item) {
            const size_t i = item / n_parts, first = item % n_parts * rows, last = std::min(first + rows, height);
            const float scale = kernels_.quantize(task_, sample(i), largest[i], first, last, codes.start + i * sample_bytes_);
            if (first == 0) scales[i] = scale;
        });
        const size_t n_positions = n * task_.n_positions(), n_chunks = (n_positions + CONVOLVE_CHUNK - 1) / CONVOLVE_CHUNK;
        const size_t vectors_at_once = 4, n_columns = (n_vectors_ + vectors_at_once - 1) / vectors_at_once;
        const size_t chunks_at_once = n_chunks * n_columns / (8 * n_threads_) + 1;
        const size_t n_rows = (n_chunks + chunks_at_once - 1) / chunks_at_once;
        share_out(n_rows * n_columns, [&](size_t item) {
            const size_t first = item % n_rows * chunks_at_once * CONVOLVE_CHUNK, vector = item / n_rows * vectors_at_once;
            const size_t last = first + chunks_at_once * CONVOLVE_CHUNK, end = vector + vectors_at_once;
            kernels_.convolve(task_, packed_.start, codes.start, scales.data(), first, std::min(last, n_positions), vector,
                              std::min(end, n_vectors_), out_);
        });
    }

    const Convolving& task_;
    const ConvolveKernels& kernels_;
    uint8_t* out_;
    size_t n_vectors_, sample_bytes_, n_threads_ = 1;
    Aligned packed_;
};

// The product of sizes below 2^31 each, refused where memory could not hold it.
inline size_t product(std::initializer_list<size_t> sizes) {
    constexpr size_t MOST = size_t(1) << 46;
    size_t all = 1;
    for (const size_t size : sizes) {
        require(size == 0 || all <= MOST / size, "a request that contradicts itself");
        all *= size;
    }
    return all;
}

inline Convolving convolving_of(const Bytes& packed) {
    uint64_t fields[19];
    require(packed.n_bytes == sizeof fields, "a request of another length");
    std::memcpy(fields, packed.data, sizeof fields);
    Convolving task;
    size_t* const sizes[] = {&task.n_samples,       &task.n_in,            &task.height,          &task.width,
                             &task.n_out,           &task.out_height,      &task.out_width,       &task.groups,
                             &task.kernel_height,   &task.kernel_width,    &task.stride_height,   &task.stride_width,
                             &task.dilation_height, &task.dilation_width,  &task.top,             &task.left};
    for (size_t i = 0; i < 16; i++) {
        // All are at least 1 but for samples and padding.
        require(fields[i] < uint64_t(1) << 31 && (fields[i] || i == 0 || i >= 14), "a request that contradicts itself");
        *sizes[i] = size_t(fields[i]);
    }
    task.is_input_last = fields[16] != 0, task.is_out_last = fields[17] != 0, task.is_codes_last = fields[18] != 0;
    require(task.n_in % task.groups == 0 && task.n_out % task.groups == 0, "a request that contradicts itself");
    require(product({task.in_each(), task.kernel_height, task.kernel_width}) <= CONVOLVE_MOST, "rows of too many codes");
    product({task.out_height, task.stride_height});
    product({task.dilation_height, task.kernel_height});
    product({task.out_width, task.stride_width});
    product({task.dilation_width, task.kernel_width});
    // Places within a sample are told by 32 bits, two bytes a code at most.
    require(product({task.padded_height(), task.padded_width(), task.n_in}) < size_t(1) << 30, "samples of too many codes");
    return task;
}

// A request (numbers, flags), inputs, codes, scales, bias or None, out, threads: fills out.
PyObject* convolve(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* objects[6];
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "OOOOOOn", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4], &objects[5],
                              &n_threads))
            throw std::domain_error("");
        Buffers buffers;
        const Bytes packed = buffers.take(objects[0]), input = buffers.take(objects[1]), codes = buffers.take(objects[2]);
        const Bytes scales = buffers.take(objects[3]), bias = buffers.take(objects[4]), out = buffers.take(objects[5], true);
        Convolving task = convolving_of(packed);
        task.input = input.data, task.codes = codes.data, task.scales = scales.data, task.bias = bias.data;
        require(input.n_bytes == product({4, task.n_samples, task.n_in, task.height, task.width}), "inputs of another number");
        require(codes.n_bytes == task.n_out * task.in_each() * task.n_taps(), "codes of another number");
        require(scales.n_bytes == 4 * task.n_out, "scales of another number");
        require(bias.data == nullptr || bias.n_bytes == 4 * task.n_out, "a bias of another number");
        require(out.n_bytes == product({4, task.n_samples, task.n_out, task.out_height, task.out_width}),
                "outputs of another number");
        if (task.n_samples == 0) Py_RETURN_NONE;
        {
            Unlocked unlocked;
            Convolution(task, n_threads < 1 ? 1 : size_t(n_threads), const_cast<uint8_t*>(out.data)).run();
        }
        Py_RETURN_NONE;
    });
}

}  // namespace
}  // namespace tricomp
