"""A weight as codes and scales, in a module that stands where the parameter stood. Imports torch and the core.

State dicts name it as the parameter was named: `fc.weight` becomes `fc.weight.codes` and `fc.weight.scales`. The hard
thing: a model that is moved or cast must move codes and never cast scales, and no float copy may stay behind.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from tricomp.errors import BackendError, InvalidArgument
from tricomp.integers import Quantized, pack_int4, quantize, quantize_on_device, unpack_int4
from tricomp.layout import DeviceArray
from tricomp_torch.integers import operations
from tricomp_torch.tensors import from_device_array, to_array, to_leaf, to_tensor

_log = logging.getLogger("tricomp")


def packed(codes: torch.Tensor) -> torch.Tensor:
    """tricomp.integers.pack_int4 where the codes are: int8 [out, n] as uint8 [out, ceil(n / 2)], low bits first."""
    low, high = codes[:, 0::2].view(torch.uint8) & 15, codes[:, 1::2].view(torch.uint8) << 4
    low[:, : high.shape[1]] |= high
    return low


class IntegerWeight(nn.Module):
    """A weight [out, ...] in integers. Calling it gives the floats, made anew each time.

    Buffers: codes, int8 of the weight's shape, or, at 4 bits, uint8 [out, ceil(n / 2)], two codes a byte, low bits
    first, of rows of n; scales, float32 or bfloat16, [out] or [out, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bits: int,
        group: int | None,
        rows_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        is_turned: bool = False,
    ) -> None:
        """Takes the tensors as they are. rows_shape: [out, ...]. is_turned: the model holds the transpose."""
        super().__init__()
        self.bits, self.group, self.is_turned = bits, group, is_turned
        self.rows_shape, self.dtype = tuple(rows_shape), dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.train(False)

    @classmethod
    def from_quantized(
        cls, quantized: Quantized, device: torch.device | None = None, *, is_turned: bool = False
    ) -> Self:
        """Of the core's codes and scales, one code a byte; copies them."""
        codes = np.ascontiguousarray(quantized.codes)
        if quantized.bits == 4:
            codes = pack_int4(codes.reshape(len(codes), -1))
        tensors = to_tensor(codes, "codes", device), to_tensor(quantized.scales, "scales", device)
        dtype: torch.dtype = getattr(torch, quantized.dtype)
        return cls(*tensors, quantized.bits, quantized.group, quantized.shape, dtype, is_turned=is_turned)

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bits: int = 8,
        group: int | None = None,
        *,
        scale_dtype: str = "float32",
        is_turned: bool = False,
        name: str = "weight",
    ) -> Self:
        """The integers of a weight [out, ...], or [in, out] if turned, found where it is. Raises as quantize does."""
        rows = (weight.detach().t() if is_turned else weight.detach()).contiguous()
        leaf = to_leaf(rows, name)
        if isinstance(leaf, DeviceArray):
            try:
                made = quantize_on_device(leaf, bits, group=group, scale_dtype=scale_dtype, leaf=name)
            except BackendError as error:
                _log.warning("%s is quantised on the host: %s", name, error)
            else:
                codes, scales = (from_device_array(array, name) for array in made)
                codes = packed(codes.reshape(len(codes), -1)) if bits == 4 else codes
                return cls(codes, scales, bits, group, rows.shape, weight.dtype, is_turned=is_turned)
        quantized = quantize(to_array(rows, name), bits, group=group, scale_dtype=scale_dtype, leaf=name)
        return cls.from_quantized(quantized, weight.device, is_turned=is_turned)

    @property
    def shape(self) -> torch.Size:
        """Of the weight, as the model holds it."""
        return torch.Size(reversed(self.rows_shape) if self.is_turned else self.rows_shape)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def n_out(self) -> int:
        """Rows."""
        return self.rows_shape[0]

    @property
    def n_in(self) -> int:
        """Weights of a row."""
        return math.prod(self.rows_shape[1:])

    @property
    def row_codes(self) -> torch.Tensor:
        """The codes as [out, n], or [out, ceil(n / 2)]."""
        return self.codes if self.codes.ndim == 2 else self.codes.reshape(self.n_out, self.n_in)

    def forward(self) -> torch.Tensor:
        """The floats that the codes stand for, in the weight's dtype and shape."""
        values = operations.values(self.row_codes, self.scales, self.bits, self.n_in, self.group, self.dtype)
        return values.t() if self.is_turned else values.reshape(self.rows_shape)

    def quantized(self) -> Quantized:
        """Codes and scales as the core holds them, one code a byte."""
        codes = to_array(self.codes, "codes")
        if self.bits == 4:
            codes = unpack_int4(codes, self.n_in)
        scales = to_array(self.scales, "scales")
        return Quantized(
            codes.reshape(self.rows_shape), scales, self.bits, self.group, str(self.dtype).removeprefix("torch.")
        )

    def extra_repr(self) -> str:
        grouped = f", group={self.group}" if self.group else ""
        return f"{list(self.shape)}, int{self.bits}{grouped}, {str(self.dtype).removeprefix('torch.')}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Codes and scales move with the model; a cast changes the dtype of values, never that of scales."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        kept = self.scales.dtype

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        made: Any = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        assert self.scales.dtype == kept
        return made  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Codes are taken over only as codes: a float weight of the same shape would be truncated without a word."""
        for name, held in (("codes", self.codes), ("scales", self.scales)):
            given = state_dict.get(prefix + name)
            if isinstance(given, torch.Tensor) and given.dtype != held.dtype:
                raise InvalidArgument(
                    f"{prefix + name!r}: expected {held.dtype}, got {given.dtype}. Load the state of a model that was "
                    "converted by the same plan."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
