"""A bar with rate and time left, for people: on a terminal alone, and never with -q or --json.

The hard thing is to show nothing anywhere else: what is piped or logged holds results and errors only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tricomp.cli import console
from tricomp.cli.table import shortened

_COLUMNS = 80  # of a terminal that does not tell
_NUMBERS = 50  # columns for the share, the bytes, the time left and the rate; tqdm cuts them off behind a long name


@contextmanager
def shown(options: argparse.Namespace, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A function that takes (bytes done, of so many) and draws; None where nothing is to be drawn. what: its name."""
    if console.is_quiet(options) or getattr(options, "json", False) or not _is_terminal():
        yield None
        return
    from tqdm import tqdm

    looks: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    looks |= {} if _size() else {"ncols": _COLUMNS, "nrows": 24}  # else tqdm would draw nothing
    name = shortened(console.printable(what), max((_size() or _COLUMNS) - _NUMBERS, 8))
    with tqdm(desc=name, file=sys.stderr, **looks) as bar:

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _size() -> int:
    """The columns of the terminal; 0: it does not know its size, as one that a program made may not."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return 0
    return size.columns if size.lines > 0 else 0
