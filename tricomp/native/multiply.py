"""Products of float rows with integer weights, natively, with threads over outputs. Imports ground and numpy.

Gives what `tricomp.reference.multiply` gives, but for rounding of sums. The hard thing: it is called for every layer of
a running model, so it packs seven numbers and passes buffers on; the extension compares each with the shape.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tricomp import native

Array = np.ndarray[Any, Any]
MOST_IN = 1 << 16  # weights of a row
WHOLE_ROW = 1 << 30  # a group that no row reaches


def multiply(
    rows: Array,
    codes: Array,
    scales: Array,
    bias: Array | None,
    out: Array,
    bits: int,
    group: int | None,
    is_dynamic: bool,
    threads: int,
) -> None:
    """Fill out, float32[m, out], from contiguous arrays; shapes as in the reference.

    scales: float32, or the words of bfloat16 (of 2 bytes). rows of at most MOST_IN.
    """
    is_short = scales.itemsize == 2
    fields = (rows.shape[0], rows.shape[1], out.shape[1], group or WHOLE_ROW, bits, is_short, is_dynamic)
    native.load().multiply(struct.pack("<7Q", *fields), rows, codes, scales, bias, out, threads)
