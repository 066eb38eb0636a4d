"""What a planner asks of words on a device: facts, digest sums, lattices; each for many frames in one launch.

Imports ground, numpy, torch and the kernels. The hard thing: a survey reads all words, so it is cut into parts that
fill the device, and one read serves facts and digests of the words and of their reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from tricomp.dtypes import DType
from tricomp.kernels.device import Device, Upload
from tricomp.kernels.survey_kernel import gather_kernel, mean_kernel, survey_kernel

PART_BYTES = 128 << 10  # of words that one program surveys
BLOCK_BYTES = 2 << 20  # of a digest. Frozen since format 1
_ROW_BYTES = 512
_N_TOLD = 6
_GATHERED = 1024  # words that one program gathers
_MEAN_ROWS = 8  # means that one program takes
MOST_MEAN_COLUMNS = 128

Array = np.ndarray[Any, Any]


class Surveyed(NamedTuple):
    """Exact facts of words. n_unlike: how many differ from the one compared with; n_unlike_reference: and from theirs.

    joined: OR of all. digest_sum, reference_sum: what they add to the digests of leaves, see digest_end. like: the word
    compared with, 0 where there are no words.
    """

    n_unlike: int
    n_unlike_reference: int
    joined: int
    digest_sum: int
    reference_sum: int
    like: int


class Request(NamedTuple):
    """Words to survey: int tensor [n], contiguous, at a multiple of 8 bytes in memory, as their reference is.

    like: the word to compare with, as an unsigned number; None: the first one. first_byte: where in their leaf they
    begin, a multiple of 512.
    """

    words: torch.Tensor
    reference: torch.Tensor | None = None
    like: int | None = None
    first_byte: int = 0


def survey(requests: Sequence[Request], device: Device) -> PendingSurvey:
    """Launch a survey of words on the device's current stream."""
    return PendingSurvey(requests, device)


class PendingSurvey:
    """A survey under way."""

    def __init__(self, requests: Sequence[Request], device: Device) -> None:
        self._widths = [8 * request.words.element_size() for request in requests]
        made = [part for i, one in enumerate(requests) if len(one.words) for part in _parts(i, one, device)]
        made.sort(key=lambda part: part.kind)
        table = np.concatenate([_NO_PARTS.table, *(part.table for part in made)])
        table[:, 5] = np.arange(len(table))
        self._owners = np.concatenate([_NO_PARTS.owners, *(part.owners for part in made)])
        self._keys = np.concatenate([_NO_PARTS.keys, *(part.keys for part in made)])
        upload = Upload(device)
        row_keys, parts = upload.put(_row_keys()), upload.put(table)
        likes = {
            number: upload.put(np.array([one.like], f"<u{one.words.element_size()}"))
            for number, one in enumerate(requests)
            if one.like is not None
        }
        upload.allocate()
        for number, place in likes.items():
            table[self._owners == number, 4] = upload.address(place)
        upload.send()
        told = device.empty((max(len(table), 1), _N_TOLD), torch.int64)
        first = 0
        for kind, some in groupby(made, key=lambda part: part.kind):
            n_parts = sum(len(part.owners) for part in some)
            device.launch(
                survey_kernel,
                (n_parts,),
                upload.view(parts, torch.int64)[first * table.shape[1] :],
                upload.view(row_keys, torch.int32),
                told,
                W=kind >> 2,
                HAS_REFERENCE=kind >> 1 & 1,
                IS_WHOLE=kind & 1,
                ROWS=device.survey_rows,
            )
            first += n_parts
        self._held: list[Any] = [upload, told, list(requests)]
        self._told, self._done = device.to_host(told), device.event()

    def result(self) -> list[Surveyed]:
        """Wait, and add up what the parts told."""
        self._done.wait()
        self._held.clear()
        told = self._told.array().view(np.uint64)[: len(self._owners)]
        sums = np.zeros((len(self._widths), _N_TOLD), np.uint64)
        for column in (0, 1):
            np.add.at(sums[:, column], self._owners, told[:, column])
        np.bitwise_or.at(sums[:, 2], self._owners, told[:, 2])
        for column in (3, 4):
            np.add.at(sums[:, column], self._owners, told[:, column] * self._keys)
        sums[self._owners, 5] = told[:, 5]
        return [Surveyed(*_folded(row.tolist(), width)) for row, width in zip(sums, self._widths, strict=True)]


def _folded(numbers: list[int], width: int) -> list[int]:
    """OR of pieces to OR of words."""
    joined = numbers[2]
    for shift in (32, 16, 8):
        if width <= shift:
            joined |= joined >> shift
    numbers[2] = joined & (1 << width) - 1
    return numbers


class _Parts(NamedTuple):
    """Parts of words that are surveyed. kind: 4 * bits of a word + 2 * has a reference + is whole, of all of them.

    table: of the kernel, int64[n, 6]; owners: the number of the request; keys: of the digest's block, uint64.
    """

    kind: int
    table: Array
    owners: Array
    keys: Array


