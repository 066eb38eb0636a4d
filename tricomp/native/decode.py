"""Decode frames with the extension module. Imports ground and numpy; gives the words of `tricomp.reference.decode`, and
its errors, text by text.

The hard thing: bytes may be hostile. The module checks every length against the bytes at hand and says what is wrong
in numbers; the texts are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tricomp import native
from tricomp.bounds import Bytes
from tricomp.dtypes import Words
from tricomp.errors import CorruptFrame
from tricomp.job import DecodeJob, Summed
from tricomp.native import side
from tricomp.native.plan_numbers import pack
from tricomp.plan import Plan

_ADVICE = "Restore the file from another copy, or list a store's intact steps: tricomp verify FOLDER."
_NOTHING = np.zeros(0, np.uint8)
LARGE_BYTES = 2 << 20  # a large page: fresh memory in small ones costs more than decoding

# In the order of ChunkFault in chunk.h.
_CHUNK_FAULTS = (
    "",
    "checksum {0:016x} stored, {1:016x} computed",
    "its sections are longer than its payload",
    "its sections are shorter than its payload",
    "its row of the directory says more than that it is raw",
    "it is not raw as its plan says",
    "an index is outside the dictionary",
    "byte plane {0} is in an unknown mode",
    "a patch is outside the chunk",
    "its patches are not ascending",
    "its symbols do not end where an encoder begins",
    "a block shift exceeds the word",
    "a lane of its remainders has no first word",
    "its remainders do not end where an encoder begins",
    "the padding after it is not zero",
)


def decode(jobs: Sequence[DecodeJob], threads: int | None = None, into: Sequence[Words] | None = None) -> list[Words]:
    """The words that each job asks for. into: arrays to put them in. Raises CorruptFrame, naming chunk and frame."""
    return [found.words for found in decode_summed(jobs, threads, into)]


def decode_summed(
    jobs: Sequence[DecodeJob], threads: int | None = None, into: Sequence[Words] | None = None
) -> list[Summed]:
    """The same, each with the sum of its words' digest, at the place where they stand in their frame."""
    core, n_threads = native.load(), native.n_threads(threads)
    out: list[Words] = []
    for number, job in enumerate(jobs):
        target = None if into is None else into[number]
        words, n_stored = _room(job, target), len(job.cut)
        if job.plan.n_chunks == 0 and n_stored:
            raise CorruptFrame(f"frame of {job.name!r}: {n_stored} bytes where its plan leaves none.")
        out.append(words)
    waiting = [number for number, job in enumerate(jobs) if job.plan.n_chunks and job.start < job.end]
    empty = [number for number, job in enumerate(jobs) if job.plan.n_chunks and job.start >= job.end]
    known = [number for number, job in enumerate(jobs) if not job.plan.n_chunks]
    requests = [_request(jobs[number], out[number]) for number in waiting]
    found = core.decode(requests, n_threads) if requests else []
    if isinstance(found, tuple):
        raise _fault(jobs[waiting[found[2]]], *found)
    sums = [(0, 0)] * len(jobs)
    for number, added in zip(waiting, found, strict=True):
        sums[number] = added
    if known:
        parts = [(out[number].view(np.uint8), jobs[number].start * out[number].itemsize) for number in known]
        for number, total in zip(known, core.digest_sums(parts, n_threads), strict=True):
            sums[number] = (total, total)  # a reference here is what was copied
    for number in empty:
        _check_head(jobs[number])
    return [
        Summed(words, total, reference if job.wants_reference_sum and job.reference is not None else None)
        for job, words, (total, reference) in zip(jobs, out, sums, strict=True)
    ]


