"""What a planner asks of words on a device: facts, digest sums, lattices; each for many frames in one launch.

Imports ground, numpy, torch and the kernels. The hard thing: a survey reads all words, so it is cut into parts that
fill the device, and one read serves facts and digests of the words and of their reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tricomp.dtypes import DType
from tricomp.kernels.device import Device, HostCopy, Upload
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


def survey(requests: Sequence[Request], device: Device) -> list[Surveyed]:
    """Survey words, and wait for it."""
    return PendingSurvey(requests, device).result()


class PendingSurvey:
    """A survey under way."""

    def __init__(self, requests: Sequence[Request], device: Device) -> None:
        self._n = len(requests)
        self._keys: list[Array] = []
        self._owners: list[Array] = []
        self._told: list[HostCopy] = []
        self._widths = [8 * request.words.element_size() for request in requests]
        upload = Upload(device)
        likes = {
            number: upload.put(np.array([request.like], f"<u{request.words.element_size()}"))
            for number, request in enumerate(requests)
            if request.like is not None
        }
        row_keys = upload.put(_row_keys())
        upload.send()
        kinds: dict[tuple[int, bool], list[tuple[Array, Array, Array]]] = {}
        for number, request in enumerate(requests):
            if not len(request.words):
                continue
            address = upload.address(likes[number]) if number in likes else request.words.data_ptr()
            kind = (8 * request.words.element_size(), request.reference is not None)
            kinds.setdefault(kind, []).append(_parts(number, request, address))
        keys = upload.view(row_keys, torch.int32)
        self._held: list[Any] = [upload, list(requests)]
        for (width, has_reference), members in kinds.items():
            parts = np.concatenate([part for part, _, _ in members])
            parts[:, 5] = np.arange(len(parts))
            is_whole = parts[:, 2] % (_ROW_BYTES * device.survey_rows) == 0
            table = Upload(device)
            places = [
                (bool(flag), table.put(parts[is_whole == flag]), int((is_whole == flag).sum())) for flag in (1, 0)
            ]
            table.send()
            told = device.empty((len(parts), _N_TOLD), torch.int64)
            for flag, place, n_parts in places:
                device.launch(
                    survey_kernel,
                    (n_parts,),
                    table.view(place, torch.int64),
                    keys,
                    told,
                    W=width,
                    HAS_REFERENCE=int(has_reference),
                    IS_WHOLE=int(flag),
                    ROWS=device.survey_rows,
                )
            self._held.append((table, told))
            self._told.append(device.to_host(told))
            self._owners.append(np.concatenate([owner for _, owner, _ in members]))
            self._keys.append(np.concatenate([key for _, _, key in members]))
        self._done = device.event()

    def result(self) -> list[Surveyed]:
        """Wait, and add up what the parts told."""
        self._done.wait()
        sums = np.zeros((self._n, _N_TOLD), np.uint64)
        for copy, owners, keys in zip(self._told, self._owners, self._keys, strict=True):
            told = copy.array().view(np.uint64)
            for column in (0, 1):
                np.add.at(sums[:, column], owners, told[:, column])
            np.bitwise_or.at(sums[:, 2], owners, told[:, 2])
            for column in (3, 4):
                np.add.at(sums[:, column], owners, told[:, column] * keys)
            sums[owners, 5] = told[:, 5]
        self._held.clear()
        return [Surveyed(*_folded(row.tolist(), width)) for row, width in zip(sums, self._widths, strict=True)]


def _folded(numbers: list[int], width: int) -> list[int]:
    """OR of pieces to OR of words."""
    joined = numbers[2]
    for shift in (32, 16, 8):
        if width <= shift:
            joined |= joined >> shift
    numbers[2] = joined & (1 << width) - 1
    return numbers


def _parts(number: int, request: Request, like: int) -> tuple[Array, Array, Array]:
    """Rows of the kernel's table, their request, and the key of the digest's block of each."""
    words, reference = request.words, request.reference
    n_bytes = words.nbytes
    # Parts begin at multiples in the leaf, so that each lies in one block.
    starts = np.arange(-(request.first_byte % PART_BYTES), n_bytes, PART_BYTES)
    ends = np.minimum(starts + PART_BYTES, n_bytes)
    starts = np.maximum(starts, 0)
    parts = np.zeros((len(starts), 6), np.int64)
    parts[:, 0] = words.data_ptr() + starts
    parts[:, 1] = 0 if reference is None else reference.data_ptr() + starts
    parts[:, 2] = ends - starts
    parts[:, 3] = (request.first_byte + starts) % BLOCK_BYTES // _ROW_BYTES
    parts[:, 4] = like
    blocks = ((request.first_byte + starts) // BLOCK_BYTES).astype(np.uint64)
    return parts, np.full(len(starts), number), _mix64(blocks) | np.uint64(1)


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


def gather(lookups: Sequence[Lookup], device: Device) -> list[Array]:
    """What is to be gathered, flat, in host memory; all in one transfer, which is waited for. uint[...], or int16."""
    upload = Upload(device)
    known: dict[int, int] = {}  # the same index arrays serve words and reference

    def put(array: Array) -> int:
        if id(array) not in known:
            known[id(array)] = upload.put(np.ascontiguousarray(array, np.int64))
        return known[id(array)]

    places = [(put(lookup.rows), put(lookup.columns)) for lookup in lookups]
    sizes = [lookup.n_wanted * lookup.item_bytes for lookup in lookups]
    begins = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes)])
    upload.send()
    out = device.empty(int(begins[-1]), torch.uint8)
    table = np.zeros((len(lookups), 8), np.int64)
    programs: dict[tuple[int, bool], list[Array]] = {}
    for i, (lookup, (rows, columns)) in enumerate(zip(lookups, places, strict=True)):
        n_rows, n_columns, dtype = len(lookup.rows), len(lookup.columns), lookup.mean_of
        addresses = (lookup.words.data_ptr(), upload.address(rows), upload.address(columns))
        shift = 0 if dtype is None else dtype.mantissa_bits - 3
        table[i] = (*addresses, lookup.n_columns, n_rows, n_columns, out.data_ptr() + int(begins[i]), shift)
        firsts = np.arange(0, lookup.n_wanted, _GATHERED if dtype is None else _MEAN_ROWS)
        part = np.stack([np.full(len(firsts), i), firsts], axis=1)
        programs.setdefault((8 * lookup.words.element_size(), dtype is not None), []).append(part)
    tables = Upload(device)
    place = tables.put(table)
    launches = [(kind, tables.put(np.concatenate(parts)), sum(map(len, parts))) for kind, parts in programs.items()]
    tables.send()
    for (width, is_mean), program, n_programs in launches:
        views = tables.view(program, torch.int64), tables.view(place, torch.int64)
        if is_mean:
            columns = MOST_MEAN_COLUMNS
            device.launch(mean_kernel, (n_programs,), *views, W=width, ROWS=_MEAN_ROWS, COLUMNS=columns)
        else:
            device.launch(gather_kernel, (n_programs,), *views, W=width, BLOCK=_GATHERED)
    copy = device.to_host(out)
    device.event().wait()
    octets = copy.array()
    return [
        octets[begin : begin + size].view("<i2" if lookup.mean_of is not None else f"<u{lookup.item_bytes}")
        for lookup, begin, size in zip(lookups, begins.tolist(), sizes, strict=False)
    ]
