"""save, load and async_save: torch.distributed.checkpoint's own, with our writer, reader and planners.

Arguments are named as torch names them. The hard thing is what a rank is told when another one fails: torch wraps it
into an exception that catches as no Exception; here every rank raises the error itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from tricomp.errors import InvalidArgument, TricompError
from tricomp_torch.dcp.planners import TricompLoadPlanner, TricompSavePlanner
from tricomp_torch.dcp.reader import TricompReader
from tricomp_torch.dcp.writer import TricompWriter

Path = str | os.PathLike[str]
_Result = TypeVar("_Result")


def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Path | None = None,
    storage_writer: TricompWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    **options: Any,
) -> Metadata:
    """Save a state on all ranks; when this returns it is durable. Call it on every rank of the group.

    state_dict: nested dicts and lists of tensors, DTensors, plain values and objects with state_dict. checkpoint_id:
    the folder. storage_writer: one to use again, which then codes each checkpoint against the one before; without it,
    options are those of a TricompWriter: reference, keyframe, spec, threads and so on.

    Whatever fails on any rank is raised on all; what was saved before stays. Raises UnsupportedNode and
    UnsupportedDtype, naming the entry; StorageError; MissingFile, CorruptFile if a given reference cannot be read.
    """
    writer = _writer(storage_writer, options)
    saved: Metadata = _told(
        lambda: state_dict_saver.save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=writer,
            planner=planner or TricompSavePlanner(),
            process_group=process_group,
            no_dist=no_dist,
        )
    )
    return saved


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Path | None = None,
    storage_writer: TricompWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    no_dist: bool = False,
    **options: Any,
) -> Future[Metadata]:
    """Save as save does, behind training: returns when the state is copied. The Future is done when all is durable.

    Wait for it before the next save. process_group: None: a gloo group of its own, made at the first call, as training
    goes on talking in the other one; one given here must have a CPU backend, and be used for nothing else meanwhile.
    async_checkpointer_type: PROCESS encodes and writes in a process of its own, to which torch sends the copies through
    shared memory: then give reference=, as what that process learns is not known here. Errors are the Future's.
    """
    is_process = async_checkpointer_type == AsyncCheckpointerType.PROCESS
    if is_process:
        options = {"stage_on": "host", **options} if storage_writer is None else options
    writer = _writer(storage_writer, options)
    told: Future[Metadata] = Future()
    told.set_running_or_notify_cancel()

    def pass_on(done: Future[Metadata]) -> None:
        try:
            told.set_result(_told(done.result))
        except BaseException as error:
            told.set_exception(error)

    saving = state_dict_saver.async_save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=writer,
        planner=planner or TricompSavePlanner(),
        process_group=process_group or _own_group(no_dist),
        async_checkpointer_type=async_checkpointer_type,
        async_stager=writer,
        no_dist=no_dist,
    )
    assert isinstance(saving, Future)
    saving.add_done_callback(pass_on)
    return told


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Path | None = None,
    storage_reader: TricompReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    threads: int | None = None,
    backend: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Load into a state, in place, on all ranks: tensors keep their devices and placements, whatever was saved.

    What the state does not ask for is not read. Raises on all ranks what one met with: MissingLeaf and InvalidArgument
    if the state does not fit, before anything is changed; MissingFile, MissingParent, CorruptFile, CorruptFrame naming
    file and entry: then tensors may hold anything.
    """
    reader = storage_reader or TricompReader(threads=threads, backend=backend, storage_options=storage_options)
    reader.is_error_kept = True
    try:
        _told(
            lambda: state_dict_loader.load(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_reader=reader,
                planner=planner or TricompLoadPlanner(),
                process_group=process_group,
                no_dist=no_dist,
            )
        )
    finally:
        reader.is_error_kept = False


_groups: list[tuple[Any, dist.ProcessGroup]] = []  # of all ranks, and the one beside it for saves behind training


def _own_group(no_dist: bool) -> dist.ProcessGroup | None:
    """A group of all ranks that nothing else talks in. All of them make it at the same call."""
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    if not _groups or _groups[0][0] is not world:
        _groups[:] = [(world, dist.new_group(backend="gloo"))]
    return _groups[0][1]


def _writer(given: TricompWriter | None, options: Mapping[str, Any]) -> TricompWriter:
    if given is None:
        return TricompWriter(**{"reference_in": "store", **options})  # there is no next save
    if options:
        raise InvalidArgument(f"{', '.join(options)}: belong to the storage_writer given. Set them there.")
    return given


def _told(action: Callable[[], _Result]) -> _Result:
    """The result of action. Raises the first of our errors that torch wraps, with the rank that met with it."""
    try:
        return action()
    except CheckpointException as wrapped:
        for rank, (error, _) in sorted(wrapped.failures.items()):
            if isinstance(error, TricompError):
                raise type(error)(f"rank {rank}: {error}") from wrapped
        raise
