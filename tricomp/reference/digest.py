"""The 64-bit digest of a decoded leaf, in numpy. Imports numpy only.

Made for wide machines: a sum of products over 32-bit pieces, so that any order and any split into chunks gives the
same number. It finds accidents; it is no defence against a forger.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

# Frozen since format 1.
_COLUMNS = 128
_ROWS = 4096
_M64 = (1 << 64) - 1

Array = np.ndarray[Any, Any]


BLOCK_BYTES = 4 * _COLUMNS * _ROWS  # 2 MiB


def digest_sum(words: Array, first_byte: int = 0) -> int:
    """What words contribute to the digest of the leaf in which they begin at first_byte, a multiple of 4.

    words: uint[n]; whole u32 together, but for the leaf's last ones. Sums of all parts of a leaf add up modulo 2^64.
    """
    octets = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    total, at = 0, first_byte
    while len(octets):
        number, offset = divmod(at, BLOCK_BYTES)
        block, octets = octets[: BLOCK_BYTES - offset], octets[BLOCK_BYTES - offset :]
        at += len(block)
        if len(block) % 4:
            block = np.append(block, np.zeros(-len(block) % 4, np.uint8))
        pieces = block.view("<u4").astype(np.uint64)
        keys = _keys()[offset // 4 : offset // 4 + len(pieces)]
        total += int(np.dot(pieces, keys)) * (_mix64(number) | 1)
    return total & _M64


def digest_end(total: int, n_bytes: int) -> int:
    """The digest of a leaf of n_bytes from the sum over all of its words: 0 to 2^64 - 1. FORMAT.md, "Digest"."""
    return _mix64(total + n_bytes * 0x9E3779B97F4A7C15 & _M64)


def digest(words: Array) -> int:
    """The digest of a leaf. words: uint[n]. Returns 0 to 2^64 - 1. FORMAT.md, "Digest"."""
    return digest_end(digest_sum(words), words.nbytes)


@lru_cache(maxsize=1)
def _keys() -> Array:
    """The keys of a block of 4096 rows of 128 pieces: a product of row and column in each half. uint64[524288]."""
    rows, columns = np.arange(_ROWS, dtype=np.uint32), np.arange(_COLUMNS, dtype=np.uint32)
    one = np.uint32(1)
    low = (_mix32(rows ^ np.uint32(0x9E3779B9)) | one)[:, None] * (_mix32(columns + one) | one)
    high = (_mix32(rows ^ np.uint32(0x7F4A7C15)) | one)[:, None] * (_mix32(columns + np.uint32(129)) | one)
    return (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)).reshape(-1)


def _mix32(x: Array) -> Array:
    """Finaliser of MurmurHash3 (A. Appleby), 32 bits. x: uint32[n]."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)


def _mix64(x: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea, Flood)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _M64
    return x ^ x >> 31
