"""TricompReader: torch's StorageReader for checkpoints of a TricompWriter, onto however many ranks.

A stored shard is decoded once, and the parts of it that are wanted are copied from there. The hard thing is what is
told: torch reads the index where it swallows errors, and whoever looks for a lost file wants to know whose it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

import tricomp
from tricomp import codec, tree
from tricomp.errors import CorruptFile, InvalidArgument, TricompError
from tricomp.layout import DeviceArray
from tricomp_torch.dcp import index as indices
from tricomp_torch.dcp.chains import Access, open_chained, share_of_cores
from tricomp_torch.dcp.index import Index, keys_of, path_of
from tricomp_torch.dcp.planners import TricompLoadPlanner
from tricomp_torch.files import load_leaves, notes_of
from tricomp_torch.tensors import dtype_named, from_device_array, view_as_tensor
from tricomp_torch.trees import Flat, unflatten

_BATCH_BYTES = 256 << 20  # of shards that are decoded at a time
_CARRIERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TricompReader(StorageReader):
    """Loads what a TricompWriter saved, for torch.distributed.checkpoint or load here.

    path: the checkpoint's folder or URL; checkpoint_id of a load replaces it. allow_cast: let a tensor of the state be
    of another dtype than was saved, as torch does; else that is an error. threads: None: this rank's share of the
    cores. backend: see tricomp.open. storage_options: for fsspec.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        allow_cast: bool = False,
        threads: int | None = None,
        backend: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        codec.Engine(threads, backend)  # checks both
        self.checkpoint_id = None if path is None else indices.absolute(path)
        self._access = Access(storage_options, threads or share_of_cores(), backend)
        self._allow_cast = allow_cast
        self._index: Index | None = None
        self._error: TricompError | None = None
        self.is_error_kept = False  # read_metadata then lets set_up_storage_reader raise, where torch tells all ranks

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path or a URL."""
        return isinstance(checkpoint_id, str | os.PathLike) and bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A load begins. checkpoint_id: its folder, if it is another one than before."""
        self._index = self._error = None
        if checkpoint_id is not None:
            self.checkpoint_id = indices.absolute(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, in torch's words. Raises MissingFile, CorruptFile, InvalidArgument."""
        try:
            if self.checkpoint_id is None:
                raise InvalidArgument("TricompReader: there is nothing to load. Give it a path, or checkpoint_id=.")
            self._index = indices.read(self.checkpoint_id, self._access.options)
            return _metadata(self._index)
        except TricompError as error:
            if not self.is_error_kept:
                raise
            self._error = error
            return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises what read_metadata met with."""
        if self._error is not None:
            raise self._error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of the planner's state, and put its values in place.

        Raises InvalidArgument before anything is changed if dtypes differ; MissingFile, MissingParent, CorruptFile,
        CorruptFrame naming file and entry.
        """
        assert self._index is not None
        tensors: dict[int, dict[str, list[tuple[ReadItem, torch.Tensor]]]] = {}
        values: dict[int, list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                if not isinstance(planner, TricompLoadPlanner):
                    raise InvalidArgument(
                        f"{item.dest_index.fqn!r}: is no tensor, and a {type(planner).__name__} would unpickle it. "
                        "Derive your planner from tricomp_torch.dcp.TricompLoadPlanner."
                    )
                values.setdefault(self._index.values[item.storage_index.fqn], []).append(item)
                continue
            path, number = self._home(item)
            target = planner.resolve_tensor(item).detach()
            self._require_dtype(item, target)
            tensors.setdefault(number, {}).setdefault(path, []).append((item, target))
        for number in sorted({*tensors, *values}):
            items = [item for wanted in tensors.get(number, {}).values() for item, _ in wanted]
            with self._open(number, [*items, *values.get(number, [])]) as file:
                for path, leaf in _decoded(file, tensors.get(number, {})):
                    for item, target in tensors[number][path]:
                        _copy(target, _part(leaf, item))
                        planner.commit_tensor(item, target)
                for item, value in _values(file, values.get(number, [])):
                    planner.load_value(item, value)  # type: ignore[attr-defined]
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _home(self, item: ReadItem) -> tuple[str, int]:
        """Path of the leaf that an item reads, and the number of its file."""
        assert self._index is not None
        fqn, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        stored = self._index.tensors[fqn]
        hint = item.storage_index.index
        at_hint = [stored.chunks[hint]] if hint is not None and 0 <= hint < len(stored.chunks) else []
        chunk = next(chunk for chunk in (*at_hint, *stored.chunks) if chunk.offsets == offset)
        return path_of(keys_of(fqn, chunk.offsets, chunk.sizes, stored.size)), chunk.file

    def _require_dtype(self, item: ReadItem, target: torch.Tensor) -> None:
        assert self._index is not None
        fqn = item.storage_index.fqn
        saved = dtype_named(self._index.tensors[fqn].dtype, fqn)
        if target.dtype != saved and not self._allow_cast:
            raise InvalidArgument(
                f"{item.dest_index.fqn!r}: was saved as {saved}, the state has {target.dtype}; nothing was loaded. "
                "Load into the dtype that was saved, or pass storage_reader=TricompReader(path, allow_cast=True)."
            )

    def _open(self, number: int, items: Sequence[ReadItem]) -> tricomp.File:
        assert self._index is not None
        assert self.checkpoint_id is not None
        try:
            return open_chained(self.checkpoint_id, self._index.files[number], self._access)
        except TricompError as error:
            raise type(error)(f"{items[0].storage_index.fqn!r}: {error}") from error


def _metadata(index: Index) -> Metadata:
    entries: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in index.values}
    for fqn, stored in index.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks]
        properties = TensorProperties(dtype=dtype_named(stored.dtype, fqn))
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(stored.size), chunks)
    return Metadata(entries, planner_data=dict(index.paths))


