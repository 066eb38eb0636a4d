"""Bytes that wait in nameless temporary files: a Spool is read in order, a Scratch anywhere. Imports bounds and errors.

The compressed frame of one leaf waits in a Spool until its directory is known; what is inflated, joined or decoded for
a while goes to a Scratch. The hard thing: memory stays bounded and one small leaf touches no disk; and where the disk
has no room, whoever asked hears which folder it was and how to choose another.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, StorageError

MEMORY_BYTES = 256 << 20  # held in memory by one Spool
_READ_BYTES = 4 << 20


class Spool:
    """Append pieces, then iterate over them, as often as wanted; later pieces come joined or cut."""

    def __init__(self) -> None:
        self._pieces: list[Bytes] = []
        self._n_held = 0
        self._file: IO[bytes] | None = None
        self.n_bytes = 0

    def append(self, piece: Bytes) -> None:
        """Take a piece; not copied while it stays in memory. Raises StorageError when the disk is full."""
        self.n_bytes += len(piece)
        if self._file is None and self._n_held + len(piece) <= MEMORY_BYTES:
            self._pieces.append(piece)
            self._n_held += len(piece)
            return
        with _refusal("a large leaf while it is encoded"):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="tricomp-")  # noqa: SIM115 - closed when the Spool goes
            self._file.write(piece)

    def __iter__(self) -> Iterator[Bytes]:
        yield from self._pieces
        if self._file is not None:
            self._file.flush()
            n_filed = self.n_bytes - self._n_held
            for first in range(0, n_filed, _READ_BYTES):
                yield os.pread(self._file.fileno(), min(_READ_BYTES, n_filed - first), first)


class Scratch:
    """A Source that is written first, then mapped and read. The disk it takes is free again when the last view is gone.

    name: as of any Source. what: it holds, for the message when there is no room.
    """

    def __init__(self, name: str, what: str) -> None:
        """Raises StorageError when no temporary file can be made."""
        self.name, self._what = name, what
        self.n_bytes = 0
        self._view: memoryview | None = None
        with _refusal(what):
            self._file = tempfile.TemporaryFile(prefix="tricomp-")  # noqa: SIM115 - closed below

    def append(self, data: Bytes) -> int:
        """Add bytes; returns where they begin. Raises StorageError when the disk is full."""
        start = self.n_bytes
        with _refusal(self._what):
            self._file.write(data)
        self.n_bytes += len(data)
        return start

    def read(self, offset: int, n_bytes: int) -> memoryview:
        """A view of these bytes; the first one ends the writing. Raises CorruptFile, InvalidArgument if closed."""
        if self._view is None:
            if self._file.closed:
                raise InvalidArgument(f"{self.name}: is closed. Open it again.")
            with _refusal(self._what):
                self._file.flush()
                self._view = self._mapped()
        if not 0 <= offset <= offset + n_bytes <= self.n_bytes:
            raise CorruptFile(f"{self.name}: bytes {offset}..{offset + n_bytes} of {self.n_bytes}.")
        return self._view[offset : offset + n_bytes]

    def close(self) -> None:
        """Let go of the file; views keep it mapped."""
        self._file.close()
        if self._view is not None:
            with suppress(BufferError):
                self._view.release()
            self._view = None

    def _mapped(self) -> memoryview:
        if not self.n_bytes:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the folder for temporary files."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            f"{tempfile.gettempdir()}: cannot hold {what}: {reason}. "
            "Free some space there, or set TMPDIR to another folder."
        ) from error
