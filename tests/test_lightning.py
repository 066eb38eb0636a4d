"""Lightning's Trainer and Fabric with checkpoints of ours: resumed bit for bit, rotated, linked, killed, damaged."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from abc import ABC
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tricomp_torch

import tricomp
from tricomp.folder import Folder

pytest.importorskip("lightning")

from lightning.fabric import Fabric
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.data import AttributeDict as FabricDict
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.parsing import AttributeDict
from tricomp_torch.lightning import TricompCheckpointIO, export, library, load_from_checkpoint
from tricomp_torch.lightning.chains import HIDDEN, chain_of
from tricomp_torch.lightning.removals import Removals
from tricomp_torch.lightning.states import packed

from tests import lightning_training as training
from tests.lightning_training import DELTAS, Net, small, train

Point = namedtuple("Point", "x y")

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec")  # Lightning's own


@pytest.fixture(scope="module", autouse=True)
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The program whose trainings and savers are killed, run beside the other tests; and the folder it fills."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.lightning_training", str(folder)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are small
    with subprocess.Popen(
        command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        yield folder, program
        program.kill()
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def killed(deaths: tuple[Path, subprocess.Popen[str]]) -> Path:
    """Folders that killed trainings and savers left."""
    folder, program = deaths
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    died = [line.rpartition(" ") for line in output.splitlines() if line.endswith((" True", " False"))]
    assert len(died) == 2 + training.N_CRASHES
    assert {name: word for name, _, word in died if word != "True"} == {}
    return folder


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[Net, Any]:
    return train(None, [])


def equal(first: Any, second: Any) -> bool:
    """Whether two trees are the same, bit for bit and type for type."""
    if isinstance(first, torch.Tensor):
        return type(first) is type(second) and first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and bool(np.array_equal(first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


class _Checking(TricompCheckpointIO):
    """After each removal, every checkpoint that a name stands for must hold what was saved under it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.saved: dict[str, Any] = {}
        self.n_removed = self.n_deltas = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.saved[os.path.realpath(path)] = copy.deepcopy(checkpoint)

    def remove_checkpoint(self, path: Any) -> None:
        there = os.path.exists(path)
        self.saved.pop(os.path.realpath(path), None)
        super().remove_checkpoint(path)
        assert not os.path.lexists(path)
        self.n_removed += there
        for name, checkpoint in self.saved.items():
            self.n_deltas += len(chain_of(name)) > 1
            assert equal(super().load_checkpoint(name), checkpoint)


@pytest.mark.parametrize("save_last", ["link", True])
def test_rotated_checkpoints_can_all_be_loaded(save_last: Any, tmp_path: Path) -> None:
    """The two best of a metric that goes up and down, and the last, over many steps."""
    io = _Checking(keyframe=DELTAS)
    rotation = ModelCheckpoint(
        tmp_path, monitor="odd", save_top_k=2, save_last=save_last, every_n_train_steps=1, filename="{step}"
    )
    net, run = train(io, [rotation], n_epochs=3)
    assert io.n_removed >= 3
    assert io.n_deltas >= 3
    assert len(names(tmp_path)) == 3
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    best = io.load_checkpoint(rotation.best_model_path)
    state = best["callbacks"][rotation.state_key]
    assert state["best_model_path"] == rotation.best_model_path
    assert rotation.best_model_path in state["best_k_models"]
    for path in tmp_path.glob("*.ckpt"):
        assert run.validate(net, training.data(), ckpt_path=str(path), verbose=False)
    hidden = list((tmp_path / HIDDEN).glob("*.tri"))
    assert len(hidden) <= 3 * DELTAS.n


def test_a_validation_and_a_module_come_from_our_files(tmp_path: Path) -> None:
    net, run = train(TricompCheckpointIO(keyframe=DELTAS), [ModelCheckpoint(tmp_path)], n_epochs=2)
    (path,) = tmp_path.glob("*.ckpt")
    before = run.callback_metrics["validation"]
    (after,) = run.validate(Net(), training.data(), ckpt_path="best", verbose=False)
    assert after["validation"] == float(before)
    back = load_from_checkpoint(Net, path, map_location="cpu", width=61)
    assert equal(dict(back.state_dict()), dict(net.state_dict()))
    assert back.hparams["path"] == Path("data/here")
    stock = tmp_path / "stock.ckpt"
    export(path, stock)
    assert equal(torch.load(stock, weights_only=False), TricompCheckpointIO().load_checkpoint(path))
    with pytest.raises(tricomp.InvalidArgument, match="would replace itself"):
        export(path, path)


