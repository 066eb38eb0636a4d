"""Prediction stage in registers: a word to (symbol, remainder) and back, its context, the scaled reference.

Imports triton and bits. Mirrors `tricomp.reference.predict`. A symbol is an int32; n_symbols stands for a word that
does not fit, whose entry is that of a patch, see tables.py. No float decides: those here are integers whose conversion
is exact. The hard thing: k, the base and the like are numbers of the frame, not of the kernel, so that one kernel
serves all frames of a kind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.bits import (
    bit_length,
    exponent,
    from_order,
    in_order,
    length_32,
    low_bits,
    magnitude,
    top_bit,
    top_bits,
)
from tricomp.kernels.lanes import word_at

# Fields of what a delta's symbol means, see tables.py: bits below, bits of its remainder, sign, leading bits.
MEANING_LOW = tl.constexpr((1 << 6) - 1)
MEANING_LENGTH = tl.constexpr(6)
MEANING_LENGTH_MASK = tl.constexpr((1 << 7) - 1)
MEANING_SIGN = tl.constexpr(13)
MEANING_LEAD = tl.constexpr(16)


@triton.jit
def split_full(b_x, b_level, k, base, n_symbols, has_sign, W: tl.constexpr, M: tl.constexpr, HAS_SCALES: tl.constexpr):
    """A word's place among the entries of its context, uint32, and its remainder.

    Entries are those of the symbols from 1 on, of a patch, and of symbol 0. b_level: int32, R + C; the numbers are
    int32. The remainder of a patch means nothing, and so does that of symbol 0 where it has no bits.
    """
    n_low = M - k
    b_high = (magnitude(b_x, W, True, True) >> n_low.to(b_x.dtype)).to(tl.int32)
    b_place = b_high - base
    if HAS_SCALES:
        b_place = b_place - (b_level >> 3) * (1 << k)
    # A sign that is not coded makes the place too large, as an uint32, and so does a place below 0.
    b_signs = top_bits(b_x, W) & tl.where(has_sign != 0, 0, 1 << 31).to(tl.uint32)
    b_place = tl.minimum(b_place.to(tl.uint32, bitcast=True) | b_signs, (n_symbols - 1).to(tl.uint32))
    b_place = tl.where(b_x == 0, n_symbols.to(tl.uint32), b_place)
    b_down = b_x >> (W - 1 - n_low).to(b_x.dtype)  # the sign is where it belongs
    return b_place, ((b_x ^ b_down) & low_bits(n_low, b_x)) ^ b_down


@triton.jit
def merge_full(b_symbol, b_remainder, b_level, k, base, W: tl.constexpr, M: tl.constexpr, HAS_SCALES: tl.constexpr):
    """Inverse of `split_full`, patches aside. b_remainder: nothing above the sign, and no sign that is not coded."""
    n_low = (M - k).to(b_remainder.dtype)
    TOP: tl.constexpr = 1 << (W - 1)
    b_high = b_symbol + (base - 1)
    if HAS_SCALES:
        b_high = b_high + ((b_level >> 3) << k)
    b_body = (b_high.to(b_remainder.dtype) << n_low) | (b_remainder & low_bits(n_low, b_remainder))
    b_sign = (b_remainder << ((W - 1) - n_low)) & tl.full((), TOP, b_remainder.dtype)
    b_word = (b_body & tl.full((), TOP - 1, b_remainder.dtype)) | b_sign  # what a damaged stream may exceed
    return tl.where(b_symbol == 0, 0, b_word)


@triton.jit
def context_of_level(b_level, shift):
    """The phase of a level that is the context. shift: 3 - log2 of the contexts."""
    return (b_level & 7) >> shift


@triton.jit
def context_of_word(
    b_y,
    base,
    shift,
    n_contexts,
    W: tl.constexpr,
    M: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_SIGNED: tl.constexpr,
):
    """The window of the prediction's exponent that is the context of a delta."""
    b_place = (exponent(b_y, W, M, IS_FLOAT, IS_SIGNED) - base) >> shift
    return tl.minimum(tl.maximum(b_place, 0), n_contexts - 1)


