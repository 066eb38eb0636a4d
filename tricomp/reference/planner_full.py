"""The planner of `full`: its row and column scales, k, phases, and how its remainders are packed.

Imports numpy, dtypes, plan and the stages. The hard thing: scales are dear to measure, so a small lattice tells first
which split is worth it; then k and phases are chosen together, from one histogram of a thin sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Scales, Side, Tables
from tricomp.plan import MAX_MANTISSA_BITS, MAX_PHASE_BITS, MAX_SYMBOLS, MAX_TABLE_ENTRIES, Plan, Spec
from tricomp.reference.bits import magnitude, trailing_zeros
from tricomp.reference.entropy import normalise
from tricomp.reference.estimate import (
    LEARNING,
    PROB_BITS,
    SIMPLER_BITS,
    STATE_BITS,
    Choice,
    Sample,
    block_columns,
    densest,
    entropy_bits,
    in_blocks,
    lattice_columns,
    splits,
    symbol_cost,
    vector_bits,
    with_symbols,
)
from tricomp.reference.lanes import ROW

Array = np.ndarray[Any, Any]

LATTICE_RUNS = 16  # runs a row of the lattice that tells whether a split is worth it
LATTICE_WORDS = 4096
FIT_RUNS = 32  # runs that a row's scale is measured on,
FIT_BLOCKS, FIT_BLOCK = 16, 8  # or blocks of columns where runs would stand in a line of memory each
FIT_ROWS = 256  # most rows that a column's is measured on
PLANE_ROWS = 32  # of the sample, to twice as many, on which byte planes are weighed
PLANE_BITS = 0.03  # what coding a byte plane must save
SCALE_BITS = 5  # of one scale of a vector, roughly
NEAR_GAIN = 0.1  # splits that promise nearly as much as the best are all measured
HOPELESS_BITS = 4.0  # what no scales have been seen to save


def full_choice(
    words: Words, sample: Sample, blank: Plan, shape: Sequence[int] | None, spec: Spec, rival: float
) -> Choice:
    """`full` without a scale model or with the most promising split, at the best k and phases.

    rival: bits per word that another prediction costs; scales that cannot come below it are not tried.
    """
    dtype = blank.dtype
    thin = sample.thin()
    n_negative = int(np.count_nonzero(thin.words >> (dtype.word_bits - 1)))
    blank = replace(blank, predict="full", has_sign=n_negative * 1000 > thin.words.size)
    best = _best_full(thin, None, 0.0, blank, spec)
    scales = Scales()
    rest = float(blank.remainder_bits + blank.mantissa_bits)
    if best.bits + rest < rival + HOPELESS_BITS:
        least = max(SIMPLER_BITS, best.bits + rest - rival)
        gains = [(split_gain(words, dtype, *split), *split) for split in splits(shape, len(words))]
        first = max((gain for gain, *_ in gains), default=0.0)
        for gain, n_columns, has_column_scale in gains:
            if gain <= least or gain < first - NEAR_GAIN:
                continue
            fitted = fit_scales(words, dtype, n_columns, has_column_scale)
            plan = replace(blank, n_columns=n_columns, has_column_scale=has_column_scale)
            side_bits = vector_bits(fitted.rows) + vector_bits(fitted.columns)
            scaled = _best_full(thin, levels(fitted, plan.n_columns, thin.positions), side_bits, plan, spec)
            if scaled.bits < best.bits:
                best, scales = scaled, fitted
    packed_bits, plan = _packing(words, thin, best.plan, spec)
    return Choice(best.bits + packed_bits, lambda: _finished(plan, sample, scales, best.phase_bits, spec))


@dataclass(frozen=True)
class _Fit:
    """k and phases of one split. bits: per word of the symbols, less k, so that every k compares."""

    bits: float
    plan: Plan
    phase_bits: int


def _best_full(thin: Sample, level: Array | None, side_bits: float, plan: Plan, spec: Spec) -> _Fit:
    """The best k and phases for one split. level: L of the thin sample's words, int32, or None."""
    k_most = min(MAX_MANTISSA_BITS, plan.dtype.mantissa_bits)
    grid, zeros, low, n_outside = count_highs(thin.words, level, k_most, plan)
    has_phases = level is not None and spec.tier == "dense"
    best: _Fit | None = None
    for k in range(k_most + 1):
        coarse = _coarsen(grid, low, k_most - k)
        for phase_bits in (0, MAX_PHASE_BITS - 1, MAX_PHASE_BITS) if has_phases else (0,):
            candidate = replace(plan, mantissa_bits=k)
            table, _, n_missed = _window(_merged(coarse, phase_bits), _merged(zeros, phase_bits))
            bits = symbol_cost(table, n_outside + n_missed, side_bits, candidate, thin, spec) - k
            if best is None or bits < best.bits:
                best = _Fit(bits, candidate, phase_bits)
    assert best is not None
    return best


