"""Files of other formats: read them into trees, write them again, tell which is which. Imports no framework.

    read(path)                     TensorFile: the tree, and where its leaves stand
    origins(file)                  what an open `.tri` file was made of: a list of Origin
    restored(file, origin)         the bytes of that file again: the same, or of an equal one
    exported(format, file)         the bytes of a file of any format with the tree of an open `.tri` file
    write(format, file, target)    the same, put at a path or written to a binary stream

The hard thing: a format is told by content, since names lie; and an adapter's format is found, and its framework
loaded, only when none of the formats here fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from tricomp.bounds import Bytes
from tricomp.file import File
from tricomp.formats.base import Format
from tricomp.formats.origin import Origin, Span, TensorFile

__all__ = ["Format", "Origin", "Span", "TensorFile", "exported", "names", "origins", "read", "restored", "write"]

GROUP = "tricomp.formats"


def names() -> tuple[str, ...]:
    """The formats that there are, those of installed adapters included."""
    raise NotImplementedError


def read(path: str) -> TensorFile:
    """Open a tensor file of any known format, told by its content; nothing but its table is read yet.

    Raises UnsupportedFormat if it is of none, InvalidArgument if it is damaged or holds code, MissingFile, StorageError.
    """
    raise NotImplementedError


def origins(file: File) -> list[Origin]:
    """What an open `.tri` file was made of: empty if it was not made of files. Raises CorruptFile, LimitExceeded."""
    raise NotImplementedError


def restored(file: File, origin: Origin) -> Iterator[Bytes]:
    """The bytes of a file that a `.tri` file was made of: the very same if origin has spans, else of an equal file."""
    raise NotImplementedError


def exported(format: str, file: File) -> Iterator[Bytes]:
    """The bytes of a file of that format with the tree of an open `.tri` file, in bounded memory.

    Raises UnsupportedFormat for a name that is none; InvalidArgument, naming the leaf, for what the format cannot hold.
    """
    raise NotImplementedError


def write(format: str, file: File, target: str | BinaryIO) -> int:
    """Write what exported gives to a path (atomically, replacing what is there) or to a binary stream. Returns bytes."""
    raise NotImplementedError
