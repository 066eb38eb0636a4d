"""The entropy of the codec's models on given data. Imports numpy only, and no code of tricomp.

Every figure is a sum over leaves of bits: the empirical entropy of a leaf's symbols given their context, plus the
remainder bits; symbol tables are free. The hard thing: row and column scales are side information, and a model with
one scale for a handful of elements would look cheap for what it does not count. So a leaf's model is chosen with its
scales at their own entropy, and both figures are given, without the scales and with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_K_MAX = 4
_PHASES = 8  # scales are in eighths of an octave
_FACTOR_STEPS = 256  # factors of a scaled delta are in this part of an octave


@dataclass(frozen=True)
class Fields:
    """A float dtype's word: its unsigned integer type, exponent bits, mantissa bits."""

    word: str
    exponent_bits: int
    mantissa_bits: int


FLOAT32 = Fields("<u4", 8, 23)
BFLOAT16 = Fields("<u2", 8, 7)


@dataclass(frozen=True)
class Bits:
    """Bits of symbols and remainders, and of the scales that the symbols are relative to."""

    payload: float
    scales: float = 0.0

    @property
    def total(self) -> float:
        return self.payload + self.scales

    def __add__(self, other: Bits) -> Bits:
        return Bits(self.payload + other.payload, self.scales + other.scales)


def _least(candidates: Iterable[Bits]) -> Bits:
    return min(candidates, key=lambda bits: bits.total)


def entropy_bits(counts: NDArray[np.integer[Any]]) -> float:
    """Bits to code counts.sum() symbols given their context. counts: int[n_contexts, n_symbols]."""
    total = counts.sum(axis=-1, keepdims=True)
    used = counts > 0
    return float(-(counts * np.log2(counts / np.maximum(total, 1), where=used, out=np.zeros(counts.shape))).sum())


def _scale_bits(*scales: Ints) -> float:
    """Bits of vectors of small integers at their order-0 entropy."""
    return sum(entropy_bits(np.unique(scale, return_counts=True)[1][None]) for scale in scales)


def _magnitudes(array: NDArray[Any], fields: Fields) -> tuple[Ints, NDArray[np.bool_]]:
    """Words without their sign, and the signs, in the array's shape."""
    words = array.view(fields.word).astype(np.int64)
    n_bits = fields.exponent_bits + fields.mantissa_bits
    return words & ((1 << n_bits) - 1), (words >> n_bits).astype(bool)


