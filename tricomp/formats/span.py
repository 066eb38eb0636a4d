"""Spans: where leaves stand in a file, and a leaf's bytes on their way into one. Imports numpy; knows no format.

The hard thing: a leaf may be larger than memory, and a tree may have 100,000 small ones. So a large one is decoded
piece by piece, and small ones many at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tricomp.bounds import Bytes
from tricomp.file import PIECE_BYTES
from tricomp.layout import Leaf
from tricomp.reuse import Reuse

if TYPE_CHECKING:
    from tricomp.file import File

Array = np.ndarray[Any, Any]
BATCH_BYTES = 8 << 20  # of small leaves that are decoded together


class Leaves:
    """The leaves of a tree in its order, found by number and by path; shared by the origins of a tree's many files."""

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self._leaves = tuple(leaves)
        self._numbers = {leaf.path: number for number, leaf in enumerate(self._leaves)}

    def __len__(self) -> int:
        return len(self._leaves)

    def __getitem__(self, number: int) -> Leaf:
        return self._leaves[number]

    def number(self, path: str) -> int:
        """Raises KeyError."""
        return self._numbers[path]

    def find(self, path: str) -> Leaf | None:
        """The leaf of a path, or None."""
        number = self._numbers.get(path)
        return None if number is None else self._leaves[number]


@dataclass(frozen=True)
class Span:
    """Where a leaf's bytes stand in a file: offset and n_bytes.

    axes: leaf.transpose(axes), in C order, is what stands there; None: the leaf itself. is_swapped: big-endian there.
    start: the span holds the leaf's bytes [start, start + n_bytes), in the leaf's own order (then axes is None).
    """

    leaf: str
    offset: int
    n_bytes: int
    axes: tuple[int, ...] | None = None
    is_swapped: bool = False
    start: int = 0


def fault_of(span: Span, leaf: Leaf | None) -> str:
    """What is wrong with a span of a leaf, in words; nothing: ""."""
    if leaf is None:
        return "there is no such leaf"
    size = element_bytes(leaf)
    if span.start % size or span.n_bytes % size or not 0 <= span.start <= span.start + span.n_bytes <= leaf.n_bytes:
        return f"bytes {span.start} to {span.start + span.n_bytes} of a leaf of {leaf.n_bytes}"
    if span.axes is not None:
        if sorted(span.axes) != list(range(len(leaf.shape))):
            return f"axes {list(span.axes)} of a leaf with {len(leaf.shape)} dimensions"
        if span.n_bytes != leaf.n_bytes:
            return "axes, and not the whole leaf"
    return ""


def element_bytes(leaf: Leaf) -> int:
    """Bytes of one element of a leaf."""
    return leaf.dtype.word_bits // 8 * leaf.dtype.words_per_element


def spans_of(leaves: Sequence[Leaf]) -> tuple[Span, ...]:
    """Spans of whole leaves, one behind the other."""
    spans: list[Span] = []
    offset = 0
    for leaf in leaves:
        spans.append(Span(leaf.path, offset, leaf.n_bytes))
        offset += leaf.n_bytes
    return tuple(spans)


def decoded(spans: Sequence[Span], leaves: Leaves, file: File) -> Iterator[tuple[Span, Iterator[Bytes]]]:
    """Each span, and pieces of a few MB of what stands in it, to be taken before the next span is.

    A piece stays as it is while it is held; what is dropped makes room for others. leaves: at least those of the spans.
    Raises what decoding raises.
    """
    room = Reuse()
    for batch in _batches(spans, leaves):
        small = file.borrowed([span.leaf for span in batch], room) if len(batch) > 1 else {}
        for span in batch:
            leaf = leaves[leaves.number(span.leaf)]
            yield span, _span_bytes(span, leaf, _pieces_in_order(span, leaf, file, small.get(span.leaf), room))


def _batches(spans: Sequence[Span], leaves: Leaves) -> Iterator[list[Span]]:
    """Spans in order: small leaves together, which are quicker to decode at once, each of the others alone."""
    batch: list[Span] = []
    n_bytes = 0
    for span in spans:
        is_small = leaves[leaves.number(span.leaf)].n_bytes <= PIECE_BYTES
        if batch and (not is_small or n_bytes + span.n_bytes > BATCH_BYTES):
            yield batch
            batch, n_bytes = [], 0
        if is_small:
            batch.append(span)
            n_bytes += span.n_bytes
        else:
            yield [span]
    if batch:
        yield batch


def _span_bytes(span: Span, leaf: Leaf, pieces: Iterator[Array]) -> Iterator[Bytes]:
    """What stands in a span. pieces: of its leaf, in the order of the file."""
    word = leaf.dtype.word_dtype
    for piece in pieces:
        words = piece.view(word)
        del piece
        octets = (words.byteswap() if span.is_swapped else words).view(np.uint8)
        del words
        yield octets.data
        del octets


def _pieces_in_order(span: Span, leaf: Leaf, file: File, array: Array | None, room: Reuse) -> Iterator[Array]:
    """The elements of a span, one-dimensional, some MB at a time. array: its leaf, if it is decoded already."""
    if span.axes is not None and len(span.axes) > 1:
        whole = (file[span.leaf] if array is None else array).transpose(span.axes)
        n_elements = max(PIECE_BYTES // element_bytes(leaf), 1)
        for start in range(0, whole.size, n_elements):
            yield whole.flat[start : start + n_elements]
    elif span.n_bytes != leaf.n_bytes:
        size, n_elements = element_bytes(leaf), file.piece_elements(span.leaf)
        first, last = span.start // size, (span.start + span.n_bytes) // size
        for start in range(first, last, n_elements):
            yield file.elements(span.leaf, start, min(start + n_elements, last))
    elif array is not None:
        yield array.reshape(-1)
    else:
        yield from file.pieces(span.leaf, room=room)
