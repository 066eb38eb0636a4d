"""Whose saves the stall benchmark compares: torch.save, safetensors, torch's distributed checkpoints, tricomp.

Imports torch, safetensors and the public names of tricomp_torch. The hard thing is to promise the same: a save is done
when its files are synced to the disk, have their names, and the folder that holds these is synced too. tricomp and
torch's distributed writer sync their files themselves; for the others it is done here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tricomp_torch
from safetensors import safe_open
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from tricomp_torch import dcp

import tricomp
from tests.benchmarks.stall_training import Training

State = dict[str, Any]


class Saver:
    """One way to save. folder: where to, of its own. What begin gives is a Future, or None if the save is done."""

    is_chained = False  # a checkpoint needs others to be read

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int, training: Training) -> Any:
        raise NotImplementedError

    def restore(self, step: int, training: Training) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Free memory, and wait for nothing."""

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step}"


def sync(path: str | os.PathLike[str]) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _durably(path: Path, write: Callable[[Path], None]) -> None:
    """As whoever cares writes one file: under another name, synced, renamed, the folder synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


class TorchSave(Saver):
    def begin(self, step: int, training: Training) -> None:
        _durably(self.at(step), lambda path: torch.save(training.state(), path))

    def restore(self, step: int, training: Training) -> None:
        training.load(torch.load(self.at(step), weights_only=True))


class Safetensors(Saver):
    """The model's tensors and the optimizer's by number and name; what is no tensor goes to the metadata as JSON."""

    def begin(self, step: int, training: Training) -> None:
        state = training.state()
        tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
        for number, entries in state["optimizer"]["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in entries.items()}
        about = {"param_groups": json.dumps(state["optimizer"]["param_groups"])}
        _durably(self.at(step), lambda path: safetensors.torch.save_file(tensors, path, about))

    def restore(self, step: int, training: Training) -> None:
        state: State = {"model": {}, "optimizer": {"state": {}}}
        with safe_open(self.at(step), "pt") as file:
            state["optimizer"]["param_groups"] = json.loads(file.metadata()["param_groups"])
            for key in file.keys():  # noqa: SIM118 - it is no dict
                kind, _, rest = key.partition(".")
                if kind == "model":
                    state["model"][rest] = file.get_tensor(key)
                else:
                    number, _, name = rest.partition(".")
                    state["optimizer"]["state"].setdefault(int(number), {})[name] = file.get_tensor(key)
        training.load(state)


class _Writer(FileSystemWriter):
    """torch's own, which syncs its files; here the folders too."""

    def finish(self, *args: Any, **kwargs: Any) -> None:
        super().finish(*args, **kwargs)
        sync(self.path)
        sync(Path(self.path).parent)


class Distributed(Saver):
    """torch.distributed.checkpoint, of one process. has_kept_memory: copies go to memory of the save before."""

    def __init__(
        self, folder: Path, is_async: bool = False, has_zstd: bool = False, has_kept_memory: bool = False
    ) -> None:
        super().__init__(folder)
        self._is_async = is_async
        self._writer = _Writer(folder, _extensions=[ZStandard()] if has_zstd else None)
        on_host = StagingOptions(False, False, False, False)  # nothing that needs a GPU
        self._stager = DefaultStager(on_host) if has_kept_memory else None

    def begin(self, step: int, training: Training) -> Any:
        if self._is_async:
            return state_dict_saver.async_save(
                training.state(),
                checkpoint_id=self.at(step),
                storage_writer=self._writer,
                async_stager=self._stager,
                async_checkpointer_type=AsyncCheckpointerType.THREAD,
                no_dist=True,
            )
        state_dict_saver.save(training.state(), checkpoint_id=self.at(step), storage_writer=self._writer, no_dist=True)
        return None

    def restore(self, step: int, training: Training) -> None:
        state = training.state()
        state_dict_loader.load(state, checkpoint_id=self.at(step), no_dist=True)
        training.load(state)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class TricompDistributed(Saver):
    """tricomp_torch.dcp, of one process; one writer, which codes each step against the one before."""

    is_chained = True

    def __init__(self, folder: Path, is_async: bool = False) -> None:
        super().__init__(folder)
        self._is_async = is_async
        self._writer = dcp.TricompWriter()

    def begin(self, step: int, training: Training) -> Any:
        save = dcp.async_save if self._is_async else dcp.save
        made: Any = save(training.state(), checkpoint_id=self.at(step), storage_writer=self._writer, no_dist=True)
        return made if self._is_async else None

    def restore(self, step: int, training: Training) -> None:
        state = training.state()
        dcp.load(state, checkpoint_id=self.at(step), no_dist=True)
        training.load(state)

    def close(self) -> None:
        self._writer.close()


class Checkpointed(Saver):
    """tricomp_torch.Checkpointer; options are its own."""

    is_chained = True

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder)
        self._checkpointer = tricomp_torch.Checkpointer(folder, **options)

    def begin(self, step: int, training: Training) -> Any:
        return self._checkpointer.save(step, model=training.model, optimizer=training.optimizer)

    def restore(self, step: int, training: Training) -> None:
        self._checkpointer.restore(step=step, model=training.model, optimizer=training.optimizer)

    def close(self) -> None:
        self._checkpointer.close()


SAVERS: dict[str, Callable[[Path], Saver]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "DCP save": Distributed,
    "DCP save, zstd": lambda folder: Distributed(folder, has_zstd=True),
    "DCP async_save": lambda folder: Distributed(folder, is_async=True),
    "DCP async_save, memory kept": lambda folder: Distributed(folder, is_async=True, has_kept_memory=True),
    "DCP async_save, zstd": lambda folder: Distributed(folder, is_async=True, has_zstd=True),
    "Checkpointer": Checkpointed,
    "Checkpointer, reference in store": lambda folder: Checkpointed(folder, reference_in="store"),
    "Checkpointer, every step alone": lambda folder: Checkpointed(
        folder, reference_in="store", keyframe=tricomp.KeyframeEvery(1)
    ),
    "Checkpointer, fast tier": lambda folder: Checkpointed(folder, spec=tricomp.Spec(tier="fast")),
    "tricomp dcp.save": TricompDistributed,
    "tricomp dcp.async_save": lambda folder: TricompDistributed(folder, is_async=True),
}


def available() -> list[str]:
    """Names of the savers that can be had: zstd in torch's distributed checkpoints needs a package, zstandard."""
    return [who for who in SAVERS if "zstd" not in who or ZStandard.is_available()]


def saver_of(who: str, folder: Path) -> Saver:
    """The saver of that name, in its place in a folder."""
    return SAVERS[who](folder / who.replace(",", "").replace(" ", "-"))
