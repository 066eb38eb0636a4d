"""tricomp_jax.orbax: steps that Orbax saves, names, keeps and removes come back bit for bit, whatever it removes."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import tricomp_jax.orbax
from flax import nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import step as step_lib
from tricomp_jax.orbax import KeepParents, TricompHandler, TricompRestore, TricompSave
from tricomp_jax.orbax.options import Options
from tricomp_jax.orbax.writer import Writer

import tricomp
from tests.cases import moments, stepped, weights
from tests.test_jax_adapter import assert_same
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    MissingFile,
    MissingParent,
    StorageError,
    TricompError,
    UnsupportedNode,
)

BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])


def manager(folder, is_async=True, handler=None, **options):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=is_async, **options)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def state(step=0):
    """Parameters, moments in the optimizer's own types, and what stands beside them, some steps on."""
    old = weights((93, 67))
    for i in range(step):
        old = stepped(old, i)
    params = {"dense": {"kernel": jnp.asarray(old), "bias": jnp.asarray(old[0], jnp.bfloat16)}}
    optimizer = optax.adamw(1e-3).init(params)
    adam = optimizer[0]._replace(nu=jax.tree.map(lambda leaf: leaf + moments(leaf.shape).astype(leaf.dtype), params))
    return {"params": params, "opt": (adam, *optimizer[1:]), "step": step, "key": jax.random.key(step), "none": None}


def saved(root, steps, is_async=True, **options):
    with manager(root, is_async, **options) as writing:
        for step in steps:
            writing.save(step, args=TricompSave(state(step)))
        writing.wait_until_finished()
        return list(writing.all_steps())


def restored(root, step, target=None):
    with manager(root) as reading:
        return reading.restore(step, args=TricompRestore(target))


def files(root):
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*.tri"))


def n_bytes(root, own):
    """Bytes that a step wrote: links of earlier files are none. own: the name of its own file, if it is ours."""
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in paths if path.suffix != ".tri" or path.name == own)


# what is saved comes back


@BOTH
def test_steps_come_back(tmp_path, is_async):
    assert saved(tmp_path, range(4), is_async) == [0, 1, 2, 3]
    with manager(tmp_path, is_async) as reading:
        for step in reading.all_steps():
            assert_same(reading.restore(step, args=TricompRestore(state())), state(step))
        plain = reading.restore(3, args=TricompRestore())
        assert_same(reading.restore(3), plain)  # Orbax knows the handler by the name that it wrote
        assert_same(plain["params"], state(3)["params"])
        assert type(plain["opt"]) is tuple
        assert set(plain["opt"][0]) == {"count", "mu", "nu"}
        assert plain["step"] == 3
        metadata = reading.item_metadata(3)
    assert metadata["params/dense/bias"] == jax.ShapeDtypeStruct((67,), jnp.bfloat16)
    assert metadata["key"].dtype == jax.random.key(0).dtype
    assert metadata["step"] == 3


def test_an_items_folder_is_a_store(tmp_path):
    saved(tmp_path, range(12))
    store = tricomp.Store(tmp_path / "9" / "default")
    assert (store.steps(), store.verify().broken) == ([*range(10)], ())
    assert store.load(9)["step"] == 9
    assert [Path(name).name for name in files(tmp_path / "10")] == ["step-000000000010.tri"]  # a keyframe
    assert [Path(name).name for name in files(tmp_path / "11")] == ["step-000000000010.tri", "step-000000000011.tri"]
    sizes = [(tmp_path / f"{step}/default/step-{step:012d}.tri").stat().st_size for step in range(12)]
    assert max(sizes[1:10]) < 0.9 * sizes[0]
    assert max(sizes[11:]) < 0.9 * sizes[10]


