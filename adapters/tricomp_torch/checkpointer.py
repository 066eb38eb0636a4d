"""Checkpointer: a training run's state in and out of a Store, behind training. The only module here that knows Stores.

A save returns when the state is copied; a thread encodes and writes the copy. The hard thing: a restore either fits as
a whole or changes nothing, and holds no second state in memory. So the file's header is judged against the objects, and
only then are leaves decoded, straight into the tensors that the objects hold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, LifoQueue
from types import TracebackType
from typing import Any, Literal

import tricomp
from tricomp.background import Background, Saving
from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.host_memory import HostBuffer
from tricomp.notes import without_notes
from tricomp.store import count_of, step_number
from tricomp.tree import plain
from tricomp_torch import rng as generators
from tricomp_torch.checks import missing_and_unexpected, problems
from tricomp_torch.files import notes_of, with_notes
from tricomp_torch.filling import Filling, fill
from tricomp_torch.objects import States, give, holds_object, pair_up, parameter_names, put_in, states_of, take
from tricomp_torch.places import targets_of
from tricomp_torch.snapshot import Snapshot, snapshot_of
from tricomp_torch.trees import NOTES_KEY, flatten

_SLOTS = ("model", "optimizer", "scheduler", "extra")


@dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found.

    step: as it was given to save. extra: as it was given to save, with values loaded; objects given to restore stand
    in their own places, states of objects not given stand as plain data. metadata: the caller's.
    missing_keys, unexpected_keys: of the models, as in torch; empty unless strict=False.
    """

    step: int
    extra: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


