"""Transposed convolutions on integer weights and inputs as codes. Imports torch and the convolutions.

With a stride of s, every s-th place of an output is a sum over every s-th place of the kernel: a convolution of its
own, with a smaller kernel turned round, and no stride. So there are as many of these as places in a stride, and zeros
are not multiplied (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016). The hard thing:
which places of the kernel these are, where the kernel is dilated too.

Measured on one core of AMD Zen 4 with AVX512-VNNI, torch 2.13, milliseconds; float32 is torch's own:

    channels     picture    kernel, stride    samples   float32   codes
    128 ->  64   28 x  28       2 x 2, 2            1      0.77    0.55
    128 ->  64   28 x  28       2 x 2, 2            8     15.2     6.2
     64 ->  32   16 x  16       4 x 4, 2            8      3.3     1.9
    256 -> 128        800          16, 8            1     10.0     4.0
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tricomp.codec import convolving as backend
from tricomp.errors import InvalidArgument
from tricomp_torch.integers import convolving
from tricomp_torch.integers.forms import input_first

_LEAST_PLACES = 400  # of inputs, below which to turn the kernel round takes longer than to multiply floats


class Phase(NamedTuple):
    """Of one axis, the places of the output from first on, a stride apart. places: those of the kernel that they sum
    over, in order; none: they are bias alone. dilation, before, after: of the convolution that gives them."""

    first: int
    places: range
    dilation: int
    before: int
    after: int


def convolve(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """F.conv_transpose1d or 2d of input [batch, in, ...] or [in, ...], its samples rounded to int8. In its dtype.

    codes: int8 [out, in / groups, ...]; scales, bias: [out]. Raises InvalidArgument for an input of another form.
    """
    if not input.is_floating_point():
        raise InvalidArgument(f"expected an input of floats, got {input.dtype}")
    samples = input if input.ndim == codes.ndim else input.unsqueeze(0)
    sizes = out_sizes(samples.shape, codes.shape, stride, padding, output_padding, dilation, groups)
    axes = [
        phases(samples.shape[2 + i], codes.shape[2 + i], stride[i], padding[i], dilation[i], size)
        for i, size in enumerate(sizes)
    ]
    is_on_host = samples.device.type == "cpu" and codes.device.type == "cpu" and backend.is_fast(1, 1)
    n_places = samples.numel() // max(samples.shape[1], 1)
    is_cropped = any(phase.before < 0 or phase.after < 0 for axis in axes for phase in axis)
    if not is_on_host or n_places < _LEAST_PLACES or is_cropped:
        out = _by_floats(samples, codes, scales, bias, stride, padding, output_padding, dilation, groups)
        return out if samples is input else out.squeeze(0)
    out = _empty(samples, codes, sizes)
    ones = (1,) * len(sizes)
    for some in itertools.product(*axes):
        here = out[:, :, *(slice(phase.first, None, step) for phase, step in zip(some, stride, strict=True))]
        if here.numel() == 0:
            continue
        if not all(len(phase.places) for phase in some):
            here.copy_(torch.zeros(()) if bias is None else bias.reshape(-1, *ones))
            continue
        taken = (slice(phase.places.start, phase.places.stop, phase.places.step) for phase in some)
        turned = codes[:, :, *taken].flip([*range(2, codes.ndim)])
        sides = [side for phase in some for side in (phase.before, phase.after)]
        dilations = [phase.dilation for phase in some]
        here.copy_(convolving.convolve(samples, turned, scales, bias, ones, sides, dilations, groups))
    return out if samples is input else out.squeeze(0)


def fake(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[Any],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A tensor of the shape and order in memory that convolve gives, for traces."""
    samples = input if input.ndim == codes.ndim else input.unsqueeze(0)
    sizes = out_sizes(samples.shape, codes.shape, stride, padding, output_padding, dilation, groups)
    out = _empty(samples, codes, sizes)
    return out if samples is input else out.squeeze(0)


def out_sizes(
    shape: Sequence[int],
    codes_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """Of the output's axes of space. Raises InvalidArgument if there is no output."""
    convolving.require_channels(shape, codes_shape, groups)
    kernel = codes_shape[2:]
    sizes = [
        (size - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + output_padding[i] + 1
        for i, size in enumerate(shape[2:])
    ]
    if min(sizes) < 0:
        raise InvalidArgument(f"the input {list(shape)} is too small: its output would be {sizes}")
    return sizes


@lru_cache(maxsize=4096)
def phases(size: int, kernel: int, stride: int, padding: int, dilation: int, out_size: int) -> tuple[Phase, ...]:
    """Those of one axis. out_size: of the output, whose place o sums over k where o + padding - k * dilation is a
    multiple of stride, of which it takes the place of the input."""
    common = math.gcd(stride, dilation)
    made = []
    for residue in range(stride):
        first = (residue - padding) % stride
        found = [k for k in range(min(stride // common, kernel)) if k * dilation % stride == residue]
        if not found:
            made.append(Phase(first, range(0), 1, 0, 0))
            continue
        places = range(found[0], kernel, stride // common)
        reach = (len(places) - 1) * (dilation // common)
        # Of the first output, the input that the first place of the kernel takes; places further on take earlier ones.
        at = (first + padding - found[0] * dilation) // stride
        n = len(range(first, out_size, stride))
        made.append(Phase(first, places, dilation // common, reach - at, n + at - size))
    return tuple(made)


def _empty(samples: torch.Tensor, codes: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    out = samples.new_empty(samples.shape[0], codes.shape[0], *sizes)
    return out.to(memory_format=torch.channels_last) if convolving.has_channels_last(samples) else out


def _by_floats(
    samples: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The same but for rounding of sums, by torch's own of what codes stand for."""
    weight = input_first(convolving.floats_of(codes, scales, samples.dtype), groups)
    run: Any = F.conv_transpose1d if codes.ndim == 3 else F.conv_transpose2d
    added = None if bias is None else bias.to(samples.dtype)
    rounded = convolving.rounded_samples(samples)
    return run(rounded, weight, added, stride, padding, output_padding, groups, dilation)  # type: ignore[no-any-return]
