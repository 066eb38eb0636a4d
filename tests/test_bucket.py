"""A Store at a URL: what a folder promises holds on file systems without rename, whatever fails, at each call."""

import gc
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import equal, moments, stepped, weights
from tests.faulty import WORLDS, Died, World
from tricomp import KeepEvery, KeepLast, KeyframeEvery, Store, codec, lease, objects, storage
from tricomp.cache import BLOCK_BYTES, Cache
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    MissingFile,
    MissingParent,
    MissingStep,
    StorageError,
    StoreLocked,
)
from tricomp.lease import LOCK_NAME
from tricomp.ranged import END_BYTES

fsspec = pytest.importorskip("fsspec")


def state(step, run=0):
    """A small training state with structure, different at each step."""
    rng = np.random.default_rng((step, run))
    v = moments((6, 20), seed=7)
    return {"w": stepped(weights((6, 20), seed=3), seed=step + 100 * run), "v": v * np.float32(1 + step), "step": step,
            "few": rng.integers(0, 3, 30)}  # fmt: skip


def tiny(step):
    return {"w": np.arange(40, dtype=np.float32) + np.float32(step), "step": step}


class Place:
    """A storage to test on: its URL, options for it, and its objects behind tricomp's back."""

    def __init__(self, url, options):
        self.url, self.options = url, options
        self.world = WORLDS.get("test")

    def store(self, **options):
        return Store(self.url, storage_options=self.options, **options)

    @property
    def objects(self):
        return objects.Objects(self.url, self.options)

    def names(self):
        return sorted(self.objects.listed())

    def read(self, name):
        return self.objects.read_object(name)

    def write(self, name, data):
        self.objects.write_object(name, data)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto's server is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    found.start()
    host, port = found.get_host_and_port()
    yield f"http://{host}:{port}"
    found.stop()


def s3_options(server):
    return {"key": "testing", "secret": "testing", "endpoint_url": server,
            "client_kwargs": {"region_name": "eu-west-1"}}  # fmt: skip


@pytest.fixture
def s3(s3_server, request):
    bucket = f"bucket{abs(hash(request.node.nodeid))}"
    options = s3_options(s3_server)
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return Place(f"s3://{bucket}/run", options)


@pytest.fixture(params=["memory", "faulty", "faultystore", "s3"])
def place(request, quick):
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield Place("memory://run", {})
        return
    WORLDS["test"] = World()
    yield Place(f"{request.param}://run", {"world": "test"})


@pytest.fixture(params=["faulty", "faultystore"])
def faulty(request, quick):
    WORLDS["test"] = World()
    return Place(f"{request.param}://run", {"world": "test"})


def filled(place, steps, make=state, **options):
    with place.store(**options) as store:
        return [store.save(step, make(step)) for step in steps]


def name_of(step):
    return f"step-{step:012d}.tri"


def flip(place, step, at):
    data = bytearray(place.read(name_of(step)))
    data[int(len(data) * at)] ^= 16
    place.write(name_of(step), bytes(data))


# What a folder does


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
def test_every_step_that_is_kept_loads(place, reference):
    options = {"keyframe": KeyframeEvery(4), "reference": reference, "keep": [KeepLast(2), KeepEvery(60)]}
    with place.store(reference_in="host" if reference == "previous" else "store", **options) as store:
        for step in range(0, 90, 10):
            report = store.save(step, state(step), metadata={"step": step})
            assert (report.parent is None) == (step % 40 == 0)
            assert report.path == f"{place.url}/{name_of(step)}"
            assert equal(store.load(step), state(step))
        assert {0, 60, 70, 80} <= set(store.steps())
        assert store.latest() == 80
        assert str(store.verify()) == f"{len(store.steps())} steps intact, 0 broken"
        with place.store() as reader, reader.open(70) as file:
            assert file.metadata == {"step": 70}
            assert equal(file["v"], state(70)["v"])
            assert equal(reader.load(), state(80))
            assert equal(reader.load(60, leaves=["w"]), {"w": state(60)["w"]})
        assert LOCK_NAME in place.names()
    assert place.names() == [name_of(step) for step in place.store().steps()]


def test_a_chain_goes_on_in_a_new_store_and_after_an_older_step(place, caplog):
    first = filled(place, [10, 20])
    with place.store() as store:
        report = store.save(30, state(30))
        assert report.parent == first[1].content_id
        store.load(10)
        assert store.save(15, state(15, run=1)).parent == first[0].content_id
        assert "saved step 15 below step 30, which stays the latest" in caplog.text
        store.remove(20, 30)
        assert (store.steps(), store.latest()) == ([10, 15], 15)
        assert store.verify().is_clean


