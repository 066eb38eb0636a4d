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
from itertools import chain, groupby, zip_longest
from typing import Any

from tricomp.ahead import ahead
from tricomp.codec.accelerator import device_copy, home_of, host_copy, wait_for
from tricomp.codec.batch import Batch, Digests, Reference, Task, Work, batches, counterparts
from tricomp.codec.engine import Engine
from tricomp.codec.siblings import siblings
from tricomp.dtypes import Words
from tricomp.errors import BackendError, InvalidArgument
from tricomp.layout import Snapshot
from tricomp.plan import Frame, Spec
from tricomp.reference.digest import digest_end

_log = logging.getLogger("tricomp")

SMALL_WORDS = 16_384  # leaves below this share frames
GROUP_WORDS = 65_536  # most words of a shared frame


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

    def add(self, tasks: Iterable[Task]) -> None:
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
    close the iterator if not all are taken. On a GPU the next one is planned meanwhile, which takes memory for at most
    64 Mi words that are joined, and as many of the reference. Raises InvalidArgument, OutOfDeviceMemory, BackendError.
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
        digests = Digests(snapshot, engine)
        # Asked for once: finding a leaf may mean decoding it.
        small = [i for i in numbers if leaves[i].n_words < SMALL_WORDS]
        known = _known_there(reference, engine)
        found = dict(zip(small, counterparts([leaves[i] for i in small], known)))
        tasks = _tasks(snapshot, found, siblings(snapshot, numbers, digests.of, engine), spec, numbers)
    except BackendError as error:
        yield from _frames(snapshot, reference, spec, engine.on_host(error), numbers, waiting)
        return
    waiting.add(tasks)
    tasks.sort(key=lambda task: waiting.numbers.isdisjoint(task.leaves))  # stable: others keep their order
    work = Work(snapshot, known, found, digests, spec, engine)
    planned = list(batches(tasks, leaves, engine.batch_words))

    def encoded() -> Iterator[list[Frame]]:
        nonlocal work
        ready: Batch | None = None
        for tasks, following in zip_longest(planned, planned[1:]):
            try:
                batch = ready or work.plan(tasks)
                batch.encode()
                ready = work.plan_ahead(following, batch)
                frames = batch.frames()
            except BackendError as error:
                host = work.engine.on_host(error)
                there = _adopted(work.snapshot, host, numbers)
                work, ready = Work(there, reference, found, Digests(there, host), spec, host), None
                batch = work.plan(tasks)
                batch.encode()
                frames = batch.frames()
            del batch
            waiting.tell(i for task in tasks for i in task.leaves)
            yield frames

    if len(planned) < 2:
        yield from chain.from_iterable(encoded())
        return
    with closing(ahead(encoded())) as done:
        for frames in done:
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
) -> list[Task]:
    """Which leaves form which frames: repeats and casts of a sibling, large leaves alone, small leaves together."""
    leaves = snapshot.layout.leaves
    tasks = [Task((i,), sibling) for i, sibling in known.items()]
    small: list[int] = []
    for i in numbers:
        if i in known:
            continue
        if leaves[i].n_words >= SMALL_WORDS:
            tasks.append(Task((i,)))
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
                tasks.append(Task(tuple(members)))
                members, n_words = [], 0
            members.append(i)
            n_words += leaves[i].n_words
        tasks.append(Task(tuple(members)))
    return tasks


def encode_leaf(snapshot: Snapshot, reference: Words | None, spec: Spec, engine: Engine) -> tuple[Frame, int | None]:
    """The frame of a Snapshot of one leaf, and the digest of the reference if the frame was coded against it.

    reference: uint[n_words]. Raises InvalidArgument.
    """
    _warn_of_idle(snapshot, spec)
    snapshot = _adopted(bounded(snapshot, spec, engine), engine, [0])
    digests = Digests(snapshot, engine)
    batch = Work(snapshot, None, {0: reference}, digests, spec, engine).plan([Task((0,))])
    batch.encode(wants_reference_sums=True)
    (coded,) = batch.encoded()
    (digest,) = digests.of([0])
    parent = None
    if coded.plan.reference == "parent" and reference is not None:
        told = coded.reference_sum
        parent = engine.digests([engine.adopted(reference)])[0] if told is None else digest_end(told, reference.nbytes)
    return Frame((0,), coded.plan, (digest,), coded.n_bytes, coded.pieces), parent