def _splits(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for axis in range(1, len(shape)):
        rows, columns = math.prod(shape[:axis]), math.prod(shape[axis:])
        if rows > 1 and columns > 1:
            yield rows, columns


def _row_and_column_means(values: NDArray[np.float64], valid: NDArray[np.bool_]) -> tuple[Any, Any]:
    """Least squares fit of values[i, j] by rows[i, 0] + columns[0, j] over the valid entries, by two sweeps."""
    rows, columns = np.zeros((values.shape[0], 1)), np.zeros((1, values.shape[1]))
    for _ in range(2):
        rows = ((values - columns) * valid).sum(1, keepdims=True) / np.maximum(valid.sum(1, keepdims=True), 1)
        columns = ((values - rows) * valid).sum(0, keepdims=True) / np.maximum(valid.sum(0, keepdims=True), 1)
    return rows, columns


def _trailing_zeros(magnitude: Ints, fields: Fields) -> Ints:
    """For every non-zero word, how many of the lowest mantissa bits are zero in its whole row (first axis)."""
    rows = magnitude.reshape(magnitude.shape[0] if magnitude.ndim > 1 else 1, -1)
    set_bits = np.bitwise_or.reduce(rows, axis=1) | 1 << fields.mantissa_bits
    zeros = np.frexp((set_bits & -set_bits).astype(np.float64))[1] - 1
    return np.repeat(zeros, np.count_nonzero(rows, axis=1)).astype(np.int64)


def full_bits(array: NDArray[Any], fields: Fields) -> Bits:
    """Bits of a leaf without reference: the least over k = 0..4 and over no scales and every split into rows x columns.

    The symbol is exponent and top k mantissa bits, less the whole octaves of R_i + C_j; the context is the eighths.
    Zero is a symbol of its own; the sign costs its order-0 entropy, every other mantissa bit one bit, or nothing where
    it is zero in a whole row of the leaf.
    """
    magnitude, sign = _magnitudes(array, fields)
    zero = magnitude == 0
    high = magnitude >> (fields.mantissa_bits - _K_MAX)
    trailing = _trailing_zeros(magnitude, fields)
    flags = entropy_bits(np.array([[sign.sum(), sign.size - sign.sum()], [zero.sum(), zero.size - zero.sum()]]))
    if zero.all():
        return Bits(flags)
    candidates = _symbol_bits(high.reshape(1, -1), np.zeros((1, 1), np.int64), ~zero.reshape(1, -1), trailing, fields)
    octaves = magnitude / (1 << fields.mantissa_bits)
    for rows, columns in _splits(array.shape):
        view = high.reshape(rows, columns), ~zero.reshape(rows, columns)
        r, c = (_eighths(scale) for scale in _row_and_column_means(octaves.reshape(rows, columns), view[1]))
        scales = _scale_bits(r, c)
        candidates += [Bits(bits.payload, scales) for bits in _symbol_bits(view[0], r + c, view[1], trailing, fields)]
    return _least(candidates) + Bits(flags)


def _eighths(octaves: NDArray[np.float64]) -> Ints:
    return np.rint(octaves * _PHASES).astype(np.int64)


def _symbol_bits(high: Ints, scale: Ints, used: NDArray[np.bool_], trailing: Ints, fields: Fields) -> list[Bits]:
    """Bits for k = 4, 3, .. 0 of the non-zero words, relative to a scale in eighths of an octave."""
    phase = np.broadcast_to(scale % _PHASES, high.shape)[used]
    symbols = (high - (scale // _PHASES << _K_MAX))[used]
    low = int(symbols.min()) >> _K_MAX << _K_MAX  # so that dropping a mantissa bit merges pairs
    n_symbols = (int(symbols.max()) - low | 15) + 1
    counts = np.bincount(phase * n_symbols + symbols - low, minlength=_PHASES * n_symbols).reshape(_PHASES, -1)
    found = []
    for k in range(_K_MAX, -1, -1):
        remainder = fields.mantissa_bits - k
        free = float(np.minimum(trailing, remainder).sum())
        merged = counts.reshape(_PHASES, -1, 1 << _K_MAX - k).sum(2)
        found.append(Bits(entropy_bits(merged) + symbols.size * remainder - free))
    return found


def _ordered(array: NDArray[Any], fields: Fields) -> Ints:
    magnitude, sign = _magnitudes(array, fields)
    return np.where(sign, -magnitude - 1, magnitude)


def _difference_bits(array: NDArray[Any], prediction: NDArray[Any], fields: Fields) -> float:
    difference = _ordered(array, fields) - _ordered(prediction, fields)
    length = np.frexp(np.abs(difference).astype(np.float64))[1].astype(np.int64)
    exponent = _magnitudes(prediction, fields)[0] >> fields.mantissa_bits
    counts = np.bincount((exponent * 64 + length).ravel(), minlength=64 << fields.exponent_bits).reshape(-1, 64)
    return entropy_bits(counts) + float(length.sum())  # sign and the bits below the leading one: length bits


def delta_bits(array: NDArray[Any], reference: NDArray[Any], fields: Fields) -> Bits:
    """Bits of a leaf given a reference: bit length of the ordered difference, in the context of its exponent."""
    return Bits(_difference_bits(array, reference, fields))


def _scaled(reference: NDArray[np.float32], octaves: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return (reference * 2.0**octaves).astype(np.float32)


def scaled_delta_bits(array: NDArray[np.float32], reference: NDArray[np.float32]) -> Bits:
    """Bits of a float32 leaf given reference x row factor x column factor: the least over splits and one common factor.

    Factors are means of log2(new / old), in 1/256 of an octave. The common one is searched on a sample, since most of
    the mass of a skewed ratio lies below its mean.
    """
    valid = (array > 0) & (reference > 0)
    ratio = np.log2(np.where(valid, array, 1).astype(np.float64) / np.where(valid, reference, 1))
    words, old = array.ravel(), reference.ravel()
    fits = [(np.full(array.size, ratio.sum() / max(valid.sum(), 1)), 0.0)]
    for rows, columns in _splits(array.shape):
        means = _row_and_column_means(ratio.reshape(rows, columns), valid.reshape(rows, columns))
        r, c = (np.rint(mean * _FACTOR_STEPS).astype(np.int64) for mean in means)
        fits.append((((r + c) / _FACTOR_STEPS).ravel(), _scale_bits(r, c)))
    sample = np.random.default_rng(0).permutation(array.size)[: 1 << 16]
    candidates = []
    for fit, scales in fits:
        residual = (ratio.ravel() - fit)[sample]
        shifts = [0.0, *np.quantile(residual, np.linspace(0.02, 0.98, 33)).tolist()]
        costs = [_difference_bits(words[sample], _scaled(old[sample], fit[sample] + s), FLOAT32) for s in shifts]
        shift = shifts[int(np.argmin(costs))]
        candidates.append(Bits(_difference_bits(words, _scaled(old, fit + shift), FLOAT32), scales))
    return _least(candidates)


def stream_bits(arrays: dict[str, NDArray[Any]], references: dict[str, NDArray[Any]] | None, fields: Fields) -> Bits:
    """Bits of a whole stream: for every leaf the model that codes it best."""
    total = Bits(0.0)
    for name, array in arrays.items():
        candidates = [full_bits(array, fields)]
        if references is not None:
            candidates.append(delta_bits(array, references[name], fields))
            if fields is FLOAT32 and array.min() >= 0:
                candidates.append(scaled_delta_bits(array, references[name]))
        total += _least(candidates)
    return total
