"""Prediction stage, in numpy: words to (symbol, context, remainder) and back. Defines the bytes.

Imports numpy, dtypes, job, plan and bits only; integers only. The hard thing: every split must be undone exactly from
its symbols, the same contexts, and its remainders; a word that does not fit is flagged and stored whole as a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Scales
from tricomp.plan import Plan
from tricomp.reference.bits import bit_length, exponent, magnitude, ordered, unordered

Array = np.ndarray[Any, Any]

# Frozen since format 1: `scaled_delta` multiplies by factors of row and column, one = 2^15 each, and by the plan's
# factor for all, one = 2^30.
FACTOR_BITS = 15


@dataclass(frozen=True)
class Split:
    """Words taken apart. symbols, contexts: uint8[n]; remainders: uint[n]; is_patch: bool[n], words that do not fit.

    Where is_patch is set the symbol is 0 and the remainder means nothing. contexts is None when there is one.
    """

    symbols: Array
    contexts: Array | None
    remainders: Words
    is_patch: Array


@dataclass(frozen=True)
class Basis:
    """What both sides know of some words before their symbols. level: L = R + C of the scale model, int16[n], or None.

    predicted: uint[n], the words that a delta is taken from, or None.
    """

    level: Array | None = None
    predicted: Words | None = None


def spread(scales: Scales, n_columns: int, first: int, n_words: int) -> tuple[Array, Array | None]:
    """Rows and columns of the scales spread over words [first, first + n_words) of the split."""
    row, column = divmod(first, n_columns)
    n_rows = -(-(column + n_words) // n_columns)
    # A row may be far longer than what is asked for: only its words in the range are spread.
    counts = np.full(n_rows, n_columns)
    counts[0] -= column
    counts[-1] -= n_rows * n_columns - column - n_words
    rows = np.repeat(scales.rows[row : row + n_rows], counts)
    if scales.columns is None:
        return rows, None
    if n_rows <= 2:
        parts = scales.columns[column : column + n_words], scales.columns[: n_words - counts[0]]
        return rows, np.concatenate(parts)
    return rows, np.tile(scales.columns, n_rows)[column : column + n_words]


def basis(plan: Plan, reference: Words | None, scales: Scales, first: int, n_words: int) -> Basis:
    """The basis of the frame's words [first, first + n_words). reference: uint[n_words], theirs."""
    if plan.predict == "full" and plan.is_scaled:
        rows, columns = spread(scales, plan.n_columns, first, n_words)
        return Basis(level=rows if columns is None else rows + columns)
    if plan.predict == "delta":
        return Basis(predicted=np.zeros(n_words, plan.dtype.word_dtype) if reference is None else reference)
    if plan.predict == "scaled_delta":
        assert reference is not None
        rows, columns = spread(scales, plan.n_columns, first, n_words)
        return Basis(predicted=scale_words(reference, factors(plan.factor, rows, columns), plan.dtype))
    return Basis()


def factors(common: int, rows: Array, columns: Array | None) -> Array:
    """common x rows x columns, cut to 30 fractional bits, at most 2^32 - 1. rows, columns: uint16[n]. uint64[n]."""
    wide = rows.astype(np.uint64)
    wide = wide << np.uint64(FACTOR_BITS) if columns is None else wide * columns
    return np.minimum(wide * np.uint64(common) >> np.uint64(2 * FACTOR_BITS), np.uint64((1 << 32) - 1))


def contexts_of(plan: Plan, basis: Basis) -> Array | None:
    """The context of each word: the phase of its level, or its prediction's exponent in a window; None for one."""
    if plan.n_contexts == 1:
        return None
    if basis.level is not None:
        return (basis.level & 7).astype(np.uint8) >> np.uint8(3 - plan.phase_bits)
    assert basis.predicted is not None
    place = (exponent(basis.predicted, plan.dtype).astype(np.int16) - np.int16(plan.context_base)) >> plan.context_shift
    return np.clip(place, 0, plan.n_contexts - 1).astype(np.uint8)


