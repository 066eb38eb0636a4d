"""Codes and scales to torchao's tensors and back, bit for bit. Imported by name: torchao is optional.

The hard thing: torchao knows zero points, blocks of any shape and codes that are laid out for one kernel; what is no
plain row or group of symmetric codes is refused, for it would be another number.
"""

from __future__ import annotations

from typing import Any

import torch

from tricomp.errors import InvalidArgument
from tricomp.integers import Quantized
from tricomp_torch.integers.weights import IntegerWeight
from tricomp_torch.tensors import to_array, to_tensor

try:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
except ImportError as error:
    raise ImportError(
        f"tricomp_torch.integers.exchange needs torchao 0.15 or later ({error}): pip install torchao"
    ) from error

_GROUP_STEP = 16
_INT4: Any = getattr(torch, "int4", None)  # torch has it since 2.6


def to_torchao(
    weight: Quantized | IntegerWeight, *, is_dynamic: bool = False, device: torch.device | None = None
) -> Any:
    """The torchao tensor of the same codes [out, in]: an Int8Tensor, or at 4 bits an IntxUnpackedToInt8Tensor.

    is_dynamic: F.linear with it makes int8 of each row of its input, symmetric; at 8 bits only. Raises InvalidArgument
    for weights of other than two axes, and groups that do not divide a row, which torchao does not have.
    """
    is_turned = isinstance(weight, IntegerWeight) and weight.is_turned
    quantized = weight.quantized() if isinstance(weight, IntegerWeight) else weight
    group = quantized.group or (quantized.shape[1] if len(quantized.shape) == 2 else 0)
    if is_turned or len(quantized.shape) != 2 or group == 0 or quantized.shape[1] % group:
        raise InvalidArgument(
            f"to_torchao: expected a weight [out, in] in groups that divide a row, got {list(quantized.shape)} in "
            f"groups of {group}{', turned' if is_turned else ''}. Dequantise it, or plan it with another group."
        )
    if is_dynamic and quantized.bits == 4:
        raise InvalidArgument(
            "to_torchao: torchao has no 4-bit weights with symmetric int8 inputs. Use is_dynamic=False."
        )
    codes = to_tensor(quantized.codes, "codes", device)
    scales = to_tensor(quantized.scales, "scales", device).float().reshape(codes.shape[0], -1)
    dtype: torch.dtype = getattr(torch, quantized.dtype)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    if quantized.bits == 4:
        return IntxUnpackedToInt8Tensor(codes, scales, zeros, _INT4, (1, group), dtype, None)
    inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if is_dynamic else None
    return Int8Tensor(codes, scales, [1, group], dtype, zero_point=zeros, act_quant_kwargs=inputs)


def from_torchao(tensor: Any, name: str = "weight") -> Quantized:
    """The codes and scales of a torchao tensor: an Int8Tensor, or an IntxUnpackedToInt8Tensor of int4 or int8.

    Raises InvalidArgument, naming it, for other classes, for zero points that are not 0, and for blocks that are no
    groups of 16 or a multiple, or whole rows.
    """
    if isinstance(tensor, Int8Tensor):
        bits = 8
    elif isinstance(tensor, IntxUnpackedToInt8Tensor) and tensor.target_dtype in (torch.int8, _INT4):
        bits = 8 if tensor.target_dtype == torch.int8 else 4
    else:
        raise InvalidArgument(
            f"{name!r}: expected torchao's Int8Tensor, or IntxUnpackedToInt8Tensor of int4 or int8, got "
            f"{type(tensor).__name__}. Others hold codes as one kernel wants them: dequantise it and plan it here."
        )
    if tensor.zero_point is not None and bool((tensor.zero_point != 0).any()):
        raise InvalidArgument(f"{name!r}: its codes have zero points other than 0. Quantise it symmetrically.")
    if getattr(tensor, "act_pre_scale", None) is not None:
        raise InvalidArgument(
            f"{name!r}: it scales its inputs, which is not kept here. Dequantise it and plan it here."
        )
    *ones, group = tensor.block_size
    n_in = tensor.qdata.shape[-1]
    if tensor.qdata.ndim != 2 or any(size != 1 for size in ones) or (group != n_in and group % _GROUP_STEP):
        raise InvalidArgument(
            f"{name!r}: its blocks are {list(tensor.block_size)} of {list(tensor.qdata.shape)}: expected rows, or "
            f"groups of a multiple of {_GROUP_STEP} in a row. Dequantise it and plan it here."
        )
    codes = to_array(tensor.qdata.contiguous(), name).copy()
    scales = tensor.scale if tensor.scale.dtype in (torch.float32, torch.bfloat16) else tensor.scale.float()
    found = to_array(scales.contiguous(), name).copy()
    is_whole = group == n_in
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Quantized(codes, found.reshape(-1) if is_whole else found, bits, None if is_whole else int(group), dtype)
