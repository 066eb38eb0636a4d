"""Msgpack files as flax.serialization writes them, read without Flax and without loading them. Imports no framework.

Arrays are extension 1 around (shape, dtype name, bytes), numpy scalars extension 3 around the same, complex numbers
extension 2; an array above 1 GiB is a dict of chunks, and is joined here as Flax does it. The hard thing: msgpack has
no table, so the file is walked, from one declared length to the next, and none is believed before it is checked.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from tricomp import bounds, dtypes
from tricomp import tree as trees
from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats import flax_writer
from tricomp.formats.origin import Span, TensorFile
from tricomp.layout import is_shape
from tricomp.spool import Scratch

Array = np.ndarray[Any, Any]
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # extension codes
CHUNKED = "__msgpack_chunked_array__"
_ADVICE = "Save it again with flax.serialization."


@dataclass(frozen=True)
class _Found:
    """An array in the file: dtype as it is named there, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass
class _Placed:
    """Where arrays of the finished tree stand, by identity: (start in the array, offset, n_bytes) of each part."""

    parts: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    kept: list[Array] = field(default_factory=list)  # or an identity could be given anew

    def add(self, array: Array, parts: list[tuple[int, int, int]]) -> Array:
        self.parts[id(array)] = parts
        self.kept.append(array)
        return array


class Flax:
    """The format "flax", see tricomp.formats.base.Format."""

    name = "flax"
    suffixes = (".msgpack",)

    def matches(self, head: bytes, path: str) -> bool:
        """A msgpack map whose first key is text. There is no magic."""
        if len(head) < 3 or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
            return False
        at = {0xDE: 3, 0xDF: 5}.get(head[0], 1)
        if not any(head[1:at]) and at > 1:  # an empty map
            return False
        code = head[at] if at < len(head) else 0
        width = {0xD9: 1, 0xDA: 2}.get(code, 0)
        n_bytes = int.from_bytes(head[at + 1 : at + 1 + width], "big") if width else code & 31
        try:
            key = head[at + 1 + width : at + 1 + width + n_bytes].decode()
        except UnicodeDecodeError:
            return False
        return bool(width or 0xA0 <= code <= 0xBF) and key.isprintable()

    def read(self, path: str) -> TensorFile:
        """The tree that flax.serialization.msgpack_restore gives; scalars and complex numbers are 0-d arrays."""
        source = LocalFile(path)
        try:
            walk = _Walk(source)
            node = walk.whole()
            placed = _Placed()
            tree = _tree(node, source, placed)
            _, paths, leaves = trees.flatten(tree)
        except BaseException:
            source.close()
            raise
        spans = tuple(
            Span(path, offset, n_bytes, start=start)
            for path, leaf in zip(paths, leaves, strict=True)
            for start, offset, n_bytes in placed.parts.get(id(leaf), ())
        )
        return TensorFile(os.path.basename(path), "flax", tree, source.n_bytes, spans, source)

    def pieces(self, file: File) -> Iterator[Bytes]:
        """As flax.serialization.msgpack_serialize writes it; trees of dicts, lists and plain values only."""
        return flax_writer.pieces(file)


def _tree(node: Any, source: LocalFile, placed: _Placed, is_in_list: bool = False) -> Any:
    """Found arrays as views, chunks joined: where Flax joins them, that is not inside lists."""
    if isinstance(node, _Found):
        return placed.add(_view(node, source), [(0, node.offset, node.n_bytes)])
    if isinstance(node, list):
        return [_tree(each, source, placed, True) for each in node]
    if not isinstance(node, dict):
        return node
    if CHUNKED in node and not is_in_list:
        return _joined(node, source, placed)
    return {key: _tree(each, source, placed, is_in_list) for key, each in node.items()}


def _view(found: _Found, source: LocalFile) -> Array:
    data = source.read(found.offset, found.n_bytes)
    return _shaped(np.frombuffer(data, np.uint8) if found.n_bytes else np.zeros(0, np.uint8), found, source)