@pytest.mark.parametrize("reference_in", ["host", "store"])
def test_one_item_of_several(tmp_path, reference_in):
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name, every in (("model", 10), ("data", 1)):
        handler = TricompHandler(tricomp.KeyframeEvery(every), reference_in=reference_in)
        registry.add(name, TricompSave, handler)
        registry.add(name, TricompRestore, handler)
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as both:
        for step in range(4):
            items = {
                "model": TricompSave(state(step), metadata={"note": step}),
                "config": ocp.args.JsonSave({"lr": 0.1}),
                "standard": ocp.args.StandardSave({"x": jnp.arange(step + 1)}),
            }
            if step != 2:
                items["data"] = TricompSave({"at": np.arange(5) * step})
            both.save(step, args=ocp.args.Composite(**items))
        both.wait_until_finished()
        found = both.restore(
            3,
            args=ocp.args.Composite(
                model=TricompRestore(state()),
                data=TricompRestore(),
                config=ocp.args.JsonRestore(),
                standard=ocp.args.StandardRestore(),
            ),
        )
    assert_same(found.model, state(3))
    assert found.data["at"].tolist() == [0, 3, 6, 9, 12]
    assert (found.config, found.standard["x"].tolist()) == ({"lr": 0.1}, [0, 1, 2, 3])
    assert len(files(tmp_path / "3" / "model")) == 4
    assert len(files(tmp_path / "3" / "data")) == 1
    with tricomp.Store(tmp_path / "3" / "model").open() as file:
        assert file.metadata["note"] == 3


def test_alone_without_a_manager(tmp_path):
    with ocp.Checkpointer(TricompHandler()) as one:
        one.save(tmp_path / "final", state(1))
        one.save(tmp_path / "run_3", args=TricompSave(state(2)))
        one.save(tmp_path / "run_4", args=TricompSave(state(3)))
        assert_same(one.restore(tmp_path / "final", target=state()), state(1))
        assert_same(one.restore(tmp_path / "run_4", args=TricompRestore(state())), state(3))
    assert files(tmp_path) == [
        "final/step-000000000000.tri",
        "run_3/step-000000000003.tri",
        "run_4/step-000000000003.tri",
        "run_4/step-000000000004.tri",
    ]
    assert_same(tricomp_jax.load(tmp_path / "final" / "step-000000000000.tri", state()), state(1))


def test_modules_of_nnx(tmp_path):
    class Model(nnx.Module):
        def __init__(self, step):
            self.w, self.names = nnx.Param(state(step)["params"]["dense"]["kernel"]), "static"

    with manager(tmp_path) as writing:
        writing.save(2, args=TricompSave({"model": Model(2), "step": 2}))
        target = {"model": Model(0), "step": 0}
        found = writing.restore(2, args=TricompRestore(target))
    assert (found["model"] is target["model"], found["step"]) == (True, 2)
    assert_same(found["model"].w[...], state(2)["params"]["dense"]["kernel"])


def test_an_older_step_is_continued_from_itself(tmp_path):
    saved(tmp_path, [3, 8])
    with manager(tmp_path) as writing:
        writing.save(5, args=TricompSave(state(5)), force=True)
    assert [Path(name).name for name in files(tmp_path / "5")] == ["step-000000000003.tri", "step-000000000005.tri"]
    assert_same(restored(tmp_path, 5, state()), state(5))


# names


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"step_prefix": "ckpt"}, "ckpt_7"),
        ({"step_format_fixed_length": 8}, "00000007"),
        ({"step_name_format": step_lib.standard_name_format(step_prefix="a-1", step_format_fixed_length=3)}, "a-1_007"),
    ],
)
def test_names_of_steps(tmp_path, options, name):
    saved(tmp_path, [5, 6], **options)
    saved(tmp_path, [7], **options)  # as after a restart
    assert [Path(path).name for path in files(tmp_path / name)] == [f"step-{step:012d}.tri" for step in (5, 6, 7)]
    with manager(tmp_path, **options) as reading:
        assert_same(reading.restore(7, args=TricompRestore(state())), state(7))


