"""Launchers: floats on a device to integer codes and scales, and back. Imports ground, torch and the kernels.

They give what `tricomp.reference.quantize` gives, on the device, and wait for nothing. The hard thing: groups are of 16
elements or of millions, so a program has many short ones at a time, or a part of a long one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tricomp.dtypes import DType
from tricomp.kernels.device import IS_INTERPRETED, Device
from tricomp.kernels.quantize_kernel import dequantize_kernel, quantize_kernel

# Frozen with the definition, as in the reference: what the largest magnitude is multiplied by, in 64ths.
_WIDE = (64, 63, 62, 61, 60, 59, 58, 56, 54, 52, 50, 48, 44, 40, 36, 32)
_NARROW = (64, 60, 56, 52, 48, 44, 41, 38, 35, 32, 29, 26, 23, 20, 18, 16)
FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
_CARRIERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.float64}  # what a kernel loads
_LARGEST = {
    "float32": torch.finfo(torch.float32).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
    "float16": torch.finfo(torch.float16).max,
    "float64": torch.finfo(torch.float32).max,
}
_TILE = 1 << 16 if IS_INTERPRETED else 1024  # elements of a program with many groups: the interpreter counts programs


def quantize(
    rows: torch.Tensor, dtype: DType, bits: int, group: int, scale_dtype: DType, is_clipped: bool, device: Device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8[out, n], scales as int words [out, n_groups], counts of what is not finite, int64[out].

    rows: int tensor [out, n] on the device, words of dtype. Inside device.running().
    """
    n_rows, n = rows.shape
    group = min(group, max(n, 1))
    n_groups = max(-(-n // group), 1)
    codes = device.empty((n_rows, n), torch.int8)
    scales = device.empty((n_rows, n_groups), _CARRIERS[scale_dtype.word_bits // 8])
    counts = device.empty((n_rows, n_groups), torch.int32)
    size, groups = tile(group, bits, n_rows * n_groups)
    device.launch(
        quantize_kernel,
        (-(-n_rows * n_groups // groups),),
        rows.contiguous().view(_CARRIERS[dtype.word_bits // 8]),
        _shares(bits, device.handle),
        codes,
        scales,
        counts,
        n_rows * n_groups,
        n,
        group,
        n_groups,
        FORMAT=FORMATS[dtype.name],
        MOST=(1 << bits - 1) - 1,
        IS_BF16=int(scale_dtype.name == "bfloat16"),
        IS_CLIPPED=int(is_clipped),
        GROUPS=groups,
        SIZE=size,
        IS_ONE=int(size >= group),
    )
    return codes, scales, counts.sum(dim=1)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, group: int, scale_dtype: DType, dtype: DType, device: Device
) -> torch.Tensor:
    """The floats that codes stand for: an int tensor [out, n], words of dtype. Inside device.running().

    codes: int8[out, n]; scales: int words [out, n_groups], both on the device.
    """
    n_rows, n = codes.shape
    group = min(group, max(n, 1))
    n_groups = max(-(-n // group), 1)
    words = device.empty((n_rows, n), _CARRIERS[dtype.word_bits // 8])
    size, groups = tile(group, 8, n_rows * n_groups)
    device.launch(
        dequantize_kernel,
        (-(-n_rows * n_groups // groups),),
        codes.contiguous(),
        scales.contiguous(),
        words,
        n_rows * n_groups,
        n,
        group,
        n_groups,
        _LARGEST[dtype.name],
        FORMAT=FORMATS[dtype.name],
        IS_BF16=int(scale_dtype.name == "bfloat16"),
        GROUPS=groups,
        SIZE=size,
    )
    return words.view(torch.int64) if dtype.word_bits == 64 else words


def tile(group: int, bits: int, n_groups: int) -> tuple[int, int]:
    """Elements of a group that a program looks at at a time, and groups that it has, of so many; powers of 2."""
    most = 1024 if bits == 4 else 2048  # squares of more would not fit 32 bits; and a warp's registers hold so many
    size = min(1 << max(group - 1, 0).bit_length(), most)
    groups = max(_TILE // size, 1)
    return size, min(groups, 1 << max(n_groups - 1, 0).bit_length()) if IS_INTERPRETED else groups


@cache
def _shares(bits: int, handle: torch.device) -> Any:
    """What a top is multiplied by, on the device."""
    shares = _WIDE if bits >= 6 else _NARROW
    return torch.tensor([share / 64 for share in shares], dtype=torch.float32).to(handle)
