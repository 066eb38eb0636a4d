"""A local folder with copies of files of a bucket that serve as references. Imports bounds, errors, folder.

A copy is named by the URL, the file's name and its stamp, so that a file that changed is another. The hard thing: the
folder is nobody's own. Processes fill and empty it at the same time, and disks forget: a copy appears by rename, whole
or not at all; it holds a checksum of each block, compared when the block is first read; and a copy that is damaged, cut
or gone is never an error, only a reason to read the bucket.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import xxhash

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, TricompError
from tricomp.folder import LocalFile

if TYPE_CHECKING:
    from tricomp.storage import Source

_log = logging.getLogger("tricomp")
BLOCK_BYTES = 1 << 20
_SUFFIX, _UNFINISHED = ".copy", ".tmp"
_ORPHAN_SECONDS = 3600.0  # a copy that nobody wrote to for this long has no writer any more


class Cache:
    """Copies in a local folder, at most max_bytes together: those not used for longest make room."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        """Nothing is made before the first copy. Raises InvalidArgument."""
        if not isinstance(folder, str | os.PathLike) or "://" in os.fspath(folder):
            raise InvalidArgument(f"cache: expected a local folder, got {folder!r}.")
        if type(max_bytes) is not int or max_bytes < 0:
            raise InvalidArgument(f"cache_bytes: expected a number of bytes, got {max_bytes!r}.")
        self.folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        self.max_bytes = max_bytes

    @staticmethod
    def key(url: str, places: Mapping[str, str], name: str, stamp: tuple[object, ...]) -> str:
        """The name of a copy. places: what else tells the bucket from others of its URL."""
        where = xxhash.xxh3_64_hexdigest(repr((url, sorted(places.items()))).encode())
        return f"{where}-{name}-{xxhash.xxh3_64_hexdigest(repr(stamp).encode())}{_SUFFIX}"

    def get(self, key: str, n_bytes: int, name: str, far: Callable[[], Source]) -> CachedFile | None:
        """The copy of a file of n_bytes; None: there is none, or it has another size and was removed.

        name: of the file, for messages. far: opens the file itself, should the copy turn out damaged.
        """
        path = os.path.join(self.folder, key)
        try:
            copy = LocalFile(path, name)
        except (TricompError, OSError):
            return None
        if copy.n_bytes != n_bytes + _trailer_bytes(n_bytes):
            _remove(path, f"it has {copy.n_bytes} bytes")
            copy.close()
            return None
        with suppress(OSError):
            os.utime(path)
        return CachedFile(copy, path, n_bytes, far)

    def filling(self) -> Filling:
        """A copy to be written."""
        return Filling(self)

    def make_room(self, kept: str) -> None:
        """Remove copies, the longest unused first, until all fit; never the one just made. And what nobody finished."""
        found: list[tuple[float, int, str]] = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    about = entry.stat()
                    if entry.name.endswith(_SUFFIX):
                        found.append((about.st_mtime, about.st_size, entry.path))
                    elif entry.name.endswith(_UNFINISHED) and time.time() - about.st_mtime > _ORPHAN_SECONDS:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            if path != kept:
                with suppress(OSError):
                    os.unlink(path)
                total -= size


class Filling:
    """A copy being written; whatever keeps it from that (a full disk, more bytes than allowed) ends it silently."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._n_bytes = 0
        self._checks: list[int] = []
        self._block = xxhash.xxh3_64()
        self._path = os.path.join(cache.folder, f"{os.urandom(8).hex()}{_UNFINISHED}")
        self._file: IO[bytes] | None = None
        try:
            if cache.max_bytes:
                os.makedirs(cache.folder, exist_ok=True)
                self._file = open(self._path, "xb")  # noqa: SIM115 - closed by commit or abort
        except OSError as error:
            self._give_up(error)

    @property
    def is_full(self) -> bool:
        """Whether there is no use in writing more."""
        return self._file is None

    def write(self, piece: Bytes) -> None:
        """Add to the copy."""
        if self._file is None:
            return
        view = memoryview(piece).cast("B")
        if self._n_bytes + len(view) > self._cache.max_bytes:
            self.abort()
            return
        try:
            self._file.write(view)
        except OSError as error:
            self._give_up(error)
            return
        while len(view):
            part = view[: BLOCK_BYTES - self._n_bytes % BLOCK_BYTES]
            self._block.update(part)
            self._n_bytes += len(part)
            view = view[len(part) :]
            if self._n_bytes % BLOCK_BYTES == 0:
                self._end_block()

    def commit(self, key: str, n_bytes: int) -> None:
        """Let others see the copy, if it is whole."""
        if self._file is None or self._n_bytes != n_bytes:
            self.abort()
            return
        if self._n_bytes % BLOCK_BYTES:
            self._end_block()
        path = os.path.join(self._cache.folder, key)
        try:
            self._file.write(b"".join(check.to_bytes(8, "little") for check in self._checks))
            self._file.close()
            os.replace(self._path, path)
        except OSError as error:
            self._give_up(error)
            return
        self._file = None
        self._cache.make_room(path)

    def abort(self) -> None:
        """Drop the copy, unless it was committed."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                os.unlink(self._path)
            self._file = None

    def _end_block(self) -> None:
        self._checks.append(self._block.intdigest())
        self._block.reset()

    def _give_up(self, error: OSError) -> None:
        _log.warning("%s: holds no copy, and the bucket will be read: %s", self._cache.folder, error)
        self.abort()


class CachedFile:
    """A Source over a copy; over the bucket's file from the moment on that a block of the copy is found damaged."""

    def __init__(self, copy: LocalFile, path: str, n_bytes: int, far: Callable[[], Source]) -> None:
        self.name, self.n_bytes = copy.name, n_bytes
        self._copy, self._path, self._open = copy, path, far
        self._far: Source | None = None
        self._is_sound = bytearray(-(-n_bytes // BLOCK_BYTES))

    def read(self, offset: int, n_bytes: int) -> Bytes:
        """These bytes, their blocks compared with their checksums. Raises CorruptFile when not all are in the file."""
        if not 0 <= offset <= offset + n_bytes <= self.n_bytes:
            raise CorruptFile(f"{self.name}: bytes {offset}..{offset + n_bytes} of a file of {self.n_bytes} bytes.")
        if self._far is None:
            blocks = range(offset // BLOCK_BYTES, -(-(offset + n_bytes) // BLOCK_BYTES))
            if all(self._is_sound[i] or self._check(i) for i in blocks):
                return self._copy.read(offset, n_bytes)
            _remove(self._path, "it is damaged")
            self._far = self._open()
        return self._far.read(offset, n_bytes)

    def close(self) -> None:
        """Let go of the copy."""
        self._copy.close()
        if self._far is not None:
            self._far.close()

    def _check(self, block: int) -> bool:
        begin = block * BLOCK_BYTES
        data = self._copy.read(begin, min(BLOCK_BYTES, self.n_bytes - begin))
        stored = self._copy.read(self.n_bytes + 8 * block, 8)
        self._is_sound[block] = int.from_bytes(stored, "little") == xxhash.xxh3_64_intdigest(data)
        return bool(self._is_sound[block])


def _trailer_bytes(n_bytes: int) -> int:
    return 8 * -(-n_bytes // BLOCK_BYTES)


def _remove(path: str, why: str) -> None:
    _log.warning("%s: %s: the copy was removed, and the bucket is read", path, why)
    with suppress(OSError):
        os.unlink(path)
