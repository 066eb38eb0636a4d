"""Plans of frames that lie elsewhere, from gathered words and facts: those of whole arrays, on the planner's cases."""

from __future__ import annotations

from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest

from tests import test_native_planner as cases
from tests.cases import decayed, moments, special_words, stepped, told_by, weights
from tests.test_native_planner import SPECS, frame, parts
from tricomp import dtypes, native
from tricomp.job import Facts, Gathered, Lattice
from tricomp.plan import Plan
from tricomp.reference import bits
from tricomp.reference import planner as reference_planner
from tricomp.reference.planner_full import octaves_of

pytestmark = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
if native.is_there():
    from tricomp.native.planner import plan_frames
    from tricomp.native.planner_gathered import lattices, plan_gathered, wanted


def walled(array):
    """The same numbers, with others before and after them that a read outside would meet."""
    room = np.full(array.size + 256, 0x5A, np.uint8).astype(array.dtype)
    room[:128], room[128:-128], room[-128:] = 0x5B, array.reshape(-1), 0x5C
    return room[128:-128]


def places(lattice: Lattice):
    return lattice.rows[:, None] * lattice.n_columns + lattice.columns


def means(words, dtype):
    """What a lattice of means wants, from its words."""
    octaves = np.where(words != 0, octaves_of(words, dtype), 0).astype(np.int64)
    n, sums = np.count_nonzero(words, axis=1), octaves.sum(axis=1)
    return np.where(n > 0, (2 * sums + n) // np.maximum(2 * n, 1), -1).astype(np.int16)


def facts_of(words, reference) -> Facts:
    first = int(words[0]) if len(words) else 0
    unlike = None if reference is None else int(np.count_nonzero(words != reference))
    return Facts(first, int(np.count_nonzero(words != first)), unlike, int(np.bitwise_or.reduce(words)))


def gather(given, places_wanted):
    """What lattices want of a frame: of its words and of its reference."""
    words, reference, dtype, *_ = given
    some = [walled(means(words[places(one)], dtype) if one.is_mean else words[places(one)]) for one in places_wanted]
    return some, [None if not one.has_reference else walled(reference[places(one)]) for one in places_wanted]


def first_gathered(given) -> Gathered:
    """A frame as another device hands it over at first."""
    words, reference, dtype, shape, spec, keep = given
    first = lattices(len(words), dtype, shape, reference is not None)
    some, old = gather(given, first)
    facts = facts_of(words, reference)
    return Gathered(len(words), dtype, shape, spec, keep, facts, first, some, None if reference is None else old)


def gathered(frames, has_means=False, threads=1) -> list[Gathered]:
    """Frames with all that their plans need."""
    found = []
    firsts = [first_gathered(given) for given in frames]
    for given, one, (more, commonest) in zip(frames, firsts, wanted(firsts, threads, has_means), strict=True):
        one = one.extended(more, *gather(given, more))
        if commonest is not None:
            one = replace(one, n_unlike_commonest=int(np.count_nonzero(given[0] != commonest)))
        found.append(one)
    return found


def assert_equal(frames, threads=2):
    """Plans of gathered words are those of whole arrays. Returns the predictions."""
    jobs = plan_frames(frames, threads)
    for has_means in (False, True):
        found = plan_gathered(gathered(frames, has_means, threads), threads)
        for job, (plan, side) in zip(jobs, found, strict=True):
            for spec in fields(Plan):
                name = spec.name
                assert getattr(plan, name) == getattr(job.plan, name), (name, job.plan.describe())
                assert type(getattr(plan, name)) is type(getattr(job.plan, name)), name
            for one, other in zip(parts(side), parts(job.side), strict=True):
                assert one.dtype == other.dtype
                assert one.tolist() == other.tolist(), job.plan.describe()
    return {job.plan.predict for job in jobs}


@pytest.fixture(autouse=True)
def _gather(monkeypatch):
    """The planner's own tests compare what this module compares."""
    monkeypatch.setattr(cases, "assert_equal", assert_equal)


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype_and_many_shapes(name, tier):
    cases.test_every_dtype_and_many_shapes(name, tier)


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float64, np.float16])
def test_training_state(kind, tier):
    cases.test_training_state(kind, tier)


@pytest.mark.parametrize("tier", SPECS)
def test_odd_frames(tier):
    cases.test_odd_frames(tier)


