"""TricompCheckpointIO: where Lightning's Trainer and Fabric hand over a checkpoint and a path, and ask for it again.

The hard thing: it is called from two threads and from signal handlers, and no fault of what saves space (a folder
without hard links, another writer, a chain that cannot be read) may cost a checkpoint: then it stands alone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import tricomp
from tricomp import codec
from tricomp.bucket import Bucket
from tricomp.chain import ReferenceChoice
from tricomp.checkpoint import put
from tricomp.content import content_of
from tricomp.errors import InvalidArgument, StorageError, TricompError, UnsupportedDtype, UnsupportedNode
from tricomp.folder import Folder
from tricomp_torch.lightning import library
from tricomp_torch.lightning.chains import HIDDEN, Access, place_of
from tricomp_torch.lightning.hidden import Chained, remove
from tricomp_torch.lightning.reading import read
from tricomp_torch.lightning.removals import Removals
from tricomp_torch.lightning.states import advised, packed

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO
else:
    CheckpointIO = library.part("fabric.plugins").CheckpointIO

Path = str | os.PathLike[str]
_log = logging.getLogger("tricomp")


class TricompCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `.tri` files, at the very paths and names that Lightning asks for.

    Give it to `Trainer(plugins=[TricompCheckpointIO()])` or `Fabric(plugins=...)`, alone or inside AsyncCheckpointIO.
    A file is there whole or not at all; no file holds a pickle. Stock checkpoints are loaded too, told apart by their
    first bytes; see `export` for the way back.

    keyframe: None: every checkpoint stands alone, and can be copied anywhere: right unless disk space is short.
    `tricomp.KeyframeEvery(n)`: one in n does, and the others hold what changed since the one before. What they need is
    kept in a folder `.tricomp` beside them until nothing there needs it, so that Lightning may remove, replace and link
    checkpoints as ever; what others remove or rename is noticed with the next save. Copy or move these with their whole
    folder, or take one out with `export`. Where there are no hard links, and at URLs, every checkpoint stands alone.

    Of keyframe: reference: code against the "previous" one (smallest) or the last "keyframe" (loads faster).
    reference_in: "host" keeps a copy of what was saved last in memory; "store" reads it from the disk each time.
    spec: how to encode, see tricomp.Spec. storage_options: for fsspec. threads, backend: see tricomp.open.

    Only rank zero writes: Lightning's strategies see to it. Those for FSDP and model parallelism load by themselves,
    and save sharded checkpoints so: save with `tricomp_torch.dcp` there, and `export` a full one before it is loaded.
    Inside AsyncCheckpointIO take ModelCheckpoint's save_last=True rather than "link": Lightning makes the link before
    the file is there. Random generators are in no checkpoint of Lightning's: see RandomState in `random_state`.
    """

    def __init__(
        self,
        *,
        keyframe: tricomp.KeyframeEvery | None = None,
        reference: ReferenceChoice = "previous",
        reference_in: Literal["host", "store"] = "host",
        spec: tricomp.Spec | None = None,
        storage_options: Mapping[str, Any] | None = None,
        threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        for module in library.loaded("fabric.plugins"):  # the Trainer's may be another copy than ours
            if not issubclass(type(self), module.CheckpointIO):
                module.CheckpointIO.register(type(self))
        self._has_deltas, self._keyframe = keyframe is not None, keyframe or tricomp.KeyframeEvery(1)
        self._engine, self._spec = codec.Engine(threads, backend), spec
        self._options: dict[str, Any] = {
            "reference": reference, "reference_in": reference_in, "spec": spec, "threads": threads, "backend": backend
        }  # fmt: skip
        Chained(HIDDEN, self._keyframe, **self._options)  # judges them, and makes nothing
        self._access = Access(storage_options, threads, backend)
        self._reset()

    def _reset(self) -> None:
        self._chained: dict[str, Chained] = {}
        self._without_links: set[str] = set()
        self._removals = Removals()
        self._at_work = threading.RLock()  # a signal handler may save while its own thread is saving

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned process needs: nothing of what this one has begun."""
        names = ("_has_deltas", "_keyframe", "_engine", "_spec", "_options", "_access")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint: when this returns it is durable; until then what has that name is as it was.

        path: of a local file, whose folder is made if need be, or a URL. storage_options: for fsspec, in place of the
        plugin's. Raises UnsupportedNode and UnsupportedDtype naming the entry and what to do; StorageError, for a full
        disk say.
        """
        options = self._access.options_for(path) if storage_options is None else storage_options
        where, name = place_of(path, options)
        full = os.path.join(where.url, name)
        with self._at_work:
            is_first = self._removals.begin(full)
            try:
                self._write(where, name, *packed(checkpoint), has_deltas=self._has_deltas and is_first)
                if is_first:
                    self._remove(self._removals.saved())
                    self._prune(where)
            except (UnsupportedNode, UnsupportedDtype) as error:
                raise advised(error, full) from error
            finally:
                if is_first:
                    self._remove(self._removals.end())

    def load_checkpoint(
        self, path: Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at a path or URL, its tensors on the CPU, or on the device that map_location names.

        weights_only: a `.tri` file holds nothing that could run, whatever this says; of a stock checkpoint never
        anything else is loaded. Raises MissingFile, MissingParent, CorruptFile, CorruptFrame, which name another one to
        load; InvalidArgument for a stock checkpoint that needs its pickle run, and for a sharded one.
        """
        checkpoint: dict[str, Any] = read(path, map_location, self._access)
        where, name = place_of(path, self._access.options_for(path))
        if self._has_deltas and isinstance(where, Folder):
            with self._at_work:
                self._chain_of(where.url).continue_from(os.path.join(where.url, name))
        return checkpoint

    def remove_checkpoint(self, path: Path) -> None:
        """Remove a checkpoint; no error if it is gone. What others need of it stays, hidden. Raises StorageError.

        While another is being saved behind training, the last good one stays until that is done.
        """
        where, name = place_of(path, self._access.options_for(path))
        if isinstance(where, Bucket):
            where.delete(name)
            return
        full = os.path.join(where.url, name)
        if not name.startswith(".") and self._removals.waits(full, os.path.lexists(full)):
            return
        remove(full)
        if self._at_work.acquire(blocking=False):  # else the save under way prunes at its end
            try:
                self._prune(where)
            finally:
                self._at_work.release()

    def teardown(self) -> None:
        """Free the memory that is held for the next save. The plugin can be used again."""
        with self._at_work:
            for chained in self._chained.values():
                chained.store.close()

    def _write(
        self, where: Folder | Bucket, name: str, tree: Any, metadata: dict[str, Any], *, has_deltas: bool
    ) -> None:
        """Write a checkpoint against the one before, or so that it stands alone: wherever there is a doubt."""
        has_deltas = has_deltas and not name.startswith(".")  # those are Lightning's own, soon to be removed
        if has_deltas and isinstance(where, Folder) and where.url not in self._without_links:
            try:
                if self._chain_of(where.url).save(name, tree, metadata):
                    return
                self._without_links.add(where.url)
                _log.warning("%s: no hard links there, so every checkpoint stands alone", where.url)
            except InvalidArgument:
                raise
            except TricompError as error:
                _log.warning("%s stands alone: %s", os.path.join(where.url, name), error)
        put(where, name, content_of(tree), spec=self._spec, metadata=metadata, engine=self._engine)

    def _chain_of(self, folder: str) -> Chained:
        if folder not in self._chained:
            self._chained[folder] = Chained(folder, self._keyframe, **self._options)
        return self._chained[folder]

    def _prune(self, where: Folder | Bucket) -> None:
        if isinstance(where, Folder) and os.path.isdir(os.path.join(where.url, HIDDEN)):
            self._chain_of(where.url).prune()

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                remove(path)
            except StorageError as error:
                _log.warning("%s", error)
