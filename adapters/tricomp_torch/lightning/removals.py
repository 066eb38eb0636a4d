"""Which removals wait for a save: pure bookkeeping, for saves that run in a thread of their own. Imports no tricomp.

The hard thing: AsyncCheckpointIO queues a save and removes, at once, the checkpoint that it is to take the place of. At
that moment the one may be all that is on the disk, and of the queue nothing can be seen but the save under way.
"""

from __future__ import annotations

import os
import threading


class Removals:
    """Told of each save by `begin`, `saved` and `end`, asked by `waits` before each removal. Paths are absolute."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # a signal handler that saves may come at any instant
        self._saver: int | None = None  # the thread that saves
        self._active: str | None = None
        self._is_saved = False
        self._newest: dict[str, str] = {}  # by folder, what was saved there last
        self._waiting: set[str] = set()
        self._early: set[str] = set()  # removed before they were there: their own saves were queued still

    def begin(self, path: str) -> bool:
        """A save begins. Returns False if the thread is in the middle of another, which a signal has interrupted."""
        with self._guard:
            if self._active is not None:
                return False
            self._saver, self._active, self._is_saved = threading.get_ident(), path, False
            self._waiting.discard(path)
            return True

    def saved(self) -> set[str]:
        """The save that was begun is on the disk. Returns what is to be removed now."""
        with self._guard:
            path = self._active
            assert path is not None
            self._newest[os.path.dirname(path)], self._is_saved = path, True
            if path in self._early:
                self._early.discard(path)
                self._waiting.add(path)
            return self._due()

    def end(self) -> set[str]:
        """The save is over, and what follows it too. Returns what is to be removed now; nothing, if it failed."""
        with self._guard:
            self._active = None
            return self._due() if self._is_saved else set()

    def waits(self, path: str, is_there: bool) -> bool:
        """Whether a removal has to wait: then a save returns the path. is_there: whether there is such a file.

        Saves of the calling thread are on the disk by now: then nothing waits. A file that is not there is taken for
        one that is queued, and goes when a later one of its folder has come.
        """
        with self._guard:
            if self._saver in (None, threading.get_ident()):
                return False
            if not is_there:
                self._early.add(path)
            elif self._active is not None or self._newest.get(os.path.dirname(path)) == path:
                self._waiting.add(path)
            else:
                return False
            return True

    def _due(self) -> set[str]:
        due = {path for path in self._waiting if self._newest.get(os.path.dirname(path)) != path}
        self._waiting -= due
        return due
