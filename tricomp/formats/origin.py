"""Where a `.tri` file's leaves came from: files of other formats, and how to rebuild them byte for byte.

A file is leaves' bytes in spans and, around them, its *skeleton*; the metadata key "origin" holds spans and skeletons.
Imports no framework. The hard thing: 100,000 spans must cost next to nothing, so they are columns of differences, zero
for any tidy file, and deflated; and what is read back is hostile until it is checked against the file's leaves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tricomp import bounds, dtypes
from tricomp import tree as trees
from tricomp.bounds import Bytes, Limits
from tricomp.errors import CorruptFile, InvalidArgument, LimitExceeded
from tricomp.formats import header
from tricomp.formats.span import Leaves, Span, decoded, fault_of
from tricomp.layout import Leaf
from tricomp.storage import Source

if TYPE_CHECKING:
    from tricomp.file import File

__all__ = ["Origin", "Span", "TensorFile", "is_plain_name"]

Array = np.ndarray[Any, Any]
_MOST_SPANS = 1 << 20  # of all files, beside one for each leaf


@dataclass(frozen=True)
class TensorFile:
    """A file of another format, opened: its tree of numpy arrays (views of the mapped file) and plain values.

    name: without folders. n_bytes: of the file, or of all parts together. spans: where leaves of the tree stand, in any
    order, so that the file can be rebuilt byte for byte; None: only an equal one can be written. source: the file's
    bytes. metadata: further keys for the `.tri` file's metadata (an adapter's notes; not "origin"). parts: the shards,
    when this is an index of several files; their leaves are leaves of this tree. A context manager.
    """

    name: str
    format: str
    tree: Any
    n_bytes: int
    spans: tuple[Span, ...] | None
    source: Source
    metadata: dict[str, Any] = field(default_factory=dict)
    parts: tuple[TensorFile, ...] = ()

    def origins(self) -> list[Origin]:
        """The Origin of this file, then of its parts. Raises InvalidArgument if spans do not fit the file or tree."""
        _, paths, arrays = trees.flatten(self.tree)
        leaves = Leaves(Leaf(path, dtypes.of(array, path), array.shape) for path, array in zip(paths, arrays))
        found = [_origin_of(opened, leaves) for opened in (self, *self.parts)]
        sizes = [(40 * len(origin.spans or ()), len(origin.skeleton)) for origin in found]
        check_sizes(sizes, len(leaves), bounds.DEFAULTS, self.name)
        return found

    def to_metadata(self) -> dict[str, Any]:
        """What a `.tri` file of this tree takes as metadata: the adapter's notes, and "origin"."""
        return {**self.metadata, "origin": [origin.to_metadata() for origin in self.origins()]}

    def close(self) -> None:
        """Let go of the file; arrays that still view it keep it mapped."""
        self.source.close()
        for part in self.parts:
            part.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Origin:
    """One file that leaves came from, for metadata["origin"].

    spans: in file order; None if only an equal file can be written, by the format's writer. skeleton: all bytes outside
    the spans. leaves: all of the tree's.
    """

    format: str
    name: str
    n_bytes: int
    spans: tuple[Span, ...] | None
    skeleton: bytes
    leaves: Leaves

    @property
    def is_exact(self) -> bool:
        """Whether pieces can rebuild the file."""
        return self.spans is not None

    def to_metadata(self) -> dict[str, Any]:
        """Plain values for a file's metadata, see FORMAT.md."""
        known: dict[str, Any] = {"format": self.format, "name": self.name, "bytes": self.n_bytes}
        if self.spans is None:
            return known
        axes = sorted({span.axes for span in self.spans if span.axes is not None})
        columns = _columns(self.spans, self.leaves, axes)
        placed = _placed(self.spans, self.leaves)
        short = header.abridge(self.skeleton, placed) if self.format == "safetensors" and placed else None
        known["spans"] = bounds.deflate(columns.tobytes())
        known["axes"] = [list(each) for each in axes]
        known["skeleton"] = bounds.deflate(self.skeleton if short is None else short)
        known["skeleton_bytes"] = len(self.skeleton)
        known["is_abridged"] = short is not None
        return known

    @classmethod
    def from_metadata(
        cls, packed: Any, file: File, limits: Limits = bounds.DEFAULTS, leaves: Leaves | None = None
    ) -> Origin:
        """One entry of metadata["origin"], checked against its file's leaves. Raises CorruptFile, LimitExceeded.

        leaves: of the file, if they are at hand.
        """
        what = f"{file.name}: origin"
        if not isinstance(packed, dict) or not isinstance(packed.get("format"), str):
            raise CorruptFile(f"{what}: expected a map that names a format, got {type(packed).__name__}.")
        name, n_bytes = packed.get("name"), packed.get("bytes")
        if not isinstance(name, str) or not is_plain_name(name):
            raise CorruptFile(f"{what}: expected the name of a file in the same folder, got {name!r}.")
        if type(n_bytes) is not int or not 0 <= n_bytes < 1 << 62:
            raise CorruptFile(f"{what}: {name!r}: {n_bytes!r} is no size of a file.")
        what = f"{what}: {name!r}"
        leaves = leaves or Leaves(map(file.leaf, file))
        if packed.get("spans") is None:
            return cls(packed["format"], name, n_bytes, None, b"", leaves)
        n_skeleton, is_abridged = packed.get("skeleton_bytes"), packed.get("is_abridged")
        if type(n_skeleton) is not int or not 0 <= n_skeleton <= n_bytes or not isinstance(is_abridged, bool):
            raise CorruptFile(f"{what}: a skeleton of {n_skeleton!r} bytes in a file of {n_bytes} bytes.")
        limits.check("max_table_bytes", n_skeleton, what)
        raw = bounds.inflate(packed.get("spans"), limits, f"{what}: spans")
        spans = _spans(raw, packed.get("axes"), leaves, n_bytes - n_skeleton, n_bytes, f"{what}: spans")
        skeleton = bounds.inflate(packed.get("skeleton"), limits, f"{what}: skeleton")
        if is_abridged:
            skeleton = header.expand(skeleton, _placed(spans, leaves), n_skeleton, f"{what}: skeleton")
        if len(skeleton) != n_skeleton:
            raise CorruptFile(f"{what}: a skeleton of {len(skeleton)} bytes, {n_skeleton} are declared.")
        return cls(packed["format"], name, n_bytes, spans, skeleton, leaves)

    def pieces(self, file: File) -> Iterator[Bytes]:
        """The original file's bytes, a few MB at a time, leaves decoded in file order.

        Raises InvalidArgument if the file cannot be rebuilt exactly, and what decoding raises.
        """
        if self.spans is None:
            raise InvalidArgument(
                f"{file.name}: {self.name!r} cannot be rebuilt byte for byte. Write an equal file: formats.restored."
            )
        skeleton, done, offset = memoryview(self.skeleton), 0, 0
        for span, found in decoded(self.spans, self.leaves, file):
            if span.offset > offset:
                yield skeleton[done : done + span.offset - offset]
                done += span.offset - offset
            yield from found
            offset = span.offset + span.n_bytes
        if done < len(skeleton):
            yield skeleton[done:]


