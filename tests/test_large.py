"""Large state: many leaves, large leaves, and memory that is bounded by stated numbers, not by the state."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import tricomp
from tricomp.errors import CorruptFrame, InvalidArgument, MissingLeaf

# Memory


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux: RLIMIT_DATA and VmData")
def test_a_large_state_takes_no_more_memory_than_is_stated(tmp_path):
    """README: "Memory". In a process of its own, to which the system refuses more."""
    pytest.importorskip("torch")
    code = [sys.executable, "-m", "tests.large_run", str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, timeout=600)
    if done.stdout == "not enforced\n":
        pytest.skip("this system does not enforce RLIMIT_DATA")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[1]) > 500 << 20


@pytest.fixture
def chained(tmp_path, monkeypatch):
    """A delta and its leaves: alone in a frame, sharing one, a repeat and a cast of another; small batches."""
    monkeypatch.setattr(tricomp.frames, "_BATCH_WORDS", 70_000)
    monkeypatch.setattr(tricomp.frames, "_THREAD_WORDS", 1)
    rng = np.random.default_rng(5)
    long = (rng.standard_normal(300_001) * 0.02).astype(np.float32)
    old: dict[str, Any] = {
        "long": long,
        "repeat": long.copy(),
        "half": long.astype(np.float16),
        "wide": np.arange(40_000),
    }
    old |= {f"small{k}": rng.integers(0, 9, k * 77).astype(np.int8) for k in range(99)}
    old |= {"scalar": np.array(7.5), "complex": (long[:60_000] + 1j).astype(np.complex64).reshape(60, 1000)}
    new = {name: array.copy() for name, array in old.items()}
    for name in ("long", "repeat"):
        new[name].view(np.uint32)[::3] ^= 5
    new["half"] = new["long"].astype(np.float16)
    new["small50"][3] += 1
    new["wide"][7] = 1 << 40
    tricomp.save(tmp_path / "old.tri", old)
    tricomp.save(tmp_path / "new.tri", new, reference=tmp_path / "old.tri")
    with tricomp.open(tmp_path / "new.tri", reference=tmp_path / "old.tri") as file:
        assert file.plan("long").reference == "parent"
        assert {file.plan("half").predict, file.plan("repeat").reference} == {"cast", "sibling"}
        yield file, new


def test_leaves_come_once_each_batch_by_batch(chained):
    file, new = chained
    found = {}
    for path, array in file.stream(reversed(list(new))):
        assert path not in found
        found[path] = array.copy()
    assert found.keys() == new.keys()
    for name, array in new.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    assert {path for path, _ in file.stream(["half", "small7"])} == {"half", "small7"}
    assert list(file.stream([])) == []
    with pytest.raises(MissingLeaf):
        list(file.stream(["none"]))


def test_leaves_are_decoded_into_arrays_that_are_there(chained):
    file, new = chained
    room = {name: np.full_like(array, 77) for name, array in new.items()}
    around = np.full(300_020, 3, np.float32)
    file.load_into(room | {"long": around[10:-9]})
    assert around[10:-9].tobytes() == new["long"].tobytes()
    assert (around[:10] == 3).all()
    assert (around[-9:] == 3).all()
    for name, array in room.items():
        assert name == "long" or array.tobytes() == new[name].tobytes()
    for wrong in (
        around[10:-10],
        around[10:-9].view(np.int32),
        np.zeros(600_002, np.float32)[::2],
        np.zeros(300_001, ">f4"),
        np.broadcast_to(np.float32(0), 300_001),
    ):
        room["small98"][...] = 5
        with pytest.raises(InvalidArgument, match="leaf 'long': expected a"):
            file.load_into({"small98": room["small98"], "long": wrong})
        assert (room["small98"] == 5).all()


def test_what_is_loaded_is_nobody_elses(chained):
    """Leaves with a frame of their own are handed out as they were decoded: not copied, and not shared either."""
    file, new = chained
    first = file.load()
    for array in first.values():
        array[...] = 1
    for path, array in file.load().items():
        assert array.tobytes() == new[path].tobytes()
    base = first["long"].base
    assert base is None or base.nbytes <= first["long"].nbytes + (4 << 20)


@pytest.mark.usefixtures("chained")
def test_damage_in_a_leaf_that_goes_in_pieces_is_found(tmp_path):
    data = bytearray((tmp_path / "old.tri").read_bytes())
    with tricomp.open(tmp_path / "old.tri") as old:
        offset = old._frame_of[old._index["long"]].offset + old.coded_bytes("long") - 1000
    data[offset] ^= 1
    (tmp_path / "old.tri").write_bytes(data)
    room = np.zeros(300_001, np.float32)
    with (
        tricomp.open(tmp_path / "new.tri", reference=tmp_path / "old.tri") as damaged,
        pytest.raises(CorruptFrame, match=r"old\.tri: chunk \d+ of 'long': checksum"),
    ):
        damaged.load_into({"long": room})
