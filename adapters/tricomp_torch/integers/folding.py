"""Which batch norms can be folded, and which weights turned, as the trace of a model shows. Imports torch.

The hard thing: a norm may go into the layer before it only if nothing else ever sees what is between the two, and only
if its channels are the layer's rows; a trace must show both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tricomp_torch.integers.candidates import INPUT_FIRST, class_of, kind_of, module_at, why_in_place
from tricomp_torch.integers.forms import NORMS
from tricomp_torch.integers.graph import Call, Graph
from tricomp_torch.integers.nodes import Fold
from tricomp_torch.tensors import PLAIN

_FOLDED = ("linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")


def folds_of(model: nn.Module, graph: Graph) -> tuple[Fold, ...]:
    """The batch norms that can go into the layer before: those that are the only user of its output, each time.

    model: the frozen copy that the graph is of, or one like it.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for i, call in enumerate(graph.calls):
        layer = graph.calls[call.source] if call.source is not None else None
        if layer is None or layer.n_users != 1 or call.module == layer.module:
            continue
        if type(module_at(model, call.module)) not in NORMS or not _fits(model, layer):
            continue
        found.setdefault((layer.module, call.module), []).extend([call.source or 0, i])
    return tuple(
        Fold(layer, norm)
        for (layer, norm), numbers in found.items()
        if _is_alone(model, graph, layer, norm, set(numbers))
    )


def turns_of(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """Modules whose weights are to be turned to output channel first: transposed convolutions, x @ weight layers."""
    return tuple(
        path
        for path, module in model.named_modules()
        if (kind_of(module) in ("conv_transpose1d", "conv_transpose2d") or class_of(module) == INPUT_FIRST)
        and not why_in_place(model, module, graph, [f"{path}.weight".lstrip(".")], is_to_turn=True)
        and not _is_tied(graph, [f"{path}.weight".lstrip(".")])
    )


def _is_tied(graph: Graph, tensors: list[str]) -> bool:
    firsts = list(graph.first_names.values())
    return any(firsts.count(graph.first_names.get(name, name)) > 1 for name in tensors)


def _fits(model: nn.Module, layer: Call) -> bool:
    """Whether the norm scales what are the layer's output channels."""
    module = module_at(model, layer.module)
    kind = kind_of(module) if module is not None else None
    if kind is None or kind not in _FOLDED or layer.op not in (*_FOLDED, "module"):
        return False
    if kind == "linear":  # [n, features], whose features a norm of [n, channels, length] would not scale
        return layer.n_axes == 2
    if kind.endswith("1d"):
        return layer.n_axes == 3
    return True  # a norm over images takes batches of them alone


def _is_alone(model: nn.Module, graph: Graph, layer: str, norm: str, numbers: set[int]) -> bool:
    """Whether the tensors of both are used in just these calls, and both can be changed."""
    parts = [model.get_submodule(layer), model.get_submodule(norm)]
    for path, module in zip((layer, norm), parts, strict=True):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            full = f"{path}.{name}" if path else name
            if type(tensor) not in PLAIN or (name != "num_batches_tracked" and not tensor.is_floating_point()):
                return False
            if any(i not in numbers for i, _ in graph.uses(full)) or _is_tied_elsewhere(graph, full):
                return False
    held: Any = parts[1]
    is_counted = held.running_mean is not None and held.running_var is not None
    return bool(is_counted and held.num_features == _n_rows(parts[0]))


def _is_tied_elsewhere(graph: Graph, name: str) -> bool:
    """Whether a tensor has names in other modules; those of one module that stands at several paths are fine."""
    owner = graph.paths.get(name.rpartition(".")[0])
    first = graph.first_names.get(name, name)
    others = [other.rpartition(".")[0] for other, held in graph.first_names.items() if held == first]
    return any(graph.paths.get(other) != owner for other in others)


def _n_rows(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