def _room(job: DecodeJob, target: Words | None) -> Words:
    """The words where the plan alone gives them, else room for them, earned by the frame's directory."""
    plan, n_words = job.plan, job.end - job.start
    if plan.n_chunks and _head_bytes(plan) > len(job.cut):
        raise CorruptFrame(f"frame of {job.name!r}: {plan.n_words} words need a longer chunk directory than it has.")
    words = _fresh(n_words, plan.dtype.word_dtype) if target is None else target
    if plan.predict == "constant":
        words[...] = plan.word
    elif plan.predict == "copy":
        assert job.reference is not None
        words[...] = job.reference
    return words


def _fresh(n_words: int, dtype: np.dtype[Any]) -> Words:
    """Memory for words; where it is large, from the beginning of a large page on, and in large pages."""
    n_bytes = n_words * dtype.itemsize
    if n_bytes < LARGE_BYTES:
        return np.empty(n_words, dtype)
    room = np.empty(n_bytes + LARGE_BYTES, np.uint8)
    first = -room.__array_interface__["data"][0] % LARGE_BYTES
    words: Words = room[first : first + n_bytes].view(dtype)
    native.load().advise(words)
    return words


def _row_bytes(plan: Plan) -> int:
    return 4 * (6 + len(plan.plane_widths))


def _head_bytes(plan: Plan) -> int:
    """Bytes before the first chunk: side section and directory."""
    n_bytes = plan.n_chunks * _row_bytes(plan)
    return plan.side_bytes + -(-n_bytes // 16) * 16


def _request(job: DecodeJob, words: Words) -> tuple[Any, ...]:
    """A job as the module takes it. Of data that is read as it is asked for, the head and the chunks wanted alone."""
    plan, data = job.plan, job.cut
    head: Bytes
    payloads: Bytes
    if isinstance(data, memoryview):
        head, payloads, at = data, data, 0
    else:
        head = data[: _head_bytes(plan)]
        at, stop = _span(job, head)
        payloads = data[at:stop]
    reference = None if job.reference is None else np.require(job.reference, requirements=("C", "A"))
    numbers = pack(plan, job.source, job.reference is not None)
    flags = job.wants_reference_sum, job.is_checked
    return numbers, head, payloads, at, len(data), reference, words, job.start, job.end, *flags


def _span(job: DecodeJob, head: Bytes) -> tuple[int, int]:
    """Where the chunks that a job asks for stand in its frame; nothing where the head is too short to tell."""
    plan, n_stored = job.plan, len(job.cut)
    if len(head) < _head_bytes(plan):
        return 0, 0
    rows = np.frombuffer(head, "<u4", plan.n_chunks * _row_bytes(plan) // 4, plan.side_bytes)
    sizes = rows.reshape(plan.n_chunks, -1)[:, 2].astype(np.int64)
    ends = _head_bytes(plan) + np.cumsum(-(-sizes // 16) * 16)
    first, last = job.start >> plan.chunk_log2, (job.end - 1) >> plan.chunk_log2
    begin = int(ends[first] - -(-sizes[first] // 16) * 16)
    # With the padding after the last one, where another chunk follows.
    return begin, min(int(ends[last]), n_stored)


def _check_head(job: DecodeJob) -> None:
    """A job that asks for no words still needs a sound head."""
    head = job.cut[: _head_bytes(job.plan)]
    if len(head) < _head_bytes(job.plan) or native.load().xxh3_64(head) != job.plan.side_check:
        raise CorruptFrame(f"frame of {job.name!r}: its side section or directory is damaged. {_ADVICE}")


def _fault(job: DecodeJob, stage: int, code: int, _: int, chunk: int, *details: int) -> CorruptFrame:
    """What the module found, in words."""
    if stage == 3:
        return CorruptFrame(f"chunk {chunk} of {job.name!r}: {_CHUNK_FAULTS[code].format(*details)}. {_ADVICE}")
    if stage == 2:
        return side.fault(code, job.name)
    if code == 1:
        return CorruptFrame(f"frame of {job.name!r}: its side section or directory is damaged. {_ADVICE}")
    return CorruptFrame(f"frame of {job.name!r}: its chunks end at byte {details[0]} of {details[1]}. {_ADVICE}")
