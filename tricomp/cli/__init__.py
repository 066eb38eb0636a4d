"""The `tricomp` command: the parser of all subcommands, and what becomes of their errors and of signals.

Each module of this package holds subcommands: its add(commands, common) adds their parsers, whose default `run` takes
the parsed arguments and returns the exit code. Modules import what they need when they run, so that the command starts
quickly. The hard thing: however a subcommand ends, the shell gets one line and a number, and no half-written file.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from tricomp.cli import console
from tricomp.container import VERSION
from tricomp.errors import TricompError

_LETTERS = {"-z": "compress", "-d": "decompress", "-t": "verify", "-l": "inspect"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line argv (None: of this process).

    Returns 0, 1 after an error, which goes to stderr in one line, or 128 + the number of the signal that stopped it.
    Exits with 2 on wrong use.
    """
    options = argparse.Namespace(command="")
    _fill_streams()
    try:
        with _stoppable():
            options = parser().parse_args(_spelled_out(sys.argv[1:] if argv is None else argv))
            with _logging(options):
                code: int = options.run(options)
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at exit
        return console.FAILED
    except (TricompError, OSError, MemoryError) as error:
        console.complain(options, error)
        return console.FAILED
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        print(f"tricomp: {'interrupted' if number == signal.SIGINT else 'terminated'}", file=sys.stderr)
        return 128 + number
    return code


def _spelled_out(argv: Sequence[str]) -> list[str]:
    """The arguments with zstd's letter for a command, if they begin with one, as its name."""
    return [_LETTERS.get(word, word) if i == 0 else word for i, word in enumerate(argv)]


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    from tricomp.cli import completion, compress, demo, inspection, quantize, stores

    letters = ", ".join(f"{letter} {name}" for letter, name in _LETTERS.items())
    made = argparse.ArgumentParser(
        prog="tricomp",
        description="Lossless compression of training checkpoints.",
        epilog=f"In the place of COMMAND, zstd's letters are understood: {letters}.",
    )
    made.add_argument("--version", action=_Version, help="show the version and the backends that are live")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (compress, inspection, stores, quantize, completion, demo):
        module.add(commands, [console.common()])
    return made


class _Closed(io.TextIOBase):
    """Stands for a standard output that is closed: fine as long as nothing goes there."""

    @property
    def buffer(self) -> _Closed:
        return self

    def write(self, _: object) -> NoReturn:
        raise OSError("standard output is closed")


def _fill_streams() -> None:
    """Put something in the place of standard streams that are closed.

    Else print would take standard output for errors, between the bytes of a file, and the next file that is opened
    would get the number to which libraries write their warnings.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        sys.stdout = _Closed()


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Version(argparse.Action):
    """Prints the version and ends; looks for backends only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from tricomp import backends

        print(f"tricomp {VERSION}")
        print("backends: " + "; ".join(f"{name}: {state}" for name, state in backends.live().items()))
        parser.exit()


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the signals that end a process raise Stopped, so that whatever is being written is cleaned up."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise Stopped(number)

    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: signals go elsewhere
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logging(options: argparse.Namespace) -> Iterator[None]:
    """Show the library's log on stderr: warnings, with -v what is done, with -vv more, with -q errors only."""
    log, before = logging.getLogger("tricomp"), logging.getLogger("tricomp").level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("tricomp: %(message)s"))
    if console.is_quiet(options):
        log.setLevel(logging.ERROR)
    else:
        log.setLevel({0: logging.WARNING, 1: logging.INFO}.get(console.verbosity(options), logging.DEBUG))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
