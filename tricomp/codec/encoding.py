"""Encode Snapshots: leaves to frames, in batches, one batch ahead of whoever writes them.

The hard thing: small leaves must share frames, equal and cast leaves must find each other, and frames must go to the
backend in batches large enough to be fast on all threads, yet small enough to bound memory. Leaves on one device are
coded there together, and never with those of another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, groupby
from typing import Any, Protocol

from tricomp.ahead import ahead
from tricomp.codec.accelerator import device_copy, home_of, host_copy, wait_for
from tricomp.codec.engine import Engine, FrameToPlan
from tricomp.codec.siblings import siblings
from tricomp.dtypes import Words
from tricomp.errors import BackendError, InvalidArgument
from tricomp.job import Encoded, EncodeJob, Side
from tricomp.layout import Leaf, Snapshot
from tricomp.plan import Frame, Plan, Spec
from tricomp.reference.digest import digest_end
from tricomp.spool import Spool

_log = logging.getLogger("tricomp")

SMALL_WORDS = 16_384  # leaves below this share frames
GROUP_WORDS = 65_536  # most words of a shared frame


class Reference(Protocol):
    """Anything that has the words of earlier leaves by path: a Snapshot, an open file.

    One that finds many at a time faster than one by one has find_all too: from paths to a list of what find gives. One
    that can give words on a torch device has on too: from the device to a Reference to its words there.
    """

    def find(self, path: str) -> tuple[Leaf, Words] | None: ...


@dataclass(frozen=True)
class First:
    """Leaves, by path, to encode before all others, and what is called once they are: their words may then change.

    It is called in whatever thread encodes, before the frames have been taken; not if encoding fails.
    """

    paths: Collection[str] = ()
    when_done: Callable[[], None] | None = None


class _Waiting:
    """Which of the leaves of a First are not encoded yet. numbers: of all of them, and of those coded against them."""

    def __init__(self, snapshot: Snapshot, first: First) -> None:
        index = snapshot.layout.index
        self.numbers = {index[path] for path in first.paths if path in index}
        self._left = set(self.numbers)
        self._when_done = first.when_done

    def add(self, tasks: Iterable[_Task]) -> None:
        """Wait for leaves too that are coded against others that somebody waits for: they need their words."""
        found = {i for task in tasks if task.sibling in self.numbers for i in task.leaves}
        self.numbers |= found
        self._left |= found

    def tell(self, done: Iterable[int]) -> None:
        """Some leaves are encoded."""
        self._left.difference_update(done)
        if not self._left and self._when_done is not None:
            when_done, self._when_done = self._when_done, None
            when_done()


@dataclass(frozen=True)
class _Task:
    """A frame to be: its leaves, and the leaf it repeats or rounds, if any."""

    leaves: tuple[int, ...]
    sibling: int | None = None


class _Digests:
    """The digests of a Snapshot's leaves, each told once."""

    def __init__(self, snapshot: Snapshot, engine: Engine) -> None:
        self._snapshot, self._engine = snapshot, engine
        self._known: dict[int, int] = {}

    def of(self, numbers: Iterable[int]) -> list[int]:
        wanted = list(numbers)
        missing = [i for i in wanted if i not in self._known]
        if missing:
            self._known.update(zip(missing, self._engine.digests([self._snapshot.words(i) for i in missing])))
        return [self._known[i] for i in wanted]

    def learn(self, number: int, coded: Encoded) -> None:
        """Take what encoding told of the digest of a frame's one leaf."""
        if coded.digest_sum is not None:
            self._known[number] = digest_end(coded.digest_sum, self._snapshot.words(number).nbytes)


def encode(
    snapshot: Snapshot,
    reference: Reference | None = None,
    spec: Spec | None = None,
    threads: int | None = None,
    backend: str | None = None,
    first: First | None = None,
) -> Generator[Frame, None, None]:
    """Encode every leaf of a Snapshot, exactly once each, in no promised order but for first: see First.

    reference: an earlier Snapshot or open file; leaves that it lacks, or has in another dtype or shape, are coded
    without it. spec: see Spec; with keep_mantissa_bits the leaves are rounded first. threads, backend: see Engine.
    Words on a GPU are coded there, on a stream of its own, after what the current stream has been given by now; they
    must not change until all is taken. A batch is encoded, in a thread, while the frames of the one before are taken:
    close the iterator if not all are taken. Raises InvalidArgument, OutOfDeviceMemory, BackendError.
    """
    groups = _by_home(snapshot)
    engines = [Engine(threads, backend, home) for home in groups]
    for engine in engines:
        _ = engine.coder  # follows what its device has been given
    waiting = _Waiting(snapshot, first or First())
    return _all_frames(snapshot, reference, spec or Spec(), list(zip(engines, groups.values(), strict=True)), waiting)


