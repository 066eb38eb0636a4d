"""Which of several ways to one result is the fastest on a GPU: each is timed once. Imports torch and errors.

The choice is kept for the life of the process, by device and shape. The hard thing: while a CUDA graph is captured
nothing can be timed, so there the first way is taken that runs, and nothing is kept; whoever captures runs the model
before, as torch asks for. Where torch is told to be deterministic, clocks must not choose, and the first way is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping

import torch

from tricomp.errors import BackendError

Way = Callable[[], torch.Tensor]
_ROUNDS = 3
_CALLS = 4  # a round, one after the other: what launching costs counts where the device waits for it
_log = logging.getLogger("tricomp")
_chosen: dict[Hashable, str] = {}


def run(key: tuple[Hashable, ...], ways: Mapping[str, Way], otherwise: Way, device: torch.device) -> torch.Tensor:
    """What the fastest of the ways gives; what otherwise gives, if none of them runs on this device.

    key: of all calls that share the choice. ways: by name, the likeliest first. Raises what otherwise raises, and
    torch.OutOfMemoryError.
    """
    key = (device, *key)
    name = _chosen.get(key)
    if name is None:
        if not _may_time(device):
            return _first(ways, otherwise)
        name = _chosen[key] = _fastest(ways, device)
    if name in ways:
        return ways[name]()
    return _first(ways, otherwise) if name else otherwise()


def chosen() -> dict[Hashable, str]:
    """The choices so far: names of ways by keys, which begin with the device; "" where none of the ways ran."""
    return dict(_chosen)


def _may_time(device: torch.device) -> bool:
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _first(ways: Mapping[str, Way], otherwise: Way) -> torch.Tensor:
    for name, way in ways.items():
        result = _tried(name, way)
        if result is not None:
            return result
    return otherwise()


def _fastest(ways: Mapping[str, Way], device: torch.device) -> str:
    """The name of the fastest, "" if none runs. The first call of each compiles, and is not timed."""
    able = [name for name, way in ways.items() if _tried(name, way) is not None]
    if len(able) < 2:
        return "".join(able)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in able}
    with torch.cuda.device(device):
        for _ in range(_ROUNDS):
            for name in able:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                for _ in range(_CALLS):
                    ways[name]()
                end.record()
                marks[name].append((begin, end))
        torch.cuda.current_stream().synchronize()
    spent = {name: min(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in marks.items()}
    return min(able, key=spent.__getitem__)


def _tried(name: str, way: Way) -> torch.Tensor | None:
    """What a way gives, None if it does not run on this device."""
    try:
        return way()
    except torch.OutOfMemoryError:
        raise
    except (BackendError, RuntimeError) as error:  # torch's operators raise RuntimeError for what they do not take
        _log.info("%s is not used: %s", name, error)
        return None
