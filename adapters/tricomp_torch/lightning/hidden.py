"""What checkpoints need of one another, kept in a hidden Store beside them. Imports no torch.

Each checkpoint that may serve others is a hard link to a step of a Store in the folder's `.tricomp`. A base therefore
stays while anything there needs it, whatever becomes of its name; and no byte is stored twice.

The hard thing: names come and go by anybody's hand. So what is still needed is never counted in a table: it is told
each time from the files that are there, links or copies, and whatever cannot be told is kept.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import tricomp
from tricomp.errors import StorageError, TricompError
from tricomp.folder import Folder
from tricomp.steps import file_name
from tricomp_torch.lightning.chains import HIDDEN, names_in, stat_of, summary_of

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL)
_log = logging.getLogger("tricomp")


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
        except TricompError as error:
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
        try:
            return self._needed(steps)
        except OSError as error:
            _log.info("%s: nothing is pruned: %s", self._folder, error)
            return steps

    def _needed(self, steps: Sequence[int]) -> set[int]:
        own = {step: os.path.join(self._folder, HIDDEN, file_name(step)) for step in steps}
        about = {step: stat for step, path in own.items() if (stat := stat_of(path)) is not None}
        inodes = {stat.st_ino for stat in about.values()}
        wanted = {step for step, stat in about.items() if stat.st_nlink > 1}
        others = [path for path in names_in(self._folder) if (stat := stat_of(path)) and stat.st_ino not in inodes]
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


def _links_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_symlink() and os.path.exists(entry.path)]
