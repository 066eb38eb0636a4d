"""Floats to integer codes and scales, and back. Register functions, then kernels; mirrors reference/quantize.py.

FORMAT.md, "Integers". Imports triton only. The hard thing: codes must be those of the other backends. So a float
operation is a single one, rounded to nearest even (launches say enable_fp_fusion=False, and division is div_rn), errors
are summed as integers, and nothing that counts is subnormal.
"""

from __future__ import annotations

import triton
import triton.language as tl

N_CANDIDATES = tl.constexpr(16)
# A float below 2^22 plus this has its nearest integer in its low bits; halves go to the even one.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)
PARTS_LOG2 = tl.constexpr(6)  # of a code, in which errors are counted
PARTS = tl.constexpr(64)
HALF = tl.constexpr(32)
INFINITE = tl.constexpr(0x7F800000)
LEAST_SCALE = tl.constexpr(2.0**-112)
# A float64 of this magnitude, half a step above float32's largest, would be rounded to infinity.
BEYOND = tl.constexpr(3.4028235677973366e38)

F32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
F16 = tl.constexpr(2)
F64 = tl.constexpr(3)


@triton.jit
def float_bits(b_word, FORMAT: tl.constexpr):
    """Words of a float format as bits of float32, int32; infinite where that has no such number. b_word: as loaded."""
    if FORMAT == F64:
        m_beyond = tl.abs(b_word) >= BEYOND
        b_bits = tl.where(m_beyond, 0.0, b_word).to(tl.float32).to(tl.int32, bitcast=True)
        return tl.where(m_beyond | (b_word != b_word), INFINITE, b_bits)
    elif FORMAT == F32:
        return b_word
    elif FORMAT == BF16:
        return b_word.to(tl.int32) << 16
    else:
        b_sign = (b_word.to(tl.int32) & 0x8000) << 16
        b_body = (b_word.to(tl.int32) & 0x7FFF) << 13
        b_small = (b_body + (113 << 23)).to(tl.float32, bitcast=True) - 2.0**-14  # the mantissa, in 2^-24
        b_usual = tl.where(b_body >= 31 << 23, INFINITE, b_body + (112 << 23))
        return b_sign | tl.where(b_body < 1 << 23, b_small.to(tl.int32, bitcast=True), b_usual)


@triton.jit
def float_word(b_x, FORMAT: tl.constexpr):
    """float32 as what is stored for a float format, rounded to nearest even. b_x: of that format's range."""
    if FORMAT == F64:
        return b_x.to(tl.float64)
    elif FORMAT == F32:
        return b_x.to(tl.int32, bitcast=True)
    else:
        b_bits = b_x.to(tl.int32, bitcast=True)
        if FORMAT == BF16:
            return ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16).to(tl.int16)
        else:
            b_body = b_bits & 0x7FFFFFFF
            b_small = (b_body.to(tl.float32, bitcast=True) + 0.5).to(tl.int32, bitcast=True) - 0x3F000000
            b_usual = (b_body - (112 << 23) + 0xFFF + ((b_body >> 13) & 1)) >> 13
            return (((b_bits >> 16) & 0x8000) | tl.where(b_body < 113 << 23, b_small, b_usual)).to(tl.int16)


@triton.jit
def nearest(b_x):
    """The nearest integer, int32; halves go to the even one. b_x: float32, its magnitude below 2^22."""
    return (b_x + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def stored_scale(b_top, b_share, IS_BF16: tl.constexpr):
    """The scale of a candidate as it is stored, float32. b_top: the largest magnitude by the largest code."""
    b_scale = tl.maximum(b_top * b_share, LEAST_SCALE)
    if IS_BF16:
        b_bits = b_scale.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & ~0xFFFF
        b_scale = b_bits.to(tl.float32, bitcast=True)
    return b_scale


@triton.jit
def squared_error(b_magnitude, b_inverse, MOST: tl.constexpr):
    """Squares of errors in parts of a code, int32. b_inverse: of the scale, times the parts of a code."""
    b_parts = nearest(b_magnitude * b_inverse)
    b_code = tl.minimum((b_parts + HALF) >> PARTS_LOG2, MOST)
    b_error = b_parts - b_code * PARTS
    return b_error * b_error


@triton.jit
def finite_bits(p_words, o_tile, m_tile, FORMAT: tl.constexpr):
    """Bits of float32 of a tile, 0 where elements are not finite; and where those are."""
    b_bits = float_bits(tl.load(p_words + o_tile, mask=m_tile, other=0), FORMAT)
    m_bad = (b_bits & 0x7FFFFFFF) >= INFINITE
    return tl.where(m_bad, 0, b_bits), m_bad


@triton.jit
def error_of(b_bits, b_scale, MOST: tl.constexpr):
    """Sum of the squared errors of each group of a tile with a scale, int64 [GROUPS]."""
    b_inverse = tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), b_scale) * PARTS
    b_squares = squared_error((b_bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), b_inverse[:, None], MOST)
    if MOST <= 7:  # 1,024 of at most 2^21 fit
        return tl.sum(b_squares, axis=1).to(tl.int64)
    else:
        return tl.sum(b_squares.to(tl.int64), axis=1)


