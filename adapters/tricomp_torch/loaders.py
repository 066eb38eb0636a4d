"""What decides the order in which a DataLoader gives its data: as a pass over it begins, as plain data, and back.

Imports torch and rng; knows accelerate's loaders by their attributes alone. The hard thing: within a pass nothing can
be read off a shuffling sampler. So the state is taken before a pass, and the pass begun again and skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tricomp_torch import rng as generators

_SEEDS = ("initial_seed", "epoch")  # numbers that samplers shuffle by


def get_state(loader: Any) -> dict[str, Any]:
    """Random states of this process, and the loader's own seeds, generators and count of passes. loader None: none."""
    return {
        "rng": generators.get_state(),
        "iteration": getattr(loader, "iteration", None),
        "sampler": {name: getattr(_sampler(loader), name) for name in _SEEDS if hasattr(_sampler(loader), name)},
        "generators": [generator.get_state() for generator in _generators(loader)],
    }


def set_state(loader: Any, state: Mapping[str, Any], rng: bool = True) -> None:
    """Take over what get_state gave; a pass that begins now gives the data in the same order.

    rng: also the random states of this process, which are to be judged before.
    """
    if rng:
        generators.set_state(state["rng"])
    if state["iteration"] is not None and hasattr(loader, "iteration"):
        loader.iteration = state["iteration"]
    for name, seed in state["sampler"].items():
        if hasattr(_sampler(loader), name):
            setattr(_sampler(loader), name, seed)
    for generator, words in zip(_generators(loader), state["generators"], strict=False):
        generator.set_state(words.cpu())


def _sampler(loader: Any) -> Any:
    """The sampler below a loader's batch samplers."""
    sampler = getattr(loader, "batch_sampler", None) or getattr(loader, "sampler", None)
    while (inner := getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    return sampler


def _generators(loader: Any) -> Iterator[torch.Generator]:
    found = getattr(loader, "generator", None), getattr(_sampler(loader), "generator", None)
    for i, generator in enumerate(found):
        if isinstance(generator, torch.Generator) and generator not in found[:i]:
            yield generator
