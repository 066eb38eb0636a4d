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
        self._parents: dict[int, frozenset[int]] = {}
        self._saving: dict[int, set[int]] = {}
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
                pending += self._parents.get(step, frozenset()) | self._saving.get(step, set())
                if step in unread:  # whatever it needs is at or above a keyframe; the step before leads there
                    pending += sorted(other for other in steps if other < step)[-1:]
        self._kept = frozenset(kept)
        return [step in kept for step in steps]

    @property
    def kept(self) -> frozenset[int] | None:
        """The steps that will stay, as far as was asked: others may be gone a moment later. None: nothing was asked."""
        return self._kept

    def note(self, step: int, parent: int | None) -> None:
        """A step is being saved, coded against another. Called by the handler, for each item."""
        self._parents.pop(step, None)  # it may have been saved before, and have failed
        parents = self._saving.setdefault(step, set())
        if parent is not None:
            parents.add(parent)

    def _read(self) -> set[int]:
        """Learn what committed steps need, each once. Returns the steps that cannot be read."""
        found: dict[int, frozenset[int]] = {}
        unread: set[int] = set()
        for path in self.directory.iterdir():
            step = places.Place(self.directory, path.name, "").step
            if step is None or utils.TMP_DIR_SUFFIX in path.name:
                continue
            try:
                known = self._parents[step] if step in self._parents else frozenset(places.parents_of(path))
                found[step] = known | found.get(step, frozenset())
            except TricompError as error:
                _log.warning("%s: cannot be read, so the step before it is kept as well: %s", path, error)
                unread.add(step)
        self._parents = found
        self._saving = {step: parents for step, parents in self._saving.items() if step not in found}
        return unread
