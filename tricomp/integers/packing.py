"""Codes of 4 bits, two a byte; and as words of 32 bits, as the compressed-tensors library has them. numpy, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tricomp.errors import InvalidArgument

Array = np.ndarray[Any, Any]

PER_WORD = 8  # codes of 4 bits in an int32


def pack_int4(codes: Array) -> Array:
    """Two codes a byte, the first in the low bits. codes: int8[..., n], -8 to 7. Returns uint8[..., ceil(n / 2)].

    Bits that no code needs are 0. Raises InvalidArgument for what is no array of such codes.
    """
    codes = np.asarray(codes)
    if codes.dtype != np.int8 or codes.ndim == 0:
        raise InvalidArgument(f"pack_int4: expected int8 codes [..., n], got {codes.dtype.name}{list(codes.shape)}.")
    _require_int4(codes, "pack_int4")
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


def pack_words(codes: Array) -> Array:
    """Codes of 4 bits plus 8, eight an int32, the first lowest. codes: int8[out, ...]. Returns int32[out, ceil(n / 8)].

    What is left over is 0. Raises InvalidArgument for codes that do not fit 4 bits.
    """
    _require_int4(codes, "pack_words")
    rows = codes.reshape(codes.shape[0], math.prod(codes.shape[1:]))
    nibbles = np.zeros((rows.shape[0], -(-rows.shape[1] // PER_WORD) * PER_WORD), np.uint8)
    nibbles[:, : rows.shape[1]] = (rows + np.int8(8)).view(np.uint8)
    return np.ascontiguousarray(nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view("<i4")


def unpack_words(words: Array, shape: tuple[int, ...], bits: int) -> Array:
    """The codes of a shape [out, ...] that words hold, at 4 or 8 bits each: int8. words: int32[out, n * bits / 32]."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        nibbles = np.empty((octets.shape[0], 2 * octets.shape[1]), np.uint8)
        nibbles[:, 0::2], nibbles[:, 1::2] = octets & 15, octets >> 4
        octets = nibbles
    codes = octets[:, : math.prod(shape[1:])] - np.uint8(1 << bits - 1)
    return codes.view(np.int8).reshape(shape)


def _require_int4(codes: Array, what: str) -> None:
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise InvalidArgument(f"{what}: codes from {codes.min()} to {codes.max()} do not fit 4 bits, -8 to 7.")
