"""Codes and scales of the kernels are the reference's; and they compile, without fused steps, for every target."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases import weights
from tests.kernel_cases import DEVICE, on_device
from tests.kernel_code import measure_all
from tests.kernel_variants import TARGETS, variants
from tricomp import dtypes
from tricomp.errors import BackendError, InvalidArgument
from tricomp.integers import dequantize, dequantize_on_device, quantize, quantize_on_device
from tricomp.kernels import quantize as kernels
from tricomp.kernels.device import IS_INTERPRETED
from tricomp.layout import DeviceArray
from tricomp.reference import quantize as reference

FLOATS = ("float32", "bfloat16", "float16", "float64")
SCALES = ("float32", "bfloat16")
F = np.float32


def floats(shape, dtype, seed):
    """Weights with rows of very different size, outliers, zeros, and subnormal numbers."""
    rng = np.random.default_rng(seed)
    array = weights(shape, seed) * rng.choice(np.array([1e-37, 1e-4, 1, 300], F), (shape[0], *[1] * (len(shape) - 1)))
    array[rng.random(shape) < 0.03] *= 9
    array[rng.random(shape) < 0.03] = 0
    return array.astype(dtypes.by_name(dtype).numpy)


def check(array, bits, group, scale, is_clipped=True):
    """Codes, scales, counts and floats again, in memory that held other things."""
    dtype, kind = dtypes.of(array), dtypes.by_name(scale)
    rows = dtypes.to_words(array).reshape(array.shape)
    expected = reference.quantize(rows, dtype, bits, group, kind, is_clipped)
    given = on_device(rows.reshape(-1)).view(array.shape)
    with DEVICE.running():
        found = kernels.quantize(given, dtype, bits, group, kind, is_clipped, DEVICE)
    assert found[2].cpu().tolist() == expected[2].tolist()
    if expected[2].any():
        return
    assert found[1].cpu().numpy().view(kind.word_dtype).tobytes() == expected[1].tobytes(), (dtype.name, bits, group)
    assert found[0].cpu().numpy().tobytes() == expected[0].tobytes(), (dtype.name, bits, group)
    with DEVICE.running():
        back = kernels.dequantize(found[0], found[1], group, kind, dtype, DEVICE)
    assert back.cpu().numpy().tobytes() == reference.dequantize(*expected[:2], group, kind, dtype).tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_codes_of_the_reference(dtype, bits):
    """Many groups a program, one of them, parts of one; the last of a row short."""
    scale = SCALES[(bits == 4) ^ (dtype == "float32")]
    for seed, (shape, group) in enumerate((((37, 100), 16), ((5, 301), 128), ((2, 3001), 1 << 40), ((70, 1), 1 << 40))):
        check(floats(shape, dtype, seed), bits, group, scale)


def test_few_bits_empty_arrays_and_no_search():
    check(floats((9, 70), "float32", 1), 5, 32, "float32")
    check(floats((9, 70), "bfloat16", 2), 7, 1 << 40, "bfloat16")
    check(floats((9, 2100), "float32", 3), 8, 1 << 40, "float32", is_clipped=False)
    for shape in ((0, 5), (4, 0)):
        check(np.zeros(shape, F), 8, 16, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits(dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtypes.by_name(dtype).numpy)
    finite = numbers[np.isfinite(numbers.astype(F)) & (np.abs(numbers.astype(F)) < 1e38)]
    check(finite[: len(finite) // 64 * 64].reshape(-1, 64), 4, 1 << 40, "float32")
    check(numbers[:, None], 8, 1 << 40, "float32")  # counts what is not finite


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_counted(dtype):
    array = floats((11, 2500), dtype, 3)
    array[np.arange(11), np.arange(11) * 200] = np.inf
    array[7, 3:600] = np.nan
    if dtype == "float64":
        array[2, 2:5] = [3.5e38, -3.4028235677973366e38, 3.4028235677973362e38]
    check(array, 8, 64, "float32")


def on_card(array):
    words = dtypes.to_words(array)
    return DeviceArray(dtypes.of(array), array.shape, on_device(words))


def test_public_functions_give_what_those_of_the_host_give():
    array = floats((6, 5, 30), "bfloat16", 1)
    expected = quantize(array, 4, group=64, scale_dtype="bfloat16")
    codes, scales = quantize_on_device(on_card(array), 4, group=64, scale_dtype="bfloat16", backend="triton")
    assert (codes.shape, codes.dtype.name, scales.shape, scales.dtype.name) == ((6, 5, 30), "int8", (6, 3), "bfloat16")
    assert codes.words.cpu().numpy().tobytes() == expected.codes.tobytes()
    assert scales.words.cpu().numpy().tobytes() == expected.scales.tobytes()
    back = dequantize_on_device(codes, scales, 64, "bfloat16", backend="triton")
    assert back.shape == array.shape
    assert back.words.cpu().numpy().tobytes() == dequantize(expected).tobytes()
    same = quantize(array, 4, group=64, scale_dtype="bfloat16", backend="triton")
    assert same.codes.tobytes() == expected.codes.tobytes()
    assert same.scales.tobytes() == expected.scales.tobytes()
    assert dequantize(same, backend="triton").tobytes() == dequantize(expected).tobytes()


def test_public_functions_refuse():
    array = floats((3, 40), "float32", 1)
    with pytest.raises(InvalidArgument, match=r"leaf 'w': expected floats \[out, ...\], got int32\[3\]"):
        quantize_on_device(on_card(np.zeros(3, np.int32)), leaf="w")
    array[1, 4] = np.nan
    with pytest.raises(
        InvalidArgument, match="1 of its 120 elements is infinite or NaN, in 1 of 3 rows, the first in row 1"
    ):
        quantize_on_device(on_card(array), backend="triton")
    codes, scales = on_card(np.zeros((3, 40), np.int8)), on_card(np.ones((3, 2), F))
    with pytest.raises(InvalidArgument, match=r"got int8\[3, 40\] and \[3, 2\], group 16"):
        dequantize_on_device(codes, scales, 16, "float32")
    with pytest.raises(BackendError, match="nothing decodes on"):
        dequantize_on_device(codes, on_card(np.ones((3, 3), F)), 16, "float32", backend="native")


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU compiles them itself")
def test_kernels_compile_for_every_target(tmp_path):
    names = [name for name, variant in variants().items() if variant.module == "quantize_kernel"]
    tasks = [(name, target) for i, name in enumerate(names) for target in TARGETS if i < 4 or target == "sm_90"]
    rows = measure_all(tasks, 1, tmp_path)
    assert {(row["variant"], row["target"]): row["error"] for row in rows if "error" in row} == {}
    assert {(row["variant"], row["target"]): row["spilt_bytes"] for row in rows if row["spilt_bytes"]} == {}
    found = [path.read_text() for path in tmp_path.rglob("*.ptx")]
    assert len(found) == sum(target.startswith("sm") for _, target in tasks)
    assert not any(
        "fma.rn.f32" in text or ".ftz" in text or "div.full" in text or "div.approx" in text for text in found
    )
