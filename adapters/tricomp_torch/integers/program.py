"""A module that runs a graph of plain values: what lets a file be loaded without the model's code.

Imports torch and errors. No pickle: a graph is a list of nodes that name operators, see operators. The hard thing: the
reader must end with steps that can be run or with an error that says what is wrong, whatever the file holds.
"""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedVersion
from tricomp_torch.integers import operations, operators, recurrences, structure
from tricomp_torch.integers.describing import KINDS, VERSION
from tricomp_torch.integers.nodes import Plan
from tricomp_torch.integers.steps import Builder, Steps

_DIRECT = {**operations.DIRECT, **recurrences.DIRECT}


class Program(nn.Module):
    """Runs a graph that was read from a file. Its parameters and buffers have the names they had in the model.

    Called like the model was when it was exported: arguments by position or by name. Output classes come back as dicts.
    """

    def __init__(
        self, steps: Steps, form: Form, tensors: Mapping[str, torch.Tensor], places: Iterable[tuple[str, int]]
    ) -> None:
        """tensors: those that the graph uses, by name. places: the name of each, and its place in the steps."""
        super().__init__()
        tables = _attached(self, tensors)
        # Tensors are looked up where they stand at each call, for they may be moved. All names but these are free
        # for the model's own.
        self.__dict__["_tricomp_program"] = (steps, form, [(place, *tables[name]) for name, place in places])
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs. Raises InvalidArgument naming the input that is missing, unknown or of another form."""
        steps, form, places = self.__dict__["_tricomp_program"]
        values = form.bound(args, kwargs)
        leaves = itertools.chain.from_iterable(
            structure.leaves_of(values[name], nest, name) for name, nest in zip(form.names, form.structures)
        )
        flat = [_checked(value, facts) for value, facts in zip(leaves, form.leaves)]
        tensors = ((place, table[name]) for place, table, name in places)
        return structure.rebuilt(iter(steps(tensors, flat)), form.output)

    @property
    def integer_plan(self) -> Plan | None:
        """What became of each node of the float model; None if nobody told. Raises InvalidArgument if it is damaged."""
        told: Plan | Mapping[str, Any] | None = self.__dict__["_tricomp_plan"]
        if isinstance(told, Mapping):  # read when it is asked for, which most never do
            told = self.__dict__["_tricomp_plan"] = Plan.from_dict(told)
        return told

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


def read(
    described: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
    where: str = "graph",
    plan: Mapping[str, Any] | None = None,
) -> Program:
    """The module that runs a described graph on tensors of these names. plan: what Plan.to_dict gave.

    Raises CorruptFile, UnsupportedVersion.
    """
    if not isinstance(described, Mapping) or described.get("version") != VERSION:
        version = described.get("version") if isinstance(described, Mapping) else None
        raise UnsupportedVersion(
            f"{where}: version {version!r} of the graph, this tricomp reads {VERSION}. Update tricomp."
        )
    try:
        made = _Reader(tensors, torch.device(device), where).program(described)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFile(
            f"{where}: the graph in the file is not one that can be run: {type(error).__name__}: {error}. The file is "
            "damaged; save it again, or load with model=."
        ) from error
    made.__dict__["_tricomp_plan"] = plan
    return made


class _Reader:
    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device, where: str) -> None:
        self.tensors = tensors
        self.device = device
        self.where = where
        self.builder = Builder()
        self.made: dict[str, int] = {}
        self.attached: list[tuple[str, int]] = []

    def program(self, described: Mapping[str, Any]) -> Program:
        inputs = described["inputs"]
        n_inputs = 0
        for form in inputs["structures"]:
            n_inputs += structure.n_leaves(structure.require(form, f"{self.where}: input"))
        if n_inputs != len(inputs["leaves"]) or len(inputs["names"]) != len(inputs["structures"]):
            raise CorruptFile(f"{self.where}: {n_inputs} inputs by their structure, {len(inputs['leaves'])} described.")
        for facts in inputs["leaves"]:
            self._keep(self._identifier(facts["name"]), self.builder.input())
        for node in described["nodes"]:
            self._keep(node[0], self._node(node))
        output = structure.require(described["output"], f"{self.where}: output")
        if structure.n_leaves(output) != len(described["result"]):
            raise CorruptFile(
                f"{self.where}: the graph has {len(described['result'])} outputs, their structure differs."
            )
        steps = self.builder.finished([self._place(value) for value in described["result"]])
        form = Form(inputs["names"], inputs["structures"], inputs["leaves"], output)
        return Program(steps, form, {name: self.tensors[name] for name, _ in self.attached}, self.attached)

    def _keep(self, name: str, place: int) -> None:
        if not isinstance(name, str) or name in self.made:
            raise CorruptFile(f"{self.where}: two nodes of the graph are called {name!r}.")
        self.made[name] = place

    def _node(self, node: Any) -> int:
        name, target, *rest = node
        if target == "tensor":
            return self._attribute(rest[0], name)
        arguments, keywords = rest
        function = _DIRECT.get(target) or operators.operator_of(target, f"{self.where}: node {name!r}")
        if not isinstance(arguments, list):
            raise CorruptFile(f"{self.where}: node {name!r} has no list of arguments.")
        named = {self._identifier(key): self._place(value) for key, value in keywords.items()}
        return self.builder.call(function, [self._place(value) for value in arguments], named)

    def _attribute(self, target: str, name: str) -> int:
        if target not in self.tensors:
            raise CorruptFile(f"{self.where}: node {name!r} uses the tensor {target!r}, which is not in the file.")
        for part in target.split("."):
            self._identifier(part if not part.isdecimal() else f"_{part}")
            if hasattr(nn.Module, part):
                raise CorruptFile(f"{self.where}: {target!r} is no name of a tensor of a model. Save the model again.")
        self.attached.append((target, self.builder.constant(None)))
        return self.attached[-1][1]

    def _identifier(self, name: Any) -> str:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise CorruptFile(f"{self.where}: {str(name)[:80]!r} is no name. The file is damaged; do not trust it.")
        return name

    def _place(self, value: Any) -> int:
        """Of an argument: a node's result, a plain value, or a nest of both, which a step of its own makes."""
        if not _has_node(value):
            return self.builder.constant(self._plain(value))
        if isinstance(value, list):
            return self.builder.call(_listed, [self._place(part) for part in value], {})
        ((kind, inside),) = value.items()
        if kind == "node":
            return self.made[inside]
        return self.builder.call(_NESTS[kind], [self._place(part) for part in inside], {})

    def _plain(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._plain(part) for part in value]
        if not isinstance(value, Mapping):
            return value
        ((kind, inside),) = value.items()
        if kind in _NESTS:
            return _NESTS[kind](*(self._plain(part) for part in inside))
        if kind == "device":
            return self.device  # what was made on the exporting machine's device is made on this one's
        made = getattr(torch, inside)
        if not isinstance(made, KINDS[kind]):
            raise CorruptFile(f"{self.where}: {inside!r} is no {kind}.")
        return made


def _has_node(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "node" in value or any(map(_has_node, value.values()))
    return isinstance(value, list) and any(map(_has_node, value))


def _listed(*parts: Any) -> list[Any]:
    return list(parts)


def _tupled(*parts: Any) -> tuple[Any, ...]:
    return parts


_NESTS: dict[str, Callable[..., Any]] = {"tuple": _tupled, "slice": slice}


def _attached(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[dict[str, Any], str]]:
    """Make buffers of dotted names, with empty modules on the way. The table that holds each, and its name in there."""
    folders: dict[str, nn.Module] = {"": root}
    tables: dict[str, tuple[dict[str, Any], str]] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        buffers = _folder(folders, path)._buffers
        buffers[last] = tensor
        tables[name] = buffers, last
    return tables


def _folder(folders: dict[str, nn.Module], path: str) -> nn.Module:
    if path not in folders:
        parent, _, last = path.rpartition(".")
        made = nn.Module()
        made.training = False
        _folder(folders, parent)._modules[last] = made
        folders[path] = made
    return folders[path]
