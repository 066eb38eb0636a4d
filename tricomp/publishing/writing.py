"""The files of a version, written: whole, as a delta in safetensors, or as one `.tri` file. Whoever calls has the lock.

Imports shards, difference and, for `.tri`, checkpoint. The hard thing: readers come at any instant, and so may death:
shards are written first and the index last, whole or not at all, and what an earlier attempt left is removed before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp import checkpoint, codec
from tricomp.codec import Engine
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.folder import LOCK_NAME, Folder
from tricomp.publishing import difference, shards
from tricomp.publishing.publication import Options, State
from tricomp.publishing.shards import INDEX, Entry
from tricomp.publishing.threads import in_order
from tricomp.publishing.updates import BASE_DIGESTS, Decoded
from tricomp.publishing.version import NOTE, TRI, full_key
from tricomp.spool import Spool
from tricomp.storage import Storage
from tricomp.tree import join


@dataclass(frozen=True)
class Written:
    """n_changed: tensors in the files. n_bytes: of them, but for an index. encoding: of a delta in safetensors."""

    n_changed: int
    n_bytes: int
    encoding: str = ""


def write_full(new: State, where: Storage, version: int, options: Options) -> Written:
    """Write a state whole."""
    if options.format == "tri":
        return _write_tri(new, None, where, version, options)
    format = options.checksum
    placed: dict[str, str] = {}
    n_bytes = 0
    parts = shards.split((shards.entry_of(name, tensor) for name, tensor in new.items()), options.shard_bytes)

    def checksum(entry: Entry) -> str:
        return new[entry.name].checksum(format)

    for file, part in zip(shards.names(len(parts)), parts, strict=True):
        # Each tensor is read twice, since its checksum stands in the header.
        found = in_order(checksum, part, options.n_threads)
        texts = {full_key(format, entry.name): told for entry, told in zip(part, found, strict=True)}
        head = shards.head(part, {"format": "pt", **texts}, f"{where.url}/{file}")
        where.put(file, shards.written(head, (new[entry.name] for entry in part)))
        placed.update((entry.name, file) for entry in part)
        n_bytes += len(head) + sum(entry.n_bytes for entry in part)
    total = sum(tensor.n_bytes for tensor in new.values())
    _commit(where, {"total_size": total, "version": f"{version:06d}", "checksum_format": format}, placed)
    return Written(len(new), n_bytes)


def write_delta(new: State, old: State, where: Storage, version: int, options: Options) -> Written:
    """Write what differs between a version and the one before."""
    if options.format == "tri":
        return _write_tri(new, old, where, version, options)
    encoding = options.encoding
    if encoding == "auto":
        encoding = difference.cheaper(new, old, options.level)
    spooled: list[tuple[Spool, list[Entry], dict[str, str]]] = []
    for name, pieces, checksum in _changed(new, old, encoding, options):
        n_bytes = sum(map(len, pieces))
        if not spooled or spooled[-1][0].n_bytes + n_bytes > options.shard_bytes:
            spooled.append((Spool(), [], {}))
        spool, entries, texts = spooled[-1]
        for piece in pieces:
            spool.append(piece)
        entries.append(Entry(name, "U8", (n_bytes,), n_bytes))
        texts[name] = checksum
    placed: dict[str, str] = {}
    total = 0
    for file, (spool, entries, texts) in zip(shards.names(len(spooled)), spooled, strict=True):
        head = shards.head(entries, texts, f"{where.url}/{file}")
        where.put(file, _after(head, spool))
        placed.update((entry.name, file) for entry in entries)
        total += len(head) + spool.n_bytes
    about = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": options.checksum,
    }
    _commit(where, about, placed)
    return Written(len(placed), total, encoding)


def _changed(new: State, old: State, encoding: str, options: Options) -> Iterator[tuple[str, list[bytes], str]]:
    """Name, payload and checksum of each tensor that changed."""

    def made(name: str) -> tuple[str, list[bytes], str] | None:
        tensor, before = new[name], old[name]
        n = difference.n_changed(tensor, before)
        if not n:
            return None
        try:
            payload = difference.payload(tensor, before, encoding, n, options.level)
        except InvalidArgument as error:
            raise InvalidArgument(f"tensor {name!r}: {error}") from None
        return name, payload, tensor.checksum(options.checksum)

    return (found for found in in_order(made, new, options.n_threads) if found is not None)


def _commit(where: Storage, about: Mapping[str, object], placed: Mapping[str, str]) -> None:
    """The index, after all else."""
    _tidy(where, set(placed.values()))
    where.put(INDEX, [shards.index(about, placed)])


def _tidy(where: Storage, kept: set[str]) -> None:
    """Remove what an interrupted publication left: temporary files, and what some readers would take for shards."""
    if isinstance(where, Folder):
        where.lock().release()
        where.delete(LOCK_NAME)
    for name in where.list():
        if name.endswith(".safetensors") and name not in kept:
            where.delete(name)


def _write_tri(new: State, old: State | None, where: Storage, version: int, options: Options) -> Written:
    content = content_by_name(new)
    base: File | Content | None = None
    note: dict[str, Any] = {"version": f"{version:06d}"}
    if old is not None:
        base = old.file if isinstance(old, Decoded) else content_by_name(old)
        if isinstance(base, File):
            digests = [base.digest(join(None, name)) for name in new]
        else:
            digests = codec.digests([base.snapshot.words(i) for i in range(len(new))])
        note |= {"base_version": f"{version - 1:06d}", BASE_DIGESTS: np.array(digests, "<u8").tobytes()}
    _tidy(where, set())
    engine = Engine(options.threads)
    report = checkpoint.put(where, TRI, content, base, options.spec, {NOTE: note}, int(old is not None), engine)
    return Written(len(new), report.file_bytes)


def content_by_name(state: State) -> Content:
    """The Content of a state, in the order of the names."""
    return content_of({name: tensor.leaf() for name, tensor in sorted(state.items())})


def _after(head: bytes, spool: Spool) -> Iterator[bytes | memoryview]:
    yield head
    yield from spool
