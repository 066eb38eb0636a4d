"""The index of a checkpoint: which file holds which shard, in one msgpack file that is written last.

A folder without an index is no checkpoint, so one that was broken off is never taken for whole. Imports no torch. The
hard thing: an index comes from a disk and is not to be trusted, so all of it is checked before it is used, and the
names in it lead to no file but those beside it and those of its parent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from tricomp import bounds, dtypes, storage
from tricomp.container import VERSION, check_of
from tricomp.errors import CorruptFile, MissingFile, UnsupportedVersion
from tricomp.layout import is_shape
from tricomp.tree import join

INDEX_NAME = "index.tricomp"
_FORMAT = 1
_START = b"\xa3dcp"  # the first key of the map
FILE_NAME = re.compile(r"rank_[0-9]{5,}-[0-9a-f]{8}\.tri")
_HEX = re.compile(r"[0-9a-f]{32}")

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Parent:
    """The file that another was coded against. folder: of its checkpoint, relative to the other's where that can be."""

    folder: str
    name: str
    content_id: str


@dataclass(frozen=True)
class StoredFile:
    """One `.tri` file of a checkpoint. since_keyframe: files of its chain below it."""

    name: str
    n_bytes: int
    content_id: str
    since_keyframe: int = 0
    parent: Parent | None = None


@dataclass(frozen=True)
class Chunk:
    """One shard of a tensor, and the number of the file that holds it."""

    offsets: Sizes
    sizes: Sizes
    file: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor: its dtype's name in the format, its size, and the shards that make it."""

    dtype: str
    size: Sizes
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint: what a chain needs of its index, which of many ranks is long."""

    id: str
    files: tuple[StoredFile, ...]

    @property
    def since_keyframe(self) -> int:
        """The most of any file."""
        return max((file.since_keyframe for file in self.files), default=0)

    def file(self, name: str) -> StoredFile | None:
        """The file of that name, or None."""
        return next((file for file in self.files if file.name == name), None)


@dataclass(frozen=True)
class Index(Files):
    """All of a checkpoint but the data. values: the files of what is no tensor. paths: keys and numbers of containers
    that lead to each entry of the state."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)


def keys_of(fqn: str, offsets: Iterable[int], sizes: Iterable[int], size: Iterable[int]) -> tuple[str, ...]:
    """Where a shard stands in the tree of its file: under its name, and beneath it under its ranges if it is a part."""
    begins, lengths = tuple(offsets), tuple(sizes)
    if lengths == tuple(size) and not any(begins):
        return (fqn,)
    ranges = (f"{begin}:{begin + length}" for begin, length in zip(begins, lengths, strict=True))
    return fqn, ",".join(ranges)


def path_of(keys: Iterable[str]) -> str:
    """The path of the leaf at these keys."""
    path: str | None = None
    for key in keys:
        path = join(path, key)
    return path or ""


def pack(index: Index) -> bytes:
    """The bytes of an index file: a map, and a checksum of it. Raises LimitExceeded, as a reader would."""
    tensors = {
        fqn: [tensor.dtype, tensor.size, [[c.offsets, c.sizes, c.file] for c in tensor.chunks]]
        for fqn, tensor in index.tensors.items()
    }
    files = [
        [
            f.name,
            f.n_bytes,
            f.content_id,
            f.since_keyframe,
            None if f.parent is None else [f.parent.folder, f.parent.name, f.parent.content_id],
        ]
        for f in index.files
    ]
    body: bytes = msgpack.packb(
        {
            "dcp": _FORMAT,
            "writer": f"tricomp {VERSION}",
            "id": index.id,
            "files": _packed(files),
            "tensors": _packed(tensors),
            "values": _packed(dict(index.values)),
            "paths": _packed({fqn: list(path) for fqn, path in index.paths.items()}),
        }
    )
    return body + b"\xcf" + check_of(body).to_bytes(8, "big")


def _packed(table: Any) -> Any:
    raw: bytes = msgpack.packb(table)
    bounds.DEFAULTS.check("max_table_bytes", len(raw), INDEX_NAME)
    return bounds.pack_table(raw)


def unpack(data: bytes, what: str) -> Index:
    """The Index in the bytes of a file. Raises CorruptFile, UnsupportedVersion, LimitExceeded."""
    outer = _checked(data, what)
    try:
        known = _files(outer, what)
        n_files = len(known.files)
        tensors = {_text(fqn): _tensor(entry, n_files) for fqn, entry in _table(outer, "tensors", what).items()}
        values = {_text(fqn): _below(number, n_files) for fqn, number in _table(outer, "values", what).items()}
        paths = {_text(fqn): _path(entry) for fqn, entry in _table(outer, "paths", what).items()}
        return Index(known.id, known.files, tensors, values, paths)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _foreign(what, error) from None


def read(folder: str, options: Mapping[str, Any] | None = None) -> Index:
    """The index of the checkpoint in a folder, or at a URL. Raises MissingFile, CorruptFile, StorageError."""
    return unpack(*_read(folder, options))


