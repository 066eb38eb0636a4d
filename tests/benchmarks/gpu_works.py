"""What the GPU benchmark packs: streams of a trained GPT on the device, and how they are coded there, step by step.

Imports torch, tricomp and its kernels. The hard thing is to time what the device does and nothing else, yet what is
timed must be what users get: plans are the codec's, frames are compared with what comes back, and the whole way from
tensors to host bytes and back is timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from tests.benchmarks.gpu_device import NotingDevice, TimedDevice, timed
from tests.benchmarks.gpu_peers import seconds_of, synchronise
from tests.benchmarks.gpu_training import Kept
from tricomp import codec, dtypes
from tricomp.codec import Engine, Frame, StoredFrame
from tricomp.job import Encoded, EncodeJob, Tables
from tricomp.kernels.decode import DeviceDecodeJob
from tricomp.kernels.decode import decode as decode_there
from tricomp.kernels.encode import DeviceJob
from tricomp.kernels.encode import encode as encode_there
from tricomp.kernels.frame import kind_of
from tricomp.layout import DeviceArray, Snapshot, snapshot_of
from tricomp.plan import Spec
from tricomp.reference.entropy import normalise

_CARRIERS = {2: torch.int16, 4: torch.int32}
SMALL_WORDS = 16_384  # smaller leaves share frames: left out here, they are less than 1 % of a model


@dataclass(frozen=True)
class Work:
    """Leaves to pack together, on the device, and those they are packed against, if any. mode: what it is to show."""

    name: str
    dtype: str
    mode: str
    leaves: dict[str, torch.Tensor]
    old: dict[str, torch.Tensor] | None = None

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.leaves.values())

    def snapshot(self) -> Snapshot:
        return _snapshot(self.leaves, self.dtype)

    def parent(self) -> Snapshot | None:
        return None if self.old is None else _snapshot(self.old, self.dtype)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All words one after the other, and those of the reference."""
        return _joined(self.leaves), None if self.old is None else _joined(self.old)


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """The words of a tensor, flat; a view."""
    return tensor.reshape(-1).view(_CARRIERS[tensor.element_size()])


def _snapshot(leaves: dict[str, torch.Tensor], dtype: str) -> Snapshot:
    arrays = [DeviceArray(dtypes.by_name(dtype), tuple(t.shape), words_of(t)) for t in leaves.values()]
    return snapshot_of(list(leaves), arrays)


def _joined(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([words_of(tensor) for tensor in leaves.values()])


def works(kept: Kept, least_words: int, most_words: int) -> Iterator[Work]:
    """Every stream, dtype and mode; each is made when it is asked for. kept: steps s, s + 1, s + 10, a later one."""
    first, after_1, after_10, last = kept.states

    def stream(step: int, kind: str, dtype: str) -> dict[str, torch.Tensor]:
        found = kept.states[step][kind]
        return {
            name: t.to(getattr(torch, dtype)) for name, t in found.items() if least_words <= t.numel() <= most_words
        }

    for dtype in ("bfloat16", "float32"):
        for kind in "wmv":
            yield Work(f"{kind} {dtype}", dtype, "full", stream(last, kind, dtype))
        base = stream(first, "w", dtype)
        yield Work(f"w {dtype}, 1 apart", dtype, "delta", stream(after_1, "w", dtype), base)
        yield Work(f"w {dtype}, 10 apart", dtype, "delta", stream(after_10, "w", dtype), base)
        moments = stream(after_10, "v", dtype), stream(first, "v", dtype)
        yield Work(f"v {dtype}, 10 apart", dtype, "scaled_delta", *moments)
        yield Work(f"w {dtype}, unchanged", dtype, "copy", {k: t.clone() for k, t in base.items()}, base)
        yield Work(f"w {dtype}, 0.1 % changed", dtype, "sparse", _some_changed(base), base)


def _some_changed(leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One word in a thousand moved by a few percent."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in leaves.items():
        generator = torch.Generator(tensor.device).manual_seed(len(found))
        chosen = torch.rand(tensor.shape, generator=generator, device=tensor.device) < 1e-3
        found[name] = torch.where(chosen, tensor * 1.05, tensor)
    return found


@dataclass(frozen=True)
class Packed:
    """A Work with plans, and its frames."""

    jobs: list[EncodeJob]
    frames: list[Encoded]
    data: list[bytes]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.data))


def planned(work: Work, spec: Spec, engine: Engine) -> list[EncodeJob]:
    """How the codec would encode each leaf, in memory of the device."""
    snapshot, parent = work.snapshot(), work.parent()
    frames = []
    for i, leaf in enumerate(snapshot.layout.leaves):
        old = None if parent is None else engine.adopted(parent.words(i))
        frames.append((engine.adopted(snapshot.words(i)), old, leaf.dtype, leaf.shape, spec, None))
    return engine.plan_frames(frames)


def far_jobs(jobs: Sequence[EncodeJob]) -> list[DeviceJob]:
    """What the encoder on the device takes."""
    return [DeviceJob(job.plan, job.side, job.words, job.reference, job.source) for job in jobs]  # type: ignore[arg-type]


def packed(jobs: list[EncodeJob], engine: Engine) -> Packed:
    """The frames of some jobs."""
    frames = engine.encode(jobs, list)
    return Packed(jobs, frames, [frame.data for frame in frames])


