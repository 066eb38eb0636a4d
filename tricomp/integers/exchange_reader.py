"""Quantised arrays read from safetensors files in the layout of the compressed-tensors library, see exchange.

The hard thing: such a file may come from anybody. What it holds is told by names, dtypes and shapes, which must all fit
each other; what this library's integers cannot say (zero points, columns in another order) is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np

from tricomp import formats
from tricomp.errors import InvalidArgument
from tricomp.integers.form import FLOATS, GROUP_STEP, Form
from tricomp.integers.packing import unpack_words
from tricomp.integers.quantized import Quantized, scales_shape
from tricomp.tensors import Path

Array = np.ndarray[Any, Any]

NOTE = "tricomp.integers"  # key of a safetensors file's metadata
PACKED, SCALE, SHAPE, ZERO, ORDER = "_packed", "_scale", "_shape", "_zero_point", "_g_idx"
_ADVICE = "Download it again."


def from_safetensors(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file, or of an index of shards: a Quantized for each that holds codes of this
    layout, else arrays. float16 scales become float32.

    Raises InvalidArgument for zero points other than 0, for orders of columns, and for parts that do not fit.
    """
    with closing(formats.read(path)) as opened:
        if opened.format != "safetensors":
            raise InvalidArgument(f"{opened.name}: is a {opened.format} file, not a safetensors file.")
        left = dict(opened.tree)
        forms = _forms_in(opened.metadata.get("safetensors", {}))
        found: dict[str, Any] = {}
        for name in opened.tree:
            base = name.removesuffix(PACKED)
            if name in left and base + SCALE in left and (base != name or left[name].dtype == np.int8):
                found[base] = _taken(base, left, forms.get(base), opened.name)
        rest = {name: array.copy() for name, array in left.items()}
        return {**found, **rest}


def _forms_in(metadata: Mapping[str, str]) -> dict[str, Form]:
    """The Forms that a file of ours tells of; of others none. What is odd is left out: the tensors tell enough."""
    try:
        told = json.loads(metadata.get(NOTE, "{}"))
        return {name: Form(**form) for name, form in told.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _taken(name: str, left: dict[str, Array], form: Form | None, where: str) -> Quantized:
    """The Quantized of an entry, whose tensors are taken out of left."""
    what = f"{where}: {name!r}"
    scales = left.pop(name + SCALE)
    zeros, order = left.pop(name + ZERO, None), left.pop(name + ORDER, None)
    if zeros is not None and zeros.astype(np.int64).any():
        raise InvalidArgument(f"{what}: has zero points other than 0. Only codes symmetric about 0 are read.")
    if order is not None and (order.astype(np.int64) != -1).any():
        raise InvalidArgument(f"{what}: has its columns in another order ({name}{ORDER}), which is not read.")
    if name + PACKED in left:
        words = left.pop(name + PACKED)
        shape = tuple(int(size) for size in left.pop(name + SHAPE, np.zeros(0, np.int64)).reshape(-1))
        n = math.prod(shape[1:]) if shape and min(shape) >= 0 else -1
        widths = [bits for bits in (4, 8) if n >= 0 and words.shape == (shape[0], -(-n * bits // 32))]
        if words.dtype != np.int32 or not widths:
            raise InvalidArgument(
                f"{what}: {words.dtype.name}{list(words.shape)} does not hold codes of shape {list(shape)}. {_ADVICE}"
            )
        bits = widths[0]
        codes = unpack_words(words, shape, bits)
    else:
        codes, bits = left.pop(name).copy(), 8
    if codes.ndim == 0:
        raise InvalidArgument(f"{what}: expected codes [out, ...], got a single one.")
    dtype = str(scales.dtype.name)
    scales = scales.astype(np.float32) if dtype == "float16" else scales.copy()
    if form is None:
        form = Form(bits, _group(codes.shape, scales.shape, what), dtype if dtype in FLOATS else "float32")
    expected = scales_shape(codes.shape, form.group)
    if scales.size != math.prod(expected):
        raise InvalidArgument(f"{what}: expected scales {list(expected)}, got {list(scales.shape)}. {_ADVICE}")
    return Quantized(codes, scales.reshape(expected), form.bits, form.group, form.dtype)


def _group(shape: tuple[int, ...], scales: tuple[int, ...], what: str) -> int | None:
    """The elements that share a scale, told by the shapes; None: a row."""
    n = math.prod(shape[1:])
    if scales in ((shape[0],), (shape[0], 1)):
        return None
    if len(scales) != 2 or scales[0] != shape[0] or scales[1] == 0 or n % scales[1] or n // scales[1] % GROUP_STEP:
        raise InvalidArgument(
            f"{what}: scales {list(scales)} for codes {list(shape)}: expected one a row, or one for each group of a "
            f"multiple of {GROUP_STEP}."
        )
    return n // scales[1]
