"""Floats to integer codes and back, by the backend asked for and where the floats are.

Imports engine, and each backend when it is asked. The hard thing is the same as for frames: the codes hang neither on
the backend nor on threads, and words on a GPU stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tricomp.codec import accelerator
from tricomp.codec.engine import Engine
from tricomp.dtypes import DType, Words
from tricomp.reference import quantize as reference

LARGEST_CODE = reference.LARGEST_CODE


def quantize(
    rows: Any, dtype: DType, bits: int, group: int, scale_dtype: DType, is_clipped: bool, engine: Engine
) -> tuple[Any, Any, np.ndarray[Any, Any]]:
    """Codes int8[out, n], scales as words [out, n_groups], and counts: see reference.quantize.quantize.

    rows: uint[out, n], words of dtype; or an int tensor [out, n] on a device, where codes and scales are then too.
    counts: on the host.
    """
    found: tuple[Any, Any, np.ndarray[Any, Any]] = _functions(rows, engine)[0](
        rows, dtype, bits, group, scale_dtype, is_clipped
    )
    return found


def dequantize(codes: Any, scales: Words, group: int, scale_dtype: DType, dtype: DType, engine: Engine) -> Any:
    """The floats that codes stand for, words of dtype [out, n]: see reference.quantize.dequantize.

    codes, scales: both on the host or both on a device, where the words are then too.
    """
    return _functions(codes, engine)[1](codes, scales, group, scale_dtype, dtype)


def _functions(words: Any, engine: Engine) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """quantize and dequantize of the backend for words."""
    home = accelerator.home_of(words)
    name = (engine if home is None else engine.at(home)).coder.name
    if name == "reference":
        return reference.quantize, reference.dequantize
    from tricomp.native import quantize as native

    return partial(native.quantize, threads=engine.n_threads), partial(native.dequantize, threads=engine.n_threads)
