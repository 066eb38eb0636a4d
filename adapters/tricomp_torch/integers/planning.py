"""`plan`: from a model and example inputs to what becomes of each node. Imports torch and the package's steps.

The model is read and never written: all work is done on copies in eval mode. The hard thing: effects are measured with
nodes as they will run, one alone at first, so that the report says what each costs, then all of them together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import asking, ladders
from tricomp_torch.integers.budgets import require_kept
from tricomp_torch.integers.candidates import candidates
from tricomp_torch.integers.choice import Choice, Unit, choose, nodes_on, usage
from tricomp_torch.integers.copies import check_finite, frozen_copy, shapes_of
from tricomp_torch.integers.effect import Examples
from tricomp_torch.integers.eighth import with_eighth_bits
from tricomp_torch.integers.examples import batches_of
from tricomp_torch.integers.folding import folds_of, turns_of
from tricomp_torch.integers.forms import in_preset_form
from tricomp_torch.integers.graph import trace
from tricomp_torch.integers.nodes import Budget, Effect, NodePlan, Plan
from tricomp_torch.integers.trials import Trials

_log = logging.getLogger("tricomp")
_ALONE_BATCHES = 4  # first ones, on which nodes are measured alone; all together they are measured on all


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    budget: Budget | None = None,
    select: asking.Select | None = None,
    bits: Literal[8, 7, 6, 5, 4, "int8", "auto"] = "int8",
    group: int | None = None,
    activations: Literal["auto", "float", "dynamic"] = "auto",
) -> Plan:
    """Which nodes of a model become integers, so that its outputs on the example inputs stay within a budget.

    model: is not changed, nor its mode; it is planned as in eval mode, on its device.
    example_inputs: a tensor, a tuple or a dict of the model's inputs, or a list of such; a few hundred rows of real
    data are worth most. None: errors of weights are told instead, and only Budget's weight_error and size can be asked.
    budget: None for no limit. What it does not allow stays in float.
    select: glob patterns of node names ("blocks.*.mlp.*"), or a function of name and module; None: every node.
    bits: "int8": codes of 7 bits, with a scale per output channel, and of 8 where 7 cost too much. Both run as int8; 7
    take an eighth less in a file. 8 are for nodes whose error for each byte, at 7, is over 4 times the average (small
    first and last layers, mostly), for weights whose own error at 7 is over 2 %, and for what the budget does not allow
    at 7. Without example inputs, a node's share of the error is that of its weights, each node counting alike. "auto":
    4 bits, with a scale per group of weights, where the budget allows it, then 7, then 8. A number: just that; 5 to 8
    run as int8. group: weights per scale at 4 bits, a multiple of 16; None: 64.
    activations: "dynamic" quantises the inputs of int8 linear layers and convolutions too, which is what makes them
    fast; "float" does not; "auto" does where the budget allows, and only if there are example inputs to see it by.
    Raises InvalidArgument for bad arguments, inputs that the model does not take, weights that are not finite, and
    models that cannot be copied or have no nodes; BudgetError if the budget allows no node at all, or not the size.
    """
    asked, budget = budget, budget or Budget()
    asking.check(budget, bits, group, activations, has_examples=example_inputs is not None)
    copy = frozen_copy(model)
    check_finite(copy)
    batches = batches_of(example_inputs) if example_inputs is not None else []
    examples = Examples(copy, batches, budget) if batches else None
    graph = trace(copy, batches[0] if batches else None)
    if graph.trace == "modules":
        _log.warning(
            "%s could not be traced (%s): it is planned by its modules, and batch norms are not folded",
            type(model).__name__,
            graph.note,
        )
    folds, turns = folds_of(copy, graph), turns_of(copy, graph)
    del copy  # tracing may have left its marks on it
    prepared = in_preset_form(frozen_copy(model), folds, turns)
    nodes = asking.selected(candidates(prepared, graph, folds, turns), prepared, select)
    trials = Trials(prepared)
    options = ladders.options(bits, group, activations, has_examples=examples is not None)
    units = ladders.units_of(nodes, options, trials)
    allowed = [ladders.within(unit, budget) for unit in units]
    if examples is None:
        allowed = with_eighth_bits(allowed, None, budget.weight_error)
        chosen, effect, measure = nodes_on(allowed, [0] * len(allowed)), None, None
    else:
        measure = _Measure(trials, examples)
        allowed, choice = _measured_choice(allowed, budget, measure)
        chosen, effect = nodes_on(allowed, choice.rungs), choice.effect
        units = [known if len(known.rungs) > 1 else unit for known, unit in zip(allowed, units, strict=True)]
    n_bytes = sum({id(tensor): tensor.nbytes for tensor in [*prepared.parameters(), *prepared.buffers()]}.values())
    other_bytes = n_bytes - sum(node.float_bytes for node in nodes)
    in_order = _in_order(nodes, chosen)
    made = Plan(in_order, folds, turns, graph.trace, graph.note, asked, effect, other_bytes, shapes_of(model))
    require_kept(made, units, budget, measure)
    return made


class _Measure:
    """What nodes do to the outputs, all together."""

    def __init__(self, trials: Trials, examples: Examples) -> None:
        self._trials, self._examples = trials, examples

    def __call__(self, nodes: Sequence[NodePlan], n_batches: int | None = None) -> Effect:
        with self._trials.applied(nodes) as model:
            return self._examples.effect(model, n_batches)


def _measured_choice(units: list[Unit], budget: Budget, measure: _Measure) -> tuple[list[Unit], Choice]:
    """Units with the effect of each form that was tried, and a rung for each."""
    units = [_alone(unit, [0] if len(unit.rungs) > 1 else [], measure) for unit in units]
    units = with_eighth_bits(units, lambda unit, rung: _alone(unit, [rung], measure), budget.weight_error)
    smallest = Choice(tuple(0 for _ in units), measure(nodes_on(units, [0] * len(units))))
    if usage(smallest.effect, budget) <= 1:
        return units, smallest
    units = [_alone(unit, _not_measured(unit), measure) for unit in units]
    return units, choose(units, budget, measure)


def _not_measured(unit: Unit) -> list[int]:
    return [rung for rung, nodes in enumerate(unit.rungs[:-1]) if all(node.cosine is None for node in nodes)]


def _alone(unit: Unit, rungs: Iterable[int], measure: _Measure) -> Unit:
    """The unit with what some of its forms do to the outputs if all else is float."""
    made = list(unit.rungs)
    for rung in rungs:
        try:
            effect = measure(made[rung], _ALONE_BATCHES)
        except InvalidArgument:  # the model read the weight of a module itself, which no trace has shown
            made = [tuple(map(ladders.in_place, nodes)) for nodes in made]
            effect = measure(made[rung], _ALONE_BATCHES)
        made[rung] = tuple(
            replace(node, error=effect.max_error, cosine=effect.cosine, top1=effect.top1) for node in made[rung]
        )
    return Unit(tuple(made))


def _in_order(nodes: Sequence[NodePlan], chosen: Sequence[NodePlan]) -> tuple[NodePlan, ...]:
    """The chosen nodes in the model's order, those that the budget left in float with the reason."""
    by_name = {node.name: node for node in chosen}
    found = [by_name[node.name] for node in nodes]
    return tuple(node if node.is_integer or node.reason else node.in_float("the budget") for node in found)
