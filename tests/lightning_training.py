"""Trainings with Lightning for tests; run as a program: trainings and savers that are killed, each in a fork."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader, TensorDataset
from tricomp_torch.lightning import TricompCheckpointIO
from tricomp_torch.lightning.random_state import RandomState

import tricomp
from tricomp.folder import Folder

N_EPOCHS = 4
N_CRASHES = 16  # instants of a rotation at which a saver is killed
DELTAS = tricomp.KeyframeEvery(4)


class Net(LightningModule):
    """A net with dropout, a buffer and bfloat16 weights, whose losses are kept."""

    def __init__(self, width: int = 61, path: Path = Path("data") / "here") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = torch.nn.Linear(19, width)
        self.layers = torch.nn.Sequential(torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.2), torch.nn.Linear(width, 1))
        self.scale = torch.nn.Parameter(torch.ones(width, dtype=torch.bfloat16))
        self.losses: list[float] = []

    def forward(self, values: torch.Tensor) -> Any:
        return self.layers(torch.relu(self.first(values)) * self.scale)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = ((self(batch[0]) - batch[1]) ** 2).mean()
        self.losses.append(float(loss))
        self.log("loss", loss)
        self.log("odd", torch.tensor(float(torch.initial_seed() % 7 + (3 * len(self.losses)) % 5)))
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("validation", ((self(batch[0]) - batch[1]) ** 2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5)]


def data(shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(157, 19, generator=generator)
    return DataLoader(TensorDataset(values, values[:, :1] * 2 + values[:, 1:2].sin()), 32, shuffle=shuffle)


def trainer(plugin: Any, callbacks: list[Any], n_epochs: int = N_EPOCHS) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = [] if plugin is None else [plugin]
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(
            max_epochs=n_epochs, accelerator="cpu", devices=1, plugins=plugins, callbacks=callbacks,
            enable_checkpointing=checkpoints, num_sanity_val_steps=0, **quiet,
        )  # fmt: skip


def train(
    plugin: Any, callbacks: list[Any], seed: int = 1, n_epochs: int = N_EPOCHS, resume: str | None = None
) -> tuple[Net, Trainer]:
    """A training, from the beginning or from a checkpoint. seed: of all that a checkpoint does not bring back."""
    seed_everything(seed, verbose=False)
    net, run = Net(), trainer(plugin, [*callbacks, RandomState()], n_epochs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(net, data(shuffle=True), data(), ckpt_path=resume)
    return net, run


def plugin_of(kind: str) -> Any:
    io = TricompCheckpointIO(keyframe=None if kind == "alone" else DELTAS)
    return AsyncCheckpointIO(io) if kind == "async" else io


def small(number: int) -> dict[str, Any]:
    """A checkpoint of a saver, told by its number."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(301, 7, generator=generator)
    weights[number % 301] += number
    return {"state_dict": {"w": weights, "n": torch.tensor(number)}, "epoch": number}


class _Death(Callback):
    """Kills the process before the last epoch's third batch, and when there is a checkpoint at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == N_EPOCHS - 1 and batch_idx == 2:
            while not self.path.exists():
                time.sleep(0.01)
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _DeathInSave(Callback):
    """Lets the save of that number die with half of its file written."""

    def __init__(self, at: int) -> None:
        self.at, self.n_puts = at, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        puts = Folder.put

        def put(folder: Folder, name: str, pieces: Iterable[Any], is_synced: bool = True) -> None:
            self.n_puts += 1
            puts(folder, name, self._cut(pieces) if self.n_puts == self.at else pieces, is_synced)

        Folder.put = put  # type: ignore[method-assign, assignment]

    def _cut(self, pieces: Iterable[Any]) -> Iterator[Any]:
        for number, piece in enumerate(pieces):
            if number == 2:
                _die()
            yield piece


def _die_at_call(at: int) -> None:
    """Die before the call of that number by which names in a folder change."""
    n_calls = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            n_calls[0] += 1
            if n_calls[0] == at:
                _die()
            return call(*arguments, **options)

        return counting

    for name in ("link", "replace", "unlink", "symlink"):
        setattr(os, name, counted(getattr(os, name)))


def _rotate(folder: Path, at: int) -> None:
    """Save, link "last.ckpt" to it, and remove the one before, as ModelCheckpoint does, until killed."""
    io = TricompCheckpointIO(keyframe=tricomp.KeyframeEvery(3))
    for number in range(6):
        if number == 2:
            _die_at_call(at)
        io.save_checkpoint(small(number), folder / f"{number}.ckpt")
        (folder / "saved").write_text(str(number))
        if number:
            io.remove_checkpoint(folder / f"{number - 1}.ckpt")
        if os.path.lexists(folder / "last.ckpt"):
            os.remove(folder / "last.ckpt")
        os.symlink(f"{number}.ckpt", folder / "last.ckpt")


def main(folder: Path) -> None:
    """Nothing is computed here before the forks, so that none inherits threads of torch that are not there."""
    torch.set_num_threads(1)
    deaths: dict[str, Callable[[Path], Any]] = {
        "alone": lambda place: train(plugin_of("alone"), [ModelCheckpoint(place, save_last=True), _DeathInSave(5)]),
        "async": lambda place: train(
            plugin_of("async"), [ModelCheckpoint(place, save_last=True), _Death(place / "last.ckpt")]
        ),
    }
    for at in range(1, N_CRASHES + 1):
        deaths[f"rotation {at}"] = lambda place, at=at: _rotate(place, at)  # type: ignore[misc]
    for name, run in deaths.items():
        place = folder / name
        place.mkdir()
        child = os.fork()
        if not child:
            run(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(name, os.WIFSIGNALED(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
