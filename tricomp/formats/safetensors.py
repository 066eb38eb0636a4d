"""Files of the safetensors format, alone or as shards with an index, read and written. Imports no framework.

Legal is what the format's own library takes, down to odd but harmless headers: any order, spaces, entries given twice
(the last counts). The hard thing: a header is hostile text of up to 100 MB that must not be trusted for a byte, and
whatever is odd in it must survive in the origin's skeleton.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from tricomp import dtypes
from tricomp import tree as trees
from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument, MissingFile
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats import header
from tricomp.formats.export import named_leaves
from tricomp.formats.origin import Span, TensorFile, is_plain_name
from tricomp.formats.span import Leaves, decoded, is_shape, spans_of

Array = np.ndarray[Any, Any]
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_INDEX = re.compile(r"\.safetensors\.index(\.[^./]+)?\.json$", re.IGNORECASE)  # "fp16" may stand in it
_METADATA = "__metadata__"
_ADVICE = "Download or copy it again."


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs: keys may be there twice."""


@dataclass(frozen=True)
class _Tensor:
    """One entry of a header: dtype as the format names it; start, stop: of its data, from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Safetensors:
    """The format "safetensors", see tricomp.formats.base.Format."""

    name = "safetensors"
    suffixes = (".safetensors", ".safetensors.index.json")

    def matches(self, head: bytes, path: str) -> bool:
        """A plausible length and the brace of a header, or an index of shards."""
        if _INDEX.search(path):
            return head.lstrip()[:1] == b"{"
        n_bytes = int.from_bytes(head[:8], "little")
        return 2 <= n_bytes <= MAX_HEADER_BYTES and head[8:].lstrip(b" \t\r\n")[:1] == b"{"

    def read(self, path: str) -> TensorFile:
        """The flat dict of a file's tensors in the order of their data; of all shards', given their index."""
        return _read_index(path) if _INDEX.search(path) else _read_file(path)

    def pieces(self, file: File) -> Iterator[Bytes]:
        """As the library writes it: by alignment, then by name; with the text metadata the file came with."""
        leaves = named_leaves(file, "safetensors")
        for name, leaf in leaves:
            if leaf.dtype.name not in header.NAMES:
                raise InvalidArgument(
                    f"leaf {leaf.path!r}: safetensors has no {leaf.dtype.name}. Leave the leaf out, or convert it."
                )
            if name == _METADATA:
                raise InvalidArgument(f"leaf {leaf.path!r}: safetensors keeps that name for itself. Rename the leaf.")
        order = {code: number for number, code in enumerate(header.BITS)}
        leaves.sort(key=lambda each: (-order[header.NAMES[each[1].dtype.name]], each[0].encode()))
        spans = spans_of([leaf for _, leaf in leaves])
        entries = [header.entry(name, leaf, span.offset) for (name, leaf), span in zip(leaves, spans)]
        metadata = _texts_of(file.metadata)
        if metadata:
            entries.insert(0, header.text(_METADATA) + b":" + header.text(metadata))
        written = b"{" + b",".join(entries) + b"}"
        written += b" " * (-len(written) % 8)
        if len(written) > MAX_HEADER_BYTES:
            raise InvalidArgument(
                f"{file.name}: the header would take {len(written)} bytes, safetensors allows {MAX_HEADER_BYTES}. "
                f"Export fewer leaves, or to another format."
            )
        return _written(written, spans, [leaf for _, leaf in leaves], file)


def _written(head: bytes, spans: Sequence[Span], leaves: Sequence[Any], file: File) -> Iterator[Bytes]:
    yield len(head).to_bytes(8, "little") + head
    for _, found in decoded(spans, Leaves(leaves), file):
        yield from found


def _texts_of(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of a `.tri` file that a header can hold: that of the file it came from, else its own texts."""
    own = metadata["safetensors"] if isinstance(metadata.get("safetensors"), dict) else metadata
    return {key: value for key, value in own.items() if isinstance(key, str) and isinstance(value, str)}


def _read_file(path: str) -> TensorFile:
    source = LocalFile(path)
    try:
        tensors, metadata, begin = _parse(source)
        tree: dict[str, Array] = {}
        spans: list[Span] = []
        for tensor in tensors:
            n_bytes = tensor.stop - tensor.start
            tree[tensor.name] = _array(tensor, source.read(begin + tensor.start, n_bytes))
            spans.append(Span(trees.join(None, tensor.name), begin + tensor.start, n_bytes))
    except BaseException:
        source.close()
        raise
    notes = {} if metadata is None else {"safetensors": metadata}
    return TensorFile(os.path.basename(path), "safetensors", tree, source.n_bytes, tuple(spans), source, notes)


