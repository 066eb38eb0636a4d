"""What choices cost: the planner's sample, and estimates of bits. Imports numpy, dtypes, plan and the stages.

The hard thing: every backend must come to the same plan. So sums and logarithms are integers (in 1/65,536 bit), and
what is left, few additions and divisions of doubles, is done in the order written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import Side, Tables
from tricomp.plan import Plan, Spec
from tricomp.reference.entropy import normalise
from tricomp.reference.lanes import ROW
from tricomp.reference.side import vector_step

Array = np.ndarray[Any, Any]

SAMPLE_ROWS = 1024  # most rows of 128 words in a sample
LEAST_SAMPLE_ROWS = 512  # a frame of no more rows is its own sample; beyond, an eighth of the rows is taken
THIN_ROWS = 128  # the search looks at 128 to 255 rows of the sample
LONG_COLUMNS = 4096  # rows so long may be cut into blocks
BLOCK_COLUMNS = 256  # the split of frames without two dimensions: a scale for every 256 words
RUN = 4  # columns of a lattice that is only probed stand in runs of so many
BLOCK_WORDS = 1 << 22  # of a leaf that are measured at a time
STATE_BITS = 1024 + 192  # of one stream, with its part of the directory
PROB_BITS = 11
LEARNING = 0.72  # bits that a frequency costs in the words it was not counted on: 1 / (2 ln 2)
RUN_GAIN = 50  # a run of symbols may cost 1 / RUN_GAIN bit a word more than the commonest ones
SIMPLE_SYMBOLS = 64  # one context of so many symbols is decoded fastest
SIMPLER_BITS = 0.02  # what anything slower must save to be taken
DOUBLE_BITS = 0.005  # and for each doubling of the table entries
ONE = 65536.0  # the unit of prices


def _logarithms() -> Array:
    """int64[4096]: log2(1 + i / 4096) in 1/65,536, by squaring: 16 bits, each rounded down."""
    squares = np.arange(4096, 8192, dtype=np.uint64) << np.uint64(18)
    logs = np.zeros(4096, np.int64)
    for _ in range(16):
        squares = squares * squares >> np.uint64(30)
        bit = squares >> np.uint64(31)
        squares = squares >> bit
        logs = logs << 1 | bit.astype(np.int64)
    return logs


_LOGARITHMS = _logarithms()


def logarithm(numbers: Array) -> Array:
    """log2 of whole numbers in 1/65,536 bit, from their 13 highest bits; 0 for 0. numbers: int64[...] < 2^40."""
    numbers = np.maximum(numbers, 1)
    power = np.zeros(numbers.shape, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        power += (numbers >> (power + step) > 0) * step
    return power << 16 | _LOGARITHMS[(numbers << 12 >> power) & 4095]


PRICES = (PROB_BITS << 16) - logarithm(np.arange((1 << PROB_BITS) + 1))  # of a symbol, by its frequency


@dataclass(frozen=True)
class Choice:
    """A candidate: bits per word, all side information included, and what completes its plan from the whole sample."""

    bits: float
    finish: Callable[[], tuple[Plan, Side]]


@dataclass(frozen=True)
class Sample:
    """Rows of 128 words spread over a frame. firsts: position of each row; words, reference: uint[n_rows, 128].

    n_words: of the frame. n_sampled: of the whole sample, of which this may be a thin part.
    """

    firsts: Array
    words: Words
    reference: Words | None
    n_words: int
    n_sampled: int

    def thin(self) -> Sample:
        """The part on which choices are weighed."""
        # An odd step, so that rows that take turns are met alike.
        return self.every(max(len(self.firsts) // THIN_ROWS, 1) - 1 | 1)

    def counted(self, n_contexts: int) -> Sample:
        """The part on which tables are counted: one table needs less than several."""
        is_ample = n_contexts == 1 and len(self.firsts) >= 2 * LEAST_SAMPLE_ROWS
        return self.every(2) if is_ample else self

    def every(self, step: int) -> Sample:
        """The first of every `step` rows."""
        reference = None if self.reference is None else self.reference[::step]
        return Sample(self.firsts[::step], self.words[::step], reference, self.n_words, self.n_sampled)

    @property
    def positions(self) -> Array:
        return self.firsts[:, None] + np.arange(self.words.shape[1])


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
        old = None if reference is None else reference[places]
        return Sample(firsts, words[places], old, len(words), places.size)
    n_sampled = min(max(n_rows // 8, LEAST_SAMPLE_ROWS), SAMPLE_ROWS)
    numbers = np.arange(n_sampled)
    starts = numbers * n_rows // n_sampled
    gaps = (numbers + 1) * n_rows // n_sampled - starts
    chosen = starts + (numbers * 0x9E3779B1 >> 7) % gaps
    whole = words[: n_rows * ROW].reshape(-1, ROW)
    cut = None if reference is None else reference[: n_rows * ROW].reshape(-1, ROW)[chosen]
    return Sample(chosen * ROW, whole[chosen], cut, len(words), n_sampled * ROW)


def in_blocks(n: int, width: int, measure: Callable[[slice], Array]) -> Array:
    """measure of slices that cover 0..n, joined, with little made on the way. width: words that it takes for one."""
    n_each = max(BLOCK_WORDS // max(width, 1), 1)
    return np.concatenate([measure(slice(first, min(first + n_each, n))) for first in range(0, max(n, 1), n_each)])


def splits(shape: Sequence[int] | None, n_words: int) -> list[tuple[int, bool]]:
    """(columns, whether columns get a scale): every cut of the shape in two; or, and for long rows, blocks of words."""
    cuts = []
    if shape is not None:
        for axis in range(1, len(shape)):
            n_columns = math.prod(shape[axis:])
            n_rows = n_words // max(n_columns, 1)
            is_dear = (n_rows + n_columns) * 4 > n_words  # scales for every few words, and long to fit
            if n_columns > 1 and n_rows > 1 and not is_dear and (n_columns, True) not in cuts:
                cuts.append((n_columns, True))
    if n_words >= 4 * BLOCK_COLUMNS and all(n_columns >= LONG_COLUMNS for n_columns, _ in cuts):
        cuts.append((BLOCK_COLUMNS, False))
    return cuts


def lattice_columns(n_columns: int, nruns: int) -> Array:
    """Columns of a lattice: all, or short runs at even distances."""
    if n_columns <= nruns * RUN:
        return np.arange(n_columns)
    starts = np.arange(nruns) * (n_columns - RUN) // (nruns - 1)
    return (starts[:, None] + np.arange(RUN)).reshape(-1)


def block_columns(n_columns: int, n_blocks: int, length: int) -> Array:
    """All columns, or `length` at a time from multiples of it, so that few lines of memory hold them."""
    if n_columns <= n_blocks * length:
        return np.arange(n_columns)
    n_all = n_columns // length
    starts = (np.arange(n_blocks) * n_all + n_all // 2) // n_blocks * length
    return (starts[:, None] + np.arange(length)).reshape(-1)


def entropy_bits(counts: Array) -> float:
    """Bits of all that was counted, under its own frequencies. counts: int64[n]."""
    total = int(counts.sum())
    return (total * int(logarithm(np.array(total))) - int((counts * logarithm(counts)).sum())) / ONE


def vector_bits(values: Array | None, n: int | None = None) -> float:
    """Bits of a vector of the side section, roughly. n: how many values it has, where only some are given."""
    if values is None or len(values) == 0:
        return 0.0
    numbers = (values.astype(np.int64) - int(values.min())) // vector_step(values)
    n_all = len(values) if n is None else n
    width = int(numbers.max()).bit_length()
    packed = float(width * n_all)
    if width <= 8 and packed > 4096:
        counts = np.bincount(numbers)
        coded = entropy_bits(counts)
        if len(values) < n_all:
            coded = (coded + LEARNING * int(np.count_nonzero(counts))) / len(values) * n_all
        packed = min(packed, coded + (STATE_BITS + 1500))
    return 80 + packed


def patch_bits(dtype: DType, share: float) -> float:
    """Bits per word of patches, when this share of the words needs one."""
    return share * (16 + dtype.word_bits)


def symbol_cost(counts: Array, n_outside: int, extra_bits: float, plan: Plan, sample: Sample, spec: Spec) -> float:
    """Bits per word of the counted symbols in the tier asked for, with their tables, patches, and `extra_bits` a frame.

    counts: int64[n_contexts, n_symbols] over a sample. n_outside: words of it that are patched.
    """
    n_words, n_sampled = float(sample.n_words), float(sample.n_sampled)
    n_counted = float(int(counts.sum()) + n_outside)
    if spec.tier != "dense":
        width, n_missed = index_of(counts, plan)
        share = float(n_outside + n_missed) / n_counted
        return width + patch_bits(plan.dtype, share) + (extra_bits + float(8 << width)) / n_words
    freqs = np.stack([normalise(row, PROB_BITS) for row in counts])
    price = int((counts * PRICES[freqs]).sum())
    n_present, n_once = int(np.count_nonzero(counts)), int(np.count_nonzero(counts == 1))
    log_sizes = (logarithm(freqs) >> 16).sum()
    fixed = float(4 * counts.size + int(log_sizes) + STATE_BITS * max(plan.n_chunks, 1)) + extra_bits
    bits = price / (ONE * n_counted) + fixed / n_words
    # What was counted once tells how much there is that was not counted at all.
    fresh = 1.0 / n_sampled - 1.0 / n_words
    bits += patch_bits(plan.dtype, float(n_outside) / n_counted + n_once * fresh)
    bits += LEARNING * n_present * (fresh + (1.0 / n_counted - 1.0 / n_words))
    if counts.shape[0] > 1 or counts.shape[1] > SIMPLE_SYMBOLS:
        bits += SIMPLER_BITS + DOUBLE_BITS * ((counts.size - 1) // SIMPLE_SYMBOLS).bit_length()
    return bits


def index_of(counts: Array, plan: Plan) -> tuple[int, int]:
    """The width of an index of the counted symbols, and how many words the dictionary then lacks."""
    total = counts.sum(axis=0)
    n_all = int(total.sum())
    ordered = -np.sort(-total)
    covered = np.cumsum(ordered)
    missed = [n_all - int(covered[min(1 << width, len(ordered)) - 1]) for width in range(1, 9)]
    costs = [width * n_all + missed[width - 1] * (16 + plan.dtype.word_bits) for width in range(1, 9)]
    best = costs.index(min(costs))
    return best + 1, missed[best]


def smoothed(counts: Array, plan: Plan) -> Array:
    """Counts of a sample, four to one, and one for what it lacks in contexts where that is cheaper than patches.

    A symbol that the sample lacks, but has others on both sides or next to it, may be met in the frame. What is counted
    once tells how often: in n_once words of n. A frequency costs 1.44 / 2^11 bits in every word of its context.
    """
    counts = counts * 4
    for row in counts:
        used = np.flatnonzero(row)
        if len(used):
            part = row[max(int(used[0]) - 1, 0) : int(used[-1]) + 2]
            n_once, n_lacking = int(np.count_nonzero(part == 4)), int(np.count_nonzero(part == 0))
            if n_once * (16 + plan.dtype.word_bits) << PROB_BITS + 6 > 23 * n_lacking * int(part.sum()):
                part[part == 0] = 1
    return counts


def with_symbols(plan: Plan, counts: Array, sample: Sample, spec: Spec, **changes: Any) -> tuple[Plan, Side]:
    """The plan with its entropy stage and other changes filled in, and the tables or the dictionary of the counts.

    counts: int64[n_contexts, n_symbols] over `sample`.
    """
    plan = replace(plan, n_contexts=counts.shape[0], n_symbols=counts.shape[1], **changes)
    if spec.tier == "dense":
        if sample.words.size < sample.n_words:
            counts = smoothed(counts, plan)
        freqs = np.stack([normalise(row, PROB_BITS) for row in counts])
        return replace(plan, entropy="rans"), Side(Tables(freqs, PROB_BITS))
    width, _ = index_of(counts, plan)
    dictionary = dictionary_of(counts.sum(axis=0), width, plan)
    return replace(plan, entropy="index", index_bits=width), Side(dictionary=dictionary.astype(np.uint8))


def dictionary_of(total: Array, width: int, plan: Plan) -> Array:
    """The commonest symbols that an index of this width has places for, ascending; total: int64[n_symbols], counts.

    Or a run of symbols, where that costs less than a fiftieth of a bit a word more: it needs no look-ups.
    """
    order = np.argsort(-total, kind="stable")
    chosen = np.sort(order[: min(1 << width, max(int(np.count_nonzero(total)), 1))])
    sums = np.concatenate([[0], np.cumsum(total)])
    n_run = min(1 << width, len(total))
    inside = sums[n_run:] - sums[: len(sums) - n_run]
    first = int(np.argmax(inside))
    n_lost = int(total[chosen].sum()) - int(inside[first])
    used = np.flatnonzero(total[first : first + n_run])
    if len(used) and RUN_GAIN * n_lost * (16 + plan.dtype.word_bits) <= int(sums[-1]):
        return np.arange(first + int(used[0]), first + int(used[-1]) + 1)
    return chosen


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
