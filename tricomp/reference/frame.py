"""What encoder and decoder of a frame share: the directory's fields, plane modes, the base that patches apply to.

Imports numpy, dtypes, plan and the stages. A frame is the side section, the chunk directory, then the chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.dtypes import DType, Words
from tricomp.plan import Plan
from tricomp.reference.bits import cast

Array = np.ndarray[Any, Any]

# Frozen since format 1.
ALIGN = 16
DIRECTORY_FIELDS = 6  # uint32: checksum (low, high), payload bytes, patches or RAW_FLAG, symbol words, stack words
RAW_FLAG = 1 << 31
PLANE_RAW, PLANE_CONSTANT, PLANE_RANS = 0, 1, 2

SEGMENT_CHUNKS = 4  # chunks predicted at a time, so that temporaries stay small; does not change a byte


def aligned(n_bytes: int) -> int:
    """n_bytes rounded up to 16."""
    return -(-n_bytes // ALIGN) * ALIGN


def directory_shape(plan: Plan) -> tuple[int, int]:
    """Rows (chunks) and uint32 fields of the chunk directory."""
    return plan.n_chunks, DIRECTORY_FIELDS + len(plan.plane_widths)


def head_bytes(plan: Plan) -> int:
    """Bytes before the first chunk: side section and directory."""
    n_chunks, n_fields = directory_shape(plan)
    return plan.side_bytes + aligned(4 * n_chunks * n_fields)


def base_words(plan: Plan, n_words: int, reference: Words | None, source: DType | None) -> Words:
    """The words that patches of `sparse` and `cast` apply to: the reference, its cast, or one word throughout."""
    if plan.predict == "cast":
        assert reference is not None
        assert source is not None
        return cast(reference, source, plan.dtype)
    if reference is not None:
        return reference
    return np.full(n_words, plan.word, plan.dtype.word_dtype)
