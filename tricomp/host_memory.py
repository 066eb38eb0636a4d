"""Host memory for copies of a state, kept from one save to the next, and the copies into it. Imports numpy only.

The hard thing is what a copy costs: fresh memory comes from the system page by page, for several times the price of the
copy itself. So memory is kept, and several threads copy, which numpy does without the GIL.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ALIGN = 64
_BATCH_BYTES = 4 << 20  # of copies that a thread takes at a time
_MOST_THREADS = 4  # more do not make memory faster


class HostBuffer:
    """Flat host memory that is kept from one copy of a state to the next: who has the last one's arrays sees it change.

    Not for several threads at a time.
    """

    def __init__(self) -> None:
        self._memory: Array | None = None
        self._owner: Array | None = None
        self._n_alone = 0

    @property
    def is_free(self) -> bool:
        """Whether nothing refers to the copies of last time any more; False where the interpreter does not count."""
        return self._owner is None or (self._n_alone > 0 and _n_references(self._owner) == self._n_alone)

    def holds(self, array: Any) -> bool:
        """Whether all of an array, of numpy, stands in this memory."""
        if self._owner is None or not isinstance(array, np.ndarray):
            return False
        begin = array.ctypes.data - self._owner.ctypes.data
        return array.flags.c_contiguous and 0 <= begin <= begin + array.nbytes <= self._owner.nbytes

    def copies(self, arrays: Sequence[Array]) -> list[Array]:
        """A copy of each array in row-major order, one after the other in this memory; all are done on return."""
        made, finish = self.begin(arrays)
        finish()
        return made

    def begin(self, arrays: Sequence[Array]) -> tuple[list[Array], Callable[[], None]]:
        """What copies gives, while other threads may still copy, and what makes sure that all is done."""
        begins = [0]
        for array in arrays:
            begins.append(begins[-1] + -(-array.nbytes // _ALIGN) * _ALIGN)
        memory = self._reserve(begins[-1])
        made = []
        for array, begin in zip(arrays, begins[:-1], strict=True):
            made.append(np.ndarray(array.shape, array.dtype, memory, begin))
        return made, _begin(made, arrays)

    def reserve_as(self, other: HostBuffer) -> None:
        """Get as much memory as another has, from the system too, so that the next copies need not wait for that."""
        if other._memory is not None and (self._memory is None or len(self._memory) < len(other._memory)):
            self._reserve(len(other._memory)).fill(0)

    def release(self) -> None:
        """Let go of the memory."""
        self._memory = self._owner = None

    def _reserve(self, n_bytes: int) -> Array:
        """uint8[n_bytes] at a multiple of 64 bytes: the memory of before, where that is enough."""
        if self._memory is None or len(self._memory) < n_bytes:
            self._memory = self._owner = None  # before there is more
            self._owner = np.empty(n_bytes + _ALIGN, np.uint8)
            begin = -self._owner.ctypes.data % _ALIGN
            self._memory = self._owner[begin : begin + n_bytes]
            self._n_alone = _n_references(self._owner)
        return self._memory[:n_bytes]


def _n_references(array: Array) -> int:
    """References to an array, however this interpreter counts; 0: it does not."""
    return sys.getrefcount(array) if hasattr(sys, "getrefcount") else 0


def _begin(targets: Sequence[Array], sources: Sequence[Array]) -> Callable[[], None]:
    """Copy each source to its target, in several threads where there is much. Returns what helps, and waits."""
    batches = deque(_batches(targets, sources))

    def work() -> None:
        while batches:
            try:
                batch = batches.popleft()
            except IndexError:  # another thread was faster
                return
            _copy_batch(batch)

    waiting = []
    with suppress(RuntimeError):  # the interpreter ends, and no thread can be started
        for _ in range(min(_n_threads(), len(batches)) - 1):
            waiting.append(_threads().submit(work))

    def finish() -> None:
        work()
        for one in waiting:
            one.result()

    return finish


def _batches(targets: Sequence[Array], sources: Sequence[Array]) -> Iterator[list[tuple[Array, Array]]]:
    """Targets and sources in batches of about equal size: large ones cut, small ones together."""
    batch: list[tuple[Array, Array]] = []
    n_bytes = 0
    for target, source in zip(targets, sources, strict=True):
        for piece in _pieces(target, source):
            batch.append(piece)
            n_bytes += piece[1].nbytes
            if n_bytes >= _BATCH_BYTES:
                yield batch
                batch, n_bytes = [], 0
    if batch:
        yield batch


def _pieces(target: Array, source: Array) -> Iterator[tuple[Array, Array]]:
    if source.nbytes <= _BATCH_BYTES or not source.flags.c_contiguous:
        yield target, source
        return
    new, old = target.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)
    for first in range(0, len(old), _BATCH_BYTES):
        yield new[first : first + _BATCH_BYTES], old[first : first + _BATCH_BYTES]


def _copy_batch(batch: Sequence[tuple[Array, Array]]) -> None:
    for target, source in batch:
        # numpy copies dtypes of others, bfloat16 say, one by one and with the GIL
        if source.dtype.isbuiltin != 1 and source.itemsize in (1, 2, 4, 8):
            kind = f"u{source.itemsize}"
            np.copyto(target.view(kind), source.view(kind))
        else:
            np.copyto(target, source)


@cache
def _n_threads() -> int:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(n_cores // 2, _MOST_THREADS), 1)  # of two cores, one alone was measured to fill the memory's bus


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_n_threads(), thread_name_prefix="tricomp-copy")
