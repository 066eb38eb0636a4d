"""What is asked of a plan: whether arguments are any, and which nodes are meant. Imports torch and errors."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers.nodes import Bits, Budget, NodePlan
from tricomp_torch.integers.report import budget_text

Select = str | Iterable[str] | Callable[[str, nn.Module | None], bool]
GROUP_STEP = 16
_SPANS = (("max_error", 0, None), ("cosine", -1, 1), ("top1", 0, 1), ("weight_error", 0, None), ("size", 0, None))
_N_SHOWN = 6


def check(budget: Budget, bits: Any, group: Any, activations: Any, has_examples: bool) -> None:
    """Raise InvalidArgument for arguments of `plan` that are none, or do not go together."""
    if bits not in (*get_args(Bits), "int8", "auto") or isinstance(bits, bool):
        raise InvalidArgument(f'bits: expected "int8", "auto", 8, 4 or one between, got {bits!r}')
    if group is not None and (not isinstance(group, int) or group <= 0 or group % GROUP_STEP):
        raise InvalidArgument(f"group: expected a multiple of {GROUP_STEP}, got {group!r}")
    if activations not in ("auto", "float", "dynamic"):
        raise InvalidArgument(f'activations: expected "auto", "float" or "dynamic", got {activations!r}')
    if not isinstance(budget, Budget):
        raise InvalidArgument(f"budget: expected a Budget, got {type(budget).__name__}. Say Budget(top1=0.995), say.")
    for name, low, high in _SPANS:
        limit = getattr(budget, name)
        is_number = isinstance(limit, (int, float)) and low <= limit and (high is None or limit <= high)
        if limit is not None and not is_number:
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


def selected(nodes: list[NodePlan], model: nn.Module, select: Select | None) -> list[NodePlan]:
    """The nodes, those not asked for with a reason to stay in float.

    Raises InvalidArgument if there are none, and for patterns that match none, telling what there is.
    """
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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_N_SHOWN]) + more
