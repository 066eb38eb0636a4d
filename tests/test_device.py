"""Words on a device, through codec, files, stores and tricomp_torch: the bytes of the host, and back to the device.

Run by Triton's interpreter, on CPU tensors that are taken for a device's; see test_kernels.py, which starts it.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
import tricomp_torch

import tricomp
from tests.kernel_cases import on_device as tensor_of
from tests.kernel_cases import torch
from tests.sparse_file import write_sparse_file
from tricomp import codec, dtypes
from tricomp.codec.batch import Work
from tricomp.codec.engine import Engine
from tricomp.errors import BackendError, InvalidArgument, OutOfDeviceMemory
from tricomp.kernels import encode as kernels_encode
from tricomp.kernels import survey
from tricomp.kernels.device import IS_INTERPRETED, Device
from tricomp.layout import DeviceArray, Snapshot, snapshot_of
from tricomp.plan import Spec
from tricomp.reference.digest import digest_sum

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="it takes the CPU for a device")
CPU = torch.device("cpu")
SHORT = Spec(chunk_log2=10)


def leaves(step):
    """A state that has grown for some steps: every kind of frame that the planner makes."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(96, 200)).astype(np.float32) * np.exp(rng.normal(size=(96, 1))).astype(np.float32)
    scales = np.exp(2 * rng.normal(size=(96, 1))) * np.exp(2 * rng.normal(size=(1, 200)))
    v = (rng.normal(size=(96, 200)) ** 2 * scales).astype(np.float32)
    noise = np.random.default_rng(5 + step)
    w = (w * (1 + step * 1e-3 * noise.normal(size=w.shape))).astype(np.float32)
    return {
        "w": w,
        "v": (v * np.float32(0.999) ** step + step * 1e-9).astype(np.float32),
        "copy": w.astype(ml_dtypes.bfloat16),
        "tied": w.copy(),
        "zeros": np.zeros(3000, np.int8),
        "b": noise.normal(size=50).astype(np.float32),
        "step": np.int64(step),
        "none": np.zeros((0, 3), np.float16),
        "sparse": np.where(noise.random(17000) < 0.01, noise.normal(size=17000), 0).astype(np.float32),
    }


def on_device(snapshot):
    return Snapshot(snapshot.layout, tuple(tensor_of(buffer) for buffer in snapshot.buffers))


@pytest.fixture
def before():
    return snapshot_of(list(leaves(0)), [np.asarray(value) for value in leaves(0).values()])


@pytest.fixture
def after():
    return snapshot_of(list(leaves(3)), [np.asarray(value) for value in leaves(3).values()])


def frames_of(snapshot, reference, spec, **how):
    frames = codec.encode(snapshot, reference, spec, **how)
    return [(frame.leaves, frame.plan, frame.digests, frame.n_bytes, frame.data) for frame in frames]


@pytest.mark.parametrize("tier", ["dense", "fast"])
def test_frames_are_those_of_the_host(before, after, tier):
    spec = Spec(tier=tier, chunk_log2=10, keep_mantissa_bits={} if tier == "dense" else {"v": 7, "copy": 3})
    references = before if tier == "dense" else None, on_device(before) if tier == "dense" else None
    expected = frames_of(after, references[0], spec, backend="native")
    assert frames_of(on_device(after), references[1], spec) == expected
    assert frames_of(on_device(after), references[0], spec, backend="native") == expected


def test_words_of_host_and_device_mix_in_one_tree(before):
    mixed = on_device(before)
    mixed = Snapshot(mixed.layout, tuple(b if i % 2 else before.buffers[i] for i, b in enumerate(mixed.buffers)))
    found = {leaf: frame for frame in codec.encode(mixed, None, SHORT) for leaf in frame.leaves}
    assert sorted(found) == list(range(len(before.layout.leaves)))
    told = codec.digests([before.words(i) for i in range(len(before.layout.leaves))])
    assert [dict(zip(found[i].leaves, found[i].digests))[i] for i in sorted(found)] == told
    assert codec.digests([mixed.words(i) for i in range(len(told))]) == told


