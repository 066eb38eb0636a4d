"""`plan`: from a model and example inputs to what becomes of each node. Imports torch and the package's steps.

The model is read and never written: all work is done on copies in eval mode. The hard thing: effects are measured with
nodes as they will run, one alone at first, so that the report says what each costs, then all of them together.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from tricomp.errors import BudgetError, InvalidArgument
from tricomp_torch.integers import candidates as nodes_of
from tricomp_torch.integers.choice import Choice, Unit, choose, nodes_on
from tricomp_torch.integers.copies import check_finite, frozen_copy, shapes_of
from tricomp_torch.integers.effect import Examples, usage
from tricomp_torch.integers.examples import batches_of
from tricomp_torch.integers.forms import in_preset_form
from tricomp_torch.integers.graph import Graph, trace
from tricomp_torch.integers.nodes import Activations, Bits, Budget, Effect, Fold, NodePlan, Plan
from tricomp_torch.integers.report import budget_text, effect_text, type_of
from tricomp_torch.integers.trials import Trials

_log = logging.getLogger("tricomp")
Select = str | Iterable[str] | Callable[[str, nn.Module | None], bool]
DEFAULT_GROUP = 64
GROUP_STEP = 16
_DYNAMIC_KINDS = ("linear", "attention")  # whose inputs become int8 too
_ALONE_BATCHES = 4  # first ones, on which nodes are measured alone; all together they are measured on all
_N_SHOWN = 6
_SCALE_BYTES = {"float32": 4, "bfloat16": 2}


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    budget: Budget | None = None,
    select: Select | None = None,
    bits: Literal[8, 4, "auto"] = 8,
    group: int | None = None,
    activations: Literal["auto", "float", "dynamic"] = "auto",
) -> Plan:
    """Which nodes of a model become integers, so that its outputs on the example inputs stay within a budget.

    model: is not changed, nor its mode; it is planned as in eval mode, on its device.
    example_inputs: a tensor, a tuple or a dict of the model's inputs, or a list of such; a few hundred rows of real
    data are worth most. None: errors of weights are told instead, and only Budget's weight_error and size can be asked.
    budget: None for no limit. What it does not allow stays in float.
    select: glob patterns of node names ("blocks.*.mlp.*"), or a function of name and module; None: every node.
    bits: 8 (one scale per output channel), 4 (a scale per group of weights) or "auto": 4 where the budget allows it,
    then 8. group: weights per scale at 4 bits, a multiple of 16; None: 64.
    activations: "dynamic" quantises the inputs of int8 linear layers too, which is what makes them fast; "float" does
    not; "auto" does where the budget allows, and only if there are example inputs to see it by.
    Raises InvalidArgument for bad arguments, inputs that the model does not take, weights that are not finite, and
    models that cannot be copied or have no nodes; BudgetError if the budget allows no node at all, or not the size.
    """
    budget_asked, budget = budget, budget or Budget()
    _check(budget, bits, group, activations, has_examples=example_inputs is not None)
    copy = frozen_copy(model)
    check_finite(copy)
    examples = None
    batches = batches_of(example_inputs) if example_inputs is not None else []
    if batches:
        examples = Examples(copy, batches, budget.top1_axis)
        examples.check(budget)
    graph = trace(copy, batches[0] if batches else None)
    if graph.trace == "modules":
        _log.warning(
            "%s could not be traced (%s): it is planned by its modules, and batch norms are not folded",
            type(model).__name__,
            graph.note,
        )
    folds, turns = nodes_of.folds_of(copy, graph), nodes_of.turns_of(copy, graph)
    del copy  # tracing may have left its marks on it
    prepared = in_preset_form(frozen_copy(model), folds, turns)
    nodes = _selected(nodes_of.candidates(prepared, graph, folds, turns), prepared, select)
    trials = Trials(prepared)
    units = _units(nodes, _options(bits, group or DEFAULT_GROUP, activations, examples is not None), trials)
    allowed = [_within(unit, budget) for unit in units]
    if examples is None:
        chosen, measured = nodes_on(allowed, [0] * len(allowed)), None
    else:
        allowed, choice = _measured_choice(allowed, budget, examples, trials)
        chosen, measured = choice.nodes(allowed), choice.effect
        units = [known if len(known.rungs) > 1 else unit for known, unit in zip(allowed, units, strict=True)]
    made = _plan(model, prepared, _in_order(nodes, chosen), folds, turns, graph, budget_asked, measured)
    _require(made, units, budget, examples, trials)
    return made


def _measured_choice(
    units: list[Unit], budget: Budget, examples: Examples, trials: Trials
) -> tuple[list[Unit], Choice]:
    """Units with the effect of each form that was tried, and a rung for each."""

    def measure(nodes: Sequence[NodePlan], n_batches: int | None = None) -> Effect:
        with trials.applied(nodes) as model:
            return examples.effect(model, n_batches)

    def alone(unit: Unit, rungs: Iterable[int]) -> Unit:
        made = list(unit.rungs)
        for rung in rungs:
            try:
                effect = measure(made[rung], _ALONE_BATCHES)
            except InvalidArgument:  # the model read the weight of a module itself, which no trace has shown
                made = [tuple(map(_in_place, nodes)) for nodes in made]
                effect = measure(made[rung], _ALONE_BATCHES)
            made[rung] = tuple(
                replace(node, error=effect.max_error, cosine=effect.cosine, top1=effect.top1) for node in made[rung]
            )
        return Unit(tuple(made))

    units = [alone(unit, [0] if len(unit.rungs) > 1 else []) for unit in units]
    smallest = Choice(tuple(0 for _ in units), measure(nodes_on(units, [0] * len(units))))
    if usage(smallest.effect, budget) <= 1:
        return units, smallest
    units = [alone(unit, range(1, len(unit.rungs) - 1)) for unit in units]
    return units, choose(units, budget, measure)


def _check(budget: Budget, bits: Any, group: Any, activations: Any, has_examples: bool) -> None:
    if bits not in (8, 4, "auto"):
        raise InvalidArgument(f'bits: expected 8, 4 or "auto", got {bits!r}')
    if group is not None and (not isinstance(group, int) or group <= 0 or group % GROUP_STEP):
        raise InvalidArgument(f"group: expected a multiple of {GROUP_STEP}, got {group!r}")
    if activations not in ("auto", "float", "dynamic"):
        raise InvalidArgument(f'activations: expected "auto", "float" or "dynamic", got {activations!r}')
    if not isinstance(budget, Budget):
        raise InvalidArgument(f"budget: expected a Budget, got {type(budget).__name__}. Say Budget(top1=0.995), say.")
    for name, low, high in (
        ("max_error", 0, None),
        ("cosine", -1, 1),
        ("top1", 0, 1),
        ("weight_error", 0, None),
        ("size", 0, None),
    ):
        limit = getattr(budget, name)
        if limit is not None and not (low <= limit and (high is None or limit <= high)):
            span = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise InvalidArgument(f"budget.{name}: expected a number {span}, got {limit!r}")
    if budget.is_of_outputs and not has_examples:
        raise InvalidArgument(
            f"budget ({budget_text(budget)}): outputs cannot be measured without example_inputs. Give some, or a "
            "budget of weights alone: Budget(weight_error=0.01)."
        )
    if bits == "auto" and not (budget.is_of_outputs or budget.weight_error is not None):
        raise InvalidArgument(
            'bits="auto" needs a budget to choose by, such as Budget(top1=0.995), or Budget(weight_error=0.01) where '
            "there are no example inputs"
        )


def _selected(nodes: list[NodePlan], model: nn.Module, select: Select | None) -> list[NodePlan]:
    """The nodes, those not asked for with a reason to stay in float."""
    if not nodes:
        raise InvalidArgument(
            f"no node of this {type(model).__name__} can become integers: no linear, convolution, embedding, attention "
            "or recurrent layer of torch.nn with float weights was found, nor a parameter used as a weight. Layers "
            "that are quantised already cannot be planned again."
        )
    if select is None:
        return nodes
    names = [name for node in nodes for name in (node.name, *node.aliases)]
    if callable(select):
        modules = dict(model.named_modules(remove_duplicate=False))
        found = {name for name in names if select(name, modules.get(name))}
    else:
        patterns = [select] if isinstance(select, str) else select
        if not isinstance(patterns, Iterable):
            raise InvalidArgument(f"select: expected patterns or a function, got {type(select).__name__}")
        patterns = list(patterns)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise InvalidArgument(f"select: expected patterns or a function, got {type(pattern).__name__}")
            if not fnmatch.filter(names, pattern):
                raise InvalidArgument(f"select: {pattern!r} matches no node. There are {_listed(names)}.")
        found = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    if not found:
        raise InvalidArgument(f"select: no node was chosen. There are {_listed(names)}.")
    owners = {node.tied or node.name for node in nodes if found & {node.name, *node.aliases}}
    return [
        node if (node.tied or node.name) in owners or node.reason else replace(node, reason="not selected")
        for node in nodes
    ]


def _options(bits: Any, group: int, activations: str, has_examples: bool) -> list[tuple[Bits, int | None, Activations]]:
    """Forms to try, smallest and fastest first."""
    found: list[tuple[Bits, int | None, Activations]] = []
    if bits in (4, "auto"):
        found.append((4, group, "float"))
    if bits in (8, "auto"):
        if activations == "dynamic" or (activations == "auto" and has_examples):
            found.append((8, None, "dynamic"))
        if activations != "dynamic":
            found.append((8, None, "float"))
    return found


def _units(
    nodes: Sequence[NodePlan], options: Sequence[tuple[Bits, int | None, Activations]], trials: Trials
) -> list[Unit]:
    held: dict[str, list[NodePlan]] = {}
    for node in nodes:
        held.setdefault(node.tied or node.name, []).append(node)
    return [Unit(tuple(_rungs(group, options, trials))) for group in held.values()]


def _rungs(
    nodes: list[NodePlan], options: Sequence[tuple[Bits, int | None, Activations]], trials: Trials
) -> Iterable[tuple[NodePlan, ...]]:
    seen: set[tuple[NodePlan, ...]] = set()
    for bits, group, activations in options if not any(node.reason for node in nodes) else ():
        rung = tuple(_in_form(node, bits, group, activations, trials) for node in nodes)
        if rung not in seen and sum(node.integer_bytes for node in rung) < sum(node.float_bytes for node in rung):
            seen.add(rung)
            yield rung
    reason = "" if seen or any(node.reason for node in nodes) else "integers and scales would take no less"
    yield tuple(node.in_float(node.reason or reason) for node in nodes)


def _in_form(node: NodePlan, bits: Bits, group: int | None, activations: Activations, trials: Trials) -> NodePlan:
    scale_dtype = "bfloat16" if bits == 4 else "float32"
    shapes = [trials.rows(name, node) for name in node.tensors]
    if group is not None and all(n <= group for _, n in shapes):
        group = None
    n_bytes = sum(
        (rows * n if bits == 8 else -(-rows * n // 2))
        + rows * -(-n // (group or max(n, 1))) * _SCALE_BYTES[scale_dtype]
        for rows, n in shapes
    )
    is_dynamic = activations == "dynamic" and node.kind in _DYNAMIC_KINDS and node.place == "module"
    made = replace(
        node,
        bits=bits,
        group=group,
        scale_dtype=scale_dtype,
        activations="dynamic" if is_dynamic else "float",
        integer_bytes=0 if node.tied else n_bytes,
    )
    error = trials.weight_error(made)
    return replace(made, weight_error=error, error=error)


def _in_place(node: NodePlan) -> NodePlan:
    """The node with its module kept, and its weights read on access."""
    if node.place == "parameter":
        return node
    form = "read on access" if node.form == "as it is" else f"{node.form}, read on access"
    return replace(node, place="parameter", activations="float", form=form)


def _within(unit: Unit, budget: Budget) -> Unit:
    """The unit without the forms whose weights are not within the budget."""
    limit = budget.weight_error
    *rungs, in_float = unit.rungs
    if limit is None:
        return unit
    return Unit((*(nodes for nodes in rungs if all(node.weight_error <= limit for node in nodes)), in_float))


def _in_order(nodes: Sequence[NodePlan], chosen: Sequence[NodePlan]) -> tuple[NodePlan, ...]:
    """The chosen nodes in the model's order, those that the budget left in float with the reason."""
    by_name = {node.name: node for node in chosen}
    found = [by_name[node.name] for node in nodes]
    return tuple(node if node.is_integer or node.reason else node.in_float("the budget") for node in found)


