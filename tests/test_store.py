"""The Store: what is saved loads bit for bit, whatever policy, fault or damage; errors say which step to load."""

import errno
import os
import re
import resource
import subprocess
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tricomp
from tests.cases import equal
from tricomp import KeepEvery, KeepLast, KeyframeEvery, Store, codec
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    MissingLeaf,
    MissingParent,
    MissingStep,
    StorageError,
    StoreLocked,
    UnsupportedNode,
    UnsupportedVersion,
)
from tricomp.folder import LOCK_NAME, Folder


def state(step, run=0):
    """A small training state with structure: rows of different scale that drift, a counter, a constant."""
    rng = np.random.default_rng(7)
    rows = np.exp2(rng.integers(-6, 6, (20, 1)))
    w = rng.standard_normal((20, 30)) * rows
    drift = np.random.default_rng((step, run)).standard_normal((20, 30)) * rows * 1e-4
    v = (np.abs(w) * 1e-3).astype(np.float32)
    return {"w": (w + drift).astype(np.float32), "opt": {0: {"v": v, "step": step}}, "zero": np.zeros(9)}


def file_of(folder, step):
    return Path(folder) / f"step-{step:012d}.tri"


def flip(folder, step, at=0.5):
    """Flip one bit of the file of a step, at a fraction of its length."""
    data = bytearray(file_of(folder, step).read_bytes())
    data[int(len(data) * at)] ^= 16
    file_of(folder, step).write_bytes(data)


def filled(folder, steps, **options):
    """A folder with checkpoints of steps; the Store is closed again."""
    with Store(folder, **options) as store:
        return [store.save(step, state(step)) for step in steps]


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "run")


# Saving and loading


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
@pytest.mark.parametrize("reference_in", ["host", "store"])
@pytest.mark.parametrize("keep", [(), (KeepLast(2), KeepEvery(60))])
def test_every_step_that_is_kept_loads(folder, reference, reference_in, keep):
    options = {"keyframe": KeyframeEvery(4), "keep": keep, "reference": reference, "reference_in": reference_in}
    with Store(folder, **options) as store:
        for step in range(0, 120, 10):
            report = store.save(step, state(step), metadata={"step": step})
            assert (report.parent is None) == (step % 40 == 0)
            assert report.path == str(file_of(folder, step))
            assert all(equal(store.load(other), state(other)) for other in store.steps())
            store.load(step)
        assert store.steps() == (
            [0, 40, 50, 60, 80, 90, 100, 110] if keep and reference == "previous" else store.steps()
        )
        assert {0, 60, 100, 110} <= set(store.steps())
        assert len(store.steps()) == 12 or keep
        assert store.latest() == 110
        assert equal(store.load(), state(110))
        assert str(store.verify()) == f"{len(store.steps())} steps intact, 0 broken"
        with store.open(100) as file:
            assert file.metadata == {"step": 100}
            assert equal(file["opt/0/v"], state(100)["opt"][0]["v"])
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_a_save_continues_from_the_step_that_is_named(folder):
    filled(folder, [0, 10, 20], keyframe=KeyframeEvery(100))
    with Store(folder, keyframe=KeyframeEvery(100)) as store:
        with store.open(10) as file:
            content_id = file.content_id
        store.continue_from(10)
        assert store.save(30, state(30)).parent == content_id
        with pytest.raises(MissingStep, match=re.escape("step 11 is not in")):
            store.continue_from(11)


def test_metadata_alone(folder):
    with Store(folder) as store:
        store.save(3, state(3), {"loss": 0.5})
        store.save(4, state(4))
        assert (store.metadata(3), store.metadata(4)) == ({"loss": 0.5}, {})
        with pytest.raises(MissingStep, match="step 5 is not in"):
            store.metadata(5)
        path = os.path.join(folder, "step-000000000004.tri")
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) - 1)
        with pytest.raises(CorruptFile, match="it was cut"):
            store.metadata(4)


