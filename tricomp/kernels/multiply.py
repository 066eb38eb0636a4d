"""Launchers: products of float rows with integer weights, on a device. Imports ground, torch and the kernels.

They give what `tricomp.reference.multiply` gives, but for rounding of sums, and wait for nothing; no weight becomes a
float in memory. The hard thing is that nobody knows what is fastest on a card before it is timed. So there are `ways`,
and whoever runs models times them. Where inputs become codes, all ways give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from tricomp.kernels.device import IS_INTERPRETED, Device
from tricomp.kernels.multiply_kernel import codes_kernel, finish_kernel, pieces_kernel, product_kernel
from tricomp.kernels.tiles import FEW_ROWS, MOST_STEP, Tile, constants_of, tiles_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Way = Callable[[], torch.Tensor]
_MOST_SUM = (1 << 31) - 1
_INTERPRETED = (Tile(64, 64, 128, 4, 1),)  # the interpreter counts programs
_LEAST = 16  # torch._int_mm of torch 2.13 mistakes the strides of matrices of one column, and sums garbage


@dataclass(frozen=True)
class Weight:
    """An integer weight on a device, as saved: int8 [out, n_in], or at 4 bits uint8 [out, ceil(n_in / 2)].

    scales: float32 or bfloat16, [out] or [out, groups]. bias: float [out]. group: inputs that share a scale, None: all.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    bits: int
    group: int | None
    n_in: int

    @property
    def n_out(self) -> int:
        return self.codes.shape[0]

    @property
    def shared(self) -> int:
        """Inputs that share a scale; 0: all of a row."""
        return 0 if self.group is None or self.group >= self.n_in else self.group


def ways(rows: torch.Tensor, weight: Weight, is_dynamic: bool) -> dict[str, Way]:
    """What gives rows [m, n_in] times a weight, [m, out] in the dtype of rows: functions by their names.

    is_dynamic: rows become codes of 8 bits, each by its largest magnitude. Empty where no kernel fits: other dtypes,
    nothing to multiply, sums that int32 may not hold. A way raises BackendError where its kernel does not run.
    """
    if not fits(rows, weight, is_dynamic):
        return {}
    tiles = tiles_for(len(rows), bool(weight.shared) or rows.dtype == torch.float32)
    found: dict[str, Way] = {
        f"tiles of {tile}": partial(_here, multiply, rows, weight, is_dynamic, tile)
        for tile in (_INTERPRETED if IS_INTERPRETED else tiles)
    }
    if is_dynamic and _suits_torch(rows, weight):
        found["torch._int_mm"] = partial(_here, multiply_by_torch, rows, weight)
    return found


def fits(rows: torch.Tensor, weight: Weight, is_dynamic: bool) -> bool:
    """Whether a product can be computed here: something to multiply, known dtypes, and no sum beyond int32."""
    if rows.dtype not in DTYPES or 0 in (len(rows), weight.n_in, weight.n_out):
        return False
    n_terms = min(weight.shared, MOST_STEP) if weight.shared else weight.n_in
    return not is_dynamic or 127 * 128 * n_terms <= _MOST_SUM


