"""What a plan says: which nodes of a model become integers, how, and at what cost. Imports no torch.

A plan holds names and numbers, no tensors: it can be stored, read by a human, and applied to the same model again. The
hard thing: names are those of the prepared model, the float model in the preset form that `prepare` makes, whose state
dict differs from the original's where batch norms were folded or weights turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import msgpack

from tricomp.errors import InvalidArgument
from tricomp_torch.integers.report import report

Kind = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "embedding",
    "attention",
    "lstm",
    "gru",
    "parameter",
]
Bits = Literal[8, 7, 6, 5, 4]
Place = Literal["module", "parameter"]
Activations = Literal["float", "dynamic"]
Trace = Literal["export", "symbolic", "modules"]

_VERSION = 1


@dataclass(frozen=True)
class Budget:
    """How far the outputs of the converted model may be from the float model's, on the example inputs.

    max_error: largest absolute error of any output element, relative to the range (max - min) of that output tensor.
    cosine: least cosine similarity of any output tensor with the float model's.
    top1: least part of positions whose arg max over top1_axis is the float model's, in the first output of two or more
    dimensions (the one named "logits" if there is one).
    weight_error: largest relative RMS error of any node's weights; needs no example inputs.
    size: the most bytes the selected nodes' weights may take, relative to their float bytes. None: no limit.
    """

    max_error: float | None = None
    cosine: float | None = None
    top1: float | None = None
    weight_error: float | None = None
    size: float | None = None
    top1_axis: int = -1

    @property
    def is_of_outputs(self) -> bool:
        """Whether it can only be judged by example inputs."""
        return (self.max_error, self.cosine, self.top1) != (None, None, None)


@dataclass(frozen=True)
class Effect:
    """What integers do to the outputs on the example inputs; terms as in Budget. top1: None if no output has one."""

    max_error: float
    cosine: float
    top1: float | None


@dataclass(frozen=True)
class NodePlan:
    """One node: a module with weights, or a parameter that is used by itself.

    name: path of the module in the prepared model; of the parameter if kind is "parameter".
    kind: "parameter" for a weight that no module of a known kind owns.
    bits: 8 to 5, run as int8, or 4; None leaves the node in float. group: weights per scale in a row of an int4 node;
    None: one per row.
    tensors: names in the prepared model's state dict of what is turned into integers, each [out, ...] unless turned.
    form: the preset form, in words, such as "batch norm folded".
    error: of the outputs (max_error) with this node alone in integers; without example inputs, the relative RMS error
    of its weights, which weight_error holds in any case. cosine, top1: likewise alone; None without example inputs.
    float_bytes, integer_bytes: of tensors, before entropy coding, scales included; 0 for a node tied to another.
    place: "module": `convert` swaps the module. "parameter": the module stays (its weights are used by others too, or
    it has hooks), and each tensor becomes an attribute that is dequantised whenever it is read.
    activations: "dynamic": inputs are quantised too, to int8 per row, in convolutions per sample (symmetric, by the
    largest magnitude of each).
    aliases: further paths of the same module object, or of the same parameter.
    tied: name of the earlier node that holds the same tensors; same bits, group and scale_dtype; codes are shared.
    turned: tensors that are [in, out] in the model and quantised as their transpose (x @ w).
    reason: why a node was left in float.
    """

    name: str
    kind: Kind
    bits: Bits | None
    group: int | None
    tensors: tuple[str, ...]
    form: str
    error: float
    cosine: float | None
    float_bytes: int
    integer_bytes: int
    top1: float | None = None
    weight_error: float = 0.0
    place: Place = "module"
    activations: Activations = "float"
    scale_dtype: str = "float32"
    aliases: tuple[str, ...] = ()
    tied: str | None = None
    turned: tuple[str, ...] = ()
    reason: str = ""

    @property
    def is_integer(self) -> bool:
        """Whether the node is to be converted."""
        return self.bits is not None

    def in_float(self, reason: str) -> NodePlan:
        """The node, left in float, and why."""
        return replace(self, bits=None, group=None, activations="float", integer_bytes=self.float_bytes, reason=reason)


@dataclass(frozen=True)
class Fold:
    """A batch norm whose eval form goes into the convolution or linear layer before it. Both are paths of modules."""

    layer: str
    norm: str


@dataclass(frozen=True)
class Plan:
    """The nodes of a model and what becomes of each, with what brings the model to the preset form.

    nodes: in the order of the model's parameters, those left in float too.
    folds: batch norms to fold. turns: modules whose weights are turned to output channel first.
    trace: how the model was read: "export" (torch.export), "symbolic" (torch.fx, without inputs) or "modules" (a walk
    over modules, which shows no use: nothing is folded); note says why not by export.
    budget: as asked. measured: effect of all chosen nodes together; None without example inputs.
    other_bytes: of parameters and buffers that are in no node.
    shapes: of the original's state dict, so that a plan is not applied to another model.
    """

    nodes: tuple[NodePlan, ...]
    folds: tuple[Fold, ...] = ()
    turns: tuple[str, ...] = ()
    trace: Trace = "modules"
    note: str = ""
    budget: Budget | None = None
    measured: Effect | None = None
    other_bytes: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NodePlan:
        """The node of that name. Raises InvalidArgument if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise InvalidArgument(f"no node {name!r} in this plan; it has {', '.join(node.name for node in self.nodes)}")

    def __str__(self) -> str:
        return report(self)

    @property
    def integer_nodes(self) -> tuple[NodePlan, ...]:
        """The nodes that become integers."""
        return tuple(node for node in self.nodes if node.is_integer)

    @property
    def float_bytes(self) -> int:
        """Bytes of the prepared float model."""
        return sum(node.float_bytes for node in self.nodes) + self.other_bytes

    @property
    def integer_bytes(self) -> int:
        """Bytes of the converted model, before entropy coding."""
        return sum(node.integer_bytes for node in self.nodes) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, which `from_dict` takes."""
        return {"version": _VERSION, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """The plan of such a dict. Raises InvalidArgument if it is none."""
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            raise InvalidArgument(f"this is no plan of version {_VERSION}: a dict made by Plan.to_dict was expected")
        made: Self = _made(cls, {key: value for key, value in state.items() if key != "version"}, "plan")
        return made

    def to_bytes(self) -> bytes:
        """The plan as msgpack."""
        return bytes(msgpack.packb(self.to_dict()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The plan of such bytes. Raises InvalidArgument if they are none."""
        try:
            state = msgpack.unpackb(data)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise InvalidArgument(f"these bytes are no plan: {error}. Plan.to_bytes makes them.") from error
        return cls.from_dict(state)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(held) for held in value]
    return value


