// Products with integer weights for the Python module _core. Limited API of Python 3.11.
//
// module.cpp includes this and no one else does. multiply.py packs what is given. The hard thing: threads. A framework
// whose idle threads still spin would share its cores with threads of ours; so where the process has an OpenMP runtime
// for all to see, as PyTorch's, its threads are used.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>

#include "kernels.h"
#include "module_parts.h"
#include "threads.h"

namespace tricomp {
namespace {

constexpr size_t MULTIPLY_SHARE = size_t(1) << 15;  // elements that are worth a thread
constexpr size_t MULTIPLY_ROUNDS = 4;                // blocks for each thread, from which threads share blocks evenly
constexpr size_t MULTIPLY_CACHE = size_t(1) << 18;   // bytes of blocks that stay in a core's cache beside weights

// Call work() in so many threads at once.
template <class Work>
void in_threads(size_t n_threads, const Work& work) {
    typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
#if defined(__unix__) || defined(__APPLE__)
    static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    const Parallel parallel = nullptr;
#endif
    if (n_threads <= 1) {
        work();
    } else if (parallel != nullptr) {
        parallel([](void* held) { (*static_cast<const Work*>(held))(); }, const_cast<Work*>(&work), unsigned(n_threads), 0);
    } else {
        share(n_threads, n_threads, [&] { return [&](size_t) { work(); }; });
    }
}

// Memory that starts at a multiple of MULTIPLY_ALIGN.
struct Aligned {
    explicit Aligned(size_t n_bytes) : memory(new uint8_t[n_bytes + MULTIPLY_ALIGN]) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(memory.get());
        start = memory.get() + (MULTIPLY_ALIGN - at % MULTIPLY_ALIGN) % MULTIPLY_ALIGN;
    }
    std::unique_ptr<uint8_t[]> memory;
    uint8_t* start;
};

// Inputs made ready, then outputs, by so many threads. Where blocks are many, a thread takes some through all outputs, as
// many as stay in its cache; else all blocks are made ready, and threads share the outputs.
inline void multiply_all(const Multiplying& task, const uint8_t* input, size_t n_threads, uint8_t* out) {
    const MultiplyKernels& multiplying = kernels().multiplying;
    const MultiplyBlocks each = multiplying.blocks(task);
    const size_t n_blocks = (task.n_rows + each.n_rows - 1) / each.n_rows;
    const size_t scratch_bytes = (each.scratch_bytes + MULTIPLY_ALIGN - 1) / MULTIPLY_ALIGN * MULTIPLY_ALIGN;
    const auto rows_of = [&](size_t i) { return std::min(task.n_rows - i * each.n_rows, each.n_rows); };
    const auto prepare = [&](size_t i, uint8_t* scratch, uint8_t* block) {
        multiplying.prepare(task, input + i * each.n_rows * 4 * task.n_in, rows_of(i), scratch, block);
    };
    if (task.n_rows * task.n_out < MULTIPLY_SHARE * 16 / task.n_in) n_threads = 1;
    std::atomic<size_t> next_block{0}, next{0}, i_thread{0};
    if (each.n_rows > 1 && n_blocks >= MULTIPLY_ROUNDS * n_threads) {
        const size_t n_cached = std::max<size_t>(MULTIPLY_CACHE / each.n_bytes, 1);
        const size_t n_together = std::min(n_cached, n_blocks / (MULTIPLY_ROUNDS * n_threads));
        const size_t thread_bytes = scratch_bytes + n_together * each.n_bytes;
        const Aligned memory(n_threads * thread_bytes);
        in_threads(n_threads, [&] {
            uint8_t* scratch = memory.start + (i_thread++) * thread_bytes;
            uint8_t* blocks = scratch + scratch_bytes;
            for (size_t i = n_together * next_block++; i < n_blocks; i = n_together * next_block++) {
                const size_t n_here = std::min(n_together, n_blocks - i), first_row = i * each.n_rows;
                for (size_t k = 0; k < n_here; k++) prepare(i + k, scratch, blocks + k * each.n_bytes);
                const size_t n_rows = std::min(task.n_rows - first_row, n_here * each.n_rows);
                multiplying.multiply(task, blocks, n_rows, 0, task.n_out, scratch, out + 4 * first_row * task.n_out);
            }
        });
        return;
    }
    const Aligned memory(n_threads * scratch_bytes + n_blocks * each.n_bytes);
    uint8_t* blocks = memory.start + n_threads * scratch_bytes;
    in_threads(n_blocks == 1 || task.n_rows * task.n_in < MULTIPLY_SHARE ? 1 : n_threads, [&] {
        uint8_t* scratch = memory.start + (i_thread++) * scratch_bytes;
        for (size_t i = next_block++; i < n_blocks; i = next_block++) prepare(i, scratch, blocks + i * each.n_bytes);
    });
    i_thread = 0;
    const size_t n_outputs = (task.n_out / (n_threads * 4) / MULTIPLY_OUTPUTS + 1) * MULTIPLY_OUTPUTS;
    in_threads(n_threads, [&] {
        uint8_t* scratch = memory.start + (i_thread++) * scratch_bytes;
        for (size_t first = n_outputs * next++; first < task.n_out; first = n_outputs * next++) {
            const size_t last = std::min(first + n_outputs, task.n_out);
            multiplying.multiply(task, blocks, task.n_rows, first, last, scratch, out);
        }
    });
}

// A request (rows, in, out, group, bits, format of scales, whether inputs become codes), inputs, codes, scales, bias or
// None, out, threads: fills out.
PyObject* multiply(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* objects[6];
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "OOOOOOn", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4], &objects[5],
                              &n_threads))
            throw std::domain_error("");
        Buffers buffers;
        const Bytes packed = buffers.take(objects[0]), input = buffers.take(objects[1]), codes = buffers.take(objects[2]);
        const Bytes scales = buffers.take(objects[3]), bias = buffers.take(objects[4]), out = buffers.take(objects[5], true);
        uint64_t fields[7];
        require(packed.n_bytes == sizeof fields, "a request of another length");
        std::memcpy(fields, packed.data, sizeof fields);
        constexpr uint64_t MOST = uint64_t(1) << 31;
        require(fields[0] < MOST && fields[1] && fields[1] <= MULTIPLY_MOST && fields[2] < MOST && fields[3] &&
                    fields[3] < MOST && fields[3] % 16 == 0 && (fields[4] == 8 || fields[4] == 4) && fields[5] < 2,
                "a request that contradicts itself");
        Multiplying task;
        task.n_rows = size_t(fields[0]), task.n_in = size_t(fields[1]), task.n_out = size_t(fields[2]);
        task.group = size_t(fields[3]), task.bits = uint32_t(fields[4]), task.scale_format = FloatFormat(fields[5]);
        task.is_dynamic = fields[6] != 0;
        task.codes = codes.data, task.scales = scales.data, task.bias = bias.data;
        require(input.n_bytes == 4 * task.n_rows * task.n_in, "inputs of another number");
        require(codes.n_bytes == task.n_out * task.row_bytes(), "codes of another number");
        require(scales.n_bytes == task.n_out * task.scale_bytes(), "scales of another number");
        require(bias.data == nullptr || bias.n_bytes == 4 * task.n_out, "a bias of another number");
        require(out.n_bytes == 4 * task.n_rows * task.n_out, "outputs of another number");
        if (task.n_rows == 0 || task.n_out == 0) Py_RETURN_NONE;
        {
            Unlocked unlocked;
            multiply_all(task, input.data, size_t(n_threads), const_cast<uint8_t*>(out.data));
        }
        Py_RETURN_NONE;
    });
}

}  // namespace
}  // namespace tricomp
