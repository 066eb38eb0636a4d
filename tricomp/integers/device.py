"""The same for arrays in an accelerator's memory: floats to codes and scales where they are. Imports no framework.

An adapter gives its tensor as a DeviceArray and views what it gets as its own dtypes. The hard thing: nothing but the
counts of what is not finite crosses to the host, and those must, before codes are believed.
"""

from __future__ import annotations

from tricomp import dtypes
from tricomp.codec import Engine, quantizing
from tricomp.errors import InvalidArgument
from tricomp.integers.form import FLOATS
from tricomp.integers.quantized import check_options, require_finite, rows_shape, scales_shape
from tricomp.layout import DeviceArray


def quantize_on_device(
    array: DeviceArray,
    bits: int = 8,
    *,
    group: int | None = None,
    scale_dtype: str = "float32",
    clip: bool = True,
    backend: str | None = None,
    leaf: str = "array",
) -> tuple[DeviceArray, DeviceArray]:
    """Codes (int8, of the array's shape) and scales, both on the device, byte for byte those of quantize.

    array: of a float dtype, [out, ...]. Raises InvalidArgument as quantize does, BackendError where no kernel can run.
    """
    if array.dtype.name not in FLOATS or not array.shape:
        raise InvalidArgument(f"leaf {leaf!r}: expected floats [out, ...], got {array.dtype.name}{list(array.shape)}.")
    check_options(bits, group, array.dtype.name, scale_dtype, f"leaf {leaf!r}")
    shape, kind = rows_shape(array.shape), dtypes.by_name(scale_dtype)
    each = max(shape[1], 1) if group is None else group
    rows = array.words.reshape(shape)
    codes, scales, counts = quantizing.quantize(rows, array.dtype, bits, each, kind, clip, Engine(backend=backend))
    require_finite(counts, shape[0] * shape[1], array.dtype, leaf)
    return (
        DeviceArray(dtypes.by_name("int8"), array.shape, codes.reshape(-1)),
        DeviceArray(kind, scales_shape(array.shape, group), scales.reshape(-1)),
    )


def dequantize_on_device(
    codes: DeviceArray, scales: DeviceArray, group: int | None, dtype: str, *, backend: str | None = None
) -> DeviceArray:
    """The floats that codes stand for, on the device, byte for byte those of dequantize. dtype: of the floats."""
    check_options(8, group, dtype, scales.dtype.name, "dequantize")
    if codes.dtype.name != "int8" or not codes.shape or scales.shape != scales_shape(codes.shape, group):
        raise InvalidArgument(
            f"dequantize: expected int8 codes [out, ...] and scales that fit, got "
            f"{codes.dtype.name}{list(codes.shape)} and {list(scales.shape)}, group {group}."
        )
    shape, kind = rows_shape(codes.shape), dtypes.by_name(dtype)
    each = max(shape[1], 1) if group is None else group
    parts = scales.words.reshape(shape[0], -1 if shape[0] else 1)
    engine = Engine(backend=backend)
    words = quantizing.dequantize(codes.words.reshape(shape), parts, each, scales.dtype, kind, engine)
    return DeviceArray(kind, codes.shape, words.reshape(-1))
