"""`plan`: from a model and example inputs to what becomes of each node. Imports torch and the package's steps.

The model is read and never written: all work is done on copies in eval mode. The hard thing: effects are measured with
nodes as they will run, one alone at first, so that the report says what each costs, then all of them together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from tricomp.progress import OnProgress
from tricomp_torch.integers import asking, ladders
from tricomp_torch.integers.alone import Alone
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
from tricomp_torch.integers.progress import Progress
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
    on_progress: OnProgress | None = None,
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
    activations: "dynamic" makes the inputs of linear layers and convolutions int8 too, which is what makes them
    fast; "float" does not; "auto" does where the budget allows, and only if there are example inputs to see it by.
    on_progress: gets (runs of the model done, of so many); there may be more as the search for what the budget allows
    goes on. The log "tricomp" has a line every few seconds, at INFO.
    Raises InvalidArgument for bad arguments, inputs that the model does not take, weights that are not finite, and
    models that cannot be copied or have no nodes; BudgetError if the budget allows no node at all, or not the size.
    """
    asked, budget = budget, budget or Budget()
    asking.check(budget, bits, group, activations, has_examples=example_inputs is not None)
    progress = Progress(on_progress)
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
    progress.tell("%d nodes, %s", len(nodes), "traced" if graph.calls else "not traced")
    trials = Trials(prepared)
    options = ladders.options(bits, group, activations, has_examples=examples is not None)
    units = ladders.units_of(nodes, options, trials)
    allowed = [ladders.within(unit, budget) for unit in units]
    if examples is None:
        allowed = with_eighth_bits(allowed, None, budget.weight_error)
        chosen, effect, measure = nodes_on(allowed, [0] * len(allowed)), None, None
    else:
        measure = _Together(trials, examples, progress)
        alone = Alone(trials, examples, progress, is_traced=graph.trace != "modules")
        allowed, choice = _measured_choice(allowed, budget, alone, measure)
        chosen, effect = nodes_on(allowed, choice.rungs), choice.effect
        units = [known if len(known.rungs) > 1 else unit for known, unit in zip(allowed, units, strict=True)]
    n_bytes = sum({id(tensor): tensor.nbytes for tensor in [*prepared.parameters(), *prepared.buffers()]}.values())
    other_bytes = n_bytes - sum(node.float_bytes for node in nodes)
    in_order = _in_order(nodes, chosen)
    made = Plan(in_order, folds, turns, graph.trace, graph.note, asked, effect, other_bytes, shapes_of(model))
    progress.tell("%d of %d nodes in integers", len(made.integer_nodes), len(nodes))
    require_kept(made, units, budget, measure)
    return made


class _Together:
    """What nodes do to the outputs, all together, on all batches."""

    def __init__(self, trials: Trials, examples: Examples, progress: Progress) -> None:
        self._trials, self._examples, self._progress = trials, examples, progress

    def __call__(self, nodes: Sequence[NodePlan], *, until_broken: bool = False) -> Effect:
        with self._trials.applied(nodes) as model:
            found = self._examples.effect(model, until_broken=until_broken)
        self._progress.step(len(self._examples.batches))
        return found


def _measured_choice(units: list[Unit], budget: Budget, alone: Alone, together: _Together) -> tuple[list[Unit], Choice]:
    """Units with the effect of each form that was tried, and a rung for each."""
    units = alone.measured(units, {i: [0] for i, unit in enumerate(units) if len(unit.rungs) > 1})
    units = with_eighth_bits(units, alone.measured, budget.weight_error)
    smallest = Choice(tuple(0 for _ in units), together(nodes_on(units, [0] * len(units))))
    if usage(smallest.effect, budget) <= 1:
        return units, smallest
    units = alone.measured(units, {i: _not_measured(unit) for i, unit in enumerate(units)})
    found = choose(units, budget, partial(together, until_broken=True))
    if usage(found.effect, budget) > 1:  # nothing keeps the budget, and this effect is not that of all batches
        found = replace(found, effect=together(found.nodes(units)))
    return units, found


def _not_measured(unit: Unit) -> list[int]:
    return [rung for rung, nodes in enumerate(unit.rungs[:-1]) if all(node.cosine is None for node in nodes)]


def _in_order(nodes: Sequence[NodePlan], chosen: Sequence[NodePlan]) -> tuple[NodePlan, ...]:
    """The chosen nodes in the model's order, those that the budget left in float with the reason."""
    by_name = {node.name: node for node in chosen}
    found = [by_name[node.name] for node in nodes]
    return tuple(node if node.is_integer or node.reason else node.in_float("the budget") for node in found)
