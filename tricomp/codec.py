"""Encode and decode Snapshots: leaves to frames and back. The only importer of the backends.

Imports no framework. The hard thing: small leaves must share frames, equal and cast leaves must find each other, and
frames must go to the backend in batches large enough to be fast, yet small enough to bound memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Protocol

import numpy as np

from tricomp.bounds import Bytes, Cut
from tricomp.dtypes import Words
from tricomp.errors import CorruptFrame, InvalidArgument, WrongReference
from tricomp.job import DecodeJob, EncodeJob, Side
from tricomp.layout import Leaf, Snapshot
from tricomp.plan import Frame, Plan, Spec
from tricomp.reference import decode as _decoder
from tricomp.reference import encode as _encoder
from tricomp.reference.bits import cast, is_equal, round_mantissa
from tricomp.reference.digest import BLOCK_BYTES as DIGEST_BYTES
from tricomp.reference.digest import Digester, digest
from tricomp.reference.frame import anatomy, head_bytes
from tricomp.reference.planner import plan_frame
from tricomp.spool import Spool

__all__ = [
    "DIGEST_BYTES",
    "Digester",
    "Frame",
    "Reference",
    "bounded",
    "breakdown",
    "decode",
    "decode_many",
    "decode_parts",
    "digest",
    "encode",
]

_log = logging.getLogger("tricomp")

SMALL_WORDS = 16_384  # leaves below this share frames
GROUP_WORDS = 65_536  # most words of a shared frame
BATCH_WORDS = 8 << 20  # words encoded at a time; a larger leaf is a batch of its own
_PROBES, _PROBE_WORDS = 4, 16  # samples of a leaf, and words in each, by which casts are recognised
_CAST_PAIRS = {
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float64", "float32"),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
}


class Reference(Protocol):
    """Anything that has the words of earlier leaves by path: a Snapshot, an open file."""

    def find(self, path: str) -> tuple[Leaf, Words] | None: ...


def bounded(snapshot: Snapshot, spec: Spec) -> Snapshot:
    """The Snapshot with the mantissas of `spec.keep_mantissa_bits` rounded: what a decoder of it will see.

    Raises InvalidArgument when a pattern matches a leaf that is no float.
    """
    kept = [spec.mantissa_bits_of(leaf.path) for leaf in snapshot.layout.leaves]
    for pattern in spec.keep_mantissa_bits:
        if not any(fnmatchcase(leaf.path, pattern) for leaf in snapshot.layout.leaves):
            _log.warning("keep_mantissa_bits: no leaf matches %r, so it rounds nothing", pattern)
    if all(bits is None for bits in kept):
        return snapshot
    words = []
    for i, (leaf, bits) in enumerate(zip(snapshot.layout.leaves, kept, strict=True)):
        if bits is not None and not leaf.dtype.is_float:
            raise InvalidArgument(
                f"leaf {leaf.path!r}: keep_mantissa_bits applies to float leaves, this one is {leaf.dtype.name}. "
                "Narrow the pattern."
            )
        words.append(snapshot.words(i) if bits is None else round_mantissa(snapshot.words(i), leaf.dtype, bits))
    places = tuple(replace(place, buffer=i, offset=0) for i, place in enumerate(snapshot.layout.places))
    return Snapshot(replace(snapshot.layout, places=places), tuple(words))


@dataclass(frozen=True)
class _Task:
    """A frame to be: its leaves, and the leaf it repeats or rounds, if any."""

    leaves: tuple[int, ...]
    sibling: int | None = None


def encode(
    snapshot: Snapshot,
    reference: Reference | None = None,
    spec: Spec | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> Iterator[Frame]:
    """Encode every leaf of a Snapshot, exactly once each, in no promised order.

    reference: an earlier Snapshot or open file; leaves that it lacks, or has in another dtype or shape, are coded
    without it. spec: see Spec; with keep_mantissa_bits the leaves are rounded first. threads: unused by the reference
    backend. Raises InvalidArgument.
    """
    _check_backend(backend)
    spec = spec or Spec()
    snapshot = bounded(snapshot, spec)
    leaves = snapshot.layout.leaves
    digests = [digest(snapshot.words(i)) for i in range(len(leaves))]
    pending: list[tuple[_Task, EncodeJob]] = []
    n_pending = 0
    # Asked for once: finding a leaf may mean decoding it.
    found = {i: _counterpart(leaf, reference) for i, leaf in enumerate(leaves) if leaf.n_words < SMALL_WORDS}
    for task in _tasks(snapshot, found, digests, spec):
        old = [found[i] if i in found else _counterpart(leaves[i], reference) for i in task.leaves]
        job = _job(snapshot, old, task, spec)
        if n_pending and n_pending + job.plan.n_words > BATCH_WORDS:
            yield from _flush(pending, digests)
            pending, n_pending = [], 0
        pending.append((task, job))
        n_pending += job.plan.n_words
    yield from _flush(pending, digests)


def _check_backend(backend: str | None) -> None:
    chosen = backend or os.environ.get("TRICOMP_BACKEND") or "auto"
    if chosen not in ("auto", "reference"):
        where = "backend" if backend else "TRICOMP_BACKEND"
        raise InvalidArgument(f"{where}: expected 'auto' or 'reference', got {chosen!r}; this version has no other.")


def _flush(pending: list[tuple[_Task, EncodeJob]], digests: list[int]) -> Iterator[Frame]:
    for (task, job), encoded in zip(pending, _encoder.encode([job for _, job in pending], Spool), strict=True):
        if encoded.plan.predict != "raw" and encoded.n_bytes > job.words.nbytes + 64 and encoded.plan.n_chunks:
            raw = replace(job, plan=_raw(job.plan), side=Side())
            encoded = min(encoded, _encoder.encode([raw], Spool)[0], key=lambda coded: coded.n_bytes)
        yield Frame(task.leaves, encoded.plan, tuple(digests[i] for i in task.leaves), encoded.n_bytes, encoded.pieces)


def _raw(plan: Plan) -> Plan:
    return Plan(plan.dtype, plan.n_words, "raw", chunk_log2=plan.chunk_log2, keep_mantissa_bits=plan.keep_mantissa_bits)


def _tasks(
    snapshot: Snapshot, small_references: Mapping[int, Words | None], digests: list[int], spec: Spec
) -> list[_Task]:
    """Which leaves form which frames: repeats and casts of a sibling, large leaves alone, small leaves together."""
    leaves = snapshot.layout.leaves
    siblings = _siblings(snapshot, digests)
    tasks = [_Task((i,), sibling) for i, sibling in siblings.items()]
    small: list[int] = []
    for i, leaf in enumerate(leaves):
        if i in siblings:
            continue
        if leaf.n_words >= SMALL_WORDS:
            tasks.append(_Task((i,)))
        else:
            small.append(i)

    def kind(i: int) -> tuple[object, ...]:
        leaf = leaves[i]
        return (
            leaf.dtype.number,
            -1 if (kept := spec.mantissa_bits_of(leaf.path)) is None else kept,
            small_references[i] is not None,
            leaf.path.rsplit("/", 1)[-1],
        )

    for _, group in groupby(sorted(small, key=kind), key=lambda i: kind(i)[:3]):
        members: list[int] = []
        n_words = 0
        for i in group:
            if members and n_words + leaves[i].n_words > GROUP_WORDS:
                tasks.append(_Task(tuple(members)))
                members, n_words = [], 0
            members.append(i)
            n_words += leaves[i].n_words
        tasks.append(_Task(tuple(members)))
    return tasks


def _siblings(snapshot: Snapshot, digests: list[int]) -> dict[int, int]:
    """Leaf number to that of an earlier equal leaf, or of a leaf that it is the cast of. No chains."""
    leaves = snapshot.layout.leaves
    found: dict[int, int] = {}
    first_with: dict[tuple[int, int, int], int] = {}
    by_shape: dict[tuple[int, ...], list[int]] = {}  # with the words at the end: a complex element has two
    for i, leaf in enumerate(leaves):
        if leaf.n_bytes < 256:
            continue
        j = first_with.setdefault((digests[i], leaf.dtype.number, leaf.n_words), i)
        if j != i and is_equal(snapshot.words(i), snapshot.words(j)):
            found[i] = j
        else:
            by_shape.setdefault((*leaf.shape, leaf.n_words), []).append(i)
    sources: set[int] = set(found.values())
    for alike in by_shape.values():
        for i, source in _casts(snapshot, [i for i in alike if i not in found], sources).items():
            found[i] = source
            sources.add(source)
    return found


def _casts(snapshot: Snapshot, alike: Sequence[int], sources: Set[int]) -> dict[int, int]:
    """Which of some leaves of one shape are casts of which others, nearly everywhere. No chains; wide before narrow.

    A few words of every leaf, cast to every dtype present, are looked up: the time is linear in the leaves.
    """
    leaves = snapshot.layout.leaves
    targets = {leaves[i].dtype for i in alike}
    if len(targets) < 2:
        return {}
    n_words = leaves[alike[0]].n_words
    probes = [np.arange(k, n_words, max(n_words // _PROBE_WORDS, 1))[:_PROBE_WORDS] for k in range(_PROBES)]
    known: dict[tuple[str, int, bytes], int] = {}
    for j in alike:
        dtype = leaves[j].dtype
        for target in targets:
            if (dtype.name, target.name) in _CAST_PAIRS:
                for k, probe in enumerate(probes):
                    words = cast(snapshot.words(j)[probe], dtype, target)
                    known.setdefault((target.name, k, words.tobytes()), j)
    found: dict[int, int] = {}
    taken = set(sources)
    for i in sorted(alike, key=lambda i: leaves[i].dtype.word_bits):
        words = snapshot.words(i)
        if i in taken:
            continue
        for k, probe in enumerate(probes):
            source = known.get((leaves[i].dtype.name, k, words[probe].tobytes()))
            if source is None or source in found or not words[probe].any():
                continue
            if _is_mostly_cast(snapshot, i, source):
                found[i] = source
                taken.add(source)
                break
    return found


def _is_mostly_cast(snapshot: Snapshot, i: int, source: int) -> bool:
    """Whether leaf i is the cast of leaf source in all but 1 % of some thousand words."""
    words = snapshot.words(i)
    some = slice(None, None, max(len(words) // 4096, 1))
    dtypes = (snapshot.layout.leaves[source].dtype, snapshot.layout.leaves[i].dtype)
    is_other = cast(snapshot.words(source)[some], *dtypes) != words[some]
    return int(np.count_nonzero(is_other)) * 100 <= len(is_other)


def _counterpart(leaf: Leaf, reference: Reference | None) -> Words | None:
    """The reference's words of the same leaf, if dtype and shape are the same."""
    found = None if reference is None else reference.find(leaf.path)
    if found is None or found[0].dtype != leaf.dtype or found[0].shape != leaf.shape:
        return None
    return found[1]


