"""Trees to msgpack as flax.serialization writes them, streaming. Imports no framework.

The hard thing: the length of an array's extension stands before its bytes, so an array is written whole or not at all;
one above 1 GiB is written in chunks, as Flax does, because other readers of msgpack stop at 4 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from tricomp import bounds
from tricomp.bounds import LEAF, Bytes
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.formats.span import Leaves, Span, decoded, element_bytes
from tricomp.layout import Leaf

MAX_CHUNK_BYTES = 1 << 30
_ARRAY = 1


def pieces(file: File) -> Iterator[Bytes]:
    """The bytes of a Flax file with the tree of an open `.tri` file. Raises InvalidArgument, naming the node."""
    structure = bounds.unpack(file.structure, f"{file.name}: tree")
    _check(structure, "the tree itself")
    leaves = iter([file.leaf(path) for path in file])
    parts = list(_parts(structure, leaves))
    return _written(parts, file)


def _written(parts: list[bytes | tuple[Leaf, Span]], file: File) -> Iterator[Bytes]:
    placed = [part for part in parts if not isinstance(part, bytes)]
    contents = decoded([span for _, span in placed], Leaves(leaf for leaf, _ in placed), file)
    for part in parts:
        if isinstance(part, bytes):
            yield part
        else:
            yield from next(contents)[1]


def _check(node: Any, path: str) -> None:
    """Raise InvalidArgument for what Flax has no form for: tuples, named tuples, registered types, large numbers."""
    is_extension = isinstance(node, msgpack.ExtType) and node.code != LEAF
    is_marked = isinstance(node, list) and bool(node) and isinstance(node[0], msgpack.ExtType) and node[0].code != LEAF
    if is_extension or is_marked:
        raise InvalidArgument(
            f"{path}: flax files hold dicts, lists, arrays and plain values, and this is something else. "
            f"Convert it with flax.serialization.to_state_dict, or export to another format."
        )
    if isinstance(node, dict):
        for key, value in node.items():
            _check(value, f"node {key!r} in {path}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check(value, f"node {i} in {path}")


def _parts(node: Any, leaves: Iterator[Leaf]) -> Iterator[bytes | tuple[Leaf, Span]]:
    """The file as bytes and, between them, spans of leaves."""
    if isinstance(node, msgpack.ExtType):
        leaf = next(leaves)
        if leaf.n_bytes <= MAX_CHUNK_BYTES:
            yield from _array(leaf, leaf.shape, 0, leaf.n_bytes)
        else:
            yield from _chunked(leaf)
    elif isinstance(node, dict):
        yield _packed("pack_map_header", len(node))
        for key, value in node.items():
            yield msgpack.packb(key)
            yield from _parts(value, leaves)
    elif isinstance(node, list):
        yield _packed("pack_array_header", len(node))
        for value in node:
            yield from _parts(value, leaves)
    else:
        yield msgpack.packb(node)


def _packed(name: str, count: int) -> bytes:
    packed: bytes = getattr(msgpack.Packer(), name)(count)
    return packed


def _array(leaf: Leaf, shape: tuple[int, ...], start: int, n_bytes: int) -> Iterator[bytes | tuple[Leaf, Span]]:
    """Extension 1 around shape, dtype and some bytes of a leaf."""
    size = bytes((0xC4, n_bytes)) if n_bytes < 256 else b""
    size = size or (b"\xc5" + n_bytes.to_bytes(2, "big") if n_bytes < 1 << 16 else b"\xc6" + n_bytes.to_bytes(4, "big"))
    head = b"\x93" + msgpack.packb(shape) + msgpack.packb(leaf.dtype.name) + size
    n_all = len(head) + n_bytes
    if n_all in (1, 2, 4, 8, 16):
        outer = bytes((0xD4 + n_all.bit_length() - 1, _ARRAY))
    else:
        width = 1 if n_all < 256 else 2 if n_all < 1 << 16 else 4
        outer = {1: b"\xc7", 2: b"\xc8", 4: b"\xc9"}[width] + n_all.to_bytes(width, "big") + bytes((_ARRAY,))
    yield outer + head
    yield leaf, Span(leaf.path, 0, n_bytes, start=start)


def _chunked(leaf: Leaf) -> Iterator[bytes | tuple[Leaf, Span]]:
    """A dict of flat chunks."""
    step = max(MAX_CHUNK_BYTES // element_bytes(leaf), 1) * element_bytes(leaf)
    starts = range(0, leaf.n_bytes, step)
    shape = {str(i): size for i, size in enumerate(leaf.shape)}
    yield _packed("pack_map_header", 3) + msgpack.packb("__msgpack_chunked_array__") + msgpack.packb(True)
    yield msgpack.packb("shape") + msgpack.packb(shape)
    yield msgpack.packb("chunks") + _packed("pack_map_header", len(starts))
    for i, start in enumerate(starts):
        yield msgpack.packb(str(i))
        n_bytes = min(step, leaf.n_bytes - start)
        yield from _array(leaf, (n_bytes // element_bytes(leaf),), start, n_bytes)
