"""Finished models to turn into integers: a CNN of digits, a transformer of text, an MLP. Imports torch, scikit-learn.

The hard thing: data must be real, and what a model is judged by must not be what it has learnt from. The digits are
those of scikit-learn, half of them held out; the text is Python's own standard library, cut into passages, each to be
told apart by the package that it is from, every fifth passage held out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks import training

_N_PACKAGES = 10


@dataclass(frozen=True)
class Finished:
    """A trained model and what to judge it by.

    make: the model without its weights. inputs, labels: held out. examples: inputs that it was trained on. key: what
    it was trained with.
    """

    name: str
    make: Callable[[], nn.Module]
    model: nn.Module
    examples: Tensor
    inputs: Tensor
    labels: Tensor
    key: str
    is_trained: bool = True

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class Residual(nn.Module):
    """Two convolutions with batch norms beside a way around them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.second, self.second_norm = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.around, self.around_norm = nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.around_norm(self.around(x)))


class Digits(nn.Module):
    """A small residual network for pictures of 8 x 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.body = nn.Sequential(Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.norm(self.stem(pictures)))).mean((2, 3)))


class Passages(nn.Module):
    """A transformer that tells which package a passage of text is from."""

    def __init__(self, width: int, n_blocks: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(training.Block(width, width // 64) for _ in range(n_blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _N_PACKAGES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def mlp(width: int = 1024, n_layers: int = 4) -> nn.Module:
    """Linear layers and little else: width to four times the width and back, n_layers times."""
    parts: list[nn.Module] = []
    for _ in range(n_layers):
        parts += [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    return nn.Sequential(*parts)


def layers(width: int, n_layers: int) -> Finished:
    """The MLP, as it is made: to time, not to judge. Its labels are what it says itself."""
    torch.manual_seed(0)
    model = mlp(width, n_layers).eval()
    inputs = torch.randn(256, width)
    with torch.inference_mode():
        labels = model(inputs).argmax(-1)
    return Finished("MLP", lambda: mlp(width, n_layers), model, torch.randn(64, width), inputs, labels, "", False)


def digits(n_steps: int, width: int, cache: Path) -> Finished:
    """The CNN, trained on every other picture of scikit-learn's digits. cache: folder for trained weights."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images.astype(np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(found.target.astype(np.int64))
    key = f"digits-{n_steps}-{width}"
    return _trained("CNN", key, lambda: Digits(width), pictures, labels, 2, n_steps, 3e-3, cache)


def passages(n_steps: int, width: int, n_blocks: int, vocabulary: int, context: int, cache: Path) -> Finished:
    """The transformer, trained on four of five passages of the largest packages of the standard library."""
    texts: dict[str, list[bytes]] = defaultdict(list)
    for name, text in training.library_sources():
        if "/" in name:
            texts[name.partition("/")[0]].append(text)
    largest = sorted(texts, key=lambda package: (-sum(map(len, texts[package])), package))[:_N_PACKAGES]
    tokens = training.tokens_of(b"\n".join(b"\n".join(texts[package]) for package in largest), vocabulary)
    ends = np.cumsum([len(training.tokens_of(b"\n".join(texts[package]), vocabulary)) for package in largest])
    n = min(len(tokens), int(ends[-1])) // context
    rows = torch.from_numpy(tokens[: n * context].reshape(n, context))
    labels = torch.from_numpy(np.searchsorted(ends, np.arange(n) * context + context // 2, side="right"))
    labels = labels.clamp_(max=_N_PACKAGES - 1)
    make = lambda: Passages(width, n_blocks, vocabulary, context)  # noqa: E731
    key = f"passages-{n_steps}-{width}-{n_blocks}-{vocabulary}-{context}"
    return _trained("transformer", key, make, rows, labels, 5, n_steps, 1e-3, cache)


def _trained(
    name: str,
    key: str,
    make: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    every: int,
    n_steps: int,
    rate: float,
    cache: Path,
) -> Finished:
    """A model after n_steps of AdamW on all inputs but every so manieth; from the cache if it is there."""
    torch.manual_seed(0)
    kept = cache / f"{key}.safetensors"
    is_held_out = torch.arange(len(inputs)) % every == every - 1
    known, known_labels = inputs[~is_held_out], labels[~is_held_out]
    model = make()
    if kept.exists():
        model.load_state_dict(load_file(kept))
        return Finished(name, make, model.eval(), known[:256], inputs[is_held_out], labels[is_held_out], key)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=n_steps, pct_start=0.2)
    for _ in range(n_steps):
        some = torch.randint(len(known), (32,))
        loss = F.cross_entropy(model(known[some]), known_labels[some])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.state_dict()), kept)
    return Finished(name, make, model.eval(), known[:256], inputs[is_held_out], labels[is_held_out], key)
