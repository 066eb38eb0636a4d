"""Remainder packing in registers: a step of the bit stack, a row of vertically packed bits. Imports triton and lanes.

Mirrors `tricomp.reference.pack`. A stack of 16-bit words is held in uint32, one of 32-bit words in uint64. The hard
thing: both directions must be undone without knowing any length, so encoders go backwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.lanes import ballot, population


@triton.jit
def stack_push(
    b_hold,
    b_held,
    b_value,
    b_length,
    p_words,
    o_next,
    m_lane,
    b_bit,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """Push one value of b_length bits (int32, up to B) a lane. b_held: int32, bits held, below B.

    Above those, b_hold has bits that were stored before. p_words: int64 address of words of B bits, filled downwards;
    o_next: int32, one past the next. Returns b_hold, b_held, o_next. Lanes that hold back push 0 bits.
    """
    b_hold = (b_hold << b_length.to(b_hold.dtype)) | b_value.to(b_hold.dtype)
    b_held += b_length
    m_full = b_held >= B
    b_full = ballot(m_full, b_bit, C)
    o_word = o_next - population(b_full & (0 - b_bit))  # those of this lane and of the lanes above it are still to come
    b_held &= B - 1
    b_above = b_hold >> b_held.to(b_hold.dtype)
    if B == 16:
        p_word = (p_words + 2 * o_word.to(tl.int64)).to(tl.pointer_type(tl.uint16))
        tl.store(p_word, b_above.to(tl.uint16), mask=m_full)
    else:
        p_word = (p_words + 4 * o_word.to(tl.int64)).to(tl.pointer_type(tl.uint32))
        tl.store(p_word, b_above.to(tl.uint32), mask=m_full)
    return b_hold, b_held, o_next - population(b_full)


@triton.jit
def stack_pop(b_hold, b_held, b_length, p_words, o_next, b_bit, B: tl.constexpr, C: tl.constexpr):
    """Pop one value of b_length bits (int32, up to B) a lane. Returns values (uint32), b_hold, b_held, o_next.

    p_words, o_next: as in `stack_push`, taken upwards. Whatever the words hold, a step moves o_next by 32 at most; of
    words of 16 bits lanes that take none read one of those too.
    """
    m_short = b_held < b_length
    b_short = ballot(m_short, b_bit, C)
    o_word = o_next + population(b_short & (b_bit - 1))
    b_up = b_held.to(b_hold.dtype)
    if B == 16:
        b_word = tl.load((p_words + 2 * o_word.to(tl.int64)).to(tl.pointer_type(tl.uint16))).to(tl.uint32)
        b_hold = tl.where(m_short, b_hold | (b_word << b_up), b_hold)
    else:
        p_word = (p_words + 4 * o_word.to(tl.int64)).to(tl.pointer_type(tl.uint32))
        b_hold = b_hold | (tl.load(p_word, mask=m_short, other=0).to(tl.uint64) << b_up)
    b_held += tl.where(m_short, B, 0) - b_length
    # The ones below 2^length: with words of 32 bits what a shift by it leaves of 32 ones above them.
    b_length = b_length.to(b_hold.dtype)
    if B == 16:
        b_ones = (tl.full((), 1, tl.uint32) << b_length) - 1
    else:
        b_ones = ((tl.full((), (1 << 32) - 1, tl.uint64) << b_length) >> 32).to(tl.uint32)
    return b_hold.to(tl.uint32) & b_ones, b_hold >> b_length, b_held, o_next + population(b_short)


@triton.jit
def joined_row(b_0, b_1, b_2, b_3, WIDTH: tl.constexpr):
    """A lane's four values of a row side by side; uint32. Added: a shift and an addition are one instruction."""
    return b_0 + (b_1 << WIDTH) + (b_2 << (2 * WIDTH)) + (b_3 << (3 * WIDTH))


