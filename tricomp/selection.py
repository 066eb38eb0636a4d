"""Which elements of an array an index asks for, and how to fetch those and few others. numpy and errors only; no file.

An index becomes one ascending set of positions an axis; their product is what is fetched, and what is left of the
index (turning, repeating, dropping axes) is done to that block. The hard thing: the product stands in runs of any
length and number, from one huge run to one element in each of a billion rows, so runs are told in batches, and those
that no whole chunk keeps apart are fetched together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tricomp.errors import InvalidIndex

Array = np.ndarray[Any, Any]
Positions = range | NDArray[np.int64]  # ascending, each once
RunsOf = Callable[[Sequence[range]], Sequence[Array]]
_SPAN = 1 << 22  # most elements fetched at a time
_BATCH_RUNS = 1 << 18  # runs told at a time


@dataclass(frozen=True)
class Selection:
    """What an index asks of an array of a shape.

    axes: the positions needed on each axis. index: what to do to the block of them, an item for each axis and each new
    one: 0 (drop it), a slice (all of it, either way round), None (a new axis) or int64[...] (positions in the block).
    dots_at: where in it an Ellipsis stood, else its length. Even one for no axes parts arrays, for numpy.
    """

    shape: tuple[int, ...]
    axes: tuple[Positions, ...]
    index: tuple[int | slice | NDArray[np.int64] | None, ...]
    dots_at: int

    @property
    def is_whole(self) -> bool:
        """Whether every element is needed."""
        return all(len(positions) == n for positions, n in zip(self.axes, self.shape, strict=True))

    def fetch(self, runs_of: RunsOf, dtype: np.dtype[Any], chunk_elements: int) -> Array:
        """The block: the product of the positions. runs_of: the runs of the array, flat, in C order, for ranges of it.

        What lies between two needed elements is fetched too if it holds no whole chunk of chunk_elements, wherever
        chunks begin; so no chunk is asked for in vain. Memory: the block, and what some MB take when decoded.
        """
        block = np.empty([len(positions) for positions in self.axes], dtype)
        if block.size == 0:
            return block
        run, starts_of = self._runs()
        # Bits, for numpy makes no strided view of some dtypes of ml_dtypes; those of more than 8 bytes are numpy's own.
        carrier = np.dtype(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else dtype
        rows = block.reshape(-1, run).view(carrier)
        waiting: list[_Window] = []
        n_waiting = 0
        for window in _windows(starts_of, run, chunk_elements, rows):
            waiting.append(window)
            n_waiting += len(window.elements) + chunk_elements  # for it is whole chunks that are decoded
            if n_waiting >= _SPAN:
                _fill(waiting, runs_of)
                waiting, n_waiting = [], 0
        _fill(waiting, runs_of)
        return block

    def of(self, block: Array, is_int_first: bool = False) -> Array:
        """What the index asks for, of the block that was fetched; contiguous, of no more dimensions than it has.

        is_int_first: beside arrays of positions, ints drop their axis before anything else, as in torch; else they
        count as arrays, as in numpy. It matters to where axes stand.
        """
        index: tuple[Any, ...] = (*self.index[: self.dots_at], ..., *self.index[self.dots_at :])
        if is_int_first:
            block = block[(*(slice(None) if isinstance(item, np.ndarray) else item for item in self.index), ...)]
            left = [item for item in self.index if not isinstance(item, int)]
            index = (*(item if isinstance(item, np.ndarray) else slice(None) for item in left), ...)
        return np.asarray(block[index], order="C")

    def _runs(self) -> tuple[int, Iterator[NDArray[np.int64]]]:
        """Elements in each run, and where the runs begin, ascending, in batches."""
        n_outer = len(self.shape)
        while n_outer and len(self.axes[n_outer - 1]) == self.shape[n_outer - 1]:
            n_outer -= 1
        run = prod(self.shape[n_outer:])
        offset = 0
        if n_outer:
            last = self.axes[n_outer - 1]
            if int(last[-1]) - int(last[0]) == len(last) - 1:
                n_outer -= 1
                offset = int(last[0]) * run
                run *= len(last)
        steps = [prod(self.shape[axis + 1 :]) for axis in range(n_outer)]
        return run, _starts(self.axes[:n_outer], steps, offset)


def select(shape: tuple[int, ...], index: Any, name: str = "array") -> Selection:
    """The Selection of an index: ints, slices of any step, Ellipsis, None, and arrays or lists of ints or booleans.

    Rules and results are numpy's. Raises InvalidIndex, naming what it is an index of.
    """
    items = _items(index, name)
    n_taken = sum(_n_axes(item) for item in items)
    if n_taken > len(shape):
        raise InvalidIndex(f"{name}: {n_taken} indices for its {len(shape)} dimensions.")
    rest = [slice(None)] * (len(shape) - n_taken)
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    n_after = max(len(items) - at - 1, 0)
    items[at : at + 1] = rest
    axes: list[Positions] = []
    left: list[int | slice | NDArray[np.int64] | None] = []
    dots_at = None
    for i, item in enumerate(items):
        if i == len(items) - n_after:
            dots_at = len(left)
        if item is None:
            left.append(None)
            continue
        if isinstance(item, np.ndarray) and item.dtype == bool:
            here = shape[len(axes) : len(axes) + item.ndim]
            if item.shape != here:
                raise InvalidIndex(f"{name}: a mask of shape {list(item.shape)} for dimensions of {list(here)}.")
            found = [_positions(part, n, name) for part, n in zip(item.nonzero(), here, strict=True)]
        else:
            found = [_positions(item, shape[len(axes)], name)]
        for positions, after in found:
            axes.append(positions)
            left.append(after)
    return Selection(shape, tuple(axes), tuple(left), len(left) if dots_at is None else dots_at)


def _items(index: Any, name: str) -> list[Any]:
    """The items of an index: int, slice, None, Ellipsis, bool[...] of a dimension or more, int64[...]."""
    items: list[Any] = []
    for item in index if isinstance(index, tuple) else (index,):
        if item is None or item is Ellipsis or isinstance(item, slice):
            items.append(item)
        elif isinstance(item, bool | np.bool_):
            raise InvalidIndex(f"{name}: the index {item!r} is no position. Use an int, a slice, ... or None.")
        else:
            items.append(_int_or_array(item, name))
    if sum(item is Ellipsis for item in items) > 1:
        raise InvalidIndex(f"{name}: an index can hold one ellipsis ('...') only.")
    return items


def _int_or_array(item: Any, name: str) -> Any:
    try:
        return operator.index(item)
    except TypeError:
        pass
    try:
        array = np.asarray(item) if isinstance(item, Sequence) or hasattr(item, "__array__") else None
    except (TypeError, ValueError):
        array = None
    if array is not None and array.size == 0 and isinstance(item, list):
        array = array.astype(np.int64)  # [] makes floats
    if array is None or isinstance(item, str | bytes) or array.ndim == 0 or array.dtype.kind not in "iub":
        raise InvalidIndex(
            f"{name}: {item!r:.80} is no index. Use ints, slices, ..., None, or arrays of ints or booleans."
        )
    return array if array.dtype == bool else array.astype(np.int64)


def _n_axes(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, np.ndarray) and item.dtype == bool else 1


def _positions(item: Any, n: int, name: str) -> tuple[Positions, int | slice | NDArray[np.int64]]:
    """The positions that an item asks for on an axis of n, and what is left to do with them."""
    if isinstance(item, slice):
        try:
            chosen = range(*item.indices(n))
        except (TypeError, ValueError) as error:
            raise InvalidIndex(f"{name}: {item}: {error}.") from None
        return (chosen[::-1], slice(None, None, -1)) if chosen.step < 0 else (chosen, slice(None))
    if isinstance(item, np.ndarray):
        lowest, highest = (int(item.min()), int(item.max())) if item.size else (0, -1)
        if lowest < -n or highest >= n:
            worst = lowest if lowest < -n else highest
            raise InvalidIndex(f"{name}: index {worst} for a dimension of {n}.")
        chosen_array, back = np.unique(item % n if n else item, return_inverse=True)
        return chosen_array, back.reshape(item.shape)
    if not -n <= item < n:
        raise InvalidIndex(f"{name}: index {item} for a dimension of {n}.")
    return range(item % n, item % n + 1), 0


def _starts(axes: Sequence[Positions], steps: Sequence[int], offset: int) -> Iterator[NDArray[np.int64]]:
    lengths = [len(positions) for positions in axes]
    n_runs = prod(lengths)
    for begin in range(0, n_runs, _BATCH_RUNS):
        numbers = np.arange(begin, min(begin + _BATCH_RUNS, n_runs))
        starts = np.full(len(numbers), offset, np.int64)
        for positions, length, step in zip(reversed(axes), reversed(lengths), reversed(steps), strict=True):
            numbers, at = np.divmod(numbers, length)
            chosen = at * positions.step + positions.start if isinstance(positions, range) else positions[at]
            starts += chosen * step
        yield starts


@dataclass(frozen=True)
class _Window:
    """Elements fetched in one piece, and the rows of the block to put them in. at: where in the piece each row begins;
    None: the piece is what the rows take, in order."""

    elements: range
    rows: Array
    at: NDArray[np.int64] | None = None


def _windows(starts_of: Iterator[NDArray[np.int64]], run: int, chunk_elements: int, rows: Array) -> Iterator[_Window]:
    """Windows over the runs that begin at starts, of about _SPAN elements at most. rows: one for each run."""
    done = 0
    for starts in starts_of:
        is_cut = (np.diff(starts) >= run + chunk_elements) | (np.diff(starts // _SPAN) != 0)
        for begin, end in pairwise([0, *(np.flatnonzero(is_cut) + 1).tolist(), len(starts)]):
            first, stop = int(starts[begin]), int(starts[end - 1]) + run
            if end - begin > 1:
                yield _Window(range(first, stop), rows[done + begin : done + end], starts[begin:end] - first)
                continue
            at = first
            while at < stop:
                following = min((at // _SPAN + 1) * _SPAN, stop)
                yield _Window(range(at, following), rows[done + begin, at - first : following - first])
                at = following
        done += len(starts)


def _fill(windows: Sequence[_Window], runs_of: RunsOf) -> None:
    if not windows:
        return
    for window, part in zip(windows, runs_of([window.elements for window in windows]), strict=True):
        bits = part.view(window.rows.dtype)
        if window.at is None:
            window.rows[...] = bits
        else:
            window.rows[...] = np.lib.stride_tricks.sliding_window_view(bits, window.rows.shape[-1])[window.at]
