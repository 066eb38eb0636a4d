"""`tricomp export --to flax|orbax`: what JAX's own libraries read back, bit for bit, without tricomp."""

import json
import logging
import os
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

import flax
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import tricomp_jax
from flax.training.train_state import TrainState
from tricomp_jax.orbax import TricompSave
from tricomp_jax.orbax.export import FORMAT

import tricomp
from tests.cases import stepped, weights
from tests.test_jax_adapter import NARROW, assert_same, random_bits
from tricomp import formats
from tricomp.cli import main
from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedFormat
from tricomp.subset import Subset

SHARED = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "int8", "uint32", "bool"]


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """The entry point of tricomp_jax, whether or not the installed wheel has it."""
    entry = EntryPoint("orbax", "tricomp_jax.orbax.export:FORMAT", formats.FOLDERS)
    real = formats._entry_points
    monkeypatch.setattr(formats, "_entry_points", lambda g=formats.GROUP: [entry] if g == formats.FOLDERS else real(g))


@pytest.fixture
def run(capsys):
    """Run the command line. Returns what it printed, and raises AssertionError with what it said if it failed."""

    def call(*words, code=0):
        logging.getLogger("absl").setLevel(logging.ERROR)
        found = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.out if code == 0 else printed.err

    return call


def train_state(step=0):
    old = weights((61, 35))
    for i in range(step):
        old = stepped(old, i)
    params = {"dense": {"kernel": jnp.asarray(old), "bias": jnp.asarray(old[0], jnp.bfloat16)}, "many": [jnp.ones(3)]}
    optimizer = optax.chain(optax.clip(1.0), optax.masked(optax.adamw(1e-3), {"dense": True, "many": [False]}))
    return TrainState.create(apply_fn=lambda: None, params=params, tx=optimizer).replace(step=step)


def same_bits(a, b):
    assert (a.dtype.name, a.shape, np.asarray(a).tobytes()) == (b.dtype.name, b.shape, np.asarray(b).tobytes())


# flax


def test_flax_gets_what_flax_writes(tmp_path, run):
    state = train_state(3)
    tricomp_jax.save(tmp_path / "x.tri", state)
    run("export", tmp_path / "x.tri", "--to", "flax")
    data = (tmp_path / "x.msgpack").read_bytes()
    assert data == flax.serialization.to_bytes(state)
    found = flax.serialization.from_bytes(train_state(), data)
    assert_same(jax.tree.map(jnp.asarray, found.params), state.params)
    assert (found.step, jax.tree.structure(found.opt_state)) == (3, jax.tree.structure(state.opt_state))


def test_flax_of_every_kind_of_node(tmp_path, run):
    narrow: Any = {name: random_bits(name, (5, 7)) for name in NARROW}
    tree = {
        "shared": {name: random_bits(name, (3, 5)) for name in SHARED},
        "narrow": narrow,
        "ints": {3: np.ones(2), -1: {"x": 2}},
        "nested": [np.arange(5), [(1, None), {}], []],
        "pair": Pair(np.zeros((0, 3)), (np.array(2.5),)),
        "plain": {"t": "é", "b": b"\0\xff", "yes": True, "z": 1 - 2j, "big": 2**64 - 1},
    }
    tricomp_jax.save(tmp_path / "x.tri", tree)
    run("export", tmp_path / "x.tri", "-o", tmp_path / "x.msgpack")
    assert (tmp_path / "x.msgpack").read_bytes() == flax.serialization.to_bytes(tree)
    found = flax.serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    for name, array in narrow.items():
        same_bits(found["narrow"][name], array)
    key = jax.random.key(5)
    tricomp_jax.save(tmp_path / "key.tri", {"key": key})
    run("export", tmp_path / "key.tri", "--to", "flax")
    found = flax.serialization.msgpack_restore((tmp_path / "key.msgpack").read_bytes())
    same_bits(found["key"], jax.random.key_data(key))


def test_lists_of_a_flax_file_stay(tmp_path, run):
    data = flax.serialization.msgpack_serialize({"l": [np.ones(3), [1, {}]]})
    (tmp_path / "x.msgpack").write_bytes(data)
    run("compress", tmp_path / "x.msgpack")
    run("export", tmp_path / "x.msgpack.tri", "-o", tmp_path / "y.msgpack")
    assert (tmp_path / "y.msgpack").read_bytes() == data


def test_what_flax_cannot_hold(tmp_path, run):
    tricomp.save(tmp_path / "x.tri", {"a": {3: 1, "3": np.ones(1)}})
    said = run("export", tmp_path / "x.tri", "--to", "flax", code=1)
    assert "node 'a': has keys that are alike as text" in said
    tricomp.save(tmp_path / "x.tri", {"a": (2**70, np.ones(1))})
    assert "node '0' in node 'a' in the tree itself: flax files hold" in run(
        "export", tmp_path / "x.tri", "--to", "flax", code=1
    )
    assert not (tmp_path / "x.msgpack").exists()


# orbax


