"""Products of float rows with integer weights. Register functions, then kernels; mirrors reference/multiply.py.

Imports triton only. The hard thing: the tensor cores multiply integers or short floats, while inputs may be float32.
Codes are whole numbers that bfloat16 holds exactly, and a float32 is a sum of three bfloat16, its pieces: so three
exact products take the place of one, and nothing is rounded but sums. Scales are multiplied after sums, so that no
weight is ever rounded. Where rows became codes, every float operation is a single one in a stated order (launches say
enable_fp_fusion=False): such products are the same on every machine, whatever the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(127.0)
# A float below 2^22 plus this has its nearest integer in its low bits; halves go to the even one.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)
INFINITE = tl.constexpr(0x7F800000)
NOT_A_NUMBER = tl.constexpr(0x7FC00000)
UPPER = tl.constexpr(-65536)  # the bits of a float32 that bfloat16 keeps
ROW_TILES = tl.constexpr(8)  # that share weights in the L2 cache


@triton.jit
def widened(b_x):
    """A float of at most 32 bits as float32. Of bfloat16 by its bits: the interpreter mistakes subnormal ones."""
    if b_x.dtype == tl.bfloat16:
        return (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return b_x.to(tl.float32)


@triton.jit
def upper(b_x):
    """The first 8 significant bits of float32. What is not finite stays so."""
    b_bits = tl.where(b_x == b_x, b_x.to(tl.int32, bitcast=True), NOT_A_NUMBER)
    return (b_bits & UPPER).to(tl.float32, bitcast=True)


@triton.jit
def shortened(b_x):
    """float32 of at most 8 significant bits as bfloat16, without rounding, which some cards have no instruction for."""
    return (b_x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def unpacked(b_bytes, IS_NVIDIA: tl.constexpr):
    """16 times codes of 4 bits, int8 [OUTS, 2 * BYTES], of int8 [OUTS, BYTES]: low bits first."""
    if IS_NVIDIA:  # four bytes of a register at once, which the compiler does not find
        b_low, b_high = tl.inline_asm_elementwise(
            "{ .reg .b32 low; shl.b32 low, $2, 4; and.b32 $0, low, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r",
            [b_bytes],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        return tl.interleave(b_low, b_high)
    else:
        return tl.interleave(b_bytes << 4, b_bytes & -16)


@triton.jit
def exact(b_code, dtype: tl.constexpr, IS_NVIDIA: tl.constexpr):
    """Codes of 8 bits as floats, which hold them exactly."""
    if dtype == tl.float16:  # the code is written into the mantissa of 1024, and 1152 is taken off
        b_word = (b_code.to(tl.int16) & 0xFF) ^ 0x6480
        return b_word.to(tl.float16, bitcast=True) - 1152.0
    elif dtype == tl.bfloat16 and not IS_NVIDIA:
        return shortened(b_code.to(tl.float32))
    else:
        return b_code.to(dtype)


@triton.jit
def finished(b_sum, b_scale, b_factor, b_bias, HAS_FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Outputs, float32 [ROWS, OUTS]: sums times scales [OUTS], times factors of rows [ROWS], plus biases [OUTS]."""
    b_out = b_sum * b_scale[None, :]
    if HAS_FACTOR:
        b_out = b_out * b_factor[:, None]
    if HAS_BIAS:
        b_out = b_out + b_bias[None, :]
    return b_out


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """float32 as dtype, to nearest even."""
    if dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_nearest = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return tl.where(b_x == b_x, b_nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit(do_not_specialize=["n_rows"])
def codes_kernel(p_rows, p_codes, p_factors, n_rows, n_in, row_stride, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Codes int8 [n_rows, n_in] of ROWS rows a program by their largest magnitudes, and factors; SIZE at a time.

    A row of zeros has the factor 1, one that is not finite NaN.
    """
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    p_row = p_rows + o_row.to(tl.int64)[:, None] * row_stride
    b_top = tl.zeros((ROWS,), tl.int32)
    for first in tl.range(0, n_in, SIZE):
        o_in = first + tl.arange(0, SIZE)
        b_x = tl.load(p_row + o_in[None, :], mask=m_row[:, None] & (o_in < n_in)[None, :], other=0)
        b_top = tl.maximum(b_top, tl.max(widened(b_x).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    b_factor = tl.div_rn(b_top.to(tl.float32, bitcast=True), tl.full((ROWS,), LARGEST, tl.float32))
    b_factor = tl.where((b_factor == 0.0) | (b_top >= INFINITE), 1.0, b_factor)
    tl.store(p_factors + o_row, tl.where(b_top < INFINITE, b_factor, float("nan")), mask=m_row)
    b_divisor = tl.broadcast_to(b_factor[:, None], (ROWS, SIZE))
    for first in tl.range(0, n_in, SIZE):
        o_in = first + tl.arange(0, SIZE)
        m_in = m_row[:, None] & (o_in < n_in)[None, :]
        b_x = widened(tl.load(p_row + o_in[None, :], mask=m_in, other=0))
        b_code = (tl.div_rn(b_x, b_divisor) + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
        b_code = tl.maximum(tl.minimum(b_code, 127), -127).to(tl.int8)
        tl.store(p_codes + o_row.to(tl.int64)[:, None] * n_in + o_in[None, :], b_code, mask=m_in)


@triton.jit(do_not_specialize=["n_rows"])
def pieces_kernel(
    p_rows, p_pieces, n_rows, n_in, row_stride, PIECES: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    """bfloat16 [n_rows, PIECES, n_in], 8 bits each of rows of float32; three add up to all above 2^-133."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_in = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    m_in = (o_row < n_rows)[:, None] & (o_in < n_in)[None, :]
    b_x = tl.load(p_rows + o_row.to(tl.int64)[:, None] * row_stride + o_in[None, :], mask=m_in, other=0)
    p_here = p_pieces + o_row.to(tl.int64)[:, None] * (PIECES * n_in) + o_in[None, :]
    for piece in tl.static_range(PIECES):
        tl.store(p_here + piece * n_in, shortened(upper(b_x)), mask=m_in)
        b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)
        b_x = b_x - upper(b_x)


@triton.jit(do_not_specialize=["n_rows", "n_out"])
def product_kernel(
    p_rows,
    p_factors,
    p_codes,
    p_scales,
    p_bias,
    p_out,
    n_rows,
    n_out,
    n_in,
    row_stride,
    piece_stride,
    code_stride,
    n_groups,
    IS_DYNAMIC: tl.constexpr,
    PIECES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_WIDENED: tl.constexpr,
    IS_NVIDIA: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of ROWS rows and OUTS rows of weights a program, STEP inputs of each at a time.

    p_rows: IS_DYNAMIC: int8, with p_factors, float32 [n_rows]; else bfloat16 or float16, in so many PIECES. p_codes:
    int8, at 4 bits two a byte. p_scales: float32 or bfloat16 [n_out, n_groups]. GROUP: inputs that share a scale, 0:
    all. DEPTH: of tiles, of which STEP are used: the tensor cores want 16 or 32. IS_EVEN: STEP divides n_in, and DEPTH
    is STEP. IS_WIDENED: short floats are multiplied as float32, as the interpreter must.
    """
    tl.static_assert(GROUP % STEP == 0, "a step belongs to one group")
    tl.static_assert(DEPTH >= STEP, "a tile holds a step")
    n_row_tiles, n_out_tiles = tl.cdiv(n_rows, ROWS), tl.cdiv(n_out, OUTS)
    band = tl.program_id(0) // (ROW_TILES * n_out_tiles)
    here = tl.program_id(0) % (ROW_TILES * n_out_tiles)
    n_here = tl.minimum(n_row_tiles - band * ROW_TILES, ROW_TILES)
    o_row = (band * ROW_TILES + here % n_here) * ROWS + tl.arange(0, ROWS)
    o_out = here // n_here * OUTS + tl.arange(0, OUTS)
    # Beyond the last one, the last one again: loads need no mask.
    p_row = p_rows + tl.minimum(o_row, n_rows - 1).to(tl.int64)[:, None] * row_stride
    o_weight = tl.minimum(o_out, n_out - 1).to(tl.int64)
    p_weight = p_codes + o_weight[:, None] * code_stride
    p_scale = p_scales + o_weight * n_groups
    unit: tl.constexpr = 1 / 16 if BITS == 4 else 1.0  # see unpacked
    b_total = tl.zeros((ROWS, OUTS), tl.float32)
    b_sum = tl.zeros((ROWS, OUTS), tl.int32 if IS_DYNAMIC else tl.float32)
    o_in = tl.arange(0, DEPTH)
    o_byte = tl.arange(0, DEPTH * BITS // 8)
    for first in tl.range(0, n_in, STEP, num_stages=STAGES):
        n_left = tl.minimum(n_in - first, STEP)
        p_here = p_weight + (first * BITS // 8 + o_byte)[None, :]
        if IS_EVEN:
            b_code = tl.load(p_here)
        else:
            b_code = tl.load(p_here, mask=(o_byte * (8 // BITS) < n_left)[None, :], other=0)
        if BITS == 4:
            b_code = unpacked(b_code, IS_NVIDIA)
        if not IS_DYNAMIC:
            b_code = exact(b_code, tl.float32 if IS_WIDENED else p_rows.dtype.element_ty, IS_NVIDIA)
        b_code = tl.trans(b_code)  # [DEPTH, OUTS]
        for piece in tl.static_range(PIECES):
            p_piece = p_row + (piece * piece_stride + first + o_in)[None, :]
            if IS_EVEN:
                b_row = tl.load(p_piece)
            else:
                b_row = tl.load(p_piece, mask=(o_in < n_left)[None, :], other=0)
            if IS_DYNAMIC:
                b_sum = tl.dot(b_row, b_code, b_sum, out_dtype=tl.int32)
            else:
                b_row = widened(b_row) if IS_WIDENED else b_row
                b_sum = tl.dot(b_row, b_code, b_sum, input_precision="ieee")
        if GROUP > 0:
            b_scale = tl.load(p_scale + first // GROUP).to(tl.float32) * unit
            b_total = b_total + b_sum.to(tl.float32) * b_scale[None, :]
            b_sum = tl.zeros((ROWS, OUTS), tl.int32 if IS_DYNAMIC else tl.float32)
    if GROUP > 0:
        b_scale = tl.full((OUTS,), 1.0, tl.float32)
    else:
        b_total = b_sum.to(tl.float32)
        b_scale = tl.load(p_scale).to(tl.float32) * unit
    b_factor = tl.load(p_factors + o_row, mask=o_row < n_rows, other=0) if IS_DYNAMIC else b_scale
    b_bias = tl.load(p_bias + o_weight).to(tl.float32) if HAS_BIAS else b_scale
    b_out = finished(b_total, b_scale, b_factor, b_bias, IS_DYNAMIC, HAS_BIAS)
    o_to = o_row.to(tl.int64)[:, None] * n_out + o_out[None, :]
    m_to = (o_row < n_rows)[:, None] & (o_out < n_out)[None, :]
    tl.store(p_out + o_to, rounded(b_out, p_out.dtype.element_ty), mask=m_to)


@triton.jit(do_not_specialize=["n_rows"])
def finish_kernel(
    p_sums,
    p_factors,
    p_scales,
    p_bias,
    p_out,
    n_rows,
    n_out,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
):
    """The outputs that product_kernel gives, of sums of products of codes, int32 [n_rows, n_out], by other means."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_out = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    m_row, m_out = o_row < n_rows, o_out < n_out
    o_to = o_row.to(tl.int64)[:, None] * n_out + o_out[None, :]
    m_to = m_row[:, None] & m_out[None, :]
    b_sum = tl.load(p_sums + o_to, mask=m_to, other=0).to(tl.float32)
    b_scale = tl.load(p_scales + o_out, mask=m_out, other=0).to(tl.float32)
    b_factor = tl.load(p_factors + o_row, mask=m_row, other=0)
    b_bias = tl.load(p_bias + o_out, mask=m_out, other=0).to(tl.float32) if HAS_BIAS else b_scale
    b_out = finished(b_sum, b_scale, b_factor, b_bias, True, HAS_BIAS)
    tl.store(p_out + o_to, rounded(b_out, p_out.dtype.element_ty), mask=m_to)