def state() -> dict[str, Any]:
    """All kinds of things that checkpoints hold."""
    weights = torch.randn(33, 17)
    layers = OrderedDict(a=weights, b=weights, half=torch.randn(129).bfloat16(), none=torch.empty(0, 3))
    layers._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return {
        "epoch": 3,
        "state_dict": layers,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "callbacks": {
            "ModelCheckpoint{'monitor': 'a/b'}": {
                "best_k_models": {"/runs/a/epoch=1.ckpt": torch.tensor(0.25)},
                "kth_value": torch.tensor(float("inf")),
                "odd": {(1, "a"): torch.arange(5), None: [Path("x"), {2.5: True}], True: b"y"},
                "clash": {1: "int", "1": "text"},
                "milestones": Counter([3, 3, 5]),
            }
        },
        "hyper_parameters": {
            "where": Path("/data") / "x",
            "options": argparse.Namespace(a=1, inner=argparse.Namespace(b=Path("c"))),
            "nested": AttributeDict(a=AttributeDict(b=torch.ones(3)), c=(1, [2.5, None])),
            "fabric": FabricDict(x=Point(1, torch.zeros(()))),
            "array": np.arange(7, dtype=np.uint16),
            "dtype": torch.bfloat16,
            "shape": torch.Size([2, 3]),
        },
    }


@pytest.mark.parametrize("keyframe", [None, DELTAS])
def test_what_checkpoints_hold_comes_back(keyframe: Any, tmp_path: Path) -> None:
    io = TricompCheckpointIO(keyframe=keyframe)
    for number in range(3):
        saved = state()
        io.save_checkpoint(saved, tmp_path / f"{number}.ckpt")
        loaded = io.load_checkpoint(tmp_path / f"{number}.ckpt")
        assert equal(loaded["hyper_parameters"].pop("fabric")["x"]._asdict(), {"x": 1, "y": torch.zeros(())})
        assert type(saved["hyper_parameters"].pop("fabric")) is FabricDict
        assert equal(loaded, saved)
        assert loaded["state_dict"]["a"].data_ptr() == loaded["state_dict"]["b"].data_ptr()
        assert loaded["state_dict"]._metadata == saved["state_dict"]._metadata
    assert not list(tmp_path.glob("*.tmp"))
    with tricomp.open(tmp_path / "0.ckpt") as file:
        assert file.metadata["epoch"] == 3


@pytest.mark.parametrize(
    "notes",
    [
        5,
        {"objects": []},
        {"objects": {"epoch": "os.system"}},
        {"objects": {"epoch": 3}},
        {"pairs": {}},
        {"pairs": [1]},
        {"pairs": ["state_dict"]},
        {"pairs": ["hyper_parameters/dtype"]},
        {"objects": {"state_dict": "Path"}},
        {"objects": {"epoch": "Namespace"}},
    ],
)
def test_notes_are_not_trusted(notes: Any, tmp_path: Path) -> None:
    tree, metadata = packed({"epoch": 3, "state_dict": {"w": torch.ones(3)}, "hyper_parameters": {"dtype": [[1], 2]}})
    tricomp.save(tmp_path / "a.ckpt", tree, metadata={**metadata, "tricomp_torch": {"lightning": notes}})
    with pytest.raises(tricomp.CorruptFile, match="tricomp_torch.load|not known here"):
        TricompCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("checkpoint", "text"),
    [
        ({"hyper_parameters": {"loss": torch.nn.L1Loss()}}, r"hyper_parameters/loss.*save_hyperparameters\(ignore"),
        ({"hyper_parameters": {"kind": [dict, int]}}, r"hyper_parameters/kind/0.*save_hyperparameters\(ignore"),
        ({"callbacks": {"Mine": {"f": os.getcwd}}}, r"callbacks/Mine/f.*state_dict\(\)"),
        ({"mine": {"thing": object()}}, "mine/thing.*register_node"),
    ],
)
@pytest.mark.parametrize("keyframe", [None, DELTAS])
def test_what_cannot_be_stored_is_named(keyframe: Any, checkpoint: Any, text: str, tmp_path: Path) -> None:
    io = TricompCheckpointIO(keyframe=keyframe)
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(small(1), path)
    with pytest.raises(tricomp.UnsupportedNode, match=f"(?s)a.ckpt.*{text}"):
        io.save_checkpoint({**small(2), **checkpoint}, path)
    assert equal(io.load_checkpoint(path), small(1))
    assert names(tmp_path) == ["a.ckpt"]


