"""The steps of a run as pytrees in a Store: what a hook saves to and restores from. The only module that knows Stores.

The hard thing: a save happens in another thread than the flattening before it, so what is handed on is a Flat, whose
memory nobody else may change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import tricomp
from tricomp.errors import InvalidArgument
from tricomp.notes import without_notes
from tricomp.steps import number_of
from tricomp_jax.files import load_from, with_notes
from tricomp_jax.trees import NOTES_KEY, Flat, flatten


@dataclass(frozen=True)
class Restored:
    """What was restored: the step, the state in the target's types, and the caller's metadata."""

    step: int
    state: Any
    metadata: dict[str, Any] = field(default_factory=dict)


class Checkpoints(Protocol):
    """Where a run's steps are: in one Store, or in one for each process of a run."""

    def flatten(self, tree: Any) -> Flat:
        """What this process saves of a pytree, sharing its memory. Raises UnsupportedNode, UnsupportedDtype."""

    def claim(self, step: int, overwrite: bool) -> None:
        """Raise at once what save would raise before it writes: StoreLocked; InvalidArgument if the step is there."""

    def save(self, step: int, flat: Flat, metadata: Mapping[str, Any] | None, overwrite: bool) -> tricomp.Report:
        """Write a step; it is durable when this returns. May run in another thread than all else."""

    def restore(self, step: int | None, target: Any, strict: bool) -> Restored | None:
        """A step (None: the latest) in a target's types; None if step is None and there is none."""

    def steps(self) -> list[int]:
        """All steps that are there as a whole, ascending."""

    def close(self) -> None:
        """Let another writer in."""


class InStore:
    """Checkpoints of a run of one process, in a Store of its own."""

    def __init__(self, store: tricomp.Store) -> None:
        self.store = store

    def flatten(self, tree: Any) -> Flat:
        """All of a pytree."""
        return flatten(tree)

    def claim(self, step: int, overwrite: bool) -> None:
        """See Checkpoints."""
        self.store.claim()
        if not overwrite:
            self.store.require_new(step)

    def save(self, step: int, flat: Flat, metadata: Mapping[str, Any] | None, overwrite: bool) -> tricomp.Report:
        """See Checkpoints."""
        return self.store.save(step, flat.tree, metadata=with_notes(metadata, flat.notes), overwrite=overwrite)

    def restore(self, step: int | None, target: Any, strict: bool) -> Restored | None:
        """See Checkpoints. The store's next save continues from this step."""
        if step is None and self.store.latest() is None:
            return None
        with self.store.open(step) as file:
            number = number_of(file)
            try:
                state = load_from(file, target, strict)
            except InvalidArgument as error:
                raise InvalidArgument(f"step {number} of {self.store.url}: {error}") from None
            metadata = without_notes(file.metadata, NOTES_KEY)
        self.store.continue_from(number)
        return Restored(number, state, metadata)

    def steps(self) -> list[int]:
        """See Checkpoints."""
        return self.store.steps()

    def close(self) -> None:
        """See Checkpoints."""
        self.store.close()


def store_of(store: tricomp.Store | str | os.PathLike[str], options: Mapping[str, Any]) -> tricomp.Store:
    """The Store given, or one at a folder or URL with the options that are not None. Raises InvalidArgument."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(store, tricomp.Store):
        if given:
            raise InvalidArgument(f"{', '.join(given)} belong to the Store given. Set them there.")
        return store
    return tricomp.Store(os.fspath(store), **given)
