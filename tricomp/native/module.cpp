// The Python module _core: arguments in, results out, the GIL released in between. Limited API of Python 3.11.
//
// The hard thing: every size is compared with its buffer here, before any stage sees a pointer. Callers are the modules
// beside this one, which make buffers contiguous and aligned.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "frame.h"
#include "kernels.h"
#include "module_parts.h"
#include "planner_module.h"
#include "convolve_module.h"
#include "multiply_module.h"
#include "quantize_module.h"
#include "side_module.h"
#include "threads.h"

namespace tricomp {
namespace {

size_t word_bytes(const PlanNumbers& plan) { return size_t(plan.fields[P_WORD_BITS]) / 8; }
size_t source_bytes(const PlanNumbers& plan) {
    return size_t(plan.fields[plan.fields[P_PREDICT] == CAST ? P_SOURCE_WORD_BITS : P_WORD_BITS]) / 8;
}

// Only of a reference with words like the frame's own: what a cast is from has no digest here.
bool plan_has_reference(const PlanNumbers& plan) {
    return plan.fields[P_HAS_REFERENCE] && plan.fields[P_PREDICT] != CAST;
}

PyObject* pair(uint64_t one, uint64_t other) {
    return Py_BuildValue("(KK)", (unsigned long long)one, (unsigned long long)other);
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kernels().name); }

PyObject* decode_requests(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* list;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &n_threads)) throw std::domain_error("");
        Buffers buffers;
        std::vector<DecodeRequest> requests(size_t(PyList_Size(list)));
        for (size_t i = 0; i < requests.size(); i++) {
            PyObject* given = PyList_GetItem(list, Py_ssize_t(i));
            DecodeRequest& request = requests[i];
            request.plan = plan_of(buffers.take(item(given, 0)));
            request.head = buffers.take(item(given, 1));
            request.payloads = buffers.take(item(given, 2));
            request.payloads_at = number(item(given, 3));
            request.frame_bytes = number(item(given, 4));
            const Bytes reference = buffers.take(item(given, 5));
            const Bytes words = buffers.take(item(given, 6), true);
            request.start = number(item(given, 7));
            request.stop = number(item(given, 8));
            request.wants_reference_sum = number(item(given, 9)) && plan_has_reference(request.plan);
            request.is_checked = number(item(given, 10));
            const PlanNumbers& plan = request.plan;
            const uint64_t n_words = uint64_t(plan.fields[P_N_WORDS]), size = uint64_t(1) << plan.fields[P_CHUNK_LOG2];
            require(request.start <= request.stop && request.stop <= n_words && request.start % size == 0 &&
                        (request.stop % size == 0 || request.stop == n_words),
                    "a part that is not whole chunks");
            const uint64_t n = request.stop - request.start;
            require(words.n_bytes == n * word_bytes(plan), "an output of another size");
            require(!plan.fields[P_HAS_REFERENCE] || reference.n_bytes == n * source_bytes(plan),
                    "a reference of another size");
            require(reinterpret_cast<uintptr_t>(words.data) % word_bytes(plan) == 0 &&
                        reinterpret_cast<uintptr_t>(reference.data) % source_bytes(plan) == 0,
                    "a buffer that is not aligned");
            request.words = const_cast<uint8_t*>(words.data);
            request.reference = plan.fields[P_HAS_REFERENCE] ? reference.data : nullptr;
        }
        Fault fault;
        {
            Unlocked unlocked;
            fault = decode(requests, size_t(n_threads));
        }
        if (fault.stage)
            return Py_BuildValue("(IIKKKK)", fault.stage, fault.code, (unsigned long long)fault.request,
                                 (unsigned long long)fault.chunk, (unsigned long long)fault.details[0],
                                 (unsigned long long)fault.details[1]);
        PyObject* sums = PyList_New(Py_ssize_t(requests.size()));
        for (size_t i = 0; sums != nullptr && i < requests.size(); i++)
            PyList_SetItem(sums, Py_ssize_t(i), pair(requests[i].digest_sum, requests[i].reference_sum));
        return sums;
    });
}