class Config(dict):
    """As OmegaConf's: hyper-parameters that are no dict of plain values."""


@dataclass(frozen=True)
class Window:
    size: int
    kind: str


def test_hyper_parameters_of_another_library_are_named(tmp_path: Path) -> None:
    with pytest.raises(tricomp.UnsupportedNode, match=r"'hyper_parameters'.*Config.*to_container"):
        TricompCheckpointIO().save_checkpoint({"hyper_parameters": Config(a=1)}, tmp_path / "a.ckpt")


def test_registered_types_come_back(tmp_path: Path) -> None:
    tricomp.register_node(Window, "tests.Window", dataclasses.asdict, lambda fields: Window(**fields))
    net = Net()
    checkpoint = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": net.state_dict(),
        "hyper_parameters": {"width": 61, "path": Window(3, "flat")},
    }
    TricompCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert equal(TricompCheckpointIO().load_checkpoint(tmp_path / "a.ckpt"), checkpoint)
    assert load_from_checkpoint(Net, tmp_path / "a.ckpt").hparams["path"] == Window(3, "flat")


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = small(1)
    loop["loop"] = [loop]
    with pytest.raises(tricomp.LimitExceeded, match="holds itself"):
        TricompCheckpointIO().save_checkpoint(loop, tmp_path / "a.ckpt")


def test_stock_checkpoints_are_read(tmp_path: Path) -> None:
    """What torch.load(weights_only=True) gives of them, whatever weights_only says; what needs more is named."""
    net, run = train(None, [], n_epochs=1)
    del net.hparams["path"]
    path = tmp_path / "stock.ckpt"
    run.save_checkpoint(path)
    assert equal(TricompCheckpointIO().load_checkpoint(path), torch.load(path, weights_only=False))
    assert equal(TricompCheckpointIO().load_checkpoint(path, weights_only=False)["epoch"], 1)
    again, _ = train(TricompCheckpointIO(), [], resume=str(path))
    assert len(again.losses) == 3 * len(net.losses)
    TorchCheckpointIO().save_checkpoint({"hyper_parameters": {"f": os.getcwd}}, path)
    with pytest.raises(tricomp.InvalidArgument, match="nothing of it was run.*save_checkpoint"):
        TricompCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.fixture
def rotated(tmp_path: Path) -> Path:
    """A folder with three checkpoints, the last two coded against others of which one is hidden."""
    folder = tmp_path / "run"
    io = TricompCheckpointIO(keyframe=tricomp.KeyframeEvery(9))
    for number in range(5):
        io.save_checkpoint(small(number), folder / f"{number}.ckpt")
    for number in (1, 2):
        io.remove_checkpoint(folder / f"{number}.ckpt")
    io.teardown()
    assert names(folder) == ["0.ckpt", "3.ckpt", "4.ckpt"]
    assert len(chain_of(str(folder / "4.ckpt"))) == 5
    return folder


def test_a_missing_file_is_no_fresh_start(rotated: Path) -> None:
    with pytest.raises(tricomp.MissingFile, match=r"no such file.*Load .*4\.ckpt"):
        train(TricompCheckpointIO(), [], resume=str(rotated / "5.ckpt"))
    with pytest.raises(tricomp.MissingFile, match="No other checkpoint"):
        TricompCheckpointIO().load_checkpoint(rotated.parent / "elsewhere" / "5.ckpt")


def test_a_damaged_file_names_one_that_is_intact(rotated: Path) -> None:
    io = TricompCheckpointIO()
    for damage in (lambda data: data[:-7], lambda data: data[:3000] + b"damage" + data[3006:], lambda data: data[:40]):
        (rotated / "5.ckpt").write_bytes(damage((rotated / "0.ckpt").read_bytes()))
        with pytest.raises((tricomp.CorruptFile, tricomp.CorruptFrame), match=r"5\.ckpt.*Load .*4\.ckpt, the newest"):
            io.load_checkpoint(rotated / "5.ckpt")
    (rotated / "6.ckpt").touch()
    with pytest.raises(tricomp.InvalidArgument, match="empty file"):
        io.load_checkpoint(rotated / "6.ckpt")


