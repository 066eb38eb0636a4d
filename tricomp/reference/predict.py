"""Prediction stage, in numpy: words to (symbol, context, remainder) and back. Defines the bytes.

Imports numpy, dtypes, plan and bits only; integers only. The hard thing: every split must be undone exactly from its
symbols, the same contexts, and its remainders; a word that does not fit is flagged and stored whole as a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.plan import Plan
from tricomp.reference.bits import bit_length, exponent, magnitude, ordered, unordered

Array = np.ndarray[Any, Any]

# Frozen since format 1: factors of `scaled_delta` are fixed-point, one = 2^15 each, 2^30 their product.
FACTOR_BITS = 15


@dataclass(frozen=True)
class Scales:
    """Vectors of the scale model or of the factors. rows: int16 or uint16[n_rows]; columns: [n_columns] or None."""

    rows: Array = field(default_factory=lambda: np.zeros(0, np.int16))
    columns: Array | None = None

    def table(self, n_columns: int, first: int, n_words: int) -> tuple[Array, Array | None]:
        """rows and columns spread over words [first, first + n_words) of the split."""
        row, column = divmod(first, n_columns)
        n_rows = -(-(column + n_words) // n_columns)
        rows = np.repeat(self.rows[row : row + n_rows], n_columns)[column : column + n_words]
        if self.columns is None:
            return rows, None
        return rows, np.tile(self.columns, n_rows)[column : column + n_words]


@dataclass(frozen=True)
class Split:
    """Words taken apart. symbols, contexts: uint8[n]; remainders: uint[n]; is_patch: bool[n], words that do not fit.

    Where is_patch is set the other arrays hold zeros. contexts is None when there is one context.
    """

    symbols: Array
    contexts: Array | None
    remainders: Words
    is_patch: Array


def levels(plan: Plan, scales: Scales, first: int, n_words: int) -> Array | None:
    """L = R + C of the scale model in eighths of an octave, int16[n_words]; None without one."""
    if not plan.is_scaled:
        return None
    rows, columns = scales.table(plan.n_columns, first, n_words)
    return rows if columns is None else rows + columns


def contexts_of(plan: Plan, reference: Words | None, level: Array | None) -> Array | None:
    """The context of each word: the phase of its level (`full`), or its reference's exponent in a window (deltas)."""
    if plan.n_contexts == 1:
        return None
    if plan.predict == "full":
        assert level is not None
        return (level & 7).astype(np.uint8) >> np.uint8(3 - plan.phase_bits)
    assert reference is not None
    place = (exponent(reference, plan.dtype).astype(np.int16) - np.int16(plan.context_base)) >> plan.context_shift
    return np.clip(place, 0, plan.n_contexts - 1).astype(np.uint8)


def symbol_bits(plan: Plan) -> Array:
    """Bits of the remainder that go with each symbol, uint8[n_symbols]."""
    if plan.predict == "full":
        lengths = np.full(plan.n_symbols, plan.remainder_bits, np.uint8)
    elif plan.predict in ("delta", "scaled_delta"):
        lengths = (np.arange(plan.n_symbols) + plan.base).astype(np.uint8)
    else:
        return np.zeros(plan.n_symbols, np.uint8)
    lengths[0] = 0
    return lengths


def split(plan: Plan, words: Words, reference: Words | None, scales: Scales, palette: Words, first: int) -> Split:
    """Take words apart as the plan says. words, reference: uint[n], the frame's words [first, first + n)."""
    if plan.predict == "palette":
        symbols = np.searchsorted(palette, words).clip(max=len(palette) - 1)
        return Split(symbols.astype(np.uint8), None, words[:0], palette[symbols] != words)
    level = levels(plan, scales, first, len(words)) if plan.predict == "full" else None
    contexts = contexts_of(plan, reference, level)
    if plan.predict == "full":
        symbols, remainders, fits = _split_full(plan, words, level)
    else:
        predicted = _predicted(plan, reference, scales, first, len(words))
        symbols, remainders, fits = _split_delta(plan, words, predicted)
    is_patch = ~fits
    if is_patch.any():
        symbols[is_patch] = 0
        remainders[is_patch] = 0
    return Split(symbols, contexts, remainders, is_patch)


def merge(
    plan: Plan,
    symbols: Array,
    remainders: Words,
    reference: Words | None,
    scales: Scales,
    palette: Words,
    first: int,
) -> Words:
    """Inverse of `split`, patches aside."""
    if plan.predict == "palette":
        return palette[symbols]
    if plan.predict == "full":
        return _merge_full(plan, symbols, remainders, levels(plan, scales, first, len(symbols)))
    predicted = _predicted(plan, reference, scales, first, len(symbols))
    return _merge_delta(plan, symbols, remainders, predicted)


def _split_full(plan: Plan, words: Words, level: Array | None) -> tuple[Array, Words, Array]:
    """Symbol 0 is the zero word; s > 0 is the high part less its level less base, plus one."""
    n_low = plan.dtype.mantissa_bits - plan.mantissa_bits
    top = plan.dtype.word_bits - 1
    symbols = (magnitude(words, plan.dtype) >> n_low).astype(np.int32)
    if level is not None:
        symbols -= (level >> 3).astype(np.int32) << plan.mantissa_bits
    symbols -= plan.base  # now one less than the symbol, so that one comparison checks both ends
    is_zero = words == 0
    fits = (symbols.view(np.uint32) < plan.n_symbols - 1) | is_zero
    sign = words >> top
    remainders = words & words.dtype.type((1 << n_low) - 1)
    if plan.has_sign:
        remainders |= sign << n_low
    else:
        fits &= sign == 0
    coded = (symbols + 1).astype(np.uint8)
    coded[is_zero] = 0
    return coded, remainders, fits


