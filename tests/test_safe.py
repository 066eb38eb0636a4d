"""Flat named tensors in safetensors' manner: save_file, load_file, safe_open, slices; held against that library."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import tricomp_torch

import tricomp
import tricomp.numpy
from tests.cases import of_dtype, same_bits, stepped, weights
from tests.test_torch_adapter import DTYPES, random_bits, raw, same
from tricomp import codec, selection
from tricomp.cli import main
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    InvalidIndex,
    MissingFile,
    MissingLeaf,
    UnsupportedDtype,
    UnsupportedNode,
    WrongReference,
)
from tricomp.selection import select

SHARED = [dtype for dtype in DTYPES if dtype is not torch.complex128]  # safetensors has no complex128
SPEC = tricomp.Spec(chunk_log2=10)
INDICES = [
    0, -1, slice(1, 3), slice(None), slice(None, None, 2), slice(3, 1), slice(0, 100), slice(-2, None), (0, 1),
    (0, 1, 2), ..., (..., 0), (0, ..., 0), (slice(None), slice(1, 3)), (slice(None), slice(None), slice(None, None, 2)),
    (), None, (None, 0), (2, slice(None), -1), [0, 1], (slice(None), [0, 2]), (0, slice(None), [1, 2]), np.int64(1),
    torch.tensor([4, 0, 4]), (slice(np.int64(1), None), -2), torch.tensor(1),
    torch.tensor([True, False, True, False, True]),
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "a.tri")


@pytest.fixture
def other(tmp_path):
    return str(tmp_path / "a.safetensors")


def tensors():
    """Every dtype that both libraries have, in some shapes, names that are odd as paths."""
    found = {}
    for i, dtype in enumerate(SHARED):
        found[f"x/{str(dtype)[6:]}"] = random_bits(dtype, (7, 5, 3), i)
        found[f"~1.0d.{i}"] = random_bits(dtype, (1,), i).reshape(())
        found[f"empty.{i}"] = torch.empty((0, 3), dtype=dtype)
    return {**found, "": torch.ones(2), "é\n ": torch.arange(3)}


def test_torch_as_safetensors(path, other):
    given = tensors()
    metadata = {"format": "pt", "": "é"}
    safetensors.torch.save_file(given, other, metadata)
    report = tricomp_torch.save_file(given, path, metadata)
    assert report.n_leaves == len(given)
    theirs, ours = safetensors.torch.load_file(other), tricomp_torch.load_file(path)
    assert type(ours) is dict
    assert list(ours) == list(given)
    assert set(theirs) == set(ours)
    assert all(same(ours[name], tensor) and same(theirs[name], tensor) for name, tensor in given.items())
    with safetensors.safe_open(other, "pt") as a, tricomp_torch.safe_open(path, "pt") as b:
        assert a.keys() == b.keys()
        assert sorted(a.offset_keys()) == sorted(b.offset_keys())
        assert b.offset_keys() == list(given)
        assert a.metadata() == b.metadata() == metadata
        for name in a.keys():  # noqa: SIM118 - it is no dict
            assert same(a.get_tensor(name), b.get_tensor(name))
            assert a.get_slice(name).get_dtype() == b.get_slice(name).get_dtype()
            assert a.get_slice(name).get_shape() == b.get_slice(name).get_shape()
            assert same(a.get_slice(name)[...], b.get_slice(name)[...])
        assert all(same(a.get_tensors()[name], tensor) for name, tensor in b.get_tensors().items())


def test_numpy_as_safetensors(path, other):
    read = [dtype for dtype in SHARED if "float8" not in str(dtype)]  # safetensors.numpy writes those, and reads none
    given = {f"x/{str(dtype)[6:]}": tricomp_torch.flatten(random_bits(dtype, (7, 5))).tree for dtype in read}
    given |= {"0d": np.array(2.5, np.float16), "empty": np.zeros((3, 0), ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(given, other, {"k": "v"})
    tricomp.numpy.save_file(given, path, {"k": "v"})
    theirs, ours = safetensors.numpy.load_file(other), tricomp.numpy.load_file(path)
    assert list(ours) == list(given)
    assert all(same_bits(ours[name], theirs[name]) and same_bits(ours[name], array) for name, array in given.items())
    assert all(array.flags.writeable for array in ours.values())
    with safetensors.safe_open(other, "np") as a, tricomp.numpy.safe_open(path, "np") as b:
        assert (a.keys(), a.metadata()) == (b.keys(), b.metadata())
        for name in a.keys():  # noqa: SIM118
            assert same_bits(a.get_tensor(name), b.get_tensor(name))
            assert a.get_slice(name).get_dtype() == b.get_slice(name).get_dtype()
        part = b.get_slice("x/float32")[0, 0]
        assert type(part) is np.ndarray
        assert same_bits(part, a.get_slice("x/float32")[0, 0])
    with tricomp_torch.safe_open(path, framework="np") as c:
        assert same_bits(c.get_tensor("0d"), given["0d"])


def test_bytes_are_those_of_the_file(path):
    given: Any = {"a": np.arange(1000, dtype=np.int32), "b/c": np.float32(2)}
    data = tricomp.numpy.save(given, {"k": "v"}, spec=SPEC)
    tricomp.numpy.save_file(given, path, {"k": "v"}, spec=SPEC)
    with open(path, "rb") as file:
        assert file.read() == data
    for form in (data, bytearray(data), memoryview(data)):
        back = tricomp.numpy.load(form)
        assert list(back) == ["a", "b/c"]
        assert same_bits(back["a"], given["a"])
        assert same_bits(back["b/c"], np.asarray(given["b/c"]))
    assert tricomp.numpy.load(tricomp.numpy.save({})) == {}
    with pytest.raises(CorruptFile, match="bytes"):
        tricomp.numpy.load(data[:-9])
    with pytest.raises(InvalidArgument, match="load: expected the bytes of a .tri file, got a str. See load_file"):
        tricomp.numpy.load(path)


def test_dtypes_that_safetensors_lacks_go_by_their_own_name(path):
    given = {name: of_dtype(name, (5, 3)) for name in ("complex128", "float8_e3m4", "float8_e4m3")}
    tricomp.numpy.save_file(given, path)
    with tricomp.numpy.safe_open(path) as opened:
        assert all(opened.get_slice(name).get_dtype() == name for name in given)
        assert all(same_bits(opened.get_tensor(name), array) for name, array in given.items())
    with pytest.raises(UnsupportedDtype, match="leaf 'float8_e3m4': torch has no dtype"):
        tricomp_torch.load_file(path)


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_slices_as_safetensors(path, other, index):
    given = {"x": torch.arange(60, dtype=torch.int32).reshape(5, 4, 3)}
    safetensors.torch.save_file(given, other)
    tricomp_torch.save_file(given, path)
    with safetensors.safe_open(other, "pt") as a, tricomp_torch.safe_open(path) as b:
        part = b.get_slice("x")[index]
        assert same(part, a.get_slice("x")[index])
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex128, torch.uint64, torch.bool], ids=str
)
def test_slices_of_any_step_and_dtype(path, dtype):
    given = random_bits(dtype, (9, 8, 7))
    bits = given.view(torch.uint8).reshape(*given.shape, -1).numpy()
    tricomp_torch.save_file({"x": given}, path)
    for index in (
        (slice(None, None, -1),),
        (slice(7, 1, -3), 2),
        (..., slice(None, None, -2)),
        ([1, -1, 1], 0, [0, 3, 2]),
    ):
        with tricomp_torch.safe_open(path) as opened:
            part = opened.get_slice("x")[index]
        expected = bits[(*index, slice(None))] if index[0] is not ... else bits[..., ::-2, :]
        assert tuple(part.shape) == expected.shape[:-1]
        assert raw(part) == expected.tobytes()


def test_0d_slices(path):
    tricomp_torch.save_file({"x": torch.tensor(3.5)}, path)
    with tricomp_torch.safe_open(path) as opened:
        part = opened.get_slice("x")
        assert (part.get_shape(), part.get_dtype()) == ([], "F32")
        assert same(part[...], torch.tensor(3.5))
        assert same(part[()], torch.tensor(3.5))
        assert same(part[None], torch.tensor([3.5]))
        with pytest.raises(InvalidIndex, match="slice of 'x': 1 indices for its 0 dimensions"):
            part[0]


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (5, "index 5 for a dimension of 5"),
        ((0, -5), "index -5 for a dimension of 4"),
        ([0, 7], "index 7 for a dimension of 5"),
        ([-6, 0], "index -6 for a dimension of 5"),
        ((0, 0, 0, 0), "4 indices for its 3 dimensions"),
        ((..., ...), "one ellipsis"),
        (True, "index True is no position"),
        (1.5, "1.5 is no index. Use ints, slices"),
        ("a", "'a' is no index"),
        ([0.5], "is no index"),
        ([[0], [1, 2]], "is no index"),
        ({}, "is no index"),
        (slice(None, None, 0), "slice step cannot be zero"),
        (slice(1.5, 2), "slice indices must be integers"),
        (np.array([True, False]), r"a mask of shape \[2\] for dimensions of \[5\]"),
    ],
    ids=repr,
)
def test_indices_that_are_refused(path, index, text):
    tricomp_torch.save_file({"x": torch.arange(60).reshape(5, 4, 3)}, path)
    with tricomp_torch.safe_open(path) as opened, pytest.raises(InvalidIndex, match=f"slice of 'x'.*{text}") as refusal:
        opened.get_slice("x")[index]
    assert isinstance(refusal.value, IndexError)


def random_index(rng, shape, has_arrays):
    """An index that may be out of bounds."""

    def end(n):
        return rng.choice([None, rng.randint(-n - 2, n + 2)])

    n_items = rng.randint(0, len(shape))
    dots_at = rng.randint(0, n_items) if rng.random() < 0.3 else None
    items: list[Any] = []
    for i in range(n_items):
        if i == dots_at:
            items.append(...)
        n = shape[i if dots_at is None or i < dots_at else len(shape) - n_items + i]
        what = rng.random()
        if what < 0.1:
            items.append(None)
        if what < 0.4 and n:
            items.append(rng.randint(-n, n - 1 + (what < 0.12)))
        elif what < 0.6 and has_arrays and n:
            items.append([rng.randint(-n, n - 1) for _ in range(3)])
        else:
            items.append(slice(end(n), end(n), rng.choice([None, 1, 2, 3, -1, -2, 7])))
    return tuple(items)


def chosen(shape, index, elements, dtype, size):
    wanted = select(shape, index)
    return wanted.of(wanted.fetch(elements, dtype, size))


@pytest.mark.parametrize("seed", range(4))
def test_selections_are_numpys_and_torchs_and_fetch_no_chunk_in_vain(monkeypatch, seed):
    rng = random.Random(seed)
    n_refused = 0
    for _ in range(1500):
        monkeypatch.setattr(selection, "_SPAN", rng.choice([4, 16, 1 << 22]))
        monkeypatch.setattr(selection, "_BATCH_RUNS", rng.choice([1, 3, 1 << 18]))
        shape = tuple(rng.choice([0, 1, 2, 3, 5, 8]) for _ in range(rng.randint(0, 4)))
        whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        index = random_index(rng, shape, rng.random() < 0.5)
        size, first = rng.choice([1, 4, 64]), rng.choice([0, 3])  # chunks, and where in one the array begins
        touched: set[int] = set()

        def elements(runs, whole=whole, size=size, first=first, touched=touched):
            for run in runs:
                assert 0 <= run.start < run.stop <= whole.size
                touched.update(range((run.start + first) // size, (run.stop - 1 + first) // size + 1))
            return [whole.reshape(-1)[run.start : run.stop] for run in runs]

        try:
            expected = whole[index]
        except IndexError:
            n_refused += 1
            with pytest.raises(IndexError):
                chosen(shape, index, elements, whole.dtype, size)
            continue
        wanted = select(shape, index)
        block = wanted.fetch(elements, whole.dtype, size)
        assert same_bits(wanted.of(block), np.asarray(expected))
        if not any(isinstance(item, list) for item in index):
            assert touched == {(value + first) // size for value in np.asarray(expected).reshape(-1).tolist()}
        if not any(isinstance(item, slice) and (item.step or 1) < 0 for item in index):
            by_torch = torch.from_numpy(whole)[index] if index else torch.from_numpy(whole)
            assert same_bits(wanted.of(block, is_int_first=True), by_torch.numpy())
    assert n_refused > 5


@pytest.mark.parametrize("dtype", [np.float32, np.complex64], ids=str)
def test_masks_and_repeated_positions(dtype):
    whole = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    mask = whole.real % 7 < 2
    for index in (
        mask,
        mask[:, :, 0],
        (slice(None), mask[0]),
        (0, mask[0]),
        [2, 2, 0, -1],
        np.zeros(0, int),
        ([[0, 1]], [[2], [3]]),
    ):
        wanted = select(whole.shape, index)
        block = wanted.fetch(lambda runs: [whole.reshape(-1)[run.start : run.stop] for run in runs], whole.dtype, 16)
        assert same_bits(wanted.of(block), whole[index])


SHAPES = {
    "rows": ((300, 130), (slice(100, 103),)),
    "row steps": ((300, 130), (slice(None, None, 97),)),
    "columns of rows longer than a chunk": ((12, 5000), (slice(None), slice(2100, 2110))),
    "columns of short rows": ((700, 60), (slice(200, 300), slice(3, 5))),
    "one huge row": ((40_003,), (slice(20_000, 20_020),)),
    "one huge row, two-dimensional": ((1, 40_003), (0, slice(20_000, 20_020))),
    "a step longer than a chunk": ((1, 40_003), (0, slice(500, None, -5000))),
    "an element": ((30, 40, 50), (10, 20, 30)),
    "chosen rows": ((300, 130), ([290, 3, 3, 150],)),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Paths of a keyframe and two deltas, and what they hold; each leaf of many chunks."""
    tmp_path = tmp_path_factory.mktemp("chain")

    def written(arrays, name, **more):
        paths.append(str(tmp_path / f"{name}.tri"))
        tricomp.numpy.save_file(arrays, paths[-1], spec=SPEC, **more)
        return arrays

    paths: list[str] = []
    first = written({name: weights(shape, seed=len(name)) for name, (shape, _) in SHAPES.items()}, "0")
    second = written({name: stepped(array) for name, array in first.items()}, "1", reference=paths[0])
    third = {name: stepped(array, seed=2) for name, array in second.items()}
    with tricomp.open(paths[1], reference=paths[0]) as reference:
        written(third, "2", reference=reference)
    return paths, [first, second, third]


