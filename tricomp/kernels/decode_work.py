"""What the decode kernels are told: rows of their tables, and programs, for all chunks of all jobs at once.

Imports ground, numpy, torch, and what says how tables look. The hard thing: kernels go by addresses alone, so whatever
is written here must lie inside a tensor of the job, its payload, or the memory that planes are decoded to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tricomp.bounds import Cut
from tricomp.dtypes import DType
from tricomp.job import Side
from tricomp.kernels.device import Upload
from tricomp.kernels.frame import MOST_PLANES, ROW, Field, Flow, Kind, Part, Stream, flow_of, kind_of, numbers_of
from tricomp.kernels.payload import Chunks, Stored
from tricomp.kernels.tables import decoder_slots, meanings
from tricomp.plan import Plan

Array = np.ndarray[Any, Any]

PIECE_BYTES = 1 << 16  # that one program copies
_MOST_INDICES = 256
_LONG_ROW = 1 << 30  # of a split; a chunk further, columns would pass 32 bits
_ADDRESSES = [
    Part.SYMBOLS,
    Part.SYMBOL_WORDS,
    Part.SHIFTS,
    Part.HEADS,
    Part.STACK_WORDS,
    *(Part.PLANE + plane for plane in range(MOST_PLANES)),
]


@dataclass(frozen=True)
class DeviceDecodeJob:
    """One frame to decode, or the words [start, stop) of it, as DecodeJob has it, to a tensor on a device.

    side: of the frame, its head checked, see payload.sides. target, reference: int tensors [stop - start] of the words'
    width (for `cast`, of the source's), contiguous; the target may be part of a larger one.
    """

    plan: Plan
    side: Side
    data: bytes | memoryview | Cut
    target: torch.Tensor
    reference: torch.Tensor | None = None
    source: DType | None = None
    name: str = "array"
    start: int = 0
    stop: int | None = None
    is_checked: bool = False

    @property
    def end(self) -> int:
        return self.plan.n_words if self.stop is None else self.stop

    @property
    def stored(self) -> Stored:
        """Its bytes, to be sliced."""
        data = memoryview(self.data).cast("B") if isinstance(self.data, bytes | memoryview) else self.data
        return Stored(self.plan, data, self.name)

    @property
    def numbers(self) -> range:
        """Numbers of the chunks that it asks for."""
        if self.plan.n_chunks == 0 or self.start >= self.end:
            return range(0)
        return range(self.start >> self.plan.chunk_log2, -(-self.end >> self.plan.chunk_log2))

    def targets(self, numbers: Array) -> Array:
        """Addresses of the words of chunks."""
        return self._addresses(self.target, numbers)

    def references(self, numbers: Array) -> Array:
        """Addresses of the reference's words that belong to chunks; 0 where there is none."""
        return np.zeros_like(numbers) if self.reference is None else self._addresses(self.reference, numbers)

    def _addresses(self, words: torch.Tensor, numbers: Array) -> Array:
        places = (numbers << self.plan.chunk_log2) - self.start
        return np.asarray(words.data_ptr() + places * words.element_size())


class Looked:
    """What kernels look up of frames: tables, dictionaries, palettes, scales; on their way to the device."""

    def __init__(self, jobs: Sequence[DeviceDecodeJob], members: Sequence[int], upload: Upload) -> None:
        """members: the jobs that any of it is needed for."""
        self._upload = upload
        self._places = {number: _put_side(jobs[number], upload) for number in members}
        self._planes = {
            (number, plane): upload.put(decoder_slots(tables))
            for number in members
            for plane, tables in jobs[number].side.plane_tables.items()
        }

    def fields(self, number: int) -> dict[int, int]:
        """Addresses of what was sent of a frame, by Field. To be asked for after the upload was sent."""
        return {name: self._upload.address(place) for name, place in self._places[number].items()}

    def plane_tables(self, n_jobs: int) -> Array:
        """int64[n_jobs, MOST_PLANES]: address of each plane's table; 0 where it has none."""
        found = np.zeros((n_jobs, MOST_PLANES), np.int64)
        for key, place in self._planes.items():
            found[key] = self._upload.address(place)
        return found


def _put_side(job: DeviceDecodeJob, upload: Upload) -> dict[int, int]:
    plan, side = job.plan, job.side
    places: dict[int, int] = {}
    if side.tables is not None:
        places[Field.TABLE] = upload.put(decoder_slots(side.tables))
    symbols = np.arange(plan.n_symbols)
    if plan.entropy == "index":
        symbols = np.zeros(_MOST_INDICES, np.uint8)  # whatever an index is, it is inside
        symbols[: len(side.dictionary)] = side.dictionary
        places[Field.PLACES] = upload.put(symbols)
    if plan.predict == "palette":
        places[Field.LIST] = upload.put(side.palette[symbols])
    if plan.predict in ("delta", "scaled_delta"):
        places[Field.MEANINGS] = upload.put(meanings(plan)[symbols])
    if plan.is_scaled:
        places[Field.ROWS] = upload.put(side.scales.rows)
        if side.scales.columns is not None:
            places[Field.COLUMNS] = upload.put(side.scales.columns)
    return places


def frame_row(job: DeviceDecodeJob, looked: dict[int, int]) -> list[int]:
    """A job's row of the frame table. Positions are counted in the frame, whatever part of it is decoded."""
    numbers: dict[int, int] = {int(name): number for name, number in numbers_of(job.plan).items()}
    numbers.update(looked)
    origin = np.zeros(1, np.int64)
    numbers[Field.WORDS] = int(job.targets(origin)[0])
    numbers[Field.REFERENCE] = int(job.references(origin)[0])
    numbers[Field.N_PLACES] = len(job.side.dictionary)
    return [numbers.get(name, 0) for name in range(Field.N)]


def placed(parts: Array, addresses: Array) -> Array:
    """The chunk table: parts of Sections with addresses for places. addresses: int64[n], of each chunk's payload."""
    table = parts.copy()
    places = table[:, _ADDRESSES]
    table[:, _ADDRESSES] = np.where(places >= 0, places + addresses[:, None], 0)
    return table


def plane_streams(
    plans: Sequence[Plan], chunks: Chunks, coded: Array, addresses: Array, tables: Array
) -> tuple[Array, Array, Array]:
    """Coded planes, see Stream, their targets counted from 0; width and prob_bits of each, int64[n, 2]; bytes of each.

    coded: streams of Sections. tables: address of the table of each job's planes, int64[n_jobs, MOST_PLANES].
    """
    chunk, plane = coded[:, 0], coded[:, 1]
    job = chunks.job[chunk]
    widths = np.zeros((len(plans), MOST_PLANES), np.int64)
    for number in np.unique(job).tolist():
        widths[number, : len(plans[number].plane_widths)] = plans[number].plane_widths
    prob_bits = np.array([plan.prob_bits for plan in plans], np.int64)
    kinds = np.stack([widths[job, plane], prob_bits[job]], axis=1)
    n_rows = (chunks.n_words[chunk] + ROW - 1) // ROW
    n_bytes = (n_rows * kinds[:, 0] + 7) // 8 * ROW
    streams = np.zeros((len(coded), int(Stream.N)), np.int64)
    streams[:, Stream.CHUNK] = chunk
    streams[:, Stream.N_ROWS] = n_rows
    streams[:, Stream.STATES] = addresses[chunk] + coded[:, 2]
    streams[:, Stream.WORDS] = addresses[chunk] + coded[:, 3]
    streams[:, Stream.N_WORDS] = coded[:, 4]
    streams[:, Stream.TABLE] = tables[job, plane]
    streams[:, Stream.TARGET] = np.cumsum(n_bytes) - n_bytes
    return streams, kinds, n_bytes


def plane_programs(streams: Array, kinds: Array, n_each: int) -> Iterator[tuple[tuple[int, int], Array]]:
    """Programs of plane_kernel by width and prob_bits. n_each: streams that a program decodes."""
    for width, prob_bits in np.unique(kinds, axis=0).tolist():
        grouped = _grouped(np.flatnonzero((kinds == (width, prob_bits)).all(axis=1)), n_each)
        n_rows = streams[grouped, Stream.N_ROWS].max(axis=1, keepdims=True)
        yield (width, prob_bits), np.concatenate([n_rows, grouped], axis=1)


def programs(
    jobs: Sequence[DeviceDecodeJob], chunks: Chunks, rows_of: dict[int, Array], n_each: int
) -> dict[tuple[Kind, Flow, bool], Array]:
    """Programs of decode_kernel by kind and flow, and by whether their rows are long.

    rows_of: the chunks of each job that has such, in the order of the frame table. n_each: chunks of a program.
    """
    found: dict[tuple[Kind, Flow, bool], list[Array]] = {}
    for i, (number, rows) in enumerate(rows_of.items()):
        job = jobs[number]
        n_words = chunks.n_words[rows]
        kind = kind_of(job.plan, job.reference is not None, job.source)
        is_aligned = job.target.data_ptr() % 8 == 0 and (job.reference is None or job.reference.data_ptr() % 8 == 0)
        is_whole = (n_words == 1 << job.plan.chunk_log2) & is_aligned
        is_long = job.plan.n_columns >= _LONG_ROW
        for whole in (True, False):
            if (is_whole == whole).any():
                grouped = _grouped(rows[is_whole == whole], n_each)
                n_rows = -(-int(n_words[is_whole == whole].max()) // ROW)
                heads = np.broadcast_to(np.array([i, n_rows]), (len(grouped), 2))
                key = kind, flow_of(job.plan, whole), is_long
                found.setdefault(key, []).append(np.concatenate([heads, grouped], axis=1))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _grouped(rows: Array, n_each: int) -> Array:
    """Rows in programs, int64[n, n_each]; the last again where there are too few."""
    spare = np.repeat(rows[-1:], -len(rows) % n_each)
    return np.concatenate([rows, spare]).reshape(-1, n_each)


def copies(jobs: Sequence[DeviceDecodeJob], chunks: Chunks, addresses: Array) -> Iterator[tuple[int, Array]]:
    """Pieces of copy_kernel by the bits of its units: raw chunks, constants, copies, and what patches are put on."""
    parts: list[Array] = [np.zeros((0, 5), np.int64)]  # source, target, bytes, value, bytes of a word
    is_raw_all = chunks.is_raw
    for number, job in enumerate(jobs):
        plan, word_bytes = job.plan, job.target.element_size()
        value = _repeated(plan.word, 8 * word_bytes)
        if plan.predict in ("constant", "copy"):
            source = job.reference.data_ptr() if plan.predict == "copy" and job.reference is not None else 0
            n_bytes = np.array([job.target.numel() * word_bytes])
            parts.append(_columns(n_bytes, source, job.target.data_ptr(), n_bytes, value, word_bytes))
            continue
        rows = chunks.of(number)
        for is_raw in (True, False):
            some = rows[is_raw_all[rows] == is_raw]
            if not len(some) or not (is_raw or plan.predict == "sparse"):
                continue
            sources = addresses[some] if is_raw else job.references(chunks.number[some])
            targets, n_bytes = job.targets(chunks.number[some]), word_bytes * chunks.n_words[some]
            parts.append(_columns(n_bytes, sources, targets, n_bytes, value, word_bytes))
    table = np.concatenate(parts)
    is_wide = (table[:, :3] % 8 == 0).all(axis=1)
    unit_bytes = np.where(is_wide, 8, table[:, 4])
    for unit in np.unique(unit_bytes).tolist():
        some = table[unit_bytes == unit]
        yield 8 * unit, _pieces(some[:, 0], some[:, 1], some[:, 2] // unit, some[:, 3], unit, unit)


def casts(jobs: Sequence[DeviceDecodeJob], chunks: Chunks) -> dict[tuple[int, int, int, int], Array]:
    """Pieces of cast_kernel by widths and mantissas, the source's and the target's."""
    found: dict[tuple[int, int, int, int], list[Array]] = {}
    is_raw = chunks.is_raw
    for number, job in enumerate(jobs):
        rows = chunks.of(number)
        rows = rows[~is_raw[rows]]
        if job.plan.predict != "cast" or job.source is None or not len(rows):
            continue
        source, dtype, numbers = job.source, job.plan.dtype, chunks.number[rows]
        widths = source.word_bits // 8, dtype.word_bits // 8
        pieces = _pieces(
            job.references(numbers), job.targets(numbers), chunks.n_words[rows], np.zeros_like(rows), *widths
        )
        key = source.word_bits, source.mantissa_bits, dtype.word_bits, dtype.mantissa_bits
        found.setdefault(key, []).append(pieces)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def patches(jobs: Sequence[DeviceDecodeJob], chunks: Chunks, places: Array) -> dict[int, Array]:
    """Work of patch_kernel by the bits of a word. places: address of each chunk's patches."""
    found: dict[int, list[Array]] = {}
    has_patches = ~chunks.is_raw & (chunks.rows[:, 3] > 0)
    for number, job in enumerate(jobs):
        rows = chunks.of(number)
        rows = rows[has_patches[rows]]
        if len(rows):
            columns = places[rows], chunks.rows[rows, 3], job.targets(chunks.number[rows]), chunks.n_words[rows]
            found.setdefault(job.plan.dtype.word_bits, []).append(_columns(rows, rows, *columns))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _columns(like: Array, *columns: Array | int) -> Array:
    """Columns side by side, int64, each as long as one of them."""
    return np.stack([np.broadcast_to(np.asarray(column, np.int64), like.shape) for column in columns], axis=1)


def _repeated(word: int, n_bits: int) -> int:
    """A word again and again in 64 bits, as a signed number."""
    value = sum(word << place for place in range(0, 64, n_bits))
    return value - (1 << 64) if value >> 63 else value


def _pieces(source: Array, target: Array, n_units: Array, value: Array, from_bytes: int, to_bytes: int) -> Array:
    """Runs of units in pieces: source (0: none), target, units, value. Units may have other widths at the target."""
    n_each = PIECE_BYTES // max(from_bytes, to_bytes)
    counts = -(-n_units // n_each)
    run = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * n_each
    sources = np.where(source[run] == 0, 0, source[run] + first * from_bytes)
    n_left = np.minimum(n_units[run] - first, n_each)
    return np.stack([sources, target[run] + first * to_bytes, n_left, value[run]], axis=1)
