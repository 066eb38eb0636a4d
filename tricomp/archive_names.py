"""Names of compressed and of restored files, on the disk. Knows no format and no codec.

    x.safetensors                    x.safetensors.tri
    model.safetensors.index.json     model.safetensors.index.tri     (and the shards that it lists)

The hard thing: a `.tri` file tells the names of what it was made of, and whoever wrote it may mean harm. So such a name
is only ever a name inside the folder that the user chose, and one that a tensor file may have.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Sequence
from contextlib import suppress
from glob import escape, glob
from typing import TYPE_CHECKING, Any

from tricomp.container import START
from tricomp.errors import InvalidArgument, MissingFile, UnsupportedFormat

if TYPE_CHECKING:
    from tricomp.formats.base import FolderFormat

SUFFIX = ".tri"
INDEX_SUFFIX = ".index.json"
_INDEX = re.compile(r"\.index(\.[^./]+)?\.json$", re.IGNORECASE)  # "fp16" may stand in it
_SUFFIX_OF = {"safetensors": ".safetensors", "npy": ".npy", "npz": ".npz", "torch": ".pt", "flax": ".msgpack"}
_SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth", ".ckpt", ".bin", ".msgpack")


def compressed(path: str) -> str:
    """The name that the compressed file of a file or of an index of shards gets."""
    return (path.removesuffix(".json") if path.endswith(INDEX_SUFFIX) else path) + SUFFIX


def path_of(path: Any, what: str) -> str:
    """A path given by a caller, as str. what: its name, for the error. Raises InvalidArgument."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise InvalidArgument(f"{what}: expected a path, got {path!r:.80}.")
    if not os.fspath(path):
        raise InvalidArgument(f"{what}: expected a path, got an empty text.")
    return os.fspath(path)


def is_compressed(path: str) -> bool:
    """Whether a file begins as a `.tri` file does; False if it cannot be read, which reading it then tells."""
    with suppress(OSError):
        if os.path.isfile(path):  # a pipe would block
            with open(path, "rb") as file:
                return file.read(1 + len(START))[1:] == START
    return False


def model_file(path: str) -> str:
    """The file to read for a path: itself, or in a folder the one index of shards, or the one tensor file.

    Raises InvalidArgument if a folder holds several, UnsupportedFormat if it holds none.
    """
    if not os.path.isdir(path):
        return path
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors", "*"):
        found = sorted(name for name in glob(os.path.join(escape(path), pattern)) if os.path.isfile(name))
        if pattern == "*":
            found = [name for name in found if name.endswith(_SUFFIXES)]
        if len(found) > 1:
            some = ", ".join(map(os.path.basename, found[:3]))
            raise InvalidArgument(f"{path}: holds {len(found)} models ({some}, ...). Name the file that is meant.")
        if found:
            return found[0]
    raise UnsupportedFormat(f"{path}: holds no tensor file. Name the file that is meant.")


def shards(index: str) -> list[str]:
    """Paths of the files that an index of shards lists, in the order of their names; empty if it is no such index."""
    try:
        with open(index, encoding="utf-8") as file:
            listed = json.load(file)["weight_map"].values()
        names = sorted({name for name in listed if _is_shard(name)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return [os.path.join(os.path.dirname(index), name) for name in names]


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and os.path.basename(name) == name


def restored(path: str, format: str, origin_name: str) -> str:
    """The name of the one file that is in a compressed file: without `.tri`, with a suffix that fits its format.

    Raises InvalidArgument if path does not end in `.tri`.
    """
    name = path.removesuffix(SUFFIX)
    if name == path or not os.path.basename(name):
        raise InvalidArgument(
            f"{path}: does not end in {SUFFIX}, so there is no name for the output. Give one with -o."
        )
    if name.lower().endswith(_SUFFIXES):
        return name
    suffix = os.path.splitext(origin_name)[1]
    return name + (suffix if suffix in _SUFFIXES else _SUFFIX_OF.get(format, ""))


def inside(folder: str, names: Sequence[str], path: str) -> list[str]:
    """The places in a folder for files of these names, as told by the compressed file at path.

    Raises InvalidArgument if a name is none of a tensor file or of an index, or stands there twice.
    """
    for name in names:
        if not _is_restorable(name):
            raise InvalidArgument(
                f"{path}: wants to write a file called {name!r}: expected the plain name of a tensor file. "
                f"Nothing was written: do not trust this file."
            )
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{path}: wants to write two files of one name. Do not trust this file.")
    return [os.path.join(folder, name) for name in names]


def check_parts(names: Sequence[str], path: str) -> None:
    """Raise InvalidArgument if a model at path has files of such names that `inside` would refuse to write again."""
    for name in names:
        if not _is_restorable(name):
            raise InvalidArgument(
                f"{path}: has a file called {name!r}, a name that decompress would not write: expected it to end in "
                f"{', '.join(_SUFFIXES)}, and is not hidden. Rename the file, in the index too."
            )


def _is_restorable(name: str) -> bool:
    """Whether a name is the plain one of a tensor file or of an index of shards, in capitals or not."""
    is_plain = name == os.path.basename(name) and "\\" not in name and name.isprintable() and not name.startswith(".")
    return is_plain and (name.lower().endswith(_SUFFIXES) or _INDEX.search(name) is not None)


def check_output(path: str, inputs: Sequence[str], overwrite: bool, reserved: Container[str] = ()) -> None:
    """Raise InvalidArgument if path is one of the inputs, is reserved, is no file, or may not be overwritten.

    reserved: real paths of other outputs.
    """
    if os.path.realpath(path) in reserved:
        raise InvalidArgument(f"{path}: is the output of another input already. Compress them to different folders.")
    if not os.path.lexists(path):
        return
    if any(os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name) for name in inputs):
        raise InvalidArgument(f"{path}: is input and output at once. Choose another name for the output.")
    if not overwrite:
        raise InvalidArgument(f"{path}: is there already. Pass -f (overwrite=True) to replace it, or choose another.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InvalidArgument(f"{path}: is not a regular file and will not be replaced. Choose another path.")


def check_folder(path: str, inputs: Sequence[str], overwrite: bool, format: FolderFormat) -> None:
    """Raise InvalidArgument if path may not be written, is no folder of the format, or has one of the inputs in it."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise InvalidArgument(f"{path}: is there already. Pass -f (overwrite=True) to replace it, or choose another.")
    real = os.path.join(os.path.realpath(path), "")
    if any(os.path.realpath(name).startswith(real) for name in inputs):
        raise InvalidArgument(f"{path}: the input is in it. Choose another name for the output.")
    if os.path.islink(path) or not os.path.isdir(path) or (os.listdir(path) and not format.matches(path)):
        raise InvalidArgument(f"{path}: is no {format.name} checkpoint and will not be replaced. Choose another path.")


def check_input(path: str) -> None:
    """Raise MissingFile or InvalidArgument unless there is a regular file at path."""
    if not os.path.lexists(path):
        raise MissingFile(f"{path}: there is no such file. Check the path.")
    if os.path.isdir(path):
        raise InvalidArgument(f"{path}: is a folder; expected a file.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InvalidArgument(f"{path}: is not a regular file. Pipe it in: tricomp ... - < {path}")
