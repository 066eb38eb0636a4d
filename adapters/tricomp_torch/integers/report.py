"""A plan as text. Imports nothing of the package but types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tricomp_torch.integers.nodes import Budget, Effect, NodePlan, Plan

_HEAD = ("node", "kind", "form", "type", "error", "cosine", "bytes", "", "")
_LEFT = 4  # columns that are words
_TRACES = {
    "export": "traced by torch.export",
    "symbolic": "traced by torch.fx",
    "modules": "not traced: planned by its modules",
}


def report(plan: Plan) -> str:
    """The plan node by node: form, type, error of the outputs (without examples: of the weights), bytes; totals."""
    rows = [_HEAD, *(_row(node) for node in plan.nodes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < _LEFT else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *_summary(plan)])


def effect_text(effect: Effect) -> str:
    """An effect in words."""
    top1 = "" if effect.top1 is None else f", top-1 agreement {effect.top1:.2%}"
    return f"largest error {effect.max_error:.2%} of the output range, cosine {effect.cosine:.6f}{top1}"


def budget_text(budget: Budget) -> str:
    """A budget in words."""
    texts = [
        (budget.max_error, f"largest error at most {budget.max_error or 0:.2%}"),
        (budget.cosine, f"cosine at least {budget.cosine or 0:.6f}"),
        (budget.top1, f"top-1 agreement at least {budget.top1 or 0:.2%}"),
        (budget.weight_error, f"error of any node's weights at most {budget.weight_error or 0:.2%}"),
        (budget.size, f"size of the nodes at most {budget.size or 0:.1%}"),
    ]
    return ", ".join(text for limit, text in texts if limit is not None) or "none"


def type_of(node: NodePlan) -> str:
    """What a node's weights become, and its inputs if they do too."""
    if node.bits is None:
        return "float"
    group = f" per {node.group}" if node.group else ""
    name = f"int{node.bits}" if node.bits in (4, 8) else f"int8 ({node.bits} bits)"
    return f"{name}{group}" + (" x int8" if node.activations == "dynamic" else "")


def _row(node: NodePlan) -> Sequence[str]:
    form = f"shared with {node.tied}" if node.tied else node.form
    if not node.is_integer:
        why = f"{form}; {node.reason}" if node.reason else form
        return (node.name or "(model)", node.kind, why, "float", "", "", f"{node.float_bytes:,}", "", "")
    cosine = "" if node.cosine is None else f"{node.cosine:.6f}"
    ratio = f"{node.integer_bytes / node.float_bytes:.1%}" if node.float_bytes else ""
    sizes = (f"{node.float_bytes:,}", f"-> {node.integer_bytes:,}", ratio)
    return (node.name or "(model)", node.kind, form, type_of(node), f"{node.error:.3%}", cosine, *sizes)


def _summary(plan: Plan) -> list[str]:
    n_integer, n_bytes = len(plan.integer_nodes), plan.float_bytes
    lines = [
        f"{n_integer} of {len(plan.nodes)} nodes in integers: {n_bytes:,} -> {plan.integer_bytes:,} bytes "
        f"({plan.integer_bytes / n_bytes if n_bytes else 1:.1%}), {plan.other_bytes:,} of them not in nodes",
        f"{_TRACES[plan.trace]}{f' ({plan.note})' if plan.note else ''}; {len(plan.folds)} batch norms folded, "
        f"{len(plan.turns)} weights turned to output channel first",
    ]
    if plan.budget is not None:
        lines.append(f"budget: {budget_text(plan.budget)}")
    if plan.measured is not None:
        lines.append(f"all together: {effect_text(plan.measured)}")
    else:
        lines.append("no example inputs: errors are relative RMS errors of weights, outputs were not measured")
    return lines
