"""The Triton backend as the engine calls it: words on a device to frames and back. Imports the kernels when asked.

Kernels code; what concerns bytes on the host (side sections, checksums, plans from what kernels gathered) is the native
module's. The hard thing is order: work runs on a stream of its own, after all that the caller has launched on the
device, and nobody waits but whoever needs bytes on the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tricomp import native
from tricomp.dtypes import DType, Words
from tricomp.errors import BackendError, InvalidArgument
from tricomp.job import Coding, Compared, DecodeJob, Encoded, EncodeJob, Later, Room, Summed
from tricomp.layout import DeviceArray
from tricomp.native import digest
from tricomp.native.side import read_side, side_bytes
from tricomp.plan import Spec

if TYPE_CHECKING:
    from tricomp.kernels.device import Device
    from tricomp.kernels.encode import Coded, Pending
    from tricomp.kernels.survey import PendingSurvey, Request

FrameToPlan = tuple[Words, Words | None, DType, Sequence[int] | None, Spec, int | None]

_ALIGN = 16  # of words that kernels read
_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and either under Windows


@cache
def why_not(kind: str = "cuda") -> str:
    """Why no Triton kernel can run here, for memory of a kind of torch device; empty if one can."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    if not native.is_there():
        return f"it needs the native module ({native.why_not()})"
    from tricomp.kernels.device import IS_INTERPRETED, gpu_names

    if IS_INTERPRETED:
        return ""
    if not gpu_names():
        return "torch sees no GPU"
    return "" if kind == "cuda" else f"its tensors are on {kind!r}"


def describe() -> str:
    """What the backend runs on, or why it does not, told without importing torch, which takes seconds."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return f"none: {package} is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter, on the CPU"
    if not any(map(os.path.exists, _GPU_NODES)):
        return "none: there is no GPU"
    return f"triton {version('triton')}"


def home_of(words: Any) -> Any:
    """The device on which words are, None for numpy arrays."""
    return None if isinstance(words, np.ndarray) else words.device


def place_of(device: Any) -> Any:
    """A torch device, also if it was given by its name. Raises BackendError if torch is not there to know it."""
    if not isinstance(device, str):
        return device
    if find_spec("torch") is None:
        raise BackendError(f"device {device!r}: torch is not installed. Load to the host, and copy.")
    from tricomp.kernels.device import place_of

    return place_of(device)


def to_host(words: Any) -> Words:
    """Words as a numpy array, copied from the device on which they are."""
    if isinstance(words, np.ndarray):
        return words
    found: Words = words.detach().cpu().numpy()
    return found.view(f"<u{found.itemsize}")


def from_dlpack(array: Any) -> DeviceArray:
    """The DeviceArray that shares an array's memory by DLPack, as a leaf of a tree. Raises UnsupportedDtype."""
    from tricomp.kernels.device import from_dlpack

    return from_dlpack(array)


def host_copy(words: Any) -> Words:
    """Words as a numpy array in memory of its own; pinned where they come from a GPU, so that they go back faster."""
    if isinstance(words, np.ndarray):
        return words.copy()
    from tricomp.kernels.device import Device

    found: Words = Device(words.device).to_host(words, wait=True).array()
    return found.view(f"<u{found.itemsize}")


def device_copy(words: Any) -> Any:
    """Words in memory of their own where they are. Raises OutOfDeviceMemory."""
    if isinstance(words, np.ndarray):
        return words.copy()
    from tricomp.kernels.device import Device

    return Device(words.device).empty(len(words), words.dtype).copy_(words)


def wait_for(buffers: Iterable[Any]) -> None:
    """Let the host wait for what the current stream of each device that words are on was given."""
    for home in {home_of(words) for words in buffers} - {None}:
        from tricomp.kernels.device import Device

        Device(home).event().wait()


