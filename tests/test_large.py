"""Large state: many leaves, large leaves, and memory that is bounded by stated numbers, not by the state."""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests.cases import equal
from tests.sparse_file import write_sparse_file
from tricomp.cli import main
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


# Leaves

N_LARGE = (1 << 31) + 12_345
MARKS = (0, 1, (1 << 30) - 1, 1 << 30, (1 << 31) - 70_000, (1 << 31) - 1, 1 << 31, (1 << 31) + 12_000, N_LARGE - 1)


def around(k, n=N_LARGE):
    """Some elements on both sides of one."""
    return slice(max(k - 1003, 0), min(k + 1009, n))


def test_parts_of_leaves_beyond_4_gib(tmp_path):
    """Words stand where they should in frames of several msgpack objects, and in a file, of more than 4 GiB."""
    path = tmp_path / "large.tri"
    shape = ((1 << 31) + 777,)
    bins = [(k << 29) + d for k in range(1, 4) for d in (-70_000, -1, 0, 1)]  # a bin ends in a chunk near
    ones = sorted({0, 5, *bins, (1 << 31) - 1, 1 << 31, shape[0] - 1})
    write_sparse_file(path, {"first": shape, "second": shape}, "bfloat16", ones)
    with tricomp.open(path) as file:
        assert file.n_bytes > 2 << 32
        assert len(file._frame_of[0].sizes) == 5
        for name in ("first", "second"):
            parts = file.runs(name, [range(*around(k, shape[0]).indices(shape[0])) for k in ones])
            for k, part in zip(ones, parts, strict=True):
                near = around(k, shape[0])
                assert (near.start + np.flatnonzero(part.view(np.uint16))).tolist() == [
                    one for one in ones if near.start <= one < near.stop
                ]
                assert set(part.view(np.uint16)) <= {0, 0xFFFF}
    torch_adapter = pytest.importorskip("tricomp_torch")
    with torch_adapter.safe_open(path) as opened:
        part = opened.get_slice("second")
        assert part[(1 << 31) - 2 : (1 << 31) + 3].isnan().tolist() == [False, True, True, False, False]
        assert part[[5, -1, 1 << 31, 6]].isnan().tolist() == [True, True, True, False]


def test_more_than_2_31_elements(tmp_path):
    """A leaf and a delta of it. Memory that nobody writes to is none; what is read back comes in pieces."""
    old, new = np.zeros(N_LARGE, np.int8), np.zeros(N_LARGE, np.int8)
    rng = np.random.default_rng(0)
    for k in MARKS:
        old[around(k)] = rng.integers(-9, 9, len(old[around(k)]))
        new[around(k)] = old[around(k)]
        new[k] += 3
    small = np.arange(5)
    tricomp.save(tmp_path / "old.tri", {"x": old, "small": small})
    report = tricomp.save(tmp_path / "new.tri", {"x": new, "small": small}, reference={"x": old, "small": small})
    assert report.file_bytes < 1 << 20
    with tricomp.open(tmp_path / "new.tri", reference=tmp_path / "old.tri") as file:
        assert file.plan("x").reference == "parent"
        for k in MARKS:
            near = around(k)
            assert file.elements("x", near.start, near.stop).tobytes() == new[near].tobytes()
        first = 0
        for piece in file.pieces("x", 64 << 20):  # the digest of the whole is compared at the end
            assert np.array_equal(piece, new[first : first + len(piece)])
            first += len(piece)
        assert first == N_LARGE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="maps a file many times, one after the other")