@pytest.mark.parametrize("name", SHAPES)
def test_a_slice_decodes_its_chunks_alone(chain, monkeypatch, name):
    (first, second, third), arrays = chain
    shape, index = SHAPES[name]
    decoded: list[range] = []
    original = codec.decode_parts

    def noted(frame, parts, *rest):
        for part in parts:
            decoded.append(range(part.start >> frame.plan.chunk_log2, -(-part.stop >> frame.plan.chunk_log2)))
        return original(frame, parts, *rest)

    monkeypatch.setattr(codec, "decode_parts", noted)
    monkeypatch.setattr(codec, "decode_many", None)
    needed = set((np.arange(np.prod(shape)).reshape(shape)[index].reshape(-1) >> 10).tolist())
    with tricomp.open(first) as keyframe, tricomp.open(second, reference=keyframe) as middle:
        levels = zip((first, second, third), (None, keyframe, middle), arrays, strict=True)
        for n_files, (path, reference, expected) in enumerate(levels, 1):
            decoded.clear()
            with tricomp.numpy.safe_open(path, reference=reference) as opened:
                assert same_bits(opened.get_slice(name)[index], np.array(expected[name][index]))
            chunks = [chunk for part in decoded for chunk in part]
            assert set(chunks) == needed
            assert len(chunks) == n_files * len(needed)  # each once
        with tricomp_torch.safe_open(third, reference=middle) as tensors:
            ours = tensors.get_slice(name)[index]
            assert ours.numpy().tobytes() == arrays[2][name][index].tobytes()


