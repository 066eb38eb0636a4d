"""Calls at the end of the interpreter, while threads and pools still work. Imports nothing of tricomp.

The hard thing: atexit's calls come when all pools of threads have ended, which a file system may need to write; those
of threading come before, in reverse order, so that these come before the pools' own, which were registered by then.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - so that the end of the pools is registered first
import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakMethod


def before_exit(method: Callable[[], None]) -> None:
    """Call a method, of an object that is still there then, when the interpreter ends."""
    held: WeakMethod[Callable[[], None]] = WeakMethod(method)

    def call() -> None:
        found = held()
        if found is not None:
            found()

    with suppress(RuntimeError):  # the interpreter is ending already
        getattr(threading, "_register_atexit", atexit.register)(call)
