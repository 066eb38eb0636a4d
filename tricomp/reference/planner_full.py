"""The planner of `full`: its row and column scales, k, phases, and how its remainders are packed.

Imports numpy, dtypes, plan and the stages. The hard thing: k, phases and split are chosen together, from one histogram
of the sample for each split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Scales, Tables
from tricomp.plan import MAX_MANTISSA_BITS, MAX_PHASE_BITS, MAX_SYMBOLS, MAX_TABLE_ENTRIES, Plan, Spec
from tricomp.reference.bits import magnitude, trailing_zeros
from tricomp.reference.entropy import normalise
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
    table_bits,
    vector_bits,
    with_entropy,
)
from tricomp.reference.lanes import ROW

Array = np.ndarray[Any, Any]


def full_choice(words: Words, sample: Sample, blank: Plan, shape: Sequence[int] | None, spec: Spec) -> Choice:
    """`full` without a scale model and with each split, at the best k and phases."""
    dtype = blank.dtype
    is_zero = sample.words == 0
    has_sign = bool(np.count_nonzero(sample.words >> (dtype.word_bits - 1)) > 1e-3 * sample.words.size)
    blank = replace(blank, predict="full", has_sign=has_sign)
    k_most = min(MAX_MANTISSA_BITS, dtype.mantissa_bits)
    high = (magnitude(sample.words, dtype) >> (dtype.mantissa_bits - k_most)).astype(np.int32)
    best = _best_full(high, None, is_zero, k_most, 0.0, blank, spec)
    scales = Scales()
    for n_columns, has_column_scale in splits(shape, len(words)):
        fitted = fit_scales(words, dtype, n_columns, has_column_scale)
        level = _sampled_levels(fitted, n_columns, sample.firsts, sample.words.shape[1])
        side_bits = vector_bits(fitted.rows) + vector_bits(fitted.columns)
        plan = replace(blank, n_columns=n_columns, has_column_scale=has_column_scale)
        scaled = _best_full(high, level, is_zero, k_most, side_bits, plan, spec)
        if scaled[0] < best[0]:
            best, scales = scaled, fitted
    bits, plan, tables = best
    packed_bits, plan, plane_tables = _packing(words, sample, plan, is_zero, spec)
    side = side_of(plan, tables, scales)
    return Choice(bits + packed_bits, plan, replace(side, plane_tables=plane_tables))


@dataclass(frozen=True)
class _Window:
    """A window of symbols: their bits per word, the width of an index or 0, counts or dictionary, its place."""

    bits: float
    index_bits: int
    tables: Array
    base: int
    n_symbols: int


def _best_full(
    high: Array, level: Array | None, is_zero: Array, k_most: int, side_bits: float, plan: Plan, spec: Spec
) -> tuple[float, Plan, Array]:
    """The best k and phases for one split. Bits are those of the symbols less k, so that every k compares."""
    finest = high if level is None else high - ((level >> 3) << k_most)
    phase = np.zeros(high.shape, np.int32) if level is None else level & 7
    phase_most = 0 if level is None or spec.tier == "fast" else MAX_PHASE_BITS
    low, width = int(finest.min()), int(finest.max()) - int(finest.min()) + 1
    places = (phase * width + (finest - low))[~is_zero]
    grid = np.bincount(places, minlength=8 * width).reshape(8, width)
    zeros = np.bincount(phase[is_zero], minlength=8)
    best: tuple[float, int, int, _Window] | None = None
    for k in range(k_most + 1):
        coarse, base = _coarsen(grid, low, k_most - k)
        for phase_bits in range(phase_most + 1):
            merged = coarse.reshape(1 << phase_bits, 8 >> phase_bits, -1).sum(axis=1)
            merged_zeros = zeros.reshape(1 << phase_bits, 8 >> phase_bits).sum(axis=1)
            window = _window(merged, base, merged_zeros, side_bits, plan, spec)
            if best is None or window.bits - k < best[0]:
                best = window.bits - k, k, 1 << phase_bits, window
    assert best is not None
    bits, k, n_contexts, window = best
    changes = {"mantissa_bits": k, "n_contexts": n_contexts, "base": window.base, "n_symbols": window.n_symbols}
    return bits, with_entropy(plan, window.index_bits, **changes), window.tables


def _coarsen(grid: Array, low: int, drop: int) -> tuple[Array, int]:
    """Counts with the lowest `drop` bits of the symbol merged, and the symbol of the first column."""
    base = low >> drop
    places = ((low + np.arange(grid.shape[1])) >> drop) - base
    out = np.zeros((8, int(places[-1]) + 1), np.int64)
    for row, counts in zip(out, grid, strict=True):
        np.add.at(row, places, counts)
    return out, base


def _window(counts: Array, base: int, zeros: Array, side_bits: float, plan: Plan, spec: Spec) -> _Window:
    """Fit the counted values into a window of symbols; what falls outside is patched. Symbol 0: the zero word.

    counts: int64[n_contexts, n_values] of the words that are not zero. zeros: int64[n_contexts].
    """
    n_contexts = len(counts)
    total = counts.sum(axis=0)
    first, last = densest(total, min(MAX_SYMBOLS, MAX_TABLE_ENTRIES // n_contexts) - 1)
    table = np.zeros((n_contexts, last - first + 1), np.int64)
    table[:, 1:] = counts[:, first:last]
    n_zeros = int(zeros.sum())
    n_sampled = int(total.sum()) + n_zeros
    share = 1 - (int(table.sum()) + n_zeros) / n_sampled
    # Where there are zeros, a phase without one in the sample may meet one yet.
    table[:, 0] = np.maximum(zeros, min(n_zeros, 1))
    bits, index_bits, tables = symbol_cost(table, side_bits, plan, spec)
    return _Window(bits + patch_bits(plan.dtype, share), index_bits, tables, base + first, last - first + 1)


def _octaves(words: Words, dtype: DType) -> Array:
    """Magnitude in eighths of an octave, as the scale model counts them; int32[...]."""
    if dtype.mantissa_bits >= 3:
        return (magnitude(words, dtype) >> (dtype.mantissa_bits - 3)).astype(np.int32)
    return magnitude(words, dtype).astype(np.int32) << (3 - dtype.mantissa_bits)


def _means(values: Array, is_counted: Array, axis: int) -> Array:
    """Mean of the counted values along an axis, rounded down; -1 where nothing counts. Integers only."""
    sums = np.where(is_counted, values, 0).sum(axis=axis, dtype=np.int64)
    counts = np.count_nonzero(is_counted, axis=axis)
    return np.where(counts > 0, (2 * sums + counts) // np.maximum(2 * counts, 1), -1)


def fit_scales(words: Words, dtype: DType, n_columns: int, has_column_scale: bool) -> Scales:
    """Row and column scales of a frame, in eighths of an octave: means over the nonzero words of a lattice."""
    n_whole = len(words) // n_columns
    grid = words[: n_whole * n_columns].reshape(n_whole, n_columns)
    step = -(-n_columns // FIT_COLUMNS)
    thin = grid[:, ::step]
    rows = in_blocks(n_whole, thin.shape[1], lambda part: _means(_octaves(thin[part], dtype), thin[part] != 0, 1))
    if n_whole * n_columns < len(words):
        tail = words[None, n_whole * n_columns :]
        rows = np.append(rows, _means(_octaves(tail, dtype), tail != 0, 1))
    known = rows[rows >= 0]
    typical = int(np.median(known)) if len(known) else 0
    rows = np.where(rows < 0, typical, rows)
    if not has_column_scale:
        return Scales(rows.astype(np.int16), None)
    few = grid[:: -(-n_whole // FIT_ROWS)]
    levels = rows[:n_whole][:: -(-n_whole // FIT_ROWS), None]

    def offsets(part: slice) -> Array:
        some = few[:, part]
        sums = np.where(some != 0, _octaves(some, dtype) - levels, 0).sum(axis=0, dtype=np.int64)
        counts = np.count_nonzero(some, axis=0)
        return np.where(counts > 0, (2 * sums + counts) // np.maximum(2 * counts, 1), 0)

    columns = in_blocks(n_columns, len(few), offsets)
    return Scales(rows.astype(np.int16), columns.astype(np.int16))


def _sampled_levels(scales: Scales, n_columns: int, firsts: Array, width: int) -> Array:
    """L = R + C at the sampled positions, int32[n_rows, width]."""
    positions = firsts[:, None] + np.arange(width)
    level = scales.rows.astype(np.int32)[positions // n_columns]
    if scales.columns is not None:
        level = level + scales.columns.astype(np.int32)[positions % n_columns]
    return level


def _packing(
    words: Words, sample: Sample, plan: Plan, is_zero: Array, spec: Spec
) -> tuple[float, Plan, dict[int, Tables]]:
    """Byte planes or a stack for the remainders of `full`, by bits per word. Adds k back: the caller took it off."""
    dtype = plan.dtype
    n_bits = plan.remainder_bits
    k = plan.mantissa_bits
    if n_bits == 0:
        return float(k), plan, {}
    n_low = dtype.mantissa_bits - k
    low_mask = words.dtype.type((1 << n_low) - 1)
    by_row = np.bitwise_or.reduce(sample.words & low_mask, axis=1)
    shift = min(int(trailing_zeros(np.bitwise_or.reduce(by_row)[None])[0]), n_low)
    if shift:  # what the sample suggests must hold for every word
        joined = np.bitwise_or.reduce(words) & low_mask
        shift = min(int(trailing_zeros(joined[None])[0]), n_low)
    # Planes.
    low = sample.words & low_mask
    if plan.has_sign:
        low = low | (sample.words >> (dtype.word_bits - 1)) << n_low
    planes = replace(plan, remainder="planes", shift=shift)
    plane_bits = 0.0
    plane_tables: dict[int, Tables] = {}
    states = STATE_BITS * plan.n_chunks / plan.n_words
    for plane, width in enumerate(planes.plane_widths):
        octets = (low >> (shift + 8 * plane)).astype(np.uint8) & np.uint8((1 << width) - 1)
        counts = np.bincount(octets.reshape(-1), minlength=1 << width)
        entropy = entropy_bits(counts[None]) / octets.size + table_bits(counts) / plan.n_words + states
        if spec.tier == "dense" and entropy < width - 0.03:
            # One count for all, so that a byte which the sample missed can still be coded.
            plane_tables[plane] = Tables(normalise(counts * 4 + 1, plan.prob_bits)[None], plan.prob_bits)
            entropy += 0.01
            planes = replace(planes, coded_planes=planes.coded_planes | 1 << plane)
        plane_bits += min(entropy, width) if plane in plane_tables else width
    # Stack.
    saved = float(np.minimum(trailing_zeros(by_row), n_low).mean())
    zero_share = np.count_nonzero(is_zero) / is_zero.size
    has_block_shifts = saved - 8 / ROW > 0.02
    stack_bits = (1 - zero_share) * (n_bits - (saved if has_block_shifts else 0)) + states
    stack_bits += 8 / ROW if has_block_shifts else 0
    if stack_bits < plane_bits - 0.01:
        return stack_bits + k, replace(plan, remainder="stack", has_block_shifts=has_block_shifts), {}
    return plane_bits + k, planes, plane_tables
