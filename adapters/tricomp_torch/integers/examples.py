"""Example inputs of a model and the outputs they give. Imports torch and the core's errors; knows no plan.

Outputs are whatever trees of tensors the model returns; what is compared are their floating-point tensors, by their
place in the tree. The hard thing: a model that draws random numbers in eval mode, or that fails halfway, must neither
look like one that integers have changed, nor leave the program's random state moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from tricomp.errors import InvalidArgument

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        shown = [_shown(value) for value in self.args]
        return ", ".join(shown + [f"{name}={_shown(value)}" for name, value in self.kwargs.items()])


def batches_of(example_inputs: Any) -> list[Batch]:
    """The calls that example_inputs stand for.

    A tensor is one call of one argument, a tuple one call of several, a mapping one call of keywords, and a list is
    several calls, each a tensor, tuple, list or mapping. Raises InvalidArgument for all else, and for an empty list.
    """
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise InvalidArgument("example_inputs: an empty list. Give at least one batch, or None for weights alone.")
        return [_batch(item, f"example_inputs[{i}]") for i, item in enumerate(example_inputs)]
    return [_batch(example_inputs, "example_inputs")]


def run(model: torch.nn.Module, batch: Batch, name: str) -> Outputs:
    """The floating-point tensors among the outputs of one call, detached, by their place.

    Raises InvalidArgument, naming the batch, if the model raises, or returns no such tensor.
    """
    try:
        with torch.no_grad(), quiet_random():
            outputs = model(*_cloned(batch.args), **_cloned(dict(batch.kwargs)))
    except Exception as error:
        raise InvalidArgument(
            f"{name}: the model raised {type(error).__name__}: {_first_line(error)}. It was called with ({batch}); "
            "give inputs as model(*inputs) takes them, on the model's device."
        ) from error
    found = {path: leaf.detach() for path, leaf in leaves_of(outputs) if leaf.is_floating_point() and leaf.numel() > 0}
    if not found:
        raise InvalidArgument(
            f"{name}: the model returned {_shown(outputs)}, in which no floating-point tensor was found to compare. "
            "Plan the part of the model that gives floats, or wrap it so that it returns them."
        )
    return found


def leaves_of(outputs: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a tree of mappings, sequences and dataclasses, with their places; nothing of other objects."""
    if isinstance(outputs, torch.Tensor):
        yield path or "output", outputs
    elif isinstance(outputs, Mapping):  # ModelOutput of transformers is one
        for key, value in outputs.items():
            yield from leaves_of(value, f"{path}.{key}" if path else str(key))
    elif isinstance(outputs, (tuple, list)):
        for i, value in enumerate(outputs):
            yield from leaves_of(value, f"{path}[{i}]")
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        for field in fields(outputs):
            yield from leaves_of(getattr(outputs, field.name), f"{path}.{field.name}" if path else field.name)


@contextmanager
def quiet_random() -> Iterator[None]:
    """The same random numbers each time, and torch's generators as they were afterwards."""
    devices = list(range(torch.cuda.device_count()))  # said, for torch warns of all where there are several
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _batch(item: Any, name: str) -> Batch:
    if isinstance(item, torch.Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        return Batch((), dict(item))
    if isinstance(item, (tuple, list)):
        return Batch(tuple(item), {})
    raise InvalidArgument(
        f"{name}: expected a tensor, a tuple or a dict of the model's inputs, or a list of such, got "
        f"{type(item).__name__}. Of a data loader, give a list of a few batches, without their targets."
    )


def _cloned(value: Any) -> Any:
    """Tensors copied, for a model may write to its inputs."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _cloned(held) for key, held in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cloned(held) for held in value)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(_shown(held) for held in value[:8])})"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else "no message"
