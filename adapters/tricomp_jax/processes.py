"""The steps of a run of several processes: each writes its own parts into a Store of its own, and waits for no other.

The hard thing: processes save, prune and die at different instants, and at each of them the last step that counts, see
sets.py, must stay. So a policy is asked for what is there of all processes, not for what one of them has.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from threading import RLock
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import tricomp
from tricomp.chain import Keep
from tricomp.errors import InvalidArgument, MissingStep, StorageError, StoreLocked, TricompError, UnsupportedNode
from tricomp.notes import without_notes
from tricomp_jax import arrays
from tricomp_jax.checkpoints import Restored
from tricomp_jax.files import with_notes
from tricomp_jax.joined import SHARDS, Joined
from tricomp_jax.parts import box_of, key_of
from tricomp_jax.sets import RUN, Sets, folder_of
from tricomp_jax.targets import restore
from tricomp_jax.trees import NOTES_KEY, Flat, children, flatten, unflatten

_log = logging.getLogger("tricomp")
Path = str | os.PathLike[str]


def is_shared(url: Path, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether several processes have written steps into a run's folder. Raises StorageError."""
    options = {"storage_options": storage_options}
    return len(Sets(tricomp.Store(url, storage_options=storage_options).url, options).folders()) > 1


class InProcesses:
    """Checkpoints of a run in which jax has several processes, each of which makes one of these; see Checkpoints.

    An array on devices of several processes is saved by all of them: each part by the process that has its first copy.
    Everything else, plain values and arrays of one process, is saved as process 0 has it, and restored to all.

    Retention policies are asked for steps that all processes have written; each process prunes its own files. A step
    that is replaced by overwrite=True does not count while some processes have replaced it and others have not.
    """

    def __init__(self, url: Path, options: Mapping[str, Any] | None = None) -> None:
        """url: of the run's folder. options: keyword arguments of tricomp.Store, for this process's own."""
        options = dict(options or {})
        self.url = tricomp.Store(url, **options).url  # which checks the options
        self.number, self.n_processes = jax.process_index(), jax.process_count()
        self.sets = Sets(self.url, options)
        self._policies: Sequence[Keep] = options.pop("keep", ())
        keep = [_KeptByAll(self, is_mine=True)] if self._policies else []
        mine = self.sets.at(folder_of(self.number, self.n_processes))
        self._store = tricomp.Store(mine, keep=keep, **options)
        self._saved: set[int] = set()
        self._lock = RLock()  # saving is another thread's

    def flatten(self, tree: Any) -> Flat:
        """What this process saves of a pytree: its parts, and on process 0 all that is in no parts.

        The first call of this or of claim waits for the other processes: all agree on what to call this run.
        """
        run = self._run
        shards: dict[str, list[int]] = {}

        def own(value: jax.Array, path: str) -> _Own:
            return _Own(self._own_of(value, path, shards))

        flat = flatten(tree, own)
        notes = {**flat.notes, RUN: run, **({SHARDS: shards} if shards else {})}
        if self.number:
            notes.pop("kinds", None)  # of what process 0 saves
        return Flat(self._stripped(flat.tree), notes)

    def claim(self, step: int, overwrite: bool) -> None:
        """See Checkpoints."""
        _ = self._run  # before anything is raised: the other processes wait for it
        self._store.claim()
        if not (overwrite or self._is_left_over(step)):
            self._store.require_new(step)
        with self._lock:
            others = [one for n, steps in self.sets.listed().items() if n != self.n_processes for one in steps]
        if self.number == 0 and step < max(others, default=step):
            _log.warning("%s: step %d is below step %d, which stays the latest", self.url, step, max(others))

    def save(self, step: int, flat: Flat, metadata: Mapping[str, Any] | None, overwrite: bool) -> tricomp.Report:
        """Write this process's part of a step. What an earlier run left here of one that does not count is replaced."""
        overwrite = overwrite or self._is_left_over(step)
        report = self._store.save(step, flat.tree, metadata=with_notes(metadata, flat.notes), overwrite=overwrite)
        self._saved.add(step)
        if self._policies and self.number == 0:
            self._prune_others()
        return report

    def restore(self, step: int | None, target: Any, strict: bool) -> Restored | None:
        """See Checkpoints. Of each array, only what devices of this process need is decoded.

        All processes must ask together: they wait for each other first, so that what each has saved is there, and the
        latest step is that which process 0 finds. A step may be of another number of processes. Without a target, all
        arrays come back whole.
        """
        if self.n_processes > 1:
            multihost_utils.sync_global_devices("tricomp_jax: restore")
        with self._lock:
            found = self.sets.find(step) if step is not None or self.n_processes == 1 else self._latest()
        if found is None:
            return None
        restored = self.restore_from(*found, target, strict)
        if found[0] == self.n_processes:
            self._store.continue_from(restored.step)
        return restored

    def restore_from(self, n: int, number: int, target: Any, strict: bool) -> Restored:
        """A step that n processes wrote."""
        with self._lock, Joined(number, [self.sets.store(folder_of(i, n)) for i in range(n)]) as joined:
            try:
                state = unflatten(joined.flat()) if target is None else restore(target, joined, strict)
            except InvalidArgument as error:
                raise InvalidArgument(f"step {number} of {self.url}: {error}") from None
            metadata = without_notes(joined.metadata, NOTES_KEY)
        return Restored(number, state, metadata)

    def steps(self) -> list[int]:
        """All steps that count, ascending, whatever number of processes wrote them."""
        with self._lock:
            return self.sets.whole()

    def close(self) -> None:
        """See Checkpoints."""
        self._store.close()

    def kept(self, steps: Sequence[int], is_mine: bool) -> list[int]:
        """Those of the steps of one process that the policies want of all, and the last that counts.

        is_mine: the later ones too, which other processes may be about to write.
        """
        with self._lock:
            listed = self.sets.listed()
            last = self.sets.last_whole(listed)
        if last is None:
            return list(steps)
        known = sorted(set().union(*listed.values()))
        wanted = {step for policy in self._policies for step in policy.kept(known)} | {last}
        return [step for step in steps if step in wanted or (is_mine and step > last)]

    @cached_property
    def _run(self) -> str:
        """A name for this run of the program, the same in all its processes."""
        now = time.time_ns()
        mine = np.array([now >> 32, now & 0xFFFFFFFF, secrets.randbits(32)], np.uint32)
        agreed = multihost_utils.broadcast_one_to_all(mine) if self.n_processes > 1 else mine
        return "".join(f"{int(part):08x}" for part in agreed)

    def _is_left_over(self, step: int) -> bool:
        """Whether this process's file of a step is of a run that died before all processes had written theirs."""
        with self._lock:
            is_there = step not in self._saved and step in self._store.steps()
            return is_there and not self.sets.is_whole(self.n_processes, step)

    def _latest(self) -> tuple[int, int] | None:
        """What process 0 finds as the latest step: processes that looked for themselves might see different ones."""
        found: tuple[int, int] | None = None
        failure: TricompError | None = None
        if self.number == 0:
            try:
                found = self.sets.find(None)
            except TricompError as error:
                failure = error
        n, step = found or (0, 0)
        told = np.array([failure is not None, n, step >> 32, step & 0xFFFFFFFF], np.uint32)
        has_failed, n, high, low = (int(part) for part in multihost_utils.broadcast_one_to_all(told))
        if failure is not None:
            raise failure
        if has_failed:
            raise StorageError(f"{self.url}: process 0 could not look for the latest step. See its error.")
        return (n, high << 32 | low) if n else None

    def _own_of(self, value: jax.Array, path: str, shards: dict[str, list[int]]) -> Any:
        """What this process saves of an array: a leaf, parts by where they begin, or None."""
        arrays.require_data(value, path)
        if value.is_fully_addressable:
            return None if self.number else arrays.to_leaf(value, path)
        devices: Any = value.sharding.device_set
        homes = {device.process_index for device in devices}
        if len(homes) == 1:
            raise UnsupportedNode(
                f"leaf {path!r}: it is on devices of process {homes.pop()} alone, and process {self.number} cannot "
                "save it. Spread it over devices of all processes, or save it there with tricomp_jax.save."
            )
        first = [shard for shard in value.addressable_shards if shard.replica_id == 0]
        if value.is_fully_replicated:
            return arrays.to_leaf(first[0].data, path) if first else None
        if not all(isinstance(part, slice) for shard in first for part in shard.index):
            raise UnsupportedNode(
                f"leaf {path!r}: pmap has laid it over devices of several processes, each part without the axis that "
                "counts the devices. Use jax.jit with a NamedSharding, or save one copy with tricomp_jax.save."
            )
        shards[path] = list(value.shape)
        parts = {key_of(box_of(shard.index, value.shape)): shard.data for shard in first}
        return {key: arrays.to_leaf(part, path) for key, part in parts.items()} or None

    def _stripped(self, node: Any) -> Any:
        """A flattened tree with what this process saves; None for all else."""
        if isinstance(node, _Own):
            return node.leaf
        parts = children(node)
        if parts is None:
            return None if self.number else node
        return parts.plain([self._stripped(value) for value in parts.values])

    def _prune_others(self) -> None:
        """Take away what the policies no longer want of the sets of other numbers of processes."""
        with self._lock:
            others = [folder_of(i, n) for n in self.sets.listed() if n != self.n_processes for i in range(n)]
        for folder in others:
            keep = [_KeptByAll(self, is_mine=False)]
            try:
                with tricomp.Store(self.sets.at(folder), keep=keep, **self.sets.options) as store:
                    store.prune()
            except (StorageError, StoreLocked) as error:
                _log.warning("old steps of another number of processes could not be removed: %s", error)


class _Own:
    """What stands in a flattened tree for what this process saves there."""

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf


class _KeptByAll:
    """The retention policy of one process's Store: what all processes together need."""

    def __init__(self, run: InProcesses, is_mine: bool) -> None:
        self._run, self._is_mine = run, is_mine

    def kept(self, steps: Sequence[int]) -> list[int]:
        return self._run.kept(steps, self._is_mine)


def load_step(
    url: Path,
    step: int | None = None,
    target: Any = None,
    *,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """The pytree of one step (None: the latest) of a run's folder, whatever number of processes wrote it.

    target, strict: as for load; each process decodes what its devices need. Without a target, arrays come back whole.
    threads, backend: see tricomp.open. Raises MissingStep, and what load raises, naming the step.
    """
    given = {"storage_options": storage_options, "threads": threads, "backend": backend}
    run = InProcesses(url, {name: value for name, value in given.items() if value is not None})
    found = run.sets.find(step)
    if found is None:
        raise MissingStep(f"there are no checkpoints in {run.url}. Save one first, or check the path.")
    return run.restore_from(*found, target, strict).state
