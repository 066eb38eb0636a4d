"""What choices cost: the planner's sample, and estimates of bits. Imports numpy, dtypes, plan and the stages.

The hard thing: an estimate must count what a choice costs besides its symbols (tables, vectors, patches, states), or
small leaves suffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Scales, Side, Tables
from tricomp.plan import Plan, Spec
from tricomp.reference.entropy import normalise
from tricomp.reference.lanes import ROW
from tricomp.reference.side import vector_step

Array = np.ndarray[Any, Any]

SAMPLE_ROWS = 1024  # most rows of 128 words in a sample
LEAST_SAMPLE_ROWS = 256  # a frame of no more rows is its own sample; between them a quarter of the rows is taken
BLOCK_COLUMNS = 256  # the split of frames without two dimensions: a scale for every 256 words
FIT_COLUMNS = 128  # most columns that a row's scale or factor is measured on
FIT_ROWS = 512  # most rows that a column's is measured on
BLOCK_WORDS = 1 << 22  # of a leaf that are measured at a time
STATE_BITS = 1024 + 192  # of one stream, with its part of the directory


@dataclass(frozen=True)
class Choice:
    """A candidate: bits per word on the sample, all side information included, and what to encode with."""

    bits: float
    plan: Plan
    side: Side


@dataclass(frozen=True)
class Sample:
    """Rows of 128 words spread over a frame. firsts: position of each row; words, reference: uint[n_rows, 128]."""

    firsts: Array
    words: Words
    reference: Words | None


def sample_of(words: Words, reference: Words | None) -> Sample:
    """Rows at even distances, each shifted by a fixed scramble of its number, so that no column is preferred.

    The rule is the same for every backend. Of a long frame the last partial row is never part of it; of a short one
    the last 128 words are, so that an odd end is not missed.
    """
    n_rows = len(words) // ROW
    if n_rows <= LEAST_SAMPLE_ROWS:
        width = min(len(words), ROW)
        firsts = np.arange(0, max(n_rows, 1) * ROW, ROW)
        if len(words) > n_rows * ROW > 0:
            firsts = np.append(firsts, len(words) - ROW)
        places = firsts[:, None] + np.arange(width)
        return Sample(firsts, words[places], None if reference is None else reference[places])
    n_sampled = min(max(n_rows // 4, LEAST_SAMPLE_ROWS), SAMPLE_ROWS)
    numbers = np.arange(n_sampled)
    starts = numbers * n_rows // n_sampled
    gaps = (numbers + 1) * n_rows // n_sampled - starts
    chosen = starts + (numbers * 0x9E3779B1 >> 7) % gaps
    whole = words[: n_rows * ROW].reshape(-1, ROW)
    cut = None if reference is None else reference[: n_rows * ROW].reshape(-1, ROW)[chosen]
    return Sample(chosen * ROW, whole[chosen], cut)


def in_blocks(n: int, width: int, measure: Callable[[slice], Array]) -> Array:
    """measure of slices that cover 0..n, joined, with little made on the way. width: words that it takes for one."""
    n_each = max(BLOCK_WORDS // max(width, 1), 1)
    return np.concatenate([measure(slice(first, min(first + n_each, n))) for first in range(0, max(n, 1), n_each)])


def splits(shape: Sequence[int] | None, n_words: int) -> list[tuple[int, bool]]:
    """(columns, whether columns get a scale): every cut of the shape in two, and blocks of consecutive words."""
    cuts = []
    if shape is not None:
        for axis in range(1, len(shape)):
            n_columns = math.prod(shape[axis:])
            n_rows = n_words // max(n_columns, 1)
            is_dear = (n_rows + n_columns) * 4 > n_words  # scales for every few words, and long to fit
            if n_columns > 1 and n_rows > 1 and not is_dear and (n_columns, True) not in cuts:
                cuts.append((n_columns, True))
    if n_words >= 4 * BLOCK_COLUMNS:
        cuts.append((BLOCK_COLUMNS, False))
    return cuts


def entropy_bits(counts: Array) -> float:
    """Total bits of the counted symbols under their own frequencies, contexts along the first axes."""
    counts = counts.astype(np.float64)
    totals = counts.sum(axis=-1)
    logs = np.log2(np.where(counts > 0, counts, 1))
    return float((totals * np.log2(np.where(totals > 0, totals, 1))).sum() - (counts * logs).sum())


def table_bits(counts: Array) -> float:
    """Bits of the frequency tables of the side section, roughly."""
    n_present = np.count_nonzero(counts)
    return 4.0 * counts.size + 4.5 * n_present


def vector_bits(values: Array | None) -> float:
    """Bits of a vector of the side section, roughly."""
    if values is None or len(values) == 0:
        return 0.0
    numbers = (values.astype(np.int64) - int(values.min())) // vector_step(values)
    width = int(numbers.max()).bit_length()
    packed = float(width * len(values))
    if width <= 8 and packed > 4096:
        packed = min(packed, entropy_bits(np.bincount(numbers)) + STATE_BITS + 1500)
    return 80 + packed


def patch_bits(dtype: DType, share: float) -> float:
    """Bits per word of patches, when this share of the words needs one."""
    return share * (16 + dtype.word_bits)


def symbol_cost(counts: Array, extra_bits: float, plan: Plan, spec: Spec) -> tuple[float, int, Array]:
    """Bits per word of the counted symbols in the tier asked for, an index's width or 0, and what to make tables of.

    counts: int64[n_contexts, n_symbols] over the sample. extra_bits: what the choice costs the frame besides. The last
    result is the counts for rANS, the dictionary's symbols for an index.
    """
    n_sampled = int(counts.sum())
    if spec.tier == "dense":
        fixed = table_bits(counts) + extra_bits + STATE_BITS * max(plan.n_chunks, 1)
        return entropy_bits(counts) / n_sampled + fixed / plan.n_words, 0, counts
    total = counts.sum(axis=0)
    order = np.argsort(-total, kind="stable")
    covered = np.cumsum(total[order]) / n_sampled
    costs = {
        width: width + patch_bits(plan.dtype, 1 - covered[min(1 << width, len(order)) - 1]) for width in range(1, 9)
    }
    width = min(costs, key=lambda width: costs[width])
    dictionary = np.sort(order[: min(1 << width, max(int(np.count_nonzero(total)), 1))])
    return costs[width] + (8 * len(dictionary) + extra_bits) / plan.n_words, width, dictionary


def with_entropy(plan: Plan, index_bits: int, **changes: Any) -> Plan:
    """The plan with its entropy stage and other changes filled in."""
    return replace(plan, entropy="index" if index_bits else "rans", index_bits=index_bits, **changes)


def densest(counts: Array, widest: int) -> tuple[int, int]:
    """[first, last) of the counted places, or of the widest window that holds most of them. counts: int64[n].

    Where nothing is counted, one place.
    """
    used = np.flatnonzero(counts)
    if not len(used):
        return (1, 2) if len(counts) > 1 else (0, 1)
    first, last = int(used[0]), int(used[-1]) + 1
    if last - first > widest:
        sums = np.concatenate([[0], np.cumsum(counts)])
        first = int(np.argmax(sums[widest:] - sums[:-widest]))
        last = first + widest
    return first, last


def side_of(plan: Plan, tables: Array, scales: Scales, palette: Words | None = None) -> Side:
    """The Side of a completed plan. tables: what `symbol_cost` gave, counts for rANS or a dictionary."""
    palette = np.zeros(0, plan.dtype.word_dtype) if palette is None else palette
    if plan.entropy == "index":
        return Side(dictionary=tables.astype(np.uint8), scales=scales, palette=palette)
    freqs = np.stack([normalise(row, plan.prob_bits) for row in tables])
    return Side(Tables(freqs, plan.prob_bits), scales=scales, palette=palette)