def test_what_is_temporary_is_no_parent_and_written_nowhere(tmp_path):
    saved(tmp_path, [1, 2])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "2", tmp_path / "other_3")
    keep = KeepParents(policies.LatestN(None), tmp_path)
    saved(tmp_path, [4], handler=None)
    with manager(tmp_path, handler=TricompHandler(parents=keep), preservation_policy=keep) as writing:
        writing.save(5, args=TricompSave(state(5)))
        writing.wait_until_finished()
        shutil.copytree(tmp_path / "5", tmp_path / "6.orbax-checkpoint-tmp")
        writing.save(7, args=TricompSave(state(7)))
    assert [Path(path).name for path in files(tmp_path / "4")] == [f"step-{step:012d}.tri" for step in (1, 2, 4)]
    assert [Path(path).name for path in files(tmp_path / "7")] == ["step-000000000007.tri"]
    with tricomp.open(tmp_path / "7/default/step-000000000007.tri") as file:
        assert file.metadata["tricomp_jax"]["orbax"] == {"parent": 5, "item": "default"}
    for path in (tmp_path / "4", tmp_path / "7"):
        assert not any(b"checkpoint-tmp" in each.read_bytes() for each in path.rglob("*.tri"))
    assert_same(restored(tmp_path, 7, state()), state(7))


# what Orbax removes


@BOTH
def test_max_to_keep_alone(tmp_path, is_async):
    with manager(tmp_path, is_async, TricompHandler(tricomp.KeyframeEvery(4)), max_to_keep=2) as writing:
        for step in range(9):
            writing.save(step, args=TricompSave(state(step)))
            writing.wait_until_finished()
            for kept in writing.all_steps():
                assert_same(writing.restore(kept, args=TricompRestore(state())), state(kept))
            assert len({path.stat().st_ino for path in tmp_path.rglob("*.tri")}) <= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"]
    assert [Path(name).name for name in files(tmp_path / "8")] == [f"step-{step:012d}.tri" for step in (6, 7, 8)]
    shutil.copytree(tmp_path / "7", tmp_path / "elsewhere_7")  # a step's folder is all that is needed of it
    shutil.rmtree(tmp_path / "7")
    assert_same(restored(tmp_path, 8, state()), state(8))
    with ocp.Checkpointer(TricompHandler()) as one:
        assert_same(one.restore(tmp_path / "elsewhere_7" / "default", args=TricompRestore(state())), state(7))


KEPT = {
    "latest": (policies.LatestN(2), {9, 10}),
    "every": (policies.EveryNSteps(3), {0, 3, 6, 9}),
    "any": (policies.AnyPreservationPolicy([policies.LatestN(1), policies.EveryNSteps(5)]), {0, 5, 10}),
    "best": (policies.BestN(get_metric_fn=lambda m: -abs(m["loss"] - 5.8), n=2), {5, 6}),
}


@BOTH
@pytest.mark.parametrize("name", KEPT)
def test_kept_parents(tmp_path, name, is_async):
    policy, wanted = KEPT[name]
    for steps in (range(6), range(6, 11)):  # the second as after a restart
        keep = KeepParents(policy, tmp_path)
        handler = TricompHandler(tricomp.KeyframeEvery(4), parents=keep)
        best = {"best_fn": lambda m: m["loss"]} if name == "best" else {}
        with manager(tmp_path, is_async, handler, preservation_policy=keep, **best) as writing:
            for step in steps:
                writing.save(step, args=TricompSave(state(step)), metrics={"loss": float(step)} if best else None)
                writing.wait_until_finished()
                there = writing.all_steps()
                for kept in there if step in (5, 10) else []:
                    assert_same(writing.restore(kept, args=TricompRestore(state())), state(kept))
    assert wanted <= set(there) < set(range(11))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == sorted(there)
    assert all(len(files(tmp_path / str(step))) == 1 for step in there)
    chains = {1 + tricomp.open(next((tmp_path / str(step)).rglob("*.tri"))).since_keyframe for step in there}
    assert max(chains) > 1


def test_linked_and_kept_in_one_run(tmp_path):
    keep = KeepParents(policies.LatestN(None), tmp_path)
    for step in range(6):
        handler = TricompHandler(parents=keep if step in (2, 3) else "linked")
        with manager(tmp_path, handler=handler, preservation_policy=keep) as writing:
            writing.save(step, args=TricompSave(state(step)))
    for step in range(6):
        assert_same(restored(tmp_path, step, state()), state(step))
    assert [len(files(tmp_path / str(step))) for step in range(6)] == [1, 2, 1, 1, 1, 2]
    assert tricomp.open(tmp_path / "4" / "default" / "step-000000000004.tri").parent is None