def test_a_leaf_of_more_than_4_gib(tmp_path, request):
    """Dense words: real frames, files and deltas of GB, decoded to a file that is mapped."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes a minute or two, and 12 GB of disk: -m slow asks for it")
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("takes 12 GB of disk")
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((48 << 20) + 2048) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint16)
    old = repeated(block, N_LARGE, tmp_path / "old")
    block ^= (rng.integers(0, 16, len(block)) == 0).astype(np.uint16)
    new = repeated(block, N_LARGE, tmp_path / "new")
    tricomp.save(tmp_path / "old.tri", {"x": old.view(ml_dtypes.bfloat16)})
    reference = {"x": old.view(ml_dtypes.bfloat16)}
    tricomp.save(tmp_path / "new.tri", {"x": new.view(ml_dtypes.bfloat16)}, reference=reference)
    room = np.memmap(tmp_path / "room", ml_dtypes.bfloat16, "w+", shape=(N_LARGE,))
    with tricomp.open(tmp_path / "new.tri", reference=tmp_path / "old.tri") as file:
        assert file.plan("x").reference == "parent"
        file.load_into({"x": room})
        for k in MARKS:
            near = around(k)
            assert file.elements("x", near.start, near.stop).tobytes() == new[near].tobytes()
    piece = 64 << 20
    for first in range(0, N_LARGE, piece):
        assert np.array_equal(room[first : first + piece].view(np.uint16), new[first : first + piece])


def repeated(block, n, path):
    """uint16[n]: a block of whole pages again and again, which takes memory once. Not to be written to."""
    path.write_bytes(block.tobytes())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    no_reserve, fixed = 0x4000, 0x10
    n_bytes = -(-2 * n // block.nbytes) * block.nbytes
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    base = libc.mmap(None, n_bytes, mmap.PROT_READ, private, -1, 0)
    with open(path, "rb") as file:
        for at in range(base, base + n_bytes, block.nbytes):
            assert libc.mmap(at, block.nbytes, mmap.PROT_READ, mmap.MAP_SHARED | fixed, file.fileno(), 0) == at
    return np.frombuffer((ctypes.c_uint16 * n).from_address(base), np.uint16)


# Many leaves

DTYPES = ("float32", "bfloat16", "int64", "int8", "bool", "float64", "float16", "uint8")


def many(n, seed):
    """Small leaves of all kinds: without dimensions, without elements, of odd sizes."""
    rng = np.random.default_rng(seed)
    found = {}
    for k in range(n):
        shape = [(), (0, 3), (k % 97 + 1,), (3, k % 11 + 1), (1,), (k % 5, 2)][k % 6]
        values = np.asarray(rng.standard_normal(shape) * 30)
        found[f"layer{k // 10}.p{k % 10}"] = values.astype(np.dtype(DTYPES[k % 8]))
    return found


def test_ten_thousand_leaves(tmp_path, capsys):
    first = many(10_000, 0)
    second = {name: array.copy() for name, array in first.items()}
    for name, array in many(10_000, 1).items():
        if array.dtype == np.float32:
            second[name][...] = array
    with tricomp.Store(tmp_path / "run") as store:
        reports = [store.save(1, {"model": first}), store.save(2, {"model": second})]
        assert [report.parent is None for report in reports] == [True, False]
        assert equal(store.load(1), {"model": first})
        assert equal(store.load(2), {"model": second})
        assert store.verify().is_clean
        some = store.load(2, leaves=["model/layer77.*"])
        assert len(some) == 10
        assert all(array.tobytes() == second[path.removeprefix("model/")].tobytes() for path, array in some.items())
        store.remove(1)
        assert equal(store.load(), {"model": second})
    assert max(report.file_bytes for report in reports) < 1.05 * sum(a.nbytes for a in first.values()) + 20 * 10_000
    assert main(["inspect", "-v", str(tmp_path / "run" / "step-000000000002.tri")]) == 0
    assert "layer999.p9" in capsys.readouterr().out


def test_ten_thousand_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    import tricomp_torch

    net = torch.nn.Module()
    for k in range(10_000):
        values = torch.arange(float(k % 23 - 3 if k % 23 > 3 else 1)) + k
        net.register_buffer(f"b{k}", values.to([torch.float32, torch.bfloat16, torch.int64, torch.bool][k % 4]))
    weights = torch.nn.ParameterList([torch.full((k % 7 + 1,), float(k)) for k in range(2000)])
    adamw = torch.optim.AdamW(weights)
    for weight in weights:
        adamw.state[weight] = {"step": torch.tensor(3.0), "exp_avg": weight / 3, "exp_avg_sq": weight.detach() ** 2}
    saved = [tensor.clone() for tensor in net.state_dict().values()]
    moments = [adamw.state[weight]["exp_avg_sq"].clone() for weight in weights]
    ckpt: Any = tricomp_torch.Checkpointer(tmp_path)
    with ckpt:
        ckpt.save(1, model=net, optimizer=adamw).result()
        held = dict(net.named_buffers())
        with torch.no_grad():
            for tensor in (*held.values(), *(adamw.state[weight]["exp_avg_sq"] for weight in weights)):
                tensor.zero_()
        assert ckpt.restore(model=net, optimizer=adamw).step == 1
    for tensor, old in zip(net.state_dict().values(), saved, strict=True):
        assert torch.equal(tensor, old)
    for weight, old in zip(weights, moments, strict=True):
        assert torch.equal(adamw.state[weight]["exp_avg_sq"], old)
    assert all(held[name] is buffer for name, buffer in net.named_buffers())
