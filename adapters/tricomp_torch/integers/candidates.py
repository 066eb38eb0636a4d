"""The nodes of a model that can become integers. Imports torch; changes no model.

A module of a known kind is a node if it runs exactly what torch's own does. The hard thing: its weight may be used by
others as well (a head that shares the embedding's, a weight that is read directly), and it may have hooks; such a
module stays in place, and its weight is dequantised whenever it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from tricomp_torch.integers.forms import OutputFirstConvTranspose
from tricomp_torch.integers.graph import Call, Graph
from tricomp_torch.integers.nodes import Fold, Kind, NodePlan
from tricomp_torch.tensors import PLAIN

_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Embedding: "embedding",
    nn.MultiheadAttention: "attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
}
_METHODS = ("forward", "_conv_forward")  # what a subclass must have left as it is
_OPERATIONS = {  # of nodes that are a parameter used by itself: axes of the weight
    "linear": (2,),
    "matmul": (2,),
    "mm": (2,),
    "addmm": (2,),
    "embedding": (2,),
    "conv1d": (3,),
    "conv2d": (4,),
}
_TAKES_TURNED = ("matmul", "mm", "addmm")  # x @ weight: [in, out]
INPUT_FIRST = "transformers.pytorch_utils.Conv1D"  # class of linear layers that hold [in, out]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of node that a module is; None if it is none, or a subclass that runs something else."""
    if isinstance(module, OutputFirstConvTranspose):
        return "conv_transpose1d" if len(module.kernel_size) == 1 else "conv_transpose2d"
    for known, kind in _KINDS.items():
        if isinstance(module, known):
            is_own = all(getattr(type(module), name, None) is getattr(known, name, None) for name in _METHODS)
            return kind if is_own else None
    return None


def candidates(model: nn.Module, graph: Graph, folds: tuple[Fold, ...], turns: tuple[str, ...]) -> list[NodePlan]:
    """Every node of a model in the preset form, all in float: bits None, error 0, with a reason if it must stay so."""
    nodes = list(_modules(model, graph, folds, turns))
    taken = {graph.first_names.get(name, name) for node in nodes for name in node.tensors}
    nodes += _parameters(model, graph, taken)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return _tied(sorted(nodes, key=lambda node: order[node.tensors[0]]), graph)


def _modules(model: nn.Module, graph: Graph, folds: tuple[Fold, ...], turns: tuple[str, ...]) -> Iterator[NodePlan]:
    inside: set[int] = set()
    folded = {fold.layer for fold in folds}
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or id(module) in inside:
            continue
        inside |= {id(part) for part in module.modules()}
        tensors = _weights(module, kind, path)
        held = [model.get_parameter(name) if _is_parameter(model, name) else None for name in tensors]
        if not tensors or any(tensor is None for tensor in held):
            continue
        why = why_in_place(model, module, graph, tensors)
        words = ["output channel first"] if path in turns else []
        words += ["batch norm folded"] if path in folded else []
        words += [why] if why else []
        node = _node(path, kind, tensors, [tensor for tensor in held if tensor is not None], words)
        aliases = tuple(other for other, first in graph.paths.items() if first == path and other != path)
        yield replace(
            node,
            place="parameter" if why else "module",
            aliases=aliases,
            reason=_why_float(module, [tensor for tensor in held if tensor is not None]),
        )


def _parameters(model: nn.Module, graph: Graph, taken: set[str]) -> Iterator[NodePlan]:
    """Parameters that no node owns, all of whose uses are those of a weight."""
    for name, parameter in model.named_parameters():
        if name in taken or type(parameter) not in PLAIN or not parameter.is_floating_point():
            continue
        uses = [call for _, call in graph.uses(name)]
        operations = {call.op for call in uses}
        if not uses or any(call.weight != name or parameter.ndim not in _OPERATIONS.get(call.op, ()) for call in uses):
            continue
        ways = {(call.op in _TAKES_TURNED) != call.is_turned for call in uses}
        if len(ways) > 1:
            continue
        node = _node(name, "parameter", [name], [parameter], [f"used by {' and '.join(sorted(operations))}"])
        yield replace(
            node,
            place="parameter",
            aliases=tuple(other for other, first in graph.first_names.items() if first == name and other != name),
            turned=(name,) if ways == {True} else (),
            reason=_why_float(None, [parameter]),
        )