def test_a_new_store_continues_the_chain(folder):
    reports = [filled(folder, [step], keyframe=KeyframeEvery(3))[0] for step in range(5)]
    assert [report.parent for report in reports] == [
        None, reports[0].content_id, reports[1].content_id, None, reports[3].content_id,
    ]  # fmt: skip
    assert equal(Store(folder).load(2), state(2))


def test_the_tree_may_change_after_a_save(folder):
    tree = state(1)
    with Store(folder) as store:
        store.save(1, tree)
        tree["w"] += 1
        store.save(2, tree)
        tree["w"] += 1
        assert equal(store.load(1)["w"], state(1)["w"])
        assert equal(store.load(2)["w"], state(1)["w"] + 1)


def test_a_tree_may_gain_lose_and_reshape_leaves(folder):
    trees = [state(0), {**state(1), "new": np.arange(5)}, {"w": np.zeros((3, 3), np.float32)}, {}, state(4)]
    with Store(folder) as store:
        for step, tree in enumerate(trees):
            store.save(step, tree)
    assert all(equal(Store(folder).load(step), tree) for step, tree in enumerate(trees))


def test_equal_states_in_a_row(folder):
    with Store(folder, keep=[KeepLast(2)]) as store:
        reports = [store.save(step, state(0)) for step in range(8)]
        assert len({report.content_id for report in reports}) == 1
        assert store.verify().is_clean
        assert equal(store.load(), state(0))
        store.save(8, state(8))
        assert store.verify().is_clean


def test_bounded_spec_codes_against_what_a_reader_sees(folder):
    spec = tricomp.Spec(keep_mantissa_bits={"w": 7})
    with Store(folder, spec=spec) as store:
        for step in range(4):
            store.save(step, state(step))
            held = store._held
            assert held is not None
            assert held.content_id == store.open(step).content_id != tricomp.content_id(state(step))
        loaded = [store.load(step)["w"] for step in range(4)]
        store.rebase(2)
        assert store.verify().is_clean
        assert [store.load(step)["w"].tobytes() for step in range(4)] == [w.tobytes() for w in loaded]
    assert all(np.abs(w / state(step)["w"] - 1).max() <= 2**-8 for step, w in enumerate(loaded))


def test_leaves_of_a_step(folder):
    filled(folder, [1, 2])
    assert equal(Store(folder).load(2, leaves=["opt/*"]), {"opt/0/v": state(2)["opt"][0]["v"]})
    with pytest.raises(MissingLeaf, match="no leaf matches 'x'"):
        Store(folder).load(leaves=["x"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["save", "load", "rebase", "remove", "reopen"]), st.integers(0, 6)), max_size=14
    ),
    st.sampled_from(["previous", "keyframe"]),
    st.sampled_from(["host", "store"]),
    st.integers(1, 4),
)
def test_any_sequence_of_calls_keeps_every_step_loadable(actions, reference, reference_in, n):
    with tempfile.TemporaryDirectory() as folder:
        options = {"reference": reference, "reference_in": reference_in, "keyframe": KeyframeEvery(n)}
        store, expected = Store(folder, **options), {}
        for i, (action, step) in enumerate(actions):
            if action == "save":
                store.save(step, state(step, i), overwrite=True)
                expected[step] = state(step, i)
            elif action == "reopen":
                store.close()
                store = Store(folder, **options)
            elif step in expected:
                if action == "remove":
                    del expected[step]
                    store.remove(step)
                else:
                    getattr(store, action)(step)
            assert store.steps() == sorted(expected)
        assert all(equal(store.load(step), tree) for step, tree in expected.items())
        assert store.verify().intact == tuple(sorted(expected))
        store.close()


# Steps


def test_steps_that_are_there_are_not_replaced_unasked(folder):
    filled(folder, [10, 20, 30])
    with Store(folder) as store:
        with pytest.raises(InvalidArgument, match=f"step 20 is already in {folder}. Save a higher step, or pass overw"):
            store.save(20, state(99))
        assert equal(store.load(20), state(20))
        store.save(20, state(99), overwrite=True)
        assert equal(store.load(20), state(99))
        assert equal(store.load(30), state(30))  # was coded against the old 20
        assert store.verify().is_clean


