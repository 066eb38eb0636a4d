"""Which operations of a model use which of its tensors, as a trace shows it. Imports torch; changes no model.

A trace is a list of calls, each with the path of the innermost module it ran in. torch.export gives one where there
are example inputs; torch.fx gives a coarser one without. The hard thing: a tensor reaches an operation through views
of it, under any of its names, in modules that run several times; so a call names tensors by their first name, and
tells whether it took the transpose.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from tricomp_torch.integers.examples import Batch, leaves_of, quiet_random
from tricomp_torch.integers.nodes import Trace

# By the part of an operation's name before its overload: aten.linear.default and F.linear are both "linear".
_WEIGHT_AT = {
    "linear": 1,
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "embedding": 0,
    "matmul": 1,
    "mm": 1,
    "bmm": 1,
    "addmm": 2,
    "batch_norm": 3,
}
_PASSED_ON = ("detach", "alias", "contiguous", "clone", "_to_copy", "to", "type_as", "float", "lift_fresh_copy")
_TURNS = ("t", "numpy_T", "transpose", "permute", "swapaxes")
_N_NOTE = 160
_log = logging.getLogger("tricomp")


@dataclass(frozen=True)
class Call:
    """One operation. op: its bare name, or "module" for a whole module of torch.nn. module: path of the innermost
    module that it ran in. tensors: of the model, that it took, by first names. weight: the one that stands where
    operations take weights, and is_turned: as its transpose. source: the call whose output it took first; n_users: of
    its output. n_axes: of its output, if known.
    """

    op: str
    module: str
    tensors: tuple[str, ...]
    weight: str | None
    is_turned: bool
    source: int | None
    n_users: int
    n_axes: int | None


@dataclass(frozen=True)
class Graph:
    """The calls of a model, or none at all if it could not be traced. first_names: of tensors that have several.
    paths: of modules that stand at several, their first."""

    trace: Trace
    note: str
    calls: tuple[Call, ...]
    first_names: Mapping[str, str]
    paths: Mapping[str, str]

    def uses(self, tensor: str) -> list[tuple[int, Call]]:
        """The calls that took a tensor, by any of its names, with their numbers."""
        first = self.first_names.get(tensor, tensor)
        return [(i, call) for i, call in enumerate(self.calls) if first in call.tensors]


def trace(model: nn.Module, batch: Batch | None) -> Graph:
    """The graph of a model in eval mode, by the best way that works; never raises for what cannot be traced.

    The model may be left with attributes of the tracing: give a copy that is of no further use.
    """
    first_names, paths = _first_names(model), _first_paths(model)
    notes: list[str] = []
    if batch is not None:
        try:
            return Graph("export", "", tuple(_exported(model, batch, first_names, paths)), first_names, paths)
        except Exception as error:  # torch.export raises whatever the model or its own passes raise
            notes.append(f"torch.export: {_said(error)}")
    else:
        try:
            return Graph("symbolic", "", tuple(_symbolic(model, first_names, paths)), first_names, paths)
        except Exception as error:
            notes.append(f"torch.fx: {_said(error)}")
    return Graph("modules", "; ".join(notes), (), first_names, paths)


def export(model: nn.Module, batch: Batch, shapes: Any = None) -> torch.export.ExportedProgram:
    """The model as torch.export has it. Raises what torch.export raises.

    shapes: torch.export's dynamic_shapes; None: the first axis of every input may be of any size. Outputs that are no
    tensors nor numbers (a language model's cache of keys and values, say) become None, with a warning.
    """
    signature = _spelt_out(inspect.signature(model.forward), batch)
    if shapes is None:
        bound = signature.bind(*batch.args, **batch.kwargs)
        shapes = {name: _dynamic(value) for name, value in bound.arguments.items()}
    with _plain_outputs(model, signature), _plain_attention(), quiet_random(), torch.no_grad(), _silence():
        return torch.export.export(model, batch.args, dict(batch.kwargs), dynamic_shapes=shapes, strict=False)


def _spelt_out(signature: inspect.Signature, batch: Batch) -> inspect.Signature:
    """With a name for each of what *args and **kwargs take: torch.export gives those no dynamic shape."""
    n_named = sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in signature.parameters.values())
    made: list[inspect.Parameter] = []
    for one in signature.parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            names = [f"{one.name}_{i}" for i in range(len(batch.args) - n_named)]
            made = [other.replace(kind=one.POSITIONAL_ONLY) if names else other for other in made]
            made += [inspect.Parameter(name, one.POSITIONAL_ONLY) for name in names]
        elif one.kind is one.VAR_KEYWORD:
            names = [name for name in batch.kwargs if name not in signature.parameters]
            made += [inspect.Parameter(name, one.KEYWORD_ONLY) for name in names]
        else:
            made.append(one)
    return inspect.Signature(made)


@contextlib.contextmanager
def _plain_outputs(model: nn.Module, signature: inspect.Signature) -> Iterator[None]:
    """Meanwhile the model gives None for what a graph cannot give, and says that it takes what signature has."""
    forward, was_own = model.forward, "forward" in model.__dict__
    lost: dict[str, str] = {}

    def kept(path: Any, leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str, torch.SymInt, torch.SymFloat)):
            return leaf
        lost[keystr(path)] = type(leaf).__name__
        return None

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return tree_map_with_path(kept, forward(*args, **kwargs))

    plain.__dict__["__signature__"] = signature
    model.__dict__["forward"] = plain
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if was_own:
            model.__dict__["forward"] = forward
    for name, kind in lost.items():
        _log.warning("the graph of %s gives None for its output%s, a %s", type(model).__name__, name, kind)


def _exported(
    model: nn.Module, batch: Batch, first_names: Mapping[str, str], paths: Mapping[str, str]
) -> Iterator[Call]:
    values = (*batch.args, *batch.kwargs.values())
    shapes = {"values": tuple(map(_dynamic, values))} if values else None
    with _plain_attention(), quiet_random(), torch.no_grad(), _silence():
        exported = torch.export.export(_Flat(model, batch), values, dynamic_shapes=shapes, strict=False)
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    yield from _calls(exported.graph, named, first_names, paths, model, "model.")


class _Flat(nn.Module):
    """A model of plain inputs and outputs: torch.export knows few of the classes that models return."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model, self.n_args, self.names = model, len(batch.args), tuple(batch.kwargs)

    def forward(self, *values: Any) -> list[torch.Tensor]:
        kwargs = dict(zip(self.names, values[self.n_args :], strict=True))
        return [tensor for _, tensor in leaves_of(self.model(*values[: self.n_args], **kwargs))]


def _dynamic(value: Any) -> Any:
    """A batch dimension of any size for each tensor; what torch finds to be fixed becomes fixed."""
    auto = torch.export.Dim.AUTO
    return tree_map(lambda leaf: {0: auto} if isinstance(leaf, torch.Tensor) and leaf.ndim else None, value)


def _symbolic(model: nn.Module, first_names: Mapping[str, str], paths: Mapping[str, str]) -> Iterator[Call]:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    with _plain_attention(), torch.no_grad(), _silence():
        graph = fx.Tracer().trace(model, concrete_args=defaults or None)
    named = {node.name: str(node.target) for node in graph.nodes if node.op == "get_attr"}
    yield from _calls(graph, named, first_names, paths, model)


def _calls(
    graph: fx.Graph,
    named: Mapping[str, str],
    first_names: Mapping[str, str],
    paths: Mapping[str, str],
    model: nn.Module,
    prefix: str = "",
) -> Iterator[Call]:
    """The calls of a graph. named: nodes that are tensors of the model. prefix: of the model in what was traced."""
    views: dict[fx.Node, tuple[str, bool]] = {}
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        name = named.get(node.name, "").removeprefix(prefix)
        if name in first_names:
            views[node] = (first_names[name], False)
            continue
        op = _op(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source in views and (op in _PASSED_ON or (op in _TURNS and _n_axes(node) in (2, None))):
            held, is_turned = views[source]
            views[node] = (held, is_turned != (op in _TURNS))
            continue
        at = _WEIGHT_AT.get(op)
        if op == "embedding" and source not in views:
            at = 1  # F.embedding takes the indices first
        weight = node.args[at] if at is not None and len(node.args) > at else node.kwargs.get("weight")
        used = views.get(weight) if isinstance(weight, fx.Node) else None
        tensors = [views[other][0] for other in node.all_input_nodes if other in views]
        module = f"{_module(node)}.".removeprefix(prefix).removesuffix(".")
        if node.op == "call_module":
            tensors += [
                first_names[f"{module}.{name}" if module else name]
                for name in shallow_names(model.get_submodule(module))
                if f"{module}.{name}".lstrip(".") in first_names
            ]
        numbers[node] = len(numbers)
        yield Call(
            op,
            paths.get(module, module),
            tuple(dict.fromkeys(tensors)),
            used[0] if used else None,
            used is not None and used[1],
            numbers.get(source) if source is not None else None,
            len(node.users),
            _n_axes(node),
        )


def shallow_names(module: nn.Module) -> list[str]:
    """Names of a module's parameters and buffers, those of its parts too."""
    return [name for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]]


def _op(node: fx.Node) -> str:
    if node.op == "call_module":
        return "module"
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _module(node: fx.Node) -> str:
    """Path of the innermost module; a module's second call is marked by torch with @1 in keys, not in paths."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]).partition("@")[0] if stack else ""


def _n_axes(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else None


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter and buffer, by each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(tensor), name) for name, tensor in named}


def _first_paths(model: nn.Module) -> dict[str, str]:
    firsts: dict[int, str] = {}
    return {path: firsts.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)}


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Transformers and attention step by step, not as one fused operation that hides which module uses what."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings and logs of the tracer: what it cannot trace is told in one sentence of ours."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # Where torch cannot trace, it prints the whole graph so far.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    sentence = lines[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence if len(sentence) <= _N_NOTE else sentence[:_N_NOTE] + '...'}"
