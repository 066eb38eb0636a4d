"""Decode frames, in numpy: check, parse, decode the streams, merge, patch. Defines what the bytes mean.

Imports numpy, xxhash, errors, plan and the stages. The hard thing: the bytes may be hostile. Every length is checked
against the payload before use, every index is clipped, and what cannot be right raises CorruptFrame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from tricomp.dtypes import Words
from tricomp.errors import CorruptFrame
from tricomp.job import DecodeJob, Side
from tricomp.reference import side
from tricomp.reference.entropy import Coded, rans_decode
from tricomp.reference.frame import (
    DIRECTORY_FIELDS,
    PLANE_CONSTANT,
    PLANE_RANS,
    PLANE_RAW,
    RAW_FLAG,
    aligned,
    base_words,
    directory,
    head_bytes,
    places,
)
from tricomp.reference.lanes import BATCH_CHUNKS, LANES, ROW, padded
from tricomp.reference.pack import Stacked, packed_bytes, stack_decode, stack_word_bits, unpack_bits
from tricomp.reference.predict import Basis, basis, contexts_of, merge, symbol_bits

Array = np.ndarray[Any, Any]

_ADVICE = "Restore the file from another copy, or list a store's intact steps: tricomp verify FOLDER."


@dataclass
class _Chunk:
    """A chunk on its way: what its payload holds, then symbols and remainders."""

    job: DecodeJob
    side: Side
    number: int
    n_words: int
    n_padded: int
    padding: bytes = b""  # up to the next chunk: zeros, that no checksum covers
    raw: Words | None = None
    basis: Basis = field(default_factory=Basis)
    coded: Coded | None = None
    contexts: Array | None = None
    symbols: Array = field(default_factory=lambda: np.zeros(0, np.uint8))
    planes: list[Array | Coded | int] = field(default_factory=list)
    block_shifts: Array | None = None
    stacked: Stacked | None = None
    remainders: Words = field(default_factory=lambda: np.zeros(0, np.uint8))
    patch_positions: Array = field(default_factory=lambda: np.zeros(0, np.uint16))
    patch_words: Words = field(default_factory=lambda: np.zeros(0, np.uint8))

    def fault(self, text: object) -> CorruptFrame:
        return CorruptFrame(f"chunk {self.number} of {self.job.name!r}: {text}. {_ADVICE}")


def decode(jobs: Sequence[DecodeJob], into: Sequence[Words] | None = None) -> list[Words]:
    """The words that each job asks for. into: arrays to put them in. Raises CorruptFrame, naming chunk and frame.

    Of several faults, that of the first chunk is told, but those of heads come before those of chunks.
    """
    out = [_allocate(job, None if into is None else into[number]) for number, job in enumerate(jobs)]
    heads = [_open(job) for job in jobs]
    pending: list[tuple[Words, _Chunk]] = []
    for job, words, head in zip(jobs, out, heads, strict=True):
        try:
            for chunk in _parse(job, head):
                pending.append((words, chunk))
                if len(pending) == BATCH_CHUNKS:
                    _flush(pending)
                    pending = []
        except CorruptFrame:
            _flush(pending)  # one of these may be at fault too, and comes first
            raise
    _flush(pending)
    return out


def _allocate(job: DecodeJob, target: Words | None) -> Words:
    """The frame's words where the plan alone gives them, else room for them, earned by its directory."""
    plan = job.plan
    if plan.n_chunks and head_bytes(plan) > len(job.cut):
        raise CorruptFrame(f"frame of {job.name!r}: {plan.n_words} words need a longer chunk directory than it has.")
    if plan.n_chunks == 0 and len(job.cut):
        raise CorruptFrame(f"frame of {job.name!r}: {len(job.cut)} bytes where its plan leaves none.")
    words = np.empty(job.end - job.start, plan.dtype.word_dtype) if target is None else target
    if plan.predict == "constant":
        words[...] = plan.word
    elif plan.predict == "copy":
        assert job.reference is not None
        words[...] = job.reference
    return words


