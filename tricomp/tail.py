"""The last bytes of a `.tri` file, by which a whole file is told from a cut one. Imports xxhash only.

A storage that cannot write a file in one instant knows by them what its readers may see; the container compares them
again with everything else. The hard thing: they are the only part of the format that a storage knows, and no more.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

FORMAT = 1
# Frozen since format 1.
START = b"\xa7tricomp"  # bytes 1..9 of every file, in every format; the format number follows
MAGIC = b"\x89TRI\r\n\x1a\n"
FIELDS = struct.Struct("<QQQQQ16s")  # header bytes, its check, index offset, index bytes, its check, content id
TAIL_BYTES = 2 + FIELDS.size + 8 + len(MAGIC)
TAIL_START = b"\xc4" + (TAIL_BYTES - 2).to_bytes(1, "big")  # a msgpack bin


@dataclass(frozen=True)
class Ends:
    """Where header and index of a file stand, in bytes."""

    header_bytes: int
    index_offset: int
    index_bytes: int


def ends_in(last: bytes | memoryview, n_bytes: int) -> Ends | None:
    """What the tail of a file of n_bytes tells; None: these are not the last bytes of a whole file."""
    tail = bytes(last[-TAIL_BYTES:])
    body, check = tail[: 2 + FIELDS.size], tail[2 + FIELDS.size : -len(MAGIC)]
    if len(tail) < TAIL_BYTES or not tail.startswith(TAIL_START) or not tail.endswith(MAGIC):
        return None
    header_bytes, _, index_offset, index_bytes, _, _ = FIELDS.unpack(body[2:])
    is_sound = int.from_bytes(check, "little") == xxhash.xxh3_64_intdigest(body)
    fits = 0 < header_bytes <= index_offset and index_offset + index_bytes + TAIL_BYTES == n_bytes
    return Ends(header_bytes, index_offset, index_bytes) if is_sound and fits else None


def is_of_another_format(first: bytes | memoryview) -> bool:
    """Whether a file that begins with these 10 bytes is of a format whose tail may look otherwise."""
    return bytes(first[1:9]) == START and len(first) > 9 and first[9] != FORMAT
