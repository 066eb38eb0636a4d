"""The tensors of a file of integers, decoded to where they are to be. Imports torch, the core and filling.

State dicts name what a file holds as "fc.weight" as `fc.weight.codes` and `fc.weight.scales`, and so do these. The hard
thing: no bytes are copied on the way; codes of 4 bits alone stand one a byte in the file and two a byte in memory.
"""

from __future__ import annotations

import math

import torch

import tricomp
from tricomp import tree
from tricomp.errors import CorruptFile
from tricomp.integers.files import check_parts, names_of
from tricomp.integers.form import CODES, SCALES, Form
from tricomp_torch.filling import Target, fill
from tricomp_torch.integers.weights import IntegerWeight, packed
from tricomp_torch.tensors import dtype_named


class Contents:
    """All that a file holds. tensors: by name. forms, shapes: of names with codes and scales."""

    def __init__(self, file: tricomp.File, device: torch.device) -> None:
        """Raises InvalidArgument for a file of no flat dict, UnsupportedDtype, and what File.load raises."""
        self._file, self._device = file, device
        self.tensors: dict[str, torch.Tensor] = {}
        self.forms: dict[str, Form] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._targets: dict[str, Target] = {}
        for name, form in names_of(file).items():
            if form is None:
                self.tensors[name] = self._room(tree.join(None, name))
            else:
                self._take(name, form)
        fill(file, self._targets)
        self._targets.clear()
        for name, form in self.forms.items():
            if form.bits == 4:
                codes = self.tensors[f"{name}.{CODES}"]
                self.tensors[f"{name}.{CODES}"] = packed(codes.reshape(len(codes), math.prod(codes.shape[1:])))

    def weight(self, name: str, *, is_turned: bool) -> IntegerWeight:
        """That of a name with codes and scales."""
        form, dtype = self.forms[name], dtype_named(self.forms[name].dtype, name)
        tensors = self.tensors[f"{name}.{CODES}"], self.tensors[f"{name}.{SCALES}"]
        return IntegerWeight(*tensors, form.bits, form.group, self.shapes[name], dtype, is_turned=is_turned)

    def tie(self, alias: str, first: str) -> None:
        """Let a name be another's too. Raises CorruptFile if that is not in the file."""
        if first in self.forms:
            self.forms[alias], self.shapes[alias] = self.forms[first], self.shapes[first]
            for part in (CODES, SCALES):
                self.tensors[f"{alias}.{part}"] = self.tensors[f"{first}.{part}"]
        elif isinstance(alias, str) and first in self.tensors:
            self.tensors[alias] = self.tensors[first]
        else:
            raise CorruptFile(
                f"{self._file.name}: {alias!r} is tied to {first!r}, which is not in the file. Fetch it again."
            )

    def _take(self, name: str, form: Form) -> None:
        path = tree.join(None, name)
        codes, scales = self._file.leaf(f"{path}/{CODES}"), self._file.leaf(f"{path}/{SCALES}")
        check_parts(self._file.name, name, form, codes.dtype.name, codes.shape, scales.dtype.name, scales.shape)
        self.forms[name], self.shapes[name] = form, codes.shape
        self.tensors[f"{name}.{CODES}"], self.tensors[f"{name}.{SCALES}"] = map(self._room, (codes.path, scales.path))

    def _room(self, path: str) -> torch.Tensor:
        leaf = self._file.leaf(path)
        room = torch.empty(leaf.shape, dtype=dtype_named(leaf.dtype.name, path), device=self._device)
        self._targets[path] = room
        return room