@dataclass(frozen=True)
class Sizes:
    """What each symbol of a delta says of |d|. All [n_symbols].

    tops: its leading one and the k bits below, in place, as words. n_low: bits below those, uint8. is_negative: bool,
    where the sign is part of the symbol.
    """

    tops: Words
    n_low: Array
    is_negative: Array


def sizes(plan: Plan) -> Sizes:
    """The meaning of a delta's symbols: s + base = (bit length << k | next k bits), doubled plus sign if coded."""
    k = plan.mantissa_bits
    codes = np.arange(plan.n_symbols, dtype=np.int64) + plan.base
    is_negative = np.zeros(plan.n_symbols, np.bool_)
    if not plan.has_sign:
        is_negative = (codes & 1) != 0
        codes = codes >> 1
    length = np.minimum(codes >> k, plan.dtype.word_bits)  # what a damaged plan may exceed
    lead = (codes & (1 << k) - 1 | 1 << k).astype(np.uint64)
    up = np.maximum(length - 1 - k, 0).astype(np.uint64)
    down = np.maximum(k + 1 - length, 0).astype(np.uint64)
    tops = (lead << up >> down).astype(plan.dtype.word_dtype)
    tops[0], is_negative[0] = 0, False
    return Sizes(tops, up.astype(np.uint8), is_negative)


def symbol_bits(plan: Plan) -> Array:
    """Bits of the remainder that go with each symbol, uint8[n_symbols]."""
    if plan.predict == "full":
        lengths = np.full(plan.n_symbols, plan.remainder_bits, np.uint8)
    elif plan.predict in ("delta", "scaled_delta"):
        lengths = sizes(plan).n_low + np.uint8(plan.has_sign)
    else:
        return np.zeros(plan.n_symbols, np.uint8)
    lengths[0] = 0
    return lengths


def split(plan: Plan, words: Words, basis: Basis, palette: Words) -> Split:
    """Take words apart as the plan says. words: uint[n]. basis: theirs."""
    contexts = contexts_of(plan, basis)
    if plan.predict == "palette":
        found = np.searchsorted(palette, words).clip(max=len(palette) - 1)
        symbols, remainders, fits = found.astype(np.uint8), np.zeros(0, words.dtype), palette[found] == words
    elif plan.predict == "full":
        symbols, remainders, fits = _split_full(plan, words, basis.level)
    else:
        assert basis.predicted is not None
        symbols, remainders, fits = _split_delta(plan, words, basis.predicted)
    is_patch = ~fits
    if is_patch.any():
        symbols[is_patch] = 0
    return Split(symbols, contexts, remainders, is_patch)


def merge(plan: Plan, symbols: Array, remainders: Words, basis: Basis, palette: Words) -> Words:
    """Inverse of `split`, patches aside."""
    if plan.predict == "palette":
        return palette[symbols]
    if plan.predict == "full":
        return _merge_full(plan, symbols, remainders, basis.level)
    assert basis.predicted is not None
    return _merge_delta(plan, symbols, remainders, basis.predicted)


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


def difference(words: Words, predicted: Words, dtype: DType) -> tuple[Words, Words]:
    """The ordered difference: its size |d|, and its sign, 1 where negative. Both uint[n]."""
    change = ordered(words, dtype) - ordered(predicted, dtype)
    sign = change >> (dtype.word_bits - 1)
    fill = ~sign + sign.dtype.type(1)
    return (change ^ fill) - fill, sign


def size_codes(size: Words, k: int) -> Array:
    """bit length << k | the k bits below the leading one, of each |d|; int16[n]."""
    length = bit_length(size).astype(np.int16)
    if k == 0:
        return length
    up = np.maximum(np.int16(k + 1) - length, 0).astype(size.dtype)
    down = np.maximum(length - np.int16(k + 1), 0).astype(size.dtype)
    lead = (size << up >> down).astype(np.int16) & np.int16((1 << k) - 1)
    return length << k | lead


