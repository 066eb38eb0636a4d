"""Kernels decode what the reference encoded, to the same words; and of damaged frames they tell the same faults."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tests import damage_cases
from tests.cases import decayed, moments, stepped, weights
from tests.kernel_cases import (
    DEVICE,
    Poisoned,
    jobs_of_every_kind,
    long_row_job,
    odd_jobs,
    on_device,
    plain_jobs,
    plane_jobs,
    planned_jobs,
)
from tricomp import dtypes
from tricomp.errors import CorruptFrame, InvalidArgument, TricompError
from tricomp.job import DecodeJob, EncodeJob, Side
from tricomp.kernels.decode import DeviceDecodeJob, checksums_of, decode
from tricomp.kernels.payload import Stored, sides
from tricomp.plan import Plan, Spec
from tricomp.reference import decode as reference
from tricomp.reference import encode as encoder
from tricomp.reference import side
from tricomp.reference.frame import directory, head_bytes, places
from tricomp.reference.planner import plan_frame

FAULTS = (
    "checksum .* stored, .* computed",
    "its sections are longer than its payload",
    "its sections are shorter than its payload",
    "its row of the directory says more than that it is raw",
    "it is not raw as its plan says",
    "an index is outside the dictionary",
    "byte plane . is in an unknown mode",
    "a patch is outside the chunk",
    "its patches are not ascending",
    "its symbols do not end where an encoder begins",
    "a block shift exceeds the word",
    "a lane of its remainders has no first word",
    "its remainders do not end where an encoder begins",
    "the padding after it is not zero",
    "side section or directory is damaged",
    "its chunks end at byte",
    "longer chunk directory",
    "leaves none",
)


def read_side(plan, section, name):
    try:
        return side.read(plan, section)
    except CorruptFrame as fault:
        raise CorruptFrame(f"frame of {name!r}: {fault}.") from None


def decoded(jobs, shift=0, **options):
    """The octets of each job's words, decoded by kernels; the poison around them is left."""
    targets = [Poisoned(job.plan.dtype.word_dtype, max(job.end - job.start, 0), shift) for job in jobs]
    try:
        known = sides([Stored(job.plan, job.cut, job.name) for job in jobs], read_side)
        given = [
            DeviceDecodeJob(
                job.plan,
                one,
                job.data,
                target.tensor,
                on_device(job.reference, shift),
                job.source,
                job.name,
                job.start,
                job.stop,
                job.is_checked,
            )
            for job, one, target in zip(jobs, known, targets, strict=True)
        ]
        decode(given, DEVICE, **options).result()
    finally:
        octets = [target.octets() for target in targets]
    return octets


def outcome(decoder, jobs):
    """What comes of jobs: the octets of each, or an error's class and text. Anything else escapes."""
    try:
        return [words.tobytes() if isinstance(words, np.ndarray) else words for words in decoder(jobs)]
    except TricompError as error:
        return type(error), str(error)


def frames_of(jobs):
    """Jobs to decode what jobs to encode give."""
    return [
        DecodeJob(coded.plan, coded.data, job.reference, job.source)
        for job, coded in zip(jobs, encoder.encode(jobs), strict=True)
    ]


def assert_decodes(jobs, shift=0):
    for job, octets in zip(jobs, decoded(frames_of(jobs), shift), strict=True):
        assert octets == job.words.tobytes(), job.plan


def test_every_kind_of_kernel():
    assert_decodes(jobs_of_every_kind())


@pytest.mark.parametrize("shift", [0, 1])
def test_planned_frames(shift):
    """Full chunks by wide loads and stores, and word by word where the target or the reference does not allow these."""
    assert_decodes(list(islice(planned_jobs(), shift, None, 1 + 2 * shift)), shift)


def test_odd_sizes_and_special_words():
    assert_decodes(list(odd_jobs()))


@pytest.mark.parametrize("shift", [0, 1])
def test_predictions_without_a_coder(shift):
    assert_decodes(list(plain_jobs()), shift)


def test_a_row_that_32_bits_cannot_count():
    assert_decodes([long_row_job()])


def test_byte_planes_of_every_width():
    assert_decodes(list(plane_jobs()))


def test_large_runs_are_copied_in_pieces():
    dtype, words = dtypes.by_name("float64"), np.arange(20_000, dtype=np.uint64) << np.uint64(40)
    plan = Plan(dtype, 20_000, "constant", word=(1 << 63) + 5)
    small = Plan(dtypes.by_name("uint8"), 100_001, "constant", word=0xFE)
    assert_decodes(
        [
            EncodeJob(replace(plan, predict="copy", reference="parent", word=0), Side(), words, words),
            EncodeJob(plan, Side(), np.full(20_000, (1 << 63) + 5, np.uint64)),
            EncodeJob(small, Side(), np.full(100_001, 0xFE, np.uint8)),
        ]
    )


class Slices:
    """Bytes that are read as they are asked for."""

    def __init__(self, data):
        self.data, self.n_read = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, part):
        self.n_read += len(self.data[part])
        return self.data[part]


@pytest.mark.parametrize("predict", ["full", "scaled_delta"])
def test_parts_of_a_frame(predict):
    """Scales and reference stand where the part does; only its chunks are read."""
    old = moments((30, 97))
    new, known = (old, None) if predict == "full" else (decayed(old), dtypes.to_words(old))
    job = plan_frame(dtypes.to_words(new), known, dtypes.of(new), new.shape, Spec(chunk_log2=10))
    assert (job.plan.predict, job.plan.is_scaled) == (predict, True)
    (whole,) = frames_of([job])
    parts = []
    for start, stop in ((1024, 2048), (2048, 2910), (0, None), (1024, 1024)):
        end = len(job.words) if stop is None else stop
        before = None if known is None else known[start:end]
        parts.append(replace(whole, data=Slices(whole.data), start=start, stop=stop, reference=before))
    for part, octets in zip(parts, decoded(parts), strict=True):
        assert octets == job.words[part.start : part.end].tobytes()
    n_head = head_bytes(whole.plan)
    assert parts[0].data.n_read < len(whole.data) // 2 + 2 * n_head


