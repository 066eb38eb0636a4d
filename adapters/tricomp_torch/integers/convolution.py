"""Convolutions that hold integers. Imports torch, the preset form's transposed convolution and the weights' module.

Inputs stay float, and the weights become floats for each call: a convolution uses each weight once for every place of
its output, so that this costs a few parts in a hundred (measured: 3 % at 256 channels of 14 x 14, batch 1; less above).
"""

from __future__ import annotations

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
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class _IntegerConv(_IntegerConvolution):
    _SHARED = (*_IntegerConvolution._SHARED, "padding_mode", "_reversed_padding_repeated_twice")
    _run: Callable[..., torch.Tensor]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the float layer computes. input: float [batch, in, ...] or [in, ...]."""
        operations.refuse_gradients(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        weight = self.weight().to(input.dtype)
        return type(self)._run(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class IntegerConv1d(_IntegerConv):
    """nn.Conv1d on an integer weight [out, in / groups, n]."""

    _run = F.conv1d


class IntegerConv2d(_IntegerConv):
    """nn.Conv2d on an integer weight [out, in / groups, height, width]."""

    _run = F.conv2d


class IntegerConvTranspose(_IntegerConvolution):
    """A transposed convolution of one or two axes on an integer weight [out, in / groups, ...]."""

    _SHARED = (*_IntegerConvolution._SHARED, "output_padding")

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """What the float layer computes. input: float [batch, in, ...] or [in, ...]."""
        operations.refuse_gradients(input)
        n_space = len(self.kernel_size)
        size = None if output_size is None else list(output_size)
        padding = _output_padding(
            self, input, size, self.stride, self.padding, self.kernel_size, n_space, self.dilation
        )
        weight = input_first(self.weight().to(input.dtype), self.groups)
        run: Callable[..., torch.Tensor] = F.conv_transpose1d if n_space == 1 else F.conv_transpose2d
        return run(input, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


def converted(layer: nn.Module, weight: IntegerWeight) -> nn.Module:
    """The module that runs a layer of the prepared model on an integer weight."""
    if isinstance(layer, OutputFirstConvTranspose):
        return IntegerConvTranspose(layer, weight)
    return (IntegerConv1d if isinstance(layer, nn.Conv1d) else IntegerConv2d)(layer, weight)
