"""Damaged frames: sound ones of every kind, and what can go wrong with each. Imports numpy, xxhash and tricomp.

The hard thing: checksums catch nearly all damage, so most of it is done behind them: what was changed is given right
checksums again, and the checks inside are reached, as they would be by a file that somebody made on purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from tests import golden_cases
from tests.cases import decayed, moments, weights
from tricomp import dtypes
from tricomp.dtypes import DType
from tricomp.errors import TricompError
from tricomp.job import DecodeJob, EncodeJob, Side
from tricomp.plan import Plan, Spec
from tricomp.reference import encode as encoder
from tricomp.reference.bits import cast
from tricomp.reference.frame import aligned, directory, directory_shape, head_bytes, places
from tricomp.reference.lanes import padded
from tricomp.reference.pack import packed_bytes
from tricomp.reference.planner import plan_frame

Array = np.ndarray[Any, Any]
NUMBERS = (0, 1, 15, 16, 127, 0xFFF, 1 << 15, 1 << 28, (1 << 28) + 1, 2 << 28, 3 << 28, 1 << 31, (1 << 32) - 1)
SPECS = (Spec(chunk_log2=10), Spec(tier="fast", chunk_log2=10))
OCTETS = (0, 1, 0x7F, 0x80, 0xFF)
CASTS = (
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float64", "float32"),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
)


@dataclass(frozen=True)
class Sound:
    """A frame as the reference wrote it."""

    name: str
    job: EncodeJob
    plan: Plan
    data: bytes

    def decode_job(self, plan: Plan | None = None, data: bytes | None = None) -> DecodeJob:
        chosen, found = plan or self.plan, self.data if data is None else data
        return DecodeJob(chosen, found, self.job.reference, self.job.source, self.name)


def _jobs() -> Iterator[tuple[str, EncodeJob]]:
    """Plans by hand, what the planner makes of every dtype and tier, and predictions that are nothing but patches."""
    yield from golden_cases.jobs()
    for name in dtypes.NAMES:
        dtype = dtypes.by_name(name)
        old = golden_cases.words(dtype, 2500, 3 * dtype.number)
        new = golden_cases.moved(old, dtype, 7)
        for spec in SPECS:
            for known in (None, old):
                job = plan_frame(new, known, dtype, (25, 100), spec)
                yield f"{name} {spec.tier}: {job.plan.describe()}", job
    v, w = moments((30, 80)), weights((30, 80))
    few = golden_cases.noise(2400, 3) % np.uint64(5) * np.uint64(77)
    states: tuple[tuple[str, str, Array, Array | None], ...] = (
        ("v", "float32", v, None),
        ("v later", "float32", decayed(v), v),
        ("w", "float32", w, None),
        ("few", "uint64", few, None),
    )
    for label, name, now, before in states:
        dtype = dtypes.by_name(name)
        words = now.reshape(-1).view(dtype.word_dtype)
        reference = None if before is None else before.reshape(-1).view(dtype.word_dtype)
        for spec in SPECS:
            job = plan_frame(words, reference, dtype, (30, 80), spec)
            yield f"{label} {spec.tier}: {job.plan.describe()}", job
    for source_name, name in CASTS:
        source, dtype = dtypes.by_name(source_name), dtypes.by_name(name)
        wide = golden_cases.words(source, 2100, 9)
        narrow = cast(wide, source, dtype)
        narrow[::300] ^= narrow.dtype.type(1)
        plan = Plan(dtype, 2100, "cast", chunk_log2=10, reference="sibling")
        yield f"{source_name} to {name}", EncodeJob(plan, Side(), narrow, wide, source)
    for name in ("uint8", "bfloat16", "float32", "int64"):
        yield from _patched(dtypes.by_name(name))


def _patched(dtype: DType) -> Iterator[tuple[str, EncodeJob]]:
    words = golden_cases.words(dtype, 2100, 11)
    zeros = np.zeros_like(words)
    zeros[::77] = words[::77]
    plan = Plan(dtype, 2100, "raw", chunk_log2=10)
    yield f"{dtype.name} raw", EncodeJob(plan, Side(), words)
    yield f"{dtype.name} sparse", EncodeJob(replace(plan, predict="sparse"), Side(), zeros)
    changed = replace(plan, predict="sparse", reference="parent")
    yield f"{dtype.name} sparse of a reference", EncodeJob(changed, Side(), words ^ zeros, words)
    yield f"{dtype.name} constant", EncodeJob(replace(plan, predict="constant", word=9), Side(), zeros * 0 + 9)
    yield f"{dtype.name} copy", EncodeJob(replace(plan, predict="copy", reference="parent"), Side(), words, words)


@functools.cache
def sound() -> list[Sound]:
    """Frames of every kind, of some kilobytes each, three chunks mostly."""
    names, jobs = zip(*_jobs())
    encoded = encoder.encode(jobs)
    return [Sound(name, job, coded.plan, coded.data) for name, job, coded in zip(names, jobs, encoded, strict=True)]


def with_checks(plan: Plan, data: bytes | bytearray) -> tuple[Plan, bytes]:
    """The same frame with right checksums of its chunks, as far as they lie in it, and of its head."""
    out = bytearray(data)
    n_head = head_bytes(plan)
    n_chunks, n_fields = directory_shape(plan)
    if plan.n_chunks == 0 or n_head > len(out):
        return plan, bytes(out)
    rows = directory(plan, bytes(out[:n_head])).copy()
    begins, _ = places(plan, rows)
    for number, begin in enumerate(begins.tolist()):
        payload = bytes(out[begin : begin + int(rows[number, 2])])
        checksum = xxhash.xxh3_64_intdigest(payload)
        rows[number, 0], rows[number, 1] = checksum & 0xFFFFFFFF, checksum >> 32
    out[plan.side_bytes : plan.side_bytes + 4 * n_chunks * n_fields] = rows.astype("<u4").tobytes()
    return replace(plan, side_check=xxhash.xxh3_64_intdigest(bytes(out[:n_head]))), bytes(out)


def _scribbled(rng: np.random.Generator, data: bytes | bytearray, begin: int, end: int) -> bytearray:
    """Bits flipped, bytes or a run of bytes set, somewhere in [begin, end)."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(begin, end))
        kind = rng.integers(3)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        else:
            n = 1 if kind == 1 else min(int(rng.integers(1, 40)), end - at)
            out[at : at + n] = bytes([int(rng.choice(OCTETS))]) * n
    return out


