"""Trees to msgpack as flax.serialization.to_bytes writes them, streaming. Imports no framework.

Lists, tuples and named tuples become dicts, as flax.serialization.to_state_dict makes them; not those that came from a
Flax file, which are there as they are. Notes of the JAX adapter tell dtypes that only Flax has a name for. The hard
thing: the length of an array's extension stands before its bytes, so an array is written whole or not at all;
one above 1 GiB is written in chunks, as Flax does, because other readers of msgpack stop at 4 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np

from tricomp import bounds, tree
from tricomp.bounds import LEAF, NAMED_TUPLE, TUPLE, Bytes
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.formats.span import Leaves, Span, decoded, element_bytes
from tricomp.layout import Leaf

MAX_CHUNK_BYTES = 1 << 30
_ARRAY, _COMPLEX = 1, 2  # extension codes
# Dtypes narrower than a byte, and the bits of a byte that Flax writes of one; a stored integer has its sign in all.
_NARROW = {
    "int2": 3,
    "int4": 15,
    "uint2": 3,
    "uint4": 15,
    "float4_e2m1fn": 15,
    "float6_e2m3fn": 63,
    "float6_e3m2fn": 63,
}


def pieces(file: File) -> Iterator[Bytes]:
    """The bytes of a Flax file with the tree of an open `.tri` file. Raises InvalidArgument, naming the node."""
    structure = bounds.unpack(file.structure, f"{file.name}: tree")
    origins = file.metadata.get("origin")
    is_flax = isinstance(origins, list) and any(
        isinstance(each, dict) and each.get("format") == "flax" for each in origins
    )
    if not is_flax:
        structure = _state_dict(structure, None, _noted(file, "kinds"))
    _check(structure, "the tree itself")
    narrow = {path: name for path, name in _noted(file, "dtypes").items() if name in _NARROW}
    leaves = iter([file.leaf(path) for path in file])
    parts = list(_parts(structure, leaves, narrow))
    return _written(parts, file, narrow)


def _noted(file: File, table: str) -> Mapping[str, str]:
    """A table of the JAX adapter's notes, by path."""
    notes = file.metadata.get("tricomp_jax")
    found = notes.get(table) if isinstance(notes, dict) else None
    found = found if isinstance(found, dict) else {}
    return {path: entry for path, entry in found.items() if isinstance(entry, str)}


def _written(parts: list[bytes | tuple[Leaf, Span]], file: File, narrow: Mapping[str, str]) -> Iterator[Bytes]:
    placed = [part for part in parts if not isinstance(part, bytes)]
    contents = decoded([span for _, span in placed], Leaves(leaf for leaf, _ in placed), file)
    for part in parts:
        if isinstance(part, bytes):
            yield part
            continue
        mask = _NARROW[narrow[part[0].path]] if part[0].path in narrow else 0xFF
        for piece in next(contents)[1]:
            yield piece if mask == 0xFF else (np.frombuffer(piece, np.uint8) & np.uint8(mask)).data


def _state_dict(node: Any, path: str | None, kinds: Mapping[str, str]) -> Any:
    """A structure with dicts for lists and tuples, and text for all keys. kinds: where pairs are complex numbers."""
    if isinstance(node, dict):
        texts = {str(key): _state_dict(value, tree.join(path, key), kinds) for key, value in node.items()}
        if len(texts) < len(node):
            raise InvalidArgument(
                f"node {path or ''!r}: has keys that are alike as text, and the keys of flax files are text. "
                "Rename one, or export to another format."
            )
        return texts
    if not isinstance(node, list):
        return node
    code = node[0].code if node and isinstance(node[0], msgpack.ExtType) else LEAF
    if code == TUPLE and len(node) == 3 and kinds.get(path or "") == "complex":
        return msgpack.ExtType(_COMPLEX, msgpack.packb(node[1:]))
    if code not in (LEAF, TUPLE, NAMED_TUPLE):
        return node
    values = node[1:] if code == TUPLE else node[3:] if code == NAMED_TUPLE else node
    keys = node[2] if code == NAMED_TUPLE else range(len(values))
    return {str(key): _state_dict(each, tree.join(path, key), kinds) for key, each in zip(keys, values, strict=True)}


def _check(node: Any, path: str) -> None:
    """Raise InvalidArgument for what Flax has no form for: registered types, large numbers."""
    is_extension = isinstance(node, msgpack.ExtType) and node.code not in (LEAF, _COMPLEX)
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


def _parts(node: Any, leaves: Iterator[Leaf], narrow: Mapping[str, str]) -> Iterator[bytes | tuple[Leaf, Span]]:
    """The file as bytes and, between them, spans of leaves. narrow: names of dtypes, by path."""
    if isinstance(node, msgpack.ExtType) and node.code == LEAF:
        leaf = next(leaves)
        name = narrow.get(leaf.path, leaf.dtype.name)
        if leaf.n_bytes <= MAX_CHUNK_BYTES:
            yield from _array(leaf, name, leaf.shape, 0, leaf.n_bytes)
        else:
            yield from _chunked(leaf, name)
    elif isinstance(node, dict):
        yield _packed("pack_map_header", len(node))
        for key, value in node.items():
            yield msgpack.packb(key)
            yield from _parts(value, leaves, narrow)
    elif isinstance(node, list):
        yield _packed("pack_array_header", len(node))
        for value in node:
            yield from _parts(value, leaves, narrow)
    else:
        yield msgpack.packb(node)


def _packed(name: str, count: int) -> bytes:
    packed: bytes = getattr(msgpack.Packer(), name)(count)
    return packed


def _array(
    leaf: Leaf, name: str, shape: tuple[int, ...], start: int, n_bytes: int
) -> Iterator[bytes | tuple[Leaf, Span]]:
    """Extension 1 around shape, dtype and some bytes of a leaf."""
    size = bytes((0xC4, n_bytes)) if n_bytes < 256 else b""
    size = size or (b"\xc5" + n_bytes.to_bytes(2, "big") if n_bytes < 1 << 16 else b"\xc6" + n_bytes.to_bytes(4, "big"))
    head = b"\x93" + msgpack.packb(shape) + msgpack.packb(name) + size
    n_all = len(head) + n_bytes
    if n_all in (1, 2, 4, 8, 16):
        outer = bytes((0xD4 + n_all.bit_length() - 1, _ARRAY))
    else:
        width = 1 if n_all < 256 else 2 if n_all < 1 << 16 else 4
        outer = {1: b"\xc7", 2: b"\xc8", 4: b"\xc9"}[width] + n_all.to_bytes(width, "big") + bytes((_ARRAY,))
    yield outer + head
    yield leaf, Span(leaf.path, 0, n_bytes, start=start)


def _chunked(leaf: Leaf, name: str) -> Iterator[bytes | tuple[Leaf, Span]]:
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
        yield from _array(leaf, name, (n_bytes // element_bytes(leaf),), start, n_bytes)