@triton.jit
def weighed(b_error, b_scale):
    """Errors in parts of a code as those of numbers, float64: what candidates are compared by."""
    b_wide = b_scale.to(tl.float64)
    return b_error.to(tl.float64) * (b_wide * b_wide)


@triton.jit
def best_of_tile(b_bits, b_limit, p_shares, MOST: tl.constexpr, IS_BF16: tl.constexpr):
    """The scale with the least error of each group, float32 [GROUPS]; of equal ones the first. b_bits: whole groups."""
    b_best = stored_scale(b_limit, tl.load(p_shares), IS_BF16)
    b_least = weighed(error_of(b_bits, b_best, MOST), b_best)
    for candidate in range(1, N_CANDIDATES):
        b_scale = stored_scale(b_limit, tl.load(p_shares + candidate), IS_BF16)
        b_error = weighed(error_of(b_bits, b_scale, MOST), b_scale)
        m_better = b_error < b_least
        b_best = tl.where(m_better, b_scale, b_best)
        b_least = tl.where(m_better, b_error, b_least)
    return b_best


@triton.jit
def added_errors(b_errors, b_bits, b_limit, p_shares, o_candidate, MOST: tl.constexpr, IS_BF16: tl.constexpr):
    """Errors of each candidate, int64 [GROUPS, N_CANDIDATES], with those of a tile added."""
    for candidate in range(N_CANDIDATES):
        b_error = error_of(b_bits, stored_scale(b_limit, tl.load(p_shares + candidate), IS_BF16), MOST)
        b_errors += tl.where(o_candidate[None, :] == candidate, b_error[:, None], 0)
    return b_errors


@triton.jit
def best_of_errors(b_errors, b_limit, p_shares, o_candidate, IS_BF16: tl.constexpr):
    """The same of errors that were added up."""
    b_scales = stored_scale(b_limit[:, None], tl.load(p_shares + o_candidate)[None, :], IS_BF16)
    b_found = weighed(b_errors, b_scales)
    b_least = tl.min(b_found, axis=1)
    b_first = tl.min(tl.where(b_found == b_least[:, None], o_candidate[None, :], N_CANDIDATES), axis=1)
    return tl.sum(tl.where(o_candidate[None, :] == b_first[:, None], b_scales, 0.0), axis=1)


@triton.jit
def codes_of(b_bits, b_inverse, MOST: tl.constexpr):
    """Codes of a tile, int8."""
    b_code = nearest(b_bits.to(tl.float32, bitcast=True) * b_inverse[:, None])
    return tl.maximum(tl.minimum(b_code, MOST), -MOST).to(tl.int8)


@triton.jit
def places(n_groups_in_all, n, group, n_groups, GROUPS: tl.constexpr):
    """Of a program's groups: number, where they begin, how many elements they have (0: there is no such group)."""
    o_group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    o_row, o_part = o_group // n_groups, o_group % n_groups
    n_here = tl.minimum(n - o_part * group, group)
    return o_group, o_row * n + o_part * group, tl.where(o_group < n_groups_in_all, n_here, 0)


