"""Which files the arguments of a command mean: files, folders, patterns and standard input. Knows no format.

The hard thing: a folder holds files of other kinds and shards that belong to one model. So what was found in a folder
is marked as found: it is left alone, not refused, when it is no tensor file; and an index stands for its shards.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic

from tricomp import archive_names
from tricomp.errors import InvalidArgument, StorageError

STANDARD = "-"


@dataclass(frozen=True)
class Input:
    """A file to work on. below: its folder, seen from the folder it was found in. is_found: in a folder, not named."""

    path: str
    below: str = ""
    is_found: bool = False


@dataclass(frozen=True)
class Found:
    """Inputs in order, how many files of folders were left alone, and folders that could not be read, with reasons."""

    inputs: tuple[Input, ...]
    n_left: int
    unreadable: tuple[str, ...]


def find(given: Sequence[str], is_compressed: bool) -> Found:
    """What the arguments of a command mean, each file once. is_compressed: of folders take the `.tri` files, or else
    the others. A name that is there is never taken for a pattern."""
    inputs: list[Input] = []
    unreadable: list[str] = []
    n_left = 0
    for name in given:
        if os.path.isdir(name):
            for below, file in _files(name, unreadable):
                if file.endswith(archive_names.SUFFIX) == is_compressed:
                    inputs.append(Input(file, below, is_found=True))
                else:
                    n_left += 1
        elif has_magic(name) and not os.path.lexists(name):
            matching = sorted(file for file in glob(name, recursive=True) if not os.path.isdir(file))
            inputs += map(Input, matching or [name])
        else:
            inputs.append(Input(name))
    seen = set() if is_compressed else _shards(inputs)
    unique: list[Input] = []
    for one in inputs:
        key = one.path if one.path == STANDARD else os.path.realpath(one.path)
        if key not in seen:
            seen.add(key)
            unique.append(one)
    return Found(tuple(unique), n_left, tuple(unreadable))


def is_many(given: Sequence[str]) -> bool:
    """Whether arguments may mean several files, so that an output must be a folder."""
    return len(given) > 1 or any(os.path.isdir(name) for name in given)


@contextmanager
def spooled(path: str) -> Iterator[str]:
    """The path of a file to read for an input: standard input is copied to a temporary file first.

    Raises StorageError when there is no room for it, InvalidArgument when it is a terminal.
    """
    if path != STANDARD:
        yield path
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidArgument("standard input is a terminal. Pipe a file into the command, or name one.")
    with tempfile.NamedTemporaryFile(prefix="tricomp-") as spool:
        try:
            while piece := os.read(sys.stdin.fileno(), 1 << 20):  # buffered reads look for signals too rarely
                spool.write(piece)
            spool.flush()
        except OSError as error:
            raise StorageError(
                f"standard input: cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}. "
                f"Name a folder with more room in TMPDIR."
            ) from error
        yield spool.name


def _files(folder: str, unreadable: list[str]) -> Iterator[tuple[str, str]]:
    """Every file of a folder and of those below, but hidden ones and links to folders: its folder seen from the
    first, and its path. An index of shards comes before them."""

    def refused(error: OSError) -> None:
        unreadable.append(f"{error.filename}: cannot be read: {error.strerror}.")

    for where, folders, names in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(where, folder)
        for name in sorted(names):
            path = os.path.join(where, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield "" if below == os.curdir else below, path


def _shards(inputs: Sequence[Input]) -> set[str]:
    """Real paths of the files that belong to an index among the inputs."""
    indexes = [one.path for one in inputs if one.path.endswith(archive_names.INDEX_SUFFIX)]
    return {os.path.realpath(shard) for index in indexes for shard in archive_names.shards(index)}
