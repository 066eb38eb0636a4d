"""Encode frames on a device: launch the encoder over all chunks of a kind, lay the streams out, put them together.

Imports ground, numpy, torch and the kernels. Gives what `tricomp.reference.encode` gives, checksums aside, which
whoever has the bytes on the host takes there. The hard thing: no size is known on the host while kernels run. Sizes are
summed up on the device, streams are copied to where the sums say, and one small transfer at the end tells the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from tricomp.dtypes import DType
from tricomp.errors import BackendError
from tricomp.job import Side
from tricomp.kernels.collect_kernel import copy_kernel, patch_kernel
from tricomp.kernels.device import Device, Upload
from tricomp.kernels.encode_kernel import LONGEST_ROW, encode_kernel, plane_kernel
from tricomp.kernels.frame import (
    ALIGN,
    DIRECTORY_FIELDS,
    ENTRIES_ALIGN,
    LANES,
    MOST_PLANES,
    PLANE_CONSTANT,
    PLANE_RANS,
    RAW_FLAG,
    ROW,
    STATE_BYTES,
    Field,
    Flow,
    Kind,
    Result,
    aligned,
    flow_of,
    kind_of,
    numbers_of,
    packed_bytes,
    stack_word_bits,
)
from tricomp.kernels.tables import encoder_entries, entry_lengths, index_places, symbol_lengths
from tricomp.plan import Plan

ROUND_BYTES = 512 << 20  # of device memory that a round of chunks takes, unless one chunk needs more
_ROUNDS_AT_A_TIME = 2  # so that the device has work while bytes of the other cross to the host
_BLOCK = 256  # u64 that a program of copy_kernel moves at a time


@dataclass(frozen=True)
class DeviceJob:
    """One frame to encode. words, reference: int tensors [n_words] of the words' width on one device, contiguous.

    For `cast`: source is the dtype of the reference.
    """

    plan: Plan
    side: Side
    words: torch.Tensor
    reference: torch.Tensor | None = None
    source: DType | None = None


class CodedPart(NamedTuple):
    """Neighbouring chunks of a frame, in host memory. begins, sizes: int64[n], of each in the payload, in bytes."""

    begins: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    payload: memoryview


@dataclass(frozen=True)
class Coded:
    """Chunks of a frame. rows: uint32[n_chunks, fields] of its directory, checksums 0. parts: of all of its chunks."""

    rows: np.ndarray[Any, Any]
    parts: list[CodedPart]

    @property
    def payload(self) -> bytes:
        """All chunks at once."""
        return b"".join(part.payload for part in self.parts)


@dataclass(frozen=True)
class _Layout:
    """Where a chunk's streams stand in its scratch memory, and how long it is; by Field. See `_layout_of`."""

    places: dict[int, int] = field(default_factory=dict)
    plane_streams: dict[int, tuple[int, int]] = field(default_factory=dict)  # states, and one past the words
    n_bytes: int = 0


def encode(jobs: Sequence[DeviceJob], device: Device, round_bytes: int = ROUND_BYTES) -> Pending:
    """Launch the encoding of frames on the device's current stream. Raises OutOfDeviceMemory, BackendError.

    round_bytes: of device memory that a round of chunks takes for streams and for what they are put together to. Two
    rounds are in it at a time; the others are launched when the result is asked for, each before one is waited for.
    """
    return Pending(jobs, device, round_bytes)


