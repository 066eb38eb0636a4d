"""Arrays as codes and scales: what is asked, checked and handed to the codec. Imports ground and the codec.

FORMAT.md, "Integers", defines the codes. The hard thing: a weight that is not finite would silently spoil a whole row,
so it is refused, and told where it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp import codec, dtypes
from tricomp.codec import quantizing
from tricomp.dtypes import DType
from tricomp.errors import InvalidArgument, UnsupportedDtype
from tricomp.integers.form import FLOATS, SCALE_DTYPES, Form

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A float array as integers: the value of an element is its code times its scale.

    codes: int8 of the array's shape [out, ...], -127..127 at 8 bits, -7..7 at 4. scales: float32 or bfloat16, [out], or
    [out, max(ceil(n / group), 1)] where a row has n elements. dtype: name of the float dtype that the array had, and
    gets again from dequantize. Raises InvalidArgument if they do not fit each other.
    """

    codes: np.ndarray[tuple[int, ...], Any]
    scales: np.ndarray[tuple[int, ...], Any]
    bits: int
    group: int | None
    dtype: str

    def __post_init__(self) -> None:
        check_options(self.bits, self.group, self.dtype, str(self.scales.dtype.name), "Quantized")
        if self.codes.dtype != np.int8 or self.codes.ndim == 0:
            raise InvalidArgument(
                f"Quantized: expected int8 codes [out, ...], got {self.codes.dtype.name}{list(self.codes.shape)}."
            )
        expected = scales_shape(self.codes.shape, self.group)
        if self.scales.shape != expected:
            raise InvalidArgument(
                f"Quantized: codes {list(self.codes.shape)}, group {self.group}: expected scales {list(expected)}, got "
                f"{list(self.scales.shape)}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, two a byte at 4 bits, and of the scales."""
        n_codes = self.codes.size if self.bits > 4 else -(-self.codes.size // 2)
        return int(n_codes + self.scales.nbytes)


def quantize(
    array: Array,
    bits: int = 8,
    *,
    group: int | None = None,
    scale_dtype: str = "float32",
    clip: bool = True,
    threads: int | None = None,
    backend: str | None = None,
    leaf: str = "array",
) -> Quantized:
    """The nearest integers of an array [out, ...] of floats, symmetric about 0, and the scales that bring them back.

    array: float32, bfloat16, float16 or float64 (rounded to float32 first), seen as [out, n]. bits: 8 or 4, which
    machines compute with; 5 to 7 run as 8 do, and take less in a file. group: None for one scale a row, or a multiple
    of 16: so many elements of a row that share one (the last of a row may be fewer). scale_dtype: "float32" or
    "bfloat16". clip: search the scale with the least squared error, among stated ones; False: the largest magnitude of
    a group gets the largest code. threads, backend: as for tricomp.open; the codes are the same whatever they are.
    leaf: the array's name, for errors.
    Raises InvalidArgument for other arguments, and for elements that are infinite, NaN, or too large for float32;
    UnsupportedDtype for other dtypes.
    """
    dtype = float_dtype(array, leaf)
    check_options(bits, group, dtype.name, scale_dtype, f"leaf {leaf!r}")
    engine = codec.Engine(threads, backend)
    rows = dtypes.to_words(array, leaf).reshape(rows_shape(array.shape))
    each = max(rows.shape[1], 1) if group is None else group
    kind = dtypes.by_name(scale_dtype)
    codes, scales, counts = quantizing.quantize(rows, dtype, bits, each, kind, clip, engine)
    require_finite(counts, rows.size, dtype, leaf)
    return Quantized(
        codes.reshape(array.shape),
        scales.view(kind.numpy).reshape(scales_shape(array.shape, group)),
        bits,
        group,
        dtype.name,
    )


def dequantize(quantized: Quantized, *, threads: int | None = None, backend: str | None = None) -> Array:
    """The floats that codes stand for: code times scale, as a float32, then as the dtype that the array had.

    A product beyond dtype's largest number becomes that one.
    """
    dtype, kind = dtypes.by_name(quantized.dtype), dtypes.by_name(quantized.scales.dtype.name)
    shape = rows_shape(quantized.codes.shape)
    codes = np.ascontiguousarray(quantized.codes).reshape(shape)
    scales = dtypes.to_words(quantized.scales).reshape(shape[0], -1 if shape[0] else 1)
    each = max(shape[1], 1) if quantized.group is None else quantized.group
    words = quantizing.dequantize(codes, scales, each, kind, dtype, codec.Engine(threads, backend))
    return dtypes.from_words(words, dtype, quantized.codes.shape)


def rows_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """How an array [out, ...] is seen: [out, n]."""
    return shape[0], math.prod(shape[1:])


def scales_shape(shape: tuple[int, ...], group: int | None) -> tuple[int, ...]:
    """The shape of the scales of an array [out, ...]."""
    return (shape[0],) if group is None else (shape[0], max(-(-math.prod(shape[1:]) // group), 1))


def float_dtype(array: Any, leaf: str) -> DType:
    """The dtype of an array that can be quantised. Raises UnsupportedDtype, InvalidArgument."""
    if not isinstance(array, np.ndarray):
        raise InvalidArgument(f"leaf {leaf!r}: expected a numpy array, got {type(array).__name__}. Use np.asarray.")
    dtype = dtypes.of(array, leaf)
    if dtype.name not in FLOATS:
        raise UnsupportedDtype(
            f"leaf {leaf!r}: {dtype.name} is not quantised: expected one of {', '.join(FLOATS)}. Leave it as it is."
        )
    if array.ndim == 0:
        raise InvalidArgument(f"leaf {leaf!r}: a single number is not quantised: expected a shape [out, ...].")
    return dtype


def check_options(bits: Any, group: Any, dtype: str, scale_dtype: Any, what: str) -> None:
    """Raise InvalidArgument unless these are bits, a group and dtypes that there are."""
    try:
        Form(bits, group, dtype)
    except InvalidArgument as error:
        raise InvalidArgument(f"{what}: {error}") from None
    if scale_dtype not in SCALE_DTYPES:
        raise InvalidArgument(f"{what}: expected scales of {' or '.join(SCALE_DTYPES)}, got {scale_dtype!r}.")


def require_finite(counts: Array, n: int, dtype: DType, leaf: str) -> None:
    """Raise InvalidArgument, naming the leaf, how many and the first row, if elements are no finite float32.

    counts: of them in each row. n: elements in all.
    """
    if not counts.any():
        return
    n_bad, rows = int(counts.sum()), np.flatnonzero(counts)
    what = "infinite or NaN" if dtype.name != "float64" else "infinite, NaN or too large for float32"
    raise InvalidArgument(
        f"leaf {leaf!r}: {n_bad} of its {n} elements {'is' if n_bad == 1 else 'are'} {what}, in {len(rows)} of "
        f"{len(counts)} rows, the first in row {rows[0]}: integers cannot say that. Leave this leaf in floats, or "
        f"repair it."
    )
