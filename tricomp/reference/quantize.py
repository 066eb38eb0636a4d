"""Floats to integer codes and scales, and back, in numpy. Defines the codes: native and kernels must equal it.

Imports numpy, dtypes and errors only. FORMAT.md, "Integers". The hard thing: every backend must find the same codes, so
nothing may hang on an order or on fused steps. Each float operation here is a single one of IEEE 754, rounded to
nearest even; sums are integers; and no number that counts is ever subnormal, so flushing those to zero changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words

Array = np.ndarray[Any, Any]

LARGEST_CODE = {bits: (1 << bits - 1) - 1 for bits in (4, 5, 6, 7, 8)}
# What the largest magnitude of a group is multiplied by, in 64ths, from no clipping downwards. With many codes,
# clipping to less than the half cannot pay in rows of up to 64,000 elements; with few, a single outlier makes it pay.
_WIDE = (64, 63, 62, 61, 60, 59, 58, 56, 54, 52, 50, 48, 44, 40, 36, 32)
_NARROW = (64, 60, 56, 52, 48, 44, 41, 38, 35, 32, 29, 26, 23, 20, 18, 16)
CANDIDATES = {bits: _WIDE if bits >= 6 else _NARROW for bits in LARGEST_CODE}
ERROR_PARTS = 64  # of a code, in which errors are counted
LEAST_SCALE = np.float32(2.0**-112)  # far above what is subnormal, so that the latter round to code 0
_SLICE_ELEMENTS = 1 << 18  # worked on at a time


def quantize(
    rows: Words, dtype: DType, bits: int, group: int, scale_dtype: DType, is_clipped: bool
) -> tuple[Array, Array, Array]:
    """Codes and scales of floats.

    rows: uint[out, n], words of dtype. bits: 4 to 8. group: elements of a row that share a scale, from 1. Returns codes
    int8[out, n]; the scales as words, uint32 or uint16 [out, max(ceil(n / group), 1)]; how many elements of each row
    are infinite, NaN or too large for float32, int64[out]. Where there are any, codes and scales mean nothing.
    """
    n_rows, n = rows.shape
    counts = _count_non_finite(rows, dtype)
    if counts.any():
        rows = np.zeros_like(rows)
    group = min(group, max(n, 1))
    n_groups = max(-(-n // group), 1)
    codes = np.zeros((n_rows, n), np.int8)
    scales = np.zeros((n_rows, n_groups), scale_dtype.word_dtype)
    for some, first, last in _slices(n_rows, n_groups, group):
        part = _floats(rows[some, first * group : last * group], dtype)
        padded = np.zeros((len(part), (last - first) * group), np.float32)
        padded[:, : part.shape[1]] = part
        found, scale = _quantized(padded.reshape(-1, group), bits, scale_dtype, is_clipped)
        codes[some, first * group : last * group] = found.reshape(len(part), -1)[:, : part.shape[1]]
        scales[some, first:last] = _scale_words(scale, scale_dtype).reshape(len(part), -1)
    return codes, scales, counts


def dequantize(codes: Array, scales: Words, group: int, scale_dtype: DType, dtype: DType) -> Words:
    """The floats that codes stand for: code times scale as a float32, no larger than dtype's largest, as a dtype.

    codes: int8[out, n]. scales: as quantize gives them. Returns uint[out, n], words of dtype.
    """
    n_rows, n = codes.shape
    group = min(group, max(n, 1))
    found = np.zeros((n_rows, n), dtype.word_dtype)
    values = _scale_values(scales, scale_dtype)
    largest = largest_float32(dtype)
    for some, first, last in _slices(n_rows, scales.shape[1], group):
        part = codes[some, first * group : last * group].astype(np.float32)
        with np.errstate(over="ignore"):
            part *= np.repeat(values[some, first:last], group, axis=1)[:, : part.shape[1]]
        np.clip(part, -largest, largest, out=part)
        found[some, first * group : last * group] = part.astype(dtype.numpy).view(dtype.word_dtype)
    return found


def largest_float32(dtype: DType) -> np.float32:
    """The largest finite number of a float dtype, or of float32, if that is smaller."""
    word = ((1 << dtype.exponent_bits) - 1 << dtype.mantissa_bits) - 1
    if dtype.name == "float64":
        return np.finfo(np.float32).max
    return np.float32(np.array([word], dtype.word_dtype).view(dtype.numpy)[0])


def _count_non_finite(rows: Words, dtype: DType) -> Array:
    found = np.zeros(len(rows), np.int64)
    for some, first, last in _slices(len(rows), rows.shape[1], 1):
        found[some] += np.count_nonzero(~np.isfinite(_floats(rows[some, first:last], dtype)), axis=1)
    return found


def _slices(n_rows: int, n_groups: int, group: int) -> Iterator[tuple[slice, int, int]]:
    """Rows and a range of groups of them, a slice at a time."""
    n_each = max(_SLICE_ELEMENTS // group, 1)
    if n_each >= n_groups > 0:
        n_together = n_each // n_groups
        yield from ((slice(row, row + n_together), 0, n_groups) for row in range(0, n_rows, n_together))
        return
    for row in range(n_rows):
        for first in range(0, n_groups, n_each):
            yield slice(row, row + 1), first, min(first + n_each, n_groups)


def _floats(words: Words, dtype: DType) -> Array:
    """The numbers as float32 in an array of their own; beyond its range, infinities."""
    with np.errstate(over="ignore", under="ignore"):
        return np.ascontiguousarray(words).view(dtype.numpy).astype(np.float32)


def _quantized(groups: Array, bits: int, scale_dtype: DType, is_clipped: bool) -> tuple[Array, Array]:
    """Codes int8[n, size] and scales float32[n] of groups float32[n, size]."""
    most = np.int32(LARGEST_CODE[bits])
    top = np.abs(groups).max(axis=1, initial=0) / np.float32(most)
    best = _scale_of(top, CANDIDATES[bits][0], scale_dtype)
    if is_clipped:
        least = _error(groups, best, most)
        for candidate in CANDIDATES[bits][1:]:
            scale = _scale_of(top, candidate, scale_dtype)
            error = _error(groups, scale, most)
            is_better = error < least  # of equal ones the larger scale stays
            best, least = np.where(is_better, scale, best), np.where(is_better, error, least)
    codes = np.clip(np.rint(groups * _reciprocal(best)[:, None]), -most, most)
    return codes.astype(np.int8), best


def _scale_of(top: Array, candidate: int, scale_dtype: DType) -> Array:
    """The scale of a candidate, as scale_dtype has it. top: float32[n], the largest magnitudes by the largest code."""
    scale = np.maximum(top * np.float32(candidate / 64), LEAST_SCALE)
    return _scale_values(_scale_words(scale, scale_dtype), scale_dtype)


def _reciprocal(scale: Array) -> Array:
    return np.float32(1) / scale


def _error(groups: Array, scale: Array, most: np.int32) -> Array:
    """Sum of squared errors of each group, float64[n]; an element's error is counted in parts of a code."""
    parts = np.abs(np.rint(groups * (_reciprocal(scale) * np.float32(ERROR_PARTS))[:, None])).astype(np.int32)
    error = parts - np.minimum((parts + ERROR_PARTS // 2) // ERROR_PARTS, most) * ERROR_PARTS
    total = np.square(error, dtype=np.int64).sum(axis=1)
    return total.astype(np.float64) * np.square(scale.astype(np.float64))


def _scale_words(scale: Array, scale_dtype: DType) -> Words:
    """float32 as words of scale_dtype, rounded to nearest even."""
    words = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    if scale_dtype.name == "float32":
        return words
    return (words + np.uint32(0x7FFF) + (words >> 16 & 1) >> 16).astype(np.uint16)


def _scale_values(words: Words, scale_dtype: DType) -> Array:
    """Words of scale_dtype as float32."""
    if scale_dtype.name == "float32":
        return words.view(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