@cache
def _types_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, which Python evaluates from their texts each time it is asked."""
    return get_type_hints(kind)


def _made(kind: Any, state: Any, where: str) -> Any:
    """A value of an annotated type, of plain values: dicts become dataclasses, lists tuples. Checks every type."""
    origin, inside = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(state, Mapping):
        kinds = _types_of(kind)
        if unknown := [key for key in state if key not in kinds]:
            raise InvalidArgument(f"{where}: a {kind.__name__} has no {unknown[0]!r}. Plan.to_dict makes such a dict.")
        try:
            return kind(**{key: _made(kinds[key], value, f"{where}.{key}") for key, value in state.items()})
        except TypeError as error:
            raise InvalidArgument(f"{where}: this is no {kind.__name__}: {error}. Plan.to_dict makes it.") from error
    if origin is Literal and any(state == choice and type(state) is type(choice) for choice in inside):
        return state
    if origin in (Union, UnionType):
        if state is None and NoneType in inside:
            return None
        (kind,) = (each for each in inside if each is not NoneType)  # None or one other, no more
        return _made(kind, state, where)
    if origin is tuple and isinstance(state, (list, tuple)):
        return tuple(_made(inside[0], item, f"{where}[{i}]") for i, item in enumerate(state))
    if origin is Mapping and isinstance(state, Mapping):
        return {
            _made(inside[0], key, where): _made(inside[1], item, f"{where}[{key!r}]") for key, item in state.items()
        }
    if kind is float and type(state) is int:
        return float(state)
    if type(state) is kind:
        return state
    raise InvalidArgument(
        f"{where}: expected {getattr(kind, '__name__', kind)}, got {state!r:.80}. Plan.to_dict makes such a dict."
    )