def _merge_full(plan: Plan, symbols: Array, remainders: Words, level: Array | None) -> Words:
    n_low = plan.dtype.mantissa_bits - plan.mantissa_bits
    high = symbols.astype(np.int32) + (plan.base - 1)
    if level is not None:
        high += (level >> 3).astype(np.int32) << plan.mantissa_bits
    high &= (1 << (plan.dtype.exponent_bits + plan.mantissa_bits)) - 1  # what a damaged stream may exceed
    word_type = plan.dtype.word_dtype.type
    words = high.astype(plan.dtype.word_dtype) << n_low
    words |= remainders & word_type((1 << n_low) - 1)
    if plan.has_sign:
        words |= remainders >> n_low << (plan.dtype.word_bits - 1)
    words[symbols == 0] = 0
    return words


def _predicted(plan: Plan, reference: Words | None, scales: Scales, first: int, n_words: int) -> Words:
    """What a delta is taken from, as an ordered integer. Without a reference: the integer 0."""
    if reference is None:
        return np.full(n_words, ordered(np.zeros(1, plan.dtype.word_dtype), plan.dtype)[0])
    if plan.predict == "scaled_delta":
        rows, columns = scales.table(plan.n_columns, first, n_words)
        factors = rows.astype(np.uint32)
        factors = factors << np.uint32(FACTOR_BITS) if columns is None else factors * columns
        reference = scale_words(reference, factors, plan.dtype)
    return ordered(reference, plan.dtype)


def _split_delta(plan: Plan, words: Words, predicted: Words) -> tuple[Array, Words, Array]:
    """Symbol 0: no difference; s > 0: a difference of s + base bits. Remainder: its low bits, the sign above them."""
    one = words.dtype.type(1)
    difference = ordered(words, plan.dtype) - predicted
    sign = difference >> (plan.dtype.word_bits - 1)
    size = np.where(sign, ~difference + one, difference)
    length = bit_length(size)
    symbols = length - np.uint8(plan.base)
    fits = (length == 0) | (symbols - np.uint8(1) < plan.n_symbols - 1)
    symbols[length == 0] = 0
    # The leading one of size gives way to the sign: it stays where the difference is negative.
    leading = (sign ^ one) << np.maximum(length, np.uint8(1)) - np.uint8(1)
    return symbols, size & ~leading, fits


def _merge_delta(plan: Plan, symbols: Array, remainders: Words, predicted: Words) -> Words:
    one = remainders.dtype.type(1)
    below = np.where(symbols == 0, np.uint8(0), symbols + np.uint8(plan.base) - np.uint8(1)).astype(np.uint8)
    leading = one << below
    size = remainders | leading
    is_negative = (remainders & leading) != 0
    difference = np.where(is_negative, ~size + one, size)
    difference[symbols == 0] = 0
    return unordered(predicted + difference, plan.dtype)


def scale_words(words: Words, factors: Array, dtype: DType) -> Words:
    """Multiply floats by factors with integers only; the sign, zeros, subnormals, infinities and NaNs stay.

    words: uint[n]. factors: uint32[n], fixed-point, one = 2^30. The product's mantissa is cut, not rounded; below
    the normal range it becomes zero, above it the largest finite magnitude. FORMAT.md, "scaled delta".
    """
    m = dtype.mantissa_bits
    word_type = dtype.word_dtype.type
    body = magnitude(words, dtype)
    field_ = (body >> m).astype(np.int32)
    largest_field = (1 << dtype.exponent_bits) - 1
    significand = (body & word_type((1 << m) - 1) | word_type(1 << m)).astype(np.uint64)
    wide = factors.astype(np.uint64)
    if m > 31:  # 53 x 32 bits: the low 24 bits apart, so that nothing passes 2^64
        low = np.uint64((1 << 24) - 1)
        product = (significand >> np.uint64(24)) * wide + ((significand & low) * wide >> np.uint64(24))
        point = m + 2 * FACTOR_BITS - 24
    else:
        product = significand * wide
        point = m + 2 * FACTOR_BITS
    # Normalise: bring the leading one to bit m.
    length = bit_length(product).astype(np.int32)
    down = np.clip(length - 1 - m, 0, 63).astype(np.uint64)
    up = np.clip(m + 1 - length, 0, 63).astype(np.uint64)
    mantissa = (product >> down << up) & np.uint64((1 << m) - 1)
    new_field = field_ + (length - 1 - point)
    scaled = (np.clip(new_field, 0, largest_field).astype(np.uint64) << np.uint64(m) | mantissa).astype(words.dtype)
    scaled = np.where((new_field < 1) | (length == 0), word_type(0), scaled)
    scaled = np.where(new_field >= largest_field, word_type((largest_field << m) - 1), scaled)
    is_kept = (field_ == 0) | (field_ == largest_field)
    return np.where(is_kept, words, (words ^ body) | scaled)
