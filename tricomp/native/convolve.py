"""Convolutions of float pictures with integer weights, natively, with threads. Imports ground and numpy.

Gives the bits of `tricomp.reference.convolve`. The hard thing: it is called for every layer of a running model, so what
shapes say is packed apart, once for each shape, and buffers are passed on; the extension compares each with the shapes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from tricomp import native

Array = np.ndarray[Any, Any]
MOST_IN = 1 << 16  # weights of an output channel
MOST_CODES = 1 << 30  # of a padded sample
_NUMBERS = struct.Struct("<19Q")


def request(
    shape: Sequence[int],
    out_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    is_last: Sequence[bool],
) -> bytes:
    """What convolve is asked: shape and out_shape are (samples, channels, height, width), whatever the order in memory.

    kernel, stride, padding, dilation: (height, width). padding: zeros before each sample; those after it follow from
    out_shape. is_last: whether channels stand last in the memory of input, out and codes.
    """
    n, n_in, height, width = shape
    _, n_out, out_height, out_width = out_shape
    return _NUMBERS.pack(
        *(n, n_in, height, width, n_out, out_height, out_width, groups),
        *(*kernel, *stride, *dilation, *padding, *is_last),
    )


def convolve(
    request: bytes, input: Array, codes: Array, scales: Array, bias: Array | None, out: Array, threads: int
) -> None:
    """Fill out, float32, from contiguous arrays: input float32, codes int8, scales and bias float32[out]."""
    native.load().convolve(request, input, codes, scales, bias, out, threads)
