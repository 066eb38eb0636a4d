// plan_frames and what belongs to it for the Python module _core: requests in, plans out, the GIL released in between.
// Limited API of Python 3.11.
//
// module.cpp includes this and no one else does. The hard thing: shapes and sizes come from Python, so each is compared
// with its buffer before the planner sees a pointer. planner.py and planner_gathered.py pack the requests and read the
// results.
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

// What planner_gathered.py packs of a frame elsewhere.
enum FactField {
    F_N_WORDS, F_HAS_REFERENCE, F_FIRST, F_N_UNLIKE_FIRST, F_N_UNLIKE_REFERENCE, F_JOINED, F_IS_COUNTED,
    F_N_UNLIKE_COMMONEST, N_FACT_FIELDS
};

// And of each lattice that was gathered.
enum LatticeField { L_USE, L_N_COLUMNS, L_IS_MEAN, N_LATTICE_FIELDS };

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// All that planner.py packs; its shape is not compared with anything yet.
inline PlanRequest numbers_of(PyObject* given, Views& views) {
    const Py_buffer numbers = views.take(given);
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
    request.shape.assign(fields.begin() + N_REQUEST_FIELDS, fields.end());
    return request;
}

inline void check_shape(PlanRequest& request) {
    if (request.shape.empty()) return;
    uint64_t n_words = 1;
    for (const uint64_t size : request.shape) {
        require(size == 0 || n_words <= UINT64_MAX / 8 / size, "a shape of another size");
        n_words *= size;
    }
    require(n_words == request.n_words, "a shape of another size");
    if (n_words == 0) request.shape.clear();
}

inline void check_aligned(const Py_buffer& buffer, size_t n_bytes) {
    require(reinterpret_cast<uintptr_t>(buffer.buf) % n_bytes == 0, "a buffer that is not aligned");
}

inline PlanRequest request_of(PyObject* given, Views& views) {
    PlanRequest request = numbers_of(item_of(given, 0), views);
    const Py_buffer words = views.take(item_of(given, 1));
    const size_t word_bytes = request.kind.word_bits / 8;
    require(size_t(words.len) % word_bytes == 0, "part of a word");
    check_aligned(words, word_bytes);
    request.words = words.buf;
    request.n_words = uint64_t(words.len) / word_bytes;
    if (item_of(given, 2) != Py_None) {
        const Py_buffer reference = views.take(item_of(given, 2));
        require(reference.len == words.len, "a reference of another size");
        check_aligned(reference, word_bytes);
        request.reference = reference.buf;
    }
    check_shape(request);
    return request;
}

// All of a frame elsewhere but what was gathered.
inline PlanRequest facts_of(PyObject* given, Views& views) {
    PlanRequest request = numbers_of(item_of(given, 0), views);
    const Py_buffer packed = views.take(item_of(given, 1));
    uint64_t fields[N_FACT_FIELDS];
    require(packed.len == Py_ssize_t(sizeof fields), "facts of another length");
    std::memcpy(fields, packed.buf, sizeof fields);
    const uint64_t n_words = fields[F_N_WORDS];
    require(n_words <= uint64_t(1) << 48, "a frame of too many words");
    require(fields[F_N_UNLIKE_FIRST] <= n_words && fields[F_N_UNLIKE_REFERENCE] <= n_words &&
                fields[F_N_UNLIKE_COMMONEST] <= n_words,
            "more words counted than there are");
    request.n_words = n_words;
    request.has_reference = fields[F_HAS_REFERENCE] != 0;
    Facts facts{fields[F_FIRST], fields[F_N_UNLIKE_FIRST], fields[F_N_UNLIKE_REFERENCE], fields[F_JOINED], std::nullopt};
    if (fields[F_IS_COUNTED]) facts.n_unlike_commonest = fields[F_N_UNLIKE_COMMONEST];
    request.facts = facts;
    check_shape(request);
    return request;
}

