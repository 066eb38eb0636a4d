"""snapshot: a copy of what flatten gave, done when it returns, so that the next step may be given the arrays' memory.

Imports numpy, the codec and the adapter's trees; no jax. The hard thing is what a copy costs: fresh memory comes from
the system page by page, for several times the price of the copy itself. So host memory is kept from save to save, in
a HostBuffer, and several threads copy, which numpy does without the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from tricomp import codec, dtypes
from tricomp import tree as plain_trees
from tricomp.layout import DeviceArray, snapshot_of
from tricomp_jax.arrays import Array
from tricomp_jax.trees import Flat

_ALIGN = 64
_BATCH_BYTES = 4 << 20  # of copies that a thread takes at a time
_MOST_THREADS = 4  # more do not make memory faster

Copy = tuple[Array, Array]  # where to, where from


class HostBuffer:
    """Flat host memory that is kept from one snapshot to the next. Whoever has the last one's arrays sees it change."""

    def __init__(self) -> None:
        self._memory: Array | None = None

    def reserve(self, n_bytes: int) -> Array:
        """uint8[n_bytes] at a multiple of 64 bytes: the memory of before, where that is enough."""
        if self._memory is None or len(self._memory) < n_bytes:
            self._memory = None  # before there is more
            memory = np.empty(n_bytes + _ALIGN, np.uint8)
            self._memory = memory[-memory.ctypes.data % _ALIGN :]
        return self._memory[:n_bytes]


def snapshot(flat: Flat, buffer: HostBuffer | None = None) -> Flat:
    """Copy every leaf of a flattened tree: those of the host into the buffer, those of a GPU to fresh memory of it.

    jax must have computed the arrays. What jax put together for flatten alone, an array that was sharded, is nobody
    else's and is not copied again. buffer: None: fresh memory. Returns when all is copied. Raises UnsupportedDtype and
    UnsupportedNode, naming the path; OutOfDeviceMemory, with nothing changed: then encode flat while nothing changes.
    """
    structure, paths, leaves = plain_trees.flatten(flat.tree)
    done = _device_copies(paths, leaves)
    kinds = flat.notes.get("kinds", {})
    begins: dict[int, int] = {}
    n_bytes = 0
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if i in done:
            continue
        dtypes.of(leaf, path)  # what holds objects cannot be copied as bytes
        if type(leaf) is not np.ndarray:
            done[i] = leaf.copy()  # with what its class adds, which the core judges
        elif leaf.flags.owndata and not leaf.flags.writeable and kinds.get(path) != "ndarray":
            done[i] = leaf
        else:
            begins[i] = n_bytes
            n_bytes += -(-leaf.nbytes // _ALIGN) * _ALIGN
    memory = (HostBuffer() if buffer is None else buffer).reserve(n_bytes)
    copies: list[Copy] = []
    for i, begin in begins.items():
        source = leaves[i]
        done[i] = memory[begin : begin + source.nbytes].view(source.dtype).reshape(source.shape)
        copies.append((done[i], source))
    _copy(copies)
    return Flat(plain_trees.unflatten(structure, [done[i] for i in range(len(leaves))]), flat.notes)


def _device_copies(paths: Sequence[str], leaves: Sequence[Any]) -> dict[int, Any]:
    """Copies of the leaves that are on a device, by their numbers. Waits for them. Raises OutOfDeviceMemory."""
    far = [i for i, leaf in enumerate(leaves) if isinstance(leaf, DeviceArray)]
    if not far:
        return {}
    held = codec.copied(snapshot_of([paths[i] for i in far], [leaves[i] for i in far]), to_host=False)
    return {i: replace(leaves[i], words=words) for i, words in zip(far, held.buffers, strict=True)}


def _copy(copies: Sequence[Copy]) -> None:
    """Make copies, in several threads where they are large."""
    batches = _batches(copies)
    if len(batches) < 2 or _n_threads() < 2:
        for batch in batches:
            _copy_batch(batch)
        return
    waiting = []
    try:
        for batch in batches:
            waiting.append(_threads().submit(_copy_batch, batch))
    except RuntimeError:  # the interpreter ends, and no thread can be started
        for batch in batches[len(waiting) :]:
            _copy_batch(batch)
    for one in waiting:
        one.result()


def _batches(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Copies in batches of about equal size: large ones cut, small ones together."""
    batches: list[list[Copy]] = [[]]
    room = _BATCH_BYTES
    for target, source in copies:
        pieces = [(target, source)]
        if source.nbytes > _BATCH_BYTES and source.flags.c_contiguous:
            flat, new = source.reshape(-1), target.reshape(-1)
            step = _BATCH_BYTES // source.itemsize
            pieces = [(new[first : first + step], flat[first : first + step]) for first in range(0, flat.size, step)]
        for piece in pieces:
            if room <= 0:
                batches.append([])
                room = _BATCH_BYTES
            batches[-1].append(piece)
            room -= piece[1].nbytes
    return batches


def _copy_batch(batch: Sequence[Copy]) -> None:
    for target, source in batch:
        np.copyto(target, source)


@cache
def _n_threads() -> int:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_cores, _MOST_THREADS)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_n_threads(), thread_name_prefix="tricomp-snapshot")
