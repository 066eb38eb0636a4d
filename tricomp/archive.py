"""compress and decompress: whole files of other formats to `.tri` files and back: formats, checkpoint and names.

    compress("model.safetensors")            writes model.safetensors.tri
    decompress("model.safetensors.tri")      writes model.safetensors again, byte for byte

The hard thing: nothing may be lost on the way. Files appear whole or not at all, an input that changes while it is read
is noticed, and a delta is decoded against the very content that it was made against, in whatever file that comes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import BinaryIO

from tricomp import archive_names, checkpoint, folder, formats
from tricomp.archive_base import Base, require_base, require_shared
from tricomp.archive_output import (
    Output,
    keep_private,
    make_folder,
    put,
    put_together,
    unchanged,
    write,
    write_ahead,
)
from tricomp.codec import Engine
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument
from tricomp.formats import Origin
from tricomp.plan import Spec, check_spec
from tricomp.progress import OnProgress, counter
from tricomp.report import Report

Path = str | os.PathLike[str]

STREAM = "standard output"


@dataclass(frozen=True)
class Compressed:
    """What compress_file did. files: read, an index of shards first. input_bytes: theirs. format: of the input.

    is_exact: decompress restores the files byte for byte; else equal ones, written anew, or rounded ones (see Spec).
    """

    report: Report
    files: tuple[str, ...]
    input_bytes: int
    format: str
    is_exact: bool


@dataclass(frozen=True)
class RestoredFile:
    """A file that decompress wrote.

    is_exact: byte for byte the original; else an equal one, written anew, or the original with rounded leaves.
    """

    path: str
    n_bytes: int
    is_exact: bool


@dataclass(frozen=True)
class Restored:
    """What decompress wrote. path, file_bytes: of the `.tri` file. base: path of the base, if one was needed.

    is_rounded: leaves were rounded when they were compressed, as Spec.keep_mantissa_bits asked.
    """

    path: str
    file_bytes: int
    files: tuple[RestoredFile, ...]
    base: str | None
    seconds: float
    is_rounded: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes written."""
        return sum(file.n_bytes for file in self.files)


def compress(
    path: Path,
    out: Path | BinaryIO | None = None,
    base: Path | Base | None = None,
    spec: Spec | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    backend: str | None = None,
) -> Report:
    """Compress a tensor file, an index of shards, or a folder that holds one model, to one `.tri` file; path stays.

    out: a path (default: path + ".tri") or a binary stream to write to. base: a file to encode against (a path, or an
    open Base); the same content, in any form, is needed to decompress. on_progress gets (bytes done, of so many).
    threads, backend: see tricomp.open.
    Raises UnsupportedFormat, InvalidArgument (damage, code in a pickle, out is there, nothing shared with base),
    UnsupportedDtype, MissingFile, StorageError.
    """
    return compress_file(path, out, base, spec, threads, overwrite, on_progress, backend=backend).report


def compress_file(
    path: Path,
    out: Path | BinaryIO | None = None,
    base: Path | Base | None = None,
    spec: Spec | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    name: str | None = None,
    reserved: Container[str] = (),
    backend: str | None = None,
) -> Compressed:
    """The same as compress, and tells which files were read.

    name: recorded as the input's, instead of path's own. reserved: real paths that are not to be written, whatever
    overwrite says, as they are outputs already.
    """
    check_spec(spec)
    engine = Engine(threads, backend)
    with ExitStack() as stack:
        opened_base = _base(base, stack, engine)
        path = archive_names.model_file(archive_names.path_of(path, "compress"))
        archive_names.check_input(path)
        is_unchanged = unchanged([path])
        if archive_names.is_compressed(path):
            raise InvalidArgument(f"{path}: is compressed already. Use tricomp decompress to restore it.")
        opened = stack.enter_context(formats.read(path))
        if name is not None:
            opened = replace(opened, name=name)
        files = (path, *(os.path.join(os.path.dirname(path), part.name) for part in opened.parts))
        if opened_base is not None and os.path.samefile(path, opened_base.path):
            raise InvalidArgument(
                f"{path}: is the base itself. Compress it without a base, and keep it for the others."
            )
        target = _compressed_path(path, archive_names.compressed(path) if out is None else out)
        content = content_of(opened.tree)
        metadata = opened.to_metadata()
        if opened.parts:
            archive_names.check_parts([origin["name"] for origin in metadata["origin"]], path)
        if opened_base is not None:
            require_shared(path, content, opened_base)
            metadata["base"] = {"name": opened_base.name}
        make_folder(out)
        checks = [is_unchanged, unchanged(files[1:]), *([opened_base.check] if opened_base else [])]
        where, place = _output(target, files, opened_base, overwrite, reserved, checks)
        report = checkpoint.put(
            where,
            place,
            content,
            None if opened_base is None else opened_base.content,
            spec,
            metadata,
            0 if opened_base is None else 1,
            engine,
            counter(on_progress, sum(leaf.n_bytes for leaf in content.snapshot.layout.leaves)),
        )
        if isinstance(target, str):
            keep_private(target, path)
            report = replace(report, path=target)
        is_rounded = spec is not None and any(spec.mantissa_bits_of(leaf) is not None for leaf in _paths(content))
        is_exact = not is_rounded and all(part.spans is not None for part in (opened, *opened.parts))
        return Compressed(report, files, opened.n_bytes, opened.format, is_exact)


