"""Checkpoints read: `.tri` files along their chains, and stock ones of torch.save; told apart by their first bytes.

The hard thing: Lightning's own `load_from_checkpoint` asks no plugin but calls torch.load. It takes an open file, so it
is given one in memory, as stock Lightning would have written it.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from tricomp import storage
from tricomp.errors import InvalidArgument, TricompError
from tricomp.folder import Folder
from tricomp.tail import START
from tricomp_torch.files import load_leaves, notes_of
from tricomp_torch.lightning.chains import Access, alternatives, is_local, open_chained, place_of, plain_path
from tricomp_torch.lightning.states import unpacked
from tricomp_torch.pt import FORMAT as STOCK
from tricomp_torch.tensors import device_of

_Module = TypeVar("_Module")
_PIECE_BYTES = 16 << 20


def read(path: str | os.PathLike[str], map_location: Any = None, access: Access | None = None) -> Any:
    """The checkpoint at a path or URL, its tensors on one device: the CPU, unless map_location names another.

    Raises MissingFile, MissingParent, CorruptFile, CorruptFrame, naming what else there can be loaded; InvalidArgument
    for a stock file that needs a pickle to be run, and for a folder.
    """
    path, device, access = plain_path(path), _device(map_location), access or Access()
    try:
        if not _is_tri(path, access):
            return _read_stock(path, device, access)
        with open_chained(path, access) as file:
            return unpacked(load_leaves(file, None, device), notes_of(file.metadata), device)
    except InvalidArgument:
        raise
    except TricompError as error:
        raise type(error)(f"{error} {alternatives(path)}") from error


def load_from_checkpoint(
    kind: type[_Module],
    path: str | os.PathLike[str],
    map_location: Any = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> _Module:
    """What kind.load_from_checkpoint(path, ...) gives, kind being a LightningModule or LightningDataModule.

    Lightning itself reads stock files alone there, whatever plugin the Trainer has. map_location: a device.
    storage_options: for fsspec. options: as Lightning takes them: strict, hparams_file, and what overrides
    hyper-parameters. Takes twice the memory of the checkpoint meanwhile. Raises what
    `TricompCheckpointIO.load_checkpoint` raises.

    >>> model = load_from_checkpoint(MyModule, "runs/a/last.ckpt")  # doctest: +SKIP
    """
    file = _stock_file(read(path, map_location, Access(storage_options)))
    with torch.serialization.safe_globals(_classes_in(file)):
        loaded: _Module = kind.load_from_checkpoint(file, map_location=_device(map_location), **options)  # type: ignore[attr-defined]
    return loaded


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint as stock Lightning does, with torch.save, for who has no tricomp: it needs no other file.

    path, target: paths or URLs. storage_options: for fsspec. Raises what `read` raises; InvalidArgument if target is
    the checkpoint itself; StorageError.
    """
    access = Access(storage_options)
    where, name = place_of(target, access.options_for(target))
    if is_local(path) and isinstance(where, Folder) and _is_same(plain_path(path), os.path.join(where.url, name)):
        raise InvalidArgument(f"{os.fspath(path)}: would replace itself. Export it to another path.")
    where.put(name, [_stock_file(read(path, access=access)).getbuffer()])


def _is_same(path: str, target: str) -> bool:
    return os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target)


def _device(map_location: Any) -> torch.device | None:
    """The device meant by any of torch.load's forms: all stored tensors stand for tensors of the CPU."""
    if callable(map_location):
        moved = map_location(torch.empty(0).untyped_storage(), "cpu")
        return None if moved is None else moved.device
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu")
    return device_of(map_location)


def _is_tri(path: str, access: Access) -> bool:
    """Whether a file begins as ours do. Raises MissingFile, StorageError, and InvalidArgument for a folder."""
    if is_local(path) and os.path.isdir(path):
        raise InvalidArgument(
            f"{path}: is a folder, so a sharded checkpoint that a strategy wrote by itself (FSDP, DeepSpeed). "
            "Load it with that strategy."
        )
    source = storage.source(path, access.options_for(path))
    try:
        return bytes(source.read(0, min(source.n_bytes, 9)))[1:] == START
    finally:
        source.close()


def _read_stock(path: str, device: torch.device | None, access: Access) -> Any:
    """A checkpoint of torch.save, no code in it run."""
    if is_local(path):
        try:
            file = STOCK.read(path)
        except InvalidArgument as error:
            raise type(error)(
                f"{error} If you trust it, read it once without this plugin, with weights_only=False, and give what "
                "comes to TricompCheckpointIO().save_checkpoint."
            ) from error
        try:
            return unpacked(file.tree, notes_of(file.metadata), device)
        finally:
            file.close()
    source = storage.source(path, access.storage_options)
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, os.path.basename(path))
        try:
            with open(name, "wb") as copy:
                for start in range(0, source.n_bytes, _PIECE_BYTES):
                    copy.write(source.read(start, min(_PIECE_BYTES, source.n_bytes - start)))
        finally:
            source.close()
        try:
            return _read_stock(name, device, access)
        except InvalidArgument as error:
            raise type(error)(str(error).replace(name, path)) from error


def _stock_file(checkpoint: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return file


def _classes_in(file: io.BytesIO) -> list[Any]:
    """The classes that a pickle made here asks for, so that torch.load makes them again: those of a `.tri` file's
    notes, numpy's, and those that the caller has registered."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    found: list[Any] = [type(np.dtype(code)) for code in f"?{np.typecodes['AllInteger']}{np.typecodes['AllFloat']}"]
    for full in names:
        module, _, name = full.rpartition(".")
        found.append((getattr(sys.modules[module], name), full))
    return found
