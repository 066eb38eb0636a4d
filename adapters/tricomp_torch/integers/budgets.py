"""What is said of a budget that cannot be met: what nodes cost, and what budget would do. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tricomp.errors import BudgetError
from tricomp_torch.integers.choice import Unit
from tricomp_torch.integers.nodes import Budget, Effect, NodePlan, Plan
from tricomp_torch.integers.report import budget_text, effect_text, type_of

_N_SHOWN = 6


def require_kept(
    made: Plan, units: Sequence[Unit], budget: Budget, measure: Callable[[Sequence[NodePlan]], Effect] | None
) -> None:
    """Raise BudgetError if the plan turns nothing into integers because of the budget, or stays too large.

    units: with the cost of each form that was tried. measure: of nodes together; None without example inputs.
    """
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
    if measure is None:
        whole = f"Budget(weight_error={max(node.weight_error for node in smallest):.3g}) would allow all of them"
    else:
        effect = measure([node for unit in tried for node in unit.rungs[0]])
        whole = f"all of them together: {effect_text(effect)}; a budget of that would allow them"
    what = "allows no node to become integers"
    if made.integer_nodes:
        what = f"leaves the nodes at {n_integer / n_float:.1%} of their float bytes, {len(made.integer_nodes)} integers"
    raise BudgetError(
        f"the budget ({budget_text(budget)}) {what}. What nodes cost alone:\n" + "\n".join(lines) + f"\n{whole}. "
        'Allow more, select fewer nodes, or try bits=8 with activations="float".'
    )


def _cost(node: NodePlan) -> str:
    if node.cosine is None:
        return f"weights {node.weight_error:.2%}"
    return effect_text(Effect(node.error, node.cosine, node.top1))
