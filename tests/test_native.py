"""The native backend gives the reference's bytes, words, digests and errors: for every plan, dtype, size, thread count
and instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import golden_cases
from tests.cases import special_words, told_by
from tests.test_codec import jobs_by_hand
from tricomp import dtypes, native
from tricomp.errors import CorruptFrame
from tricomp.job import DecodeJob, EncodeJob, Side
from tricomp.plan import Plan, Spec
from tricomp.reference import bits
from tricomp.reference import digest as reference_digest
from tricomp.reference import encode as reference_encode
from tricomp.reference.planner import plan_frame

pytestmark = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
if native.is_there():
    from tricomp.native import decode as native_decode
    from tricomp.native import digest as native_digest
    from tricomp.native import encode as native_encode


def assert_equal(jobs, threads=1):
    """Both backends encode jobs to the same bytes and plans, and decode these to the same words."""
    expected = reference_encode.encode(jobs)
    found = native_encode.encode([replace(job, wants_reference_sum=True) for job in jobs], threads=threads)
    for job, one, other in zip(jobs, expected, found, strict=True):
        assert one.plan == other.plan, job.plan.describe()
        assert one.n_bytes == other.n_bytes
        assert one.data == other.data, job.plan.describe()
        if other.digest_sum is not None:
            assert_sums(job, other.digest_sum, other.reference_sum)
    waiting = [
        DecodeJob(one.plan, one.data, job.reference, job.source, wants_reference_sum=True)
        for job, one in zip(jobs, expected, strict=True)
    ]
    poisoned = [np.full(len(job.words), 0xA5, job.words.dtype) for job in jobs]
    back = native_decode.decode_summed(waiting, threads, poisoned)
    for job, (words, total, reference_sum, _) in zip(jobs, back, strict=True):
        assert words.tobytes() == job.words.tobytes(), job.plan.describe()
        assert_sums(job, total, reference_sum)


def assert_sums(job, total, reference_sum):
    """The digests of a job's words, and of its reference if that has words like them."""
    assert native_digest.digest_end(total, job.words.nbytes) == reference_digest.digest(job.words)
    if job.reference is not None and job.plan.predict != "cast":
        told = native_digest.digest_end(reference_sum, job.reference.nbytes)
        assert told == reference_digest.digest(job.reference), job.plan.describe()


@pytest.mark.parametrize("threads", [1, 3])
def test_frames_of_the_golden_file(threads):
    assert_equal([job for _, job in golden_cases.jobs()], threads)


def test_every_plan_by_hand():
    assert_equal(list(jobs_by_hand()), 2)


