"""An embedding whose table is integers: the rows that are asked for become floats, no others. Imports torch."""

from __future__ import annotations

import torch
from torch import nn

from tricomp_torch.integers import operations
from tricomp_torch.integers.weights import IntegerWeight


class IntegerEmbedding(nn.Module):
    """nn.Embedding on an integer weight [n_embeddings, n]. input: whole numbers of any shape [...]; gives [..., n]."""

    def __init__(self, weight: IntegerWeight, padding_idx: int | None = None) -> None:
        """padding_idx: kept for code that reads it; at inference it is a row as any other."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.n_out, weight.n_in
        self.padding_idx = padding_idx
        self.weight = weight
        self.train(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows in the weight's dtype. Raises IndexError for what is no row, as torch does."""
        weight, rows = self.weight, input.reshape(-1)
        codes = weight.row_codes.index_select(0, rows)
        scales = weight.scales.index_select(0, rows)
        made = operations.values(codes, scales, weight.bits, weight.n_in, weight.group, weight.dtype)
        return made.reshape(*input.shape, weight.n_in)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
