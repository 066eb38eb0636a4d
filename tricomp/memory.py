"""Storage in this process's memory: the same promises as a folder's, without a disk. Imports bounds and errors.

For checkpoints that are held compressed and never written, and for tests. The hard thing: readers of a file keep its
bytes when it is replaced or removed, as an open file does.
"""

from __future__ import annotations

from collections.abc import Iterable

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, MissingFile, StoreLocked


class HeldFile:
    """A Source over bytes in memory. data: taken over, not copied."""

    def __init__(self, data: Bytes, name: str) -> None:
        self.name = name
        self._view = memoryview(data).cast("B")
        self.n_bytes = len(self._view)

    def read(self, offset: int, n_bytes: int) -> memoryview:
        """A view of these bytes. Raises CorruptFile when not all of them are there."""
        if not 0 <= offset <= offset + n_bytes <= self.n_bytes:
            raise CorruptFile(f"{self.name}: bytes {offset}..{offset + n_bytes} of {self.n_bytes} bytes.")
        return self._view[offset : offset + n_bytes]

    def close(self) -> None:
        """Nothing to let go of."""


class HeldLock:
    """The one writer's hold on a Memory."""

    def __init__(self, owner: Memory) -> None:
        self._owner = owner

    @property
    def is_held(self) -> bool:
        return self._owner._writer is self

    def refresh(self) -> None:
        """Nothing can take it away."""

    def release(self) -> None:
        """Let the next writer in."""
        if self.is_held:
            self._owner._writer = None


class Memory:
    """Storage in memory. url: for messages."""

    def __init__(self, url: str = "memory") -> None:
        self.url = url
        self._files: dict[str, tuple[int, memoryview]] = {}
        self._n_written = 0
        self._writer: HeldLock | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(len(data) for _, data in self._files.values())

    def put(self, name: str, pieces: Iterable[Bytes]) -> None:
        """Take a file's bytes; whatever pieces raises passes through, and nothing has changed then."""
        data = bytearray()  # which grows where it is, mostly: pieces that are joined are there twice
        for piece in pieces:
            data += piece
        self._n_written += 1
        self._files[name] = self._n_written, memoryview(data).toreadonly()

    def get(self, name: str) -> HeldFile:
        """A Source over a file. Raises MissingFile."""
        if name not in self._files:
            raise MissingFile(f"{self.url}: holds no {name!r}.")
        return HeldFile(self._files[name][1], name)

    def list(self) -> dict[str, object]:
        """Names of the files, each with a number that changes when the file does."""
        return {name: number for name, (number, _) in self._files.items()}

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is gone."""
        self._files.pop(name, None)

    def lock(self) -> HeldLock:
        """Become the only writer. Raises StoreLocked."""
        if self._writer is not None:
            raise StoreLocked(f"{self.url}: has a writer already. Close its Store.")
        self._writer = HeldLock(self)
        return self._writer
