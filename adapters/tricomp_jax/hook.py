"""CheckpointHook: saves the state of a training loop behind its back, and restores it.

Imports jax and the adapter. The hard thing: a step may be given the memory of the state before it (donate_argnums), so
all that reads the state is done when a call returns; what is left, encoding and writing, has a copy of its own.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import jax

import tricomp
from tricomp.background import Background, Saving
from tricomp.errors import InvalidArgument, OutOfDeviceMemory
from tricomp.host_memory import HostBuffer
from tricomp.store import count_of, step_number
from tricomp_jax.arrays import is_key, is_on_gpu
from tricomp_jax.checkpoints import Checkpoints, InStore, Restored, store_of
from tricomp_jax.exit import before_exit
from tricomp_jax.modules import put_back, states_of
from tricomp_jax.processes import InProcesses, is_shared
from tricomp_jax.snapshot import snapshot
from tricomp_jax.targets import leaves_of
from tricomp_jax.trees import Flat

_jax: Any = jax  # some of its functions have no types
_log = logging.getLogger("tricomp")
_SHORT = (
    "step %d is saved before training goes on, since it cannot be copied: %s jax takes most of a GPU's memory for "
    "itself; XLA_PYTHON_CLIENT_MEM_FRACTION makes it leave room."
)


def checkpoints_at(store: tricomp.Store | str | os.PathLike[str], options: Mapping[str, Any]) -> Checkpoints:
    """Where a hook saves to: one Store, or one for each process of a run. options: of those; None where not given.

    Raises InvalidArgument.
    """
    n_processes = jax.process_count()
    if isinstance(store, tricomp.Store):
        if n_processes > 1:
            raise InvalidArgument(
                f"this run has {n_processes} processes, each of which writes its own parts to a store of its own. "
                f"Give the folder or URL, {store.url!r}, and keyframe=, keep= and the like here."
            )
        return InStore(store_of(store, options))
    if n_processes > 1 or is_shared(store):
        return InProcesses(store, {name: value for name, value in options.items() if value is not None})
    return InStore(store_of(store, options))


@dataclass
class _Copy:
    """Memory for a copy of the state, and the save that needs it, or did."""

    buffer: HostBuffer = field(default_factory=HostBuffer)
    saving: Saving[tricomp.Report] | None = None


class CheckpointHook:
    """Saves a training run's state in the background, and restores it, bit for bit.

    store: a `tricomp.Store`, or a folder or URL for one. every: a call does nothing unless step is a multiple of it.
    spec: how to code (`tricomp.Spec`). keyframe, keep: policies of the store made for a folder or URL; a Store has its
    own. threads: to encode with, see tricomp.open; a Store has its own. in_flight: how many saves may be on their way;
    a call beyond them waits. Each holds one copy of the state in memory, which is kept for the next one.

    A call returns when the state is copied; training may then change or donate it. What fails behind is logged when it
    happens, and raised once: by the Future, the next call (which then does nothing else), wait() or close(). Steps that
    were saved before stay, and later calls save again. close() the hook, or use it with `with`; what was begun when
    the interpreter ends, by its last line or an exception, is brought to its end. Several threads may call.

    In a run of several jax processes all make a hook for the same folder or URL, and all call it at the same steps:
    each saves the parts of arrays that are its own to a folder of its own there, and process 0 what is in no parts. A
    step counts when all have written theirs, and a run may go on with another number of processes.

    >>> hook = tricomp_jax.CheckpointHook("runs/a", every=100)  # doctest: +SKIP
    >>> restored = hook.restore_latest(state)  # doctest: +SKIP
    >>> state = restored.state if restored else state  # doctest: +SKIP
    >>> for step in range(restored.step + 1 if restored else 1, n_steps + 1):  # doctest: +SKIP
    ...     state, loss = train_step(state, batch(step))
    ...     hook(step, state)
    """

    def __init__(
        self,
        store: tricomp.Store | str | os.PathLike[str],
        *,
        every: int | None = None,
        spec: tricomp.Spec | None = None,
        keyframe: tricomp.KeyframeEvery | None = None,
        keep: Sequence[Any] | None = None,
        threads: int | None = None,
        in_flight: int = 1,
    ) -> None:
        self._every = None if every is None else count_of(every, "every: expected a number of steps")
        n_copies = count_of(in_flight, "in_flight: expected a number of saves")
        options = {"spec": spec, "keyframe": keyframe, "keep": keep, "threads": threads}
        self._checkpoints = checkpoints_at(store, options)
        self._behind: Background[tricomp.Report] = Background(n_copies)
        self._copies = [_Copy() for _ in range(n_copies)]
        self._untold: list[BaseException] = []
        self._newest: int | None = None  # the step that was saved or restored last
        self._is_claimed = False  # whether it was saved: what its store refuses is then told by the next call
        self._one_at_a_time = Lock()
        before_exit(self._end)

    def __call__(
        self,
        step: Any,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> Future[tricomp.Report] | None:
        """Save the state at step. Returns when it may change; the Future has the report once the step is durable.

        None if step is no multiple of `every` and not force. step: an int, or an array of one, which is waited for.
        state: any pytree, such as a TrainState or (params, opt_state); nnx modules and optimizers, alone or in dicts,
        lists and tuples, stand for their nnx.state. metadata: a small plain map that can be read without the rest.
        overwrite: replace step if it is there.

        Waits until the state is computed, as training itself would, and is copied: on a GPU to memory of that GPU; if
        that is short, until it is encoded and written. Raises what an earlier save failed with; InvalidArgument, also
        if step is there already, and StoreLocked, both by the next call unless this is the first; UnsupportedNode and
        UnsupportedDtype, naming the path.
        """
        step = step_number(step)
        self._tell()
        if self._every is not None and step % self._every and not force:
            return None
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidArgument(f"metadata: expected a dict of plain values, got {type(metadata).__name__}.")
        state = states_of(state)
        await_arrays(state)
        with self._one_at_a_time:
            self._behind.ready()
            if not self._is_claimed and self._behind.is_idle:
                self._checkpoints.claim(step, overwrite)
                self._is_claimed = True
            flat = self._checkpoints.flatten(state)
            return self._begin(step, flat, copy.deepcopy(metadata), overwrite)

    def _begin(
        self, step: int, flat: Flat, metadata: Mapping[str, Any] | None, overwrite: bool
    ) -> Future[tricomp.Report]:
        """Copy the state, and begin to save the copy."""
        place = next(one for one in self._copies if one.saving is None or one.saving.done())
        try:
            flat, is_copied = snapshot(flat, place.buffer), True
        except OutOfDeviceMemory as error:
            _log.warning(_SHORT, step, error)
            is_copied = False
        save = self._checkpoints.save
        saving = self._behind.submit(f"step {step}", lambda: save(step, flat, metadata, overwrite))
        place.saving, self._newest = saving, step
        if not is_copied:
            wait([saving])
        return saving

    def restore_latest(self, target: Any, strict: bool = True) -> Restored | None:
        """The latest step in the target's types; None if there is none. See restore."""
        return self._restore(None, target, strict)

    def restore(self, step: int, target: Any, strict: bool = True) -> Restored:
        """A step in the target's types, after what is on its way; the next save continues from it.

        target, strict: see `unflatten`. nnx modules and optimizers in it, as in a call, are updated in place, and stand
        in the result. Raises InvalidArgument listing all that does not fit, with nothing changed; MissingStep;
        CorruptFile and the like, naming the step to load instead.
        """
        restored = self._restore(step_number(step), target, strict)
        assert restored is not None  # only the latest may be none
        return restored

    def _restore(self, step: int | None, target: Any, strict: bool) -> Restored | None:
        self._settle()
        with self._one_at_a_time:
            found = self._checkpoints.restore(step, states_of(target), strict)
            if found is not None:
                self._newest, self._is_claimed = found.step, False
        return None if found is None else Restored(found.step, put_back(target, found.state), found.metadata)

    def steps(self) -> list[int]:
        """All steps that are saved, ascending, after what is on its way."""
        self._settle()
        with self._one_at_a_time:
            return self._checkpoints.steps()

    def latest(self) -> int | None:
        """The highest of the steps, or None."""
        return max(self.steps(), default=None)

    def wait(self) -> None:
        """Wait until all that was begun is durable. Raises what a save failed with."""
        self._settle()
        self._tell()

    def close(self) -> None:
        """Wait as wait does, let another process write, and free memory. The hook can be used again."""
        self._settle()
        with self._one_at_a_time:
            self._copies = [_Copy() for _ in self._copies]
            self._checkpoints.close()
            self._is_claimed = False
        self._tell()

    def __enter__(self) -> CheckpointHook:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # else it is logged, and what ends the block is what matters
                raise

    def _settle(self) -> None:
        """Wait for the steps that jax is computing, which may save, and for all saves; raises nothing."""
        with suppress(Exception):  # of a step that failed: whoever asks for its results is told
            _jax.effects_barrier()
        with self._one_at_a_time:
            self._keep_failure(self._behind.wait)

    def _keep_failure(self, call: Callable[[], None]) -> None:
        """Keep what a call raises until somebody is to be told."""
        try:
            call()
        except Exception as error:
            self._untold.append(error)

    def _tell(self) -> None:
        """Raise what a save failed with, unless somebody was told. Waits for nothing."""
        with self._one_at_a_time:
            if self._behind.is_idle:
                self._keep_failure(self._behind.wait)
            if self._untold:
                raise self._untold.pop(0)

    def _end(self) -> None:
        """The interpreter ends. What fails is logged; there is nobody to raise it to."""
        try:
            self.close()
        except Exception as error:
            _log.error("%s", error)


