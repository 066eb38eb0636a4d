"""Decode frames: whole ones, many together, or some words of one. What the container read goes to the backend.

The hard thing is trust: a plan, its leaves, its reference and its bytes come from a file, and are compared with each
other before a backend sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from tricomp.bounds import Bytes, Cut
from tricomp.codec.engine import Engine
from tricomp.codec.siblings import CAST_PAIRS
from tricomp.dtypes import Words
from tricomp.errors import CorruptFrame, WrongReference
from tricomp.job import DecodeJob
from tricomp.layout import Leaf
from tricomp.plan import Plan
from tricomp.reference.digest import digest_end
from tricomp.reference.frame import anatomy, head_bytes


class StoredFrame(NamedTuple):
    """A frame as it stands in a file.

    parent: the reference words of the frame's leaves, one after the other, when plan.reference is "parent". sibling:
    the leaf that plan.sibling numbers and its words, when it is "sibling". is_checked: see DecodeJob.
    """

    leaves: Sequence[Leaf]
    plan: Plan
    data: Bytes | Cut
    parent: Words | None = None
    sibling: tuple[Leaf, Words] | None = None
    is_checked: bool = False


class Decoded(NamedTuple):
    """Words of each leaf of a frame, in memory of their own that they share, and the digest of each leaf.

    parent: the digest of the frame's reference words, where it was wanted.
    """

    words: list[Words]
    digests: list[int]
    parent: int | None = None


def decode(
    leaves: Sequence[Leaf],
    plan: Plan,
    data: Bytes | Cut,
    parent: Words | None,
    sibling: tuple[Leaf, Words] | None,
    threads: int | None = None,
    backend: str | None = None,
) -> list[Words]:
    """Words of each leaf of one frame; see StoredFrame. Raises what decode_many raises."""
    (found,) = decode_many([StoredFrame(leaves, plan, data, parent, sibling)], Engine(threads, backend))
    return found.words


def decode_many(
    frames: Sequence[StoredFrame],
    engine: Engine | None = None,
    into: Sequence[Words] | None = None,
    wants_parents: bool = False,
) -> list[Decoded]:
    """Words and digests of each leaf of each frame. into: arrays to decode to, one for each frame.

    The digests are told, and not compared with any; with wants_parents those of references too. Raises CorruptFrame,
    and WrongReference when a reference is missing or of another size.
    """
    engine = engine or Engine()
    jobs = [
        replace(
            _job(frame, range(frame.plan.n_words)),
            leaf_words=[leaf.n_words for leaf in frame.leaves] if len(frame.leaves) > 1 else (),
            wants_reference_sum=wants_parents and frame.plan.reference == "parent",
        )
        for frame in frames
    ]
    found = engine.decode(jobs, into)
    parts: list[list[Words]] = []
    untold: list[Words] = []
    for frame, whole in zip(frames, found, strict=True):
        ends = accumulate((leaf.n_words for leaf in frame.leaves), initial=0)
        is_alone = len(frame.leaves) == 1
        parts.append([whole.words] if is_alone else [whole.words[start:end] for start, end in pairwise(ends)])
        untold += [] if is_alone or whole.leaf_sums is not None else parts[-1]
    told = iter(engine.digest_sums([(words, 0) for words in untold]) if untold else [])
    decoded = []
    for words, whole in zip(parts, found, strict=True):
        sums = [whole.digest_sum] if len(words) == 1 else whole.leaf_sums or [next(told) for _ in words]
        digests = [digest_end(total, part.nbytes) for total, part in zip(sums, words, strict=True)]
        parent = None if whole.reference_sum is None else digest_end(whole.reference_sum, whole.words.nbytes)
        decoded.append(Decoded(words, digests, parent))
    return decoded


def decode_parts(
    frame: StoredFrame,
    parts: Sequence[range],
    references: Sequence[Words] | None,
    engine: Engine | None = None,
    into: Sequence[Words] | None = None,
) -> list[tuple[Words, int]]:
    """Some words of a frame: those of each of parts, which begins at a chunk and ends at one or at the frame's end.

    frame: but for parent and sibling's words, of which references holds what each part needs; only its head and the
    chunks asked for are read. With each part comes what it adds to the digest of the frame's one leaf, see digest_end.
    into: arrays to decode to, one for each part. Raises what decode_many raises.
    """
    jobs = []
    for i, part in enumerate(parts):
        words = references[i] if references else None
        sibling = None if frame.sibling is None or words is None else (frame.sibling[0], words)
        jobs.append(_job(frame._replace(parent=words, sibling=sibling), part))
    return [(found.words, found.digest_sum) for found in (engine or Engine()).decode(jobs, into)]


def breakdown(plan: Plan, data: Bytes | Cut) -> dict[str, int]:
    """Bytes of a frame by purpose (see report.Breakdown), told from its head. Raises CorruptFrame."""
    head = data[: head_bytes(plan)]
    if len(head) < head_bytes(plan):
        raise CorruptFrame(f"its head should have {head_bytes(plan)} bytes, found {len(head)}")
    return anatomy(plan, head)


def _job(frame: StoredFrame, part: range) -> DecodeJob:
    plan, leaves = frame.plan, frame.leaves
    name = leaves[0].path if leaves else "array"
    n_words = sum(leaf.n_words for leaf in leaves)
    if n_words != plan.n_words or any(leaf.dtype != plan.dtype for leaf in leaves):
        raise CorruptFrame(
            f"frame of {name!r}: its plan is for {plan.n_words} words of {plan.dtype.name}, its leaves have {n_words}"
            f" of {leaves[0].dtype.name if leaves else 'no dtype'}."
        )
    if plan.reference == "none":
        return DecodeJob(plan, frame.data, name=name, start=part.start, stop=part.stop, is_checked=frame.is_checked)
    words, source = (frame.parent, plan.dtype) if plan.reference == "parent" else (None, plan.dtype)
    if plan.reference == "sibling" and frame.sibling is not None:
        words, source = frame.sibling[1], frame.sibling[0].dtype
    if words is None or len(words) != len(part):
        came = "none was given" if words is None else f"{len(words)} came"
        raise WrongReference(
            f"leaf {name!r}: it was encoded against a reference of {len(part)} words, {came}. "
            "Pass the checkpoint that it was saved against."
        )
    pair = (source.name, plan.dtype.name)
    if (pair not in CAST_PAIRS) if plan.predict == "cast" else (source != plan.dtype):
        raise CorruptFrame(f"frame of {name!r}: its reference of {pair[0]} does not fit a leaf of {pair[1]}.")
    return DecodeJob(plan, frame.data, words, source, name, part.start, part.stop, is_checked=frame.is_checked)