def test_a_manager_that_does_not_ask(tmp_path, caplog):
    """The handler is told of a policy that the manager was not."""
    keep = KeepParents(policies.LatestN(2), tmp_path)
    with manager(tmp_path, handler=TricompHandler(parents=keep), max_to_keep=2) as writing:
        for step in range(4):
            writing.save(step, args=TricompSave(state(step)))
        writing.wait_until_finished()
        for step in (2, 3):
            assert_same(writing.restore(step, args=TricompRestore(state())), state(step))
    assert "every step stands alone, since Orbax does not ask KeepParents" in caplog.text
    other = KeepParents(policies.LatestN(2), tmp_path / "other")
    with (
        manager(tmp_path, is_async=False, handler=TricompHandler(parents=other)) as writing,
        pytest.raises(InvalidArgument, match="KeepParents is of .*other, but steps are saved in"),
    ):
        writing.save(4, args=TricompSave(state(4)))


def test_a_parent_that_was_deleted(tmp_path):
    keep = KeepParents(policies.LatestN(None), tmp_path)
    with manager(tmp_path, handler=TricompHandler(parents=keep), preservation_policy=keep) as writing:
        for step in range(3):
            writing.save(step, args=TricompSave(state(step)))
        writing.wait_until_finished()
        writing.delete(0)
        with pytest.raises(MissingParent, match=r"step 1 in .* needs step 0 .* removed, as max_to_keep does.*KeepPar"):
            writing.restore(1, args=TricompRestore())
        with pytest.raises(MissingParent, match=r"step 2 in .* needs step 1 .* step 1 in .* needs step 0"):
            writing.restore(2, args=TricompRestore())
        writing.save(3, args=TricompSave(state(3)))
        writing.wait_until_finished()
        assert_same(writing.restore(3, args=TricompRestore(state())), state(3))  # it stands alone


def test_kept_parents_of_steps_that_cannot_be_read(tmp_path, caplog):
    for steps in ([0, 1, 2], [3]):
        keep = KeepParents(policies.LatestN(2 if 3 in steps else None), tmp_path)
        with manager(tmp_path, handler=TricompHandler(parents=keep), preservation_policy=keep) as writing:
            for step in steps:
                writing.save(step, args=TricompSave(state(step)))
            writing.wait_until_finished()
            assert writing.all_steps() == [0, 1, 2, 3][: max(steps) + 1]
        if 3 not in steps:
            flip(tmp_path / "2/default/step-000000000002.tri", 0.999)
    assert "cannot be read, so the step before it is kept as well" in caplog.text


def test_a_step_that_was_saved_again(tmp_path):
    keep = KeepParents(policies.LatestN(None), tmp_path)
    with manager(tmp_path, handler=TricompHandler(parents=keep), preservation_policy=keep) as writing:
        for step in range(3):
            writing.save(step, args=TricompSave(state(step)))
        writing.wait_until_finished()
        writing.delete(1)
        writing.save(1, args=TricompSave(state(7)), force=True)
        writing.wait_until_finished()
        with pytest.raises(MissingParent, match=r"step 2 in .* needs step 1 \(content id .*, but that holds .*again"):
            writing.restore(2, args=TricompRestore())


def test_without_hard_links_every_step_stands_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    assert saved(tmp_path, range(3)) == [0, 1, 2]
    assert len(files(tmp_path)) == 3
    warnings = [record.message for record in caplog.records if "hard links" in record.message]
    assert len(warnings) == 1
    assert "KeepParents" in warnings[0]
    shutil.rmtree(tmp_path / "1")
    assert_same(restored(tmp_path, 2, state()), state(2))