def _shaped(flat: Array, found: _Found, source: LocalFile) -> Array:
    """Bytes as the array they are; of dtypes that tricomp does not have, as bytes."""
    is_bytes = found.dtype == "bool" and flat.max(initial=0) > 1
    if found.dtype in dtypes.NAMES:
        dtype = dtypes.by_name(found.dtype).numpy
    elif math.prod(found.shape) == len(flat):  # such as int4, an element a byte
        dtype, is_bytes = np.dtype(np.uint8), False
    else:
        return flat
    if math.prod(found.shape) * dtype.itemsize != len(flat):
        _refuse(
            source,
            f"array at {found.offset}: expected {math.prod(found.shape) * dtype.itemsize} bytes of "
            f"{found.dtype}{list(found.shape)}, got {len(flat)}",
        )
    if not is_shape(found.shape):
        _refuse(source, f"array at {found.offset}: expected a shape that numpy takes, got {list(found.shape)}")
    return (flat if is_bytes else flat.view(dtype)).reshape(found.shape)


def _joined(node: dict[Any, Any], source: LocalFile, placed: _Placed) -> Array:
    """A chunked array. Its chunks do not stand in a row, so they are copied to a scratch file, not to memory."""
    shape, chunks = _row(node.get("shape")), _row(node.get("chunks"))
    is_fit = chunks and all(isinstance(chunk, _Found) and chunk.dtype == chunks[0].dtype for chunk in chunks)
    if shape is None or not chunks or not is_fit or not all(type(size) is int and size >= 0 for size in shape):
        _refuse(source, "an array in chunks: expected its shape and chunks of one dtype, got something else")
    parts: list[tuple[int, int, int]] = []
    scratch = Scratch(source.name, f"the chunks of {source.name}")
    for chunk in chunks:
        parts.append((scratch.n_bytes, chunk.offset, chunk.n_bytes))
        for start in range(0, chunk.n_bytes, 1 << 24):
            scratch.append(source.read(chunk.offset + start, min(1 << 24, chunk.n_bytes - start)))
    whole = _Found(chunks[0].dtype, tuple(shape), chunks[0].offset, scratch.n_bytes)
    data = scratch.read(0, scratch.n_bytes)
    array = _shaped(np.frombuffer(data, np.uint8) if scratch.n_bytes else np.zeros(0, np.uint8), whole, source)
    scratch.close()
    return placed.add(array, parts)


def _row(node: Any) -> list[Any] | None:
    """The values of {"0": ..., "1": ...}, as Flax writes a tuple; None if it is none."""
    if not isinstance(node, dict) or any(str(i) not in node for i in range(len(node))):
        return None
    return [node[str(i)] for i in range(len(node))]


def _refuse(source: LocalFile, what: str, advice: str = _ADVICE) -> NoReturn:
    raise InvalidArgument(f"{source.name}: {what}. {advice}")


_FIXED = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
          0xD3: ">q"}  # fmt: skip
_NUMBERS = {code: struct.Struct(form) for code, form in _FIXED.items()}
_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4,
                 0xC7: 1, 0xC8: 2, 0xC9: 4}  # fmt: skip
