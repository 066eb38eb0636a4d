"""Leaves, their Layout in flat Buffers, and the Snapshot that adapters hand to the core. Imports dtypes and errors.

The hard thing: a Snapshot never says on which device its Buffers live; the codec asks the Buffers. Here a Buffer is
a numpy uint array; other backends bring their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words, of, to_words
from tricomp.errors import InvalidArgument


@dataclass(frozen=True)
class Leaf:
    """One named tensor: path ("model/h.0.weight"), dtype, shape."""

    path: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def n_words(self) -> int:
        return math.prod(self.shape) * self.dtype.words_per_element

    @property
    def n_bytes(self) -> int:
        return self.n_words * self.dtype.word_bits // 8


def is_shape(shape: Sequence[int]) -> bool:
    """Whether a leaf can be of this shape: in bytes, below what an address can hold, also if another size is 0."""
    return len(shape) <= 64 and math.prod(max(size, 1) for size in shape) < 1 << 59


@dataclass(frozen=True)
class Place:
    """Where a leaf stands: words [offset, offset + n_words) of Buffer number buffer."""

    buffer: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The ordered table of leaves and their places. Paths are unique. Raises InvalidArgument otherwise."""

    leaves: tuple[Leaf, ...]
    places: tuple[Place, ...]

    def __post_init__(self) -> None:
        if len(self.leaves) != len(self.places):
            raise InvalidArgument(f"a Layout of {len(self.leaves)} leaves needs as many places, got {len(self.places)}")
        if len(self.index) != len(self.leaves):
            seen: set[str] = set()
            twice = next(leaf.path for leaf in self.leaves if leaf.path in seen or seen.add(leaf.path))  # type: ignore[func-returns-value]
            raise InvalidArgument(f"leaf {twice!r} appears twice; give every leaf a path of its own")

    @cached_property
    def index(self) -> dict[str, int]:
        """Path to position in `leaves`."""
        return {leaf.path: i for i, leaf in enumerate(self.leaves)}


@dataclass(frozen=True)
class Snapshot:
    """A Layout and its Buffers (uint[...] each) at one step."""

    layout: Layout
    buffers: tuple[Words, ...]

    def words(self, i: int) -> Words:
        """Words of leaf number i, flat, no copy."""
        place = self.layout.places[i]
        return self.buffers[place.buffer][place.offset : place.offset + self.layout.leaves[i].n_words]

    def find(self, path: str) -> tuple[Leaf, Words] | None:
        """The leaf of that path and its words, or None. This is what makes a Snapshot usable as a Reference."""
        i = self.layout.index.get(path)
        return None if i is None else (self.layout.leaves[i], self.words(i))

    def copy(self) -> Snapshot:
        """The same Snapshot in memory of its own, so that training may go on."""
        return Snapshot(self.layout, tuple(buffer.copy() for buffer in self.buffers))


def snapshot_of(paths: Sequence[str], arrays: Sequence[np.ndarray[Any, Any]]) -> Snapshot:
    """A Snapshot over numpy arrays, one Buffer a leaf, sharing memory where it is contiguous and little-endian."""
    leaves = tuple(Leaf(p, of(a, p), a.shape) for p, a in zip(paths, arrays, strict=True))
    places = tuple(Place(i, 0) for i in range(len(leaves)))
    return Snapshot(Layout(leaves, places), tuple(to_words(a, p) for p, a in zip(paths, arrays, strict=True)))
