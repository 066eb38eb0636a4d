"""Rounding of mantissas on a device, with torch's own operations. Imports ground and torch.

Mirrors `tricomp.reference.bits.round_mantissa`. The hard thing: torch computes with signed integers alone, so words of
up to 32 bits are widened, and those of 64 rely on a magnitude being below 2^63.
"""

from __future__ import annotations

import torch

from tricomp.dtypes import DType
from tricomp.errors import InvalidArgument
from tricomp.kernels.device import Device

_SLICE_WORDS = 1 << 22  # rounded at a time: each takes some 50 bytes meanwhile


def round_mantissa(words: torch.Tensor, dtype: DType, kept_bits: int, device: Device) -> torch.Tensor:
    """Round floats to nearest even at kept_bits of mantissa. words: int tensor [n]. Returns one of its own.

    Infinities and NaNs stay as they are, and so does a finite word that would round past the largest finite one.
    Raises InvalidArgument unless dtype is a float.
    """
    if not dtype.is_float:
        raise InvalidArgument(f"keep_mantissa_bits applies to float leaves, not {dtype.name}. Narrow the pattern.")
    n_dropped = dtype.mantissa_bits - kept_bits
    if n_dropped <= 0:
        return words
    with device.running():
        out = torch.empty_like(words)
        for first in range(0, len(words), _SLICE_WORDS):
            part = slice(first, first + _SLICE_WORDS)
            out[part] = _rounded(words[part].to(torch.int64), dtype, n_dropped).to(words.dtype)
        return out


def _rounded(words: torch.Tensor, dtype: DType, n_dropped: int) -> torch.Tensor:
    top = dtype.word_bits - 1
    body = words & (1 << top) - 1
    mask = (1 << n_dropped) - 1
    rounded = (body + (mask >> 1) + ((body >> n_dropped) & 1)) & ~mask
    sign = words ^ body
    if dtype.name.endswith("fnuz"):  # there a zero has no sign: the word of -0 is NaN
        sign = torch.where((rounded == 0) & (body != 0), torch.zeros_like(sign), sign)
    largest = _largest_finite(dtype)
    is_kept = (body > largest) | (rounded > largest) | (rounded < 0)
    return torch.where(is_kept, words, sign | rounded)


def _largest_finite(dtype: DType) -> int:
    """Magnitude of the largest finite number."""
    if dtype.name.endswith("fnuz"):
        return (1 << (dtype.word_bits - 1)) - 1
    if dtype.name.endswith("fn"):
        return (1 << (dtype.word_bits - 1)) - 2
    return (((1 << dtype.exponent_bits) - 1) << dtype.mantissa_bits) - 1
