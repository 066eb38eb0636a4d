"""The copy of a model on an inference server's disk: which version it is at, and how it comes to another in one step.

Beside the files of the model a folder `.weight_sync` says what they are: `state.json` the version, `lock` who is at
work (an flock), as other programs of this layout have it. The hard thing: a process may die at any instant. New files
are written and synced beside the old ones, in `.weight_sync/next`; then `tricomp.json` says what is to be moved where;
then the state is withdrawn, the files moved, the new state written. Whoever comes next drops what was not finished
being written, or finishes moving what was. Files that somebody has mapped are replaced, never written into.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import xxhash

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, MissingFile, StorageError, StoreLocked
from tricomp.folder import Folder
from tricomp.publishing import shards
from tricomp.publishing.shards import INDEX, Shard
from tricomp.publishing.tensors import Tensor

try:
    import fcntl
except ImportError:  # not on Windows; then nothing keeps a second process out
    fcntl = None  # type: ignore[assignment]

SYNC = ".weight_sync"
_STATE, _LOCK, _JOURNAL, _NEXT = "state.json", "lock", "tricomp.json", "next"
_OURS = b"tricomp\n"


class Copy:
    """The files of a model in a folder. shards: open. tensors: by name. index: is there one? A context manager."""

    def __init__(self, path: str, opened: Sequence[Shard], index: bool) -> None:
        self.path, self.shards, self.index = path, opened, index
        self.tensors: dict[str, Tensor] = {}
        for shard in opened:
            for name, tensor in shard.tensors.items():
                if name in self.tensors:
                    raise CorruptFile(
                        f"{shard.source.name}: tensor {name!r} is in another file too. Remove one of them."
                    )
                self.tensors[name] = tensor

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_copy(path: str) -> Copy | None:
    """The model in a folder, by its index or as all its safetensors files; or in one file. None: there is none."""
    if os.path.isfile(path):
        where, name = os.path.split(path)
        return Copy(path, [shards.open_shard(Folder(where or "."), name)], index=False)
    here = Folder(path)
    names = here.list()
    if INDEX in names:
        _, placed = shards.read_index(here)
        return Copy(path, shards.open_placed(here, placed), index=True)
    found = sorted(name for name in names if name.endswith(".safetensors"))
    return Copy(path, [shards.open_shard(here, name) for name in found], index=False) if found else None


@contextmanager
def locked(path: str, timeout: float | None) -> Iterator[None]:
    """Be the only one at work on a copy. timeout: seconds to wait; None: as long as it takes. Raises StoreLocked."""
    with _refusal(path):
        os.makedirs(os.path.join(path, SYNC), exist_ok=True)
        _make_lock(os.path.join(path, SYNC))
        file = open(os.path.join(path, SYNC, _LOCK), "a+b")  # noqa: SIM115 - closed below
    try:
        _lock(file, path, timeout)
        yield
    finally:
        file.close()


def _lock(file: IO[bytes], path: str, timeout: float | None) -> None:
    if fcntl is None:
        return
    if timeout is None:
        with _refusal(path):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        return
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= end:
                raise StoreLocked(f"{path}: another process is applying a version. Wait for it to end.") from None
            time.sleep(0.02)


def _make_lock(sync: str) -> None:
    """Make the file that is locked, with our name in it from its first instant; other programs empty it."""
    lock, own = os.path.join(sync, _LOCK), os.path.join(sync, f"{_LOCK}.{os.urandom(4).hex()}")
    if os.path.exists(lock):
        return
    with open(own, "xb") as file:
        file.write(_OURS)
    try:
        os.link(own, lock)
    except FileExistsError:
        pass
    except OSError:  # no links here
        os.replace(own, lock)
    _remove(own)


def is_untouched(path: str) -> bool:
    """Whether no other program has begun to change a copy that has no mark. Call it locked."""
    with _refusal(path), open(os.path.join(path, SYNC, _LOCK), "rb") as file:
        return file.read(len(_OURS)) == _OURS


def version_of(path: str) -> int | None:
    """The version that a copy is at; None: it has no mark, or is between two. Raises CorruptFile."""
    file = os.path.join(path, SYNC, _STATE)
    found = _read(file)
    if found is None:
        return None
    version = found.get("version")
    if isinstance(version, str) and version.isdecimal():
        return int(version)
    if type(version) is int and version >= 0:
        return version
    raise CorruptFile(f"{file}: expected a version, got {version!r:.80}. Remove it, and copy the base model anew.")


@dataclass(frozen=True)
class _Journal:
    """What is left to do. before, version: of the copy. moved: file to its digest, out of next. removed: files."""

    before: int | None
    version: int
    moved: Mapping[str, str]
    removed: Sequence[str]


def recover(path: str) -> None:
    """Finish, or undo, what a process that died had begun. Call it locked. Raises CorruptFile, StorageError."""
    sync = os.path.join(path, SYNC)
    found = _read(os.path.join(sync, _JOURNAL))
    if found is not None:
        journal = _Journal(found.get("before"), found["version"], found["moved"], found["removed"])
        state = version_of(path)
        if state is None:
            _require_moved(path, journal)
            _finish(path, journal)
        # Else nothing was moved yet, or all was; or another program began anew.
    with _refusal(path):
        _remove(os.path.join(sync, _JOURNAL))
        shutil.rmtree(os.path.join(sync, _NEXT), ignore_errors=True)


def _require_moved(path: str, journal: _Journal) -> None:
    """Raise CorruptFile unless each file of a journal is where it was or where it goes."""
    for name, digest in journal.moved.items():
        if not os.path.exists(os.path.join(path, SYNC, _NEXT, name)) and _digest(os.path.join(path, name)) != digest:
            raise CorruptFile(
                f"{path}: applying version {journal.version} was interrupted, and another program has changed {name} "
                f"since. Remove {SYNC} there, and copy the base model anew or apply a full version."
            )


def replace(
    path: str,
    before: int | None,
    version: int,
    files: Iterable[tuple[str, Iterable[Bytes]]],
    removed: Sequence[str] = (),
) -> int:
    """Bring a copy from one version to another. files: name and pieces of each file that is new. removed: files.

    Until the last of them is on the disk, nothing changes. Whatever pieces raise passes through. Returns the bytes
    written. Raises StorageError.
    """
    sync = os.path.join(path, SYNC)
    following = Folder(os.path.join(sync, _NEXT))
    digests: dict[str, str] = {}
    n_bytes = 0

    def counted(name: str, pieces: Iterable[Bytes]) -> Iterator[Bytes]:
        nonlocal n_bytes
        digest = xxhash.xxh3_128()
        for piece in pieces:
            digest.update(piece)
            n_bytes += len(piece)
            yield piece
        digests[name] = digest.hexdigest()

    try:
        for name, pieces in files:
            following.put(name, counted(name, pieces))
    except BaseException:
        shutil.rmtree(following.url, ignore_errors=True)
        raise
    journal = _Journal(before, version, digests, [name for name in removed if name not in digests])
    text = json.dumps({"before": before, "version": version, "moved": digests, "removed": list(journal.removed)})
    Folder(sync).put(_JOURNAL, [text.encode()])
    with _refusal(path):
        _remove(os.path.join(sync, _STATE))
    _finish(path, journal)
    with _refusal(path):
        _remove(os.path.join(sync, _JOURNAL))
        shutil.rmtree(following.url, ignore_errors=True)
    return n_bytes


def mark(path: str, version: int) -> None:
    """Say that a copy is at a version."""
    Folder(os.path.join(path, SYNC)).put(_STATE, [json.dumps({"version": f"{version:06d}"}).encode()])


def _finish(path: str, journal: _Journal) -> None:
    """Move and remove what is left of a journal, and mark the copy."""
    with _refusal(path):
        for name in journal.moved:
            with suppress(FileNotFoundError):
                os.replace(os.path.join(path, SYNC, _NEXT, name), os.path.join(path, name))
        for name in journal.removed:
            _remove(os.path.join(path, name))
        _sync(path)
    mark(path, journal.version)


def _read(file: str) -> dict[str, Any] | None:
    try:
        with open(file, "rb") as opened:
            found = json.loads(opened.read())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}.") from error
    if not isinstance(found, dict):
        raise CorruptFile(f"{file}: expected a map as JSON. Remove it, and copy the base model anew.")
    return found


def _digest(file: str) -> str | None:
    digest = xxhash.xxh3_128()
    try:
        with open(file, "rb") as opened:
            while piece := opened.read(4 << 20):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


def _remove(file: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(file)


def _sync(folder: str) -> None:
    """Make names in a folder durable, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def _refusal(path: str) -> Iterator[None]:
    try:
        yield
    except (StorageError, InvalidArgument, MissingFile):
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}. Apply again when it can.") from error