@triton.jit
def split_delta(
    b_x,
    b_y,
    k,
    base,
    n_symbols,
    has_sign,
    W: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_SIGNED: tl.constexpr,
):
    """As `split_full`, of x - y in their order. b_y: what the difference is taken from.

    Computed with at the top of 32 or 64 bits, where it wraps of itself. The size as a float has its length as the
    exponent, and the bits below its leading one on top of the mantissa: symbol and k bits in one shift.
    """
    RAISED: tl.constexpr = 0 if W > 32 else 32 - W
    b_change = in_order(b_x, W, IS_FLOAT, IS_SIGNED) - in_order(b_y, W, IS_FLOAT, IS_SIGNED)
    if W == 64:
        b_signed = b_change.to(tl.int64, bitcast=True)
        b_negative = (b_signed >> 63).to(tl.uint64, bitcast=True)
        b_size = tl.abs(b_signed).to(tl.uint64, bitcast=True)
    else:
        b_signed = b_change.to(tl.int32, bitcast=True)
        b_negative = (b_signed >> 31).to(tl.uint32, bitcast=True)
        b_size = tl.abs(b_signed).to(tl.uint32, bitcast=True)
    b_exact = b_size
    if W > 23:  # Below a leading one 7 bits stay, the next is cleared and takes what rounding carries.
        b_exact = b_size & ((b_size >> 8) ^ tl.full((), -1, tl.int64).to(b_size.dtype))
    b_float = b_exact.to(tl.float32).to(tl.int32, bitcast=True)
    more = 1 - has_sign
    b_code = (b_float >> (23 - k)) << more
    b_place = b_code + (b_negative.to(tl.int32) & more) - (((126 + RAISED) << k << more) + base + 1)
    b_place = tl.minimum(b_place.to(tl.uint32, bitcast=True), (n_symbols - 1).to(tl.uint32))
    b_place = tl.where(b_size == 0, n_symbols.to(tl.uint32), b_place)
    b_down = tl.maximum((b_float >> 23) - (127 + RAISED + k), 0)
    b_one = tl.full((), 1, b_x.dtype) << b_down.to(b_x.dtype)
    b_sign = b_one & b_negative & (0 - has_sign).to(b_x.dtype)
    return b_place, ((b_size >> RAISED) & (b_one - 1)) | b_sign


