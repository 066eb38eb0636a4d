// Side sections for the Python module _core, of frames that are coded elsewhere. Limited API of Python 3.11.
//
// module.cpp includes this and no one else does. side.py packs what is given and reads what comes back. The hard thing:
// a section may be hostile, see side.h; and whoever reads one has seen before that the frame holds its directory.
#pragma once

#include "module_parts.h"
#include "side.h"

namespace tricomp {
namespace {

// A plan and what belongs to it, as side.py packs them.
inline void take_side(PyObject* given, Buffers& buffers, EncodeRequest& request) {
    request.plan = plan_of(buffers.take(item(given, 0)));
    request.freqs = buffers.take(item(given, 1));
    request.plane_freqs = buffers.take(item(given, 2));
    request.dictionary = buffers.take(item(given, 3));
    request.palette = buffers.take(item(given, 4));
    request.scale_rows = buffers.take(item(given, 5));
    request.scale_columns = buffers.take(item(given, 6));
}

// n values of a vector that may be empty, as bytes.
template <class Value>
PyObject* bytes_of(const std::vector<Value>& values, size_t first, size_t n) {
    const char* data = n ? reinterpret_cast<const char*>(values.data() + first) : "";
    return PyBytes_FromStringAndSize(data, Py_ssize_t(n * sizeof(Value)));
}

PyObject* side_bytes(PyObject*, PyObject* given) {
    return guarded([&]() -> PyObject* {
        Buffers buffers;
        EncodeRequest request;
        take_side(given, buffers, request);
        std::vector<uint8_t> section;
        {
            Unlocked unlocked;
            Model model;
            SideData side;
            model_of(request.plan, model);
            set_side(model, request, side);
            write_side(model, section);
        }
        return bytes_of(section, 0, section.size());
    });
}

// A plan, a section -> frequencies of symbols, of planes, dictionary, palette, scales of rows, of columns; or a SideFault.
PyObject* side_parts(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *numbers, *given;
        if (!PyArg_ParseTuple(args, "OO", &numbers, &given)) throw std::domain_error("");
        Buffers buffers;
        const PlanNumbers plan = plan_of(buffers.take(numbers));
        const Bytes section = buffers.take(given);
        Model model;
        SideData side;
        SideFault fault;
        {
            Unlocked unlocked;
            model_of(plan, model);
            fault = read_side(model, section.data, section.n_bytes, side);
        }
        if (fault != SIDE_SOUND) return PyLong_FromUnsignedLong(fault);
        const size_t n_freqs = model.entropy == RANS ? size_t(model.n_contexts) * model.n_symbols : 0;
        const size_t n_palette = model.palette ? model.n_symbols * model.kind.word_bits / 8 : 0;
        const size_t n_rows = model.n_columns ? size_t((model.n_words + model.n_columns - 1) / model.n_columns) : 0;
        const char* palette = n_palette ? reinterpret_cast<const char*>(side.palette.data()) : "";
        return Py_BuildValue("(NNNy#NN)", bytes_of(side.freqs, 0, n_freqs),
                             bytes_of(side.freqs, n_freqs, side.freqs.size() - n_freqs),
                             bytes_of(side.dictionary, 0, model.n_dictionary), palette, Py_ssize_t(n_palette),
                             bytes_of(side.rows, 0, n_rows),
                             bytes_of(side.columns, 0, model.has_column_scale ? size_t(model.n_columns) : 0));
    });
}

}  // namespace
}  // namespace tricomp
