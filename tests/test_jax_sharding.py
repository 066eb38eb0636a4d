"""Sharded arrays: on several devices of one process, and as the parts that several processes save and restore."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import tricomp_jax
from tricomp_jax.parts import Divided, is_grid, whole_box
from tricomp_jax.processes import InProcesses, is_shared

import tricomp
from tests.cases import ROOT
from tests.jax_sharding_cases import SHAPE, check_same, mesh_of, placed, state_at
from tricomp.errors import CorruptFile, CorruptFrame, InvalidArgument, MissingStep

FIRST, SECOND = "process-00000-of-00002", "process-00001-of-00002"


def begun(case: str, folder: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A process of a case, and where it says what happens."""
    command = [sys.executable, "-m", "tests.jax_sharding_cases", case, str(folder), *arguments]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    said = folder / f"{case}-{'-'.join(arguments)}.txt"
    with open(said, "wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT), said


def both(case: str, folder: Path, codes: tuple[int, int] = (0, 0)) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    until = time.monotonic() + 120
    processes = [begun(case, folder, str(number), port) for number in (0, 1)]
    try:
        while any(process.poll() is None for process, _ in processes):
            ended = [process.poll() for process, _ in processes]
            assert all(found in (None, code) for found, code in zip(ended, codes)), texts(processes)
            assert time.monotonic() < until, texts(processes)
            time.sleep(0.05)
        assert tuple(process.returncode for process, _ in processes) == codes, texts(processes)
    finally:
        for process, _ in processes:
            process.kill()  # one that waits for the other
            process.wait()


def texts(processes: list[tuple[subprocess.Popen[bytes], Path]]) -> str:
    return "\n".join(said.read_text()[-3000:] for _, said in processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that one process began on four devices, and two went on with, of whom one was killed, and two again."""
    folder = tmp_path_factory.mktemp("sharded")
    process, said = begun("devices", folder)
    assert process.wait() == 0, said.read_text()[-3000:]
    both("first", folder, (0, -9))
    assert names(folder / "run" / SECOND)[-1] == "step-000000000005.tri"
    assert names(folder / "run" / FIRST)[-1] == "step-000000000006.tri"
    both("second", folder)
    return folder


def names(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".tri"))


def test_processes_go_on_from_the_last_step_that_all_have_written(folder):
    run = folder / "run"
    assert is_shared(run)
    assert not is_shared(folder)
    assert not is_shared(folder / "none")
    kept = InProcesses(run).steps()
    assert kept[-2:] == [6, 7]
    assert 3 not in kept  # two newer ones are kept, and what they need
    assert names(run) == []  # of the one process that began


@pytest.mark.parametrize("where", ["whole", "mesh"])
def test_one_process_restores_what_several_have_written(folder, where):
    if where == "whole":
        found = tricomp_jax.load_step(folder / "run")
        expected = state_at(7)
        assert found["opt"]["nu"].tobytes() == expected["opt"].nu.tobytes()
        assert list(found["opt"]) == ["count", "mu", "nu"]
        assert found["names"] == expected["names"]
        assert found["int4"].dtype == "int4"
        assert np.asarray(found["int4"]).tobytes() == expected["int4"].tobytes()
        assert jax.random.key_data(found["dropout"]).tobytes() == expected["dropout"].tobytes()
        assert found["empty"].shape == (0, 8)
    else:
        expected = placed(state_at(6), mesh_of((1, 1)), {})
        check_same(tricomp_jax.load_step(folder / "run", 6, expected), expected)


def test_the_parts_are_leaves_of_each_file(folder):
    with tricomp.Store(folder / "run" / SECOND).open(7) as file:
        assert [path for path in file if path.startswith("params/w")] == ["params/w/512,0", "params/w/768,0"]
        assert file.metadata["tricomp_jax"]["shards"]["params/w"] == list(SHAPE)
        assert file["params/w/768,0"].tobytes() == state_at(7)["params"]["w"][768:].tobytes()


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run, to be damaged."""
    for name in (FIRST, SECOND):
        (tmp_path / name).mkdir()
        for file in names(folder / "run" / name):
            (tmp_path / name / file).write_bytes((folder / "run" / name / file).read_bytes())
    return tmp_path


def test_a_missing_file_is_named(run, caplog):
    (run / SECOND / "step-000000000007.tri").unlink()
    text = f"step 7 does not count: there is no file of it in {SECOND}. The nearest that does is step 6."
    with pytest.raises(MissingStep, match=re.escape(text)):
        tricomp_jax.load_step(run, 7)
    assert tricomp_jax.load_step(run)["step"] == 6
    assert f"there is no file of it in {SECOND}" in caplog.text
    with pytest.raises(MissingStep, match=re.escape("step 70 is not there")):
        tricomp_jax.load_step(run, 70)
    for name in names(run / FIRST):
        (run / FIRST / name).unlink()
    with pytest.raises(MissingStep, match="there are no checkpoints in"):
        tricomp_jax.load_step(run)


@pytest.mark.parametrize("shards", [[3], {"params/w": 5}, {"params/w": [-1, 2]}, {"params/w": []}], ids=str)
def test_damaged_notes_are_named(run, shards):
    with tricomp.Store(run / SECOND) as store:
        with store.open(7) as file:
            metadata = file.metadata
        metadata["tricomp_jax"]["shards"] = shards
        store.save(7, store.load(7), metadata, overwrite=True)
    with pytest.raises(CorruptFile, match=f"{SECOND}/step-000000000007.tri: the notes on its shards are damaged"):
        tricomp_jax.load_step(run, 7)


def test_a_missing_part_is_named(run):
    with tricomp.Store(run / SECOND) as store:
        tree = store.load(7)
        with store.open(7) as file:
            metadata = file.metadata
        tree["opt"] = tree["opt"]._replace(mu=None)
        store.save(7, tree, metadata, overwrite=True)
    with pytest.raises(CorruptFile) as caught:
        tricomp_jax.load_step(run, 7)
    assert "step 7: leaf 'opt/mu': its parts are not all there" in str(caught.value)
    assert f"{run}/{FIRST} holds 2, {run}/{SECOND} holds 0" in str(caught.value)


def test_damage_is_named_and_older_steps_stay(run, caplog):
    path = run / SECOND / "step-000000000007.tri"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptFrame, match=re.escape(f"step 7 in {run}/{SECOND}: ")):
        tricomp_jax.load_step(run)
    path.write_bytes(data[:-1])
    with pytest.raises(MissingStep, match=f"step 7 does not count: its file in .*{SECOND} is damaged"):
        tricomp_jax.load_step(run, 7)
    assert tricomp_jax.load_step(run)["step"] == 6


def test_a_hook_of_one_process_goes_on_from_several(run, caplog):
    expected = placed(state_at(7), mesh_of((1, 1)), {})
    InProcesses(run).claim(5, overwrite=False)
    assert "step 5 is below step 7, which stays the latest" in caplog.text
    with tricomp_jax.CheckpointHook(run, keep=[tricomp.KeepLast(1)]) as hook:
        restored = hook.restore_latest(expected)
        assert restored is not None
        assert restored.step == 7
        check_same(restored.state, expected)
        hook(8, restored.state)
        assert hook.steps()[-1] == 8
    assert names(run) == ["step-000000000008.tri"]
    assert names(run / FIRST) == names(run / SECOND) == []
    assert tricomp_jax.CheckpointHook(run).latest() == 8
    check_same(tricomp_jax.load_step(run, 8, expected), expected)


class Two:
    """Two processes of a run as far as their stores go, in this one; each start of the program is a run of its own."""

    def __init__(self, folder, monkeypatch, **options):
        self.processes = []
        self.start(folder, monkeypatch, options, "first")

    def start(self, folder, monkeypatch, options, run):
        for process in self.processes:
            process.close()
        self.processes = []
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        for number in (0, 1):
            monkeypatch.setattr(jax, "process_index", lambda number=number: number)
            process = InProcesses(folder, options)
            process.__dict__["_run"] = run
            self.processes.append(process)

    def save(self, number, step, overwrite=False):
        process = self.processes[number]
        process.save(step, process.flatten({"w": np.arange(300) * step, "step": step}), {}, overwrite)


@pytest.mark.parametrize(("keep", "n"), [([tricomp.KeepLast(1)], 1), ([tricomp.KeepLast(2), tricomp.KeepEvery(4)], 3)])
def test_at_every_instant_a_whole_step_stays(tmp_path, monkeypatch, keep, n):
    options = {"keep": keep, "keyframe": tricomp.KeyframeEvery(n)}
    two = Two(tmp_path, monkeypatch, **options)
    rng = random.Random(5)
    done = [0, 0]
    reached = 0
    for i in range(40):
        number = i // 5 % 2 if rng.random() < 0.8 else rng.randrange(2)  # the one is ahead, then the other
        number = number if max(done) - min(done) < 5 else int(done[1] < done[0])
        done[number] += 1
        two.save(number, done[number])
        before, reached = reached, max(reached, min(done))
        steps = two.processes[1 - number].steps()
        assert reached == 0 or steps[-1] == reached
        if reached != before and reached % 7 == 4:  # all die, and go on from the last step that counts
            two.start(tmp_path, monkeypatch, options, f"{i:03d}")
            found = two.processes[0].sets.find(None)
            assert found == (2, reached)
            assert two.processes[0].restore_from(*found, None, True).state["step"] == reached
            done = [reached, reached]
    assert reached > 10
    assert "step-000000000002.tri" not in names(tmp_path / FIRST) + names(tmp_path / SECOND)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_files_of_two_runs_are_no_step(tmp_path, monkeypatch, kind):
    if kind == "bucket":
        pytest.importorskip("fsspec")
    where = str(tmp_path) if kind == "folder" else "memory://two-runs"
    two = Two(where, monkeypatch)
    assert not is_shared(where)
    for number, step in [(0, 1), (1, 1), (0, 2)]:
        two.save(number, step)
    with pytest.raises(InvalidArgument, match="step 2 is already in"):
        two.save(0, 2)
    assert is_shared(where)
    two.start(where, monkeypatch, {}, "second")
    two.save(1, 2)
    assert two.processes[0].steps() == [1]
    with pytest.raises(MissingStep, match="some of its files are of one run of the program, some of another"):
        two.processes[0].sets.find(2)
    assert two.processes[0].sets.find(None) == (2, 1)
    two.save(0, 2)
    assert two.processes[1].steps() == [1, 2]
    two.save(1, 2, overwrite=True)
    with pytest.raises(InvalidArgument, match="step 1 is already in"):
        two.save(1, 1)


def test_options_are_those_of_a_store(tmp_path):
    with pytest.raises(InvalidArgument, match="keep: expected a list of policies"):
        InProcesses(tmp_path, {"keep": tricomp.KeepLast(1)})
    with tricomp.Store(tmp_path) as store:
        store.save(3, {"w": np.arange(4)})
    with pytest.raises(InvalidArgument, match="step 3"):
        tricomp_jax.load_step(tmp_path, target={"w": jax.numpy.arange(5)})


def test_boxes_of_an_array_in_parts():
    array = np.arange(7 * 6).reshape(7, 6)
    boxes = [((a, b), (c, d)) for a, b in [(0, 3), (3, 7)] for c, d in [(0, 2), (2, 4), (4, 6)]]
    divided = Divided(
        (7, 6), array.dtype, [(box, array[box[0][0] : box[0][1], box[1][0] : box[1][1]]) for box in boxes]
    )
    for index in [(slice(None), slice(1, 5)), (slice(2, 4), slice(None)), (slice(3, 7), slice(4, 6)), None]:
        assert np.array_equal(divided.box(index), array if index is None else array[index])
    assert np.array_equal(divided.changed(lambda box: box.astype("f4"), np.dtype("f4")).whole(), array.astype("f4"))
    assert is_grid(boxes, (7, 6))
    assert is_grid([()], ())
    assert is_grid([whole_box((0, 3))], (0, 3))
    assert not is_grid(boxes[:-1], (7, 6))
    assert not is_grid(boxes[3:], (7, 6))
    assert not is_grid([*boxes, boxes[0]], (7, 6))
    assert not is_grid(boxes, (8, 6))
    assert not is_grid([], (2,))
    assert not is_grid([*boxes[:-1], ((3, 7), (4, 5))], (7, 6))
