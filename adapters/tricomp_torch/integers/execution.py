"""Products with integer weights: which way is taken for which shape and place, all here. Imports torch and the codec.

On the CPU the core's native kernel reads the codes as they are saved, on a GPU its Triton kernels do, or torch where
that was timed to be faster. The hard thing: kernels that want weights in a layout of their own are not used. Laying out
4 million weights took oneDNN 23 ms and FBGEMM 14 ms, longer than to read them as floats; and one copy to save and one
to run would both stay in memory.

Measured on one core of AMD Zen 4 with AVX512-VNNI, torch 2.13, rows of input by 4096 x 1024 weights, milliseconds:

                     FBGEMM,     torch.    inputs int8, natively    inputs float, natively    by torch
    rows   float32   laid out   _int_mm      8 bits       4 bits       8 bits       4 bits      8 bits
       1      0.49       0.08      0.10        0.07         0.12         0.35         0.52         0.6
      16       2.5       0.35      0.75        0.37         0.55          1.5          1.5         2.5
     128        12        2.8       3.6         2.5          2.8         10.5         10.4          14

Where inputs are not said to be float, they become int8 within these times. At 128 rows that is 92 % of the products of
codes that the processor can do, and 88 % of those of floats. For one row of float32 others took, with weights as int8
alone, 3.4 ms (torch._weight_int8pack_mm), as int4 15 ms (torch._weight_int4pack_mm_for_cpu), and with signed inputs
89 ms (torch.ops.onednn.qlinear_pointwise).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tricomp.codec import multiplying, multiplying_there
from tricomp_torch.integers import fastest

LARGEST = 127  # code of a row's largest magnitude
_BLOCK_WEIGHTS = 1 << 18  # as floats they stay in a core's cache
_GPU_BLOCK_WEIGHTS = 1 << 23  # and these keep a GPU busy
_MOST_TERMS = 1 << 17  # sums of more products of codes may not fit an int32
_LEAST = 16  # torch._int_mm of torch 2.13 mistakes the strides of matrices of one column, and sums garbage
_MANY_ROWS = 48  # of float inputs, from which BLAS on blocks of floats is faster where vectors are short
_MANY_ROWS_OF_4_BITS = 512  # torch takes as long to make 4 bits floats as BLAS takes for 128 rows
_CUDA_ROWS = 32  # cuBLAS takes more than 16 rows
_LEAST_BUCKET, _MOST_BUCKET = 16, 1 << 14  # of rows, whose numbers share a choice between powers of 2


def linear(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
    is_dynamic: bool,
) -> torch.Tensor:
    """input [..., in] times the transpose of the weight [out, in], and the bias. In the input's dtype.

    codes: int8 [out, in], or uint8 [out, ceil(in / 2)] at 4 bits. scales: [out] or [out, groups]. bias: [out].
    """
    n_in, n_out = input.shape[-1], codes.shape[0]
    rows = input if input.ndim == 2 else input.reshape(-1, n_in)
    if rows.shape[0] == 0 or n_out == 0 or n_in == 0:
        out = rows.new_zeros(rows.shape[0], n_out)
        out = out if bias is None else out + bias.to(out.dtype)
    elif _is_on_gpu(codes) and rows.device == codes.device:  # else torch says what is wrong
        out = _gpu_linear(rows, codes, scales, bias, bits, group, is_dynamic)
    elif _is_native(rows, codes, bits, is_dynamic):
        out = _native_linear(rows, codes, scales, bias, bits, group, is_dynamic)
    else:
        out = _torch_linear(rows, codes, scales, bias, bits, group, is_dynamic)
    return out if input.ndim == 2 else out.reshape(*input.shape[:-1], n_out)


def values(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, n_in: int, group: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """The floats [out, in] that codes stand for: code times scale in float32, then rounded to dtype."""
    if bits == 4:
        codes = unpacked(codes, n_in)
    scales = scales.float()
    if group is None:
        made = codes * scales[:, None]
    elif n_in % group == 0:
        made = (codes.reshape(len(codes), n_in // group, group) * scales[:, :, None]).reshape(len(codes), n_in)
    else:
        made = codes * scales.repeat_interleave(group, 1)[:, :n_in]
    if dtype == torch.float16:
        made = made.clamp_(-65504.0, 65504.0)
    return made.to(dtype)


def unpacked(packed: torch.Tensor, n: int) -> torch.Tensor:
    """int8 [out, n] of codes of 4 bits, two a byte, low bits first."""
    signed = packed.view(torch.int8)
    return torch.stack([signed << 4 >> 4, signed >> 4], -1).reshape(len(packed), 2 * packed.shape[1])[:, :n]


def to_codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [m, n] as int8 and their scales, float32 [m, 1], by each row's largest magnitude."""
    rows = rows.float()
    scales = torch.linalg.vector_norm(rows, float("inf"), -1, True).div_(LARGEST)
    scales.masked_fill_(scales == 0, 1.0)
    return torch.div(rows, scales).round_().to(torch.int8), scales