def _decoded(
    file: tricomp.File, wanted: Mapping[str, Sequence[tuple[ReadItem, torch.Tensor]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and tensor of each wanted leaf, decoded in batches, where the first tensor that takes from it lives."""
    batches: dict[torch.device, list[list[str]]] = {}
    n_bytes: dict[torch.device, int] = {}
    for path, parts in wanted.items():
        device = parts[0][1].device
        if not batches.get(device) or n_bytes[device] + file.leaf(path).n_bytes > _BATCH_BYTES:
            batches.setdefault(device, []).append([])
            n_bytes[device] = 0
        batches[device][-1].append(path)
        n_bytes[device] += file.leaf(path).n_bytes
    for device, mine in batches.items():
        for batch in mine:
            for path, leaf in load_leaves(file, batch, device).items():
                is_far = isinstance(leaf, DeviceArray)
                yield path, from_device_array(leaf, path) if is_far else view_as_tensor(leaf, path)


def _part(leaf: torch.Tensor, item: ReadItem) -> torch.Tensor:
    for axis, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        leaf = leaf.narrow(axis, begin, length)
    return leaf


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bits where dtypes are the same: not all have a copy of their own for every stride."""
    if target.dtype == source.dtype and not target.is_complex():
        carrier = _CARRIERS[target.element_size()]
        target, source = target.view(carrier), source.view(carrier)
    target.copy_(source)


def _values(file: tricomp.File, items: Sequence[ReadItem]) -> Iterator[tuple[ReadItem, Any]]:
    """Each value that is no tensor, as it was saved."""
    if not items:
        return
    fqns = {item.storage_index.fqn for item in items}
    names = {tree.join(None, fqn) for fqn in fqns}
    paths = [path for path in file if path.partition("/")[0] in names]
    arrays = file.load(paths) if paths else {}
    saved = tree.unflatten(file.structure, [arrays.get(path) for path in file], what=f"{file.name}: tree")
    missing = [fqn for fqn in fqns if not isinstance(saved, dict) or fqn not in saved]
    if missing:
        raise CorruptFile(f"{file.name}: holds no {missing[0]!r}, though the index says so. Load another step.")
    found = unflatten(Flat({fqn: saved[fqn] for fqn in fqns}, notes_of(file.metadata)))
    for item in items:
        yield item, found[item.storage_index.fqn]
