"""Publisher: publishes version after version, and keeps a copy of the last, so that nothing is read back.

Imports publish. The hard thing: the copy is that of what was published, not of what was tried: it moves on when, and
only when, the version is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from tricomp.publishing.publish import Options, Publication, open_base, publish_tensors
from tricomp.publishing.tensors import Tensor, tensors_of

Path = str | os.PathLike[str]


class Publisher:
    """Publishes a trainer's states into one folder. For one thread."""

    def __init__(
        self,
        folder: Path,
        base: Mapping[str, Any] | Path | None = None,
        reference_in: Literal["host", "folder"] = "host",
        **options: Any,
    ) -> None:
        """base: as for publish, of the first version. options: those of publish, but for base, for each version.

        reference_in: where the last version is kept: in memory, or nowhere: then it is made of what is in the folder.
        Raises InvalidArgument.
        """
        self.folder = folder
        self._is_kept = reference_in == "host"
        self.options = Options(**options)
        self._first = base
        self._held: tuple[int, Mapping[str, Tensor]] | None = None

    def publish(self, state: Any, version: int) -> Publication:
        """What tricomp.publishing.publish does, against the copy of the version before, if that was the last one."""
        new = self.tensors(state)
        if self._is_kept and self._held is not None and self._held[0] == version - 1:
            done = publish_tensors(new, self.folder, version, self._held[1], self.options, is_known=True)
        else:
            with open_base(None if self._held is not None else self._first) as base:
                done = publish_tensors(new, self.folder, version, base, self.options)
        self._held = version, self.copied(new) if self._is_kept else {}
        return done

    def tensors(self, state: Any) -> Mapping[str, Tensor]:
        """The Tensors of a state."""
        return tensors_of(state)

    def copied(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that stay as they are, whatever becomes of the state."""
        return {name: tensor.copied() for name, tensor in state.items()}
