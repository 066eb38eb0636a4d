"""Encode frames, in numpy: split every chunk, code its streams, lay them down. Defines the bytes.

Imports numpy, xxhash, plan and the stages. The hard thing: the loops of the entropy stage want many chunks at once,
so frames are encoded in batches; a frame's bytes never depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from tricomp.dtypes import Words
from tricomp.job import Encoded, EncodeJob, Room, Tables
from tricomp.plan import Plan
from tricomp.reference import side
from tricomp.reference.bits import trailing_zeros
from tricomp.reference.entropy import Coded, rans_encode
from tricomp.reference.frame import (
    ALIGN,
    DIRECTORY_FIELDS,
    PLANE_CONSTANT,
    PLANE_RANS,
    PLANE_RAW,
    RAW_FLAG,
    SEGMENT_CHUNKS,
    base_words,
)
from tricomp.reference.lanes import BATCH_CHUNKS, ROW, padded
from tricomp.reference.pack import Stacked, pack_bits, packed_bytes, stack_encode, stack_word_bits
from tricomp.reference.predict import Split, basis, split, symbol_bits

Array = np.ndarray[Any, Any]


@dataclass
class _Chunk:
    """A chunk on its way: symbol rows, remainders, patches, then the coded streams."""

    words: Words
    symbols: Array
    patches: Array
    rows: Array | None = None
    planes: list[Array] | None = None
    stack: tuple[Array, Array] | None = None
    block_shifts: Array | None = None


@dataclass
class _Output:
    """What has been laid down of a frame: directory rows, payloads padded to 16 bytes but for the last."""

    payloads: Room
    rows: list[Array] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, row: Array, payload: bytes) -> None:
        """Lay down the next chunk."""
        checksum = xxhash.xxh3_64_intdigest(payload)
        row[0], row[1] = checksum & 0xFFFFFFFF, checksum >> 32
        padding = bytes(-self.n_bytes % ALIGN)
        self.payloads.append(padding + payload if padding else payload)
        self.n_bytes += len(padding) + len(payload)
        self.rows.append(row)


def encode(jobs: Sequence[EncodeJob], room: Callable[[], Room] = list) -> list[Encoded]:
    """Encode frames. room: makes the place where the payloads of one frame wait."""
    outputs = [_Output(room()) for _ in jobs]
    pending: list[tuple[int, _Chunk]] = []
    for number, job in enumerate(jobs):
        for chunk in _take_apart(job):
            pending.append((number, chunk))
            if len(pending) == BATCH_CHUNKS:
                _flush(jobs, pending, outputs)
                pending = []
    _flush(jobs, pending, outputs)
    return [_assemble(job, output) for job, output in zip(jobs, outputs, strict=True)]


def _flush(jobs: Sequence[EncodeJob], pending: list[tuple[int, _Chunk]], outputs: list[_Output]) -> None:
    """Code the streams of all pending chunks at once, and lay the chunks down."""
    parts = [(jobs[number], chunk) for number, chunk in pending]
    symbols = _code([(chunk.rows, job.side.tables) for job, chunk in parts if chunk.rows is not None])
    planes = _code(
        [
            (chunk.planes[plane], tables)
            for job, chunk in parts
            if chunk.planes is not None
            for plane, tables in sorted(job.side.plane_tables.items())
        ]
    )
    stacks: dict[int, Stacked] = {}
    for word_bits in (8, 16, 32, 64):
        members = [
            (place, chunk.stack)
            for place, (job, chunk) in enumerate(parts)
            if chunk.stack is not None and job.plan.dtype.word_bits == word_bits
        ]
        coded = stack_encode([v for _, (v, _) in members], [n for _, (_, n) in members], stack_word_bits(word_bits))
        stacks.update((place, stacked) for (place, _), stacked in zip(members, coded, strict=True))
    next_symbols, next_planes = iter(symbols), iter(planes)
    for place, (number, chunk) in enumerate(pending):
        row, payload = _lay_down(jobs[number], chunk, next_symbols, next_planes, stacks.get(place))
        outputs[number].add(row, payload)


def _code(streams: list[tuple[Array | None, Tables | None]]) -> list[Coded]:
    return rans_encode([s[0] for s in streams if s[0] is not None], [s[1] for s in streams if s[1] is not None])


def _take_apart(job: EncodeJob) -> Iterator[_Chunk]:
    """Predict and split every chunk of a frame."""
    plan = job.plan
    size = 1 << plan.chunk_log2
    if plan.n_chunks == 0:
        return
    for first in range(0, plan.n_words, SEGMENT_CHUNKS * size):
        words = job.words[first : first + SEGMENT_CHUNKS * size]
        reference = None if job.reference is None else job.reference[first : first + SEGMENT_CHUNKS * size]
        if plan.predict in ("raw", "sparse", "cast"):
            is_patch = words != base_words(plan, len(words), reference, job.source) if plan.predict != "raw" else None
            for start in range(0, len(words), size):
                patches = (
                    np.flatnonzero(is_patch[start : start + size]) if is_patch is not None else np.zeros(0, np.int64)
                )
                yield _Chunk(words[start : start + size], words[:0], patches)
            continue
        parts = split(plan, words, basis(plan, reference, job.side.scales, first, len(words)), job.side.palette)
        rows, is_patch = _rows(job, parts)
        symbols = parts.symbols
        if plan.remainder != "none" and is_patch.any():
            parts.remainders[is_patch] = 0
        for start in range(0, len(words), size):
            stop = min(start + size, len(words))
            n_padded = padded(stop - start)
            chunk = _Chunk(words[start:stop], symbols[start:stop], np.flatnonzero(is_patch[start:stop]))
            _fill(job, chunk, None if rows is None else rows[start:stop], n_padded)
            if plan.remainder != "none":
                _pack(job, chunk, _pad(parts.remainders[start:stop], n_padded))
            yield chunk


def _rows(job: EncodeJob, parts: Split) -> tuple[Array | None, Array]:
    """Rows of the frequency tables (none for an index), and which words are patched.

    Symbols that the tables or the dictionary lack become patches, and a patch takes its context's stand-in: in place.
    """
    plan, symbols, contexts = job.plan, parts.symbols, parts.contexts
    if plan.entropy == "index":
        is_known = np.zeros(plan.n_symbols, np.bool_)
        is_known[job.side.dictionary] = True
        is_patch = parts.is_patch | ~is_known[symbols]
        symbols[is_patch] = job.side.dictionary[0]
        return None, is_patch
    assert job.side.tables is not None
    starts = (np.arange(plan.n_contexts) * plan.n_symbols).astype(np.uint16)
    rows = symbols.astype(np.uint16) if contexts is None else starts[contexts] + symbols
    is_patch = parts.is_patch
    is_unknown = (job.side.tables.freqs == 0).reshape(-1)
    if is_unknown.any():
        is_patch = is_patch | is_unknown[rows]
    patches = np.flatnonzero(is_patch)
    if len(patches):
        where = np.zeros(len(patches), np.uint8) if contexts is None else contexts[patches]
        symbols[patches] = job.side.tables.favourites()[where]
        rows[patches] = starts[where] + symbols[patches]
    return rows, is_patch


def _pad(values: Array, n_padded: int) -> Array:
    if len(values) == n_padded:
        return values
    out = np.zeros(n_padded, values.dtype)
    out[: len(values)] = values
    return out


def _fill(job: EncodeJob, chunk: _Chunk, rows: Array | None, n_padded: int) -> None:
    """Rows for the entropy stage, or places in the dictionary. Padding: context 0 and its stand-in, or place 0."""
    if rows is None:
        places = np.zeros(job.plan.n_symbols, np.uint8)
        places[job.side.dictionary] = np.arange(len(job.side.dictionary))
        chunk.symbols = _pad(places[chunk.symbols], n_padded)
        return
    assert job.side.tables is not None
    chunk.rows = rows
    if len(rows) < n_padded:
        chunk.rows = np.full(n_padded, job.side.tables.favourites()[0], np.uint16)
        chunk.rows[: len(rows)] = rows


def _pack(job: EncodeJob, chunk: _Chunk, remainders: Words) -> None:
    """Byte planes, or values and lengths for the stack."""
    plan = job.plan
    n = len(chunk.words)
    if plan.remainder == "planes":
        chunk.planes = []
        for plane, width in enumerate(plan.plane_widths):
            octets = (remainders >> (plan.shift + 8 * plane)).astype(np.uint8)
            chunk.planes.append(octets & np.uint8((1 << width) - 1) if width < 8 else octets)
        return
    symbols = chunk.symbols if plan.entropy == "rans" else job.side.dictionary[chunk.symbols[:n]]
    lengths = np.zeros(len(remainders), np.uint8)
    lengths[:n] = symbol_bits(plan)[symbols]
    if plan.has_block_shifts:
        chunk.block_shifts = _block_shifts(plan, remainders, lengths)
        spread = np.repeat(chunk.block_shifts, ROW)
        remainders = remainders >> spread
        lengths = lengths - np.minimum(lengths, spread)
    chunk.stack = (remainders, lengths)


def _block_shifts(plan: Plan, remainders: Words, lengths: Array) -> Array:
    """Zero bits at the bottom of every remainder of a row of 128, at most its longest length, below the word's."""
    joined = np.bitwise_or.reduce(remainders.reshape(-1, ROW), axis=1)
    longest = lengths.reshape(-1, ROW).max(axis=1).clip(max=plan.dtype.word_bits - 1)
    return np.minimum(trailing_zeros(joined), longest)