def _node(path: str, kind: Kind, tensors: list[str], held: list[torch.Tensor], words: list[str]) -> NodePlan:
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    form = ", ".join(words) or "as it is"
    return NodePlan(path, kind, None, None, tuple(tensors), form, 0.0, None, n_bytes, n_bytes)


def _tied(nodes: list[NodePlan], graph: Graph) -> list[NodePlan]:
    """Nodes that hold the tensors of an earlier one say so, and count no bytes."""
    firsts = {node.name: tuple(graph.first_names.get(name, name) for name in node.tensors) for node in nodes}
    owners = {firsts[node.name]: node for node in reversed(nodes)}
    in_place = {firsts[node.name] for node in nodes if node.place == "parameter"}
    shared = _partly_shared(nodes, firsts)
    made: list[NodePlan] = []
    for node in nodes:
        owner = owners[firsts[node.name]]
        if owner is not node:
            node = replace(node, tied=owner.name, float_bytes=0, integer_bytes=0, reason=node.reason or owner.reason)
        if firsts[node.name] in in_place and node.place == "module":  # all that hold it, alike
            node = replace(node, place="parameter", form=f"{node.form}, read on access")
        if node.name in shared:
            node = replace(node, reason="shares some of its weights with other nodes, not all")
        made.append(node)
    return made


def _partly_shared(nodes: list[NodePlan], firsts: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Nodes of which some tensor belongs to another node of other tensors, or which takes it the other way round."""
    holders: dict[str, list[NodePlan]] = {}
    for node in nodes:
        for name in firsts[node.name]:
            holders.setdefault(name, []).append(node)
    return {
        node.name
        for held in holders.values()
        for node in held
        if len({(firsts[other.name], bool(other.turned)) for other in held}) > 1
    }


def _weights(module: nn.Module, kind: Kind, path: str) -> list[str]:
    """Names in the state dict of what becomes integers."""
    prefix = f"{path}." if path else ""
    if kind == "attention":
        own = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [prefix + name for name in own if getattr(module, name) is not None] + [f"{prefix}out_proj.weight"]
    if kind in ("lstm", "gru"):
        return [prefix + name for name, _ in module.named_parameters() if name.startswith("weight_")]
    return [f"{prefix}weight"]


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    parameter = model.get_submodule(owner)._parameters.get(attribute)
    return parameter is not None


def why_in_place(
    model: nn.Module, module: nn.Module, graph: Graph, tensors: list[str], is_to_turn: bool = False
) -> str:
    """Why a module must stay and have its weights dequantised on access; empty if it can be swapped."""
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return "has hooks, read on access"
    if "forward" in vars(module):
        return "its forward was replaced, read on access"
    if any(not _is_owned(model, graph, call, name) for name in tensors for _, call in graph.uses(name)):
        return "weight used elsewhere too, read on access"
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)) and not is_to_turn:
        return "input channel first, read on access"
    return ""


def _is_owned(model: nn.Module, graph: Graph, call: Call, name: str) -> bool:
    """Whether a call is that of a node which holds the tensor, under any of its names."""
    first = graph.first_names.get(name, name)
    inside = f"{call.module}." if call.module else ""
    held = [other[len(inside) :] for other, of in graph.first_names.items() if of == first and other.startswith(inside)]
    if call.op == "module":  # one of torch's own, of which the trace shows no inside
        return bool(held)
    module = module_at(model, call.module)
    if module is None or (kind_of(module) is None and class_of(module) != INPUT_FIRST) or call.op == "output":
        return False
    return any("." not in rest.removeprefix("out_proj.") for rest in held)


def _why_float(module: nn.Module | None, held: list[torch.Tensor]) -> str:
    for tensor in held:
        if type(tensor) not in PLAIN:
            return f"its weight is a {type(tensor).__name__} already"
        if not tensor.is_floating_point():
            return f"its weight is of {str(tensor.dtype).removeprefix('torch.')}"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rescales its weight whenever it runs"
    if all(tensor.numel() == 0 for tensor in held):
        return "it has no weights"
    return ""


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def class_of(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