def test_resuming_from_an_older_step(folder, caplog):
    filled(folder, [10, 20, 30, 40])
    with Store(folder, keep=[KeepLast(2)]) as store:
        store.load(20)
        parent = store.open(20).content_id
        report = store.save(25, state(25, run=1))
        assert report.parent == parent
        assert "saved step 25 below step 40, which stays the latest" in caplog.text
        assert 25 in store.steps()  # never pruned by its own save, though two higher ones are there
        assert store.latest() == 40
        store.remove(30, 40)
        assert store.latest() == 25
        assert equal(store.load(), state(25, run=1))
        assert store.verify().is_clean


def test_going_back_to_an_older_step(folder):
    filled(folder, [10, 20, 30, 40])
    with Store(folder) as store:
        with pytest.raises(InvalidArgument, match=r"take the later ones away with Store.rewind\(step\)"):
            store.save(30, state(30, run=1))
        with pytest.raises(MissingStep, match="step 25 is not in .*: nothing was removed"):
            store.rewind(25)
        assert store.rewind(20) == (30, 40)
        assert store.rewind(20) == ()
        assert (store.steps(), store.latest()) == ([10, 20], 20)
        report = store.save(30, state(30, run=1))
        assert report.parent == store.open(20).content_id
        assert equal(store.load(), state(30, run=1))
        assert store.verify().is_clean


@pytest.mark.parametrize("step", [-1, 1.5, "1", None, True, 10**18])
def test_steps_are_checked(folder, step):
    with pytest.raises(InvalidArgument, match="step: expected an integer"):
        Store(folder).save(step, state(0))


def test_numpy_steps_and_long_steps(folder):
    with Store(folder) as store:
        store.save(np.int64(3), state(3))  # type: ignore[arg-type]
        store.save(10**15, state(4))
        assert store.steps() == [3, 10**15]
        assert equal(store.load(np.int32(3)), state(3))  # type: ignore[arg-type]


def test_steps_that_are_not_there(folder):
    with pytest.raises(MissingStep, match=f"there are no checkpoints in {folder}. Save one first, or check the path"):
        Store(folder).load()
    with pytest.raises(MissingStep, match=f"step 5 is not in {folder}. It has no checkpoints"):
        Store(folder).load(5)
    assert not os.path.exists(folder)
    filled(folder, [10, 20])
    with pytest.raises(MissingStep, match=f"step 15 is not in {folder}. The nearest is step 10"):
        Store(folder).open(15)
    with Store(folder) as store, pytest.raises(MissingStep, match="step 15 is not in .*: nothing was removed"):
        store.remove(20, 15)
    assert Store(folder).steps() == [10, 20]


