"""Modules that compute what integer modules will, in float: how a plan is measured. Imports torch and the core.

A node is put into a model by swapping its module for a shallow copy with rounded weights, and taken out by putting the
very same module back, so weights are restored bit for bit because they are never written. The hard thing: codes are
searched for once and kept, as integers, for each form that a node is tried in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from tricomp.integers import Quantized, dequantize, quantize
from tricomp_torch.integers.forms import replaced
from tricomp_torch.integers.nodes import NodePlan
from tricomp_torch.tensors import to_array, to_tensor


class Emulation:
    """Puts nodes of a prepared model into integers, as emulated in float, and back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._weights = dict(model.named_parameters(remove_duplicate=False))
        self._errors: dict[tuple[str, int | None, int | None], float] = {}
        self._codes: dict[tuple[int, bool, int, int | None], Quantized] = {}

    def rows(self, name: str, node: NodePlan) -> tuple[int, int]:
        """Rows that have a scale of their own, and the weights in each."""
        weight = self._weights[name]
        n_rows = weight.shape[1 if name in node.turned else 0]
        return n_rows, weight.numel() // max(1, n_rows)

    def weight_error(self, node: NodePlan) -> float:
        """Relative RMS error of a node's weights: of the root of all squared errors to that of all squares."""
        key = (node.tied or node.name, node.bits, node.group)
        if key not in self._errors:
            error = total = 0.0
            for name in node.tensors:
                weight = self._weights[name].detach()
                error += float(torch.dist(self._values(name, node).double(), weight.double())) ** 2
                total += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
            self._errors[key] = (error / total) ** 0.5 if total else 0.0
        return self._errors[key]

    @contextmanager
    def applied(self, nodes: Sequence[NodePlan]) -> Iterator[nn.Module]:
        """The model with these nodes in integers. Nodes left in float are passed over."""
        model = self.model
        parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        swapped: list[tuple[str, nn.Module]] = []
        try:
            for node in nodes:
                if node.is_integer and node.place == "parameter" and node.tied is None:
                    parameters += self._put_parameters(node)
            for node in nodes:
                if node.is_integer and node.place == "module":
                    module = model.get_submodule(node.name)
                    model = replaced(model, node.name, self._emulated(module, node))
                    swapped.append((node.name, module))
            yield model
        finally:
            for path, module in reversed(swapped):
                model = replaced(model, path, module)
            for owner, attribute, parameter in parameters:
                setattr(owner, attribute, parameter)

    def _put_parameters(self, node: NodePlan) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Rounded weights in the place of parameters, wherever these stand; what stood where."""
        done: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name in node.tensors:
            held = self._weights[name]
            rounded = nn.Parameter(self._values(name, node), requires_grad=False)
            places = {
                (id(module), attribute): (module, attribute)
                for module in self.model.modules()
                for attribute, parameter in module._parameters.items()
                if parameter is held
            }
            for module, attribute in places.values():
                setattr(module, attribute, rounded)
                done.append((module, attribute, held))
        return done

    def _emulated(self, module: nn.Module, node: NodePlan) -> nn.Module:
        made = _shallow(module)
        for name in node.tensors:
            inside = name[len(node.name) + 1 :] if node.name else name
            part, _, attribute = inside.rpartition(".")
            owner = made
            if part:  # out_proj of attention
                owner = _shallow(module.get_submodule(part))
                setattr(made, part, owner)
            setattr(owner, attribute, nn.Parameter(self._values(name, node), requires_grad=False))
        if node.activations == "dynamic":
            plain = made.forward
            made.__dict__["forward"] = lambda input: plain(rounded_rows(input))
        return made

    def _values(self, name: str, node: NodePlan) -> torch.Tensor:
        assert node.bits is not None
        weight, is_turned = self._weights[name], name in node.turned
        key = (id(weight), is_turned, node.bits, node.group)
        if key not in self._codes:
            array = to_array((weight.detach().t() if is_turned else weight.detach()).contiguous(), name)
            self._codes[key] = quantize(array, node.bits, group=node.group, scale_dtype=node.scale_dtype, leaf=name)
        values = to_tensor(dequantize(self._codes[key]), name, weight.device)
        return values.t().contiguous() if is_turned else values


def rounded_rows(input: torch.Tensor) -> torch.Tensor:
    """Each row [..., n] as 255 levels, in float."""
    rows = input.float()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    codes = (rows / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-127, 127)
    return (codes * scale).to(input.dtype)


def _shallow(module: nn.Module) -> nn.Module:
    """Another module of the same parts, whose own tables can be changed."""
    made = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        made.__dict__[table] = dict(module.__dict__[table])
    if "_flat_weights" in made.__dict__:
        made.__dict__["_flat_weights"] = list(module.__dict__["_flat_weights"])
    return made