// Requests as encode.py packs them. Buffers stay with the caller's Buffers.
std::vector<EncodeRequest> encode_requests_of(PyObject* list, Buffers& buffers) {
    std::vector<EncodeRequest> requests(size_t(PyList_Size(list)));
    for (size_t i = 0; i < requests.size(); i++) {
        PyObject* given = PyList_GetItem(list, Py_ssize_t(i));
        EncodeRequest& request = requests[i];
        take_side(given, buffers, request);
        const Bytes words = buffers.take(item(given, 7)), reference = buffers.take(item(given, 8));
        request.first_chunk = number(item(given, 9));
        request.n_chunks = number(item(given, 10));
        request.wants_reference_sum = number(item(given, 11)) && plan_has_reference(request.plan);
        request.wants_side = request.first_chunk == 0;
        const PlanNumbers& plan = request.plan;
        Model model;
        model_of(plan, model);
        require(words.n_bytes == model.n_words * word_bytes(plan), "words of another number");
        require(!model.has_reference || reference.n_bytes == model.n_words * source_bytes(plan),
                "a reference of another size");
        require(reinterpret_cast<uintptr_t>(words.data) % word_bytes(plan) == 0 &&
                    reinterpret_cast<uintptr_t>(reference.data) % source_bytes(plan) == 0,
                "a buffer that is not aligned");
        const uint64_t n_chunks = n_chunks_of(model);
        require(request.n_chunks <= n_chunks && request.first_chunk <= n_chunks - request.n_chunks,
                "chunks that there are not");
        request.words = words.data;
        request.reference = model.has_reference ? reference.data : nullptr;
    }
    return requests;
}

PyObject* room_for(PyObject*, PyObject* list) {
    return guarded([&]() -> PyObject* {
        uint64_t n = SLACK;
        for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
            PyObject* given = PyList_GetItem(list, i);
            Buffers buffers;
            const PlanNumbers plan = plan_of(buffers.take(item(given, 0)));
            n += number(item(given, 10)) * aligned(uint64_t(word_bytes(plan)) << plan.fields[P_CHUNK_LOG2]);
        }
        return PyLong_FromUnsignedLongLong(n);
    });
}

PyObject* encode_requests(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *list, *output;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!On", &PyList_Type, &list, &output, &n_threads)) throw std::domain_error("");
        Buffers buffers;
        std::vector<EncodeRequest> requests = encode_requests_of(list, buffers);
        const Bytes out = buffers.take(output, true);
        require(out.n_bytes >= output_bytes(requests), "an output that is too small");
        {
            Unlocked unlocked;
            encode(requests, size_t(n_threads), const_cast<uint8_t*>(out.data));
        }
        PyObject* results = PyList_New(Py_ssize_t(requests.size()));
        for (size_t i = 0; results != nullptr && i < requests.size(); i++) {
            const EncodeRequest& request = requests[i];
            // An empty vector may point nowhere, which Python would take for None.
            auto text = [](const std::vector<uint8_t>& bytes) {
                return bytes.empty() ? "" : reinterpret_cast<const char*>(bytes.data());
            };
            PyObject* result = Py_BuildValue("(nny#y#N)", Py_ssize_t(request.begin), Py_ssize_t(request.end),
                                             text(request.rows), Py_ssize_t(request.rows.size()), text(request.side),
                                             Py_ssize_t(request.side.size()),
                                             pair(request.digest_sum, request.reference_sum));
            if (result == nullptr) {
                Py_DecRef(results);
                return nullptr;
            }
            PyList_SetItem(results, Py_ssize_t(i), result);
        }
        return results;
    });
}

// Sums of digests: [(bytes, first byte)], threads -> list of int.
PyObject* digest_sums(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* list;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &n_threads)) throw std::domain_error("");
        Buffers buffers;
        std::vector<Part> parts(size_t(PyList_Size(list)));
        for (size_t i = 0; i < parts.size(); i++) {
            PyObject* given = PyList_GetItem(list, Py_ssize_t(i));
            const Bytes bytes = buffers.take(item(given, 0));
            parts[i] = {bytes, number(item(given, 1))};
            require(parts[i].first_byte % 512 == 0, "a part that begins within a row");
        }
        std::vector<uint64_t> sums;
        {
            Unlocked unlocked;
            sums = sum_parts(parts, size_t(n_threads));
        }
        PyObject* result = PyList_New(Py_ssize_t(sums.size()));
        for (size_t i = 0; result != nullptr && i < sums.size(); i++)
            PyList_SetItem(result, Py_ssize_t(i), PyLong_FromUnsignedLongLong(sums[i]));
        return result;
    });
}

// Fresh memory comes in pages of 4 KiB, which cost more than what is then done with them; ask for large ones.
void ask_for_large_pages(const void* memory, size_t n_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t LARGE = uintptr_t(2) << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + LARGE - 1) / LARGE * LARGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + n_bytes) / LARGE * LARGE;
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)n_bytes;
#endif
}

