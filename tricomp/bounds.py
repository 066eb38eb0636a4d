"""Reader limits, and the only door through which a file's msgpack becomes objects. Imports msgpack and errors.

The hard thing: a few hostile bytes may declare huge arrays, deep nesting or a zlib bomb. So every declared size is
compared with a limit, or with the bytes that are really there, before memory is taken for it.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from tricomp.errors import CorruptFile, LimitExceeded

Bytes = bytes | memoryview


class Cut(Protocol):
    """Bytes that are read when a slice of them is taken: [start:stop], step 1."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Bytes: ...


# Frozen since format 1. Extension codes of msgpack objects; 1..3 belong to Flax.
LEAF, BIG_INT, TUPLE, NAMED_TUPLE, REGISTERED, DEFLATED = range(32, 38)


def _physical_bytes() -> int:
    """Bytes of memory in this machine; 64 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 36


@dataclass(frozen=True)
class Limits:
    """What a reader accepts. A writer refuses to write what a reader with the defaults would refuse.

    max_header_bytes, max_index_bytes: one header or index object, as stored.
    max_table_bytes: one packed table (tree, leaves, frames), inflated.
    max_leaves: leaves in one file. max_depth: levels of a tree. max_dimensions: of one leaf.
    max_decoded_bytes: of the leaves of one load, and of any frame. Default: the machine's memory.
    """

    max_header_bytes: int = 1 << 28
    max_index_bytes: int = 1 << 30
    max_table_bytes: int = 1 << 28
    max_leaves: int = 1 << 24
    max_depth: int = 128
    max_dimensions: int = 64
    max_decoded_bytes: int = field(default_factory=_physical_bytes)

    def check(self, name: str, value: int, what: str) -> None:
        """Raise LimitExceeded when value is above the limit called name."""
        limit = getattr(self, name)
        if value > limit:
            advice = f"Pass limits=Limits({name}=...) to open or decode."
            raise LimitExceeded(f"{what}: {value} exceeds the limit {name} = {limit}. {advice}")


DEFAULTS = Limits()


def most_frame_bytes(n_words: int, word_bits: int, chunk_log2: int = 16) -> int:
    """The most bytes that an encoded frame ever takes: its words raw, 64 bytes, and 40 for each chunk. Tested."""
    n_chunks = -(-n_words >> chunk_log2)
    return n_words * word_bits // 8 + 64 + 40 * n_chunks


def unpack(data: Bytes, what: str) -> Any:
    """The one msgpack object that data holds, extensions as msgpack.ExtType. Raises CorruptFile, naming what.

    Skipping over it first takes no memory and proves that every declared count is really filled, so that what is
    allocated afterwards is bounded by a constant times len(data).
    """
    try:
        walker = msgpack.Unpacker(max_buffer_size=max(len(data), 1), strict_map_key=False)
        walker.feed(data)
        walker.skip()
        if walker.tell() != len(data):
            raise CorruptFile(f"{what}: {len(data) - walker.tell()} bytes follow the msgpack object.")
        return msgpack.unpackb(data, strict_map_key=False, ext_hook=msgpack.ExtType)
    except msgpack.OutOfData:
        raise CorruptFile(f"{what}: the msgpack object is cut.") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CorruptFile(f"{what}: not valid msgpack ({type(error).__name__}: {error}).") from None


def deflate(raw: bytes) -> bytes:
    """u64 LE raw size and zlib stream, as in extension 37."""
    return len(raw).to_bytes(8, "little") + zlib.compress(raw, 9)


def inflate(packed: Any, limits: Limits, what: str) -> bytes:
    """What deflate was given. Raises CorruptFile, LimitExceeded."""
    if not isinstance(packed, bytes):
        raise CorruptFile(f"{what}: expected bytes, got {type(packed).__name__}.")
    return unpack_table(msgpack.ExtType(DEFLATED, packed), limits, what)


def pack_table(raw: bytes) -> bytes | msgpack.ExtType:
    """A table's msgpack bytes, deflated when that is smaller: then extension 37, u64 LE raw size and zlib stream."""
    deflated = deflate(raw)
    return msgpack.ExtType(DEFLATED, deflated) if len(deflated) < len(raw) else raw


def unpack_table(packed: Any, limits: Limits, what: str) -> bytes:
    """The raw bytes of pack_table. Raises CorruptFile or LimitExceeded before inflating more than was declared."""
    if isinstance(packed, bytes):
        limits.check("max_table_bytes", len(packed), what)
        return packed
    if not isinstance(packed, msgpack.ExtType) or packed.code != DEFLATED or len(packed.data) < 8:
        raise CorruptFile(f"{what}: expected a packed table, got {type(packed).__name__}.")
    n_bytes = int.from_bytes(packed.data[:8], "little")
    limits.check("max_table_bytes", n_bytes, what)
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(packed.data[8:], n_bytes + 1)
    except zlib.error as error:
        raise CorruptFile(f"{what}: {error}.") from None
    if len(raw) != n_bytes or not stream.eof or stream.unused_data:
        raise CorruptFile(f"{what}: declared {n_bytes} bytes inflated, and does not hold them.")
    return raw
