"""Files of the safetensors format, alone or as shards with an index, read and written. Imports no framework.

The hard thing: every file that the format's own library takes must come back byte for byte. So what no array can say,
such as bools that are none or elements smaller than a byte, becomes flat bytes, and the header is kept in the origin.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tricomp import dtypes
from tricomp import tree as trees
from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument, MissingFile
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats import header
from tricomp.formats.export import named_leaves
from tricomp.formats.header_reader import MAX_HEADER_BYTES, METADATA, Object, Tensor, json_of, parse, refuse, shown
from tricomp.formats.origin import Span, TensorFile, is_plain_name
from tricomp.formats.span import Leaves, decoded, spans_of
from tricomp.layout import Leaf, is_shape

Array = np.ndarray[Any, Any]
_INDEX = re.compile(r"\.safetensors\.index(\.[^./]+)?\.json$", re.IGNORECASE)  # "fp16" may stand in it


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
        named = named_leaves(file, "safetensors")
        head, named = head_of(named, texts_of(file.metadata), file.name)
        leaves = [leaf for _, leaf in named]
        return _written(head, spans_of(leaves), leaves, file)


def head_of(
    named: Sequence[tuple[str, Leaf]], metadata: dict[str, str], where: str
) -> tuple[bytes, list[tuple[str, Leaf]]]:
    """The beginning of a file with these tensors, and the tensors in the order in which their data follows.

    where: named in errors. Raises InvalidArgument, naming the leaf, for what the format cannot hold.
    """
    for name, leaf in named:
        if leaf.dtype.name not in header.NAMES:
            raise InvalidArgument(
                f"leaf {leaf.path!r}: safetensors has no {leaf.dtype.name}. Leave the leaf out, or convert it."
            )
        if name == METADATA:
            raise InvalidArgument(f"leaf {leaf.path!r}: safetensors keeps that name for itself. Rename the leaf.")
    order = {code: number for number, code in enumerate(header.BITS)}
    placed = sorted(named, key=lambda each: (-order[header.NAMES[each[1].dtype.name]], each[0].encode()))
    spans = spans_of([leaf for _, leaf in placed])
    entries = [header.entry(name, leaf, span.offset) for (name, leaf), span in zip(placed, spans)]
    if metadata:
        entries.insert(0, header.text(METADATA) + b":" + header.text(metadata))
    written = b"{" + b",".join(entries) + b"}"
    written += b" " * (-len(written) % 8)
    if len(written) > MAX_HEADER_BYTES:
        raise InvalidArgument(
            f"{where}: the header would take {len(written)} bytes, safetensors allows {MAX_HEADER_BYTES}. "
            f"Export fewer leaves, or to another format."
        )
    return len(written).to_bytes(8, "little") + written, placed


def _written(head: bytes, spans: Sequence[Span], leaves: Sequence[Any], file: File) -> Iterator[Bytes]:
    yield head
    for _, found in decoded(spans, Leaves(leaves), file):
        yield from found


def texts_of(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of a `.tri` file that a header can hold: that of the file it came from, else its own texts."""
    own = metadata["safetensors"] if isinstance(metadata.get("safetensors"), dict) else metadata
    return {key: value for key, value in own.items() if isinstance(key, str) and isinstance(value, str)}


def _read_file(path: str) -> TensorFile:
    source = LocalFile(path)
    try:
        tensors, metadata, begin = parse(source)
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


def _array(tensor: Tensor, data: Bytes) -> Array:
    """The view of a tensor: of its own dtype and shape, or flat bytes where none can be: odd dtypes, shapes, bools."""
    flat = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
    name = header.DTYPES.get(tensor.dtype)
    if name is None or (name == "bool" and flat.max(initial=0) > 1) or not is_shape(tensor.shape):
        return flat
    return flat.view(dtypes.by_name(name).numpy).reshape(tensor.shape)


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
    shared = dict(sorted(set.intersection(*(set(note.items()) for note in notes)))) if notes else {}
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
        refuse(source, f"expected an index of at most {MAX_HEADER_BYTES} bytes, got {source.n_bytes}")
    found = json_of(source, source.read(0, source.n_bytes), "index")
    placed = dict(found).get("weight_map") if isinstance(found, Object) else None
    if not isinstance(placed, Object):
        refuse(source, "expected an index with a weight_map from tensors to shards, got none")
    for name, shard in placed:
        if not isinstance(shard, str) or not is_plain_name(shard):
            refuse(
                source,
                f"tensor {name!r}: expected the name of a shard in the same folder, got {shown(shard)}",
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
                refuse(source, f"tensor {name!r}: expected it in one shard, got it in {home[name]} and {part.name}")
            home[name] = part.name
            tree[name] = array
    for name, shard in placed.items():
        if home.get(name) != shard:
            refuse(source, f"tensor {name!r}: expected it in the shard {shard}, which has none of that name")
    return tree