def _by_home(snapshot: Snapshot) -> dict[Any, list[int]]:
    """Numbers of the leaves on each device, None: the host; of an empty Snapshot the host has none."""
    groups: dict[Any, list[int]] = {}
    for i in range(len(snapshot.layout.leaves)):
        groups.setdefault(home_of(snapshot.buffers[snapshot.layout.places[i].buffer]), []).append(i)
    return groups


def _all_frames(
    snapshot: Snapshot,
    reference: Reference | None,
    spec: Spec,
    groups: Sequence[tuple[Engine, list[int]]],
    waiting: _Waiting,
) -> Generator[Frame, None, None]:
    """The frames of all groups, one after the other, those first that have leaves which somebody waits for."""
    _warn_of_idle(snapshot, spec)
    waiting.tell([])
    for engine, numbers in sorted(groups, key=lambda group: waiting.numbers.isdisjoint(group[1])):
        yield from _frames(snapshot, reference, spec, engine, numbers, waiting)


def _warn_of_idle(snapshot: Snapshot, spec: Spec) -> None:
    for pattern in spec.keep_mantissa_bits:
        if not any(fnmatchcase(leaf.path, pattern) for leaf in snapshot.layout.leaves):
            _log.warning("keep_mantissa_bits: no leaf matches %r, so it rounds nothing", pattern)


def bounded(snapshot: Snapshot, spec: Spec, engine: Engine | None = None) -> Snapshot:
    """The Snapshot with the mantissas of `spec.keep_mantissa_bits` rounded: what a decoder of it will see.

    Rounded leaves are where they were. Raises InvalidArgument when a pattern matches a leaf that is no float.
    """
    if not spec.keep_mantissa_bits:
        return snapshot
    kept = [spec.mantissa_bits_of(leaf.path) for leaf in snapshot.layout.leaves]
    if all(bits is None for bits in kept):
        return snapshot
    words = []
    engines: dict[Any, Engine] = {}
    for i, (leaf, bits) in enumerate(zip(snapshot.layout.leaves, kept, strict=True)):
        if bits is not None and not leaf.dtype.is_float:
            raise InvalidArgument(
                f"leaf {leaf.path!r}: keep_mantissa_bits applies to float leaves, this one is {leaf.dtype.name}. "
                "Narrow the pattern."
            )
        found = snapshot.words(i)
        if bits is not None:
            home = home_of(found)
            worker = engine or engines.setdefault(home, Engine(device=home))
            found = worker.rounded(worker.adopted(found), leaf.dtype, bits)
        words.append(found)
    places = tuple(replace(place, buffer=i, offset=0) for i, place in enumerate(snapshot.layout.places))
    return Snapshot(replace(snapshot.layout, places=places), tuple(words))


def _known_there(reference: Reference | None, engine: Engine) -> Reference | None:
    """The reference with its words where the engine works, if it can give them there."""
    on_device = getattr(reference, "on", None) if engine.is_on_device else None
    known: Reference | None = reference if on_device is None else on_device(engine.device)
    return known


def copied(snapshot: Snapshot, to_host: bool) -> Snapshot:
    """The Snapshot in memory of its own, on the host or where it is. The old memory may change when this returns.

    Raises OutOfDeviceMemory.
    """
    copy = host_copy if to_host else device_copy
    buffers = tuple(copy(buffer) for buffer in snapshot.buffers)
    wait_for(buffers)  # what is not torch's memory may be written to by another stream
    return Snapshot(snapshot.layout, buffers)


