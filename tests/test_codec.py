"""The codec as a whole: every dtype, prediction, tier and size there and back; nothing expands; siblings are found."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden_cases
from tests.cases import ODD_SIZES, decayed, moments, of_dtype, same_bits, special_words, stepped, weights
from tricomp import codec, dtypes
from tricomp.bounds import most_frame_bytes
from tricomp.errors import CorruptFrame, InvalidArgument, WrongReference
from tricomp.job import DecodeJob, EncodeJob, Scales, Side, Tables
from tricomp.layout import Layout, Snapshot, snapshot_of
from tricomp.plan import Plan, Spec
from tricomp.reference import decode as decoder
from tricomp.reference import encode as encoder
from tricomp.reference.entropy import normalise
from tricomp.reference.frame import RAW_FLAG, directory
from tricomp.reference.predict import basis, split, spread, symbol_bits

DENSE, FAST = Spec(), Spec(tier="fast")


def round_trip(arrays, references=None, spec=DENSE):
    """Encode and decode arrays by path; checks bits, digests, plans and the size bound. Returns the frames."""
    snapshot = snapshot_of(list(arrays), list(arrays.values()))
    parent = None if references is None else snapshot_of(list(references), list(references.values()))
    frames = list(codec.encode(snapshot, parent, spec))
    leaves = snapshot.layout.leaves
    assert sorted(i for frame in frames for i in frame.leaves) == list(range(len(leaves)))
    expected = codec.bounded(snapshot, spec)
    jobs = []
    for frame in frames:
        plan = Plan.from_wire(frame.plan.to_wire())
        assert plan == frame.plan
        old = sibling = None
        if plan.reference == "parent":
            assert parent is not None
            old = np.concatenate([parent.words(parent.layout.index[leaves[i].path]) for i in frame.leaves])
        if plan.reference == "sibling":
            sibling = leaves[plan.sibling], expected.words(plan.sibling)
        jobs.append(codec.StoredFrame([leaves[i] for i in frame.leaves], plan, frame.data, old, sibling))
        assert len(frame.data) <= most_frame_bytes(plan.n_words, plan.dtype.word_bits, plan.chunk_log2)
    for frame, decoded in zip(frames, codec.decode_many(jobs), strict=True):
        assert tuple(decoded.digests) == frame.digests
        for i, digest, back in zip(frame.leaves, frame.digests, decoded.words, strict=True):
            assert np.array_equal(back, expected.words(i)), (leaves[i], frame.plan)
            assert codec.digest(back) == digest
    return frames


def bits_per_word(frames):
    return sum(8 * len(frame.data) for frame in frames) / sum(frame.plan.n_words for frame in frames)


@pytest.mark.parametrize("spec", [DENSE, FAST], ids=["dense", "fast"])
@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype_with_and_without_reference(name, spec):
    for shape in ((), (0,), (3,), (7, 5), (40, 33, 25)):
        old, new = of_dtype(name, shape, 1), of_dtype(name, shape, 1)
        words = new.reshape(-1).view(dtypes.by_name(name).word_dtype)
        words[::3] ^= words.dtype.type(1)
        if name == "bool":
            words &= 1
        round_trip({"a": old}, spec=spec)
        round_trip({"a": new}, {"a": old}, spec)


@pytest.mark.parametrize("n_words", [*ODD_SIZES, 1023, 1024, 1025, 4095, 4097, 65_535, 65_536, 65_537])
def test_odd_sizes(n_words):
    for make, change in ((weights, stepped), (moments, decayed)):
        old = make((n_words,), 2)
        new = change(old)
        round_trip({"a": old})
        round_trip({"a": new}, {"a": old})
        round_trip({"a": new}, {"a": old}, Spec(chunk_log2=10))
        round_trip({"a": old.astype(ml_dtypes.bfloat16)}, spec=FAST)


def test_views_and_byte_orders():
    base = weights((60, 80))
    for view in (base.T, base[::2, ::-3], base[:, 7], np.broadcast_to(base[:1], (9, 80)), base.astype(">f4")):
        round_trip({"a": view})
        round_trip({"a": np.arange(50, dtype=">i8")})


PREDICTIONS = {
    "constant": (np.full(70_000, 3.5, np.float32), None),
    "copy": (weights((300, 300)), weights((300, 300))),
    "palette": (np.random.default_rng(0).choice([0.0, 1.5, -2.25], 70_000).astype(np.float32), None),
    "full": (moments((300, 300)), None),
    "delta": (stepped(weights((300, 300))), weights((300, 300))),
    "scaled_delta": (decayed(moments((300, 300))), moments((300, 300))),
}


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_planner_finds_the_prediction(predict):
    new, old = PREDICTIONS[predict]
    for spec in (DENSE, FAST):
        frames = round_trip({"a": new}, None if old is None else {"a": old}, spec)
        assert [frame.plan.predict for frame in frames] == [predict]
        assert frames[0].plan.entropy in ("none", "rans" if spec is DENSE else "index")


def test_remainders_that_are_all_zero():
    powers = 2.0 ** np.random.default_rng(0).integers(-300, 300, 3000)
    assert round_trip({"a": powers})[0].plan.plane_widths == ()


def test_an_odd_end_is_seen():
    array = np.full(1000, 7, np.int32)
    array[::3] = 9
    array[-100:] = np.arange(100) * 3
    frames = round_trip({"a": array})
    assert len(frames[0].data) < 600


def test_a_split_into_pairs_is_not_tried():
    assert not round_trip({"a": moments((40_000, 2))})[0].plan.has_column_scale


def test_sparse_changes_and_sparse_zeros():
    old = weights((400, 400))
    new = old.copy()
    new.reshape(-1)[::2000] += 1
    assert bits_per_word(round_trip({"a": new}, {"a": old})) < 0.1
    zeros = np.zeros(160_000, np.float32)
    zeros[::5000] = weights((32,))
    assert bits_per_word(round_trip({"a": zeros})) < 0.1


@pytest.mark.parametrize("spec", [DENSE, FAST], ids=["dense", "fast"])
def test_words_that_the_sample_misses(spec):
    """All that is sampled is zero; the last words, which no sample holds, are not."""
    for name in dtypes.NAMES:
        tail = of_dtype(name, (100,))
        for n_zeros in (128, 40_960):
            array = np.concatenate([np.zeros(n_zeros, tail.dtype), tail])
            round_trip({"a": array}, spec=spec)
            round_trip({"a": array}, {"a": np.roll(array, 1)}, spec)


def test_unchanged_words_are_nearly_free():
    old = weights((500, 500)).astype(ml_dtypes.bfloat16)
    new = stepped(old, still_share=0.99, rate=1e-2)
    assert bits_per_word(round_trip({"a": new}, {"a": old})) < 0.25


def test_zeros_cost_no_remainder_and_do_not_drag_the_scales():
    dense = bits_per_word(round_trip({"a": moments((512, 256))}))
    half = bits_per_word(round_trip({"a": moments((512, 256), zero_share=0.5)}))
    assert half < dense / 2 + 1.2


def test_zeros_are_counted_in_the_phases_where_they_are():
    """Blocks of zeros, and blocks of one number each with zeros between: their phases differ."""
    rng = np.random.default_rng(0)
    levels = np.repeat((np.arange(80) % 8 + 40) * (rng.random(80) > 0.5), 256)
    levels[rng.random(levels.size) < 0.3] = 0
    array = levels.astype(np.uint8).view(ml_dtypes.float8_e4m3)
    assert bits_per_word(round_trip({"a": array})) < 0.9


def test_scale_model_beats_plain_exponents():
    array = moments((600, 500))
    frames = round_trip({"a": array})
    assert frames[0].plan.is_scaled
    flat = round_trip({"a": np.sort(array.reshape(-1))[np.random.default_rng(0).permutation(array.size)]})
    assert bits_per_word(frames) < bits_per_word(flat) - 1


@pytest.mark.parametrize("kept", [3, 7, 16])
def test_rows_of_lower_precision_pay_only_for_what_they_hold(kept):
    array = weights((512, 384))
    words = array.view(np.uint32)
    words[::2] &= np.uint32(0xFFFFFFFF << (23 - kept) & 0xFFFFFFFF)
    whole = bits_per_word(round_trip({"a": weights((512, 384))}))
    assert bits_per_word(round_trip({"a": array})) < whole - 0.8 * (23 - kept) / 2


def test_words_that_change_by_nothing_save_no_shift():
    """Unchanged words have no remainder: zeros at their bottom make a delta no cheaper than a few patches."""
    old = np.zeros(70_000, np.int64)
    new = old.copy()
    new[::10_000] = 5
    for spec in (DENSE, FAST):
        assert sum(len(frame.data) for frame in round_trip({"a": new}, spec=spec)) < 400
        assert sum(len(frame.data) for frame in round_trip({"a": new}, {"a": old}, spec)) < 400


def test_small_leaves_share_frames():
    arrays = {f"layers.{i}.norm": moments((1000,), i) for i in range(200)}
    frames = round_trip(arrays)
    assert len(frames) < 10
    assert all(frame.plan.n_words <= 65_536 for frame in frames)
    old = {path: array * np.float32(0.9) for path, array in arrays.items()}
    del old["layers.7.norm"]
    round_trip(arrays, old)


def test_repeats_and_casts_of_a_sibling_cost_nothing():
    master = weights((200, 300))
    half = master.astype(ml_dtypes.bfloat16)
    frames = round_trip({"master": master, "again": master.copy(), "half": half, "f16": master.astype(np.float16)})
    kinds = {frame.leaves[0]: (frame.plan.predict, len(frame.data)) for frame in frames}
    assert kinds[1] == ("copy", 0)
    assert kinds[2][0] == "cast"
    assert kinds[3][0] == "cast"
    assert kinds[2][1] < 100
    back = round_trip({"half": half, "up": half.astype(np.float32)})  # an exact widening is a cast as well
    assert sum(len(frame.data) for frame in back) < half.nbytes


def test_a_cast_with_exceptions_is_patched():
    master = weights((200, 300))
    half = master.astype(ml_dtypes.bfloat16)
    half.reshape(-1)[::1009] += 1
    frames = round_trip({"master": master, "half": half})
    assert {frame.plan.predict for frame in frames} == {"full", "cast"}


def test_leaves_that_only_look_like_casts_are_planned():
    ones = np.ones((130, 130), np.float32)
    ones[1:, 1:] = weights((129, 129))
    half = np.ones((130, 130), ml_dtypes.bfloat16)
    half[1:, 1:] = weights((129, 129), 7)
    frames = round_trip({"a": ones, "b": half})
    assert {frame.plan.predict for frame in frames} == {"full"}


def test_many_leaves_of_one_shape_and_two_dtypes():
    masters = {f"m{i}": weights((8, 16), i) for i in range(400)}
    halves = {f"h{i}": masters[f"m{i}"].astype(ml_dtypes.bfloat16) for i in range(0, 400, 2)}
    others = {f"o{i}": weights((8, 16), 1000 + i).astype(ml_dtypes.bfloat16) for i in range(200)}
    frames = round_trip({**masters, **halves, **others})
    assert sum(frame.plan.predict == "cast" for frame in frames) == 200


def test_references_of_another_shape_or_dtype_are_not_used():
    new = weights((128, 200))
    for old in (weights((200, 128)), weights((128, 200)).astype(np.float64), weights((128, 201))):
        assert all(frame.plan.reference == "none" for frame in round_trip({"a": new}, {"a": old}))
    assert all(frame.plan.reference == "none" for frame in round_trip({"a": new}, {"b": new}))


def test_bounded_mode_rounds_what_matches_and_says_so():
    spec = Spec(keep_mantissa_bits={"opt/*": 7})
    tree = {"opt/m": weights((300, 200)), "w": weights((300, 200), 4)}
    frames = round_trip(tree, spec=spec)
    kept = {frame.leaves[0]: frame.plan.keep_mantissa_bits for frame in frames}
    assert kept == {0: 7, 1: None}
    sizes = {frame.leaves[0]: len(frame.data) for frame in frames}
    assert sizes[0] < 0.45 * sizes[1]
    assert "bounded: 7 mantissa bits kept" in next(f.plan for f in frames if f.leaves == (0,)).describe()
    with pytest.raises(
        InvalidArgument, match=r"leaf 'opt/step': keep_mantissa_bits applies to float leaves, this one is"
    ):
        round_trip({"opt/step": np.arange(5)}, spec=spec)


def test_bytes_do_not_depend_on_the_batch():
    trees = {f"l{i}": moments((130, 140 + i), i) for i in range(4)}
    together = {frame.leaves: frame for frame in round_trip(trees)}
    for i, (path, array) in enumerate(trees.items()):
        alone = round_trip({path: array})[0]
        assert alone.data == together[(i,)].data


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(dtypes.NAMES), st.lists(st.integers(0, 40), max_size=3), st.integers(0, 2**32), st.data())
def test_any_words_at_all(name, shape, seed, data):
    dtype = dtypes.by_name(name)
    rng = np.random.default_rng(seed)
    n_words = math.prod(shape) * dtype.words_per_element
    high = 2 if name == "bool" else 2**dtype.word_bits

    def words():
        array = rng.integers(0, high, n_words, dtype=dtype.word_dtype.type)
        if data.draw(st.booleans()) and n_words:
            array[rng.random(n_words) < 0.7] = array[0]
        if data.draw(st.booleans()) and name != "bool" and n_words:
            array[:] = rng.choice(special_words(dtype), n_words)
        return array.view(dtype.numpy).reshape(shape)

    spec = Spec(tier=data.draw(st.sampled_from(["dense", "fast"])), chunk_log2=data.draw(st.sampled_from([10, 16])))
    new, old = words(), words()
    round_trip({"a": new}, spec=spec)
    round_trip({"a": new}, {"a": old}, spec)


def plans_by_hand():
    """Plans that the planner seldom or never picks, of windows and tables that are yet to be filled in; and scales."""
    blank = Plan(dtypes.by_name("float32"), 1900, "full", chunk_log2=10)
    rows = Scales(np.arange(900, 910, dtype=np.int16), np.zeros(200, np.int16) + np.arange(200, dtype=np.int16) % 5)
    ratios = Scales(np.full(10, 31_000, np.uint16), np.full(200, 33_000, np.uint16))
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"):
        dtype = dtypes.by_name(name)
        for k in range(min(4, dtype.mantissa_bits) + 1):
            for entropy in ("rans", "index"):
                for remainder in ("planes", "stack"):
                    plan = replace(blank, dtype=dtype, mantissa_bits=k, entropy=entropy, remainder=remainder)
                    if not plan.remainder_bits:
                        plan = replace(plan, remainder="none")
                    yield plan, Scales()
                    if entropy == "rans" and dtype.mantissa_bits >= 3:
                        yield replace(plan, n_columns=200, has_column_scale=True, n_contexts=4), rows
                        yield replace(plan, has_sign=False, remainder="stack", has_block_shifts=True), Scales()
    for name in dtypes.NAMES:
        dtype = dtypes.by_name(name)
        for k in range(min(5, dtype.word_bits)):
            for has_sign in (True, False):
                plan = replace(blank, dtype=dtype, predict="delta", entropy="rans", remainder="stack")
                plan = replace(plan, mantissa_bits=k, has_sign=has_sign)
                yield plan, Scales()
                first = (1 << dtype.exponent_bits) * 3 // 4 - 6 if dtype.is_float else 2  # see golden_cases.words
                plan = replace(plan, reference="parent", n_contexts=4, context_base=max(first, 0), context_shift=1)
                yield plan, Scales()
                yield replace(plan, has_block_shifts=True, n_contexts=1), Scales()
                yield replace(plan, entropy="index", n_contexts=1), Scales()
                if dtype.is_float:
                    plan = replace(plan, predict="scaled_delta", n_columns=200, has_column_scale=True)
                    yield replace(plan, factor=(1 << 30) - 7), ratios


def words_by_hand(plan, scales):
    """Words near what the plan predicts, and some special ones, so that most of them fit; and their reference."""
    dtype = plan.dtype
    words = golden_cases.words(dtype, plan.n_words, dtype.number)
    reference = words if plan.reference == "parent" else None
    predicted = basis(plan, reference, scales, 0, plan.n_words).predicted
    new = words.copy() if predicted is None else golden_cases.moved(predicted, dtype, dtype.number + 50)
    if plan.predict == "full" and not plan.has_sign:
        new &= dtype.word_dtype.type((1 << dtype.word_bits - 1) - 1)
    special = special_words(dtype) if dtype.name != "bool" else words[:2]
    new[:: plan.n_words // len(special)][: len(special)] = special
    return new, reference


def jobs_by_hand():
    """Each plan by hand with tables from the data itself; windows hold only part of it, so that patches occur."""
    for plan, scales in plans_by_hand():
        words, reference = words_by_hand(plan, scales)
        plan = replace(plan, n_symbols=min(32 << plan.mantissa_bits, 256))
        known = basis(plan, reference, scales, 0, len(words))
        if plan.predict == "full":
            field = (words >> plan.dtype.mantissa_bits & ((1 << plan.dtype.exponent_bits) - 1)).astype(int)
            level = 0 if known.level is None else int(np.median(known.level >> 3))
            plan = replace(plan, base=(int(np.median(field)) - level << plan.mantissa_bits) - plan.n_symbols // 2)
        parts = split(plan, words, known, words[:0])
        tables, dictionary = None, np.zeros(0, np.uint8)
        if plan.entropy == "rans":
            context = np.zeros(len(words), int) if parts.contexts is None else parts.contexts
            counts = np.zeros((plan.n_contexts, plan.n_symbols), np.int64)
            np.add.at(counts, (context, parts.symbols), 1)
            counts[:, np.argmin(np.where(counts.any(axis=0), counts.sum(axis=0), len(words)))] = 0  # no table knows it
            tables = Tables(np.stack([normalise(row, 11) for row in counts]), 11)
        else:
            is_narrow = plan.mantissa_bits < 2
            plan = replace(plan, index_bits=(3 if is_narrow else 6) + (plan.predict == "full"))
            common = np.argsort(-np.bincount(parts.symbols, minlength=plan.n_symbols))
            dictionary = np.sort(common[: (1 << plan.index_bits) - 1]).astype(np.uint8)
        planes = {}
        if plan.remainder == "planes" and plan.plane_widths:
            width = plan.plane_widths[0]
            planes[0] = Tables(normalise(np.ones(1 << width, np.int64), 11)[None], 11)
            plan = replace(plan, coded_planes=1)
        yield EncodeJob(plan, Side(tables, planes, dictionary, scales=scales), words, reference)


def test_every_plan_by_hand():
    """Nearly all are coded, and with patches: or this would show little."""
    seen: Counter[str] = Counter()
    for job in jobs_by_hand():
        encoded = encoder.encode([job])[0]
        complete, data = encoded.plan, encoded.data
        assert Plan.from_wire(complete.to_wire()) == complete
        back = decoder.decode([DecodeJob(complete, data, job.reference)])[0]
        assert np.array_equal(back, job.words), complete
        assert (symbol_bits(job.plan) <= job.plan.dtype.word_bits).all()
        n_patches = directory(complete, data)[:, 3]
        seen["all"] += 1
        seen["raw"] += bool((n_patches == RAW_FLAG).any())
        seen["patched"] += bool((n_patches % RAW_FLAG).any())
    assert seen["all"] > 1200
    assert seen["raw"] < seen["all"] / 40
    assert seen["patched"] > seen["all"] * 0.9


def test_scales_are_spread_over_the_asked_words_only():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n_columns, n_words = (int(n) for n in rng.integers(1, 40, 2))
        scales = Scales(np.arange(100, dtype=np.int16), rng.integers(0, 99, n_columns).astype(np.int16))
        places = int(rng.integers(0, 60 * n_columns)) + np.arange(n_words)
        rows, columns = spread(scales, n_columns, int(places[0]), n_words)
        assert np.array_equal(rows, scales.rows[places // n_columns])
        assert columns is not None
        assert scales.columns is not None
        assert np.array_equal(columns, scales.columns[places % n_columns])
    n_columns = 1 << 24  # a flat leaf is one row
    tracemalloc.start()
    rows, _ = spread(Scales(np.full(1, 7, np.int16)), n_columns, n_columns - 1000, 1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rows == 7).all()
    assert peak_bytes < 1 << 20


def test_wrong_and_missing_references_are_named():
    old, new = weights((150, 150)), stepped(weights((150, 150)))
    snapshot, parent = snapshot_of(["w"], [new]), snapshot_of(["w"], [old])
    frame = next(iter(codec.encode(snapshot, parent)))
    leaves = snapshot.layout.leaves
    with pytest.raises(WrongReference, match=r"leaf 'w': it was encoded against a reference of 22500 words, none"):
        codec.decode(leaves, frame.plan, frame.data, None, None)
    with pytest.raises(WrongReference, match="22499 came"):
        codec.decode(leaves, frame.plan, frame.data, parent.words(0)[1:], None)
    with pytest.raises(CorruptFrame, match="its plan is for 22500 words of float32, its leaves have 22500 of int32"):
        codec.decode(snapshot_of(["w"], [new.view(np.int32)]).layout.leaves, frame.plan, frame.data, None, None)


def test_unknown_backend_and_duplicate_paths(monkeypatch):
    monkeypatch.setenv("TRICOMP_BACKEND", "abacus")
    with pytest.raises(
        InvalidArgument, match="TRICOMP_BACKEND: expected 'auto', 'triton', 'native' or 'reference', got 'abacus'"
    ):
        list(codec.encode(snapshot_of(["a"], [np.zeros(3)])))
    assert list(codec.encode(snapshot_of(["a"], [np.zeros(3)]), backend="reference"))
    with pytest.raises(InvalidArgument, match="backend: expected"):
        list(codec.encode(snapshot_of(["a"], [np.zeros(3)]), backend="abacus"))
    with pytest.raises(InvalidArgument, match="leaf 'a' appears twice"):
        snapshot_of(["a", "a"], [np.zeros(3), np.zeros(3)])


def test_snapshots_of_one_flat_buffer():
    """A Layout may place many leaves in one Buffer."""
    arrays = [weights((40, 50), i) for i in range(5)]
    apart = snapshot_of([f"l{i}" for i in range(5)], arrays)
    flat = np.concatenate([apart.words(i) for i in range(5)])
    places = tuple(replace(place, buffer=0, offset=2000 * i) for i, place in enumerate(apart.layout.places))
    joined = Snapshot(Layout(apart.layout.leaves, places), (flat,))
    assert [frame.data for frame in codec.encode(joined)] == [frame.data for frame in codec.encode(apart)]
    assert same_bits(codec.copied(joined, to_host=True).words(3), apart.words(3))


def test_differences_that_end_in_zeros_pay_for_their_high_bits_only():
    rng = np.random.default_rng(0)
    old = (rng.standard_normal(1 << 17) * 0.02).astype(np.float32)
    steps = rng.integers(-200, 200, old.size).astype(np.int32) << 12  # though neither checkpoint ends in zeros
    new = (old.view(np.int32) + steps).view(np.float32)
    frames = round_trip({"w": new}, {"w": old})
    assert frames[0].plan.has_block_shifts
    assert bits_per_word(frames) < 11


@pytest.mark.parametrize("wide", ["complex64", "complex128"])
def test_complex_leaves_beside_real_ones_of_their_shape(wide):
    real = np.random.default_rng(0).standard_normal(333)
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16):
        pair = {"a": (real * (1 + 2j)).astype(wide), "b": real.astype(dtype), "c": real.astype(np.float32)}
        round_trip(pair)
        round_trip(dict(reversed(pair.items())))
