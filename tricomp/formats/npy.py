"""The npy format: one numpy array in a file, or in a member of an npz. Imports no framework.

An array of a dtype that tricomp has is itself; text, dates, records and the like are flat bytes, and the header, kept
in the origin, says what they are. The hard thing: a header is a Python literal out of a hostile file. Arrays of objects
are pickles and are refused.
"""

from __future__ import annotations

import ast
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tricomp import dtypes
from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats.export import named_leaves
from tricomp.formats.origin import Span, TensorFile
from tricomp.formats.span import Leaves, decoded, spans_of
from tricomp.layout import Leaf, is_shape
from tricomp.storage import Source

Array = np.ndarray[Any, Any]
MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # numpy's own limit: a literal is parsed
_MAX_WHOLE_BYTES = 12 + _MAX_HEADER_BYTES
_KEYS = {"descr", "fortran_order", "shape"}
# How numpy names dtypes of ml_dtypes; raw bytes would be "|V2". (The other float8 are all "<V1": bytes.)
_ML_DTYPES = {"<V2": np.dtype(ml_dtypes.bfloat16), "<f1": np.dtype(ml_dtypes.float8_e5m2)}
_LONG = re.compile(r"(?<=[0-9])L\b")  # Python 2 wrote sizes as 3L


@dataclass(frozen=True)
class Placed:
    """An array in a file: its view there, where its bytes begin, and how they stand (see Span)."""

    array: Array
    offset: int
    n_bytes: int
    axes: tuple[int, ...] | None
    is_swapped: bool

    def span(self, path: str) -> Span:
        return Span(path, self.offset, self.n_bytes, self.axes, self.is_swapped)


class Npy:
    """The format "npy", see tricomp.formats.base.Format."""

    name = "npy"
    suffixes = (".npy",)

    def matches(self, head: bytes, path: str) -> bool:
        """Its magic."""
        return head.startswith(MAGIC)

    def read(self, path: str) -> TensorFile:
        """The array itself is the tree."""
        source = LocalFile(path)
        try:
            placed = array_at(source, 0, source.n_bytes, source.name)
        except BaseException:
            source.close()
            raise
        spans = (placed.span(""),)
        return TensorFile(os.path.basename(path), "npy", placed.array, source.n_bytes, spans, source)

    def pieces(self, file: File) -> Iterator[Bytes]:
        """The one array of a tree; bfloat16 and float8 as numpy itself writes them (np.load gives raw V2 or V1)."""
        leaves = named_leaves(file, "npy")
        if len(leaves) != 1:
            raise InvalidArgument(f"{file.name}: npy holds one array, this tree has {len(leaves)}. Export to npz.")
        return _written(leaves[0][1], file)


def _written(leaf: Leaf, file: File) -> Iterator[Bytes]:
    yield head_of(leaf)
    for _, found in decoded(spans_of([leaf]), Leaves([leaf]), file):
        yield from found


def head_of(leaf: Leaf) -> bytes:
    """The magic and header for a leaf, in C order."""
    head = io.BytesIO()
    dtype = leaf.dtype.numpy
    descr = dtype.str if dtype.isbuiltin == 1 else f"<V{dtype.itemsize}"  # such as bfloat16: what np.load can read
    described = {"descr": descr, "fortran_order": False, "shape": leaf.shape}
    np.lib.format.write_array_header_1_0(head, described)
    return head.getvalue()


def array_at(source: Source, start: int, n_bytes: int, what: str) -> Placed:
    """The array in the npy file at start of a source, n_bytes long or shorter. Raises InvalidArgument, naming what."""
    dtype, is_fortran, shape, offset = _header(bytes(source.read(start, min(n_bytes, _MAX_WHOLE_BYTES))), what)
    if dtype.hasobject:
        raise InvalidArgument(
            f"{what}: it is an array of Python objects, that is a pickle, which could run code and is never loaded. "
            f"Save its parts as arrays of numbers."
        )
    expected = math.prod(shape) * dtype.itemsize
    if expected > n_bytes - offset:
        raise InvalidArgument(
            f"{what}: expected {expected} bytes of {dtype}{list(shape)}, got {n_bytes - offset}: it is cut. "
            f"Copy it again."
        )
    data = source.read(start + offset, expected)
    flat = np.frombuffer(data, np.uint8) if expected else np.zeros(0, np.uint8)
    if not _is_known(dtype) or (dtype == np.bool_ and flat.max(initial=0) > 1):
        return Placed(flat, start + offset, expected, None, False)
    if not is_shape(shape):
        raise InvalidArgument(f"{what}: expected a shape that numpy takes, got {list(shape)}. Save it again.")
    array = flat.view(dtype).reshape(shape, order="F" if is_fortran else "C")
    axes = tuple(reversed(range(len(shape)))) if is_fortran and not array.flags.c_contiguous else None
    return Placed(array, start + offset, expected, axes, dtype.byteorder == ">")


def _is_known(dtype: np.dtype[Any]) -> bool:
    return dtype.subdtype is None and dtype.names is None and dtype.name in dtypes.NAMES


def _header(head: bytes, what: str) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """dtype, order, shape, and bytes before the data, of a header that is all in head."""
    version = tuple(head[6:8])
    if not head.startswith(MAGIC) or version not in ((1, 0), (2, 0), (3, 0)):
        raise InvalidArgument(f"{what}: expected an npy header of version 1 to 3, got {head[:8]!r}. Save it again.")
    begin = 10 if version == (1, 0) else 12
    end = begin + int.from_bytes(head[8:begin], "little")
    if end > len(head) or end - begin > _MAX_HEADER_BYTES:
        raise InvalidArgument(
            f"{what}: expected an npy header of at most {min(len(head) - begin, _MAX_HEADER_BYTES)} bytes, "
            f"got {end - begin}. Copy it again."
        )
    try:
        text = head[begin:end].decode("utf-8" if version == (3, 0) else "latin1")
        described = _literal(text)
        if not isinstance(described, dict) or described.keys() != _KEYS:
            raise ValueError(f"expected a dict of {', '.join(sorted(_KEYS))}")
        shape, is_fortran = described["shape"], described["fortran_order"]
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape is {shape!r}"[:100])
        if not isinstance(is_fortran, bool):
            raise ValueError(f"the order is {is_fortran!r}"[:100])
        descr = described["descr"]
        dtype = _ML_DTYPES[descr] if str(descr) in _ML_DTYPES else np.lib.format.descr_to_dtype(descr)
    except (ValueError, TypeError, SyntaxError, AttributeError, LookupError, MemoryError, RecursionError) as error:
        raise InvalidArgument(f"{what}: its npy header is damaged: {error}. Copy it again.") from None
    return dtype, is_fortran, shape, end


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except SyntaxError:
        return ast.literal_eval(_LONG.sub("", text))
