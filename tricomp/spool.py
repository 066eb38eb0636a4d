"""Spool: bytes written once and read in order, in memory up to a size and in a temporary file beyond it.

The compressed frame of one leaf waits here until its directory is known. Imports the standard library only. The hard
thing: a leaf of many GB must not need as much memory, and one of a few MB must not touch a disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import IO

from tricomp.bounds import Bytes
from tricomp.errors import StorageError

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
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="tricomp-")  # noqa: SIM115 - closed when the Spool goes
            self._file.write(piece)
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: a large leaf waits there while it is encoded: {error.strerror}. "
                "Free some space, or set TMPDIR to a folder that has it."
            ) from error

    def __iter__(self) -> Iterator[Bytes]:
        yield from self._pieces
        if self._file is not None:
            self._file.flush()
            n_filed = self.n_bytes - self._n_held
            for first in range(0, n_filed, _READ_BYTES):
                yield os.pread(self._file.fileno(), min(_READ_BYTES, n_filed - first), first)
