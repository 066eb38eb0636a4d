"""The planner: which prediction a frame gets, by estimated bits on a sample.

Imports numpy, dtypes, plan and the stages. It and its parts (estimate, planner_full, planner_delta) are the only ones
of the reference that may use floating point: whatever they pick is recorded, and any choice decodes to the same words.
The hard thing: one rule for all backends, so a decision rests on the sample and on exact counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.job import EncodeJob, Scales, Side
from tricomp.plan import MAX_SYMBOLS, Plan, Spec
from tricomp.reference.bits import count_unequal, is_constant, is_equal
from tricomp.reference.estimate import Choice, Sample, patch_bits, sample_of, side_of, symbol_cost, with_entropy
from tricomp.reference.planner_delta import delta_choice, scaled_delta_choice
from tricomp.reference.planner_full import full_choice

HOPELESS_BITS = 1.5  # a delta that costs so much more than no reference is not tried with scales
THIN_ROWS = 16  # every 16th row of the sample tells whether few distinct words are to be expected
SIMPLER_BITS = 0.02  # what a slower prediction must save to be taken


def plan_frame(
    words: Words,
    reference: Words | None,
    dtype: DType,
    shape: Sequence[int] | None,
    spec: Spec,
    keep_mantissa_bits: int | None = None,
) -> EncodeJob:
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
        choices.append(full_choice(words, sample, blank, shape, spec))
    else:
        choices.append(delta_choice(None, sample, blank, spec))
    if reference is not None:
        without = min(choice.bits for choice in choices)
        plain = delta_choice(reference, sample, blank, spec)
        choices.append(plain)
        if dtype.is_float and plain.bits < without + HOPELESS_BITS:
            scaled = scaled_delta_choice(words, reference, sample, blank, shape, spec)
            choices.append(replace(scaled, bits=scaled.bits + SIMPLER_BITS))
    best = min(choices, key=lambda choice: choice.bits)
    return EncodeJob(best.plan, best.side, words, reference if best.plan.reference == "parent" else None)


def _exact(words: Words, reference: Words | None, blank: Plan) -> EncodeJob | None:
    """Constant or copy, if the whole frame is."""
    if is_constant(words):
        return EncodeJob(replace(blank, predict="constant", word=int(words[0]) if len(words) else 0), Side(), words)
    if reference is not None and is_equal(words, reference):
        return EncodeJob(replace(blank, predict="copy", reference="parent"), Side(), words, reference)
    return None


def _sparse(words: Words, reference: Words | None, sample: Sample, blank: Plan) -> list[Choice]:
    """Few words differ from the reference, or from the commonest word."""
    overhead = 192 / min(len(words), 1 << blank.chunk_log2)
    values, counts = np.unique(sample.words[::THIN_ROWS], return_counts=True)
    commonest = values[np.argmax(counts)]
    choices = []
    if counts.max() > 0.5 * counts.sum():
        share = count_unequal(words, int(commonest)) / len(words)
        plan = replace(blank, predict="sparse", word=int(commonest))
        choices.append(Choice(patch_bits(plan.dtype, share) + overhead, plan, Side()))
    if reference is not None and np.count_nonzero(sample.words != sample.reference) < 0.5 * sample.words.size:
        share = count_unequal(words, reference) / len(words)
        plan = replace(blank, predict="sparse", reference="parent")
        choices.append(Choice(patch_bits(plan.dtype, share) + overhead, plan, Side()))
    return choices


def _palette(sample: Sample, blank: Plan, spec: Spec) -> list[Choice]:
    """At most 256 distinct words."""
    if len(np.unique(sample.words[::THIN_ROWS])) > MAX_SYMBOLS:
        return []
    words, counts = np.unique(sample.words, return_counts=True)
    if len(words) > MAX_SYMBOLS or len(words) > max(sample.words.size // 4, 2):
        return []
    plan = replace(blank, predict="palette", n_symbols=len(words))
    palette_bits = len(words) * blank.dtype.word_bits
    bits, index_bits, tables = symbol_cost(counts[None], palette_bits, plan, spec)
    plan = with_entropy(plan, index_bits)
    return [Choice(bits, plan, side_of(plan, tables, Scales(), words))]
