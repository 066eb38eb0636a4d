"""How far outputs are from the float model's. Imports torch and what the package says of nodes.

Sums are of differences, so that float32 tells a cosine of 1 - 1e-9 from 1. The hard thing: outputs may hold infinities
on purpose (masked logits), so those count as equal where both have them, and as an infinite error where one has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tricomp.errors import InvalidArgument
from tricomp_torch.integers.examples import Batch, Outputs, run
from tricomp_torch.integers.nodes import Budget, Effect

_LEAST_SQUARE = 1e-9  # of the sum of squares: less is what rounding leaves of an output of zeros


class Examples:
    """Batches with the float model's outputs for them, which others are compared with."""

    def __init__(self, model: torch.nn.Module, batches: Sequence[Batch], budget: Budget) -> None:
        """model: the float model, in eval mode.

        Raises InvalidArgument as `examples.run` does, and if the budget is of an output that the model does not give.
        """
        self.batches = batches
        self._budget = budget
        outputs = [self.outputs(model, i) for i in range(len(batches))]
        name, axis = _top1_name(outputs[0], budget.top1_axis), budget.top1_axis
        if budget.top1 is not None and name is None:
            shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in outputs[0].items())
            raise InvalidArgument(
                f"budget.top1: no output has two or more axes, one of them {axis}, to take the arg max over; outputs "
                f"are {shown}. Use max_error or cosine."
            )
        self._wanted = [
            {path: _Wanted(tensor, axis if path == name else None) for path, tensor in found.items()}
            for found in outputs
        ]

    def outputs(self, model: torch.nn.Module, number: int) -> Outputs:
        """What a model, in eval mode, gives for a batch. Raises InvalidArgument as `examples.run` does."""
        return run(model, self.batches[number], f"example batch {number}")

    def comparison(self, n_batches: int | None = None) -> Comparison:
        """To be given the outputs of another model for the first batches, or for all, in order."""
        return Comparison(self._wanted[:n_batches], self._budget)

    def effect(self, model: torch.nn.Module, *, until_broken: bool = False) -> Effect:
        """How far the outputs of another model, in eval mode, are from the float model's.

        until_broken: stop as soon as the budget is certain not to hold: then the effect is that of fewer batches, and
        breaks the budget too.
        """
        found = self.comparison()
        for i in range(len(self.batches)):
            found.add(self.outputs(model, i))
            if until_broken and found.is_broken:
                break
        return found.effect


class Comparison:
    """The outputs of one model beside those that were wanted, batch after batch."""

    def __init__(self, wanted: Sequence[dict[str, _Wanted]], budget: Budget) -> None:
        self._wanted, self._budget = wanted, budget
        self._n_added = self._n_same = self._n_ranked = 0
        self._found = {name: _Difference() for outputs in wanted for name in outputs}
        self._most = {  # errors beyond which max_error cannot be within the budget
            name: _span([outputs[name] for outputs in wanted if name in outputs]) * (budget.max_error or 0.0)
            for name in self._found
        }
        self._n_to_rank = sum(
            one.best.numel() for outputs in wanted for one in outputs.values() if one.best is not None
        )

    def add(self, outputs: Outputs) -> None:
        """The outputs for the next batch."""
        for name, wanted in self._wanted[self._n_added].items():
            got = outputs.get(name)
            self._found[name].add(wanted, got)
            if wanted.best is not None and got is not None:
                best = got.argmax(wanted.axis) if got.shape == wanted.shape else None
                self._n_same += 0 if best is None else int((best.to(wanted.best.device) == wanted.best).sum())
                self._n_ranked += 1 if best is None else best.numel()
        self._n_added += 1

    @property
    def is_broken(self) -> bool:
        """Whether the budget cannot hold any more, whatever the batches that are left give."""
        budget, n_wrong = self._budget, self._n_ranked - self._n_same
        if budget.top1 is not None and n_wrong > (1 - budget.top1) * self._n_to_rank:
            return True
        is_far = any(found.worst > self._most[name] for name, found in self._found.items())
        return budget.max_error is not None and is_far

    @property
    def effect(self) -> Effect:
        """Of all that was added."""
        seen = [found for found in self._found.values() if found.n_added]
        return Effect(
            max(found.max_error for found in seen),
            min(found.cosine for found in seen),
            self._n_same / self._n_ranked if self._n_ranked else None,
        )


class _Wanted:
    """An output tensor of the float model, with what every comparison needs of it."""

    def __init__(self, tensor: torch.Tensor, axis: int | None) -> None:
        """axis: of the arg max, if this is the output that is judged by it."""
        self.shape, self.axis = tensor.shape, axis
        self.best = tensor.argmax(axis) if axis is not None and axis < tensor.ndim else None
        self.values = _flat(tensor)
        is_finite = self.values.isfinite()
        self.is_finite = None if bool(is_finite.all()) else is_finite
        kept = self.values if self.is_finite is None else self.values[is_finite]
        self.low, self.high = (float(end) for end in kept.aminmax()) if kept.numel() else (math.inf, -math.inf)
        self.square = _dot(kept, kept)


class _Difference:
    """One output over all batches."""

    def __init__(self) -> None:
        self.worst, self.n_added = 0.0, 0
        self._low, self._high = math.inf, -math.inf
        self._square = self._along = self._change = 0.0  # of what is wanted; of it times the difference; of that

    def add(self, wanted: _Wanted, got: torch.Tensor | None) -> None:
        self.n_added += 1
        if got is None or got.shape != wanted.shape:
            self.worst = math.inf
            return
        a, b = wanted.values, _flat(got).to(wanted.values.device, wanted.values.dtype)
        if wanted.is_finite is not None:
            is_finite = wanted.is_finite
            if not torch.equal(a[~is_finite].nan_to_num(0.5), b[~is_finite].nan_to_num(0.5)):
                self.worst = math.inf
            a, b = a[is_finite], b[is_finite]
        if a.numel() == 0 or self.worst == math.inf:
            return
        change = b - a
        worst = float(torch.linalg.vector_norm(change, math.inf))
        if not math.isfinite(worst):  # so is b, then
            self.worst = math.inf
            return
        self._low, self._high = min(self._low, wanted.low), max(self._high, wanted.high)
        self.worst = max(self.worst, worst)
        self._square += wanted.square
        self._along += _dot(a, change)
        self._change += _dot(change, change)

    @property
    def max_error(self) -> float:
        """Relative to the range; of a constant output, to its magnitude."""
        if self.worst in (0.0, math.inf):
            return self.worst
        return self.worst / _range(self._low, self._high)

    @property
    def cosine(self) -> float:
        if self.worst == math.inf:
            return -1.0
        if self._square == 0.0:
            return float(self._change == 0.0)
        along, square = self._along / self._square, 1 + (2 * self._along + self._change) / self._square
        if square <= _LEAST_SQUARE:
            return 0.0
        return max(-1.0, min(1.0, (1 + along) / math.sqrt(square)))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and of one axis, in float32 or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).flatten()


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    found = float(a @ b)
    return found if math.isfinite(found) else float(a.double() @ b.double())


def _range(low: float, high: float) -> float:
    return (high - low) or abs(high) or 1.0


def _span(found: Sequence[_Wanted]) -> float:
    return _range(min(one.low for one in found), max(one.high for one in found))


def _top1_name(outputs: Outputs, axis: int) -> str | None:
    wide = [name for name, tensor in outputs.items() if tensor.ndim >= 2 and -tensor.ndim <= axis < tensor.ndim]
    return next((name for name in wide if name.rpartition(".")[2] == "logits"), wide[0] if wide else None)