def decompress(
    path: Path,
    out: Path | BinaryIO | None = None,
    base: Path | Base | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    backend: str | None = None,
    is_synced: bool = False,
) -> Restored:
    """Restore what a `.tri` file was made of: byte for byte where the format allows, else an equal file; path stays.

    out: a path (default: path without ".tri"), a folder, or a binary stream; a model in shards takes a folder (default:
    that of path). base: what the file was made against, as any file of that content. threads, backend: see
    tricomp.open. is_synced: wait until the disk has it all, as whoever removes path afterwards should; else, as with
    cp, the system writes it there by and by.
    Raises InvalidArgument (not made of a file, out is there), WrongReference (base missing or another), CorruptFile,
    CorruptFrame, MissingFile, StorageError; nothing is left behind then, but for what a stream has got.
    """
    return decompress_file(path, out, base, overwrite, threads, on_progress, backend=backend, is_synced=is_synced)


def decompress_file(
    path: Path,
    out: Path | BinaryIO | None = None,
    base: Path | Base | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    reserved: Container[str] = (),
    backend: str | None = None,
    is_synced: bool = False,
) -> Restored:
    """The same as decompress. reserved: as for compress_file."""
    began = time.perf_counter()
    # One thread writes while the others decode, and keeps a core busy.
    engine = Engine(max(Engine(threads, backend).n_threads - 1, 1), backend)
    path = archive_names.path_of(path, "decompress")
    archive_names.check_input(path)
    with ExitStack() as stack:
        file = stack.enter_context(checkpoint.open_file(path, threads=engine.threads, backend=engine.backend))
        used: Base | None = None
        if file.parent is not None:
            used = _base(base, stack, engine)
            reference = require_base(file, used).content
            delta = checkpoint.open_file(path, reference, threads=engine.threads, backend=engine.backend)
            file = stack.enter_context(delta)
        origins = formats.origins(file)
        if not origins:
            raise InvalidArgument(
                f"{path}: was not made of a file, so there is none to restore. "
                f'Run "tricomp export --to safetensors {path}", or tricomp.load it.'
            )
        count = counter(on_progress, sum(origin.n_bytes for origin in origins))
        inputs = (path,) if used is None else (path, *used.files)
        if out is None or isinstance(out, (str, os.PathLike)):
            targets = _places(path, None if out is None else archive_names.path_of(out, "out"), origins)
            for target in targets:
                archive_names.check_output(target, inputs, overwrite, reserved)
            make_folder(out)
            pieces = [formats.restored(file, origin) for origin in origins]
            if len(origins) > 1:
                sizes = put_together(targets, pieces, is_synced, count)
            else:
                sizes = [put(targets[0], pieces[0], is_synced, count)]
            for target in targets:
                keep_private(target, path)
        else:
            if len(origins) > 1:
                raise InvalidArgument(f"{path}: holds {len(origins)} files. Give a folder for them: -o FOLDER/.")
            targets, sizes = [STREAM], [write_ahead(out, formats.restored(file, origins[0]), count)]
        is_rounded = any(file.plan(leaf).keep_mantissa_bits is not None for leaf in file)
        exact = [origin.spans is not None and not is_rounded for origin in origins]
        written = tuple(map(RestoredFile, targets, sizes, exact))
        seconds = time.perf_counter() - began
        return Restored(path, file.n_bytes, written, None if used is None else used.path, seconds, is_rounded)


def _paths(content: Content) -> Iterator[str]:
    return (leaf.path for leaf in content.snapshot.layout.leaves)


def _base(base: Path | Base | None, stack: ExitStack, engine: Engine) -> Base | None:
    if isinstance(base, (str, os.PathLike)):
        return stack.enter_context(Base(base, engine.threads, engine.backend))
    return base


def _compressed_path(path: str, out: Path | BinaryIO) -> str | BinaryIO:
    """Where the compressed file of path goes: to a path, to its own name in a folder, or to a stream."""
    if not isinstance(out, (str, os.PathLike)):
        return out
    target = archive_names.path_of(out, "out")
    if os.path.isdir(target) or target.endswith(os.sep):
        return os.path.join(target, os.path.basename(archive_names.compressed(path)))
    return target


def _output(
    target: str | BinaryIO,
    files: Sequence[str],
    base: Base | None,
    overwrite: bool,
    reserved: Container[str],
    checks: Sequence[Callable[[], None]],
) -> tuple[Output, str]:
    """Where the compressed file of some files goes, and its name there; refused now if it must not be written.

    checks: called before it is there.
    """

    def check() -> None:
        for each in checks:
            each()

    if not isinstance(target, str):
        return Output("", lambda _, pieces: write(target, pieces), check), STREAM
    archive_names.check_output(target, [*files, *(base.files if base else ())], overwrite, reserved)
    where, name = folder.split(target)
    return Output(where.url, where.put, check), name


def _places(path: str, out: str | None, origins: Sequence[Origin]) -> list[str]:
    """Where the files of a compressed file go."""
    is_folder = out is not None and (os.path.isdir(out) or out.endswith(os.sep))
    if len(origins) > 1:
        if out is not None and os.path.lexists(out) and not is_folder:
            raise InvalidArgument(f"{path}: holds {len(origins)} files. Give a folder for them: -o FOLDER/.")
        target = os.path.dirname(path) if out is None else out
        return archive_names.inside(target, [origin.name for origin in origins], path)
    if out is not None and not is_folder:
        return [out]
    name = archive_names.restored(path, origins[0].format, origins[0].name)
    return [name if out is None else os.path.join(out, os.path.basename(name))]
