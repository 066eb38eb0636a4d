"""The planner of `delta` and `scaled delta`: the sign's place, contexts, k, and factors.

Imports numpy, dtypes, plan and the stages. The hard thing: the factor that codes best is no mean. The ratio of two
second moments is skewed, and words that took no gradient have decayed by exactly the same factor: it must be met to
the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Scales, Side
from tricomp.plan import MAX_SYMBOLS, MAX_TABLE_ENTRIES, Plan, Spec
from tricomp.reference.bits import bit_length, exponent, magnitude, trailing_zeros
from tricomp.reference.estimate import (
    SIMPLER_BITS,
    STATE_BITS,
    Choice,
    Sample,
    block_columns,
    densest,
    entropy_bits,
    in_blocks,
    splits,
    symbol_cost,
    vector_bits,
    with_symbols,
)
from tricomp.reference.lanes import ROW
from tricomp.reference.predict import FACTOR_BITS, difference, factors, scale_words, size_codes

Array = np.ndarray[Any, Any]

DELTA_K_MOST = 3  # most bits below the leading one that a delta's symbol may hold
EXPONENTS = 16  # of the prediction that contexts are made of, the last one at TOP_PERCENT of the words
TOP_PERCENT = 97
TOP_STEP = 4  # rows of the thin sample of which one is looked at for that
WINDOWS = ((8, 0), (8, 1), (4, 1), (4, 0))  # contexts, and log2 of the exponents in one
PROBE_ROWS, PROBE_COLUMNS = 64, 16
DECAY_BITS = 0.03  # what a factor must save where numbers have signs
RATIO_LOW, RATIO_HIGH = 0.26, 3.9
FIT_COLUMNS, FIT_ROWS, FIT_WORDS = 64, 512, 1 << 16
FIT_BLOCK = 8  # columns that a row's factor is measured on stand in blocks of so many


@dataclass(frozen=True)
class _Fit:
    """bits: per word, remainders included. window: contexts, first exponent, log2 of the exponents in a context."""

    bits: float
    plan: Plan
    n_contexts: int
    context_base: int
    context_shift: int


def delta_choice(reference: Words | None, sample: Sample, blank: Plan, spec: Spec) -> Choice:
    """`delta` from the reference, or from zero for integers."""
    plan = replace(blank, predict="delta", reference="none" if reference is None else "parent", remainder="stack")
    thin = sample.thin()
    predicted = np.zeros_like(thin.words) if reference is None else thin.reference
    assert predicted is not None
    fit = _best_delta(thin, predicted, plan, 0.0, spec)
    shift_bits, plan = _delta_shifts(thin.words, predicted, fit.plan)

    def finish() -> tuple[Plan, Side]:
        counted = sample.counted(fit.n_contexts)
        predicted = np.zeros_like(counted.words) if reference is None else counted.reference
        assert predicted is not None
        return _finished(fit, plan, counted, predicted, Scales(), spec)

    return Choice(fit.bits - shift_bits, finish)


def _delta_shifts(words: Words, predicted: Words, plan: Plan) -> tuple[float, Plan]:
    """Bits per word that block shifts save, where the remainders of whole rows end in zeros. On the sample."""
    if words.shape[1] < ROW or plan.dtype.word_bits == 8:
        return 0.0, plan
    size, _ = difference(words, predicted, plan.dtype)
    length = bit_length(size).astype(np.int64)
    one = size.dtype.type(1)
    low = np.where(size > 0, size ^ one << np.maximum(length - 1, 0).astype(size.dtype), size)
    shifts = trailing_zeros(np.bitwise_or.reduce(low, axis=1)).astype(np.int64)
    # No word saves more bits than its remainder has: one that did not change saves none.
    n_low = np.maximum(length - 1 - plan.mantissa_bits, 0)
    saved = int(np.minimum(n_low, shifts[:, None]).sum()) / float(words.size) - 8.0 / ROW
    if saved < 0.5:
        return 0.0, plan
    return saved * 0.9, replace(plan, has_block_shifts=True)


def _best_delta(thin: Sample, predicted: Words, plan: Plan, side_bits: float, spec: Spec) -> _Fit:
    """The best place of the sign, then the best contexts, then the best k."""
    exponents = exponent(predicted[::TOP_STEP], plan.dtype)
    ordered = np.bincount(exponents.reshape(-1))
    end = int(np.searchsorted(np.cumsum(ordered), exponents.size * TOP_PERCENT // 100)) + 1
    counts = count_codes(thin.words, predicted, DELTA_K_MOST, EXPONENTS, end - EXPONENTS, 0, plan.dtype)
    is_dense = spec.tier == "dense"

    def fit(k: int, has_sign: bool, n_contexts: int, shift: int) -> _Fit:
        start = EXPONENTS - (n_contexts << shift)
        places = np.clip(np.arange(EXPONENTS) - start >> shift, 0, n_contexts - 1)
        merged = np.zeros((n_contexts, *counts.shape[1:]), np.int64)
        np.add.at(merged, places, counts)
        merged = merged.reshape(n_contexts, -1, 1 << (DELTA_K_MOST - k), 2).sum(axis=2)
        candidate = replace(plan, mantissa_bits=k, has_sign=has_sign)
        table, first, n_missed = _window(merged, has_sign)
        bits = symbol_cost(table, n_missed, side_bits, candidate, thin, spec)
        low_bits = int((table.sum(axis=0)[1:] * _low_bits(first, table.shape[1] - 1, candidate)).sum())
        bits += float(low_bits) / float(thin.words.size)
        base = end - EXPONENTS + start
        return _Fit(bits, candidate, n_contexts, base if n_contexts > 1 else 0, shift)

    best = fit(1 if is_dense else 0, True, 1, 0)
    if is_dense:
        best = min(best, fit(1, False, 1, 0), key=lambda one: one.bits)
        for window in WINDOWS:
            best = min(best, fit(1, best.plan.has_sign, *window), key=lambda one: one.bits)
        for k in (0, 2, 3):
            best = min(best, fit(k, best.plan.has_sign, best.n_contexts, best.context_shift), key=lambda one: one.bits)
        if best.plan.mantissa_bits > 1:  # eight contexts may lack the room for so many symbols
            for window in WINDOWS:
                best = min(best, fit(best.plan.mantissa_bits, best.plan.has_sign, *window), key=lambda one: one.bits)
    return replace(best, bits=best.bits + STATE_BITS * plan.n_chunks / float(plan.n_words))


def count_codes(words: Words, predicted: Words, k: int, n_contexts: int, base: int, shift: int, dtype: DType) -> Array:
    """Counts by context, size code at k, and sign: int64[n_contexts, (W + 1) << k, 2]."""
    size, sign = difference(words.reshape(-1), predicted.reshape(-1), dtype)
    codes = size_codes(size, k).astype(np.int64)
    place = np.clip(exponent(predicted.reshape(-1), dtype).astype(np.int64) - base >> shift, 0, n_contexts - 1)
    n_codes = (dtype.word_bits + 1) << k
    places = (place * n_codes + codes) * 2 + sign.astype(np.int64)
    return np.bincount(places, minlength=n_contexts * n_codes * 2).reshape(n_contexts, n_codes, 2)


def _window(counts: Array, has_sign: bool) -> tuple[Array, int, int]:
    """Fit the counted codes into a window of symbols: its table, its first code, and how many words lie outside.

    counts: int64[n_contexts, n_codes, 2]. Symbol 0: no difference.
    """
    n_contexts = len(counts)
    symbols = counts.sum(axis=2) if has_sign else counts.reshape(n_contexts, -1).copy()
    symbols[:, : 1 if has_sign else 2] = 0
    total = symbols.sum(axis=0)
    first, last = densest(total, min(MAX_SYMBOLS, MAX_TABLE_ENTRIES // n_contexts) - 1)
    first = max(first, 1)
    table = np.zeros((n_contexts, last - first + 1), np.int64)
    table[:, 0] = counts[:, 0].sum(axis=1)
    table[:, 1:] = symbols[:, first:last]
    return table, first, int(total.sum()) - int(total[first:last].sum())


def _low_bits(first: int, n: int, plan: Plan) -> Array:
    """Bits of the remainder of n symbols from code `first` on."""
    codes = np.arange(first, first + n)
    length = (codes if plan.has_sign else codes >> 1) >> plan.mantissa_bits
    return np.maximum(length - 1 - plan.mantissa_bits, 0) + plan.has_sign


def _finished(fit: _Fit, plan: Plan, sample: Sample, predicted: Words, scales: Scales, spec: Spec) -> tuple[Plan, Side]:
    """The plan and side, with tables counted on all of a sample. predicted: of its words."""
    contexts = fit.n_contexts, fit.context_base, fit.context_shift
    counts = count_codes(sample.words, predicted, plan.mantissa_bits, *contexts, plan.dtype)
    table, first, _ = _window(counts, plan.has_sign)
    changes = {"context_base": fit.context_base, "context_shift": fit.context_shift} if fit.n_contexts > 1 else {}
    plan, side = with_symbols(plan, table, sample, spec, base=first - 1, **changes)
    return plan, replace(side, scales=scales)


def scaled_delta_choice(
    words: Words, reference: Words, sample: Sample, blank: Plan, shape: Sequence[int] | None, spec: Spec
) -> Choice | None:
    """`scaled delta` with one factor for all, or with the best split's factors of rows and columns besides."""
    thin = sample.thin()
    assert thin.reference is not None
    plan = replace(blank, predict="scaled_delta", reference="parent", remainder="stack", n_columns=len(words))
    probe = slice(None, None, max(len(thin.firsts) // PROBE_ROWS, 1)), slice(None, PROBE_COLUMNS)
    new, old = thin.words[probe], thin.reference[probe]
    flat = np.full(new.shape, 1 << FACTOR_BITS, np.uint64)
    # Numbers of both signs change by what is added to them, not by what they are multiplied with, decay aside.
    n_negative = int(np.count_nonzero(new >> (blank.dtype.word_bits - 1)))
    has_signs = n_negative * 1000 > new.size
    common, fewest, plain = _best_factor(new, old, flat, plan.dtype, 3 if has_signs else 5, spec)
    if has_signs and fewest > plain - DECAY_BITS:
        return None
    unsplit = replace(plan, factor=common), Scales(np.full(1, 1 << FACTOR_BITS, np.uint16), None)
    best, cost = unsplit, fewest
    positions = thin.positions[probe]

    def try_split(n_columns: int, has_column_scale: bool, is_probed: bool) -> tuple[float, tuple[Plan, Scales]]:
        """Bits per word, and the split with its factors: of the probe's rows and columns alone, or of all."""
        some = _places(positions, n_columns, len(words) // n_columns, has_column_scale) if is_probed else None
        scales = fit_factors(words, reference, common, blank.dtype, n_columns, has_column_scale, some)
        side_bits = vector_bits(scales.rows, -(-len(words) // n_columns)) + vector_bits(scales.columns, n_columns)
        spread = spread_factors(scales, n_columns, positions, some)
        factor, bits, _ = _best_factor(new, old, spread, plan.dtype, 5, spec)
        split = replace(plan, n_columns=n_columns, has_column_scale=has_column_scale, factor=factor)
        return bits + side_bits / len(words), (split, scales)

    is_probed = len(words) > FIT_WORDS
    chosen = None
    for cut in [] if has_signs else splits(shape, len(words)):
        bits, split = try_split(*cut, is_probed)
        if bits < fewest:
            fewest, best, chosen = bits, split, cut
    if is_probed and chosen is not None:
        bits, split = try_split(*chosen, False)
        best = split if bits < cost else unsplit
    plan, scales = best
    side_bits = vector_bits(scales.rows) + vector_bits(scales.columns)
    fit = _best_delta(thin, _scaled(thin, plan, scales), plan, side_bits, spec)

    def finish() -> tuple[Plan, Side]:
        counted = sample.counted(fit.n_contexts)
        return _finished(fit, fit.plan, counted, _scaled(counted, plan, scales), scales, spec)

    return Choice(fit.bits + SIMPLER_BITS, finish)


def _places(positions: Array, n_columns: int, n_whole: int, has_column_scale: bool) -> tuple[Array, Array]:
    """Rows and columns of a split, ascending: those of some positions, and rows that columns are measured on."""
    fitted = np.arange(0, n_whole if has_column_scale else 0, _column_step(n_whole, n_columns))
    return np.union1d(positions // n_columns, fitted), np.unique(positions % n_columns)


def spread_factors(scales: Scales, n_columns: int, positions: Array, some: tuple[Array, Array] | None = None) -> Array:
    """Factors of row and column at some positions, one = 2^15; uint64[...]. some: rows and columns that scales has."""
    rows, columns = positions // n_columns, positions % n_columns
    if some is not None:
        rows, columns = np.searchsorted(some[0], rows), np.searchsorted(some[1], columns)
    spread = scales.rows.astype(np.uint64)[rows]
    if scales.columns is not None:
        spread = spread * scales.columns.astype(np.uint64)[columns] >> np.uint64(FACTOR_BITS)
    return spread


def _scaled(sample: Sample, plan: Plan, scales: Scales) -> Words:
    assert sample.reference is not None
    rows = scales.rows[sample.positions // plan.n_columns]
    columns = None if scales.columns is None else scales.columns[sample.positions % plan.n_columns]
    return scale_words(sample.reference, factors(plan.factor, rows, columns), plan.dtype)


def _ratios(new: Words, old: Words, dtype: DType) -> Array:
    """new / old as float32[...], of 24-bit significands; 0 where one is zero or special, or the signs differ."""
    m = dtype.mantissa_bits
    largest = (1 << dtype.exponent_bits) - 1
    sizes, fields = [], []
    for words in (new, old):
        body = magnitude(words, dtype)
        field = (body >> m).astype(np.int32)
        size = body & body.dtype.type((1 << m) - 1)
        size = (size >> (m - 23)) if m > 23 else size.astype(np.uint32) << (23 - m)
        sizes.append((size.astype(np.uint32) | np.uint32(1 << 23)).astype(np.float32))
        fields.append(field)
    is_normal = (fields[0] > 0) & (fields[1] > 0) & (fields[0] < largest) & (fields[1] < largest)
    is_normal &= (new ^ old) >> (dtype.word_bits - 1) == 0
    octaves = np.clip(fields[0] - fields[1], -30, 30)
    return np.where(is_normal, np.ldexp(sizes[0] / sizes[1], octaves), np.float32(0))


def _best_factor(
    new: Words, old: Words, spread: Array, dtype: DType, n_tried: int, spec: Spec
) -> tuple[int, float, float]:
    """The common factor with which the probed words cost least; that cost, and that of the factor one, in bits."""
    ratios = _ratios(new, old, dtype) * (np.float32(1 << FACTOR_BITS) / spread.astype(np.float32))
    known = np.sort(ratios[(ratios > np.float32(RATIO_LOW)) & (ratios < np.float32(RATIO_HIGH))])
    tried = [known[len(known) * (2 * i + 1) // (2 * n_tried)] for i in range(n_tried)] if len(known) else []
    if len(known) and spec.tier == "dense":
        # A power of the decay is a float32 number: what is nearest to it is met more often than anything else. An index
        # gains nothing from differences that are 0 alone.
        _, firsts, counts = np.unique(known.view(np.uint32) >> 6, return_index=True, return_counts=True)
        tried.append(known[firsts[np.argmax(counts)] + int(counts.max()) // 2])
    candidates = [1 << 30, *(int(float(ratio) * (1 << 30)) for ratio in tried)]
    rows = np.minimum(spread, np.uint64((1 << 16) - 1)).astype(np.uint16)
    costs = []
    for common in candidates:
        size, sign = difference(new, scale_words(old, factors(common, rows, None), dtype), dtype)
        length = bit_length(size).astype(np.int64)
        counts = np.bincount((length * 2 + sign.astype(np.int64)).reshape(-1))
        low_bits = int(np.maximum(length - 1, 0).sum())
        symbol_bits = entropy_bits(counts) if spec.tier == "dense" else 0.0  # an index costs the same for all
        costs.append((symbol_bits + low_bits) / float(new.size))
    best = costs.index(min(costs))
    return candidates[best], costs[best], costs[0]


def _column_step(n_whole: int, n_columns: int) -> int:
    """Rows of which the first is one that the factors of columns are measured on."""
    return -(-n_whole // min(max(FIT_WORDS // n_columns, 16), FIT_ROWS))


def fit_factors(
    words: Words,
    reference: Words,
    common: int,
    dtype: DType,
    n_columns: int,
    has_column_scale: bool,
    some: tuple[Array, Array] | None = None,
) -> Scales:
    """Row and column factors, beside the common one, from the reference to the words: medians over a lattice.

    some: the rows and columns to fit, ascending; else all of them.
    """
    n_whole = len(words) // n_columns
    grid = words[: n_whole * n_columns].reshape(n_whole, n_columns)
    old = reference[: n_whole * n_columns].reshape(n_whole, n_columns)
    unit = np.float32(1 << FACTOR_BITS) / (np.float32(common) / np.float32(1 << 30))

    def quotients(new: Words, ref: Words, unit: Any) -> Array:
        """Ratios as factors, one = 2^15, at most 2^16 - 1; 0 where there is none."""
        rounded = _ratios(new, ref, dtype) * unit + np.float32(0.5)
        return np.minimum(rounded, np.float32(65535)).astype(np.uint16)

    lattice = block_columns(n_columns, min(max(FIT_WORDS // n_whole, 16), FIT_COLUMNS) // FIT_BLOCK, FIT_BLOCK)
    has_tail = n_whole * n_columns < len(words) if some is None else bool(some[0][-1] == n_whole)
    chosen = np.arange(n_whole) if some is None else some[0][: len(some[0]) - has_tail]

    def row_middles(part: slice) -> Array:
        places = chosen[part, None], lattice
        return _medians(quotients(grid[places], old[places], unit), 1)

    rows = in_blocks(len(chosen), len(lattice), row_middles)
    if has_tail:
        tail = n_whole * n_columns + lattice[lattice < len(words) - n_whole * n_columns]
        rows = np.append(rows, _medians(quotients(words[None, tail], reference[None, tail], unit), 1))
    row_factors = _factor(rows)
    if not has_column_scale:
        return Scales(row_factors, None)
    step = _column_step(n_whole, n_columns)
    few, few_old = grid[::step], old[::step]
    if some is not None:
        few, few_old = few[:, some[1]], few_old[:, some[1]]
    is_fitted = chosen % step == 0
    units = unit * (np.float32(1 << FACTOR_BITS) / row_factors[: len(chosen), None][is_fitted].astype(np.float32))

    def column_middles(part: slice) -> Array:
        return _medians(quotients(few[:, part], few_old[:, part], units), 0)

    return Scales(row_factors, _factor(in_blocks(few.shape[1], len(few), column_middles)))


def _medians(values: Array, axis: int) -> Array:
    """Median along an axis of what is not zero, the lower one of two; one = 2^15 where nothing is left. int64[...]"""
    n = values.shape[axis]
    ordered = np.sort(values, axis=axis)
    counts = np.count_nonzero(values, axis=axis, keepdims=True)
    places = np.minimum(n - counts + np.maximum(counts - 1, 0) // 2, n - 1)
    middle = np.take_along_axis(ordered, places, axis)
    return np.where(counts > 0, middle, 1 << FACTOR_BITS).squeeze(axis).astype(np.int64)


def _factor(ratios: Array) -> Array:
    """Factors on a step of at most 255 values about one, so that their vector stays small."""
    one = 1 << FACTOR_BITS
    away = np.clip(ratios, 328, 65208) - one
    near = np.abs(away[np.abs(away) < one // 2])
    reach = int(near.max()) if len(near) else one // 2
    step = max(2 * reach // 255, 1)
    steps = (2 * away + step) // (2 * step)
    return np.clip(one + steps * step, 1, (1 << 16) - 1).astype(np.uint16)