def test_arguments_are_checked(tmp_path):
    with pytest.raises(InvalidArgument, match="reference is 'previous' or 'keyframe', not 'first'"):
        Store(tmp_path, reference="first")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="reference_in is 'device', 'host' or 'store', not 'gpu'"):
        Store(tmp_path, reference_in="gpu")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="keyframe: expected a tricomp.KeyframeEvery, got 10"):
        Store(tmp_path, keyframe=10)  # type: ignore[arg-type]
    for keep in (KeepLast(2), [3]):
        with pytest.raises(InvalidArgument, match=r"keep: expected a list of policies, say .*, got \[?(KeepLast|3)"):
            Store(tmp_path, keep=keep)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="spec: expected a tricomp.Spec, got str 'fast'"):
        Store(tmp_path, spec="fast")  # type: ignore[arg-type]
    for url in (None, 3, b"run", ""):
        with pytest.raises(InvalidArgument, match="store: expected a path or URL as str, got"):
            Store(url)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="'s3:/bucket/run': a URL lost a slash in a Path. Give it as str"):
        Store(Path("s3://bucket/run"))
    with pytest.raises(InvalidArgument, match="storage_options and cache are for URLs; this is a local folder"):
        Store(tmp_path, storage_options={"key": "x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="is a file. A Store needs a folder"):
        Store(tmp_path / "file").steps()
    for path in ("file", "file/run"):
        with pytest.raises(InvalidArgument, match="/file: is a file. A Store needs a folder"):
            Store(tmp_path / path).save(1, 1)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InvalidArgument, match="/link: is a link to nothing. A Store needs a folder"):
        Store(tmp_path / "link").save(1, 1)
    with pytest.raises(InvalidArgument, match="step: expected an integer, got ") as caught:
        Store(tmp_path).save({i: state(1) for i in range(100)}, 1)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    assert Store(f"file://{tmp_path}").steps() == []


def test_a_relative_folder_stays_the_same_when_the_process_changes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/a") as store:
        store.save(1, state(1))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.save(2, state(2))
        assert store.steps() == [1, 2]
        assert equal(store.load(2), state(2))
        store.remove(1)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert Store(tmp_path / "runs" / "a").steps() == [2]


def test_foreign_files_are_left_alone(folder):
    filled(folder, [1])
    for name in ("step-1.tri", "step-000000000002.tri.bak", "notes.txt", "step-000000000003.TRI"):
        (Path(folder) / name).write_text("x")
    os.mkdir(file_of(folder, 9))
    with Store(folder, keep=[KeepLast(1)]) as store:
        assert store.steps() == [1]
        store.save(4, state(4))
        store.prune()
    assert len(os.listdir(folder)) == 5 + 2 + 1  # those, two steps, the lock


# Pruning and rebasing


def test_prune_returns_what_it_removed(folder):
    filled(folder, range(0, 60, 10), keyframe=KeyframeEvery(3))
    with Store(folder) as store:
        assert store.prune() == ()
    with Store(folder, keep=[KeepLast(1)]) as store:
        assert store.prune() == (0, 10, 20)
        assert store.steps() == [30, 40, 50]
        assert equal(store.load(50), state(50))


def test_broken_steps_do_not_push_out_good_ones(folder):
    filled(folder, [10, 20, 30], keyframe=KeyframeEvery(1))
    for step in (20, 30):
        file_of(folder, step).write_bytes(b"")
    with Store(folder, keep=[KeepLast(2)], keyframe=KeyframeEvery(1)) as store:
        assert store.prune() == ()
        store.save(40, state(40))
        store.save(50, state(50))
        assert store.steps() == [20, 30, 40, 50]


def test_rebase_keeps_content_and_children(folder):
    reports = filled(folder, [10, 20, 30])
    with Store(folder) as store:
        report = store.rebase(20)
        assert report.parent is None
        assert report.content_id == reports[1].content_id
        store.remove(10)
        assert store.verify().intact == (20, 30)
        assert equal(store.load(30), state(30))


def test_rebase_of_types_that_are_not_registered_here(folder):
    class Mine(dict):
        pass

    tricomp.register_node(Mine, "test.Mine", dict, Mine)
    try:
        with Store(folder) as store:
            for step in range(2):
                store.save(step, Mine(state(step)))
    finally:
        del tricomp.tree._by_type[Mine], tricomp.tree._by_name["test.Mine"]
    with Store(folder) as store:
        store.rebase(1)
        assert store.verify().is_clean
        with pytest.raises(UnsupportedNode, match="'test.Mine' is not registered here"):
            store.load(1)
        assert equal(store.load(1, leaves=["w"])["w"], state(1)["w"])


def test_removed_steps_free_their_children_first(folder):
    filled(folder, [10, 20, 30, 40])
    with Store(folder) as store:
        store.remove(10, 20)
        assert store.verify().intact == (30, 40)
        assert equal(store.load(40), state(40))
        assert store.open(40).parent == store.open(30).content_id


# Damage


def test_a_missing_parent_is_told_with_the_step_to_load(folder):
    reports = filled(folder, [1000, 1100, 1200, 1300])
    os.unlink(file_of(folder, 1100))
    store = Store(folder)
    needs = (
        f"needs a parent with content id {reports[1].content_id}, which is not in {folder}. Load step 1000, the near"
    )
    with pytest.raises(MissingParent, match=f"step 1200: step 1200 {needs}"):
        store.load(1200)
    with pytest.raises(MissingParent, match=f"step 1300: step 1300 needs step 1200, which {needs}"):
        store.load()
    report = store.verify()
    assert report.intact == (1000,)
    assert [broken.step for broken in report.broken] == [1200, 1300]
    assert str(report).startswith("1 steps intact, 2 broken\nstep 1200: step 1200 needs a parent")


def test_a_different_parent_is_a_missing_one(folder):
    filled(folder, [10, 20])
    os.replace(file_of(filled(folder + "2", [30]) and folder + "2", 30), file_of(folder, 10))
    with pytest.raises(MissingParent, match="step 20 needs a parent with content id .* Load step 10"):
        Store(folder).load()
    assert equal(Store(folder).load(10), state(30))


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (lambda f: flip(f, 30, 0.3), CorruptFrame, "step 30: .*checksum .* Load step 20, the nearest intact one"),
        (lambda f: flip(f, 30, 0.01), CorruptFile, "step 30: .*header: .* Load step 20, the nearest intact one"),
        (lambda f: flip(f, 30, 0.999), CorruptFile, "step 30: .* Load step 20, the nearest intact one"),
        (lambda f: file_of(f, 30).write_bytes(b""), CorruptFile, "step 30: .*is empty .* Load step 20, the nearest"),
        (lambda f: os.truncate(file_of(f, 30), 500), CorruptFile, "step 30: .* was cut at 500 bytes.* Load step 20"),
        (
            lambda f: file_of(f, 30).write_bytes(b"\x87\xa7tricomp\x02" + bytes(90)),
            UnsupportedVersion,
            "was written by format 2; this tricomp reads 1. Upgrade .* Load step 20",
        ),
    ],
)
def test_a_broken_latest_step_names_the_step_to_load(folder, damage, error, text):
    filled(folder, [10, 20, 30])
    damage(folder)
    store = Store(folder)
    with pytest.raises(error, match=text):
        store.load()
    assert equal(store.load(20), state(20))
    report = store.verify()
    assert report.intact == (10, 20)
    assert [broken.step for broken in report.broken] == [30]


