"""Checkpointer: a training run's state in and out of a Store, synchronously. The only module here that knows Stores.

The hard thing: a restore either fits as a whole or changes nothing, so it reads everything, judges everything, and
only then gives it to the objects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tricomp
from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.store import step_number
from tricomp_torch import rng as generators
from tricomp_torch.checks import missing_and_unexpected, problems
from tricomp_torch.files import notes_of, with_notes
from tricomp_torch.objects import States, give, holds_object, pair_up, parameter_names, put_in, states_of, take
from tricomp_torch.trees import NOTES_KEY, Flat, flatten, unflatten

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
    """Saves and restores a training run, bit for bit.

    store: a `tricomp.Store`, or a folder for one. every: `save` does nothing unless step is a multiple of it.
    spec: how to code (`tricomp.Spec`). keyframe, keep: policies of the store made for a folder; a Store has its own.
    threads: to work with, see tricomp.open; a Store has its own.

    >>> ckpt = tricomp_torch.Checkpointer("runs/a", every=100)  # doctest: +SKIP
    >>> restored = ckpt.restore(model=model, optimizer=optimizer)  # doctest: +SKIP
    >>> for step in range(restored.step + 1 if restored else 0, n_steps):  # doctest: +SKIP
    ...     train_one(step)
    ...     ckpt.save(step, model=model, optimizer=optimizer)
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
    ) -> None:
        if every is not None and (isinstance(every, bool) or not hasattr(every, "__index__") or every < 1):
            raise InvalidArgument(f"every: expected a number of steps, 1 or more, got {every!r}")
        if isinstance(store, tricomp.Store):
            if any(value is not None for value in (spec, keyframe, keep, threads)):
                raise InvalidArgument("spec, keyframe, keep and threads belong to the Store given. Set them there.")
            self.store = store
        else:
            policies: dict[str, Any] = {"spec": spec, "keyframe": keyframe, "keep": keep, "threads": threads}
            given = {name: value for name, value in policies.items() if value is not None}
            self.store = tricomp.Store(os.fspath(store), **given)
        self._every = every

    def close(self) -> None:
        """Let another process write to the store."""
        self.store.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    ) -> tricomp.Report | None:
        """Save the state at step; returns when it is on disk. None if step is no multiple of `every` and not force.

        model, optimizer, scheduler: an object with state_dict and load_state_dict, or a dict or list of such.
        extra: by name, more such objects (GradScaler, EMA, a sampler), torch or numpy Generators, tensors, and plain
        values. rng: also the global random generators of torch, CUDA (if in use), numpy and Python.
        metadata: a small plain map that can be read without the rest. overwrite: replace step if it is there.

        Raises InvalidArgument if step is no step or is there already, or a slot holds something without a state;
        UnsupportedNode naming the path; StorageError; StoreLocked.
        """
        step = step_number(step)
        if self._every is not None and step % self._every != 0 and not force:
            return None
        values = _values(model, optimizer, scheduler, extra)
        if not values:
            raise InvalidArgument("save: nothing to save. Give model=, optimizer=, scheduler= or extra=.")
        states = take(values, parameter_names(model))
        flat = flatten({**states.tree, "rng": generators.get_state()} if rng else states.tree)
        notes = {**flat.notes, "classes": states.classes, "parameters": states.parameters}
        return self.store.save(step, flat.tree, metadata=with_notes(metadata, notes), overwrite=overwrite)

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

        Models copy into their own tensors; devices stay theirs. What was saved but is not asked for is left alone;
        what is asked for must have been saved. strict: missing and unexpected keys, other classes, other dtypes and
        parameters in another order are errors too; wrong shapes always are. rng: also set the random generators.

        Raises InvalidArgument listing all that does not fit, before anything is changed; MissingStep; CorruptFile and
        the like if the file is damaged.
        """
        if step is None:
            step = self.store.latest()
            if step is None:
                return None
        with self.store.open(step) as file:
            metadata = file.metadata
        notes = notes_of(metadata)
        saved = self._states(step, notes)
        values = _values(model, optimizer, scheduler, extra)
        pairs = list(pair_up(values, saved.tree))
        names = parameter_names(model)
        found = [text for pair in pairs for text in problems(pair, saved, names, strict)]
        has_rng = rng and (strict or "rng" in saved.tree)
        if has_rng:
            found += generators.problems(saved.tree.get("rng"), strict)
        if found:
            lines = "\n  ".join(found)
            advice = "Restore into what was saved" + (", or pass strict=False to take what fits." if strict else ".")
            raise InvalidArgument(f"step {step} does not fit; nothing was changed.\n  {lines}\n{advice}")
        keys = [missing_and_unexpected(pair) for pair in pairs]
        for pair in pairs:
            if pair.state is not None:
                give(pair, strict)
        if has_rng:
            generators.set_state(saved.tree["rng"])
        return Restored(
            step,
            put_in(dict(extra or {}), saved.tree.get("extra", {})),
            {key: value for key, value in metadata.items() if key != NOTES_KEY},
            tuple(key for missing, _ in keys for key in missing),
            tuple(key for _, unexpected in keys for key in unexpected),
        )

    def _states(self, step: int, notes: dict[str, Any]) -> States:
        tree = self.store.load(step)  # load, not open: the store's next save then continues from this step
        try:
            return states_of(unflatten(Flat(tree, notes)), notes)
        except (InvalidArgument, CorruptFile) as error:
            raise type(error)(f"step {step} of {self.store.url}: {error}") from error


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
