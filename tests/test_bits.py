"""Bit fields, casts and rounding against plain Python integers and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cases import special_words
from tricomp import dtypes
from tricomp.reference import bits

FLOATS = [name for name in dtypes.NAMES if dtypes.by_name(name).is_float]
PAIRS = [
    ("float64", "float32"),
    ("float64", "bfloat16"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
]
SIGNED = {16: (np.int16, torch.int16), 32: (np.int32, torch.int32), 64: (np.int64, torch.int64)}


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bit_length_and_trailing_zeros(width):
    rng = np.random.default_rng(width)
    words = rng.integers(0, 2**width, 2000, dtype=f"u{width // 8}")
    words >>= rng.integers(0, width, 2000).astype(words.dtype)
    words[:3] = 0, 1, 2**width - 1
    assert bits.bit_length(words).tolist() == [int(word).bit_length() for word in words]
    expected = [(int(word) & -int(word)).bit_length() - 1 if word else width for word in words]
    assert bits.trailing_zeros(words).tolist() == expected


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_ordered_keeps_order_and_inverts(name):
    dtype = dtypes.by_name(name)
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**dtype.word_bits, 500, dtype=dtype.word_dtype.type)
    words = np.concatenate([words, special_words(dtype)])
    assert np.array_equal(bits.unordered(bits.ordered(words, dtype), dtype), words)
    if dtype.words_per_element == 1 and not name.endswith("fnuz"):  # there the word of -0 is NaN
        with np.errstate(invalid="ignore"):
            values = words.view(dtype.numpy).astype(np.float64 if dtype.is_float else object)
        for a, b in zip(range(0, 500, 2), range(1, 500, 2)):
            if values[a] < values[b]:
                assert bits.ordered(words, dtype)[a] < bits.ordered(words, dtype)[b]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_cast_equals_torch(source, target):
    a, b = dtypes.by_name(source), dtypes.by_name(target)
    rng = np.random.default_rng(5)
    spread = rng.standard_normal(50_000) * 10.0 ** rng.integers(-45, 38, 50_000)
    with np.errstate(all="ignore"):
        words = spread.astype(a.numpy).view(a.word_dtype)
    words = np.concatenate([words, rng.integers(0, 2**a.word_bits, 50_000, dtype=a.word_dtype.type), special_words(a)])
    tensor = torch.from_numpy(words.view(SIGNED[a.word_bits][0])).view(getattr(torch, source))
    rounded = tensor.to(getattr(torch, target)).view(SIGNED[b.word_bits][1]).numpy().view(b.word_dtype)
    is_number = ~torch.isnan(tensor).numpy()  # payloads of NaNs differ between libraries
    cast = bits.cast(words, a, b)
    assert np.array_equal(cast[is_number], rounded[is_number])
    field = (cast[~is_number] >> b.mantissa_bits) & (2**b.exponent_bits - 1)
    assert (field == 2**b.exponent_bits - 1).all()
    assert (cast[~is_number] & (2**b.mantissa_bits - 1) != 0).all()


@pytest.mark.parametrize("name", FLOATS)
def test_round_mantissa_keeps_the_bound(name):
    dtype = dtypes.by_name(name)
    rng = np.random.default_rng(7)
    words = rng.integers(0, 2**dtype.word_bits, 4000, dtype=dtype.word_dtype.type)
    words = np.concatenate([words, special_words(dtype)])
    for kept in range(dtype.mantissa_bits):
        rounded = bits.round_mantissa(words, dtype, kept)
        field = bits.magnitude(words, dtype) >> dtype.mantissa_bits
        is_normal = (field > 0) & (field < (1 << dtype.exponent_bits) - 1)
        with np.errstate(all="ignore"):
            old = words.view(dtype.numpy).astype(np.complex128).view(np.float64)[::2]
            new = rounded.view(dtype.numpy).astype(np.complex128).view(np.float64)[::2]
        assert np.array_equal(np.isnan(old), np.isnan(new))
        if dtype.words_per_element == 1:
            old, new = old[is_normal], new[is_normal]
            assert (np.abs(new - old) <= np.abs(old) * 2.0 ** -(kept + 1)).all()
        is_special = bits.magnitude(words, dtype) > bits._largest_finite(dtype)
        assert np.array_equal(rounded[is_special], words[is_special])
        assert not (bits.magnitude(rounded, dtype) > bits._largest_finite(dtype))[~is_special].any()
        assert np.array_equal(bits.round_mantissa(rounded, dtype, kept), rounded)
    assert np.array_equal(bits.round_mantissa(words, dtype, dtype.mantissa_bits), words)
