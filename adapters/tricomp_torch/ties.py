"""Which entries of a tree are one and the same tensor. Imports torch, numpy and the core's errors.

Two entries are tied when they cover the same memory in the same way: device, address, dtype, shape, strides. The hard
thing: views that only overlap are not ties; each is stored and restored on its own, as are empty tensors, whose
addresses mean nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch

from tricomp.dtypes import to_words
from tricomp.errors import CorruptFile
from tricomp.layout import DeviceArray
from tricomp_torch.tensors import Leaf, fills_memory, from_device_array, to_tensor


class TieFinder:
    """Fed a tree's tensors in order; `ties` then maps each later path of a tie to its first."""

    def __init__(self) -> None:
        self.ties: dict[str, str] = {}
        self._at: dict[int, tuple[str, torch.Tensor]] = {}
        self._first: dict[Hashable, str] = {}

    def add(self, path: str, tensor: torch.Tensor) -> None:
        """Note one tensor."""
        if tensor.numel() == 0:
            return
        other_path, other = self._at.setdefault(tensor.data_ptr(), (path, tensor))
        if other_path == path:  # nearly all are alone at their address, and training waits
            return
        self._first.setdefault(_view(other), other_path)
        first = self._first.setdefault(_view(tensor), path)
        if first != path:
            self.ties[path] = first


def _view(tensor: torch.Tensor) -> Hashable:
    """What two entries share if they are one tensor."""
    how = tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), how


class TieMaker:
    """Makes tensors of arrays so that tied paths share storage, with the strides that are noted for them."""

    def __init__(self, ties: Mapping[str, str], strides: Mapping[str, Sequence[int]]) -> None:
        self._ties, self._strides = ties, strides
        self._firsts = set(ties.values())
        self._made: dict[str, tuple[str, Leaf, torch.Tensor]] = {}

    def tensor(self, path: str, array: Leaf, device: torch.device | None) -> torch.Tensor:
        """The tensor of path, or a view of the tensor it is tied to.

        Raises CorruptFile if the two arrays of a tie differ, or strides do not fit, which no writer of them produces.
        """
        first = self._ties.get(path, path)
        if first in self._made:
            other, held, made = self._made[first]
            if not self.is_tied(other, held, path, array):
                raise CorruptFile(
                    f"leaf {path!r} is noted as tied to {first!r}, but their values differ. "
                    "Read the file with tricomp.load, which does not tie, and save it again."
                )
            return made.detach()
        strides = self._strides.get(path)
        if strides is not None and not (len(strides) == len(array.shape) and fills_memory(array.shape, strides)):
            raise CorruptFile(
                f"leaf {path!r} is noted to have the strides {list(strides)}, which do not fit its shape "
                f"{list(array.shape)}. Read the file with tricomp.load, which does not use them, and save it again."
            )
        made = self.make(path, array, device, strides)
        if first in self._firsts:  # what nothing is tied to need not be kept
            self._made[first] = (path, array, made)
        return made

    def make(self, path: str, array: Leaf, device: torch.device | None, strides: Sequence[int] | None) -> torch.Tensor:
        """The tensor of an array, untied."""
        if isinstance(array, DeviceArray):
            return from_device_array(array, path, strides)
        return to_tensor(array, path, device, strides)

    def is_tied(self, first: str, held: Leaf, path: str, array: Leaf) -> bool:
        """Whether two leaves, paths and arrays, can be one tensor."""
        return is_same(held, array)


def is_same(a: Leaf, b: Leaf) -> bool:
    """Whether two arrays hold the same bits in the same shape."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if isinstance(a, DeviceArray) and isinstance(b, DeviceArray):
        return torch.equal(a.words, b.words)
    return np.array_equal(to_words(a), to_words(b))
