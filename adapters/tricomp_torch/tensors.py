"""One tensor to one numpy array and back, bit for bit. Imports torch, numpy and the core's dtypes and errors.

The hard thing: torch and numpy disagree about which dtypes exist, so the bits cross over as signed integers of the
same width and are named again on the other side. A CPU tensor crosses without a copy. One on another device stays
there, as a DeviceArray that shares its memory: the core compresses it where it lives, or copies it, if nothing can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tricomp import dtypes
from tricomp.errors import InvalidArgument, UnsupportedDtype, UnsupportedNode
from tricomp.layout import DeviceArray

Array = np.ndarray[Any, Any]
Leaf = Any  # an Array or a DeviceArray

# Names are the same on both sides, except that numpy has no 4-byte complex and torch no float8_e3m4 and its like.
_TORCH_BY_NAME = {name: getattr(torch, name) for name in dtypes.NAMES if hasattr(torch, name)}
_NAME_BY_TORCH = {dtype: name for name, dtype in _TORCH_BY_NAME.items()}
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The types of tensors that are leaves; all others are subclasses, made of such."""
# What numpy has itself: a tensor of it becomes an array of the core's dtype as it is.
_NUMPYS_OWN = frozenset(dtype for name, dtype in _TORCH_BY_NAME.items() if dtypes.by_name(name).numpy.isbuiltin == 1)
_CARRIER_BY_ITEM_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_leaf(tensor: torch.Tensor, path: str) -> Leaf:
    """The core's leaf for a tensor, sharing its memory where that is row-major: an array, or off the CPU a DeviceArray.

    Raises what to_array raises.
    """
    if is_on_host(tensor):
        if _is_numpys(tensor):
            return tensor.numpy()
        return to_array(tensor, path)
    name = _name_of(tensor, path)
    plain = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        plain = torch.view_as_real(plain)
    carrier = _CARRIER_BY_ITEM_BYTES[plain.element_size()]
    words = plain.contiguous().reshape(-1).view(carrier)
    return DeviceArray(dtypes.by_name(name), tuple(tensor.shape), words)


def _is_numpys(tensor: torch.Tensor) -> bool:
    """Whether a tensor on the host can be numpy's as it is. Told in few calls: there are many, and training waits."""
    return (
        type(tensor) in PLAIN
        and tensor.dtype in _NUMPYS_OWN
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_nested or tensor.is_neg() or tensor.is_conj())
    )


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether numpy can share a tensor's memory."""
    return tensor.is_cpu


def to_array(tensor: torch.Tensor, path: str) -> Array:
    """The numpy array of a tensor's bits, sharing its memory when it is on the CPU.

    Any strides, any number of dimensions; requires_grad is dropped. Raises UnsupportedNode for tensors that are not
    plain strided memory and UnsupportedDtype for dtypes the format does not know, both naming the path.
    """
    name = _name_of(tensor, path)
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu")
    if tensor.is_complex():
        return plain.numpy()
    return plain.view(_CARRIER_BY_ITEM_BYTES[plain.element_size()]).numpy().view(dtypes.by_name(name).numpy)


def _name_of(tensor: torch.Tensor, path: str) -> str:
    """The core's name of a plain tensor's dtype."""
    _require_plain(tensor, path)
    return dtype_name(tensor.dtype, path)


def dtype_name(dtype: torch.dtype, path: str) -> str:
    """The core's name of a dtype. Raises UnsupportedDtype, naming the path."""
    name = _NAME_BY_TORCH.get(dtype)
    if name is None:
        raise UnsupportedDtype(
            f"leaf {path!r}: {dtype} is not one of {', '.join(_TORCH_BY_NAME)}. Convert it, or leave it out."
        )
    return name


def to_numpy(array: DeviceArray) -> Array:
    """The numpy array of a DeviceArray, copied to the host."""
    words: Array = array.words.cpu().numpy()
    return words.view(array.dtype.numpy).reshape(array.shape)


def from_device_array(array: DeviceArray, path: str, strides: Sequence[int] | None = None) -> torch.Tensor:
    """The tensor of a DeviceArray, on its device, sharing its memory unless strides ask for another order.

    Raises UnsupportedDtype, naming the path, for dtypes torch lacks.
    """
    dtype = dtype_named(array.dtype.name, path)
    if dtype.is_complex:
        parts = array.words.view(torch.float32 if dtype == torch.complex64 else torch.float64)
        tensor = torch.view_as_complex(parts.reshape(*array.shape, 2))
    else:
        tensor = array.words.view(dtype).reshape(array.shape)
    if strides is None:
        return tensor
    return torch.empty_strided(array.shape, tuple(strides), dtype=dtype, device=tensor.device).copy_(tensor)


