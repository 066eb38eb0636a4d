"""A model's graph as plain values, and a module that runs it: what lets a file be loaded without the model's code.

Imports torch and errors. No pickle: a graph is a list of nodes that name operators, see operators. The hard thing: the
reader must end with a graph that torch.fx runs or with an error that says what is wrong, whatever the file holds.
"""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode, UnsupportedVersion
from tricomp_torch.integers import operations, operators, structure

VERSION = 1
assert operations  # its operators are registered when it is imported
_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


class Program(nn.Module):
    """Runs a graph that was read from a file. Its parameters and buffers have the names they had in the model.

    Called like the model was when it was exported: arguments by position or by name. Output classes come back as dicts.
    """

    def __init__(self, run: Callable[..., Any], tensors: nn.Module, form: Form) -> None:
        """run: the graph's function of a module and flat inputs. tensors: a module that holds what the graph uses."""
        super().__init__()
        # All names but this one are free for the model's own.
        self.__dict__["_tricomp_program"] = (run, form)
        self._modules.update(tensors._modules)
        self._buffers.update(tensors._buffers)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs. Raises InvalidArgument naming the input that is missing, unknown or of another form."""
        run, form = self.__dict__["_tricomp_program"]
        values = form.bound(args, kwargs)
        leaves = itertools.chain.from_iterable(
            structure.leaves_of(values[name], nest, name) for name, nest in zip(form.names, form.structures)
        )
        flat = [_checked(value, facts) for value, facts in zip(leaves, form.leaves)]
        return structure.rebuilt(iter(run(self, *flat)), form.output)

    def train(self, mode: bool = True) -> Program:
        """A program is for inference: eval() is allowed, train() is not."""
        if mode:
            raise InvalidArgument(
                "This model is for inference only and cannot be trained. Train the float model instead."
            )
        return super().train(False)


@dataclass(frozen=True)
class Form:
    """What a graph takes and gives. structures: of each named input. leaves: facts of theirs. output: a structure."""

    names: Sequence[str]
    structures: Sequence[Any]
    leaves: Sequence[Mapping[str, Any]]
    output: Any

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by name. Raises InvalidArgument naming those that are missing, unknown or given twice."""
        if len(args) > len(self.names):
            raise InvalidArgument(
                f"The model takes {len(self.names)} inputs ({', '.join(self.names)}), got {len(args)}."
            )
        values = dict(zip(self.names, args))
        if twice := sorted(set(values) & set(kwargs)):
            raise InvalidArgument(f"The model got {', '.join(twice)} twice: by position and by name.")
        values.update(kwargs)
        # An input that was None or a number when the graph was made may be left out: the graph has its value in it.
        fixed = {name: value for name, value in self._fixed() if name not in values}
        missing = sorted(set(self.names) - set(values) - set(fixed))
        unexpected = sorted(set(values) - set(self.names))
        if missing or unexpected:
            raise InvalidArgument(
                f"The model takes {', '.join(self.names)}: missing {missing}, unexpected {unexpected}."
            )
        return {**values, **fixed}

    def _fixed(self) -> Iterator[tuple[str, Any]]:
        facts = iter(self.leaves)
        for name, nest in zip(self.names, self.structures):
            inside = list(itertools.islice(facts, structure.n_leaves(nest)))
            if nest == structure.LEAF and "value" in inside[0]:
                yield name, inside[0]["value"]


def _checked(value: Any, facts: Mapping[str, Any]) -> Any:
    name = facts["name"]
    if "value" in facts:
        if value != facts["value"] or type(value) is not type(facts["value"]):
            raise InvalidArgument(
                f"{name}: the graph was made with {facts['value']!r} and holds for that value only, got {value!r}."
            )
        return value
    if not isinstance(value, torch.Tensor):
        raise InvalidArgument(f"{name}: expected a tensor, got {type(value).__name__}.")
    shape = facts["shape"]
    is_shape = len(shape) == value.dim() and all(n is None or n == m for n, m in zip(shape, value.shape))
    if not is_shape or str(value.dtype) != f"torch.{facts['dtype']}":
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise InvalidArgument(
            f"{name}: expected {facts['dtype']} of shape ({expected}), got {str(value.dtype)[6:]} of shape "
            f"{tuple(value.shape)}."
        )
    return value


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
    for kind, of in _KINDS.items():
        if isinstance(value, of):
            return {kind: str(value)[6:]}
    raise UnsupportedNode(f"{where}: an argument of {type(value).__name__} cannot be described in a file.")