def _split_delta(plan: Plan, words: Words, predicted: Words) -> tuple[Array, Words, Array]:
    """Symbol 0: no difference; others as `sizes` says. Remainder: the bits of |d| below, the sign above them."""
    size, sign = difference(words, predicted, plan.dtype)
    codes = size_codes(size, plan.mantissa_bits)
    if not plan.has_sign:
        codes = codes << 1 | sign.astype(np.int16)
    places = codes - np.int16(plan.base)
    is_same = size == 0
    fits = is_same | (places > 0) & (places < plan.n_symbols)
    symbols = places.astype(np.uint8)
    symbols[is_same] = 0
    if not fits.all():
        symbols[~fits] = 0
    meaning = sizes(plan)
    remainders = size - meaning.tops[symbols]
    if plan.has_sign:
        remainders |= sign << meaning.n_low[symbols]
    return symbols, remainders, fits


def _merge_delta(plan: Plan, symbols: Array, remainders: Words, predicted: Words) -> Words:
    meaning = sizes(plan)
    one = remainders.dtype.type(1)
    size = meaning.tops[symbols]
    if plan.has_sign:
        n_low = meaning.n_low[symbols]
        sign = (remainders >> n_low) & one
        size |= remainders & ((one << n_low) - one)
    else:
        sign = meaning.is_negative.astype(remainders.dtype)[symbols]
        size |= remainders
    fill = ~sign + one
    return unordered(ordered(predicted, plan.dtype) + ((size ^ fill) - fill), plan.dtype)


def scale_words(words: Words, factors: Array, dtype: DType) -> Words:
    """Multiply floats by factors, with integers only; the sign, zeros, subnormals, infinities and NaNs stay.

    words: uint[n]. factors: uint64[n] below 2^32, one = 2^30. The product is rounded, halves up; below the normal
    range it becomes zero, above it the largest finite magnitude. FORMAT.md, "scaled delta".
    """
    m = dtype.mantissa_bits
    word_type = dtype.word_dtype.type
    body = magnitude(words, dtype)
    field_ = (body >> m).astype(np.int32)
    largest_field = (1 << dtype.exponent_bits) - 1
    significand = (body & word_type((1 << m) - 1) | word_type(1 << m)).astype(np.uint64)
    if m > 31:  # 53 x 32 bits: the low 24 bits apart, so that nothing passes 2^64
        low = np.uint64((1 << 24) - 1)
        product = (significand >> np.uint64(24)) * factors + ((significand & low) * factors >> np.uint64(24))
        point = m + 2 * FACTOR_BITS - 24
    else:
        product = significand * factors
        point = m + 2 * FACTOR_BITS
    # Bring the leading one to bit m, with the bit below what is cut rounding it; a carry reaches the exponent.
    # No product is shorter than the shortest factor makes it, so only the bits above that need looking at.
    sure = max(int(factors.min(initial=1 << 32)).bit_length() - 1 + point - 2 * FACTOR_BITS, 0)
    above = product >> np.uint64(sure)
    widest = int(factors.max(initial=0)).bit_length() + point + 1 - 2 * FACTOR_BITS  # of any product
    is_narrow = widest - sure <= 8
    length = (bit_length(above.astype(np.uint8) if is_narrow else above) + np.uint8(sure)).astype(np.int32)
    drop = length - (1 + m)
    if sure > m:
        down = drop.astype(np.uint64)
        rounded = product + (np.uint64(1) << down - np.uint64(1)) >> down
    else:
        down = np.clip(drop, 0, 63).astype(np.uint64)
        half = np.uint64(1) << down >> np.uint64(1)
        rounded = (product + half >> down) << np.clip(-drop, 0, 63).astype(np.uint64)
    new_field = field_ + (length - (1 + point))
    base = np.clip(new_field - 1, 0, largest_field).astype(np.uint64) << np.uint64(m)
    scaled = np.minimum(base + rounded, np.uint64((largest_field << m) - 1)).astype(words.dtype)
    scaled[(new_field < 1) | (above == 0)] = 0
    is_kept = (field_ == 0) | (field_ == largest_field)
    return np.where(is_kept, words, (words ^ body) | scaled)