def count_highs(words: Words, level: Array | None, k: int, plan: Plan) -> tuple[Array, Array, int, int]:
    """Counts of the high parts at k, relative to their levels, by phase: int64[8, n]; of zeros by phase; the first
    high part; and how many words lie outside the densest octaves, where no window would reach.
    """
    dtype = plan.dtype
    is_zero = words == 0
    high = (magnitude(words, dtype) >> (dtype.mantissa_bits - k)).astype(np.int32)
    phase = np.zeros(high.shape, np.int32)
    if level is not None:
        high, phase = high - ((level >> 3) << k), level & 7
    zeros = np.bincount(phase[is_zero], minlength=8)
    high, phase = high[~is_zero], phase[~is_zero]
    if not len(high):
        return np.zeros((8, 1 << k), np.int64), zeros, 0, 0
    octave = int(high.min()) >> k
    octaves = np.bincount((high >> k) - octave)
    first, last = densest(octaves, MAX_SYMBOLS - 1)
    low, width = octave + first << k, last - first << k
    inside = (high >= low) & (high < low + width)
    counts = np.bincount(phase[inside] * width + (high[inside] - low), minlength=8 * width).reshape(8, width)
    return counts, zeros, low, len(high) - int(np.count_nonzero(inside))


def _coarsen(grid: Array, low: int, drop: int) -> Array:
    """Counts with the lowest `drop` bits of the symbol merged. low: a multiple of whole octaves."""
    assert low >> drop << drop == low
    return grid.reshape(8, -1, 1 << drop).sum(axis=2)


def _merged(counts: Array, phase_bits: int) -> Array:
    """Counts of 8 phases merged into fewer."""
    return counts.reshape(1 << phase_bits, 8 >> phase_bits, *counts.shape[1:]).sum(axis=1)


