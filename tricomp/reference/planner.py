"""The planner: which prediction, contexts, scales and packing a frame gets, by estimated bits on a sample.

Imports numpy, dtypes, plan and the stages. The one part of the reference that may use floating point: whatever it
picks is recorded, and any choice decodes to the same words. The hard thing: the estimate must count what a choice
costs besides its symbols (tables, vectors, patches, states), or small leaves suffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.plan import MAX_MANTISSA_BITS, MAX_PHASE_BITS, MAX_SYMBOLS, MAX_TABLE_ENTRIES, Plan, Spec
from tricomp.reference.bits import exponent, magnitude, trailing_zeros
from tricomp.reference.encode import Job
from tricomp.reference.entropy import Tables, normalise
from tricomp.reference.lanes import ROW
from tricomp.reference.predict import FACTOR_BITS, Scales, difference, factors, scale_words, size_codes
from tricomp.reference.side import Side, vector_step

Array = np.ndarray[Any, Any]

SAMPLE_ROWS = 1024  # most rows of 128 words in a sample
LEAST_SAMPLE_ROWS = 256  # a frame of no more rows is its own sample; between them a quarter of the rows is taken
BLOCK_COLUMNS = 256  # the split of frames without two dimensions: a scale for every 256 words
FIT_COLUMNS = 128  # most columns that a row's scale is measured on
FIT_ROWS = 512  # most rows that a column's scale is measured on
STATE_BITS = 1024 + 192  # of one stream, with its part of the directory
FIT_WORDS = 1 << 17  # most words that a vector of factors is measured on, if that leaves 16 a row or column
PROB_BITS = 11
THIN_ROWS = 16  # every 16th row of the sample tells whether few distinct words are to be expected
HOPELESS_BITS = 1.5  # a delta that costs so much more than no reference is not tried with scales
DELTA_K_MOST = 3  # most bits below the leading one that a delta's symbol may hold
SHIFT_ROWS = 64  # rows of the sample on which the common factor of a scaled delta is searched


@dataclass(frozen=True)
class Choice:
    """A candidate: bits per word on the sample, all side information included, and what to encode with."""

    bits: float
    plan: Plan
    side: Side


@dataclass(frozen=True)
class Sample:
    """Rows of 128 words spread over a frame. first: position of each row; words, reference: uint[n_rows, 128]."""

    firsts: Array
    words: Words
    reference: Words | None


def sample_of(words: Words, reference: Words | None) -> Sample:
    """Rows at even distances, each shifted by a fixed scramble of its number, so that no column is preferred.

    The rule is the same for every backend. The last partial row of a frame is never part of it, unless it is all.
    """
    n_rows = len(words) // ROW
    if n_rows <= LEAST_SAMPLE_ROWS:
        n_words = max(n_rows * ROW, min(len(words), ROW))
        firsts = np.arange(0, n_words, ROW)
        width = min(len(words), ROW)
        cut = None if reference is None else reference[:n_words].reshape(-1, width)
        return Sample(firsts, words[:n_words].reshape(-1, width), cut)
    n_sampled = min(max(n_rows // 4, LEAST_SAMPLE_ROWS), SAMPLE_ROWS)
    numbers = np.arange(n_sampled)
    starts = numbers * n_rows // n_sampled
    gaps = (numbers + 1) * n_rows // n_sampled - starts
    chosen = starts + (numbers * 0x9E3779B1 >> 7) % gaps
    whole = words[: n_rows * ROW].reshape(-1, ROW)
    cut = None if reference is None else reference[: n_rows * ROW].reshape(-1, ROW)[chosen]
    return Sample(chosen * ROW, whole[chosen], cut)


def plan_frame(
    words: Words,
    reference: Words | None,
    dtype: DType,
    shape: Sequence[int] | None,
    spec: Spec,
    keep_mantissa_bits: int | None = None,
) -> Job:
    """Choose how to encode a frame. words, reference: uint[n]. shape: of the leaf; None for several small leaves."""
    blank = Plan(dtype, len(words), "raw", chunk_log2=spec.chunk_log2, keep_mantissa_bits=keep_mantissa_bits)
    exact = _exact(words, reference, blank)
    if exact is not None:
        return exact
    sample = sample_of(words, reference)
    choices = [Choice(float(dtype.word_bits), blank, Side())]
    choices += _sparse(words, reference, sample, blank)
    choices += _palette(sample, blank, spec)
    if dtype.is_float:
        choices += _full(words, sample, blank, shape, spec)
    else:
        choices += _delta(words, None, sample, blank, spec)
    if reference is not None:
        without = min(choice.bits for choice in choices)
        choices += _delta(words, reference, sample, blank, spec)
        if dtype.is_float and choices[-1].bits < without + HOPELESS_BITS:
            choices += _scaled_delta(words, reference, sample, blank, shape, spec)
    best = min(choices, key=lambda choice: choice.bits)
    return Job(best.plan, best.side, words, reference if best.plan.reference == "parent" else None)


def _exact(words: Words, reference: Words | None, blank: Plan) -> Job | None:
    """Constant or copy, if the whole frame is."""
    if len(words) == 0 or (words[0] == words[-1] and (words == words[0]).all()):
        return Job(replace(blank, predict="constant", word=int(words[0]) if len(words) else 0), Side(), words)
    if reference is not None and np.array_equal(words, reference):
        return Job(replace(blank, predict="copy", reference="parent"), Side(), words, reference)
    return None


def _patch_bits(plan: Plan, share: float) -> float:
    """Bits per word of patches, when this share of the words needs one."""
    return share * (16 + plan.dtype.word_bits)


def _sparse(words: Words, reference: Words | None, sample: Sample, blank: Plan) -> list[Choice]:
    """Few words differ from the reference, or from the commonest word."""
    overhead = 192 / min(len(words), 1 << blank.chunk_log2)
    values, counts = np.unique(sample.words[::THIN_ROWS], return_counts=True)
    commonest = values[np.argmax(counts)]
    choices = []
    if counts.max() > 0.5 * counts.sum():
        share = np.count_nonzero(words != commonest) / len(words)
        plan = replace(blank, predict="sparse", word=int(commonest))
        choices.append(Choice(_patch_bits(plan, share) + overhead, plan, Side()))
    if reference is not None and np.count_nonzero(sample.words != sample.reference) < 0.5 * sample.words.size:
        share = np.count_nonzero(words != reference) / len(words)
        plan = replace(blank, predict="sparse", reference="parent")
        choices.append(Choice(_patch_bits(plan, share) + overhead, plan, Side()))
    return choices


def _entropy(counts: Array) -> float:
    """Total bits of the counted symbols under their own frequencies, contexts along the first axes."""
    counts = counts.astype(np.float64)
    totals = counts.sum(axis=-1)
    logs = np.log2(np.where(counts > 0, counts, 1))
    return float((totals * np.log2(np.where(totals > 0, totals, 1))).sum() - (counts * logs).sum())


def _table_bits(counts: Array) -> float:
    """Bits of the frequency tables of the side section, roughly."""
    n_present = np.count_nonzero(counts)
    return 4.0 * counts.size + 4.5 * n_present


def _symbol_choice(counts: Array, extra_bits: float, plan: Plan, spec: Spec) -> tuple[float, Plan, Array]:
    """Bits per word of coding the counted symbols in the tier asked for, the completed plan, and its tables' counts.

    counts: int64[n_contexts, n_symbols] over the sample. extra_bits: per-frame cost of the choice besides.
    """
    n_sampled = int(counts.sum())
    n_chunks = max(plan.n_chunks, 1)
    if spec.tier == "fast":
        total = counts.sum(axis=0)
        order = np.argsort(-total, kind="stable")
        covered = np.cumsum(total[order]) / n_sampled
        best = (math.inf, 0)
        for index_bits in range(1, 9):
            share = 1 - covered[min(1 << index_bits, len(order)) - 1]
            best = min(best, (index_bits + _patch_bits(plan, share), index_bits))
        n_entries = min(1 << best[1], int(np.count_nonzero(total)))
        dictionary = np.sort(order[:n_entries])
        per_word = best[0] + (8 * n_entries + extra_bits) / plan.n_words
        return per_word, replace(plan, entropy="index", index_bits=best[1], n_contexts=1), dictionary
    fixed = _table_bits(counts) + extra_bits + STATE_BITS * n_chunks
    return _entropy(counts) / n_sampled + fixed / plan.n_words, replace(plan, entropy="rans"), counts


def _side_of(plan: Plan, tables: Array, scales: Scales, palette: Words | None = None) -> Side:
    palette = np.zeros(0, plan.dtype.word_dtype) if palette is None else palette
    if plan.entropy == "index":
        return Side(dictionary=tables.astype(np.uint8), scales=scales, palette=palette)
    freqs = np.stack([normalise(row, plan.prob_bits) for row in tables])
    return Side(Tables(freqs, plan.prob_bits), scales=scales, palette=palette)


def _palette(sample: Sample, blank: Plan, spec: Spec) -> list[Choice]:
    """At most 256 distinct words."""
    if len(np.unique(sample.words[::THIN_ROWS])) > MAX_SYMBOLS:
        return []
    words, counts = np.unique(sample.words, return_counts=True)
    if len(words) > MAX_SYMBOLS or len(words) > max(sample.words.size // 4, 2):
        return []
    plan = replace(blank, predict="palette", n_symbols=len(words))
    palette_bits = len(words) * blank.dtype.word_bits
    bits, plan, tables = _symbol_choice(counts[None], palette_bits, plan, spec)
    return [Choice(bits, plan, _side_of(plan, tables, Scales(), words))]


def _splits(shape: Sequence[int] | None, n_words: int) -> list[tuple[int, bool]]:
    """(columns, whether columns get a scale): every cut of the shape in two, and blocks of consecutive words."""
    cuts = []
    if shape is not None:
        for axis in range(1, len(shape)):
            n_columns = math.prod(shape[axis:])
            n_rows = n_words // max(n_columns, 1)
            if n_columns > 1 and n_rows > 1 and (n_columns, True) not in cuts:
                cuts.append((n_columns, True))
    if n_words >= 4 * BLOCK_COLUMNS:
        cuts.append((BLOCK_COLUMNS, False))
    return cuts


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
    rows = _means(_octaves(thin, dtype), thin != 0, 1)
    if n_whole * n_columns < len(words):
        tail = words[None, n_whole * n_columns :]
        rows = np.append(rows, _means(_octaves(tail, dtype), tail != 0, 1))
    known = rows[rows >= 0]
    typical = int(np.median(known)) if len(known) else 0
    rows = np.where(rows < 0, typical, rows)
    if not has_column_scale:
        return Scales(rows.astype(np.int16), None)
    thin = grid[:: -(-n_whole // FIT_ROWS)]
    relative = _octaves(thin, dtype) - rows[:n_whole][:: -(-n_whole // FIT_ROWS), None]
    sums = np.where(thin != 0, relative, 0).sum(axis=0, dtype=np.int64)
    counts = np.count_nonzero(thin, axis=0)
    columns = np.where(counts > 0, (2 * sums + counts) // np.maximum(2 * counts, 1), 0)
    return Scales(rows.astype(np.int16), columns.astype(np.int16))


def _vector_bits(values: Array | None) -> float:
    """Bits of a vector of the side section, roughly."""
    if values is None or len(values) == 0:
        return 0.0
    numbers = (values.astype(np.int64) - int(values.min())) // vector_step(values)
    width = int(numbers.max()).bit_length()
    packed = float(width * len(values))
    if width <= 8 and packed > 4096:
        packed = min(packed, _entropy(np.bincount(numbers)) + STATE_BITS + 1500)
    return 80 + packed


def _sampled_levels(scales: Scales, n_columns: int, firsts: Array, width: int) -> Array:
    """L = R + C at the sampled positions, int32[n_rows, width]."""
    positions = firsts[:, None] + np.arange(width)
    level = scales.rows.astype(np.int32)[positions // n_columns]
    if scales.columns is not None:
        level = level + scales.columns.astype(np.int32)[positions % n_columns]
    return level


def _full(words: Words, sample: Sample, blank: Plan, shape: Sequence[int] | None, spec: Spec) -> list[Choice]:
    """`full` without a scale model and with each split, at the best k and phases."""
    dtype = blank.dtype
    is_zero = sample.words == 0
    has_sign = bool(np.count_nonzero(sample.words >> (dtype.word_bits - 1)) > 1e-3 * sample.words.size)
    blank = replace(blank, predict="full", has_sign=has_sign)
    k_most = min(MAX_MANTISSA_BITS, dtype.mantissa_bits)
    high = (magnitude(sample.words, dtype) >> (dtype.mantissa_bits - k_most)).astype(np.int32)
    best = _best_full(high, None, is_zero, k_most, 0.0, blank, spec)
    scales = Scales()
    for n_columns, has_column_scale in _splits(shape, len(words)):
        fitted = fit_scales(words, dtype, n_columns, has_column_scale)
        level = _sampled_levels(fitted, n_columns, sample.firsts, sample.words.shape[1])
        side_bits = _vector_bits(fitted.rows) + _vector_bits(fitted.columns)
        plan = replace(blank, n_columns=n_columns, has_column_scale=has_column_scale)
        scaled = _best_full(high, level, is_zero, k_most, side_bits, plan, spec)
        if scaled[0] < best[0]:
            best, scales = scaled, fitted
    bits, plan, tables = best
    packed_bits, plan, plane_tables = _packing(words, sample, plan, is_zero, spec)
    side = _side_of(plan, tables, scales)
    return [Choice(bits + packed_bits, plan, replace(side, plane_tables=plane_tables))]


def _best_full(
    high: Array, level: Array | None, is_zero: Array, k_most: int, side_bits: float, plan: Plan, spec: Spec
) -> tuple[float, Plan, Array]:
    """The best k and phases for one split: bits of symbols alone (remainder bits are traded k for k)."""
    finest = high if level is None else high - ((level >> 3) << k_most)
    phase = np.zeros(high.shape, np.int32) if level is None else level & 7
    phase_most = 0 if level is None or spec.tier == "fast" else MAX_PHASE_BITS
    low, top = int(finest.min()), int(finest.max())
    counts = (
        np.bincount(((phase << 18) + (finest - low))[~is_zero], minlength=0)
        if top - low < 1 << 18
        else np.zeros(0, np.int64)
    )
    width = top - low + 1
    grid = np.zeros((8, width), np.int64)
    for p in range(8):
        part = counts[p << 18 : (p << 18) + width]
        grid[p, : len(part)] = part
    n_zeros = int(np.count_nonzero(is_zero))
    best: tuple[float, Plan, Array] | None = None
    for k in range(k_most + 1):
        coarse, base = _coarsen(grid, low, k_most - k)
        for phase_bits in range(phase_most + 1):
            n_phases = 1 << phase_bits
            merged = coarse.reshape(n_phases, 8 >> phase_bits, -1).sum(axis=1)
            choice = _window(
                merged, base, n_zeros, replace(plan, mantissa_bits=k, n_contexts=n_phases), side_bits, spec
            )
            if best is None or choice[0] - k < best[0] - best[1].mantissa_bits:
                best = choice
    assert best is not None
    return best[0] - best[1].mantissa_bits + 0.0, best[1], best[2]


def _coarsen(grid: Array, low: int, drop: int) -> tuple[Array, int]:
    """Counts with the lowest `drop` bits of the symbol merged, and the symbol of the first column."""
    base = low >> drop
    places = ((low + np.arange(grid.shape[1])) >> drop) - base
    out = np.zeros((8, int(places[-1]) + 1), np.int64)
    for row, counts in zip(out, grid, strict=True):
        np.add.at(row, places, counts)
    return out, base


def _window(
    counts: Array, base: int, n_zeros: int, plan: Plan, side_bits: float, spec: Spec
) -> tuple[float, Plan, Array]:
    """Fit the counted values into a window of symbols; what falls outside is patched. Symbol 0: the zero word."""
    n_contexts = len(counts)
    widest = min(MAX_SYMBOLS, MAX_TABLE_ENTRIES // n_contexts) - 1
    total = counts.sum(axis=0)
    used = np.flatnonzero(total)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    if last - first > widest:
        sums = np.concatenate([[0], np.cumsum(total)])
        inside = sums[widest:] - sums[:-widest]
        first = int(np.argmax(inside))
        last = first + widest
    window = counts[:, first:last]
    n_sampled = int(total.sum()) + n_zeros
    share = 1 - (int(window.sum()) + n_zeros) / n_sampled
    table = np.zeros((n_contexts, last - first + 1), np.int64)
    table[:, 1:] = window
    # A zero has a phase like any other word, but its count by phase is not kept: spread it evenly.
    table[:, 0] = -(-n_zeros // n_contexts)
    plan = replace(plan, base=base + first, n_symbols=last - first + 1)
    bits, plan, tables = _symbol_choice(table, side_bits, plan, spec)
    return bits + _patch_bits(plan, share), plan, tables


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
    joined = words & low_mask
    by_row = np.bitwise_or.reduce(joined[: len(words) // ROW * ROW].reshape(-1, ROW), axis=1)
    rest = np.bitwise_or.reduce(joined[len(words) // ROW * ROW :], initial=words.dtype.type(0))
    everything = np.bitwise_or.reduce(by_row, initial=rest)
    shift = min(int(trailing_zeros(everything[None])[0]), n_low)
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
        entropy = _entropy(counts[None]) / octets.size + _table_bits(counts) / plan.n_words + states
        if spec.tier == "dense" and entropy < width - 0.03:
            # One count for all, so that a byte which the sample missed can still be coded.
            plane_tables[plane] = Tables(normalise(counts * 4 + 1, PROB_BITS)[None], PROB_BITS)
            entropy += 0.01
            planes = replace(planes, coded_planes=planes.coded_planes | 1 << plane)
        plane_bits += min(entropy, width) if plane in plane_tables else width
    # Stack.
    shifts = np.minimum(trailing_zeros(by_row), n_low) if len(by_row) else np.zeros(1)
    saved = float(shifts.mean())
    zero_share = np.count_nonzero(is_zero) / is_zero.size
    has_block_shifts = saved - 8 / ROW > 0.02
    stack_bits = (1 - zero_share) * (n_bits - (saved if has_block_shifts else 0)) + states
    stack_bits += 8 / ROW if has_block_shifts else 0
    if stack_bits < plane_bits - 0.01:
        return stack_bits + k, replace(plan, remainder="stack", has_block_shifts=has_block_shifts), {}
    return plane_bits + k, planes, plane_tables


def _delta(words: Words, reference: Words | None, sample: Sample, blank: Plan, spec: Spec) -> list[Choice]:
    """`delta` from the reference, or from zero for integers."""
    plan = replace(blank, predict="delta", reference="none" if reference is None else "parent", remainder="stack")
    predicted = np.zeros_like(sample.words) if reference is None else sample.reference
    assert predicted is not None
    bits, plan, tables = _best_delta(sample.words, predicted, plan, 0.0, spec)
    shift_bits, plan = _delta_shifts(words, reference, plan)
    return [Choice(bits - shift_bits, plan, _side_of(plan, tables, Scales()))]


def _delta_shifts(words: Words, reference: Words | None, plan: Plan) -> tuple[float, Plan]:
    """Bits per word that block shifts save, when rows hold lower precision in both checkpoints."""
    n_whole = len(words) // ROW * ROW
    if n_whole == 0 or plan.dtype.word_bits == 8:
        return 0.0, plan
    joined = words[:n_whole] if reference is None else words[:n_whole] | reference[:n_whole]
    saved = float(trailing_zeros(np.bitwise_or.reduce(joined.reshape(-1, ROW), axis=1)).clip(max=32).mean()) - 8 / ROW
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

    Returns int64[n_exponents, 66 << k, 2].
    """
    size, sign = difference(words.reshape(-1), predicted.reshape(-1), dtype)
    codes = size_codes(size, DELTA_K_MOST).astype(np.int64)
    context = exponent(predicted.reshape(-1), dtype).astype(np.int64)
    low = int(context.min())
    n_rows, n_codes = int(context.max()) - low + 1, 66 << DELTA_K_MOST
    places = ((context - low) * n_codes + codes) * 2 + sign.astype(np.int64)
    return np.bincount(places, minlength=n_rows * n_codes * 2).reshape(n_rows, n_codes, 2), low


