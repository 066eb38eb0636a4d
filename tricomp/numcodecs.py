"""The array codec for numcodecs, and so for zarr's format 2 and all who take numcodecs' codecs. Imports numcodecs.

Not imported by `import tricomp`: numcodecs finds it by its entry point. The hard thing: to numcodecs a chunk is a
buffer, and what comes back must be the same bytes in the same order, whatever dtype, byte order and memory order the
array had; while the codec is good because it knows dtype and shape. So arrays are encoded as they are, in Fortran order
as their transpose, and decoded to one dimension in the order of memory.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ensure_ndarray_like
from numcodecs.registry import register_codec

from tricomp.blob import decode, decode_into, encode
from tricomp.codec import Engine
from tricomp.dtypes import NAMES, by_name
from tricomp.errors import InvalidArgument, UnsupportedDtype
from tricomp.plan import Spec

Array = np.ndarray[Any, Any]
# Frozen since format 1: before a blob, msgpack's true: the array was big-endian. A blob never begins so.
_SWAPPED = b"\xc3"
_ALIGNED = 8  # bytes: of the widest word


class Tricomp(Codec):  # type: ignore[misc]  # numcodecs has no types
    """Lossless compression of arrays of numbers, as `tricomp.encode` does it.

    tier: "dense" or "fast". dtype: what the bytes of a buffer are, when it comes as bytes or as another dtype
    ("float32", "bfloat16", ...). Dtypes that tricomp does not know are coded as bytes; objects are refused.
    threads: to work with, see tricomp.open; no part of the configuration that is stored with an array.
    """

    codec_id: ClassVar[str] = "tricomp"

    def __init__(self, tier: Literal["dense", "fast"] = "dense", dtype: Any = None, threads: int | None = None) -> None:
        """Raises InvalidArgument, UnsupportedDtype."""
        Spec(tier=tier)
        self._threads = Engine(threads).threads
        self.tier = tier
        self.dtype: str | None = None if dtype is None else _name_of(dtype)

    def encode(self, buf: Any) -> bytes:
        """The bytes of a buffer or array, compressed. Raises InvalidArgument, UnsupportedDtype."""
        array = np.asarray(ensure_ndarray_like(buf))
        if self.dtype is not None:
            array = _viewed(array, by_name(self.dtype).numpy)
        if array.flags.f_contiguous and not array.flags.c_contiguous:
            array = array.T
        array = encodable(array)
        mark = _SWAPPED if array.dtype.str.startswith(">") else b""
        return mark + encode(array, spec=Spec(tier=self.tier), threads=self._threads)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The array that encode was given, in one dimension and the order of its memory; or out, filled with it.

        Raises CorruptFile, CorruptFrame, LimitExceeded; InvalidArgument when out has another size. Then out may hold
        anything.
        """
        data = memoryview(ensure_contiguous_ndarray(buf).view(np.uint8))
        is_swapped = bytes(data[:1]) == _SWAPPED
        target = None if out is None else np.asarray(ensure_ndarray_like(out))
        if target is not None and not is_swapped and (octets := _octets(target)) is not None:
            decode_into(data, octets, threads=self._threads)
            return out
        found = decode(data[1:] if is_swapped else data, threads=self._threads).reshape(-1)
        if is_swapped:
            found = found.byteswap().view(found.dtype.newbyteorder(">"))
        if target is None:
            return found
        if target.nbytes != found.nbytes:
            raise InvalidArgument(f"out: has {target.nbytes} bytes, and {found.nbytes} were encoded.")
        order: Literal["F", "C"] = "F" if target.flags.f_contiguous and not target.flags.c_contiguous else "C"
        target[...] = found.view(np.uint8).view(target.dtype).reshape(target.shape, order=order)
        return out


def _octets(target: Array) -> Array | None:
    """The memory of an array as bytes, where something can be decoded to it; None: where it cannot."""
    is_one = target.flags.c_contiguous or target.flags.f_contiguous
    if (
        not is_one
        or not target.flags.writeable
        or target.dtype.hasobject
        or target.__array_interface__["data"][0] % _ALIGNED
    ):
        return None
    return (target if target.flags.c_contiguous else target.T).reshape(-1).view(np.uint8)


def encodable(array: Array) -> Array:
    """The array itself, or, where tricomp does not know its dtype, its bits as integers. Raises UnsupportedDtype."""
    if array.dtype.hasobject:
        raise UnsupportedDtype(
            f"dtype {array.dtype}: holds Python objects. Encode them to bytes by another codec first."
        )
    if array.dtype.name in NAMES:
        return array
    if array.dtype.kind in "mM":  # times are integers
        return array.view(np.dtype(np.int64).newbyteorder(array.dtype.str[0]))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _viewed(array: Array, dtype: np.dtype[Any]) -> Array:
    """The bytes of an array, in the order of its memory, as elements of a dtype; in its shape where that can be."""
    if array.dtype.itemsize == dtype.itemsize and array.dtype.str[0] != ">":
        return array.view(dtype)
    flat = array.reshape(-1, order="A").view(np.uint8)
    if len(flat) % dtype.itemsize:
        raise InvalidArgument(
            f"a buffer of {len(flat)} bytes holds no whole number of elements of {dtype.name}, {dtype.itemsize} bytes "
            "each. Give the codec the dtype of the data, or none."
        )
    return flat.view(dtype)


def _name_of(dtype: Any) -> str:
    return by_name(dtype if isinstance(dtype, str) and dtype in NAMES else np.dtype(dtype).name, "dtype").name


register_codec(Tricomp)
