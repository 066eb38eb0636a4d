"""How the demo kills itself in the middle of a save: for real, with SIGKILL, from outside the code under test.

A thread watches the store's folder and kills the process once a file that was not there before has grown to a given
size. The hard thing: a small file may be written faster than a thread can look, so an audit hook kills at the latest
in the moment before the file would be renamed to its final name.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn


def kill_in_next_save(folder: str, n_bytes: int) -> None:
    """Kill this process with SIGKILL when a new file in folder (or below) has n_bytes, or is about to be renamed."""
    before = set(_sizes(folder))

    def watch() -> NoReturn:
        while True:
            if any(size >= n_bytes for path, size in _sizes(folder).items() if path not in before):
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.link") and str(args[1]).startswith(folder):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    threading.Thread(target=watch, daemon=True).start()


def unfinished_bytes(folder: str) -> int:
    """Bytes of the largest checkpoint in folder under a temporary name: what a killed save leaves behind."""
    return max((size for path, size in _sizes(folder).items() if ".tri." in os.path.basename(path)), default=0)


def _sizes(folder: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            try:
                sizes[path] = os.stat(path).st_size
            except FileNotFoundError:
                continue
    return sizes