def _lay_down(
    job: EncodeJob, chunk: _Chunk, symbols: Iterator[Coded], planes: Iterator[Coded], stacked: Stacked | None
) -> tuple[Array, bytes]:
    """The payload of a chunk and its row of the directory, checksum aside. Takes the chunk's streams."""
    plan = job.plan
    row = np.zeros(DIRECTORY_FIELDS + len(plan.plane_widths), np.uint32)
    parts: list[bytes] = []
    if chunk.rows is not None:
        coded = next(symbols)
        parts.append(_stream(coded.states.astype("<u4"), coded.words.astype("<u2")))
        row[4] = len(coded.words)
    elif plan.entropy == "index":
        parts.append(pack_bits(chunk.symbols[None], plan.index_bits).astype("<u4").tobytes())
    for plane, octets in enumerate(chunk.planes or ()):
        stream = next(planes) if plane in job.side.plane_tables else None
        mode, value, part = _plane(octets, plan.plane_widths[plane], stream)
        row[DIRECTORY_FIELDS + plane] = mode << 28 | value
        parts.append(part)
    if stacked is not None:
        if chunk.block_shifts is not None:
            parts.append(chunk.block_shifts.tobytes() + bytes(-len(chunk.block_shifts) % 16))
        kind = f"<u{stack_word_bits(plan.dtype.word_bits) // 8}"
        parts.append(_stream(stacked.heads.astype(kind), stacked.words.astype(kind)))
        row[5] = len(stacked.words)
    if len(chunk.patches):
        parts.append(chunk.patches.astype("<u2").tobytes() + chunk.words[chunk.patches].tobytes())
        row[3] = len(chunk.patches)
    payload = b"".join(parts)
    if plan.predict == "raw" or len(payload) >= chunk.words.nbytes:
        payload = chunk.words.tobytes()
        row[3:] = 0
        row[3] = RAW_FLAG
    row[2] = len(payload)
    return row, payload