def _array(tensor: _Tensor, data: Bytes) -> Array:
    """The view of a tensor: of its own dtype and shape, or flat bytes where none can be: odd dtypes, shapes, bools."""
    flat = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
    name = header.DTYPES.get(tensor.dtype)
    if name is None or (name == "bool" and flat.max(initial=0) > 1) or not is_shape(tensor.shape):
        return flat
    return flat.view(dtypes.by_name(name).numpy).reshape(tensor.shape)


def _refuse(source: LocalFile, what: str, advice: str = _ADVICE) -> NoReturn:
    raise InvalidArgument(f"{source.name}: {what}. {advice}")


def _parse(source: LocalFile) -> tuple[list[_Tensor], dict[str, str] | None, int]:
    """Tensors in the order of their data, metadata, and where data begins. Raises InvalidArgument."""
    if source.n_bytes < 8:
        _refuse(source, f"expected the 8 bytes of a safetensors header's length, got {source.n_bytes} bytes")
    n_bytes = int.from_bytes(source.read(0, 8), "little")
    if n_bytes > MAX_HEADER_BYTES:
        _refuse(source, f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got {n_bytes}")
    if n_bytes > source.n_bytes - 8:
        _refuse(source, f"expected a header of {n_bytes} bytes, got a file of {source.n_bytes}: it is cut")
    entries, metadata = _entries(source, _json(source, source.read(8, n_bytes), "header"))
    tensors = sorted(entries, key=lambda tensor: (tensor.start, tensor.stop))
    at = 0
    for tensor in tensors:
        if tensor.start != at or tensor.stop < at:
            _refuse(source, f"tensor {tensor.name!r}: expected data at {at}, got {tensor.start} to {tensor.stop}")
        expected = _n_bytes(source, tensor)
        if expected is not None and tensor.stop - tensor.start != expected:
            shape = f"{tensor.dtype}{list(tensor.shape)}"
            _refuse(
                source,
                f"tensor {tensor.name!r}: expected {expected} bytes of {shape}, got {tensor.stop - tensor.start}",
            )
        at = tensor.stop
    if 8 + n_bytes + at != source.n_bytes:
        state = "it is cut" if 8 + n_bytes + at > source.n_bytes else "something follows its tensors"
        _refuse(source, f"expected {8 + n_bytes + at} bytes, got {source.n_bytes}: {state}")
    return tensors, metadata, 8 + n_bytes


def _n_bytes(source: LocalFile, tensor: _Tensor) -> int | None:
    """Bytes that a tensor must have; None for a dtype of a later version of the format."""
    bits = header.BITS.get(tensor.dtype)
    n_bits = 1
    for size in (*tensor.shape, 1 if bits is None else bits):
        n_bits *= size
        if n_bits >= 1 << 64:  # on the way, too: the library takes no such shape, even if the next size is 0
            _refuse(source, f"tensor {tensor.name!r}: a shape of {list(tensor.shape)} overflows")
    if bits is None:
        return None
    if n_bits % 8:
        _refuse(source, f"tensor {tensor.name!r}: {tensor.dtype}{list(tensor.shape)} does not fill its last byte")
    return n_bits // 8


def _json(source: LocalFile, data: Bytes, what: str) -> Any:
    def number(digits: str) -> int | float:
        value = int(digits) if len(digits) <= 20 else float(digits)
        if digits == "-0" or not -(1 << 63) <= value < 1 << 64:  # where the library sees a float
            return real(digits)
        return value

    def real(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"the number {digits[:40]} is out of range")
        return value

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(
            str(data, "utf-8"),
            object_pairs_hook=_Object,
            parse_int=number,
            parse_float=real,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        _refuse(source, f"expected the {what} in UTF-8, got {error.object[error.start]:#x} at {error.start}")
    except (ValueError, RecursionError) as error:
        _refuse(source, f"expected the {what} as JSON, got {error}")


def _entries(source: LocalFile, found: Any) -> tuple[list[_Tensor], dict[str, str] | None]:
    if not isinstance(found, _Object):
        _refuse(source, f"expected a map of tensors as header, got {type(found).__name__}")
    tensors: dict[str, _Tensor] = {}
    metadata: dict[str, str] | None = None
    n_metadata = 0
    for name, value in found:
        _check_text(source, name)
        if name == _METADATA:
            n_metadata += 1
            metadata = _texts(source, value)
        else:
            tensors[name] = _tensor(source, name, value)
    if n_metadata > 1:
        _refuse(source, f"expected {_METADATA} once, got it {n_metadata} times")
    return list(tensors.values()), metadata


def _texts(source: LocalFile, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, _Object) or not all(isinstance(each, str) for _, each in value):
        _refuse(source, f"expected texts in {_METADATA}, got something else")
    for key, each in value:
        _check_text(source, key)
        _check_text(source, each)
    return dict(value)


def _check_text(source: LocalFile, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(source, f"expected Unicode in the header, got {value!r}")


def _tensor(source: LocalFile, name: str, value: Any) -> _Tensor:
    """An entry; the library also takes one that is given as a list, and an unknown field."""
    keys = ("dtype", "shape", "data_offsets")
    given: list[Any] = list(value) if isinstance(value, list) else []
    if isinstance(value, _Object):
        pairs = [pair for pair in value if pair[0] in keys]
        if sorted(key for key, _ in pairs) != sorted(keys):
            _refuse(source, f"tensor {name!r}: expected dtype, shape and data_offsets once each, got {_keys(value)}")
        given = [dict(pairs)[key] for key in keys]
    if len(given) != 3:
        _refuse(source, f"tensor {name!r}: expected a map of dtype, shape and data_offsets, got {type(value).__name__}")
    dtype, shape, offsets = given
    if isinstance(dtype, _Object) and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]
    if not isinstance(dtype, str):
        _refuse(source, f"tensor {name!r}: expected the name of a dtype, got {type(dtype).__name__}")
    if not _are_sizes(shape):
        _refuse(source, f"tensor {name!r}: expected a shape of whole numbers, got {_shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(source, f"tensor {name!r}: expected two data_offsets, got {_shown(offsets)}")
    return _Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(each) is int and each >= 0 for each in value)


def _keys(value: _Object) -> str:
    return _shown([key for key, _ in value])


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _read_index(path: str) -> TensorFile:
    """All shards of an index as one file; its tree has the shards' tensors, shard by shard in the order of names."""
    source = LocalFile(path)
    parts: list[TensorFile] = []
    try:
        placed = _weight_map(source)
        for shard in sorted(set(placed.values())):
            parts.append(_read_shard(source, path, shard))
        tree = _joined(source, parts, placed)
        notes = [part.metadata.get("safetensors", {}) for part in parts]
    except BaseException:
        source.close()
        for part in parts:
            part.close()
        raise
    shared = dict(set.intersection(*(set(note.items()) for note in notes))) if notes else {}
    return TensorFile(
        os.path.basename(path),
        "safetensors",
        tree,
        source.n_bytes + sum(part.n_bytes for part in parts),
        (),
        source,
        {"safetensors": shared} if shared else {},
        tuple(parts),
    )


def _weight_map(source: LocalFile) -> dict[str, str]:
    """Tensor name to shard name. Raises InvalidArgument for a shard outside the index's folder."""
    if source.n_bytes > MAX_HEADER_BYTES:
        _refuse(source, f"expected an index of at most {MAX_HEADER_BYTES} bytes, got {source.n_bytes}")
    found = _json(source, source.read(0, source.n_bytes), "index")
    placed = dict(found).get("weight_map") if isinstance(found, _Object) else None
    if not isinstance(placed, _Object):
        _refuse(source, "expected an index with a weight_map from tensors to shards, got none")
    for name, shard in placed:
        if not isinstance(shard, str) or not is_plain_name(shard):
            _refuse(
                source,
                f"tensor {name!r}: expected the name of a shard in the same folder, got {_shown(shard)}",
                "Do not trust this index: its shards lie elsewhere.",
            )
    return dict(placed)


def _read_shard(source: LocalFile, path: str, shard: str) -> TensorFile:
    try:
        return _read_file(os.path.join(os.path.dirname(path), shard))
    except MissingFile:
        raise MissingFile(
            f"{source.name}: its shard {shard!r} is not there. Put all shards into one folder with the index."
        ) from None


def _joined(source: LocalFile, parts: Sequence[TensorFile], placed: dict[str, str]) -> dict[str, Array]:
    tree: dict[str, Array] = {}
    home: dict[str, str] = {}
    for part in parts:
        for name, array in part.tree.items():
            if name in home:
                _refuse(source, f"tensor {name!r}: expected it in one shard, got it in {home[name]} and {part.name}")
            home[name] = part.name
            tree[name] = array
    for name, shard in placed.items():
        if home.get(name) != shard:
            _refuse(source, f"tensor {name!r}: expected it in the shard {shard}, which has none of that name")
    return tree