class Checkpointer:
    """Saves a training run in the background, and restores it, bit for bit.

    store: a `tricomp.Store`, or a folder or URL for one. every: `save` does nothing unless step is a multiple of it.
    in_flight: how many saves may be on their way; one beyond them waits. Each holds a copy of the state; host memory
    for it is kept for the next one. budget_bytes: of GPU memory for copies, see `snapshot`; what does not fit is
    encoded before `save` returns.

    Of the store made for a folder or URL (a Store has its own): spec: how to code (`tricomp.Spec`). keyframe, keep:
    policies. reference_in: where the last saved words are held for the next save, see tricomp.Store. threads, backend:
    to encode with, see tricomp.open.

    What fails in the background is logged, and raised once: by the Future, or the next save, restore, wait or close.
    Steps that were saved before stay, and later saves go on. When the interpreter ends, what was begun is finished.
    Not for several threads at a time.

    >>> ckpt = tricomp_torch.Checkpointer("runs/a", every=100)  # doctest: +SKIP
    >>> restored = ckpt.restore(model=model, optimizer=optimizer)  # doctest: +SKIP
    >>> for step in range(restored.step + 1 if restored else 0, n_steps):  # doctest: +SKIP
    ...     train_one(step)
    ...     ckpt.save(step, model=model, optimizer=optimizer)
    >>> ckpt.close()  # doctest: +SKIP
    """

    def __init__(
        self,
        store: tricomp.Store | str | os.PathLike[str],
        *,
        every: int | None = None,
        in_flight: int = 1,
        budget_bytes: int | None = None,
        spec: tricomp.Spec | None = None,
        keyframe: tricomp.KeyframeEvery | None = None,
        keep: Sequence[Any] | None = None,
        reference_in: Literal["device", "host", "store"] | None = None,
        threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        self._every = None if every is None else count_of(every, "every: expected a number of steps")
        n_buffers = count_of(in_flight, "in_flight: expected a number of saves")
        options: dict[str, Any] = {
            "spec": spec,
            "keyframe": keyframe,
            "keep": keep,
            "reference_in": reference_in,
            "threads": threads,
            "backend": backend,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(store, tricomp.Store):
            if given:
                raise InvalidArgument(f"{', '.join(given)}: belong to the Store given. Set them there.")
            self.store = store
        else:
            self.store = tricomp.Store(os.fspath(store), **given)
        self._budget_bytes = budget_bytes
        self._behind: Background[tricomp.Report] = Background(n_buffers)
        self._buffers = [HostBuffer() for _ in range(n_buffers + 1)]  # one of which the store may hold
        self._lent: list[HostBuffer] = []
        self._free: LifoQueue[HostBuffer] = LifoQueue()  # so that no more of them get memory than are needed
        for buffer in self._buffers:
            self._free.put(buffer)

    def wait(self) -> None:
        """Wait until every save that was begun is on disk. Raises what one of them failed with."""
        self._behind.wait()

    def close(self) -> None:
        """Wait as `wait` does, let another process write to the store, and free memory. Can be used again."""
        try:
            self._behind.wait()
        finally:
            for buffer in self._buffers:
                buffer.release()
            self.store.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # else it is logged, and what ends the block is what matters
                raise

    def is_due(self, step: int, force: bool = False) -> bool:
        """Whether `save` would save this step: it is a multiple of `every`, or force. Raises InvalidArgument."""
        return force or self._every is None or step_number(step) % self._every == 0

    def save(
        self,
        step: int,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
        rng: bool = True,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> Saving[tricomp.Report] | None:
        """Save the state at step. Returns when training may change it: a Future of the Report, done when it is on disk.

        None if step is no multiple of `every` and not force. Call `.result()` on it to wait. Where tensors are on a
        GPU, nothing waits for the copies but what is launched on its current stream later.

        model, optimizer, scheduler: an object with state_dict and load_state_dict, or a dict or list of such.
        extra: by name, more such objects (GradScaler, EMA, a sampler), torch or numpy Generators, tensors, and plain
        values. rng: also the global random generators of torch, CUDA (if in use), numpy and Python.
        metadata: a small plain map that can be read without the rest. overwrite: replace step if it is there.

        Raises InvalidArgument if step is no step or is there already, or a slot holds something without a state;
        UnsupportedNode naming the path; StoreLocked; OutOfDeviceMemory; what an earlier save failed with.
        """
        step = step_number(step)
        if not self.is_due(step, force):
            return None
        values = _values(model, optimizer, scheduler, extra)
        if not values:
            raise InvalidArgument("save: nothing to save. Give model=, optimizer=, scheduler= or extra=.")
        self._behind.ready()
        if self._behind.is_idle:  # else it is told by the save
            self.store.claim()
            if not overwrite:
                self.store.require_new(step)
        states = take(values, parameter_names(model))
        flat = flatten({**states.tree, "rng": generators.get_state()} if rng else states.tree)
        own = {**flat.notes, "classes": states.classes, "parameters": states.parameters}
        notes = with_notes(deepcopy(metadata), own)
        plain([metadata, flat.notes])  # what no file can hold is told now
        buffer = self._free.get()
        try:
            taken = snapshot_of(flat, self._budget_bytes, buffer=buffer)
            saving = self._behind.submit(f"step {step}", partial(self._write, step, taken, notes, overwrite, buffer))
        except BaseException:
            self._free.put(buffer)
            raise
        taken.wait_live()
        return saving

    def _write(
        self, step: int, taken: Snapshot, metadata: dict[str, Any], overwrite: bool, buffer: HostBuffer
    ) -> tricomp.Report:
        try:
            with taken.saving() as first:
                tree = taken.flat.tree
                return self.store.save(step, tree, metadata, overwrite, first, not taken.live)
        finally:
            self._give_back(buffer)

    def _give_back(self, buffer: HostBuffer) -> None:
        """A save is done: free the buffers that the store holds no words of."""
        self._lent.append(buffer)
        for one in tuple(self._lent):
            if not self.store.holds(one.holds):
                self._lent.remove(one)
                self._free.put(one)
        if buffer in self._lent:
            with suppress(Empty):
                other = self._free.get_nowait()
                other.reserve_as(buffer)
                self._free.put(other)

    def restore(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
        step: int | None = None,
        strict: bool = True,
        rng: bool = True,
    ) -> Restored | None:
        """Load step, the latest if None, into the objects given. Returns None if step is None and the store is empty.

        Waits for what is on its way.
        Models copy into their own tensors; devices stay theirs. What was saved but is not asked for is left alone;
        what is asked for must have been saved. strict: missing and unexpected keys, other classes, other dtypes and
        parameters in another order are errors too; wrong shapes always are. rng: also set the random generators.

        In memory for a few batches of leaves, whatever the size of the state: they are decoded into the tensors of
        models and optimizers, and into new ones only where there is none of that dtype and shape.

        Raises InvalidArgument listing all that does not fit, before anything is changed; MissingStep; CorruptFile and
        the like if the file is damaged: of a local folder, whose checksums are compared first, before anything is
        changed too; of a bucket, the objects may hold parts of the step, and a note on the error says so.
        """
        self._behind.wait()
        if step is None:
            step = self.store.latest()
            if step is None:
                return None
        values = _values(model, optimizer, scheduler, extra)
        names = parameter_names(model)

        def restored(file: tricomp.File) -> Restored:
            return _restored(file, step, values, names, strict, rng)

        return self.store.read(step, restored, is_checked=True)


def _restored(
    file: tricomp.File, step: int, values: dict[str, Any], names: Mapping[int, str], strict: bool, has_rng: bool
) -> Restored:
    """Restore what an open file holds into the objects in values."""
    notes = notes_of(file.metadata)
    try:
        filling, outline = _outlined(file, notes)
    except (InvalidArgument, CorruptFile) as error:
        raise type(error)(f"step {step} of {os.path.dirname(file.name)}: {error}") from error
    pairs = list(pair_up(values, outline.tree))
    found = [text for pair in pairs for text in problems(pair, outline, names, strict)]
    has_rng = has_rng and (strict or "rng" in outline.tree)
    if has_rng:
        found += generators.problems(outline.tree.get("rng"), strict)
    if found:
        lines = "\n  ".join(found)
        advice = "Restore into what was saved" + (", or pass strict=False to take what fits." if strict else ".")
        raise InvalidArgument(f"step {step} does not fit; nothing was changed.\n  {lines}\n{advice}")
    keys = [missing_and_unexpected(pair) for pair in pairs]
    targets = targets_of(filling, pairs, ("extra", "rng") if has_rng else ("extra",))
    try:
        fill(file, targets)
    except Exception as error:
        error.add_note(f"What was given may hold parts of step {step} now: restore another step into it.")
        raise
    tree = filling.tree(targets)
    for pair in pair_up(values, tree):
        if pair.state is not None:
            give(pair, strict)
    if has_rng:
        generators.set_state(tree["rng"])
    return Restored(
        step,
        put_in(dict(values.get("extra", {})), tree.get("extra", {})),
        without_notes(file.metadata, NOTES_KEY),
        tuple(key for missing, _ in keys for key in missing),
        tuple(key for _, unexpected in keys for key in unexpected),
    )


def _outlined(file: tricomp.File, notes: dict[str, Any]) -> tuple[Filling, States]:
    """The states that a file holds, of tensors without data; random states are decoded, as they are to be judged."""
    filling = Filling(file, notes)
    known = [path for path in file if path.startswith("rng/")]
    return filling, states_of(filling.outline(file.load(known) if known else {}), notes, filling.facts)


def _values(model: Any, optimizer: Any, scheduler: Any, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(zip(_SLOTS, (model, optimizer, scheduler, extra), strict=True))
    values = {slot: value for slot, value in given.items() if value is not None}
    for slot, value in values.items():
        if slot != "extra" and not holds_object(value):
            raise InvalidArgument(
                f"{slot}: expected an object with state_dict and load_state_dict, or a dict or list of such, "
                f"got {type(value).__name__}. Plain values go in extra=."
            )
    if extra is not None:
        if not isinstance(extra, Mapping):
            raise InvalidArgument(f"extra: expected a dict, got {type(extra).__name__}. Give what it holds a name.")
        values["extra"] = dict(extra)
    return values
