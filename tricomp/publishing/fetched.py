"""A file of a bucket, brought here whole when its data are first asked for. Imports storage's kinds and spool.

A version's files are read from end to end, a tensor at a time, by several threads; a request for each of thousands of
small tensors would take far longer than their bytes do. The hard thing: who only wants a header gets no more than that.
"""

from __future__ import annotations

from threading import Lock

from tricomp.bounds import Bytes
from tricomp.folder import LocalFile
from tricomp.spool import Scratch
from tricomp.storage import Source

_PART_BYTES = 64 << 20  # asked for at a time


class Fetched:
    """A Source over another, far one."""

    def __init__(self, source: Source) -> None:
        """Takes over source."""
        self.name, self.n_bytes = source.name, source.n_bytes
        self._source, self._lock = source, Lock()
        self._whole: Scratch | None = None

    def peek(self, offset: int, n_bytes: int) -> Bytes:
        """These bytes alone. Raises CorruptFile, StorageError."""
        with self._lock:
            return self._source.read(offset, n_bytes)

    def read(self, offset: int, n_bytes: int) -> Bytes:
        """These bytes; the first time, the whole file comes, into a temporary one. Raises CorruptFile, StorageError."""
        with self._lock:
            if self._whole is None:
                whole = Scratch(self.name, "a published file while it is applied")
                for start in range(0, self.n_bytes, _PART_BYTES):
                    whole.append(self._source.read(start, min(_PART_BYTES, self.n_bytes - start)))
                whole.read(0, 0)
                self._whole = whole
        return self._whole.read(offset, n_bytes)

    def close(self) -> None:
        self._source.close()
        if self._whole is not None:
            self._whole.close()


class Peeked:
    """A Source that peeks into a Fetched."""

    def __init__(self, source: Fetched) -> None:
        self.name, self.n_bytes, self.read = source.name, source.n_bytes, source.peek

    def close(self) -> None:
        """Leaves the Fetched open."""


def near(source: Source) -> Source:
    """A source to read from end to end: that of a local file as it is."""
    return source if isinstance(source, LocalFile) else Fetched(source)
