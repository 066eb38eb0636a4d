"""What subcommands share: exit codes, the options all of them take, and how they speak. Imports errors only.

Results go to stdout, everything else to stderr. The hard thing: names in files are foreign text, so nothing is printed
that could move a terminal's cursor or break a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from typing import Any

DONE, FAILED, WRONG_USE = 0, 1, 2


def common() -> argparse.ArgumentParser:
    """-q, -v and --json, to be given as one of the parents of a subcommand's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    loudness.add_argument("-v", "--verbose", action="count", default=0, help="print more; tracebacks of errors too")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output, one object a line")
    return parser


def is_quiet(options: argparse.Namespace) -> bool:
    """Whether -q was given."""
    return bool(getattr(options, "quiet", False))


def verbosity(options: argparse.Namespace) -> int:
    """How often -v was given."""
    return int(getattr(options, "verbose", 0))


def show(text: str) -> None:
    """Print a result to stdout, its lines as they are but for control characters and what its encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # stderr escapes what it cannot encode, stdout does not
    print("\n".join(map(printable, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding))


def emit(result: dict[str, Any]) -> None:
    """Print one JSON object to stdout, on one line. NaN and infinities must not be in it."""
    print(json.dumps(result, allow_nan=False), flush=True)


def note(options: argparse.Namespace, text: str, least: int = 0) -> None:
    """Print a line about what was done to stderr, unless -q or --json; with least, only after that many -v."""
    if not is_quiet(options) and not getattr(options, "json", False) and verbosity(options) >= least:
        print(printable(text), file=sys.stderr)


def complain(options: argparse.Namespace, error: BaseException | str) -> None:
    """Print an error to stderr in one line; with -v the traceback too."""
    if isinstance(error, BaseException) and verbosity(options):
        traceback.print_exception(error)
    print(printable(f"tricomp {options.command}: {_text(error)}"), file=sys.stderr)


def printable(text: str) -> str:
    """One line of text with control characters, line ends and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count_bytes(n: int) -> str:
    """A number of bytes for people: 512 B, 1.50 KiB, 3.20 GiB."""
    if n < 1024:
        return f"{n} B"
    size, units = float(n), ["KiB", "MiB", "GiB", "TiB"]
    size /= 1024
    while size >= 1023.995 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.2f} {units[0]}"


def count_files(n: int) -> str:
    """A number of files for people: 1 file, 2,000 files."""
    return f"{n:,} file" if n == 1 else f"{n:,} files"


def takes_files(action: argparse.Action) -> argparse.Action:
    """Mark an argument of a parser as the name of a file or folder, for shell completion."""
    action.is_file = True  # type: ignore[attr-defined]
    return action


def takes_threads(parser: argparse.ArgumentParser) -> None:
    """Add the option that says on how many threads to work; None: one for each core."""
    parser.add_argument("-T", "--threads", type=_threads, metavar="N", help="threads; 0: one a core (default)")


def _threads(text: str) -> int | None:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text!r}")
    return int(text) or None


def _text(error: BaseException | str) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory for this."
    return str(error) or type(error).__name__ if isinstance(error, BaseException) else error
