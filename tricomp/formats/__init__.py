"""Files of other formats: read them into trees, write them again, tell which is which. Imports no framework.

    read(path)                     TensorFile: the tree, and where its leaves stand
    origins(file)                  what an open `.tri` file was made of: a list of Origin
    restored(file, origin)         the bytes of that file again: the same, or of an equal one
    exported(format, file)         the bytes of a file of any format with the tree of an open `.tri` file
    write(format, file, target)    the same, put at a path or written to a binary stream
    folder(format)                 a format of checkpoints that are folders, to be put by archive_output.put_folder

The hard thing: a format is told by content, since names lie; and an adapter's format is found, and its framework
loaded, only when none of the formats here fits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from tricomp import archive_output, bounds
from tricomp.bounds import Bytes, Limits
from tricomp.container import START
from tricomp.errors import CorruptFile, UnsupportedFormat
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats.base import HEAD_BYTES, FolderFormat, Format
from tricomp.formats.flax import Flax
from tricomp.formats.npy import Npy
from tricomp.formats.npz import Npz
from tricomp.formats.origin import Origin, Span, TensorFile, check_sizes, sizes_of
from tricomp.formats.safetensors import Safetensors
from tricomp.formats.span import Leaves

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

__all__ = [
    "FolderFormat",
    "Format",
    "Origin",
    "Span",
    "TensorFile",
    "exported",
    "folder",
    "names",
    "origins",
    "read",
    "restored",
    "write",
]

GROUP = "tricomp.formats"
FOLDERS = "tricomp.folders"
_CORE: tuple[Format, ...] = (Safetensors(), Npy(), Npz(), Flax())


def names() -> tuple[str, ...]:
    """The formats that there are, those of installed adapters included."""
    return tuple(sorted({format.name for format in _CORE} | {entry.name for entry in _entry_points()}))


def read(path: str | os.PathLike[str]) -> TensorFile:
    """Open a tensor file of any known format, told by its content; nothing but its table is read yet.

    Raises UnsupportedFormat if it is of none, InvalidArgument if it is damaged or holds code, MissingFile,
    StorageError.
    """
    path = os.fspath(path)
    source = LocalFile(path)
    with contextlib.closing(source):
        head = bytes(source.read(0, min(source.n_bytes, HEAD_BYTES)))
    if head[1 : 1 + len(START)] == START:
        raise UnsupportedFormat(f"{path}: is a .tri file already. Open it with tricomp.open or tricomp.load.")
    missing: list[str] = []
    format = _best(_CORE, head, path) or _best(_adapters(missing), head, path) or _by_suffix(path, missing)
    if format is None:
        hint = f" ({'; '.join(missing)})" if missing else ""
        advice = "Install it, or convert the file first." if missing else "Convert it to one of them first."
        raise UnsupportedFormat(
            f"{path}: expected a file of tensors ({', '.join(names())}), got one that is none of these{hint}. "
            f"{advice if head else 'It is empty.'}"
        )
    return format.read(path)


def origins(file: File, limits: Limits = bounds.DEFAULTS) -> list[Origin]:
    """What an open `.tri` file was made of: empty if it was not made of files. Raises CorruptFile, LimitExceeded."""
    packed = file.metadata.get("origin", [])
    if not isinstance(packed, list):
        raise CorruptFile(f"{file.name}: origin: expected a list, got {type(packed).__name__}.")
    leaves = Leaves(map(file.leaf, file))
    check_sizes([sizes_of(each) for each in packed], len(leaves), limits, f"{file.name}: origin")
    found = [Origin.from_metadata(each, file, limits, leaves) for each in packed]
    if len({origin.name for origin in found}) != len(found):
        raise CorruptFile(f"{file.name}: origin: two files of one name.")
    return found


def restored(file: File, origin: Origin) -> Iterator[Bytes]:
    """The bytes of a file that a `.tri` file was made of: the very same if origin has spans, else of an equal file."""
    return origin.pieces(file) if origin.is_exact else exported(origin.format, file)


def exported(format: str, file: File) -> Iterator[Bytes]:
    """The bytes of a file of that format with the tree of an open `.tri` file, in bounded memory.

    Raises UnsupportedFormat for a name that is none; InvalidArgument, naming the leaf, for what the format cannot hold.
    """
    missing: list[str] = []
    found = _named(format, _CORE) or _named(format, _adapters(missing))
    if found is not None:
        return found.pieces(file)
    raise _unknown(format, missing)


def folder(format: str) -> FolderFormat | None:
    """The format of that name whose checkpoints are folders; None: there is none. Raises UnsupportedFormat if it
    needs a package that is missing."""
    for entry in _entry_points(FOLDERS):
        if entry.name == format:
            try:
                found: FolderFormat = entry.load()
            except ImportError as error:
                raise _unknown(format, [_needs(format, error)]) from None
            return found
    return None


def _unknown(format: str, missing: list[str]) -> UnsupportedFormat:
    known = sorted({*names(), *(entry.name for entry in _entry_points(FOLDERS))})
    hint = "".join(f" {each[:1].upper()}{each[1:]}." for each in missing)
    return UnsupportedFormat(f"format {format!r}: expected one of {', '.join(known)}.{hint}")


def _needs(format: str, error: ImportError) -> str:
    return f"the format {format!r} needs a package that is missing: {error}"


def write(format: str, file: File, target: str | os.PathLike[str] | BinaryIO) -> int:
    """Write what exported gives to a path (atomically, replacing what is there) or a binary stream. Returns its size.

    Raises what exported raises, StorageError.
    """
    pieces = exported(format, file)
    if isinstance(target, str | os.PathLike):
        return archive_output.put(os.fspath(target), pieces)
    return archive_output.write_ahead(target, pieces)


def _named(name: str, formats: tuple[Format, ...]) -> Format | None:
    return next((format for format in formats if format.name == name), None)


def _best(formats: tuple[Format, ...], head: bytes, path: str) -> Format | None:
    """The format that matches; of several, the one whose suffix the file has."""
    found = [format for format in formats if format.matches(head, path)]
    return next((format for format in found if path.lower().endswith(format.suffixes)), next(iter(found), None))


def _by_suffix(path: str, missing: list[str]) -> Format | None:
    """The format a file should have by its name: reading it will say what is wrong."""
    return next((f for f in (*_CORE, *_adapters(missing)) if path.lower().endswith(f.suffixes)), None)


def _entry_points(group: str = GROUP) -> EntryPoints:
    from importlib import metadata  # takes as long as opening a file

    return metadata.entry_points(group=group)


def _adapters(missing: list[str]) -> tuple[Format, ...]:
    """Formats of installed adapters whose framework is there; the others are told in missing."""
    found: list[Format] = []
    for entry in _entry_points():
        try:
            found.append(entry.load())
        except ImportError as error:
            told = _needs(entry.name, error)
            missing += [told] if told not in missing else []
    return tuple(found)