def _flush(pending: list[tuple[Words, _Chunk]]) -> None:
    """Decode the streams of all pending chunks at once, and write their words."""
    try:
        _decode_together(pending)
    except CorruptFrame:
        for one in pending:
            _decode_together([one])  # so that the fault names its chunk
        raise


def _decode_together(pending: list[tuple[Words, _Chunk]]) -> None:
    coded = [chunk for _, chunk in pending if chunk.raw is None]
    for chunk in coded:
        first = chunk.number << chunk.job.plan.chunk_log2
        chunk.basis = basis(chunk.job.plan, _reference(chunk), chunk.side.scales, first, chunk.n_words)
    _decode_symbols([chunk for chunk in coded if chunk.coded is not None])
    _decode_planes([chunk for chunk in coded if chunk.planes])
    _decode_stacks([chunk for chunk in coded if chunk.stacked is not None])
    for words, chunk in pending:
        if any(chunk.padding):
            raise chunk.fault("the padding after it is not zero")
        first = (chunk.number << chunk.job.plan.chunk_log2) - chunk.job.start
        words[first : first + chunk.n_words] = _words(chunk)


def _open(job: DecodeJob) -> tuple[Side, Array, Array]:
    """What the head of a frame tells, checked: side section, directory, where chunks begin. Empty if it has none."""
    plan, data = job.plan, job.cut
    if plan.n_chunks == 0:
        return Side(), np.zeros((0, 0), np.uint32), np.zeros(0, np.int64)
    head = data[: head_bytes(plan)]
    if len(head) < head_bytes(plan) or xxhash.xxh3_64_intdigest(head) != plan.side_check:
        raise CorruptFrame(f"frame of {job.name!r}: its side section or directory is damaged. {_ADVICE}")
    try:
        tables = side.read(plan, memoryview(head)[: plan.side_bytes])
    except CorruptFrame as fault:
        raise CorruptFrame(f"frame of {job.name!r}: {fault}.") from None
    rows = directory(plan, head)
    begins, end = places(plan, rows)
    if end != len(data):
        raise CorruptFrame(f"frame of {job.name!r}: its chunks end at byte {end} of {len(data)}. {_ADVICE}")
    return tables, rows, begins


def _parse(job: DecodeJob, head: tuple[Side, Array, Array]) -> Iterator[_Chunk]:
    """Check the checksum of every payload asked for, and cut the payloads up."""
    plan, data = job.plan, job.cut
    tables, rows, begins = head
    numbers = range(job.start >> plan.chunk_log2, -(-job.end >> plan.chunk_log2))
    if not numbers or not plan.n_chunks:
        return
    at = int(begins[numbers[0]])
    payloads = memoryview(data[at : int(begins[numbers[-1]]) + aligned(int(rows[numbers[-1], 2]))])
    for number in numbers:
        row = rows[number].tolist()
        n_words = min(1 << plan.chunk_log2, plan.n_words - (number << plan.chunk_log2))
        chunk = _Chunk(job, tables, number, n_words, padded(n_words))
        first = int(begins[number]) - at
        payload = payloads[first : first + row[2]]
        chunk.padding = bytes(payloads[first + row[2] : first + aligned(row[2])])
        stored = row[0] | row[1] << 32
        if not job.is_checked and (computed := xxhash.xxh3_64_intdigest(payload)) != stored:
            raise chunk.fault(f"checksum {stored:016x} stored, {computed:016x} computed")
        _cut(chunk, row, payload)
        yield chunk


class _Payload:
    """Takes the sections of a payload one after the other, never past its end."""

    def __init__(self, chunk: _Chunk, octets: memoryview) -> None:
        self._chunk = chunk
        self._octets = octets
        self._at = 0

    def take(self, n_bytes: int, dtype: Any) -> Array:
        if n_bytes > len(self._octets) - self._at:
            raise self._chunk.fault("its sections are longer than its payload")
        self._at += n_bytes
        return np.frombuffer(self._octets[self._at - n_bytes : self._at], dtype)

    def stream(self, n_words: int, head_dtype: str, word_dtype: str) -> tuple[Array, Array]:
        """Heads (or states), the zeros before the words, the words."""
        heads = self.take(LANES * np.dtype(head_dtype).itemsize, head_dtype)
        n_bytes = n_words * np.dtype(word_dtype).itemsize
        self.take(-n_bytes % 16, np.uint8)
        return heads, self.take(n_bytes, word_dtype)

    def finish(self) -> None:
        if self._at != len(self._octets):
            raise self._chunk.fault("its sections are shorter than its payload")