@pytest.fixture
def far(monkeypatch):
    """CPU tensors are taken for those of a device."""
    monkeypatch.setattr("tricomp_torch.tensors.is_on_host", lambda tensor: False)


def state():
    torch.manual_seed(0)
    weight = torch.randn(70, 300)
    return {
        "weight": weight,
        "tied": weight,
        "half": torch.randn(9000).bfloat16(),
        "last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "slice": torch.randn(40, 50)[:, 3:17],
        "complex": torch.randn(40, dtype=torch.complex64),
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.arange(7),
        "empty": torch.zeros(0, 3),
        "array": np.arange(5),
        "step": 7,
    }


def assert_same(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        if torch.is_tensor(value):
            assert value.dtype == other[key].dtype
            assert value.shape == other[key].shape
            assert torch.equal(value, other[key]), key
        else:
            assert np.array_equal(value, other[key]), key


def test_torch_trees_to_files_and_back_to_the_device(far, tmp_path, monkeypatch):
    tree = state()
    taken = tricomp_torch.snapshot(tree)
    assert taken.live == ()
    assert taken.copied_bytes == sum(v.nbytes for k, v in tree.items() if torch.is_tensor(v) and k != "tied")
    kept = {key: value.clone() if torch.is_tensor(value) else value for key, value in tree.items()}
    for value in tree.values():
        if torch.is_tensor(value):
            value.zero_()
    tricomp_torch.save(taken, tmp_path / "far.tri", spec=SHORT)
    with tricomp.open(tmp_path / "far.tri") as file:
        found = tricomp_torch.unflatten(tricomp_torch.Flat(file.load_to(CPU), file.metadata["tricomp_torch"]))
        some = file.load_to(CPU, ["half", "numbers"])
    assert_same(kept, found)
    assert found["tied"].data_ptr() == found["weight"].data_ptr()
    assert found["last"].is_contiguous(memory_format=torch.channels_last)
    assert isinstance(found["array"], np.ndarray)
    assert set(some) == {"half", "numbers"}
    assert all(isinstance(leaf, DeviceArray) for leaf in some.values())
    monkeypatch.undo()
    assert_same(kept, tricomp_torch.load(tmp_path / "far.tri"))
    tricomp_torch.save(state(), tmp_path / "near.tri", spec=SHORT)
    with tricomp.open(tmp_path / "near.tri") as near, tricomp.open(tmp_path / "far.tri") as far_file:
        assert near.content_id == far_file.content_id


def test_a_snapshot_within_a_budget_says_what_is_left(far):
    tree = {"a": torch.zeros(100), "b": torch.zeros(1000), "c": torch.zeros(100, dtype=torch.int8)}
    taken = tricomp_torch.snapshot(tree, budget_bytes=600)
    assert (taken.live, taken.copied_bytes) == (("b",), 500)
    assert taken.flat.tree["b"].words.data_ptr() == tree["b"].data_ptr()
    assert taken.flat.tree["a"].words.data_ptr() != tree["a"].data_ptr()
    taken.before_update()
    taken.wait()
    for wrong in (-1, True):
        with pytest.raises(InvalidArgument, match="budget_bytes: expected bytes, 0 or more"):
            tricomp_torch.snapshot(tree, budget_bytes=wrong)


def test_what_a_budget_leaves_is_saved_first_and_may_then_change(far, tmp_path, monkeypatch):
    tree = {"cast": (torch.arange(17000) % 7).float()}  # of one that is not copied
    tree |= {f"{i}": torch.arange(17000) % (11 + i) for i in range(4)}
    tree["source"] = tree["cast"].double()
    kept = {key: value.clone() for key, value in tree.items()}
    taken = tricomp_torch.snapshot(tree, budget_bytes=17000 * (4 + 3 * 8))
    assert taken.live == ("3", "source")
    monkeypatch.setattr("tricomp.codec.engine.BATCH_WORDS", 17000)  # one leaf a batch
    monkeypatch.setattr("tricomp.codec.engine.THREAD_WORDS", 1)
    assert not taken.wait_live(0)

    def change():
        assert taken.wait_live(100)
        for key in taken.live:
            tree[key].zero_()

    changer = threading.Thread(target=change)
    changer.start()
    tricomp_torch.save(taken, tmp_path / "a.tri", spec=SHORT, backend="native")
    changer.join()
    assert not tree["3"].any()
    monkeypatch.undo()
    assert_same(kept, tricomp_torch.load(tmp_path / "a.tri"))


def test_who_waits_for_live_tensors_goes_on_if_the_save_fails(far, tmp_path):
    taken = tricomp_torch.snapshot({"a": torch.zeros(1000)}, budget_bytes=0)
    with pytest.raises(InvalidArgument):
        tricomp_torch.save(taken, tmp_path / "a.tri", metadata=7)  # type: ignore[arg-type]
    assert taken.wait_live(0)


@pytest.mark.parametrize("where", ["device", "host", "store"])
def test_a_store_codes_against_what_it_holds(far, tmp_path, where):
    first = tricomp_torch.flatten({"w": torch.arange(20000) % 89}).tree
    second = tricomp_torch.flatten({"w": (torch.arange(20000) % 89) + (torch.arange(20000) % 1000 == 0)}).tree
    with tricomp.Store(tmp_path, reference_in=where, spec=SHORT) as store:
        store.save(1, first)
        report = store.save(2, second)
    assert report.parent is not None
    with tricomp.Store(tmp_path) as store:
        assert np.array_equal(store.load(2)["w"], second["w"].words.numpy())
        with store.open(2) as file:
            assert torch.equal(file.load_to(CPU)["w"].words, second["w"].words)


def test_leaves_are_decoded_into_parts_of_larger_tensors(tmp_path):
    long = np.arange(20000, dtype=np.int32) % 89
    tricomp.save(tmp_path / "a.tri", {"long": long, "short": np.arange(7, dtype=np.int16)}, spec=SHORT)
    room = torch.full((20100,), 77, dtype=torch.int32)
    small = torch.zeros(9, dtype=torch.int16)
    int32, int16 = dtypes.by_name("int32"), dtypes.by_name("int16")
    with tricomp.open(tmp_path / "a.tri") as file:
        file.load_into(
            {
                "long": DeviceArray(int32, (20000,), room[33:20033]),
                "short": DeviceArray(int16, (7,), small[1:8]),
            }
        )
        for wrong in (DeviceArray(int32, (100, 200), room[:20000]), DeviceArray(int16, (20000,), room[:20000])):
            with pytest.raises(InvalidArgument, match="leaf 'long': expected a target of int32"):
                file.load_into({"long": wrong})
    assert np.array_equal(room[33:20033].numpy(), long)
    assert (room[:33] == 77).all()
    assert (room[20033:] == 77).all()
    assert small.tolist() == [0, *range(7), 0]


def test_words_that_32_bits_cannot_number(tmp_path):
    """Chunks beyond 2^31 words and 4 GiB of a frame, read by kernels: of a file that is a hole."""
    n_words = (1 << 31) + 777
    ones = [3, (1 << 29) - 1, (1 << 31) - 2, (1 << 31) + 1, n_words - 1]
    write_sparse_file(tmp_path / "large.tri", {"w": (n_words,)}, "bfloat16", ones)
    with tricomp.open(tmp_path / "large.tri", backend="triton") as file:
        for one in ones:
            start, stop = max(one - 3, 0), min(one + 4, n_words)
            part = file.elements("w", start, stop).view(np.uint16)
            assert [start + int(k) for k in np.flatnonzero(part)] == [k for k in ones if start <= k < stop]


def test_numpy_arrays_by_the_triton_backend():
    array = np.random.default_rng(3).normal(size=(30, 41)).astype(np.float64)
    blob = tricomp.encode(array, reference=array * 1.001, spec=SHORT, backend="triton")
    assert blob == tricomp.encode(array, reference=array * 1.001, spec=SHORT, backend="native")
    back = tricomp.decode(blob, reference=array * 1.001, backend="triton")
    assert isinstance(back, np.ndarray)
    assert np.array_equal(back, array)


def test_jax_arrays_by_dlpack():
    jax = pytest.importorskip("jax")
    array = jax.numpy.arange(6000, dtype=jax.numpy.bfloat16).reshape(60, 100)
    leaf = codec.from_dlpack(array)
    assert (leaf.dtype.name, leaf.shape, leaf.words.dtype) == ("bfloat16", (60, 100), torch.int16)
    assert leaf.words.data_ptr() == array.unsafe_buffer_pointer()
    snapshot = snapshot_of(["a"], [leaf])
    host = snapshot_of(["a"], [np.asarray(array)])
    assert frames_of(snapshot, None, SHORT) == frames_of(host, None, SHORT, backend="native")


def test_what_no_kernel_can_do_the_host_does_once_told(before, monkeypatch, caplog):
    def refuse(self, kernel, grid, *arguments, **constants):
        raise BackendError("no compiler")

    far = on_device(before)
    expected = frames_of(before, None, SHORT, backend="native")
    monkeypatch.setattr(Device, "launch", refuse)
    with caplog.at_level(logging.WARNING, "tricomp"):
        assert frames_of(far, None, SHORT) == expected
        assert frames_of(far, None, SHORT) == expected
    assert [record.message for record in caplog.records if "no compiler" in record.message] == [
        "what is on a GPU is copied to the host and coded there, slower: no compiler"
    ]
    with pytest.raises(BackendError, match="no compiler"):
        frames_of(far, None, SHORT, backend="triton")


def test_what_fails_midway_goes_to_the_host(before, monkeypatch):
    calls, launch = [], Device.launch

    def fail_late(self, kernel, grid, *arguments, **constants):
        calls.append(kernel)
        if kernel.__name__ == "encode_kernel":
            raise BackendError("no registers")
        launch(self, kernel, grid, *arguments, **constants)

    expected = frames_of(before, None, SHORT, backend="native")
    monkeypatch.setattr(Device, "launch", fail_late)
    assert frames_of(on_device(before), None, SHORT) == expected
    assert len(calls) > 2


def test_a_device_without_memory_fails_the_save_and_nothing_else(far, tmp_path, monkeypatch):
    tree = {"w": torch.arange(20000)}
    tricomp_torch.save(tree, tmp_path / "a.tri", spec=SHORT)
    good = (tmp_path / "a.tri").read_bytes()

    def refuse(self, shape, dtype):
        raise OutOfDeviceMemory("cuda:0: no memory")

    monkeypatch.setattr(Device, "empty", refuse)
    with pytest.raises(OutOfDeviceMemory):
        tricomp_torch.save({"w": torch.arange(20000) * 3}, tmp_path / "a.tri", spec=SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tri"]
    assert (tmp_path / "a.tri").read_bytes() == good


def test_engines_say_where_they_work():
    assert Engine(device=CPU).coder.name == "triton"
    assert Engine().coder.name == "native"
    with pytest.raises(BackendError, match="nothing decodes on cpu: backend 'native' was asked for"):
        Engine(backend="native", device=CPU).there()
    assert codec.live()["triton"] == "Triton's interpreter, on the CPU"


def test_surveys_count_and_digest_every_width():
    rng = np.random.default_rng(0)
    device = Device(CPU)
    requests, expected = [], []
    for width in (1, 2, 4, 8):
        for n, like in ((1, None), (5, 9), (1000, None), (40_001, None)):
            words = rng.integers(0, 200, n).astype(f"<u{width}")
            other = words.copy()
            other[::7] ^= 1
            first_byte = 512 * int(rng.integers(0, 9000))
            requests.append(survey.Request(tensor_of(words), tensor_of(other), like, first_byte))
            compared = int(words[0]) if like is None else like
            counts = int((words != compared).sum()), int((words != other).sum()), int(np.bitwise_or.reduce(words))
            expected.append((*counts, digest_sum(words, first_byte), digest_sum(other, first_byte), compared))
    assert [tuple(found) for found in survey.survey(requests, device).result()] == expected


def test_means_of_rows_are_those_that_the_planner_takes():
    rng = np.random.default_rng(0)
    rows, columns = np.arange(0, 190, 2), np.arange(0, 101, 3)
    for name in ("float64", "bfloat16", "float8_e5m2"):
        dtype = dtypes.by_name(name)
        words = rng.integers(0, 1 << dtype.word_bits - 1, 20000, dtype=np.uint64).astype(dtype.word_dtype) << 1
        words[rng.random(20000) < 0.3] = 0
        words[3000:4000] = 0
        (found,) = survey.gather([survey.Lookup(tensor_of(words), rows, columns, 104, dtype)], Device(CPU)).result()
        expected = []
        for row in words[rows[:, None] * 104 + columns].tolist():
            used = [word & (1 << dtype.word_bits - 1) - 1 for word in row if word]
            up, down = max(3 - dtype.mantissa_bits, 0), max(dtype.mantissa_bits - 3, 0)
            total = sum(word >> down << up for word in used)
            expected.append((2 * total + len(used)) // (2 * len(used)) if used else -1)
        assert found.tolist() == expected, name


def test_many_small_leaves_are_a_handful_of_launches(monkeypatch):
    """Launches go with kinds of kernels, not with leaves."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n,)).astype(np.float32) for n in rng.integers(600, 900, 60)]
    snapshot = on_device(snapshot_of([f"{i}/w" for i in range(len(arrays))], arrays))
    launched, launch = [], Device.launch

    def count(self, kernel, grid, *arguments, **constants):
        launched.append(kernel.__name__)
        launch(self, kernel, grid, *arguments, **constants)

    monkeypatch.setattr(Device, "launch", count)
    frames = list(codec.encode(snapshot, None, SHORT))
    assert sum(len(frame.leaves) for frame in frames) == 60
    assert len(launched) <= 12, launched


@dataclass
class Waits:
    """What the host waited for. An event that comes before one that was waited for costs no time.

    made: events; done: the last one that was waited for; found: for each wait, whether the device had more to do.
    n_copies: waits for bytes, which cross on a stream of their own.
    """

    made: int = 0
    done: int = 0
    n_rounds: int = 0
    n_batches: int = 0
    n_copies: int = 0
    found: list[bool] = field(default_factory=list)

    def event(self):
        self.made += 1
        return Event(self, self.made)

    def copy(self):
        return Event(self, 0)


@dataclass
class Event:
    waits: Waits
    number: int

    def wait(self):
        self.waits.n_copies += self.number == 0
        if self.number > self.waits.done:
            self.waits.done = self.number
            self.waits.found.append(self.number < self.waits.made)


@pytest.fixture
def waits(monkeypatch):
    """Waits of the host from now on, in batches of a few leaves."""
    found, round_of, begin = Waits(), kernels_encode._Round.__init__, Engine.begin_encoding

    def count_round(self, *arguments):
        found.n_rounds += 1
        round_of(self, *arguments)

    def count_batch(self, jobs, room):
        found.n_batches += 1
        return begin(self, jobs, room)

    monkeypatch.setattr(Device, "event", lambda self: found.event())
    monkeypatch.setattr(Device, "fetch", lambda self, tensor: (self.to_host(tensor), found.copy()))
    monkeypatch.setattr(kernels_encode._Round, "__init__", count_round)
    monkeypatch.setattr(Engine, "begin_encoding", count_batch)
    monkeypatch.setattr("tricomp.codec.engine.DEVICE_BATCH_WORDS", 1000)
    monkeypatch.setattr("tricomp.codec.encoding.SMALL_WORDS", 250)
    return found


N_SIBLING_WAITS = 4  # a checkpoint: words of all leaves, digests of those alike, these compared, casts looked at


def two_steps(n_layers=4):
    """Many leaves of a few hundred words, of every kind, and one that is looked at twice; at two steps."""
    rng = np.random.default_rng(2)
    w = (rng.normal(size=(10, 30)) * np.exp(rng.normal(size=(10, 1)))).astype(np.float32)
    few = np.where(rng.random(9000) < 0.3, rng.normal(size=9000), 0).astype(np.float32)
    steps = []
    for step in (0, 3):
        noise = np.random.default_rng(step)
        found = {
            f"{i}/w": (w * np.exp(1e-3 * noise.normal(size=w.shape)) * 2**i).astype(np.float32) for i in range(n_layers)
        }
        found |= {f"{i}/v": found[f"{i}/w"] ** 2 for i in range(n_layers // 2)}
        found |= {f"{i}/half": found[f"{i}/w"].astype(ml_dtypes.bfloat16) for i in range(n_layers)}
        found |= {"tied": found["0/w"].copy(), "zeros": np.zeros(600, np.int16), "still": w}
        found |= {"few": few} if n_layers > 2 else {}
        found |= {f"{i}/b": noise.normal(size=40).astype(np.float32) for i in range(8)}
        steps.append(snapshot_of(list(found), list(found.values())))
    return steps


@pytest.mark.parametrize("has_reference", [False, True])
def test_a_save_waits_twice_a_batch_for_plans(waits, has_reference):
    """And twice a round: for its sizes, and for its bytes."""
    old, new = two_steps()
    parent = on_device(old) if has_reference else None
    frames = list(codec.encode(on_device(new), parent, SHORT))
    assert waits.n_batches > 5
    assert waits.n_rounds == waits.n_copies >= waits.n_batches - 2  # a batch may be of copies alone
    assert len(waits.found) - waits.n_rounds <= N_SIBLING_WAITS + 2 * waits.n_batches
    assert (
        sum(waits.found) >= waits.n_batches - 3
    )  # the next one is surveyed by then, if there is one, and not too large
    host = codec.encode(new, old if has_reference else None, SHORT, backend="native")
    data = {frame.leaves: (frame.plan, frame.data, frame.digests) for frame in host}
    assert {frame.leaves: (frame.plan, frame.data, frame.digests) for frame in frames} == data


def test_a_batch_is_planned_later_where_memory_is_short(waits, monkeypatch):
    plan_ahead, asked = Work.plan_ahead, []
    _, new = two_steps(2)

    def refuse(self, shape, dtype):
        raise OutOfDeviceMemory("cuda:0: no memory")

    def plan_in_vain(self, tasks, coded):
        with monkeypatch.context() as patch:
            patch.setattr(Device, "empty", refuse)
            asked.append(plan_ahead(self, tasks, coded))
        return asked[-1]

    monkeypatch.setattr(Work, "plan_ahead", plan_in_vain)
    assert frames_of(on_device(new), None, SHORT) == frames_of(new, None, SHORT, backend="native")
    assert len(asked) > 3
    assert not any(asked)


def test_a_load_waits_once_a_batch(tmp_path, waits):
    steps = [
        {
            leaf.path: dtypes.from_words(step.words(i), leaf.dtype, leaf.shape)
            for i, leaf in enumerate(step.layout.leaves)
        }
        for step in two_steps(2)
    ]
    n_words = sum(array.size for array in steps[0].values())
    parent = None
    for n_files, (name, step) in enumerate(zip(("a.tri", "b.tri"), steps, strict=True), start=1):
        tricomp.save(tmp_path / name, step, reference=parent, spec=SHORT)
        waits.found.clear()
        with tricomp.open(tmp_path / name, reference=parent) as file:
            found = file.load_to(CPU)
        # A batch is full when it has its words; those that repeat others come last.
        assert len(waits.found) <= n_files * (n_words // 1000 + 2)
        for path, array in step.items():
            assert found[path].words.numpy().tobytes() == array.tobytes(), path
        parent = tmp_path / name


def test_a_step_that_the_device_cannot_hold_is_saved_all_the_same(far, tmp_path, monkeypatch, caplog):
    def refuse(words):
        raise OutOfDeviceMemory("cuda:0: no memory")

    first, second = (tricomp_torch.flatten({"w": torch.arange(20000) % n}).tree for n in (89, 97))
    with tricomp.Store(tmp_path, reference_in="device", spec=SHORT) as store:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "tricomp"):
            patch.setattr("tricomp.codec.encoding.device_copy", refuse)
            store.save(1, first)
        assert "this step is not held for the next one to be coded against" in caplog.text
        assert store.save(2, second).parent is not None
    with tricomp.Store(tmp_path) as store:
        assert np.array_equal(store.load(2)["w"], second["w"].words.numpy())
