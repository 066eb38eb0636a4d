"""What tests of sharded arrays run in processes of their own: with four host devices, and as two processes of jax.

Each takes its name, a folder and what it needs on the command line, and raises if something is not as it should be.
The hard thing: how many devices and processes jax has is said before it starts, so not in the process of the tests.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tricomp_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tricomp_jax.arrays import is_key
from tricomp_jax.processes import InProcesses

import tricomp
from tests.cases import decayed, moments, of_dtype, stepped, weights
from tricomp.errors import InvalidArgument, MissingStep, UnsupportedNode

P = PartitionSpec
SHAPE = (1024, 288)  # more words than a part may have to be decoded whole in any case


class Moments(NamedTuple):
    count: Any
    mu: Any
    nu: Any


def state_at(step: int) -> dict[str, Any]:
    """The state of a run after some steps, as numpy has it: what all processes can tell for themselves."""
    w, v = weights(SHAPE), moments((96, 40), zero_share=0.2)
    for i in range(step):
        w, v = stepped(w, i), decayed(v, i)
    half = w[:96, :40].astype(ml_dtypes.bfloat16)
    return {
        "params": {"w": w, "half": half, "fp8": half.astype(ml_dtypes.float8_e4m3fn), "odd": weights((7, 5), step)},
        "opt": Moments(np.int32(step), stepped(weights((96, 40)), step), v),
        "int4": np.random.default_rng(step).integers(-8, 8, (64, 9), np.int8).astype(ml_dtypes.int4),
        "mask": of_dtype("bool", (32, 12), step),
        "complex": of_dtype("complex64", (16,), step),
        "empty": np.zeros((0, 8), np.float32),
        "dropout": np.arange(16, dtype=np.uint32).reshape(8, 2) + np.uint32(step),
        "key": np.array([step, 7], np.uint32),
        "step": step,
        "names": ["a", None, 2.5, step * 1j],
    }


KEYS = ("dropout", "key")
# How arrays are laid over a mesh of axes "x" and "y"; all others are there whole on every device.
LAID = {
    "params/w": P("x", "y"),
    "params/half": P("y"),
    "params/fp8": P(None, ("x", "y")),
    "opt/mu": P(("x", "y"), None),
    "opt/nu": P(None, "x"),
    "int4": P(("y", "x")),
    "mask": P("y", "x"),
    "complex": P("x"),
    "empty": P(None, "y"),
    "dropout": P("y"),
}
OTHERWISE = {
    "params/w": P(("y", "x"), None),
    "params/half": P(None, "x"),
    "params/fp8": P("x"),
    "opt/mu": P(),
    "opt/nu": P("x", "y"),
    "int4": P("x"),
    "mask": P(("x", "y")),
    "complex": P(("y", "x")),
    "dropout": P("x"),
}


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] = ("x", "y"), *, is_reversed: bool = False) -> Mesh:
    devices: list[Any] = list(jax.devices())[: int(np.prod(shape))]
    return Mesh(np.array(devices[::-1] if is_reversed else devices).reshape(shape), names)


def placed(tree: Any, mesh: Mesh, laid: dict[str, PartitionSpec]) -> Any:
    """The tree with its arrays over a mesh, random keys among them; plain values stay."""

    def put(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        host = np.asarray(leaf)
        array = jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, laid.get(name, P())), lambda index: host[index]
        )
        return jax.random.wrap_key_data(array) if name in KEYS else array

    return jax.tree_util.tree_map_with_path(put, tree)


def specs_of(tree: Any) -> Any:
    """The shapes, dtypes and shardings of a tree's arrays, without their data."""

    def spec(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if is_array else leaf

    return jax.tree.map(spec, tree)


def check_same(found: Any, expected: Any) -> None:
    """Types, dtypes, shardings and, of every shard that is here, bytes."""
    structure: Any = jax.tree.structure(expected)
    assert jax.tree.structure(found) == structure
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        if not isinstance(b, jax.Array):
            assert (type(a), a) == (type(b), b), path
            continue
        assert isinstance(a, jax.Array), path
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding), (path, a.sharding, b.sharding)
        if is_key(b):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        shards = zip(a.addressable_shards, b.addressable_shards, strict=True)
        for one, other in shards:
            assert (one.device, one.index) == (other.device, other.index), path
            assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes(), path