def test_runs_are_elements_decoded_together(chain):
    (first, second, _), arrays = chain
    asked = [range(1), range(2047, 2049), range(30_000, 39_000), range(5, 5), range(4, 7)]
    with tricomp.open(second, reference=first) as file:
        for name in ("rows", "one huge row"):
            flat = arrays[1][name].reshape(-1)
            runs = file.runs(name, asked)
            assert [run.tobytes() for run in runs] == [flat[part.start : part.stop].tobytes() for part in asked]
            assert file.runs(name, []) == []
            for bad in (range(-1, 3), range(5, 4), range(0, 10, 2), range(7, flat.size + 1)):
                with pytest.raises(InvalidArgument, match=f"leaf '{name}': range.* of {flat.size} elements"):
                    file.runs(name, [range(3), bad])


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("name", ["rows", "columns of rows longer than a chunk", "one huge row"])
def test_damage_outside_a_slice_does_no_harm(tmp_path, chain, name, damaged):
    paths, arrays = [shutil.copy(path, tmp_path) for path in chain[0]], chain[1]
    index = SHAPES[name][1]
    with tricomp.open(paths[damaged], reference=paths[0] if damaged else None) as file:
        frame = file._frame_of[list(file).index(name)]
    with open(paths[damaged], "r+b") as stored:
        stored.seek(frame.offset + frame.n_bytes - 3)  # in the last chunk
        byte = stored.read(1)
        stored.seek(-1, 1)
        stored.write(bytes([byte[0] ^ 1]))
    with tricomp.numpy.safe_open(paths[1], reference=paths[0]) as opened:
        assert same_bits(opened.get_slice(name)[index], np.array(arrays[1][name][index]))
        with pytest.raises(CorruptFrame, match=f"chunk [0-9]+ of '{name}'"):
            opened.get_slice(name)[-1:, ...] if name != "one huge row" else opened.get_slice(name)[-1]
        with pytest.raises(CorruptFrame):
            opened.get_tensor(name)
        with pytest.raises(CorruptFrame):
            opened.get_slice(name)[...]


