"""The run that the stall benchmark saves: a GPT under AdamW, the same in every process. Imports torch and training.

The hard thing is the same bits everywhere: batches come from a generator of its own, and everybody has the same number
of threads. Digests tell whether it holds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from tests.benchmarks import training

_TEXT_BYTES = 2 << 20  # more than is ever trained on


class Training:
    """A GPT and its AdamW in the middle of a run, and batches that are the same in every process."""

    def __init__(self, run: training.Run, arrays: dict[str, Any], text: Path) -> None:
        self.model = training.Gpt(run)
        betas = (0.9, run.beta2)
        rate = run.learning_rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=betas, weight_decay=0.1)
        self._run, self._tokens = run, torch.from_numpy(np.load(text, mmap_mode="c"))
        self._batches = np.random.default_rng(1)
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(torch.from_numpy(arrays[f"w/{name}"]))
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(run.steps[-1])),
                "exp_avg": torch.from_numpy(arrays[f"m/{name}"]).clone(),
                "exp_avg_sq": torch.from_numpy(arrays[f"v/{name}"]).clone(),
            }

    def step(self) -> float:
        """One step; seconds."""
        began = time.perf_counter()
        starts = self._batches.integers(len(self._tokens) - self._run.context - 1, size=self._run.batch)
        loss = training.gpt_loss(self.model, self._tokens, torch.from_numpy(starts), self._run.context)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What is saved; of tensors that training changes."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state."""
        state = self.state()
        moments = [tensor for entries in state["optimizer"]["state"].values() for tensor in entries.values()]
        return [*state["model"].values(), *moments]

    def digest(self) -> str:
        """Of every bit of the state, and of the optimizer's options."""
        state = self.state()
        found = xxhash.xxh3_128(json.dumps(state["optimizer"]["param_groups"]).encode())
        for name, tensor in state["model"].items():
            found.update(name.encode())
            found.update(_bytes_of(tensor))
        for number, entries in sorted(state["optimizer"]["state"].items()):
            for name, tensor in sorted(entries.items()):
                found.update(f"{number} {name}".encode())
                found.update(_bytes_of(tensor))
        return found.hexdigest()

    def poison(self) -> None:
        """Write over every bit of the state."""
        for tensor in self.tensors():
            tensor.view(torch.uint8).fill_(0xA5) if tensor.dim() else tensor.fill_(-1)


def _bytes_of(tensor: torch.Tensor) -> Any:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def begin(run: training.Run, folder: Path) -> Training:
    """The run as it begins: from the files that `leave` made in the folder."""
    with np.load(folder / "state.npz") as arrays:
        return Training(run, dict(arrays), folder / "tokens.npy")


def leave(run: training.Run, arrays: dict[str, Any], folder: Path) -> None:
    """Make the files of which a run begins, from the arrays of its last step."""
    np.savez(folder / "state.npz", allow_pickle=False, **arrays)
    text = b"\n".join(text for _, text in training.library_sources())
    np.save(folder / "tokens.npy", training.tokens_of(text[:_TEXT_BYTES], run.vocabulary))