def rounded_rows(rows: torch.Tensor) -> torch.Tensor:
    """What the codes of rows [m, n] stand for, in the dtype of rows."""
    codes, scales = to_codes(rows)
    return (codes * scales).to(rows.dtype)


def _is_on_gpu(codes: torch.Tensor) -> bool:
    return codes.is_cuda


def _gpu_linear(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
    is_dynamic: bool,
) -> torch.Tensor:
    """By the fastest of the core's kernels and torch's; nothing is waited for but where they are timed, once a shape.

    Dynamic products are the same bytes whichever that is. Others differ in how sums are rounded.
    """
    arguments = (rows, codes, scales, bias, bits, group)
    ways = multiplying_there.ways(*arguments, is_dynamic)
    if ways and not is_dynamic:
        ways["torch of floats"] = partial(_float_linear, *arguments)
    bucket = min(max(1 << (len(rows) - 1).bit_length(), _LEAST_BUCKET), _MOST_BUCKET)
    key = (bucket, rows.shape[1], len(codes), rows.dtype, bits, group, is_dynamic, bias is not None)
    return fastest.run(key, ways, partial(_torch_linear, *arguments, is_dynamic), codes.device)


def _is_native(rows: torch.Tensor, codes: torch.Tensor, bits: int, is_dynamic: bool) -> bool:
    if codes.device.type != "cpu" or not multiplying.is_fast(rows.shape[1]):
        return False
    if is_dynamic or rows.shape[0] < (_MANY_ROWS if bits > 4 else _MANY_ROWS_OF_4_BITS):
        return True
    return multiplying.is_wide()


def _native_linear(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
    is_dynamic: bool,
) -> torch.Tensor:
    out = torch.empty(rows.shape[0], codes.shape[0])
    multiplying.multiply(
        _array(rows if rows.dtype == torch.float32 else rows.float()),
        _array(codes),
        _array(scales if scales.dtype == torch.float32 else scales.view(torch.int16)),
        None if bias is None else _array(bias if bias.dtype == torch.float32 else bias.float()),
        out.numpy(),
        8 if bits > 4 else 4,  # 5 to 7 bits stand a byte each, as 8 do
        group,
        is_dynamic,
        torch.get_num_threads(),
    )
    return out if rows.dtype == torch.float32 else out.to(rows.dtype)


def _array(tensor: torch.Tensor) -> Any:
    if tensor.requires_grad:  # a tenth of a microsecond; to detach takes more
        tensor = tensor.detach()
    return tensor.contiguous().numpy()


def _torch_linear(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
    is_dynamic: bool,
) -> torch.Tensor:
    """By torch alone, wherever the codes are."""
    if is_dynamic and bits > 4 and group is None and _has_integer_product(codes):
        return _integer_linear(rows, codes, scales, bias)
    return _float_linear(rounded_rows(rows) if is_dynamic else rows, codes, scales, bias, bits, group)


def _has_integer_product(codes: torch.Tensor) -> bool:
    n_out, n_in = codes.shape
    if not _LEAST <= n_in <= _MOST_TERMS or n_out < _LEAST:
        return False
    return not codes.is_cuda or (n_out % 8 == 0 and n_in % 8 == 0)


def _integer_linear(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    inputs, input_scales = to_codes(rows)
    n_rows = len(inputs)
    if inputs.is_cuda and n_rows < _CUDA_ROWS:
        inputs = F.pad(inputs, (0, 0, 0, _CUDA_ROWS - n_rows))
    out = torch._int_mm(inputs, codes.t())[:n_rows] * scales.float()
    out = out.mul_(input_scales) if bias is None else torch.addcmul(bias.float(), out, input_scales)
    return out.to(rows.dtype)


def _float_linear(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
) -> torch.Tensor:
    """A block of weights at a time becomes floats, for as long as it is used."""
    n_in, n_out = rows.shape[1], len(codes)
    n_each = max(1, (_GPU_BLOCK_WEIGHTS if codes.is_cuda else _BLOCK_WEIGHTS) // n_in)
    out = rows.new_empty(len(rows), n_out)
    for first in range(0, n_out, n_each):
        last = min(first + n_each, n_out)
        block = values(codes[first:last], scales[first:last], bits, n_in, group, rows.dtype)
        out[:, first:last] = rows @ block.t()
    return out if bias is None else out.add_(bias)
