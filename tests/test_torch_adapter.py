"""tricomp_torch.save and load: every tensor comes back with its bits, its dtype, its shape and its ties."""

import collections
import importlib.util
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import tricomp_torch
from tricomp_torch.trees import NOTES_KEY, Flat, flatten, unflatten

import tricomp
from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedDtype, UnsupportedNode, WrongReference

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64, torch.complex128,
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip
WIDTHS = [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e5m2, torch.bool]


def raw(tensor):
    """The bytes of a tensor in row order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return b"" if flat.numel() == 0 else flat.view(torch.uint8).numpy().tobytes()


def random_bits(dtype, shape, seed=0):
    """A tensor of any bit patterns that the dtype allows, NaN payloads among them."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    bits = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, n_bytes, np.uint8)
    return torch.from_numpy(bits).view(dtype).reshape(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "a.tri")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1,), (33,), (7, 5, 3), (1, 257)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(path, dtype, shape):
    tensor = random_bits(dtype, shape)
    tricomp_torch.save({"x": tensor}, path)
    assert same(tricomp_torch.load(path)["x"], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_0d_and_bare_tensors(path, dtype):
    tensor = random_bits(dtype, (1,)).reshape(())
    tricomp_torch.save(tensor, path)
    back = tricomp_torch.load(path)
    assert back.shape == ()
    assert same(back, tensor)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_views_of_any_strides(path, dtype):
    base = random_bits(dtype, (6, 10, 4))
    views = {
        "transposed": base.transpose(0, 2),
        "stepped": base[::2, 1::3],
        "expanded": base[:1].expand(5, 10, 4),
        "offset": base[1:, 2:, 3],
    }
    tricomp_torch.save(views, path)
    back = tricomp_torch.load(path)
    assert all(same(back[name], view) for name, view in views.items())


def test_conjugate_and_negative_views_are_resolved(path):
    z = random_bits(torch.complex64, (5,)).nan_to_num()
    tree = {"z": z, "conj": z.conj(), "imag": z.conj().imag}
    tricomp_torch.save(tree, path)
    back = tricomp_torch.load(path)
    assert same(back["z"], z)
    assert same(back["conj"], z.conj().resolve_conj())
    assert same(back["imag"], z.conj().imag.resolve_neg())


def test_cpu_tensors_are_not_copied_on_the_way_in():
    tensor = torch.arange(10, dtype=torch.bfloat16)
    array = flatten({"x": tensor}).tree["x"]
    assert array.dtype == ml_dtypes.bfloat16
    assert array.ctypes.data == tensor.data_ptr()


def test_requires_grad_and_parameters_come_back_as_plain_tensors(path):
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    buffer = torch.nn.Buffer(torch.randn(3))
    tricomp_torch.save([parameter, buffer, parameter * 2], path)
    back = tricomp_torch.load(path)
    assert [type(tensor) for tensor in back] == [torch.Tensor] * 3
    assert not any(tensor.requires_grad for tensor in back)
    assert same(back[2], parameter * 2)


def test_plain_values_and_containers(path):
    Point = collections.namedtuple("Point", "x y")
    tree: dict[Any, Any] = {
        "none": None, "bool": True, "int": -(2**80), "float": -0.0, "text": "é", "bytes": b"\0\1", 3: "int key",
        "empty": {}, "tuple": (1, (2.5,), []), "point": Point(torch.ones(2), 4), "a/b~c": torch.zeros(1),
        "size": torch.Size([2, 3]), "ordered": collections.OrderedDict(b=1, a=torch.ones(1)),
        "counter": collections.Counter({5: 2, 7: 1}), "array": np.arange(3, dtype=np.float16),
        "scalar": np.float64(0.1),
    }  # fmt: skip
    tricomp_torch.save(tree, path)
    back = tricomp_torch.load(path)
    assert list(back) == list(tree)
    for key in ("none", "bool", "int", "text", "bytes", 3, "empty", "tuple", "size", "counter", "scalar"):
        assert back[key] == tree[key]
        assert type(back[key]) is type(tree[key])
    assert math.copysign(1, back["float"]) == -1
    assert back["point"].y == 4
    assert same(back["point"].x, tree["point"].x)
    assert type(back["ordered"]) is collections.OrderedDict
    assert list(back["ordered"]) == ["b", "a"]
    assert back["array"].dtype == np.float16
    assert back["array"].tolist() == [0, 1, 2]


def test_nan_payloads_and_negative_zero(path):
    bits = torch.tensor([0x7FC00001, 0x7F800123, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    tricomp_torch.save(bits.view(torch.float32), path)
    assert torch.equal(tricomp_torch.load(path).view(torch.int32), bits)


class TiedHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.head = torch.nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_come_back_tied_and_only_they(path):
    state = TiedHead().state_dict()
    state["copy"] = state["head.weight"].clone()
    tricomp_torch.save(state, path)
    back = tricomp_torch.load(path)
    storages = {name: tensor.untyped_storage().data_ptr() for name, tensor in back.items()}
    assert storages["head.weight"] == storages["embedding.weight"]
    assert storages["copy"] != storages["embedding.weight"]
    back["head.weight"].zero_()
    assert back["embedding.weight"].eq(0).all()
    assert same(back["copy"], state["copy"])
    assert same(tricomp_torch.load(path)["embedding.weight"], state["embedding.weight"])


def test_tied_entries_are_all_there_for_the_core_and_cost_nearly_nothing(tmp_path):
    tensor = random_bits(torch.float32, (20_000,))
    once = tricomp_torch.save({"a": tensor}, str(tmp_path / "once.tri"))
    twice = tricomp_torch.save({"a": tensor, "b": tensor}, str(tmp_path / "twice.tri"))
    plain = tricomp.load(twice.path)
    assert plain["a"].tobytes() == plain["b"].tobytes() == raw(tensor)
    assert twice.file_bytes < once.file_bytes + 300


def test_overlapping_views_and_empty_tensors_are_not_tied(path):
    base = torch.arange(10.0)
    tree = {"all": base, "part": base[:5], "rows": base.view(2, 5), "e1": torch.empty(0), "e2": torch.empty(0)}
    assert "ties" not in flatten(tree).notes
    tricomp_torch.save(tree, path)
    back = tricomp_torch.load(path)
    back["all"].zero_()
    assert same(back["part"], base[:5])
    assert same(back["rows"], base.view(2, 5))


def test_equal_but_separate_tensors_do_not_share_memory(path):
    tree = {name: torch.zeros(4000) for name in "abc"}
    tricomp_torch.save(tree, path)
    back = tricomp_torch.load(path)
    back["a"].fill_(1)
    assert same(back["b"], tree["b"])
    assert same(back["c"], tree["c"])


def test_loading_against_a_tree_shares_no_memory_with_it(tmp_path):
    old = {"same": torch.arange(5000.0), "other": torch.arange(7.0)}
    path = str(tmp_path / "delta.tri")
    report = tricomp_torch.save({**old, "other": torch.ones(7)}, path, reference=old)
    assert report.parent is not None
    back = tricomp_torch.load(path, reference=old)
    back["same"].zero_()
    assert same(old["same"], torch.arange(5000.0))
    assert same(back["other"], torch.ones(7))


def test_reference_by_path_and_wrong_reference(tmp_path):
    old, new = {"w": torch.randn(3000)}, {"w": torch.randn(3000)}
    base, delta = str(tmp_path / "base.tri"), tmp_path / "delta.tri"
    tricomp_torch.save(old, base)
    tricomp_torch.save(new, delta, reference=base)
    assert same(tricomp_torch.load(delta, reference=base)["w"], new["w"])
    with tricomp.open(base) as opened:
        assert same(tricomp_torch.load(delta, reference=opened)["w"], new["w"])
    with pytest.raises(WrongReference, match="was encoded against content id"):
        tricomp_torch.load(delta, reference=new)


def test_module_versions_survive(path):
    state: Any = TiedHead().state_dict()
    tricomp_torch.save({"net": state}, path)
    back: Any = tricomp_torch.load(path)["net"]
    versions: Any = back._metadata
    assert type(back) is collections.OrderedDict
    assert dict(versions) == dict(state._metadata)
    assert versions["norm"] == {"version": 2}


def test_some_leaves(path):
    state = TiedHead().state_dict()
    tricomp_torch.save({"net": state, "step": torch.tensor(3)}, path)
    back = tricomp_torch.load(path, leaves=["net/*.weight", "step"])
    assert sorted(back) == ["net/embedding.weight", "net/head.weight", "net/norm.weight", "step"]
    assert back["net/head.weight"].data_ptr() == back["net/embedding.weight"].data_ptr()
    assert same(back["step"], torch.tensor(3))


def test_files_of_the_core_load_as_tensors(path):
    tricomp.save(path, {"x": np.arange(5, dtype=ml_dtypes.bfloat16), "y": [np.float32(2.5)]})
    back = tricomp_torch.load(path)
    assert same(back["x"], torch.arange(5, dtype=torch.bfloat16))
    assert same(back["y"][0], torch.tensor(2.5))


def test_the_cores_paths_are_the_adapters(path):
    tree = {"a/b": [torch.ones(1), (torch.zeros(1), {"~": torch.ones(2)})], 7: torch.zeros(3)}
    flat = flatten({**tree, "tie": tree[7]})
    assert flat.notes["ties"] == {"tie": "7"}
    tricomp_torch.save(tree, path)
    with tricomp.open(path) as file:
        assert sorted(file.keys()) == ["7", "a~1b/0", "a~1b/1/0", "a~1b/1/1/~0"]


def test_dtypes_that_torch_lacks_are_refused_by_name(path):
    tricomp.save(path, {"x": np.zeros(3, ml_dtypes.float8_e3m4)})
    with pytest.raises(UnsupportedDtype, match=r"leaf 'x': torch has no dtype 'float8_e3m4'\. Load this file with"):
        tricomp_torch.load(path)


def test_user_metadata_stands_beside_the_notes(path):
    tensor = torch.ones(2)
    tricomp_torch.save([tensor, tensor], path, metadata={"run": "a"})
    with tricomp.open(path) as file:
        assert file.metadata["run"] == "a"
        assert file.metadata[NOTES_KEY]["ties"] == {"1": "0"}
    with pytest.raises(InvalidArgument, match="metadata: the key 'tricomp_torch' is kept for tricomp's own notes"):
        tricomp_torch.save(tensor, path, metadata={NOTES_KEY: 1})


class Named(torch.Tensor):
    """A subclass such as users and libraries define."""


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"its layout is torch.sparse_coo. Store to_dense\(\)"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "its layout is torch.sparse_csr"),
    "meta": (lambda: torch.empty(3, device="meta"), "it is on the meta device and has no data. Materialise it"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "it is quantized. Store"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "it is a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        "NestedTensor, a nested tensor",
    ),
    "storage": (lambda: torch.ones(2).untyped_storage(), "expected a tensor, got its storage. Store the tensor"),
    "subclass": (lambda: torch.ones(2).as_subclass(Named), "expected a torch.Tensor, got its subclass Named"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "subclass UninitializedParameter, which has no data yet. Run the"),
    "complex32": (lambda: torch.ones(2, dtype=torch.complex32), "torch.complex32 is not one of float64, float32"),
    "module": (lambda: torch.nn.Linear(2, 2), r"expected plain data, got a Linear. Store its state_dict\(\)"),
    "generator": (lambda: torch.Generator(), r"expected plain data, got a Generator. Store its get_state\(\)"),
    "default": (lambda: collections.defaultdict(int), "expected a dict, got its subclass defaultdict"),
    "object": (lambda: object(), "object"),
    "set": (lambda: {1, (2, 3)}, "set"),
    "frozenset": (lambda: frozenset(), "frozenset"),
    "partial": (lambda: torch.nn.functional.relu, "function"),
    "masked": (lambda: np.ma.masked_array(np.zeros(2), [False, True]), "MaskedArray"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_stored_is_refused_by_name(path, name):
    make, text = REFUSED[name]
    with pytest.raises(UnsupportedNode if name != "complex32" else UnsupportedDtype, match=text) as refusal:
        tricomp_torch.save({"model": [{"odd": make()}]}, path)
    assert "'model/0/odd'" in str(refusal.value)
    assert not Path(path).exists()


@pytest.mark.parametrize("where", [{"cpu": "cpu"}, lambda storage, location: storage])
def test_map_location_takes_one_device(path, where):
    tricomp_torch.save({"x": torch.ones(2)}, path)
    assert tricomp_torch.load(path, map_location="cpu")["x"].device.type == "cpu"
    assert tricomp_torch.load(path, map_location=torch.device("meta"))["x"].is_meta
    with pytest.raises(InvalidArgument, match="map_location: expected a device or its name, got"):
        tricomp_torch.load(path, map_location=where)


@pytest.mark.parametrize(
    "notes",
    [
        {"ties": {"b": "a"}},
        {"ties": [1]},
        {"ties": {"b": 5}},
        {"kinds": {"c": "Counter", "c/0": 3}},
        {"kinds": {"c": "Counter"}},
        {"modules": 3},
        {"modules": {"c": {"": 1}}},
    ],
)
def test_notes_that_do_not_fit_are_refused(notes):
    tree = {"a": np.zeros(2), "b": np.ones(2), "c": [1]}
    with pytest.raises(CorruptFile, match=r"tricomp\.load"):
        unflatten(Flat(tree, notes))


def test_notes_from_nowhere_do_no_harm():
    tree = {"a": np.zeros(2)}
    back = unflatten(Flat(tree, {"ties": {"a": "gone", "gone": "a"}, "kinds": {"x": "Counter", "a": "odd"}, "more": 1}))
    assert same(back["a"], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tricomp_torch", "tricomp_jax"])
def test_adapters_go_by_their_own_name_only(name):
    folder = Path(__file__).parent.parent / "adapters" / name
    spec: Any = importlib.util.spec_from_file_location(f"adapters.{name}", folder / "__init__.py")
    with pytest.raises(ImportError, match=f"import {name} by that name, not as 'adapters.{name}'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_save_with_its_arguments_swapped_says_the_order(tmp_path):
    with pytest.raises(InvalidArgument, match=r"expected a path, as in tricomp_torch.save\(obj, path\), got a dict"):
        tricomp_torch.save(str(tmp_path / "a.tri"), {"w": torch.ones(3)})  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3, None])
def test_threads_change_nothing_but_the_time(tmp_path, threads):
    state = {"a": random_bits(torch.bfloat16, (300, 700)), "b": random_bits(torch.float32, (70,))}
    first, path = tmp_path / "first.tri", tmp_path / "x.tri"
    tricomp_torch.save(state, first, threads=1)
    tricomp_torch.save(state, path, threads=threads)
    assert first.read_bytes() == path.read_bytes()
    assert same(tricomp_torch.load(path, threads=threads)["a"], state["a"])
    tricomp_torch.save_file(state, path, threads=threads)
    assert same(tricomp_torch.load_file(path, threads=threads)["b"], state["b"])
    with tricomp_torch.safe_open(path, threads=threads) as opened:
        assert same(opened.get_tensor("a"), state["a"])
    held = tricomp_torch.CompressedStateDict(state, threads=threads)
    held.update({"b": state["b"] + 1})
    assert same(held["a"], state["a"])
    held.save(path)
    assert same(tricomp_torch.CompressedStateDict.load(path, threads=threads)["b"], state["b"] + 1)


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5, True])
def test_threads_that_are_none_are_refused(tmp_path, threads):
    state, path = {"a": torch.ones(3)}, tmp_path / "x.tri"
    tricomp_torch.save(state, path)
    for call in (
        lambda: tricomp_torch.save(state, tmp_path / "y.tri", threads=threads),
        lambda: tricomp_torch.load(path, threads=threads),
        lambda: tricomp_torch.save_file(state, tmp_path / "y.tri", threads=threads),
        lambda: tricomp_torch.load_file(path, threads=threads),
        lambda: tricomp_torch.safe_open(path, threads=threads),
        lambda: tricomp_torch.safe_open(path, "np", threads=threads),
        lambda: tricomp_torch.CompressedStateDict(state, threads=threads),
        lambda: tricomp_torch.CompressedStateDict.load(path, threads=threads),
        lambda: tricomp_torch.Checkpointer(tmp_path / "run", threads=threads),
    ):
        with pytest.raises(InvalidArgument, match="threads: expected a number from 1 to 4096, or None for one a core"):
            call()
    assert [one.name for one in tmp_path.iterdir()] == ["x.tri"]