def read_files(folder: str, options: Mapping[str, Any] | None = None) -> Files:
    """The part of it that tells of the files. Raises what read raises."""
    data, what = _read(folder, options)
    outer = _checked(data, what)
    try:
        return _files(outer, what)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _foreign(what, error) from None


def _read(folder: str, options: Mapping[str, Any] | None) -> tuple[bytes, str]:
    """The bytes of a folder's index, and what it is called."""
    try:
        source = storage.at(folder, options).get(INDEX_NAME)
    except MissingFile:
        raise MissingFile(
            f"{folder}: is no complete checkpoint: it has no {INDEX_NAME}, which is written last. "
            "Check the path, or load an earlier step."
        ) from None
    try:
        return bytes(source.read(0, source.n_bytes)), source.name
    finally:
        source.close()


def _checked(data: bytes, what: str) -> Any:
    """The map in the bytes of a file, its tables still packed. Raises CorruptFile, UnsupportedVersion."""
    body, check = data[:-9], data[-9:]
    if len(data) < 20 or data[1:5] != _START:
        raise CorruptFile(f"{what}: {len(data)} bytes that are no index of a checkpoint. Load another step.")
    if data[5] != _FORMAT:
        raise UnsupportedVersion(f"{what}: was written by format {data[5]}; this tricomp reads {_FORMAT}. Upgrade it.")
    stored = int.from_bytes(check[1:], "big")
    if check[0] != 0xCF or stored != check_of(body):
        raise CorruptFile(
            f"{what}: checksum {stored:016x} stored, {check_of(body):016x} computed: it is cut or damaged. "
            "Restore it from another copy, or load another step."
        )
    return bounds.unpack(body, what)


def _foreign(what: str, error: Exception) -> CorruptFile:
    return CorruptFile(f"{what}: its tables are not those of an index ({error}). Load another step.")


def _table(outer: Any, name: str, what: str) -> Any:
    return bounds.unpack(bounds.unpack_table(outer[name], bounds.DEFAULTS, what), what)


def _files(outer: Any, what: str) -> Files:
    return Files(_matching(_HEX, outer["id"]), tuple(_file(entry) for entry in _table(outer, "files", what)))


def absolute(folder: str | os.PathLike[str]) -> str:
    """A folder as it is named from anywhere on the machine; URLs as they are."""
    text = os.fspath(folder)
    return text if storage.is_url(text) else os.path.abspath(os.path.expanduser(text))


def relative(folder: str, start: str) -> str:
    """A folder as it is named from another one, so that both can be moved together; URLs as they are."""
    return folder if storage.is_url(folder) or storage.is_url(start) else os.path.relpath(folder, start)


def resolved(folder: str, start: str) -> str:
    """What relative gave, undone."""
    if storage.is_url(folder) or os.path.isabs(folder):
        return folder
    return os.path.normpath(os.path.join(start, folder))


def _file(entry: Any) -> StoredFile:
    name, n_bytes, content_id, since_keyframe, parent = entry
    made = None
    if parent is not None:
        folder, parent_name, parent_id = parent
        made = Parent(_text(folder), _matching(FILE_NAME, parent_name), _matching(_HEX, parent_id))
    stored = StoredFile(
        _matching(FILE_NAME, name), _count(n_bytes), _matching(_HEX, content_id), _count(since_keyframe), made
    )
    if (made is None) != (stored.since_keyframe == 0):
        raise ValueError(f"{name}: since_keyframe {since_keyframe}")
    return stored


def _tensor(entry: Any, n_files: int) -> StoredTensor:
    dtype, size, chunks = entry
    whole = _sizes(size)
    if dtype not in dtypes.NAMES or not is_shape(whole):
        raise ValueError(f"a tensor of {dtype!r}{list(whole)}")
    made = tuple(Chunk(_sizes(begin), _sizes(sizes), _below(number, n_files)) for begin, sizes, number in chunks)
    for chunk in made:
        for begin, length, most in zip(chunk.offsets, chunk.sizes, whole, strict=True):
            if begin + length > most:
                raise ValueError(f"a shard at {list(chunk.offsets)} of {list(chunk.sizes)} in {list(whole)}")
    return StoredTensor(dtype, whole, made)


def _sizes(entry: Any) -> Sizes:
    sizes = tuple(entry)
    for size in sizes:
        if type(size) is not int or size < 0:
            raise ValueError(f"sizes {list(sizes)}")
    return sizes


def _path(entry: Any) -> tuple[str | int, ...]:
    if not entry or not all(isinstance(key, str) or _count(key) < 1 << 32 for key in entry):
        raise ValueError("path")
    return tuple(entry)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _below(value: Any, end: int) -> int:
    if _count(value) >= end:
        raise ValueError(f"file {value} of {end}")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not pattern.fullmatch(_text(value)):
        raise ValueError(f"{value!r:.80} does not match {pattern.pattern}")
    return str(value)