// A frame elsewhere: lattices are looked at only where its facts do not decide.
inline PlanRequest gathered_of(PyObject* given, Views& views) {
    PlanRequest request = facts_of(given, views);
    if (request.is_exact()) return request;
    const Py_buffer packed = views.take(item_of(given, 2));
    PyObject *words = item_of(given, 3), *reference = item_of(given, 4);
    std::vector<uint64_t> fields(size_t(packed.len) / 8);
    const size_t n_lattices = fields.size() / N_LATTICE_FIELDS;
    require(n_lattices > 0 && packed.len == Py_ssize_t(8 * N_LATTICE_FIELDS * n_lattices), "no lattices");
    std::memcpy(fields.data(), packed.buf, size_t(packed.len));
    require(PyTuple_Check(words) && PyTuple_Size(words) == Py_ssize_t(n_lattices), "words of another number of lattices");
    require(!request.has_reference || (PyTuple_Check(reference) && PyTuple_Size(reference) == PyTuple_Size(words)),
            "a reference of another number of lattices");
    for (size_t i = 0; i < n_lattices; i++) {
        const uint64_t* field = fields.data() + i * N_LATTICE_FIELDS;
        Lattice lattice;
        require(find_lattice(request, field[L_USE], field[L_N_COLUMNS], field[L_IS_MEAN] != 0, lattice),
                "a lattice that the frame does not have");
        require((i == 0) == (lattice.use == SAMPLE || lattice.use == WHOLE), "no sample, or not in the first place");
        const auto take = [&](PyObject* parts) -> const void* {
            const Py_buffer part = views.take(item_of(parts, Py_ssize_t(i)));
            require(uint64_t(part.len) == lattice.n_bytes(request.kind.word_bits), "a lattice of another size");
            check_aligned(part, lattice.is_means ? sizeof(int16_t) : request.kind.word_bits / 8);
            return part.buf;
        };
        request.gathered.push_back(
            {lattice.use, lattice.n_columns, take(words), lattice.has_reference ? take(reference) : nullptr, lattice.is_means});
    }
    request.words = request.gathered[0].words;
    request.reference = request.gathered[0].reference;
    if (request.gathered[0].use == WHOLE) request.gathered.clear();
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

// Runs body; C++ exceptions become Python's.
template <class Body>
PyObject* answered(Body body) {
    try {
        return body();
    } catch (const PythonError&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
    return nullptr;
}

// Calls body without the GIL.
template <class Body>
void unlocked(Body body) {
    PyThreadState* state = PyEval_SaveThread();
    try {
        body();
    } catch (...) {
        PyEval_RestoreThread(state);
        throw;
    }
    PyEval_RestoreThread(state);
}

// A list of what make gives for each of n results.
template <class Make>
PyObject* list_of(size_t n, Make make) {
    PyObject* results = PyList_New(Py_ssize_t(n));
    if (results == nullptr) throw PythonError();
    try {
        for (size_t i = 0; i < n; i++) {
            PyObject* made = make(i);
            if (made == nullptr) throw PythonError();
            PyList_SetItem(results, Py_ssize_t(i), made);
        }
    } catch (...) {
        Py_DECREF(results);
        throw;
    }
    return results;
}

template <class RequestOf>
std::vector<PlanRequest> requests_of(PyObject* list, Views& views, RequestOf request_of_item) {
    std::vector<PlanRequest> requests;
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) requests.push_back(request_of_item(PyList_GetItem(list, i), views));
    return requests;
}

template <class RequestOf>
PyObject* planned(PyObject* args, RequestOf request_of_item) {
    return answered([&]() {
        PyObject* list;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &n_threads)) throw PythonError();
        Views views;
        const std::vector<PlanRequest> requests = requests_of(list, views, request_of_item);
        std::vector<PlanResult> plans;
        unlocked([&]() { plan_frames(requests, size_t(n_threads < 1 ? 1 : n_threads), plans); });
        return list_of(plans.size(), [&](size_t i) { return tuple_of(plans[i]); });
    });
}

// Its use, rows, columns, n_columns, whether the reference is read, whether means are.
inline PyObject* tuple_of(const Lattice& lattice) {
    std::vector<uint64_t> rows(lattice.n_rows), columns;
    for (uint64_t i = 0; i < lattice.n_rows; i++) rows[i] = lattice.row(i);
    for (const uint64_t start : lattice.starts)
        for (uint64_t i = 0; i < lattice.length; i++) columns.push_back(start + i);
    return Py_BuildValue("(INNKNN)", unsigned(lattice.use), bytes_of(rows), bytes_of(columns),
                         (unsigned long long)lattice.n_columns, PyBool_FromLong(lattice.has_reference),
                         PyBool_FromLong(lattice.is_means));
}

inline PyObject* list_of(const std::vector<Lattice>& lattices) {
    return list_of(lattices.size(), [&](size_t i) { return tuple_of(lattices[i]); });
}

}  // namespace plan_requests

// [(numbers and shape, words, reference or None)], threads -> a tuple for each; see planner.py.
inline PyObject* plan_frames(PyObject*, PyObject* args) {
    using namespace plan_requests;
    return planned(args, request_of);
}

// [(numbers and shape, facts, lattices, words of each, reference of each or None)], threads -> a tuple for each, as above.
inline PyObject* plan_gathered(PyObject*, PyObject* args) {
    using namespace plan_requests;
    return planned(args, gathered_of);
}

// The same, whether means are gathered, threads -> for each lattices that are wanted too, and a word to be counted or None.
inline PyObject* plan_wants(PyObject*, PyObject* args) {
    using namespace plan_requests;
    return answered([&]() {
        PyObject* list;
        int has_means;
        Py_ssize_t n_threads;
        if (!PyArg_ParseTuple(args, "O!pn", &PyList_Type, &list, &has_means, &n_threads)) throw PythonError();
        Views views;
        const std::vector<PlanRequest> requests = requests_of(list, views, gathered_of);
        std::vector<Wants> wants;
        unlocked([&]() { wants_of(requests, has_means != 0, size_t(n_threads < 1 ? 1 : n_threads), wants); });
        return list_of(wants.size(), [&](size_t i) -> PyObject* {
            PyObject* more = list_of(wants[i].lattices);
            if (!wants[i].commonest) return Py_BuildValue("(NO)", more, Py_None);
            return Py_BuildValue("(NK)", more, (unsigned long long)*wants[i].commonest);
        });
    });
}

// (numbers and shape, facts) -> the lattices of every such frame.
inline PyObject* lattices(PyObject*, PyObject* given) {
    using namespace plan_requests;
    return answered([&]() {
        Views views;
        return list_of(lattices_of(facts_of(given, views)));
    });
}

}  // namespace tricomp
