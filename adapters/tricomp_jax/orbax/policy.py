"""KeepParents: a preservation policy that also keeps what the steps that another one keeps are coded against.

The hard thing: Orbax asks what to keep while the newest step is still being written, so the handler tells here what
that one needs, before it is asked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import utils

from tricomp.errors import InvalidArgument, TricompError
from tricomp_jax.orbax import places

_log = logging.getLogger("tricomp")


class KeepParents:
    """For CheckpointManagerOptions(preservation_policy=...), and for TricompHandler(parents=...): one for both.

    >>> keep = KeepParents(policies.LatestN(3), "/runs/a")  # doctest: +SKIP

    policy: what to keep besides: LatestN, EveryNSteps, BestN, AnyPreservationPolicy, ... directory: the manager's.
    Never more are kept than the chains of the kept steps: one for each, as long as the handler's keyframe says.
    Raises InvalidArgument.
    """

    def __init__(self, policy: Any, directory: str | os.PathLike[str]) -> None:
        if not callable(getattr(policy, "should_preserve", None)):
            raise InvalidArgument(
                f"KeepParents: expected a preservation policy of Orbax, say LatestN(3), got {policy!r:.80}."
            )
        self.policy = policy
        self.directory = places.path_of(directory)
        self._parents: dict[int, frozenset[int]] = {}  # of steps that were there before
        self._saved: dict[int, set[int]] = {}  # of those that the handler told of, which may still be written
        self._kept: frozenset[int] | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """What Orbax asks: of some checkpoints in ascending order, which to keep."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        wanted = self.policy.should_preserve(checkpoints, context=context)
        pending = [step for step, is_wanted in zip(steps, wanted, strict=True) if is_wanted]
        unread = self._read()
        kept: set[int] = set()
        while pending:
            step = pending.pop()
            if step not in kept:
                kept.add(step)
                pending += self._saved.get(step, self._parents.get(step, frozenset()))
                if step in unread:  # whatever it needs is at or above a keyframe; the step before leads there
                    pending += sorted(other for other in steps if other < step)[-1:]
        self._kept = frozenset(kept)
        return [step in kept for step in steps]

    def parents(self, place: places.Place) -> frozenset[int]:
        """The steps that one to be saved may be coded against: those of which Orbax was told that they stay.

        Before Orbax has asked these are none, so that nothing depends on a manager that does not ask. Called by the
        handler. Raises InvalidArgument if this is of another folder.
        """
        if os.path.abspath(place.root) != os.path.abspath(self.directory):
            raise InvalidArgument(
                f"KeepParents is of {self.directory}, but steps are saved in {place.root}. Give it that folder."
            )
        if self._kept is None and self._saved:
            _log.warning(
                "%s: every step stands alone, since Orbax does not ask KeepParents what to keep. Give it to the "
                "manager: CheckpointManagerOptions(preservation_policy=...).",
                self.directory,
            )
        return self._kept or frozenset()

    def note(self, step: int, parent: int | None) -> None:
        """A step is being saved, coded against another. Called by the handler, for each item."""
        parents = self._saved.setdefault(step, set())
        if parent is not None:
            parents.add(parent)

    def _read(self) -> set[int]:
        """Learn what steps of earlier runs need, each once. Returns those that cannot be read."""
        found: dict[int, frozenset[int]] = {}
        unread: set[int] = set()
        for path in self.directory.iterdir():
            step = places.Place(self.directory, path.name, "").step
            if step is None or step in self._saved or utils.TMP_DIR_SUFFIX in path.name:
                continue
            try:
                known = self._parents[step] if step in self._parents else frozenset(places.parents_of(path))
                found[step] = known | found.get(step, frozenset())
            except TricompError as error:
                _log.warning("%s: cannot be read, so the step before it is kept as well: %s", path, error)
                unread.add(step)
        self._parents = found
        return unread