def save_from_callback(hook: CheckpointHook, step: int, flat: Flat, overwrite: bool) -> None:
    """Save arrays that are gone when this returns, unless that step is the one just saved or restored.

    Raises nothing: an error that is raised inside a compiled step ends it, and what was donated to it would be lost.
    """
    with hook._one_at_a_time:
        if step == hook._newest:
            return
        hook._keep_failure(hook._behind.ready)
        try:
            hook._begin(step, flat, None, overwrite)
        except Exception as error:
            error.add_note(f"This is what became of step {step}, which was to be saved from inside jit.")
            _log.error("step %d could not be saved: %s: %s", step, type(error).__name__, error)
            hook._untold.append(error)


def await_arrays(state: Any) -> None:
    """Wait until a state's arrays are computed. Those that are needed on the host, and are not, get there together."""
    try:
        leaves = jax.tree.leaves(state)
    except Exception:  # dicts of mixed keys are ours to walk; of trees that hold themselves, flatten tells
        with suppress(RecursionError):
            _jax.block_until_ready([leaf for _, leaf in leaves_of(state)])
        return
    leaves = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)]
    there = [leaf for leaf in leaves if not leaf.is_deleted()]
    for leaf in there if jax.default_backend() != "cpu" else ():
        if not is_key(leaf) and not is_on_gpu(leaf) and any(device.platform != "cpu" for device in leaf.devices()):
            leaf.copy_to_host_async()
    _jax.block_until_ready(there)
