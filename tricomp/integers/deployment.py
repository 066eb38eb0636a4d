"""quantize_file: the weights of a tensor file become integers in a `.tri` file; no model code, no framework.

The hard thing: memory. Tensors are read where they are mapped, a slice of rows at a time, and what comes of a large
model waits in a temporary file until all of it is coded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp import archive_names, checkpoint, dtypes, folder, tree
from tricomp.archive_output import Output, keep_private, unchanged
from tricomp.codec import Engine
from tricomp.content import content_of
from tricomp.errors import InvalidArgument
from tricomp.integers.form import CODES, KEY, SCALES, Form, note_of
from tricomp.integers.quantized import Quantized, check_options, dequantize, quantize
from tricomp.integers.weights import Weights, picked
from tricomp.notes import with_notes
from tricomp.plan import Spec
from tricomp.progress import OnProgress, counter
from tricomp.report import Report
from tricomp.spool import MEMORY_BYTES, Scratch
from tricomp.tensors import Path

Array = np.ndarray[Any, Any]

_SUFFIXES = (".safetensors", ".npz", ".npy", ".pt", ".bin", ".msgpack")
_SLICE_BYTES = 16 << 20  # of a tensor, quantised at a time
_MEASURED = 1 << 15  # elements whose errors are looked at at a time: they fit a cache


@dataclass(frozen=True)
class TensorFacts:
    """What became of one tensor. form: None: it stays as it is.

    error_rms: of its error, as a share of the root mean square of its values. error_max: the largest error, as a share
    of the largest magnitude. raw_bytes: as it was; coded_bytes: in the file, with scales.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: Form | None
    error_rms: float
    error_max: float
    raw_bytes: int
    coded_bytes: int


@dataclass(frozen=True)
class Deployed:
    """What quantize_file did. files: read, an index of shards first."""

    report: Report
    files: tuple[str, ...]
    input_bytes: int
    tensors: tuple[TensorFacts, ...]


def quantize_file(
    path: Path,
    out: Path | None = None,
    bits: int = 8,
    *,
    group: int | None = None,
    scale_dtype: str = "float32",
    clip: bool = True,
    select: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    spec: Spec | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    reserved: Container[str] = (),
) -> Deployed:
    """Write a `.tri` file with the weights of a tensor file as integers, everything else as it is; path stays.

    path: a file of any format that is a flat dict of tensors, an index of shards, a folder that holds one model, or a
    `.tri` file. out: default: path with ".int8.tri" in the place of its suffix. bits, group, scale_dtype, clip: see
    quantize. select: names or fnmatch patterns of tensors to quantise, of two or more dimensions; None: see is_weight.
    skip: of tensors to leave in floats. on_progress gets (bytes done, of so many). reserved: real paths never written.
    Raises InvalidArgument (elements that are not finite, naming tensor and row; out is there), MissingLeaf (a pattern
    that matches nothing), UnsupportedFormat, MissingFile, StorageError.
    """
    engine = Engine(threads)
    options = {"bits": bits, "group": group, "scale_dtype": scale_dtype, "clip": clip, "threads": engine.threads}
    with ExitStack() as stack:
        source = Weights(archive_names.model_file(archive_names.path_of(path, "quantize")), stack, engine)
        check_options(bits, group, "float32", scale_dtype, "quantize")
        chosen = picked(source, None if select is None else list(select), list(skip))
        target = _target(source.path, bits) if out is None else archive_names.path_of(out, "out")
        archive_names.check_output(target, source.files, overwrite, reserved)
        is_unchanged = unchanged(source.files)
        shelf = stack.enter_context(_Shelf(sum(source.n_bytes(name) for name in chosen)))
        count = counter(on_progress, sum(source.n_bytes(name) for name in source.names))
        errors: dict[str, tuple[float, float]] = {}
        forms: dict[str, Form] = {}
        for name in source.names:
            if name in chosen:
                errors[name] = _quantized(name, source.array(name), options, shelf)
                forms[tree.join(None, name)] = Form(bits, group, source.about(name)[0])
            elif not source.is_mapped:
                shelf.add(name, [source.array(name)], None)
            if count is not None:
                count(source.n_bytes(name))
        arrays = shelf.arrays()
        content = content_of({name: arrays[name] if name in arrays else source.array(name) for name in source.names})
        where, place = folder.split(target)
        metadata = with_notes(source.metadata, note_of(forms), KEY)
        output = Output(where.url, where.put, is_unchanged)
        report = replace(checkpoint.put(output, place, content, None, spec, metadata, 0, engine), path=target)
        keep_private(target, source.path)
        coded = _coded_bytes(report)
        facts = tuple(
            TensorFacts(
                name,
                *source.about(name),
                forms.get(tree.join(None, name)),
                *errors.get(name, (0.0, 0.0)),
                source.n_bytes(name),
                coded[tree.join(None, name)],
            )
            for name in source.names
        )
        return Deployed(report, source.files, source.input_bytes, facts)


