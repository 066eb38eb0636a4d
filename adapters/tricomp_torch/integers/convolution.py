"""Convolutions that hold integers. Imports torch, the preset form's transposed convolution and the weights' module.

Where inputs become codes too, products are those of `convolving` and `transposing`. Where they stay float, weights
become floats for each call: a convolution uses each weight once for every place of its output, so that this costs a few
parts in a hundred (measured: 3 % at 256 channels of 14 x 14, batch 1; less above).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tricomp_torch.integers import operations
from tricomp_torch.integers.forms import OutputFirstConvTranspose, input_first
from tricomp_torch.integers.weights import IntegerWeight

# It reads output_padding of its first argument, and nothing else.
_output_padding: Any = nn.ConvTranspose2d._output_padding
_LEAST_PRODUCTS = 6  # for each float read or written, from which codes are faster; measured
_LEAST_TRANSPOSED = 24  # the same of transposed ones, which are some convolutions put together


class _IntegerConvolution(nn.Module):
    """What all convolutions say of themselves, by torch.nn's names."""

    _SHARED: tuple[str, ...] = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    weight: IntegerWeight
    bias: nn.Parameter | None
    is_dynamic = False

    def __init__(self, layer: nn.Module, weight: IntegerWeight) -> None:
        """Of a float layer, whose bias is taken, and its weight in integers."""
        super().__init__()
        for name in self._SHARED:
            setattr(self, name, getattr(layer, name))
        self.weight = weight
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        self.train(False)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"inputs={'int8 samples' if self.is_dynamic else 'float'}"
        )


class _IntegerConv(_IntegerConvolution):
    _SHARED = (*_IntegerConvolution._SHARED, "padding_mode", "_reversed_padding_repeated_twice")
    _run: Callable[..., torch.Tensor]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(self, layer: nn.Module, weight: IntegerWeight, *, is_dynamic: bool = False) -> None:
        """is_dynamic: each sample of the input becomes int8 too, where the weight has 8 bits and one scale a row."""
        super().__init__(layer, weight)
        self.is_dynamic = is_dynamic and weight.bits > 4 and weight.group is None
        # Before and after each axis; torch keeps them the other way round, the last axis first.
        before, after = self._reversed_padding_repeated_twice[::2], self._reversed_padding_repeated_twice[1::2]
        pairs = zip(reversed(before), reversed(after), strict=True)
        self._zeros = [n if self.padding_mode == "zeros" else 0 for pair in pairs for n in pair]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the float layer computes. input: float [batch, in, ...] or [in, ...]."""
        padding, weight = self.padding, self.weight
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        if self.is_dynamic:
            return operations.convolve(
                *(input, weight.codes, weight.scales, self.bias),
                *(self.stride, self._zeros, self.dilation, self.groups),
            )
        operations.refuse_gradients(input)
        floats = weight().to(input.dtype)
        return type(self)._run(input, floats, self.bias, self.stride, padding, self.dilation, self.groups)


class IntegerConv1d(_IntegerConv):
    """nn.Conv1d on an integer weight [out, in / groups, n]."""

    _run = F.conv1d


class IntegerConv2d(_IntegerConv):
    """nn.Conv2d on an integer weight [out, in / groups, height, width]."""

    _run = F.conv2d


class IntegerConvTranspose(_IntegerConvolution):
    """A transposed convolution of one or two axes on an integer weight [out, in / groups, ...]."""

    _SHARED = (*_IntegerConvolution._SHARED, "output_padding")

    def __init__(self, layer: nn.Module, weight: IntegerWeight, *, is_dynamic: bool = False) -> None:
        """is_dynamic: as for other convolutions."""
        super().__init__(layer, weight)
        self.is_dynamic = is_dynamic and weight.bits > 4 and weight.group is None

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """What the float layer computes. input: float [batch, in, ...] or [in, ...]."""
        operations.refuse_gradients(input)
        n_space = len(self.kernel_size)
        size = None if output_size is None else list(output_size)
        padding = _output_padding(
            self, input, size, self.stride, self.padding, self.kernel_size, n_space, self.dilation
        )
        if self.is_dynamic:
            return operations.convolve_transposed(
                input,
                *(self.weight.codes, self.weight.scales, self.bias),
                self.stride,
                *(self.padding, padding, self.dilation),
                self.groups,
            )
        weight = input_first(self.weight().to(input.dtype), self.groups)
        run: Callable[..., torch.Tensor] = F.conv_transpose1d if n_space == 1 else F.conv_transpose2d
        return run(input, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


def converted(layer: nn.Module, weight: IntegerWeight, *, is_dynamic: bool = False) -> nn.Module:
    """The module that runs a layer of the prepared model on an integer weight."""
    if isinstance(layer, OutputFirstConvTranspose):
        return IntegerConvTranspose(layer, weight, is_dynamic=is_dynamic)
    made = IntegerConv1d if isinstance(layer, nn.Conv1d) else IntegerConv2d
    return made(layer, weight, is_dynamic=is_dynamic)


def gains_by_codes(layer: nn.Module) -> bool:
    """Whether a float layer is a convolution that runs faster on inputs as codes.

    A layer with little to do for each float, such as one of a channel a group, makes codes for longer than it gains.
    """
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, OutputFirstConvTranspose)):
        return False
    n_in, n_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    n_products, least = n_in * n_out * math.prod(layer.kernel_size), _LEAST_PRODUCTS
    if isinstance(layer, OutputFirstConvTranspose):
        n_products, least = n_products // math.prod(layer.stride), _LEAST_TRANSPOSED
    return n_products >= least * (n_in + n_out)