@triton.jit
def merge_delta(b_meaning, b_remainder, b_y, W: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """Inverse of `split_delta`, patches aside. b_meaning: uint32, of the symbol, see tables.py; 0: no difference.

    b_remainder: nothing above the sign, and no sign that is not coded. Computed with in the order of `in_order`.
    """
    RAISED: tl.constexpr = 0 if W > 32 else 32 - W
    b_low = (b_meaning & MEANING_LOW).to(b_y.dtype)
    b_sign = b_remainder >> b_low
    b_size = (((b_meaning >> MEANING_LEAD).to(b_y.dtype) ^ b_sign) << b_low) ^ b_remainder
    b_sign = b_sign | ((b_meaning >> MEANING_SIGN) & 1).to(b_y.dtype)
    b_change = (b_size ^ (0 - b_sign)) + b_sign
    return from_order(in_order(b_y, W, IS_FLOAT, IS_SIGNED) + (b_change << RAISED), W, IS_FLOAT, IS_SIGNED)


@triton.jit
def factor_of(b_row, b_column, factor):
    """common x row x column, cut to 30 fractional bits; uint64 below 2^32. b_row, b_column: uint64, one = 2^15."""
    b_all = ((b_row * b_column) * factor.to(tl.uint64)) >> 30
    return tl.minimum(b_all, tl.full((), (1 << 32) - 1, tl.uint64))


@triton.jit
def scaled(b_y, b_factor, W: tl.constexpr, M: tl.constexpr):
    """A float's word times a factor. b_factor: uint64 below 2^32, one = 2^30. FORMAT.md, "scaled delta"."""
    E_MAX: tl.constexpr = (1 << (W - 1 - M)) - 1
    b_body = magnitude(b_y, W, True, True)
    b_field = (b_body >> M).to(tl.int32)
    if W == 64:
        b_g = (b_body & ((1 << M) - 1)) | tl.full((), 1 << M, tl.uint64)
        b_p = (b_g >> 24) * b_factor + (((b_g & 0xFFFFFF) * b_factor) >> 24)
        b_length = bit_length(b_p, 64)
        b_drop = b_length - 1 - M
        b_down = tl.maximum(b_drop, 0).to(tl.uint64)
        b_half = (tl.full((), 1, tl.uint64) << b_down) >> 1
        b_q = ((b_p + b_half) >> b_down) << tl.maximum(-b_drop, 0).to(tl.uint64)
        b_new = tl.where(b_p == 0, 0, b_field + b_length - 1 - (M + 6))
    else:
        # A product is as long as its factors together, or one bit longer with `b_more`. It is taken twice, so that the
        # bit that rounds is there when nothing is dropped.
        b_length = length_32(b_factor.to(tl.uint32))
        b_g = (b_body & ((1 << M) - 1)) | (1 << M)
        b_p = (b_g * 2).to(tl.uint64) * b_factor
        b_more = (b_p >> (b_length + (M + 1)).to(tl.uint64)).to(tl.int32)
        b_down = (tl.maximum(b_length - 1, 0) + b_more).to(tl.uint64)
        b_q = ((b_p >> b_down).to(tl.uint32) + 1) >> 1
        b_new = b_field + b_more + tl.where(b_length == 0, -E_MAX - 1, b_length - 31)
    b_scaled = ((b_new - 1).to(b_y.dtype) << M) + b_q
    b_scaled = tl.minimum(b_scaled, tl.full((), (E_MAX << M) - 1, b_y.dtype))
    b_scaled = tl.where(b_new < 1, 0, b_scaled)
    b_kept = tl.where((b_field == 0) | (b_field == E_MAX), b_body, b_scaled)
    return b_kept | (b_y ^ b_body)


@triton.jit
def place_in(b_x, p_palette, n_symbols, W: tl.constexpr):
    """The place of words in an ascending list of up to 256; n_symbols where they are not in it. p_palette: int64."""
    b_place = tl.zeros(b_x.shape, tl.int32)  # words below x, found from the highest bit of that number down
    for bit in tl.static_range(8, -1, -1):
        b_next = b_place + (1 << bit)
        m_in = b_next <= n_symbols
        b_below = word_at(p_palette, (b_next - 1).to(tl.int64), m_in, W)
        b_place = tl.where(m_in & (b_below < b_x), b_next, b_place)
    b_found = word_at(p_palette, b_place.to(tl.int64), b_place < n_symbols, W)
    return tl.where((b_place < n_symbols) & (b_found == b_x), b_place, n_symbols)


@triton.jit
def rounded(b_x, W: tl.constexpr, M: tl.constexpr, V: tl.constexpr, N: tl.constexpr):
    """Floats of W bits, M of mantissa, to nearest even as floats of V bits, N of mantissa. Returns words of V bits.

    Infinities stay, overflow gives one, and a NaN keeps its sign and the top of its payload, with the quiet bit set.
    """
    IN_MAX: tl.constexpr = (1 << (W - 1 - M)) - 1
    OUT_MAX: tl.constexpr = (1 << (V - 1 - N)) - 1
    b_body = magnitude(b_x, W, True, True).to(tl.uint64)
    b_field = (b_body >> M).to(tl.int32)
    b_fraction = b_body & ((1 << M) - 1)
    m_subnormal = b_field == 0
    # A subnormal's significand is brought to the normal form 1.f by shifting its top bit up to bit M.
    b_lift = tl.where(m_subnormal, M + 1 - bit_length(b_fraction, 64), 0)
    b_g = tl.where(m_subnormal, b_fraction << b_lift.to(tl.uint64), b_fraction | tl.full((), 1 << M, tl.uint64))
    b_new = tl.maximum(b_field, 1) - b_lift + ((OUT_MAX >> 1) - (IN_MAX >> 1))
    # Below the target's normal range more bits are dropped; what is dropped decides the rounding.
    b_drop = (M - N) + tl.maximum(1 - b_new, 0)
    b_down = tl.minimum(tl.maximum(b_drop, 0), 63).to(tl.uint64)
    b_one = tl.full((), 1, tl.uint64)
    b_rest = b_g & ((b_one << b_down) - 1)
    b_half = (b_one << b_down) >> 1
    b_q = b_g >> b_down
    m_up = (b_rest > b_half) | ((b_rest == b_half) & ((b_q & 1) == 1))
    b_q = tl.where(b_drop > 0, b_q + tl.where(m_up, 1, 0).to(tl.uint64), b_g << tl.maximum(-b_drop, 0).to(tl.uint64))
    b_value = tl.where(b_new < 1, b_q, b_q + (tl.maximum(b_new - 1, 0).to(tl.uint64) << N))
    b_infinity = tl.full((), OUT_MAX << N, tl.uint64)
    b_value = tl.where((b_value > b_infinity) | (b_new >= OUT_MAX), b_infinity, b_value)
    if M >= N:
        b_payload = b_fraction >> (M - N)
    else:
        b_payload = b_fraction << (N - M)
    b_nan = b_infinity | tl.full((), 1 << (N - 1), tl.uint64) | b_payload
    b_value = tl.where(b_field == IN_MAX, tl.where(b_fraction == 0, b_infinity, b_nan), b_value)
    b_value = tl.where(b_body == 0, 0, b_value)
    b_value = b_value | (top_bit(b_x, W).to(tl.uint64) << (V - 1))
    if V == 64:
        return b_value
    else:
        return b_value.to(tl.uint32)
