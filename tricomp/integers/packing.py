"""Codes of 4 bits, two a byte. Imports numpy and errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.errors import InvalidArgument

Array = np.ndarray[Any, Any]


def pack_int4(codes: Array) -> Array:
    """Two codes a byte, the first in the low bits. codes: int8[..., n], -8 to 7. Returns uint8[..., ceil(n / 2)].

    Bits that no code needs are 0. Raises InvalidArgument for what is no array of such codes.
    """
    codes = np.asarray(codes)
    if codes.dtype != np.int8 or codes.ndim == 0:
        raise InvalidArgument(f"pack_int4: expected int8 codes [..., n], got {codes.dtype.name}{list(codes.shape)}.")
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise InvalidArgument(f"pack_int4: codes from {codes.min()} to {codes.max()} do not fit 4 bits, -8 to 7.")
    low, high = codes[..., 0::2].view(np.uint8) & 15, codes[..., 1::2].view(np.uint8) << 4
    low[..., : high.shape[-1]] |= high
    return low


def unpack_int4(packed: Array, n: int) -> Array:
    """The codes that pack_int4 packed. packed: uint8[..., ceil(n / 2)]. Returns int8[..., n].

    Raises InvalidArgument if n codes do not fill packed.
    """
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim == 0 or packed.shape[-1] != -(-n // 2) or n < 0:
        raise InvalidArgument(
            f"unpack_int4: {n} codes are packed as uint8[..., {-(-n // 2)}], got {packed.dtype.name}"
            f"{list(packed.shape)}."
        )
    codes = np.empty((*packed.shape[:-1], n), np.int8)
    nibbles = packed.view(np.int8)
    codes[..., 0::2] = nibbles << 4 >> 4
    codes[..., 1::2] = (nibbles >> 4)[..., : n // 2]
    return codes