def damaged(frame: Sound, seed: int, n: int) -> Iterator[DecodeJob]:
    """About n damaged forms of a frame, fewer where it has no chunks."""
    rng = np.random.default_rng(seed)
    plan, data = frame.plan, frame.data
    for _ in range(1 + n // 8):
        yield from _planned(rng, frame)
    if not plan.n_chunks:
        yield frame.decode_job(plan, b"\0")
        return
    n_head = head_bytes(plan)
    for _ in range(1 + n // 16):  # these the checksums catch
        yield frame.decode_job(plan, bytes(_scribbled(rng, data, 0, len(data))))
        yield frame.decode_job(plan, data[: int(rng.integers(len(data)))])
        yield frame.decode_job(plan, data + bytes(int(rng.integers(1, 40))))
    for _ in range(1 + n // 4):
        yield frame.decode_job(*with_checks(plan, _scribbled(rng, data, n_head, len(data))))
    for _ in range(1 + n // 8):
        if plan.side_bytes:
            yield frame.decode_job(*with_checks(plan, _scribbled(rng, data, 0, plan.side_bytes)))
            yield frame.decode_job(*with_checks(plan, _hostile_vector(rng, plan, data)))
    for _ in range(1 + n // 8):
        yield frame.decode_job(*with_checks(plan, _forged(rng, plan, data)))
        yield frame.decode_job(*with_checks(plan, _spliced(rng, plan, data)))
        if plan.remainder == "stack":
            yield frame.decode_job(*with_checks(plan, _stacked(rng, plan, data)))


def _hostile_vector(rng: np.random.Generator, plan: Plan, data: bytes) -> bytearray:
    """The side section with one byte, a number of two or of four bytes at the extremes."""
    out = bytearray(data)
    width = int(rng.choice([1, 2, 4]))
    at = int(rng.integers(max(plan.side_bytes - width, 1)))
    out[at : at + width] = int(rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
    return out


def _forged(rng: np.random.Generator, plan: Plan, data: bytes) -> bytearray:
    """A field of the directory near what it was, or at the extremes; or bytes in the padding."""
    out = bytearray(data)
    n_chunks, n_fields = directory_shape(plan)
    n_used = 4 * n_chunks * n_fields
    if rng.random() < 0.1 and n_used % 16:
        out[plan.side_bytes + n_used] = 1
        return out
    at = plan.side_bytes + 4 * int(rng.integers(n_chunks) * n_fields + rng.integers(2, n_fields))
    old = int.from_bytes(out[at : at + 4], "little")
    new = rng.choice([old + 1, old - 1, old + 8, old - 8, old ^ 1 << 28, *NUMBERS]) % (1 << 32)
    out[at : at + 4] = int(new).to_bytes(4, "little")
    return out


def _spliced(rng: np.random.Generator, plan: Plan, data: bytes) -> bytearray:
    """Payloads of two chunks exchanged with their rows, or one of them with some bytes taken out, doubled or put in."""
    n_head = head_bytes(plan)
    rows = directory(plan, data[:n_head]).copy()
    begins, _ = places(plan, rows)
    payloads = [data[begin : begin + int(row[2])] for begin, row in zip(begins.tolist(), rows)]
    one, other = (int(i) for i in rng.integers(len(payloads), size=2))
    kind = rng.integers(4)
    if kind == 0:
        payloads[one], payloads[other] = payloads[other], payloads[one]
        rows[[one, other]] = rows[[other, one]]
    else:
        payload = payloads[one]
        n = min(int(rng.choice([1, 2, 4, 16, 64, 128])), len(payload))
        at = int(rng.integers(len(payload) - n + 1))
        part = {1: b"", 2: payload[at : at + n] * 2, 3: payload[at : at + n] + bytes(n)}[int(kind)]
        payloads[one] = payload[:at] + part + payload[at + n :]
        rows[one, 2] = len(payloads[one])
    padding = bytes([int(rng.random() < 0.05)])  # it is zero, and no checksum covers it
    body = b"".join(payload + padding * (-len(payload) % 16) for payload in payloads[:-1]) + payloads[-1]
    head = data[: plan.side_bytes] + rows.astype("<u4").tobytes()
    return bytearray(head + bytes(aligned(len(head)) - len(head)) + body)


def _stacked(rng: np.random.Generator, plan: Plan, data: bytes) -> bytearray:
    """The first bytes of a stack of remainders, where shifts and heads stand, at the extremes."""
    out = bytearray(data)
    rows = directory(plan, data[: head_bytes(plan)])
    begins, end = places(plan, rows)
    number = int(rng.integers(len(rows)))
    n_words = min(1 << plan.chunk_log2, plan.n_words - (number << plan.chunk_log2))
    n_symbols = 128 + aligned(2 * int(rows[number, 4]))
    if plan.entropy == "index":
        n_symbols = packed_bytes(padded(n_words), plan.index_bits)
    at = min(int(begins[number]) + n_symbols + int(rng.integers(4)), end - 1)
    n = min(int(rng.choice([1, 2, 4, 16, 40])), end - at)
    out[at : at + n] = bytes([int(rng.choice(OCTETS))]) * n
    return out


def _planned(rng: np.random.Generator, frame: Sound) -> Iterator[DecodeJob]:
    """Another plan for the same bytes, if a plan can be that and the reference still has the words that it wants."""
    wire = frame.plan.to_wire()
    keys = ["n", "p", "c", "r", "e", "ns", "b", "pb", "nc", "cb", "cs", "k", "sg", "nk", "ks", "f", "ib", "m", "t"]
    key = str(rng.choice([*keys, "bs", "cp", "w", "sb", "sc", "d"]))
    old = wire.get(key, 0)
    wire[key] = int(rng.choice([old + 1, old - 1, old ^ 1, 0, 1, 2, 3, 4, 5, 7, 8, 11, 255, 1 << 12, 1 << 16]))
    try:
        plan = Plan.from_wire(wire, frame.name)
    except TricompError:
        return
    n_words = 0 if frame.job.reference is None else len(frame.job.reference)
    wanted = plan.reference != "none" and (
        n_words != plan.n_words or plan.dtype.word_bits != frame.plan.dtype.word_bits
    )
    is_cast = plan.predict == "cast" and (plan.dtype.name != frame.plan.dtype.name or frame.job.source is None)
    if wanted or is_cast or plan.n_words > 1 << 20:
        return  # a codec never asks a backend for these
    plan, data = with_checks(plan, frame.data)
    job = frame.decode_job(plan, data)
    if plan.reference == "none":
        job = replace(job, reference=None, source=None)
    yield job
