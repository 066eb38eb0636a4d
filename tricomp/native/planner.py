"""Plan frames with the extension module. Imports ground and numpy; decides as `tricomp.reference.planner`.

The hard thing: the numbers of a request and of a result stand in the order of planner_module.h; neither file alone must
ever change.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from tricomp import native
from tricomp.dtypes import DType, Words
from tricomp.job import EncodeJob, Side
from tricomp.native.side import unpack_side
from tricomp.plan import ENTROPIES, PREDICTIONS, REMAINDERS, Plan, Spec

_RESULT = struct.Struct("<9Qq1Qq7Q")

FrameToPlan = tuple[Words, Words | None, DType, Sequence[int] | None, Spec, int | None]


def plan_frames(frames: Sequence[FrameToPlan], threads: int | None = None) -> list[EncodeJob]:
    """Choose how to encode each frame: (words, reference, dtype, shape of the leaf or None, spec, mantissa bits kept).

    words, reference: uint[n]. threads: None: one a core. Scratch memory: below 2 MiB a thread, and the scales.
    """
    flat = [
        (
            np.require(frame[0], requirements=("C", "A")),
            None if frame[1] is None else np.require(frame[1], None, ("C", "A")),
        )
        for frame in frames
    ]
    requests = [(pack_request(*frame[2:5]), *words) for frame, words in zip(frames, flat)]
    results = native.load().plan_frames(requests, native.n_threads(threads))
    return [_job(*frame, result) for frame, result in zip(frames, results)]


def pack_request(dtype: DType, shape: Sequence[int] | None, spec: Spec) -> bytes:
    """What the module is asked, words aside."""
    numbers = (
        dtype.word_bits,
        dtype.exponent_bits,
        dtype.mantissa_bits,
        dtype.is_float,
        dtype.is_signed,
        spec.chunk_log2,
        spec.tier == "fast",
        *(() if shape is None else shape),
    )
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def _job(
    words: Words,
    reference: Words | None,
    dtype: DType,
    shape: Sequence[int] | None,
    spec: Spec,
    keep_mantissa_bits: int | None,
    result: tuple[bytes, ...],
) -> EncodeJob:
    """The job of one result."""
    plan, side = unpack_result(len(words), dtype, spec, keep_mantissa_bits, *result)
    return EncodeJob(plan, side, words, None if plan.reference == "none" else reference)


def unpack_result(
    n_words: int,
    dtype: DType,
    spec: Spec,
    keep_mantissa_bits: int | None,
    numbers: bytes,
    freqs: bytes,
    plane_freqs: bytes,
    dictionary: bytes,
    palette: bytes,
    rows: bytes,
    columns: bytes,
) -> tuple[Plan, Side]:
    """The plan and side of one result of the module."""
    (
        predict,
        entropy,
        remainder,
        has_reference,
        has_sign,
        has_column_scale,
        has_block_shifts,
        n_symbols,
        n_contexts,
        context_base,
        context_shift,
        base,
        mantissa_bits,
        index_bits,
        shift,
        coded_planes,
        n_columns,
        factor,
        word,
    ) = _RESULT.unpack(numbers)
    plan = Plan(
        dtype,
        n_words,
        PREDICTIONS[predict],
        spec.chunk_log2,
        "parent" if has_reference else "none",
        entropy=ENTROPIES[entropy],
        n_symbols=n_symbols,
        base=base,
        n_contexts=n_contexts,
        context_base=context_base,
        context_shift=context_shift,
        mantissa_bits=mantissa_bits,
        has_sign=bool(has_sign),
        n_columns=n_columns,
        has_column_scale=bool(has_column_scale),
        factor=factor,
        index_bits=index_bits,
        remainder=REMAINDERS[remainder],
        shift=shift,
        has_block_shifts=bool(has_block_shifts),
        coded_planes=coded_planes,
        word=word,
        keep_mantissa_bits=keep_mantissa_bits,
    )
    words = np.frombuffer(palette, np.uint64).astype(dtype.word_dtype)
    return plan, unpack_side(plan, freqs, plane_freqs, dictionary, words, rows, columns)