def check_sizes(sizes: Sequence[tuple[int, int]], n_leaves: int, limits: Limits, what: str) -> None:
    """Raise LimitExceeded if the origins of a tree of n_leaves take more memory than any that files of tensors have.

    sizes: bytes of the columns, and of the skeleton, of each.
    """
    n_bytes = sum(map(sum, sizes))
    limits.check("max_table_bytes", n_bytes, f"{what}: bytes that are no leaf's")
    n_spans = sum(n_columns for n_columns, _ in sizes) // 40
    if n_spans > n_leaves + _MOST_SPANS:
        raise LimitExceeded(f"{what}: its {n_leaves} leaves stand in {n_spans} pieces, {_MOST_SPANS} more are read.")


def sizes_of(packed: Any) -> tuple[int, int]:
    """Bytes of the columns, and of the skeleton, that an entry of metadata["origin"] declares; 0 if it is damaged."""
    entry = packed if isinstance(packed, dict) else {}
    spans, n_skeleton = entry.get("spans"), entry.get("skeleton_bytes")
    n_columns = int.from_bytes(spans[:8], "little") if isinstance(spans, bytes) else 0
    return n_columns, n_skeleton if type(n_skeleton) is int and n_skeleton > 0 else 0


def is_plain_name(name: str) -> bool:
    """Whether a name out of a file is that of a file in the folder it is used in, and of nothing else."""
    is_part = bool(name) and name not in (".", "..") and not any(letter in name for letter in "/\\:\0")
    return is_part and name.isprintable() and len(name.encode(errors="replace")) <= 255


