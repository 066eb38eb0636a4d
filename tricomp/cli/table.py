"""Text in columns for a terminal or a page of 120 letters. Imports nothing.

The hard thing: names come from files and may be long, so one column gives way, its texts shortened in the middle, where
paths differ least.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence
from typing import Any

PAGE = 120  # letters across, where stdout is no terminal
_GAP = "  "
_LEAST = 16  # letters that a shortened column keeps


def page_width() -> int:
    """Letters across: of the terminal, if stdout is one."""
    return shutil.get_terminal_size((PAGE, 40)).columns if sys.stdout.isatty() else PAGE


def shortened(text: str, width: int) -> str:
    """The text in at most width letters, its middle left out if need be."""
    if len(text) <= width:
        return text
    if width < 4:
        return text[:width]
    n_tail = (width - 2) * 2 // 3  # the end of a path tells more than its beginning
    return f"{text[: width - 2 - n_tail]}..{text[len(text) - n_tail :]}"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    flexible: int = 0,
    width: int | None = None,
) -> list[str]:
    """Lines of columns, those numbered in left aligned to the left, the others to the right.

    Columns that are empty throughout are left out; the flexible one is shortened to fit width (None: page_width()).
    """
    kept = [i for i in range(len(heads)) if i == flexible or any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in (heads, *rows)) for i in kept}
    rest = sum(widths.values()) - widths[flexible] + len(_GAP) * (len(kept) - 1)
    widths[flexible] = min(widths[flexible], max((page_width() if width is None else width) - rest, _LEAST))
    lines = []
    for row in (heads, *rows):
        texts = {i: shortened(row[i], widths[i]) for i in kept}
        aligned = [text.ljust(widths[i]) if i in left else text.rjust(widths[i]) for i, text in texts.items()]
        lines.append(_GAP.join(aligned).rstrip())
    return lines


def entry(key: str, value: Any) -> str:
    """A key of metadata with its value, if that is short."""
    if isinstance(value, (dict, list)):
        return f"{key} ({len(value):,} {'entry' if len(value) == 1 else 'entries'})"
    return f"{key}={shortened(str(value), 60)}"