_WORDS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Walk:
    """One pass over a msgpack file; arrays come out as _Found, all else as what it is."""

    def __init__(self, source: LocalFile) -> None:
        self._source = source
        self._data = source.read(0, source.n_bytes)
        self._at = 0
        self._stop = source.n_bytes
        self._n_nodes = 0

    def whole(self) -> Any:
        """The one object that the file holds. Raises InvalidArgument, LimitExceeded."""
        node = self._node(0)
        if self._at != self._stop:
            self._fail(f"{self._stop - self._at} bytes follow the msgpack object")
        return node

    def _fail(self, what: str) -> NoReturn:
        _refuse(self._source, f"expected a msgpack file as Flax writes it, at {self._at} {what}")

    def _take(self, n_bytes: int) -> memoryview:
        if n_bytes > self._stop - self._at:
            self._fail(f"{n_bytes} bytes are declared and {self._stop - self._at} are left: it is cut")
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def _node(self, depth: int) -> Any:
        bounds.DEFAULTS.check("max_depth", depth, f"{self._source.name}: depth")
        self._n_nodes += 1
        bounds.DEFAULTS.check("max_leaves", self._n_nodes, f"{self._source.name}: nodes")
        kind, n = self._kind()
        if kind == "number":
            return n
        if kind in ("str", "bin"):  # a value that will be part of a file's header
            bounds.DEFAULTS.check("max_table_bytes", self._count(n), f"{self._source.name}: bytes of a {kind}")
            return self._text(n) if kind == "str" else bytes(self._take(n))
        if kind == "array":
            return [self._node(depth + 1) for _ in range(self._count(n))]
        if kind == "map":
            return self._map(self._count(2 * n) // 2, depth)
        return self._extension(n)

    def _kind(self) -> tuple[str, Any]:
        """What comes next, and its length or value."""
        code = self._take(1)[0]
        if code < 0x80:
            return "number", code
        if code >= 0xE0:
            return "number", code - 256
        if code < 0x90:
            return "map", code & 15
        if code < 0xA0:
            return "array", code & 15
        if code < 0xC0:
            return "str", code & 31
        if code in _WORDS:
            return "number", _WORDS[code]
        if code in _NUMBERS:
            number = _NUMBERS[code]
            return "number", number.unpack(self._take(number.size))[0]
        if 0xD4 <= code <= 0xD8:
            return "ext", 1 << (code - 0xD4)
        if code not in _LENGTH_BYTES:
            self._fail(f"the byte {code:#x} begins nothing")
        kind = "ext" if code <= 0xC9 and code >= 0xC7 else "bin" if code < 0xC7 else "str" if code < 0xDC else "array"
        return "map" if code >= 0xDE else kind, int.from_bytes(self._take(_LENGTH_BYTES[code]), "big")

    def _count(self, n: int) -> int:
        if n > self._stop - self._at:  # each takes a byte at least
            self._fail(f"{n} items are declared and {self._stop - self._at} bytes are left: it is cut")
        return n

    def _text(self, n_bytes: int) -> str:
        try:
            return str(self._take(n_bytes), "utf-8")
        except UnicodeDecodeError:
            self._fail("a text is not UTF-8")

    def _map(self, n: int, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for _ in range(n):
            key = self._node(depth + 1)
            if type(key) is not str and type(key) is not int:
                self._fail(f"a key is a {type(key).__name__}: only texts and whole numbers can be keys")
            found[key] = self._node(depth + 1)
        return found

    def _extension(self, n_bytes: int) -> Any:
        code = self._take(1)[0]
        if code not in (_ARRAY, _COMPLEX, _SCALAR):
            self._fail(f"extension {code if code < 128 else code - 256} is unknown to Flax")
        self._count(n_bytes)
        outer, self._stop = self._stop, self._at + n_bytes
        found = self._complex() if code == _COMPLEX else self._array()
        if self._at != self._stop:
            self._fail(f"{self._stop - self._at} bytes follow what extension {code} holds")
        self._stop = outer
        return found

    def _complex(self) -> Array:
        if self._stop - self._at > 19:
            self._fail("a complex number is not two numbers")
        try:
            real, imag = bounds.unpack(bytes(self._take(self._stop - self._at)), "complex")
            return np.asarray(complex(real, imag))
        except (CorruptFile, TypeError, ValueError, OverflowError):
            self._fail("a complex number is damaged")

    def _array(self) -> _Found:
        kind, n = self._kind()
        if (kind, n) != ("array", 3):
            self._fail("an array is not (shape, dtype, bytes)")
        kind, n_dimensions = self._kind()
        if kind != "array":
            self._fail("an array has no shape")
        bounds.DEFAULTS.check("max_dimensions", n_dimensions, f"{self._source.name}: dimensions")
        shape = [self._kind() for _ in range(n_dimensions)]
        if not all(kind == "number" and type(size) is int and size >= 0 for kind, size in shape):
            self._fail("an array has a shape that is none")
        kind, n = self._kind()
        if kind not in ("str", "bin"):
            self._fail("an array has no dtype")
        dtype = bytes(self._take(n)).decode("latin1")
        kind, n = self._kind()
        if kind not in ("str", "bin"):
            self._fail("an array has no bytes")
        found = _Found(dtype, tuple(size for _, size in shape), self._at, n)
        self._take(n)
        return found