@pytest.mark.parametrize("name", dtypes.NAMES)
@pytest.mark.parametrize("tier", ["dense", "fast"])
def test_planned_frames_of_every_dtype(name, tier):
    dtype = dtypes.by_name(name)
    jobs = []
    for n, log2 in ((1, 16), (33, 16), (129, 10), (1024, 10), (1025, 10), (5003, 11), (70_001, 16)):
        old = golden_cases.words(dtype, n, 5)
        new = golden_cases.moved(old, dtype, 6)
        spec = Spec(tier=tier, chunk_log2=log2)
        shape = (n // 100, 100) if n % 100 == 0 and n else (n,)
        for words, reference in ((new, None), (new, old), (np.resize(special_words(dtype), n), old), (old, old)):
            jobs.append(plan_frame(words, reference, dtype, shape, spec))
    assert_equal(jobs, 2)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(dtypes.NAMES),
    st.integers(1, 5000),
    st.integers(0, 2**30),
    st.sampled_from(["dense", "fast"]),
    st.booleans(),
    st.integers(10, 13),
    st.integers(1, 4),
)
def test_any_words(name, n, seed, tier, has_reference, chunk_log2, threads):
    dtype = dtypes.by_name(name)
    rng = np.random.default_rng(seed)
    kinds = [golden_cases.words(dtype, n, seed), np.resize(special_words(dtype), n), golden_cases.noise(n, seed)]
    words = kinds[seed % 3].astype(dtype.word_dtype)
    if name == "bool":
        words &= np.uint8(1)
    old = golden_cases.moved(words, dtype, seed) if has_reference else None
    n_columns = int(rng.integers(1, n + 1))
    shape = (n // n_columns, n_columns) if n % n_columns == 0 else (n,)
    assert_equal([plan_frame(words, old, dtype, shape, Spec(tier=tier, chunk_log2=chunk_log2))], threads)


def test_raw_sparse_cast_constant_and_copy_frames():
    f32, bf16 = dtypes.by_name("float32"), dtypes.by_name("bfloat16")
    wide = golden_cases.words(f32, 5000, 1)
    narrow = bits.cast(wide, f32, bf16)
    narrow[::700] ^= 1
    zeros = np.zeros(5000, np.uint32)
    zeros[::33] = 7
    side = Side()
    assert_equal(
        [
            EncodeJob(Plan(bf16, 5000, "cast", chunk_log2=11, reference="sibling"), side, narrow, wide, f32),
            EncodeJob(Plan(f32, 5000, "raw", chunk_log2=10), side, wide),
            EncodeJob(Plan(f32, 5000, "sparse", chunk_log2=10), side, zeros),
            EncodeJob(Plan(f32, 5000, "sparse", chunk_log2=12, reference="parent"), side, wide ^ (zeros << 3), wide),
            EncodeJob(Plan(f32, 5000, "constant", word=9), side, np.full(5000, 9, np.uint32)),
            EncodeJob(Plan(f32, 5000, "copy", reference="parent"), side, wide, wide),
            EncodeJob(Plan(f32, 0, "raw"), side, wide[:0]),
        ]
    )


def test_the_output_never_depends_on_threads_or_rounds(monkeypatch):
    words = golden_cases.words(dtypes.by_name("float32"), 300_001, 3)
    job = plan_frame(words, None, dtypes.by_name("float32"), (300_001,), Spec(chunk_log2=12))
    one = native_encode.encode([job, job], threads=1)
    for threads in (2, 5, 16):
        assert [each.data for each in native_encode.encode([job, job], threads=threads)] == [each.data for each in one]
    monkeypatch.setattr(native_encode, "ROUND_BYTES", 100_000)
    assert [each.data for each in native_encode.encode([job, job], threads=2)] == [each.data for each in one]


def test_parts_of_a_frame():
    words = golden_cases.words(dtypes.by_name("float32"), 40_000, 3)
    coded = reference_encode.encode(
        [plan_frame(words, None, dtypes.by_name("float32"), (200, 200), Spec(chunk_log2=11))]
    )
    plan, data = coded[0].plan, coded[0].data

    class Slices:
        def __len__(self):
            return len(data)

        def __getitem__(self, part):
            return data[part]

    for start, stop in ((0, 2048), (2048, 8192), (38_912, 40_000), (0, 40_000), (4096, 4096)):
        for given_data in (data, Slices()):
            job = DecodeJob(plan, given_data, start=start, stop=stop)
            ((found, total, *_),) = native_decode.decode_summed([job], 2)
            assert found.tobytes() == words[start:stop].tobytes()
            assert total == reference_digest.digest_sum(words[start:stop], 4 * start) if stop > start else total == 0


def test_arrays_that_are_unaligned_or_read_only():
    f32 = dtypes.by_name("float32")
    words = golden_cases.words(f32, 3000, 3)
    memory = np.zeros(4 * 3000 + 1, np.uint8)
    memory[1:] = words.view(np.uint8)
    unaligned = memory[1:].view(np.uint32)
    unaligned.flags.writeable = False
    job = plan_frame(words, None, f32, (3000,), Spec())
    expected = reference_encode.encode([job])[0].data
    assert native_encode.encode([replace(job, words=unaligned)])[0].data == expected
    spaced = np.repeat(words, 2)[::2]
    assert native_encode.encode([replace(job, words=spaced)])[0].data == expected


def test_the_module_refuses_buffers_of_wrong_sizes():
    f32 = dtypes.by_name("float32")
    words = golden_cases.words(f32, 3000, 3)
    job = plan_frame(words, None, f32, (3000,), Spec())
    coded = reference_encode.encode([job])[0]
    with pytest.raises(ValueError, match="words of another number"):
        native_encode.encode([replace(job, words=words[:-1])])
    with pytest.raises(ValueError, match="an output of another size"):
        native_decode.decode([DecodeJob(coded.plan, coded.data)], into=[np.empty(2999, np.uint32)])
    read_only = np.empty(3000, np.uint32)
    read_only.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        native_decode.decode([DecodeJob(coded.plan, coded.data)], into=[read_only])


def test_contradictory_plans_never_reach_a_stage():
    f32 = dtypes.by_name("float32")
    words = golden_cases.words(f32, 300, 3)
    for changes in ({"predict": "full"}, {"n_symbols": 3}, {"index_bits": 2}, {"n_columns": 301}, {"coded_planes": 1}):
        plan = replace(Plan(f32, 300, "raw"), **changes)
        with pytest.raises(ValueError, match="contradicts itself"):
            native_encode.encode([EncodeJob(plan, Side(), words)])


def test_a_fault_names_its_chunk_and_leaf():
    words = golden_cases.words(dtypes.by_name("float32"), 9000, 3)
    coded = reference_encode.encode([plan_frame(words, None, dtypes.by_name("float32"), (9000,), Spec(chunk_log2=11))])
    data = bytearray(coded[0].data)
    data[-5] ^= 8
    with pytest.raises(CorruptFrame, match=r"^chunk 4 of 'w/x': checksum [0-9a-f]{16} stored, [0-9a-f]{16} computed"):
        native_decode.decode([DecodeJob(coded[0].plan, bytes(data), name="w/x")], 2)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    code = (
        "from tests import test_native as t; from tricomp import native; import pytest, sys; print(native.isa());"
        "t.test_frames_of_the_golden_file(2); t.test_every_plan_by_hand(); t.test_parts_of_a_frame();"
        "t.test_raw_sparse_cast_constant_and_copy_frames();"
        "[t.test_planned_frames_of_every_dtype(n, 'dense') for n in ('float64','float32','bfloat16','int8','uint64')];"
        "t.test_planned_frames_of_every_dtype('bfloat16', 'fast')"
    )
    assert told_by(isa, code) == isa
