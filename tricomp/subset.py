"""Some leaves of an open file, as a file of these alone: what writers of other formats take.

The hard thing: a model's leaves within a checkpoint should come out under the names that the model gave them, so the
keys that all chosen leaves share are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tricomp import tree
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument, MissingLeaf
from tricomp.file import Array, File
from tricomp.layout import Leaf
from tricomp.plan import Plan
from tricomp.reuse import Reuse

_KEPT = ("safetensors",)  # metadata that tells nothing of paths
_NOTES = "tricomp_jax"  # tables of what leaves were, by path


class Subset(File):
    """Leaves of an open File, in dicts of their keys, whatever they stood in; plain values are left out.

    It is the File's owner who closes it.
    """

    def __init__(self, file: File, paths: Sequence[str]) -> None:
        """paths: of leaves of file. Raises InvalidArgument if there are none, MissingLeaf."""
        if not paths:
            raise InvalidArgument(f"{file.name}: no leaves were chosen.")
        self.name = file.name
        self._file = file
        keys = [path.split("/") for path in paths]
        n_shared = 0
        while all(len(parts) > n_shared + 1 and parts[n_shared] == keys[0][n_shared] for parts in keys):
            n_shared += 1
        nested: dict[str, Any] = {}
        for parts in keys:
            node = nested
            for key in parts[n_shared:-1]:
                node = node.setdefault(tree.key_of(key), {})
            node[tree.key_of(parts[-1])] = np.empty(0)
        self._structure, own, _ = tree.flatten(nested)
        known = {"/".join(parts[n_shared:]): path for parts, path in zip(keys, paths)}
        self._paths = {path: known[path] for path in own}
        self._leaves = {path: Leaf(path, leaf.dtype, leaf.shape) for path in own if (leaf := file.leaf(known[path]))}

    @property
    def structure(self) -> bytes:
        return self._structure

    @property
    def metadata(self) -> dict[str, Any]:
        metadata = self._file.metadata
        found = {key: value for key, value in metadata.items() if key in _KEPT}
        tables = metadata.get(_NOTES)
        if isinstance(tables, dict):
            notes = {name: self._of_leaves(table) for name, table in tables.items() if isinstance(table, dict)}
            found |= {_NOTES: kept} if (kept := {name: table for name, table in notes.items() if table}) else {}
        return found

    def _of_leaves(self, table: dict[str, Any]) -> dict[str, Any]:
        """The entries of a table that are of chosen leaves, by their paths here."""
        return {path: table[known] for path, known in self._paths.items() if known in table}

    @property
    def n_bytes(self) -> int:
        return self._file.n_bytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, path: object) -> bool:
        return path in self._paths

    def __getitem__(self, path: str) -> Array:
        return self._file[self._known(path)]

    def leaf(self, path: str) -> Leaf:
        self._known(path)
        return self._leaves[path]

    def plan(self, path: str) -> Plan:
        return self._file.plan(self._known(path))

    def digest(self, path: str) -> int:
        return self._file.digest(self._known(path))

    def elements(self, path: str, start: int, stop: int, parent: Array | None = None) -> Array:
        return self._file.elements(self._known(path), start, stop, parent)

    def borrowed(self, paths: Sequence[str], room: Reuse) -> dict[str, Array]:
        found = self._file.borrowed([self._known(path) for path in paths], room)
        return {path: found[self._known(path)] for path in paths}

    def pieces(self, path: str, n_elements: int | None = None, room: Reuse | None = None) -> Iterator[Array]:
        return self._file.pieces(self._known(path), n_elements, room)

    def piece_elements(self, path: str, n_elements: int | None = None) -> int:
        return self._file.piece_elements(self._known(path), n_elements)

    def load(self, leaves: Iterable[str] | None = None) -> Any:
        if leaves is None:
            found = self._file.load(self._paths.values())
            return tree.unflatten(self._structure, [found[path] for path in self._paths.values()])
        wanted = list(leaves)
        found = self._file.load([self._known(path) for path in wanted])
        return {path: found[self._known(path)] for path in wanted}

    def content(self) -> Content:
        return content_of(self.load())

    def close(self) -> None:
        """Nothing to let go of."""

    def __repr__(self) -> str:
        return f"<{len(self)} leaves of {self._file!r}>"

    def _known(self, path: str) -> str:
        try:
            return self._paths[path]
        except KeyError:
            raise MissingLeaf(f"{self.name}: no leaf {path!r} was chosen.") from None
