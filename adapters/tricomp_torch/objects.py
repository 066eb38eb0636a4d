"""Stateful objects (modules, optimizers, schedulers, generators, ...): their states taken, paired up and given back.

Holds no file code; `checks` judges the pairs before anything is given. The hard thing: an optimizer's own
load_state_dict casts its state to the parameter's dtype, which loses bits, so the bits are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.tree import join

_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class States:
    """States of objects as one tree; by path, the objects' class names, and [name, shape] of optimizers' parameters.

    facts: of a leaf, by path, what is equal of two that hold the same; None: the tree's tensors tell.
    """

    tree: dict[str, Any]
    classes: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, list[list[Any]]] = field(default_factory=dict)
    facts: Callable[[str], Hashable] | None = None


def states_of(tree: Any, notes: Mapping[str, Any], facts: Callable[[str], Hashable] | None = None) -> States:
    """The States that a file holds. facts: see States.

    Raises InvalidArgument if a Checkpointer did not write it, CorruptFile.
    """
    if not isinstance(tree, dict) or "classes" not in notes:
        raise InvalidArgument("it was not saved by a Checkpointer. Load it with tricomp_torch.load or tricomp.load.")
    classes, parameters = notes["classes"], notes.get("parameters", {})
    entries = [entry for rows in parameters.values() for entry in rows] if isinstance(parameters, dict) else [None]
    is_table = isinstance(classes, dict) and all(isinstance(name, str) for name in classes.values())
    if not is_table or not all(isinstance(e, list) and len(e) == 2 and isinstance(e[1], list) for e in entries):
        raise CorruptFile("its notes on classes and parameters are damaged. Load it with tricomp_torch.load.")
    return States(tree, classes, parameters, facts)


@dataclass(frozen=True)
class Pair:
    """An object given to restore, and the state stored for it."""

    path: str
    target: Any
    state: Any


def is_object(value: Any) -> bool:
    """Whether value has a state of its own that can be taken and given back."""
    if isinstance(value, torch.Generator | np.random.Generator):
        return True
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def unwrapped(value: Any) -> Any:
    """The module in what torch.compile, DataParallel and DistributedDataParallel wrap around it; all else as it is.

    Their prefixes ("_orig_mod.", "module.") are no part of the model: a checkpoint goes into whatever is around it.
    """
    while isinstance(value, torch.nn.Module):
        if isinstance(value, _PARALLEL):
            value = value.module
        elif "_orig_mod" in value._modules:
            value = value._modules["_orig_mod"]
        else:
            break
    return value


def holds_object(value: Any) -> bool:
    """Whether value is, or a nesting of dicts, lists and tuples that has in it, an object with a state."""
    return is_object(value) or any(holds_object(entry) for _, entry in _entries(value))


def take(values: Mapping[str, Any], names: Mapping[int, str]) -> States:
    """The states of all objects in values; all else stays as it is. names: what `parameter_names` gave."""
    states = States({})

    def walk(value: Any, path: str) -> Any:
        value = unwrapped(value)
        if is_object(value):
            states.classes[path] = type(value).__name__
            if isinstance(value, torch.optim.Optimizer):
                states.parameters[path] = parameters_in_order(value, names)
            return _state_of(value)
        if not holds_object(value):
            return value
        if isinstance(value, dict):
            return {key: walk(entry, join(path, key)) for key, entry in value.items()}
        return type(value)(walk(entry, join(path, i)) for i, entry in enumerate(value))

    for slot, value in values.items():
        states.tree[slot] = walk(value, join(None, slot))
    return states


def pair_up(values: Any, tree: Any, path: str | None = None) -> Iterator[Pair]:
    """Every object in values with its stored state; the state is None where the tree has none."""
    values = unwrapped(values)
    if is_object(values):
        yield Pair(path or "", values, tree)
    for key, value in _entries(values):
        entries = dict(_entries(tree))
        if key in entries or holds_object(value):
            yield from pair_up(value, entries.get(key), join(path, key))


def put_in(values: Any, tree: Any) -> Any:
    """The tree with each object of values in the place of its state."""
    if is_object(values):
        return values
    if not holds_object(values):
        return tree
    entries = dict(_entries(values))
    if isinstance(tree, dict):
        return {key: put_in(entries.get(key), state) for key, state in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(put_in(entries.get(i), state) for i, state in enumerate(tree))
    return tree


def give(pair: Pair, strict: bool) -> None:
    """Let the object take over the state. strict: as in torch, for modules."""
    target, state = pair.target, pair.state
    if isinstance(target, torch.Generator):
        target.set_state(state.cpu())
    elif isinstance(target, np.random.Generator):
        target.bit_generator.state = state
    elif isinstance(target, torch.nn.Module):
        target.load_state_dict(state, strict=strict)
    elif isinstance(target, torch.optim.Optimizer):
        devices = _devices(target)
        target.load_state_dict(state)
        _put_bits_back(target, state, devices)
    else:
        target.load_state_dict(state)


def parameter_names(model: Any) -> dict[int, str]:
    """Name of each parameter of the module, or of the modules in a dict or list, by id."""
    model = unwrapped(model)
    if isinstance(model, torch.nn.Module):
        return {id(parameter): name for name, parameter in model.named_parameters()}
    return {key: name for _, entry in _entries(model) for key, name in parameter_names(entry).items()}


def parameters_in_order(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[Any]]:
    """[name, shape] of the optimizer's parameters in its own order, all that its state goes by; name "" if unknown."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [[names.get(id(parameter), ""), list(parameter.shape)] for parameter in parameters]


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if type(value) in (list, tuple):
        return list(enumerate(value))
    return []


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return dict(value.bit_generator.state)
    return value.state_dict()


def _devices(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.device]]:
    """Where the tensors among each group's options are, a learning rate say."""
    return [
        {key: value.device for key, value in group.items() if isinstance(value, torch.Tensor)}
        for group in optimizer.param_groups
    ]


def _put_bits_back(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], devices: list[dict[str, torch.device]]
) -> None:
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, stored in state["state"].get(number, {}).items():
            if key in optimizer.state[parameter]:
                optimizer.state[parameter][key] = _exact(optimizer.state[parameter][key], stored)
    for group, device_of in zip(optimizer.param_groups, devices, strict=True):
        for key, device in device_of.items():  # a file keeps no devices, and load_state_dict moves no options
            if isinstance(group.get(key), torch.Tensor):
                group[key] = group[key].to(device)


def _exact(held: Any, stored: Any) -> Any:
    """What the optimizer holds after its load_state_dict, with the tensors that were cast made those stored."""
    if isinstance(stored, torch.Tensor) and isinstance(held, torch.Tensor):
        is_cast = held.dtype != stored.dtype or type(held) is not type(stored)
        return stored.to(held.device) if is_cast and held.shape == stored.shape else held
    if type(stored) in (list, tuple) and type(held) is type(stored) and len(held) == len(stored):
        return type(held)(_exact(*entries) for entries in zip(held, stored, strict=True))
    if type(stored) is dict and type(held) is dict and held.keys() == stored.keys():
        return {key: _exact(held[key], stored[key]) for key in held}
    return held
