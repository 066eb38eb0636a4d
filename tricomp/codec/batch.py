"""A batch of frames on its way through a backend: what they are coded against, their plans, their bytes, their digests.

The hard thing is a device's time: it idles while the host plans or waits. So a batch is planned while the bytes of the
one before cross to the host, as far as a stated amount of memory goes; on the host each step is done at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from tricomp.codec.engine import Engine, FrameToPlan
from tricomp.dtypes import Words
from tricomp.errors import OutOfDeviceMemory
from tricomp.job import Coding, Encoded, EncodeJob, Side
from tricomp.layout import Leaf, Snapshot
from tricomp.plan import Frame, Plan, Spec
from tricomp.reference.digest import digest_end
from tricomp.spool import Spool


class Reference(Protocol):
    """Anything that has the words of earlier leaves by path: a Snapshot, an open file.

    One that finds many at a time faster than one by one has find_all too: from paths to a list of what find gives. One
    that can give words on a torch device has on too: from the device to a Reference to its words there.
    """

    def find(self, path: str) -> tuple[Leaf, Words] | None: ...


@dataclass(frozen=True)
class Task:
    """A frame to be: its leaves, and the leaf it repeats or rounds, if any."""

    leaves: tuple[int, ...]
    sibling: int | None = None


class Digests:
    """The digests of a Snapshot's leaves, each told once."""

    def __init__(self, snapshot: Snapshot, engine: Engine) -> None:
        self._snapshot, self._engine = snapshot, engine
        self._known: dict[int, int] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._known

    def of(self, numbers: Iterable[int]) -> list[int]:
        wanted = list(numbers)
        missing = [i for i in wanted if i not in self._known]
        if missing:
            self._known.update(zip(missing, self._engine.digests([self._snapshot.words(i) for i in missing])))
        return [self._known[i] for i in wanted]

    def learn(self, number: int, digest_sum: int | None) -> None:
        """Take what a leaf adds to its digest, where that was told on the way."""
        if digest_sum is not None:
            self._known[number] = digest_end(digest_sum, self._snapshot.words(number).nbytes)


@dataclass(frozen=True)
class Work:
    """What the batches of a Snapshot share. small: the reference's words of small leaves, None where it has none."""

    snapshot: Snapshot
    reference: Reference | None
    small: Mapping[int, Words | None]
    digests: Digests
    spec: Spec
    engine: Engine

    def plan(self, tasks: Sequence[Task]) -> Batch:
        """Plan a batch."""
        batch = Batch(self, tasks)
        batch.plan()
        return batch

    def plan_ahead(self, tasks: Sequence[Task] | None, coded: Batch) -> Batch | None:
        """The same while another is coded, if there is one, and if the device has the memory."""
        if tasks is None or n_words(tasks, self.snapshot.layout.leaves) > self.engine.words_ahead:
            return None
        batch = None
        with suppress(OutOfDeviceMemory):  # it has more when the other is done
            batch = Batch(self, tasks)
        coded.fetch()
        if batch is not None:
            with suppress(OutOfDeviceMemory):
                batch.plan()
                return batch
        return None


class Batch:
    """Frames to be. Begun when it is made; then plan, encode, and ask for what was encoded, or for frames."""

    def __init__(self, work: Work, tasks: Sequence[Task]) -> None:
        self._work, self._tasks = work, tasks
        self._given = _given(work, tasks)
        # What plans do not tell: whether a sibling's repeat is the parent too, and digests of leaves that share frames.
        self._pairs: dict[int, tuple[Words, Words | None]] = {}
        for task, (words, parent, *_) in zip(tasks, self._given, strict=True):
            if task.sibling is not None:
                if parent is not None or task.leaves[0] not in work.digests:
                    self._pairs[task.leaves[0]] = words, parent
            elif len(task.leaves) > 1:
                unknown = [i for i in task.leaves if i not in work.digests]
                self._pairs.update((i, (work.snapshot.words(i), None)) for i in unknown)
        self._compared = work.engine.begin_comparing(list(self._pairs.values()))
        planned = [frame for frame, task in zip(self._given, tasks, strict=True) if task.sibling is None]
        self._planned = work.engine.begin_plans(planned)

    def plan(self) -> None:
        """Wait for what plans are made of, and make them."""
        work = self._work
        planned = iter(self._planned.result())
        compared = dict(zip(self._pairs, self._compared.result(), strict=True))
        for i, one in compared.items():
            work.digests.learn(i, one.digest_sum)
        self._jobs = [
            next(planned)
            if task.sibling is None
            else _sibling_job(work, frame, task.sibling, frame[1] is not None and compared[task.leaves[0]].is_equal)
            for frame, task in zip(self._given, self._tasks, strict=True)
        ]
        del self._given, self._pairs, self._planned, self._compared  # and what they hold

    def encode(self, wants_reference_sums: bool = False) -> None:
        """Begin to encode what is planned."""
        if wants_reference_sums:
            self._jobs = [replace(job, wants_reference_sum=job.reference is not None) for job in self._jobs]
        self._coding: Coding[list[Encoded]] = self._work.engine.begin_encoding(self._jobs, Spool)

    def fetch(self) -> None:
        """Let bytes cross to the host, as soon as there are some."""
        self._coding.fetch()

    def encoded(self) -> list[Encoded]:
        """Wait. What came out larger than its words, by more than a raw frame would, is raw after all."""
        encoded = self._coding.result()
        worse = [
            k
            for k, (job, coded) in enumerate(zip(self._jobs, encoded, strict=True))
            if coded.plan.predict != "raw" and coded.n_bytes > job.words.nbytes + 64 and coded.plan.n_chunks
        ]
        raw = [replace(job, plan=_raw(job.plan), side=Side()) for k in worse for job in [self._jobs[k]]]
        for k, coded in zip(worse, self._work.engine.encode(raw, Spool) if raw else [], strict=True):
            if coded.n_bytes < encoded[k].n_bytes:
                encoded[k] = coded
        del self._jobs, self._coding
        for task, coded in zip(self._tasks, encoded, strict=True):
            if len(task.leaves) == 1:
                self._work.digests.learn(*task.leaves, coded.digest_sum)
        return encoded

    def frames(self) -> list[Frame]:
        """Wait. The frames, with digests."""
        encoded, digests = self.encoded(), self._work.digests
        digests.of(i for task in self._tasks for i in task.leaves)  # all together
        return [
            Frame(task.leaves, coded.plan, tuple(digests.of(task.leaves)), coded.n_bytes, coded.pieces)
            for task, coded in zip(self._tasks, encoded, strict=True)
        ]


