"""save and load: torch trees in `.tri` files. Argument order is that of torch.save and torch.load; no pickle, ever."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

import tricomp
from tricomp import notes
from tricomp.errors import BackendError, InvalidArgument
from tricomp_torch.filling import Filling
from tricomp_torch.snapshot import Snapshot
from tricomp_torch.tensors import device_of
from tricomp_torch.trees import NOTES_KEY, Flat, flatten, unflatten, unflatten_leaves

_log = logging.getLogger("tricomp")


def save(
    obj: Any,
    path: str | os.PathLike[str],
    *,
    reference: Any = None,
    spec: tricomp.Spec | None = None,
    metadata: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> tricomp.Report:
    """Write obj, any nesting of dicts, lists and tuples of tensors and plain values, or a snapshot of it, to path.

    Tensors on a GPU are compressed there, where Triton can, and only compressed bytes leave it.

    reference: a path, an open `tricomp.File` or a torch tree that the reader will also have; the file then holds the
    difference. Entries that are the same tensor (tied weights) are noted, and `load` ties them again. Views that only
    overlap are stored separately. requires_grad and devices are not stored. threads, backend: see tricomp.open.

    Raises UnsupportedNode and UnsupportedDtype, naming the entry; StorageError.

    >>> tricomp_torch.save({"model": model.state_dict(), "step": 7}, "step7.tri")  # doctest: +SKIP
    """
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise InvalidArgument(f"save: expected a path, as in tricomp_torch.save(obj, path), got a {kind}.")
    flat = obj.flat if isinstance(obj, Snapshot) else flatten(obj)
    with obj.saving() if isinstance(obj, Snapshot) else nullcontext() as first:
        return tricomp.save(
            os.fspath(path),
            flat.tree,
            reference=plain_reference(reference),
            spec=spec,
            metadata=with_notes(metadata, flat.notes),
            threads=threads,
            backend=backend,
            first=first,
        )


def load(
    path: str | os.PathLike[str],
    *,
    reference: Any = None,
    map_location: str | torch.device | None = None,
    leaves: Sequence[str] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Read back what `save` wrote; also any other `.tri` file whose dtypes torch has.

    reference: what `save` was given. map_location: the device of all tensors, the CPU if None (a file keeps no
    devices); for a GPU they are decoded there, where Triton can. leaves: entry paths or patterns such as "model/h.0.*";
    then only those are read, and the result is a dict of path to tensor. threads, backend: see tricomp.open.

    Raises CorruptFile, CorruptFrame, WrongReference, MissingLeaf, UnsupportedVersion, UnsupportedDtype.
    """
    device = device_of(map_location)
    with tricomp.open(os.fspath(path), reference=plain_reference(reference), threads=threads, backend=backend) as file:
        own = notes_of(file.metadata)
        if device is None or device.type == "cpu":
            return Filling(file, own).load(None if leaves is None else file.select(leaves))
        found = load_leaves(file, leaves, device)
        if leaves is None:
            return unflatten(Flat(found, own), device)
        return unflatten_leaves(found, own, device)


def load_leaves(file: tricomp.File, leaves: Sequence[str] | None, device: torch.device | None) -> Any:
    """What file.load gives, decoded on the device if kernels run there: then leaves are DeviceArrays."""
    if device is None or device.type != "cuda":
        return file.load(leaves)
    try:
        return file.load_to(device, leaves)
    except BackendError as error:
        _log.warning("decoding on the host, and copying to %s: %s", device, error)
        return file.load(leaves)


def with_notes(metadata: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """The user's metadata with our notes beside it. Raises InvalidArgument if it uses the notes' key."""
    return notes.with_notes(metadata, own, NOTES_KEY)


def notes_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our notes in a file's metadata, empty for files that another program wrote."""
    return notes.notes_of(metadata, NOTES_KEY)


def plain_reference(reference: Any) -> Any:
    """What the core takes as a reference: paths and open files as they are, torch trees flattened."""
    if reference is None or isinstance(reference, str | os.PathLike | tricomp.File):
        return reference
    return reference.flat.tree if isinstance(reference, Snapshot) else flatten(reference).tree
