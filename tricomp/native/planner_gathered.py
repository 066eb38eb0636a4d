"""Plan frames whose words lie on another device: where to gather words, and plans from these and from facts. Imports
ground and numpy; decides as `tricomp.native.planner` does from whole arrays.

The hard thing: what is gathered must be all that planning reads, and little; so the module that plans lists it: what is
read of every frame, known from sizes alone, then what these words promise something of. The numbers of a request stand
in the order of planner_module.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tricomp import native
from tricomp.dtypes import DType
from tricomp.job import Gathered, Lattice, Side
from tricomp.native.planner import pack_request, unpack_result
from tricomp.plan import Plan, Spec

_FACTS = struct.Struct("<8Q")


class Wanted(NamedTuple):
    """What the plan of a frame needs besides.

    lattices: more places to gather. commonest: a word; how many of all words differ from it is to be counted.
    """

    lattices: tuple[Lattice, ...]
    commonest: int | None


def lattices(n_words: int, dtype: DType, shape: Sequence[int] | None, has_reference: bool) -> list[Lattice]:
    """What is read of every frame, the sample first; or, where that is less, one lattice of all words in order.

    Much less than a large frame. What is found is kept for later calls.
    """
    return list(_lattices(n_words, dtype, None if shape is None else tuple(shape), has_reference))


@lru_cache(maxsize=1024)
def _lattices(n_words: int, dtype: DType, shape: tuple[int, ...] | None, has_reference: bool) -> tuple[Lattice, ...]:
    facts = _FACTS.pack(n_words, has_reference, *[0] * 6)
    return _unpack(native.load().lattices((pack_request(dtype, shape, Spec()), facts)))


def _unpack(found: list[tuple[Any, ...]]) -> tuple[Lattice, ...]:
    return tuple(
        Lattice(use, np.frombuffer(rows, np.int64), np.frombuffer(columns, np.int64), *rest)
        for use, rows, columns, *rest in found
    )


def wanted(frames: Sequence[Gathered], threads: int | None = None, has_means: bool = False) -> list[Wanted]:
    """What the plan of each frame may need besides, now that its `lattices` are gathered: of most nothing.

    has_means: the caller gathers means where they are enough, see Lattice; else words.
    """
    requests = [_request(frame) for frame in frames]
    found = native.load().plan_wants(requests, has_means, native.n_threads(threads))
    return [Wanted(_unpack(more), word) for more, word in found]


def plan_gathered(frames: Sequence[Gathered], threads: int | None = None) -> list[tuple[Plan, Side]]:
    """Choose how to encode each frame, see plan_frames; each has got what was `wanted`.

    Raises ValueError where it has not, or where sizes or counts do not fit.
    """
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
