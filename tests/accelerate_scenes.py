"""Runs of a small net under Accelerate, for its tests: dropout, tied weights, shuffled data, accumulated gradients.

Each scene is what one rank does, see tests/dcp_ranks.py.
"""

from __future__ import annotations

import os
from typing import Any

import accelerate
import torch
import tricomp_torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from tricomp_torch.accelerate import ResumableLoader, load_state, save_state

from tests.groups import die_in_file

N_SAMPLES = 37  # 13 batches of 3, the last of one sample


class Net(torch.nn.Module):
    """Tied embedding and head, dropout."""

    def __init__(self, width=18):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, width)
        self.middle = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.norm(self.middle(self.embedding(tokens)))
        return self.head(torch.nn.functional.dropout(x, 0.2, self.training))


class Average:
    """A running mean of weights: an object of the user's own, with numpy's randomness in it."""

    def __init__(self, model):
        self.model = model
        self.mean = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.n = 0

    def update(self):
        self.n += 1
        for name, tensor in self.model.state_dict().items():
            self.mean[name] += (tensor.detach() - self.mean[name]) / (self.n + 1)

    def state_dict(self):
        return {"mean": self.mean, "n": self.n}

    def load_state_dict(self, state):
        self.mean = {name: tensor.clone() for name, tensor in state["mean"].items()}
        self.n = state["n"]


class Run:
    """Model, optimizer, scheduler and loader, prepared. seed: of the loader's own generator. options: of loaders."""

    def __init__(self, width=18, optimizer=torch.optim.AdamW, n_averages=1, scaler=None, seed=None, **options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(3)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(**options)
        )
        self.accelerator.scaler = scaler
        model = Net(width)
        made = optimizer(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
        tokens: Any = torch.randint(11, (N_SAMPLES, 7))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loader: Any = torch.utils.data.DataLoader(tokens, batch_size=3, shuffle=True, generator=generator)
        self.model, self.optimizer, self.scheduler, loader = self.accelerator.prepare(model, made, scheduler, loader)
        self.loader = ResumableLoader(self.accelerator, loader)
        self.averages = [Average(model) for _ in range(n_averages)]
        self.accelerator.register_for_checkpointing(*self.averages)
        self.losses: list[float] = []
        self.step = 0

    def train(self, checkpointer=None, until=None, epochs=3):
        """To the end, or until a step."""
        for _ in range(self.loader.epoch, epochs):
            for tokens in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = torch.nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.step += 1
                    self.losses.append(loss.item())
                    for average in self.averages:
                        average.update()
                    if checkpointer is not None:
                        save_state(self.accelerator, checkpointer, self.step)
                    if self.step == until:
                        return self
        return self

    def resume(self, checkpointer, step=None, **options):
        """Go on from a step of a store."""
        restored = load_state(self.accelerator, checkpointer, step, **options)
        self.step = restored.step if restored else 0
        return self

    def outcome(self):
        """All that two runs must have in common."""
        optimizer = self.optimizer.state_dict()
        return (
            bits(self.model.state_dict()),
            [bits(entry) for entry in optimizer["state"].values()],
            optimizer["param_groups"],
            self.scheduler.state_dict(),
            [bits(average.mean) for average in self.averages],
            self.accelerator.step,
            torch.get_rng_state().tolist(),
        )


def bits(tensors):
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def killed(rank, n, folder, at):
    """Dies by SIGKILL in the middle of writing a checkpoint, number at."""
    die_in_file(at)
    Run().train(tricomp_torch.Checkpointer(folder, every=3))


def ranks(rank, n, folder, **options):
    """Two processes in DistributedDataParallel: cut and resumed, as if never cut."""
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29512}
    os.environ.update({name: str(value) for name, value in environ.items()})
    whole = Run(**options).train()
    assert whole.accelerator.num_processes == n
    expected = whole.outcome(), whole.losses
    with tricomp_torch.Checkpointer(folder, every=3) as checkpointer:
        Run(**options).train(checkpointer, until=7)
    torch.distributed.barrier()
    again = Run(**options).resume(tricomp_torch.Checkpointer(folder))
    assert again.step == 6
    again.train()
    assert (again.outcome(), again.losses) == (expected[0], expected[1][6:])


SCENES = {"killed": killed, "ranks": ranks}
