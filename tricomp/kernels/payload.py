"""Payloads of chunks to decode: where their sections stand, of all at once, and in words what is wrong with one.

Imports ground, numpy and xxhash. Mirrors what `tricomp.reference.decode` checks before it decodes, text by text. The
hard thing: bytes may be hostile, and there are too many chunks to look at each. So all are checked together, which
tells only that something is wrong with a chunk; the first such is then read as the reference would read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from tricomp.bounds import Bytes, Cut
from tricomp.errors import CorruptFrame
from tricomp.job import Side
from tricomp.kernels.frame import (
    ALIGN,
    DIRECTORY_FIELDS,
    INDEX,
    LANES,
    MOST_PLANES,
    PLANE_CONSTANT,
    PLANE_RANS,
    PLANE_RAW,
    RANS,
    RAW,
    RAW_FLAG,
    ROW,
    STACK,
    STATE_BYTES,
    Fault,
    Part,
    aligned,
    packed_bytes,
    stack_word_bits,
)
from tricomp.plan import ENTROPIES, PREDICTIONS, REMAINDERS, Plan

Array = np.ndarray[Any, Any]

ADVICE = "Restore the file from another copy, or list a store's intact steps: tricomp verify FOLDER."
# Of what kernels tell; the rest `read_payload` tells.
_TOLD = {
    Fault.SYMBOLS_END: "its symbols do not end where an encoder begins",
    Fault.PLANES_END: "its symbols do not end where an encoder begins",
    Fault.SHIFT: "a block shift exceeds the word",
    Fault.HEAD: "a lane of its remainders has no first word",
    Fault.STACK_END: "its remainders do not end where an encoder begins",
}
_N_FIELDS = DIRECTORY_FIELDS + MOST_PLANES


class Stored(NamedTuple):
    """A frame as it is stored. name: what errors call it."""

    plan: Plan
    data: Cut
    name: str


def sides(frames: Sequence[Stored], read: Callable[[Plan, Bytes, str], Side]) -> list[Side]:
    """The side section of every frame, its head checked. read: plan, section, name -> Side, or raises CorruptFrame.

    Raises CorruptFrame, of several faults the one that the reference would tell.
    """
    for frame in frames:
        check_room(frame)
    found = []
    for frame in frames:
        plan = frame.plan
        if plan.n_chunks == 0:
            found.append(Side())
            continue
        head = frame.data[: head_bytes(plan)]
        if len(head) < head_bytes(plan) or xxhash.xxh3_64_intdigest(head) != plan.side_check:
            raise CorruptFrame(f"frame of {frame.name!r}: its side section or directory is damaged. {ADVICE}")
        found.append(read(plan, memoryview(head)[: plan.side_bytes], frame.name))
        open_directory(frame)
    return found


def check_room(frame: Stored) -> None:
    """Raise CorruptFrame unless the data may hold the frame's directory, and nothing where there is none."""
    plan = frame.plan
    if plan.n_chunks and head_bytes(plan) > len(frame.data):
        raise CorruptFrame(f"frame of {frame.name!r}: {plan.n_words} words need a longer chunk directory than it has.")
    if plan.n_chunks == 0 and len(frame.data):
        raise CorruptFrame(f"frame of {frame.name!r}: {len(frame.data)} bytes where its plan leaves none.")


def head_bytes(plan: Plan) -> int:
    """Bytes before the first chunk: side section and directory."""
    return plan.side_bytes + aligned(4 * plan.n_chunks * (DIRECTORY_FIELDS + len(plan.plane_widths)))


def open_directory(frame: Stored) -> tuple[Array, Array]:
    """The directory, uint32[n_chunks, fields], and the byte at which each chunk begins. Raises CorruptFrame."""
    plan = frame.plan
    if plan.n_chunks == 0:
        return np.zeros((0, DIRECTORY_FIELDS), np.uint32), np.zeros(0, np.int64)
    n_fields = DIRECTORY_FIELDS + len(plan.plane_widths)
    stored = frame.data[plan.side_bytes : plan.side_bytes + 4 * plan.n_chunks * n_fields]
    rows = np.frombuffer(stored, "<u4").reshape(plan.n_chunks, n_fields)
    sizes = rows[:, 2].astype(np.int64)
    ends = head_bytes(plan) + np.cumsum(aligned_all(sizes))
    begins = ends - aligned_all(sizes)
    end = int(begins[-1] + sizes[-1])
    if end != len(frame.data):
        raise CorruptFrame(f"frame of {frame.name!r}: its chunks end at byte {end} of {len(frame.data)}. {ADVICE}")
    return rows, begins


