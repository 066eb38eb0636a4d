"""What the speed benchmark packs, who packs it, and the clock. Imports numpy and the public names of tricomp only.

The hard thing is to be fair on a machine that others use too: everybody gets the same bytes and allocates what he
gives back, inputs that are destroyed are made anew before the clock starts, and the repetitions of all contestants
take turns, so that noise hits them alike.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

import tricomp

Array = NDArray[Any]
Raw = NDArray[np.uint8]
Parts = list[Any]
Item = TypeVar("Item")
TIERS: tuple[Literal["dense", "fast"], ...] = ("dense", "fast")


@dataclass(frozen=True)
class Work:
    """Leaves to pack, each by itself, and those they are packed against, if any.

    mode: the prediction it is to show. form: "layers" (stacked over all blocks), "leaves" (as they are) or "one leaf".
    """

    name: str
    mode: str
    form: str
    arrays: tuple[Array, ...]
    references: tuple[Array, ...] | None = None

    @property
    def dtype(self) -> str:
        return self.arrays[0].dtype.name

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def raws(self) -> list[Raw]:
        """The bytes of every leaf; views."""
        return [bytes_of(array) for array in self.arrays]

    @property
    def bases(self) -> list[Raw] | None:
        """The bytes of every reference; views."""
        return None if self.references is None else [bytes_of(array) for array in self.references]


@dataclass(frozen=True)
class Contestant:
    """Somebody who packs leaves. given: makes what pack takes, off the clock. unpack: None where nothing is undone."""

    who: str
    threads: int
    given: Callable[[], Parts]
    pack: Callable[[Parts], Parts]
    unpack: Callable[[Parts], Parts] | None


def bytes_of(array: Array) -> Raw:
    """The bytes of a contiguous array, flat; a view."""
    return array.reshape(-1).view(np.uint8)


def n_cores() -> int:
    """Cores that this run may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(call: Callable[[Parts], Parts], parts: Parts) -> tuple[float, Parts]:
    """Seconds of one call, and what it gave: it is freed by the caller, off the clock."""
    started = time.perf_counter()
    result = call(parts)
    return time.perf_counter() - started, result


def shuffled(items: Sequence[Item], turn: int) -> Sequence[Item]:
    """The same in another order each turn, so that nobody always follows the same one and gets its memory."""
    return random.Random(turn).sample(items, len(items))


def gigabytes_per_second(n_bytes: int, seconds: Sequence[float]) -> float:
    """Of the median run."""
    return float(f"{n_bytes / 1e9 / statistics.median(seconds):.4g}")


def tricomp_of(work: Work, tier: Literal["dense", "fast"], threads: int) -> Contestant:
    """tricomp.encode and decode as they are: planning, checksums and digests included."""
    spec = tricomp.Spec(tier=tier)
    references = work.references or (None,) * len(work.arrays)

    def pack(arrays: Parts) -> Parts:
        return [tricomp.encode(array, base, spec, threads) for array, base in zip(arrays, references, strict=True)]

    def unpack(blobs: Parts) -> Parts:
        return [tricomp.decode(blob, base, threads) for blob, base in zip(blobs, references, strict=True)]

    return Contestant(f"tricomp {tier}", threads, lambda: list(work.arrays), pack, unpack)


def is_exact(work: Work, backs: Parts) -> bool:
    """Whether leaves came back: the bytes of all; of arrays (peers give bare bytes) the dtype and the shape too."""
    for array, raw, back in zip(work.arrays, work.raws, backs, strict=True):
        is_array = isinstance(back, np.ndarray) and back.dtype != np.uint8
        if is_array and (back.dtype, back.shape) != (array.dtype, array.shape):
            return False
        if not np.array_equal(bytes_of(back) if is_array else np.frombuffer(back, np.uint8), raw):
            return False
    return True


@contextmanager
def memcpy_of(work: Work, threads: int) -> Iterator[Contestant]:
    """A copy of the same bytes into memory that is there already, cut into a piece for each thread."""
    pairs = [(raw, np.empty_like(raw)) for raw in work.raws]
    pieces = [
        (raw[start : start + size], copy[start : start + size])
        for raw, copy in pairs
        for size in [max(-(-raw.size // threads), 1)]
        for start in range(0, raw.size, size)
    ]
    with ThreadPoolExecutor(threads) as pool:

        def copy_all(_: Parts) -> Parts:
            if threads == 1:
                for raw, copy in pieces:
                    np.copyto(copy, raw)
            else:
                list(pool.map(lambda piece: np.copyto(piece[1], piece[0]), pieces))
            return [copy for _, copy in pairs]

        yield Contestant("memcpy", threads, list, copy_all, None)
