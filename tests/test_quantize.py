"""Arrays as integers and scales: the reference against the definition in plain Python, bad input, packing."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import weights
from tricomp.errors import InvalidArgument, UnsupportedDtype
from tricomp.integers import Quantized, dequantize, pack_int4, quantize, unpack_int4

FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}
F = np.float32
WIDE = (64, 63, 62, 61, 60, 59, 58, 56, 54, 52, 50, 48, 44, 40, 36, 32)
NARROW = (64, 60, 56, 52, 48, 44, 41, 38, 35, 32, 29, 26, 23, 20, 18, 16)
MOST = {8: 127, 7: 63, 6: 31, 5: 15, 4: 7}


def nearest_even(x: float) -> int:
    return round(x)  # as Python has it


def plain(group: list[Any], bits: int, scale_dtype: str, clip: bool) -> tuple[list[int], float]:
    """Codes and scale of one group, straight from the definition, one number at a time."""
    most, grid = MOST[bits], WIDE if bits >= 6 else NARROW
    top = F(max([abs(F(x)) for x in group], default=F(0))) / F(most)
    found = None
    for candidate in grid if clip else grid[:1]:
        scale = max(F(top * F(candidate / 64)), F(2.0**-112))
        scale = F(scale.astype(ml_dtypes.bfloat16)) if scale_dtype == "bfloat16" else scale
        inverse, error = F(F(1) / scale), 0
        for x in group:
            parts = abs(nearest_even(float(F(F(x) * F(inverse * F(64))))))
            error += (parts - 64 * min((parts + 32) // 64, most)) ** 2
        if found is None or error * (float(scale) * float(scale)) < found[0]:
            codes = [max(-most, min(most, nearest_even(float(F(F(x) * inverse))))) for x in group]
            found = error * (float(scale) * float(scale)), codes, scale
    assert found is not None
    return found[1], float(found[2])


def check_against_plain(array, bits, group, scale_dtype, clip):
    found = quantize(array, bits, group=group, scale_dtype=scale_dtype, clip=clip, backend="reference")
    rows = array.reshape(array.shape[0], -1)
    each = group or max(rows.shape[1], 1)
    n_groups = max(-(-rows.shape[1] // each), 1)
    codes, scales = [], []
    for row in rows:
        for i in range(n_groups):
            some = plain(list(row[i * each : (i + 1) * each]), bits, scale_dtype, clip)
            codes += some[0]
            scales.append(some[1])
    assert found.codes.dtype == np.int8
    assert found.codes.shape == array.shape
    assert found.codes.ravel().tolist() == codes
    assert found.scales.dtype.name == scale_dtype
    assert found.scales.shape == ((len(rows),) if group is None else (len(rows), n_groups))
    assert found.scales.astype(np.float64).ravel().tolist() == scales
    return found


@pytest.mark.parametrize(("bits", "scale_dtype"), [(8, "float32"), (7, "bfloat16"), (5, "float32"), (4, "bfloat16")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "group"), [((5, 33), None), ((3, 67), 16), ((2, 3, 3, 3), 32), ((3, 7), 64), ((9,), None)]
)
def test_reference_is_the_definition(dtype, bits, shape, group, scale_dtype):
    array = weights(shape, seed=bits).astype(FLOATS[dtype])
    array[0] = 0
    for clip in (True, False):
        check_against_plain(array, bits, group, scale_dtype, clip)


@given(data=st.data(), bits=st.sampled_from(list(MOST)), scale_dtype=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=60, deadline=None)
def test_any_finite_floats(data, bits, scale_dtype):
    n = data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    width: Any = {"float32": 32, "float16": 16}[dtype]
    floats = st.floats(width=width, allow_nan=False, allow_infinity=False)
    array = np.array(data.draw(st.lists(floats, min_size=2 * n, max_size=2 * n)), FLOATS[dtype]).reshape(2, n)
    found = check_against_plain(array, bits, data.draw(st.sampled_from([None, 16])), scale_dtype, True)
    back = dequantize(found)
    assert np.isfinite(back.astype(np.float64)).all()
    assert not np.signbit(back[found.codes == 0]).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_the_ends_of_the_range(bits, scale_dtype):
    largest, least = np.finfo(F).max, np.finfo(F).smallest_subnormal
    array = np.array(
        [[largest, -largest, 1, -0.0], [least, -least, 0, 1e-38], [1e-30, -2e-31, least, 0], [-0.0, 0, 0, 0]], F
    )
    found = check_against_plain(array, bits, None, scale_dtype, True)
    assert (found.codes[1] == 0).all()
    back = dequantize(found)
    assert np.isfinite(back).all()
    assert back[0, 0] > 0.99 * float(largest)
    for name in ("bfloat16", "float16"):
        ends = np.full((1, 3), ml_dtypes.finfo(FLOATS[name]).max, FLOATS[name])
        assert np.isfinite(dequantize(quantize(ends, bits, scale_dtype=scale_dtype)).astype(F)).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0,), (3, 0, 2)])
@pytest.mark.parametrize("group", [None, 16])
def test_empty_arrays(shape, group):
    found = quantize(np.zeros(shape, F), group=group)
    assert found.codes.shape == shape
    assert found.scales.shape == ((shape[0],) if group is None else (shape[0], 1))
    back = dequantize(found)
    assert (back.shape, back.dtype) == (shape, F)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_code_times_scale(dtype):
    array = weights((7, 50)).astype(FLOATS[dtype])
    for group in (None, 16):
        found = quantize(array, group=group, scale_dtype="bfloat16")
        scales = np.repeat(found.scales.astype(F).reshape(7, -1), group or 50, axis=1)[:, :50]
        expected = (found.codes.astype(F) * scales).astype(FLOATS[dtype])
        back = dequantize(found)
        assert back.dtype == expected.dtype
        assert back.tobytes() == expected.tobytes()


def test_views_and_other_byte_orders_give_the_same():
    array = weights((12, 40))
    expected = quantize(array)
    wide = np.zeros((12, 80), F)
    wide[:, ::2] = array
    for same in (wide[:, ::2], array.astype(">f4"), np.asfortranarray(array)):
        found = quantize(same)
        assert found.codes.tobytes() == expected.codes.tobytes()
        assert found.scales.tobytes() == expected.scales.tobytes()
    assert dequantize(Quantized(np.asfortranarray(expected.codes), expected.scales, 8, None, "float32")).tobytes() == (
        dequantize(expected).tobytes()
    )


def test_the_search_makes_the_error_smaller():
    array = weights((64, 256))
    for bits, group in ((4, None), (4, 32), (8, None)):
        errors = [
            np.square(dequantize(quantize(array, bits, group=group, clip=clip)) - array).sum(axis=1)
            for clip in (True, False)
        ]
        assert (errors[0] <= errors[1] * 1.001).all()
        assert errors[0].sum() < (0.8 if (bits, group) == (4, None) else 1.0) * errors[1].sum()


def test_what_is_not_finite_is_refused_and_told():
    array = weights((5, 9))
    array[3, 2], array[4, :2] = np.nan, np.inf
    with pytest.raises(
        InvalidArgument,
        match=r"leaf 'h\.0\.w': 3 of its 45 elements are infinite or NaN, in 2 of 5 rows, "
        r"the first in row 3.*Leave this leaf in floats",
    ):
        quantize(array, leaf="h.0.w")
    with pytest.raises(InvalidArgument, match=r"1 of its 2 elements is infinite, NaN or too large for float32"):
        quantize(np.array([[1.0, 1e300]]))


@pytest.mark.parametrize(
    ("array", "options", "error", "text"),
    [
        (np.zeros((2, 2), np.int32), {}, UnsupportedDtype, "int32 is not quantised"),
        (np.zeros((), F), {}, InvalidArgument, "single number"),
        ([[1.0]], {}, InvalidArgument, "expected a numpy array, got list"),
        (np.zeros((2, 2), F), {"bits": 3}, InvalidArgument, "expected 8 or 4 bits .*, got 3"),
        (np.zeros((2, 2), F), {"bits": True}, InvalidArgument, "expected 8 or 4 bits"),
        (np.zeros((2, 2), F), {"group": 24}, InvalidArgument, "multiple of 16 elements, or None.*got 24"),
        (np.zeros((2, 2), F), {"group": 0}, InvalidArgument, "multiple of 16"),
        (np.zeros((2, 2), F), {"scale_dtype": "float16"}, InvalidArgument, "or bfloat16, got 'float16'"),
    ],
)  # fmt: skip
def test_bad_arguments(array, options, error, text):
    with pytest.raises(error, match=text):
        quantize(array, **options)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"codes": np.zeros((2, 3), np.int16)}, "expected int8 codes"),
        ({"scales": np.ones(3, F)}, r"codes \[2, 3\], group None: expected scales \[2\], got \[3\]"),
        ({"group": 16}, r"expected scales \[2, 1\]"),
        ({"scales": np.ones(2, np.float64)}, "expected scales of float32 or bfloat16, got 'float64'"),
        ({"dtype": "int8"}, "dtype 'int8': expected one of float32"),
        ({"bits": 2}, "expected 8 or 4 bits"),
    ],
)
def test_parts_that_do_not_fit(fields, text):
    parts = {"codes": np.zeros((2, 3), np.int8), "scales": np.ones(2, F), "bits": 8, "group": None, "dtype": "float32"}
    with pytest.raises(InvalidArgument, match=text):
        Quantized(**{**parts, **fields})


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 8), (2, 3, 7), (4, 0)])
def test_packing_is_two_codes_a_byte_low_first(shape):
    codes = (np.arange(math.prod(shape)) % 16 - 8).astype(np.int8).reshape(shape)
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert unpack_int4(packed, shape[-1]).tobytes() == codes.tobytes()
    if shape == (5,):
        assert packed.tolist() == [0x98, 0xBA, 0x0C]


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(InvalidArgument, match="codes from -9 to 8 do not fit 4 bits"):
        pack_int4(np.array([-9, 8], np.int8))
    with pytest.raises(InvalidArgument, match="expected int8 codes"):
        pack_int4(np.zeros(3, np.int32))
    with pytest.raises(InvalidArgument, match=r"3 codes are packed as uint8\[..., 2\], got uint8\[3\]"):
        unpack_int4(np.zeros(3, np.uint8), 3)


PINNED = {
    ("float32", 8, None, "float32"): "cf6cf9d3805d8b45",
    ("float32", 4, 32, "bfloat16"): "fbbe16d2c7fe5a8f",
    ("bfloat16", 8, None, "bfloat16"): "200a107e3b4f0031",
    ("float16", 4, None, "float32"): "0210f5c7b676c1db",
    ("float64", 6, 64, "float32"): "4653fff76cff23df",
}


@pytest.mark.parametrize("options", PINNED)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_codes_never_change(options, backend):
    """They are part of what files hold: who quantises again must get the same."""
    dtype, bits, group, scale_dtype = options
    numbers = np.arange(40 * 300, dtype=np.uint64)
    numbers = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # 24 bits, well spread
    values = (numbers.astype(np.float64) / (1 << 23) - 1) ** 3 / 16  # exact to 2^-53, many small, few large
    found = quantize(
        values.astype(FLOATS[dtype]).reshape(40, 300), bits, group=group, scale_dtype=scale_dtype, backend=backend
    )
    assert hashlib.sha256(found.codes.tobytes() + found.scales.tobytes()).hexdigest()[:16] == PINNED[options]