def to_tensor(
    array: Array, path: str, device: torch.device | None = None, strides: Sequence[int] | None = None
) -> torch.Tensor:
    """The tensor of an array's bits, on device (None: the CPU), always in memory that torch allocated.

    numpy aligns memory less strictly than torch does, and BLAS may round differently on it: a run resumed on numpy's
    memory could drift from an uninterrupted one. strides: the tensor's, in elements, which must fill its memory.
    Raises UnsupportedDtype, naming the path, for dtypes torch lacks.
    """
    dtype = dtype_of(array, path)
    held = dtype if dtype.is_complex else _CARRIER_BY_ITEM_BYTES[array.dtype.itemsize]
    if strides is None:
        tensor = torch.empty(array.shape, dtype=held)
    else:
        tensor = torch.empty_strided(array.shape, tuple(strides), dtype=held)
    tensor.numpy()[...] = array if dtype.is_complex else array.view(f"i{array.dtype.itemsize}")
    tensor = tensor.view(dtype)
    return tensor if device is None else tensor.to(device)


def view_as_tensor(array: Array, path: str) -> torch.Tensor:
    """The tensor that shares the memory of a contiguous, writable array. Raises UnsupportedDtype, naming the path."""
    dtype = dtype_of(array, path)
    if dtype.is_complex:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"i{array.dtype.itemsize}")).view(dtype)


def dtype_of(array: Array, path: str) -> torch.dtype:
    """torch's dtype for an array's bits. Raises UnsupportedDtype, naming the path, for dtypes torch lacks."""
    return dtype_named(dtypes.of(array, path).name, path)


def dtype_named(name: str, path: str) -> torch.dtype:
    """torch's dtype of the core's name. Raises UnsupportedDtype, naming the path, for dtypes torch lacks."""
    if name not in _TORCH_BY_NAME:
        raise UnsupportedDtype(f"leaf {path!r}: torch has no dtype {name!r}. Load this file with tricomp.load.")
    dtype: torch.dtype = _TORCH_BY_NAME[name]
    return dtype


def unusual_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides, in elements, of a tensor that fills its memory in another order than the last axis fastest, such as
    channels_last; None for all others. Convolutions may round differently on other strides, so a resumed run needs
    them.
    """
    if tensor.is_contiguous() and 1 not in tensor.shape:  # where 1 is a size, its stride can still be any
        return None
    shape, strides = tuple(tensor.shape), tensor.stride()
    usual, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        usual[axis] = step
        step *= max(1, shape[axis])
    return None if strides == tuple(usual) or not fills_memory(shape, strides) else strides


def fills_memory(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of that shape and those strides is not empty and uses each element of its memory once."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected or size == 0:
            return False
        expected *= size
    return True


def device_of(map_location: str | torch.device | None) -> torch.device | None:
    """The device meant by map_location. Raises InvalidArgument for torch.load's dict and callable forms."""
    if map_location is None or isinstance(map_location, torch.device):
        return map_location
    if isinstance(map_location, str):
        return torch.device(map_location)
    raise InvalidArgument(
        f"map_location: expected a device or its name, got {type(map_location).__name__}. A file does not keep the "
        "devices its tensors were on, so there is nothing to map from; give one device, or move tensors after loading."
    )


def _require_plain(tensor: torch.Tensor, path: str) -> None:
    if type(tensor) not in PLAIN:
        raise UnsupportedNode(
            f"leaf {path!r}: expected a torch.Tensor, got its subclass {type(tensor).__name__}. "
            "Store the plain tensors it is made of."
        )
    if tensor.is_quantized:
        raise UnsupportedNode(f"leaf {path!r}: it is quantized. Store its int_repr(), scale and zero point.")
    if tensor.is_nested:
        raise UnsupportedNode(f"leaf {path!r}: it is a nested tensor. Store the list of its parts, unbind().")
    if tensor.layout is not torch.strided:
        raise UnsupportedNode(
            f"leaf {path!r}: its layout is {tensor.layout}. Store to_dense(), or its indices() and values()."
        )
    if tensor.is_meta:
        raise UnsupportedNode(f"leaf {path!r}: it is on the meta device and has no data. Materialise it first.")
