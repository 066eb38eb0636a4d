"""What the demo trains: a small GPT on bytes of Python's own standard library. Imports torch; nothing that saves.

Everything here repeats bit for bit on one machine: the data is a fixed function of the Python installation, and batches
and dropout draw from torch's global generator, so that a resumed run must restore it to agree.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tricomp.demos.task import QUICK, VOCABULARY, Size, library_text

__all__ = ["GPT", "QUICK", "Block", "Size", "Training", "batch", "begin"]


def batch(data: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pieces of the text and their next bytes. int64[batch, context] each; draws from the global generator."""
    starts = torch.randint(len(data) - size.context - 1, (size.batch,))
    rows = torch.stack([data[start : start + size.context + 1] for start in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and added to its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.n_heads, self.dropout = size.n_heads, size.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.projection = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, context, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(rows, context, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.projection(mixed), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """A byte-level GPT whose output layer is tied to its embedding. int64[batch, context] to logits."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.position = nn.Parameter(torch.zeros(size.context, size.width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.n_layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.embedding(tokens) + self.position, self.size.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Training:
    """All that a run changes: model, optimizer, scheduler. The generators are torch's global ones."""

    model: GPT
    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.LambdaLR
    data: torch.Tensor

    def step(self) -> float:
        """One step on a random batch. Returns its loss."""
        tokens, targets = batch(self.data, self.model.size)
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


def begin(size: Size, n_steps: int, seed: int = 0) -> Training:
    """A fresh run: AdamW with weight decay on matrices, warmup and cosine decay to n_steps. Seeds all generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # numpy's and Python's are not drawn from, but saved, restored and compared too
    random.seed(seed)
    model = GPT(size)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    n_warmup = max(1, n_steps // 10)
    data = torch.from_numpy(library_text())

    def rate(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    return Training(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate), data)
