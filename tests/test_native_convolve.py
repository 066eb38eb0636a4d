"""Native convolutions with integer weights give the reference's bits: odd shapes, every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import told_by
from tricomp import native
from tricomp.native.convolve import convolve, request
from tricomp.reference import convolve as reference

pytestmark = pytest.mark.skipif(not native.is_there(), reason="no native module")

ONE, NONE = (1, 1), ((0, 0), (0, 0))
# Samples, inputs and outputs of a group, groups, picture, kernel, stride, padding, dilation.
CASES: list[tuple[Any, ...]] = [
    (3, 1, 1, 1, ONE, ONE, ONE, NONE, ONE),
    (2, 3, 5, 1, (7, 5), (3, 3), ONE, ((1, 1), (1, 1)), ONE),
    (5, 1, 32, 1, (8, 9), (3, 3), (2, 1), ((1, 0), (0, 2)), ONE),
    (9, 64, 70, 1, (4, 3), (3, 3), ONE, ((1, 1), (1, 1)), ONE),
    (1, 64, 130, 1, (9, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), ONE),
    (17, 68, 33, 1, (2, 2), (3, 3), ONE, ((1, 1), (1, 1)), ONE),
    (1, 20, 48, 1, (13, 31), ONE, ONE, NONE, ONE),
    (4, 36, 17, 1, (5, 6), ONE, (2, 3), NONE, ONE),
    (2, 8, 16, 1, (11, 11), (5, 5), (3, 2), ((2, 3), (0, 4)), ONE),
    (2, 4, 7, 1, (1, 53), (1, 9), (1, 4), ((0, 0), (4, 4)), (1, 2)),
    (1, 16, 20, 1, (10, 9), (3, 2), ONE, ((2, 2), (1, 2)), (2, 3)),
    (3, 1, 1, 19, (6, 6), (3, 3), ONE, ((1, 1), (1, 1)), ONE),
    (2, 5, 3, 3, (6, 7), (3, 3), (2, 2), ((2, 1), (1, 0)), ONE),
    (2, 16, 35, 2, (5, 5), (2, 2), ONE, NONE, (2, 2)),
    (2, 4, 6, 1, (1, 1), (3, 3), ONE, ((1, 1), (1, 1)), ONE),
    (3, 2, 4, 1, (6, 3), (2, 2), (5, 1), NONE, ONE),  # the last rows are never read
]


def arrays(case, seed=0) -> tuple[Any, Any, Any, Any]:
    """Samples of sizes of their own, codes, scales and a bias or none."""
    n, n_in, n_out, groups, picture, kernel, *_ = case
    random = np.random.default_rng(seed)
    samples = random.standard_normal((n, n_in * groups, *picture)).astype(np.float32)
    samples *= 10.0 ** random.integers(-4, 4, (n, 1, 1, 1)).astype(np.float32)
    samples[:, -1] = np.maximum(samples[:, -1], 0)
    codes = random.integers(-128, 128, (n_out * groups, n_in, *kernel), np.int8)
    scales = np.geomspace(1e-4, 1, n_out * groups).astype(np.float32)
    return samples, codes, scales, random.standard_normal(n_out * groups).astype(np.float32) if n_out % 2 else None


def made(case, samples, codes, scales, bias, is_last=(False, False, False), threads=1):
    """What native makes, as [n, out, height, width]."""
    *_, groups, _, kernel, stride, padding, dilation = case
    sizes = [
        (samples.shape[2 + i] + sum(padding[i]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    shape = (len(samples), len(codes), *sizes)
    turned = [np.ascontiguousarray(of.transpose(0, 2, 3, 1)) for of in (samples, codes)]
    out = np.full([shape[i] for i in ((0, 2, 3, 1) if is_last[1] else range(4))], np.nan, np.float32)
    asked = request(samples.shape, shape, kernel, stride, [side[0] for side in padding], dilation, groups, is_last)
    given = turned[0] if is_last[0] else samples, turned[1] if is_last[2] else codes
    convolve(asked, *given, scales, bias, out, threads)
    return out.transpose(0, 3, 1, 2) if is_last[1] else out


def check(threads=1):
    for i, case in enumerate(CASES):
        given = arrays(case, i)
        stride, padding, dilation = case[6:]
        wanted = reference.convolve(*given, stride, padding, dilation, case[3])
        assert np.isfinite(wanted).all()
        for n in range(8):
            is_last = (n & 1 == 1, n & 2 == 2, n & 4 == 4)
            assert made(case, *given, is_last, threads).tobytes() == wanted.tobytes(), (case, is_last)


@pytest.mark.parametrize("threads", [1, 3])
def test_convolutions_equal_the_references(threads):
    check(threads)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_convolutions_on_older_processors(isa):
    assert told_by(isa, "from tests.test_native_convolve import check, native; check(); print(native.isa())") == isa


@pytest.mark.parametrize("n", [1, 5, 40])
def test_work_is_shared_among_threads(n):
    case = (n, 64, 80, 1, (15, 13), (3, 3), ONE, ((1, 1), (1, 1)), ONE)
    given = arrays(case)
    wanted = reference.convolve(*given, *case[6:], 1)
    for is_last in ((False, False, False), (True, True, False)):
        assert made(case, *given, is_last, threads=3).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_samples_that_are_not_finite_stay_so(threads):
    case = (5, 36, 64, 1, (19, 17), (3, 3), ONE, ((1, 1), (1, 1)), ONE)
    samples, codes, scales, bias = arrays(case)
    samples[1, 3, 2, 1], samples[2, 35, 18, 16], samples[3, 0, 0, 0], samples[4] = np.nan, np.inf, -np.inf, 1e-38
    for is_last in ((False, False, False), (True, False, True)):
        out = made(case, samples, codes, scales, bias, is_last, threads)
        wanted = reference.convolve(samples, codes, scales, bias, *case[6:], 1)
        assert np.isnan(out[1:4]).all()
        assert np.isnan(wanted[1:4]).all()
        assert out[[0, 4]].tobytes() == wanted[[0, 4]].tobytes()
        assert (out[4] == 0).all()  # too small to be told from zeros


def test_extremes_of_codes_do_not_overflow():
    case = (2, 4096, 17, 1, (4, 4), (4, 4), ONE, NONE, ONE)
    samples = np.full((2, 4096, 4, 4), -1, np.float32)
    for code in (-128, 127):
        codes = np.full((17, 4096, 4, 4), code, np.int8)
        out = made(case, samples, codes, np.ones(17, np.float32), None)
        assert np.allclose(out, -code * (1 << 16))


WRONG = {
    "input": "inputs of another number",
    "codes": "codes of another number",
    "scales": "scales of another number",
    "bias": "a bias of another number",
    "out": "outputs of another number",
}


@pytest.mark.parametrize("what", WRONG)
def test_buffers_that_do_not_fit_are_refused(what):
    given: dict[str, Any] = {
        "input": np.zeros((2, 6, 5, 5), np.float32),
        "codes": np.zeros((4, 3, 3, 3), np.int8),
        "scales": np.zeros(4, np.float32),
        "bias": np.zeros(4, np.float32),
        "out": np.zeros((2, 4, 3, 3), np.float32),
    }
    asked = request((2, 6, 5, 5), (2, 4, 3, 3), (3, 3), ONE, (0, 0), ONE, 2, (False, False, False))
    convolve(asked, **given, threads=1)
    given[what] = given[what][..., :-1].copy()
    with pytest.raises(ValueError, match=WRONG[what]):
        convolve(asked, **given, threads=1)


@pytest.mark.parametrize(
    ("shape", "out_shape", "kernel", "stride", "groups", "why"),
    [
        ((1, 6, 5, 5), (1, 4, 3, 3), (3, 3), ONE, 4, "contradicts itself"),
        ((1, 6, 5, 5), (1, 4, 3, 3), (3, 3), ONE, 0, "contradicts itself"),
        ((1, 6, 5, 5), (1, 4, 3, 3), (3, 0), ONE, 1, "contradicts itself"),
        ((1, 6, 5, 5), (1, 4, 0, 3), (3, 3), ONE, 1, "contradicts itself"),
        ((1, 1 << 31, 5, 5), (1, 4, 3, 3), (3, 3), ONE, 1, "contradicts itself"),
        ((1, 6, 5, 5), (1, 4, 3, 3), (103, 107), ONE, 1, "rows of too many codes"),
        ((1, 6, 5, 5), (1, 4, 1 << 20, 3), (3, 3), (1 << 20, 1), 1, "samples of too many codes"),
        ((1, 6, 5, 5), (1, 4, 1 << 30, 3), (3, 3), (1 << 30, 1), 1, "contradicts itself"),
    ],
)
def test_requests_that_cannot_be_are_refused(shape, out_shape, kernel, stride, groups, why):
    nothing = np.zeros(0, np.float32)
    asked = request(shape, out_shape, kernel, stride, (0, 0), ONE, groups, (False, False, False))
    with pytest.raises(ValueError, match=why):
        convolve(asked, nothing, nothing.view(np.int8), nothing, None, nothing.copy(), 1)


def test_a_request_of_another_length_is_refused():
    nothing = np.zeros(0, np.float32)
    with pytest.raises(ValueError, match="another length"):
        convolve(b"12345678", nothing, nothing.view(np.int8), nothing, None, nothing.copy(), 1)