def read(
    described: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
    where: str = "graph",
) -> Program:
    """The module that runs a described graph on tensors of these names.

    Raises CorruptFile, UnsupportedVersion.
    """
    if not isinstance(described, Mapping) or described.get("version") != VERSION:
        version = described.get("version") if isinstance(described, Mapping) else None
        raise UnsupportedVersion(
            f"{where}: version {version!r} of the graph, this tricomp reads {VERSION}. Update tricomp."
        )
    try:
        return _Reader(tensors, torch.device(device), where).program(described)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFile(
            f"{where}: the graph in the file is not one that can be run: {type(error).__name__}: {error}. The file is "
            "damaged; save it again, or load with model=."
        ) from error


class _Reader:
    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device, where: str) -> None:
        self.tensors = tensors
        self.device = device
        self.where = where
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.made: dict[str, fx.Node] = {}
        self.attached: set[str] = set()

    def program(self, described: Mapping[str, Any]) -> Program:
        inputs = described["inputs"]
        n_inputs = 0
        for form in inputs["structures"]:
            n_inputs += structure.n_leaves(structure.require(form, f"{self.where}: input"))
        if n_inputs != len(inputs["leaves"]) or len(inputs["names"]) != len(inputs["structures"]):
            raise CorruptFile(f"{self.where}: {n_inputs} inputs by their structure, {len(inputs['leaves'])} described.")
        for facts in inputs["leaves"]:
            self._keep(facts["name"], self.graph.placeholder(self._identifier(facts["name"])))
        for node in described["nodes"]:
            self._keep(node[0], self._node(node))
        output = structure.require(described["output"], f"{self.where}: output")
        if structure.n_leaves(output) != len(described["result"]):
            raise CorruptFile(
                f"{self.where}: the graph has {len(described['result'])} outputs, their structure differs."
            )
        self.graph.output(tuple(self._value(value) for value in described["result"]))
        self.graph.lint()
        form = Form(inputs["names"], inputs["structures"], inputs["leaves"], output)
        return Program(type(fx.GraphModule(self.root, self.graph)).forward, self.root, form)

    def _keep(self, name: str, node: fx.Node) -> None:
        if not isinstance(name, str) or name in self.made:
            raise CorruptFile(f"{self.where}: two nodes of the graph are called {name!r}.")
        self.made[name] = node

    def _node(self, node: Any) -> fx.Node:
        name, target, *rest = node
        where = f"{self.where}: node {name!r}"
        if target == "tensor":
            return self._attribute(rest[0], where)
        arguments, keywords = rest
        function = operators.operator_of(target, where)
        named = {self._identifier(key): self._value(value) for key, value in keywords.items()}
        return self.graph.call_function(function, tuple(self._value(arguments)), named)

    def _attribute(self, target: str, where: str) -> fx.Node:
        if target not in self.tensors:
            raise CorruptFile(f"{where}: the graph uses the tensor {target!r}, which is not in the file.")
        if target not in self.attached:
            for part in target.split("."):
                self._identifier(part if not part.isdecimal() else f"_{part}")
                if hasattr(nn.Module, part):
                    raise CorruptFile(f"{where}: {target!r} is no name of a tensor of a model. Save the model again.")
            attach(self.root, target, self.tensors[target])
            self.attached.add(target)
        return self.graph.get_attr(target)

    def _identifier(self, name: Any) -> str:
        # torch.fx writes these into the Python code that it compiles: nothing but a name may come out of a file.
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise CorruptFile(f"{self.where}: {str(name)[:80]!r} is no name. The file is damaged; do not trust it.")
        return name

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(part) for part in value]
        if not isinstance(value, Mapping):
            return value
        ((kind, inside),) = value.items()
        if kind == "node":
            return self.made[inside]
        if kind == "tuple":
            return tuple(self._value(part) for part in inside)
        if kind == "slice":
            return slice(*(self._value(part) for part in inside))
        if kind == "device":
            return self.device  # what was made on the exporting machine's device is made on this one's
        made = getattr(torch, inside)
        if not isinstance(made, _KINDS[kind]):
            raise CorruptFile(f"{self.where}: {inside!r} is no {kind}.")
        return made


def attach(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a tensor as a buffer under a dotted name, with empty modules on the way."""
    *folders, last = name.split(".")
    module = root
    for folder in folders:
        if folder not in module._modules:
            module.add_module(folder, nn.Module())
        module = module.get_submodule(folder)
    module.register_buffer(last, tensor)
