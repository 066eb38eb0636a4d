"""Files of the safetensors format in a published folder or a local copy: opened in any storage, and laid out to write.

Imports the format's header and no framework. The hard thing: a header comes before what it tells of, so sizes and
checksums are known before the first byte is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tricomp.errors import CorruptFile, MissingFile, UnsupportedDtype
from tricomp.formats import header
from tricomp.formats.header_reader import MAX_HEADER_BYTES, METADATA, json_of, parse
from tricomp.formats.header_reader import Object as JsonObject
from tricomp.formats.origin import is_plain_name
from tricomp.publishing.fetched import Fetched, Peeked, near
from tricomp.publishing.tensors import StoredTensor, Tensor
from tricomp.storage import Source, Storage

INDEX = "model.safetensors.index.json"
ALONE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # of tensors in one file, as others have them


@dataclass(frozen=True)
class Shard:
    """An open file: its tensors in the order of their data, the texts of its header, and the header itself."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    head: bytes
    source: Source

    def close(self) -> None:
        self.source.close()


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    code: str
    shape: tuple[int, ...]
    n_bytes: int


def open_shard(where: Storage, name: str) -> Shard:
    """Open a file. Raises MissingFile, InvalidArgument (damage), StorageError."""
    source = near(where.get(name))
    try:
        head = Peeked(source) if isinstance(source, Fetched) else source
        found, metadata, begin = parse(head)
        tensors = {
            tensor.name: StoredTensor(
                source, begin + tensor.start, tensor.dtype, tensor.shape, tensor.stop - tensor.start
            )
            for tensor in found
        }
        return Shard(name, tensors, metadata or {}, bytes(head.read(0, begin)), source)
    except BaseException:
        source.close()
        raise


def read_index(where: Storage, name: str = INDEX) -> tuple[dict[str, object], dict[str, str]]:
    """The metadata and the weight_map of an index. Raises MissingFile, InvalidArgument, CorruptFile."""
    source = where.get(name)
    try:
        if source.n_bytes > MAX_HEADER_BYTES:
            raise CorruptFile(f"{source.name}: expected at most {MAX_HEADER_BYTES} bytes, got {source.n_bytes}.")
        found = json_of(source, source.read(0, source.n_bytes), "index")
    finally:
        source.close()
    pairs = dict(found) if isinstance(found, JsonObject) else {}
    metadata, placed = pairs.get("metadata", JsonObject()), pairs.get("weight_map")
    if not isinstance(metadata, JsonObject) or not isinstance(placed, JsonObject):
        raise CorruptFile(f"{source.name}: expected an index with metadata and a weight_map. Publish it again.")
    for tensor, shard in placed:
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise CorruptFile(
                f"{source.name}: tensor {tensor!r}: expected the name of a shard in the same folder, got "
                f"{shard!r:.80}. Do not trust this index."
            )
    return dict(metadata), dict(placed)


def index(metadata: Mapping[str, object], placed: Mapping[str, str]) -> bytes:
    """An index as text."""
    return header.text({"metadata": dict(metadata), "weight_map": dict(sorted(placed.items()))}) + b"\n"


def open_placed(where: Storage, placed: Mapping[str, str]) -> list[Shard]:
    """All shards of an index, each with exactly the tensors that stand in it. Raises CorruptFile, naming a tensor."""
    opened: list[Shard] = []
    try:
        for name in sorted(set(placed.values())):
            try:
                opened.append(open_shard(where, name))
            except MissingFile:
                url = os.path.join(where.url, name)
                raise MissingFile(
                    f"{url}: the index names this shard, and it is not there. Publish it again."
                ) from None
            expected = {tensor for tensor, shard in placed.items() if shard == name}
            odd = sorted(expected ^ opened[-1].tensors.keys())
            if odd:
                state = "is not in it" if odd[0] in expected else "is in it, and not in the index"
                raise CorruptFile(f"{opened[-1].source.name}: tensor {odd[0]!r} {state}. Publish the version again.")
    except BaseException:
        for shard in opened:
            shard.close()
        raise
    return opened


def split(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Entries cut into shards of about so many bytes, in order; each shard's as the format's library orders them."""
    made: list[list[Entry]] = []
    n_bytes = 0
    for entry in entries:
        if not made or (n_bytes and n_bytes + entry.n_bytes > shard_bytes):
            made.append([])
            n_bytes = 0
        made[-1].append(entry)
        n_bytes += entry.n_bytes
    order = {code: number for number, code in enumerate(header.BITS)}
    for shard in made:
        shard.sort(key=lambda entry: (-order.get(entry.code, 0), entry.name.encode()))
    return made


def names(n: int) -> list[str]:
    """The names of n shards."""
    return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def head(entries: Sequence[Entry], metadata: Mapping[str, str], what: str) -> bytes:
    """The header of a file with these tensors in this order, filled up to 8 bytes. Raises UnsupportedDtype."""
    parts = [header.text(METADATA) + b":" + header.text(dict(metadata))] if metadata else []
    at = 0
    for entry in entries:
        if entry.code not in header.BITS:
            raise UnsupportedDtype(
                f"{what}: tensor {entry.name!r}: safetensors has no {entry.code}. Convert it, or publish as .tri."
            )
        about = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [at, at + entry.n_bytes]}
        parts.append(header.text(entry.name) + b":" + header.text(about))
        at += entry.n_bytes
    written = b"{" + b",".join(parts) + b"}"
    written += b" " * (-len(written) % 8)
    if len(written) > MAX_HEADER_BYTES:
        raise CorruptFile(f"{what}: its header would take {len(written)} bytes. Use a smaller shard_bytes.")
    return len(written).to_bytes(8, "little") + written


def entry_of(name: str, tensor: Tensor) -> Entry:
    """The Entry of a tensor as it is."""
    return Entry(name, tensor.code, tensor.shape, tensor.n_bytes)


def written(first: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    """The pieces of a file: its header and its tensors."""
    yield first
    for tensor in tensors:
        for piece in tensor.pieces():
            yield piece.data
