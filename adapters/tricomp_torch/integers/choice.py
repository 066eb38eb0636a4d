"""Which form each node gets, so that all of them together keep the outputs within a budget. Imports no torch.

Each node has a ladder of forms, smallest first, float last. The search starts with every node on its smallest and lets
nodes climb, those first whose step wins most accuracy for the bytes it costs. The hard thing: errors of nodes do not
add up exactly, so it is always the whole choice that is measured, and nodes that climbed for nothing are put down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tricomp_torch.integers.nodes import Budget, Effect, NodePlan

_MOST_PUT_DOWN = 32  # measurements
_MOST_EXPECTED = 1.5  # of the budget, from which on nothing is measured
# A byte of codes takes 0.07 ms with int8 inputs, 0.38 with float ones, and its 4 bytes of floats 0.56: see execution.
_FLOAT_INPUTS = 2  # bytes
Measure = Callable[[Sequence[NodePlan]], Effect]


@dataclass(frozen=True)
class Unit:
    """Nodes that share weights, which go together. rungs: their forms, smallest first; the last is float."""

    rungs: tuple[tuple[NodePlan, ...], ...]

    def n_bytes(self, rung: int) -> float:
        """Bytes of the unit on a rung, as a file keeps them: of 7 bits, 7 of 8."""
        return sum(node.integer_bytes * _part_of_byte(node) for node in self.rungs[rung])

    def cost(self, rung: int) -> float:
        """Bytes, and what of speed is lost where inputs stay float that could be int8, in bytes too."""
        n_dynamic = [sum(node.activations == "dynamic" for node in nodes) for nodes in self.rungs]
        is_slower = n_dynamic[rung] < max(n_dynamic)
        n_slower = sum(node.integer_bytes for node in self.rungs[rung] if node.is_integer) if is_slower else 0
        return self.n_bytes(rung) + _FLOAT_INPUTS * n_slower

    def loss(self, rung: int) -> float:
        """What the unit alone costs on a rung: 1 - cosine of the outputs, which adds up over units, about."""
        return max((1.0 - node.cosine for node in self.rungs[rung] if node.cosine is not None), default=0.0)


@dataclass(frozen=True)
class Choice:
    """A rung for each unit, and what all together do to the outputs."""

    rungs: tuple[int, ...]
    effect: Effect

    def nodes(self, units: Sequence[Unit]) -> list[NodePlan]:
        """The nodes on their rungs."""
        return nodes_on(units, self.rungs)


def _runs_as_int8(node: NodePlan) -> bool:
    return node.bits is not None and node.bits > 4


def _part_of_byte(node: NodePlan) -> float:
    """Of a byte of codes, what a file keeps: codes are entropy-coded, and those of 7 bits take one less."""
    return (node.bits or 8) / 8 if _runs_as_int8(node) else 1.0


def nodes_on(units: Sequence[Unit], rungs: Sequence[int]) -> list[NodePlan]:
    """The nodes of units on given rungs."""
    return [node for unit, rung in zip(units, rungs, strict=True) for node in unit.rungs[rung]]


def choose(units: Sequence[Unit], budget: Budget, measure: Measure) -> Choice:
    """The smallest choice found that keeps the budget; all in float keeps any, but for how the preset form rounds.

    Calls measure about log2 of all steps times, and then up to 32 times to put nodes down again; not where what nodes
    cost alone says that the budget would be broken by far.
    """

    def measured(rungs: tuple[int, ...]) -> Choice:
        return Choice(rungs, measure(nodes_on(units, rungs)))

    path = _climb(units)
    found = measured(path[0])
    if usage(found.effect, budget) <= 1:
        return found
    low, high = 0, len(path) - 1  # path[low] breaks the budget; path[high], once measured, keeps it
    best = measured(path[high])
    while high - low > 1:
        middle = (low + high) // 2
        tried = measured(path[middle])
        if usage(tried.effect, budget) <= 1:
            high, best = middle, tried
        else:
            low = middle
    return _put_down(units, budget, best, measured)


def _climb(units: Sequence[Unit]) -> list[tuple[int, ...]]:
    """All choices from everything at its smallest to everything in float, one step of one unit at a time."""
    rungs = [0] * len(units)
    path = [tuple(rungs)]
    while True:
        steps = [
            (_worth(unit, rung, above), i, above)
            for i, (unit, rung) in enumerate(zip(units, rungs, strict=True))
            for above in range(rung + 1, len(unit.rungs))
        ]
        if not steps:
            return path
        _, i, above = max(steps, key=lambda step: (step[0], -step[2]))
        rungs[i] = above
        path.append(tuple(rungs))


def _worth(unit: Unit, rung: int, above: int) -> float:
    """Accuracy won by a step for each byte that it costs."""
    return (unit.loss(rung) - unit.loss(above)) / max(1, unit.cost(above) - unit.cost(rung))


def _put_down(
    units: Sequence[Unit], budget: Budget, found: Choice, measured: Callable[[tuple[int, ...]], Choice]
) -> Choice:
    """Try each unit that climbed on lower rungs again, those first that save most bytes."""
    order = sorted(
        (i for i, rung in enumerate(found.rungs) if rung),
        key=lambda i: units[i].cost(0) - units[i].cost(found.rungs[i]),
    )
    n_left = _MOST_PUT_DOWN
    for i in order:
        for lower in range(found.rungs[i]):
            if _expected(units[i], lower, found, i, budget) > _MOST_EXPECTED:
                continue
            n_left -= 1
            if n_left < 0:
                return found
            tried = measured((*found.rungs[:i], lower, *found.rungs[i + 1 :]))
            if usage(tried.effect, budget) <= 1:
                found = tried
                break
    return found


def _expected(unit: Unit, lower: int, found: Choice, i: int, budget: Budget) -> float:
    """How much of the budget would be used with a unit on a lower rung, if what units cost alone added up.

    Errors of any kind are taken to grow as the root of that cost, or, where the budget is of the cosine, as it does.
    """
    lost = 1.0 - found.effect.cosine
    more = unit.loss(lower) - unit.loss(found.rungs[i])
    if lost <= 0.0 or more <= 0.0:
        return 0.0
    effect, times = found.effect, 1 + more / lost
    root = math.sqrt(times)
    top1 = None if effect.top1 is None else 1 - (1 - effect.top1) * root
    return usage(Effect(effect.max_error * root, 1 - lost * times, top1), budget)


def usage(effect: Effect, budget: Budget) -> float:
    """How much of the budget an effect uses: at most 1 if it is within, the worst of its limits."""
    pairs = [(effect.max_error, budget.max_error)]
    if budget.cosine is not None:
        pairs.append((1 - effect.cosine, 1 - budget.cosine))
    if budget.top1 is not None and effect.top1 is not None:
        pairs.append((1 - effect.top1, 1 - budget.top1))
    return max((_part(used, limit) for used, limit in pairs if limit is not None), default=0.0)


def _part(used: float, limit: float) -> float:
    if used <= limit:
        return used / limit if limit else 0.0
    return used / limit if limit > 0 else math.inf