def test_checksums_are_the_callers():
    """They are asked for once, of all chunks that nobody has checked; with a checked job none of its is."""
    asked = []

    def checksums(octets, begins, sizes):
        asked.append(len(begins))
        return checksums_of(octets, begins, sizes)

    one, other = frames_of([_weights(n) for n in (2100, 130)])
    damaged = bytearray(other.data)
    damaged[-3] ^= 1  # of a raw chunk
    jobs = [one, replace(other, data=bytes(damaged), is_checked=True)]
    found = decoded(jobs, checksums=checksums)
    assert asked == [3]
    assert found[0] == _weights(2100).words.tobytes()
    assert found[1] != _weights(130).words.tobytes()
    with pytest.raises(CorruptFrame, match="^chunk 0 of 'array': checksum"):
        decoded([one, replace(jobs[1], is_checked=False)], checksums=checksums)


def _weights(n_words):
    words = dtypes.to_words(weights((n_words,)))
    return plan_frame(words, None, dtypes.by_name("float32"), (n_words,), Spec(chunk_log2=10))


def test_damage():
    """Every fault that there is comes up, and is told as the reference tells it; what is none decodes alike."""
    found = defaultdict(list)
    for number, frame in enumerate(damage_cases.sound()):
        for job in damage_cases.damaged(frame, seed=number, n=12):
            expected = outcome(reference.decode, [job])
            text = "decoded" if isinstance(expected, list) else expected[1]
            kind = next((fault for fault in FAULTS if re.search(fault, text)), text.split(": ")[-1])
            found[kind].append((job, expected))
    assert set(FAULTS) <= set(found)
    tried = []
    for kind, cases in found.items():
        n = 12 if kind == "decoded" else 2
        tried += cases[:: -(-len(cases) // n)]
    assert len(tried) > 40
    for job, expected in tried:
        assert outcome(decoded, [job]) == expected, job.plan


def test_of_several_faults_the_first_is_told():
    """Heads before chunks, then chunks in order, and of one chunk what stands first."""
    one, dense, fast = frames_of([_weights(2060), *_deltas(2060)])
    n_patches = int(directory(fast.plan, fast.data)[1, 3])
    cases = [
        [_struck(dense, 1, 300), replace(one, data=one.data[:-1])],
        [_struck(dense, 1, 300), _struck(fast, 0, 523)],
        [_padded(_struck(fast, 0, 523), 0)],  # a head, behind the indices
        [_padded(_struck(fast, 1, 523), 0)],
        [_struck(_struck(dense, 0, 4), 1, 4, has_checksum=False)],
        [_struck(_struck(fast, 1, 523), 1, -4 * n_patches - 1)],  # and the last position of a patch
    ]
    texts = set()
    for case in cases:
        named = [replace(job, name=f"leaf {i}") for i, job in enumerate(case)]
        expected = outcome(reference.decode, named)
        assert outcome(decoded, named) == expected
        texts.add(expected[1] if isinstance(expected, tuple) else "")
    assert len(texts) == len(cases)


def _deltas(n_words):
    """Two deltas, one of the fast tier."""
    old = weights((n_words,))
    new = dtypes.to_words(stepped(old))
    for tier in ("dense", "fast"):
        yield plan_frame(new, dtypes.to_words(old), dtypes.of(old), old.shape, Spec(tier=tier, chunk_log2=10))


def _struck(job, chunk, at, has_checksum=True):
    """One byte of a chunk's payload turned over; has_checksum: with the right checksum for it."""
    plan, data = job.plan, bytearray(job.data)
    begins, _ = places(plan, directory(plan, job.data[: head_bytes(plan)]))
    n_bytes = int(directory(plan, job.data[: head_bytes(plan)])[chunk, 2])
    data[int(begins[chunk]) + at % n_bytes] ^= 0xFF
    if has_checksum:
        return replace(job, **dict(zip(("plan", "data"), damage_cases.with_checks(plan, data), strict=True)))
    return replace(job, data=bytes(data))


def _padded(job, chunk):
    """The padding after a chunk set to ones."""
    rows = directory(job.plan, job.data[: head_bytes(job.plan)])
    begins, _ = places(job.plan, rows)
    end = int(begins[chunk]) + int(rows[chunk, 2])
    assert end % 16
    data = bytearray(job.data)
    data[end : int(begins[chunk + 1])] = b"\1" * (int(begins[chunk + 1]) - end)
    return replace(job, data=bytes(data))


def test_tensors_that_do_not_fit_are_refused():
    (job,) = frames_of([_weights(130)])
    (known,) = sides([Stored(job.plan, job.cut, "w")], read_side)
    words = np.zeros(260, np.uint32)
    for target in (on_device(words)[:129], on_device(words)[::2], on_device(words.view(np.uint16))[:130]):
        with pytest.raises(InvalidArgument, match=r"^leaf 'w': its target should be a contiguous tensor of 130 words"):
            decode([DeviceDecodeJob(job.plan, known, job.data, target, name="w")], DEVICE)
    wanted = DeviceDecodeJob(job.plan, known, job.data, on_device(words)[:130], on_device(words), name="w")
    with pytest.raises(InvalidArgument, match="its reference should be a contiguous tensor of 130 words of 32 bits"):
        decode([wanted], DEVICE)
