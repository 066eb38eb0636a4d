"""Floats to integer codes and scales, and back, natively, with threads over rows. Imports ground and numpy.

Gives what `tricomp.reference.quantize` gives. The hard thing: the numbers of a request stand in the order of
quantize_module.h; neither file alone must ever change.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tricomp import native
from tricomp.dtypes import DType, Words

Array = np.ndarray[Any, Any]

_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}


def quantize(
    rows: Words, dtype: DType, bits: int, group: int, scale_dtype: DType, is_clipped: bool, threads: int | None = None
) -> tuple[Array, Array, Array]:
    """Codes int8[out, n], scales as words [out, n_groups], and how many elements of each row are no finite float32.

    rows: uint[out, n], words of dtype. Where any count is not 0, codes and scales mean nothing.
    """
    n_rows, n = rows.shape
    group = min(group, max(n, 1))
    codes = np.empty((n_rows, n), np.int8)
    scales = np.empty((n_rows, max(-(-n // group), 1)), scale_dtype.word_dtype)
    counts = np.empty(n_rows, np.int64)
    request = _request(rows.shape, group, dtype, scale_dtype, bits, is_clipped)
    core = native.load()
    core.advise(codes)
    core.quantize(request, np.ascontiguousarray(rows), codes, scales, counts, native.n_threads(threads))
    return codes, scales, counts


def dequantize(
    codes: Array, scales: Words, group: int, scale_dtype: DType, dtype: DType, threads: int | None = None
) -> Words:
    """The floats that codes stand for: uint[out, n], words of dtype. codes: int8[out, n]; scales: words."""
    words = np.empty(codes.shape, dtype.word_dtype)
    request = _request(codes.shape, min(group, max(codes.shape[1], 1)), dtype, scale_dtype)
    core = native.load()
    core.advise(words)
    given = [np.ascontiguousarray(array) for array in (codes, scales)]
    core.dequantize(request, *given, words, native.n_threads(threads))
    return words


def _request(
    shape: tuple[int, ...], group: int, dtype: DType, scale_dtype: DType, bits: int = 8, is_clipped: bool = False
) -> bytes:
    return struct.pack("<7Q", *shape, group, _FORMATS[dtype.name], _FORMATS[scale_dtype.name], bits, is_clipped)
