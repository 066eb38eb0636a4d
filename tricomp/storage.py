"""What a Store needs of a folder or bucket, and the door to the kinds there are. Knows no codec and no format.

The hard thing is in the promise of put: a file is there whole and durable, or not at all, at any instant.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument
from tricomp.folder import Folder


class Source(Protocol):
    """Random access to the bytes of one stored file. name is for messages."""

    name: str
    n_bytes: int

    def read(self, offset: int, n_bytes: int) -> Bytes:
        """The bytes [offset, offset + n_bytes). Raises CorruptFile when they are not all inside the file."""
        ...

    def close(self) -> None: ...


class Lock(Protocol):
    """A writer's hold on a storage."""

    @property
    def is_held(self) -> bool: ...

    def release(self) -> None: ...


class Storage(Protocol):
    """What a Store needs of a folder or bucket. Names are flat; url is for messages."""

    url: str

    def put(self, name: str, pieces: Iterable[Bytes]) -> None:
        """Write a file from pieces: afterwards the whole of it is there and durable, or nothing has changed."""
        ...

    def get(self, name: str) -> Source:
        """Open a file for reading. Raises MissingFile, StorageError."""
        ...

    def list(self) -> dict[str, object]:
        """Names of the files there, each with a stamp that changes when the file does."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is gone."""
        ...

    def lock(self) -> Lock:
        """Become the only writer and remove what dead ones left. Raises StoreLocked."""
        ...


def at(url: str | os.PathLike[str]) -> Storage:
    """The storage at a path or file:// URL. Raises InvalidArgument for URLs of other kinds."""
    path = os.fspath(url)
    if not isinstance(path, str):
        raise InvalidArgument(f"store {path!r}: expected a path or URL as str.")
    path = path.removeprefix("file://")
    if "://" in path:
        raise InvalidArgument(
            f"store {path!r}: only local folders can be stores in this version. Give a folder's path."
        )
    return Folder(str(Path(path).expanduser()))
