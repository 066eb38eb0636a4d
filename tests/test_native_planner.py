"""The native planner decides as the reference: fields of the plan, frequencies, scales, dictionary, palette."""

from __future__ import annotations

from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import decayed, moments, of_dtype, special_words, stepped, told_by, weights
from tricomp import dtypes, native
from tricomp.plan import Plan, Spec
from tricomp.reference.planner import plan_frame

pytestmark = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
if native.is_there():
    from tricomp.native.planner import plan_frames

SPECS = {"dense": Spec(), "fast": Spec(tier="fast", chunk_log2=10)}


def frame(array, reference=None, spec=SPECS["dense"], is_joined=False):
    """A frame to plan; joined: as several leaves, without a shape."""
    dtype = dtypes.of(array, "a")
    shape = None if is_joined else (*array.shape, dtype.words_per_element)[: array.ndim + (dtype.words_per_element > 1)]
    old = None if reference is None else dtypes.to_words(reference)
    return dtypes.to_words(array), old, dtype, shape, spec, None


def assert_equal(frames, threads=2):
    """Both planners come to the same jobs. Returns the predictions."""
    jobs = plan_frames(frames, threads)
    for given_, job in zip(frames, jobs, strict=True):
        expected = plan_frame(*given_)
        for spec in fields(Plan):
            name = spec.name
            assert getattr(job.plan, name) == getattr(expected.plan, name), (name, expected.plan.describe())
            assert type(getattr(job.plan, name)) is type(getattr(expected.plan, name)), name
        for one, other in zip(parts(job.side), parts(expected.side), strict=True):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist(), expected.plan.describe()
        assert job.words is given_[0]
        assert job.reference is (given_[1] if job.plan.reference == "parent" else None)
    return {job.plan.predict for job in jobs}


