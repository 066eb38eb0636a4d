"""rebase: a checkpoint written again so that it stands alone, and those before it can be removed. Imports no torch.

The hard thing is a crash between two files. Each is replaced as a whole under its own name and content id, so that
what is coded against it stays right, and is read for what it is, whatever the index still says of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tricomp import codec, storage
from tricomp.checkpoint import put
from tricomp_torch.dcp.chains import Access, open_chained
from tricomp_torch.dcp.index import INDEX_NAME, absolute, pack, read


def rebase(
    checkpoint_id: str | os.PathLike[str],
    *,
    threads: int | None = None,
    backend: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Let a checkpoint stand alone: afterwards it needs no other one. Call it in one process, while nobody saves there.

    It loads at any moment meanwhile; what is coded against it stays as it is. Raises MissingFile, MissingParent,
    CorruptFile, CorruptFrame, StorageError: then it may be called again.
    """
    folder = absolute(checkpoint_id)
    access = Access(storage_options, threads, backend)
    where = storage.at(folder, access.options_for(folder))
    index = read(folder, storage_options)
    files = list(index.files)
    for number, stored in enumerate(files):
        if stored.parent is None:
            continue
        with open_chained(folder, stored, access) as file:
            content, metadata = file.content(), file.metadata
        report = put(where, stored.name, content, metadata=metadata, engine=codec.Engine(threads, backend))
        assert report.content_id == stored.content_id
        files[number] = replace(stored, n_bytes=report.file_bytes, since_keyframe=0, parent=None)
    if files != list(index.files):
        where.put(INDEX_NAME, [pack(replace(index, files=tuple(files)))])