def test_a_parent_that_goes_while_it_is_linked(tmp_path, monkeypatch):
    saved(tmp_path, range(2))
    real = os.link

    def vanish(source, target):
        if "000001" in str(source):
            shutil.rmtree(tmp_path / "1")
        real(source, target)

    monkeypatch.setattr(os, "link", vanish)
    saved(tmp_path, [2])
    assert [Path(path).name for path in files(tmp_path / "2")] == ["step-000000000002.tri"]


# what goes wrong


def test_a_wrong_target(tmp_path):
    saved(tmp_path, [4])
    target = state()
    target["params"]["dense"]["kernel"] = jnp.zeros((2, 3))
    with pytest.raises(
        InvalidArgument, match=rf"4 in {tmp_path}: .*\n  'params/dense/kernel': the checkpoint holds float32"
    ):
        restored(tmp_path, 4, target)
    del target["params"]["dense"]["kernel"]
    with manager(tmp_path) as reading:
        part = reading.restore(4, args=TricompRestore(target, strict=False))
    assert_same(part["params"]["dense"]["bias"], state(4)["params"]["dense"]["bias"])


def flip(path, place=0.6):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.unlink()  # another name of the same file stays as it is
    path.write_bytes(data)


def test_damage(tmp_path):
    saved(tmp_path, [1, 2])
    flip(tmp_path / "2/default/step-000000000002.tri")
    with pytest.raises((CorruptFrame, CorruptFile), match=r"2/default/step-000000000002\.tri"):
        restored(tmp_path, 2, state())
    assert_same(restored(tmp_path, 1, state()), state(1))
    (tmp_path / "2/default/step-000000000001.tri").unlink()
    with pytest.raises(TricompError, match="step 2 needs a parent|000002"):
        restored(tmp_path, 2, state())


def test_a_damaged_parent_makes_a_keyframe(tmp_path, caplog):
    saved(tmp_path, [1, 2])
    flip(tmp_path / "2/default/step-000000000002.tri", 0.5)
    saved(tmp_path, [3])
    assert "stands alone, since step 2 cannot be read" in caplog.text
    assert [Path(path).name for path in files(tmp_path / "3")] == ["step-000000000003.tri"]
    assert_same(restored(tmp_path, 3, state()), state(3))
    flip(tmp_path / "3/default/step-000000000003.tri", 0.999)
    saved(tmp_path, [4])
    assert "stands alone, since step 3 cannot be read" in caplog.text
    assert_same(restored(tmp_path, 4, state()), state(4))


def test_another_handlers_step(tmp_path):
    with manager(tmp_path) as writing:
        writing.save(1, args=ocp.args.StandardSave({"x": jnp.ones(3)}))
    with pytest.raises(MissingFile, match=r"1/default: there is no .tri file in it"):
        restored(tmp_path, 1)
    with manager(tmp_path, handler=TricompHandler()) as writing:
        writing.save(2, args=TricompSave(state(2)))
    assert_same(restored(tmp_path, 2, state()), state(2))


@BOTH
def test_a_write_that_fails(tmp_path, monkeypatch, is_async):
    saved(tmp_path, [1])
    real = Writer.write

    def fail(self, folder, taken):
        if taken.place.step == 2:
            raise StorageError(f"{folder}: cannot be written: no space left.")
        return real(self, folder, taken)

    monkeypatch.setattr(Writer, "write", fail)
    with manager(tmp_path, is_async) as writing:
        with contextlib.nullcontext() if is_async else pytest.raises(StorageError, match="no space left"):
            writing.save(2, args=TricompSave(state(2)))
        if is_async:
            with pytest.raises(StorageError, match="no space left"):
                writing.wait_until_finished()
        assert_same(writing.restore(1, args=TricompRestore(state())), state(1))
        if is_async:
            writing.save(3, args=TricompSave(state(3)))
            writing.wait_until_finished()
            assert_same(writing.restore(3, args=TricompRestore(state())), state(3))
            assert files(tmp_path / "3")[0] == "default/step-000000000001.tri"


