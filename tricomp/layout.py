"""Leaves, their Layout in flat Buffers, and the Snapshot that adapters hand to the core. Imports dtypes and errors.

The hard thing: a Snapshot never says on which device its Buffers live; the codec asks the Buffers. A Buffer is a numpy
uint array, or a flat tensor of integers in the memory of a GPU, which is handed on and never looked into here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
class DeviceArray:
    """An array in memory that numpy does not see: a leaf as adapters hand it to the core, and get it back.

    words: its words as a flat, contiguous torch tensor of integers of that width, on whatever device.
    """

    dtype: DType
    shape: tuple[int, ...]
    words: Any

    @property
    def nbytes(self) -> int:
        return int(self.words.nbytes)


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


def snapshot_of(paths: Sequence[str], arrays: Sequence[Any]) -> Snapshot:
    """A Snapshot over arrays, of numpy or DeviceArrays, one Buffer a leaf.

    It shares memory where that is contiguous and little-endian.
    """
    leaves, words = [], []
    for path, array in zip(paths, arrays, strict=True):
        is_far = isinstance(array, DeviceArray)
        leaves.append(Leaf(path, array.dtype if is_far else of(array, path), array.shape))
        words.append(array.words if is_far else to_words(array, path))
    return Snapshot(Layout(tuple(leaves), tuple(Place(i, 0) for i in range(len(leaves)))), tuple(words))
