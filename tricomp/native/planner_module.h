// plan_frames for the Python module _core: requests in, plans out, the GIL released in between. Limited API of Python 3.11.
//
// module.cpp includes this and no one else does. The hard thing: shapes and sizes come from Python, so each is compared
// with its buffer before the planner sees a pointer. planner.py packs the requests and reads the results.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "planner.h"

namespace tricomp {
namespace plan_requests {

struct PythonError {};  // one is set already

// Buffers of the words, held while the GIL is released.
class Views {
  public:
    ~Views() {
        for (Py_buffer& view : views_) PyBuffer_Release(&view);
    }

    const Py_buffer& take(PyObject* object) {
        Py_buffer view;
        if (PyObject_GetBuffer(object, &view, PyBUF_CONTIG_RO)) throw PythonError();
        views_.push_back(view);
        return views_.back();
    }

  private:
    std::vector<Py_buffer> views_;
};

inline PyObject* item_of(PyObject* tuple, Py_ssize_t i) {
    PyObject* found = PyTuple_GetItem(tuple, i);
    if (found == nullptr) throw PythonError();
    return found;
}

// The numbers that planner.py packs before the shape.
enum RequestField {
    R_WORD_BITS, R_EXPONENT_BITS, R_MANTISSA_BITS, R_IS_FLOAT, R_IS_SIGNED, R_CHUNK_LOG2, R_IS_FAST, N_REQUEST_FIELDS
};

inline PlanRequest request_of(PyObject* given, Views& views) {
    const auto require = [](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(what);
    };
    const Py_buffer numbers = views.take(item_of(given, 0));
    require(numbers.len % 8 == 0 && numbers.len >= 8 * Py_ssize_t(N_REQUEST_FIELDS), "a request of another length");
    std::vector<uint64_t> fields(size_t(numbers.len) / 8);
    std::memcpy(fields.data(), numbers.buf, size_t(numbers.len));
    PlanRequest request;
    const uint64_t word_bits = fields[R_WORD_BITS];
    require(word_bits == 8 || word_bits == 16 || word_bits == 32 || word_bits == 64, "words of another width");
    request.kind.word_bits = uint32_t(word_bits);
    request.kind.is_float = fields[R_IS_FLOAT] != 0;
    request.kind.is_signed = fields[R_IS_SIGNED] != 0;
    const uint64_t exponent_bits = fields[R_EXPONENT_BITS], mantissa_bits = fields[R_MANTISSA_BITS];
    require(request.kind.is_float ? exponent_bits > 0 && exponent_bits <= 11 && mantissa_bits > 0 && request.kind.is_signed &&
                                        exponent_bits + mantissa_bits + 1 == word_bits
                                  : exponent_bits == 0 && mantissa_bits == 0,
            "fields that do not fill the word");
    request.kind.exponent_bits = uint32_t(exponent_bits);
    request.kind.mantissa_bits = uint32_t(mantissa_bits);
    require(fields[R_CHUNK_LOG2] >= 10 && fields[R_CHUNK_LOG2] <= 16, "chunks of another size");
    request.chunk_log2 = uint32_t(fields[R_CHUNK_LOG2]);
    request.is_fast = fields[R_IS_FAST] != 0;
    const Py_buffer words = views.take(item_of(given, 1));
    const size_t word_bytes = size_t(word_bits) / 8;
    require(size_t(words.len) % word_bytes == 0, "part of a word");
    require(reinterpret_cast<uintptr_t>(words.buf) % word_bytes == 0, "a buffer that is not aligned");
    request.words = words.buf;
    request.n_words = uint64_t(words.len) / word_bytes;
    if (item_of(given, 2) != Py_None) {
        const Py_buffer reference = views.take(item_of(given, 2));
        require(reference.len == words.len, "a reference of another size");
        require(reinterpret_cast<uintptr_t>(reference.buf) % word_bytes == 0, "a buffer that is not aligned");
        request.reference = reference.buf;
    }
    request.shape.assign(fields.begin() + N_REQUEST_FIELDS, fields.end());
    if (!request.shape.empty()) {
        uint64_t n_words = 1;
        for (const uint64_t size : request.shape) {
            require(size == 0 || n_words <= UINT64_MAX / 8 / size, "a shape of another size");
            n_words *= size;
        }
        require(n_words == request.n_words, "a shape of another size");
        if (n_words == 0) request.shape.clear();
    }
    return request;
}

template <class Value>
PyObject* bytes_of(const std::vector<Value>& values) {
    // An empty vector may point nowhere.
    return PyBytes_FromStringAndSize(values.empty() ? "" : reinterpret_cast<const char*>(values.data()),
                                     Py_ssize_t(values.size() * sizeof(Value)));
}

inline PyObject* tuple_of(const PlanResult& plan) {
    // In the order in which planner.py reads them.
    const uint64_t numbers[] = {
        plan.predict, plan.entropy, plan.remainder, plan.has_reference, plan.has_sign, plan.has_column_scale,
        plan.has_block_shifts, plan.n_symbols, plan.n_contexts, uint64_t(int64_t(plan.context_base)), plan.context_shift,
        uint64_t(int64_t(plan.base)), plan.k, plan.index_bits, plan.shift, plan.coded_planes, plan.n_columns, plan.factor,
        plan.word};
    std::vector<uint16_t> plane_freqs;
    for (const std::vector<uint16_t>& freqs : plan.plane_freqs)
        plane_freqs.insert(plane_freqs.end(), freqs.begin(), freqs.end());
    const bool is_level = plan.factor_rows.empty();
    PyObject* parts[] = {
        PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers), sizeof numbers),
        bytes_of(plan.freqs),
        bytes_of(plane_freqs),
        bytes_of(plan.dictionary),
        bytes_of(plan.palette),
        is_level ? bytes_of(plan.level_rows) : bytes_of(plan.factor_rows),
        is_level ? bytes_of(plan.level_columns) : bytes_of(plan.factor_columns),
    };
    constexpr Py_ssize_t N_PARTS = sizeof parts / sizeof *parts;
    PyObject* tuple = PyTuple_New(N_PARTS);
    bool is_whole = tuple != nullptr;
    for (Py_ssize_t i = 0; i < N_PARTS; i++) {
        is_whole = is_whole && parts[i] != nullptr;
        if (tuple == nullptr) Py_XDECREF(parts[i]);
        else PyTuple_SetItem(tuple, i, parts[i]);  // takes it, null or not
    }
    if (!is_whole) {
        Py_XDECREF(tuple);
        throw PythonError();
    }
    return tuple;
}

}  // namespace plan_requests