PyObject* advise(PyObject*, PyObject* object) {
    return guarded([&]() -> PyObject* {
        Buffers buffers;
        const Bytes bytes = buffers.take(object);
        ask_for_large_pages(bytes.data, bytes.n_bytes);
        Py_RETURN_NONE;
    });
}

// Copies parts to where they belong, in shares that any thread may take, and keeps the checksum of what is there.
class Sealing {
  public:
    explicit Sealing(uint8_t* out) : out_(out) {}

    void add(const Bytes& part) {
        for (size_t at = 0; at < part.n_bytes; at += SHARE)
            copies_.push_back({part.data + at, n_bytes_ + at, std::min(SHARE, part.n_bytes - at)});
        n_bytes_ += part.n_bytes;
    }

    // The checksum of all.
    uint64_t run(size_t n_threads) {
        std::vector<std::atomic<bool>> is_there(copies_.size());
        size_t n_taken = 0;
        std::mutex baton;  // who holds it takes what is there into the checksum; nobody waits for it
        share(copies_.size(), n_bytes_ < FEW_BYTES ? 1 : n_threads, [&] {
            return [&](size_t i) {
                const Copy& copy = copies_[i];
                std::memcpy(out_ + copy.to, copy.from, copy.n_bytes);
                is_there[i].store(true, std::memory_order_release);
                std::unique_lock<std::mutex> held(baton, std::try_to_lock);
                if (!held) return;
                while (n_taken < copies_.size() && is_there[n_taken].load(std::memory_order_acquire)) n_taken++;
                if (n_taken) kernels().xxh3_take(check_, out_, copies_[n_taken - 1].to + copies_[n_taken - 1].n_bytes);
            };
        });
        return kernels().xxh3_end(check_, out_, n_bytes_);
    }

  private:
    static constexpr size_t SHARE = size_t(128) << 10;  // fits the second cache
    static constexpr size_t FEW_BYTES = size_t(2) << 20;  // copied before another thread has begun

    struct Copy {
        const uint8_t* from;
        size_t to, n_bytes;
    };

    uint8_t* out_;
    std::vector<Copy> copies_;
    size_t n_bytes_ = 0;
    Xxh3 check_ = {};
};

// Buffers, threads -> all their bytes in a row, and their checksum as msgpack has it: 0xCF, then big-endian.
PyObject* seal(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* list;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &n_threads)) throw std::domain_error("");
        Buffers buffers;
        std::vector<Bytes> parts;
        size_t n_bytes = 0;
        for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
            parts.push_back(buffers.take(PyList_GetItem(list, i)));
            n_bytes += parts.back().n_bytes;
        }
        PyObject* sealed = PyBytes_FromStringAndSize(nullptr, Py_ssize_t(n_bytes + 9));
        if (sealed == nullptr) throw std::domain_error("");
        uint8_t* out = reinterpret_cast<uint8_t*>(PyBytes_AsString(sealed));
        try {
            Unlocked unlocked;
            ask_for_large_pages(out, n_bytes + 9);
            Sealing sealing(out);
            for (const Bytes& part : parts) sealing.add(part);
            const uint64_t check = sealing.run(size_t(n_threads));
            out[n_bytes] = 0xCF;
            for (size_t i = 0; i < 8; i++) out[n_bytes + 1 + i] = uint8_t(check >> (56 - 8 * i));
        } catch (...) {
            Py_DecRef(sealed);
            throw;
        }
        return sealed;
    });
}

PyObject* checksum(PyObject*, PyObject* object) {
    return guarded([&]() -> PyObject* {
        Buffers buffers;
        const Bytes bytes = buffers.take(object);
        uint64_t found;
        {
            Unlocked unlocked;
            found = kernels().xxh3_64(bytes.data, bytes.n_bytes);
        }
        return PyLong_FromUnsignedLongLong(found);
    });
}

