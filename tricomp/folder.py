"""Storage in a local folder: bytes in and out, whole or not at all. Imports bounds and errors.

The hard thing: a writer may die at any instant. A file is written under a temporary name that no reader lists, synced,
renamed, and the folder synced. A writer holds an flock on its temporary file, which the kernel drops when the writer
dies, so that whoever writes next knows which temporary files nobody owns and removes them.

Locks on a network file system: Linux maps flock onto byte-range locks of NFS, so they hold between hosts as long as the
server's lock service runs; mounts with `nolock` or `local_lock` (and Lustre without `-o flock`) lock within one host
or not at all. Where the file system refuses to lock, a warning is logged and nothing keeps a second writer out.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
import stat
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, MissingFile, StorageError, StoreLocked

try:
    import fcntl
except ImportError:  # not on Windows; then nothing keeps a second writer out
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("tricomp")
LOCK_NAME = ".tricomp.lock"
_LONGEST_STEM = 255 - len("..01234567.tmp")  # bytes of a name, for its temporary name to be one
_DYING_SECONDS = 5.0  # how long to wait for the lock of a holder that has ended; its children may still be starting
_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file size limit reached"}
_BEGUN_BYTES = 8 << 20  # that the disk is asked for at a time
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class LocalFile:
    """A Source over a local file, mapped into memory: reading one leaf touches that leaf's pages only."""

    def __init__(self, path: str, name: str | None = None) -> None:
        """path: of a regular file. Raises MissingFile, InvalidArgument, StorageError."""
        self.name = name or path
        self._map: mmap.mmap | None = None
        try:
            if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):  # a pipe would block
                raise InvalidArgument(f"{self.name}: is not a regular file. Copy what it gives to one first.")
            with open(path, "rb") as file:
                self.n_bytes = os.fstat(file.fileno()).st_size
                if self.n_bytes:  # an empty file cannot be mapped
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise MissingFile(f"{self.name}: there is no such file. Check the path.") from None
        except IsADirectoryError:
            raise InvalidArgument(f"{self.name}: is a folder. Give a .tri file, or use tricomp.Store.") from None
        except InvalidArgument:
            raise
        except (OSError, ValueError) as error:
            raise _storage_error(error, f"{self.name}: cannot be read", is_reading=True) from error
        self._view = memoryview(self._map) if self._map is not None else memoryview(b"")
        self._is_open = True

    def read(self, offset: int, n_bytes: int) -> memoryview:
        """A view of these bytes. Raises CorruptFile when not all are in the file, InvalidArgument if closed."""
        if not self._is_open:
            raise InvalidArgument(f"{self.name}: is closed. Open it again.")
        if not 0 <= offset <= offset + n_bytes <= self.n_bytes:
            raise CorruptFile(f"{self.name}: bytes {offset}..{offset + n_bytes} of a file of {self.n_bytes} bytes.")
        return self._view[offset : offset + n_bytes]

    def close(self) -> None:
        """Unmap the file, at once or when the last view of it is gone."""
        self._is_open = False
        with suppress(BufferError):
            self._view.release()
            if self._map is not None:
                self._map.close()


class FolderLock:
    """The writer's lock of a folder: an flock, released by the kernel when the process dies, and never inherited."""

    def __init__(self, file: IO[bytes], path: str, url: str) -> None:
        """file: open and locked, at path. url: of the folder, for messages."""
        self._file, self._path, self._url = file, path, url
        self._pid = os.getpid()
        _held.add(self)

    @property
    def is_held(self) -> bool:
        return self._pid == os.getpid() and not self._file.closed

    def refresh(self) -> None:
        """Make sure that the locked file is still the one there. Raises StorageError: the folder was moved."""
        try:
            is_same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            is_same = False
        except OSError as error:
            raise _storage_error(error, f"{self._url}: cannot be looked up") from error
        if not is_same:
            raise StorageError(
                f"{self._url}: was moved, removed or replaced while it was written to: its {LOCK_NAME} is no longer "
                "the one that this writer holds. Close the Store and open it where the folder is now."
            )

    def release(self) -> None:
        """Let the next writer in."""
        if self.is_held:
            with suppress(OSError):
                self._file.truncate(0)
        self._file.close()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_locks() -> None:
    """A forked child shares the flock, and would keep the store locked after the writer's death: close its copy."""
    for lock in list(_held):
        lock._file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


