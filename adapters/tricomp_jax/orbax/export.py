"""The folder format "orbax": a `.tri` file's tree as Orbax itself writes it, for `tricomp export --to orbax`.

PyTreeCheckpointer and StandardCheckpointer restore it, without tricomp. Arrays come back as numpy's unless a target
says otherwise, since the devices that they were on may not be there. The hard thing: what Orbax cannot hold, it finds
while it writes, or never: so it is looked for before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from orbax.checkpoint import PyTreeCheckpointer

from tricomp import tree as trees
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.tree import join
from tricomp_jax.files import notes_of
from tricomp_jax.trees import Notes, children

_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "orbax.checkpoint")
_UNKNOWN = ("float8_e4m3", "uint2", "uint4", "float6_e2m3fn", "float6_e3m2fn")  # to TensorStore, which writes arrays
_ADVICE = "Leave it out (--leaves), or export to another format."


class Orbax:
    """See tricomp.formats.base.FolderFormat."""

    name = "orbax"

    def matches(self, folder: str) -> bool:
        """Whether Orbax left a mark in it."""
        return any(os.path.exists(os.path.join(folder, name)) for name in _MARKS)

    def write(self, file: File, folder: str) -> None:
        """Make the folder. All of the tree is in memory meanwhile."""
        notes = Notes(notes_of(file.metadata))
        blanks = [np.broadcast_to(np.zeros((), leaf.dtype.numpy), leaf.shape) for leaf in map(file.leaf, file)]
        _check(trees.unflatten(file.structure, blanks, what=f"{file.name}: tree"), notes)
        tree = _mapped(file.load(), None, notes)
        try:
            with PyTreeCheckpointer() as checkpointer:
                checkpointer.save(os.path.abspath(folder), tree)
        except OSError:
            raise
        except Exception as error:  # of whatever kind, from Orbax or TensorStore
            raise InvalidArgument(f"{file.name}: Orbax cannot write it: {error}") from error


FORMAT = Orbax()


def _check(tree: Any, notes: Notes) -> None:
    """Raise InvalidArgument, naming the path, for what Orbax cannot hold."""
    top = children(tree)
    if top is not None and not top.keys:
        raise InvalidArgument("the tree is empty, and Orbax holds none that is. Export to another format.")
    for path, kind in notes.kinds.items():
        if kind == "complex":
            raise InvalidArgument(f"node {path!r}: Orbax holds no complex numbers beside arrays. {_ADVICE}")
    names: dict[str, str] = {}
    for path, keys, node in _nodes(tree, None, ()):
        fault = _fault(node, path, notes)
        if fault:
            raise InvalidArgument(f"node {path!r}: {fault}. {_ADVICE}")
        name = ".".join(keys)
        if name in names:
            raise InvalidArgument(f"nodes {names[name]!r} and {path!r}: have one name in Orbax, {name!r}. {_ADVICE}")
        names[name] = path


def _fault(node: Any, path: str, notes: Notes) -> str:
    """Why Orbax cannot hold a leaf, a plain value or an empty node; "" if it can."""
    if isinstance(node, np.ndarray):
        if node.size == 0:
            return f"Orbax holds no array without elements, and this is {node.dtype.name}{list(node.shape)}"
        name = notes.dtypes.get(path, node.dtype.name)
        return f"Orbax holds no {name}" if name in _UNKNOWN else ""
    if isinstance(node, bytes):
        return "Orbax holds no bytes beside arrays"
    if type(node) is int and not -(1 << 63) <= node < 1 << 63:
        return f"Orbax holds numbers of 64 bits, and this is {node}"
    return ""


def _nodes(node: Any, path: str | None, keys: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Path, keys as text, and node, of each that has no children."""
    parts = None if isinstance(node, np.ndarray) else children(node)
    if parts is None or not parts.keys:
        yield path or "", keys, node
        return
    for key, value in zip(parts.keys, parts.values, strict=True):
        yield from _nodes(value, join(path, key), (*keys, str(key)))


def _mapped(node: Any, path: str | None, notes: Notes) -> Any:
    """The tree with text for keys, and arrays in the dtypes that they had."""
    if isinstance(node, np.ndarray):
        return np.asarray(notes.array(node, path or ""))
    parts = children(node)
    if parts is None:
        return node
    values = [_mapped(value, join(path, key), notes) for key, value in zip(parts.keys, parts.values, strict=True)]
    if isinstance(node, dict):
        return dict(zip(map(str, parts.keys), values, strict=True))
    return parts.plain(values)