def n_words(tasks: Iterable[Task], leaves: Sequence[Leaf]) -> int:
    """Words of some tasks."""
    return sum(leaves[i].n_words for task in tasks for i in task.leaves)


def batches(tasks: Sequence[Task], leaves: Sequence[Leaf], most_words: int) -> Iterator[list[Task]]:
    """Tasks in order, cut into batches of at most so many words, or of one task."""
    batch: list[Task] = []
    n_pending = 0
    for task in tasks:
        n_more = n_words([task], leaves)
        if batch and n_pending + n_more > most_words:
            yield batch
            batch, n_pending = [], 0
        batch.append(task)
        n_pending += n_more
    if batch:
        yield batch


def counterparts(leaves: Sequence[Leaf], reference: Reference | None) -> list[Words | None]:
    """The reference's words of the same leaves, None where it has none of that dtype and shape."""
    if reference is None:
        return [None] * len(leaves)
    find_all = getattr(reference, "find_all", None)
    paths = [leaf.path for leaf in leaves]
    found = [reference.find(path) for path in paths] if find_all is None else find_all(paths)
    return [
        None if other is None or (other[0].dtype, other[0].shape) != (leaf.dtype, leaf.shape) else other[1]
        for leaf, other in zip(leaves, found, strict=True)
    ]


def _given(work: Work, tasks: Sequence[Task]) -> list[FrameToPlan]:
    """What a planner is told of each frame, siblings' included."""
    leaves, engine, spec = work.snapshot.layout.leaves, work.engine, work.spec
    large = [i for task in tasks for i in task.leaves if i not in work.small]
    old = {**work.small, **dict(zip(large, counterparts([leaves[i] for i in large], work.reference)))}
    given: list[FrameToPlan] = []
    for task in tasks:
        mine = [leaves[i] for i in task.leaves]
        words = engine.joined([work.snapshot.words(i) for i in task.leaves])
        parts = [engine.adopted(part) for i in task.leaves if (part := old[i]) is not None]
        parent = engine.joined(parts) if len(parts) == len(mine) else None
        shape = mine[0].shape if len(mine) == 1 else None
        if shape is not None and mine[0].dtype.words_per_element > 1:
            shape = (*shape, mine[0].dtype.words_per_element)
        given.append((words, parent, mine[0].dtype, shape, spec, spec.mantissa_bits_of(mine[0].path)))
    return given


def _sibling_job(work: Work, frame: FrameToPlan, sibling: int, is_parent: bool) -> EncodeJob:
    """How to encode a frame that repeats a sibling or rounds it. is_parent: its words are its parent's."""
    words, parent, dtype, _, spec, kept = frame
    if is_parent:
        plan = Plan(dtype, len(words), "copy", reference="parent", keep_mantissa_bits=kept)
        return EncodeJob(plan, Side(), words, parent)
    source = work.snapshot.layout.leaves[sibling].dtype
    plan = Plan(
        dtype,
        len(words),
        "copy" if source == dtype else "cast",
        chunk_log2=spec.chunk_log2,
        reference="sibling",
        sibling=sibling,
        keep_mantissa_bits=kept,
    )
    return EncodeJob(plan, Side(), words, work.engine.joined([work.snapshot.words(sibling)]), source)


def _raw(plan: Plan) -> Plan:
    return Plan(plan.dtype, plan.n_words, "raw", chunk_log2=plan.chunk_log2, keep_mantissa_bits=plan.keep_mantissa_bits)