def test_threads_share_a_long_frame():
    cases.test_threads_share_a_long_frame()


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_any_words_at_all(name):
    """Longer than their samples: random bits, specials, narrow and wide exponents, mostly one word."""
    dtype, rng = dtypes.by_name(name), np.random.default_rng(0)
    shape = (293, 601 - 601 % dtype.words_per_element)
    n_words = int(np.prod(shape)) * dtype.words_per_element
    high = 2 if name == "bool" else 2**dtype.word_bits
    random = rng.integers(0, high, n_words, dtype=dtype.word_dtype.type)
    special = random if name == "bool" else rng.choice(special_words(dtype), n_words)
    narrow = random >> dtype.word_dtype.type(dtype.word_bits // 3)
    mostly = np.where(rng.random(n_words) < 0.7, special[0], random)
    mixed = np.where(rng.random(n_words) < 0.02, random, special)
    every = [words.view(dtype.numpy).reshape(shape) for words in (random, special, narrow, mostly, mixed)]
    frames = [frame(new, None, spec) for new in every for spec in SPECS.values()]
    frames += [frame(new, old) for new in every for old in every]
    assert_equal(frames)


def large_frames(kind, spec):
    """Of millions of words, lattices are small parts of them: wide rows, long columns, tails, four dimensions."""
    for shape in ((1501, 1100), (700, 4099), (4, 300_007), (1_500_007,), (1200, 4, 310)):
        w, v = weights(shape), moments(shape, zero_share=0.03)
        v[: max(len(v) // 7, 1)] = 0
        grown = (v * np.random.default_rng(0).uniform(0.8, 1.2, (len(v), *[1] * (v.ndim - 1)))).astype(np.float32)
        for new, old in ((w, None), (v, None), (stepped(w), w), (decayed(v), v), (grown, v)):
            yield frame(new.astype(kind), None if old is None else old.astype(kind), spec)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_lattices_are_small_parts_of_large_frames(kind):
    frames = list(large_frames(kind, SPECS["dense"]))
    assert {"full", "delta"} | ({"scaled_delta"} if kind is not np.float64 else set()) <= assert_equal(frames)
    for given in frames:
        n_each = 1 if given[1] is None else 2
        first = first_gathered(given)
        assert sum(one.n_words * (1 + one.has_reference) for one in first.lattices) < 300_000 * n_each
        ((more, _),) = wanted([first], 1, has_means=True)
        n_more = sum(one.n_wanted * (1 + one.has_reference) for one in more)
        assert n_more < len(given[0]) * n_each * 0.7


def test_lattices_name_each_place_once_and_those_of_the_frame_alone():
    float32, int64 = dtypes.by_name("float32"), dtypes.by_name("int64")
    for shape in (
        (),
        (1,),
        (127,),
        (130, 3),
        (90_001,),
        (5000, 9),
        (300, 700),
        (17, 9000),
        (256, 96, 3, 3),
        (70_001, 31),
    ):
        n_words = int(np.prod(shape, dtype=np.int64))
        for dtype in (float32, int64):
            for has_reference in (False, True):
                found = lattices(n_words, dtype, shape, has_reference)
                assert found[0].has_reference is has_reference
                assert not any(one.is_mean for one in found)
                assert len({(one.use, one.n_columns) for one in found}) == len(found)
                n_both = sum(one.n_words * (1 + one.has_reference) for one in found)
                assert n_both <= n_words * (1 + has_reference)
                for one in found:
                    every = places(one).reshape(-1)
                    assert len(every) == one.n_words > 0
                    assert (np.diff(every) > 0).all() or one is found[0]
                    assert len(np.unique(every)) == len(every)
                    assert every[0] >= 0
                    assert every.max() < n_words
                if len(found) == 1 and found[0].n_words == n_words:
                    assert (places(found[0]).reshape(-1) == np.arange(n_words)).all()
    assert lattices(0, float32, (0, 4), True) == []
    again = [lattices(210_000, float32, shape, True) for shape in ((300, 700), [300, 700])]
    assert all(one is other for one, other in zip(*again, strict=True))
    assert not again[0][0].rows.flags.writeable
    assert len(lattices(210_000, int64, (300, 700), True)) == 1


def test_facts_decide_before_words_are_looked_at():
    float32 = dtypes.by_name("float32")
    blank = Gathered(300_000, float32, (300, 1000), SPECS["dense"], 5, Facts(7, 0, None, 7), (), ())
    same = replace(blank, facts=Facts(7, 12, 0, 15), reference=())
    nothing = replace(blank, n_words=0, shape=(0,), facts=Facts(0, 0, None, 0))
    assert wanted([blank, same, nothing]) == [((), None)] * 3
    plans = [plan for plan, _ in plan_gathered([blank, same, nothing])]
    assert [(plan.predict, plan.word, plan.reference, plan.n_words) for plan in plans] == [
        ("constant", 7, "none", 300_000),
        ("copy", 0, "parent", 300_000),
        ("constant", 0, "none", 0),
    ]
    assert {plan.keep_mantissa_bits for plan in plans} == {5}


def test_what_the_reference_counts_is_to_be_counted(monkeypatch):
    """Frames with a word that makes up more than half of them: some far from sparse, some near, some that look so."""
    counted = []

    def count(words, others):
        if isinstance(others, int):
            counted.append(others)
        return bits.count_unequal(words, others)

    monkeypatch.setattr(reference_planner, "count_unequal", count)
    rng = np.random.default_rng(0)
    asked = []
    for share in (0.001, 0.01, 0.1, 0.3, 0.45, 0.6):
        for kind in (np.float32, ml_dtypes.bfloat16, np.float64):
            w = np.where(rng.random((300, 501)) < share, weights((300, 501)), 0.5).astype(kind)
            asked += [frame(w), frame(w, np.roll(w, 1)), frame(w, spec=SPECS["fast"])]
        asked.append(frame(rng.integers(-(2**62), 2**62, 100_000) * (rng.random(100_000) < share)))
        asked.append(frame((rng.integers(0, 255, 100_000) * (rng.random(100_000) < share)).astype(np.uint8)))
    asked.append(frame(np.repeat(np.array([0, 1], np.float32), [70_000, 9])))
    known = 0
    for given, (_, found) in zip(asked, wanted([first_gathered(given) for given in asked], 2), strict=True):
        counted.clear()
        reference_planner.plan_frame(*given)
        assert [found] == counted or not counted
        known += len(counted)
        if found is not None:
            assert np.count_nonzero(given[0] == found) * 3 > len(given[0])
    assert 5 < known < len(asked) - 5
    assert_equal(asked)


def test_what_does_not_fit_is_refused():
    v = moments((300, 1000))
    (good,) = gathered([frame(decayed(v), v)])
    assert len(plan_gathered([good])) == 1
    assert good.reference is not None
    few = weights((300, 1000))
    few[3:] = 0
    (sparse,) = gathered([frame(few)])
    (scaled,) = gathered([frame(v)])
    assert len(scaled.lattices) == 4
    assert sparse.n_unlike_commonest is not None
    wrong = [
        (replace(good, words=good.words[:-1]), "words of another number"),
        (replace(good, lattices=[], words=[], reference=[]), "no lattices"),
        (replace(good, lattices=good.lattices[1:], words=good.words[1:], reference=good.reference[1:]), "no sample"),
        (replace(good, lattices=[good.lattices[0]] * len(good.words)), "not in the first place"),
        (replace(good, lattices=good.lattices[:1], words=good.words[:1], reference=good.reference[:1]), "not gathered"),
        (replace(scaled, lattices=scaled.lattices[:3], words=scaled.words[:3]), "not gathered"),
        (replace(good, lattices=[*good.lattices[:-1], replace(good.lattices[-1], n_columns=999)]), "does not have"),
        (replace(good, lattices=[*good.lattices[:-1], replace(good.lattices[-1], use=11)]), "does not have"),
        (replace(scaled, lattices=[replace(one, is_mean=True) for one in scaled.lattices]), "another size"),
        (replace(good, reference=None), "reference of another number"),
        (replace(good, words=[good.words[0][1:], *good.words[1:]]), "lattice of another size"),
        (replace(good, reference=[*good.reference[:-1], v.reshape(-1)]), "lattice of another size"),
        (replace(good, n_words=299_999), "shape of another size"),
        (replace(good, n_words=1 << 50, shape=None), "too many words"),
        (replace(good, facts=replace(good.facts, n_unlike_first=300_001)), "more words counted"),
        (replace(good, n_words=0, shape=None), "more words counted"),
        (replace(sparse, n_unlike_commonest=None), "commonest were not counted"),
    ]
    for one, text in wrong:
        with pytest.raises(ValueError, match=text):
            plan_gathered([good, one])
    core, odd = native.load(), replace(good, words=[None, *good.words[1:]])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        plan_gathered([odd])
    malformed: list[object] = [7, (b"",), (bytes(7 * 8), b"", b"", (), None), (bytes(7 * 8), bytes(8 * 8), 7, (), 7)]
    for request in malformed:
        with pytest.raises((TypeError, IndexError, SystemError, ValueError)):
            core.plan_gathered([request], 1)
    with pytest.raises((TypeError, SystemError)):
        core.lattices(7)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    code = (
        "from tests import test_native_gathered as t; from tricomp import native; import ml_dtypes, numpy as np;"
        "t.cases.assert_equal = t.assert_equal;"
        "print(native.isa()); t.test_odd_frames('dense'); t.test_training_state(ml_dtypes.bfloat16, 'dense');"
        "t.test_training_state(np.float64, 'fast'); t.assert_equal(list(t.large_frames(np.float32, t.SPECS['fast'])));"
        "[t.test_every_dtype_and_many_shapes(n, 'dense') for n in ('float8_e4m3fn', 'int8', 'int16', 'uint64')]"
    )
    assert told_by(isa, code) == isa
