"""Leaves of a file decoded straight to the memory of tensors, new ones or such as are there. Knows no objects.

The hard thing is memory: a state is there once, in its tensors. So what a tree will look like is told from the file's
header, of tensors without data; then leaves are decoded, batch by batch, to where they are to be; and only then is the
tree made. Notes come back from a file and are judged by trees and ties, as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import tricomp
from tricomp import tree
from tricomp.errors import BackendError
from tricomp.layout import DeviceArray
from tricomp_torch.tensors import Array, Leaf, dtype_named, is_on_host, to_leaf, to_tensor, view_as_tensor
from tricomp_torch.ties import TieMaker
from tricomp_torch.trees import Flat, table, unflatten, unflatten_leaves

_log = logging.getLogger("tricomp")
Target = torch.Tensor | Array
_HOST, _META = torch.device("cpu"), torch.device("meta")


class Filling:
    """An open file and its notes: the tree that it holds, before its leaves are decoded and after."""

    def __init__(self, file: tricomp.File, notes: Mapping[str, Any]) -> None:
        """Raises CorruptFile if the notes are damaged."""
        self.file, self.notes = file, notes
        self.ties, self.strides = table(notes, "ties"), table(notes, "strides")
        self._kinds = table(notes, "kinds")
        self._parts = tuple(f"{path}/" if path else "" for path in table(notes, "subclasses"))

    def facts(self, path: str) -> Hashable:
        """What two leaves have in common that hold the same."""
        leaf = self.file.leaf(path)
        return leaf.dtype, leaf.shape, self.file.digest(path)

    def outline(self, known: Mapping[str, Array] | None = None) -> Any:
        """The tree with tensors on the meta device and arrays of zeros in no memory, for all leaves but those known."""
        return self._tree(known or {}, {})

    def new(self, path: str, device: torch.device | None = None) -> Target:
        """Room for a leaf: a tensor, on device (None: the CPU), with the strides it had; or an array, if it was one.

        Raises UnsupportedDtype, and CorruptFile if the strides that are noted do not fit.
        """
        leaf = self.file.leaf(path)
        if self._is_array(path):
            return np.empty(leaf.shape, leaf.dtype.numpy)
        return _Maker(self, {}).tensor(path, DeviceArray(leaf.dtype, leaf.shape, None), device or _HOST)

    def tree(self, targets: Mapping[str, Target]) -> Any:
        """The tree of what was filled; leaves that are not among the targets, nor tied to one, are as in outline."""
        return self._tree({path: one for path, one in targets.items() if isinstance(one, np.ndarray)}, targets)

    def load(self, paths: Sequence[str] | None = None) -> Any:
        """The whole tree, on the CPU; or a dict of path to tensor."""
        wanted = list(self.file) if paths is None else list(paths)
        there = set(wanted)
        targets = {path: self.new(path) for path in wanted if self.ties.get(path) not in there}
        fill(self.file, targets)
        if paths is None:
            return self.tree(targets)
        leaves = {path: self._leaf(path, targets) for path in wanted}
        return unflatten_leaves(leaves, self.notes, None, _Maker(self, targets))

    def blank_device(self, path: str) -> torch.device:
        """Where a tensor without data is: a subclass may refuse to be made of tensors on the meta device."""
        return _HOST if path.startswith(self._parts) else _META

    def _tree(self, arrays: Mapping[str, Array], targets: Mapping[str, Target]) -> Any:
        leaves = [self._leaf(path, arrays) for path in self.file]
        plain = tree.unflatten(self.file.structure, leaves, what=f"{self.file.name}: tree")
        return unflatten(Flat(plain, dict(self.notes)), None, _Maker(self, targets).tensor)

    def _leaf(self, path: str, arrays: Mapping[str, Target]) -> Leaf:
        """The array of a leaf, if it is there, else what stands for it while the tree is made."""
        found, leaf = arrays.get(path), self.file.leaf(path)
        if isinstance(found, np.ndarray):
            return found
        if self._is_array(path):
            return np.broadcast_to(np.zeros((), leaf.dtype.numpy), leaf.shape)
        return DeviceArray(leaf.dtype, leaf.shape, None)

    def _is_array(self, path: str) -> bool:
        return self._kinds.get(path) in ("ndarray", "generic")


class _Maker(TieMaker):
    """Hands out the tensors that are there, and ties others to them; what is left has no data."""

    def __init__(self, filling: Filling, targets: Mapping[str, Target]) -> None:
        super().__init__(filling.ties, filling.strides)
        self._filling, self._targets = filling, targets

    def tensor(self, path: str, array: Leaf, device: torch.device | None) -> torch.Tensor:
        """The target of a path, also of one that is noted as tied; else what TieMaker gives."""
        target = self._targets.get(path)
        if isinstance(target, torch.Tensor) and path in self._ties:
            return target
        return super().tensor(path, array, device)

    def make(self, path: str, array: Leaf, device: torch.device | None, strides: Sequence[int] | None) -> torch.Tensor:
        target = self._targets.get(path)
        if isinstance(target, torch.Tensor):
            return target
        if isinstance(array, np.ndarray):
            return to_tensor(array, path, device, strides)
        where, dtype = device or self._filling.blank_device(path), dtype_named(array.dtype.name, path)
        if strides is None:
            return torch.empty(array.shape, dtype=dtype, device=where)
        return torch.empty_strided(array.shape, tuple(strides), dtype=dtype, device=where)

    def is_tied(self, first: str, held: Leaf, path: str, array: Leaf) -> bool:
        return self._filling.facts(first) == self._filling.facts(path)


def fill(file: tricomp.File, targets: Mapping[str, Target]) -> None:
    """Decode leaves, by path, into tensors and arrays of their dtypes and shapes, wherever these are.

    In memory for a few batches, see tricomp.File.load_into, and raises what that raises: then targets may hold
    anything.
    """
    here: dict[str, Leaf] = {}
    there: dict[str, Leaf] = {}
    rest: dict[str, torch.Tensor] = {}
    for path, target in targets.items():
        if isinstance(target, np.ndarray):
            here[path] = target
        elif not target.is_contiguous() or target.is_conj() or target.is_neg():
            rest[path] = target
        elif is_on_host(target):
            here[path] = to_leaf(target, path)
        elif target.device.type == "cuda":
            there[path] = to_leaf(target, path)
        else:
            rest[path] = target
    file.load_into(here)
    try:
        file.load_into(there)
    except BackendError as error:
        _log.warning("decoding on the host, and copying to the GPU: %s", error)
        rest |= {path: target for path in there if isinstance(target := targets[path], torch.Tensor)}
    with torch.no_grad():
        for path, array in file.stream(rest):
            rest[path].copy_(view_as_tensor(array, path))
