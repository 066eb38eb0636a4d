"""CheckpointHook: a resumed run equals an uninterrupted one, and what happens behind training gets nowhere lost."""

import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import wait
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

import jax
import jax.numpy as jnp
import tricomp_jax
from tricomp_jax.snapshot import snapshot
from tricomp_jax.trees import Flat, flatten

import tricomp
from tests.faulty import WORLDS, World
from tests.jax_training import RUNS, Linen, Plain, bits
from tricomp.errors import (
    InvalidArgument,
    LimitExceeded,
    MissingStep,
    OutOfDeviceMemory,
    StorageError,
    StoreLocked,
    UnsupportedNode,
)
from tricomp.host_memory import HostBuffer
from tricomp.layout import DeviceArray


def hook_at(folder, **options) -> Any:
    return tricomp_jax.CheckpointHook(str(folder), **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    run = RUNS[name]()
    losses, states = {}, {}
    with hook_at(tmp_path, every=2, keyframe=tricomp.KeyframeEvery(2)) as hook:
        assert hook.restore_latest(run.state) is None
        for step in range(1, 8):
            losses[step] = run.train(step)
            states[step] = bits(run.state)
            assert (hook(step, run.state) is None) == (step % 2 == 1)
    assert hook.steps() == [2, 4, 6]

    for step, restore in ((6, lambda hook, target: hook.restore_latest(target)), (4, lambda h, t: h.restore(4, t))):
        again = RUNS[name](seed=99)
        restored = restore(hook_at(tmp_path), again.state)
        assert restored.step == step
        again.restored(restored.state)
        assert bits(again.state) == states[step]
        for later in range(step + 1, 8):
            assert again.train(later) == losses[later]
            assert bits(again.state) == states[later]


def test_modules_and_optimizers_are_updated_in_place(tmp_path):
    run = RUNS["nnx"]()
    run.train(1)
    saved = bits(run.state)
    with hook_at(tmp_path) as hook:
        hook(run.state["optimizer"].step, run.state)
        assert hook.steps() == [1]
        fresh = RUNS["nnx"](seed=5)
        assert hook.restore_latest(fresh.state).state["model"] is fresh.state["model"]
        assert bits(fresh.state) == saved
        hook(2, (run.state["model"], [run.state["optimizer"]]))
        alone = RUNS["nnx"](seed=6).state["model"]
        with pytest.raises(InvalidArgument, match="step 2"):
            hook.restore_latest(alone)
        hook(3, run.state["model"])
        assert hook.restore(3, alone).state is alone
        assert bits(alone) == bits(run.state["model"])


def test_values_written_over_by_donation_do_not_reach_the_file(tmp_path):
    """Each array that the hook was called with is written to by the step right after the call."""

    @jax.jit
    def start():
        draws = jax.random.normal(jax.random.key(0), (3, 700, 1001))
        return {"w": draws[0], "m": draws[1].astype(jnp.bfloat16), "v": draws[2] ** 2}

    step_of = jax.jit(lambda tree: jax.tree.map(lambda a: a * 1.5 - 1, tree), donate_argnums=0)
    state = start()
    numbers = np.arange(99999)
    expected = {}
    with hook_at(tmp_path, in_flight=2) as hook:
        for step in range(4):
            state = step_of(state)
            numbers += 1
            expected[step] = bits(jax.tree.map(np.array, {**state, "n": numbers}))
            old = state["w"]
            hook(step, {**state, "n": numbers})
            state = step_of(state)
            numbers[:] = 0
            assert old.is_deleted()
        for step, bytes_then in expected.items():
            assert bits(hook.restore(step, {**state, "n": numbers}).state) == bytes_then


def of_all_kinds():
    rng = np.random.default_rng(3)
    big = rng.normal(size=(1031, 4099)).astype(np.float32)
    return {
        "big": jnp.asarray(big[:, :2053]),
        "bf16": jnp.asarray(big[0], jnp.bfloat16),
        "fp8": jnp.asarray(big[1, :33], jnp.float8_e4m3fn),
        "int4": jnp.arange(-7, 8, dtype=jnp.int4),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "truth": jnp.asarray(big[2, :31] > 0),
        "complex": jnp.asarray(big[3, :7] + 1j),
        "scalar": jnp.float32(np.nan),
        "empty": jnp.zeros((0, 3)),
        "numpy": {
            "strided": big[::2, 1:4000:3],
            "turned": big[:300, :301].T,
            "swapped": big[5].astype(">f4"),
            "locked": np.array(big[6]),
            "bf16": big[7].astype(ml_dtypes.bfloat16),
            "number": np.float64(0.1),
            "whole": big,
        },
        "plain": [None, 3, "text", (1.5, True), 2 + 1j],
    }


@pytest.mark.parametrize("is_mapped", [False, True])
def test_snapshots_are_equal_and_have_memory_of_their_own(tmp_path, is_mapped):
    tree = of_all_kinds()
    if is_mapped:
        np.save(tmp_path / "mapped.npy", np.arange(1001.0))
        tree["numpy"]["mapped"] = np.load(tmp_path / "mapped.npy", mmap_mode="r+")
    tree["numpy"]["locked"].flags.writeable = False  # its owner may unlock it
    buffer = HostBuffer()
    flat = flatten(tree)
    before = bits(flat.tree)
    taken = snapshot(flat, buffer)
    assert taken.notes == flat.notes
    assert bits(taken.tree) == before
    pairs = list(zip(jax.tree.leaves(taken.tree), jax.tree.leaves(flat.tree), strict=True))
    kept = [np.shares_memory(new, old) for new, old in pairs if isinstance(old, np.ndarray) and old.size]
    assert not any(kept)
    assert bits(tricomp_jax.unflatten(taken, tree)) == bits(tree)

    places = {path: leaf.ctypes.data for path, leaf in taken.tree["numpy"].items()}
    again = snapshot(flatten(tree), buffer)
    assert {path: leaf.ctypes.data for path, leaf in again.tree["numpy"].items()} == places
    assert bits(again.tree) == before
    small = snapshot(Flat({"w": tree["numpy"]["strided"]}), buffer)
    assert bits(small.tree) == bits({"w": tree["numpy"]["strided"]})
    assert bits(snapshot(Flat({})).tree) == []


@pytest.mark.parametrize("leaf", [np.array([None, 1]), np.array(["text"]), np.zeros(2, "M8[s]")])
def test_leaves_that_no_file_takes_are_told_at_once(tmp_path, leaf):
    with hook_at(tmp_path) as hook:
        hook(1, {"a": np.zeros(3)})
        with pytest.raises(InvalidArgument, match="model/w"):
            hook(2, {"model": {"w": leaf}})
        with pytest.raises(UnsupportedNode, match="node 'f'"):
            hook(2, {"f": len})
        gone = jnp.zeros(3)
        gone.delete()
        with pytest.raises(UnsupportedNode, match="'w'.*its memory was given away"):
            hook(2, {"w": gone})
        endless: list[Any] = [jnp.ones(3)]
        endless.append(endless)
        with pytest.raises(LimitExceeded, match="holds itself"):
            hook(2, endless)
        assert hook.steps() == [1]
        hook(2, {1: jnp.ones(3), "a": [jnp.zeros(2)]})
        assert bits(hook.restore_latest(None).state["a"]) == bits([np.zeros(2, np.float32)])


def test_leaves_on_a_device_are_copied_there():
    torch = pytest.importorskip("torch")
    words = torch.arange(1001, dtype=torch.int32)
    old = words.clone()
    leaf = DeviceArray(tricomp.dtypes.by_name("float32"), (7, 143), words)
    taken = snapshot(Flat({"far": leaf, "near": np.ones(5)}))
    words.zero_()
    assert torch.equal(taken.tree["far"].words, old)
    assert taken.tree["far"].shape == (7, 143)


def test_what_a_device_has_no_memory_to_copy_is_saved_before_the_call_returns(tmp_path, monkeypatch, caplog):
    def short(*_):
        raise OutOfDeviceMemory("cuda:0: no memory for 5 bytes")

    monkeypatch.setattr("tricomp_jax.hook.snapshot", short)
    numbers = np.arange(70001.0)
    with hook_at(tmp_path) as hook, caplog.at_level(logging.WARNING):
        saving = hook(1, {"w": numbers})
        assert saving.done()
        numbers[:] = 0
        assert bits(hook.restore_latest(None).state) == bits({"w": np.arange(70001.0)})
    assert "step 1 is saved before training goes on, since it cannot be copied" in caplog.text


@pytest.mark.parametrize("told_by", ["call", "idle call", "wait", "close", "future"])
def test_what_fails_behind_training_is_told_once_and_the_step_before_it_loads(told_by, caplog):
    WORLDS["jax"] = World()
    store = tricomp.Store("faulty://run", storage_options={"world": "jax"})
    hook: Any = tricomp_jax.CheckpointHook(store, every=10)
    run = Plain()
    hook(10, run.state).result()
    saved = bits(run.state)
    run.train(1)
    WORLDS["jax"].strike("fail", 1, "write")
    with caplog.at_level(logging.ERROR):
        saving = hook(20, run.state)
        if told_by == "idle call":
            wait([saving])
        calls = {
            "call": lambda: hook(30, run.state),
            "idle call": lambda: hook(31, run.state),  # not due
            "future": saving.result,
            "wait": hook.wait,
            "close": hook.close,
        }
        with pytest.raises(StorageError) as caught:
            calls[told_by]()
    assert "step 20" in caplog.text
    assert told_by == "future" or any("step 20" in note for note in caught.value.__notes__)
    WORLDS["jax"].heal()
    hook.wait()
    assert bits(hook.restore_latest(Plain(seed=4).state).state) == saved
    hook(30, run.state)
    hook.close()
    assert hook.steps() == [10, 30]
    assert bits(hook.restore_latest(Plain(seed=4).state).state) == bits(run.state)


def test_an_error_that_ends_the_block_is_not_hidden(tmp_path):
    def fall(hook):
        with hook:
            hook(1, {"w": np.ones(3)}).result()
            hook(1, {"w": np.ones(3)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fall(hook_at(tmp_path))
    hook, other = hook_at(tmp_path), hook_at(tmp_path)
    with pytest.raises(InvalidArgument, match="step 1 is already in"):
        hook(1, {"w": np.ones(3)})
    hook(2, {"w": np.ones(3)})
    with pytest.raises(StoreLocked):
        other(3, {"w": np.ones(3)})
    hook.close()
    other(3, {"w": np.ones(3)}).result()
    other.close()


def test_a_restore_is_not_stopped_by_a_save_that_failed(tmp_path):
    hook = hook_at(tmp_path)
    for step in (1, 2, 1):
        hook(step, {"w": np.full(3, step)})
    assert hook.restore(1, None).state["w"].tolist() == [1, 1, 1]
    assert hook.latest() == 2
    with pytest.raises(InvalidArgument, match="step 1 is already in"):
        hook(3, {"w": np.ones(3)})
    with pytest.raises(InvalidArgument, match="step 2 is already in"):  # at once: it is the first after a restore
        hook(2, {"w": np.ones(3)})
    hook(1, {"w": np.zeros(3)}, overwrite=True)
    assert hook.restore(1, None).state["w"].tolist() == [0, 0, 0]
    hook.close()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_call_waits_when_too_many_saves_are_on_their_way(tmp_path, monkeypatch, in_flight):
    hook = hook_at(tmp_path, in_flight=in_flight)
    gate = threading.Event()
    save = hook._checkpoints.save
    monkeypatch.setattr(hook._checkpoints, "save", lambda *given: gate.wait(30) and save(*given))
    savings = [hook(step, {"w": np.full(3, step)}) for step in range(in_flight)]
    thread = threading.Thread(target=lambda: savings.append(hook(in_flight, {"w": np.full(3, in_flight)})))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert not any(saving.done() for saving in savings)
    gate.set()
    thread.join(30)
    hook.close()
    assert [saving.result().n_leaves for saving in savings] == [1] * (in_flight + 1)
    for step in range(in_flight + 1):
        assert hook.restore(step, None).state["w"].tolist() == [step] * 3


def test_policies_every_force_and_metadata(tmp_path):
    options = {"keyframe": tricomp.KeyframeEvery(3), "keep": [tricomp.KeepLast(2), tricomp.KeepEvery(30)]}
    run, metadata = Plain(), {"note": ["a"]}
    with hook_at(tmp_path, every=np.int64(10), threads=1, **options) as hook:
        reports = []
        for step in (0, 10, 20, 30, 40, 50):
            run.train(step)
            saving = hook(jnp.int32(step), run.state, metadata=metadata)
            metadata["note"].append("b")
            reports.append(saving.result())
        assert [report.parent is None for report in reports] == [True, False, False, True, False, False]
        assert hook.steps() == [0, 30, 40, 50]
        assert hook(57, run.state) is None
        assert hook(57, run.state, force=True).result().n_leaves == reports[0].n_leaves
        assert hook.restore(40, run.state).metadata == {"note": ["a", *"bbbb"]}
        with pytest.raises(MissingStep, match="step 41"):
            hook.restore(41, run.state)
    rounding: Any = tricomp_jax.CheckpointHook(str(tmp_path / "b"), spec=tricomp.Spec(keep_mantissa_bits={"w": 2}))
    rounding(1, {"w": np.full(9, 1.1, np.float32)})
    assert rounding.restore_latest(None).state["w"].tolist() == [1.0] * 9


def test_arguments_are_judged_at_once(tmp_path):
    store = tricomp.Store(str(tmp_path))
    for given, text in (
        ({"every": 0}, "every: expected a number of steps, 1 or more, got 0"),
        ({"every": True}, "every: expected a number of steps"),
        ({"in_flight": 0}, "in_flight: expected a number of saves, 1 or more, got 0"),
        ({"keyframe": tricomp.KeyframeEvery(2)}, "keyframe belong to the Store given"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            tricomp_jax.CheckpointHook(store, **given)
    with hook_at(tmp_path) as hook:
        for step in (1.5, "7", -1, jnp.float32(1), np.zeros(2, int)):
            with pytest.raises(InvalidArgument, match="step: expected an integer"):
                hook(step, {"w": np.ones(3)})
        with pytest.raises(InvalidArgument, match="metadata: expected a dict"):
            hook(1, {"w": np.ones(3)}, metadata=[3])
        assert hook.latest() is None


def test_a_wrong_target_is_told_with_step_and_paths_and_changes_nothing(tmp_path):
    run = Linen()
    with hook_at(tmp_path) as hook:
        hook(7, run.state)
        target = run.state.replace(params={"params": {"Dense_0": {"kernel": jnp.ones((3, 2))}, "more": jnp.ones(1)}})
        with pytest.raises(InvalidArgument) as caught:
            hook.restore_latest(target)
        for text in ("step 7", "params/params/Dense_0/kernel", "params/params/more", "float32[3, 2]"):
            assert text in str(caught.value)
        part = {"params": {"params": {"Dense_0": dict(run.state.params["params"]["Dense_0"])}}, "other": 5}
        assert hook.restore_latest(part, strict=False).state["other"] == 5


_KILLED = """
import os, signal, sys
import tricomp_jax
from tests.jax_training import Linen
run = Linen()
hook = tricomp_jax.CheckpointHook(sys.argv[1], every=2)
for step in range(1, 7):
    print(run.train(step), flush=True)
    hook(step, run.state)
os.kill(os.getpid(), signal.SIGKILL)
"""
_NOT_CLOSED = """
import sys
import jax, numpy as np, tricomp_jax
assert not {"flax", "optax", "orbax", "torch"} & set(sys.modules), "imported"
hook = tricomp_jax.CheckpointHook(sys.argv[1])
mesh = jax.make_mesh((4,), ("x",))
state = {
    "w": jax.device_put(np.arange(4 * 70001.0, dtype=np.float32), jax.NamedSharding(mesh, jax.P("x"))),
    "r": jax.device_put(np.ones(5), jax.NamedSharding(mesh, jax.P())),
}
next_step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
for step in range(3):
    hook(step, state)
    state = next_step(state)
other = tricomp_jax.CheckpointHook(sys.argv[1] + "-2")
other(1, state).result()
other(1, state)
raise SystemExit(3)
"""


def ran(code, folder, **environment):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([root, *sys.path]),
        **environment,
    }
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_run_that_is_killed_goes_on_in_another_process(tmp_path):
    ended = ran(_KILLED, tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    run, again = Linen(), Linen(seed=8)
    losses = [run.train(step) for step in range(1, 9)]
    assert ended.stdout.split() == losses[:6]
    with hook_at(tmp_path) as hook:
        assert str(hook._checkpoints.store.verify()).endswith("0 broken")
        restored = hook.restore_latest(again.state)
        assert restored.step in (4, 6)
        again.restored(restored.state)
        assert [again.train(step) for step in range(restored.step + 1, 9)] == losses[restored.step :]
        assert bits(again.state) == bits(run.state)


def test_a_script_that_ends_without_close_has_its_last_step_on_disk(tmp_path):
    """Of sharded arrays; what fails at the very end is logged."""
    ended = ran(_NOT_CLOSED, tmp_path / "run", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert ended.returncode == 3, ended.stderr
    assert "step 1 could not be saved" in ended.stderr
    with hook_at(tmp_path / "run") as hook:
        assert hook.steps() == [0, 1, 2]
        for step in range(3):
            expected = {"r": np.full(5, 1 + step), "w": np.arange(4 * 70001.0) + step}
            expected = {name: array.astype(np.float32) for name, array in expected.items()}
            assert bits(hook.restore(step, None).state) == bits(expected)
