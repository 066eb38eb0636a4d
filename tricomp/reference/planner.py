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
from tricomp.job import EncodeJob, Side
from tricomp.plan import MAX_SYMBOLS, Plan, Spec
from tricomp.reference.bits import count_unequal, is_constant, is_equal
from tricomp.reference.estimate import SIMPLER_BITS, Choice, Sample, patch_bits, sample_of, symbol_cost, with_symbols
from tricomp.reference.planner_delta import delta_choice, scaled_delta_choice
from tricomp.reference.planner_full import full_choice

HOPELESS_BITS = 1.5  # a delta that costs so much more than no reference is not tried with scales
FEW_ROWS = 16  # rows of the thin sample that tell whether few distinct words are to be expected
NEAR_BITS = 0.5  # a sparse frame that seems to cost so much more than another is not counted


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
    best = Choice(dtype.word_bits - SIMPLER_BITS, lambda: (blank, Side()))
    best = _better(best, _palette(sample, blank, spec))
    delta = None if reference is None else delta_choice(reference, sample, blank, spec)
    if dtype.is_float:
        rival = best.bits if delta is None else min(best.bits, delta.bits)
        best = _better(best, full_choice(words, sample, blank, shape, spec, rival))
    else:
        best = _better(best, delta_choice(None, sample, blank, spec))
    if reference is not None and delta is not None:
        is_hopeless = not dtype.is_float or delta.bits >= best.bits + HOPELESS_BITS
        best = _better(best, delta)
        if not is_hopeless:
            best = _better(best, scaled_delta_choice(words, reference, sample, blank, shape, spec))
    for sparse in _sparse(words, reference, sample, blank, best.bits):
        best = _better(best, sparse)
    plan, side = best.finish()
    return EncodeJob(plan, side, words, reference if plan.reference == "parent" else None)


def _better(one: Choice, other: Choice | None) -> Choice:
    return one if other is None or one.bits <= other.bits else other


def _exact(words: Words, reference: Words | None, blank: Plan) -> EncodeJob | None:
    """Constant or copy, if the whole frame is."""
    if is_constant(words):
        return EncodeJob(replace(blank, predict="constant", word=int(words[0]) if len(words) else 0), Side(), words)
    if reference is not None and is_equal(words, reference):
        return EncodeJob(replace(blank, predict="copy", reference="parent"), Side(), words, reference)
    return None


def _few(sample: Sample) -> Words:
    """Some rows of the thin sample, joined."""
    words = sample.thin().words
    return words[:: max(len(words) // FEW_ROWS, 1)].reshape(-1)


def _sparse(words: Words, reference: Words | None, sample: Sample, blank: Plan, rival: float) -> list[Choice]:
    """Few words differ from the reference, or from the commonest word. Counted only where it seems worth it."""
    overhead = 192.0 / min(len(words), 1 << blank.chunk_log2)
    thin = sample.thin()
    values, counts = np.unique(_few(sample), return_counts=True)
    commonest = int(values[np.argmax(counts)])
    choices = []

    def weigh(n_unequal: int, others: Words | int, plan: Plan) -> None:
        share = n_unequal / float(thin.words.size)
        if patch_bits(plan.dtype, share) + overhead < rival + NEAR_BITS:
            share = count_unequal(words, others) / float(len(words))
            choices.append(Choice(patch_bits(plan.dtype, share) + overhead, lambda: (plan, Side())))

    if int(counts.max()) * 2 > int(counts.sum()):
        n_unequal = int(np.count_nonzero(thin.words != commonest))
        weigh(n_unequal, commonest, replace(blank, predict="sparse", word=commonest))
    if reference is not None:
        n_unequal = int(np.count_nonzero(thin.words != thin.reference))
        weigh(n_unequal, reference, replace(blank, predict="sparse", reference="parent"))
    return choices


def _palette(sample: Sample, blank: Plan, spec: Spec) -> Choice | None:
    """At most 256 distinct words."""
    if len(np.unique(_few(sample))) > MAX_SYMBOLS:
        return None
    words, counts = np.unique(sample.words, return_counts=True)
    if len(words) > MAX_SYMBOLS or len(words) > max(sample.words.size // 4, 2):
        return None
    plan = replace(blank, predict="palette", n_symbols=len(words))
    bits = symbol_cost(counts[None], 0, float(len(words) * blank.dtype.word_bits), plan, sample, spec)

    def finish() -> tuple[Plan, Side]:
        done, side = with_symbols(plan, counts[None], sample, spec)
        return done, replace(side, palette=words)

    return Choice(bits, finish)
