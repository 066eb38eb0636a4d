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
    engine = engine if home is None else engine.at(home).there()
    name = engine.coder.name
    if name == "reference":
        return reference.quantize, reference.dequantize
    if name == "triton":
        worker = _Worker(home)
        return worker.quantize, worker.dequantize
    from tricomp.native import quantize as native

    return partial(native.quantize, threads=engine.n_threads), partial(native.dequantize, threads=engine.n_threads)


class _Worker:
    """The Triton backend on a device, after what its current stream has been given; None: on the host's behalf."""

    def __init__(self, home: Any) -> None:
        self._worker = accelerator.Accelerator(home)
        self._is_host_wanted = home is None

    def quantize(
        self, rows: Any, dtype: DType, bits: int, group: int, scale_dtype: DType, is_clipped: bool
    ) -> tuple[Any, Any, np.ndarray[Any, Any]]:
        from tricomp.kernels.quantize import quantize

        device = self._worker.device
        words = self._worker.adopted(rows.reshape(-1)).view(tuple(rows.shape))
        with device.running():
            codes, scales, counts = quantize(words, dtype, bits, group, scale_dtype, is_clipped, device)
            told = device.to_host(counts, wait=True).array()
        handed = self._handed_over(codes)
        return handed.view(np.int8) if self._is_host_wanted else handed, self._handed_over(scales), told

    def dequantize(self, codes: Any, scales: Any, group: int, scale_dtype: DType, dtype: DType) -> Any:
        from tricomp.kernels.quantize import dequantize

        device, shape = self._worker.device, tuple(codes.shape)
        given = [self._worker.adopted(each.reshape(-1)).view(tuple(each.shape)) for each in (codes, scales)]
        with device.running():
            words = dequantize(given[0], given[1], group, scale_dtype, dtype, device)
        return self._handed_over(words.view(shape))

    def _handed_over(self, tensor: Any) -> Any:
        """A tensor for the caller; for the host, an array of unsigned words."""
        return accelerator.to_host(tensor) if self._is_host_wanted else self._worker.device.given(tensor)