def _job(snapshot: Snapshot, old: Sequence[Words | None], task: _Task, spec: Spec) -> EncodeJob:
    """Plan one frame. old: the reference's words of each of its leaves."""
    leaves = [snapshot.layout.leaves[i] for i in task.leaves]
    words = _joined([snapshot.words(i) for i in task.leaves])
    parent = _joined([part for part in old if part is not None]) if all(part is not None for part in old) else None
    kept = spec.mantissa_bits_of(leaves[0].path)
    if task.sibling is None:
        shape = leaves[0].shape if len(leaves) == 1 else None
        if shape is not None and leaves[0].dtype.words_per_element > 1:
            shape = (*shape, leaves[0].dtype.words_per_element)
        return plan_frame(words, parent, leaves[0].dtype, shape, spec, kept)
    if parent is not None and is_equal(parent, words):
        plan = Plan(leaves[0].dtype, len(words), "copy", reference="parent", keep_mantissa_bits=kept)
        return EncodeJob(plan, Side(), words, parent)
    source = snapshot.layout.leaves[task.sibling]
    plan = Plan(
        leaves[0].dtype,
        len(words),
        "copy" if source.dtype == leaves[0].dtype else "cast",
        chunk_log2=spec.chunk_log2,
        reference="sibling",
        sibling=task.sibling,
        keep_mantissa_bits=kept,
    )
    return EncodeJob(plan, Side(), words, snapshot.words(task.sibling), source.dtype)


