"""A Plan as the extension module takes it: 64-bit integers in a row. Imports ground only.

The hard thing: the order is that of PlanField in frame.h; one of them alone must never change.
"""

from __future__ import annotations

import struct

from tricomp.dtypes import DType
from tricomp.plan import ENTROPIES, PREDICTIONS, REMAINDERS, Plan

_NUMBERS = struct.Struct("<28qQqQq")


def pack(plan: Plan, source: DType | None, has_reference: bool) -> bytes:
    """source: dtype of the reference's words where the prediction is `cast`."""
    dtype = plan.dtype
    source = dtype if source is None else source
    return _NUMBERS.pack(
        dtype.word_bits,
        dtype.exponent_bits,
        dtype.mantissa_bits,
        dtype.is_float,
        dtype.is_signed,
        source.word_bits,
        source.exponent_bits,
        source.mantissa_bits,
        PREDICTIONS.index(plan.predict),
        ENTROPIES.index(plan.entropy),
        REMAINDERS.index(plan.remainder),
        plan.chunk_log2,
        plan.n_words,
        plan.n_symbols,
        plan.base,
        plan.prob_bits,
        plan.n_contexts,
        plan.context_base,
        plan.context_shift,
        plan.mantissa_bits,
        plan.has_sign,
        plan.n_columns,
        plan.has_column_scale,
        plan.factor,
        plan.index_bits,
        plan.shift,
        plan.has_block_shifts,
        plan.coded_planes,
        plan.word,
        plan.side_bytes,
        plan.side_check,
        has_reference,
    )
