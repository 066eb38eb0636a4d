"""TricompWriter: torch's StorageWriter and AsyncStager in one. A rank writes a `.tri` file, the coordinator the index.

The hard thing is that all ranks must agree on what to code against, though finish() runs on one of them only. So the
coordinator alone remembers the last checkpoint that was finished, and tells the ranks with the plan; each then looks
into that checkpoint for itself, and codes without it what it does not find there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

import tricomp
from tricomp import codec, storage
from tricomp.background import let_go_on
from tricomp.checkpoint import put
from tricomp.codec.accelerator import host_copy
from tricomp.content import Content, content_of
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    LimitExceeded,
    MissingFile,
    StorageError,
    TricompError,
    UnsupportedVersion,
    WrongReference,
)
from tricomp.host_memory import HostBuffer
from tricomp.layout import Snapshot
from tricomp.plan import check_spec
from tricomp_torch.dcp import index as indices
from tricomp_torch.dcp.chains import Access, share_of_cores
from tricomp_torch.dcp.index import Chunk, Index, StoredFile, StoredTensor, keys_of, path_of
from tricomp_torch.dcp.planners import TricompSavePlanner, flat_values
from tricomp_torch.dcp.references import Base, Order, find_base
from tricomp_torch.dcp.staging import stage
from tricomp_torch.files import with_notes
from tricomp_torch.tensors import dtype_name, to_leaf

_log = logging.getLogger("tricomp")
_MOST_BUFFERS = 3  # the copies of a save, those held from the one before, and what an error may still hold
_BROKEN = (CorruptFile, CorruptFrame, LimitExceeded, MissingFile, UnsupportedVersion, WrongReference)


class TricompWriter(StorageWriter, AsyncStager):
    """Saves distributed checkpoints as `.tri` files, for torch.distributed.checkpoint or save and async_save here.

    path: the checkpoint's folder (or a URL that fsspec knows; storage_options go to fsspec); checkpoint_id of a save
    replaces it. Nothing is seen of a checkpoint before all of it is on disk; one that is there is replaced as a whole.

    reference: the folder of an earlier checkpoint to code the first save against, such as the one that was loaded; it
    stands alone if None. Later ones are coded against the last that this writer finished, in this process. A shard that
    is there with the same name, place, size and dtype becomes a delta, all others stand alone.

    keyframe: how often a checkpoint stands alone. spec: how to code, see tricomp.Spec; leaves go by torch's names, and
    parts have their ranges behind: "*.exp_avg" and "*.exp_avg/*" are all first moments. stage_on: where `stage` copies
    to: "device", where the tensors are, or "host". reference_in: keep what was saved last in "host" memory for the next
    save to be coded against, or decode it from the "store". threads: None: this rank's share of the cores. backend: see
    tricomp.open.

    One save at a time. What a checkpoint is coded against is needed to load it, and must not be removed or replaced
    before: `chain` tells what that is, and `rebase` lets a checkpoint stand alone. What a save that failed leaves has
    no index, and can be removed.

    >>> writer = tricomp_torch.dcp.TricompWriter()  # doctest: +SKIP
    >>> tricomp_torch.dcp.save(state, checkpoint_id=f"runs/a/{step}", storage_writer=writer)  # doctest: +SKIP
    """

    _synchronize_after_execute = False

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        reference: str | os.PathLike[str] | None = None,
        keyframe: tricomp.KeyframeEvery = tricomp.KeyframeEvery(10),  # noqa: B008 - it is frozen
        spec: tricomp.Spec | None = None,
        stage_on: Literal["device", "host"] = "device",
        reference_in: Literal["host", "store"] = "host",
        threads: int | None = None,
        backend: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_spec(spec)
        codec.Engine(threads, backend)  # checks both
        if not isinstance(keyframe, tricomp.KeyframeEvery):
            raise InvalidArgument(f"TricompWriter: keyframe: expected a tricomp.KeyframeEvery, got {keyframe!r}.")
        if stage_on not in ("device", "host"):
            raise InvalidArgument(f"TricompWriter: stage_on is 'device' or 'host', not {stage_on!r}.")
        if reference_in not in ("host", "store"):
            raise InvalidArgument(f"TricompWriter: reference_in is 'host' or 'store', not {reference_in!r}.")
        self.checkpoint_id = None if path is None else indices.absolute(path)
        self._reference = None if reference is None else indices.absolute(reference)
        self._keyframe, self._spec, self._stage_on = keyframe, spec, stage_on
        self._access = Access(storage_options, threads or share_of_cores(), backend)
        self._reference_in = reference_in
        self._last: str | None = None
        self._save_id = ""
        self._stage_error: Exception | None = None
        self._is_staged = False
        self._held: Content | None = None
        self._buffers: list[HostBuffer] = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path or a URL."""
        return isinstance(checkpoint_id, str | os.PathLike) and bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A save begins. checkpoint_id: its folder, if it is another one than before."""
        if self._is_staged:
            self._is_staged = False
            let_go_on()
        if checkpoint_id is not None:
            self.checkpoint_id = indices.absolute(checkpoint_id)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with copies of all tensors. What fails here is raised when all ranks can be told, by the save."""
        self._stage_error, self._is_staged = None, True
        try:
            staged: dict[str, Any] = stage(state_dict, self._stage_on == "host", self._free_buffer())
        except Exception as error:
            self._stage_error = error  # the other ranks would wait for this one
            return {}
        return staged

    def _free_buffer(self) -> HostBuffer:
        """Memory for copies: that of an earlier save, unless somebody still holds some of it."""
        found = next((buffer for buffer in self._buffers if buffer.is_free), None)
        if found is None:
            found = HostBuffer()
            self._buffers = [*self._buffers, found][-_MOST_BUFFERS:]
        return found

    def synchronize_staging(self) -> None:
        """Nothing: `stage` returns when all is copied."""

    def close(self) -> None:
        """Free what is held for the next save."""
        self._held = None
        self._buffers = []

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs of a writer, where torch makes one of it for a save and then drops it."""
        return {**vars(self), "_held": None, "_buffers": [], "_reference_in": "store"}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises InvalidArgument where there is nowhere to save to, and what `stage` met with."""
        if self._stage_error is not None:
            error, self._stage_error = self._stage_error, None
            raise error
        if self.checkpoint_id is None:
            raise InvalidArgument("TricompWriter: there is no folder to save to. Give it a path, or checkpoint_id=.")
        if not kwargs.get("use_collectives", True):
            raise InvalidArgument("TricompWriter: use_collectives=False: ranks must agree on one index. Leave it out.")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells each rank the name of its file, and what to code against. Raises MissingFile, CorruptFile for an
        explicit reference that cannot be read."""
        self._save_id = os.urandom(16).hex()
        reference, reference_id = self._chosen()
        return [
            replace(plan, storage_data=Order(f"rank_{rank:05}-{self._save_id[:8]}.tri", reference, reference_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; durable when this returns. Raises UnsupportedNode, UnsupportedDtype, StorageError."""
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index: from now on the checkpoint is there. Then remove files of one that it replaces."""
        assert self.checkpoint_id is not None
        index = _index_of(self._save_id, metadata, results)
        where = storage.at(self.checkpoint_id, self._access.options_for(self.checkpoint_id))
        where.put(indices.INDEX_NAME, [indices.pack(index)])
        self._last, self._reference = self.checkpoint_id, None
        try:
            for name in where.list():
                if indices.FILE_NAME.fullmatch(name) and index.file(name) is None:
                    where.delete(name)
        except StorageError as error:
            _log.warning("%s is saved, but files of an earlier save could not be removed: %s", self._last, error)

    def _chosen(self) -> tuple[str | None, str]:
        """The checkpoint to code against, and its id; None, "" for a keyframe."""
        reference = self._reference or self._last
        if reference is None:
            return None, ""
        if reference == self.checkpoint_id:
            if self._reference is None:
                return None, ""
            raise InvalidArgument(f"{reference}: would replace its own reference. Save to another folder.")
        try:
            index = indices.read_files(reference, self._access.options_for(reference))
        except TricompError as error:
            if self._reference is not None:
                raise
            _log.warning("%s stands alone: what was saved before it cannot be read: %s", self.checkpoint_id, error)
            return None, ""
        return (None, "") if index.since_keyframe + 1 >= self._keyframe.n else (reference, index.id)

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        assert self.checkpoint_id is not None
        order = plan.storage_data
        assert isinstance(order, Order)
        content, notes = _content(plan.items, planner)
        where = storage.at(self.checkpoint_id, self._access.options_for(self.checkpoint_id))
        base = find_base(content, order, self.checkpoint_id, self._access, self._held)
        try:
            written = self._put(where, order.name, content, base, notes)
        except _BROKEN as error:
            if base is None:
                raise
            _log.warning("%s/%s stands alone: its reference is damaged: %s", self.checkpoint_id, order.name, error)
            written = self._put(where, order.name, content, None, notes)
        finally:
            if base is not None:
                base.file.close()
        return [WriteResult(item.index, _n_bytes(item), written) for item in plan.items]

    def _put(self, where: Any, name: str, content: Content, base: Base | None, notes: dict[str, Any]) -> StoredFile:
        engine = codec.Engine(self._access.threads, self._access.backend)
        words, parent, since_keyframe = None, None, 0
        if base is not None:
            words, parent, since_keyframe = base.words, base.parent, base.file.since_keyframe + 1
        report = put(where, name, content, words, self._spec, notes, since_keyframe, engine)
        self._hold(content, report.content_id)
        return StoredFile(name, report.file_bytes, report.content_id, since_keyframe, parent)

    def _hold(self, content: Content, content_id: str) -> None:
        """Keep what was written for the next save to be coded against: staged copies as they are, else copies."""
        self._held = None
        if self._reference_in == "store" or (self._spec is not None and self._spec.keep_mantissa_bits):
            return
        words = [
            found if any(buffer.holds(found) for buffer in self._buffers) else host_copy(found)
            for found in content.snapshot.buffers
        ]
        self._held = Content(content.structure, Snapshot(content.snapshot.layout, tuple(words)))
        vars(self._held)["content_id"] = content_id  # not told again from the words
        if len(self._buffers) == 1 and words and self._buffers[0].holds(words[0]):  # the next save needs another
            self._free_buffer().reserve_as(self._buffers[0])  # from the system now, while training is not held up


def _content(items: list[WriteItem], planner: SavePlanner) -> tuple[Content, dict[str, Any]]:
    """The tree of a rank's file, and what goes into its metadata. Tensors share memory with the planner's."""
    values: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            values[item.index.fqn] = _value(item, planner)
            continue
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        keys = keys_of(item.index.fqn, chunk.offsets, chunk.sizes, item.tensor_data.size)
        found = planner.resolve_data(item)
        assert isinstance(found, torch.Tensor)
        leaf = to_leaf(found, path_of(keys))
        if len(keys) == 1:
            tensors[keys[0]] = leaf
        else:
            tensors.setdefault(keys[0], {})[keys[1]] = leaf
    flat = flat_values(values)
    return content_of({**tensors, **flat.tree}), with_notes(None, flat.notes)


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    if isinstance(planner, TricompSavePlanner):
        return planner.value(item.index)
    if type(planner) is DefaultSavePlanner:  # it pickles when asked for bytes, so it is not asked
        return planner.lookup_object(item.index)
    raise InvalidArgument(
        f"{item.index.fqn!r}: is no tensor, and a {type(planner).__name__} would pickle it. Derive your planner from "
        "tricomp_torch.dcp.TricompSavePlanner."
    )


def _n_bytes(item: WriteItem) -> int:
    return item.tensor_storage_size() or 0 if item.tensor_data is not None else 0


def _index_of(id: str, metadata: Metadata, results: list[list[WriteResult]]) -> Index:
    numbers: dict[StoredFile, int] = {}
    homes: dict[MetadataIndex, int] = {}
    for result in (result for rank in results for result in rank):
        homes[result.index] = numbers.setdefault(result.storage_data, len(numbers))
    tensors: dict[str, StoredTensor] = {}
    values: dict[str, int] = {}
    for fqn, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            chunks = [
                Chunk(tuple(chunk.offsets), tuple(chunk.sizes), homes[MetadataIndex(fqn, chunk.offsets)])
                for chunk in stored.chunks
            ]
            tensors[fqn] = StoredTensor(dtype_name(stored.properties.dtype, fqn), tuple(stored.size), tuple(chunks))
        else:
            values[fqn] = homes[MetadataIndex(fqn)]
    return Index(id, tuple(numbers), tensors, values, metadata.planner_data or {})
