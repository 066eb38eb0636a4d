"""What applying tells, and what is asked first: which version is wanted, and whether it lies ahead. Imports lineage."""

from __future__ import annotations

from dataclasses import dataclass

from tricomp.errors import InvalidArgument
from tricomp.publishing.lineage import Lineage


@dataclass(frozen=True)
class Application:
    """What apply did. version: what is there now. before: what was; None: nothing, or no telling.

    n_changed: tensors that were made anew. n_bytes: written. is_new: False: it was there already.
    """

    version: int
    before: int | None
    n_changed: int
    n_bytes: int
    seconds: float
    is_new: bool = True


def target_of(lineage: Lineage, version: int | None) -> int:
    """The version asked for, or the newest one. Raises InvalidArgument."""
    if version is None:
        latest = lineage.latest()
        if latest is None:
            raise InvalidArgument(f"{lineage.where.url}: nothing is published there yet. Wait, or check the path.")
        return latest
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise InvalidArgument(f"version: expected a whole number, 0 or more, or None, got {version!r:.80}.")
    return version


def require_forward(before: int | None, target: int, what: str) -> None:
    """Raise InvalidArgument if what is there is newer. what: it is, as the message begins."""
    if before is not None and before > target:
        raise InvalidArgument(
            f"{what} at version {before}, newer than {target}. To go back, begin with an empty folder."
        )
