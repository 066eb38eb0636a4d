"""Where compressed and restored files go: a path, several at once, a stream. Imports storage's kinds and names.

The hard thing: the promise that a file is there whole or not at all holds for several files together, and an input
that changes while it is read must be noticed before the output has its name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import BinaryIO

from tricomp import folder
from tricomp.ahead import ahead
from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument, StorageError
from tricomp.memory import Memory
from tricomp.progress import OnBytes

AHEAD_BYTES = 8 << 20  # of pieces that wait to be written


class Output(Memory):
    """A Storage to put one file into, nothing else. check: called when all pieces came, before the file is there."""

    def __init__(self, url: str, write: Callable[[str, Iterable[Bytes]], object], check: Callable[[], None]) -> None:
        super().__init__(url)
        self._write, self._check = write, check

    def put(self, name: str, pieces: Iterable[Bytes]) -> None:
        """Write the pieces where they go; what check raises passes through, and no file is there then."""

        def checked() -> Iterator[Bytes]:
            yield from pieces
            self._check()

        self._write(name, checked())


def unchanged(files: Sequence[str]) -> Callable[[], None]:
    """A function that raises InvalidArgument if one of the files has changed since; a file that is gone has not."""
    before = [_stamp(name) for name in files]

    def check() -> None:
        for name, stamp in zip(files, before, strict=True):
            if _stamp(name) not in (stamp, None):
                raise InvalidArgument(f"{name}: changed while it was read. Nothing was written: compress it again.")

    return check


def make_folder(out: object) -> None:
    """Make the folder that an output goes to, if it is named as one, by a separator at its end. Raises StorageError."""
    if isinstance(out, (str, os.PathLike)) and os.fspath(out).endswith(os.sep):
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise _refused(error, str(os.fspath(out))) from error


def put(target: str, pieces: Iterable[Bytes], is_synced: bool = True, on_bytes: OnBytes | None = None) -> int:
    """Write a file, whole or not at all, while its next pieces are made. Returns its bytes.

    is_synced: see Folder.put. on_bytes: told the bytes of each piece that is written. Raises StorageError,
    InvalidArgument.
    """
    where, name = folder.split(target)
    n_bytes = 0

    def count(n: int) -> None:
        nonlocal n_bytes
        n_bytes += n

    with closing(ahead(pieces, AHEAD_BYTES, len)) as ready:
        where.put(name, _counted(_counted(ready, on_bytes), count), is_synced)
    return n_bytes


def put_folder(target: str, write: Callable[[str], None], replaces: Callable[[str], bool]) -> int:
    """Make a folder by write, whole or not at all. Returns the bytes of its files.

    replaces: whether a folder that has the name already is to be replaced. Raises StorageError, InvalidArgument, and
    what write raises.
    """
    target = os.path.abspath(target)
    where = os.path.dirname(target)
    staging = os.path.join(where, f".tricomp.{os.urandom(4).hex()}.tmp")
    new, old = os.path.join(staging, "new"), os.path.join(staging, "old")
    try:
        os.makedirs(where, exist_ok=True)
        os.mkdir(staging)
        write(new)
        n_bytes = sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(new) for name in names)
        if os.path.lexists(target):
            if not replaces(target):
                raise InvalidArgument(f"{target}: came to be while it was written, and is not replaced.")
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, target)
            raise
        _sync(where)
    except OSError as error:
        raise error if isinstance(error, StorageError) else _refused(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return n_bytes


def put_together(
    targets: Sequence[str],
    pieces: Sequence[Iterable[Bytes]],
    is_synced: bool = True,
    on_bytes: OnBytes | None = None,
) -> list[int]:
    """Write files of one folder: none has its name before the last byte of all is written. Returns their bytes.

    They are written in a hidden folder beside them, which is gone afterwards. is_synced, on_bytes: as for put. Raises
    StorageError.
    """
    where = os.path.dirname(targets[0]) or os.curdir
    staging = os.path.join(where, f".tricomp.{os.urandom(4).hex()}.tmp")
    try:
        os.makedirs(where, exist_ok=True)
        os.mkdir(staging, 0o777)
        sizes = [
            put(os.path.join(staging, os.path.basename(target)), part, is_synced, on_bytes)
            for target, part in zip(targets, pieces, strict=True)
        ]
        _rename(staging, targets)
        if is_synced:
            _sync(where)
    except StorageError as error:
        raise StorageError(str(error).replace(os.path.realpath(staging), where).replace(staging, where)) from error
    except OSError as error:
        raise _refused(error, where) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sizes


def _counted(pieces: Iterable[Bytes], on_bytes: OnBytes | None) -> Iterator[Bytes]:
    """Pieces as they come; on_bytes is told of each when it is done with."""
    for piece in pieces:
        n_bytes = len(piece)
        yield piece
        del piece  # whoever made it may want its room
        if on_bytes is not None:
            on_bytes(n_bytes)


def _rename(staging: str, targets: Sequence[str]) -> None:
    """Give the files in staging their names; if one cannot have its name, what was there before is put back."""
    moves = [(os.path.join(staging, os.path.basename(target)), target) for target in targets]
    news = {target for target in targets if not os.path.lexists(target)}
    try:
        for staged, target in moves:
            if target not in news:
                with suppress(OSError):  # a file system without second names
                    os.link(target, f"{staged}.old", follow_symlinks=False)
            os.replace(staged, target)
    except BaseException:
        for staged, target in moves:
            if not os.path.lexists(staged):
                with suppress(OSError):
                    os.unlink(target) if target in news else os.replace(f"{staged}.old", target)
        raise


def write_ahead(stream: BinaryIO, pieces: Iterable[Bytes], on_bytes: OnBytes | None = None) -> int:
    """The same as write, while the next pieces are made. on_bytes: as for put."""
    with closing(ahead(pieces, AHEAD_BYTES, len)) as ready:
        return write(stream, _counted(ready, on_bytes))


def write(stream: BinaryIO, pieces: Iterable[Bytes]) -> int:
    """Write to a stream, all of every piece. Returns bytes. Raises StorageError, and BrokenPipeError as it comes."""
    n_bytes = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        del piece
        try:
            while len(view):
                n_written = stream.write(view)
                n_bytes += n_written
                view = view[n_written:]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refused(error, f"standard output (after {n_bytes} bytes)") from error
    with suppress(AttributeError):
        stream.flush()
    return n_bytes


def keep_private(path: str, like: str) -> None:
    """Take from a file that was written the permissions that another one does not give."""
    with suppress(OSError):
        mode, allowed = os.stat(path).st_mode & 0o777, os.stat(like).st_mode & 0o777
        if mode & ~allowed:
            os.chmod(path, mode & allowed)


def _stamp(name: str) -> tuple[int, int, int] | None:
    """What changes when a file does; None: it is gone, which does no harm to what is mapped."""
    try:
        about = os.stat(name)
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _sync(path: str) -> None:
    """Make what was renamed into a folder durable, where the file system knows how to."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refused(error: OSError, what: str) -> StorageError:
    is_forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    advice = "Choose another place." if is_forbidden else "Free space, or choose another place."
    failure = StorageError(f"{what}: cannot be written: {error.strerror or error}. {advice}")
    failure.errno = error.errno
    return failure
