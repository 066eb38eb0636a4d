"""The forms that each node can be tried in, smallest first, with their bytes and the errors of their weights.

Imports no torch: weights are read through Trials. The hard thing: nodes that share weights climb together, so it is
units of nodes that have a ladder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tricomp_torch.integers.choice import Unit
from tricomp_torch.integers.nodes import Activations, Bits, Budget, NodePlan
from tricomp_torch.integers.trials import Trials

Option = tuple[Bits, int | None, Activations]
_DEFAULT_GROUP = 64
_DYNAMIC_KINDS = ("linear", "attention")  # whose inputs can become int8 too
_LEAST_STATE = 320  # units of a recurrent layer: of fewer, one row's steps take longer than torch's own in float
_SCALE_BYTES = {"float32": 4, "bfloat16": 2}


def options(bits: Any, group: int | None, activations: str, has_examples: bool) -> list[Option]:
    """Forms to try, smallest and fastest first."""
    inputs: list[Activations] = []
    if activations == "dynamic" or (activations == "auto" and has_examples):
        inputs.append("dynamic")
    if activations != "dynamic":
        inputs.append("float")
    narrow: list[Bits] = [4] if bits in (4, "auto") else []
    wide: list[Bits] = [7, 8] if bits in ("int8", "auto") else [] if bits == 4 else [bits]
    found: list[Option] = [(each, group or _DEFAULT_GROUP, input) for input in inputs for each in narrow]
    return found + [(each, None, input) for input in inputs for each in wide]


def units_of(nodes: Sequence[NodePlan], options: Sequence[Option], trials: Trials) -> list[Unit]:
    """A ladder for each group of nodes that share weights. What takes no less than floats is no form."""
    held: dict[str, list[NodePlan]] = {}
    for node in nodes:
        held.setdefault(node.tied or node.name, []).append(node)
    return [Unit(tuple(_rungs(group, options, trials))) for group in held.values()]


def _rungs(nodes: list[NodePlan], options: Sequence[Option], trials: Trials) -> Iterator[tuple[NodePlan, ...]]:
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
        (rows * n if bits > 4 else -(-rows * n // 2)) + rows * -(-n // (group or max(n, 1))) * _SCALE_BYTES[scale_dtype]
        for rows, n in shapes
    )
    is_dynamic = activations == "dynamic" and node.place == "module" and _can_be_dynamic(node, bits, shapes, trials)
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


def _can_be_dynamic(node: NodePlan, bits: Bits, shapes: Sequence[tuple[int, int]], trials: Trials) -> bool:
    """Whether the inputs of a node's module can become int8 too, and gain by it. shapes: of tensors, as rows."""
    if node.kind.startswith("conv"):
        return bits > 4 and trials.gains_by_codes(node)
    if node.kind not in ("lstm", "gru"):
        return node.kind in _DYNAMIC_KINDS
    states = [n for name, (_, n) in zip(node.tensors, shapes, strict=True) if "weight_hh" in name]
    is_projected = any("weight_hr" in name for name in node.tensors)
    return not is_projected and min(states) >= _LEAST_STATE


def in_place(node: NodePlan) -> NodePlan:
    """The node with its module kept, and its weights read on access."""
    if node.place == "parameter":
        return node
    form = "read on access" if node.form == "as it is" else f"{node.form}, read on access"
    return replace(node, place="parameter", activations="float", form=form)


def within(unit: Unit, budget: Budget) -> Unit:
    """The unit without the forms whose weights are not within the budget."""
    limit = budget.weight_error
    *rungs, in_float = unit.rungs
    if limit is None:
        return unit
    return Unit((*(nodes for nodes in rungs if all(node.weight_error <= limit for node in nodes)), in_float))