def test_a_missing_base_is_named(rotated: Path) -> None:
    """Whoever copies a checkpoint out of its folder hears what it needs; one that stands alone needs nothing."""
    io = TricompCheckpointIO()
    other = rotated.parent / "other"
    other.mkdir()
    for name in ("0.ckpt", "4.ckpt"):
        shutil.copy(rotated / name, other / name)
    with pytest.raises(tricomp.MissingParent, match=r"4\.ckpt: is coded against .*\.tricomp.*Load .*0\.ckpt"):
        io.load_checkpoint(other / "4.ckpt")
    assert equal(io.load_checkpoint(other / "0.ckpt"), small(0))
    shutil.copytree(rotated / HIDDEN, other / HIDDEN)
    assert equal(io.load_checkpoint(other / "4.ckpt"), small(4))
    export(rotated / "4.ckpt", other / "5.ckpt")
    assert equal(io.load_checkpoint(other / "5.ckpt"), small(4))
    assert equal(torch.load(other / "5.ckpt"), small(4))


def test_a_folder_is_no_checkpoint(rotated: Path) -> None:
    with pytest.raises(tricomp.InvalidArgument, match="is a folder.*sharded"):
        TricompCheckpointIO().load_checkpoint(rotated)


def test_names_may_change_by_any_hand(rotated: Path) -> None:
    """Renamed, replaced and removed without asking; copied with its folder, where links become files of their own."""
    (rotated / "0.ckpt").rename(rotated / "first.ckpt")
    (rotated / "3.ckpt").unlink()
    copied = rotated.parent / "copied"
    shutil.copytree(rotated, copied)
    for folder in (rotated, copied):
        io = TricompCheckpointIO(keyframe=tricomp.KeyframeEvery(2))
        for number in (5, 6, 7, 6):
            io.save_checkpoint(small(number), folder / "5.ckpt")
            assert equal(io.load_checkpoint(folder / "4.ckpt"), small(4))
        io.remove_checkpoint(folder / "first.ckpt")
        assert equal(io.load_checkpoint(folder / "4.ckpt"), small(4))
        io.remove_checkpoint(folder / "4.ckpt")
        io.remove_checkpoint(folder / "4.ckpt")
        io.save_checkpoint(small(8), folder / "5.ckpt")
        assert equal(io.load_checkpoint(folder / "5.ckpt"), small(8))
        assert len(list((folder / HIDDEN).glob("*.tri"))) == len(chain_of(str(folder / "5.ckpt")))


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """A checkpoint that "last.ckpt" is a link to is not lost when something is saved as "last.ckpt"."""
    for io in (TricompCheckpointIO(), TricompCheckpointIO(keyframe=DELTAS)):
        io.save_checkpoint(small(1), tmp_path / "best.ckpt")
        (tmp_path / "last.ckpt").unlink(missing_ok=True)
        (tmp_path / "last.ckpt").symlink_to("best.ckpt")
        assert equal(io.load_checkpoint(tmp_path / "last.ckpt"), small(1))
        io.save_checkpoint(small(2), tmp_path / "last.ckpt")
        assert not (tmp_path / "last.ckpt").is_symlink()
        assert equal(io.load_checkpoint(tmp_path / "best.ckpt"), small(1))
        (tmp_path / "last.ckpt").unlink()
        (tmp_path / "last.ckpt").symlink_to("best.ckpt")
        io.remove_checkpoint(tmp_path / "best.ckpt")
        assert equal(io.load_checkpoint(tmp_path / "last.ckpt"), small(1))


def test_a_resumed_run_goes_on_from_what_it_loaded(rotated: Path) -> None:
    io = TricompCheckpointIO(keyframe=tricomp.KeyframeEvery(9))
    io.load_checkpoint(rotated / "3.ckpt")
    io.save_checkpoint(small(5), rotated / "5.ckpt")
    with tricomp.open(rotated / "3.ckpt") as loaded, tricomp.open(rotated / "5.ckpt") as file:
        assert file.parent == loaded.content_id
    assert equal(io.load_checkpoint(rotated / "5.ckpt"), small(5))


