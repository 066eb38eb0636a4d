"""save and load: pytrees in `.tri` files. Argument order is that of tricomp.save; no pickle, ever. Imports no Store.

The hard thing: a target is judged by what the file's header says, so that a wrong one costs and changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import tricomp
from tricomp import notes
from tricomp.errors import BackendError, InvalidArgument
from tricomp.tree import values_of
from tricomp_jax.arrays import CONFIG, Leaf
from tricomp_jax.targets import entries_of, restore
from tricomp_jax.trees import NOTES_KEY, Flat, Notes, flatten, unflatten

_log = logging.getLogger("tricomp")


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    reference: Any = None,
    spec: tricomp.Spec | None = None,
    metadata: Mapping[str, Any] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> tricomp.Report:
    """Write a pytree of arrays and plain values to path: a TrainState, an nnx.State, (params, opt_state), ...

    Returns when the file is on disk. Arrays on a GPU are compressed there, where Triton can, and only compressed bytes
    leave it. An array that is sharded over devices of this process is stored whole.

    reference: a path, an open `tricomp.File` or a pytree that the reader will also have; the file then holds the
    difference. Static fields of dataclasses, shardings and devices are not stored. threads, backend: see tricomp.open.

    Raises UnsupportedNode and UnsupportedDtype, naming the path; StorageError.

    >>> tricomp_jax.save("step7.tri", {"params": params, "opt_state": opt_state, "step": 7})  # doctest: +SKIP
    """
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise InvalidArgument(f"save: expected a path, as in tricomp_jax.save(path, tree), got a {kind}.")
    flat = flatten(tree)
    return tricomp.save(
        os.fspath(path),
        flat.tree,
        reference=plain_reference(reference),
        spec=spec,
        metadata=with_notes(metadata, flat.notes),
        threads=threads,
        backend=backend,
    )


def load(
    path: str | os.PathLike[str],
    target: Any = None,
    *,
    reference: Any = None,
    strict: bool = True,
    leaves: Sequence[str] | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Read back what `save` wrote; also any other `.tri` file, of PyTorch say.

    target, strict: see `unflatten`; only what the target has is read. reference: what `save` was given. leaves: paths
    or patterns such as "params/*"; then only those are read, and the result is a dict of path to array. threads,
    backend: see tricomp.open.

    Raises InvalidArgument listing all that does not fit the target, before anything is decoded; CorruptFile,
    CorruptFrame, WrongReference, MissingLeaf, UnsupportedVersion.
    """
    if target is not None and leaves is not None:
        raise InvalidArgument("load: give target= or leaves=, not both. A target says by itself what is read.")
    with tricomp.open(os.fspath(path), reference=plain_reference(reference), threads=threads, backend=backend) as file:
        return load_from(file, target, strict, leaves)


def load_from(file: tricomp.File, target: Any = None, strict: bool = True, leaves: Sequence[str] | None = None) -> Any:
    """What load gives, of an open file."""
    if target is not None:
        return restore(target, Opened(file), strict)
    own = notes_of(file.metadata)
    if leaves is not None:
        known = Notes(own)
        return {path: known.made(array, path) for path, array in _read(file, leaves, _default_gpu()).items()}
    return unflatten(Flat(_read(file, None, _default_gpu()), own))


class Opened:
    """An open file as the Source of a target: its entries come from the header, and only what is asked for is read."""

    def __init__(self, file: tricomp.File) -> None:
        self.file = file
        self.notes = Notes(notes_of(file.metadata))
        leaves = ((path, file.leaf(path).shape, file.leaf(path).dtype) for path in file)
        self.entries = entries_of(leaves, values_of(file.structure, what=file.name), self.notes)

    def read(self, targets: Mapping[str, Any]) -> dict[str, Leaf]:
        """The arrays at the paths of some targets: decoded on a GPU for those that are to be there."""
        return read_for(self.file, targets)


def read_for(file: tricomp.File, targets: Mapping[str, Any]) -> dict[str, Leaf]:
    """Leaves of a file by path, whole, each decoded where its target is to be."""
    by_gpu: dict[str | None, list[str]] = {}
    for path, target in targets.items():
        by_gpu.setdefault(_gpu_for(target), []).append(path)
    found: dict[str, Leaf] = {}
    for gpu, paths in by_gpu.items():
        found |= _read(file, paths, gpu)
    return found


def _gpu_for(target: Any) -> str | None:
    """The GPU that all of a target is on, by torch's name for it; None for all else."""
    if isinstance(target, jax.ShapeDtypeStruct) and target.sharding is None:
        return _default_gpu()
    devices = getattr(getattr(target, "sharding", None), "device_set", ())
    return _gpu_name(next(iter(devices))) if len(devices) == 1 else None


def _default_gpu() -> str | None:
    device = CONFIG.jax_default_device
    return _gpu_name(device if device is not None and hasattr(device, "platform") else jax.local_devices()[0])


def _gpu_name(device: Any) -> str | None:
    if device.platform not in ("gpu", "cuda", "rocm"):
        return None
    return f"cuda:{device.local_hardware_id}"


def _read(file: tricomp.File, leaves: Sequence[str] | None, gpu: str | None) -> Any:
    """What file.load gives, decoded on a GPU if kernels run there: then leaves are DeviceArrays."""
    if gpu is None:
        return file.load(leaves)
    try:
        return file.load_to(gpu, leaves)
    except (BackendError, InvalidArgument) as error:
        _log.warning("decoding on the host, and copying to the GPU: %s", error)
        return file.load(leaves)


def with_notes(metadata: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """The user's metadata with our notes beside it. Raises InvalidArgument if it uses the notes' key."""
    return notes.with_notes(metadata, own, NOTES_KEY)


def notes_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our notes in a file's metadata, empty for files that another program wrote."""
    return notes.notes_of(metadata, NOTES_KEY)


def plain_reference(reference: Any) -> Any:
    """What the core takes as a reference: paths and open files as they are, pytrees flattened."""
    if reference is None or isinstance(reference, str | os.PathLike | tricomp.File):
        return reference
    return flatten(reference).tree
