"""Convolutions on integer weights and inputs as codes: which way is taken where. Imports torch and the codec.

On the CPU the core's native kernel reads codes as they are saved, and lays them out for the time of a call. Each sample
becomes int8 by its own largest magnitude. The hard thing: a model may rely on how an output lies in memory, such as by
`y.view(n, -1)`; so outputs have the order that torch's own convolution would give them, and every model still runs.

Measured on one core of AMD Zen 4 with AVX512-VNNI, torch 2.13, milliseconds; float32 is torch's own convolution:

    channels     picture    kernel    samples   float32   codes
     64 ->  64   28 x  28   3 x 3           1      0.55    0.15
    256 -> 256   14 x  14   3 x 3           1      2.00    0.57
    256 -> 256   14 x  14   3 x 3           8     15.0     4.28
    128 -> 128    2 x   2   3 x 3           8      0.15    0.04
     64 -> 256   28 x  28   1 x 1           8      2.11    0.99
      3 ->  64  112 x 112   7 x 7, by 2     8     12.1     4.57

With AVX2 alone, for both, from 1.5 times as fast as float32 to as fast. Without either, floats are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from tricomp.codec import convolving
from tricomp.errors import InvalidArgument
from tricomp_torch.integers import execution

_LEAST = 2.0**-100  # a sample of smaller magnitudes is one of zeros, as in the reference


def convolve(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """F.conv1d or F.conv2d of input [batch, in, ...] or [in, ...], its samples rounded to int8. In the input's dtype.

    codes: int8 [out, in / groups, ...]; scales, bias: [out]. padding: zeros before and after each axis of space, in
    order. Raises InvalidArgument for an input of another form, or smaller than the kernel.
    """
    if not input.is_floating_point():
        raise InvalidArgument(f"expected an input of floats, got {input.dtype}")
    samples = input if input.ndim == codes.ndim else input.unsqueeze(0)
    if samples.shape[1:] == codes.shape[1:] and not any(padding) and max(dilation) == 1:
        # A kernel as large as the picture: a linear layer, which need not lay weights out for a single use of each.
        out = execution.linear(samples.flatten(1), codes.flatten(1), scales, bias, 8, None, True)
        out = out.reshape(*out.shape, *[1] * (codes.ndim - 2))
        return out if samples is input else out.squeeze(0)
    if samples.numel() and samples.device.type == "cpu" and codes.device.type == "cpu":
        is_last = has_channels_last(samples), has_channels_last(codes)
        task = (tuple(stride), tuple(padding), tuple(dilation), groups)
        shape, request = _request(samples.shape, codes.shape, *task, *is_last)
        if request is not None:
            out = _native(samples, codes, scales, bias, shape, request, *is_last)
            return out if samples is input else out.squeeze(0)
    out_sizes(samples.shape, codes.shape, stride, padding, dilation, groups)
    out = _by_floats(samples, codes, scales, bias, stride, padding, dilation, groups)
    return out if samples is input else out.squeeze(0)


def fake(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A tensor of the shape and order in memory that convolve gives, for traces."""
    samples = input if input.ndim == codes.ndim else input.unsqueeze(0)
    sizes = out_sizes(samples.shape, codes.shape, stride, padding, dilation, groups)
    out = samples.new_empty(samples.shape[0], codes.shape[0], *sizes)
    if has_channels_last(samples) or has_channels_last(codes):
        out = out.to(memory_format=torch.channels_last)
    return out if samples is input else out.squeeze(0)


