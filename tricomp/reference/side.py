"""The side section of a frame, in numpy: tables, dictionary, palette, vectors. Defines the bytes.

Imports numpy, errors, plan and the sibling stages. The hard thing: it is parsed before anything is verified but its
checksum, so every length is derived from the Plan and checked against the bytes at hand before use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.errors import CorruptFrame
from tricomp.job import Scales, Side, Tables
from tricomp.plan import Plan
from tricomp.reference.entropy import STATE_BYTES, Coded, normalise, rans_decode, rans_encode
from tricomp.reference.frame import ALIGN, aligned
from tricomp.reference.lanes import padded

Array = np.ndarray[Any, Any]

_VECTOR_PROB_BITS = 11
_MOST_CODED_VALUES = 1 << 20  # of a vector in one rANS stream, which only 32 lanes decode
_LEVEL_LIMIT = 1 << 14


def write(plan: Plan, side: Side) -> bytes:
    """The side section, zero-padded to 16 bytes; empty when there is nothing to say."""
    parts: list[bytes] = []
    if side.tables is not None:
        parts.append(_write_freqs(side.tables.freqs))
    parts.extend(_write_freqs(side.plane_tables[plane].freqs) for plane in sorted(side.plane_tables))
    if plan.entropy == "index":
        parts.append(bytes([len(side.dictionary) - 1]) + side.dictionary.tobytes())
    if plan.predict == "palette":
        parts.append(side.palette.astype(plan.dtype.word_dtype).tobytes())
    if plan.is_scaled:
        parts.append(_write_vector(side.scales.rows))
        if plan.has_column_scale:
            assert side.scales.columns is not None
            parts.append(_write_vector(side.scales.columns))
    section = b"".join(parts)
    return section + bytes(aligned(len(section)) - len(section))


def read(plan: Plan, section: bytes | memoryview) -> Side:
    """Inverse of `write`. Raises CorruptFrame."""
    reader = _Reader(section)
    tables = None
    if plan.entropy == "rans":
        tables = Tables(reader.freqs(plan.n_contexts, plan.n_symbols, plan.prob_bits), plan.prob_bits)
    plane_tables = {
        plane: Tables(reader.freqs(1, 1 << width, plan.prob_bits), plan.prob_bits)
        for plane, width in enumerate(plan.plane_widths)
        if plan.coded_planes >> plane & 1
    }
    dictionary = np.zeros(0, np.uint8)
    if plan.entropy == "index":
        n_entries = int(reader.take(1)[0]) + 1
        dictionary = reader.take(n_entries)
        if n_entries > 1 << plan.index_bits or (dictionary >= plan.n_symbols).any() or _is_unsorted(dictionary):
            raise CorruptFrame("its dictionary does not fit its plan")
    palette = np.zeros(0, np.uint8)
    if plan.predict == "palette":
        palette = reader.take(plan.n_symbols * plan.dtype.word_bits // 8).view(plan.dtype.word_dtype)
        if _is_unsorted(palette):
            raise CorruptFrame("its palette is not ascending")
    scales = Scales()
    if plan.is_scaled:
        rows = reader.vector(plan.n_rows)
        columns = reader.vector(plan.n_columns) if plan.has_column_scale else None
        scales = _checked_scales(plan, rows, columns)
    reader.finish()
    return Side(tables, plane_tables, dictionary, palette, scales)


def _is_unsorted(values: Array) -> bool:
    return bool((values[1:] <= values[:-1]).any())


def _checked_scales(plan: Plan, rows: Array, columns: Array | None) -> Scales:
    """Levels must fit int16 with their sum; factors must fit uint16."""
    low, high, kind = (
        (0, 1 << 16, np.uint16) if plan.predict == "scaled_delta" else (-_LEVEL_LIMIT, _LEVEL_LIMIT, np.int16)
    )
    for vector in (rows,) if columns is None else (rows, columns):
        if len(vector) and not low <= int(vector.min()) <= int(vector.max()) < high:
            raise CorruptFrame("its scales are out of range")
    return Scales(rows.astype(kind), None if columns is None else columns.astype(kind))


def _write_freqs(freqs: Array) -> bytes:
    """Each frequency as 4 bits of length, then the bits below its leading one; lowest bits first; padded to a byte."""
    bits, n_bits = 0, 0
    for freq in freqs.reshape(-1).tolist():
        length = freq.bit_length()
        below = freq - (1 << length - 1) if length else 0
        bits |= (length | below << 4) << n_bits
        n_bits += 4 + max(length - 1, 0)
    return bits.to_bytes(-(-n_bits // 8), "little")


def vector_step(values: Array) -> int:
    """The largest step on which all values lie, counted from the least; 1 where there is none."""
    offsets = np.unique(values).astype(np.int64)
    return max(int(np.gcd.reduce(offsets - offsets[0])), 1) if len(offsets) else 1


def _write_vector(values: Array) -> bytes:
    """A vector of small integers: kind, width, step, least value, then (value - least) / step, packed or as rANS."""
    numbers = values.astype(np.int64)
    least = int(numbers.min()) if len(numbers) else 0
    step = vector_step(numbers)
    offsets = (numbers - least) // step
    width = int(offsets.max()).bit_length() if len(numbers) else 0
    head = bytes([width]) + step.to_bytes(2, "little") + least.to_bytes(4, "little", signed=True)
    is_set = offsets[:, None] >> np.arange(width) & 1
    packed = bytes([0]) + head + np.packbits(is_set.astype(np.uint8), bitorder="little").tobytes()
    if width > 8 or len(packed) < 2 * STATE_BYTES or len(numbers) > _MOST_CODED_VALUES:
        return packed
    counts = np.bincount(offsets, minlength=1 << width)
    tables = Tables(normalise(counts, _VECTOR_PROB_BITS)[None], _VECTOR_PROB_BITS)
    rows = np.full(padded(len(offsets)), tables.favourites()[0])
    rows[: len(offsets)] = offsets
    coded = rans_encode([rows], [tables])[0]
    freqs = _write_freqs(tables.freqs)
    stream = coded.states.astype("<u4").tobytes() + coded.words.astype("<u2").tobytes()
    dense = bytes([1]) + head + len(coded.words).to_bytes(4, "little") + freqs + stream
    return min(packed, dense, key=len)


class _Reader:
    """Takes the parts of a side section one after the other, never past its end."""

    def __init__(self, section: bytes | memoryview) -> None:
        self._octets = np.frombuffer(section, np.uint8)
        self._at = 0

    def take(self, n_bytes: int) -> Array:
        if n_bytes > len(self._octets) - self._at:
            raise CorruptFrame("its side section is too short")
        self._at += n_bytes
        return self._octets[self._at - n_bytes : self._at].copy()

    def finish(self) -> None:
        rest = self._octets[self._at :]
        if len(rest) >= ALIGN or rest.any():
            raise CorruptFrame("its side section is too long")

    def freqs(self, n_tables: int, n_symbols: int, prob_bits: int) -> Array:
        n_most = n_tables * n_symbols * 2
        bits = int.from_bytes(self._octets[self._at : self._at + n_most].tobytes(), "little")
        n_bits = 0
        freqs = np.zeros(n_tables * n_symbols, np.int64)
        for i in range(len(freqs)):
            length = bits >> n_bits & 15
            if length:
                freqs[i] = 1 << length - 1 | bits >> n_bits + 4 & (1 << length - 1) - 1
            n_bits += 4 + max(length - 1, 0)
        self.take(-(-n_bits // 8))
        tables = freqs.reshape(n_tables, n_symbols)
        if (tables.sum(axis=1) != 1 << prob_bits).any():
            raise CorruptFrame("its frequencies do not sum to the size of the table")
        return tables

    def vector(self, n_values: int) -> Array:
        kind, width = (int(x) for x in self.take(2))
        step = int.from_bytes(self.take(2).tobytes(), "little")
        least = int.from_bytes(self.take(4).tobytes(), "little", signed=True)
        if kind > 1 or width > (8 if kind else 17) or (kind and n_values > _MOST_CODED_VALUES):
            raise CorruptFrame("a vector of its side section is of an unknown kind")
        if kind == 0:
            packed = self.take(-(-n_values * width // 8))
            bits = np.unpackbits(packed, count=n_values * width, bitorder="little").reshape(n_values, width)
            return least + step * (bits.astype(np.int64) << np.arange(width)).sum(axis=1)
        n_words = int.from_bytes(self.take(4).tobytes(), "little")
        tables = Tables(self.freqs(1, 1 << width, _VECTOR_PROB_BITS), _VECTOR_PROB_BITS)
        coded = Coded(self.take(STATE_BYTES).view("<u4"), self.take(2 * n_words).view("<u2"))
        symbols = rans_decode([coded], [tables], [None], [padded(n_values)])[0]
        return least + step * symbols[:n_values].astype(np.int64)
