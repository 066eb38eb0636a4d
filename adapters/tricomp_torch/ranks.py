"""What each process of a run has of its own (random states, say), kept in the one checkpoint that the first one writes.

Imports torch and rng. The hard thing: on a restore there may be another number of processes, whose states nobody has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from tricomp.errors import InvalidArgument
from tricomp_torch import rng as generators

_log = logging.getLogger("tricomp")


def gathered(state: Any) -> list[Any]:
    """The states of all processes, by rank. To be called by all of them; what is given must be on the CPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def own(states: Sequence[dict[str, Any]], rank: int, n_ranks: int, what: str) -> dict[str, Any]:
    """The state of this process, or {} if the checkpoint was saved by another number of them, which is logged.

    Its random state, under "rng", has been judged. Raises InvalidArgument that begins with what.
    """
    if len(states) != n_ranks:
        _log.warning(
            "%s was saved by %d processes, and there are %d now: they keep their own random states, and the order of "
            "the data is another one",
            what,
            len(states),
            n_ranks,
        )
        return {}
    state = dict(states[rank])
    if found := generators.problems(state["rng"]):
        raise InvalidArgument(f"{what}: {found[0]}")
    return state


def require_whole(models: Iterable[Any], kind: str) -> None:
    """Raise InvalidArgument if each process holds a part of a model. kind: how a run is split, "" if it is not."""
    if kind or any(hasattr(parameter, "device_mesh") for model in models for parameter in model.parameters()):
        raise InvalidArgument(
            f"{kind or 'DTensor parameters'}: each process holds a part of the state, and a store takes it as a whole. "
            "Save it with tricomp_torch.dcp."
        )
