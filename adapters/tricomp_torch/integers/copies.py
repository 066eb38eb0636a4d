"""A frozen copy of a model to work on. The original is read and never written. Imports torch and the core's errors.

Frozen: in eval mode, without gradients, parametrizations (weight norm and the like) resolved into plain weights, tied
weights one object. The hard thing: some models hold computed tensors as attributes, which torch refuses to copy, and
tensors without data or of other kinds, which must be told by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tricomp.errors import InvalidArgument
from tricomp_torch.tensors import PLAIN
from tricomp_torch.ties import TieFinder

_N_SHOWN = 4


def frozen_copy(model: nn.Module, *, needs_data: bool = True) -> nn.Module:
    """A copy in eval mode whose parameters need no gradients and are plain, tied ones being one object.

    needs_data: False takes a model on the meta device too, of which only what is one object is tied. Raises
    InvalidArgument if the model cannot be copied, is on the meta device, lazy, compiled, scripted or wrapped for
    several devices.
    """
    _check(model, needs_data)
    made = copied(model)
    made.eval()
    made.requires_grad_(False)
    for module in made.modules():
        _resolve(module)
    if not any(parameter.is_meta for parameter in made.parameters()):
        _tie(made)
    return made


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Attributes that are computed tensors, as weight_norm's are, become constants."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    for module in model.modules():
        for value in vars(module).get("_flat_weights", None) or ():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                computed[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        raise InvalidArgument(
            f"the {type(model).__name__} cannot be copied: {type(error).__name__}: {error}. Planning works on a copy; "
            "remove what copy.deepcopy does not take (open files, locks, computed tensors) from its attributes."
        ) from error


def check_finite(model: nn.Module) -> None:
    """Raise InvalidArgument, naming each, if floating-point parameters or buffers hold NaN or infinities."""
    bad: list[str] = []
    for name, tensor in [*model.named_parameters(), *_running(model)]:
        if tensor.is_floating_point() and type(tensor) in PLAIN:
            n_bad = tensor.numel() - int(tensor.isfinite().sum())
            if n_bad:
                bad.append(f"{name!r} ({n_bad:,} of {tensor.numel():,})")
    if bad:
        more = f" and {len(bad) - _N_SHOWN} more" if len(bad) > _N_SHOWN else ""
        raise InvalidArgument(
            f"the model holds NaN or infinities: {', '.join(bad[:_N_SHOWN])}{more}. Integers cannot hold them: the "
            "training has diverged, or these are masks, which should be buffers."
        )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers by name, tied ones under each name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in named}


def check_same(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InvalidArgument if a model's tensors are not those that a plan was made for."""
    here = shapes_of(model)
    lacks = [name for name in shapes if name not in here]
    extra = [name for name in here if name not in shapes]
    other = [name for name in shapes if name in here and here[name] != tuple(shapes[name])]
    if lacks or extra or other:
        name = (other or lacks or extra)[0]
        raise InvalidArgument(
            f"the plan was made for another model: {name!r} is of shape {_shape(shapes.get(name))} there and "
            f"{_shape(here.get(name))} here ({len(lacks)} missing, {len(extra)} unexpected, {len(other)} of another "
            "shape). Plan this model."
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _running(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Statistics of batch norms, which folding multiplies into weights. Other buffers may be masks of infinities."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            yield name, buffer


def _check(model: Any, needs_data: bool) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wrapped = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
    inner = wrapped.get(type(model).__name__)
    if inner is not None:
        raise InvalidArgument(f"model: a {type(model).__name__} wraps the model to plan. Give model.{inner}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidArgument("model: a scripted model has no modules to swap. Give the eager model.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise InvalidArgument(f"{name!r} has no shape yet: its module is lazy. Run one batch through the model.")
        if tensor.is_meta and needs_data:
            raise InvalidArgument(f"{name!r} is on the meta device and has no data. Load the weights first.")


def _resolve(module: nn.Module) -> None:
    """Turn what computes a weight before each forward into the weight it computes in eval mode."""
    if parametrize.is_parametrized(module):
        # By hand: torch's remove_parametrizations changes a class that the original module shares.
        names = list(module.parametrizations)  # type: ignore[arg-type]
        values = {name: getattr(module, name).detach().clone() for name in names}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        else:
            continue
        getattr(module, hook.name).requires_grad_(False)


def _tie(model: nn.Module) -> None:
    """Make parameters that cover the same memory one object, under all their names."""
    finder = TieFinder()
    first: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) not in PLAIN:
            continue
        finder.add(name, parameter)
        first[name] = parameter
        tied = finder.ties.get(name)
        if tied is not None and first[tied] is not parameter:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, first[tied])
