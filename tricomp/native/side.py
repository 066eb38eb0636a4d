"""Side sections with the extension module. Imports ground and numpy; gives the bytes, sides and errors of
`tricomp.reference.side`, the errors worded as `decode` words them.

The hard thing: a section may be hostile. The module compares every length with the bytes at hand; the texts are here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp import native
from tricomp.bounds import Bytes
from tricomp.errors import CorruptFrame
from tricomp.job import Scales, Side, Tables
from tricomp.native.plan_numbers import pack
from tricomp.plan import Plan

_NOTHING = np.zeros(0, np.uint8)

# In the order of SideFault in side.h.
_FAULTS = (
    "",
    "its side section is too short",
    "its side section is too long",
    "its frequencies do not sum to the size of the table",
    "its dictionary does not fit its plan",
    "its palette is not ascending",
    "its scales are out of range",
    "a vector of its side section is of an unknown kind",
    "its symbols do not end where an encoder begins",
)


def side_bytes(plan: Plan, side: Side) -> bytes:
    """The side section of a frame, filled up to 16 bytes. Raises ValueError where the side does not fit the plan."""
    section: bytes = native.load().side_bytes((_numbers(plan), *pack_side(plan, side)))
    return section


def read_side(plan: Plan, section: Bytes, name: str = "array") -> Side:
    """What a side section says. The caller has seen that the frame, `name`, holds the directory that its plan asks for.

    Raises CorruptFrame.
    """
    found = native.load().read_side(_numbers(plan), section)
    if isinstance(found, int):
        raise fault(found, name)
    freqs, plane_freqs, dictionary, palette, rows, columns = found
    return unpack_side(
        plan, freqs, plane_freqs, dictionary, np.frombuffer(palette, plan.dtype.word_dtype), rows, columns
    )


def fault(code: int, name: str) -> CorruptFrame:
    """What the module found, in words."""
    return CorruptFrame(f"frame of {name!r}: {_FAULTS[code]}.")


def pack_side(plan: Plan, side: Side) -> tuple[Any, ...]:
    """A side as the module takes it."""
    planes = [side.plane_tables[plane].freqs.reshape(-1) for plane in sorted(side.plane_tables)]
    kind = _kind(plan)
    return (
        _NOTHING if side.tables is None else side.tables.freqs.reshape(-1).astype(np.uint16),
        np.concatenate(planes).astype(np.uint16) if planes else _NOTHING,
        np.ascontiguousarray(side.dictionary, np.uint8),
        np.ascontiguousarray(side.palette, plan.dtype.word_dtype) if plan.predict == "palette" else _NOTHING,
        np.ascontiguousarray(side.scales.rows, kind),
        _NOTHING if side.scales.columns is None else np.ascontiguousarray(side.scales.columns, kind),
    )


def unpack_side(
    plan: Plan,
    freqs: bytes,
    plane_freqs: bytes,
    dictionary: bytes,
    palette: np.ndarray[Any, Any],
    rows: bytes,
    columns: bytes,
) -> Side:
    """A side as the module gives it."""
    kind = _kind(plan)
    return Side(
        Tables(_freqs(freqs).reshape(plan.n_contexts, plan.n_symbols), plan.prob_bits) if freqs else None,
        _plane_tables(plan, _freqs(plane_freqs)),
        np.frombuffer(dictionary, np.uint8),
        palette,
        Scales(np.frombuffer(rows, kind), np.frombuffer(columns, kind) if plan.has_column_scale else None),
    )


def _numbers(plan: Plan) -> bytes:
    return pack(plan, None, plan.reference != "none")


def _kind(plan: Plan) -> Any:
    """Of the numbers in a vector of scales."""
    return np.uint16 if plan.predict == "scaled_delta" else np.int16


def _freqs(freqs: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(freqs, np.uint16).astype(np.int64)


def _plane_tables(plan: Plan, freqs: np.ndarray[Any, Any]) -> dict[int, Tables]:
    tables = {}
    for plane, width in enumerate(plan.plane_widths):
        if plan.coded_planes >> plane & 1:
            tables[plane], freqs = Tables(freqs[None, : 1 << width], plan.prob_bits), freqs[1 << width :]
    return tables
