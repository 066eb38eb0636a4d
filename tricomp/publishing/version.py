"""One published version: what its folder says it is, and what it says of each tensor. Imports shards and difference.

A full version is a checkpoint as any; a delta holds, for each tensor that changed, a payload and the checksum of what
it leads to. The hard thing: a folder may be seen while it is being written, here or through an object store, so only
the index (or the one file that needs none) makes a version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp.errors import CorruptFile, WrongReference
from tricomp.file import File
from tricomp.publishing import checksums, difference, shards
from tricomp.publishing.shards import ALONE, INDEX, Shard
from tricomp.publishing.tensors import Array, Tensor
from tricomp.storage import Storage

TRI = "model.tri"
NOTE = "publishing"
"""The key of a `.tri` file's metadata under which it says which version it is."""
_FOLDER = re.compile(r"weight_v(\d{6,12})")


def folder_name(number: int) -> str:
    """The folder of a version."""
    return f"weight_v{number:06d}"


def number_of(name: str) -> int | None:
    """The version that a folder of this name holds; None: none."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found is not None and folder_name(int(found[1])) == name else None


@dataclass(frozen=True)
class Version:
    """number. base: the version a delta builds on; None: it is full. format: "safetensors" or "tri".

    encoding, checksum: of a delta's payloads in safetensors, else "". placed: tensor to shard, in safetensors.
    """

    number: int
    base: int | None
    format: str
    where: Storage
    encoding: str = ""
    checksum: str = ""
    placed: Mapping[str, str] | None = None

    @property
    def is_full(self) -> bool:
        return self.base is None


def read_version(where: Storage, number: int) -> Version | None:
    """The version in a folder; None: it is not published, or not yet. Raises CorruptFile, InvalidArgument."""
    names = where.list()
    if TRI in names:
        with File(where.get(TRI)) as file:
            note = file.metadata.get(NOTE)
            base = note.get("base_version") if isinstance(note, dict) else None
            what = f"{file.name}: its metadata"
            _require_number(note.get("version") if isinstance(note, dict) else None, number, what)
            if (file.parent is None) != (base is None):
                raise CorruptFile(f"{what}: base_version {base!r} does not fit its parent, {file.parent}.")
            return Version(number, None if base is None else _base(base, number, what), "tri", where)
    if INDEX in names:
        return _indexed(where, number)
    if ALONE in names and [name for name in names if name.endswith(".safetensors")] == [ALONE]:
        return Version(number, None, "safetensors", where)
    return None


def _indexed(where: Storage, number: int) -> Version:
    metadata, placed = shards.read_index(where)
    what = f"{where.url}/{INDEX}"
    if metadata.get("version") is not None or "delta_encoding" in metadata:
        _require_number(metadata.get("version"), number, what)
    if "delta_encoding" not in metadata:
        return Version(number, None, "safetensors", where, placed=placed)
    found = {key: metadata.get(key) for key in ("delta_encoding", "compression_format", "checksum_format")}
    known = (difference.ENCODINGS, ("zstd",), checksums.FORMATS)
    for (key, value), allowed in zip(found.items(), known, strict=True):
        if value not in allowed:
            raise CorruptFile(f"{what}: {key}: expected {' or '.join(allowed)}, got {value!r:.80}.")
    base = _base(metadata.get("base_version"), number, what)
    encoding, checksum = str(found["delta_encoding"]), str(found["checksum_format"])
    return Version(number, base, "safetensors", where, encoding, checksum, placed)


def _require_number(value: Any, number: int, what: str) -> None:
    if _number(value) != number:
        raise CorruptFile(f"{what}: expected version {number:06d}, got {value!r:.80}. It is of another folder.")


def _base(value: Any, number: int, what: str) -> int:
    base = _number(value)
    if base is None or base >= number:
        raise CorruptFile(f"{what}: expected a base_version before {number:06d}, got {value!r:.80}.")
    return base


def _number(value: Any) -> int | None:
    """A version as the layout writes it, in digits; others write plain numbers."""
    if type(value) is int and value >= 0:
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) <= 12 else None


class Delta:
    """A delta in safetensors, opened. names: of the tensors that changed. A context manager."""

    def __init__(self, version: Version) -> None:
        """Raises CorruptFile, MissingFile, InvalidArgument (damage), StorageError."""
        self.version = version
        self._opened = shards.open_placed(version.where, version.placed or {})
        self._found: dict[str, tuple[Tensor, Shard]] = {
            name: (tensor, shard) for shard in self._opened for name, tensor in shard.tensors.items()
        }
        self.names = frozenset(self._found)
        for name, (tensor, shard) in self._found.items():
            if tensor.code != "U8" or len(tensor.shape) != 1 or name not in shard.metadata:
                self.close()
                what = f"a payload of {tensor.kind}" if name in shard.metadata else "one without a checksum"
                raise CorruptFile(
                    f"{shard.source.name}: tensor {name!r}: expected flat U8 with a checksum, got {what}."
                )

    def checksum(self, name: str) -> str:
        """The checksum of a changed tensor as this version has it."""
        return self._found[name][1].metadata[name]

    def fold(self, name: str, words: Array) -> None:
        """Bring a tensor from the base to this version, in place, and compare its checksum. words: uint8[n].

        Raises CorruptFrame (damage), WrongReference (what is here is not the base), naming the tensor.
        """
        stored, shard = self._found[name]
        what = f"{shard.source.name}: tensor {name!r}"
        data = stored.read(0, stored.n_bytes).data
        difference.apply_payload(words, data, self.version.encoding, what)
        found = digest_of(words, self.version.checksum)
        if found != self.checksum(name):
            raise WrongReference(
                f"{what}: what it was applied to is not version {self.version.base}: checksum {self.checksum(name)} "
                f"expected of version {self.version.number}, {found} computed. {ADVICE}"
            )

    def close(self) -> None:
        for shard in self._opened:
            shard.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


ADVICE = "Begin again from a copy of the base model, or let the trainer publish a full version."


class Full:
    """A full version in safetensors, opened. tensors: by name. A context manager."""

    def __init__(self, version: Version) -> None:
        """Raises CorruptFile, MissingFile, InvalidArgument (damage), StorageError."""
        self.version = version
        where = version.where
        self.shards = (
            [shards.open_shard(where, ALONE)] if version.placed is None else shards.open_placed(where, version.placed)
        )
        self._shard_of = {name: shard for shard in self.shards for name in shard.tensors}
        self.tensors: dict[str, Tensor] = {name: shard.tensors[name] for name, shard in self._shard_of.items()}

    def checksum(self, name: str) -> tuple[str, str] | None:
        """Format and checksum of a tensor, where the version holds it."""
        metadata = self._shard_of[name].metadata
        known = ((format, metadata.get(full_key(format, name))) for format in checksums.FORMATS)
        return next(((format, value) for format, value in known if value is not None), None)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def full_key(format: str, name: str) -> str:
    """The key of a header's texts for a tensor's checksum in a full version; adler32's is one that others read."""
    return f"{'mx' if format == 'adler32' else 'tricomp'}.{format}:{name}"


def is_full_key(key: str) -> bool:
    """Whether a text of a header is a tensor's checksum in a full version."""
    return key.startswith(tuple(full_key(format, "") for format in checksums.FORMATS))


def digest_of(words: Array, format: str) -> str:
    """The checksum of bytes."""
    found = checksums.hasher(format)
    found.update(np.ascontiguousarray(words).data)
    return found.hexdigest()
