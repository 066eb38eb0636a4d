"""Checkpoints of one folder that are coded against one another, and the hidden Store that keeps what they need.

Each such checkpoint is a hard link to a step of a Store in the folder's `.tricomp`. A base therefore stays while
anything there needs it, whatever becomes of its name; and no byte is stored twice. Imports no torch.

The hard thing: names come and go by anybody's hand. So what is still needed is never counted in a table: it is told
each time from the files that are there, links or copies, and whatever cannot be told is kept.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import tricomp
from tricomp import container, storage
from tricomp.bucket import Bucket
from tricomp.chain import Link, chains
from tricomp.container import Summary
from tricomp.errors import InvalidArgument, MissingFile, MissingParent, StorageError, StoreLocked, TricompError
from tricomp.folder import Folder, LocalFile
from tricomp.steps import file_name
from tricomp.tail import START

HIDDEN = ".tricomp"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL)
_N_TRIED = 8  # other checkpoints, newest first, of which one that can be loaded is named
_log = logging.getLogger("tricomp")


def is_local(path: str | os.PathLike[str]) -> bool:
    return not storage.is_url(path)


def place_of(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[Folder | Bucket, str]:
    """The storage and the name in it of a checkpoint. A name that is a link is itself meant, not what it points to.

    Raises InvalidArgument, StorageError.
    """
    if not is_local(path):
        return storage.split(path, storage_options)
    folder, name = os.path.split(os.fspath(path))
    if storage_options or not name:
        what = "storage_options are for URLs; this is a local path" if name else "expected the path of a file"
        raise InvalidArgument(f"{os.fspath(path)}: {what}.")
    return storage.at(os.path.abspath(os.path.expanduser(folder.removeprefix("file://")))), name


@dataclass(frozen=True)
class Access:
    """How files are read: options for fsspec, threads and backend to decode with."""

    storage_options: Mapping[str, Any] | None = None
    threads: int | None = None
    backend: str | None = None

    def options_for(self, path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
        """The options, where they mean something."""
        return None if is_local(path) else self.storage_options

    @property
    def coding(self) -> dict[str, Any]:
        """What a File takes to decode with."""
        return {"threads": self.threads, "backend": self.backend}


class Chained:
    """The checkpoints of one local folder, each coded against the one before it."""

    def __init__(self, folder: str, keyframe: tricomp.KeyframeEvery, **options: Any) -> None:
        """options: of the Store. Makes nothing yet. Raises InvalidArgument."""
        self._folder = folder
        self._hidden = Folder(os.path.join(folder, HIDDEN))
        self.store = tricomp.Store(self._hidden.url, keyframe, [_Named(folder)], **options)

    def save(self, name: str, tree: Any, metadata: dict[str, Any]) -> bool:
        """Write a checkpoint of that name. Returns whether it could: not where there are no hard links.

        Raises StoreLocked if another process is writing one; UnsupportedNode, UnsupportedDtype, StorageError.
        """
        try:
            self.store.claim()
            latest = self.store.latest()
            step = 0 if latest is None else latest + 1
            self.store.save(step, tree, metadata)
            try:
                self._hidden.link(file_name(step), os.path.join(self._folder, name))
            except StorageError as error:
                self.store.remove(step)
                if error.errno not in _NO_LINKS:
                    raise
                return False
            return True
        except StorageError as error:
            failure = StorageError(f"{os.path.join(self._folder, name)}: was not saved: {error}")
            failure.errno = error.errno
            raise failure from error
        finally:
            self.store.unlock()

    def continue_from(self, path: str) -> None:
        """Let the next checkpoint be coded against this one, which was loaded, if it is one of these."""
        with suppress(OSError, TricompError):
            loaded = os.stat(path)
            for step in self.store.steps():
                if os.path.samestat(loaded, os.stat(self._path(step))):
                    self.store.continue_from(step)

    def prune(self) -> None:
        """Remove what no checkpoint of the folder needs any more; what cannot be removed now, later."""
        try:
            self.store.prune()
        except (StoreLocked, StorageError) as error:
            _log.info("%s: will be pruned later: %s", self.store.url, error)
        finally:
            self.store.unlock()

    def _path(self, step: int) -> str:
        return os.path.join(self._hidden.url, file_name(step))


class _Named:
    """The policy of such a Store: a step is wanted while a name stands for it, or for a copy of what needs it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def kept(self, steps: Sequence[int]) -> Iterable[int]:
        own = {step: os.path.join(self._folder, HIDDEN, file_name(step)) for step in steps}
        about = {step: stat for step, path in own.items() if (stat := _stat(path)) is not None}
        inodes = {stat.st_ino for stat in about.values()}
        wanted = {step for step, stat in about.items() if stat.st_nlink > 1}
        others = [path for path in files_in(self._folder) if (stat := _stat(path)) and stat.st_ino not in inodes]
        needed = {summary.parent for path in others if (summary := summary_of(path)) is not None} - {None}
        if needed:  # a folder that was copied, or a checkpoint that was copied into it
            found = {step: summary_of(path) for step, path in own.items()}
            wanted |= {step for step, summary in found.items() if summary and summary.content_id in needed}
        return wanted


