"""Frames encoded by kernels are those of the reference, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tests.cases import moments, stepped, weights
from tests.kernel_cases import (
    DEVICE,
    is_raw,
    jobs_of_every_kind,
    long_row_job,
    odd_jobs,
    on_device,
    plain_jobs,
    plane_jobs,
    planned_jobs,
)
from tricomp import dtypes
from tricomp.job import EncodeJob, Side
from tricomp.kernels.encode import ROUND_BYTES, DeviceJob, encode
from tricomp.plan import Plan, Spec
from tricomp.reference import encode as reference
from tricomp.reference.planner import plan_frame


def assert_equal(jobs, shift=0, round_bytes=ROUND_BYTES):
    """Directories, but for checksums, and payloads are the reference's. shift: words past where wide loads can be."""
    given = [
        DeviceJob(job.plan, job.side, on_device(job.words, shift), on_device(job.reference, shift), job.source)
        for job in jobs
    ]
    found = encode(given, DEVICE, round_bytes).result()
    for job, one, other in zip(jobs, reference.encode(jobs), found, strict=True):
        data, n_payload = one.data, len(other.payload)
        n_head = len(data) - n_payload
        assert bytes(other.payload) == data[n_head:], job.plan
        rows = np.frombuffer(data, "<u4", other.rows.size, one.plan.side_bytes).reshape(other.rows.shape)
        assert (rows[:, 2:] == other.rows[:, 2:]).all(), job.plan
        assert n_head == one.plan.side_bytes + -(-rows.nbytes // 16) * 16
        sizes = np.concatenate([part.sizes for part in other.parts]) if other.parts else rows[:, 2]
        assert (sizes == rows[:, 2]).all()
        for part in other.parts:
            ends = np.cumsum(-(-part.sizes // 16) * 16)
            assert (part.begins == np.append(0, ends[:-1])).all()


def test_every_kind_of_kernel():
    jobs = jobs_of_every_kind()
    assert not any(is_raw(job).any() for job in jobs)
    assert_equal(jobs)


def test_planned_frames():
    jobs = list(planned_jobs())
    assert {job.plan.predict for job in jobs} >= {"full", "delta", "scaled_delta", "palette"}
    assert_equal(jobs)


@pytest.mark.parametrize("shift", [0, 1])
def test_odd_sizes_and_special_words(shift):
    assert_equal(list(islice(odd_jobs(), shift, None, 1 + shift)), shift)


@pytest.mark.parametrize("shift", [0, 1])
def test_predictions_without_a_coder(shift):
    """Words at any address: a raw chunk is copied from where the words stand."""
    assert_equal(list(islice(plain_jobs(), shift, None, 1 + 2 * shift)), shift)


def test_a_row_that_32_bits_cannot_count():
    assert_equal([long_row_job()])


def test_byte_planes_of_every_width():
    assert_equal(list(plane_jobs()))


def test_remainders_that_are_zero_throughout():
    powers = 2.0 ** np.random.default_rng(0).integers(-300, 300, 700)
    job = plan_frame(powers.view(np.uint64), None, dtypes.by_name("float64"), (700,), Spec(chunk_log2=10))
    assert job.plan.remainder == "planes"
    assert job.plan.plane_widths == ()
    assert_equal([job])


def test_small_leaves_in_one_frame():
    parts = [moments((300,), seed).reshape(-1).view(np.uint32) for seed in range(4)]
    job = plan_frame(np.concatenate(parts), None, dtypes.by_name("float32"), None, Spec(chunk_log2=10))
    assert_equal([job])


def test_rounds_that_scratch_memory_divides():
    """What is coded at a time does not change a byte: chunks one by one, and frames cut anywhere."""
    words = dtypes.to_words(weights((30, 90)))
    dtype = dtypes.by_name("float32")
    noise = np.random.default_rng(0).integers(0, 1 << 32, 2100, np.uint32)
    jobs = [
        plan_frame(words, None, dtype, (30, 90), Spec(chunk_log2=10)),
        EncodeJob(Plan(dtype, 2100, "raw", chunk_log2=10), Side(), noise),
        plan_frame(words[:700], None, dtype, (700,), Spec(chunk_log2=10)),
    ]
    for round_bytes in (1, 40_000):
        assert_equal(jobs, round_bytes=round_bytes)


def test_the_reference_may_stand_elsewhere():
    """Wide loads need both at a multiple of 8 bytes."""
    old = weights((1300,))
    new = stepped(old)
    plan, side = _planned(new, old)
    whole = reference.encode([EncodeJob(plan, side, dtypes.to_words(new), dtypes.to_words(old))])[0].data
    for shifts in ((0, 1), (1, 0)):
        words, reference_words = (
            on_device(dtypes.to_words(array), shift) for array, shift in zip((new, old), shifts, strict=True)
        )
        found = encode([DeviceJob(plan, side, words, reference_words)], DEVICE).result()[0]
        assert whole.endswith(bytes(found.payload))


def _planned(new, old):
    job = plan_frame(dtypes.to_words(new), dtypes.to_words(old), dtypes.of(new), new.shape, Spec(chunk_log2=10))
    assert job.plan.predict == "delta"
    return replace(job.plan), job.side