class Pending:
    """Frames that a device is encoding, a round of chunks after the other."""

    def __init__(self, jobs: Sequence[DeviceJob], device: Device, round_bytes: int) -> None:
        self._jobs, self._device = jobs, device
        upload = Upload(device)
        self._frames = {number: _Frame(job, upload) for number, job in enumerate(jobs) if job.plan.n_chunks}
        upload.send()
        self._rounds = _rounds(list(self._frames.items()), round_bytes)
        self._launched: deque[_Round] = deque()
        self._going: _Round | None = None  # whose bytes are on their way
        for _ in range(_ROUNDS_AT_A_TIME):
            self._launch()

    def _launch(self) -> None:
        """Launch the next round, if there is one."""
        members = next(self._rounds, None)
        if members is not None:
            self._launched.append(_Round(self._frames, members, self._device))

    def fetch(self) -> None:
        """Wait until the first round is coded, and start copying its bytes."""
        if self._going is None and self._launched:
            self._going = self._launched.popleft()
            self._going.fetch()

    def result(self) -> list[Coded]:
        """Wait, and take the bytes over: one frame a job; frames without chunks are empty."""
        parts: dict[int, list[_Part]] = {}
        self.fetch()
        while self._going is not None:
            for number, part in self._going.result(self._jobs):
                parts.setdefault(number, []).append(part)
            self._going = None
            self.fetch()
            self._launch()  # now that there is room, and the bytes of another round are on their way
        return [_coded(job.plan, parts.get(number, [])) for number, job in enumerate(self._jobs)]


class _Part(NamedTuple):
    """Neighbouring chunks of a frame. told: int64[n, ...], byte of the payload at which each begins, then its row."""

    told: np.ndarray[Any, Any]
    payload: memoryview


def _coded(plan: Plan, parts: Sequence[_Part]) -> Coded:
    """The frame of its parts."""
    n_fields = DIRECTORY_FIELDS + len(plan.plane_widths)
    rows = np.zeros((plan.n_chunks, n_fields), np.uint32)
    first = 0
    for told, _ in parts:
        rows[first : first + len(told), 2:] = told[:, 2:n_fields]
        first += len(told)
    return Coded(rows, [CodedPart(told[:, 0], told[:, 2], payload) for told, payload in parts])


class _Round:
    """Some chunks of some frames on their way through a device."""

    def __init__(self, frames: dict[int, _Frame], members: Sequence[tuple[int, int, int]], device: Device) -> None:
        """members: number of the job, first chunk, chunks."""
        self._members, self._device = members, device
        n_chunks = sum(n for _, _, n in members)
        n_most = sum(n * aligned(frames[number].chunk_bytes) for number, _, n in members)
        self._out = device.empty(n_most, torch.uint8)
        told = device.empty((n_chunks, DIRECTORY_FIELDS + MOST_PLANES), torch.int64)
        end = device.zeros(1, torch.int64)
        self._held = [_launch_round(frames, members, device, self._out, told, end), told, end]
        self._told, self._end = device.to_host(told), device.to_host(end)
        self._done = device.event()

    def fetch(self) -> None:
        """Wait until all is coded, and start copying what compressed bytes there are."""
        self._done.wait()
        self._held.clear()
        self._payload, self._done = self._device.fetch(self._out[: int(self._end.array()[0])])

    def result(self, jobs: Sequence[DeviceJob]) -> list[tuple[int, _Part]]:
        """Wait for what is fetched. The bytes by number of the job."""
        self._done.wait()
        del self._out
        octets, told = self._payload.array().data, self._told.array()
        found = []
        at = 0
        for number, first, n in self._members:
            part = told[at : at + n].copy()
            at += n
            begin, last = int(part[0, 0]), int(part[-1, 0] + part[-1, 2])
            part[:, 0] -= begin
            is_end = first + n == jobs[number].plan.n_chunks
            found.append((number, _Part(part, octets[begin : last if is_end else begin + aligned(last - begin)])))
        return found


class _Frame:
    """A job with its kind, its layout, and its tables on the device."""

    def __init__(self, job: DeviceJob, upload: Upload) -> None:
        plan, side = job.plan, job.side
        if plan.has_column_scale and plan.n_columns >= LONGEST_ROW.value:
            raise BackendError(f"{plan.describe()}: no kernel takes scales of {plan.n_columns} columns. Use the host.")
        self.job, self.upload = job, upload
        self.kind = kind_of(plan, job.reference is not None, job.source)
        self.layout = _layout_of(plan, side)
        self.chunk_bytes = job.words.element_size() << plan.chunk_log2
        numbers: dict[int, int] = dict(numbers_of(plan).items())
        numbers[Field.WORDS] = job.words.data_ptr()
        numbers[Field.REFERENCE] = 0 if job.reference is None else job.reference.data_ptr()
        self.tables = _upload_side(plan, side, upload)
        numbers.update(self.layout.places)
        self.numbers = numbers
        self.plane_tables = {
            plane: upload.put(encoder_entries(side.plane_tables[plane]).reshape(-1))
            for plane in self.layout.plane_streams
        }

    def row(self, scratch: int, first_chunk: int) -> list[int]:
        """Its row of the frame table; addresses of what was uploaded are known by now."""
        numbers = {**self.numbers, **{name: self.upload.address(place) for name, place in self.tables.items()}}
        numbers.update({Field.SCRATCH: scratch, Field.FIRST_CHUNK: first_chunk, Field.STRIDE: self.layout.n_bytes})
        return [_signed(numbers.get(name, 0)) for name in range(Field.N)]


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 == 1 else number