@triton.jit
def quantize_kernel(
    p_words,
    p_shares,
    p_codes,
    p_scales,
    p_counts,
    n_groups_in_all,
    n,
    group,
    n_groups,
    FORMAT: tl.constexpr,
    MOST: tl.constexpr,
    IS_BF16: tl.constexpr,
    IS_CLIPPED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    IS_ONE: tl.constexpr,
):
    """Codes and scales of GROUPS groups a program, SIZE elements of each at a time. p_shares: float32[16].

    n: elements in a row. group: of them that share a scale; n_groups: of a row. p_words: int16, int32 or float64.
    p_scales: int32, or int16 for bfloat16. p_counts: int32, elements of each group that are not finite. IS_ONE: SIZE is
    a group or more, so that each element is read once; else three times.
    """
    tl.static_assert(SIZE * (MOST <= 7) <= 1024, "sums of squares would overflow")
    o_group, o_first, n_here = places(n_groups_in_all, n, group, n_groups, GROUPS)
    o_column = tl.arange(0, SIZE)
    b_bits = tl.zeros((GROUPS, SIZE), tl.int32)
    b_top = tl.zeros((GROUPS,), tl.int32)
    b_count = tl.zeros((GROUPS,), tl.int32)
    if IS_ONE:
        m_tile = o_column[None, :] < n_here[:, None]
        b_bits, m_bad = finite_bits(p_words, o_first[:, None] + o_column[None, :], m_tile, FORMAT)
        b_top = tl.max(b_bits & 0x7FFFFFFF, axis=1)
        b_count = tl.sum((m_bad & m_tile).to(tl.int32), axis=1)
    else:
        first = tl.full((), 0, tl.int64)
        while first < group:
            o_here = first + o_column
            m_tile = o_here[None, :] < n_here[:, None]
            b_some, m_bad = finite_bits(p_words, o_first[:, None] + o_here[None, :], m_tile, FORMAT)
            b_top = tl.maximum(b_top, tl.max(b_some & 0x7FFFFFFF, axis=1))
            b_count += tl.sum((m_bad & m_tile).to(tl.int32), axis=1)
            first += SIZE
    b_most = tl.full((GROUPS,), MOST, tl.float32)
    b_limit = tl.div_rn(b_top.to(tl.float32, bitcast=True), b_most)
    if IS_CLIPPED:
        if IS_ONE:
            b_scale = best_of_tile(b_bits, b_limit, p_shares, MOST, IS_BF16)
        else:
            o_candidate = tl.arange(0, N_CANDIDATES)
            b_errors = tl.zeros((GROUPS, N_CANDIDATES), tl.int64)
            first = tl.full((), 0, tl.int64)
            while first < group:
                o_here = first + o_column
                m_tile = o_here[None, :] < n_here[:, None]
                b_some, m_bad = finite_bits(p_words, o_first[:, None] + o_here[None, :], m_tile, FORMAT)
                b_errors = added_errors(b_errors, b_some, b_limit, p_shares, o_candidate, MOST, IS_BF16)
                first += SIZE
            b_scale = best_of_errors(b_errors, b_limit, p_shares, o_candidate, IS_BF16)
    else:
        b_scale = stored_scale(b_limit, tl.load(p_shares), IS_BF16)
    m_group = o_group < n_groups_in_all
    b_word = b_scale.to(tl.int32, bitcast=True)
    if IS_BF16:
        tl.store(p_scales + o_group, (b_word >> 16).to(tl.int16), mask=m_group)
    else:
        tl.store(p_scales + o_group, b_word, mask=m_group)
    tl.store(p_counts + o_group, b_count, mask=m_group)
    b_inverse = tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), b_scale)
    if IS_ONE:
        m_tile = o_column[None, :] < n_here[:, None]
        tl.store(p_codes + o_first[:, None] + o_column[None, :], codes_of(b_bits, b_inverse, MOST), mask=m_tile)
    else:
        first = tl.full((), 0, tl.int64)
        while first < group:
            o_here = first + o_column
            m_tile = o_here[None, :] < n_here[:, None]
            o_tile = o_first[:, None] + o_here[None, :]
            b_some, m_bad = finite_bits(p_words, o_tile, m_tile, FORMAT)
            tl.store(p_codes + o_tile, codes_of(b_some, b_inverse, MOST), mask=m_tile)
            first += SIZE


@triton.jit
def dequantize_kernel(
    p_codes,
    p_scales,
    p_words,
    n_groups_in_all,
    n,
    group,
    n_groups,
    largest,
    FORMAT: tl.constexpr,
    IS_BF16: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Floats of GROUPS groups a program. Arguments as of quantize_kernel; largest: of the float format, float32."""
    o_group, o_first, n_here = places(n_groups_in_all, n, group, n_groups, GROUPS)
    b_scale = tl.load(p_scales + o_group, mask=o_group < n_groups_in_all, other=0).to(tl.int32)
    if IS_BF16:
        b_scale = b_scale << 16
    b_scale = b_scale.to(tl.float32, bitcast=True)
    first = tl.full((), 0, tl.int64)
    while first < group:
        o_here = first + tl.arange(0, SIZE)
        m_tile = o_here[None, :] < n_here[:, None]
        o_tile = o_first[:, None] + o_here[None, :]
        b_x = tl.load(p_codes + o_tile, mask=m_tile, other=0).to(tl.float32) * b_scale[:, None]
        b_x = tl.maximum(tl.minimum(b_x, largest), -largest)
        tl.store(p_words + o_tile, float_word(b_x, FORMAT), mask=m_tile)
        first += SIZE