def parts(side):
    """All arrays of a Side; what is missing is left out."""
    tables = ([] if side.tables is None else [side.tables]) + [side.plane_tables[p] for p in sorted(side.plane_tables)]
    scales = [side.scales.rows] if len(side.scales.rows) else []
    scales += [] if side.scales.columns is None else [side.scales.columns]
    palette = [side.palette] if len(side.palette) else []
    return [np.array(sorted(side.plane_tables), int), *(t.freqs for t in tables), side.dictionary, *palette, *scales]


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype_and_many_shapes(name, tier):
    frames = []
    for shape in ((), (0,), (3,), (127,), (128,), (7, 5), (40, 33, 25), (300, 200), (129, 1000), (5000, 9), (90_001,)):
        old, new = of_dtype(name, shape, 1), of_dtype(name, shape, 1)
        words = new.reshape(-1).view(dtypes.by_name(name).word_dtype)
        words[::3] ^= words.dtype.type(1)
        if name == "bool":
            words &= 1
        for is_joined in (False, True):
            frames += [frame(old, None, SPECS[tier], is_joined), frame(new, old, SPECS[tier], is_joined)]
    assert_equal(frames)


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float64, np.float16])
def test_training_state(kind, tier):
    """Of every kind, long and short, with rows of zeros, at once on several threads; every prediction occurs."""
    frames = []
    for shape in ((500, 640), (8192, 24), (17, 9000), (31, 33), (256, 96, 3, 3), (300_000,)):
        w, v = weights(shape), moments(shape, zero_share=0.1)
        v[: max(len(v) // 7, 1)] = 0
        changed = w.copy()
        changed.reshape(-1)[::3000] += 1
        for new, old in ((w, None), (v, None), (stepped(w), w), (decayed(v), v), (changed, w), (v, w)):
            new, old = new.astype(kind), None if old is None else old.astype(kind)
            frames.append(frame(new, old, SPECS[tier]))
        frames.append(frame((v.astype(kind) * kind(0.9)).astype(kind), v.astype(kind), SPECS[tier]))
    assert {"full", "delta", "scaled_delta", "sparse"} <= assert_equal(frames, 3)


@pytest.mark.parametrize("tier", SPECS)
def test_odd_frames(tier):
    """Octaves beyond any window, rounded rows, coded planes, few distinct words, all zero but the end."""
    rng = np.random.default_rng(0)
    far = (2.0 ** rng.integers(-900, 900, (400, 500)) * rng.choice([1, 1.5], (400, 500))).astype(np.float64)
    graded = far * 2.0 ** np.linspace(-100, 20, 400)[:, None]
    rounded = weights((400, 512))
    rounded.view(np.uint32)[::2] &= np.uint32(0xFFFF0000)
    coarse = weights((400, 512))
    coarse.view(np.uint32)[:] &= np.uint32(0xFFFFF000)
    few = rng.choice(np.array([0, 1.5, -2.25, np.nan, 7], np.float32), 70_000, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    skewed = (weights((300, 300)).view(np.uint32) & ~np.uint32(0xFF)) | rng.binomial(200, 0.1, (300, 300)).astype("u4")
    late = np.zeros(400_000, np.float32)
    late[-100:] = weights((100,))
    counts = np.arange(100_000) % 1000 * (np.arange(100_000) % 3)
    specials = rng.choice(special_words(dtypes.by_name("float32")), 50_000).view(np.float32)
    arrays = [far, graded, rounded, coarse, few, skewed.view(np.float32), late, counts, -counts, specials]
    arrays += [few.astype(ml_dtypes.bfloat16), counts.astype(np.uint8), np.full(1000, 7.5), np.repeat(far[:3], 99, 1)]
    frames = [frame(array, None, SPECS[tier]) for array in arrays]
    frames += [frame(array[::-1].copy(), array, SPECS[tier]) for array in arrays]
    for array in arrays:
        is_kept = np.arange(array.size).reshape(array.shape) % 5 > 0
        frames.append(frame(np.where(is_kept, array, np.roll(array, 1)), array, SPECS[tier]))
        frames.append(frame(array.copy(), array, SPECS[tier]))
    assert {"palette", "full", "delta", "sparse", "constant", "copy"} <= assert_equal(frames)


def test_threads_share_a_long_frame():
    """Whole frames are compared, and their rows measured, in parts; what differs stands in the last one."""
    shape = (9001, 250)
    v = moments(shape)
    late, rounded, few = np.zeros(shape, np.float32), weights(shape), v.copy()
    late[-1, -1] = 1
    rounded.view(np.uint32)[:] &= np.uint32(0xFFFFF000)
    rounded.view(np.uint32)[-1, -1] |= np.uint32(0x100)
    few.reshape(-1)[::3000] += 1
    growth = np.linspace(0.8, 1.2, shape[0])[:, None] * np.random.default_rng(0).normal(1, 0.01, shape)
    grown = v * growth.astype(np.float32)
    found = [assert_equal([frame(new, old)], 3) for new, old in ((v, None), (rounded, None), (grown, v), (few, v))]
    assert set.union(*found) == {"full", "scaled_delta", "sparse"}
    found = [assert_equal([frame(new, old)], 3) for new, old in ((late, None), (v * 0, None), (v.copy(), v))]
    assert found == [{"sparse"}, {"constant"}, {"copy"}]
    changed = v.copy()
    changed[-1, -1] *= 2
    assert assert_equal([frame(changed, v)], 3) == {"sparse"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(dtypes.NAMES), st.lists(st.integers(0, 70), max_size=3), st.integers(0, 2**32), st.data())
def test_any_words_at_all(name, shape, seed, data):
    dtype = dtypes.by_name(name)
    rng = np.random.default_rng(seed)
    shape = (*shape, *data.draw(st.sampled_from([(), (), (64,), (300,)])))
    n_words = int(np.prod(shape, dtype=np.int64)) * dtype.words_per_element
    high = 2 if name == "bool" else 2**dtype.word_bits

    def words():
        array = rng.integers(0, high, n_words, dtype=dtype.word_dtype.type)
        if data.draw(st.booleans()) and n_words:
            array[rng.random(n_words) < 0.7] = array[0]
        if data.draw(st.booleans()) and name != "bool" and n_words:
            array[:] = rng.choice(special_words(dtype), n_words)
        if data.draw(st.booleans()) and n_words:
            array >>= dtype.word_dtype.type(data.draw(st.integers(0, dtype.word_bits - 1)))
        return array.view(dtype.numpy).reshape(shape)

    new, old = words(), words()
    mixed = np.where(rng.random(shape) < data.draw(st.sampled_from([0.01, 0.5])), new, old).astype(dtype.numpy)
    for spec in SPECS.values():
        assert_equal([frame(new, None, spec), frame(new, old, spec), frame(mixed, old, spec)], 1)


def test_memory_that_is_not_as_the_module_wants_it():
    base = dtypes.to_words(weights((300, 200)))
    packed = bytearray(1) + bytearray(base.tobytes())
    unaligned = np.frombuffer(packed, np.uint8)[1:].view("<u4")
    read_only = base.copy()
    read_only.flags.writeable = False
    strided = np.repeat(base, 2)[::2]
    expected = plan_frame(base, base + 1, dtypes.by_name("float32"), (300, 200), SPECS["dense"])
    frames = [(words, words + 1, dtypes.by_name("float32"), (300, 200), SPECS["dense"], 7) for words in
              (base, unaligned, read_only, strided)]  # fmt: skip
    for given_, job in zip(frames, plan_frames(frames)):
        assert job.plan.describe() == f"{expected.plan.describe()} bounded: 7 mantissa bits kept"
        assert job.words is given_[0]


def test_requests_that_contradict_themselves_are_refused():
    core = native.load()
    words = np.zeros(6, np.uint32)

    def numbers(*values):
        return np.array(values, np.uint64).tobytes()

    good = (32, 8, 23, 1, 1, 16, 0, 2, 3)
    assert len(core.plan_frames([(numbers(*good), words, None)], 1)) == 1
    wrong = [
        (numbers(*good[:-1], 4), words, None),
        (numbers(*good[:-2], 1 << 40, 1 << 40), words, None),
        (numbers(31, *good[1:]), words, None),
        (numbers(32, 8, 22, *good[3:]), words, None),
        (numbers(32, 0, 0, *good[3:]), words, None),
        (numbers(*good[:5], 17, 0), words, None),
        (numbers(*good)[:-1], words, None),
        (numbers(*good[:3]), words, None),
        (numbers(*good), words.view(np.uint8)[1:], None),
        (numbers(*good), words, words[1:]),
        (numbers(*good[:-2]), np.zeros(9, np.uint8)[1:], None),
    ]
    for request in wrong:
        with pytest.raises(ValueError, match=r"of another|part of a word|do not fill|not aligned"):
            core.plan_frames([request], 1)
    malformed: list[object] = [(numbers(*good), words), (numbers(*good), "text", None), (7, words, None), 7]
    for odd in malformed:
        with pytest.raises((TypeError, IndexError, SystemError)):
            core.plan_frames([odd], 1)
    with pytest.raises(TypeError):
        core.plan_frames(7, 1)
    assert core.plan_frames([], 1) == []


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    code = (
        "from tests import test_native_planner as t; from tricomp import native; import ml_dtypes, numpy as np;"
        "print(native.isa()); t.test_odd_frames('dense'); t.test_training_state(np.float32, 'dense');"
        "t.test_training_state(ml_dtypes.bfloat16, 'dense'); t.test_training_state(np.float64, 'fast');"
        "[t.test_every_dtype_and_many_shapes(n, 'dense') for n in ('float8_e4m3fn', 'int8', 'int16', 'uint64')]"
    )
    assert told_by(isa, code) == isa
