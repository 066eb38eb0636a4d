"""save, load and open: a tree of arrays and plain values in one file. Folder, container and codec put together.

The hard thing: a save is atomic and streams. Frames go to the folder as the codec makes them, and the file gets its
name only when the last byte is on the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from tricomp import bounds, codec, storage
from tricomp.bounds import Limits
from tricomp.container import Writing
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.plan import Spec, check_spec
from tricomp.progress import OnBytes
from tricomp.report import Report, report_of
from tricomp.storage import Storage

Path = str | os.PathLike[str]


def open_file(
    path: Path,
    reference: Path | File | Any = None,
    limits: Limits = bounds.DEFAULTS,
    storage_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> File:
    """Open a `.tri` file; nothing is decoded yet.

    path: of a local file, or a URL that fsspec knows; storage_options go to fsspec. reference: for a delta, what it was
    saved against: a path or URL, an open File or a tree. threads: to decode with; None: one for each core that this
    process may use. backend: "native", "reference" (slow), or "auto": native where it is there. None: what the
    environment variable TRICOMP_BACKEND says, else "auto".
    Raises MissingFile, CorruptFile, UnsupportedVersion, LimitExceeded, WrongReference, StorageError, InvalidArgument.
    """
    engine = codec.Engine(threads, backend)
    source = storage.source(path, storage_options)
    base: File | Content | None = None
    try:
        base = _base(reference, limits, storage_options, engine)
        file = File(source, base, limits, threads, backend)
    except BaseException:
        source.close()
        if isinstance(base, File) and base is not reference:
            base.close()
        raise
    if isinstance(base, File) and base is not reference:
        file.own(base)
    return file


def load(
    path: Path,
    reference: Path | File | Any = None,
    leaves: Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """The tree in a `.tri` file; or, given leaves (paths or fnmatch patterns), a dict of path to array.

    threads, backend: as for open_file. Raises what open_file and File.load raise.
    """
    with open_file(path, reference, bounds.DEFAULTS, storage_options, threads, backend) as file:
        return file.load(leaves)


def save(
    path: Path,
    tree: Any,
    reference: Path | File | Any = None,
    spec: Spec | None = None,
    metadata: dict[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str | None = None,
    first: codec.First | None = None,
) -> Report:
    """Write a tree of numpy arrays and plain values to one file, atomically: a file that is there stays until the end.

    path: of a local file, or a URL that fsspec knows; storage_options go to fsspec. reference: a path or URL, an open
    File or a tree to encode against; it is needed again to load. metadata: plain values. threads, backend: as for
    open_file; the bytes are the same whatever they are. While frames are written, others are encoded. first: leaves to
    encode before all others, and what is called then, see codec.First.
    Raises UnsupportedNode, UnsupportedDtype (naming the leaf), InvalidArgument, StorageError.
    """
    engine = codec.Engine(threads, backend)
    where, name = storage.split(path, storage_options)
    base = _base(reference, bounds.DEFAULTS, storage_options, engine)
    try:
        target = os.path.join(where.url, name)
        if isinstance(base, File) and target in (base.name, os.path.realpath(base.name)):
            raise InvalidArgument(f"{os.fspath(path)}: would replace its own reference. Save to another path.")
        since_keyframe = base.since_keyframe + 1 if isinstance(base, File) else int(base is not None)
        return put(where, name, content_of(tree), base, spec, metadata, since_keyframe, engine, first=first)
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
    engine: codec.Engine | None = None,
    on_progress: OnBytes | None = None,
    first: codec.First | None = None,
) -> Report:
    """Encode content into one file of a storage, frame by frame as they come.

    on_progress: told the raw bytes of each frame when it is written.
    """
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidArgument(f"metadata: expected a dict of plain values, got {type(metadata).__name__}.")
    check_spec(spec)
    engine = engine or codec.Engine()
    began = time.perf_counter()
    parent = None if base is None else bytes.fromhex(base.content_id)
    leaves = content.snapshot.layout.leaves
    written = Writing(content.structure, leaves, parent, since_keyframe, metadata)

    def counted(frames: Iterable[codec.Frame]) -> Iterator[codec.Frame]:
        for frame in frames:
            yield frame
            if on_progress is not None:
                on_progress(sum(leaves[number].n_bytes for number in frame.leaves))

    with closing(codec.encode(content.snapshot, base, spec, engine.threads, engine.backend, first)) as frames:
        where.put(name, written.pieces(counted(frames)))
    return report_of(os.path.join(where.url, name), written, time.perf_counter() - began)


def _base(
    reference: Any, limits: Limits, storage_options: Mapping[str, Any] | None, engine: codec.Engine
) -> File | Content | None:
    """What reference names: an open File (opened here if it is a path), or a tree held in memory."""
    if reference is None or isinstance(reference, (File, Content)):
        return reference
    if isinstance(reference, (str, os.PathLike)):
        is_far = storage.is_url(reference)  # the options of one storage mean nothing to another kind
        options = storage_options if is_far else None
        return open_file(reference, None, limits, options, engine.threads, engine.backend)
    return content_of(reference)
