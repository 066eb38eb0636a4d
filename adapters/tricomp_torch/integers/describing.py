"""From an exported graph to plain values, which `program` reads. Imports torch and errors.

The hard thing: what a file may not say (control flow, operators of other libraries, objects) is refused here, by name,
while the model that has it is still at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from tricomp.errors import UnsupportedNode
from tricomp_torch.integers import operators, structure

VERSION = 1
KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def describe(
    exported: torch.export.ExportedProgram, name_of: Callable[[str], str] = str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A graph as plain values, and its parameters, buffers and constants by name.

    name_of: what a tensor is to be called, by its name in the graph.
    Raises UnsupportedNode for control flow, operators of other libraries, and containers that have no names.
    """
    graph_module = exported.module(check_guards=False)
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    arguments, keywords = signature.in_spec.children()
    specs = [*arguments.children(), *keywords.children()]
    names = list(signature.forward_arg_names or [f"input{i}" for i in range(len(specs))])
    nodes: list[Any] = []
    leaves: list[Any] = []
    tensors: dict[str, torch.Tensor] = {}
    result: Any = None
    for node in graph_module.graph.nodes:
        where = f"node {node.name!r}"
        if node.op == "placeholder":
            leaves.append({"name": node.name, **_facts(node.meta.get("val"), where)})
        elif node.op == "get_attr":
            name = name_of(node.target)
            tensors[name] = _tensor(graph_module, node.target, where)
            nodes.append([node.name, "tensor", name])
        elif node.op == "call_function":
            name = operators.name_of(node.target, where)
            keyword_arguments = {key: _plain(value, where) for key, value in node.kwargs.items()}
            nodes.append([node.name, name, _plain(list(node.args), where), keyword_arguments])
        elif node.op == "output":
            flat = torch.utils._pytree.tree_leaves(node.args[0])
            result = [_plain(value, where) for value in flat]
        else:
            raise UnsupportedNode(f"{where}: a {node.op} cannot be described in a file. Save without the graph.")
    return {
        "version": VERSION,
        "torch": str(torch.__version__),
        "inputs": {
            "names": names,
            "structures": [structure.describe(spec, "input") for spec in specs],
            "leaves": leaves,
        },
        "nodes": nodes,
        "result": result,
        "output": structure.describe(signature.out_spec, "output"),
    }, tensors


def _facts(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        # A size that torch.export found to be a certain one is a SymInt too, of that number.
        shape = [n.node.maybe_as_int() if isinstance(n, torch.SymInt) else int(n) for n in value.shape]
        return {"dtype": str(value.dtype)[6:], "shape": shape}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UnsupportedNode(
        f"{where}: an input of {type(value).__name__} cannot be described in a file. Make it a tensor."
    )


def _tensor(module: nn.Module, target: str, where: str) -> torch.Tensor:
    found = module
    for part in target.split("."):
        found = getattr(found, part)
    if not isinstance(found, torch.Tensor):
        raise UnsupportedNode(
            f"{where}: {target!r} is a {type(found).__name__}, not a tensor (control flow inside the graph?). Save "
            "without the graph."
        )
    return found.detach()


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_plain(part, where) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(part, where) for part in value]}
    if isinstance(value, slice):
        return {"slice": [_plain(part, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, of in KINDS.items():
        if isinstance(value, of):
            return {kind: str(value)[6:]}
    raise UnsupportedNode(f"{where}: an argument of {type(value).__name__} cannot be described in a file.")
