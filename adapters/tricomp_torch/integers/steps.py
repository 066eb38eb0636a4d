"""A graph as a list of calls, and how they are run. Imports torch alone.

No code is written and compiled: a call takes its arguments from a list of values by their places, which the list of
calls knows beforehand. The hard thing: what a call gives is let go of after its last use, as in code written by hand: a
large model would keep all that it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Values = list[Any]
Places = tuple[int, ...]


class Step(NamedTuple):
    """One call. arguments: their places. place: of what it gives. over: places that no later step asks for."""

    function: Callable[..., Any]
    arguments: Places
    keyword_arguments: dict[str, int]
    place: int
    over: Places


class Steps:
    """The calls of a graph, once all are known: run with its tensors and inputs."""

    def __init__(self, values: Values, steps: Sequence[Step], inputs: Places, results: Places) -> None:
        """values: constants at their places, None elsewhere. inputs: places of the inputs."""
        self._values, self._steps, self._inputs, self._results = values, steps, inputs, results

    def __call__(self, tensors: Iterable[tuple[int, torch.Tensor]], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The results. tensors: each with its place."""
        values = self._values.copy()
        for place, tensor in tensors:
            values[place] = tensor
        for place, value in zip(self._inputs, inputs, strict=True):
            values[place] = value
        for function, arguments, keyword_arguments, place, over in self._steps:
            given = {name: values[i] for name, i in keyword_arguments.items()}
            values[place] = function(*[values[i] for i in arguments], **given)
            for i in over:
                values[i] = None
        return tuple(values[i] for i in self._results)


class Builder:
    """Takes the calls of a graph in their order. Places are numbers that its methods give out and take."""

    def __init__(self) -> None:
        self._values: Values = []
        self._calls: list[tuple[Callable[..., Any], list[int], dict[str, int], int]] = []
        self._inputs: list[int] = []

    def constant(self, value: Any) -> int:
        """The place of a plain value, or, as None, of a tensor that is given with each run."""
        self._values.append(value)
        return len(self._values) - 1

    def input(self) -> int:
        """The place of the next input."""
        self._inputs.append(self.constant(None))
        return self._inputs[-1]

    def call(self, function: Callable[..., Any], arguments: list[int], keywords: Mapping[str, int]) -> int:
        """The place of what a function gives."""
        place = self.constant(None)
        self._calls.append((function, arguments, dict(keywords), place))
        return place

    def finished(self, results: Sequence[int]) -> Steps:
        """All of it, with the places of what it gives."""
        is_kept = set(results).union(range(len(self._values))).difference(place for *_, place in self._calls)
        is_kept.update(results)
        steps: list[Step] = []
        for function, arguments, keywords, place in reversed(self._calls):
            over = {place, *arguments, *keywords.values()} - is_kept
            is_kept |= over
            steps.append(Step(function, tuple(arguments), keywords, place, tuple(over)))
        return Steps(self._values, steps[::-1], tuple(self._inputs), tuple(results))
