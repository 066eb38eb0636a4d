"""What a compressed file is made against: a `.tri` file or a file of any format, opened.

The hard thing: the base is known by its content alone. So it may come in another file, and under another name, than it
was compressed with; and a wrong one is told by what was expected and what came.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from tricomp import archive_names, folder, formats
from tricomp.archive_output import unchanged
from tricomp.content import Content, content_of
from tricomp.dtypes import Words, to_words
from tricomp.errors import InvalidArgument, WrongReference
from tricomp.file import File
from tricomp.formats import TensorFile
from tricomp.layout import Leaf
from tricomp.spool import MEMORY_BYTES, Scratch

_log = logging.getLogger("tricomp")


class BaseFile(File):
    """A `.tri` file that others are compressed against: its large leaves wait decoded on a disk, not in memory."""

    def find(self, path: str) -> tuple[Leaf, Words] | None:
        """Leaf and words of that path, or None. Raises StorageError when there is no room for a large leaf."""
        if path not in self or self.leaf(path).n_bytes <= MEMORY_BYTES:
            return super().find(path)
        leaf = self.leaf(path)
        with closing(Scratch(self.name, "a large leaf of the base")) as scratch:
            for piece in self.pieces(path):
                scratch.append(to_words(piece).view(np.uint8).data)
            return leaf, np.frombuffer(scratch.read(0, scratch.n_bytes), leaf.dtype.word_dtype)

    def find_all(self, paths: Sequence[str]) -> list[tuple[Leaf, Words] | None]:
        """What find gives for each path; all but large leaves are decoded together."""
        small = [path for path in paths if path not in self or self.leaf(path).n_bytes <= MEMORY_BYTES]
        found = dict(zip(small, super().find_all(small)))
        return [found[path] if path in found else self.find(path) for path in paths]


class Base:
    """A file or model to compress others against, opened: a `.tri` file or a file of any format. A context manager.

    Attributes: name, without folders. path. files: path, and the shards if it is an index. content: what leaves are
    coded against, a File or a Content. check(): raises InvalidArgument if a file has changed since it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None, backend: str | None = None) -> None:
        """path: of a file, or of the folder of a sharded model. threads, backend: to decode it with, see tricomp.open.

        Raises what opening it raises.
        """
        self.path = archive_names.model_file(archive_names.path_of(path, "base"))
        archive_names.check_input(self.path)
        self.name = os.path.basename(self.path)
        self.files: tuple[str, ...] = (self.path,)
        self._checks = [unchanged(self.files)]
        self._opened: File | TensorFile
        self.content: File | Content
        if archive_names.is_compressed(self.path):
            self._opened = self.content = BaseFile(folder.LocalFile(self.path), threads=threads, backend=backend)
            if self._opened.parent is not None:
                told = told_base(self._opened)
                self.close()
                raise InvalidArgument(
                    f"{self.path}: cannot be a base: it was itself made against {told}. "
                    f"Decompress it, and give the restored file as the base."
                )
        else:
            self._opened = opened = formats.read(self.path)
            folder_name = os.path.dirname(self.path)
            self.files += tuple(os.path.join(folder_name, part.name) for part in opened.parts)
            self._checks.append(unchanged(self.files[1:]))
            self.content = content_of(opened.tree)

    def check(self) -> None:
        """Raise InvalidArgument if a file of it has changed since it was opened."""
        for check in self._checks:
            check()

    def close(self) -> None:
        """Let go of the file."""
        self._opened.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def told_base(file: File) -> str:
    """What a delta tells of its base, in words."""
    told = file.metadata.get("base")
    name = told.get("name") if isinstance(told, dict) else None
    return f"{name!r} (content id {file.parent})" if isinstance(name, str) else f"content id {file.parent}"


def require_shared(path: str, content: Content, base: Base) -> None:
    """Raise InvalidArgument unless some leaf of the base can serve as a reference."""
    if isinstance(base.content, File):
        known = {leaf.path: leaf for leaf in map(base.content.leaf, base.content)}
    else:
        known = {leaf.path: leaf for leaf in base.content.snapshot.layout.leaves}
    leaves = content.snapshot.layout.leaves
    n_shared = sum(known.get(leaf.path) == leaf for leaf in leaves)
    _log.info("%s: %d of %d leaves are in the base %s", path, n_shared, len(leaves), base.path)
    if n_shared == 0:
        first = f", such as {leaves[0].path!r} {leaves[0].dtype.name}{list(leaves[0].shape)}" if leaves else ""
        raise InvalidArgument(
            f"{path}: shares no leaf with the base {base.path}: none of its {len(leaves)} leaves{first} has a leaf of "
            f"the same path, dtype and shape there. Compress it without a base, or give the model it came from."
        )


def require_base(file: File, base: Base | None) -> Base:
    """The base, if it is the one of a delta. Raises WrongReference."""
    told = told_base(file)
    if base is None:
        raise WrongReference(
            f"{file.name}: was made against {told}, and needs it. Pass that file, in any form, with --base (base=)."
        )
    if base.content.content_id != file.parent:
        raise WrongReference(
            f"{file.name}: was made against {told}, but {base.path} has content id {base.content.content_id}. "
            f"Pass the file it was made against, in any form, with --base (base=)."
        )
    return base
