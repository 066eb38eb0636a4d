"""What encoder and decoder of a frame share: the directory's fields, plane modes, the base that patches apply to.

Imports numpy, errors, dtypes, plan and the stages. A frame is the side section, the chunk directory, then the chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.bounds import Bytes
from tricomp.dtypes import DType, Words
from tricomp.errors import CorruptFrame
from tricomp.plan import Plan
from tricomp.reference.bits import cast
from tricomp.reference.lanes import LANES, padded
from tricomp.reference.pack import packed_bytes

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


def directory(plan: Plan, head: Bytes) -> Array:
    """The chunk directory in a frame's head: uint32[n_chunks, fields], as stored."""
    n_chunks, n_fields = directory_shape(plan)
    return np.frombuffer(head, "<u4", n_chunks * n_fields, plan.side_bytes).reshape(n_chunks, n_fields)


def places(plan: Plan, rows: Array) -> tuple[Array, int]:
    """The byte at which each chunk begins, int64[n_chunks], and the byte after the last one."""
    sizes = rows[:, 2].astype(np.int64)
    ends = head_bytes(plan) + np.cumsum(-(-sizes // ALIGN) * ALIGN)
    begins = ends - (-(-sizes // ALIGN) * ALIGN)
    return begins, int(begins[-1] + sizes[-1])


def anatomy(plan: Plan, head: Bytes) -> dict[str, int]:
    """Bytes of a frame by what they are for, from its head alone; they add up to the frame.

    Keys: those of report.Breakdown.
    """
    if plan.n_chunks == 0:
        return {}
    rows = directory(plan, head).astype(np.int64)
    is_raw = rows[:, 3] == RAW_FLAG
    coded = rows[~is_raw]
    sizes = np.minimum(plan.n_words - (np.flatnonzero(~is_raw) << plan.chunk_log2), 1 << plan.chunk_log2)
    n_patches = int(coded[:, 3].sum())
    patches = n_patches * (2 + plan.dtype.word_bits // 8)
    symbols = 0
    if plan.entropy == "rans":
        symbols = int((4 * LANES + -(-2 * coded[:, 4] // ALIGN) * ALIGN).sum())
    elif plan.entropy == "index":
        symbols = sum(packed_bytes(padded(size), plan.index_bits) for size in sizes.tolist())
    begins, end = places(plan, rows)
    payloads, raw = int(coded[:, 2].sum()), int(rows[is_raw, 2].sum())
    found = {
        "side": plan.side_bytes,
        "directory": head_bytes(plan) - plan.side_bytes + end - int(begins[0]) - payloads - raw,
        "symbols": symbols,
        "remainder": payloads - symbols - patches,
        "patches": patches,
        "raw": raw,
    }
    if min(found.values()) < 0:
        raise CorruptFrame(f"its chunk directory contradicts itself: {found}")
    return found


def base_words(plan: Plan, n_words: int, reference: Words | None, source: DType | None) -> Words:
    """The words that patches of `sparse` and `cast` apply to: the reference, its cast, or one word throughout."""
    if plan.predict == "cast":
        assert reference is not None
        assert source is not None
        return cast(reference, source, plan.dtype)
    if reference is not None:
        return reference
    return np.full(n_words, plan.word, plan.dtype.word_dtype)
