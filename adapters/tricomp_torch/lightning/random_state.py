"""RandomState: a Lightning callback that keeps the random generators in the checkpoint. Imports Lightning's callbacks.

The hard thing is when to give them back: after everything that Lightning sets up has drawn from them, and before the
first batch of the epoch is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tricomp.errors import InvalidArgument
from tricomp_torch import rng
from tricomp_torch.lightning import library

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = library.part("pytorch.callbacks").Callback

_log = logging.getLogger("tricomp")


class RandomState(Callback):
    """Keeps the global generators of torch, CUDA, numpy and Python in checkpoints, so that dropout and shuffling go on.

    With it, training resumed from a checkpoint of the end of an epoch is that which was not interrupted, bit for bit,
    if nothing else differs. It is for one process: with several ranks it saves nothing, and says so.

    >>> trainer = Trainer(plugins=[TricompCheckpointIO()], callbacks=[RandomState()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._n_ranks = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._n_ranks = trainer.world_size
        if self._n_ranks > 1:
            _log.warning("RandomState saves nothing: %d ranks have generators of their own", self._n_ranks)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = _converted(rng.get_state(), np.ndarray, torch.from_numpy) if self._n_ranks == 1 else {}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises InvalidArgument if this process cannot take the states over."""
        if state_dict and self._n_ranks == 1:
            torch_states = {key: state_dict[key] for key in ("torch", "cuda") if key in state_dict}
            state = {**_converted(state_dict, torch.Tensor, torch.Tensor.numpy), **torch_states}
            if found := rng.problems(state):
                raise InvalidArgument(f"RandomState: {' '.join(found)}")
            self._saved = state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved is not None:
            rng.set_state(self._saved)
            self._saved = None


def _converted(node: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """A tree of dicts with each node of a kind converted: stock checkpoints hold tensors, and no arrays of numpy."""
    if isinstance(node, dict):
        return {key: _converted(value, kind, convert) for key, value in node.items()}
    return convert(node) if isinstance(node, kind) else node
