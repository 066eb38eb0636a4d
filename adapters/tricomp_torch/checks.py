"""Whether a stored state fits the object that is to take it over. Changes nothing.

The hard thing: torch itself would load much of what does not fit without a word: values of another dtype, a scheduler
of another class, moments of parameters that now come in another order. Each is a sentence here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from tricomp.tree import join
from tricomp_torch.objects import Pair, States, parameters_in_order
from tricomp_torch.subclasses import parts_of
from tricomp_torch.tensors import to_array
from tricomp_torch.ties import TieFinder, is_same
from tricomp_torch.trees import plain_leaves

_N_SHOWN = 8


def problems(pair: Pair, saved: States, names: Mapping[int, str], strict: bool) -> Iterator[str]:
    """Sentences that say why the object cannot take over the state; none if it can.

    saved: as `objects.take` found it at save; names: of the parameters of the models given now.
    strict=False lets pass missing and unexpected keys of modules (as torch does), a missing state, another class or
    dtype; wrong shapes never pass.
    """
    target, here = pair.target, type(pair.target).__name__
    if pair.state is None:
        if strict:
            yield f"{pair.path}: the checkpoint holds no state for this {here}"
        return
    if isinstance(target, torch.nn.Module):
        yield from _module_problems(pair, saved, strict)
        return
    stored = saved.classes.get(pair.path, here)
    if strict and stored != here:  # modules are judged by their keys: wrappers rename their classes
        yield f"{pair.path}: the checkpoint holds the state of a {stored}, got a {here}"
    elif isinstance(target, torch.optim.Optimizer):
        yield from _optimizer_problems(pair, saved.parameters.get(pair.path, []), names, strict)


def missing_and_unexpected(pair: Pair) -> tuple[list[str], list[str]]:
    """Keys of the module that the state lacks, and keys of the state that the module lacks."""
    if not isinstance(pair.target, torch.nn.Module) or pair.state is None:
        return [], []
    live = pair.target.state_dict()
    return [key for key in live if key not in pair.state], [key for key in pair.state if key not in live]


def _module_problems(pair: Pair, saved: States, strict: bool) -> Iterator[str]:
    if not isinstance(pair.state, Mapping):
        yield f"{pair.path}: the checkpoint holds a {type(pair.state).__name__}, expected a module's state"
        return
    live = pair.target.state_dict()
    missing, unexpected = missing_and_unexpected(pair)
    if strict and missing:
        yield f"{pair.path}: missing from the checkpoint: {_shown(missing)}"
    if strict and unexpected:
        yield f"{pair.path}: in the checkpoint but not in the module: {_shown(unexpected)}"
    ties = TieFinder()
    leaves: dict[str, torch.Tensor] = {}
    for key, held in live.items():
        stored = pair.state.get(key)
        if not isinstance(held, torch.Tensor) or key not in pair.state:
            continue
        where = join(pair.path, key)
        if not isinstance(stored, torch.Tensor):
            yield f"{where}: the checkpoint holds a {type(stored).__name__}, the module a tensor"
        elif is_lazy(held):
            continue
        elif stored.shape != held.shape:
            yield f"{where}: the checkpoint holds shape {tuple(stored.shape)}, the module {tuple(held.shape)}"
        elif held.is_meta:
            yield f"{where}: the module's tensor is on the meta device and takes no data. Call module.to_empty() first"
        elif strict and stored.dtype != held.dtype:
            yield f"{where}: the checkpoint holds {stored.dtype}, the module {held.dtype}; loading would round"
        elif parts_of(stored, where) != parts_of(held, where):
            kinds = type(stored).__name__, type(held).__name__
            what = "{} of other parts" if kinds[0] == kinds[1] else "{}"
            yield f"{where}: the checkpoint holds a {kinds[0]}, the module a {what.format(kinds[1])}; they do not fit"
        else:
            for (path, leaf), (_, taken) in zip(plain_leaves(held, where), plain_leaves(stored, where), strict=True):
                ties.add(path, leaf)
                leaves[path] = taken
    if strict:
        for path, first in ties.ties.items():
            if not _is_same(saved, leaves, path, first):
                other = first.removeprefix(f"{pair.path}/")
                yield f"{path}: one tensor with {other!r} in the module, but the two differ in the checkpoint"


def _is_same(saved: States, leaves: Mapping[str, torch.Tensor], path: str, first: str) -> bool:
    """Whether two leaves hold the same in the checkpoint."""
    if saved.facts is not None:
        return saved.facts(path) == saved.facts(first)
    return is_same(to_array(leaves[path], path), to_array(leaves[first], first))


def _optimizer_problems(
    pair: Pair, stored_parameters: list[list[Any]], names: Mapping[int, str], strict: bool
) -> Iterator[str]:
    if not isinstance(pair.state, Mapping) or not {"state", "param_groups"} <= set(pair.state):
        yield f"{pair.path}: the checkpoint holds something else than an optimizer's state"
        return
    stored = [len(group["params"]) for group in pair.state["param_groups"]]
    here = [len(group["params"]) for group in pair.target.param_groups]
    if stored != here:
        yield f"{pair.path}: the checkpoint holds groups of {_counts(stored)} parameters, the optimizer {_counts(here)}"
        return
    here_parameters = parameters_in_order(pair.target, names)
    for i, ((was, shape), (now, here_shape)) in enumerate(zip(stored_parameters, here_parameters, strict=False)):
        if shape != here_shape:
            shapes = f"had shape {tuple(shape)} when saved, now {tuple(here_shape)}"
            yield f"{pair.path}: parameter {i}{_named(now)} {shapes}"
        elif strict and was and now and was != now:
            yield (
                f"{pair.path}: parameter {i} was {was!r} when saved and is {now!r} now; "
                "its moments would go to another parameter"
            )
            return


def _named(name: str) -> str:
    return f" ({name!r})" if name else ""


def _shown(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _N_SHOWN} more" if len(keys) > _N_SHOWN else ""
    return ", ".join(repr(key) for key in keys[:_N_SHOWN]) + more


def _counts(counts: list[int]) -> str:
    return " + ".join(str(count) for count in counts) or "no"
