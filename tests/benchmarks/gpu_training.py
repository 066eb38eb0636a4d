"""A GPT under AdamW that trains where it is told, for tests and benchmarks on a GPU. Imports torch and training.

The same model, text and tokens as in `training`; only large, and on the device from the first step to the last. The
hard thing: a state that is kept must be the one of its step, so it is copied on the stream that trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.training import Gpt, Run, library_sources, tokens_of

MiB = 1 << 20
BYTES_A_PARAMETER = 12  # weight, first and second moment, all float32
_SIZES = (
    (64, 2, 2),
    (512, 8, 8),
    (1024, 12, 16),
    (1024, 24, 16),
    (1280, 36, 20),
    (1600, 48, 25),
    (2560, 32, 32),
    (4096, 32, 32),
)


@dataclass(frozen=True)
class Kept:
    """What a run was, and its state: tensors by step, stream ("w", "m", "v") and parameter, on the device."""

    about: dict[str, Any]
    states: dict[int, dict[str, dict[str, torch.Tensor]]]


def run_of(width: int, n_blocks: int, n_heads: int, steps: tuple[int, ...] = (1,), batch: int = 16) -> Run:
    """A run of GPT-2's manner."""
    return Run(
        f"gpt-{width}x{n_blocks}",
        steps,
        batch,
        width=width,
        n_blocks=n_blocks,
        n_heads=n_heads,
        context=512,
        vocabulary=16_384,
        warmup_steps=min(100, max(steps)),
    )


TINY = Run(
    "gpt-tiny", (3, 4, 13, 14), 2, width=32, n_blocks=1, n_heads=2, context=16, vocabulary=300, warmup_steps=2
)  # what a rehearsal without a card can do


def n_parameters(run: Run) -> int:
    """How many numbers the model learns."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Gpt(run).parameters())


def largest(most_bytes: float, steps: tuple[int, ...] = (1,), batch: int = 16) -> Run:
    """The largest GPT whose weights and moments fit into so many bytes."""
    fitting = [run_of(*size, steps, batch) for size in _SIZES]
    small = [run for run in fitting if n_parameters(run) * BYTES_A_PARAMETER <= most_bytes]
    return (small or fitting[:1])[-1]


@cache
def _tokens(vocabulary: int, most_bytes: int) -> torch.Tensor:
    text = b"\n".join(text for _, text in library_sources())
    return torch.from_numpy(tokens_of(text[:most_bytes], vocabulary))


class Training:
    """A model, its optimizer and its data on a device. Draws batches from torch's global generator of the device."""

    def __init__(self, run: Run, device: torch.device, seed: int = 0, text_bytes: int = 16 * MiB) -> None:
        torch.manual_seed(seed)
        self.run, self.device = run, device
        self._tokens = _tokens(run.vocabulary, text_bytes).to(device)
        with device:
            self.model = Gpt(run)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=run.learning_rate, betas=(0.9, run.beta2), weight_decay=0.1, fused=True
        )
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / run.warmup_steps)
        )

    def step(self) -> torch.Tensor:
        """One step; the loss, on the device. Nobody waits."""
        run = self.run
        starts = torch.randint(len(self._tokens) - run.context - 1, (run.batch,), device=self.device)
        rows = self._tokens[starts[:, None] + torch.arange(run.context + 1, device=self.device)]
        with self._narrow():
            loss = F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.warmup.step()
        return loss.detach()

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds; shares memory with the run."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def streams(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of the tensors of each stream by parameter."""
        found: dict[str, dict[str, torch.Tensor]] = {"w": {}, "m": {}, "v": {}}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            for stream, tensor in (("w", parameter), ("m", state["exp_avg"]), ("v", state["exp_avg_sq"])):
                found[stream][name] = tensor.detach().clone()
        return found

    def _narrow(self) -> AbstractContextManager[Any]:
        is_narrow = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if is_narrow else nullcontext()


def kept(
    run: Run,
    device: torch.device,
    seconds: float,
    streams_at: Callable[[int], str] = lambda step: "wmv",
    log: Callable[[str], None] = print,
) -> Kept:
    """Train, and keep the streams that streams_at names of each step in run.steps.

    After about so many seconds the steps that are left come at once: then the state is as real, of a younger model. The
    steps that are kept keep their distances.
    """
    training = Training(run, device)
    states: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    losses: list[torch.Tensor] = []
    first, last = run.steps[0], run.steps[-1]
    began = time.perf_counter()
    n_steps, skipped = 0, 0
    while n_steps + skipped < last:
        losses.append(training.step())
        n_steps += 1
        if n_steps % 20 == 0 or n_steps < 3:
            value = losses[-1].item()  # waits, so that the clock is right
            log(f"{run.name}: step {n_steps}, loss {value:.3f}, {time.perf_counter() - began:.0f} s")
        if not skipped and 10 <= n_steps < first and time.perf_counter() - began > seconds * first / last:
            skipped = first - n_steps
        if n_steps + skipped in run.steps:
            names = streams_at(n_steps + skipped)
            states[n_steps + skipped] = {k: v for k, v in training.streams().items() if k in names}
    about = {
        **asdict(run),
        "n_parameters": n_parameters(run),
        "n_steps": n_steps,
        "first_loss": round(losses[0].item(), 3),
        "last_loss": round(losses[-1].item(), 3),
        "seconds": round(time.perf_counter() - began),
    }
    return Kept(about, states)
