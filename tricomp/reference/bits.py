"""Bit fields of words, in numpy: order-preserving views, magnitudes, bit lengths, exponents, casts, rounding.

Imports numpy, dtypes and errors only. Integers only: nothing here may convert to floating point. The hard thing is
speed without clarity lost: each function is a handful of whole-array operations, and callers pass pieces that fit
the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.errors import InvalidArgument

_BLOCK_WORDS = 1 << 20  # compared at a time

_LENGTH_16 = np.zeros(1 << 16, np.uint8)
for _bit in range(16):
    _LENGTH_16[1 << _bit :] = _bit + 1


def bit_length(words: Words) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bits needed to write each word; 0 for 0. words: uint[...]. Returns uint8[...]."""
    if words.dtype.itemsize <= 2:
        return _LENGTH_16[words]
    half = words.dtype.itemsize * 4
    narrow = np.uint16 if half == 16 else np.uint32
    high = (words >> half).astype(narrow)
    is_high = high != 0
    length = bit_length(np.where(is_high, high, words.astype(narrow)))
    return length + is_high.astype(np.uint8) * np.uint8(half)


def ordered(words: Words, dtype: DType) -> Words:
    """The order-preserving integer view: a <= b as numbers iff ordered(a) <= ordered(b) as unsigned integers.

    Floats: negative words are complemented, others get their top bit set. Signed integers: the top bit is flipped.
    """
    if not dtype.is_signed:
        return words
    top = words.dtype.type(1 << (dtype.word_bits - 1))
    if not dtype.is_float:
        return words ^ top
    return words ^ (_sign_fill(words) | top)


def unordered(values: Words, dtype: DType) -> Words:
    """Inverse of `ordered`."""
    if not dtype.is_signed:
        return values
    top = values.dtype.type(1 << (dtype.word_bits - 1))
    if not dtype.is_float:
        return values ^ top
    return values ^ (~_sign_fill(values) | top)


def _sign_fill(words: Words) -> Words:
    """All ones where the top bit is set, else 0."""
    signed = words.view(words.dtype.str.replace("u", "i"))
    return (signed >> (words.dtype.itemsize * 8 - 1)).view(words.dtype)


def magnitude(words: Words, dtype: DType) -> Words:
    """A float's word without its sign; an integer's absolute value (so |-2^(W-1)| = 2^(W-1))."""
    if not dtype.is_signed:
        return words
    if dtype.is_float:
        return words & words.dtype.type((1 << (dtype.word_bits - 1)) - 1)
    fill = _sign_fill(words)
    return (words ^ fill) - fill


def exponent(words: Words, dtype: DType) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The biased exponent field of a float; the bit length of an integer's magnitude. Returns uint16[n]."""
    if dtype.is_float:
        return (magnitude(words, dtype) >> dtype.mantissa_bits).astype(np.uint16)
    return bit_length(magnitude(words, dtype)).astype(np.uint16)


def trailing_zeros(words: Words) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Zero bits below the lowest set bit; the word's width for 0. Returns uint8[...]."""
    lowest = words & (~words + words.dtype.type(1))
    return np.where(words == 0, np.uint8(words.dtype.itemsize * 8), bit_length(lowest) - np.uint8(1)).astype(np.uint8)


def round_mantissa(words: Words, dtype: DType, kept_bits: int) -> Words:
    """Round floats to nearest even at kept_bits of mantissa.

    Infinities and NaNs stay as they are, and so does a finite word that would round past the largest finite one.
    Below the normal range the error is absolute, not relative. Raises InvalidArgument unless dtype is a float.
    """
    if not dtype.is_float:
        raise InvalidArgument(f"keep_mantissa_bits applies to float leaves, not {dtype.name}. Narrow the pattern.")
    n_dropped = dtype.mantissa_bits - kept_bits
    if n_dropped <= 0:
        return words
    one = words.dtype.type(1)
    mask = words.dtype.type((1 << n_dropped) - 1)
    body = magnitude(words, dtype)
    rounded = (body + (mask >> one) + ((body >> n_dropped) & one)) & ~mask
    largest = words.dtype.type(_largest_finite(dtype))
    sign = words ^ body
    if dtype.name.endswith("fnuz"):  # there a zero has no sign: the word of -0 is NaN
        sign = np.where((rounded == 0) & (body != 0), words.dtype.type(0), sign)
    return np.where((body > largest) | (rounded > largest), words, sign | rounded)