def test_replacing_rebasing_and_removing(place):
    reports = filled(place, [10, 20, 30, 40])
    with place.store() as store:
        with pytest.raises(InvalidArgument, match=f"step 20 is already in {place.url}. Save a higher step, or pass"):
            store.save(20, state(99))
        store.save(20, state(99), overwrite=True)
        assert equal(store.load(20), state(99))
        assert equal(store.load(30), state(30))
        report = store.rebase(40)
        assert (report.parent, report.content_id) == (None, reports[3].content_id)
        store.remove(10, 30)
        assert store.verify().intact == (20, 40)
        with pytest.raises(MissingStep, match="step 30 is not in .*: nothing was removed"):
            store.remove(40, 30)
    assert place.names() == [name_of(20), name_of(40)]
    assert equal(place.store().load(), state(40))


def test_steps_that_are_not_there(place):
    store = place.store()
    assert (store.steps(), store.latest()) == ([], None)
    with pytest.raises(MissingStep, match=f"there are no checkpoints in {place.url}. Save one first, or check the"):
        store.load()
    filled(place, [10, 20])
    with pytest.raises(MissingStep, match=f"step 15 is not in {place.url}. The nearest is step 10"):
        store.open(15)
    place.objects.delete_object(name_of(10))
    with pytest.raises(MissingParent, match=f"which is not in {place.url}. No other step can be loaded"):
        store.load(20)


def test_damage_names_the_step_to_load(place):
    filled(place, [10, 20, 30])
    flip(place, 30, 0.4)
    store = place.store()
    with pytest.raises((CorruptFrame, CorruptFile), match="step 30: .* Load step 20, the nearest intact one"):
        store.load()
    assert store.verify().intact == (10, 20)
    flip(place, 30, 0.4)
    assert equal(store.load(), state(30))


@pytest.mark.parametrize("n_bytes", [0, 40, -1])
def test_an_object_without_a_sound_end_is_no_checkpoint(place, n_bytes, caplog):
    filled(place, [10, 20, 30])
    whole = place.read(name_of(30))
    place.write(name_of(30), whole[:n_bytes])
    place.write("notes.tri", b"not ours")
    store = place.store()
    assert (store.steps(), store.latest()) == ([10, 20], 20)
    assert equal(store.load(), state(20))
    with pytest.raises(MissingStep, match="step 30 is not in .* The nearest is step 20"):
        store.load(30)
    report = store.verify()
    assert report.intact == (10, 20)
    assert re.search("000030.tri: .*(is empty|was cut|is cut)", report.broken[0].reason)
    place.write(name_of(30), whole)
    assert store.steps() == [10, 20, 30]  # its stamp changed
    place.write(name_of(30), whole[:n_bytes])
    with store:
        store.save(25, state(25))
        assert "step-000000000030.tri: has no sound end, and its writer is gone: removed" in caplog.text
        assert name_of(30) not in place.names()
        store.save(30, state(30))
        assert store.verify().is_clean
    assert "notes.tri" in place.names()


def test_a_file_of_a_newer_format_is_never_removed(faulty, caplog):
    filled(faulty, [1], tiny)
    newer = b"\x87\xa7tricomp\x02" + bytes(90)
    faulty.write(name_of(2), newer)
    with faulty.store() as store:
        assert store.steps() == [1]
        store.save(3, tiny(3))
        assert "000002.tri: is of a newer format, or damaged: left alone" in caplog.text
        assert "was written by format 2" in str(store.verify())
    assert faulty.read(name_of(2)) == newer


@pytest.mark.parametrize("is_old", [False, True])
def test_a_server_that_knows_no_exclusive_creation(faulty, monkeypatch, is_old):
    def overwrite(self, path, value, **_):
        self.world.set(path, bytes(value))

    def refuse(self, path, value, mode="overwrite", **_):
        if mode == "create":
            raise OSError(5, "A header you provided implies functionality that is not implemented")
        self.world.set(path, bytes(value))

    monkeypatch.setattr("tests.faulty.FaultyFileSystem.pipe_file", overwrite if is_old else refuse)
    with faulty.store() as store, faulty.store() as other:
        store.save(1, tiny(1))
        with pytest.raises(StoreLocked):
            other.save(2, tiny(2))


