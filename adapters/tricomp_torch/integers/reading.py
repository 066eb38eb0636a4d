"""Modules that stay, with weights that become floats whenever they are read. Imports torch and the weights' module.

For modules with hooks, and weights that several use in ways of their own. The module's class is replaced by a subclass
whose properties are the weights. The hard thing: LSTM and GRU keep a list of their weights, which must be one too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers.weights import IntegerWeight

APART = "_integers"


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Meanwhile the integers stand beside the attributes that read them, under names that end in APART.

    For torch.export, which looks up submodules as attributes, and would find floats.
    """
    held = [(module, name) for module in model.modules() for name in getattr(type(module), "_integer_weights", ())]
    for module, name in held:
        module._modules[name + APART] = module._modules.pop(name)
    try:
        yield
    finally:
        for module, name in held:
            module._modules[name] = module._modules.pop(name + APART)


def put_in_place(module: nn.Module, attribute: str, weight: IntegerWeight) -> None:
    """Replace a parameter of a module by integers that are read as floats."""
    names = (*getattr(type(module), "_integer_weights", ()), attribute)
    base: Any = getattr(type(module), "_integer_base", type(module))
    del module._parameters[attribute]
    module.__dict__.pop("_flat_weights", None)
    module.__class__ = _reading(base, tuple(dict.fromkeys(names)))
    module._modules[attribute] = weight


@functools.cache
def _reading(base: type, names: tuple[str, ...]) -> type:
    """A subclass of base with a property for each name. Cached, so that copies of a module share their class."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> torch.Tensor:
            weight: Any = self._modules.get(name) or self._modules[name + APART]
            return weight()  # type: ignore[no-any-return]

        def refuse(self: nn.Module, value: Any) -> None:
            raise InvalidArgument(f"{name!r} is made of integers: it can be read, not set. Convert the float model.")

        return property(read, refuse)

    members: dict[str, Any] = {name: reader(name) for name in names}
    if issubclass(base, nn.RNNBase):
        flat = lambda self: [getattr(self, name) for name in self._flat_weights_names]  # noqa: E731
        members["_flat_weights"] = property(flat, lambda self, value: None)
    members |= {"_integer_weights": names, "_integer_base": base, "__module__": base.__module__}
    return type(base.__name__, (base,), members)
