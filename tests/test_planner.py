"""The planner of the reference: its prices, its sample, and what it prefers. Data from cases."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tests.cases import moments, stepped, weights
from tricomp import Spec, dtypes
from tricomp.job import EncodeJob
from tricomp.reference import estimate, planner_delta, planner_full
from tricomp.reference.encode import encode
from tricomp.reference.planner import plan_frame

DENSE, FAST = Spec(), Spec(tier="fast")


def planned(array, reference=None, spec=DENSE):
    words = dtypes.to_words(array)
    old = None if reference is None else dtypes.to_words(reference)
    return plan_frame(words, old, dtypes.of(array, "a"), array.shape, spec)


def bits_of(job) -> float:
    return encode([job])[0].n_bytes * 8 / job.plan.n_words


def sample_of(array, reference=None) -> estimate.Sample:
    return estimate.sample_of(dtypes.to_words(array), None if reference is None else dtypes.to_words(reference))


def test_logarithms_are_those_of_whole_numbers():
    """Exact for powers of two; never above the truth, and below it by what 13 bits leave out."""
    numbers = np.concatenate([np.arange(1, 20_000), 1 << np.arange(40), (1 << np.arange(1, 40)) - 1])
    found = estimate.logarithm(numbers)
    truth = np.array([math.log2(int(number)) for number in numbers]) * 65536
    assert ((truth - found < 24.5) & (found <= truth + 1e-6)).all()
    assert (estimate.logarithm(1 << np.arange(40)) == np.arange(40) << 16).all()
    assert int(estimate.logarithm(np.array(0))) == 0
    assert estimate.PRICES[2048] == 0
    assert estimate.PRICES[1] == 11 << 16
    assert (np.diff(estimate.PRICES[1:]) < 0).all()


def test_a_price_is_what_the_frame_costs():
    """Of a frame that is its own sample the symbols are priced as they will be coded; more so on longer frames."""
    for shape in ((160, 200), (900, 700)):
        array = weights(shape)
        sample = sample_of(array)
        blank = replace(planned(array).plan, predict="full", n_columns=0, n_contexts=1)
        words = dtypes.to_words(array)
        choice = planner_full.full_choice(words, sample, blank, None, DENSE, 32.0)
        assert choice.bits == pytest.approx(bits_of(EncodeJob(*choice.finish(), words)), rel=0.002)


def test_a_thin_sample_is_part_of_the_sample_of_a_frame_and_long_rows_stay_whole():
    for n_words in (1, 127, 128, 129, 20_000, 40_000, 300_001, 2_000_000):
        sample = sample_of(np.arange(n_words, dtype=np.uint32))
        thin = sample.thin()
        assert set(thin.firsts) <= set(sample.firsts)
        assert len(thin.firsts) == len(sample.firsts) or 128 <= len(thin.firsts) < 256
        assert (sample.words == sample.positions).all()
        assert sample.n_words == n_words
        assert sample.n_sampled == sample.words.size
        assert len(sample.firsts) <= max(n_words // 128 // 8, 513)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64, np.float16])
def test_weights_get_one_context_of_few_symbols(dtype):
    plan = planned(weights((700, 600)).astype(dtype)).plan
    assert (plan.predict, plan.n_contexts, plan.is_scaled, plan.remainder) == ("full", 1, False, "planes")
    assert 16 < plan.n_symbols <= 64
    assert plan.mantissa_bits in (1, 2)


def test_what_is_fast_gives_way_where_it_costs():
    rng = np.random.default_rng(0)
    scales = np.add.outer(rng.uniform(-9, -3, 700), rng.uniform(-1, 1, 600))
    array = np.exp2(scales + rng.normal(0, 0.2, scales.shape)).astype(np.float32)
    plan = planned(array).plan
    assert plan.is_scaled
    assert plan.n_contexts > 1
    assert bits_of(planned(array)) < bits_of(planned(array.reshape(-1))) - 0.5


def test_scales_are_fitted_only_where_a_lattice_promises_something():
    rng = np.random.default_rng(0)
    dtype = dtypes.by_name("float32")
    flat = dtypes.to_words(rng.normal(0, 1, (600, 512)).astype(np.float32))
    grid = dtypes.to_words(moments((600, 512)))
    assert planner_full.split_gain(flat, dtype, 512, True) < 0.02
    assert planner_full.split_gain(flat, dtype, 256, False) < 0.02
    assert planner_full.split_gain(grid, dtype, 512, True) > 1
    assert planner_full.split_gain(grid * 0, dtype, 512, True) == 0
    narrow = dtypes.to_words(moments((3000, 9)))
    assert planner_full.split_gain(narrow, dtype, 9, True) > 0.5


def test_scales_are_means_over_what_is_not_zero():
    dtype = dtypes.by_name("float32")
    array = 2.0 ** np.add.outer(np.arange(-20, 20), np.arange(30) % 4).astype(np.float32)
    array[3] = 0
    array[5, ::2] = 0
    scales = planner_full.fit_scales(dtypes.to_words(array), dtype, 30, True)
    assert (np.diff(scales.rows[6:]) == 8).all()
    assert scales.rows[3] == np.sort(np.delete(scales.rows, 3))[19]  # the lower median of the others
    assert scales.columns is not None
    assert set(scales.columns[1::4] - scales.columns[0]) == {8}
    some = planner_full.levels(scales, 30, np.arange(1200))
    octaves = planner_full.octaves_of(dtypes.to_words(array), dtype)
    assert (np.abs(some - octaves)[array.reshape(-1) != 0] <= 9).all()


def test_contexts_of_deltas_end_where_most_words_are():
    old = weights((700, 600))
    plan = planned(stepped(old), old).plan
    assert (plan.predict, plan.n_contexts, plan.context_shift) == ("delta", 8, 0)
    exponents = np.sort(old.view(np.uint32).reshape(-1) << 1 >> 24)
    assert plan.context_base + 8 in range(int(exponents[len(exponents) * 9 // 10]), int(exponents[-1]) + 2)


def test_few_symbols_are_preferred_at_nearly_equal_cost():
    old = weights((700, 600)).astype(ml_dtypes.bfloat16)
    new = stepped(old.astype(np.float32)).astype(ml_dtypes.bfloat16)
    job = planned(new, old)
    assert job.plan.predict == "delta"
    sample = sample_of(new, old)
    assert sample.reference is not None
    counts = planner_delta.count_codes(sample.words, sample.reference, 3, 8, job.plan.context_base, 0, job.plan.dtype)
    finest, _, n_missed = planner_delta._window(counts, True)
    assert finest.shape[1] * 8 >= job.plan.n_symbols * job.plan.n_contexts
    assert n_missed * 100 < sample.words.size


def test_a_decay_is_met_to_the_last_bit():
    old = moments((500, 400))
    new = old * np.float32(0.99)
    new[::9] += old[::9] * np.float32(0.01)
    for spec in (DENSE, FAST):
        job = planned(new, old, spec)
        assert job.plan.predict == "scaled_delta"
        assert abs(job.plan.factor / (1 << 30) - float(np.float32(0.99))) < 1e-7
        assert bits_of(job) < 5


def test_factors_lie_on_a_step_about_one():
    dtype = dtypes.by_name("float32")
    old = moments((200, 300))
    new = (old * np.linspace(0.8, 1.2, 200)[:, None]).astype(np.float32)
    rows = planner_delta.fit_factors(dtypes.to_words(new), dtypes.to_words(old), 1 << 30, dtype, 300, True).rows
    assert np.abs(rows / (1 << 15) - np.linspace(0.8, 1.2, 200)).max() < 0.003
    away = rows.astype(np.int64) - (1 << 15)
    assert len(set(away // np.gcd.reduce(away))) <= 256


def test_medians_leave_zeros_out_and_take_the_lower_one():
    values = np.array([[0, 5, 0, 9], [0, 0, 0, 0], [4, 3, 2, 1], [7, 7, 0, 8]], np.uint16)
    assert planner_delta._medians(values, 1).tolist() == [5, 1 << 15, 2, 7]
    assert planner_delta._medians(values, 0).tolist() == [4, 5, 2, 8]


def test_what_a_sample_lacks_gets_a_frequency_where_patches_are_dearer():
    plan = planned(weights((100, 100))).plan
    counts = np.array([[1000, 0, 1, 0, 0, 1, 30, 500], [0, 0, 900, 800, 700, 0, 0, 0], [0] * 8], np.int64)
    smoothed = estimate.smoothed(counts, plan)
    assert (smoothed[0] > 0).all()
    assert smoothed[1].tolist() == [0, 0, 3600, 3200, 2800, 0, 0, 0]  # nothing was met once: nothing is missed
    assert not smoothed[2].any()
    whole = planned(moments((30, 40)))
    assert whole.side.tables is not None  # of a frame that is its own sample, only what it holds has one
    assert (whole.side.tables.freqs == 0).any()


def test_a_frame_that_only_looks_sparse_is_counted():
    """The sample shows few changes; most of them stand where it does not look."""
    old = weights((4000, 400))
    new = old.copy()
    sampled = np.unique(sample_of(new).positions.reshape(-1))
    hidden = np.ones(new.size, np.bool_)
    hidden[sampled] = False
    new.reshape(-1)[hidden] += 1e-4
    assert planned(new, old).plan.predict == "delta"
    few = old.copy()
    few.reshape(-1)[::3000] += 1
    assert planned(few, old).plan.predict == "sparse"


def test_all_that_is_searched_is_zero_but_not_the_frame():
    array = np.zeros(400_000, np.float32)
    array[-100:] = weights((100,))
    for spec in (DENSE, FAST):
        assert bits_of(planned(array, spec=spec)) < 0.1
        assert bits_of(planned(array, weights((400_000,)), spec)) < 0.1
