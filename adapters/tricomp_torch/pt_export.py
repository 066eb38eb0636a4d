"""A `.tri` file's tree as the bytes of torch.save, in bounded memory. Of the archive it knows where checksums stand.

torch.save writes the archive of *blank* tensors, which take neither memory nor disk, to a temporary file; read back,
that tells where each leaf belongs, and the leaves are decoded into their places as the bytes go out. The hard thing: a
record's checksum stands behind its bytes, so each is reckoned on the way and put in when its place comes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tricomp import tree as trees
from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument, LimitExceeded, StorageError
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats import Origin, TensorFile
from tricomp_torch.files import notes_of
from tricomp_torch.pt_archive import Record, read_archive
from tricomp_torch.tensors import Array, to_tensor, view_as_tensor
from tricomp_torch.ties import TieMaker
from tricomp_torch.trees import Flat, maker_of, unflatten

_ALIGNMENT = 64


def written(file: File, read: Callable[[str], TensorFile]) -> Iterator[Bytes]:
    """The bytes of a file of torch.save with the tree of an open `.tri` file. read: of the format "torch".

    Raises, before the first piece, InvalidArgument for what torch.load(weights_only=True) would not take back.
    """
    try:
        with contextlib.closing(_Blanks(file)) as blanks, tempfile.TemporaryDirectory(prefix="tricomp-") as folder:
            path = os.path.join(folder, "archive.pt")
            _save(blanks.tree(), path, file)
            origin, records = _places(path, read, file)
    except StorageError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            f"{file.name}: no temporary file can be written in {tempfile.gettempdir()}: {reason}. "
            "Set TMPDIR to another folder."
        ) from error
    return _with_checksums(origin.pieces(file), records)


class _Blanks:
    """Tensors of a file's leaves that hold zeros, in a file with nothing but a hole in it."""

    def __init__(self, file: File) -> None:
        self._file, self._notes = file, notes_of(file.metadata)
        self._places: dict[str, int] = {}
        n_bytes = 0
        for path in file:
            self._places[path] = n_bytes
            n_bytes += -(-file.leaf(path).n_bytes // _ALIGNMENT) * _ALIGNMENT
        with tempfile.TemporaryFile() as hole:
            hole.truncate(max(n_bytes, 1))
            self._map = mmap.mmap(hole.fileno(), 0)

    def tree(self) -> Any:
        """The tree of tensors. What is numpy's is decoded: torch.save pickles it."""
        kinds = self._notes.get("kinds", {})
        numpys = [path for path in self._file if isinstance(kinds, Mapping) and path in kinds]
        decoded = self._file.load(numpys) if numpys else {}
        arrays = [decoded[path] if path in decoded else self._array(path) for path in self._file]
        tree = trees.unflatten(self._file.structure, arrays, what=f"{self._file.name}: tree")
        _require_plain(tree, None)
        maker = maker_of(self._notes, lambda *tables: _BlankMaker(self._file, *tables))
        return unflatten(Flat(tree, self._notes), make=maker.tensor)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # while tensors view it; then it goes with them
            self._map.close()

    def _array(self, path: str) -> Array:
        leaf = self._file.leaf(path)
        flat = np.frombuffer(self._map, np.uint8, leaf.n_bytes, self._places[path])
        return flat.view(leaf.dtype.numpy).reshape(leaf.shape)


class _BlankMaker(TieMaker):
    """Ties are judged by the digests of the leaves, which the blanks are not."""

    def __init__(self, file: File, ties: Mapping[str, str], strides: Mapping[str, Sequence[int]]) -> None:
        super().__init__(ties, strides)
        self._file = file

    def make(self, path: str, array: Array, device: torch.device | None, strides: Sequence[int] | None) -> torch.Tensor:
        if not array.size:  # not at the address of the next leaf
            return to_tensor(array, path, device, strides)
        tensor = view_as_tensor(array, path)
        return tensor if strides is None else tensor.as_strided(tensor.shape, tuple(strides))

    def is_tied(self, first: str, held: Array, path: str, array: Array) -> bool:
        is_alike = held.dtype == array.dtype and held.shape == array.shape
        return is_alike and self._file.digest(first) == self._file.digest(path)


def _save(tree: Any, path: str, file: File) -> None:
    """torch.save, without the tensors' bytes where torch can leave them out: the file then has holes."""
    skip_data = getattr(torch.serialization, "skip_data", contextlib.nullcontext)  # since torch 2.6
    try:
        with skip_data():
            torch.save(tree, path)
    except OSError:
        raise
    except Exception as error:  # pickle's own errors, of objects that a registered node made
        raise InvalidArgument(f"{file.name}: torch.save cannot write it: {error}") from error


def _places(path: str, read: Callable[[str], TensorFile], file: File) -> tuple[Origin, list[Record]]:
    try:
        with read(path) as opened:
            (origin,) = opened.origins()
            archive = read_archive(path, LocalFile(path))
    except InvalidArgument as error:
        told = str(error).replace(path, file.name)
        raise InvalidArgument(f"{told} (torch.load(weights_only=True) would refuse the file.)") from error
    n_leaf_bytes = 0 if origin.spans is None else sum(span.n_bytes for span in origin.spans)
    records = [] if archive is None else list(archive.records)
    if origin.spans is None or n_leaf_bytes != sum(record.n_bytes for record in records):
        raise LimitExceeded(f"{file.name}: its plain values are too large for a file of torch.save to be written.")
    return origin, records


def _require_plain(node: Any, path: str | None) -> None:
    """Raise InvalidArgument for a named tuple: its class would be asked for by the pickle."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        raise InvalidArgument(
            f"node {path or ''!r}: a named tuple ({type(node).__name__}) cannot be read back by "
            "torch.load(weights_only=True). Save it as a dict or a tuple, or load this file with tricomp_torch.load."
        )
    if isinstance(node, dict):
        for key, value in node.items():
            _require_plain(value, trees.join(path, key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            _require_plain(value, trees.join(path, i))


def _with_checksums(pieces: Iterator[Bytes], records: Sequence[Record]) -> Iterator[Bytes]:
    """The pieces, with each record's checksum where it belongs. A piece holds bytes of one record, or of none."""
    ordered = sorted((record for record in records if record.n_bytes), key=lambda record: record.offset)
    waiting: dict[int, int] = {}  # places still to come, and what belongs there
    at = number = checksum = 0
    for piece in pieces:
        stop = at + len(piece)
        if number < len(ordered) and ordered[number].offset <= at:
            checksum = zlib.crc32(piece, checksum)
            if stop == ordered[number].offset + ordered[number].n_bytes:
                waiting.update(dict.fromkeys(ordered[number].checksums, checksum))
                number, checksum = number + 1, 0
        else:
            due = [place for place in waiting if at <= place < stop]
            if due:
                patched = bytearray(piece)
                for place in due:
                    patched[place - at : place - at + 4] = waiting.pop(place).to_bytes(4, "little")
                piece = bytes(patched)
        yield piece
        at = stop
