"""One training process of the demo: `python -m tricomp_torch.demo_run OPTIONS`, where OPTIONS is an Options as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

import tricomp
from tricomp.demos import training
from tricomp.demos.task import QUICK, Size
from tricomp.demos.training import Options
from tricomp_torch import rng
from tricomp_torch.checkpointer import Checkpointer
from tricomp_torch.demo_gpt import Training, begin
from tricomp_torch.trees import flatten


def stream_of(path: str) -> str:
    """The row of the table that a leaf counts to."""
    if path.startswith("model/"):
        return "weights"
    return {"exp_avg": "m", "exp_avg_sq": "v"}.get(path.rpartition("/")[2], "rest")


class TorchTrainee:
    """A Training as a Trainee."""

    def __init__(self, run: Training) -> None:
        self.run = run
        self.n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
        self.n_text_bytes = len(run.data)

    def step(self) -> float:
        """See Trainee."""
        return self.run.step()

    def _tree(self) -> dict[str, Any]:
        """The leaves of a checkpoint, with the paths that Checkpointer gives them."""
        return {
            "model": self.run.model.state_dict(),
            "optimizer": self.run.optimizer.state_dict(),
            "scheduler": self.run.scheduler.state_dict(),
            "rng": rng.get_state(),
        }

    def state(self) -> Iterator[tuple[str, Any]]:
        """See Trainee."""
        for path, value in _leaves(self._tree()):
            yield path, value.detach().numpy() if isinstance(value, torch.Tensor) else value

    def saved(self) -> Iterator[tuple[str, Any]]:
        """See Trainee."""
        flat = flatten(self._tree())
        ties = flat.notes.get("ties", {})
        for path, value in _leaves(flat.tree):
            if isinstance(value, np.ndarray) and path not in ties:
                yield path, value

    def saver(self, options: Options) -> TorchSaver:
        """See Trainee."""
        return TorchSaver(self.run, options)


class TorchSaver:
    """A Checkpointer as a Saver."""

    def __init__(self, run: Training, options: Options) -> None:
        keyframe = tricomp.KeyframeEvery(options.keyframe)
        self._checkpointer = Checkpointer(options.store, every=options.every, keyframe=keyframe)
        self._parts: dict[str, Any] = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
        self.store = self._checkpointer.store

    def restore(self) -> int | None:
        """See Saver."""
        restored = self._checkpointer.restore(**self._parts)
        return restored.step if restored is not None else None

    def save(self, step: int) -> Future[tricomp.Report] | None:
        """See Saver."""
        return self._checkpointer.save(step, **self._parts)

    def read(self, step: int) -> None:
        """See Saver."""
        self._checkpointer.restore(step=step, rng=False)


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        entries: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list | tuple):
        entries = list(enumerate(tree))
    else:
        return [(path, tree)]
    return [leaf for key, value in entries for leaf in _leaves(value, f"{path}/{key}" if path else str(key))]


def run(options: Options) -> None:
    """Train from the store's latest step, or from the start, to n_steps."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.use_deterministic_algorithms(True)
    trainee = TorchTrainee(begin(QUICK if options.is_quick else Size(), options.n_steps))
    training.run(options, trainee, stream_of)


if __name__ == "__main__":
    run(training.from_arguments())