class Accelerator:
    """The backend's functions on one device, ordered after what the current stream of the caller has been given."""

    name = "triton"

    def __init__(self, place: Any = None, is_host_wanted: bool = False) -> None:
        """place: a torch device; None: the current GPU, or the CPU under the interpreter. Raises InvalidArgument.

        is_host_wanted: decode to numpy arrays. What is said of Words holds of int tensors here.
        """
        if why_not():
            raise InvalidArgument(
                f"backend 'triton' cannot be used: {why_not()}. Install tricomp[torch] and triton on a machine with a "
                f"GPU, or set TRITON_INTERPRET=1 to run its kernels on the CPU, slowly."
            )
        from tricomp.kernels.device import Device, current_device

        self._is_host_wanted = is_host_wanted
        self.device: Device = Device(current_device() if place is None else place).after_current()

    def adopted(self, words: Any) -> Any:
        """Words on this device, at a multiple of 16 bytes in memory: themselves where they are, else a copy."""
        return self.device.adopted(words, _ALIGN)

    def joined(self, parts: Sequence[Any]) -> Any:
        """Words one after the other."""
        return self.device.joined([self.adopted(part) for part in parts], _ALIGN)

    def compare(self, pairs: Sequence[tuple[Any, Any]]) -> Later[list[Compared]]:
        """Launch comparing words with others, or with none; and their digests."""
        from tricomp.kernels.survey import Request, survey

        requests = [Request(self.adopted(words), None if old is None else self.adopted(old)) for words, old in pairs]
        with self.device.running():
            return _Comparing(requests, survey(requests, self.device) if requests else None)

    def rounded(self, words: Any, dtype: DType, kept_bits: int) -> Any:
        """Floats rounded to nearest even at kept_bits of mantissa, see reference.bits.round_mantissa."""
        from tricomp.kernels.rounding import round_mantissa

        return self.device.given(round_mantissa(self.adopted(words), dtype, kept_bits, self.device))

    def strided(self, requests: Sequence[tuple[Any, int, int, int]]) -> list[Words]:
        """Of each (words, first, step, most): at most so many words from first on, on the host."""
        from tricomp.kernels.survey import Lookup, gather

        if not requests:
            return []
        nothing = np.zeros(1, np.int64)
        places: dict[tuple[int, int, int], Words] = {}  # leaves of a size share them
        lookups = []
        for words, first, step, most in requests:
            key = first, step, min(most, -(-(len(words) - first) // step))
            if key not in places:
                places[key] = first + step * np.arange(max(key[2], 0))
            lookups.append(Lookup(self.adopted(words), places[key], nothing, 1))
        with self.device.running():
            return gather(lookups, self.device).result()

    def digest_sums(self, parts: Sequence[tuple[Any, int]], threads: int) -> list[int]:
        """What each part adds to its leaf's digest."""
        from tricomp.kernels.survey import Request, survey

        requests = [Request(self.adopted(words), first_byte=first) for words, first in parts]
        with self.device.running():
            return [one.digest_sum for one in survey(requests, self.device).result()]

    def plan_frames(self, frames: Sequence[FrameToPlan], threads: int) -> Later[list[EncodeJob]]:
        """Launch what tells how to encode each frame."""
        from tricomp.codec.planning import Planning

        if not frames:
            return _Nothing()
        adopted = [
            (self.adopted(words), None if old is None else self.adopted(old), *rest) for words, old, *rest in frames
        ]
        return Planning(adopted, self.device, threads)

    def encode(self, jobs: Sequence[EncodeJob], room: Callable[[], Room], threads: int) -> Coding[list[Encoded]]:
        """Launch the encoding of frames; their bytes will be in pinned host memory of their own."""
        from tricomp.kernels.encode import DeviceJob, encode

        given = [
            DeviceJob(
                job.plan,
                job.side,
                self.adopted(job.words),
                None if job.reference is None else self.adopted(job.reference),
                job.source,
            )
            for job in jobs
        ]
        with self.device.running():
            return _Encoding(jobs, encode(given, self.device), self.device, threads)

    def decode(self, jobs: Sequence[DecodeJob], threads: int, into: Sequence[Any] | None) -> list[Summed]:
        """Decode frames to the device; into: tensors, or arrays to copy to; None: tensors of their own.

        Gives numpy arrays where the host was asked for. Raises CorruptFrame.
        """
        from tricomp.kernels.decode import decode
        from tricomp.kernels.decode_work import DeviceDecodeJob
        from tricomp.kernels.payload import Stored, sides
        from tricomp.kernels.survey import Request, survey

        if not jobs:
            return []
        known = sides([Stored(job.plan, job.cut, job.name) for job in jobs], read_side)
        references = [None if job.reference is None else self.adopted(job.reference) for job in jobs]
        targets = [
            self.device.target(None if into is None else into[i], job.end - job.start, job.plan.dtype.word_bits // 8)
            for i, job in enumerate(jobs)
        ]
        waiting = [
            DeviceDecodeJob(
                job.plan, side, job.data, target, old, job.source, job.name, job.start, job.stop, job.is_checked
            )
            for job, side, target, old in zip(jobs, known, targets, references, strict=True)
        ]
        with self.device.running():
            decoding = decode(waiting, self.device, partial(digest.checksums, threads=threads))
            # What is decoded is surveyed before anybody knows whether all is well: so the host waits once.
            whole = [
                Request(
                    self.adopted(target),
                    old if job.wants_reference_sum else None,
                    first_byte=job.start * target.element_size(),
                )
                for job, target, old in zip(jobs, targets, references, strict=True)
            ]
            parts = [
                Request(self.adopted(target[start:end]))
                for job, target in zip(jobs, targets, strict=True)
                for start, end in pairwise(accumulate(job.leaf_words, initial=0))
            ]
            found = survey(whole + parts, self.device).result()
            decoding.result()
        of_leaves = iter(found[len(jobs) :])
        wanted = [None] * len(jobs) if into is None else into
        words = [self._handed_over(target, one) for target, one in zip(targets, wanted, strict=True)]
        return [
            Summed(
                new,
                one.digest_sum,
                one.reference_sum if job.wants_reference_sum and job.reference is not None else None,
                [next(of_leaves).digest_sum for _ in job.leaf_words] if job.leaf_words else None,
            )
            for job, new, one in zip(jobs, words, found, strict=False)
        ]

    def _handed_over(self, decoded: Any, wanted: Any) -> Any:
        """What was decoded, where it was wanted."""
        if isinstance(wanted, np.ndarray):
            wanted[...] = to_host(decoded)
            return wanted
        if wanted is not None and wanted is not decoded:
            return wanted.copy_(decoded)
        return to_host(decoded) if self._is_host_wanted else self.device.given(decoded)


class _Nothing:
    """Later, where nothing was asked for."""

    def result(self) -> list[Any]:
        return []


class _Comparing:
    """Words being compared."""

    def __init__(self, requests: Sequence[Request], surveyed: PendingSurvey | None) -> None:
        self._has_others = [request.reference is not None for request in requests]
        self._surveyed = surveyed

    def result(self) -> list[Compared]:
        found = [] if self._surveyed is None else self._surveyed.result()
        return [
            Compared(has_others and one.n_unlike_reference == 0, one.digest_sum)
            for has_others, one in zip(self._has_others, found, strict=True)
        ]


class _Encoding:
    """Frames being encoded."""

    def __init__(self, jobs: Sequence[EncodeJob], pending: Pending, device: Device, threads: int) -> None:
        self._jobs, self._pending, self._device, self._threads = jobs, pending, device, threads

    def fetch(self) -> None:
        with self._device.running():
            self._pending.fetch()

    def result(self) -> list[Encoded]:
        with self._device.running():
            coded = self._pending.result()
        return [_assembled(job, one, self._threads) for job, one in zip(self._jobs, coded, strict=True)]


def _assembled(job: EncodeJob, coded: Coded, threads: int) -> Encoded:
    """The frame of coded chunks: their checksums, and the head before them."""
    rows = coded.rows
    if not len(rows):
        return Encoded(job.plan, 0, b"", (), job.digest_sum, job.reference_sum)
    checks = np.concatenate([digest.checksums(part.payload, part.begins, part.sizes, threads) for part in coded.parts])
    rows[:, 0], rows[:, 1] = checks & np.uint64(0xFFFFFFFF), checks >> np.uint64(32)
    side = side_bytes(job.plan, job.side)
    directory = rows.astype("<u4").tobytes()
    head = side + directory + bytes(-len(directory) % _ALIGN)
    plan = replace(job.plan, side_bytes=len(side), side_check=xxhash.xxh3_64_intdigest(head))
    payloads = [part.payload for part in coded.parts]
    n_bytes = len(head) + sum(map(len, payloads))
    return Encoded(plan, n_bytes, head, payloads, job.digest_sum, job.reference_sum)
