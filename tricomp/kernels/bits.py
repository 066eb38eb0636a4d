"""Bit fields of words in registers: ordered views, magnitudes, bit lengths, exponents. Imports triton only.

No loads, no stores; mirrors `tricomp.reference.bits`. A word of 8, 16 or 32 bits is computed with as uint32, one of 64
as uint64, with zeros above it. The hard thing: Triton has no count of leading zeros, so lengths come from the exponent
of a float conversion that is exact, whatever the rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def word_mask(W: tl.constexpr):
    """Ones in the bits of a word."""
    return tl.full((), (1 << W) - 1, tl.uint64 if W == 64 else tl.uint32)


@triton.jit
def negated(b_x, W: tl.constexpr):
    """-x modulo 2^W."""
    return (b_x ^ word_mask(W)) + 1 & word_mask(W)


@triton.jit
def top_bit(b_x, W: tl.constexpr):
    """The top bit as 0 or 1."""
    return b_x >> (W - 1)


@triton.jit
def top_bits(b_x, W: tl.constexpr):
    """The word's bits at the top of a uint32; of 64 bits the upper ones."""
    if W == 64:
        return (b_x >> 32).to(tl.uint32)
    else:
        return b_x << (32 - W)


@triton.jit
def in_order(b_x, W: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """Words at the top of uint32 or uint64, such that differences modulo its width are those of `ordered`."""
    if W < 32:
        b_x = b_x << (32 - W)
    if IS_FLOAT and IS_SIGNED:
        if W == 64:
            b_fill = (b_x.to(tl.int64, bitcast=True) >> 63).to(tl.uint64, bitcast=True)
            b_x = b_x ^ (b_fill & tl.full((), (1 << 63) - 1, tl.uint64))
        else:
            b_fill = (b_x.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)
            b_x = b_x ^ (b_fill & ((1 << 31) - (1 << (32 - W))))
    return b_x


@triton.jit
def from_order(b_x, W: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """Inverse of `in_order`, whatever stands below a word."""
    if IS_FLOAT and IS_SIGNED:
        if W == 64:
            b_fill = (b_x.to(tl.int64, bitcast=True) >> 63).to(tl.uint64, bitcast=True)
            b_x = b_x ^ (b_fill & tl.full((), (1 << 63) - 1, tl.uint64))
        else:
            b_fill = (b_x.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)
            b_x = b_x ^ (b_fill & ((1 << 31) - 1))
    if W < 32:
        b_x = b_x >> (32 - W)
    return b_x


@triton.jit
def ordered(b_x, W: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """The order-preserving integer view of words."""
    if IS_SIGNED:
        b_top = tl.full((), 1 << (W - 1), b_x.dtype)
        if IS_FLOAT:
            b_x = b_x ^ (negated(top_bit(b_x, W), W) | b_top)
        else:
            b_x = b_x ^ b_top
    return b_x


@triton.jit
def unordered(b_x, W: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """Inverse of `ordered`."""
    if IS_SIGNED:
        b_top = tl.full((), 1 << (W - 1), b_x.dtype)
        if IS_FLOAT:
            b_x = b_x ^ (negated(top_bit(b_x, W) ^ 1, W) | b_top)
        else:
            b_x = b_x ^ b_top
    return b_x


@triton.jit
def magnitude(b_x, W: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """A float's word without its sign; an integer's absolute value."""
    if IS_SIGNED:
        if IS_FLOAT:
            b_x = b_x & tl.full((), (1 << (W - 1)) - 1, b_x.dtype)
        else:
            b_fill = negated(top_bit(b_x, W), W)
            b_x = (b_x ^ b_fill) + top_bit(b_x, W) & word_mask(W)
    return b_x


@triton.jit
def length_32(b_x):
    """Bits needed to write each number; 0 for 0. b_x: uint32. Returns int32.

    Of neighbouring ones the lower is cleared, so that no rounding carries; that float's exponent is the length's.
    """
    b_apart = b_x ^ (b_x & (b_x >> 1))
    b_field = (b_apart.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.maximum(b_field, 0)


@triton.jit
def bit_length(b_x, W: tl.constexpr):
    """Bits needed to write each word; 0 for 0. Returns int32."""
    if W < 23:  # exact as a float, and never 0
        return ((2 * b_x + 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    elif W <= 32:
        return length_32(b_x)
    else:
        b_high = (b_x >> 32).to(tl.uint32)
        b_part = tl.where(b_high != 0, b_high, (b_x & 0xFFFFFFFF).to(tl.uint32))
        return length_32(b_part) + tl.where(b_high != 0, 32, 0)


@triton.jit
def exponent(b_x, W: tl.constexpr, M: tl.constexpr, IS_FLOAT: tl.constexpr, IS_SIGNED: tl.constexpr):
    """The exponent field of a float; the bit length of an integer's magnitude. Returns int32."""
    b_magnitude = magnitude(b_x, W, IS_FLOAT, IS_SIGNED)
    if IS_FLOAT:
        return (b_magnitude >> M).to(tl.int32)
    else:
        return bit_length(b_magnitude, W)


@triton.jit
def low_bits(b_n, b_like):
    """The n lowest bits set, n below the width of b_like's type."""
    b_one = tl.full((), 1, b_like.dtype)
    return (b_one << b_n.to(b_like.dtype)) - 1