def test_deltas_are_small(rotated: Path) -> None:
    sizes = {name: (rotated / name).stat().st_size for name in names(rotated)}
    assert sizes["4.ckpt"] < sizes["0.ckpt"] / 4


def test_without_hard_links_all_stand_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    io = TricompCheckpointIO(keyframe=DELTAS)
    for number in range(3):
        io.save_checkpoint(small(number), tmp_path / f"{number}.ckpt")
    for number in range(3):
        assert chain_of(str(tmp_path / f"{number}.ckpt")) == [str(tmp_path / f"{number}.ckpt")]
        assert equal(io.load_checkpoint(tmp_path / f"{number}.ckpt"), small(number))
    assert [record.getMessage() for record in caplog.records if "no hard links" in record.getMessage()] == [
        f"{tmp_path}: no hard links there, so every checkpoint stands alone"
    ]
    assert not list((tmp_path / HIDDEN).glob("*.tri"))


def test_a_store_lets_the_next_writer_in_and_keeps_its_words(tmp_path: Path) -> None:
    """Store.unlock and Folder.link, which the hidden folder is made with."""
    mine, other = (tricomp.Store(tmp_path / "store", tricomp.KeyframeEvery(9)) for _ in range(2))
    mine.save(1, {"w": np.arange(3001)})
    with pytest.raises(tricomp.StoreLocked):
        other.claim()
    mine.unlock()
    mine.unlock()
    other.save(2, {"w": np.arange(3001) + 1})
    other.unlock()
    mine.save(3, {"w": np.arange(3001) + 2})
    assert all((other.load(step)["w"] == np.arange(3001) + step - 1).all() for step in (1, 2, 3))
    (tmp_path / "name").write_text("old")
    Folder(str(tmp_path / "store")).link("step-000000000003.tri", str(tmp_path / "name"))
    assert os.path.samefile(tmp_path / "name", tmp_path / "store" / "step-000000000003.tri")
    with pytest.raises(tricomp.StorageError, match="cannot be written"):
        Folder(str(tmp_path / "store")).link("step-000000000009.tri", str(tmp_path / "name"))
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        ".tricomp.lock",
        *(f"step-{step:012d}.tri" for step in (1, 2, 3)),
    ]


