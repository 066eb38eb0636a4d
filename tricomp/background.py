"""Saves that run behind training: one after the other, each in a thread of its own. Imports nothing of tricomp.

The hard thing is what nobody waits for. What fails is logged at once and raised by the next call, so that no run goes
on for days without checkpoints; and the interpreter does not end before the last save has: its threads are no daemons.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")
_log = logging.getLogger("tricomp")
_HEAD_START = 1e-3  # seconds


def let_go_on() -> None:
    """To be called first in a thread behind training: lets whoever began it go on, who would wait for the GIL else."""
    time.sleep(_HEAD_START)


class Saving(Future[Result], Generic[Result]):
    """The Future of one save. is_told: whether its error, if it has one, has reached somebody."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.is_told = False

    def result(self, timeout: float | None = None) -> Result:
        """What the save gave. Raises what it raised, TimeoutError."""
        try:
            return super().result(timeout)
        finally:
            self.is_told = self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the save raised, or None. Raises TimeoutError."""
        try:
            return super().exception(timeout)
        finally:
            self.is_told = self.done()


class Background(Generic[Result]):
    """Runs saves one after the other, and lets no more than in_flight of them be begun and not done.

    All methods are to be called from one thread.
    """

    def __init__(self, in_flight: int = 1) -> None:
        self._in_flight = in_flight
        self._savings: list[tuple[Saving[Result], threading.Thread]] = []

    def ready(self) -> None:
        """Wait until another save may begin. Raises what an earlier one raised, if nobody was told yet."""
        while sum(not saving.done() for saving, _ in self._savings) >= self._in_flight:
            next(thread for saving, thread in self._savings if not saving.done()).join()
        self._tell()

    def submit(self, what: str, save: Callable[[], Result]) -> Saving[Result]:
        """Let save run when those before it are done; call `ready` first. what: its name in messages."""
        saving: Saving[Result] = Saving(what)
        before = self._savings[-1][1] if self._savings else None
        thread = threading.Thread(target=_run, args=(saving, save, before), name=f"tricomp-save {what}")
        self._savings.append((saving, thread))
        saving.set_running_or_notify_cancel()
        thread.start()
        return saving

    def wait(self) -> None:
        """Wait until all saves are done. Raises what the first of them raised that nobody was told of."""
        for _, thread in self._savings:
            thread.join()
        self._tell()

    @property
    def is_idle(self) -> bool:
        """Whether no save is being made."""
        return all(saving.done() for saving, _ in self._savings)

    def _tell(self) -> None:
        """Forget the saves that are done, and raise the first error among them of which nobody was told."""
        done = [saving for saving, _ in self._savings if saving.done()]
        self._savings = [pair for pair in self._savings if not pair[0].done()]
        for saving in done:
            if not saving.is_told and (error := saving.exception()) is not None:
                error.add_note(f"This is what became of {saving.what}, which was saved in the background.")
                raise error


def _run(saving: Saving[Result], save: Callable[[], Result], before: threading.Thread | None) -> None:
    if before is not None:
        before.join()
    let_go_on()
    try:
        result = save()
    except BaseException as error:
        _log.error("%s could not be saved: %s: %s", saving.what, type(error).__name__, error)
        saving.set_exception(error)
    else:
        saving.set_result(result)
