"""Words with the structure of training state, for every dtype. And one thing that tests share: to run
on one instruction set. Imports numpy, pytest and tricomp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tricomp import dtypes

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).resolve().parents[1]
ODD_SIZES = (0, 1, 31, 32, 33, 127, 128, 129, 1000)


def special_words(dtype: dtypes.DType) -> Array:
    """Zeros of both signs, subnormals, infinities, NaNs with payloads, the extremes, all ones."""
    width = dtype.word_bits
    top, inf = 1 << (width - 1), ((1 << dtype.exponent_bits) - 1) << dtype.mantissa_bits
    words = [0, top, 1, 2, top + 1, inf, inf | top, inf + 1, inf | top | 1, inf - 1, (1 << width) - 1, top - 1, 5, 77]
    return np.array([word % (1 << width) for word in words], np.uint64).astype(dtype.word_dtype)


def moments(shape: tuple[int, ...], seed: int = 0, zero_share: float = 0.0) -> Array:
    """Like Adam's second moment: positive, row scale times column scale times a skewed spread; float32."""
    rng = np.random.default_rng(seed)
    n_rows = shape[0] if shape else 1
    grid = rng.gamma(0.6, 1.0, shape) * 10.0 ** rng.uniform(-9, -4, (n_rows, *[1] * (len(shape) - 1)))
    if len(shape) > 1:
        grid = grid * 10.0 ** rng.uniform(-1, 1, shape[-1])
    grid = np.where(rng.random(shape) < zero_share, 0, grid)
    return np.asarray(grid, np.float32)


def weights(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Like a layer's weights: Laplace-distributed around zero, rows of different scale; float32."""
    rng = np.random.default_rng(seed)
    n_rows = shape[0] if shape else 1
    scale = rng.uniform(0.5, 2.0, (n_rows, *[1] * (len(shape) - 1)))
    return (rng.laplace(0, 0.02, shape) * scale).astype(np.float32)


def stepped(old: Array, seed: int = 1, rate: float = 1e-4, still_share: float = 0.3) -> Array:
    """The same weights some steps later: changes of one absolute size, part of the words unchanged."""
    rng = np.random.default_rng(seed)
    change = rng.laplace(0, rate, old.shape) * (rng.random(old.shape) > still_share)
    return (old.astype(np.float64) + change).astype(old.dtype)


def decayed(old: Array, seed: int = 1, beta: float = 0.99) -> Array:
    """The same second moments one step later: beta v + (1 - beta) g^2, as an optimizer computes it."""
    rng = np.random.default_rng(seed)
    fresh = np.asarray(old * rng.chisquare(1, old.shape), np.float32)
    fresh[rng.random(old.shape) < 0.2] = 0
    moved: Array = old * np.float32(beta) + fresh * np.float32(1 - beta)
    return moved.astype(old.dtype)


def of_dtype(name: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """An array of any dtype with structure, special words among them."""
    dtype = dtypes.by_name(name)
    rng = np.random.default_rng(seed)
    if dtype.is_float:
        n_parts = dtype.words_per_element
        base = weights((*shape, n_parts), seed).astype(np.float64).reshape(*shape, n_parts)
        with np.errstate(over="ignore", invalid="ignore"):
            if n_parts == 2:
                array = (base[..., 0] + 1j * base[..., 1]).astype(dtype.numpy)
            else:
                array = (base[..., 0] * (40 if dtype.word_bits == 8 else 1)).astype(dtype.numpy)
    elif name == "bool":
        array = rng.random(shape) < 0.2
    else:
        low = -(2 ** min(dtype.word_bits - 1, 40)) if dtype.is_signed else 0
        scale = rng.geometric(0.3, shape)
        array = (rng.integers(max(low, -1000), 1000, shape) * scale).astype(dtype.numpy)
    array = np.ascontiguousarray(array)
    words = array.reshape(-1).view(dtype.word_dtype)
    special = special_words(dtype) if name != "bool" else np.array([0, 1], np.uint8)
    if len(words) > 4 * len(special):
        words[rng.permutation(len(words))[: len(special)]] = special
    return array


def same_bits(a: Array, b: Array) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(dtypes.to_words(a), dtypes.to_words(b))


def equal(a: Any, b: Any) -> bool:
    """Trees of dicts, arrays and plain values, equal in bits."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)


def told_by(isa: str, code: str) -> str:
    """What code prints where the native backend uses an instruction set; skips the test if the processor lacks it."""
    environ = {**os.environ, "TRICOMP_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    if "does not have it" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
