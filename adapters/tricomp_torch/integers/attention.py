"""Multi-head attention whose projections are integers. Imports torch, linear layers and the weights' module.

The hard thing: torch's function for it takes float weights, so what is between the projections is done here: masks of
both kinds, added keys, averaged weights. It must stay what nn.MultiheadAttention computes in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import operations
from tricomp_torch.integers.linear import IntegerLinear
from tricomp_torch.integers.weights import IntegerWeight

_OWN = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "batch_first", "add_zero_attn", "_qkv_same_embed_dim")
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class IntegerMultiheadAttention(nn.Module):
    """nn.MultiheadAttention on integer projections, by the same names."""

    embed_dim: int
    num_heads: int
    head_dim: int
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: IntegerWeight | None
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self, layer: nn.MultiheadAttention, weights: Mapping[str, IntegerWeight], *, is_dynamic: bool = False
    ) -> None:
        """Of a float layer, whose biases are taken, and its weights in integers by their names in it."""
        super().__init__()
        for name in _OWN:
            setattr(self, name, getattr(layer, name))
        self.is_dynamic = is_dynamic
        self.dropout = 0.0
        for name in ("in_proj_weight", *_PROJECTIONS):
            self.register_module(name, weights.get(name))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, getattr(layer, name))
        self.out_proj = IntegerLinear(weights["out_proj.weight"], layer.out_proj.bias, is_dynamic=is_dynamic)
        self.train(False)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What nn.MultiheadAttention gives. is_causal is a hint there: the mask that comes with it says it all."""
        if is_causal and attn_mask is None:
            raise InvalidArgument("is_causal=True is a hint about attn_mask: give the mask too")
        is_batched = query.ndim == 3
        q, k, v = self._projected(query, key, value)
        if not is_batched:
            q, k, v = (tensor.unsqueeze(0) for tensor in (q, k, v))
        elif not self.batch_first:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        n_batch, n_queries = q.shape[:2]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([tensor, added.expand(n_batch, 1, -1)], 1)
                for tensor, added in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (tensor.reshape(n_batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for tensor in (q, k, v))
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = self._mask(attn_mask, key_padding_mask, k.shape[2], q.dtype)
        weights = None
        if need_weights:
            scores = (q * (1 / math.sqrt(self.head_dim))) @ k.transpose(2, 3)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            # As torch: where the hint says all, the mask is not looked at, and keys that were added are not seen.
            is_causal = is_causal and key_padding_mask is None
            out = F.scaled_dot_product_attention(q, k, v, None if is_causal else mask, is_causal=is_causal)
        out = self.out_proj(out.transpose(1, 2).reshape(n_batch, n_queries, self.embed_dim))
        if not is_batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs, n = (query, key, value), self.embed_dim
        weight = self.in_proj_weight
        if weight is not None and query is key and key is value:
            q, k, v = self._project(query, weight, slice(None), self.in_proj_bias).chunk(3, -1)
            return q, k, v
        made = []
        for i, (name, input) in enumerate(zip(_PROJECTIONS, inputs, strict=True)):
            rows = slice(i * n, (i + 1) * n)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            own = weight if weight is not None else getattr(self, name)
            made.append(self._project(input, own, rows if weight is not None else slice(None), bias))
        return made[0], made[1], made[2]

    def _project(
        self, input: torch.Tensor, weight: IntegerWeight, rows: slice, bias: torch.Tensor | None
    ) -> torch.Tensor:
        codes, scales = weight.row_codes[rows], weight.scales[rows]
        if input.shape[-1] != weight.n_in:
            raise InvalidArgument(
                f"expected an input [..., {weight.n_in}], got {list(input.shape)}: this layer is {self!r}"
            )
        return operations.linear(input, codes, scales, bias, weight.bits, weight.group, self.is_dynamic)

    def _mask(
        self, mask: torch.Tensor | None, padding: torch.Tensor | None, n_keys: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Both masks as one that is added to scores [batch, heads, queries, keys]; keys that were added are seen."""
        made: torch.Tensor | None = None
        if mask is not None:
            mask = _added(mask, n_keys, dtype)
            made = mask if mask.ndim == 2 else mask.reshape(-1, self.num_heads, *mask.shape[1:])
        if padding is not None:
            rows = _added(padding, n_keys, dtype)[:, None, None, :]
            made = rows if made is None else made + rows
        return made


def _added(mask: torch.Tensor, n_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask [..., keys] as what is added to scores: where a mask of booleans is true, minus infinity."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return F.pad(mask.to(dtype), (0, n_keys - mask.shape[-1]))
