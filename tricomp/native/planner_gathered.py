"""Plan frames whose words lie on another device: where to gather words, and plans from these and from facts. Imports
ground and numpy; decides as `tricomp.native.planner` does from whole arrays.

The hard thing: what is gathered must be all that planning may read, known from sizes alone; so the module that plans
lists it, and the numbers of a request stand in the order of planner_module.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tricomp import native
from tricomp.dtypes import DType
from tricomp.job import Gathered, Lattice, Side
from tricomp.native.planner import pack_request, unpack_result
from tricomp.plan import Plan, Spec

_FACTS = struct.Struct("<8Q")


def lattices(
    n_words: int, dtype: DType, shape: Sequence[int] | None, has_reference: bool, has_means: bool = False
) -> list[Lattice]:
    """What planning may read of a frame, the sample first; or, where it is less, one lattice of all words in order.

    has_means: the caller gathers means where they are enough, see Lattice; else words. What is found is kept.
    """
    return list(_lattices(n_words, dtype, None if shape is None else tuple(shape), has_reference, has_means))


@lru_cache(maxsize=256)
def _lattices(
    n_words: int, dtype: DType, shape: tuple[int, ...] | None, has_reference: bool, has_means: bool
) -> tuple[Lattice, ...]:
    facts = _FACTS.pack(n_words, has_reference, *[0] * 6)
    found = native.load().lattices((pack_request(dtype, shape, Spec()), facts), has_means)
    return tuple(
        Lattice(use, np.frombuffer(rows, np.int64), np.frombuffer(columns, np.int64), *rest)
        for use, rows, columns, *rest in found
    )


def commonest(frames: Sequence[Gathered], threads: int | None = None) -> list[int | None]:
    """Of each frame the word that a sparse plan would be told by; None where there is none, or it seems hopeless.

    n_unlike_commonest must then say how many words of the frame differ from it, before its plan is made.
    """
    requests = [_request(frame) for frame in frames]
    found: list[int | None] = native.load().commonest_words(requests, native.n_threads(threads))
    return found


def plan_gathered(frames: Sequence[Gathered], threads: int | None = None) -> list[tuple[Plan, Side]]:
    """Choose how to encode each frame, see plan_frames. Raises ValueError where sizes or counts do not fit."""
    requests = [_request(frame) for frame in frames]
    results = native.load().plan_gathered(requests, native.n_threads(threads))
    return [
        unpack_result(frame.n_words, frame.dtype, frame.spec, frame.keep_mantissa_bits, *result)
        for frame, result in zip(frames, results)
    ]


def _request(frame: Gathered) -> tuple[Any, ...]:
    facts = frame.facts
    numbers = _FACTS.pack(
        frame.n_words,
        facts.n_unlike_reference is not None,
        facts.first,
        facts.n_unlike_first,
        facts.n_unlike_reference or 0,
        facts.joined,
        frame.n_unlike_commonest is not None,
        frame.n_unlike_commonest or 0,
    )
    places = [number for one in frame.lattices for number in (one.use, one.n_columns, one.is_mean)]
    reference = None if frame.reference is None else tuple(map(_flat, frame.reference))
    return (
        pack_request(frame.dtype, frame.shape, frame.spec),
        numbers,
        struct.pack(f"<{len(places)}Q", *places),
        tuple(map(_flat, frame.words)),
        reference,
    )


def _flat(words: Any) -> Any:
    return None if words is None else np.require(words, requirements=("C", "A"))