def test_a_broken_link_breaks_what_needs_it_and_no_more(folder):
    filled(folder, [10, 20, 30, 40, 50, 60], keyframe=KeyframeEvery(3))
    flip(folder, 50, 0.3)
    store = Store(folder)
    with pytest.raises(CorruptFrame, match="step 60: .*step-000000000050.tri: .* Load step 40, the nearest intact one"):
        store.load()
    assert store.verify().intact == (10, 20, 30, 40)
    assert store.verify().broken[1].reason == "needs step 50, which is broken."
    flip(folder, 40, 0.3)
    with pytest.raises(CorruptFrame, match="Load step 30, the nearest intact one"):
        store.load()
    for step in (10, 20, 30):
        flip(folder, step, 0.3)
    with pytest.raises(CorruptFrame, match="No other step can be loaded"):
        store.load()
    assert store.verify().intact == ()


def test_damaged_files_are_named_beside_a_missing_parent(folder):
    filled(folder, [10, 20])
    file_of(folder, 10).write_bytes(b"")
    with pytest.raises(MissingParent, match=r"\(damaged there: steps 10\). No other step can be loaded"):
        Store(folder).load(20)


def test_a_save_goes_around_broken_steps(folder):
    filled(folder, [10, 20, 30])
    file_of(folder, 20).write_bytes(b"")
    with Store(folder) as store:
        report = store.save(40, state(40))  # 30 has no chain any more
        assert report.parent is None
        assert equal(store.load(), state(40))