def _largest_finite(dtype: DType) -> int:
    """Magnitude of the largest finite number."""
    if dtype.name.endswith("fnuz"):
        return (1 << (dtype.word_bits - 1)) - 1
    if dtype.name.endswith("fn"):
        return (1 << (dtype.word_bits - 1)) - 2
    return _infinity(dtype) - 1


def _infinity(dtype: DType) -> int:
    """Magnitude of infinity, for dtypes that have one."""
    return ((1 << dtype.exponent_bits) - 1) << dtype.mantissa_bits


def cast(words: Words, source: DType, target: DType) -> Words:
    """Round each float of the source dtype to nearest even in the target dtype, on words, with integers only.

    words: uint[n] of source. Returns uint[n] of target. Only IEEE-like pairs (float64, float32, float16, bfloat16).
    Overflow gives infinity. A NaN keeps its sign and the top of its payload with the quiet bit set.
    """
    wide = words.astype(np.uint64)
    body = wide & np.uint64((1 << (source.word_bits - 1)) - 1)
    sign = (wide >> np.uint64(source.word_bits - 1)) << np.uint64(target.word_bits - 1)
    special = body >= np.uint64(_infinity(source))
    m_in, m_out = source.mantissa_bits, target.mantissa_bits
    field = (body >> np.uint64(m_in)).astype(np.int64)
    fraction = body & np.uint64((1 << m_in) - 1)
    # A subnormal's significand is brought to the normal form 1.f by shifting its top bit up to bit m_in.
    lift = np.where(field == 0, m_in + 1 - bit_length(fraction).astype(np.int64), 0)
    significand = np.where(field == 0, fraction << lift.astype(np.uint64), fraction | np.uint64(1 << m_in))
    bias_in, bias_out = (1 << (source.exponent_bits - 1)) - 1, (1 << (target.exponent_bits - 1)) - 1
    new_field = np.maximum(field, 1) - lift - bias_in + bias_out
    # Below the target's normal range more bits are dropped; what is dropped decides the rounding.
    drop = m_in - m_out + np.maximum(1 - new_field, 0)
    kept = _round_shift(significand, drop)
    value = np.where(new_field < 1, kept, kept + (np.maximum(new_field - 1, 0).astype(np.uint64) << np.uint64(m_out)))
    infinity = np.uint64(_infinity(target))
    value = np.where((value > infinity) | (new_field > bias_out + bias_out), infinity, value)
    quiet = np.uint64(1 << (m_out - 1))
    payload = fraction >> np.uint64(m_in - m_out) if m_in >= m_out else fraction << np.uint64(m_out - m_in)
    nan = infinity | quiet | payload
    value = np.where(special, np.where(fraction == 0, infinity, nan), value)
    value = np.where(body == 0, np.uint64(0), value)
    return (value | sign).astype(target.word_dtype)


def _round_shift(values: Words, drop: np.ndarray[Any, np.dtype[np.int64]]) -> Words:
    """values / 2^drop to nearest even; negative drops shift up. values: uint64[n] < 2^53; drop: int64[n]."""
    up = np.maximum(-drop, 0).astype(np.uint64)
    down = np.clip(drop, 0, 63).astype(np.uint64)
    one = np.uint64(1)
    half = np.where(down > 0, one << (np.maximum(down, one) - one), np.uint64(0))
    quotient = values >> down
    rest = values & ((one << down) - one)
    quotient = quotient + ((rest > half) | ((rest == half) & (down > 0) & (quotient & one == one))).astype(np.uint64)
    return np.where(drop > 0, quotient, values << up)


def count_unequal(words: Words, others: Words | int) -> int:
    """How many words differ from the others, or from one word, in little memory however many there are."""
    n = 0
    for first in range(0, len(words), _BLOCK_WORDS):
        part = slice(first, first + _BLOCK_WORDS)
        n += int(np.count_nonzero(words[part] != (others if isinstance(others, int) else others[part])))
    return n


def is_equal(words: Words, others: Words) -> bool:
    """Whether two arrays of words are the same; stops at the first block that is not."""
    blocks = range(0, len(words), _BLOCK_WORDS)
    return len(words) == len(others) and all(
        np.array_equal(words[first : first + _BLOCK_WORDS], others[first : first + _BLOCK_WORDS]) for first in blocks
    )


def is_constant(words: Words) -> bool:
    """Whether all words are the same; stops at the first block where they are not."""
    blocks = range(0, len(words), _BLOCK_WORDS)
    return all((words[first : first + _BLOCK_WORDS] == words[0]).all() for first in blocks)