def _plane(octets: Array, width: int, coded: Coded | None) -> tuple[int, int, bytes]:
    """The cheapest of the modes of a byte plane: mode, its value, its bytes."""
    if (octets == octets[0]).all():
        return PLANE_CONSTANT, int(octets[0]), b""
    if coded is not None:
        part = _stream(coded.states.astype("<u4"), coded.words.astype("<u2"))
        if len(part) < packed_bytes(len(octets), width):
            return PLANE_RANS, len(coded.words), part
    return PLANE_RAW, 0, pack_bits(octets[None], width).astype("<u4").tobytes()


def _stream(states: Array, words: Array) -> bytes:
    """States, zeros, then the words, so that the words end on a multiple of 16 bytes."""
    return states.tobytes() + bytes(-words.nbytes % 16) + words.tobytes()


def _assemble(job: EncodeJob, output: _Output) -> Encoded:
    """Put the head before the payloads."""
    if not output.rows:
        return Encoded(job.plan, 0, b"", ())
    directory = np.stack(output.rows).astype("<u4")
    section = side.write(job.plan, job.side)
    head = section + directory.tobytes() + bytes(-directory.nbytes % ALIGN)
    plan = replace(job.plan, side_bytes=len(section), side_check=xxhash.xxh3_64_intdigest(head))
    return Encoded(plan, len(head) + output.n_bytes, head, output.payloads)