def _joined(parts: Sequence[Words]) -> Words:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def decode(
    frame_leaves: Sequence[Leaf],
    plan: Plan,
    data: bytes | memoryview,
    parent: Words | None,
    sibling: tuple[Leaf, Words] | None,
    threads: int | None = None,
    backend: str | None = None,
) -> list[Words]:
    """Words of each leaf of one frame; see decode_many."""
    return decode_many([(frame_leaves, plan, data, parent, sibling)], threads, backend)[0]


def decode_many(
    frames: Sequence[tuple[Sequence[Leaf], Plan, bytes | memoryview, Words | None, tuple[Leaf, Words] | None]],
    threads: int | None = None,
    backend: str | None = None,
) -> list[list[Words]]:
    """Words of each leaf of each frame: (leaves, plan, data, parent, sibling).

    parent: the reference words of the frame's leaves, one after the other, when plan.reference is "parent". sibling:
    the leaf that plan.sibling numbers and its words, when it is "sibling". Digests are not checked here. Raises
    CorruptFrame, and WrongReference when a reference is missing or of another size.
    """
    _check_backend(backend)
    jobs = [_decode_job(*frame) for frame in frames]
    out = []
    for (leaves, *_), words in zip(frames, _decoder.decode(jobs), strict=True):
        ends = np.cumsum([leaf.n_words for leaf in leaves])
        out.append([words[end - leaf.n_words : end] for leaf, end in zip(leaves, ends, strict=True)])
    return out


