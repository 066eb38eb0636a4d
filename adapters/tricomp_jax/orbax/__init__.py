"""Orbax saves and restores `.tri` files: handlers for its CheckpointManager, and retention that keeps parents.

>>> manager.save(step, args=tricomp_jax.orbax.TricompSave(state))  # doctest: +SKIP
>>> state = manager.restore(step, args=tricomp_jax.orbax.TricompRestore(state))  # doctest: +SKIP

CheckpointableHandler, for version 1 of Orbax, is loaded when asked for: not every orbax-checkpoint has what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import orbax.checkpoint
except ModuleNotFoundError as error:
    if error.name not in ("orbax", "orbax.checkpoint"):
        raise
    raise ModuleNotFoundError(
        "tricomp_jax.orbax needs orbax-checkpoint, which is not installed. Install it: pip install orbax-checkpoint. "
        "tricomp_jax.save and tricomp_jax.CheckpointHook work without it.",
        name=error.name,
    ) from None

from tricomp_jax.orbax.handler import TricompHandler, TricompRestore, TricompSave
from tricomp_jax.orbax.policy import KeepParents

if TYPE_CHECKING:
    from tricomp_jax.orbax.checkpointable import CheckpointableHandler

del orbax

__all__ = ["CheckpointableHandler", "KeepParents", "TricompHandler", "TricompRestore", "TricompSave"]


def __getattr__(name: str) -> Any:
    if name != "CheckpointableHandler":
        raise AttributeError(f"tricomp_jax.orbax has no {name!r}. It has {', '.join(__all__)}.")
    from tricomp_jax.orbax.checkpointable import CheckpointableHandler

    return CheckpointableHandler
