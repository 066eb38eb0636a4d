"""What a Store needs of a folder or bucket, and the door to the kinds there are. Knows no codec and no format.

The hard thing is in the promise of put: a file is there whole and durable, or not at all, at any instant.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tricomp import folder
from tricomp.bounds import Bytes
from tricomp.bucket import Bucket
from tricomp.cache import Cache
from tricomp.errors import InvalidArgument
from tricomp.folder import Folder
from tricomp.lease import LEASE_SECONDS

_LOCAL = re.compile(r"(file|local)://")
_SCHEME_OF_PATH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")  # what a pathlib.Path makes of a URL


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

    def refresh(self) -> None:
        """Make sure before a write that the storage is still this writer's. Raises StoreLocked, StorageError."""
        ...

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


def is_url(path: object) -> bool:
    """Whether a path names something that fsspec reaches; folders and file:// URLs do not."""
    return isinstance(path, str) and "://" in path and not _LOCAL.match(path)


def at(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    cache: Cache | None = None,
    lease: float = LEASE_SECONDS,
) -> Folder | Bucket:
    """The storage at a path, or at a URL that fsspec knows. storage_options: for fsspec. cache, lease: of a Bucket.

    Raises InvalidArgument, StorageError.
    """
    path = _text(url, "store")
    if is_url(path):
        return Bucket(path, storage_options, cache, lease)
    if storage_options or cache is not None:
        raise InvalidArgument(f"store {path!r}: storage_options and cache are for URLs; this is a local folder.")
    return Folder(str(Path(_LOCAL.sub("", path)).expanduser()))


def split(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[Folder, str] | tuple[Bucket, str]:
    """The storage and the name in it of a file at a path or URL. Raises InvalidArgument, StorageError."""
    if not is_url(path):
        if storage_options:
            raise InvalidArgument(f"{path!r}: storage_options are for URLs; this is a local path.")
        if isinstance(path, str):
            path = os.path.expanduser(_LOCAL.sub("", path))
        elif isinstance(path, os.PathLike) and _SCHEME_OF_PATH.match(str(os.fspath(path))):
            raise InvalidArgument(f"{os.fspath(path)!r}: a URL lost a slash in a Path. Give it as str.")
        return folder.split(path)
    url = _text(path, "path")
    where, slash, name = url.rpartition("/")
    if not name or (where.endswith(":/") and not url.startswith("memory:")):
        raise InvalidArgument(f"{url}: expected the URL of a file, as in s3://bucket/run/model.tri.")
    return Bucket(where + slash, storage_options), name


def source(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Source:
    """A file at a path or URL, open for reading. Raises InvalidArgument, MissingFile, StorageError."""
    text = _text(path, "open")
    if is_url(text):
        where, name = split(text, storage_options)
        return where.get(name)
    if storage_options:
        raise InvalidArgument(f"{text!r}: storage_options are for URLs; this is a local path.")
    return folder.LocalFile(os.path.expanduser(_LOCAL.sub("", text)))


def _text(path: str | os.PathLike[str], what: str) -> str:
    """A path or URL as str. Raises InvalidArgument for anything else, and for a URL that went through pathlib."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        shown = reprlib.repr(path) if isinstance(path, str | bytes) else f"a {type(path).__name__}"
        raise InvalidArgument(f"{what}: expected a path or URL as str, got {shown}.")
    if not isinstance(path, str) and _SCHEME_OF_PATH.match(text):
        raise InvalidArgument(f"{what} {text!r}: a URL lost a slash in a Path. Give it as str.")
    return text