def multiply(rows: torch.Tensor, weight: Weight, is_dynamic: bool, tile: Tile) -> torch.Tensor:
    """The product by one kernel, after one that makes codes or pieces of rows where they become such."""
    rows = _in_line(rows)
    out = rows.new_empty(len(rows), weight.n_out)
    given, factors, n_pieces = rows, rows, 1
    if is_dynamic:
        given, factors = to_codes(rows)
    elif rows.dtype == torch.float32:
        n_pieces = 2 if _is_tf32() else 3
        given = to_pieces(rows, n_pieces)
    codes, scales = _in_line(weight.codes.view(torch.int8)), weight.scales.contiguous()
    n_tiles = -(-len(rows) // tile.rows) * -(-weight.n_out // tile.outs)
    _device(rows.device, tile.warps).launch(
        product_kernel,
        (n_tiles,),
        given,
        factors,
        codes,
        scales,
        scales if weight.bias is None else weight.bias.contiguous(),
        out,
        len(rows),
        weight.n_out,
        weight.n_in,
        given.stride(0),
        weight.n_in,
        codes.stride(0),
        scales.numel() // weight.n_out,
        **constants_of(tile, weight.n_in, weight.bits, weight.shared, is_dynamic, n_pieces),
        HAS_BIAS=int(weight.bias is not None),
        IS_WIDENED=int(IS_INTERPRETED),
        IS_NVIDIA=int(torch.version.hip is None and not IS_INTERPRETED),
    )
    return out


def to_codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [m, n] and float32 [m], of rows whose elements follow one another. Rows not finite: the factor is NaN."""
    m, n = rows.shape
    codes = rows.new_empty(m, n, dtype=torch.int8)
    factors = rows.new_empty(m, dtype=torch.float32)
    size, each = _shape(n)
    grid = (-(-m // each),)
    _device(rows.device).launch(codes_kernel, grid, rows, codes, factors, m, n, rows.stride(0), ROWS=each, SIZE=size)
    return codes, factors


def to_pieces(rows: torch.Tensor, n_pieces: int) -> torch.Tensor:
    """bfloat16 [m, n_pieces, n] of float32 rows whose elements follow one another: numbers that add up to them."""
    m, n = rows.shape
    pieces = rows.new_empty(m, n_pieces, n, dtype=torch.bfloat16)
    size, each = _shape(n)
    grid = (-(-m // each), -(-n // size))
    _device(rows.device).launch(
        pieces_kernel, grid, rows, pieces, m, n, rows.stride(0), PIECES=n_pieces, ROWS=each, SIZE=size
    )
    return pieces


def multiply_by_torch(rows: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The product of codes by torch._int_mm, cuBLAS's; codes and outputs by kernels, so that bytes are the same."""
    rows = _in_line(rows)
    out = rows.new_empty(len(rows), weight.n_out)
    codes, factors = to_codes(rows)
    sums = torch._int_mm(codes, weight.codes.t())
    scales = weight.scales.contiguous()
    size, each = _shape(weight.n_out, 256)
    _device(rows.device).launch(
        finish_kernel,
        (-(-len(rows) // each), -(-weight.n_out // size)),
        sums,
        factors,
        scales,
        scales if weight.bias is None else weight.bias.contiguous(),
        out,
        len(rows),
        weight.n_out,
        HAS_BIAS=int(weight.bias is not None),
        ROWS=each,
        OUTS=size,
    )
    return out


def _here(call: Callable[..., torch.Tensor], rows: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Call with the rows' device as the current one, to which kernels are launched."""
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        return call(rows, *rest)


def _suits_torch(rows: torch.Tensor, weight: Weight) -> bool:
    """What torch._int_mm takes on a GPU: one scale a row, more than 16 rows, sizes that are multiples of 8."""
    if weight.bits == 4 or weight.shared or len(rows) <= FEW_ROWS or weight.codes.stride(1) != 1:
        return False
    return weight.n_in % 8 == 0 and weight.n_out % 8 == 0 and min(weight.n_in, weight.n_out) >= _LEAST


def _in_line(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy in which a row's elements follow one another."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _shape(n: int, most: int = 2048) -> tuple[int, int]:
    """Elements of a row of n, and rows, that a program looks at at a time."""
    size = min(1 << (n - 1).bit_length(), most)
    return size, max((1 << 16 if IS_INTERPRETED else most) // size, 1)


def _is_tf32() -> bool:
    """Whether torch may round inputs of float32 products to 11 bits; two pieces have 16."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # of torch 2.9 and later, where the older name may raise
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


@cache
def _device(handle: torch.device, warps: int = 4) -> Device:
    return Device(handle, warps=warps)