def _cut(chunk: _Chunk, row: list[int], octets: memoryview) -> None:
    """Cut a payload into its sections, as its row of the directory says."""
    plan = chunk.job.plan
    payload = _Payload(chunk, octets)
    if row[3] == RAW_FLAG:
        chunk.raw = payload.take(chunk.n_words * plan.dtype.word_bits // 8, plan.dtype.word_dtype)
        payload.finish()
        if any(row[4:]):
            raise chunk.fault("its row of the directory says more than that it is raw")
        return
    if plan.predict == "raw":
        raise chunk.fault("it is not raw as its plan says")
    if plan.entropy == "rans":
        chunk.coded = Coded(*payload.stream(row[4], "<u4", "<u2"))
    elif plan.entropy == "index":
        packed = payload.take(packed_bytes(chunk.n_padded, plan.index_bits), "<u4")
        places = unpack_bits(packed[None], chunk.n_padded, plan.index_bits)[0]
        if (places >= len(chunk.side.dictionary)).any():
            raise chunk.fault("an index is outside the dictionary")
        chunk.symbols = chunk.side.dictionary[places]
    for plane, width in enumerate(plan.plane_widths):
        mode, value = row[DIRECTORY_FIELDS + plane] >> 28, row[DIRECTORY_FIELDS + plane] & (1 << 28) - 1
        if mode == PLANE_RAW:
            packed = payload.take(packed_bytes(chunk.n_padded, width), "<u4")
            chunk.planes.append(unpack_bits(packed[None], chunk.n_padded, width)[0])
        elif mode == PLANE_CONSTANT and value < 1 << width:
            chunk.planes.append(value)
        elif mode == PLANE_RANS and plane in chunk.side.plane_tables:
            chunk.planes.append(Coded(*payload.stream(value, "<u4", "<u2")))
        else:
            raise chunk.fault(f"byte plane {plane} is in an unknown mode")
    if plan.remainder == "stack":
        if plan.has_block_shifts:
            chunk.block_shifts = payload.take(chunk.n_padded // ROW, np.uint8)
            payload.take(-(chunk.n_padded // ROW) % 16, np.uint8)
        kind = f"<u{stack_word_bits(plan.dtype.word_bits) // 8}"
        chunk.stacked = Stacked(*payload.stream(row[5], kind, kind))
    n_patches = row[3]
    chunk.patch_positions = payload.take(2 * n_patches, "<u2")
    chunk.patch_words = payload.take(n_patches * plan.dtype.word_bits // 8, plan.dtype.word_dtype)
    if n_patches and int(chunk.patch_positions[-1]) >= chunk.n_words:
        raise chunk.fault("a patch is outside the chunk")
    if (chunk.patch_positions[1:] <= chunk.patch_positions[:-1]).any():
        raise chunk.fault("its patches are not ascending")
    payload.finish()


def _decode_symbols(chunks: list[_Chunk]) -> None:
    for chunk in chunks:
        chunk.contexts = _contexts(chunk)
    tables = [chunk.side.tables for chunk in chunks]
    try:
        symbols = rans_decode(
            [chunk.coded for chunk in chunks if chunk.coded is not None],
            [table for table in tables if table is not None],
            [chunk.contexts for chunk in chunks],
            [chunk.n_padded for chunk in chunks],
        )
    except CorruptFrame as fault:
        raise _name(chunks, fault) from None
    for chunk, decoded in zip(chunks, symbols, strict=True):
        chunk.symbols = decoded


def _name(chunks: list[_Chunk], fault: CorruptFrame) -> CorruptFrame:
    """The fault of one chunk, or of several as yet."""
    return chunks[0].fault(fault) if len(chunks) == 1 else fault


def _contexts(chunk: _Chunk) -> Array | None:
    """Contexts of a chunk, padded with 0."""
    plan = chunk.job.plan
    if plan.n_contexts == 1:
        return None
    contexts = contexts_of(plan, chunk.basis)
    assert contexts is not None
    out = np.zeros(chunk.n_padded, np.uint8)
    out[: chunk.n_words] = contexts
    return out


def _reference(chunk: _Chunk) -> Words | None:
    first = (chunk.number << chunk.job.plan.chunk_log2) - chunk.job.start
    reference = chunk.job.reference
    return None if reference is None else reference[first : first + chunk.n_words]


def _decode_planes(chunks: list[_Chunk]) -> None:
    coded = [
        (chunk, plane, octets)
        for chunk in chunks
        for plane, octets in enumerate(chunk.planes)
        if isinstance(octets, Coded)
    ]
    try:
        decoded = rans_decode(
            [octets for _, _, octets in coded],
            [chunk.side.plane_tables[plane] for chunk, plane, _ in coded],
            [None] * len(coded),
            [chunk.n_padded for chunk, _, _ in coded],
        )
    except CorruptFrame as fault:
        raise _name([chunk for chunk, _, _ in coded], fault) from None
    for (chunk, plane, _), found in zip(coded, decoded, strict=True):
        chunk.planes[plane] = found
    for chunk in chunks:
        plan = chunk.job.plan
        remainders = np.zeros(chunk.n_words, plan.dtype.word_dtype)
        for plane, octets in enumerate(chunk.planes):
            if isinstance(octets, np.ndarray):
                remainders |= octets[: chunk.n_words].astype(remainders.dtype) << (plan.shift + 8 * plane)
            elif isinstance(octets, int):
                remainders |= remainders.dtype.type(octets << plan.shift + 8 * plane)
        chunk.remainders = remainders


def _decode_stacks(chunks: list[_Chunk]) -> None:
    for word_bits in (8, 16, 32, 64):
        members = [chunk for chunk in chunks if chunk.job.plan.dtype.word_bits == word_bits]
        streams = [chunk.stacked for chunk in members if chunk.stacked is not None]
        lengths = [_lengths(chunk) for chunk in members]
        try:
            values = stack_decode(streams, lengths, stack_word_bits(word_bits), f"<u{word_bits // 8}")
        except CorruptFrame as fault:
            raise _name(members, fault) from None
        for chunk, value in zip(members, values, strict=True):
            if chunk.block_shifts is not None:
                value = value << np.repeat(chunk.block_shifts, ROW)
            chunk.remainders = value[: chunk.n_words]


def _lengths(chunk: _Chunk) -> Array:
    """Bits that the stack holds of each remainder."""
    lengths = np.zeros(chunk.n_padded, np.uint8)
    lengths[: chunk.n_words] = symbol_bits(chunk.job.plan)[chunk.symbols[: chunk.n_words]]
    if chunk.block_shifts is None:
        return lengths
    if (chunk.block_shifts >= chunk.job.plan.dtype.word_bits).any():
        raise chunk.fault("a block shift exceeds the word")
    return lengths - np.minimum(lengths, np.repeat(chunk.block_shifts, ROW))


def _words(chunk: _Chunk) -> Words:
    """Merge a chunk and apply its patches."""
    if chunk.raw is not None:
        return chunk.raw
    plan = chunk.job.plan
    if plan.predict in ("sparse", "cast"):
        words = base_words(plan, chunk.n_words, _reference(chunk), chunk.job.source).copy()
    else:
        remainders = chunk.remainders
        if plan.remainder != "stack" and not plan.plane_widths:
            remainders = np.zeros(chunk.n_words, plan.dtype.word_dtype)
        symbols = chunk.symbols[: chunk.n_words]
        words = merge(plan, symbols, remainders, chunk.basis, chunk.side.palette)
    words[chunk.patch_positions] = chunk.patch_words
    return words
