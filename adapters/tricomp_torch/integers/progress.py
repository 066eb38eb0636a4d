"""How far planning is: told to a callback, and to the log at INFO every few seconds. Imports no torch."""

from __future__ import annotations

import logging
import time

from tricomp.progress import OnProgress

_log = logging.getLogger("tricomp")
_SECONDS = 10.0  # between two lines


class Progress:
    """Counts runs of the model on a batch. Their number is not known before: it grows as work is found."""

    def __init__(self, on_progress: OnProgress | None = None) -> None:
        self._on_progress = on_progress
        self._done = self._total = 0
        self._began = self._told = time.monotonic()

    def expect(self, n_runs: int) -> None:
        """So many more are to be done."""
        self._total += n_runs

    def step(self, n_runs: int = 1) -> None:
        """So many were done."""
        self._done += n_runs
        self._total = max(self._total, self._done)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        now = time.monotonic()
        if now - self._told >= _SECONDS:
            self._told = now
            _log.info("plan: %d of %d runs of the model, %.0f s", self._done, self._total, now - self._began)

    def tell(self, what: str, *values: object) -> None:
        """A line of the log, with the seconds so far."""
        _log.info(f"plan: {what}, %.1f s", *values, time.monotonic() - self._began)
