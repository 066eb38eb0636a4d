"""The zip archive that torch.save writes: its records, and which leaves stand where in them. Runs nothing of a pickle.

The hard thing: torch.load tells of no tensor from which record it came. But it maps the whole file once and every
storage is a part of that map, so one unknown, the map's address, turns addresses into places in the file; and it is
used only if it puts every storage on a record of its very size.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tricomp.errors import InvalidArgument
from tricomp.folder import LocalFile
from tricomp.formats import Span
from tricomp_torch.tensors import fills_memory

_LOCAL = struct.Struct("<4s5H3I2H")  # signature, five fields, crc, sizes, lengths of name and extra field
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_CRC_IN_CENTRAL = 16
_DESCRIPTOR = b"PK\7\b"  # then crc and sizes, behind a record's bytes
_MOST_UNUSED = 64  # records that no leaf is of
_MOST_UNCOVERED = 1 << 16, 64  # bytes of records, at least, and one part in so many, that a skeleton may hold


@dataclass(frozen=True)
class Record:
    """One storage in the archive: where its bytes stand, and where its checksums do."""

    name: str
    offset: int
    n_bytes: int
    is_stored: bool
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class Archive:
    """What the archive's directory tells. top: the folder in it that holds all."""

    top: str
    names: frozenset[str]
    records: tuple[Record, ...]
    is_little: bool
    pickle_bytes: int

    @property
    def is_script(self) -> bool:
        """Whether it is a TorchScript archive: a program."""
        return f"{self.top}/constants.pkl" in self.names or any(
            name.startswith(f"{self.top}/code/") for name in self.names
        )

    @property
    def is_mappable(self) -> bool:
        """Whether every storage stands in the file as it is."""
        return all(record.is_stored for record in self.records)


def read_archive(path: str, source: LocalFile) -> Archive | None:
    """The directory of an archive, None if it is a zip of something else. Raises InvalidArgument if it is damaged."""
    try:
        with zipfile.ZipFile(path) as opened:
            entries = opened.infolist()
            names = [entry.filename for entry in entries]
            top = next((name[: -len("/data.pkl")] for name in names if name.endswith("/data.pkl")), None)
            if top is None:
                return None
            if all(entry.header_offset for entry in entries):  # torch would look for entries elsewhere than zipfile
                raise zipfile.BadZipFile("something stands before its zip archive")
            order = f"{top}/byteorder"
            is_little = order not in names or opened.read(order) == b"little"
            places = _central_places(source, opened.start_dir, len(entries))
            records = [
                _record(source, entry, place)
                for entry, place in zip(entries, places, strict=True)
                if entry.filename.startswith(f"{top}/data/")
            ]
            pickle_bytes = opened.getinfo(f"{top}/data.pkl").file_size
    except (zipfile.BadZipFile, struct.error, ValueError, KeyError, NotImplementedError, EOFError, OSError) as error:
        raise InvalidArgument(f"{path}: is cut or damaged: {error}. Download or copy it again.") from error
    if len(set(names)) != len(names):
        raise InvalidArgument(f"{path}: its zip archive names an entry twice, so what it holds is unclear.")
    return Archive(top, frozenset(names), tuple(records), is_little, pickle_bytes)


def spans_of(
    leaves: Iterable[tuple[str, torch.Tensor]], archive: Archive, source: LocalFile
) -> tuple[Span, ...] | None:
    """Where leaves loaded from a mapped archive stand in it; None if too little of it is leaves' to be worth it."""
    leaves = [(path, tensor) for path, tensor in leaves if tensor.numel()]
    base = _map_address([tensor.untyped_storage() for _, tensor in leaves], archive, source)
    if base is None:
        return None
    starts = {record.offset for record in archive.records}
    found = []
    for path, tensor in leaves:
        is_inside = tensor.untyped_storage().data_ptr() - base in starts
        is_plain = not (tensor.is_conj() or tensor.is_neg())  # the leaf is a copy of such
        if is_inside and is_plain and fills_memory(tensor.shape, tensor.stride()):
            n_bytes = tensor.numel() * tensor.element_size()
            found.append(Span(path, tensor.data_ptr() - base, n_bytes, _axes(tensor)))
    found.sort(key=lambda span: (span.offset, -span.n_bytes))
    spans: list[Span] = []
    at = 0
    for span in found:  # of leaves that overlap, ties say, one is enough: the others hold the same bytes
        if span.offset >= at:
            spans.append(span)
            at = span.offset + span.n_bytes
    total = sum(record.n_bytes for record in archive.records)
    uncovered = total - sum(span.n_bytes for span in spans)
    least, part = _MOST_UNCOVERED
    return tuple(spans) if uncovered <= max(least, total // part) else None


def _map_address(storages: Sequence[torch.UntypedStorage], archive: Archive, source: LocalFile) -> int | None:
    """The address at which the archive is mapped, told from those of storages; None if that is not certain."""
    by_address = {storage.data_ptr(): storage for storage in storages}
    records = {record.offset: record.n_bytes for record in archive.records if record.n_bytes}
    n_unused = len(records) - len(by_address)
    if not by_address:
        return 0
    if not 0 <= n_unused <= _MOST_UNUSED:
        return None
    first = min(by_address)
    # Each storage begins where a record does. So the first in memory is the first in the file, but for unused ones.
    fitting = [
        base
        for base in (first - offset for offset in sorted(records)[: n_unused + 1])
        if base % mmap.PAGESIZE == 0
        and all(records.get(address - base) == storage.nbytes() for address, storage in by_address.items())
    ]
    if len(fitting) != 1:
        return None
    (base,) = fitting
    if n_unused and not all(_is_at(storage, address - base, source) for address, storage in by_address.items()):
        return None
    return base


def _is_at(storage: torch.UntypedStorage, offset: int, source: LocalFile) -> bool:
    """Whether a storage's bytes are those in the file there."""
    held = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()
    return np.array_equal(held, np.frombuffer(source.read(offset, storage.nbytes()), np.uint8))


def _axes(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The axes in the order in which memory holds them, None if that is their own order."""
    strides = tensor.stride()
    axes = tuple(sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], tensor.shape[axis] != 1)))
    return None if tensor.is_contiguous() else axes


def _record(source: LocalFile, entry: zipfile.ZipInfo, place: int) -> Record:
    head = source.read(entry.header_offset, _LOCAL.size)
    signature, *_, n_name, n_extra = _LOCAL.unpack(head)
    offset = entry.header_offset + _LOCAL.size + n_name + n_extra
    if signature != b"PK\3\4" or offset + entry.compress_size > source.n_bytes:
        raise zipfile.BadZipFile(f"the entry {entry.filename!r} does not stand where the directory says")
    checksums = [place + _CRC_IN_CENTRAL]
    stop = offset + entry.compress_size
    if stop + 8 <= source.n_bytes and bytes(source.read(stop, 4)) == _DESCRIPTOR:
        checksums.insert(0, stop + 4)
    is_stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    return Record(entry.filename, offset, entry.file_size, is_stored, tuple(checksums))


def _central_places(source: LocalFile, start: int, n_entries: int) -> list[int]:
    """Where each entry of the directory begins."""
    places = []
    for _ in range(n_entries):
        signature, *_, n_name, n_extra, n_comment, _, _, _, _ = _CENTRAL.unpack(source.read(start, _CENTRAL.size))
        if signature != b"PK\1\2":
            raise zipfile.BadZipFile("the directory is damaged")
        places.append(start)
        start += _CENTRAL.size + n_name + n_extra + n_comment
    return places
