"""How long work tells how far it is: two kinds of callback, and one made of the other. Imports nothing."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # bytes done, of so many
OnBytes = Callable[[int], None]  # bytes done since the last call


def counter(on_progress: OnProgress | None, total: int) -> OnBytes | None:
    """on_progress, for work of total bytes that tells how many were done since the last call."""
    if on_progress is None:
        return None
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        on_progress(done, total)

    return count