def test_saves_at_once_do_not_share_memory(tmp_path):
    """As those of version 1 may be, whose handlers are of one type."""
    writer = Writer(Options())
    trees = [{"w": weights((203, 41), i)} for i in range(5)]
    folders = [tmp_path / str(i) / "state" for i in range(5)]
    taken = []
    for folder, tree in zip(folders, trees):
        folder.mkdir(parents=True)
        taken.append(writer.take(folder, tree, None, True))
    for folder, one in reversed([*zip(folders, taken)]):
        writer.write(folder, one)
    for i, (folder, tree) in enumerate(zip(folders, trees)):
        found = writer.restore(folder, None, True)
        assert found["w"].tobytes() == tree["w"].tobytes()
        again = writer.take(folders[0], {"w": np.zeros((300, 300), np.float32) + i}, None, True)
        assert writer.restore(folder, None, True)["w"].tobytes() == tree["w"].tobytes()
        writer._reuse(again)


def test_what_cannot_be_saved(tmp_path):
    saved(tmp_path, [1])
    with (
        manager(tmp_path, is_async=False) as writing,
        pytest.raises(UnsupportedNode, match="'f': <lambda> is a function"),
    ):
        writing.save(2, args=TricompSave({"f": lambda: 1}))
    assert_same(restored(tmp_path, 1, state()), state(1))
    with pytest.raises(InvalidArgument, match="expected 'linked' or a KeepParents, got 'all'"):
        TricompHandler(parents="all")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"expected a tricomp.KeyframeEvery, got 3"):
        TricompHandler(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="expected a preservation policy of Orbax"):
        KeepParents(3, tmp_path)
    with ocp.Checkpointer(TricompHandler()) as one, pytest.raises(InvalidArgument, match="expected args=TricompSave"):
        one.save(tmp_path / "9", args=ocp.args.StandardSave({}))


def test_memory_may_change_when_save_returns(tmp_path, monkeypatch):
    """Arrays that are donated, and numpy's that are written to, while the file waits to be written."""
    may_write, real = threading.Event(), Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, *given: (may_write.wait(60), real(self, *given))[1])
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    old = weights((301, 33))
    expected = [stepped(old, number) for number in range(4)]
    with manager(tmp_path) as writing:
        for number in range(4):  # memory of the first is that of the third
            tree: dict[str, Any] = {"w": jnp.asarray(expected[number]), "n": expected[number][5].copy()}
            given = tree["w"]
            writing.save(number, args=TricompSave(tree))
            jax.block_until_ready(step({"w": given}))
            tree["n"][:] = 7
            assert given.is_deleted()
            may_write.set()
            writing.wait_until_finished()
            may_write.clear()
    for number in range(4):
        found = restored(tmp_path, number)
        assert np.asarray(found["w"]).tobytes() == expected[number].tobytes()
        assert found["n"].tobytes() == expected[number][5].tobytes()


# the example of the documentation


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        def dense(n_in, n_out):
            return nn.Dense(n_out, kernel_init=lambda *_: jnp.asarray(weights((n_in, n_out))))

        return dense(300, 10)(nn.relu(dense(40, 300)(x)))


def train(folder, save_args, restore_args):
    """Flax's guide: a TrainState, a CheckpointManager with options, saves in the loop, the latest restored."""
    model, data, labels = Classifier(), jnp.asarray(weights((64, 40), 1)), jnp.asarray(np.arange(64) % 10)

    def init():
        params = model.init(jax.random.key(0), data)
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-4))

    @jax.jit
    def train_step(train_state):
        def loss(params):
            logits = train_state.apply_fn(params, data)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))

    options = ocp.CheckpointManagerOptions(max_to_keep=3, save_interval_steps=2, create=True)
    with ocp.CheckpointManager(folder, options=options) as mngr:
        train_state, n_written = init(), 0
        for step in range(10):
            train_state = train_step(train_state)
            if mngr.save(step, args=save_args(train_state)):
                mngr.wait_until_finished()
                n_written += n_bytes(folder / str(step), own=f"step-{step:012d}.tri")
        return mngr.all_steps(), mngr.restore(mngr.latest_step(), args=restore_args(init())), n_written