def test_orbax_reads_it(tmp_path, run):
    state = train_state(2)
    tricomp_jax.save(tmp_path / "x.tri", state)
    said = json.loads(run("export", tmp_path / "x.tri", "--to", "orbax", "--json"))
    assert (said["format"], said["output"], said["n_leaves"]) == ("orbax", str(tmp_path / "x.orbax"), 8)
    assert said["n_bytes"] > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.orbax", "x.tri"]
    target = jax.tree.map(lambda leaf: leaf, train_state())
    for checkpointer in (ocp.StandardCheckpointer, ocp.PyTreeCheckpointer):
        with checkpointer() as reading:
            plain = reading.restore(tmp_path / "x.orbax")
        same_bits(plain["params"]["dense"]["bias"], state.params["dense"]["bias"])
        same_bits(plain["params"]["many"][0], state.params["many"][0])
        assert type(plain["params"]["dense"]["kernel"]) is np.ndarray
        assert (plain["step"], set(plain)) == (2, {"step", "params", "opt_state"})
    with ocp.StandardCheckpointer() as reading:
        found = reading.restore(tmp_path / "x.orbax", target)
    assert_same(found.params, state.params)
    assert_same(found.opt_state, state.opt_state)


def test_orbax_of_every_kind_of_node(tmp_path, run):
    key = jax.random.key(5)
    tree: dict[str, Any]
    narrow = ["int2", "int4", "float4_e2m1fn"]
    tree = {
        "shared": {name: random_bits(name, (3, 5)) for name in SHARED},
        "narrow": {name: random_bits(name, (5, 7)) for name in narrow},
        "ints": {3: np.ones(2), -1: {"x": 2}},
        "nested": [np.arange(5), [(1, None), {}], []],
        "pair": Pair(np.arange(3), (np.array(2.5, np.float16),)),
        "plain": {"t": "é", "yes": True, "f": 0.1},
        "a/b": {"c.d": np.int64(3)},
        "key": key,
    }
    tricomp_jax.save(tmp_path / "x.tri", tree)
    run("export", tmp_path / "x.tri", "-o", tmp_path / "y.orbax")
    with ocp.PyTreeCheckpointer() as reading:
        found = reading.restore(tmp_path / "y.orbax")
    for group in ("shared", "narrow"):
        for name, array in tree[group].items():
            same_bits(found[group][name], array)
    same_bits(found["key"], jax.random.key_data(key))
    same_bits(found["a/b"]["c.d"], np.array(3))
    assert found["plain"] == tree["plain"]
    assert (found["ints"]["3"].tolist(), found["ints"]["-1"]) == ([1, 1], {"x": 2})
    assert (found["nested"][0].tolist(), found["nested"][1:]) == ([0, 1, 2, 3, 4], [[[1, None], {}], []])
    assert (found["pair"]["left"].tolist(), found["pair"]["right"][0].dtype) == ([0, 1, 2], np.float16)


def test_some_leaves_and_steps_of_stores(tmp_path, run):
    with tricomp.Store(tmp_path / "run") as store:
        for step in range(3):
            flat = tricomp_jax.flatten(
                {"model": {"w": jnp.asarray(stepped(weights((40, 9)), step)), "i": random_bits("int4", (7,))}}
            )
            store.save(step, flat.tree, metadata={"tricomp_jax": flat.notes})
    run("export", f"{tmp_path / 'run'}@2", "--to", "orbax", "--leaves", "model/*", "-o", tmp_path / "two.orbax")
    run("store", "export", tmp_path / "run", "1", "--to", "orbax", "-o", tmp_path / "one.orbax")
    run("export", f"{tmp_path / 'run'}@2", "--leaves", "model/i", "-o", tmp_path / "i.msgpack")
    run("export", f"{tmp_path / 'run'}@2", "--leaves", "model/*", "-o", tmp_path / "two.tri")
    with ocp.PyTreeCheckpointer() as reading:
        two, one = reading.restore(tmp_path / "two.orbax"), reading.restore(tmp_path / "one.orbax")
    same_bits(two["w"], stepped(weights((40, 9)), 2))
    same_bits(one["model"]["w"], stepped(weights((40, 9)), 1))
    expected = random_bits("int4", (7,))
    found = flax.serialization.msgpack_restore((tmp_path / "i.msgpack").read_bytes())
    for array in (two["i"], one["model"]["i"], found["i"], tricomp_jax.load(tmp_path / "two.tri")["i"]):
        same_bits(array, expected)


