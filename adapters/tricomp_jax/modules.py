"""Modules and optimizers of flax.nnx in a tree: their state in their place, and back. Imports no flax by itself.

The hard thing: an nnx object is changed in place by training, where all else in jax is replaced; so is it by a restore.
"""

from __future__ import annotations

import sys
from typing import Any

_PLAIN = (dict, list, tuple)


def states_of(tree: Any) -> Any:
    """A tree with nnx.state of every nnx object that it is, or that stands in its dicts, lists and tuples."""
    try:
        return _states_of(tree)
    except RecursionError:  # it holds itself, which flatten tells
        return tree


def _states_of(tree: Any) -> Any:
    if _is_object(tree):
        return sys.modules["flax.nnx"].state(tree)
    kind = type(tree)
    if kind not in _PLAIN:
        return tree
    if kind is dict:
        return {key: _states_of(value) for key, value in tree.items()}
    return kind(_states_of(value) for value in tree)


def put_back(target: Any, states: Any) -> Any:
    """What states_of made of the target, with the target's nnx objects for their states, which they now have."""
    if _is_object(target):
        sys.modules["flax.nnx"].update(target, states)
        return target
    kind = type(target)
    if kind not in _PLAIN:
        return states
    if kind is dict:
        return {key: put_back(value, states[key]) for key, value in target.items()}
    return kind(put_back(value, state) for value, state in zip(target, states, strict=True))


def _is_object(value: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or isinstance(value, nnx.Variable | nnx.State):
        return False
    names = ("Module", "Optimizer", "Object", "Pytree")  # as flax has had them
    return isinstance(value, tuple(getattr(nnx, name) for name in names if hasattr(nnx, name)))