@pytest.mark.parametrize("reference_in", ["host", "store"])
def test_a_save_goes_around_a_damaged_parent(folder, caplog, reference_in):
    filled(folder, [10, 20, 30])
    flip(folder, 20, 0.3)
    with Store(folder, reference_in=reference_in) as store:
        report = store.save(40, state(40))
        assert report.parent is None
        assert "step 40 stands alone, since step 30 cannot be read: " in caplog.text
        assert equal(store.load(), state(40))
        store.save(20, state(20), overwrite=True)  # makes good what was lost
        assert "step 30 cannot be rebased" in caplog.text
        assert store.verify().intact == (10, 20, 30, 40)
        flip(folder, 30, 0.3)
        store.remove(10, 20)
        assert store.verify().intact == (40,)


@pytest.mark.parametrize("reference_in", ["host", "store"])
def test_what_may_change_once_it_is_encoded_is_not_encoded_twice(folder, monkeypatch, reference_in):
    """Somebody waits for a leaf: damage of the parent is known before; else the save fails."""
    trees = [{"x": np.arange(20_000) % (7 + k), "y": np.arange(20_000) * (3 + k) % 1009} for k in range(3)]
    with Store(folder) as store:
        for step in (10, 20):
            store.save(step, trees[step // 10 - 1])
        with store.open(20) as file:
            damaged = file._frame_of[file._index["y"]].offset + file.coded_bytes("y") // 2
    data = bytearray(file_of(folder, 20).read_bytes())
    data[damaged] ^= 1
    file_of(folder, 20).write_bytes(data)
    monkeypatch.setattr(codec.engine, "BATCH_WORDS", 1)
    monkeypatch.setattr(codec.engine, "THREAD_WORDS", 1)
    told: list[int] = []
    with Store(folder, reference_in=reference_in) as store:
        first = codec.First(["x"], lambda: told.append(1))
        assert store.save(30, trees[2], first=first).parent is None
        assert told == [1]
        assert equal(store.load(30), trees[2])
        store.remove(30)
        monkeypatch.setattr(tricomp.store, "check_all", lambda file: None)  # as if it was damaged just now
        with pytest.raises(CorruptFrame, match="of 'y': checksum"):
            store.save(30, trees[2], first=first)
        assert told == [1, 1]
        assert store.steps() == [10, 20]


# One writer


def test_a_second_writer_is_refused(folder):
    with Store(folder) as first, Store(folder) as second:
        first.save(1, state(1))
        for action in (
            lambda: second.save(2, state(2)),
            second.prune,
            lambda: second.rebase(1),
            lambda: second.remove(1),
        ):
            with pytest.raises(StoreLocked) as caught:
                action()
            text = str(caught.value)
            assert f"{folder}: is being written by process {os.getpid()} on host " in text
            assert "Wait for it to end or close its Store; reading needs no lock" in text
        assert equal(second.load(), state(1))  # reading is free
        assert second.verify().is_clean
        first.close()
        second.save(2, state(2))


def test_reading_takes_no_lock(folder):
    filled(folder, [1])
    with Store(folder) as reader, Store(folder) as writer:
        reader.load()
        reader.verify()
        writer.save(2, state(2))
        assert equal(reader.load(), state(2))


WRITER = """
    import os, sys, time, tricomp, numpy as np
    store = tricomp.Store(sys.argv[1])
    store.save(1, dict(a=np.arange(9)))
    {then}
    print("ready", flush=True)
    time.sleep(60)
"""


def started(folder, then=""):
    script = textwrap.dedent(WRITER.format(then=then))
    process = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("then", ["", "if not os.fork(): time.sleep(9), os._exit(0)"])
def test_a_killed_writer_frees_the_store_even_if_it_had_forked(folder, then):
    process = started(folder, then)
    try:
        with Store(folder) as store, pytest.raises(StoreLocked, match=f"by process {process.pid} on host"):
            store.save(2, state(2))
    finally:
        process.kill()
        process.wait()
    with Store(folder) as store:
        store.save(2, state(2))


def test_a_forked_child_is_no_writer(folder):
    with Store(folder) as store:
        store.save(1, state(1))
        child = os.fork()
        if not child:
            code = 1
            try:
                store.save(2, state(2))
            except StoreLocked:
                code = 42
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        store.save(2, state(2))  # the parent's lock is still there
        with Store(folder) as other, pytest.raises(StoreLocked):
            other.save(3, state(3))


def test_what_killed_writers_left_is_invisible_and_removed(folder, tmp_path):
    filled(folder, [1])
    left = [Path(folder) / f".step-00000000000{i}.tri.0123abcd.tmp" for i in (1, 2)]
    for path in left:
        path.write_bytes(b"half")
    store = Store(folder)
    assert store.steps() == [1]
    assert store.verify().is_clean
    assert all(path.exists() for path in left)
    with store:
        store.save(3, state(3))
    assert not any(path.exists() for path in left)
    tricomp.save(tmp_path / "x.tri", 1)
    orphan = tmp_path / ".x.tri.89abcdef.tmp"
    orphan.write_bytes(b"half")
    tricomp.save(tmp_path / "x.tri", 2)
    assert not orphan.exists()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_that_moves_under_its_writer_is_told_of(folder, is_replaced):
    with Store(folder) as store:
        store.save(1, state(1))
        os.rename(folder, folder + ".old")
        if is_replaced:
            filled(folder, [7])
        with pytest.raises(StorageError, match="run: was moved, removed or replaced while .* Close the Store and open"):
            store.save(2, state(2))
        assert os.path.exists(folder) == is_replaced
    assert untouched(folder + ".old", [1])
    with Store(folder + ".old") as store:
        store.save(2, state(2))


def test_a_file_system_without_locks_is_told_of(folder, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    filled(folder, [1, 2])
    assert f"{folder}: the file system cannot lock: nothing keeps a second writer out" in caplog.text
    assert equal(Store(folder).load(), state(2))


# Faults


@contextmanager
def largest_file(n_bytes):
    """Within, the kernel refuses to let a file grow beyond n_bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def untouched(folder, steps):
    """Whether the store holds exactly these steps, all good, and nothing else was left."""
    names = [name for name in os.listdir(folder) if name != LOCK_NAME]
    store = Store(folder)
    good = store.verify().intact == tuple(steps) and all(equal(store.load(step), state(step)) for step in steps)
    return good and sorted(names) == [file_of(folder, step).name for step in steps]


@pytest.mark.parametrize("n_bytes", [100, 700, 1400])
def test_a_full_disk(folder, n_bytes):
    filled(folder, [1, 2])
    with Store(folder) as store:
        with largest_file(n_bytes), pytest.raises(StorageError) as caught:
            store.save(3, state(3))
        text = str(caught.value)
        assert re.search(
            r"step-000000000003.tri: cannot be written \(after \d+ bytes\): File too large. The disk is", text
        )
        assert "free some space and save again. Nothing that was there has changed" in text
        assert caught.value.errno == errno.EFBIG
        assert untouched(folder, [1, 2])
        store.save(3, state(3))
    assert untouched(folder, [1, 2, 3])


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failing_system_calls(folder, monkeypatch, call, code):
    filled(folder, [1, 2])
    with Store(folder) as store, monkeypatch.context() as patched:

        def fail(*_):
            raise OSError(code, os.strerror(code))

        patched.setattr(f"os.{call}", fail)
        with pytest.raises(
            StorageError, match=f"cannot be written .*: {re.escape(os.strerror(code))}. .*Nothing that"
        ) as caught:
            store.save(3, state(3))
        assert caught.value.errno == code
        assert ("The disk is full" in str(caught.value)) == (code != errno.EIO)
    assert untouched(folder, [1, 2])


@pytest.mark.parametrize(
    "error", [ValueError("in the encoder"), MemoryError(), KeyboardInterrupt(), OSError(5, "mine")]
)
@pytest.mark.parametrize("n_frames", [0, 1])
def test_an_exception_in_the_encoder(folder, tmp_path, monkeypatch, error, n_frames):
    real = codec.encode

    def failing(*arguments, **options):
        for i, frame in enumerate(real(*arguments, **options)):
            if i == n_frames:
                raise error
            yield frame

    filled(folder, [1, 2])
    tricomp.save(tmp_path / "x.tri", state(0))
    monkeypatch.setattr(codec, "encode", failing)
    with Store(folder) as store, pytest.raises(type(error)) as caught:
        store.save(3, state(3))
    assert caught.value is error
    with pytest.raises(type(error)):
        tricomp.save(tmp_path / "x.tri", state(9))
    monkeypatch.undo()
    assert untouched(folder, [1, 2])
    assert sorted(os.listdir(tmp_path)) == ["run", "x.tri"]
    assert equal(tricomp.load(tmp_path / "x.tri"), state(0))
    filled(folder, [3])
    assert untouched(folder, [1, 2, 3])


def test_a_failing_prune_does_not_fail_the_save(folder, monkeypatch, caplog):
    filled(folder, [1, 2], keyframe=KeyframeEvery(1))
    with Store(folder, keep=[KeepLast(1)], keyframe=KeyframeEvery(1)) as store:

        def fail(*_):
            raise StorageError("no")

        monkeypatch.setattr(Folder, "delete", fail)
        store.save(3, state(3))
    assert "step 3 is saved, but older ones could not be removed: no" in caplog.text
    assert untouched(folder, [1, 2, 3])


def without_privileges(action):
    """The text that action returns or of what it raises, in a process that may not ignore permissions."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        text = "?"
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(write_end, text.encode())
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as file:
        return file.read()


def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "run")
        filled(folder, [1, 2])
        os.unlink(os.path.join(folder, LOCK_NAME))
        os.chmod(parent, 0o755)
        os.chmod(folder, 0o555)
        try:
            text = without_privileges(lambda: Store(folder).save(3, state(3)))
            assert text.startswith(f"StorageError: {folder}/{LOCK_NAME}: cannot be written")
            assert "Permission denied. The folder is read-only for this user: change its permissions or choose" in text
            text = without_privileges(lambda: tricomp.save(f"{folder}/x.tri", 1))
            assert text.startswith(
                f"StorageError: {folder}/x.tri: cannot be written (after 0 bytes): Permission denied"
            )
            assert without_privileges(lambda: equal(Store(folder).load(), state(2))) == "True"
            assert without_privileges(lambda: Store(folder).verify()) == "2 steps intact, 0 broken"
            os.chmod(file_of(folder, 2), 0)
            text = without_privileges(lambda: Store(folder).load())
            assert "step-000000000002.tri: cannot be read: Permission denied. Ask for permission to read it." in text
            assert without_privileges(lambda: Store(folder).verify()).startswith("1 steps intact, 1 broken")
        finally:
            os.chmod(folder, 0o755)
        assert untouched(folder, [1, 2])


def test_a_file_that_could_not_be_read_is_tried_again(folder, monkeypatch):
    filled(folder, [1, 2])
    store = Store(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "get", lambda *_: (_ for _ in ()).throw(StorageError("cannot be read")))
        with pytest.raises(StorageError, match="cannot be read"):
            store.load(2)
    assert equal(store.load(2), state(2))


def test_a_save_to_a_path_never_truncates_the_old_file(tmp_path):
    path = tmp_path / "x.tri"
    tricomp.save(path, state(1))
    reader = tricomp.open(path)
    with largest_file(500), pytest.raises(StorageError, match="The disk is full"):
        tricomp.save(path, state(2))
    assert equal(tricomp.load(path), state(1))
    tricomp.save(path, state(2))
    assert equal(tricomp.load(path), state(2))
    assert equal(reader.load(), state(1))  # who has the old one open keeps it
    assert os.listdir(tmp_path) == ["x.tri"]