def _delta_choice(
    counts: Array, low: int, plan: Plan, windows: list[tuple[int, int, int]], side_bits: float, spec: Spec
) -> tuple[float, Plan, Array]:
    """The best of some context windows at one k and place of the sign."""
    k, n_rows = plan.mantissa_bits, len(counts)
    by_code = counts.reshape(n_rows, -1, 1 << (DELTA_K_MOST - k), 2).sum(axis=2)
    total = by_code.sum(axis=(0, 2))
    length = np.arange(len(total)) >> k
    n_low = np.maximum(length - 1 - k, 0) + (length > 0) * plan.has_sign
    n_zeros = by_code[:, 0].sum(axis=1)
    symbols = by_code.sum(axis=2) if plan.has_sign else by_code.reshape(n_rows, -1)
    symbols[:, : 1 if plan.has_sign else 2] = 0
    per_symbol = symbols.sum(axis=0)
    used = np.flatnonzero(per_symbol)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (1, 2)
    n_sampled = int(total.sum())
    best: tuple[float, Plan, Array] | None = None
    for n_contexts, start, shift in windows:
        widest = min(MAX_SYMBOLS, MAX_TABLE_ENTRIES // n_contexts) - 1
        if last - first > widest:
            sums = np.concatenate([[0], np.cumsum(per_symbol)])
            first = max(int(np.argmax(sums[widest:] - sums[:-widest])), 1)
            last = first + widest
        inside = np.zeros(len(per_symbol), np.bool_)
        inside[first:last] = True
        share = float(per_symbol[~inside].sum()) / n_sampled
        by_symbol = n_low if plan.has_sign else np.repeat(n_low, 2)
        remainder = float((per_symbol * by_symbol)[inside].sum()) / n_sampled
        place = np.clip((np.arange(n_rows) - start) >> shift, 0, n_contexts - 1)
        table = np.zeros((n_contexts, last - first + 1), np.int64)
        np.add.at(table[:, 0], place, n_zeros)
        np.add.at(table[:, 1:], place, symbols[:, first:last])
        candidate = replace(
            plan,
            base=first - 1,
            n_symbols=last - first + 1,
            n_contexts=n_contexts,
            context_base=low + start if n_contexts > 1 else 0,
            context_shift=shift,
        )
        bits, candidate, tables = _symbol_choice(table, side_bits, candidate, spec)
        bits += remainder + _patch_bits(plan, share)
        if best is None or bits < best[0]:
            best = bits, candidate, tables
    assert best is not None
    return best


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


def _scaled_delta(
    words: Words, reference: Words, sample: Sample, blank: Plan, shape: Sequence[int] | None, spec: Spec
) -> list[Choice]:
    """`scaled delta` with one factor for all, and with the best split's factors of rows and columns besides."""
    assert sample.reference is not None
    plan = replace(blank, predict="scaled_delta", reference="parent", remainder="stack", n_columns=len(words))
    thin = slice(None, None, max(len(sample.firsts) // SHIFT_ROWS, 1))
    new, old = sample.words[thin], sample.reference[thin]
    one = np.full(1, 1 << FACTOR_BITS, np.uint16)
    common, fewest = _best_factor(new, old, np.ones(1), plan, 17)
    best = replace(plan, factor=common), Scales(one, None)
    positions = sample.firsts[:, None] + np.arange(sample.words.shape[1])
    for n_columns, has_column_scale in _splits(shape, len(words)):
        scales = fit_factors(words, reference, common, blank.dtype, n_columns, has_column_scale)
        split = replace(plan, n_columns=n_columns, has_column_scale=has_column_scale)
        places = positions[thin]
        spread = scales.rows[places // n_columns] / (1 << FACTOR_BITS)
        if scales.columns is not None:
            spread = spread * scales.columns[places % n_columns] / (1 << FACTOR_BITS)
        factor, bits = _best_factor(new, old, spread, split, 8)
        bits += (_vector_bits(scales.rows) + _vector_bits(scales.columns)) / plan.n_words
        if bits < fewest:
            fewest = bits
            best = replace(split, factor=factor), scales
    plan, scales = best
    rows = scales.rows[positions // plan.n_columns]
    columns = None if scales.columns is None else scales.columns[positions % plan.n_columns]
    predicted = scale_words(sample.reference, factors(plan.factor, rows, columns), plan.dtype)
    side_bits = _vector_bits(scales.rows) + _vector_bits(scales.columns)
    bits, plan, tables = _best_delta(sample.words, predicted, plan, side_bits, spec)
    return [Choice(bits, plan, _side_of(plan, tables, scales))]


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
        bits = (_entropy(by_sign.reshape(len(counts), -1)) + low_bits) / new.size
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
    rows = _medians(_ratios(grid[:, ::step], old[:, ::step], dtype) / whole, 1)
    if n_whole * n_columns < len(words):
        tail = _ratios(words[None, n_whole * n_columns :], reference[None, n_whole * n_columns :], dtype) / whole
        rows = np.append(rows, _medians(tail, 1))
    row_factors = _factor(rows)
    if not has_column_scale:
        return Scales(row_factors, None)
    step = -(-n_whole // min(max(FIT_WORDS // n_columns, 16), FIT_ROWS))
    columns = (
        _ratios(grid[::step], old[::step], dtype) / whole / (row_factors[:n_whole][::step, None] / (1 << FACTOR_BITS))
    )
    return Scales(row_factors, _factor(_medians(columns, 0)))


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