_NO_PARTS = _Parts(0, np.zeros((0, 6), np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _parts(number: int, request: Request, device: Device) -> Iterator[_Parts]:
    """What a program each does of a request: those that are whole, and the others."""
    words, reference = request.words, request.reference
    n_bytes = words.nbytes
    # Parts begin at multiples in the leaf, so that each lies in one block.
    starts = np.arange(-(request.first_byte % PART_BYTES), n_bytes, PART_BYTES)
    ends = np.minimum(starts + PART_BYTES, n_bytes)
    starts = np.maximum(starts, 0)
    table = np.zeros((len(starts), 6), np.int64)
    table[:, 0] = words.data_ptr() + starts
    table[:, 1] = 0 if reference is None else reference.data_ptr() + starts
    table[:, 2] = ends - starts
    table[:, 3] = (request.first_byte + starts) % BLOCK_BYTES // _ROW_BYTES
    table[:, 4] = words.data_ptr()
    blocks = ((request.first_byte + starts) // BLOCK_BYTES).astype(np.uint64)
    keys = _mix64(blocks) | np.uint64(1)
    is_whole = table[:, 2] % (_ROW_BYTES * device.survey_rows) == 0
    kind = 4 * 8 * words.element_size() + 2 * (reference is not None)
    for some, flag in ((is_whole, 1), (~is_whole, 0)):
        yield _Parts(kind + flag, table[some], np.full(int(some.sum()), number), keys[some])


@cache
def _row_keys() -> Array:
    """Keys of a block's rows of 512 bytes: of the lower and of the upper halves of products. uint32[2, 4096]."""
    rows = np.arange(BLOCK_BYTES // _ROW_BYTES, dtype=np.uint32)
    halves = [_mix32(rows ^ np.uint32(seed)) | np.uint32(1) for seed in (0x9E3779B9, 0x7F4A7C15)]
    return np.stack(halves)


def _mix32(x: Array) -> Array:
    """Finaliser of MurmurHash3 (A. Appleby), 32 bits. x: uint32[n]."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    mixed: Array = x ^ x >> np.uint32(16)
    return mixed


def _mix64(x: Array) -> Array:
    """Finaliser of SplitMix64 (Steele, Lea, Flood). x: uint64[n]."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ x >> np.uint64(31)
    return mixed


class Lookup(NamedTuple):
    """What to gather: the words at rows[i] * n_columns + columns[j]. words: int tensor [n]; rows, columns: int64[...].

    mean_of: the words' dtype, a float: then no words are wanted but the mean octave of each row, int16[rows]; at most
    MOST_MEAN_COLUMNS columns. See job.Lattice.
    """

    words: torch.Tensor
    rows: Array
    columns: Array
    n_columns: int
    mean_of: DType | None = None

    @property
    def item_bytes(self) -> int:
        return 2 if self.mean_of is not None else self.words.element_size()

    @property
    def n_wanted(self) -> int:
        return len(self.rows) * (1 if self.mean_of is not None else len(self.columns))

    @property
    def n_bytes(self) -> int:
        return self.n_wanted * self.item_bytes


def gather(lookups: Sequence[Lookup], device: Device) -> PendingGather:
    """Launch the gathering of words on the device's current stream."""
    return PendingGather(lookups, device)


class PendingGather:
    """What is being gathered, all in one transfer."""

    def __init__(self, lookups: Sequence[Lookup], device: Device) -> None:
        self._lookups = list(lookups)
        upload = Upload(device)
        known: dict[int, int] = {}  # the same index arrays serve words and reference

        def put(array: Array) -> int:
            if id(array) not in known:
                known[id(array)] = upload.put(np.ascontiguousarray(array, np.int64))
            return known[id(array)]

        places = [(put(lookup.rows), put(lookup.columns)) for lookup in lookups]
        programs: dict[tuple[int, bool], list[Array]] = {}
        for i, lookup in enumerate(lookups):
            is_mean = lookup.mean_of is not None
            firsts = np.arange(0, lookup.n_wanted, _MEAN_ROWS if is_mean else _GATHERED)
            part = np.stack([np.full(len(firsts), i), firsts], axis=1)
            programs.setdefault((8 * lookup.words.element_size(), is_mean), []).append(part)
        launches = [(kind, upload.put(np.concatenate(parts)), sum(map(len, parts))) for kind, parts in programs.items()]
        table = np.zeros((len(lookups), 8), np.int64)
        lattices = upload.put(table)
        self._begins = np.cumsum([0, *(-(-lookup.n_bytes // 16) * 16 for lookup in lookups)]).tolist()
        out = device.empty(max(self._begins[-1], 1), torch.uint8)
        upload.allocate()
        for i, (lookup, (rows, columns)) in enumerate(zip(lookups, places, strict=True)):
            addresses = lookup.words.data_ptr(), upload.address(rows), upload.address(columns)
            sizes = lookup.n_columns, len(lookup.rows), len(lookup.columns)
            shift = 0 if lookup.mean_of is None else lookup.mean_of.mantissa_bits - 3
            table[i] = (*addresses, *sizes, out.data_ptr() + self._begins[i], shift)
        upload.send()
        for (width, is_mean), program, n_programs in launches:
            views = upload.view(program, torch.int64), upload.view(lattices, torch.int64)
            if is_mean:
                constants = {"ROWS": _MEAN_ROWS, "COLUMNS": MOST_MEAN_COLUMNS}
                device.launch(mean_kernel, (n_programs,), *views, W=width, **constants)
            else:
                device.launch(gather_kernel, (n_programs,), *views, W=width, BLOCK=_GATHERED)
        self._held: list[Any] = [upload, out]
        self._copy, self._done = device.to_host(out), device.event()

    def result(self) -> list[Array]:
        """Wait. What was gathered of each, flat, in host memory: uint[...], or int16 of means."""
        self._done.wait()
        self._held.clear()
        octets = self._copy.array()
        return [
            octets[begin : begin + one.n_bytes].view("<i2" if one.mean_of is not None else f"<u{one.item_bytes}")
            for begin, one in zip(self._begins, self._lookups, strict=False)
        ]
