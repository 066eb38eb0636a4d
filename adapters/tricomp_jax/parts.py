"""Arrays in parts: which boxes of one a process has, and any box of one from the parts that hold it. Imports numpy.

A box is (begin, end) along each axis. Devices cut an array into a grid, so a part is known by where it begins. The hard
thing: of an array that no process holds whole, no process may need more memory than for what it asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Box = tuple[tuple[int, int], ...]
_KEY = re.compile(r"\d{1,18}(,\d{1,18})*")


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box of an array of shape that an index of jax means: one slice of step 1 for each axis."""
    return tuple((part.indices(n)[0], part.indices(n)[1]) for part, n in zip(index, shape, strict=True))


def whole_box(shape: Sequence[int]) -> Box:
    """The box that is all of an array."""
    return tuple((0, n) for n in shape)


def key_of(box: Box) -> str:
    """The name of a part: where it begins, as in "0,512"."""
    return ",".join(str(begin) for begin, _ in box)


def box_at(key: str, shape: Sequence[int]) -> Box | None:
    """The box of a part of that name and shape; None: it is no such name."""
    begins = [int(text) for text in key.split(",")] if _KEY.fullmatch(key) else []
    return tuple((begin, begin + n) for begin, n in zip(begins, shape)) if len(begins) == len(shape) else None


def shared(box: Box, other: Box) -> Box | None:
    """What two boxes have in common; None: nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return found if all(begin < end for begin, end in found) else None


def is_grid(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether boxes are the cells of a grid over all of an array: each element is in exactly one of them."""
    found = list(boxes)
    n_cells = 1
    for axis, n in enumerate(shape):
        begins = sorted({box[axis][0] for box in found})
        if not begins or begins[0] != 0:
            return False
        ends = dict(zip(begins, [*begins[1:], n]))
        if any(ends[box[axis][0]] != box[axis][1] for box in found):
            return False
        n_cells *= len(begins)
    return len(found) == n_cells == len({key_of(box) for box in found})


class Divided:
    """An array in host memory in parts: those that were asked for, whole or some rows of them.

    shape, dtype: of the whole array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Sequence[tuple[Box, Array]]) -> None:
        """parts: boxes that do not overlap, and what is in them."""
        self.shape, self.dtype = shape, dtype
        self._parts, self._stored_dtype = parts, dtype
        self._changes: tuple[Callable[[Array], Array], ...] = ()

    def changed(self, change: Callable[[Array], Array], dtype: np.dtype[Any]) -> Divided:
        """The same with something done, element by element, to all that is given. dtype: what that is of then."""
        other = Divided(self.shape, self._stored_dtype, self._parts)
        other.dtype, other._changes = dtype, (*self._changes, change)
        return other

    def box(self, index: Sequence[slice] | None) -> Array:
        """The elements at an index, None: all. A view of the part that has them, if one has; not to be written to."""
        array = self._stored(whole_box(self.shape) if index is None else box_of(index, self.shape))
        for change in self._changes:
            array = change(array)
        return array

    def whole(self) -> Array:
        """All elements."""
        return self.box(None)

    def _stored(self, wanted: Box) -> Array:
        for box, array in self._parts:
            if all(a <= c and d <= b for (a, b), (c, d) in zip(box, wanted, strict=True)):
                view: Array = array[_within(wanted, box)]
                return view
        found: Array = np.empty([end - begin for begin, end in wanted], self._stored_dtype)
        n_filled = 0
        for box, array in self._parts:
            common = shared(box, wanted)
            if common is not None:
                found[_within(common, wanted)] = array[_within(common, box)]
                n_filled += math.prod(end - begin for begin, end in common)
        assert n_filled == found.size  # who made this had asked for all that is asked for here
        return found


def _within(box: Box, outer: Box) -> tuple[Any, ...]:
    """The index of a box in an array of an outer box. It ends in an ellipsis, for an array without axes to stay one."""
    inner = (slice(begin - first, end - first) for (begin, end), (first, _) in zip(box, outer, strict=True))
    return (*inner, ...)
