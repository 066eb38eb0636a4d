"""Flat dicts of tensors in `.tri` files with the functions and argument order of safetensors. Trees go through files.

What differs from safetensors, and is meant to: tied tensors and tensors of any strides are taken, and come back as they
were. The hard thing: an index means to torch what it means to numpy but for ints beside arrays, see Selection.of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch

import tricomp
from tricomp import numpy as numpy_pair
from tricomp.errors import InvalidArgument, UnsupportedNode
from tricomp.tensors import SafeOpen, arrays_of, require_tensors, require_text
from tricomp_torch.files import notes_of, plain_reference, with_notes
from tricomp_torch.filling import Filling
from tricomp_torch.tensors import PLAIN, Array, to_tensor
from tricomp_torch.trees import flatten, maker_of

Path = str | os.PathLike[str]
Device = str | int | torch.device | None


class TorchSafeOpen(SafeOpen[torch.Tensor]):
    """What safe_open returns: the names of a file's tensors, and tensors when asked for."""

    is_int_first = True

    def __init__(
        self, filename: Path, device: Device = "cpu", reference: Any = None, threads: int | None = None
    ) -> None:
        """See safe_open."""
        self._device = device_of(device)
        super().__init__(filename, plain_reference(reference), threads)

    def made(self, path: str, array: Array) -> torch.Tensor:
        """A tensor on the device."""
        return to_tensor(array, path, self._device)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, with the strides it had. Raises MissingLeaf, CorruptFrame, WrongReference."""
        path = self.path_of(name)
        if self._device is None:
            return self._filled([path])[path]
        return maker_of(notes_of(self.file.metadata)).tensor(path, self.file[path], self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in the order of the file; those that were tied are tied."""
        names = {self.path_of(name): name for name in self.offset_keys()}
        if self._device is None:
            return {names[path]: tensor for path, tensor in self._filled(list(names)).items()}
        maker = maker_of(notes_of(self.file.metadata))
        made: dict[str, torch.Tensor] = {}
        for path, array in arrays_of(self.file, names):
            made[names[path]] = maker.tensor(path, array, self._device)
        return made

    def _filled(self, paths: list[str]) -> dict[str, torch.Tensor]:
        """Tensors by path, decoded to where they are; also of what was an array when it was saved."""
        notes = {name: table for name, table in notes_of(self.file.metadata).items() if name in ("ties", "strides")}
        found: dict[str, torch.Tensor] = Filling(self.file, notes).load(paths)
        return found


def save_file(
    tensors: Mapping[str, torch.Tensor],
    filename: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    reference: Any = None,
    spec: tricomp.Spec | None = None,
    threads: int | None = None,
) -> tricomp.Report:
    """Write a flat dict of tensors to a `.tri` file, atomically.

    metadata: text by text key. reference: a path, an open File or a dict of tensors to code against, needed again to
    load. Tied tensors and any strides are kept; module versions of a state_dict are not, see tricomp_torch.save.
    threads: see tricomp.open.
    Raises UnsupportedNode and UnsupportedDtype (naming the entry), InvalidArgument, StorageError.
    """
    tree = require_tensors(tensors, (torch.Tensor,), "torch.Tensor")
    for name, tensor in tree.items():
        if type(tensor) not in PLAIN:
            kind = type(tensor).__name__
            advice = "Save it with tricomp_torch.save."
            raise UnsupportedNode(f"entry {name!r}: expected a torch.Tensor, got its subclass {kind}. {advice}")
    flat = flatten(tree)
    notes = with_notes(require_text(metadata), flat.notes)
    base = plain_reference(reference)
    return tricomp.save(filename, flat.tree, reference=base, spec=spec, metadata=notes, threads=threads)


def load_file(
    filename: Path, device: Device = "cpu", *, reference: Any = None, threads: int | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a `.tri` file by name, in the order of the file; any `.tri` file whose dtypes torch has.

    device: "cpu", "cuda:0", a number, ... reference: what it was saved against. threads: see tricomp.open. Raises what
    tricomp_torch.load raises.
    """
    with TorchSafeOpen(filename, device, reference, threads) as opened:
        return opened.get_tensors()


@overload
def safe_open(
    filename: Path,
    framework: Literal["pt", "torch", "pytorch"] = "pt",
    device: Device = ...,
    *,
    reference: Any = ...,
    threads: int | None = ...,
) -> TorchSafeOpen: ...
@overload
def safe_open(
    filename: Path,
    framework: Literal["np", "numpy"],
    device: Device = ...,
    *,
    reference: Any = ...,
    threads: int | None = ...,
) -> numpy_pair.NumpySafeOpen: ...
@overload
def safe_open(
    filename: Path, framework: str, device: Device = ..., *, reference: Any = ..., threads: int | None = ...
) -> TorchSafeOpen | numpy_pair.NumpySafeOpen: ...
def safe_open(
    filename: Path,
    framework: str = "pt",
    device: Device = "cpu",
    *,
    reference: Any = None,
    threads: int | None = None,
) -> TorchSafeOpen | numpy_pair.NumpySafeOpen:
    """Open any `.tri` file: keys(), metadata(), get_tensor(name), get_slice(name)[...]; nothing is decoded yet.

    framework: "pt", or "np" for numpy's arrays. device, threads: as in load_file. Raises what tricomp.open raises.

    >>> with tricomp_torch.safe_open("model.tri", "pt", device="cuda:0") as f:  # doctest: +SKIP
    ...     rows = f.get_slice("embed.weight")[1000:2000]
    """
    if framework in ("np", "numpy"):
        base = plain_reference(reference)
        return numpy_pair.safe_open(filename, framework, str(device), reference=base, threads=threads)
    if framework not in ("pt", "torch", "pytorch"):
        raise InvalidArgument(f"safe_open: framework {framework!r} is not 'pt' or 'np'.")
    return TorchSafeOpen(filename, device, reference, threads)


def device_of(device: Device) -> torch.device | None:
    """The device meant, tried out; None: the CPU. Raises InvalidArgument if there is none of that name here."""
    if device is None or device == "cpu":
        return None
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise InvalidArgument(f"device: expected a name or number, got a {type(device).__name__} {device!r:.80}.")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        raise InvalidArgument(f"device {device!r} cannot be used here: {text}") from None
    return found
