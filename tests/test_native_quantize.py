"""The native codes and scales against the reference's, for every instruction set that this machine has."""

from __future__ import annotations

import importlib.util
import math
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import weights
from tricomp import dtypes, native
from tricomp.integers import quantize as quantize_array
from tricomp.reference import quantize as reference

pytestmark = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
if native.is_there():
    from tricomp.native import quantize as backend

FLOATS = ("float32", "bfloat16", "float16", "float64")
SCALES = ("float32", "bfloat16")
F = np.float32


@pytest.fixture(scope="module", params=["avx512", "avx2", "portable"])
def core(request, tmp_path_factory):
    """The module with one instruction set: it chooses when it is loaded, and each copy of it is another."""
    path = tmp_path_factory.mktemp(request.param) / "_core.abi3.so"
    shutil.copy(native.load().__file__, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRICOMP_ISA", request.param)
        spec = importlib.util.spec_from_file_location("_core", path)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            pytest.skip(str(error))
        patch.setattr(native, "load", lambda: module)
        yield module


def check(array: Any, bits: int, group: int, scale: str, is_clipped: bool, threads: int = 1) -> None:
    """Codes, scales and floats again are those of the reference, in memory that held other things."""
    dtype, kind = dtypes.of(array), dtypes.by_name(scale)
    rows = dtypes.to_words(array).reshape(len(array), math.prod(array.shape[1:]))
    codes, scales, counts = backend.quantize(rows, dtype, bits, group, kind, is_clipped, threads)
    expected = reference.quantize(rows, dtype, bits, group, kind, is_clipped)
    assert counts.tolist() == expected[2].tolist()
    if counts.any():
        return
    assert (codes.dtype, scales.dtype) == (expected[0].dtype, expected[1].dtype)
    assert codes.shape == expected[0].shape
    assert scales.shape == expected[1].shape
    assert scales.tobytes() == expected[1].tobytes()
    assert codes.tobytes() == expected[0].tobytes()
    for back in FLOATS:
        words = backend.dequantize(codes, scales, group, kind, dtypes.by_name(back), threads)
        assert words.tobytes() == reference.dequantize(codes, scales, group, kind, dtypes.by_name(back)).tobytes()


def floats(shape, dtype, seed):
    """Weights with rows of very different size, outliers, and a few zeros."""
    rng = np.random.default_rng(seed)
    array = weights(shape, seed) * rng.choice(np.array([1e-37, 1e-4, 1, 300], F), (shape[0], *[1] * (len(shape) - 1)))
    array[rng.random(shape) < 0.03] *= 9
    array[rng.random(shape) < 0.03] = 0
    return array.astype(dtypes.by_name(dtype).numpy)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_codes_of_the_reference(core, dtype):
    shapes = [(3, 1), (4, 7), (2, 3, 31), (3, 511), (2, 512), (2, 513), (1, 33_001), (67, 64), (0, 5), (4, 0), (300,)]
    for seed, shape in enumerate(shapes):
        array = floats(shape, dtype, seed)
        for bits in (8, 4):
            for group in (16, 32, 128, 1 << 40):
                for scale in SCALES:
                    check(array, bits, group, scale, is_clipped=True, threads=1 + seed % 3)
            check(array, bits, 48, "float32", is_clipped=False)
        check(array, 5 + seed % 3, 48, "float32", is_clipped=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits(core, dtype):
    words = np.arange(1 << 16, dtype=np.uint16)
    numbers = words.view(dtypes.by_name(dtype).numpy)
    finite = numbers[np.isfinite(numbers.astype(F))]
    for array in (finite[:, None], finite[None], finite.reshape(-1, 64)):
        for scale in SCALES:
            check(array, 4, 32, scale, is_clipped=True)
    check(numbers[:, None], 8, 1 << 40, "float32", is_clipped=True)  # counts what is not finite, row by row


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_counted(core, dtype):
    array = floats((40, 700), dtype, 3)
    rng = np.random.default_rng(0)
    array[rng.integers(0, 40, 9), rng.integers(0, 700, 9)] = np.inf
    array[7, 3:600] = np.nan
    if dtype == "float64":
        array[11, 2] = 3.5e38
    check(array, 8, 64, "float32", is_clipped=True, threads=2)


@given(
    data=st.data(),
    dtype=st.sampled_from(["float32", "float64"]),
    scale=st.sampled_from(SCALES),
    bits=st.sampled_from([8, 7, 6, 5, 4]),
)
@settings(max_examples=60, deadline=None)
def test_any_words(data, dtype, scale, bits):
    n = data.draw(st.integers(1, 70))
    width = 8 * dtypes.by_name(dtype).numpy.itemsize
    words = data.draw(st.lists(st.integers(0, (1 << width) - 1), min_size=2 * n, max_size=2 * n))
    array = np.array(words, np.uint64).astype(f"<u{width // 8}").view(dtypes.by_name(dtype).numpy).reshape(2, n)
    check(np.where(np.isfinite(array), array, 0), bits, 16, scale, is_clipped=True)
    check(array, bits, 16, scale, is_clipped=True)


def test_flushing_subnormals_changes_nothing(core):
    """Some libraries set their threads to take subnormal floats for zeros."""
    torch = pytest.importorskip("torch")
    array = np.concatenate([floats((8, 100), "float32", 1), np.full((2, 100), 1e-39, F), np.full((1, 100), 3e38, F)])
    array[:, :9] = np.array([1e-45, 1e-39, -1e-38, 1.1e-38, 0, -0.0, 2e-38, 1e-34, 1e-30], F)
    halves = np.arange(1 << 14, dtype=np.uint16).view(np.float16).reshape(-1, 128)
    given: list[Any] = [array, halves]
    expected = [quantize_array(each, bits=4, group=32, backend="reference") for each in given]
    torch.set_flush_denormal(True)
    try:
        for each, one in zip(given, expected):
            rows = dtypes.to_words(each).reshape(len(each), -1)
            kind = dtypes.by_name("float32")
            codes, scales, _ = backend.quantize(rows, dtypes.of(each), 4, 32, kind, True, 1)
            assert codes.tobytes() == one.codes.tobytes()
            assert scales.tobytes() == one.scales.tobytes()
            words = backend.dequantize(codes, scales, 32, kind, dtypes.by_name("float16"), 1)
    finally:
        torch.set_flush_denormal(False)
    assert words.tobytes() == reference.dequantize(codes, scales, 32, kind, dtypes.by_name("float16")).tobytes()


def test_buffers_of_other_sizes_are_refused(core):
    request = backend._request((3, 40), 16, dtypes.by_name("float32"), dtypes.by_name("bfloat16"))
    right: list[Any] = [np.zeros(120, F), np.zeros(120, np.int8), np.zeros(9, np.uint16), np.zeros(3, np.int64)]
    assert core.quantize(request, *right, 1) is True
    for i, what in enumerate(("words", "codes", "scales", "counts")):
        wrong = [array[:-1] if i == j else array for j, array in enumerate(right)]
        with pytest.raises(ValueError, match=f"{what} of another number"):
            core.quantize(request, *wrong, 1)
        if i < 3:
            with pytest.raises(ValueError, match=f"{what} of another number"):
                core.dequantize(request, wrong[1], wrong[2], wrong[0], 1)
    with pytest.raises(ValueError, match="a request of another length"):
        core.quantize(request[:-1], *right, 1)
    for at, value in ((16, 0), (24, 4), (32, 2), (40, 9), (0, 1 << 50)):
        odd = bytearray(request)
        odd[at : at + 8] = value.to_bytes(8, "little")
        with pytest.raises(ValueError, match="a request that contradicts itself"):
            core.quantize(bytes(odd), *right, 1)


def test_bfloat16_numbers_come_through_ml_dtypes():
    array = floats((5, 64), "bfloat16", 8)
    assert array.dtype == ml_dtypes.bfloat16
    assert quantize_array(array, backend="native").codes.tobytes() == quantize_array(array).codes.tobytes()
