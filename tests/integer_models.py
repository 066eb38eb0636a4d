"""Small models with weights that were trained a little, for tests of integer deployment."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class Block(nn.Module):
    """A residual block of which one norm can be folded and one cannot: its layer's output is also added."""

    def __init__(self, n):
        super().__init__()
        self.wide = nn.Conv2d(n, n, 3, padding=2, dilation=2, groups=n // 4, bias=False)
        self.wide_norm = nn.BatchNorm2d(n)
        self.deep = nn.Conv2d(n, n, 3, padding=1, groups=n)
        self.deep_norm = nn.BatchNorm2d(n, affine=False)

    def forward(self, x):
        x = x + F.relu(self.wide_norm(self.wide(x)))
        deep = self.deep(x)
        return deep + F.relu(self.deep_norm(deep))


class Digits(nn.Module):
    """A convolutional classifier of 8 x 8 images."""

    def __init__(self, n=24):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU())
        self.block = Block(n)
        self.up = nn.ConvTranspose2d(n, 16, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.up_norm = nn.BatchNorm2d(16, eps=1e-3)
        self.down = nn.Conv2d(16, 32, (3, 5), stride=3, padding_mode="circular", padding=1)
        self.hidden = nn.Linear(32 * 6 * 5, 64, bias=False)
        self.hidden_norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.up_norm(self.up(self.block(self.stem(x)))))
        x = F.relu(self.down(x)).flatten(1)
        return self.head(F.dropout(F.relu(self.hidden_norm(self.hidden(x))), 0.1, self.training))


class Attention(nn.Module):
    """Self-attention by parameters of its own: a linear weight, and one that is multiplied from the right."""

    def __init__(self, n):
        super().__init__()
        self.inward = nn.Parameter(torch.randn(3 * n, n) / n**0.5)
        self.outward = nn.Parameter(torch.randn(n, n) / n**0.5)

    def forward(self, x):
        q, k, v = F.linear(x, self.inward).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) @ self.outward


class Text(nn.Module):
    """A language model of bytes: the head shares the embedding's weight, one layer runs twice."""

    def __init__(self, n=32, n_tokens=64):
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, n)
        self.places = nn.Parameter(torch.randn(32, n) * 0.1)
        self.layer = nn.TransformerEncoderLayer(n, 4, 2 * n, batch_first=True, dropout=0.0)
        self.attention = Attention(n)
        self.twice = nn.Linear(n, n)
        self.head = nn.Linear(n, n_tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.places[: tokens.shape[1]]
        x = self.layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]), is_causal=True)
        x = x + self.attention(x)
        x = x + self.twice(F.gelu(self.twice(x)))
        return {"states": x, "logits": self.head(x)}


class Series(nn.Module):
    """Recurrent layers, and a convolution over time; which layer comes last depends on the data."""

    def __init__(self, n=24):
        super().__init__()
        self.conv = nn.Conv1d(3, n, 5, padding=2)
        self.norm = nn.BatchNorm1d(n)
        self.lstm = nn.LSTM(n, n, num_layers=2, batch_first=True, bidirectional=True, proj_size=8)
        self.gru = nn.GRU(16, n, batch_first=True)
        self.calm, self.wild = nn.Linear(n, 4), nn.Linear(n, 4)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        y, _ = self.lstm(y)
        y, state = self.gru(y)
        return (self.wild if x.std() > 1.1 else self.calm)(y[:, -1]), state


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32[1797, 1, 8, 8] and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def text_batches(n: int, seed: int) -> list[torch.Tensor]:
    """Batches int64[8, 32] of a text."""
    source = " ".join(line for line in (torch.nn.Transformer.__doc__ or "").splitlines()).lower()
    data = torch.tensor([ord(letter) % 64 for letter in source])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - 33, (n, 8), generator=generator)
    return [torch.stack([data[i : i + 32] for i in batch.tolist()]) for batch in starts]


def trained_digits() -> Digits:
    """Digits after three passes over a thousand images; in training mode. Each call gives another model."""
    model = Digits()
    model.load_state_dict(_digits_state())
    return model


@cache
def _digits_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model, (images, labels) = Digits(), digits()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(48):
        at = torch.arange(64) + 64 * (step % 16)
        optimizer.zero_grad()
        F.cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()
    return model.state_dict()


def trained_text() -> Text:
    """Text after some steps; in training mode."""
    torch.manual_seed(2)
    model = Text()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for tokens in text_batches(60, seed=3):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])["logits"]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return model


def trained_series() -> Series:
    """Series after some steps; in training mode."""
    torch.manual_seed(4)
    model = Series()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(6):
        x = waves(16)
        optimizer.zero_grad()
        F.mse_loss(model(x)[0], x[:, -4:].mean(2)).backward()
        optimizer.step()
    return model


def waves(n: int) -> torch.Tensor:
    """float32[n, 21, 3]: sines of several speeds, with noise."""
    speeds = torch.rand(n, 1, 3) + 0.2
    return torch.sin(torch.arange(21.0)[None, :, None] * speeds) + torch.randn(n, 21, 3) * 0.05
