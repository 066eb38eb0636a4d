"""The dtypes of format 1: names, numbers, bit fields; arrays to words and back. Imports numpy, ml_dtypes, errors.

The hard thing: numpy knows bfloat16 and float8 only through ml_dtypes, and a word is always little-endian and
contiguous, whatever the array is. A complex element is two words, the real one first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tricomp.errors import InvalidArgument, UnsupportedDtype

Words = NDArray[Any]  # always of an unsigned integer dtype; numpy's own types lose track of that in arithmetic


@dataclass(frozen=True)
class DType:
    """One dtype: its name, its number in a file, and the fields of its words.

    exponent_bits + mantissa_bits (+ 1 when is_signed) = word_bits for floats; both 0 for integers.
    words_per_element is 2 for complex dtypes, else 1.
    """

    name: str
    number: int
    numpy: np.dtype[Any]
    word_bits: int
    exponent_bits: int = 0
    mantissa_bits: int = 0
    is_signed: bool = True
    words_per_element: int = 1

    @property
    def is_float(self) -> bool:
        return self.exponent_bits > 0

    @property
    def word_dtype(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.word_bits // 8}")


def _float8(name: str, number: int, exponent_bits: int, mantissa_bits: int) -> DType:
    return DType(name, number, np.dtype(getattr(ml_dtypes, name)), 8, exponent_bits, mantissa_bits)


# Frozen since format 1: a number is never reused.
_ALL = (
    DType("float64", 1, np.dtype("<f8"), 64, 11, 52),
    DType("float32", 2, np.dtype("<f4"), 32, 8, 23),
    DType("float16", 3, np.dtype("<f2"), 16, 5, 10),
    DType("bfloat16", 4, np.dtype(ml_dtypes.bfloat16), 16, 8, 7),
    _float8("float8_e3m4", 5, 3, 4),
    _float8("float8_e4m3", 6, 4, 3),
    _float8("float8_e4m3b11fnuz", 7, 4, 3),
    _float8("float8_e4m3fn", 8, 4, 3),
    _float8("float8_e4m3fnuz", 9, 4, 3),
    _float8("float8_e5m2", 10, 5, 2),
    _float8("float8_e5m2fnuz", 11, 5, 2),
    DType("float8_e8m0fnu", 12, np.dtype(ml_dtypes.float8_e8m0fnu), 8, is_signed=False),
    DType("complex64", 13, np.dtype("<c8"), 32, 8, 23, words_per_element=2),
    DType("complex128", 14, np.dtype("<c16"), 64, 11, 52, words_per_element=2),
    DType("int8", 16, np.dtype("i1"), 8),
    DType("int16", 17, np.dtype("<i2"), 16),
    DType("int32", 18, np.dtype("<i4"), 32),
    DType("int64", 19, np.dtype("<i8"), 64),
    DType("uint8", 20, np.dtype("u1"), 8, is_signed=False),
    DType("uint16", 21, np.dtype("<u2"), 16, is_signed=False),
    DType("uint32", 22, np.dtype("<u4"), 32, is_signed=False),
    DType("uint64", 23, np.dtype("<u8"), 64, is_signed=False),
    DType("bool", 24, np.dtype("?"), 8, is_signed=False),
)
_BY_NAME = {dtype.name: dtype for dtype in _ALL}
_BY_NUMBER = {dtype.number: dtype for dtype in _ALL}
NAMES = tuple(_BY_NAME)


def by_name(name: str, leaf: str = "array") -> DType:
    """The dtype called name ("float32", "bfloat16", ...). Raises UnsupportedDtype, naming the leaf."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnsupportedDtype(
            f"leaf {leaf!r}: dtype {name!r} is not one of {', '.join(NAMES)}. Convert the leaf, or leave it out."
        ) from None


def by_number(number: int, leaf: str = "array") -> DType:
    """The dtype with that number in a file. Raises UnsupportedDtype."""
    try:
        return _BY_NUMBER[number]
    except (KeyError, TypeError):
        raise UnsupportedDtype(
            f"leaf {leaf!r}: dtype number {number!r} is unknown to this version of tricomp. Upgrade tricomp to read it."
        ) from None


def of(array: np.ndarray[Any, Any], leaf: str = "array") -> DType:
    """The DType of a numpy array. Raises UnsupportedDtype for object, string, date and structured dtypes."""
    return by_name(_name_of(array.dtype), leaf)


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    return str(dtype.name)  # numpy puts it together each time


def to_words(array: np.ndarray[Any, Any], leaf: str = "array") -> Words:
    """The bits of an array as a flat little-endian uint[n_words]; a view where the memory allows. Shape (), n = 1."""
    if not isinstance(array, np.ndarray):
        raise InvalidArgument(f"leaf {leaf!r}: expected a numpy array, got {type(array).__name__}. Use np.asarray.")
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidArgument(f"leaf {leaf!r}: it is a masked array. Store its data and its mask as two leaves.")
    dtype = of(array, leaf)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(dtype.word_dtype)


def from_words(words: Words, dtype: DType, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The array of that dtype and shape whose words these are; shares their memory. words: uint[n_words]."""
    return words.view(dtype.numpy).reshape(shape)
