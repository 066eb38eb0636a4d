"""Real training state to measure on: a GPT under AdamW, a CNN under AdamW and SGD. Imports numpy and torch only.

The hard thing: the data must be real and yet be on every machine. It is the text of Python's own standard library,
cut into the most frequent words and signs for the GPT, and seen as pages of 32 x 32 characters for the CNN. Every step
wanted is saved as step<N>.npz, with keys "w/<parameter>", "m/<parameter>", "v/<parameter>".
"""

from __future__ import annotations

import json
import platform
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

_PIECE = re.compile(rb" ?[A-Za-z_]+|[0-9]|\n *| +|[^A-Za-z0-9_ \n]")
_OWN_PACKAGES = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")


@dataclass(frozen=True)
class Run:
    """One training run: the model's shape, the batch, and the steps whose state is kept."""

    name: str
    steps: tuple[int, ...]
    batch: int
    optimizer: str = "adamw"
    learning_rate: float = 6e-4
    beta2: float = 0.99  # nanoGPT's choice where a batch has few tokens
    width: int = 320
    n_blocks: int = 8
    n_heads: int = 8
    context: int = 96
    vocabulary: int = 4096
    warmup_steps: int = 100


GPT = Run("gpt", steps=(300, 301, 310, 400), batch=16)
GPT_SMALL = Run(
    "gpt-small", (40, 41, 50, 140), 2, width=64, n_blocks=2, n_heads=2, context=48, vocabulary=512, warmup_steps=20
)
CNN = Run("cnn", (200, 210), batch=32, learning_rate=2e-3, width=48, warmup_steps=20)
CNN_SGD = Run("cnn-sgd", (200, 210), batch=32, optimizer="sgd", learning_rate=0.05, width=48, warmup_steps=20)
CNN_SMALL = Run("cnn-small", (30, 40), batch=16, learning_rate=2e-3, width=12, warmup_steps=10)
CNN_SGD_SMALL = Run("cnn-sgd-small", (30, 40), 16, optimizer="sgd", learning_rate=0.05, width=12, warmup_steps=10)
STALL = Run("gpt-stall", steps=(100,), batch=4)
ALL, SMALL = (GPT, CNN, CNN_SGD), (GPT_SMALL, CNN_SMALL, CNN_SGD_SMALL)