def test_a_slice_takes_memory_for_itself_alone(path):
    n = 1 << 21
    tricomp.numpy.save_file({"x": np.arange(n, dtype=np.int32).reshape(1, n) ** 3}, path)
    with tricomp.numpy.safe_open(path) as opened:
        part = opened.get_slice("x")
        tracemalloc.start()
        for index in (
            (0, slice(n // 2, n // 2 + 1000)),
            (0, slice(5, None, n // 3)),
            (slice(None), -1),
            (0, [7, 8, 7]),
        ):
            part[index]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 6 << 20  # of 8 MiB; a chunk of 65,536 words and what decodes it is 3


def test_tied_tensors_come_back_tied_and_only_they(path):
    weight = torch.arange(12.0).reshape(3, 4)
    given = {"embed": weight, "head": weight, "copy": weight.clone(), "row": weight[1]}
    tricomp_torch.save_file(given, path)
    back = tricomp_torch.load_file(path)
    assert back["head"].data_ptr() == back["embed"].data_ptr()
    back["head"].zero_()
    assert back["embed"].eq(0).all()
    assert same(back["copy"], weight)
    assert same(back["row"], weight[1])
    assert same_bits(tricomp.numpy.load_file(path)["head"], weight.numpy())


def test_any_strides_are_taken(path):
    base = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    given = {
        "transposed": base[0, 0].T,
        "stepped": base[0, :, ::2],
        "channels last": base.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(7),
        "parameter": torch.nn.Parameter(base),
    }
    conjugate = torch.view_as_complex(base[..., :2].contiguous()).conj()
    tricomp_torch.save_file({"z": conjugate}, path)
    assert same(tricomp_torch.load_file(path)["z"], conjugate.resolve_conj())
    tricomp_torch.save_file(given, path)
    back = tricomp_torch.load_file(path)
    assert all(same(back[name], tensor) for name, tensor in given.items())
    assert back["channels last"].stride() == given["channels last"].stride()
    with tricomp_torch.safe_open(path) as opened:
        assert opened.get_tensor("channels last").stride() == given["channels last"].stride()
        assert same(opened.get_slice("channels last")[1, 1:], base[1, 1:])
    tricomp.numpy.save_file({"t": np.asfortranarray(base.numpy()), "big": np.arange(5, dtype=">i4")}, path)
    arrays = tricomp.numpy.load_file(path)
    assert arrays["t"].tobytes() == base.numpy().tobytes()
    assert arrays["big"].tolist() == [0, 1, 2, 3, 4]


def test_reference(path, tmp_path):
    old = {"w": torch.from_numpy(weights((90, 70)))}
    new = {"w": torch.from_numpy(stepped(old["w"].numpy()))}
    base = str(tmp_path / "base.tri")
    tricomp_torch.save_file(old, base)
    report = tricomp_torch.save_file(new, path, reference=base)
    assert report.parent == tricomp.content_id({"w": old["w"].numpy()})
    assert same(tricomp_torch.load_file(path, reference=base)["w"], new["w"])
    assert same(tricomp_torch.load_file(path, "cpu", reference=old)["w"], new["w"])
    assert same_bits(tricomp.numpy.load_file(path, reference={"w": old["w"].numpy()})["w"], new["w"].numpy())
    with tricomp_torch.safe_open(path, reference=base) as opened:
        assert same(opened.get_slice("w")[3:5], new["w"][3:5])
    with tricomp_torch.safe_open(path) as opened:
        assert opened.get_slice("w").get_shape() == [90, 70]
        with pytest.raises(WrongReference, match="no reference was given"):
            opened.get_slice("w")[0]
    with pytest.raises(WrongReference, match="was encoded against content id"):
        tricomp_torch.load_file(path, reference=new)


def test_any_file_opens(path):
    tree: Any = {"model": {"a/b": np.ones(3, np.float32), "c": [np.zeros((2, 2))]}, "step": 7}
    tricomp.save(path, tree, metadata={"run": "a", "n": 3})
    with tricomp.numpy.safe_open(path) as opened:
        assert opened.offset_keys() == ["model/a~1b", "model/c/0"]
        assert opened.metadata() == {"run": "a"}
        assert same_bits(opened.get_tensor("model/a~1b"), tree["model"]["a/b"])
    for made, names in (
        (OrderedDict([("a/b", np.ones(3)), ("~", np.ones(2))]), ["a/b", "~"]),
        ({"w": np.ones(3), "step": 3, "more": {}}, ["w"]),
        ([np.ones(1), np.ones(2)], ["0", "1"]),
        (np.ones(4), [""]),
        ({7: np.ones(2)}, ["7"]),
        ({"plain": 3}, []),
    ):
        tricomp.save(path, made)
        assert list(tricomp.numpy.load_file(path)) == names
        assert list(tricomp_torch.load_file(path)) == names
        with tricomp_torch.safe_open(path) as opened:
            assert opened.metadata() is None
    model = torch.nn.Linear(3, 2)
    tricomp_torch.save(model.state_dict(), path)
    with tricomp_torch.safe_open(path) as opened:
        assert opened.keys() == ["bias", "weight"]
        assert opened.metadata() is None  # though the file holds notes
    model.load_state_dict(tricomp_torch.load_file(path))


def test_a_compressed_safetensors_file_opens_as_the_original(tmp_path, other):
    given = {"b/c": torch.arange(2000.0).reshape(40, 50), "a~": torch.ones(3, dtype=torch.bfloat16), "": torch.ones(())}
    safetensors.torch.save_file(given, other, {"format": "pt", "base": "é", "origin": "web"})
    assert main(["compress", "-q", other]) == 0
    with safetensors.safe_open(other, "pt") as a, tricomp_torch.safe_open(f"{other}.tri") as b:
        assert a.keys() == b.keys()
        assert a.offset_keys() == b.offset_keys()
        assert a.metadata() == b.metadata() == {"format": "pt", "base": "é", "origin": "web"}
        assert all(same(a.get_tensor(name), b.get_tensor(name)) for name in given)
        assert same(a.get_slice("b/c")[3:9, 4], b.get_slice("b/c")[3:9, 4])


@pytest.mark.parametrize("save_file", [tricomp_torch.save_file, tricomp.numpy.save_file])
def test_what_is_no_flat_dict_is_refused(path, save_file):
    good = torch.ones(2) if save_file is tricomp_torch.save_file else np.ones(2)
    bad = np.ones(2) if save_file is tricomp_torch.save_file else torch.ones(2)
    for entry in (3, None, "text", [good], {"nested": good}, bad):
        with pytest.raises(
            UnsupportedNode, match="entry 'odd': expected a (torch.Tensor|numpy array), got a"
        ) as refusal:
            save_file({"w": good, "odd": entry}, path)
        assert isinstance(refusal.value, TypeError)
        assert isinstance(refusal.value, ValueError)
    for key in (1, None, ("a",), b"a"):
        with pytest.raises(UnsupportedNode, match=r"the key .* is a (int|NoneType|tuple|bytes), expected str"):
            save_file({"w": good, key: good}, path)
    with pytest.raises(InvalidArgument, match="save_file: expected a dict of str to .*, got a list"):
        save_file([good], path)
    for metadata, text in (
        ({"a": 1}, "expected a dict of str to str, got the int 1 at 'a'. Turn it into text"),
        ({1: "a"}, "expected a dict of str to str, got the int 1 at 1"),
        (["a"], "expected a dict of str to str, got a list"),
        ({"origin": "x"}, "the key 'origin' is kept for tricomp's own notes"),
        ({"tricomp_torch": "x"}, "the key 'tricomp_torch' is kept"),
    ):
        with pytest.raises(InvalidArgument, match=f"metadata: {text}"):
            save_file({"w": good}, path, metadata)
    with pytest.raises(MissingFile):
        tricomp.numpy.load_file(path)  # nothing was written


class Named(torch.Tensor):
    """A subclass such as users and libraries define."""


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.eye(3).to_sparse(), "'odd': its layout is torch.sparse_coo"),
        (lambda: torch.empty(3, device="meta"), "'odd': it is on the meta device"),
        (lambda: torch.ones(2).as_subclass(Named), "'odd': expected a torch.Tensor, got its subclass Named"),
        (lambda: torch.ones(2, dtype=torch.complex32), "'odd': torch.complex32 is not one of"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused_by_name(path, make, text):
    with pytest.raises(InvalidArgument, match=text):
        tricomp_torch.save_file({"odd": make()}, path)


def test_names_frameworks_and_closed_files(path):
    tricomp_torch.save_file({"w": torch.ones(2)}, path)
    for open_any in (tricomp_torch.safe_open, tricomp.numpy.safe_open):
        with open_any(path) as opened:
            part = opened.get_slice("w")
            with pytest.raises(MissingLeaf, match="no tensor 'nope' among its 1 tensors"):
                opened.get_tensor("nope")
            with pytest.raises(KeyError):
                opened.get_slice("nope")
        for ask in (opened.keys, opened.metadata, opened.get_tensors, part.get_shape):
            with pytest.raises(InvalidArgument, match="the file is closed"):
                ask()
        opened.close()
        with pytest.raises(InvalidArgument, match="framework 'tf'"):
            open_any(path, "tf")
        with pytest.raises(MissingFile):
            open_any(path + ".nope")
    with pytest.raises(InvalidArgument, match=r"framework 'pt' is not 'np'. For torch, use tricomp_torch.safe_open"):
        tricomp.numpy.safe_open(path, "pt")


def test_devices(path):
    tensor = torch.arange(6.0).reshape(2, 3)
    tricomp_torch.save_file({"w": tensor, "v": tensor}, path)
    for device in ("cpu", torch.device("cpu"), None):
        assert same(tricomp_torch.load_file(path, device)["w"], tensor)
    meta = tricomp_torch.load_file(path, device="meta")
    assert meta["w"].is_meta
    assert meta["w"].shape == (2, 3)
    with tricomp_torch.safe_open(path, "pt", "meta") as opened:
        assert opened.get_slice("w")[0].shape == (3,)
    for missing in ("cudaa", "cuda:99", 99):
        with pytest.raises(InvalidArgument, match=f"device {missing!r} cannot be used here: "):
            tricomp_torch.load_file(path, device=missing)
    with pytest.raises(InvalidArgument, match="device: expected a name or number, got a bool True"):
        tricomp_torch.load_file(path, True)
    with pytest.raises(InvalidArgument, match="device 'cuda:0': numpy's arrays are on the CPU"):
        tricomp_torch.safe_open(path, "np", "cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_devices(path):
    tensor = torch.arange(6.0).reshape(2, 3).cuda()
    tricomp_torch.save_file({"w": tensor, "v": tensor}, path)
    for device in ("cuda", "cuda:0", 0, torch.device("cuda", 0)):
        back = tricomp_torch.load_file(path, device)
        assert back["w"].device == tensor.device
        assert back["w"].data_ptr() == back["v"].data_ptr()
        assert torch.equal(back["w"], tensor)
        with tricomp_torch.safe_open(path, "pt", device) as opened:
            assert torch.equal(opened.get_slice("w")[1, ::2], tensor[1, ::2])


@pytest.mark.parametrize(
    "notes", [{"ties": {"v": "w"}}, {"ties": 3}, {"strides": {"w": [1]}}, {"strides": {"w": [9, 9]}}]
)
def test_notes_that_do_not_fit_are_refused(path, notes):
    tricomp.save(path, {"w": np.ones((2, 3)), "v": np.zeros((2, 3))}, metadata={"tricomp_torch": notes})
    with pytest.raises(CorruptFile, match="tricomp.load"):
        tricomp_torch.load_file(path)
    assert list(tricomp.numpy.load_file(path)) == ["w", "v"]


def test_the_module_called_numpy_hides_nothing(tmp_path):
    code = (
        "import sys, tricomp.numpy, numpy; assert tricomp.numpy.np is numpy and numpy.ndarray\n"
        "assert not {'torch', 'jax', 'safetensors'} & set(sys.modules)\n"
        "from tricomp.numpy import load_file, safe_open, save_file"
    )
    for command in (["-c", code], ["-m", "tricomp.cli", "--version"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
