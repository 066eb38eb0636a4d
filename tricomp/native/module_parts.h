// What the sources of the Python module _core share: buffers, errors, the GIL, plans. Limited API of Python 3.11.
//
// Included by module.cpp alone, and by what it includes. The hard thing: a Python error that is set already travels
// through C++ as std::domain_error.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "frame.h"

namespace tricomp {
namespace {

// Buffers held while the GIL is released.
class Buffers {
  public:
    ~Buffers() {
        for (Py_buffer& view : views_) PyBuffer_Release(&view);
    }

    // The bytes of a contiguous buffer; None: none. Throws with a Python error set.
    Bytes take(PyObject* object, bool is_writable = false) {
        if (object == Py_None) return Bytes();
        Py_buffer view;
        if (PyObject_GetBuffer(object, &view, is_writable ? PyBUF_CONTIG : PyBUF_CONTIG_RO)) throw std::domain_error("");
        views_.push_back(view);
        return {static_cast<const uint8_t*>(view.buf), size_t(view.len)};
    }

  private:
    std::vector<Py_buffer> views_;
};

class Unlocked {
  public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() { PyEval_RestoreThread(state_); }

  private:
    PyThreadState* state_;
};

// Run body; C++ exceptions become Python's. domain_error: one is set already.
template <class Body>
PyObject* guarded(Body body) {
    try {
        return body();
    } catch (const std::domain_error&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
    return nullptr;
}

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

inline PyObject* item(PyObject* tuple, Py_ssize_t i) {
    PyObject* found = PyTuple_GetItem(tuple, i);
    if (found == nullptr) throw std::domain_error("");
    return found;
}

inline uint64_t number(PyObject* object) {
    const uint64_t value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred()) throw std::domain_error("");
    return value;
}

inline PlanNumbers plan_of(const Bytes& packed) {
    PlanNumbers plan;
    require(packed.n_bytes == sizeof plan.fields, "a plan of another length");
    std::memcpy(plan.fields, packed.data, sizeof plan.fields);
    Model model;
    require(model_of(plan, model), "a plan that contradicts itself");
    return plan;
}

}  // namespace
}  // namespace tricomp
