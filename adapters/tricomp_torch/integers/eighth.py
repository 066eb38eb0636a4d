"""Which nodes keep an eighth bit where codes of 7 are tried first. Imports no torch.

Each further bit of a code halves a node's error and takes one bit a weight of the file, whatever the node. What it wins
differs by orders of magnitude: of a residual network's error, the first convolution made two thirds with a thousandth
of the bytes. So nodes are judged by their error for each byte, and those far above the average keep 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tricomp_torch.integers.choice import Unit

# Times the average. No more than a quarter of all bytes can be above it, so it costs the file 3 parts in 100 at most.
_MOST_TIMES = 4.0
_MOST_WEIGHT_ERROR = 0.02  # at 7 bits; 0.010 to 0.016 is usual, more shows rows with few large weights

Measured = Callable[[Sequence[Unit], Mapping[int, Sequence[int]]], list[Unit]]


def with_eighth_bits(units: Sequence[Unit], measured: Measured | None, weight_error: float | None) -> list[Unit]:
    """The units, without forms of 7 bits where 8 are worth it.

    units: with the effect of their first rung, if effects are measured. measured: gives them with the effects of
    further rungs; None where only the errors of weights are known. weight_error: what the budget allows of it.
    """
    most = _MOST_WEIGHT_ERROR if weight_error is None else weight_error
    made = list(units)
    rungs = {i: rung for i, unit in enumerate(units) if (rung := _rung_of_8_bits(unit)) is not None}
    losses = {i: _loss(units[i], measured is not None) for i in rungs}
    for_each = _MOST_TIMES * sum(losses.values()) / max(1.0, sum(units[i].n_bytes(0) for i in rungs))
    limits = {i: for_each * units[i].n_bytes(0) for i in rungs}
    far_off = {i for i in rungs if losses[i] > limits[i]}
    if measured is not None:  # better weights do not help where it is inputs that are rounded
        made = measured(units, {i: [rungs[i]] for i in sorted(far_off)})
        far_off = {i for i in far_off if losses[i] - made[i].loss(rungs[i]) > limits[i]}
    for i in rungs:
        if i in far_off or _weight_error(units[i]) > most:
            made[i] = Unit(tuple(nodes for nodes in made[i].rungs if nodes[0].bits != 7))
    return made


def _rung_of_8_bits(unit: Unit) -> int | None:
    """The rung like the first, but of 8 bits; None if the first is not of 7."""
    first = unit.rungs[0]
    for rung, nodes in enumerate(unit.rungs):
        is_like_it = [node.activations for node in nodes] == [node.activations for node in first]
        if (first[0].bits, nodes[0].bits) == (7, 8) and is_like_it:
            return rung
    return None


def _loss(unit: Unit, is_measured: bool) -> float:
    """What the unit costs on its first rung. Without outputs, as if each node's relative error counted alike."""
    return unit.loss(0) if is_measured else _weight_error(unit) ** 2


def _weight_error(unit: Unit) -> float:
    return max(node.weight_error for node in unit.rungs[0])
