"""Convolutions of float pictures with integer weights, in numpy. Defines what native computes, bit for bit.

Imports numpy. Each sample becomes codes of 8 bits by its own largest magnitude; sums of products of codes are whole
numbers; then each output takes three roundings, in this order: times the channel's scale, times the sample's scale,
plus the bias. The hard thing: codes are found by multiplying with 127 / largest, which must be finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]
LARGEST = np.float32(127)  # code of a sample's largest magnitude
LEAST = np.float32(2.0**-100)  # a sample of smaller magnitudes is one of zeros


def convolve(
    samples: Array,
    codes: Array,
    scales: Array,
    bias: Array | None,
    stride: Pair,
    padding: tuple[Pair, Pair],
    dilation: Pair,
    groups: int,
) -> Array:
    """float32[n, out, height, width] of samples float32[n, in, ...] and codes int8[out, in / groups, kernel ...].

    scales, bias: float32[out]. padding: zeros before and after, of height, then of width. A sample that holds what is
    not finite gives NaN throughout.
    """
    found, sample_scales = to_codes(samples)
    found = np.pad(found, ((0, 0), (0, 0), *padding))
    n_out, n_in, *kernel = codes.shape
    spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    windows: Any = np.lib.stride_tricks.sliding_window_view(found, spans, (2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    n, _, height, width, *_ = windows.shape
    made = np.empty((n, n_out, height, width), np.float64)
    each = n_out // groups
    for i in range(groups):
        patches = windows[:, i * n_in : (i + 1) * n_in].transpose(0, 2, 3, 1, 4, 5)
        rows = patches.reshape(n * height * width, n_in * kernel[0] * kernel[1])
        weights = codes[i * each : (i + 1) * each].reshape(each, rows.shape[1])
        sums = rows.astype(np.float64) @ weights.T.astype(np.float64)  # exact
        made[:, i * each : (i + 1) * each] = sums.reshape(n, height, width, each).transpose(0, 3, 1, 2)
    added = np.zeros(n_out, np.float32) if bias is None else bias
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        out: Array = made.astype(np.float32) * scales[:, None, None] * sample_scales[:, None, None, None]
        return out + added[:, None, None]


def to_codes(samples: Array) -> tuple[Array, Array]:
    """Samples as int8, and the scale of each, float32[n]: NaN for one that is not finite."""
    largest = np.abs(samples).reshape(len(samples), -1).max(1, initial=0).astype(np.float32)
    with np.errstate(all="ignore"):
        factors = np.where(largest < LEAST, np.float32(0), LARGEST / largest)
        scales = np.where(largest < LEAST, np.float32(1), largest / LARGEST)
        scales = np.where(np.isfinite(largest), scales, np.float32(np.nan))
        factors = np.where(np.isfinite(scales), factors, np.float32(0))
        codes = np.rint(np.nan_to_num(samples) * factors[:, None, None, None])
    return codes.astype(np.int8), scales
