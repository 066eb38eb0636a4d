"""Which backend codes, and on how many threads: the one table of what the backends are.

The hard thing is to say so once and clearly. What was asked for is checked at once; the native module is looked for at
the first use; and where it is missing the reference works, many times slower, with one warning.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import xxhash

from tricomp import native
from tricomp.bounds import Bytes
from tricomp.dtypes import DType, Words
from tricomp.errors import InvalidArgument
from tricomp.job import DecodeJob, Encoded, EncodeJob, Room, Summed
from tricomp.plan import Spec
from tricomp.reference.digest import digest_end, digest_sum

_log = logging.getLogger("tricomp")
NAMES = ("auto", "native", "reference")
ENVIRONMENT = "TRICOMP_BACKEND"
MOST_THREADS = 1 << 12  # who asks for more has mistaken the argument

FrameToPlan = tuple[Words, Words | None, DType, Sequence[int] | None, Spec, int | None]
"""Words, reference, dtype, shape of the leaf (None: several small ones), spec, mantissa bits kept: see plan_frame."""


@dataclass(frozen=True)
class Backend:
    """What the codec calls of a backend; all but the reference's planner and encoder take threads=.

    plan_frames: frames to plan -> jobs. encode: jobs, room -> Encoded. decode: jobs, into= -> Summed. digest_sums:
    parts of leaves, and the byte of its leaf at which each begins -> what each adds to its digest. seal: buffers ->
    their bytes in a row, and their XXH3 as msgpack has it.
    """

    name: str
    plan_frames: Callable[..., list[EncodeJob]]
    encode: Callable[..., list[Encoded]]
    decode: Callable[..., list[Summed]]
    digest_sums: Callable[..., list[int]]
    seal: Callable[..., bytes]


def _reference() -> Backend:
    """tricomp.reference: on one thread, whatever threads says. Imported where it works alone: that takes a while."""
    from tricomp.reference import decode, encode
    from tricomp.reference.planner import plan_frame

    def summed(jobs: Sequence[DecodeJob], threads: int, into: Sequence[Words] | None) -> list[Summed]:
        def sum_of(job: DecodeJob, words: Words) -> int:
            return digest_sum(words, job.start * words.itemsize)

        return [
            Summed(
                words,
                sum_of(job, words),
                sum_of(job, job.reference) if job.wants_reference_sum and job.reference is not None else None,
            )
            for job, words in zip(jobs, decode.decode(jobs, into), strict=True)
        ]

    def seal(parts: Sequence[Bytes], threads: int) -> bytes:
        check = xxhash.xxh3_64()
        for part in parts:
            check.update(part)
        return b"".join([*parts, b"\xcf", check.digest()])

    return Backend(
        "reference",
        lambda frames, threads: [plan_frame(*frame) for frame in frames],
        lambda jobs, room, threads: encode.encode(jobs, room),
        summed,
        lambda parts, threads: [digest_sum(words, first) for words, first in parts],
        seal,
    )


def _native() -> Backend:
    from tricomp.native import decode, digest, encode, planner

    return Backend("native", planner.plan_frames, encode.encode, decode.decode_summed, digest.digest_sums, encode.seal)


@cache
def _backend(chosen: str) -> Backend:
    """The backend of a name, looked for once. Raises InvalidArgument, which tells how to build it."""
    if chosen == "reference":
        return _reference()
    if chosen == "native":
        native.load()
        return _native()
    if native.is_there():
        return _backend("native")
    _log.warning(
        "the native backend is not there (%s): the reference backend does the work, many times slower. "
        "Install tricomp where there is a C++ compiler, or say backend='reference' to be told no more.",
        native.why_not(),
    )
    return _backend("reference")


@dataclass(frozen=True)
class Engine:
    """A backend by its name (None: what TRICOMP_BACKEND says, else "auto"), and threads (None: one a core).

    "auto" is native where its module is there, else the reference. Raises InvalidArgument for other names, for "native"
    without its module, and for threads that are no number from 1.
    """

    threads: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", _checked(self.threads))
        if _chosen(self.backend) == "native":
            _ = self.coder

    @cached_property
    def n_threads(self) -> int:
        """Threads to work on."""
        return cores() if self.threads is None else self.threads

    @cached_property
    def coder(self) -> Backend:
        """The backend's functions."""
        return _backend(_chosen(self.backend))

    def plan_frames(self, frames: Sequence[FrameToPlan]) -> list[EncodeJob]:
        """A plan for each frame, see plan_frame."""
        return self.coder.plan_frames(frames, threads=self.n_threads)

    def encode(self, jobs: Sequence[EncodeJob], room: Callable[[], Room]) -> list[Encoded]:
        """Encode frames. room: makes the place where the payloads of one frame wait."""
        return self.coder.encode(jobs, room, threads=self.n_threads)

    def decode(self, jobs: Sequence[DecodeJob], into: Sequence[Words] | None = None) -> list[Summed]:
        """The words that each job asks for, in memory of their own, or in that of into, one array a job."""
        return self.coder.decode(jobs, threads=self.n_threads, into=into)

    def digest_sums(self, parts: Sequence[tuple[Words, int]]) -> list[int]:
        """What each part adds to its leaf's digest. parts: uint[n], and the byte, a multiple of 512, of the leaf."""
        return self.coder.digest_sums(parts, threads=self.n_threads)

    def seal(self, parts: Sequence[Bytes]) -> bytes:
        """All parts in a row, and their checksum: a msgpack uint64 of XXH3 with 64 bits."""
        return self.coder.seal(parts, threads=self.n_threads)

    def digests(self, leaves: Sequence[Words]) -> list[int]:
        """The digest of each leaf. leaves: uint[n] each."""
        sums = self.digest_sums([(words, 0) for words in leaves])
        return [digest_end(total, words.nbytes) for total, words in zip(sums, leaves, strict=True)]


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


def digests(leaves: Sequence[Words], threads: int | None = None, backend: str | None = None) -> list[int]:
    """The 64-bit digest of each leaf, FORMAT.md "Digest". leaves: uint[n] each. threads, backend: see Engine."""
    return Engine(threads, backend).digests(leaves)


def digest(words: Words) -> int:
    """The digest of one leaf."""
    return digests([words])[0]


def live() -> dict[str, str]:
    """Backend to what can be said of it: what it runs on, or why it is not there."""
    absent = "none in this version"
    here = f"{native.isa()}, {cores()} threads" if native.is_there() else f"none: {native.why_not()}"
    return {"native": here, "reference": f"numpy {np.__version__}", "triton": absent}


def _chosen(backend: str | None) -> str:
    chosen = backend or os.environ.get(ENVIRONMENT) or "auto"
    if chosen not in NAMES:
        where = "backend" if backend else ENVIRONMENT
        raise InvalidArgument(f"{where}: expected 'auto', 'native' or 'reference', got {chosen!r}.")
    return chosen


def _checked(threads: Any) -> int | None:
    """A number of threads, of whatever integer type it is. Raises InvalidArgument."""
    if threads is None:
        return None
    try:
        number = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        number = 0
    if not 1 <= number <= MOST_THREADS:
        raise InvalidArgument(
            f"threads: expected a number from 1 to {MOST_THREADS}, or None for one a core, got {threads!r:.80}."
        )
    return number
