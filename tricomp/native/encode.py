"""Encode frames with the extension module. Imports ground and numpy; gives the bytes of `tricomp.reference.encode`.

The hard thing: a frame's directory stands before its chunks and is known after them, so payloads wait in a Room; and a
leaf of many GB must pass through little memory. Chunks are therefore encoded in rounds of at most ROUND_BYTES.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tricomp import native
from tricomp.bounds import Bytes
from tricomp.job import Encoded, EncodeJob, Room
from tricomp.native.plan_numbers import pack
from tricomp.native.side import pack_side

ROUND_BYTES = 32 << 20  # of words encoded in one call
ALIGN = 16

_MOST_KEPT = 2  # outputs of rounds that are kept for the next ones: fresh memory costs as much as coding
_kept: list[np.ndarray[Any, Any]] = []
_lock = threading.Lock()


def encode(jobs: Sequence[EncodeJob], room: Callable[[], Room] = list, threads: int | None = None) -> list[Encoded]:
    """Encode frames. room: makes the place where the payloads of one frame wait. threads: None: one a core.

    Scratch memory: 2.1 MiB a thread, and two outputs of rounds, which are kept for later calls.
    """
    core, n_threads = native.load(), native.n_threads(threads)
    requests = [_request(job) for job in jobs]
    rooms: list[Room] = [room() for _ in jobs]
    rows: list[list[bytes]] = [[] for _ in jobs]
    sides = [b""] * len(jobs)
    n_bytes = [0] * len(jobs)
    sums = [(0, 0)] * len(jobs)
    for members in _rounds(jobs):
        part = [
            (*requests[number], first, n_chunks, jobs[number].wants_reference_sum)
            for number, first, n_chunks in members
        ]
        view = _output(core.room_for(part))
        coded = core.encode(part, view, n_threads)
        is_large = 8 * sum(end - begin for begin, end, *_ in coded) > len(view)  # else little would hold all of it
        for (number, first, _), (begin, end, found, side, added) in zip(members, coded):
            rooms[number].append(view[begin:end] if is_large else bytes(view[begin:end]))
            rows[number].append(found)
            n_bytes[number] += end - begin
            sums[number] = (sums[number][0] + added[0], sums[number][1] + added[1])
            if first == 0:
                sides[number] = side
    return [_assembled(*frame) for frame in zip(jobs, rooms, rows, sides, n_bytes, sums, strict=True)]


def seal(parts: Sequence[Bytes], threads: int | None = None) -> bytes:
    """All parts in a row, and their checksum: a msgpack uint64 of XXH3 with 64 bits."""
    sealed: bytes = native.load().seal(list(parts), native.n_threads(threads))
    return sealed


def _output(n_bytes: int) -> memoryview:
    """Memory for a round: an earlier round's, if nobody has a view of it any more, else new."""
    if n_bytes > 2 * ROUND_BYTES:
        return np.empty(n_bytes, np.uint8).data
    with _lock:
        for i in range(len(_kept)):
            if len(_kept[i]) >= n_bytes and sys.getrefcount(_kept[i]) == 2:  # the list's and the call's
                return _kept[i].data
        _kept.append(np.empty(max(n_bytes, ROUND_BYTES + (1 << 20)), np.uint8))
        del _kept[:-_MOST_KEPT]
        return _kept[-1].data


def _rounds(jobs: Sequence[EncodeJob]) -> list[list[tuple[int, int, int]]]:
    """What to encode in each call: number of the job, first chunk, chunks."""
    rounds: list[list[tuple[int, int, int]]] = []
    left = 0
    for number, job in enumerate(jobs):
        chunk_bytes = job.words.itemsize << job.plan.chunk_log2
        n_most = max(ROUND_BYTES // chunk_bytes, 1)
        n_chunks = job.plan.n_chunks
        for first in range(0, n_chunks, n_most):
            n_now = min(n_most, n_chunks - first)
            n_used = min(n_now * chunk_bytes, job.words.nbytes)
            if not rounds or n_used > left:
                rounds.append([])
                left = ROUND_BYTES
            rounds[-1].append((number, first, n_now))
            left -= n_used
    return rounds


def _request(job: EncodeJob) -> tuple[Any, ...]:
    """A job as the module takes it, but for which chunks."""
    return (
        pack(job.plan, job.source, job.reference is not None),
        *pack_side(job.plan, job.side),
        _flat(job.words),
        None if job.reference is None else _flat(job.reference),
    )


def _flat(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The words themselves where they are contiguous and aligned, else a copy."""
    return np.require(words, requirements=("C", "A"))


def _assembled(
    job: EncodeJob, payloads: Room, rows: list[bytes], side: bytes, n_bytes: int, sums: tuple[int, int]
) -> Encoded:
    """Put the head before the payloads."""
    if not rows:
        return Encoded(job.plan, 0, b"", ())
    directory = b"".join(rows)
    head = side + directory + bytes(-len(directory) % ALIGN)
    plan = replace(job.plan, side_bytes=len(side), side_check=native.load().xxh3_64(head))
    return Encoded(plan, len(head) + n_bytes, head, payloads, sums[0], sums[1] if job.wants_reference_sum else None)
