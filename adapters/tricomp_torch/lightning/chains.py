"""Checkpoints of a folder, and how they hang together: opened along their chains. Imports no torch.

A checkpoint that is coded against others names its parent by content. That stands in the hidden folder beside it, or
under a name of its own. The hard thing: an error here comes when a run is to be resumed, so it says what else there is
to resume from, and says it of what was looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import tricomp
from tricomp import container, storage
from tricomp.bucket import Bucket
from tricomp.chain import Link, chains
from tricomp.container import Summary
from tricomp.errors import InvalidArgument, MissingFile, MissingParent, StorageError, TricompError
from tricomp.folder import Folder, LocalFile
from tricomp.tail import START

HIDDEN = ".tricomp"
_N_TRIED = 8  # other checkpoints, newest first, of which one that can be loaded is named


def is_local(path: str | os.PathLike[str]) -> bool:
    return not storage.is_url(path)


def plain_path(path: str | os.PathLike[str]) -> str:
    """A path or URL as text; of a local file without scheme and tilde."""
    text = os.fspath(path)
    return os.path.expanduser(text.removeprefix("file://")) if is_local(path) else text


def place_of(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[Folder | Bucket, str]:
    """The storage and the name in it of a checkpoint. A name that is a link is itself meant, not what it points to.

    Raises InvalidArgument, StorageError.
    """
    if not is_local(path):
        return storage.split(path, storage_options)
    folder, name = os.path.split(plain_path(path))
    if storage_options or not name:
        what = "storage_options are for URLs; this is a local path" if name else "expected the path of a file"
        raise InvalidArgument(f"{os.fspath(path)}: {what}.")
    return storage.at(os.path.abspath(folder)), name


@dataclass(frozen=True)
class Access:
    """How files are read: options for fsspec, threads and backend to decode with."""

    storage_options: Mapping[str, Any] | None = None
    threads: int | None = None
    backend: str | None = None

    def options_for(self, path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
        """The options, where they mean something."""
        return None if is_local(path) else self.storage_options

    @property
    def coding(self) -> dict[str, Any]:
        """What a File takes to decode with."""
        return {"threads": self.threads, "backend": self.backend}


def open_chained(path: str, access: Access) -> tricomp.File:
    """A checkpoint with those open that it needs: closing it closes them.

    Raises MissingFile, MissingParent, CorruptFile, UnsupportedVersion, StorageError.
    """
    if not is_local(path):
        file = tricomp.open(path, None, storage_options=access.options_for(path), **access.coding)
        if file.parent is not None:
            file.close()
            raise MissingParent(f"{path}: is coded against another checkpoint. Load it in the folder it was saved in.")
        return file
    with ExitStack() as opened:
        above: tricomp.File | None = None
        for name in chain_of(path):
            file = opened.enter_context(tricomp.open(name, above, **access.coding))
            if above is not None:
                file.own(above)
            above = file
        opened.pop_all()
    assert above is not None
    return above


def chain_of(path: str) -> list[str]:
    """The local files that a checkpoint needs, itself last. Raises MissingFile, MissingParent, CorruptFile."""
    source = LocalFile(path)
    try:
        top = container.read_summary(source)
    finally:
        source.close()
    if top.parent is None:
        return [path]
    folders = list(dict.fromkeys(os.path.dirname(os.path.abspath(name)) for name in (path, os.path.realpath(path))))
    files = [file for folder in folders for file in (*files_in(os.path.join(folder, HIDDEN)), *files_in(folder))]
    links = []
    for number, file in enumerate(files):
        if (summary := summary_of(file)) is not None:
            links.append(Link(number, summary.content_id, summary.parent))
    for chain in chains(links).values():
        if chain[-1].content_id == top.parent:
            return [*(files[link.step] for link in chain), path]
    raise MissingParent(
        f"{path}: is coded against another checkpoint, of content id {top.parent.hex()}, which is missing or damaged: "
        f"neither {os.path.join(folders[-1], HIDDEN)} nor the folder above has it. Put back the {HIDDEN} of the folder "
        "where it was saved."
    )


def alternatives(path: str) -> str:
    """Which other checkpoint of the folder to load, as a sentence."""
    if not is_local(path):
        return "Load another checkpoint."
    folder = os.path.dirname(os.path.abspath(path))
    others: list[str] = []
    with suppress(TricompError, OSError):
        others = [file for file in files_in(folder) if not (os.path.exists(path) and os.path.samefile(file, path))]
    others.sort(key=lambda file: stat.st_mtime_ns if (stat := stat_of(file)) else 0, reverse=True)
    for other in others[:_N_TRIED]:
        with suppress(TricompError, OSError):
            for name in chain_of(other):
                with tricomp.open(name) as file:
                    file.check()
            return f"Load {other}, the newest other one there that is intact."
    return f"No other checkpoint in {folder} can be loaded."


def names_in(folder: str) -> list[str]:
    """Paths of the files in a folder; hidden ones are passed over. Raises StorageError."""
    return [os.path.join(folder, name) for name in sorted(Folder(folder).list())]


def files_in(folder: str) -> Iterator[str]:
    """Paths of the `.tri` files in a folder, by whatever name, that can be read. Raises StorageError."""
    for path in names_in(folder):
        with suppress(OSError), open(path, "rb") as file:
            if file.read(9)[1:] == START:
                yield path


def summary_of(path: str) -> Summary | None:
    """What a file tells of itself; None if it is gone or damaged. Raises StorageError."""
    try:
        source = LocalFile(path)
        try:
            return container.read_summary(source)
        finally:
            source.close()
    except MissingFile:
        return None
    except StorageError:
        raise
    except TricompError:
        return None


def stat_of(path: str) -> os.stat_result | None:
    """What is known of a file; None if somebody removed it a moment ago."""
    with suppress(FileNotFoundError):
        return os.stat(path)
    return None
