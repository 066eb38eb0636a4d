"""Files of checkpoints, opened along their chains. Imports no torch.

The hard thing: a file is coded against one file of another checkpoint, in another folder, which somebody may have
removed, replaced or moved. Each is therefore compared with what the index above it says of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import tricomp
from tricomp import storage
from tricomp.codec.engine import cores
from tricomp.errors import CorruptFile, MissingFile, MissingParent, WrongReference
from tricomp_torch.dcp.index import Files, StoredFile, absolute, read_files, resolved


@dataclass(frozen=True)
class Access:
    """How files are opened: options for fsspec, threads and backend to decode with."""

    options: Mapping[str, Any] | None = None
    threads: int | None = None
    backend: str | None = None

    def options_for(self, path: str) -> Mapping[str, Any] | None:
        """The options, where they mean something: a chain may lead from a URL to a folder of this machine."""
        return self.options if storage.is_url(path) else None


def share_of_cores() -> int:
    """Cores for each of the ranks that a launcher has started on this machine."""
    with suppress(ValueError):
        return max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "")), 1)
    return cores()


def open_chained(folder: str, stored: StoredFile, access: Access) -> tricomp.File:
    """A file of the checkpoint in a folder, with those open that it is coded against: closing it closes them.

    Raises MissingFile, MissingParent, CorruptFile, UnsupportedVersion, StorageError.
    """
    links = [(folder, stored)]
    while stored.parent is not None:
        folder, stored = _parent(folder, stored, access)
        links.append((folder, stored))
    with ExitStack() as opened:
        file: tricomp.File | None = None
        for folder, stored in reversed(links):
            above = opened.enter_context(_open(folder, stored, file, access))
            if file is not None:
                above.own(file)
            file = above
        opened.pop_all()
    assert file is not None
    return file


def chain(checkpoint_id: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """The folders that a checkpoint needs to be loaded, itself last: none of them may be removed before it is.

    Raises MissingFile, MissingParent, CorruptFile, StorageError.
    """
    access = Access(storage_options)
    found: list[str] = []
    waiting = [
        (absolute(checkpoint_id), stored) for stored in read_files(absolute(checkpoint_id), storage_options).files
    ]
    found.append(absolute(checkpoint_id))
    while waiting:
        folder, stored = waiting.pop()
        if stored.parent is None:
            continue
        waiting.append(_parent(folder, stored, access))
        if waiting[-1][0] not in found:
            found.append(waiting[-1][0])
    return found[::-1]


def _parent(folder: str, stored: StoredFile, access: Access) -> tuple[str, StoredFile]:
    """Folder and entry of the file that another was coded against."""
    assert stored.parent is not None
    where = resolved(stored.parent.folder, folder)
    what = f"{folder}/{stored.name}: is coded against {stored.parent.name} of {where}"
    try:
        index: Files = read_files(where, access.options_for(where))
    except MissingFile as error:
        raise MissingParent(
            f"{what}, which is not there: {error} Put that checkpoint back, or load a step that does not need it."
        ) from None
    above = index.file(stored.parent.name)
    if above is None or above.content_id != stored.parent.content_id or above.since_keyframe >= stored.since_keyframe:
        raise MissingParent(
            f"{what}, but the checkpoint there is another one by now. "
            "Put the old one back, or load a step that does not need it."
        )
    return where, above


def _open(folder: str, stored: StoredFile, reference: tricomp.File | None, access: Access) -> tricomp.File:
    path = f"{folder.rstrip('/')}/{stored.name}"
    options: dict[str, Any] = {
        "storage_options": access.options_for(path),
        "threads": access.threads,
        "backend": access.backend,
    }
    try:
        try:
            file = tricomp.open(path, reference, **options)
        except WrongReference:
            file = tricomp.open(path, **options)
            if file.parent is not None:  # else it was rebased, and the index was not yet
                file.close()
                raise
    except MissingFile:
        raise MissingFile(f"{path}: is gone, though the index names it. Restore it, or load another step.") from None
    if file.content_id != stored.content_id:
        file.close()
        raise CorruptFile(
            f"{path}: has content id {file.content_id}, the index says {stored.content_id}: it is the file of another "
            "save. Restore it, or load another step."
        )
    return file
