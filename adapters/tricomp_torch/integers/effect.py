"""How far outputs are from the float model's. Imports torch and what the package says of nodes.

The hard thing: outputs may hold infinities on purpose (masked logits), so those count as equal where both have them,
and as an infinite error where one has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch

from tricomp.errors import InvalidArgument
from tricomp_torch.integers.examples import Batch, Outputs, run
from tricomp_torch.integers.nodes import Budget, Effect


class Examples:
    """Batches with the float model's outputs for them, which `effect` compares others with."""

    def __init__(self, model: torch.nn.Module, batches: Sequence[Batch], budget: Budget) -> None:
        """model: the float model, in eval mode.

        Raises InvalidArgument as `examples.run` does, and if the budget is of an output that the model does not give.
        """
        self._batches = batches
        self._top1_axis = axis = budget.top1_axis
        self._wanted = [run(model, batch, f"example batch {i}") for i, batch in enumerate(batches)]
        self._top1_name = _top1_name(self._wanted[0], axis)
        if budget.top1 is not None and self._top1_name is None:
            outputs = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self._wanted[0].items())
            raise InvalidArgument(
                f"budget.top1: no output has two or more axes, one of them {axis}, to take the arg max over; outputs "
                f"are {outputs}. Use max_error or cosine."
            )

    def effect(self, model: torch.nn.Module, n_batches: int | None = None) -> Effect:
        """How far the outputs of another model, in eval mode, are from the float model's, on the first batches."""
        comparisons: dict[str, _Comparison] = {}
        n_same = n_all = 0
        for i, (batch, wanted) in enumerate(islice(zip(self._batches, self._wanted, strict=True), n_batches)):
            got = run(model, batch, f"example batch {i}")
            for name, tensor in wanted.items():
                comparisons.setdefault(name, _Comparison()).add(tensor, got.get(name))
            if self._top1_name in wanted and self._top1_name in got:
                a, b = wanted[self._top1_name], got[self._top1_name]
                same = a.argmax(self._top1_axis) == b.argmax(self._top1_axis) if a.shape == b.shape else a.new_zeros(1)
                n_same += int(same.sum())
                n_all += same.numel()
        return Effect(
            max(comparison.max_error for comparison in comparisons.values()),
            min(comparison.cosine for comparison in comparisons.values()),
            n_same / n_all if n_all else None,
        )


class _Comparison:
    """One output tensor over all batches."""

    def __init__(self) -> None:
        self._worst = 0.0
        self._low, self._high = math.inf, -math.inf
        self._dot = self._wanted_square = self._got_square = 0.0

    def add(self, wanted: torch.Tensor, got: torch.Tensor | None) -> None:
        if got is None or got.shape != wanted.shape:
            self._worst = math.inf
            return
        a, b = wanted.double().flatten(), got.double().to(wanted.device).flatten()
        if not bool(a.isfinite().all()):
            is_finite = a.isfinite()
            if not torch.equal(a[~is_finite].nan_to_num(0.5), b[~is_finite].nan_to_num(0.5)):
                self._worst = math.inf
            a, b = a[is_finite], b[is_finite]
        if not bool(b.isfinite().all()):
            self._worst = math.inf
        if a.numel() == 0 or self._worst == math.inf:
            return
        low, high = a.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._worst = max(self._worst, float(torch.dist(a, b, math.inf)))
        self._dot += float(a @ b)
        self._wanted_square += float(a @ a)
        self._got_square += float(b @ b)

    @property
    def max_error(self) -> float:
        """Relative to the range; of a constant output, to its magnitude."""
        if self._worst in (0.0, math.inf):
            return self._worst
        return self._worst / ((self._high - self._low) or abs(self._high) or 1.0)

    @property
    def cosine(self) -> float:
        if self._worst == math.inf:
            return -1.0
        if self._wanted_square == 0.0 or self._got_square == 0.0:
            return float(self._wanted_square == self._got_square)
        return min(1.0, self._dot / math.sqrt(self._wanted_square * self._got_square))


def _top1_name(outputs: Outputs, axis: int) -> str | None:
    wide = [name for name, tensor in outputs.items() if tensor.ndim >= 2 and -tensor.ndim <= axis < tensor.ndim]
    return next((name for name in wide if name.rpartition(".")[2] == "logits"), wide[0] if wide else None)
