"""Which backend codes, where and on how many threads: the one table of what the backends are.

The hard thing is to say so once and clearly. What was asked for is checked at once; the native module is looked for at
the first use; and where it is missing the reference works, many times slower, with one warning. Words on a GPU are
coded there where Triton can, else they are copied to the host, with one warning too.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from tricomp import native
from tricomp.bounds import Bytes
from tricomp.codec import accelerator
from tricomp.dtypes import DType, Words
from tricomp.errors import BackendError, InvalidArgument
from tricomp.job import Coding, Compared, DecodeJob, Encoded, EncodeJob, Later, Room, Summed
from tricomp.plan import Spec
from tricomp.reference.bits import is_equal, round_mantissa
from tricomp.reference.digest import digest_end, digest_sum
from tricomp.spool import MEMORY_BYTES, Scratch

_log = logging.getLogger("tricomp")
NAMES = ("auto", "triton", "native", "reference")
ENVIRONMENT = "TRICOMP_BACKEND"
MOST_THREADS = 1 << 12  # who asks for more has mistaken the argument
BATCH_WORDS = 8 << 20  # words encoded at a time; a larger leaf is a batch of its own
THREAD_WORDS = 1 << 19  # words of a batch that keep one thread busy: batches are larger for many threads
DEVICE_BATCH_WORDS = 64 << 20  # of a batch on a GPU: it takes 3,000 chunks to fill one; streams wait in as much memory
_COPY_BYTES = 16 << 20  # copied at a time

Found = TypeVar("Found")
Pairs = Sequence[tuple[Words, Words | None]]
"""Words and those to compare them with; None: there are none."""
FrameToPlan = tuple[Words, Words | None, DType, Sequence[int] | None, Spec, int | None]
"""Words, reference, dtype, shape of the leaf (None: several small ones), spec, mantissa bits kept: see plan_frame."""


@dataclass(frozen=True)
class Backend:
    """What the codec calls of a backend, all with threads= up to digest_sums.

    plan_frames: frames to plan -> jobs, later. encode: jobs, room -> Encoded, later. decode: jobs, into= -> Summed.
    digest_sums: parts of leaves, and the byte of its leaf at which each begins -> what each adds to its digest. seal:
    buffers -> their bytes in a row, and their XXH3 as msgpack has it. What is not about coding: adopted: words as the
    others take them; joined: words one after the other; compare: pairs -> Compared, later; rounded: see round_mantissa;
    strided: of each (words, first, step, most) some words, on the host. batch_words: as many as are best coded at a
    time, by threads. words_ahead: as many may be planned while others are encoded.
    """

    name: str
    plan_frames: Callable[..., Later[list[EncodeJob]]]
    encode: Callable[..., Coding[list[Encoded]]]
    decode: Callable[..., list[Summed]]
    digest_sums: Callable[..., list[int]]
    seal: Callable[..., bytes]
    adopted: Callable[[Any], Words]
    joined: Callable[[Sequence[Words]], Words]
    compare: Callable[[Pairs], Later[list[Compared]]]
    rounded: Callable[[Words, DType, int], Words]
    strided: Callable[[Sequence[tuple[Words, int, int, int]]], list[Words]]
    batch_words: Callable[[int], int]
    words_ahead: int


@dataclass(frozen=True)
class _Now(Generic[Found]):
    """A Later, or a Coding, that is there."""

    found: Found

    def fetch(self) -> None: ...

    def result(self) -> Found:
        return self.found


def _joined(parts: Sequence[Words]) -> Words:
    """Words one after the other, aligned in memory as backends want them; not copied where that can be."""
    if len(parts) > 1:
        return np.concatenate(parts)
    (words,) = parts
    if words.flags.aligned:
        return words
    if words.nbytes <= MEMORY_BYTES:
        return words.copy()
    octets = words.view(np.uint8).data
    with closing(Scratch("leaf", "a large leaf while it is encoded")) as scratch:
        for start in range(0, len(octets), _COPY_BYTES):
            scratch.append(octets[start : start + _COPY_BYTES])
        return np.frombuffer(scratch.read(0, scratch.n_bytes), words.dtype)


def _strided(requests: Sequence[tuple[Words, int, int, int]]) -> list[Words]:
    return [words[first::step][:most] for words, first, step, most in requests]


def _compare(pairs: Pairs) -> Later[list[Compared]]:
    return _Now([Compared(others is not None and is_equal(words, others)) for words, others in pairs])


# What the backends on the host share of a Backend, after seal.
_ON_HOST: tuple[Any, ...] = (
    accelerator.to_host,
    _joined,
    _compare,
    round_mantissa,
    _strided,
    lambda threads: max(BATCH_WORDS, THREAD_WORDS * threads),
    0,
)


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
        lambda frames, threads: _Now([plan_frame(*frame) for frame in frames]),
        lambda jobs, room, threads: _Now(encode.encode(jobs, room)),
        summed,
        lambda parts, threads: [digest_sum(words, first) for words, first in parts],
        seal,
        *_ON_HOST,
    )


def _native() -> Backend:
    from tricomp.native import decode, digest, encode, planner

    return Backend(
        "native",
        lambda frames, threads: _Now(planner.plan_frames(frames, threads)),
        lambda jobs, room, threads: _Now(encode.encode(jobs, room, threads)),
        decode.decode_summed,
        digest.digest_sums,
        encode.seal,
        *_ON_HOST,
    )


def _triton(device: Any, is_host_wanted: bool) -> Backend:
    """The Triton backend on a device, after what its current stream has been given. is_host_wanted: decode to numpy."""
    worker = accelerator.Accelerator(device, is_host_wanted)
    return Backend(
        "triton",
        worker.plan_frames,
        worker.encode,
        worker.decode,
        worker.digest_sums,
        _backend("native").seal,
        worker.adopted,
        worker.joined,
        worker.compare,
        worker.rounded,
        worker.strided,
        lambda threads: DEVICE_BATCH_WORDS,
        DEVICE_BATCH_WORDS,
    )


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

    "auto" is Triton for words on a GPU where it can run; else native where its module is there, else the reference.
    device: of the words, and where words are decoded to, a torch device; None: the host. Raises InvalidArgument for
    other names, for "native" without its module, for "triton" without what it needs, and for threads that are no
    number from 1.
    """

    threads: int | None = None
    backend: str | None = None
    device: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", _checked(self.threads))
        if _chosen(self.backend) in ("native", "triton"):
            _ = self.coder

    @cached_property
    def n_threads(self) -> int:
        """Threads to work on."""
        return cores() if self.threads is None else self.threads

    @cached_property
    def coder(self) -> Backend:
        """The backend's functions."""
        chosen = _chosen(self.backend)
        if chosen == "triton" or (chosen == "auto" and self.device is not None and _can_triton(self.device.type)):
            return _triton(self.device, is_host_wanted=self.device is None)
        return _backend(chosen)

    def at(self, device: Any) -> Engine:
        """The same for words on a device, or one of that name; None: the host. To be asked for each time."""
        return replace(self, device=accelerator.place_of(device))

    @property
    def is_on_device(self) -> bool:
        """Whether it takes and gives words on its device, not on the host."""
        return self.device is not None and self.coder.name == "triton"

    def there(self) -> Engine:
        """The same, if it works on its device. Raises BackendError."""
        if not self.is_on_device:
            why = accelerator.why_not(self.device.type) or f"backend {self.backend!r} was asked for"
            raise BackendError(f"nothing decodes on {self.device}: {why}. Load to the host, and copy.")
        return self

    def on_host(self, why: BackendError) -> Engine:
        """The same on the host, after a failure of the device's backend; raises it again where no other may do it."""
        if self.device is None or _chosen(self.backend) != "auto":
            raise why
        _warn_of_host(str(why))
        return replace(self, backend="native" if native.is_there() else "reference")

    def begin_plans(self, frames: Sequence[FrameToPlan]) -> Later[list[EncodeJob]]:
        """Begin to plan frames: a plan for each, see plan_frame."""
        return self.coder.plan_frames(frames, threads=self.n_threads)

    def plan_frames(self, frames: Sequence[FrameToPlan]) -> list[EncodeJob]:
        """A plan for each frame."""
        return self.begin_plans(frames).result()

    def begin_encoding(self, jobs: Sequence[EncodeJob], room: Callable[[], Room]) -> Coding[list[Encoded]]:
        """Begin to encode frames. room: makes the place where the payloads of one frame wait."""
        return self.coder.encode(jobs, room, threads=self.n_threads)

    def encode(self, jobs: Sequence[EncodeJob], room: Callable[[], Room]) -> list[Encoded]:
        """Encode frames."""
        return self.begin_encoding(jobs, room).result()

    def decode(self, jobs: Sequence[DecodeJob], into: Sequence[Words] | None = None) -> list[Summed]:
        """The words that each job asks for, in memory of their own, or in that of into, one array a job."""
        return self.coder.decode(jobs, threads=self.n_threads, into=into)

    def digest_sums(self, parts: Sequence[tuple[Words, int]]) -> list[int]:
        """What each part adds to its leaf's digest. parts: uint[n], and the byte, a multiple of 512, of the leaf."""
        return self.coder.digest_sums(parts, threads=self.n_threads)

    def adopted(self, words: Any) -> Words:
        """Words where this engine works, and as it takes them: themselves if they are, else a copy."""
        return self.coder.adopted(words)

    def joined(self, parts: Sequence[Words]) -> Words:
        """Words one after the other, where this engine works."""
        return self.coder.joined(parts)

    def begin_comparing(self, pairs: Pairs) -> Later[list[Compared]]:
        """Begin to compare words with others."""
        return self.coder.compare(pairs)

    def are_equal(self, pairs: Sequence[tuple[Words, Words]]) -> list[bool]:
        """Whether two arrays of words are the same, for each pair."""
        return [found.is_equal for found in self.begin_comparing(pairs).result()]

    def rounded(self, words: Words, dtype: DType, kept_bits: int) -> Words:
        """Floats rounded to nearest even at kept_bits of mantissa."""
        return self.coder.rounded(words, dtype, kept_bits)

    def strided(self, requests: Sequence[tuple[Words, int, int, int]]) -> list[Words]:
        """Of each (words, first, step, most) at most so many words from first on, every step'th; on the host."""
        return self.coder.strided(requests)

    @property
    def batch_words(self) -> int:
        """As many words as are best coded at a time."""
        return self.coder.batch_words(self.n_threads)

    @property
    def words_ahead(self) -> int:
        """As many words may be planned while others are encoded: each takes twice its bytes of the device's memory."""
        return self.coder.words_ahead

    def seal(self, parts: Sequence[Bytes]) -> bytes:
        """All parts in a row, and their checksum: a msgpack uint64 of XXH3 with 64 bits."""
        return self.coder.seal(parts, threads=self.n_threads)

    def digests(self, leaves: Sequence[Words]) -> list[int]:
        """The digest of each leaf. leaves: uint[n] each."""
        sums = self.digest_sums([(words, 0) for words in leaves])
        return [digest_end(total, words.nbytes) for total, words in zip(sums, leaves, strict=True)]