def _plain_name(name: str) -> str:
    """A name that is_plain_name takes, the same if it does already."""
    safe = "".join("_" if letter in "/\\:" or not letter.isprintable() else letter for letter in name)
    return safe if is_plain_name(safe) else f"file{os.path.splitext(safe)[1][:20]}"


def _origin_of(opened: TensorFile, leaves: Leaves) -> Origin:
    """The Origin of one opened file. leaves: of the whole tree."""
    name = _plain_name(opened.name)
    inexact = Origin(opened.format, name, opened.source.n_bytes, None, b"", leaves)
    if opened.spans is None:
        return inexact
    spans = tuple(sorted(opened.spans, key=lambda span: (span.offset, span.n_bytes)))
    n_bytes = opened.source.n_bytes
    gaps: list[tuple[int, int]] = []
    at = 0
    for span in spans:
        fault = fault_of(span, leaves.find(span.leaf))
        if fault or span.offset < at or span.offset + span.n_bytes > n_bytes:
            raise InvalidArgument(
                f"{opened.name}: leaf {span.leaf!r} at {span.offset}, {span.n_bytes} bytes: "
                f"{fault or 'overlaps another one, or the end of the file'}."
            )
        if span.offset > at:
            gaps.append((at, span.offset))
        at = span.offset + span.n_bytes
    gaps.append((at, n_bytes))
    if sum(stop - start for start, stop in gaps) > bounds.DEFAULTS.max_table_bytes:
        return inexact  # a skeleton that no reader would take
    skeleton = b"".join(opened.source.read(start, stop - start) for start, stop in gaps)
    return Origin(opened.format, name, n_bytes, spans, skeleton, leaves)


def _placed(spans: Sequence[Span], leaves: Leaves) -> list[tuple[Leaf, int]]:
    return [(leaves[leaves.number(span.leaf)], span.offset) for span in spans]


def _columns(spans: Sequence[Span], leaves: Leaves, axes: Sequence[tuple[int, ...]]) -> Array:
    """The spans as int64[5, n_spans]: steps of leaf numbers, gaps, codes, starts, sizes; nearly all 1 or 0."""
    code_of = {each: (1 + i) << 2 for i, each in enumerate(axes)}
    table = np.zeros((5, len(spans)), "<i8")
    number, at = -1, 0
    for i, span in enumerate(spans):
        found = leaves.number(span.leaf)
        is_part = span.n_bytes != leaves[found].n_bytes
        code = int(span.is_swapped) | is_part << 1 | (code_of[span.axes] if span.axes is not None else 0)
        table[:, i] = found - number - 1, span.offset - at, code, *((span.start, span.n_bytes) if is_part else (0, 0))
        number, at = found, span.offset + span.n_bytes
    return table


def _spans(raw: bytes, axes: Any, leaves: Leaves, n_leaf_bytes: int, n_bytes: int, what: str) -> tuple[Span, ...]:
    """The spans of _columns, checked: n_leaf_bytes in all, in a file of n_bytes."""
    if len(raw) % 40:
        raise CorruptFile(f"{what}: {len(raw)} bytes are no columns of five integers.")
    if not isinstance(axes, list) or not all(
        isinstance(each, list) and all(type(axis) is int for axis in each) for each in axes
    ):
        raise CorruptFile(f"{what}: expected lists of axes, got {type(axes).__name__}.")
    columns = np.frombuffer(raw, "<i8").reshape(5, -1).tolist()
    spans: list[Span] = []
    number, at, rest = -1, 0, n_leaf_bytes
    for step, gap, code, start, size in zip(*columns, strict=True):
        number += step + 1
        if not 0 <= number < len(leaves) or gap < 0 or not 0 <= code >> 2 <= len(axes):
            raise CorruptFile(f"{what}: number {len(spans)} is of a leaf, or has axes, that the file does not have.")
        leaf = leaves[number]
        if not code & 2:
            start, size = 0, leaf.n_bytes
        span = Span(
            leaf.path, at + gap, size, tuple(axes[(code >> 2) - 1]) if code >> 2 else None, bool(code & 1), start
        )
        fault = fault_of(span, leaf)
        at, rest = at + gap + size, rest - size
        if fault or at > n_bytes or rest < 0:
            raise CorruptFile(f"{what}: leaf {leaf.path!r}: {fault or 'it ends behind the file'}.")
        spans.append(span)
    if rest:
        raise CorruptFile(f"{what}: they hold {n_leaf_bytes - rest} bytes, {n_leaf_bytes} are declared.")
    return tuple(spans)
