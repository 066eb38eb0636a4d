"""What subcommands read: `.tri` files with what they were coded against, steps of stores, files of other formats.

The hard thing: a delta needs its parent, which may be the other file of the same command, one given with --base, or a
delta itself. So all are opened first, and told apart by content id, whatever their names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tricomp import archive_names, checkpoint, formats
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument, MissingStep, WrongReference
from tricomp.file import File
from tricomp.formats import TensorFile
from tricomp.store import Store

Opened = File | TensorFile


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the option --base, which may be given again for the base of the base."""
    parser.add_argument(
        "--base",
        "--patch-from",
        dest="bases",
        action="append",
        default=[],
        metavar="FILE",
        help="what a delta was made against: a .tri file, a file of another format, or STORE@STEP; may be repeated",
    )


def step_of(name: str) -> tuple[str, int | None] | None:
    """Folder and step (None: the latest) of runs/a@1200 or runs/a@latest; None if name is no such, or is a file."""
    where, at, step = name.rpartition("@")
    if not at or not where or not (step.isdecimal() or step == "latest") or os.path.exists(name):
        return None
    return where, None if step == "latest" else int(step)


def is_store(path: str) -> bool:
    """Whether a path is a folder with steps in it, or a URL that is no file's."""
    if "://" in path:
        return not path.endswith(archive_names.SUFFIX)
    return os.path.isdir(path) and bool(Store(path).steps())


def is_compressed(path: str) -> bool:
    """Whether a path is to be read as a `.tri` file: it begins like one, or is called so."""
    return archive_names.is_compressed(path) or path.endswith(archive_names.SUFFIX)


@contextmanager
def opened(names: Sequence[str], bases: Sequence[str] = (), threads: int | None = None) -> Iterator[list[Opened]]:
    """Each of names, opened: a File, with its parents behind it if they are among names and bases, or a TensorFile.

    threads: to decode with.
    Raises what opening raises; WrongReference if bases are given, and what a file was made against is not among them.
    """
    with ExitStack() as stack:
        found = _Sources(stack, names, bases, threads)
        yield [found.resolved(i) for i in range(len(names))]


class _Sources:
    """All files of a command. Opened without references first, again when their parents are known."""

    def __init__(self, stack: ExitStack, names: Sequence[str], bases: Sequence[str], threads: int | None) -> None:
        self._stack, self._has_bases, self._threads = stack, bool(bases), threads
        self._opened: list[Opened] = []
        for name in [*names, *bases]:
            self._opened.append(_open(name, threads))
            stack.callback(self._opened[-1].close)
        self._is_done = [step_of(name) is not None for name in [*names, *bases]]  # a Store opens the whole chain
        self._contents: dict[int, Content] = {}

    def resolved(self, i: int, behind: tuple[int, ...] = ()) -> Opened:
        """File number i with its parents behind it. behind: the numbers of the files that wait for it."""
        opened = self._opened[i]
        if self._is_done[i] or isinstance(opened, TensorFile) or opened.parent is None:
            return opened
        base = self._with_id(opened.parent, (*behind, i))
        if base is not None:
            file = checkpoint.open_file(opened.name, base, threads=self._threads)
            self._opened[i] = self._stack.enter_context(file)
            self._is_done[i] = True
        elif self._has_bases:
            others = [k for k in range(len(self._opened)) if k not in (*behind, i)]
            given = ", ".join(f"{self._opened[k].name} ({self._id(k)})" for k in others)
            raise WrongReference(
                f"{opened.name}: was made against content id {opened.parent}, but given are {given}. "
                f"Give what it was made against with --base."
            )
        return self._opened[i]

    def _with_id(self, content_id: str, behind: tuple[int, ...]) -> File | Content | None:
        """What has a content id: of `.tri` files, whose ids are known, else of other files, which are read for it."""
        others = [k for k in range(len(self._opened)) if k not in behind]
        for k in sorted(others, key=lambda k: isinstance(self._opened[k], TensorFile)):
            if self._id(k) == content_id:
                reference = self.resolved(k, behind)
                return reference if isinstance(reference, File) else self._contents[k]
        return None

    def _id(self, k: int) -> str:
        opened = self._opened[k]
        if isinstance(opened, File):
            return opened.content_id
        if k not in self._contents:
            self._contents[k] = content_of(opened.tree)
        return self._contents[k].content_id


def _open(name: str, threads: int | None) -> Opened:
    """One file, without its parents unless it is a step of a store."""
    step = step_of(name)
    if step is not None:
        if not is_store(step[0]):
            raise MissingStep(f"{name}: there are no checkpoints in {step[0]}. Check the path.")
        return Store(step[0], threads=threads).open(step[1])
    if os.path.isdir(name) and is_store(name):
        raise InvalidArgument(f"{name}: is a store of several steps. Name one, as in {name}@{Store(name).latest()}")
    if is_compressed(name):
        return checkpoint.open_file(name, threads=threads)
    return formats.read(archive_names.model_file(name))
