"""Publisher: publishes version after version, and keeps a copy of the last, so that nothing is read back.

Imports trainer. The hard thing: the copy is that of what was published, not of what was tried: it moves on when, and
only when, the version is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tricomp.errors import InvalidArgument
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.publication import Options, Publication, open_base
from tricomp.publishing.tensors import Tensor, tensors_of
from tricomp.publishing.trainer import publish_tensors

Path = str | os.PathLike[str]


class Publisher:
    """Publishes a trainer's states into one folder. For one thread."""

    def __init__(
        self,
        folder: Path,
        base: Mapping[str, Any] | Path | None = None,
        reference_in: Literal["host", "folder"] = "host",
        full_every: int | None = None,
        **options: Any,
    ) -> None:
        """base: the model that servers begin with, version 0, or any that the folder's deltas begin at; a trainer that
        comes back gives the same. reference_in: where the last version is kept: in memory, or nowhere: then it is made
        of what is in the folder. full_every: versions that are multiples of it are full, so that servers come from far
        behind, and older versions can be removed. options: those of publish, for each version.

        Raises InvalidArgument.
        """
        if full_every is not None and (isinstance(full_every, bool) or full_every < 1):
            raise InvalidArgument(f"full_every: expected 1 or more, or None, got {full_every!r:.80}.")
        self._full_every = full_every
        self.folder = folder
        self._is_kept = reference_in == "host"
        self.options = Options(**options)
        self._first = base
        self._held: tuple[int, Mapping[str, Tensor]] | None = None

    def publish(self, state: Any, version: int) -> Publication:
        """What tricomp.publishing.publish does, against the copy of the version before, if that was the last one."""
        new, options = self.tensors(state), self.options
        if self._full_every is not None and version % self._full_every == 0:
            options = replace(options, full=True)
        if self._held is not None and self._held[0] == version - 1:
            done = publish_tensors(new, self.folder, version, self._held[1], options, is_known=True)
        else:
            with open_base(self._first if self._is_base_needed(version) else None) as base:
                done = publish_tensors(new, self.folder, version, base, options)
        before, self._held = self._held, None  # while it is written over, it is no version
        if self._is_kept:
            held = {} if before is None else before[1]
            self._held = version, {name: self._kept(tensor, held.get(name)) for name, tensor in new.items()}
        return done

    def _is_base_needed(self, version: int) -> bool:
        """Whether what is in the folder does not lead to the version before, and to this one, by itself."""
        lineage = Lineage(self.folder, self.options.storage_options)
        known = [number for number in (version, version - 1) if number >= 0 and lineage.find(number) is not None]
        return not known or lineage.route(known[0], None).full is None

    def tensors(self, state: Any) -> Mapping[str, Tensor]:
        """The Tensors of a state."""
        return tensors_of(state)

    def copied(self, tensor: Tensor) -> Tensor:
        """A tensor that stays as it is, whatever becomes of the state."""
        return tensor.copied()

    def _kept(self, tensor: Tensor, held: Tensor | None) -> Tensor:
        """A copy, in the memory of the last one if it is of the same kind."""
        if held is None or held.kind != tensor.kind:
            return self.copied(tensor)
        held.take(tensor)
        return held