def has_channels_last(tensor: torch.Tensor) -> bool:
    """Whether torch's convolution takes a tensor for one in channels_last order, by its strides."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        size, step = tensor.shape[axis], tensor.stride(axis)
        if size == 0 or step < least or (axis == 0 and least == tensor.stride(1)):
            return False
        least = step * size if size > 1 else step
    return True


def out_sizes(
    shape: Sequence[int],
    codes_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """Of the output's axes of space. Raises InvalidArgument if there is no output."""
    require_channels(shape, codes_shape, groups)
    kernel = codes_shape[2:]
    sizes = []
    for i, size in enumerate(shape[2:]):
        room = size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1
        if room < 0:
            raise InvalidArgument(
                f"a kernel of {list(kernel)}, dilation {list(dilation)}, is larger than the input {list(shape)} with "
                f"padding {list(padding)}"
            )
        sizes.append(room // stride[i] + 1)
    return sizes


def require_channels(shape: Sequence[int], codes_shape: Sequence[int], groups: int) -> None:
    """Raise InvalidArgument for samples of other axes, or other channels, than weights have."""
    n_in = codes_shape[1] * groups
    if len(shape) != len(codes_shape) or shape[1] != n_in:
        axes = "length" if len(codes_shape) == 3 else "height, width"
        raise InvalidArgument(
            f"expected an input [batch, {n_in}, {axes}], or one without a batch, got {list(shape)} (with its batch)"
        )


@lru_cache(maxsize=4096)
def _request(
    shape: torch.Size,
    codes_shape: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    is_input_last: bool,
    is_codes_last: bool,
) -> tuple[tuple[int, ...], bytes | None]:
    """The output's shape, and what the native kernel is asked: None where floats are to be taken."""
    sizes = out_sizes(shape, codes_shape, stride, padding, dilation, groups)
    kernel, before = tuple(codes_shape[2:]), padding[::2]
    n_in = codes_shape[1] * math.prod(kernel)
    spans = [(sizes[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(len(sizes))]
    out_shape = (shape[0], codes_shape[0], *sizes)
    if min(n_in, codes_shape[0]) == 0 or not convolving.is_fast(n_in, math.prod(spans) * shape[1]):
        return out_shape, None
    if len(sizes) == 1:  # a picture of one row
        kernel, stride, before, dilation = (1, *kernel), (1, *stride), (0, *before), (1, *dilation)
        pictures = (*shape[:2], 1, shape[2]), (*out_shape[:2], 1, sizes[0])
    else:
        pictures = tuple(shape), out_shape
    is_last = is_input_last, is_input_last or is_codes_last, is_codes_last
    return out_shape, convolving.request(*pictures, kernel, stride, before, dilation, groups, is_last)


def _native(
    samples: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    shape: tuple[int, ...],
    request: bytes,
    is_input_last: bool,
    is_codes_last: bool,
) -> torch.Tensor:
    is_last = is_input_last or is_codes_last
    out = torch.empty(shape, memory_format=torch.channels_last) if is_last else torch.empty(shape)
    convolving.convolve(
        request,
        _array(samples, torch.float32, is_input_last),
        _array(codes, torch.int8, is_codes_last),
        _array(scales, torch.float32),
        None if bias is None else _array(bias, torch.float32),
        _array(out, torch.float32, is_last),
        torch.get_num_threads(),
    )
    return out if samples.dtype == torch.float32 else out.to(samples.dtype)


def _array(tensor: torch.Tensor, dtype: torch.dtype, is_last: bool = False) -> Any:
    """A tensor as a contiguous array in its order of memory."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    if is_last:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.contiguous().numpy()


def _by_floats(
    samples: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The same but for rounding of sums, by torch's convolution of what codes stand for."""
    kernel, weight = codes.shape[2:], floats_of(codes, scales, samples.dtype)
    if has_channels_last(codes):
        weight = weight.to(memory_format=torch.channels_last)
    sides = [tuple(padding[2 * i : 2 * i + 2]) for i in range(len(kernel))]
    rounded = rounded_samples(samples)
    if any(before != after for before, after in sides):
        rounded = F.pad(rounded, [zeros for side in reversed(sides) for zeros in side])
        sides = [(0, 0)] * len(sides)
    run: Any = F.conv1d if len(kernel) == 1 else F.conv2d
    added = None if bias is None else bias.to(samples.dtype)
    return run(rounded, weight, added, stride, [before for before, _ in sides], dilation, groups)  # type: ignore[no-any-return]


def floats_of(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The floats [out, ...] that codes of that shape stand for. scales: [out]."""
    rows = codes.reshape(len(codes), -1)
    return execution.values(rows, scales, 8, rows.shape[1], None, dtype).reshape(codes.shape)


def rounded_samples(samples: torch.Tensor) -> torch.Tensor:
    """What the codes of samples [n, ...] stand for, in their dtype and order; a sample of no finite largest is NaN."""
    if samples.numel() == 0:
        return samples
    floats = samples.float()
    largest = floats.abs().amax(tuple(range(1, samples.ndim)), keepdim=True)
    is_zero = largest < _LEAST
    factors = torch.where(is_zero, 0.0, execution.LARGEST / largest)
    scales = torch.where(is_zero, 1.0, largest / execution.LARGEST)
    return floats.mul(factors).round_().mul_(scales).to(samples.dtype)
