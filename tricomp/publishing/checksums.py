"""The checksums of the layout, by its names for them: xxh3-128, blake3, adler32. Imports xxhash and errors.

All are of a tensor's raw bytes, in C order and little-endian, written as lower-case hexadecimal digits. The hard thing
is blake3: its package is asked for only when a folder wants it.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any, Protocol

import xxhash

from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument

FORMATS = ("xxh3-128", "blake3", "adler32")


class Hasher(Protocol):
    """A checksum that grows."""

    def update(self, data: Any, /) -> Any: ...

    def hexdigest(self) -> str: ...


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, data: Bytes) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def hasher(format: str) -> Hasher:
    """A new checksum of that name. Raises InvalidArgument if there is none, or its package is missing."""
    if format == "xxh3-128":
        return xxhash.xxh3_128()
    if format == "adler32":
        return _Adler32()
    if format != "blake3":
        raise InvalidArgument(f"checksum: expected one of {', '.join(FORMATS)}, got {format!r:.80}.")
    try:
        found: Hasher = importlib.import_module("blake3").blake3()
    except ImportError:
        raise InvalidArgument('checksum: blake3 is not installed. Run "pip install blake3".') from None
    return found
