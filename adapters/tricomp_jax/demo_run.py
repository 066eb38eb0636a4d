"""One training process of the demo: `python -m tricomp_jax.demo_run OPTIONS`, where OPTIONS is an Options as JSON.

The hard thing: XLA reads its flags when it is first used, so nothing here may make an array before they are set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

import tricomp
from tricomp.demos import training
from tricomp.demos.task import QUICK, Size
from tricomp.demos.training import Options
from tricomp_jax import demo_gpt
from tricomp_jax.hook import CheckpointHook


def stream_of(path: str) -> str:
    """The row of the table that a leaf counts to."""
    keys = path.split("/")
    if keys[0] == "params":
        return "weights"
    return next((name for key, name in (("mu", "m"), ("nu", "v")) if key in keys), "rest")


class JaxTrainee:
    """A State as a Trainee."""

    def __init__(self, size: Size, n_steps: int) -> None:
        self.size = size
        self.now = demo_gpt.begin(size, n_steps)
        self._text = demo_gpt.text()
        self.n_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.now.params))
        self.n_text_bytes = len(self._text)

    def step(self) -> float:
        """See Trainee. The state before is donated: its memory is that of the next."""
        self.now, loss = demo_gpt.train_step(self.now, self._text, self.size)
        return float(loss)

    def state(self) -> Iterator[tuple[str, Any]]:
        """See Trainee. jax's own paths and arrays, since tricomp's are what is to be proven."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.now):
            is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            yield joined(path), np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    saved = state

    def saver(self, options: Options) -> JaxSaver:
        """See Trainee."""
        return JaxSaver(self, options)


class JaxSaver:
    """A CheckpointHook as a Saver."""

    def __init__(self, trainee: JaxTrainee, options: Options) -> None:
        self.store = tricomp.Store(options.store, keyframe=tricomp.KeyframeEvery(options.keyframe))
        self._hook = CheckpointHook(self.store, every=options.every)
        self._trainee = trainee

    def restore(self) -> int | None:
        """See Saver."""
        restored = self._hook.restore_latest(self._trainee.now)
        if restored is None:
            return None
        self._trainee.now = restored.state
        return int(restored.step)

    def save(self, step: int) -> Future[tricomp.Report] | None:
        """See Saver."""
        return self._hook(step, self._trainee.now)

    def read(self, step: int) -> None:
        """See Saver."""
        self._hook.restore(step, self._trainee.now)


def joined(path: tuple[Any, ...]) -> str:
    """A path of jax as one of tricomp."""
    return "/".join(str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", "")))) for entry in path)


def run(options: Options) -> None:
    """Train from the store's latest step, or from the start, to n_steps."""
    os.environ.update(demo_gpt.deterministic(os.environ, options.is_quick))
    training.run(options, JaxTrainee(QUICK if options.is_quick else Size(), options.n_steps), stream_of)


if __name__ == "__main__":
    run(training.from_arguments())