def test_a_step_that_orbax_manages(tmp_path, run):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in range(2):
            manager.save(step, args=TricompSave(train_state(step)))
    run("export", f"{tmp_path / 'run' / '1' / 'default'}@1", "--to", "orbax", "-o", tmp_path / "x.orbax")
    with ocp.StandardCheckpointer() as reading:
        assert_same(reading.restore(tmp_path / "x.orbax", train_state()).params, train_state(1).params)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": b"x"}, "c": np.ones(1)}, "node 'a/b': Orbax holds no bytes beside arrays"),
        ({"a": 1j, "c": np.ones(1)}, "node 'a': Orbax holds no complex numbers beside arrays"),
        (
            {"a": [np.ones(1), np.ones((0, 3))]},
            r"node 'a/1': Orbax holds no array without elements, and this is float64",
        ),
        ({"a": 2**64 - 1}, "node 'a': Orbax holds numbers of 64 bits"),
        ({"a": np.ones(3, ml_dtypes.uint2)}, "node 'a': Orbax holds no uint2. Leave it out"),
        ({3: 1, "3": np.ones(2)}, "nodes '3' and '3': have one name in Orbax, '3'"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(2)}}, "nodes 'a.b' and 'a/b': have one name in Orbax, 'a.b'"),
        ({}, "the tree is empty"),
    ],
)
def test_what_orbax_cannot_hold(tmp_path, run, tree, message):
    tricomp_jax.save(tmp_path / "x.tri", tree)
    assert message in run("export", tmp_path / "x.tri", "--to", "orbax", code=1)
    assert os.listdir(tmp_path) == ["x.tri"]


def test_folders_that_are_there(tmp_path, run):
    tricomp_jax.save(tmp_path / "x.tri", {"w": np.ones(5)})
    words = ("export", tmp_path / "x.tri", "--to", "orbax")
    run(*words)
    assert "x.orbax: is there already. Pass -f" in run(*words, code=1)
    tricomp_jax.save(tmp_path / "x.tri", {"w": np.zeros(5)})
    run(*words, "-f")
    with ocp.PyTreeCheckpointer() as reading:
        assert reading.restore(tmp_path / "x.orbax")["w"].tolist() == [0] * 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "is no orbax checkpoint and will not be replaced" in run(*words, "-f", "-o", tmp_path / "mine", code=1)
    (tmp_path / "mine" / "_METADATA").write_text("x")
    tricomp_jax.save(tmp_path / "mine" / "y.tri", {"w": np.zeros(5)})
    said = run("export", tmp_path / "mine" / "y.tri", "--to", "orbax", "-f", "-o", tmp_path / "mine", code=1)
    assert "the input is in it" in said
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert "is a folder, not a file for standard output" in run(*words, "-o", "-", code=1)
    data = bytearray((tmp_path / "x.tri").read_bytes())
    data[len(data) - 100] ^= 1
    (tmp_path / "x.tri").write_bytes(data)
    before = sorted(os.listdir(tmp_path))
    run(*words, "-f", code=1)
    assert sorted(os.listdir(tmp_path)) == before
    with ocp.PyTreeCheckpointer() as reading:
        assert reading.restore(tmp_path / "x.orbax")["w"].tolist() == [0] * 5


def test_where_orbax_is_not_installed(tmp_path, monkeypatch):
    def broken(group=formats.GROUP):
        class Entry:
            name = "orbax"

            def load(self):
                raise ModuleNotFoundError("tricomp_jax.orbax needs orbax-checkpoint, which is not installed.")

        return [Entry()] if group == formats.FOLDERS else []

    monkeypatch.setattr(formats, "_entry_points", broken)
    with pytest.raises(
        UnsupportedFormat, match="format 'orbax': expected one of flax, .*orbax.* needs orbax-checkpoint"
    ):
        formats.folder("orbax")
    assert formats.folder("npz") is None
    tricomp.save(tmp_path / "x.tri", {"w": np.ones(3)})
    with (
        tricomp.open(tmp_path / "x.tri") as file,
        pytest.raises(UnsupportedFormat, match="'gif': expected one of .*orbax"),
    ):
        formats.exported("gif", file)


def test_notes_that_lie(tmp_path):
    notes = {"dtypes": {"w": "int4"}, "kinds": {"t": "complex"}}
    tricomp.save(tmp_path / "x.tri", {"w": np.full(3, 77, np.int8), "t": (1, 2, 3)}, metadata={"tricomp_jax": notes})
    with tricomp.open(tmp_path / "x.tri") as file:
        with pytest.raises(InvalidArgument, match="node 't': Orbax holds no complex numbers"):
            FORMAT.write(file, str(tmp_path / "x.orbax"))
        with pytest.raises(CorruptFile, match="'w' is noted as int4, but holds other int8s"):
            FORMAT.write(Subset(file, ["w"]), str(tmp_path / "x.orbax"))
        assert flax.serialization.msgpack_restore(b"".join(formats.exported("flax", file)))["t"] == {
            "0": 1,
            "1": 2,
            "2": 3,
        }
    lies: list[Any] = [3, {"dtypes": 3}, {"dtypes": {"w": 3}}, {"dtypes": {"w": []}}, {"kinds": {"t": 3}}]
    for damaged in lies:
        tricomp.save(tmp_path / "x.tri", {"w": np.zeros(3, np.int8)}, metadata={"tricomp_jax": damaged})
        with tricomp.open(tmp_path / "x.tri") as file:
            assert b"".join(bytes(piece) for piece in formats.exported("flax", file))
            if damaged != 3:
                with pytest.raises((CorruptFile, InvalidArgument)):
                    FORMAT.write(file, str(tmp_path / "x.orbax"))