// A buffer, where parts of it begin, bytes of each, an output: the checksum of each part, by so many threads.
PyObject* checksums(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        constexpr uint64_t FEW_BYTES = 1 << 20;  // done before another thread has begun
        PyObject* objects[4];
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "OOOOn", &objects[0], &objects[1], &objects[2], &objects[3], &n_threads))
            throw std::domain_error("");
        Buffers buffers;
        const Bytes bytes = buffers.take(objects[0]), packed_begins = buffers.take(objects[1]);
        const Bytes packed_sizes = buffers.take(objects[2]), out = buffers.take(objects[3], true);
        const size_t n = packed_begins.n_bytes / 8;
        require(packed_begins.n_bytes == 8 * n && packed_sizes.n_bytes == 8 * n && out.n_bytes == 8 * n,
                "numbers of parts that differ");
        std::vector<uint64_t> begins(n), sizes(n), found(n);
        uint64_t n_bytes = 0;
        if (n) {
            std::memcpy(begins.data(), packed_begins.data, 8 * n);
            std::memcpy(sizes.data(), packed_sizes.data, 8 * n);
        }
        for (size_t i = 0; i < n; i++) {
            require(begins[i] <= bytes.n_bytes && sizes[i] <= bytes.n_bytes - begins[i], "a part outside the buffer");
            n_bytes += sizes[i];
        }
        {
            Unlocked unlocked;
            share(n, n_bytes < FEW_BYTES ? 1 : size_t(n_threads), [&] {
                return [&](size_t i) { found[i] = kernels().xxh3_64(bytes.data + begins[i], size_t(sizes[i])); };
            });
        }
        if (n) std::memcpy(const_cast<uint8_t*>(out.data), found.data(), 8 * n);
        Py_RETURN_NONE;
    });
}

PyObject* equal(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *one, *other;
        if (!PyArg_ParseTuple(args, "OO", &one, &other)) throw std::domain_error("");
        Buffers buffers;
        const Bytes a = buffers.take(one), b = buffers.take(other);
        bool is_same = a.n_bytes == b.n_bytes;
        if (is_same) {
            Unlocked unlocked;
            is_same = kernels().is_equal(a.data, b.data, a.n_bytes);
        }
        return PyBool_FromLong(is_same);
    });
}

PyMethodDef METHODS[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"decode", decode_requests, METH_VARARGS, "Decode requests with so many threads: digest sums of words and reference, or a fault."},
    {"room_for", room_for, METH_O, "Bytes of output that requests may need."},
    {"encode", encode_requests, METH_VARARGS, "Encode requests into an output: places, directory rows, side sections, "
     "digest sums."},
    {"plan_frames", plan_frames, METH_VARARGS, "Plan frames with so many threads: numbers, tables and scales of each."},
    {"plan_gathered", plan_gathered, METH_VARARGS, "The same for frames elsewhere, from facts and gathered words."},
    {"plan_wants", plan_wants, METH_VARARGS, "What the plans of such frames need besides."},
    {"lattices", lattices, METH_O, "Where words of such a frame are gathered."},
    {"digest_sums", digest_sums, METH_VARARGS, "Digest sums of parts of leaves."},
    {"advise", advise, METH_O, "Ask for large pages for memory that was not written yet."},
    {"seal", seal, METH_VARARGS, "The bytes of buffers in a row and their checksum, by so many threads."},
    {"xxh3_64", checksum, METH_O, "XXH3 of a buffer, 64 bits, seed 0."},
    {"checksums", checksums, METH_VARARGS, "The same of parts of a buffer, into an output, by so many threads."},
    {"side_bytes", side_bytes, METH_O, "The side section of a plan and what belongs to it."},
    {"read_side", side_parts, METH_VARARGS, "What a side section says, or what is wrong with it."},
    {"quantize", quantize, METH_VARARGS, "Codes and scales of rows of floats, by so many threads: whether all are finite."},
    {"dequantize", dequantize, METH_VARARGS, "The floats that codes and scales stand for, by so many threads."},
    {"multiply", multiply, METH_VARARGS, "Products of rows of floats with integer weights, by so many threads."},
    {"convolve", convolve, METH_VARARGS, "Convolutions of float pictures with integer weights, by so many threads."},
    {"is_equal", equal, METH_VARARGS, "Whether two buffers hold the same bytes."},
    {nullptr, nullptr, 0, nullptr},
};

int execute(PyObject*) {
    if (chosen_kernels() != nullptr) return 0;
    PyErr_Format(PyExc_ImportError,
                 "TRICOMP_ISA=%s: this processor or build does not have it. "
                 "Choose avx512, avx2 or portable, or unset it.",
                 std::getenv("TRICOMP_ISA"));
    return -1;
}

PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_core", nullptr, 0, METHODS, SLOTS, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace tricomp

PyMODINIT_FUNC PyInit__core() { return PyModuleDef_Init(&tricomp::MODULE); }