def test_a_second_writer_stands_alone(rotated: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tricomp.Store(rotated / HIDDEN) as other:
        other.claim()
        io = TricompCheckpointIO(keyframe=tricomp.KeyframeEvery(9))
        io.save_checkpoint(small(5), rotated / "5.ckpt")
        io.remove_checkpoint(rotated / "3.ckpt")
    assert "5.ckpt stands alone" in caplog.text
    assert chain_of(str(rotated / "5.ckpt")) == [str(rotated / "5.ckpt")]
    assert equal(io.load_checkpoint(rotated / "4.ckpt"), small(4))
    io.save_checkpoint(small(6), rotated / "6.ckpt")
    assert len(chain_of(str(rotated / "6.ckpt"))) > 1


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("keyframe", [None, tricomp.KeyframeEvery(1)])
def test_a_full_disk_leaves_the_old_file(keyframe: Any, tmp_path: Path) -> None:
    io = TricompCheckpointIO(keyframe=keyframe)
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(small(1), path)
    with full_disk(2000), pytest.raises(tricomp.StorageError, match=r"a\.ckpt.*free some space") as caught:
        io.save_checkpoint(small(2), path)
    assert caught.value.errno == errno.EFBIG
    assert equal(io.load_checkpoint(path), small(1))
    io.save_checkpoint(small(3), path)
    assert equal(io.load_checkpoint(path), small(3))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_behind_training_is_told(tmp_path: Path) -> None:
    io = AsyncCheckpointIO(TricompCheckpointIO(keyframe=DELTAS))
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(small(1), path)
    wait_for(path.exists)
    with full_disk(2000), suppress(tricomp.StorageError):  # where it failed at once
        io.save_checkpoint(small(2) | {"noise": torch.randn(5000)}, path)
        wait_for(lambda: io._error is not None)
    with pytest.raises(tricomp.StorageError, match=r"a\.ckpt.*free some space"):
        io.teardown()
    assert equal(TricompCheckpointIO().load_checkpoint(path), small(1))


@pytest.mark.parametrize("keyframe", [None, DELTAS])
def test_behind_training_the_last_good_one_stays(
    keyframe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AsyncCheckpointIO removes at once what the save on its way is to take the place of."""
    io = TricompCheckpointIO(keyframe=keyframe)
    behind = AsyncCheckpointIO(io)
    puts, begun, go_on = Folder.put, threading.Event(), threading.Event()

    def put(*arguments: Any, **options: Any) -> None:
        begun.set()
        assert go_on.wait(20)
        puts(*arguments, **options)

    def save(number: int) -> None:
        begun.clear()
        go_on.clear()
        behind.save_checkpoint(small(number), tmp_path / f"{number}.ckpt")
        assert begun.wait(20)

    monkeypatch.setattr(Folder, "put", put)
    save(1)
    go_on.set()
    wait_for(lambda: names(tmp_path) == ["1.ckpt"])
    save(2)
    behind.remove_checkpoint(tmp_path / "1.ckpt")  # 2 is not there yet
    assert names(tmp_path) == ["1.ckpt"]
    go_on.set()
    wait_for(lambda: names(tmp_path) == ["2.ckpt"])
    save(3)
    behind.remove_checkpoint(tmp_path / "3.ckpt")  # on its way: it goes when another has come
    behind.remove_checkpoint(tmp_path / "2.ckpt")
    go_on.set()
    wait_for(lambda: names(tmp_path) == ["3.ckpt"])
    save(4)
    go_on.set()
    behind.teardown()
    assert names(tmp_path) == ["4.ckpt"]
    assert equal(io.load_checkpoint(tmp_path / "4.ckpt"), small(4))


def test_removals_wait_for_saves_behind() -> None:
    """As of AsyncCheckpointIO, whose queue holds the saves of 2 and 3 while 1 is on its way."""
    removals = Removals()

    def save(path: str, is_saved: bool = True) -> set[str]:
        assert in_thread(lambda: removals.begin(path))
        return in_thread(lambda: (removals.saved() if is_saved else set()) | removals.end())

    assert not removals.waits("/a/1", False)
    in_thread(lambda: removals.begin("/a/1"))
    assert removals.waits("/a/0", True)
    assert removals.waits("/a/1", False)
    assert removals.waits("/a/2", False)
    assert in_thread(removals.saved) == {"/a/0"}
    assert removals.waits("/b/0", True)
    assert in_thread(removals.end) == {"/b/0"}
    assert save("/b/1") == set()  # of another folder
    assert save("/a/2", is_saved=False) == set()
    assert save("/a/2") == {"/a/1"}
    assert save("/a/3") == {"/a/2"}
    assert not removals.waits("/a/2", True)
    assert removals.waits("/a/3", True)
    assert save("/a/3") == set()  # it is wanted again
    assert save("/a/4") == set()


def in_thread(action: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("keyframe", [None, tricomp.KeyframeEvery(9)])
def test_a_signal_may_save_in_the_middle_of_a_save(
    keyframe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lightning's handler for SLURM does when a job is to be put back into the queue."""
    io = TricompCheckpointIO(keyframe=keyframe)
    io.save_checkpoint(small(0), tmp_path / "0.ckpt")
    puts = Folder.put

    def put(folder: Folder, name: str, pieces: Any, is_synced: bool = True) -> None:
        monkeypatch.setattr(Folder, "put", puts)
        first, *rest = pieces
        io.save_checkpoint(small(2), tmp_path / "hpc_ckpt_1.ckpt")
        puts(folder, name, [first, *rest], is_synced)

    monkeypatch.setattr(Folder, "put", put)
    io.save_checkpoint(small(1), tmp_path / "1.ckpt")
    io.save_checkpoint(small(3), tmp_path / "3.ckpt")
    for name, number in (("0", 0), ("1", 1), ("hpc_ckpt_1", 2), ("3", 3)):
        assert equal(io.load_checkpoint(tmp_path / f"{name}.ckpt"), small(number))
    assert len(chain_of(str(tmp_path / "3.ckpt"))) == (3 if keyframe else 1)


def test_a_chain_that_cannot_be_kept_costs_no_checkpoint(
    rotated: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hidden folder refuses, or is damaged: checkpoints stand alone, and nothing is pruned."""
    io = TricompCheckpointIO(keyframe=tricomp.KeyframeEvery(9))
    there = sorted((rotated / HIDDEN).glob("*.tri"))

    def refuse(folder: Folder) -> Any:
        raise tricomp.StorageError(f"{folder.url}: refuses.")

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "lock", refuse)
        io.save_checkpoint(small(5), rotated / "5.ckpt")
        io.remove_checkpoint(rotated / "3.ckpt")
    assert "5.ckpt stands alone" in caplog.text
    assert sorted((rotated / HIDDEN).glob("*.tri")) == there
    assert equal(io.load_checkpoint(rotated / "5.ckpt"), small(5))
    assert equal(io.load_checkpoint(rotated / "4.ckpt"), small(4))
    for path in there:
        os.truncate(path, 100)  # the names of some too
    io.save_checkpoint(small(6), rotated / "6.ckpt")
    assert equal(io.load_checkpoint(rotated / "6.ckpt"), small(6))
    with pytest.raises(tricomp.CorruptFile, match=r"4\.ckpt.*Load .*6\.ckpt"):
        io.load_checkpoint(rotated / "4.ckpt")


def wait_for(is_so: Any) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_fabric_saves_and_loads(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[TricompCheckpointIO(keyframe=DELTAS)])
    model = torch.nn.Linear(33, 7)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 33)).sum().backward()
    optimizer.step()
    fabric.save(tmp_path / "a", FabricDict(model=model, optimizer=optimizer, step=7))
    other = torch.nn.Linear(33, 7)
    into: dict[str, Any] = {"model": other, "optimizer": torch.optim.AdamW(other.parameters()), "step": 0}
    assert fabric.load(tmp_path / "a", into) == {}
    assert into["step"] == 7
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    assert equal(into["optimizer"].state_dict(), optimizer.state_dict())


def test_urls(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    io = TricompCheckpointIO(keyframe=DELTAS)
    for number in range(2):
        io.save_checkpoint(small(number), f"memory://lightning/run/{number}.ckpt")
    io.remove_checkpoint("memory://lightning/run/0.ckpt")
    assert equal(io.load_checkpoint("memory://lightning/run/1.ckpt"), small(1))
    with pytest.raises(tricomp.MissingFile, match="Load another checkpoint"):
        io.load_checkpoint("memory://lightning/run/0.ckpt")
    TorchCheckpointIO().save_checkpoint(small(2), "memory://lightning/run/2.ckpt")
    assert equal(io.load_checkpoint("memory://lightning/run/2.ckpt"), small(2))
    TorchCheckpointIO().save_checkpoint({"f": os.getcwd}, "memory://lightning/run/3.ckpt")
    with pytest.raises(tricomp.InvalidArgument, match="memory://lightning/run/3.ckpt: its pickle"):
        io.load_checkpoint("memory://lightning/run/3.ckpt")
    for url in ("memory://lightning/run/4.ckpt", f"file://{tmp_path}/new/4.ckpt"):
        export("memory://lightning/run/1.ckpt", url)
        assert equal(io.load_checkpoint(url), small(1))
    io.save_checkpoint(small(5), f"file://{tmp_path}/new/5.ckpt")
    io.save_checkpoint(small(6), f"file://{tmp_path}/new/6.ckpt")
    assert equal(io.load_checkpoint(f"file://{tmp_path}/new/6.ckpt"), small(6))
    assert len(chain_of(f"{tmp_path}/new/6.ckpt")) == 2
    io.remove_checkpoint(f"file://{tmp_path}/new/6.ckpt")
    assert names(tmp_path / "new") == ["4.ckpt", "5.ckpt"]


def test_devices_are_named_as_torch_load_does(tmp_path: Path) -> None:
    io = TricompCheckpointIO()
    io.save_checkpoint(small(1), tmp_path / "a.ckpt")
    for where in (None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, location: storage):
        assert io.load_checkpoint(tmp_path / "a.ckpt", where)["state_dict"]["w"].device.type == "cpu"
    assert io.load_checkpoint(tmp_path / "a.ckpt", "meta")["state_dict"]["w"].device.type == "meta"


def test_bad_options_are_told_at_once(tmp_path: Path) -> None:
    for options in ({"keyframe": 3}, {"reference": "next"}, {"reference_in": "attic"}, {"spec": "dense"}):
        with pytest.raises(tricomp.InvalidArgument):
            TricompCheckpointIO(**options)
    with pytest.raises(tricomp.InvalidArgument, match="for URLs"):
        TricompCheckpointIO().save_checkpoint(small(1), tmp_path / "a.ckpt", storage_options={"key": "x"})
    assert not list(tmp_path.iterdir())


def test_hidden_checkpoints_stand_alone(tmp_path: Path) -> None:
    """Those are Lightning's own, of its tuner say, and gone in a moment."""
    io = TricompCheckpointIO(keyframe=DELTAS)
    for number in range(2):
        io.save_checkpoint(small(number), tmp_path / ".lr_find.ckpt")
        assert equal(io.load_checkpoint(tmp_path / ".lr_find.ckpt"), small(number))
    io.remove_checkpoint(tmp_path / ".lr_find.ckpt")
    assert not list(tmp_path.glob("*"))


def test_a_plugin_goes_to_other_processes(tmp_path: Path) -> None:
    io = TricompCheckpointIO(keyframe=DELTAS, reference_in="store")
    io.save_checkpoint(small(1), tmp_path / "1.ckpt")
    other = copy.deepcopy(io)
    other.save_checkpoint(small(2), tmp_path / "2.ckpt")
    assert len(chain_of(str(tmp_path / "2.ckpt"))) == 2
    assert equal(io.load_checkpoint(tmp_path / "2.ckpt"), small(2))


def test_both_names_of_lightning_take_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pytorch_lightning` checks for a CheckpointIO of its own copy."""

    class Other(ABC):  # noqa: B024 - as Lightning's own
        pass

    module = type(sys)("lightning_fabric.plugins")
    module.CheckpointIO = Other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning_fabric.plugins", module)
    io = TricompCheckpointIO()
    assert isinstance(io, CheckpointIO)
    assert isinstance(io, Other)


def test_our_own_load_reads_a_checkpoint(tmp_path: Path) -> None:
    TricompCheckpointIO().save_checkpoint(small(5), tmp_path / "a.ckpt")
    assert equal(tricomp_torch.load(tmp_path / "a.ckpt"), small(5))


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning_fabric", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        library.part("fabric.plugins")


@pytest.mark.parametrize("kind", ["alone", "async"])
def test_a_killed_training_resumes_bit_for_bit(kind: str, killed: Path, uninterrupted: tuple[Net, Any]) -> None:
    """Weights, optimizer and losses, with dropout and shuffled data. alone: killed in the middle of a save; async: of
    training, while a save is on its way perhaps. Whatever is there by name can be loaded."""
    net, run = uninterrupted
    folder = killed / kind
    epochs = [TricompCheckpointIO().load_checkpoint(path)["epoch"] for path in folder.glob("*.ckpt")]
    assert max(epochs) == 1 if kind == "alone" else 0 <= max(epochs) <= 2
    resumed, again = train(training.plugin_of(kind), [ModelCheckpoint(folder, save_last=True)], 5, resume="last")
    assert 0 < len(resumed.losses) < len(net.losses)
    assert resumed.losses == net.losses[-len(resumed.losses) :]
    assert equal(dict(resumed.state_dict()), dict(net.state_dict()))
    assert equal(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("at", range(1, training.N_CRASHES + 1))
def test_a_killed_rotation_leaves_the_last_good_checkpoint(at: int, killed: Path) -> None:
    """Killed before each change of a name: all names can be loaded, one is the last saved, and saving goes on."""
    folder = killed / f"rotation {at}"
    io = TricompCheckpointIO(keyframe=DELTAS)
    numbers = set()
    for path in folder.glob("*.ckpt"):
        assert path.exists(), "a link to nothing"
        loaded = io.load_checkpoint(path)
        numbers.add(loaded["epoch"])
        assert equal(loaded, small(loaded["epoch"]))
    saved = int((folder / "saved").read_text())
    assert max(numbers) in (saved, saved + 1)
    io.save_checkpoint(small(9), folder / "9.ckpt")
    for path in [*folder.glob("[0-8].ckpt"), folder / "last.ckpt"]:
        io.remove_checkpoint(path)
    assert equal(io.load_checkpoint(folder / "9.ckpt"), small(9))
    assert names(folder) == ["9.ckpt", "saved"]
    hidden = [path for path in (folder / HIDDEN).iterdir() if path.suffix == ".tri"]
    assert len(hidden) == len(chain_of(str(folder / "9.ckpt")))
    assert not list(folder.rglob("*.tmp"))