def library_sources() -> list[tuple[str, bytes]]:
    """Name and text of every .py file of the standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    return [(p.as_posix(), (root / p).read_bytes()) for p in paths if not set(p.parts[:-1]) & set(_OWN_PACKAGES)]


def tokens_of(text: bytes, vocabulary: int) -> NDArray[np.int64]:
    """Text as numbers below vocabulary: the most frequent pieces have one each; any other piece is spelt in bytes."""
    pieces = _PIECE.findall(text)
    frequent = [piece for piece, _ in Counter(pieces).most_common(vocabulary - 256) if len(piece) > 1]
    number = {piece: [256 + i] for i, piece in enumerate(frequent)}
    return np.fromiter((t for piece in pieces for t in number.get(piece) or piece), np.int64)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.attention(self.norm_1(x)).view(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """A decoder-only transformer with tied input and output embedding."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(run.vocabulary, run.width), nn.Embedding(run.context, run.width)
        self.blocks = nn.ModuleList(Block(run.width, run.n_heads) for _ in range(run.n_blocks))
        self.norm = nn.LayerNorm(run.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                shrink = (2 * run.n_blocks) ** 0.5 if name.endswith(("projection.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)


class Cnn(nn.Module):
    """Tells from a page of 32 x 32 characters which file it was cut from. Convolutions, batch norms, one linear."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = [nn.Embedding(128, 16)]
        self.characters = layers.pop()
        for i, (n_in, n_out) in enumerate(zip((16, *widths), widths)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
            if i % 2:
                layers.append(nn.MaxPool2d(2))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(4 * width, n_classes)

    def forward(self, pages: Tensor) -> Tensor:
        return self.head(self.body(self.characters(pages).permute(0, 3, 1, 2)).mean((2, 3)))


def gpt_loss(model: nn.Module, tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """Loss of a GPT on pieces of a text, each context tokens long. tokens: int64[n]; starts: int64[batch]."""
    rows = tokens[starts[:, None] + torch.arange(context + 1)]
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def _gpt_task(run: Run) -> tuple[nn.Module, Callable[[], Tensor]]:
    tokens = torch.from_numpy(tokens_of(b"\n".join(text for _, text in library_sources()), run.vocabulary))
    model = Gpt(run)

    def loss() -> Tensor:
        return gpt_loss(model, tokens, torch.randint(len(tokens) - run.context - 1, (run.batch,)), run.context)

    return model, loss


def _cnn_task(run: Run) -> tuple[nn.Module, Callable[[], Tensor]]:
    texts = sorted((text for _, text in library_sources()), key=len)[-64:]
    pages = []
    for text in texts:
        lines = [line[:32].ljust(32) for line in text.translate(bytes(min(i, 127) for i in range(256))).split(b"\n")]
        n_pages = len(lines) // 32
        grid = np.frombuffer(b"".join(lines[: 32 * n_pages]), np.uint8).reshape(n_pages, 32, 32)
        pages.append(torch.from_numpy(grid.astype(np.int64)))
    model = Cnn(run.width, len(pages))

    def loss() -> Tensor:
        labels = torch.randint(len(pages), (run.batch,))
        cuts = torch.stack([pages[k][torch.randint(len(pages[k]), ())] for k in labels.tolist()])
        return F.cross_entropy(model(cuts), labels)

    return model, loss


def arrays_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, NDArray[Any]]:
    """Weights and moments by name, copied: "w/blocks.0.up.weight", "m/..." and "v/..."."""
    arrays = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        arrays[f"w/{name}"] = parameter.detach().numpy().copy()
        for key, long_name in (("m", "exp_avg"), ("v", "exp_avg_sq"), ("m", "momentum_buffer")):
            if long_name in state:
                arrays[f"{key}/{name}"] = state[long_name].numpy().copy()
    return arrays


def _train(run: Run, folder: Path, log: Callable[[str], None]) -> None:
    torch.manual_seed(0)
    model, loss_of_batch = (_gpt_task if run.name.startswith("gpt") else _cnn_task)(run)
    optimizer: torch.optim.Optimizer
    if run.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate, momentum=0.9)
    else:
        betas = (0.9, run.beta2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, betas=betas, weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / run.warmup_steps))
    started, losses = time.perf_counter(), []
    for step in range(1, run.steps[-1] + 1):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
        if step in run.steps:
            np.savez(folder / f"step{step}.npz", allow_pickle=False, **arrays_of(model, optimizer))
        if step in run.steps or step % 20 == 0:
            log(f"{run.name}: step {step}, loss {losses[-1]:.3f}, {time.perf_counter() - started:.0f} s")
    about = {
        **asdict(run),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": round(losses[0], 3),
        "last_loss": round(sum(losses[-10:]) / len(losses[-10:]), 3),
        "seconds": round(time.perf_counter() - started),
        "text": f"standard library of Python {platform.python_version()}",
        "torch": torch.__version__,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1))


Train = Callable[[Run, Path, Callable[[str], None]], None]


def states(
    run: Run, cache: Path, log: Callable[[str], None] = print, train: Train | None = None
) -> tuple[dict[str, Any], dict[int, dict[str, NDArray[Any]]]]:
    """What the run was, and the state at each of its steps; trained now unless cache/<run.name> holds that very run.

    train: what trains and writes into a folder what `_train` does, where it is not that.
    """
    folder = cache / run.name
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / "about.json"
    if not about.exists() or not _is_same(json.loads(about.read_text()), run):
        about.unlink(missing_ok=True)
        (train or _train)(run, folder, log)
    kept = {step: dict(np.load(folder / f"step{step}.npz")) for step in run.steps}
    return json.loads(about.read_text()), kept


def _is_same(about: dict[str, Any], run: Run) -> bool:
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(run)))
    return all(about.get(key) == value for key, value in wanted.items())


def stream(state: dict[str, NDArray[Any]], kind: str) -> dict[str, NDArray[Any]]:
    """The leaves of one kind ("w", "m" or "v") of a state, by parameter name."""
    return {key[2:]: array for key, array in state.items() if key.startswith(f"{kind}/")}
