// The Python module _core: arguments in, results out, the GIL released in between. Limited API of Python 3.11.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>

#include "kernels.h"

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(tricomp::kernels().name); }

PyMethodDef METHODS[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {nullptr, nullptr, 0, nullptr},
};

int execute(PyObject*) {
    if (tricomp::chosen_kernels() != nullptr) return 0;
    PyErr_Format(PyExc_ImportError, "TRICOMP_ISA=%s: this processor or build does not have it. Choose avx512, avx2 or portable, or unset it.",
                 std::getenv("TRICOMP_ISA"));
    return -1;
}

PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_core", nullptr, 0, METHODS, SLOTS, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__core() { return PyModuleDef_Init(&MODULE); }