class _Shelf:
    """Arrays that wait until all are there: in memory, or, if they are many bytes, in one temporary file."""

    def __init__(self, n_bytes: int) -> None:
        self._scratch = Scratch("quantize", "the integers of a large model") if n_bytes > MEMORY_BYTES else None
        self._held: dict[str, Any] = {}

    def __enter__(self) -> _Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def add(self, name: str, parts: Iterable[Array], scales: list[Array] | None) -> None:
        """Take an array in parts along its first axis, and the list of scales that is full when parts end, if any."""
        held: list[Any] = []
        shape: tuple[int, ...] = ()
        dtype, n_rows = np.dtype(np.int8), 0
        for part in parts:
            shape, dtype, n_rows = part.shape, part.dtype, n_rows + (part.shape[0] if part.shape else 0)
            if self._scratch is None:
                held.append(part)
            else:
                octets = dtypes.to_words(part, name).view(np.uint8)
                held.append((self._scratch.append(octets.data), octets.nbytes))
        whole = (n_rows, *shape[1:]) if shape else shape
        self._held[name] = held, dtype, whole, scales

    def arrays(self) -> dict[str, Any]:
        """All of them, by name: arrays, or dicts of codes and scales."""
        found: dict[str, Any] = {}
        for name, (held, dtype, shape, scales) in self._held.items():
            if self._scratch is None:
                array = held[0] if len(held) == 1 else np.concatenate(held)
            else:
                view = self._scratch.read(held[0][0], sum(n for _, n in held))
                array = np.frombuffer(view, dtype).reshape(shape)
            found[name] = array if scales is None else {CODES: array, SCALES: np.concatenate(scales)}
        return found


def _quantized(name: str, array: Array, options: Mapping[str, Any], shelf: _Shelf) -> tuple[float, float]:
    """Quantise an array, slice by slice, onto the shelf. Returns its errors, see TensorFacts."""
    scales: list[Array] = []
    sums = [0.0, 0.0, 0.0, 0.0]  # of squares of errors, of values; the largest error, the largest value

    def parts() -> Iterator[Array]:
        n_rows = max(_SLICE_BYTES // max(array[:1].nbytes, 1), 1)
        for first in range(0, array.shape[0], n_rows) or [0]:
            rows = array[first : first + n_rows]
            try:
                found = quantize(rows, leaf=name, **options)
            except InvalidArgument:
                quantize(array, leaf=name, **options)  # tells of the whole tensor
                raise
            _measure(rows, found, sums)
            scales.append(found.scales)
            yield found.codes

    shelf.add(name, parts(), scales)
    rms = math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
    return rms, sums[2] / sums[3] if sums[3] else 0.0


def _measure(rows: Array, found: Quantized, sums: list[float]) -> None:
    """Add the errors of some rows."""
    again, values = dequantize(found).reshape(-1), rows.reshape(-1)
    for first in range(0, len(values), _MEASURED):
        some = slice(first, first + _MEASURED)
        value = values[some].astype(np.float64)
        error = np.abs(again[some] - value)
        sums[2] = max(sums[2], float(error.max()))
        sums[3] = max(sums[3], float(value.max()), -float(value.min()))
        # Squared and summed: a product of vectors would wake threads, which costs more.
        sums[0] += float(np.square(error, out=error).sum())
        sums[1] += float(np.square(value, out=value).sum())


def _coded_bytes(report: Report) -> dict[str, int]:
    """Bytes in the file by the path of the tensor."""
    found: dict[str, int] = {}
    for leaf in report.leaves:
        node, _, last = leaf.path.rpartition("/")
        path = node if node and last in (CODES, SCALES) else leaf.path
        found[path] = found.get(path, 0) + leaf.coded_bytes
    return found


def _target(path: str, bits: int) -> str:
    """The name of the output: model.safetensors gives model.int8.tri."""
    stem = path.removesuffix(archive_names.SUFFIX).removesuffix(archive_names.INDEX_SUFFIX)
    bare, suffix = os.path.splitext(stem)
    return f"{bare if suffix in _SUFFIXES else stem}.int{bits}{archive_names.SUFFIX}"
