"""The planner of `delta` and `scaled delta`: k, the sign's place, contexts, and factors.

Imports numpy, dtypes, plan and the stages. The hard thing: the factor that codes best is no mean. The ratio of two
second moments is skewed, and words that took no gradient have decayed by exactly the same factor: it must be met to
the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Scales
from tricomp.plan import MAX_SYMBOLS, MAX_TABLE_ENTRIES, Plan, Spec
from tricomp.reference.bits import bit_length, exponent, magnitude, trailing_zeros
from tricomp.reference.estimate import (
    FIT_COLUMNS,
    FIT_ROWS,
    STATE_BITS,
    Choice,
    Sample,
    densest,
    entropy_bits,
    in_blocks,
    patch_bits,
    side_of,
    splits,
    symbol_cost,
    vector_bits,
    with_entropy,
)
from tricomp.reference.lanes import ROW
from tricomp.reference.predict import FACTOR_BITS, difference, factors, scale_words, size_codes

Array = np.ndarray[Any, Any]

FIT_WORDS = 1 << 17  # most words that a vector of factors is measured on, if that leaves 16 a row or column
MOST_EXPONENTS = 48  # that contexts are chosen among
DELTA_K_MOST = 3  # most bits below the leading one that a delta's symbol may hold
SHIFT_ROWS = 64  # rows of the sample on which the common factor of a scaled delta is searched


def delta_choice(reference: Words | None, sample: Sample, blank: Plan, spec: Spec) -> Choice:
    """`delta` from the reference, or from zero for integers."""
    plan = replace(blank, predict="delta", reference="none" if reference is None else "parent", remainder="stack")
    predicted = np.zeros_like(sample.words) if reference is None else sample.reference
    assert predicted is not None
    bits, plan, tables = _best_delta(sample.words, predicted, plan, 0.0, spec)
    shift_bits, plan = _delta_shifts(sample.words, predicted, plan)
    return Choice(bits - shift_bits, plan, side_of(plan, tables, Scales()))


def _delta_shifts(words: Words, predicted: Words, plan: Plan) -> tuple[float, Plan]:
    """Bits per word that block shifts save, where the remainders of whole rows end in zeros. On the sample."""
    if words.shape[1] < ROW or plan.dtype.word_bits == 8:
        return 0.0, plan
    size, _ = difference(words, predicted, plan.dtype)
    n_low = np.maximum(bit_length(size).astype(np.int64) - 1 - plan.mantissa_bits, 0)
    one = size.dtype.type(1)
    low = size & ((one << n_low.astype(size.dtype)) - one)
    shifts = trailing_zeros(np.bitwise_or.reduce(low, axis=1)).astype(np.int64)
    # No word saves more bits than its remainder has: one that did not change saves none.
    saved = float(np.minimum(n_low, shifts[:, None]).mean()) - 8 / ROW
    if saved < 0.5:
        return 0.0, plan
    return saved * 0.9, replace(plan, has_block_shifts=True)


def _best_delta(words: Words, predicted: Words, plan: Plan, side_bits: float, spec: Spec) -> tuple[float, Plan, Array]:
    """The best k, place of the sign, and window of contexts. Bits include the remainders."""
    counts, low = _delta_counts(words, predicted, plan.dtype)
    is_dense = spec.tier == "dense"
    best: tuple[float, Plan, Array] | None = None
    common = _usual_contexts(counts) if is_dense else [(1, 0, 0)]
    for k in range(DELTA_K_MOST + 1) if is_dense else (0,):
        for has_sign in (True, False) if is_dense else (True,):
            candidate = replace(plan, mantissa_bits=k, has_sign=has_sign)
            choice = _delta_choice(counts, low, candidate, common, side_bits, spec)
            if best is None or choice[0] < best[0]:
                best = choice
    assert best is not None
    if is_dense:
        refined = _delta_choice(counts, low, best[1], _context_windows(len(counts)), side_bits, spec)
        best = min(best, refined, key=lambda choice: choice[0])
    stack = STATE_BITS * plan.n_chunks / plan.n_words
    return best[0] + stack, best[1], best[2]


def _delta_counts(words: Words, predicted: Words, dtype: DType) -> tuple[Array, int]:
    """Counts by exponent of the prediction, size code at the finest k, and sign; and the first row's exponent.

    Returns int64[n_exponents, 66 << k, 2]. Exponents far from those of most words count with the nearest ones.
    """
    size, sign = difference(words.reshape(-1), predicted.reshape(-1), dtype)
    codes = size_codes(size, DELTA_K_MOST).astype(np.int64)
    context = exponent(predicted.reshape(-1), dtype).astype(np.int64)
    share = np.cumsum(np.bincount(context)) / len(context)
    high = int(np.searchsorted(share, 0.999)) + 3
    low = max(int(np.searchsorted(share, 0, side="right")), high - MOST_EXPONENTS + 1)
    n_rows, n_codes = min(high, int(context.max())) - low + 1, 66 << DELTA_K_MOST
    context = np.clip(context, low, low + n_rows - 1)
    places = ((context - low) * n_codes + codes) * 2 + sign.astype(np.int64)
    return np.bincount(places, minlength=n_rows * n_codes * 2).reshape(n_rows, n_codes, 2), low


def _delta_choice(
    counts: Array, low: int, plan: Plan, windows: list[tuple[int, int, int]], side_bits: float, spec: Spec
) -> tuple[float, Plan, Array]:
    """The best of some context windows at one k and place of the sign."""
    k, n_rows = plan.mantissa_bits, len(counts)
    by_code = counts.reshape(n_rows, -1, 1 << (DELTA_K_MOST - k), 2).sum(axis=2)
    length = np.arange(by_code.shape[1]) >> k
    n_low = np.maximum(length - 1 - k, 0) + (length > 0) * plan.has_sign
    n_zeros = by_code[:, 0].sum(axis=1)
    symbols = by_code.sum(axis=2) if plan.has_sign else by_code.reshape(n_rows, -1)
    symbols[:, : 1 if plan.has_sign else 2] = 0
    per_symbol = symbols.sum(axis=0)
    low_bits = per_symbol * (n_low if plan.has_sign else np.repeat(n_low, 2))
    n_sampled = int(counts.sum())
    best: tuple[float, int, Array] = (math.inf, 0, symbols)
    changes: dict[str, int] = {}
    for n_contexts, start, shift in windows:
        first, last = densest(per_symbol, min(MAX_SYMBOLS, MAX_TABLE_ENTRIES // n_contexts) - 1)
        first = max(first, 1)
        inside = per_symbol[first:last]
        share = 1 - (int(inside.sum()) + int(n_zeros.sum())) / n_sampled
        place = np.clip((np.arange(n_rows) - start) >> shift, 0, n_contexts - 1)
        table = np.zeros((n_contexts, last - first + 1), np.int64)
        np.add.at(table[:, 0], place, n_zeros)
        np.add.at(table[:, 1:], place, symbols[:, first:last])
        bits, index_bits, tables = symbol_cost(table, side_bits, plan, spec)
        bits += float(low_bits[first:last].sum()) / n_sampled + patch_bits(plan.dtype, share)
        if bits < best[0]:
            best = bits, index_bits, tables
            changes = {"base": first - 1, "n_symbols": last - first + 1, "n_contexts": n_contexts}
            if n_contexts > 1:
                changes |= {"context_base": low + start, "context_shift": shift}
    blank = replace(plan, context_base=0, context_shift=0)
    return best[0], with_entropy(blank, best[1], **changes), best[2]


def _usual_contexts(counts: Array) -> list[tuple[int, int, int]]:
    """No contexts, and eight that end at the exponents where 99.9 % of the words lie below."""
    by_row = counts.sum(axis=(1, 2))
    end = int(np.searchsorted(np.cumsum(by_row), 0.999 * by_row.sum())) + 1
    return [(1, 0, 0), (8, max(end - 8, 0), 0)]


def _context_windows(n_rows: int) -> list[tuple[int, int, int]]:
    """(contexts, first row, shift): windows that end near the top exponents, where most words are."""
    windows = [(1, 0, 0)]
    for n_contexts in (4, 8):
        for shift in (0, 1, 2):
            span = n_contexts << shift
            windows += [(n_contexts, max(end - span, 0), shift) for end in range(max(n_rows - 6, 1), n_rows + 1)]
    return list(dict.fromkeys(windows))


def scaled_delta_choice(
    words: Words, reference: Words, sample: Sample, blank: Plan, shape: Sequence[int] | None, spec: Spec
) -> Choice:
    """`scaled delta` with one factor for all, and with the best split's factors of rows and columns besides."""
    assert sample.reference is not None
    plan = replace(blank, predict="scaled_delta", reference="parent", remainder="stack", n_columns=len(words))
    thin = slice(None, None, max(len(sample.firsts) // SHIFT_ROWS, 1))
    new, old = sample.words[thin], sample.reference[thin]
    one = np.full(1, 1 << FACTOR_BITS, np.uint16)
    common, fewest = _best_factor(new, old, np.ones(1), plan, 13)
    best = replace(plan, factor=common), Scales(one, None)
    positions = sample.firsts[:, None] + np.arange(sample.words.shape[1])
    # Numbers of both signs change by what is added to them, not by what they are multiplied with, decay aside.
    has_signs = np.count_nonzero(new >> (blank.dtype.word_bits - 1)) > 1e-3 * new.size
    for n_columns, has_column_scale in [] if has_signs else splits(shape, len(words)):
        scales = fit_factors(words, reference, common, blank.dtype, n_columns, has_column_scale)
        split = replace(plan, n_columns=n_columns, has_column_scale=has_column_scale)
        places = positions[thin]
        spread = scales.rows[places // n_columns] / (1 << FACTOR_BITS)
        if scales.columns is not None:
            spread = spread * scales.columns[places % n_columns] / (1 << FACTOR_BITS)
        factor, bits = _best_factor(new, old, spread, split, 8)
        bits += (vector_bits(scales.rows) + vector_bits(scales.columns)) / plan.n_words
        if bits < fewest:
            fewest = bits
            best = replace(split, factor=factor), scales
    plan, scales = best
    rows = scales.rows[positions // plan.n_columns]
    columns = None if scales.columns is None else scales.columns[positions % plan.n_columns]
    predicted = scale_words(sample.reference, factors(plan.factor, rows, columns), plan.dtype)
    side_bits = vector_bits(scales.rows) + vector_bits(scales.columns)
    bits, plan, tables = _best_delta(sample.words, predicted, plan, side_bits, spec)
    return Choice(bits, plan, side_of(plan, tables, scales))


def _ratios(new: Words, old: Words, dtype: DType) -> Array:
    """new / old as float64[...]; NaN where one of them is zero or special, or the signs differ."""
    m = dtype.mantissa_bits
    largest = np.uint64((1 << dtype.exponent_bits) - 1)
    sizes, fields = [], []
    for words in (new, old):
        body = magnitude(words, dtype).astype(np.uint64)
        fields.append(body >> np.uint64(m))
        sizes.append((body & np.uint64((1 << m) - 1) | np.uint64(1 << m)).astype(np.float64))
    is_normal = (fields[0] > 0) & (fields[1] > 0) & (fields[0] < largest) & (fields[1] < largest)
    is_normal &= (new ^ old) >> (dtype.word_bits - 1) == 0
    octaves = np.clip(fields[0].astype(np.int64) - fields[1].astype(np.int64), -64, 64)
    return np.where(is_normal, np.ldexp(sizes[0] / sizes[1], octaves), np.nan)


def _best_factor(new: Words, old: Words, spread: Array, plan: Plan, n_tried: int) -> tuple[int, float]:
    """The common factor with which the sampled words cost least, and that cost in bits per word.

    spread: the row and column factors of each word as float64. The n_tried candidates are one, and quantiles of what
    remains: the mode of a skewed ratio is not its mean, and words that all decayed alike are met to the last bit.
    """
    ratios = _ratios(new, old, plan.dtype) / spread
    known = ratios[np.isfinite(ratios) & (ratios > 0.26) & (ratios < 3.9)]
    rows = (np.broadcast_to(spread, new.shape) * (1 << FACTOR_BITS)).astype(np.uint64)
    best = (1 << 30, math.inf)
    for ratio in (
        (1.0, *np.quantile(known, np.linspace(0.04, 0.96, n_tried - 1), method="nearest")) if len(known) else (1.0,)
    ):
        # A power of the decay is a float32 number: the nearest one is met more often than any other.
        common = round(float(np.float32(ratio)) * (1 << 30))
        predicted = scale_words(old, factors(common, rows, None), plan.dtype)
        counts, _ = _delta_counts(new, predicted, plan.dtype)
        by_sign = counts.reshape(len(counts), -1, 1 << DELTA_K_MOST, 2).sum(axis=2)
        by_length = by_sign.sum(axis=(0, 2))
        low_bits = float((by_length * np.maximum(np.arange(len(by_length)) - 1, 0)).sum())
        bits = (entropy_bits(by_sign.reshape(len(counts), -1)) + low_bits) / new.size
        best = min(best, (common, bits), key=lambda pair: pair[1])
    return best


def fit_factors(
    words: Words, reference: Words, common: int, dtype: DType, n_columns: int, has_column_scale: bool
) -> Scales:
    """Row and column factors, beside the common one, from the reference to the words: medians over a lattice."""
    n_whole = len(words) // n_columns
    grid = words[: n_whole * n_columns].reshape(n_whole, n_columns)
    old = reference[: n_whole * n_columns].reshape(n_whole, n_columns)
    whole = common / (1 << 30)
    step = -(-n_columns // min(max(FIT_WORDS // max(n_whole, 1), 16), FIT_COLUMNS))
    new, ref = grid[:, ::step], old[:, ::step]
    rows = in_blocks(n_whole, new.shape[1], lambda part: _medians(_ratios(new[part], ref[part], dtype) / whole, 1))
    if n_whole * n_columns < len(words):
        tail = _ratios(words[None, n_whole * n_columns :], reference[None, n_whole * n_columns :], dtype) / whole
        rows = np.append(rows, _medians(tail, 1))
    row_factors = _factor(rows)
    if not has_column_scale:
        return Scales(row_factors, None)
    step = -(-n_whole // min(max(FIT_WORDS // n_columns, 16), FIT_ROWS))
    few, few_old = grid[::step], old[::step]
    spread = row_factors[:n_whole][::step, None] / (1 << FACTOR_BITS)

    def middles(part: slice) -> Array:
        return _medians(_ratios(few[:, part], few_old[:, part], dtype) / whole / spread, 0)

    return Scales(row_factors, _factor(in_blocks(n_columns, len(few), middles)))


def _medians(values: Array, axis: int) -> Array:
    """Median along an axis of what is not NaN, the lower one of two; 1 where nothing is left."""
    ordered = np.sort(values, axis=axis)
    counts = np.count_nonzero(~np.isnan(values), axis=axis, keepdims=True)
    middle = np.take_along_axis(ordered, np.maximum(counts - 1, 0) // 2, axis=axis)
    return np.where(counts > 0, middle, 1.0).squeeze(axis)


def _factor(ratios: Array) -> Array:
    """Ratios as fixed-point factors, on a step of at most 255 values about one, so that their vector stays small."""
    away = np.clip(ratios, 0.01, 1.99) - 1
    near = away[np.abs(away) < 0.5]
    reach = float(np.abs(near).max()) if len(near) else 0.5
    step = max(int(2 * reach * (1 << FACTOR_BITS)) // 255, 1)
    steps = np.round(away * (1 << FACTOR_BITS) / step)
    return np.clip((1 << FACTOR_BITS) + steps * step, 1, (1 << 16) - 1).astype(np.uint16)
