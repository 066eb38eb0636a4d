"""Bytes that exist nowhere in one piece, put into a nameless temporary file and mapped: a Source. Imports no framework.

What is inflated or joined goes here, so that memory stays bounded; the disk it takes is free again when the last view
is gone. The hard thing: it may not fit, and then whoever reads must hear where it was and how to choose another place.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from typing import Any

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, StorageError


class Scratch:
    """Written first, then read as a Source; append returns where in it the bytes begin. name is for messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.n_bytes = 0
        self._view: memoryview | None = None
        with self._refusal():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below

    def append(self, data: Bytes) -> int:
        """Raises StorageError when the folder for temporary files is full."""
        start = self.n_bytes
        with self._refusal():
            self._file.write(data)
        self.n_bytes += len(data)
        return start

    def read(self, offset: int, n_bytes: int) -> memoryview:
        """A view of these bytes; the first one ends the writing. Raises CorruptFile, InvalidArgument if closed."""
        if self._view is None:
            if self._file.closed:
                raise InvalidArgument(f"{self.name}: is closed. Open it again.")
            with self._refusal():
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

    def _refusal(self) -> _Refusal:
        return _Refusal(self)


class _Refusal:
    """Turns an OSError into a StorageError that says where the bytes were to go."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StorageError(
                f"{self._scratch.name}: cannot be unpacked in {tempfile.gettempdir()} (after {self._scratch.n_bytes} "
                f"bytes): {reason}. Set TMPDIR to a folder with more room."
            ) from error