@cache
def _can_triton(kind: str) -> bool:
    """Whether Triton can run for words on a kind of torch device; where not, that is told once."""
    why = accelerator.why_not(kind)
    if why and kind != "cpu":
        _warn_of_host(f"no Triton kernel can run: {why}")
    return not why


@cache
def _warn_of_host(why: str) -> None:
    _log.warning("what is on a GPU is copied to the host and coded there, slower: %s", why)


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


def digests(leaves: Sequence[Words], threads: int | None = None, backend: str | None = None) -> list[int]:
    """The 64-bit digest of each leaf, FORMAT.md "Digest". leaves: uint[n] each, wherever they are. See Engine."""
    engine, found = Engine(threads, backend), [0] * len(leaves)
    homes: dict[Any, list[int]] = {}
    for i, words in enumerate(leaves):
        homes.setdefault(accelerator.home_of(words), []).append(i)
    for home, numbers in homes.items():
        worker = engine if home is None else engine.at(home)
        told = worker.digests([worker.adopted(leaves[i]) for i in numbers])
        for i, digest in zip(numbers, told, strict=True):
            found[i] = digest
    return found


def digest(words: Words) -> int:
    """The digest of one leaf."""
    return digests([words])[0]


def live() -> dict[str, str]:
    """Backend to what can be said of it: what it runs on, or why it is not there."""
    here = f"{native.isa()}, {cores()} threads" if native.is_there() else f"none: {native.why_not()}"
    return {"native": here, "reference": f"numpy {np.__version__}", "triton": accelerator.describe()}


def _chosen(backend: str | None) -> str:
    chosen = backend or os.environ.get(ENVIRONMENT) or "auto"
    if chosen not in NAMES:
        where = "backend" if backend else ENVIRONMENT
        raise InvalidArgument(f"{where}: expected 'auto', 'triton', 'native' or 'reference', got {chosen!r}.")
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
