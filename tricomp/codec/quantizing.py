"""Floats to integer codes and back, by the backend asked for and where the floats are.

Imports engine, and each backend when it is asked. The hard thing is the same as for frames: the codes hang neither on
the backend nor on threads, and words on a GPU stay there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.codec import accelerator
from tricomp.codec.engine import Engine
from tricomp.dtypes import DType, Words
from tricomp.reference import quantize as reference

LARGEST_CODE = reference.LARGEST_CODE
CANDIDATES = reference.CANDIDATES


def _backend(words: Any, engine: Engine) -> tuple[str, Any]:
    """The name of the backend for words, and its module or worker."""
    home = accelerator.home_of(words)
    coder = (engine if home is None else engine.at(home)).coder
    return coder.name, reference


def count_non_finite(rows: Words, dtype: DType, engine: Engine) -> np.ndarray[Any, Any]:
    """How many elements of each row are no finite float32: int64[out]. rows: uint[out, n], words of dtype."""
    return reference.count_non_finite(rows, dtype)


def quantize(
    rows: Words, dtype: DType, bits: int, group: int, scale_dtype: DType, is_clipped: bool, engine: Engine
) -> tuple[Any, Any]:
    """Codes int8[out, n] and scales, words [out, n_groups], of finite floats; see reference.quantize.quantize.

    rows: uint[out, n], words of dtype.
    """
    return reference.quantize(rows, dtype, bits, group, scale_dtype, is_clipped)


def dequantize(codes: Any, scales: Any, group: int, scale_dtype: DType, dtype: DType, engine: Engine) -> Any:
    """The floats that codes stand for, words of dtype [out, n]; see reference.quantize.dequantize."""
    return reference.dequantize(codes, scales, group, scale_dtype, dtype)
