"""What a format of tensor files is: the Protocol that every reader and writer of one keeps. Imports no framework.

An adapter brings a format of its own by an entry point of the group "tricomp.formats" that names an object of this
kind; one whose checkpoints are folders, and which is only written, by one of "tricomp.folders". The hard thing:
`matches` sees the beginning of any file there is, and must neither claim a stranger's nor raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tricomp.bounds import Bytes
from tricomp.file import File
from tricomp.formats.origin import TensorFile

HEAD_BYTES = 4096  # what matches gets to see


class Format(Protocol):
    """A kind of tensor file. name: what `--to` takes and an origin records. suffixes: lower case, with the dot."""

    @property
    def name(self) -> str: ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def matches(self, head: bytes, path: str) -> bool:
        """Whether a file is of this format, told by its first HEAD_BYTES bytes (fewer if it is shorter). Never raises.

        path may be opened for more. Its suffix alone is no proof: it breaks ties, and is asked when nothing matches.
        """
        ...

    def read(self, path: str) -> TensorFile:
        """Open a file, mapped, reading its table only. Raises InvalidArgument if it is damaged or holds code, and
        UnsupportedFormat if it is none of this format at all."""
        ...

    def pieces(self, file: File) -> Iterator[Bytes]:
        """The bytes of a file of this format with the tree of an open `.tri` file, in order, in bounded memory.

        Everything that can be refused is refused before the first piece, naming the leaf: InvalidArgument.
        """
        ...


class FolderFormat(Protocol):
    """A kind of checkpoint that is a folder. name: what `--to` takes, and the folder's suffix without the dot."""

    @property
    def name(self) -> str: ...

    def matches(self, folder: str) -> bool:
        """Whether a folder is one of this kind, which may be replaced by another. Never raises."""
        ...

    def write(self, file: File, folder: str) -> None:
        """Make a folder, that is not there yet, with the tree of an open `.tri` file.

        Everything that can be refused is refused before anything is decoded, naming the leaf: InvalidArgument.
        """
        ...
