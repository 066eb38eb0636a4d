"""One of the subcommands compress and decompress over its inputs, in zstd's manner: outputs, summary lines, exit code.

The hard thing: one file's failure is told and counted, and never stops the others or touches an input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from tricomp.archive_base import Base
from tricomp.cli import console, inputs, progress
from tricomp.errors import StorageError, TricompError
from tricomp.progress import OnProgress

Out = str | BinaryIO | None


class LeftAlone(Exception):
    """A file that was found in a folder is nothing to work on."""


@dataclass(frozen=True)
class Done:
    """One input done. outputs: paths written. sources: read, to be removed with --rm. text: the summary line.

    facts: for --json. details: lines for -v.
    """

    input_bytes: int
    output_bytes: int
    outputs: tuple[str, ...]
    sources: tuple[str, ...]
    text: str
    facts: dict[str, Any]
    details: tuple[str, ...] = ()


One = Callable[[inputs.Input, str, Out, OnProgress | None], Done]


class Batch:
    """The inputs of a command and what they share. base: opened. outputs: real paths written. stream: of all output."""

    def __init__(self, options: argparse.Namespace, is_compressed: bool) -> None:
        """is_compressed: of folders take the `.tri` files, else the others. Exits with 2 on wrong use."""
        self.base: Base | None = None
        self.outputs: set[str] = set()
        self.stream: BinaryIO | None = None
        self._options, self._is_compressed = options, is_compressed
        if not options.inputs:
            if sys.stdin is None or sys.stdin.isatty():
                options.refuse("name an input: a file, a folder, a pattern, or - for standard input")
            options.inputs = [inputs.STANDARD]
        self._found = inputs.find(options.inputs, is_compressed)
        self._is_many = len(self._found.inputs) > 1 or inputs.is_many(options.inputs)
        self._n_failed = 0
        self._check_use()

    def run(self, one: One) -> int:
        """Do one(input, path to read, where to write, how to show progress) for each. Returns the exit code."""
        all_done: list[Done] = []
        n_left = self._found.n_left
        with ExitStack() as stack:
            if self._options.base is not None:
                self.base = stack.enter_context(Base(self._options.base, self._options.threads))
            for reason in self._found.unreadable:
                self._fail(None, reason)
            for given in self._found.inputs:
                try:
                    all_done.append(self._do(given, one))
                except LeftAlone:
                    n_left += 1
                except BrokenPipeError:
                    raise
                except (TricompError, OSError, MemoryError) as error:
                    self._fail(given, error)
        if self._is_many:
            self._total(all_done, n_left)
        return console.FAILED if self._n_failed else console.DONE

    def _do(self, given: inputs.Input, one: One) -> Done:
        options = self._options
        label = os.path.basename(given.path)
        with inputs.spooled(given.path) as path, _named(path, given), progress.shown(options, label) as draw:
            done = one(given, path, self._out(given), draw)
        self.outputs.update(map(os.path.realpath, done.outputs))
        console.note(options, done.text, least=int(self.stream is not None))
        for line in done.details:
            console.note(options, f"  {line}", least=1)
        if options.json:
            sizes = {"input_bytes": done.input_bytes, "output_bytes": done.output_bytes}
            output = done.outputs[0] if len(done.outputs) == 1 else None
            facts = {"command": options.command, "input": given.path, "output": output, **sizes, **done.facts}
            console.emit(facts)
        for source in done.sources if options.rm else ():
            try:
                os.unlink(source)
            except OSError as error:
                raise StorageError(f"{source}: done, but cannot be removed: {error.strerror}.") from error
        return done

    def _out(self, given: inputs.Input) -> Out:
        """Where the output of an input goes; a folder ends with a separator. None: beside the input."""
        out: str | None = self._options.output
        if self.stream is not None:
            return self.stream
        if out is None or not (self._is_many or os.path.isdir(out) or out.endswith(os.sep)):
            return out
        return os.path.join(out, given.below, "")

    def _check_use(self) -> None:
        """Exit with 2 if the options do not go together."""
        options, n_inputs = self._options, len(self._found.inputs)
        for name in (*options.inputs, options.output or "", options.base or ""):
            if "://" in name and not os.path.lexists(name):
                options.refuse(f"{name}: a URL is not taken here; pipe the file in or out (- is the standard stream)")
        out, has_standard = options.output, inputs.STANDARD in options.inputs
        if options.stdout and out not in (None, "-"):
            options.refuse("-c and -o exclude each other")
        if options.stdout or out == "-" or (has_standard and out is None):
            if self._is_many or n_inputs != 1:
                options.refuse("standard output takes one input at a time")
            if options.rm:
                options.refuse("--rm: nobody can tell whether standard output is safe on a disk; remove it yourself")
            if options.json:
                options.refuse("--json goes to standard output; give the output a name with -o")
            if sys.stdout.isatty() and not options.force:
                options.refuse("standard output is a terminal; name an output with -o, or insist with -f")
            self.stream = sys.stdout.buffer
        elif options.rm and has_standard:
            options.refuse("--rm: standard input cannot be removed")
        elif self._is_many and out is not None and not self._is_folder(out):
            options.refuse(f"-o {out}: {n_inputs} inputs need a folder; end its name with /")

    def _is_folder(self, out: str) -> bool:
        """Whether an output is, or is to be made, a folder for several inputs."""
        if os.path.lexists(out):
            return os.path.isdir(out)
        return out.endswith(os.sep) or any(map(os.path.isdir, self._options.inputs))

    def _fail(self, given: inputs.Input | None, error: Exception | str) -> None:
        self._n_failed += 1
        console.complain(self._options, error)
        if self._options.json and given is not None:
            kind = type(error).__name__
            console.emit({"command": self._options.command, "input": given.path, "error": str(error), "kind": kind})

    def _total(self, all_done: list[Done], n_left: int) -> None:
        n_in, n_out = sum(done.input_bytes for done in all_done), sum(done.output_bytes for done in all_done)
        text = console.count_files(len(all_done))
        if all_done:
            text += f": {console.count_bytes(n_in)} => {console.count_bytes(n_out)}"
            text += "" if self._is_compressed else f", {share(n_out, n_in)}"
        text += f"; {self._n_failed} failed" if self._n_failed else ""
        text += f"; {n_left:,} other {'file' if n_left == 1 else 'files'} left alone" if n_left else ""
        console.note(self._options, text)


def share(part: int, whole: int) -> str:
    """A part of something in percent."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


@contextmanager
def _named(path: str, given: inputs.Input) -> Iterator[None]:
    """In errors, call the temporary copy of standard input what it is."""
    try:
        yield
    except TricompError as error:
        if path != given.path:
            error.args = (str(error).replace(path, "standard input"), *error.args[1:])
        raise