def decode_jobs(found: Packed) -> tuple[list[DeviceDecodeJob], list[torch.Tensor]]:
    """What the decoder on the device takes, with poisoned targets, and those."""
    given: list[Any] = found.jobs
    targets = [torch.full_like(job.words, 0x5A) for job in given]
    if targets:
        synchronise(targets[0].device)  # whoever decodes has a stream of its own
    jobs = [
        DeviceDecodeJob(
            one.plan,
            job.side,
            data,
            target,
            job.reference,
            job.source,
            is_checked=True,
        )
        for one, job, data, target in zip(found.frames, given, found.data, targets, strict=True)
    ]
    return jobs, targets


def is_exact(work: Work, targets: Sequence[torch.Tensor]) -> bool:
    """Whether decoded words are those of the leaves."""
    return all(torch.equal(words_of(t), back) for t, back in zip(work.leaves.values(), targets, strict=True))


def measure_device(work: Work, found: Packed, device: TimedDevice, n_runs: int) -> dict[str, Any]:
    """GB/s of the device alone both ways, and ms of each kernel. The caller has proved the round trip."""
    jobs = far_jobs(found.jobs)
    spent_in, kernels_in = timed(device, lambda on: encode_there(jobs, on), n_runs)
    waiting, _ = decode_jobs(found)
    spent_out, kernels_out = timed(device, lambda on: decode_there(waiting, on), n_runs)
    return {
        "in": _rate(work, spent_in),
        "out": _rate(work, spent_out),
        "kernels_in": _milliseconds(kernels_in),
        "kernels_out": _milliseconds(kernels_out),
    }


def _rate(work: Work, seconds: float) -> float | None:
    """None: no kernel was needed."""
    return float(f"{work.n_bytes / 1e9 / seconds:.4g}") if seconds else None


def _milliseconds(kernels: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e3, 4) for name, seconds in kernels.items()}


def measure_whole(
    work: Work, spec: Spec, engine: Callable[[], Engine], device: torch.device, n_runs: int
) -> tuple[dict[str, Any], bool]:
    """GB/s from tensors to host bytes and back, all of the codec included; and whether what came back is exact."""
    snapshot, parent = work.snapshot(), work.parent()
    leaves = snapshot.layout.leaves
    frames: list[tuple[Frame, bytes]] = []
    stored: list[StoredFrame] = []
    backs: list[codec.Decoded] = []

    def pack() -> None:
        made = codec.encode(snapshot, parent, spec, backend="triton")
        frames[:] = [(frame, b"".join(frame.pieces())) for frame in made]

    def unpack() -> None:
        backs[:] = codec.decode_many(stored, engine())

    spent_in = seconds_of(pack, device, n_runs)
    for frame, data in frames:
        numbers, plan = frame.leaves, frame.plan
        old: Any = None
        if plan.reference == "parent" and parent is not None:
            parts: list[Any] = [parent.words(i) for i in numbers]
            old = parts[0] if len(parts) == 1 else torch.cat(parts)
        sibling = (leaves[plan.sibling], snapshot.words(plan.sibling)) if plan.reference == "sibling" else None
        stored.append(StoredFrame([leaves[i] for i in numbers], plan, data, old, sibling))
    spent_out = seconds_of(unpack, device, n_runs)
    for (frame, _), back in zip(frames, backs, strict=True):
        for i, words, digest, known in zip(frame.leaves, back.words, back.digests, frame.digests, strict=True):
            came, wanted = cast(torch.Tensor, words), cast(torch.Tensor, snapshot.words(i))
            if digest != known or not torch.equal(came, wanted):
                return {}, False
    n_bytes = sum(len(data) for _, data in frames)
    return {"in": _rate(work, spent_in), "out": _rate(work, spent_out), "bytes": n_bytes}, True


def one_of_each(jobs: Sequence[EncodeJob]) -> list[EncodeJob]:
    """Of jobs whose kernels are the same, the smallest."""
    found: dict[object, EncodeJob] = {}
    for job in sorted(jobs, key=lambda job: len(job.words)):
        plan = job.plan
        kind = kind_of(plan, job.reference is not None, job.source)
        found.setdefault((kind, plan.coded_planes, plan.n_words % (1 << plan.chunk_log2) == 0), job)
    return list(found.values())


def note_encoding(jobs: Sequence[EncodeJob], device: NotingDevice) -> None:
    """Note which kernels will encode."""
    with device.running():
        encode_there(far_jobs(jobs), device)


def note_decoding(found: Packed, device: NotingDevice) -> None:
    """Note which kernels will decode."""
    with device.running():
        decode_there(decode_jobs(found)[0], device)


def with_prob_bits(job: EncodeJob, prob_bits: int) -> EncodeJob | None:
    """The same job with tables of other precision; None where a table has too many symbols for it, or there is none."""
    tables = job.side.tables
    if tables is None:
        return None
    planes = {number: _renormalised(one, prob_bits) for number, one in job.side.plane_tables.items()}
    main = _renormalised(tables, prob_bits)
    if main is None or None in planes.values():
        return None
    side = replace(job.side, tables=main, plane_tables={n: one for n, one in planes.items() if one is not None})
    return replace(job, plan=replace(job.plan, prob_bits=prob_bits), side=side)


def _renormalised(tables: Tables, prob_bits: int) -> Tables | None:
    freqs = np.asarray(tables.freqs)
    if ((freqs > 0).sum(axis=1) > 1 << prob_bits - 1).any():
        return None
    return Tables(np.stack([normalise(row, prob_bits) for row in freqs]), prob_bits)