def test_of_two_writers_that_begin_at_once_one_goes_on(quick, monkeypatch):
    WORLDS["test"] = World()
    place = Place("faulty://run", {"world": "test"})
    rival = lease._self("1" * 32)
    lease._live.add(rival.token)
    monkeypatch.setattr("time.sleep", lambda _: place.write(LOCK_NAME, rival.to_bytes()))
    with place.store() as store, pytest.raises(StoreLocked, match=f"is being written by process {os.getpid()} on"):
        store.save(1, tiny(1))
    assert place.names() == [LOCK_NAME]
    lease._live.discard(rival.token)


@pytest.mark.parametrize("error", [ValueError("in the encoder"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("n_frames", [1])
def test_an_exception_in_the_encoder(place, monkeypatch, error, n_frames):
    real = codec.encode

    def failing(*arguments, **options):
        for i, frame in enumerate(real(*arguments, **options)):
            if i == n_frames:
                raise error
            yield frame

    filled(place, [1, 2])
    with place.store() as store:
        with monkeypatch.context() as patch:
            patch.setattr(codec, "encode", failing)
            for step in (2, 3):
                with pytest.raises(type(error)) as caught:
                    store.save(step, state(step, run=step), overwrite=True)
                assert caught.value is error
        gc.collect()  # a buffered file that is let go of must not complete its upload
        assert [name for name in place.names() if name != LOCK_NAME] == [name_of(1), name_of(2)]
        assert equal(store.load(2), state(2))
        store.save(3, state(3))
    assert place.store().verify().intact == (1, 2, 3)


# One writer


def test_a_second_writer_is_refused(place):
    with place.store() as first, place.store() as second:
        first.save(1, state(1))
        for action in (lambda: second.save(2, state(2)), second.prune, lambda: second.remove(1)):
            with pytest.raises(StoreLocked) as caught:
                action()
            text = str(caught.value)
            assert (
                f"{place.url}: is being written by process {os.getpid()} on host {socket.gethostname()}, last" in text
            )
            assert (
                f"If it is dead, delete {place.url}/{LOCK_NAME}, or wait: a lock that was not renewed for 3600" in text
            )
        assert equal(second.load(), state(1))
        first.close()
        second.save(2, state(2))
        with pytest.raises(StoreLocked):
            first.save(3, state(3))


def lock_of(**changes):
    mine = lease._self("0" * 32)
    return json.dumps({**json.loads(mine.to_bytes()), **changes}).encode()


def test_the_lock_of_a_dead_process_of_this_host_is_taken_over_at_once(place, caplog):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for left in (lock_of(process=int(done.stdout)), lock_of(), lock_of(process=os.getppid(), began=1)):
        place.write(LOCK_NAME, left)
        filled(place, [1]) if not place.store().steps() else place.store().prune()
        gc.collect()
    assert "took over" not in caplog.text


def test_the_lock_of_another_host_is_taken_over_after_the_lease(place, caplog):
    place.write(LOCK_NAME, lock_of(host="far", seen=time.time() - 60))
    with pytest.raises(StoreLocked, match="by process .* on host far, last seen 20.* UTC, 6. s ago. Wait for it to"):
        filled(place, [1])
    place.write(name_of(7), b"half")
    with place.store(lease=30) as store:
        store.save(1, state(1))
        assert "took over the lock of process" in caplog.text
        assert "silent for longer than the lease of 30 s" in caplog.text
        assert name_of(7) in place.names()  # its writer may still be at work
        store.save(7, state(7))
        assert store.steps() == [1, 7]
    assert LOCK_NAME not in place.names()


@pytest.mark.parametrize("junk", [b"", b"junk", b"[]", b'{"process": "x"}', b"\xff" * 99, b'{"process": 1}'])
def test_a_lock_that_cannot_be_read_is_taken_over(faulty, junk, caplog):
    faulty.write(LOCK_NAME, junk)
    filled(faulty, [1], tiny)
    assert "took over the lock" in caplog.text
    assert faulty.store().steps() == [1]


def test_a_writer_that_lost_its_lock_writes_no_more(place):
    with place.store() as store:
        store.save(1, state(1))
        place.write(LOCK_NAME, lock_of(host="far", process=77))
        for action in (lambda: store.save(2, state(2)), lambda: store.rebase(1), lambda: store.remove(1)):
            with pytest.raises(StoreLocked, match="was taken over by process 77 on host far, .*: nothing more is wri"):
                action()
        assert store.steps() == [1]
        place.objects.delete_object(LOCK_NAME)
        with pytest.raises(StoreLocked, match="its lock was removed: .* Close it; to go on, open the Store again"):
            store.save(2, state(2))
        store.close()
        store.save(2, state(2))


def test_a_lock_lost_in_the_middle_of_a_save_ends_it(place, monkeypatch):
    real = codec.encode

    def slow(*arguments, **options):
        yield from real(*arguments, **options)
        place.write(LOCK_NAME, lock_of(host="far"))

    with place.store() as store:
        store.save(1, state(1))
        monkeypatch.setattr(codec, "encode", slow)
        with pytest.raises(StoreLocked, match="was taken over by"):
            store.save(2, state(2))
    assert place.store().steps() == [1]
    assert json.loads(place.read(LOCK_NAME))["host"] == "far"  # close left it alone


def test_a_long_save_renews_its_lock(faulty, monkeypatch):
    with faulty.store(lease=0.001) as store:
        faulty.world.heal()
        store.save(1, state(1))
        n_renewed = faulty.world.calls.count(("pipe", f"run/{LOCK_NAME}"))
    with faulty.store() as store:
        faulty.world.heal()
        store.save(2, state(2))
        assert faulty.world.calls.count(("pipe", f"run/{LOCK_NAME}")) < n_renewed


def test_a_store_that_is_dropped_frees_its_lock(place):
    store = place.store()
    store.save(1, state(1))
    del store
    gc.collect()
    assert LOCK_NAME not in place.names()


WRITER = """
    import json, os, sys, time, tricomp, numpy as np
    url, options = sys.argv[1], json.loads(sys.argv[2])
    store = tricomp.Store(url, storage_options=options)
    store.save(1, dict(a=np.arange(9)))
    print("ready", flush=True)
    if sys.argv[3] == "kill":
        time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_writer_that_ends_frees_the_store(s3, end):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), s3.url, json.dumps(s3.options), end]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if end == "kill":
        with s3.store() as store, pytest.raises(StoreLocked, match=f"by process {process.pid} on host"):
            store.save(2, state(2))
        os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    process.stdout.close()
    assert (LOCK_NAME in s3.names()) == (end == "kill")
    filled(s3, [2])
    assert s3.store().steps() == [1, 2]


def test_a_forked_child_reads_and_is_no_writer(s3):
    with s3.store() as store:
        store.save(1, state(1))
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 2 if equal(store.load(), state(1)) else 3
                store.save(2, state(2))
            except StoreLocked:
                code += 40
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        store.save(2, state(2))


# Faults, at each call


def save(store):
    store.save(3, tiny(3))


def replace(store):
    store.save(2, tiny(7), overwrite=True)


def rebase(store):
    store.rebase(2)


def remove(store):
    store.remove(1)


ACTIONS = {save: [{1, 2}, {1, 2, 3}], replace: [{1, 2}], rebase: [{1, 2}], remove: [{1, 2}, {2}]}


@pytest.mark.parametrize("fault", ["fail", "late", "die", "die late"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_fault_at_any_call_leaves_every_checkpoint_whole(faulty, action, fault, caplog):
    filled(faulty, [1, 2], tiny)
    before, n_struck = dict(faulty.world.objects), 0
    for at in range(1000):
        faulty.world.objects = dict(before)
        faulty.world.strike(fault, at)
        store = faulty.store()
        has_raised = False
        try:
            action(store)
        except (Died, StorageError):
            has_raised = True
        has_struck, n_calls = faulty.world.has_struck, len(faulty.world.calls)
        if fault.startswith("die"):
            faulty.world.is_dead, store = True, None
            lease._live.clear()
        else:
            store.close()
        faulty.world.heal()
        reader = faulty.store()
        steps = set(reader.steps())
        assert steps in ACTIONS[action], at
        assert has_raised or steps == ACTIONS[action][-1]
        for step in steps:
            wanted = [tiny(step)] + [tiny(7)] * (action is replace and step == 2)
            if action is replace and not has_raised:
                wanted = wanted[-1:]
            assert any(equal(reader.load(step), tree) for tree in wanted), at
        broken = {broken.step for broken in reader.verify().broken}
        assert broken <= {3}
        if not fault.startswith("die"):
            assert not broken or at, "what was written is removed"
        with faulty.store() as writer:
            writer.save(9, tiny(9))
            assert set(writer.steps()) == steps | {9}
            assert writer.verify().is_clean
        assert faulty.world.names() == [name_of(step) for step in sorted(steps | {9})]
        n_struck += has_struck
        if at >= n_calls:
            break
    assert n_struck > 4


@pytest.mark.parametrize("kind", ["write", "close", "part", "complete"])
def test_a_failed_save_leaves_nothing(faulty, kind):
    filled(faulty, [1, 2], tiny)
    n_struck = 0
    with faulty.store() as store:
        for at in range(100):
            faulty.world.strike("fail", at, kind)
            caught = None
            try:
                store.save(3, tiny(3))
                break
            except StorageError as error:
                caught = error
            text = str(caught)
            assert "step-000000000003.tri: cannot be written (after " in text
            assert f"OSError: [Errno 5] {kind} failed. Try again; if it goes on, look at the service" in text
            assert "Nothing that was there has changed." in text
            assert caught.errno == 5
            assert faulty.world.names() == [LOCK_NAME, name_of(1), name_of(2)]
            n_struck += 1
        assert store.steps() == [1, 2, 3]
    assert bool(n_struck) == ((kind in ("part", "complete")) == faulty.url.startswith("faultystore"))


def test_an_object_that_arrives_short_is_an_error_and_removed(faulty, monkeypatch):
    filled(faulty, [1])
    real = World.set
    monkeypatch.setattr(World, "set", lambda self, path, data: real(self, path, data[:900]))
    with (
        faulty.store() as store,
        pytest.raises(StorageError, match="000002.tri: cannot be written: 900 bytes are ther"),
    ):
        store.save(2, {"w": weights((40, 40))})
    assert faulty.world.names() == [name_of(1)]


def test_a_file_being_replaced_is_read_in_its_new_place(quick):
    WORLDS["test"] = World()
    place = Place("faulty://run", {"world": "test"})
    filled(place, [1, 2])
    half = place.read(name_of(2))[:99]
    with place.store() as store:
        whole = store.rebase(2).file_bytes
    place.write(f".{name_of(2)}.new", place.read(name_of(2)))
    place.write(name_of(2), half)  # the copy was under way when its writer died
    reader = place.store()
    assert reader.steps() == [1, 2]
    assert equal(reader.load(2), state(2))
    assert reader.verify().is_clean
    where, name = storage.split(f"{place.url}/{name_of(2)}", place.options)
    assert where.get(name).n_bytes == whole
    filled(place, [3])
    assert place.names() == [name_of(1), name_of(2), name_of(3)]
    assert place.store().verify().is_clean


# Requests and bytes


def large(n_leaves=8, seed=0):
    return {f"layer{i}": weights((300, 211), seed=seed + i) for i in range(n_leaves)}


def test_opening_costs_three_requests_and_a_leaf_its_bytes(faulty):
    faulty.store().save(1, large())
    gc.collect()
    faulty.world.heal()
    with faulty.store().open() as file:
        assert file.n_bytes > 20 * END_BYTES
        assert [kind for kind, _ in faulty.world.calls] == ["list", "read", "read"]
        assert faulty.world.n_bytes < END_BYTES + 8000
        for path in ("layer3", "layer6"):
            faulty.world.heal()
            assert equal(file[path], large()[path])
            assert len(faulty.world.calls) == 1
            assert file.coded_bytes(path) <= faulty.world.n_bytes <= file.coded_bytes(path) + 8
    faulty.world.heal()
    assert equal(faulty.store().load(), large())
    assert len(faulty.world.calls) < 3 + 8  # frames in a row are read ahead
    assert faulty.world.n_bytes < 1.2 * file.n_bytes


def test_a_small_file_is_one_request(faulty):
    filled(faulty, [1])
    faulty.world.heal()
    assert equal(faulty.store().load(), state(1))
    assert [kind for kind, _ in faulty.world.calls] == ["list", "read"]


@pytest.mark.parametrize("faulty", ["faulty"], indirect=True)
def test_an_index_beyond_the_first_request_costs_one_more(faulty):
    tree = {str(i): np.full(2, i, np.float64) for i in range(9000)}
    faulty.store().save(1, {**tree, **large(4)})
    gc.collect()
    faulty.world.heal()
    with faulty.store().open() as file:
        assert [kind for kind, _ in faulty.world.calls] == ["list", "read", "read", "read"]
        assert equal(file["layer1"], large()["layer1"])
        assert equal(file["777"], tree["777"])


def test_many_steps_are_not_all_asked_for_one(faulty):
    filled(faulty, range(60), tiny, keyframe=KeyframeEvery(5))
    faulty.world.heal()
    assert equal(faulty.store().load(48), tiny(48))
    assert len(faulty.world.calls) <= 1 + 4
    store = faulty.store()
    assert store.steps() == list(range(60))
    faulty.world.heal()
    assert store.steps() == list(range(60))
    assert [kind for kind, _ in faulty.world.calls] == ["list"]  # the rest is remembered by stamp
    faulty.world.objects.pop(f"run/{name_of(45)}")
    with pytest.raises(MissingParent, match="step 48 needs step 46, which needs a parent .* Load step 44, the nearest"):
        store.load(48)


def test_a_file_that_changes_while_it_is_open_is_an_error(faulty):
    filled(faulty, [1, 2], lambda step: large(3, step), keyframe=KeyframeEvery(1))
    with faulty.store().open(1) as file:
        faulty.world.objects[f"run/{name_of(1)}"] = faulty.world.objects[f"run/{name_of(2)}"]
        with pytest.raises((CorruptFrame, CorruptFile)):
            file["layer1"]
        del faulty.world.objects[f"run/{name_of(1)}"]
        with pytest.raises(
            MissingFile, match="step-000000000001.tri: is not there: it was removed, or the URL is wron"
        ):
            file["layer0"]
        faulty.world.set(f"run/{name_of(1)}", bytes(99))
        with pytest.raises(
            CorruptFile, match="bytes came where .* were asked for: it was cut or replaced while it was"
        ):
            file["layer0"]


def test_large_uploads_and_reads_go_in_parts(s3, monkeypatch):
    monkeypatch.setattr(objects, "_UPLOAD_BYTES", 5 << 20)
    monkeypatch.setattr("tricomp.ranged.PART_BYTES", 1 << 20)
    data = np.random.default_rng(0).bytes(12 << 20)
    where, name = storage.split(f"{s3.url}/large.bin", s3.options)
    where.put(name, iter([data[:7], b"", data[7:]]))
    assert bytes(where.get(name).read(5, len(data) - 5)) == data[5:]

    def failing():
        yield data
        raise ValueError("mine")

    for name in ("large.bin", "other.bin"):  # one that is there stays, one that is not does not come
        with pytest.raises(ValueError, match="mine"):
            where.put(name, failing())
    gc.collect()
    assert s3.names() == ["large.bin"]
    assert bytes(where.get("large.bin").read(0, len(data))) == data
    fs = s3.objects._fs
    assert fs.call_s3("list_multipart_uploads", Bucket=s3.url.split("/")[2]).get("Uploads", []) == []


# The cache


@pytest.mark.parametrize("faulty", ["faulty"], indirect=True)
@pytest.mark.parametrize("reference_in", ["host", "store"])
def test_references_are_fetched_once(faulty, tmp_path, reference_in):
    filled(faulty, range(4), lambda step: large(3, step))
    options = {"cache": tmp_path / "cache", "reference_in": reference_in}
    assert equal(faulty.store(**options).load(3), large(3, 3))
    assert len(os.listdir(tmp_path / "cache")) == 3
    faulty.world.heal()
    for step in (1, 2):  # its parents are here, and 1 and 2 themselves
        assert equal(faulty.store(**options).load(step), large(3, step))
    read = [path for kind, path in faulty.world.calls if kind == "read"]
    assert faulty.world.n_bytes < 7 * END_BYTES * 2
    assert f"run/{name_of(3)}" not in read
    with faulty.store(**options) as store:
        store.save(4, large(3, 4))
        faulty.world.heal()
        store.save(5, large(3, 5))  # against what the last save put into the cache
        assert faulty.world.n_bytes < END_BYTES + 4000  # the end of what was written, looked at once
    assert faulty.store().verify().is_clean


@pytest.mark.parametrize("faulty", ["faulty"], indirect=True)
def test_a_cache_keeps_to_its_bound(faulty, tmp_path):
    filled(faulty, range(5), lambda step: large(2, step))
    folder = tmp_path / "cache"
    size = max(len(faulty.read(name_of(step))) for step in range(5)) + 100
    with faulty.store(cache=folder, cache_bytes=2 * size) as store:
        assert equal(store.load(4), large(2, 4))
        kept = sorted(os.listdir(folder))
        assert len(kept) == 2
        assert f"-{name_of(3)}-" in "".join(kept)
    for n_bytes in (0, 1000):
        store = faulty.store(cache=tmp_path / "none", cache_bytes=n_bytes)
        assert equal(store.load(4), large(2, 4))
        assert not os.path.exists(tmp_path / "none") or not os.listdir(tmp_path / "none")


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "trailer"])
def test_a_damaged_copy_falls_back_to_the_bucket(faulty, tmp_path, damage, caplog):
    filled(faulty, [1, 2], lambda step: large(5, step))
    folder = tmp_path / "cache"
    assert equal(faulty.store(cache=folder).load(2), large(5, 2))
    (copy,) = folder.iterdir()
    data = bytearray(copy.read_bytes())
    n_bytes = len(faulty.read(name_of(1)))
    assert n_bytes > BLOCK_BYTES
    if damage == "flip":
        data[n_bytes // 3] ^= 1
    elif damage == "trailer":
        data[-3] ^= 1
    copy.write_bytes(data[:-1] if damage == "cut" else data + b"x" * (damage == "grow"))
    assert equal(faulty.store(cache=folder).load(2), large(5, 2))
    assert "the copy was removed, and the bucket is read" in caplog.text
    assert equal(faulty.store(cache=folder).load(2), large(5, 2))
    (again,) = folder.iterdir()
    assert again.read_bytes()[:n_bytes] == faulty.read(name_of(1))


@pytest.mark.parametrize("faulty", ["faulty"], indirect=True)
def test_a_copy_of_what_was_replaced_is_not_used(faulty, tmp_path):
    filled(faulty, [1, 2, 3])
    with faulty.store(cache=tmp_path) as store:
        assert equal(store.load(3), state(3))
        store.save(2, state(9), overwrite=True)
        assert equal(store.load(2), state(9))
        assert equal(store.load(3), state(3))
        assert store.verify().is_clean


@pytest.mark.parametrize("faulty", ["faulty"], indirect=True)
def test_a_cache_that_cannot_be_written_is_none(faulty, tmp_path, caplog):
    filled(faulty, [1, 2])
    (tmp_path / "file").write_text("")
    with faulty.store(cache=tmp_path / "file" / "cache") as store:
        assert equal(store.load(2), state(2))
        store.save(3, state(3))
    assert "holds no copy, and the bucket will be read" in caplog.text
    assert place_names(tmp_path) == ["file"]


def place_names(folder):
    return sorted(os.listdir(folder))


def test_what_dead_processes_left_in_a_cache_is_removed(faulty, tmp_path):
    old, new = tmp_path / "a.tmp", tmp_path / "b.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    filled(faulty, [1, 2], cache=tmp_path)
    assert not old.exists()
    assert new.exists()


def test_cache_arguments_are_checked(tmp_path):
    for folder in (3, "s3://x/y"):
        with pytest.raises(InvalidArgument, match="cache: expected a local folder, got"):
            Cache(folder, 1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="cache_bytes: expected a number of bytes, got -1"):
        Store("memory://run", cache=tmp_path, cache_bytes=-1)
    with pytest.raises(InvalidArgument, match="lease: expected seconds, above 0, got 0"):
        Store("memory://run", lease=0)


# URLs and what file systems raise


def test_urls_are_split():
    where, name = storage.split("memory://a/b/x.tri")
    assert (where.url, name) == ("memory://a/b", "x.tri")
    where, name = storage.split("memory://x.tri")
    assert (where.url, name) == ("memory://", "x.tri")
    for url in ("s3://bucket", "memory://a/"):
        with pytest.raises(InvalidArgument, match=f"{url}: expected the URL of a file, as in s3://bucket/run/mod"):
            storage.split(url)


def test_one_file_at_a_url(place):
    from tricomp.checkpoint import put
    from tricomp.content import content_of
    from tricomp.file import File

    for step in (1, 2):
        where, name = storage.split(f"{place.url}/x.tri", place.options)
        put(where, name, content_of(state(step)))
        with File(where.get(name)) as file:
            assert file.name == f"{place.url}/x.tri"
            assert equal(file.load(), state(step))
    assert place.names() == ["x.tri"]
    with pytest.raises(MissingFile, match="/y.tri: there is no such file. Check the URL"):
        where.get("y.tri")
    with pytest.raises(InvalidArgument, match="x.tri: is a file. A Store needs a folder"):
        Store(f"{place.url}/x.tri", storage_options=place.options).steps()


def test_urls_that_cannot_be_opened(monkeypatch):
    with pytest.raises(InvalidArgument, match="nosuch://x: fsspec cannot open it: Protocol not known: nosuch"):
        Store("nosuch://x")
    with pytest.raises(InvalidArgument, match="tricomp reads ranges itself. Give the URL without a cache of fsspec's"):
        Store("simplecache::memory://x")
    with pytest.raises(InvalidArgument, match="faulty://x: fsspec cannot open it: .* Check URL and storage_options"):
        Store("faulty://x", storage_options={"world": []})
    fsspec.register_implementation("absent", "no_such_module.FileSystem", errtxt="Install absentfs", clobber=True)
    with pytest.raises(InvalidArgument, match="absent://b/x: its file system is not installed: Install absentfs. Inst"):
        Store("absent://b/x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fsspec.core", None)
        with pytest.raises(InvalidArgument, match=r"URLs need fsspec. Run: pip install 'tricomp\[remote\]'"):
            Store("memory://x")


def test_importing_tricomp_does_not_import_fsspec(tmp_path):
    code = "import sys, tricomp; tricomp.Store(sys.argv[1]).steps(); print('fsspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_what_s3_refuses(s3, s3_server, monkeypatch):
    missing = Store("s3://no-such-bucket-here/run", storage_options=s3.options)
    assert missing.steps() == []
    with pytest.raises(
        StorageError, match=r"no-such-bucket-here/run/.tricomp.lock: cannot be written: FileNotFoundErr"
    ):
        missing.save(1, state(1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    options = {**s3_options(nowhere), "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with pytest.raises(StorageError, match="cannot be listed: .* The server did not answer: check the network"):
        Store("s3://b/run", storage_options=options).steps()
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    nobody = {"endpoint_url": s3_server, "client_kwargs": {"region_name": "eu-west-1"}}
    with pytest.raises(
        StorageError, match=r"There are no valid credentials: set them .*storage_options, say {'key': ..."
    ):
        Store(s3.url, storage_options=nobody).save(1, state(1))


def test_files_on_a_web_server(s3, s3_server, tmp_path):
    import tricomp

    data = filled(s3, [1], lambda step: large(3)) and s3.read(name_of(1))
    s3.objects._fs.chmod(f"{s3.url}/{name_of(1)}", "public-read")
    url = f"{s3_server}/{s3.url.removeprefix('s3://')}/{name_of(1)}"
    with tricomp.open(url) as file:
        assert equal(file["layer1"], large(3)["layer1"])
    with pytest.raises(StorageError, match="cannot be written: NotImplementedError.* This file system cannot do that"):
        tricomp.save(url, {})
    with pytest.raises(MissingFile, match="nothing.tri: there is no such file"):
        tricomp.open(url.replace(name_of(1), "nothing.tri"))
    (tmp_path / "x.tri").write_bytes(data)
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as simple:
        try:
            assert simple.stdout is not None
            port = re.search(r"port (\d+)", simple.stdout.readline())
            assert port is not None
            with pytest.raises(StorageError, match="its server does not serve ranges. Download the file and open the"):
                tricomp.open(f"http://127.0.0.1:{port[1]}/x.tri")
        finally:
            simple.kill()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["save", "load", "rebase", "remove", "rewind", "reopen"]), st.integers(0, 5)),
        max_size=12,
    ),
    st.sampled_from(["previous", "keyframe"]),
    st.sampled_from(["host", "store"]),
    st.booleans(),
)
def test_any_sequence_of_calls_keeps_every_step_loadable(faulty, actions, reference, reference_in, has_cache):
    faulty.world.objects.clear()
    with tempfile.TemporaryDirectory() as folder:
        options = {"reference": reference, "reference_in": reference_in, "keyframe": KeyframeEvery(3)}
        options["cache"] = folder if has_cache else None
        store, expected = faulty.store(**options), {}
        for i, (action, step) in enumerate(actions):
            if action == "save":
                store.save(step, tiny(step + 10 * i), overwrite=True)
                expected[step] = tiny(step + 10 * i)
            elif action == "reopen":
                store.close()
                store = faulty.store(**options)
            elif step in expected:
                if action == "rewind":
                    expected = {other: tree for other, tree in expected.items() if other <= step}
                if action == "remove":
                    del expected[step]
                getattr(store, action)(step)
            assert store.steps() == sorted(expected)
        assert all(equal(store.load(step), tree) for step, tree in expected.items())
        assert store.verify().intact == tuple(sorted(expected))
        store.close()
        assert faulty.world.names() == [name_of(step) for step in sorted(expected)]
