"""Products of float rows with integer weights, in numpy. Defines what native computes, but for rounding of sums.

Imports numpy. Products of codes are whole numbers that float64 holds exactly; only scales round.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LARGEST = 127.0  # code of a row's largest magnitude


def multiply(
    rows: Array, codes: Array, scales: Array, bias: Array | None, bits: int, group: int | None, is_dynamic: bool
) -> Array:
    """float32[m, out] of rows float32[m, in] and codes, as saved: int8[out, in] or uint8[out, ceil(in / 2)].

    scales: float32[out, groups]. is_dynamic: rows become codes too, of 8 bits, by each row's largest magnitude.
    """
    n_in = rows.shape[1]
    if bits == 4:
        nibbles = np.stack([codes.view(np.int8) << 4 >> 4, codes.view(np.int8) >> 4], -1)
        codes = nibbles.reshape(len(codes), -1)[:, :n_in]
    factors = np.ones((len(rows), 1), np.float64)
    taken = rows.astype(np.float64)
    if is_dynamic:
        largest = np.abs(rows).max(1, keepdims=True, initial=0) / np.float32(LARGEST)
        largest[largest == 0] = 1
        with np.errstate(invalid="ignore"):
            taken, factors = np.rint(rows / largest).astype(np.float64), largest.astype(np.float64)
    each = n_in if group is None else group
    weights = codes.astype(np.float64) * scales.astype(np.float64).repeat(each, 1)[:, :n_in]
    with np.errstate(invalid="ignore", over="ignore"):
        out = (taken @ weights.T) * factors
        return (out if bias is None else out + bias).astype(np.float32)