@triton.jit
def pack_row(b_hold, b_row, p_words, o_lane, q, m_row, WIDTH: tl.constexpr):
    """Pack row q of four values of WIDTH bits a lane, rows descending. b_hold: see `hold_of_rows`; pushed last.

    p_words: int64 address of u32, a number; o_lane: int32, from there to each lane's first. m_row: whether the row is
    one of the chunk's. Returns b_hold. A word is stored with the row that holds its lowest bit; b_hold goes on with
    bits that were stored, and they leave it at its top.
    """
    if WIDTH == 8:
        p_word = p_words + 4 * (o_lane + 32 * q).to(tl.int64)
        tl.store(p_word.to(tl.pointer_type(tl.uint32)), b_row, mask=m_row)
    elif 8 % WIDTH == 0:
        N_ROWS: tl.constexpr = 8 // WIDTH
        b_hold = (b_hold << (4 * WIDTH)) + b_row
        if q % N_ROWS == 0:
            p_word = p_words + 4 * (o_lane + 32 * (q // N_ROWS)).to(tl.int64)
            tl.store(p_word.to(tl.pointer_type(tl.uint32)), b_hold, mask=m_row)
    else:
        b_hold = (b_hold << (4 * WIDTH)) | b_row.to(tl.uint64)
        n_kept = (-4 * WIDTH * q) & 31
        if n_kept < 4 * WIDTH:
            p_word = p_words + 4 * (o_lane + 32 * ((4 * WIDTH * q + 31) // 32)).to(tl.int64)
            b_word = ((b_hold >> n_kept.to(tl.uint64)) & 0xFFFFFFFF).to(tl.uint32)
            tl.store(p_word.to(tl.pointer_type(tl.uint32)), b_word, mask=m_row)
    return b_hold


@triton.jit
def append_row(b_hold, b_row, p_words, q, m_row, o_lane, WIDTH: tl.constexpr):
    """The same layout as `pack_row`, rows ascending. b_hold: uint64, bits of the word that is being filled; at first 0.

    A word is stored with each row that has bits of it. Returns b_hold.
    """
    if WIDTH == 8:
        p_word = (p_words + 4 * (32 * q + o_lane).to(tl.int64)).to(tl.pointer_type(tl.uint32))
        tl.store(p_word, b_row, mask=m_row)
    else:
        j = 4 * WIDTH * q // 32
        n_below = 4 * WIDTH * q % 32
        b_hold = b_hold | (b_row.to(tl.uint64) << n_below.to(tl.uint64))
        p_word = (p_words + 4 * (32 * j + o_lane).to(tl.int64)).to(tl.pointer_type(tl.uint32))
        tl.store(p_word, (b_hold & 0xFFFFFFFF).to(tl.uint32), mask=m_row)
        tl.store(p_word + 32, (b_hold >> 32).to(tl.uint32), mask=m_row & (n_below + 4 * WIDTH > 32))
        if n_below + 4 * WIDTH >= 32:
            b_hold = b_hold >> 32
    return b_hold


@triton.jit
def hold_of_rows(WIDTH: tl.constexpr, C: tl.constexpr):
    """Nothing yet, for `pack_row`: uint64 where words of 32 bits end within rows, else uint32. [C * 32]"""
    return tl.zeros((C * 32,), tl.uint32 if 8 % WIDTH == 0 else tl.uint64)


@triton.jit
def unpack_row(p_words, q, m_row, o_lane, WIDTH: tl.constexpr):
    """Inverse of `pack_row`, any row at any time: a lane's four values of row q, uint32 each."""
    return parted_row(row_at(p_words, q, m_row, 0, o_lane, WIDTH), WIDTH)


@triton.jit
def row_at(p_words, q, m_row, b_other, o_lane, WIDTH: tl.constexpr):
    """A lane's values of row q as they are packed, uint32; b_other where m_row is not set."""
    if WIDTH == 8:
        p_word = (p_words + 4 * (32 * q + o_lane).to(tl.int64)).to(tl.pointer_type(tl.uint32))
        return tl.load(p_word, mask=m_row, other=b_other)
    else:
        n_below = 4 * WIDTH * q % 32
        p_word = (p_words + 4 * (32 * (4 * WIDTH * q // 32) + o_lane).to(tl.int64)).to(tl.pointer_type(tl.uint32))
        b_row = tl.load(p_word, mask=m_row, other=0) >> n_below.to(tl.uint32)
        if 8 % WIDTH != 0:  # then words end within rows
            b_next = tl.load(p_word + 32, mask=m_row & (n_below + 4 * WIDTH > 32), other=0)
            b_row = b_row | (b_next.to(tl.uint64) << (32 - n_below).to(tl.uint64)).to(tl.uint32)
        return tl.where(m_row, b_row, b_other)


@triton.jit
def parted_row(b_row, WIDTH: tl.constexpr):
    """Inverse of `joined_row`, whatever stands above."""
    b_mask = (1 << WIDTH) - 1
    return (
        b_row & b_mask,
        (b_row >> WIDTH) & b_mask,
        (b_row >> (2 * WIDTH)) & b_mask,
        (b_row >> (3 * WIDTH)) & b_mask,
    )