def decode_parts(
    leaves: Sequence[Leaf],
    plan: Plan,
    data: Bytes | Cut,
    parts: Sequence[range],
    parents: Sequence[Words] | None,
    siblings: Sequence[tuple[Leaf, Words]] | None,
    threads: int | None = None,
    backend: str | None = None,
) -> list[Words]:
    """Some words of a frame: those of each of parts, which begins at a chunk and ends at one or at the frame's end.

    data: of the whole frame; only its head and the chunks asked for are read. parents, siblings: as in decode_many, but
    for each part the words of that part alone. Raises what decode_many raises.
    """
    _check_backend(backend)
    jobs = []
    for i, part in enumerate(parts):
        parent, sibling = parents[i] if parents else None, siblings[i] if siblings else None
        jobs.append(_decode_job(leaves, plan, data, parent, sibling, part))
    return _decoder.decode(jobs)


def breakdown(plan: Plan, data: Bytes | Cut) -> dict[str, int]:
    """Bytes of a frame by purpose (see report.Breakdown), told from its head. Raises CorruptFrame."""
    head = data[: head_bytes(plan)]
    if len(head) < head_bytes(plan):
        raise CorruptFrame(f"its head should have {head_bytes(plan)} bytes, found {len(head)}")
    return anatomy(plan, head)


def _decode_job(
    leaves: Sequence[Leaf],
    plan: Plan,
    data: Bytes | Cut,
    parent: Words | None,
    sibling: tuple[Leaf, Words] | None,
    part: range | None = None,
) -> DecodeJob:
    name = leaves[0].path if leaves else "array"
    n_words = sum(leaf.n_words for leaf in leaves)
    if n_words != plan.n_words or any(leaf.dtype != plan.dtype for leaf in leaves):
        raise CorruptFrame(
            f"frame of {name!r}: its plan is for {plan.n_words} words of {plan.dtype.name}, its leaves have {n_words}"
            f" of {leaves[0].dtype.name if leaves else 'no dtype'}."
        )
    part = range(plan.n_words) if part is None else part
    if plan.reference == "none":
        return DecodeJob(plan, data, name=name, start=part.start, stop=part.stop)
    words, source = (parent, plan.dtype) if plan.reference == "parent" else (None, plan.dtype)
    if plan.reference == "sibling" and sibling is not None:
        words, source = sibling[1], sibling[0].dtype
    if words is None or len(words) != len(part):
        came = "none was given" if words is None else f"{len(words)} came"
        raise WrongReference(
            f"leaf {name!r}: it was encoded against a reference of {len(part)} words, {came}. "
            "Pass the checkpoint that it was saved against."
        )
    pair = (source.name, plan.dtype.name)
    if (pair not in _CAST_PAIRS) if plan.predict == "cast" else (source != plan.dtype):
        raise CorruptFrame(f"frame of {name!r}: its reference of {pair[0]} does not fit a leaf of {pair[1]}.")
    return DecodeJob(plan, data, words, source, name, part.start, part.stop)