def remove(path: str) -> None:
    """Remove a checkpoint's name; no error if it is gone. A link to it in its folder becomes the checkpoint itself.

    For the link is "last.ckpt": it must not point to nothing when training ends before it is made anew, since
    `fit(ckpt_path="last")` then begins from nothing. Raises StorageError.
    """
    folder = os.path.dirname(path)
    try:
        if os.path.isdir(path) and not os.path.islink(path):  # as a strategy that shards writes them
            shutil.rmtree(path)
            return
        with suppress(FileNotFoundError):
            for link in _links_in(folder) if os.path.isfile(path) and not os.path.islink(path) else ():
                if os.path.samefile(link, path):
                    os.replace(path, link)
                    return
            os.unlink(path)
    except OSError as error:
        failure = StorageError(f"{path}: cannot be removed: {error.strerror}. Check the permissions of {folder}.")
        failure.errno = error.errno
        raise failure from error


def open_chained(path: str, access: Access) -> tricomp.File:
    """A checkpoint with those open that it needs: closing it closes them.

    Raises MissingFile, MissingParent, CorruptFile, UnsupportedVersion, StorageError.
    """
    if not is_local(path):
        file = tricomp.open(path, None, storage_options=access.options_for(path), **access.coding)
        if file.parent is not None:
            file.close()
            raise MissingParent(f"{path}: is coded against another checkpoint. Load it in the folder it was saved in.")
        return file
    with ExitStack() as opened:
        above: tricomp.File | None = None
        for name in chain_of(path):
            file = opened.enter_context(tricomp.open(name, above, **access.coding))
            if above is not None:
                file.own(above)
            above = file
        opened.pop_all()
    assert above is not None
    return above


def chain_of(path: str) -> list[str]:
    """The local files that a checkpoint needs, itself last. Raises MissingFile, MissingParent, CorruptFile."""
    source = LocalFile(path)
    try:
        top = container.read_summary(source)
    finally:
        source.close()
    if top.parent is None:
        return [path]
    folders = list(dict.fromkeys(os.path.dirname(os.path.abspath(name)) for name in (path, os.path.realpath(path))))
    files = [file for folder in folders for file in (*files_in(os.path.join(folder, HIDDEN)), *files_in(folder))]
    links = []
    for number, file in enumerate(files):
        if (summary := summary_of(file)) is not None:
            links.append(Link(number, summary.content_id, summary.parent))
    for chain in chains(links).values():
        if chain[-1].content_id == top.parent:
            return [*(files[link.step] for link in chain), path]
    raise MissingParent(
        f"{path}: is coded against another checkpoint, of content id {top.parent.hex()}, which is missing or damaged: "
        f"neither {os.path.join(folders[-1], HIDDEN)} nor the folder above has it. Put back the {HIDDEN} of the folder "
        "where it was saved."
    )


def alternatives(path: str) -> str:
    """Which other checkpoint of the folder to load, as a sentence."""
    if not is_local(path):
        return "Load another checkpoint."
    folder = os.path.dirname(os.path.abspath(path))
    others = [file for file in files_in(folder) if not (os.path.exists(path) and os.path.samefile(file, path))]
    others.sort(key=lambda file: stat.st_mtime_ns if (stat := _stat(file)) else 0, reverse=True)
    for other in others[:_N_TRIED]:
        with suppress(TricompError, OSError):
            for name in chain_of(other):
                with tricomp.open(name) as file:
                    file.check()
            return f"Load {other}, the newest other one there that is intact."
    return f"No other checkpoint in {folder} can be loaded."


def files_in(folder: str) -> Iterator[str]:
    """Paths of the `.tri` files in a folder, by whatever name; hidden ones are passed over. Raises StorageError."""
    for name in sorted(Folder(folder).list()):
        path = os.path.join(folder, name)
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if file.read(9)[1:] == START:
                yield path


def summary_of(path: str) -> Summary | None:
    """What a file tells of itself; None if it is gone or damaged. Raises StorageError."""
    try:
        source = LocalFile(path)
        try:
            return container.read_summary(source)
        finally:
            source.close()
    except MissingFile:
        return None
    except StorageError:
        raise
    except TricompError:
        return None


def _stat(path: str) -> os.stat_result | None:
    """What is known of a file; None if somebody removed it a moment ago."""
    with suppress(FileNotFoundError):
        return os.stat(path)
    return None


def _links_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_symlink() and os.path.exists(entry.path)]
