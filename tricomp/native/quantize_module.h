// Floats to integers and back for the Python module _core. Limited API of Python 3.11.
//
// module.cpp includes this and no one else does. quantize.py packs what is given. The hard thing: every buffer is compared
// with the shape here, before a row of it is touched.
#pragma once

#include <atomic>

#include "kernels.h"
#include "module_parts.h"
#include "quantize_kernels.h"
#include "threads.h"

namespace tricomp {
namespace {

constexpr size_t QUANTIZE_SHARE = size_t(1) << 16;  // elements that a thread takes at a time, or a row

// What quantize.py packs: rows, then the fields of Quantizing.
struct QuantizeRequest {
    Quantizing task;
    size_t n_rows = 0;

    explicit QuantizeRequest(const Bytes& packed) {
        uint64_t fields[7];
        require(packed.n_bytes == sizeof fields, "a request of another length");
        std::memcpy(fields, packed.data, sizeof fields);
        constexpr uint64_t MOST = uint64_t(1) << 48;
        require(fields[0] < MOST && fields[1] < MOST && fields[2] && fields[2] < MOST && fields[3] < N_FLOAT_FORMATS &&
                    fields[4] < 2 && fields[5] >= 4 && fields[5] <= 8,
                "a request that contradicts itself");
        n_rows = size_t(fields[0]);
        task.n = size_t(fields[1]);
        task.group = size_t(fields[2]);
        task.format = FloatFormat(fields[3]);
        task.scale_format = FloatFormat(fields[4]);
        task.bits = uint32_t(fields[5]);
        task.is_clipped = fields[6] != 0;
        require(task.n == 0 || n_rows < MOST / task.n, "more rows than any memory holds");
    }

    size_t row_bytes() const { return task.n * float_bytes(task.format); }
    size_t scale_bytes() const { return task.n_groups() * float_bytes(task.scale_format); }

    void check(const Bytes& words, const Bytes& codes, const Bytes& scales) const {
        require(words.n_bytes == n_rows * row_bytes(), "words of another number");
        require(codes.n_bytes == n_rows * task.n, "codes of another number");
        require(scales.n_bytes == n_rows * scale_bytes(), "scales of another number");
    }

    // Call work(row) for all rows, by so many threads.
    template <class Work>
    void share_rows(size_t n_threads, const Work& work) const {
        const size_t n_each = task.n < QUANTIZE_SHARE ? QUANTIZE_SHARE / (task.n + 1) + 1 : 1;
        share((n_rows + n_each - 1) / n_each, n_threads, [&] {
            return [&](size_t i) {
                for (size_t row = i * n_each; row < n_rows && row < (i + 1) * n_each; row++) work(row);
            };
        });
    }
};

// A request, words, codes, scales, threads: fills codes and scales. Counts of what is not finite: into the last buffer,
// a number a row. Returns whether all is.
PyObject* quantize(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* objects[5];
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "OOOOOn", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4], &n_threads))
            throw std::domain_error("");
        Buffers buffers;
        const QuantizeRequest request(buffers.take(objects[0]));
        const Bytes words = buffers.take(objects[1]), codes = buffers.take(objects[2], true);
        const Bytes scales = buffers.take(objects[3], true), counts = buffers.take(objects[4], true);
        request.check(words, codes, scales);
        require(counts.n_bytes == 8 * request.n_rows, "counts of another number");
        std::atomic<bool> is_finite{true};
        {
            Unlocked unlocked;
            request.share_rows(size_t(n_threads), [&](size_t row) {
                const uint64_t n_bad = kernels().quantizing.quantize_row(
                    request.task, words.data + row * request.row_bytes(),
                    reinterpret_cast<int8_t*>(const_cast<uint8_t*>(codes.data)) + row * request.task.n,
                    const_cast<uint8_t*>(scales.data) + row * request.scale_bytes());
                std::memcpy(const_cast<uint8_t*>(counts.data) + 8 * row, &n_bad, 8);
                if (n_bad) is_finite.store(false, std::memory_order_relaxed);
            });
        }
        return PyBool_FromLong(is_finite.load());
    });
}

// A request, codes, scales, words, threads: fills words.
PyObject* dequantize(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* objects[4];
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "OOOOn", &objects[0], &objects[1], &objects[2], &objects[3], &n_threads))
            throw std::domain_error("");
        Buffers buffers;
        const QuantizeRequest request(buffers.take(objects[0]));
        const Bytes codes = buffers.take(objects[1]), scales = buffers.take(objects[2]);
        const Bytes words = buffers.take(objects[3], true);
        request.check(words, codes, scales);
        {
            Unlocked unlocked;
            request.share_rows(size_t(n_threads), [&](size_t row) {
                kernels().quantizing.dequantize_row(
                    request.task, reinterpret_cast<const int8_t*>(codes.data) + row * request.task.n,
                    scales.data + row * request.scale_bytes(),
                    const_cast<uint8_t*>(words.data) + row * request.row_bytes());
            });
        }
        Py_RETURN_NONE;
    });
}

}  // namespace
}  // namespace tricomp