def test_the_documented_example(tmp_path):
    stock = train(tmp_path / "stock", ocp.args.StandardSave, ocp.args.StandardRestore)
    ours = train(tmp_path / "ours", TricompSave, TricompRestore)
    assert stock[0] == ours[0] == [4, 6, 8]
    kept = {"step": stock[1].step, "params": stock[1].params, "opt_state": stock[1].opt_state}
    assert_same({"step": ours[1].step, "params": ours[1].params, "opt_state": ours[1].opt_state}, kept)
    assert type(ours[1]) is TrainState
    assert ours[2] < 0.8 * stock[2]


# version 1


def test_version_1(tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    handler = tricomp_jax.orbax.CheckpointableHandler
    registry = v1.handlers.local_registry()
    registry.add(handler, checkpointable_name="model")
    with v1.Context(checkpointables_options=v1.options.CheckpointablesOptions(registry=registry)):
        for step in range(3):
            v1.save_checkpointables(tmp_path / f"one_{step}", {"model": state(step), "config": {"lr": 0.1}})
        response = v1.save_checkpointables_async(tmp_path / "last", {"model": state(5)})
        response.result()
        found = v1.load_checkpointables(tmp_path / "one_2", {"model": state(), "config": None})
        assert_same(found["model"], state(2))
        assert found["config"] == {"lr": 0.1}
        assert_same(v1.load_checkpointables(tmp_path / "last")["model"]["params"], state(5)["params"])
        metadata = v1.checkpointables_metadata(tmp_path / "last").metadata["model"]
        assert metadata["params/dense/bias"] == jax.ShapeDtypeStruct((67,), jnp.bfloat16)
        target = state()
        del target["step"]
        with pytest.raises(InvalidArgument, match="(?s)one_2 in .* in the checkpoint but not in the target: 'step'"):
            v1.load_checkpointables(tmp_path / "one_2", {"model": target})
    assert len(files(tmp_path / "one_2" / "model")) == 3
    assert len(files(tmp_path / "last")) == 1
    assert (handler().is_handleable(state()), handler().is_handleable({"lr": 0.1})) == (True, False)
    assert handler().is_abstract_handleable(jax.eval_shape(lambda: state()["params"]))


@pytest.mark.parametrize("is_keeping", [False, True], ids=["linked", "kept"])
def test_training_with_version_1(tmp_path, is_keeping):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    policy = v1.training.preservation_policies.LatestN(2)
    keep = KeepParents(policy, tmp_path) if is_keeping else policy
    parents: dict[str, Any] = {"parents": keep} if is_keeping else {}
    handler = tricomp_jax.orbax.CheckpointableHandler.configured(keyframe=tricomp.KeyframeEvery(3), **parents)
    registry = v1.handlers.local_registry(include_global_registry=False)
    registry.add(handler, checkpointable_name="state")
    context = v1.Context(checkpointables_options=v1.options.CheckpointablesOptions(registry=registry))
    with v1.training.Checkpointer(tmp_path, context=context, preservation_policy=keep) as training:
        for step in range(6):
            training.save_async(step, state(step)).result()
        for kept in training.checkpoints:
            assert_same(training.load(kept.step, state()), state(kept.step))
        assert [kept.step for kept in training.checkpoints] == ([3, 4, 5] if is_keeping else [4, 5])
    assert len(files(tmp_path / "5")) == (1 if is_keeping else 3)


def test_what_is_not_installed():
    code = """
import sys, tricomp_jax
assert not any(name.partition(".")[0] in ("orbax", "flax") for name in sys.modules)
sys.modules["orbax"] = None
try:
    import tricomp_jax.orbax
except ModuleNotFoundError as error:
    print(error)
del sys.modules["orbax"]
import tricomp_jax.orbax
sys.modules["orbax.checkpoint.experimental.v1"] = None
try:
    tricomp_jax.orbax.CheckpointableHandler
except ImportError as error:
    print(error)
try:
    tricomp_jax.orbax.Handler
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, third = done.stdout.splitlines()
    assert "pip install orbax-checkpoint" in first
    assert "needs version 1 of Orbax" in second
    assert "TricompHandler" in third
