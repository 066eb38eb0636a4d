"""The 64-bit digest of a decoded leaf, in numpy. Imports numpy only.

Made for wide machines: a sum of products over 32-bit pieces, so that any order and any split into chunks gives the
same number. It finds accidents; it is no defence against a forger.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_COLUMNS = 128
_ROWS_AT_ONCE = 2048
_M64 = (1 << 64) - 1

Array = np.ndarray[Any, Any]


def _mix32(x: Array) -> Array:
    """Finaliser of MurmurHash3 (A. Appleby), 32 bits. x: uint32[n]."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)


# Frozen since format 1.
_COLUMN_KEYS = _mix32(np.arange(1, _COLUMNS + 1, dtype=np.uint32)) | np.uint32(1)


def digest(words: Array) -> int:
    """The digest of a leaf. words: uint[n]. Returns 0 to 2^64 - 1. FORMAT.md, "Digest"."""
    octets = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    row_bytes = 4 * _COLUMNS
    n_whole = len(octets) // row_bytes
    pieces = octets[: n_whole * row_bytes].view("<u4").reshape(n_whole, _COLUMNS)
    total = 0
    for first in range(0, n_whole, _ROWS_AT_ONCE):
        total += _weigh(pieces[first : first + _ROWS_AT_ONCE], first)
    if len(octets) % row_bytes:
        last = np.zeros(row_bytes, np.uint8)
        last[: len(octets) % row_bytes] = octets[n_whole * row_bytes :]
        total += _weigh(last.view("<u4").reshape(1, _COLUMNS), n_whole)
    return _mix64(total + len(octets) * 0x9E3779B97F4A7C15 & _M64)


def _weigh(rows: Array, first: int) -> int:
    """Sum of pieces times their keys, mod 2^64. rows: uint32[q, 128], row numbers first, first + 1, ..."""
    numbers = np.arange(first, first + len(rows), dtype=np.uint64).astype(np.uint32)
    row_keys = _mix32(numbers ^ np.uint32(0x9E3779B9)) | np.uint32(1)
    keys = row_keys[:, None] * _COLUMN_KEYS
    return int(np.dot(rows.astype(np.uint64).reshape(-1), keys.astype(np.uint64).reshape(-1)))


def _mix64(x: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea, Flood)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _M64
    return x ^ x >> 31