def _frames(
    snapshot: Snapshot,
    reference: Reference | None,
    spec: Spec,
    engine: Engine,
    numbers: Sequence[int],
    waiting: _Waiting,
) -> Generator[Frame, None, None]:
    """The frames of some leaves, which are all on one device. Where its backend fails, the host goes on, if it may."""
    try:
        snapshot = _adopted(bounded(snapshot, spec, engine), engine, numbers)
        leaves = snapshot.layout.leaves
        digests = _Digests(snapshot, engine)
        # Asked for once: finding a leaf may mean decoding it.
        small = [i for i in numbers if leaves[i].n_words < SMALL_WORDS]
        known = _known_there(reference, engine)
        found = dict(zip(small, _counterparts([leaves[i] for i in small], known)))
        tasks = _tasks(snapshot, found, siblings(snapshot, numbers, digests.of, engine), spec, numbers)
    except BackendError as error:
        yield from _frames(snapshot, reference, spec, engine.on_host(error), numbers, waiting)
        return
    waiting.add(tasks)
    tasks.sort(key=lambda task: waiting.numbers.isdisjoint(task.leaves))  # stable: others keep their order
    batches = _batches(tasks, leaves, engine.batch_words)

    def encoded() -> Iterator[list[Frame]]:
        nonlocal snapshot, known, digests, engine
        for batch in batches:
            try:
                frames = _encoded(snapshot, known, found, digests, batch, spec, engine)
            except BackendError as error:
                engine = engine.on_host(error)
                snapshot = _adopted(snapshot, engine, numbers)
                known, digests = reference, _Digests(snapshot, engine)
                frames = _encoded(snapshot, known, found, digests, batch, spec, engine)
            waiting.tell(i for task in batch for i in task.leaves)
            yield frames

    if len(batches) < 2:
        yield from chain.from_iterable(encoded())
        return
    with closing(ahead(encoded())) as ready:
        for frames in ready:
            yield from frames


def _adopted(snapshot: Snapshot, engine: Engine, numbers: Sequence[int]) -> Snapshot:
    """The Snapshot with the words of some leaves as the engine takes them."""
    words = {i: snapshot.words(i) for i in numbers}
    taken = {i: engine.adopted(found) for i, found in words.items()}
    if all(taken[i] is words[i] for i in numbers):
        return snapshot
    places = list(snapshot.layout.places)
    buffers = list(snapshot.buffers)
    for i, found in taken.items():
        places[i] = replace(places[i], buffer=len(buffers), offset=0)
        buffers.append(found)
    return Snapshot(replace(snapshot.layout, places=tuple(places)), tuple(buffers))


def _tasks(
    snapshot: Snapshot,
    small_references: Mapping[int, Words | None],
    known: Mapping[int, int],
    spec: Spec,
    numbers: Sequence[int],
) -> list[_Task]:
    """Which leaves form which frames: repeats and casts of a sibling, large leaves alone, small leaves together."""
    leaves = snapshot.layout.leaves
    tasks = [_Task((i,), sibling) for i, sibling in known.items()]
    small: list[int] = []
    for i in numbers:
        if i in known:
            continue
        if leaves[i].n_words >= SMALL_WORDS:
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

    kinds = {i: kind(i) for i in small}
    for _, group in groupby(sorted(small, key=kinds.__getitem__), key=lambda i: kinds[i][:3]):
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


def _batches(tasks: Sequence[_Task], leaves: Sequence[Leaf], most_words: int) -> list[list[_Task]]:
    """Tasks in order, cut into batches of at most so many words, or of one task."""
    batches: list[list[_Task]] = []
    n_pending = 0
    for task in tasks:
        n_words = sum(leaves[i].n_words for i in task.leaves)
        if not batches or n_pending + n_words > most_words:
            batches.append([])
            n_pending = 0
        batches[-1].append(task)
        n_pending += n_words
    return batches


def _encoded(
    snapshot: Snapshot,
    reference: Reference | None,
    found: Mapping[int, Words | None],
    digests: _Digests,
    batch: Sequence[_Task],
    spec: Spec,
    engine: Engine,
) -> list[Frame]:
    """The frames of a batch. found: the reference's words of small leaves."""
    leaves = snapshot.layout.leaves
    large = [i for task in batch for i in task.leaves if i not in found]
    old = {**found, **dict(zip(large, _counterparts([leaves[i] for i in large], reference)))}
    jobs = _jobs(snapshot, old, batch, spec, engine)
    del old
    encoded = _encode_jobs(jobs, engine)
    for task, coded in zip(batch, encoded, strict=True):
        if len(task.leaves) == 1:
            digests.learn(*task.leaves, coded)
    digests.of(i for task in batch for i in task.leaves)  # of the others, all together
    return [
        Frame(task.leaves, coded.plan, tuple(digests.of(task.leaves)), coded.n_bytes, coded.pieces)
        for task, coded in zip(batch, encoded, strict=True)
    ]


