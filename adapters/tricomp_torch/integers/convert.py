"""From a plan to a model that runs on integers. Imports torch, the preset form and the modules that hold integers.

The hard thing: what is tied stays tied. A weight that several modules share becomes one IntegerWeight that all of them
hold, and a module that stands at several paths is swapped at each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import convolution
from tricomp_torch.integers.attention import IntegerMultiheadAttention
from tricomp_torch.integers.embedding import IntegerEmbedding
from tricomp_torch.integers.forms import prepare, replaced
from tricomp_torch.integers.linear import IntegerLinear
from tricomp_torch.integers.nodes import NodePlan, Plan
from tricomp_torch.integers.reading import put_in_place
from tricomp_torch.integers.recurrent import IntegerGRU, IntegerLSTM
from tricomp_torch.integers.weights import IntegerWeight

MakeWeight = Callable[[str, NodePlan, torch.Tensor], IntegerWeight]


def convert(model: nn.Module, plan: Plan) -> nn.Module:
    """A new model that runs on integers where the plan says so, in eval mode; the given one is not touched.

    Its state dict has `name.codes` and `name.scales` in the place of each weight `name` that became integers, and its
    attribute `integer_plan` is the plan. It gives no gradients. Raises InvalidArgument if the plan was made for another
    model, or weights are not finite.
    """
    made = with_integers(prepare(model, plan), plan, quantized_weight)
    made.integer_plan = plan  # type: ignore[assignment]
    return made


def quantized_weight(name: str, node: NodePlan, weight: torch.Tensor) -> IntegerWeight:
    """The integers of a float weight, as its node plans."""
    assert node.bits is not None
    return IntegerWeight.of(
        weight, node.bits, node.group, scale_dtype=node.scale_dtype, is_turned=name in node.turned, name=name
    )


def with_integers(model: nn.Module, plan: Plan, make_weight: MakeWeight) -> nn.Module:
    """The prepared model, changed in place: returned, for it may itself be a layer that is replaced.

    make_weight: gives the integers of a tensor by its name, node and float tensor, which may be on the meta device.
    """
    made: dict[int, IntegerWeight] = {}
    kept: list[torch.Tensor] = []  # so that no address is taken again while names are told by it

    def weight_of(name: str, node: NodePlan, held: torch.Tensor) -> IntegerWeight:
        if id(held) not in made:
            kept.append(held)
            made[id(held)] = make_weight(name, node, held)
        return made[id(held)]

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for node in plan.integer_nodes:
        weights = {name: weight_of(name, node, _tensor(parameters, name)) for name in node.tensors}
        if node.place == "parameter":
            for name, weight in weights.items():
                _put_everywhere(model, parameters[name], weight)
        else:
            layer = model.get_submodule(node.name)
            inside = {name[len(node.name) + 1 :] if node.name else name: weight for name, weight in weights.items()}
            model = replaced(model, node.name, swapped(layer, node, inside))
    return model


def swapped(layer: nn.Module, node: NodePlan, weights: dict[str, IntegerWeight]) -> nn.Module:
    """The module that runs a node of place "module" on integers. weights: by their names in the float layer."""
    is_dynamic = node.activations == "dynamic"
    if node.kind == "linear":
        return IntegerLinear(weights["weight"], layer.bias, is_dynamic=is_dynamic)  # type: ignore[arg-type]
    if node.kind == "embedding":
        return IntegerEmbedding(weights["weight"], layer.padding_idx)  # type: ignore[arg-type]
    if isinstance(layer, nn.MultiheadAttention):
        return IntegerMultiheadAttention(layer, weights, is_dynamic=is_dynamic)
    if isinstance(layer, nn.LSTM):
        return IntegerLSTM(layer, weights, is_dynamic=is_dynamic)
    if isinstance(layer, nn.GRU):
        return IntegerGRU(layer, weights, is_dynamic=is_dynamic)
    return convolution.converted(layer, weights["weight"], is_dynamic=is_dynamic)


def _put_everywhere(model: nn.Module, held: nn.Parameter, weight: IntegerWeight) -> None:
    for module in model.modules():
        for attribute in [name for name, parameter in module._parameters.items() if parameter is held]:
            put_in_place(module, attribute, weight)


def _tensor(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in parameters:
        raise InvalidArgument(f"the plan names the weight {name!r}, which this model lacks. Plan this model.")
    return parameters[name]