class Folder:
    """Storage in a local folder. Made on the first write. A relative path stays what it names now."""

    def __init__(self, path: str) -> None:
        self.url = path
        self._path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)

    def put(self, name: str, pieces: Iterable[Bytes], is_synced: bool = True) -> None:
        """Write a file from pieces, atomically and durably; a file of that name is replaced, never truncated.

        is_synced: False: the system brings it to the disk by and by, so that it survives this process and any other,
        but not the machine's sudden end. Whatever pieces raises passes through, and nothing is left behind. Raises
        StorageError when the folder is full, read-only or otherwise refuses.
        """
        target, real = os.path.join(self.url, name), os.path.join(self._path, name)
        n_bytes = 0
        with self._refusal(target):
            _make_folder(self._path)
            stem = name if len(os.fsencode(name)) <= _LONGEST_STEM else f"{zlib.crc32(os.fsencode(name)):08x}"
            _remove_orphans(self._path, f".{stem}.")
        temporary = os.path.join(self._path, f".{stem}.{os.urandom(4).hex()}.tmp")
        file: IO[bytes] | None = None
        try:  # the file is made in here, so that a signal at any instant leaves none
            with self._refusal(target):
                file = open(temporary, "xb")  # noqa: SIM115 - closed below, before the rename
            _try_lock(file)
            n_begun = 0
            for piece in pieces:
                with self._refusal(target, n_bytes):
                    file.write(piece)
                n_bytes += len(piece)
                del piece  # whoever made it may want its room
                if is_synced and n_bytes - n_begun >= _BEGUN_BYTES:
                    _begin_to_sync(file, n_begun, n_bytes)
                    n_begun = n_bytes
            with self._refusal(target, n_bytes):
                file.flush()
                if is_synced:
                    os.fsync(file.fileno())
                file.close()
                os.replace(temporary, real)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            with suppress(OSError):  # what is still buffered cannot be written: that is known already
                if file is not None:
                    file.close()
            raise
        if is_synced:
            with self._refusal(target, n_bytes):
                _sync_folder(self._path)

    def link(self, name: str, path: str) -> None:
        """Give a file of the folder a second name as well, a path, which from one instant on names it durably.

        What had that name loses it. Raises StorageError, with errno, also where the file system knows no hard links.
        """
        temporary = os.path.join(self._path, f".{os.urandom(4).hex()}.tmp")  # of nobody, so that lock removes it
        with self._refusal(path):
            try:
                os.link(os.path.join(self._path, name), temporary)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync_folder(os.path.dirname(os.path.abspath(path)))

    def get(self, name: str) -> LocalFile:
        """Open a file of the folder, mapped. Raises MissingFile, StorageError."""
        return LocalFile(os.path.join(self._path, name), os.path.join(self.url, name))

    def list(self) -> dict[str, object]:
        """Names of the files, without hidden and temporary ones; a missing folder has none. Raises StorageError."""
        files = ((name, about) for name, about in self._seen() if stat.S_ISREG(about.st_mode))
        return {name: (about.st_ino, about.st_size, about.st_mtime_ns) for name, about in files}

    def folders(self) -> tuple[str, ...]:
        """Names of the folders in it, without hidden ones, in order. Raises StorageError."""
        return tuple(sorted(name for name, about in self._seen() if stat.S_ISDIR(about.st_mode)))

    def _seen(self) -> Iterator[tuple[str, os.stat_result]]:
        """What is there and not hidden; nothing, if the folder itself is not."""
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with suppress(FileNotFoundError):  # removed by the writer a moment ago
                            yield entry.name, entry.stat()
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise InvalidArgument(f"{self.url}: is a file. A Store needs a folder.") from None
        except OSError as error:
            raise _storage_error(error, f"{self.url}: cannot be listed", is_reading=True) from error

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is gone. Raises StorageError."""
        with self._refusal(os.path.join(self.url, name)), suppress(FileNotFoundError):
            os.unlink(os.path.join(self._path, name))

    def lock(self) -> FolderLock:
        """Become the folder's only writer, until release or death, and remove what dead writers left behind.

        Raises StoreLocked, naming the holder's process and host; StorageError if the folder refuses.
        """
        path = os.path.join(self._path, LOCK_NAME)
        with self._refusal(os.path.join(self.url, LOCK_NAME)):
            _make_folder(self._path)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        is_locked = _try_lock(file)
        deadline = time.monotonic() + _DYING_SECONDS
        while is_locked is False and _is_dead(_holder(file)) and time.monotonic() < deadline:
            time.sleep(0.02)
            is_locked = _try_lock(file)
        if is_locked is None:
            _log.warning("%s: the file system cannot lock: nothing keeps a second writer out", self.url)
        if is_locked is False:
            holder = _holder(file) or "another process"
            file.close()
            raise StoreLocked(
                f"{self.url}: is being written by {holder}. Wait for it to end or close its Store; "
                f"reading needs no lock."
            )
        try:
            with self._refusal(os.path.join(self.url, LOCK_NAME)):
                file.truncate(0)
                file.write(_self().encode())
                _remove_orphans(self._path, ".")
        except BaseException:
            file.close()
            raise
        return FolderLock(file, path, self.url)

    @contextmanager
    def _refusal(self, target: str, n_bytes: int = 0) -> Iterator[None]:
        """Turn an OSError of the file system into a StorageError that says what to do."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise _storage_error(error, f"{target}: cannot be written (after {n_bytes} bytes)") from error