// [(numbers and shape, words, reference or None)], threads -> a tuple for each; see planner.py.
inline PyObject* plan_frames(PyObject*, PyObject* args) {
    using namespace plan_requests;
    try {
        PyObject* list;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &n_threads)) return nullptr;
        Views views;
        std::vector<PlanRequest> requests;
        for (Py_ssize_t i = 0; i < PyList_Size(list); i++) requests.push_back(request_of(PyList_GetItem(list, i), views));
        std::vector<PlanResult> plans;
        PyThreadState* state = PyEval_SaveThread();
        try {
            plan_frames(requests, size_t(n_threads < 1 ? 1 : n_threads), plans);
        } catch (...) {
            PyEval_RestoreThread(state);
            throw;
        }
        PyEval_RestoreThread(state);
        PyObject* results = PyList_New(Py_ssize_t(plans.size()));
        if (results == nullptr) return nullptr;
        for (size_t i = 0; i < plans.size(); i++) {
            PyObject* tuple;
            try {
                tuple = tuple_of(plans[i]);
            } catch (...) {
                Py_DECREF(results);
                throw;
            }
            PyList_SetItem(results, Py_ssize_t(i), tuple);
        }
        return results;
    } catch (const PythonError&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
    return nullptr;
}

}  // namespace tricomp