def encode_leaf(snapshot: Snapshot, reference: Words | None, spec: Spec, engine: Engine) -> tuple[Frame, int | None]:
    """The frame of a Snapshot of one leaf, and the digest of the reference if the frame was coded against it.

    reference: uint[n_words]. Raises InvalidArgument.
    """
    _warn_of_idle(snapshot, spec)
    snapshot = _adopted(bounded(snapshot, spec, engine), engine, [0])
    (job,) = _jobs(snapshot, {0: reference}, [_Task((0,))], spec, engine)
    if job.reference is not None:
        job = replace(job, wants_reference_sum=True)
    (coded,) = _encode_jobs([job], engine)
    digests = _Digests(snapshot, engine)
    digests.learn(0, coded)
    (digest,) = digests.of([0])
    parent = None
    if coded.plan.reference == "parent" and reference is not None:
        told = coded.reference_sum
        parent = engine.digests([engine.adopted(reference)])[0] if told is None else digest_end(told, reference.nbytes)
    return Frame((0,), coded.plan, (digest,), coded.n_bytes, coded.pieces), parent


def _encode_jobs(jobs: Sequence[EncodeJob], engine: Engine) -> list[Encoded]:
    """Encode; what came out larger than its words, by more than a raw frame would, is raw after all."""
    encoded = engine.encode(jobs, Spool)
    worse = [
        k
        for k, (job, coded) in enumerate(zip(jobs, encoded, strict=True))
        if coded.plan.predict != "raw" and coded.n_bytes > job.words.nbytes + 64 and coded.plan.n_chunks
    ]
    raw = [replace(jobs[k], plan=_raw(jobs[k].plan), side=Side()) for k in worse]
    for k, coded in zip(worse, engine.encode(raw, Spool) if raw else [], strict=True):
        if coded.n_bytes < encoded[k].n_bytes:
            encoded[k] = coded
    return encoded


def _raw(plan: Plan) -> Plan:
    return Plan(plan.dtype, plan.n_words, "raw", chunk_log2=plan.chunk_log2, keep_mantissa_bits=plan.keep_mantissa_bits)


def _counterparts(leaves: Sequence[Leaf], reference: Reference | None) -> list[Words | None]:
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


def _jobs(
    snapshot: Snapshot, old: Mapping[int, Words | None], batch: Sequence[_Task], spec: Spec, engine: Engine
) -> list[EncodeJob]:
    """Plan the frames of a batch. old: the reference's words of each leaf."""
    given: list[FrameToPlan] = []
    for task in batch:
        leaves = [snapshot.layout.leaves[i] for i in task.leaves]
        words = engine.joined([snapshot.words(i) for i in task.leaves])
        parts = [engine.adopted(part) for i in task.leaves if (part := old[i]) is not None]
        parent = engine.joined(parts) if len(parts) == len(leaves) else None
        shape = leaves[0].shape if len(leaves) == 1 else None
        if shape is not None and leaves[0].dtype.words_per_element > 1:
            shape = (*shape, leaves[0].dtype.words_per_element)
        given.append((words, parent, leaves[0].dtype, shape, spec, spec.mantissa_bits_of(leaves[0].path)))
    planned = iter(engine.plan_frames([frame for frame, task in zip(given, batch) if task.sibling is None]))
    return [
        next(planned) if task.sibling is None else _sibling_job(snapshot, frame, task.sibling, engine)
        for frame, task in zip(given, batch, strict=True)
    ]


def _sibling_job(snapshot: Snapshot, frame: FrameToPlan, sibling: int, engine: Engine) -> EncodeJob:
    """How to encode a frame that repeats a sibling or rounds it."""
    words, parent, dtype, _, spec, kept = frame
    if parent is not None and engine.is_equal(parent, words):
        plan = Plan(dtype, len(words), "copy", reference="parent", keep_mantissa_bits=kept)
        return EncodeJob(plan, Side(), words, parent)
    source = snapshot.layout.leaves[sibling].dtype
    plan = Plan(
        dtype,
        len(words),
        "copy" if source == dtype else "cast",
        chunk_log2=spec.chunk_log2,
        reference="sibling",
        sibling=sibling,
        keep_mantissa_bits=kept,
    )
    return EncodeJob(plan, Side(), words, engine.joined([snapshot.words(sibling)]), source)