def _window(counts: Array, zeros: Array) -> tuple[Array, int, int]:
    """Fit the counted values into a window of symbols: its table, its first value, and how many words lie outside.

    counts: int64[n_contexts, n_values] of the words that are not zero. zeros: int64[n_contexts], of symbol 0.
    """
    n_contexts = len(counts)
    total = counts.sum(axis=0)
    first, last = densest(total, min(MAX_SYMBOLS, MAX_TABLE_ENTRIES // n_contexts) - 1)
    table = np.zeros((n_contexts, last - first + 1), np.int64)
    table[:, 1:] = counts[:, first:last]
    # Where there are zeros, a phase without one in the sample may meet one yet.
    table[:, 0] = np.maximum(zeros, min(int(zeros.sum()), 1))
    return table, first, int(total.sum()) - int(total[first:last].sum())


def _finished(plan: Plan, sample: Sample, scales: Scales, phase_bits: int, spec: Spec) -> tuple[Plan, Side]:
    """The plan and side, with tables counted on as much of the sample as they need."""
    counted = sample.counted(1 << phase_bits)
    level = levels(scales, plan.n_columns, counted.positions) if plan.is_scaled else None
    counts, zeros, low, _ = count_highs(counted.words, level, plan.mantissa_bits, plan)
    table, first, _ = _window(_merged(counts, phase_bits), _merged(zeros, phase_bits))
    plan, side = with_symbols(plan, table, counted, spec, base=low + first)
    plane_tables = {}
    for plane, width in enumerate(plan.plane_widths):
        if plan.coded_planes >> plane & 1:
            # One count for all, so that a byte which the sample missed can still be coded.
            counts = np.bincount(plane_octets(sample.words, plan, plane), minlength=1 << width)
            plane_tables[plane] = Tables(normalise(counts * 4 + 1, PROB_BITS)[None], PROB_BITS)
    return plan, replace(side, scales=scales, plane_tables=plane_tables)


def octaves_of(words: Words, dtype: DType) -> Array:
    """Magnitude in eighths of an octave, as the scale model counts them; int32[...]."""
    if dtype.mantissa_bits >= 3:
        return (magnitude(words, dtype) >> (dtype.mantissa_bits - 3)).astype(np.int32)
    return magnitude(words, dtype).astype(np.int32) << (3 - dtype.mantissa_bits)


def _mean(sums: Array, counts: Array, unknown: int) -> Array:
    """Rounded means; `unknown` where nothing was counted. Integers only."""
    return np.where(counts > 0, (2 * sums + counts) // np.maximum(2 * counts, 1), unknown)


def split_gain(words: Words, dtype: DType, n_columns: int, has_column_scale: bool) -> float:
    """Bits per word that scales of a split would save, by the magnitudes' entropy on a small lattice."""
    columns = lattice_columns(n_columns, LATTICE_RUNS)
    n_whole = len(words) // n_columns
    n_rows = min(n_whole, LATTICE_WORDS // len(columns))
    rows = np.arange(n_rows) * n_whole // n_rows
    lattice = words[: n_whole * n_columns].reshape(n_whole, n_columns)[rows[:, None], columns]
    is_counted = lattice != 0
    octaves = np.where(is_counted, octaves_of(lattice, dtype), 0).astype(np.int64)
    by_row = _mean(octaves.sum(axis=1), np.count_nonzero(is_counted, axis=1), 0)
    offsets = np.where(is_counted, octaves - by_row[:, None], 0)
    # Scales fit the words that they are made of better than others.
    unseen = 1.0 / len(columns) - 1.0 / n_columns
    if has_column_scale:
        by_column = _mean(offsets.sum(axis=0), np.count_nonzero(is_counted, axis=0), 0)
        offsets = offsets - by_column
        unseen += 1.0 / n_rows - 1.0 / n_whole
    before, after = octaves[is_counted], offsets[is_counted]
    if not len(before):
        return 0.0
    saved = entropy_bits(np.bincount(before)) - entropy_bits(np.bincount(after - after.min()))
    n_vector = -(-len(words) // n_columns) + (n_columns if has_column_scale else 0)
    return saved / lattice.size - LEARNING * unseen - float(SCALE_BITS * n_vector) / len(words)


def fit_scales(words: Words, dtype: DType, n_columns: int, has_column_scale: bool) -> Scales:
    """Row and column scales of a frame, in eighths of an octave: means over the nonzero words of a lattice."""
    n_whole = len(words) // n_columns
    grid = words[: n_whole * n_columns].reshape(n_whole, n_columns)
    if n_columns > 2 * FIT_RUNS * FIT_BLOCK:
        some = block_columns(n_columns, FIT_BLOCKS, FIT_BLOCK)
    else:
        some = lattice_columns(n_columns, FIT_RUNS)

    def means(part: Words) -> Array:
        octaves = np.where(part != 0, octaves_of(part, dtype), 0)
        return _mean(octaves.sum(axis=1, dtype=np.int64), np.count_nonzero(part, axis=1), -1)

    rows = in_blocks(n_whole, len(some), lambda part: means(grid[part][:, some]))
    if n_whole * n_columns < len(words):
        tail = words[n_whole * n_columns :]
        rows = np.append(rows, means(tail[None, some[some < len(tail)]]))
    known = np.sort(rows[rows >= 0])
    rows = np.where(rows < 0, known[(len(known) - 1) // 2] if len(known) else 0, rows)
    if not has_column_scale:
        return Scales(rows.astype(np.int16), None)
    step = -(-n_whole // FIT_ROWS)
    few = grid[::step]
    level = rows[:n_whole][::step, None]

    def offsets(part: slice) -> Array:
        is_counted = few[:, part] != 0
        sums = np.where(is_counted, octaves_of(few[:, part], dtype) - level, 0).sum(axis=0, dtype=np.int64)
        return _mean(sums, np.count_nonzero(is_counted, axis=0), 0)

    return Scales(rows.astype(np.int16), in_blocks(n_columns, len(few), offsets).astype(np.int16))


def levels(scales: Scales, n_columns: int, positions: Array) -> Array:
    """L = R + C at some positions of a frame, int32[...]."""
    level = scales.rows.astype(np.int32)[positions // n_columns]
    if scales.columns is not None:
        level = level + scales.columns.astype(np.int32)[positions % n_columns]
    return level


def plane_octets(words: Words, plan: Plan, plane: int) -> Array:
    """The octets of one byte plane; uint8[n]."""
    n_low = plan.dtype.mantissa_bits - plan.mantissa_bits
    low = words & words.dtype.type((1 << n_low) - 1)
    if plan.has_sign:
        low = low | (words >> (plan.dtype.word_bits - 1)) << n_low
    octets = (low >> (plan.shift + 8 * plane)).astype(np.uint8) & np.uint8((1 << plan.plane_widths[plane]) - 1)
    return octets.reshape(-1)


def _plane_bits(plan: Plan, thin: Sample, plane: int) -> float:
    """Bits per word of a byte plane, as rANS would code it."""
    some = thin.words[:: max(len(thin.firsts) // PLANE_ROWS, 1) - 1 | 1]
    counts = np.bincount(plane_octets(some, plan, plane))
    n_present = float(np.count_nonzero(counts))
    fixed = float(8 * (1 << plan.plane_widths[plane]) + STATE_BITS * plan.n_chunks) / plan.n_words
    return (entropy_bits(counts) + LEARNING * n_present) / some.size + fixed


def _packing(words: Words, thin: Sample, plan: Plan, spec: Spec) -> tuple[float, Plan]:
    """Byte planes or a stack for the remainders of `full`, by bits per word. Adds k back: the caller took it off."""
    n_bits = plan.remainder_bits
    k = float(plan.mantissa_bits)
    if n_bits == 0:
        return k, plan
    n_low = plan.dtype.mantissa_bits - plan.mantissa_bits
    low_mask = words.dtype.type((1 << n_low) - 1)
    by_row = np.bitwise_or.reduce(thin.words & low_mask, axis=1)
    shift = min(int(trailing_zeros(np.bitwise_or.reduce(by_row)[None])[0]), n_low)
    if shift:  # what the sample suggests must hold for every word
        joined = np.bitwise_or.reduce(words) & low_mask
        shift = min(int(trailing_zeros(joined[None])[0]), n_low)
    planes = replace(plan, remainder="planes", shift=shift)
    plane_bits = 0.0
    for plane, width in enumerate(planes.plane_widths):
        coded = _plane_bits(planes, thin, plane) + PLANE_BITS if spec.tier == "dense" else float(width)
        plane_bits += min(coded, float(width))
        if coded < width:
            planes = replace(planes, coded_planes=planes.coded_planes | 1 << plane)
    # Stack.
    n_rows = float(len(by_row))
    n_saved = int(np.minimum(trailing_zeros(by_row), n_low).sum())
    n_zeros = int(np.count_nonzero(thin.words == 0))
    has_block_shifts = n_saved / n_rows - 8.0 / ROW > SIMPLER_BITS
    width_bits = n_bits - n_saved / n_rows if has_block_shifts else float(n_bits)
    stack_bits = (1.0 - n_zeros / float(thin.words.size)) * width_bits
    stack_bits += STATE_BITS * plan.n_chunks / float(plan.n_words)
    stack_bits += 8.0 / ROW if has_block_shifts else 0.0
    if stack_bits < plane_bits - SIMPLER_BITS:
        return stack_bits + k, replace(plan, remainder="stack", has_block_shifts=has_block_shifts)
    return plane_bits + k, planes