def aligned_all(n_bytes: Array) -> Array:
    """`aligned` of each."""
    return np.asarray((n_bytes + ALIGN - 1) // ALIGN * ALIGN)


@dataclass(frozen=True)
class Chunks:
    """Chunks of several frames, in the order in which they are decoded. All arrays have one item, or row, a chunk.

    job: number of its frame. number: its own in the frame. n_words. begin: its first byte among all octets. rows: of
    the directory, int64, with zeros for the planes that a frame has not.
    """

    job: Array
    number: Array
    n_words: Array
    begin: Array
    rows: Array

    @property
    def n_bytes(self) -> Array:
        """Bytes of each payload."""
        return self.rows[:, 2]

    @property
    def is_raw(self) -> Array:
        """Whether a chunk's payload is its words."""
        return np.asarray(self.rows[:, 3] == RAW_FLAG)

    def __len__(self) -> int:
        return len(self.job)

    def first(self, n: int) -> Chunks:
        """The first n of them."""
        return Chunks(*(getattr(self, name)[:n] for name in self.__dataclass_fields__))

    def of(self, job: int) -> Array:
        """Which of them belong to a job."""
        return np.arange(*np.searchsorted(self.job, [job, job + 1]))


def chunks_of(plans: Sequence[Plan], wanted: Sequence[tuple[int, range, Array, Array]]) -> Chunks:
    """wanted: of some frames: its number, chunks, their rows of the directory, and where each begins."""
    if not wanted:
        none = np.zeros(0, np.int64)
        return Chunks(none, none, none, none, np.zeros((0, _N_FIELDS), np.int64))
    jobs, numbers, n_words, begins, rows = [], [], [], [], []
    for job, chunks, directory, begin in wanted:
        number = np.arange(chunks.start, chunks.stop)
        plan = plans[job]
        jobs.append(np.full(len(number), job))
        numbers.append(number)
        n_words.append(np.minimum(plan.n_words - (number << plan.chunk_log2), 1 << plan.chunk_log2))
        begins.append(begin)
        wide = np.zeros((len(number), _N_FIELDS), np.int64)
        wide[:, : directory.shape[1]] = directory
        rows.append(wide)
    return Chunks(*(np.concatenate(part) for part in (jobs, numbers, n_words, begins, rows)))


@dataclass(frozen=True)
class Sections:
    """Where the sections of chunks stand, in bytes from a chunk's first.

    parts: int64[n, Part.N], -1 for what a chunk has not. streams: int64[n, 5], coded planes: chunk, plane, states,
    words, number of words. patches: int64[n]. is_faulty: bool[n], chunks whose payload is not as its row says.
    """

    parts: Array
    streams: Array
    patches: Array
    is_faulty: Array


def _numbers(plan: Plan) -> list[int]:
    """What cutting asks of a plan."""
    widths = plan.plane_widths
    return [
        PREDICTIONS.index(plan.predict),
        ENTROPIES.index(plan.entropy),
        REMAINDERS.index(plan.remainder),
        plan.dtype.word_bits // 8,
        stack_word_bits(plan.dtype.word_bits) // 8,
        plan.index_bits,
        plan.has_block_shifts,
        plan.coded_planes,
        *widths,
        *[0] * (MOST_PLANES - len(widths)),
    ]


def cut(plans: Sequence[Plan], chunks: Chunks) -> Sections:
    """Cut the payloads of all chunks up."""
    numbers = np.array([_numbers(plan) for plan in plans], np.int64).reshape(len(plans), -1)[chunks.job]
    predict, entropy, remainder, word_bytes, stack_bytes, index_bits, has_shifts, coded = numbers.T[:8]
    widths = numbers[:, 8:]
    rows, n_rows = chunks.rows, -(-chunks.n_words // ROW)
    parts = np.full((len(chunks), Part.N), -1, np.int64)
    parts[:, Part.NUMBER] = chunks.number
    at = np.zeros(len(chunks), np.int64)

    def take(n_bytes: Array) -> Array:
        """Where a section begins; -1 where it has no bytes."""
        nonlocal at
        begin = np.where(n_bytes > 0, at, -1)
        at = at + n_bytes
        return begin

    def stream(has: Array, head_bytes: Array | int, n_words: Array, word_bytes: Array | int) -> tuple[Array, Array]:
        """Where heads and words begin; the words end at a multiple of 16."""
        n_bytes = np.where(has, n_words * word_bytes, 0)
        heads = take(np.where(has, head_bytes, 0))
        take(aligned_all(n_bytes))
        return heads, np.where(has, at - n_bytes, -1)

    is_rans = entropy == RANS
    symbols, parts[:, Part.SYMBOL_WORDS] = stream(is_rans, STATE_BYTES, rows[:, 4], 2)
    parts[:, Part.N_SYMBOL_WORDS] = np.where(is_rans, rows[:, 4], 0)
    places = take(np.where(entropy == INDEX, _packed_bytes(n_rows, index_bits), 0))
    parts[:, Part.SYMBOLS] = np.where(is_rans, symbols, places)
    streams, constants = [], np.zeros(len(chunks), np.uint64)
    is_unknown = np.zeros(len(chunks), np.bool_)
    for plane in range(MOST_PLANES):
        width = widths[:, plane]
        mode, value = rows[:, DIRECTORY_FIELDS + plane] >> 28, rows[:, DIRECTORY_FIELDS + plane] & (1 << 28) - 1
        is_packed = (mode == PLANE_RAW) & (width > 0)
        is_constant = (mode == PLANE_CONSTANT) & (value < 1 << width) & (width > 0)
        is_coded = (mode == PLANE_RANS) & (coded >> plane & 1 == 1) & (width > 0)
        is_unknown |= (width > 0) & ~(is_packed | is_constant | is_coded)
        parts[:, Part.PLANE + plane] = take(np.where(is_packed, _packed_bytes(n_rows, width), 0))
        constants |= np.where(is_constant, value, 0).astype(np.uint64) << np.uint64(8 * plane)
        states, words = stream(is_coded, STATE_BYTES, value, 2)
        chunk = np.flatnonzero(is_coded)
        streams.append(np.stack([chunk, np.full(len(chunk), plane), states[chunk], words[chunk], value[chunk]], axis=1))
    parts[:, Part.CONSTANTS] = constants.view(np.int64)
    is_stack = remainder == STACK
    parts[:, Part.SHIFTS] = take(np.where(is_stack & (has_shifts == 1), aligned_all(n_rows), 0))
    parts[:, Part.HEADS], parts[:, Part.STACK_WORDS] = stream(is_stack, LANES * stack_bytes, rows[:, 5], stack_bytes)
    parts[:, Part.N_STACK_WORDS] = np.where(is_stack, rows[:, 5], 0)
    patches = at
    is_long = at + rows[:, 3] * (2 + word_bytes) != chunks.n_bytes
    is_bad = (predict == RAW) | is_unknown | is_long
    is_bad_raw = (chunks.n_words * word_bytes != chunks.n_bytes) | rows[:, 4:].any(axis=1)
    return Sections(parts, np.concatenate(streams), patches, np.where(chunks.is_raw, is_bad_raw, is_bad))


def _packed_bytes(n_rows: Array, n_bits: Array) -> Array:
    """`packed_bytes` of each."""
    return np.asarray((n_rows * n_bits + 7) // 8 * 4 * LANES)


def is_padded(chunks: Chunks, octets: Array) -> Array:
    """Whether each chunk is followed by zeros, up to the next multiple of 16 bytes. octets: uint8, of all."""
    ends = chunks.begin + chunks.n_bytes
    place = ends[:, None] + np.arange(ALIGN - 1)
    is_padding = np.arange(ALIGN - 1) < (-chunks.n_bytes % ALIGN)[:, None]
    if not len(octets):  # chunks of a sparse frame may hold nothing
        return np.ones(len(ends), np.bool_)
    found = octets[np.where(is_padding, place, 0)]
    return np.asarray(~((found != 0) & is_padding).any(axis=1))


def told_fault(told: Array) -> str | None:
    """What kernels tell of a chunk whose payload is sound, in words. told: uint8[Fault.N]."""
    return next((text for fault, text in _TOLD.items() if told[fault]), None)


def chunk_fault(number: int, name: str, text: object) -> CorruptFrame:
    """The fault of a chunk."""
    return CorruptFrame(f"chunk {number} of {name!r}: {text}. {ADVICE}")


def read_payload(plan: Plan, side: Side, n_words: int, row: Sequence[int], octets: Bytes) -> None:
    """Read one payload, section by section, as the reference does. row: of its directory, from the third field on.

    Raises CorruptFrame, which tells the first thing that is wrong, and nothing around it.
    """
    at = 0

    def take(n_bytes: int) -> memoryview:
        nonlocal at
        if n_bytes > len(octets) - at:
            raise CorruptFrame("its sections are longer than its payload")
        at += n_bytes
        return memoryview(octets)[at - n_bytes : at]

    def stream(head_bytes: int, n_words: int, word_bytes: int) -> None:
        take(head_bytes)
        take(aligned(n_words * word_bytes))

    def finish() -> None:
        if at != len(octets):
            raise CorruptFrame("its sections are shorter than its payload")

    n_padded, word_bytes = -(-n_words // ROW) * ROW, plan.dtype.word_bits // 8
    _, n_patches, symbol_words, stack_words, *planes = row
    if n_patches == RAW_FLAG:
        take(n_words * word_bytes)
        finish()
        if any(row[2:]):
            raise CorruptFrame("its row of the directory says more than that it is raw")
        return
    if plan.predict == "raw":
        raise CorruptFrame("it is not raw as its plan says")
    if plan.entropy == "rans":
        stream(STATE_BYTES, symbol_words, 2)
    elif plan.entropy == "index":
        packed = np.frombuffer(take(packed_bytes(n_padded, plan.index_bits)), "<u4")
        if _largest(packed, n_padded, plan.index_bits) >= len(side.dictionary):
            raise CorruptFrame("an index is outside the dictionary")
    for plane, width in enumerate(plan.plane_widths):
        mode, value = planes[plane] >> 28, planes[plane] & (1 << 28) - 1
        if mode == PLANE_RAW:
            take(packed_bytes(n_padded, width))
        elif mode == PLANE_RANS and plane in side.plane_tables:
            stream(STATE_BYTES, value, 2)
        elif mode != PLANE_CONSTANT or value >= 1 << width:
            raise CorruptFrame(f"byte plane {plane} is in an unknown mode")
    if plan.remainder == "stack":
        if plan.has_block_shifts:
            take(aligned(n_padded // ROW))
        stack_bytes = stack_word_bits(plan.dtype.word_bits) // 8
        stream(LANES * stack_bytes, stack_words, stack_bytes)
    positions = np.frombuffer(take(2 * n_patches), "<u2")
    take(n_patches * word_bytes)
    if n_patches and int(positions[-1]) >= n_words:
        raise CorruptFrame("a patch is outside the chunk")
    if (positions[1:] <= positions[:-1]).any():
        raise CorruptFrame("its patches are not ascending")
    finish()


def _largest(packed: Array, n_padded: int, n_bits: int) -> int:
    """The largest of values packed vertically. packed: uint32[...]."""
    lanes = np.ascontiguousarray(packed.reshape(-1, LANES).T).view(np.uint8)
    bits = np.unpackbits(lanes, axis=1, bitorder="little")[:, : n_padded // LANES * n_bits]
    return int((bits.reshape(-1, n_bits) << np.arange(n_bits)).sum(axis=1).max())
