"""Nodes of a prepared model in integers for a while: how a plan is measured. Imports torch and the modules that run.

A node is put in by swapping its module for the very one that `convert` would make, and taken out by putting the same
float module back, so weights are as they were because they are never written. The hard thing: codes are searched for
once and kept, as integers, for each form that a node is tried in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from tricomp_torch.integers.convert import quantized_weight, swapped
from tricomp_torch.integers.convolution import gains_by_codes
from tricomp_torch.integers.nodes import NodePlan
from tricomp_torch.integers.weights import IntegerWeight


class Trials:
    """Puts nodes of a prepared model into integers, and back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._weights = dict(model.named_parameters(remove_duplicate=False))
        self._errors: dict[tuple[str, int | None, int | None], float] = {}
        self._made: dict[tuple[int, bool, int | None, int | None], IntegerWeight] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}  # where each module stands
        for owner in model.modules():
            for attribute, module in owner._modules.items():
                self._places.setdefault(id(module), []).append((owner, attribute))

    def rows(self, name: str, node: NodePlan) -> tuple[int, int]:
        """Rows that have scales of their own, and the weights in each."""
        weight = self._weights[name]
        n_rows = weight.shape[1 if name in node.turned else 0]
        return n_rows, weight.numel() // max(1, n_rows)

    def gains_by_codes(self, node: NodePlan) -> bool:
        """Whether a node is a convolution that runs faster with its inputs as codes."""
        return gains_by_codes(self.model.get_submodule(node.name))

    def weight_error(self, node: NodePlan) -> float:
        """Relative RMS error of a node's weights: of the root of all squared errors to that of all squares."""
        key = (node.tied or node.name, node.bits, node.group)
        if key not in self._errors:
            error = total = 0.0
            for name in node.tensors:
                weight = self._weights[name].detach()
                error += float(torch.dist(self._integers(name, node)().double(), weight.double())) ** 2
                total += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
            self._errors[key] = (error / total) ** 0.5 if total else 0.0
        return self._errors[key]

    @contextmanager
    def applied(self, nodes: Sequence[NodePlan]) -> Iterator[nn.Module]:
        """The model with these nodes in integers. Nodes left in float are passed over."""
        model = self.model
        parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        layers: list[nn.Module] = []
        try:
            for node in nodes:
                if node.is_integer and node.place == "parameter" and node.tied is None:
                    parameters += self._round(node)
            for node in nodes:
                if node.is_integer and node.place == "module":
                    layer = model.get_submodule(node.name)
                    n_before = len(node.name) + 1 if node.name else 0
                    weights = {name[n_before:]: self._integers(name, node) for name in node.tensors}
                    made = swapped(layer, node, weights)
                    layers.append(layer)
                    for owner, attribute in self._places.get(id(layer), ()):
                        setattr(owner, attribute, made)
                    model = made if layer is model else model
            yield model
        finally:
            for layer in layers:
                for owner, attribute in self._places.get(id(layer), ()):
                    setattr(owner, attribute, layer)
            for owner, attribute, parameter in parameters:
                setattr(owner, attribute, parameter)

    def _round(self, node: NodePlan) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """What integers would read as, in the place of parameters, wherever these stand; returns what stood where."""
        done: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name in node.tensors:
            held = self._weights[name]
            rounded = nn.Parameter(self._integers(name, node)(), requires_grad=False)
            places = [
                (module, attribute)
                for module in self.model.modules()
                for attribute, parameter in module._parameters.items()
                if parameter is held
            ]
            for module, attribute in places:
                setattr(module, attribute, rounded)
                done.append((module, attribute, held))
        return done

    def _integers(self, name: str, node: NodePlan) -> IntegerWeight:
        weight = self._weights[name]
        key = (id(weight), name in node.turned, node.bits, node.group)
        if key not in self._made:
            self._made[key] = quantized_weight(name, node, weight)
        return self._made[key]