def _upload_side(plan: Plan, side: Side, upload: Upload) -> dict[int, int]:
    places: dict[int, int] = {}
    if side.tables is not None:
        places[Field.TABLE] = upload.put(_zero_last(encoder_entries(side.tables), entry_lengths(plan, side)))
    if plan.entropy == "index":
        entries = index_places(side.dictionary, plan.n_symbols)[None]
        places[Field.PLACES] = upload.put(_zero_last(entries, entry_lengths(plan, side)))
    if plan.predict == "palette":
        places[Field.LIST] = upload.put(side.palette)
    if plan.is_scaled:
        places[Field.ROWS] = upload.put(side.scales.rows)
        if side.scales.columns is not None:
            places[Field.COLUMNS] = upload.put(side.scales.columns)
    return places


def _zero_last(entries: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Entries, then lengths, octet by octet; each context's of symbol 0 at its end, so that no place is below 0."""
    padding = ((0, 0), (0, -entries.shape[1] % ENTRIES_ALIGN))
    rolled = [np.pad(np.roll(part, -1, axis=1), padding) for part in (entries, lengths)]
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in rolled])


def _layout_of(plan: Plan, side: Side) -> _Layout:
    """The parts of a chunk's scratch memory, each at a multiple of 16 bytes."""
    n_words = min(1 << plan.chunk_log2, plan.n_words)
    n_padded = -(-n_words // ROW) * ROW
    places: dict[int, int] = {}
    streams: dict[int, tuple[int, int]] = {}
    at = 0

    def take(n_bytes: int) -> int:
        nonlocal at
        begin, at = at, at + aligned(n_bytes)
        return begin

    def stream(bits_each: int, head_bytes: int) -> tuple[int, int]:
        """Room for heads, and for words that hold so many bits of every position, with two a lane to spare."""
        heads = take(head_bytes)
        take(-(-n_padded * bits_each // 8) + 4 * STATE_BYTES)
        return heads, at

    if plan.predict == "raw":
        return _Layout()
    places[Field.FLAGS] = take(packed_bytes(n_padded, 1))
    if plan.entropy == "rans":
        places[Field.STATES], places[Field.SYMBOLS_END] = stream(plan.prob_bits, STATE_BYTES)
    elif plan.entropy == "index":
        places[Field.SYMBOLS_END] = take(packed_bytes(n_padded, plan.index_bits))
    for plane in range(len(plan.plane_widths)):  # one after the other, at equal distances
        places[Field.PLANE + plane] = take(n_padded)
    for plane in side.plane_tables:
        streams[plane] = stream(plan.prob_bits, STATE_BYTES)
    if plan.remainder == "stack":
        if plan.has_block_shifts:
            places[Field.SHIFTS] = take(n_padded // ROW)
        places[Field.HEADS], places[Field.STACK_END] = stream(int(symbol_lengths(plan).max()), STATE_BYTES)
    return _Layout(places, streams, at)


def _rounds(frames: Sequence[tuple[int, _Frame]], round_bytes: int) -> Iterator[list[tuple[int, int, int]]]:
    """Number of the job, first chunk, chunks: as many at a time as have room, or one."""
    now: list[tuple[int, int, int]] = []
    left = round_bytes
    for number, one in frames:
        n_chunks, n_bytes = one.job.plan.n_chunks, one.layout.n_bytes + aligned(one.chunk_bytes)
        first = 0
        while first < n_chunks:
            n_fit = min(n_chunks - first, left // n_bytes)
            if n_fit == 0 and now:
                yield now
                now, left = [], round_bytes
                continue
            n_fit = max(n_fit, 1)
            now.append((number, first, n_fit))
            first += n_fit
            left -= n_fit * n_bytes
    if now:
        yield now


def _launch_round(
    frames: dict[int, _Frame],
    members: Sequence[tuple[int, int, int]],
    device: Device,
    out: torch.Tensor,
    told: torch.Tensor,
    begin: torch.Tensor,
) -> list[Any]:
    """Launch everything for some chunks. Returns what must live until it has run.

    out: uint8[...], room for all as raw ones; told, begin: see `_lay_out`.
    """
    scratch = device.empty(sum(n * frames[number].layout.n_bytes for number, _, n in members), torch.uint8)
    results = device.zeros((len(told), int(Result.N)), torch.int32)
    tables = Upload(device)
    rows = np.zeros((len(members), int(Field.N)), np.int64)
    work: dict[tuple[Kind, Flow], list[tuple[int, int, int, int]]] = {}
    planes: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    at, n_before = scratch.data_ptr(), 0
    known = []
    for i, (number, first, n) in enumerate(members):
        one = frames[number]
        rows[i] = one.row(at, first)
        known.append(_known_sizes(one, first, n, at))
        at += n * one.layout.n_bytes
        if one.job.plan.predict != "raw":
            for is_whole, start, count in _parts(one.job, first, n, device.chunks_a_program):
                key = one.kind, flow_of(one.job.plan, is_whole)
                work.setdefault(key, []).append((i, start, count, n_before + start - first))
                for plane, (states, end) in one.layout.plane_streams.items():
                    width = one.job.plan.plane_widths[plane]
                    begin_of = one.layout.places[Field.PLANE + plane]
                    table = one.upload.address(one.plane_tables[plane])
                    entry = (i, start, count, n_before + start - first, plane, begin_of, states, end, table)
                    planes.setdefault((width, one.job.plan.prob_bits), []).append(entry)
        n_before += n
    frame_table = tables.put(rows)
    launches = [(key, tables.put(np.array(part, np.int64)), len(part)) for key, part in work.items()]
    plane_launches = [(key, tables.put(np.array(part, np.int64)), len(part)) for key, part in planes.items()]
    sizes = tables.put(np.concatenate(known))
    tables.send()
    for (kind, flow), place, n_programs in launches:
        device.launch(
            encode_kernel,
            (n_programs,),
            tables.view(place, torch.int64),
            tables.view(frame_table, torch.int64),
            results,
            **kind.constants(),
            **flow.constants(),
            C=device.chunks_a_program,
        )
    for (width, prob_bits), place, n_programs in plane_launches:
        device.launch(
            plane_kernel,
            (n_programs,),
            tables.view(place, torch.int64),
            tables.view(frame_table, torch.int64),
            results,
            WIDTH=width,
            P=prob_bits,
            C=device.chunks_a_program,
        )
    sizes_known = tables.view(sizes, torch.int64).view(len(told), -1)
    sections, patches = _lay_out(sizes_known, results.to(torch.int64), told, begin)
    n_most = int(max(frames[number].chunk_bytes for number, _, _ in members))
    n_each = min(-(-n_most // (8 * _BLOCK)) * 8 * _BLOCK, 8 * 8 * _BLOCK)
    n_sections = sections.shape[0] * sections.shape[1]
    device.launch(copy_kernel, (n_sections, -(-n_most // n_each)), sections, out, n_each, BLOCK=_BLOCK)
    for width in sorted(
        {frames[number].kind.W for number, _, _ in members if frames[number].job.plan.predict != "raw"}
    ):
        device.launch(patch_kernel, (len(told),), patches, out, W=width)
    return [scratch, results, tables, sections, patches]


def _parts(job: DeviceJob, first: int, n: int, n_each: int) -> Iterator[tuple[bool, int, int]]:
    """Chunks in programs: whether all are full and every wide load is aligned, first, how many."""
    n_full = (job.plan.n_words >> job.plan.chunk_log2) - first
    is_aligned = job.words.data_ptr() % 8 == 0 and (job.reference is None or job.reference.data_ptr() % 8 == 0)
    n_full = min(max(n_full, 0), n) if is_aligned else 0
    for start in range(first, first + n_full, n_each):
        yield True, start, min(n_each, first + n_full - start)
    for start in range(first + n_full, first + n, n_each):
        yield False, start, min(n_each, first + n - start)


# Columns of what the host knows of a chunk before it is coded.
(
    _SCRATCH,
    _WORDS,
    _N_WORDS,
    _RAW_BYTES,
    _WORD_BYTES,
    _IS_RAW,
    _IS_RANS,
    _INDEX_BYTES,
    _STACK_BYTES,
    _SHIFT_BYTES,
    _HEAD_BYTES,
    _PLACES,
) = range(12)
_N_PLACES = int(Field.N)
_PLANE_BYTES = _PLACES + _N_PLACES  # packed; 0: no such plane
_PLANE_STATES = _PLANE_BYTES + MOST_PLANES  # 0: no table
_PLANE_END = _PLANE_STATES + MOST_PLANES
_N_KNOWN = _PLANE_END + MOST_PLANES


def _known_sizes(one: _Frame, first: int, n: int, scratch: int) -> np.ndarray[Any, Any]:
    """int64[n, _N_KNOWN] of some chunks of a frame. scratch: address of the first one's."""
    plan = one.job.plan
    word_bytes, stack_bytes = one.job.words.element_size(), stack_word_bits(plan.dtype.word_bits) // 8
    chunks = first + np.arange(n)
    n_words = np.minimum(plan.n_words - (chunks << plan.chunk_log2), 1 << plan.chunk_log2)
    n_rows = -(-n_words // ROW)
    known = np.zeros((n, _N_KNOWN), np.int64)
    known[:, _SCRATCH] = scratch + np.arange(n) * one.layout.n_bytes
    known[:, _WORDS] = one.job.words.data_ptr() + (chunks << plan.chunk_log2) * word_bytes
    known[:, _N_WORDS] = n_words
    known[:, _RAW_BYTES] = n_words * word_bytes
    known[:, _WORD_BYTES] = word_bytes
    known[:, _IS_RAW] = plan.predict == "raw"
    known[:, _IS_RANS] = plan.entropy == "rans"
    if plan.entropy == "index":
        known[:, _INDEX_BYTES] = -(-n_rows * plan.index_bits // 8) * 128
    if plan.remainder == "stack":
        known[:, _STACK_BYTES] = stack_bytes
        known[:, _HEAD_BYTES] = LANES * stack_bytes
        known[:, _SHIFT_BYTES] = n_rows if plan.has_block_shifts else 0
    for name, place in one.layout.places.items():
        known[:, _PLACES + name] = place
    for plane, width in enumerate(plan.plane_widths):
        known[:, _PLANE_BYTES + plane] = -(-n_rows * width // 8) * 128
        if plane in one.layout.plane_streams:
            known[:, _PLANE_STATES + plane], known[:, _PLANE_END + plane] = one.layout.plane_streams[plane]
    return known


def _lay_out(
    known: torch.Tensor, results: torch.Tensor, told: torch.Tensor, begin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where every section of every chunk goes, all on the device.

    known, results: int64[n_chunks, ...]. told: int64[n_chunks, fields], filled: byte of the output in column 0, else as
    in the directory. begin: int64[1], the output's next byte, moved on. Returns sections and patches for the kernels.
    """
    n_chunks = len(known)
    scratch, zero = known[:, _SCRATCH], torch.zeros_like(known[:, 0])
    is_rans = known[:, _IS_RANS] != 0
    sources: list[torch.Tensor] = []
    sizes: list[torch.Tensor] = []

    def add(source: torch.Tensor, n_bytes: torch.Tensor) -> None:
        sources.append(scratch + source)
        sizes.append(n_bytes)

    def add_stream(states: torch.Tensor, head_bytes: torch.Tensor, end: torch.Tensor, word_bytes: torch.Tensor) -> None:
        add(states, head_bytes)
        padded = (word_bytes + ALIGN - 1) // ALIGN * ALIGN
        add(end - padded, padded)

    def place(name: int) -> torch.Tensor:
        return known[:, _PLACES + name]

    state_bytes = torch.where(is_rans, STATE_BYTES, zero)
    symbol_words = torch.where(is_rans, results[:, Result.SYMBOL_WORDS], zero)
    add_stream(place(Field.STATES), state_bytes, place(Field.SYMBOLS_END), 2 * symbol_words)
    add(place(Field.SYMBOLS_END), known[:, _INDEX_BYTES])
    rows = torch.zeros_like(told)
    for plane in range(MOST_PLANES):
        packed = known[:, _PLANE_BYTES + plane]
        some, every = results[:, Result.PLANE_ANY + plane], results[:, Result.PLANE_ALL + plane]
        is_constant = (packed > 0) & (some == every)
        n_coded = results[:, Result.PLANE_WORDS + plane]
        coded = STATE_BYTES + (2 * n_coded + ALIGN - 1) // ALIGN * ALIGN
        is_coded = (known[:, _PLANE_END + plane] > 0) & ~is_constant & (coded < packed)
        add(place(Field.PLANE + plane), torch.where(is_constant | is_coded, zero, packed))
        head = torch.where(is_coded, STATE_BYTES, zero)
        words = torch.where(is_coded, 2 * n_coded, zero)
        add_stream(known[:, _PLANE_STATES + plane], head, known[:, _PLANE_END + plane], words)
        rows[:, DIRECTORY_FIELDS + plane] = torch.where(
            is_constant, PLANE_CONSTANT << 28 | some, torch.where(is_coded, PLANE_RANS << 28 | n_coded, zero)
        )
    add(place(Field.SHIFTS), known[:, _SHIFT_BYTES])
    stack_words = torch.where(known[:, _STACK_BYTES] > 0, results[:, Result.STACK_WORDS], zero)
    add_stream(place(Field.HEADS), known[:, _HEAD_BYTES], place(Field.STACK_END), stack_words * known[:, _STACK_BYTES])
    n_patches = results[:, Result.N_PATCHES]
    all_sizes = torch.stack(sizes, dim=1)
    padded = (all_sizes + ALIGN - 1) // ALIGN * ALIGN
    patches_at = padded.sum(dim=1)
    n_bytes = patches_at + n_patches * (2 + known[:, _WORD_BYTES])
    is_raw = (known[:, _IS_RAW] != 0) | (n_bytes >= known[:, _RAW_BYTES])
    n_bytes = torch.where(is_raw, known[:, _RAW_BYTES], n_bytes)
    ends = begin + torch.cumsum((n_bytes + ALIGN - 1) // ALIGN * ALIGN, dim=0)
    begins = torch.cat([begin, ends[:-1]])
    begin.copy_(ends[-1:])
    rows[:, 3] = n_patches
    rows[:, 4] = symbol_words
    rows[:, 5] = stack_words
    rows = torch.where(is_raw[:, None], torch.zeros_like(rows), rows)
    rows[:, 3] = torch.where(is_raw, RAW_FLAG, rows[:, 3])
    rows[:, 2] = n_bytes
    rows[:, 0] = begins
    told.copy_(rows)
    all_sizes = torch.where(is_raw[:, None], torch.zeros_like(all_sizes), all_sizes)
    offsets = begins[:, None] + torch.cumsum(padded, dim=1) - padded
    all_sources = torch.stack(sources, dim=1)
    raw = torch.stack([known[:, _WORDS], begins, torch.where(is_raw, known[:, _RAW_BYTES], zero)], dim=1)
    sections = torch.cat([torch.stack([all_sources, offsets, all_sizes], dim=2), raw[:, None]], dim=1).contiguous()
    patches = torch.stack(
        [
            known[:, _WORDS],
            known[:, _N_WORDS],
            scratch + place(Field.FLAGS),
            torch.where(is_raw, zero, n_patches),
            begins + patches_at,
            8 * known[:, _WORD_BYTES],
        ],
        dim=1,
    ).contiguous()
    assert sections.shape[0] == n_chunks
    return sections, patches