def split(path: str | os.PathLike[str]) -> tuple[Folder, str]:
    """The folder and name to put a file at path, links followed. Raises InvalidArgument, StorageError."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(os.fspath(path)):
        shown = repr(path) if isinstance(path, str | bytes) else f"a {type(path).__name__}"
        raise InvalidArgument(f"save: expected a path, as in tricomp.save(path, tree), got {shown}.")
    real = os.path.realpath(os.fspath(path))
    if os.path.lexists(real) and not os.path.isfile(real):
        raise InvalidArgument(
            f"{os.fspath(path)}: is not a regular file and will not be replaced. Choose another path."
        )
    folder = os.path.dirname(real)
    if not os.path.isdir(folder):
        raise StorageError(f"{os.fspath(path)}: cannot be written: there is no folder {folder}. Make it first.")
    return Folder(folder), os.path.basename(real)


def _try_lock(file: IO[bytes]) -> bool | None:
    """Lock an open file for this process alone: True, False when another holds it, None when it cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        _log.debug("%s: cannot be locked: %s", file.name, error)
        return None
    return True


def _self() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()}"


def _holder(file: IO[bytes]) -> str:
    """What the holder of a lock wrote about itself."""
    file.seek(0)
    return file.read(200).decode("utf-8", "replace")


def _is_dead(holder: str) -> bool:
    """Whether a holder is a process of this host that has ended: then its lock is about to go."""
    words = holder.split()
    if len(words) < 2 or not words[1].isdecimal() or holder != _self().replace(str(os.getpid()), words[1], 1):
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _remove_orphans(folder: str, prefix: str) -> None:
    """Remove temporary files that no living writer holds."""
    for name in os.listdir(folder):
        if not (name.startswith(prefix) and name.endswith(".tmp")):
            continue
        with suppress(OSError), open(os.path.join(folder, name), "r+b") as file:  # NFS locks what can be written
            if _try_lock(file):
                os.unlink(file.name)


def _make_folder(folder: str) -> None:
    """Make a folder and those above it, durably. Raises InvalidArgument if something else has its name."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder) and not os.path.isdir(folder):
            what = "is a file" if os.path.exists(folder) else "is a link to nothing"
            raise InvalidArgument(f"{folder}: {what}. A Store needs a folder.")
        above = os.path.dirname(os.path.abspath(folder))
        _make_folder(above)
        os.makedirs(folder, exist_ok=True)
        _sync_folder(above)


def _begin_to_sync(file: IO[bytes], begin: int, end: int) -> None:
    """Let the disk begin with bytes that are written, while the next ones are made: a sync then waits for few.

    Linux does so when it is told that they will not be read soon; others may not, and nothing depends on it.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: str) -> None:
    """Make a rename in the folder durable, where the file system knows how to."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(descriptor)


def _storage_error(error: Exception, what: str, is_reading: bool = False) -> StorageError:
    code = getattr(error, "errno", None)
    reason = os.strerror(code) if code else str(error)
    advice = "Nothing that was there has changed."
    if is_reading:
        advice = "Ask for permission to read it." if code in _REFUSED else "Check the path and its disk."
    elif code in _FULL:
        advice = f"The disk is full ({_FULL[code]}): free some space and save again. {advice}"
    elif code in _REFUSED:
        advice = f"The folder is read-only for this user: change its permissions or choose another. {advice}"
    failure = StorageError(f"{what}: {reason}. {advice}")
    failure.errno = code
    return failure
