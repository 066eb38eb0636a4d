"""What each node does to the outputs with all else in floats. Imports torch's modules by name, the trials and examples.

Nodes are measured on the first batches, in the order in which they run, so that what is before a node is computed once
for all behind it. The hard thing: that is left where it would not be true: for weights that are read by others, models
that no trace has shown, and models that do what their outputs do not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import ladders
from tricomp_torch.integers.choice import Unit
from tricomp_torch.integers.effect import Comparison, Examples
from tricomp_torch.integers.nodes import Effect
from tricomp_torch.integers.progress import Progress
from tricomp_torch.integers.replay import Replay
from tricomp_torch.integers.trials import Trials

_MOST_BATCHES = 4  # all together, nodes are measured on all of them
_MOST_RUNS = 32  # of one form of each node, from which on there are fewer batches: errors alone rank nodes, no more
_LEAST_UNITS = 4  # for fewer, to run the model over again is as fast

Found = dict[tuple[int, int], Comparison]  # by place of the unit, and rung
Rungs = Mapping[int, Sequence[int]]


class Alone:
    """Measures nodes alone."""

    def __init__(self, trials: Trials, examples: Examples, progress: Progress, *, is_traced: bool) -> None:
        """is_traced: whether it is known what reads a weight."""
        self._trials, self._examples, self._progress = trials, examples, progress
        self._can_replay = is_traced
        self._n_batches = 1

    def measured(self, units: Sequence[Unit], rungs: Rungs) -> list[Unit]:
        """The units with what some of their rungs do to the outputs. rungs: by the unit's place."""
        rungs = {i: wanted for i, wanted in rungs.items() if len(wanted)}
        n_units = sum(len(unit.rungs) > 1 for unit in units)
        self._n_batches = min(max(1, _MOST_RUNS // max(1, n_units)), _MOST_BATCHES, len(self._examples.batches))
        self._progress.expect(self._n_batches * sum(map(len, rungs.values())))
        can_replay = self._can_replay and len(rungs) >= _LEAST_UNITS
        made, found, failed = list(units), self._comparisons(rungs), set[int]()
        for number in range(self._n_batches):
            if can_replay and not self._replayed(made, rungs, number, found, failed):
                # What was measured so far may be wrong.
                self._can_replay = False
                return self.measured(units, rungs)
            if not can_replay:
                self._run(made, rungs, number, found, failed)
        again = {i: rungs[i] for i in failed}
        for i in failed:  # the model read the weight of a module itself, which no trace has shown
            made[i] = Unit(tuple(tuple(map(ladders.in_place, nodes)) for nodes in made[i].rungs))
        if again:
            found |= self._comparisons(again)
            for number in range(self._n_batches):
                self._run(made, again, number, found, None)
        for (i, rung), comparison in found.items():
            made[i] = _with_effect(made[i], rung, comparison.effect)
        return made

    def _comparisons(self, rungs: Rungs) -> Found:
        return {(i, rung): self._examples.comparison(self._n_batches) for i in rungs for rung in rungs[i]}

    def _run(self, units: Sequence[Unit], rungs: Rungs, number: int, found: Found, failed: set[int] | None) -> None:
        """Run the whole model on a batch for each rung. failed: takes up units that do not run; None: they raise."""
        for i in rungs:
            if failed is None or i not in failed:
                self._one(units[i], i, rungs[i], number, found, failed)

    def _replayed(self, units: Sequence[Unit], rungs: Rungs, number: int, found: Found, failed: set[int]) -> bool:
        """Do as `_run`, from each unit's first module on. Gives whether that can be leant on."""
        starts = {i: list(self._modules(units[i])) for i in rungs}
        replay = Replay(self._trials.model, lambda: self._examples.outputs(self._trials.model, number))
        with replay.patched([module for modules in starts.values() for module in modules]) as order:
            places = {id(module): place for place, module in enumerate(order)}
            begins = {i: min((places.get(id(module), -1) for module in starts[i]), default=-1) for i in rungs}
            for i in sorted(begins, key=lambda i: begins[i]):
                if begins[i] >= 0:
                    replay.advance(order[begins[i]])
                if i not in failed:
                    self._one(units[i], i, rungs[i], number, found, failed, replay)
            return replay.is_true()

    def _one(
        self,
        unit: Unit,
        i: int,
        rungs: Sequence[int],
        number: int,
        found: Found,
        failed: set[int] | None,
        replay: Replay | None = None,
    ) -> None:
        for rung in rungs:
            if replay is not None:
                replay.rewind()
            try:
                with self._trials.applied(unit.rungs[rung]) as model:
                    outputs = self._examples.outputs(model, number)
            except InvalidArgument:
                if failed is None:
                    raise
                failed.add(i)
                return
            found[i, rung].add(outputs)
            self._progress.step()

    def _modules(self, unit: Unit) -> Iterator[nn.Module]:
        """The modules of a unit; none if it has weights that others read too."""
        nodes = [node for nodes in unit.rungs for node in nodes]
        if all(node.place == "module" for node in nodes):
            for node in unit.rungs[0]:
                yield self._trials.model.get_submodule(node.name)


def _with_effect(unit: Unit, rung: int, effect: Effect) -> Unit:
    nodes = tuple(
        replace(node, error=effect.max_error, cosine=effect.cosine, top1=effect.top1) for node in unit.rungs[rung]
    )
    return Unit((*unit.rungs[:rung], nodes, *unit.rungs[rung + 1 :]))