def _plan(
    model: nn.Module,
    prepared: nn.Module,
    nodes: tuple[NodePlan, ...],
    folds: tuple[Fold, ...],
    turns: tuple[str, ...],
    graph: Graph,
    budget: Budget | None,
    measured: Effect | None,
) -> Plan:
    held = {id(tensor): tensor for tensor in [*prepared.parameters(), *prepared.buffers()]}
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    other_bytes = n_bytes - sum(node.float_bytes for node in nodes)
    return Plan(nodes, folds, turns, graph.trace, graph.note, budget, measured, other_bytes, shapes_of(model))


def _require(made: Plan, units: Sequence[Unit], budget: Budget, examples: Examples | None, trials: Trials) -> None:
    """Raise BudgetError if the plan turns nothing into integers because of the budget, or stays too large."""
    tried = [unit for unit in units if len(unit.rungs) > 1]
    n_float = sum(node.float_bytes for unit in tried for node in unit.rungs[-1])
    chosen = {node.name: node for node in made.nodes}
    n_integer = sum(chosen[node.name].integer_bytes for unit in tried for node in unit.rungs[-1])
    is_small = budget.size is None or n_integer <= budget.size * n_float
    if not tried or (made.integer_nodes and is_small):
        return
    smallest = [node for unit in tried for node in unit.rungs[0] if node.tied is None]
    worst = sorted(smallest, key=lambda node: node.error, reverse=True)
    lines = [f"  {node.name}: {type_of(node)}, {_cost(node)}" for node in worst[:_N_SHOWN]]
    if len(worst) > _N_SHOWN:
        lines.append(f"  and {len(worst) - _N_SHOWN} more that cost less")
    if examples is None:
        whole = f"Budget(weight_error={max(node.weight_error for node in smallest):.3g}) would allow all of them"
    else:
        with trials.applied([node for unit in tried for node in unit.rungs[0]]) as model:
            effect = examples.effect(model)
        whole = f"all of them together: {effect_text(effect)}; a budget of that would allow them"
    what = (
        "allows no node to become integers"
        if not made.integer_nodes
        else (
            f"leaves the nodes at {n_integer / n_float:.1%} of their float bytes, {len(made.integer_nodes)} in integers"
        )
    )
    raise BudgetError(
        f"the budget ({budget_text(budget)}) {what}. What nodes cost alone:\n" + "\n".join(lines) + f"\n{whole}. "
        'Allow more, select fewer nodes, or try bits=8 with activations="float".'
    )


def _cost(node: NodePlan) -> str:
    if node.cosine is None:
        return f"weights {node.weight_error:.2%}"
    return effect_text(Effect(node.error, node.cosine, node.top1))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_N_SHOWN]) + more