def refused(kind: type[Exception], call: Any, *texts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert all(text in str(caught.value) for text in texts), str(caught.value)


class Decoded:
    """Which leaves of which files are decoded, and how often, while it is there."""

    def __init__(self) -> None:
        self.leaves: list[tuple[str, str]] = []  # folder and path
        self.n_elements = 0

    def __enter__(self) -> Decoded:
        self._load, self._elements = tricomp.File.load, tricomp.File.elements

        def load(file: tricomp.File, leaves: Any = None) -> Any:
            self.leaves += [(Path(file.name).parent.name, path) for path in (file if leaves is None else leaves)]
            return self._load(file, leaves)

        def elements(file: tricomp.File, path: str, start: int, stop: int, parent: Any = None) -> Any:
            self.leaves.append((Path(file.name).parent.name, path))
            self.n_elements += stop - start
            return self._elements(file, path, start, stop, parent)

        kind: Any = tricomp.File
        kind.load, kind.elements = load, elements
        return self

    def __exit__(self, *_: object) -> None:
        kind: Any = tricomp.File
        kind.load, kind.elements = self._load, self._elements


def devices(folder: Path) -> None:
    """One process with four devices: arrays are stored whole, and come back to whatever sharding is asked for."""
    assert len(jax.devices()) == 4
    host = state_at(3)
    state = placed(host, mesh_of((4, 1)), LAID)
    path = folder / "four.tri"
    tricomp_jax.save(path, state)
    with tricomp.open(path) as file:
        assert file.leaf("params/w").shape == SHAPE
        assert len(file) == 13
        assert file["params/half"].tobytes() == host["params"]["half"].tobytes()
    meshes = {
        "the same": mesh_of((4, 1)),
        "2x2": mesh_of((2, 2)),
        "1x4, the other way round": mesh_of((1, 4), is_reversed=True),
        "2": mesh_of((2, 1)),
        "1": mesh_of((1, 1)),
    }
    for name, mesh in meshes.items():
        for laid in (LAID, OTHERWISE, {}):
            expected = placed(host, mesh, laid)
            with Decoded() as decoded:
                check_same(tricomp_jax.load(path, expected), expected)
            assert len(decoded.leaves) == len(set(decoded.leaves)) == 13, name
            if name == "2x2":
                check_same(tricomp_jax.load(path, specs_of(expected)), expected)
    one = jax.device_put(jnp.zeros(SHAPE), jax.devices()[3])
    found = tricomp_jax.load(path, {"params": {"w": one}}, strict=False)["params"]["w"]
    assert found.sharding == SingleDeviceSharding(jax.devices()[3])
    assert np.asarray(found).tobytes() == host["params"]["w"].tobytes()
    # What jit gives of a length that the mesh does not divide, and what a loop saves of a run.
    uneven = jax.jit(lambda x: x[:1021] * 2)(state["params"]["w"])
    tricomp_jax.save(folder / "uneven.tri", {"w": uneven})
    check_same(tricomp_jax.load(folder / "uneven.tri", {"w": uneven}), {"w": uneven})
    run = InProcesses(folder / "run", {"keyframe": tricomp.KeyframeEvery(3)})
    for step in (1, 2):
        run.save(step, run.flatten(placed(state_at(step), mesh_of((2, 2)), LAID)), {"loss": 0.5}, overwrite=False)
    assert run.steps() == [1, 2]
    run.close()


def first(folder: Path, number: int) -> None:
    """Two processes go on from the steps of one; one is killed when the other has saved step 6 already."""
    run = InProcesses(folder / "run", {"keep": [tricomp.KeepLast(2)], "keyframe": tricomp.KeyframeEvery(2)})
    mesh = mesh_of((2, 2))
    expected = placed(state_at(2), mesh, LAID)
    with Decoded() as decoded:
        restored = run.restore(None, specs_of(expected), strict=True)
    assert restored is not None
    assert (restored.step, restored.metadata) == (2, {"loss": 0.5})
    check_same(restored.state, expected)
    assert len(decoded.leaves) == len(set(decoded.leaves))
    assert 0 < decoded.n_elements <= SHAPE[0] * SHAPE[1] // 2  # of w, the rows that are on devices of this process
    w = restored.state["params"]["w"]
    refused(UnsupportedNode, lambda: tricomp_jax.save(folder / "no.tri", {"a": [w]}), "'a/0'", "CheckpointHook")
    alone = jax.make_array_from_callback(
        (4,), SingleDeviceSharding(jax.devices()[-1]), lambda index: np.zeros(4, np.float32), dtype=np.float32
    )
    if number == 0:
        refused(UnsupportedNode, lambda: run.flatten({"w": w, "b": alone}), "'b'", "process 1")
    else:
        run.flatten({"w": w})  # the first call is one of all processes
    for step in (3, 4, 5):
        state = placed(state_at(step), mesh, LAID)
        state["opt"] = state["opt"]._replace(count=jax.jit(lambda count: count + 1)(state["opt"].count - 1))
        report = run.save(step, run.flatten(state), {"loss": step / 4}, overwrite=False)
        assert (report.parent is None) == (step % 2 == 1)
        if number == 1 and step == 4:
            flat = run.flatten(state)
            assert set(flat.tree["params"]["w"]) == {"512,0", "512,144"}
            assert flat.tree["opt"].count is flat.tree["step"] is flat.tree["params"]["odd"] is None
    for _ in range(2):  # once more: nothing is decoded that is another process's
        with Decoded() as decoded:
            restored = run.restore(4, state, strict=True)
        assert restored is not None
        check_same(restored.state["params"]["w"], placed(state_at(4), mesh, LAID)["params"]["w"])
        others = {path for where, path in decoded.leaves if where != f"process-{number:05d}-of-00002"}
        assert not [path for path in others if path.startswith("params/w/")], others
        assert len(decoded.leaves) == len(set(decoded.leaves))
    if number == 1:
        while not (folder / "run" / "process-00000-of-00002" / "step-000000000006.tri").exists():
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    run.save(6, run.flatten(placed(state_at(60), mesh, LAID)), {}, overwrite=False)
    assert run.steps()[-1] == 5
    os._exit(0)  # jax would wait for the other


def second(folder: Path, number: int) -> None:
    """Two processes find the last step that counts, of a mesh of another shape, and write those after it."""
    run = InProcesses(folder / "run", {"keep": [tricomp.KeepLast(2)]})
    for mesh in (mesh_of((2, 2), is_reversed=True), mesh_of((1, 4)), mesh_of((4, 1))):
        for laid in (LAID, OTHERWISE):
            expected = placed(state_at(5), mesh, laid)
            with Decoded() as decoded:
                restored = run.restore(None, expected, strict=True)
            assert restored is not None
            assert (restored.step, restored.metadata) == (5, {"loss": 1.25})
            check_same(restored.state, expected)
            assert len(decoded.leaves) == len(set(decoded.leaves))
    wrong = {**expected, "mask": jnp.zeros((32, 13), bool), "more": jnp.zeros(3)}
    with Decoded() as decoded:
        refused(
            InvalidArgument, lambda: run.restore(None, wrong, strict=True), "step 5", "'mask'", "'more'", "bool[32, 12]"
        )
    assert not decoded.leaves
    kept = run.restore(None, {"int4": expected["int4"].astype("int8"), "more": 1}, strict=False)
    assert kept is not None
    assert kept.state["more"] == 1
    assert kept.state["int4"].dtype == "int8"
    refused(MissingStep, lambda: run.restore(6, expected, strict=True), "step 6", "process-00001-of-00002", "step 5")
    refused(InvalidArgument, lambda: tricomp_jax.CheckpointHook(tricomp.Store(folder / "run")), "2 processes", "folder")
    hook = tricomp_jax.CheckpointHook(folder / "run", keep=[tricomp.KeepLast(2)])
    latest = hook.restore_latest(specs_of(expected))
    assert latest is not None
    assert latest.step == 5
    for step in (6, 7):
        saving = hook(step, placed(state_at(step), mesh, LAID))
        assert saving is not None
        assert saving.result().parent is not None
    hook(7, latest.state)
    refused(InvalidArgument, hook.close, "step 7 is already in")
    jax.experimental.multihost_utils.sync_global_devices("saved")
    assert hook.steps()[-2:] == [6, 7]
    whole = tricomp_jax.load_step(folder / "run", 7)
    assert np.asarray(whole["params"]["w"]).tobytes() == state_at(7)["params"]["w"].tobytes()


if __name__ == "__main__":
    case, where = sys.argv[1], Path(sys.argv[2])
    jax.config.update("jax_num_cpu_devices", 4 if case == "devices" else 2)
    if case == "devices":
        devices(where)
    else:
        process, port = int(sys.argv[3]), sys.argv[4]
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
        try:
            {"first": first, "second": second}[case](where, process)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # jax would wait for the other
