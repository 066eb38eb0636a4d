"""The objects of a bucket: uploads, ranges, listings of any file system that fsspec has. Knows no file format.

The hard thing: file systems agree on little. Which of them replace an object in one instant, and which refuse to create
one that is there, is known here; what an upload that fails leaves behind is removed; and no listing of fsspec's own is
believed, since other writers are at work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument, MissingFile, StorageError, StoreLocked, TricompError
from tricomp.far import abandon, failure, file_system, is_unsupported, knows_create
from tricomp.ranged import Range

# Where an object appears whole when its upload ends, and replaces another in one instant.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"}
_EXCLUSIVE = _ATOMIC - {"oss"} | {"memory"}  # within one process, memory is
_UPLOAD_BYTES = 64 << 20  # of one part: S3 allows 10,000 of them
_CHECKS = ("etag", "ETag", "generation", "sha", "checksum")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created", "ino")


@dataclass(frozen=True)
class Entry:
    """One object, as the file system tells of it. stamp: changes when the object does. asked: monotonic seconds."""

    name: str
    n_bytes: int
    stamp: tuple[object, ...]
    asked: float


class Objects:
    """The objects of one folder of a file system. is_atomic: uploads appear, and replace, in one instant.

    is_exclusive: create refuses, in one instant, what is there. Every method raises StorageError.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """No request is made. Raises InvalidArgument when fsspec or the file system's package is missing."""
        self.url = url if url.endswith("://") else url.rstrip("/")
        self._options = dict(options)
        self._pid = 0
        self._file_system: Any = None
        self._root = ""
        kinds = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self.is_atomic, self.is_exclusive = bool(kinds & _ATOMIC), bool(kinds & _EXCLUSIVE)

    @property
    def _fs(self) -> Any:
        """The file system; after a fork a new one, since its threads and connections are the parent's."""
        if self._pid != os.getpid():
            self._file_system, self._root = file_system(self.url, self._options)
            self._pid = os.getpid()
        return self._file_system

    def shown(self, name: str) -> str:
        """The URL of an object, for messages."""
        return f"{self.url}{name}" if self.url.endswith("/") else f"{self.url}/{name}"

    # Small objects, as a lock is one

    def read_object(self, name: str) -> bytes | None:
        """A small object, or None: there is none."""
        with self._refusal(f"{self.shown(name)}: cannot be read", is_reading=True):
            try:
                data: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return data

    def create_object(self, name: str, data: bytes) -> bool:
        """Make a small object unless there is one: whether it was made."""
        with self._refusal(f"{self.shown(name)}: cannot be written"):
            self._make_folder()
            if knows_create(self._fs):
                try:
                    self._fs.pipe_file(self._path(name), data, mode="create")
                    return True
                except FileExistsError:
                    return False
                except Exception as error:
                    if not is_unsupported(error):
                        raise
            self.is_exclusive = False
            if self.read_object(name) is not None:
                return False
            self._fs.pipe_file(self._path(name), data)
        return True

    def write_object(self, name: str, data: bytes) -> None:
        """Make or replace a small object."""
        with self._refusal(f"{self.shown(name)}: cannot be written"):
            self._fs.pipe_file(self._path(name), data)

    def delete_object(self, name: str) -> None:
        """Remove an object; no error if it is gone."""
        with self._refusal(f"{self.shown(name)}: cannot be removed"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    # Large objects

    def upload(self, name: str, pieces: Iterable[Bytes], is_new: bool, beat: Callable[[bool], None]) -> None:
        """Write one object from pieces, while they come; its size is compared afterwards.

        is_new: nothing that readers see has its name, so that what is there after a failure is removed. beat: called
        now and then, and with True when only the last piece is missing. Whatever pieces and beat raise passes through.
        """
        target = self.shown(name)
        n_bytes, is_closing = 0, False
        with self._refusal(f"{target}: cannot be written"):
            self._make_folder()
            file = self._fs.open(self._path(name), "wb", block_size=_UPLOAD_BYTES)

        def write(piece: Bytes) -> None:
            nonlocal n_bytes
            view = memoryview(piece)
            for start in range(0, len(view), _UPLOAD_BYTES):  # in parts that need not be held for long
                part = view[start : start + _UPLOAD_BYTES]
                with self._refusal(f"{target}: cannot be written (after {n_bytes} bytes)"):
                    file.write(part)
                n_bytes += len(part)
                beat(False)

        try:
            last: Bytes = b""
            for piece in pieces:
                write(last)
                last = piece
            beat(True)  # before the last piece, since some file systems show it at once
            write(last)
            is_closing = True
            with self._refusal(f"{target}: cannot be written (after {n_bytes} bytes)"):
                file.close()
            found = self.look_up(name)
            if found is None or found.n_bytes != n_bytes:
                came = "nothing is" if found is None else f"{found.n_bytes} bytes are"
                raise StorageError(f"{target}: cannot be written: {came} there after {n_bytes} were sent. Try again.")
        except BaseException as error:
            with suppress(Exception):
                abandon(file)
            # After StoreLocked the name is another writer's. An object store shows nothing before the end.
            if is_new and not isinstance(error, StoreLocked) and (is_closing or not self.is_atomic):
                with suppress(Exception):
                    self._fs.rm_file(self._path(name))
            raise

    def ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of ranges of one object, several at a time where the file system can. Raises MissingFile."""
        with self._refusal(f"{self.shown(name)}: cannot be read", is_reading=True):
            try:
                if len(ranges) == 1:
                    offset, n_bytes = ranges[0]
                    return [self._fs.cat_file(self._path(name), start=offset, end=offset + n_bytes)]
                starts, ends = [a for a, _ in ranges], [a + n for a, n in ranges]
                paths = [self._path(name)] * len(ranges)
                found: list[bytes] = self._fs.cat_ranges(paths, starts, ends, on_error="raise")
                return found
            except FileNotFoundError:
                raise _missing(self.shown(name)) from None

    def ranges_of_many(self, wanted: Sequence[tuple[str, Range]]) -> list[bytes | StorageError | MissingFile]:
        """The bytes of one range each of several objects, asked for together; or why it did not come."""
        paths = [self._path(name) for name, _ in wanted]
        starts, ends = [a for _, (a, _) in wanted], [a + n for _, (a, n) in wanted]
        with self._refusal(f"{self.url}: cannot be read", is_reading=True):
            found = self._fs.cat_ranges(paths, starts, ends, on_error="return")
        came: list[bytes | StorageError | MissingFile] = []
        for (name, _), data in zip(wanted, found, strict=True):
            if isinstance(data, FileNotFoundError):
                came.append(_missing(self.shown(name)))
            elif isinstance(data, Exception):
                came.append(failure(data, f"{self.shown(name)}: cannot be read", is_reading=True))
            else:
                came.append(data)
        return came

    # What is there

    def listed(self) -> dict[str, Entry]:
        """All objects there, hidden ones too; a folder that is not there has none."""
        return {name: _entry(name, about) for name, about in self._seen().items() if about["type"] == "file"}

    def folders(self) -> list[str]:
        """Names of the folders there, in order."""
        return sorted(name for name, about in self._seen().items() if about["type"] == "directory")

    def _seen(self) -> dict[str, Mapping[str, Any]]:
        """What the file system tells of each object and folder there."""
        with self._refusal(f"{self.url}: cannot be listed", is_reading=True):
            self._fs.invalidate_cache(self._root)
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
        seen = {}
        for about in found:
            if about["name"].strip("/") != self._root.strip("/"):
                seen[about["name"].rstrip("/").rsplit("/", 1)[-1]] = about
            elif about["type"] == "file" and about.get("size"):  # else the mark of an empty folder
                raise InvalidArgument(f"{self.url}: is a file. A Store needs a folder.")
        return seen

    def look_up(self, name: str) -> Entry | None:
        """An object of that name, or None."""
        with self._refusal(f"{self.shown(name)}: cannot be looked up", is_reading=True):
            self._fs.invalidate_cache(self._root)
            try:
                about = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
        return _entry(name, about) if about["type"] == "file" else None

    def _path(self, name: str) -> str:
        fs = self._fs  # which sets the root
        return f"{self._root}/{name}" if fs is not None and self._root else name

    def _make_folder(self) -> None:
        """Make the folder, where there are folders."""
        if not self.is_atomic and self._root:
            with suppress(NotImplementedError, FileExistsError):
                self._fs.makedirs(self._root, exist_ok=True)

    @contextmanager
    def _refusal(self, what: str, is_reading: bool = False) -> Iterator[None]:
        """Turn whatever the file system raises into a StorageError that says what to do."""
        try:
            yield
        except (TricompError, MemoryError):
            raise
        except Exception as error:
            raise failure(error, what, is_reading) from error


def _entry(name: str, about: Mapping[str, Any]) -> Entry:
    n_bytes = int(about.get("size") or 0)
    # A listing and a look-up tell times in different grains, so a checksum alone is better where there is one.
    known = [(key, about[key]) for key in _CHECKS if about.get(key)][:1]
    known = known or [(key, about[key]) for key in _TIMES if about.get(key)]
    stamp = [(key, value.timestamp() if isinstance(value, datetime) else value) for key, value in known]
    return Entry(name, n_bytes, (n_bytes, *((key, str(value)) for key, value in stamp)), time.monotonic())


def _missing(shown: str) -> MissingFile:
    return MissingFile(f"{shown}: is not there: it was removed, or the URL is wrong.")
