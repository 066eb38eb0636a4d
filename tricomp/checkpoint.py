"""save, load and open: a tree of arrays and plain values in one file. Folder, container and codec put together.

The hard thing: a save is atomic and streams. Frames go to the folder as the codec makes them, and the file gets its
name only when the last byte is on the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tricomp import bounds, codec, folder
from tricomp.bounds import Limits
from tricomp.container import Writing
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.plan import Spec, check_spec
from tricomp.report import Report, report_of
from tricomp.storage import Storage

Path = str | os.PathLike[str]


def open_file(path: Path, reference: Path | File | Any = None, limits: Limits = bounds.DEFAULTS) -> File:
    """Open a `.tri` file; nothing is decoded yet.

    path: of a local file. reference: for a delta, what it was saved against: a path, an open File or a tree.
    Raises MissingFile, CorruptFile, UnsupportedVersion, LimitExceeded, WrongReference, StorageError.
    """
    source = folder.LocalFile(os.fspath(path))
    base: File | Content | None = None
    try:
        base = _base(reference, limits)
        file = File(source, base, limits)
    except BaseException:
        source.close()
        if isinstance(base, File) and base is not reference:
            base.close()
        raise
    if isinstance(base, File) and base is not reference:
        file.own(base)
    return file


def load(path: Path, reference: Path | File | Any = None, leaves: Iterable[str] | None = None) -> Any:
    """The tree in a `.tri` file; or, given leaves (paths or fnmatch patterns), a dict of path to array.

    Raises what open_file and File.load raise.
    """
    with open_file(path, reference) as file:
        return file.load(leaves)


def save(
    path: Path,
    tree: Any,
    reference: Path | File | Any = None,
    spec: Spec | None = None,
    metadata: dict[str, Any] | None = None,
) -> Report:
    """Write a tree of numpy arrays and plain values to one file, atomically: a file that is there stays until the end.

    reference: a path, an open File or a tree to encode against; it is needed again to load. metadata: plain values.
    Raises UnsupportedNode, UnsupportedDtype (naming the leaf), InvalidArgument, StorageError.
    """
    where, name = folder.split(path)
    base = _base(reference, bounds.DEFAULTS)
    try:
        if isinstance(base, File) and os.path.realpath(base.name) == os.path.join(where.url, name):
            raise InvalidArgument(f"{os.fspath(path)}: would replace its own reference. Save to another path.")
        since_keyframe = base.since_keyframe + 1 if isinstance(base, File) else int(base is not None)
        return put(where, name, content_of(tree), base, spec, metadata, since_keyframe)
    finally:
        if isinstance(base, File) and base is not reference:
            base.close()


def put(
    where: Storage,
    name: str,
    content: Content,
    base: File | Content | None = None,
    spec: Spec | None = None,
    metadata: dict[str, Any] | None = None,
    since_keyframe: int = 0,
    threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Encode content into one file of a storage, frame by frame as they come.

    on_progress: told the raw bytes of each frame when it is written.
    """
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidArgument(f"metadata: expected a dict of plain values, got {type(metadata).__name__}.")
    check_spec(spec)
    began = time.perf_counter()
    parent = None if base is None else bytes.fromhex(base.content_id)
    leaves = content.snapshot.layout.leaves
    written = Writing(content.structure, leaves, parent, since_keyframe, metadata)

    def frames() -> Iterator[codec.Frame]:
        for frame in codec.encode(content.snapshot, base, spec, threads):
            yield frame
            if on_progress is not None:
                on_progress(sum(leaves[number].n_bytes for number in frame.leaves))

    where.put(name, written.pieces(frames()))
    return report_of(os.path.join(where.url, name), written, time.perf_counter() - began)


def _base(reference: Any, limits: Limits) -> File | Content | None:
    """What reference names: an open File (opened here if it is a path), or a tree held in memory."""
    if reference is None or isinstance(reference, (File, Content)):
        return reference
    if isinstance(reference, (str, os.PathLike)):
        return open_file(reference, None, limits)
    return content_of(reference)
