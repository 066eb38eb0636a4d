"""The lane layout in registers: 32 lanes a chunk, C chunks a program, one-dimensional [C * 32]. Imports triton only.

The hard thing: lanes of one chunk must agree on who takes which word without a barrier. A view [C, 32] exists inside
`ballot` and the like alone, where it stays within a warp; elsewhere it would be carried through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = 32
ROW = 128  # positions of four steps: lane l holds positions 128 q + 4 l + k at step 4 q + k


@triton.jit
def over_lanes(b_of_chunk, C: tl.constexpr):
    """[C] -> [C * 32], the same for every lane of a chunk."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(b_of_chunk, 1), (C, 32)), (C * 32,))


@triton.jit
def ballot(b_flag, b_bit, C: tl.constexpr):
    """uint32 of whose flag is set among the lanes of a chunk. b_bit: uint32, 1 << lane."""
    b_bits = tl.reshape(tl.where(b_flag, b_bit, 0), (C, 32))
    return over_lanes(tl.sum(b_bits, axis=1), C)


@triton.jit
def population(b_x):
    """How many bits are set. b_x: uint32. Returns int32."""
    b_x = b_x - ((b_x >> 1) & 0x55555555)
    b_x = (b_x & 0x33333333) + ((b_x >> 2) & 0x33333333)
    b_x = (b_x + (b_x >> 4)) & 0x0F0F0F0F
    return ((b_x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def sum_of_chunk(b_x, C: tl.constexpr):
    """The sum over the lanes of a chunk, at every lane."""
    return over_lanes(tl.sum(tl.reshape(b_x, (C, 32)), axis=1), C)


@triton.jit
def least_of_chunk(b_x, C: tl.constexpr):
    """The least of the lanes of a chunk, at every lane."""
    return over_lanes(tl.min(tl.reshape(b_x, (C, 32)), axis=1), C)


@triton.jit
def most_of_chunk(b_x, C: tl.constexpr):
    """The greatest of the lanes of a chunk, at every lane."""
    return over_lanes(tl.max(tl.reshape(b_x, (C, 32)), axis=1), C)


@triton.jit
def words_at(p_base, o_first, b_left, W: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Four neighbouring words a lane. p_base: int64 address; o_first: int64, of the first of each lane's four.

    b_left: how many words there are from o_first on; those that are not there read 0. With IS_WHOLE all are, and the
    base is a multiple of 8.
    """
    if IS_WHOLE and W == 8:
        b_all = tl.load((p_base + o_first).to(tl.pointer_type(tl.uint32)))
        return b_all & 0xFF, (b_all >> 8) & 0xFF, (b_all >> 16) & 0xFF, b_all >> 24
    elif IS_WHOLE and W == 16:
        b_all = tl.load((p_base + 2 * o_first).to(tl.pointer_type(tl.uint64)))
        b_low, b_high = (b_all & 0xFFFFFFFF).to(tl.uint32), (b_all >> 32).to(tl.uint32)
        return b_low & 0xFFFF, b_low >> 16, b_high & 0xFFFF, b_high >> 16
    elif IS_WHOLE and W == 32:
        p_all = (p_base + 4 * o_first).to(tl.pointer_type(tl.uint64))
        b_one, b_two = tl.load(p_all), tl.load(p_all + 1)
        return (
            (b_one & 0xFFFFFFFF).to(tl.uint32),
            (b_one >> 32).to(tl.uint32),
            (b_two & 0xFFFFFFFF).to(tl.uint32),
            (b_two >> 32).to(tl.uint32),
        )
    else:
        return (
            word_at(p_base, o_first, b_left > 0, W),
            word_at(p_base, o_first + 1, b_left > 1, W),
            word_at(p_base, o_first + 2, b_left > 2, W),
            word_at(p_base, o_first + 3, b_left > 3, W),
        )


@triton.jit
def word_at(p_base, o_word, m_word, W: tl.constexpr):
    """One word a lane, as it is computed with; 0 where the mask is not set."""
    if W == 8:
        return tl.load((p_base + o_word).to(tl.pointer_type(tl.uint8)), mask=m_word, other=0).to(tl.uint32)
    elif W == 16:
        return tl.load((p_base + 2 * o_word).to(tl.pointer_type(tl.uint16)), mask=m_word, other=0).to(tl.uint32)
    elif W == 32:
        return tl.load((p_base + 4 * o_word).to(tl.pointer_type(tl.uint32)), mask=m_word, other=0)
    else:
        return tl.load((p_base + 8 * o_word).to(tl.pointer_type(tl.uint64)), mask=m_word, other=0)


@triton.jit
def put_word(p_base, o_word, b_word, m_word, W: tl.constexpr):
    """Inverse of `word_at`."""
    if W == 8:
        tl.store((p_base + o_word).to(tl.pointer_type(tl.uint8)), b_word.to(tl.uint8), mask=m_word)
    elif W == 16:
        tl.store((p_base + 2 * o_word).to(tl.pointer_type(tl.uint16)), b_word.to(tl.uint16), mask=m_word)
    elif W == 32:
        tl.store((p_base + 4 * o_word).to(tl.pointer_type(tl.uint32)), b_word, mask=m_word)
    else:
        tl.store((p_base + 8 * o_word).to(tl.pointer_type(tl.uint64)), b_word, mask=m_word)


@triton.jit
def put_words(
    p_base,
    o_first,
    b_0,
    b_1,
    b_2,
    b_3,
    b_left,
    W: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Inverse of `words_at`."""
    if IS_WHOLE and W == 8:
        b_all = b_0 | (b_1 << 8) | (b_2 << 16) | (b_3 << 24)
        tl.store((p_base + o_first).to(tl.pointer_type(tl.uint32)), b_all)
    elif IS_WHOLE and W == 16:
        b_all = (b_0 | (b_1 << 16)).to(tl.uint64) | ((b_2 | (b_3 << 16)).to(tl.uint64) << 32)
        tl.store((p_base + 2 * o_first).to(tl.pointer_type(tl.uint64)), b_all)
    elif IS_WHOLE and W == 32:
        p_all = (p_base + 4 * o_first).to(tl.pointer_type(tl.uint64))
        tl.store(p_all, b_0.to(tl.uint64) | (b_1.to(tl.uint64) << 32))
        tl.store(p_all + 1, b_2.to(tl.uint64) | (b_3.to(tl.uint64) << 32))
    else:
        put_word(p_base, o_first, b_0, b_left > 0, W)
        put_word(p_base, o_first + 1, b_1, b_left > 1, W)
        put_word(p_base, o_first + 2, b_2, b_left > 2, W)
        put_word(p_base, o_first + 3, b_3, b_left > 3, W)


@triton.jit
def forward(b_row, b_column, n_rows, n_more, n_columns):
    """Row and column of a split after some positions more, which are n_rows whole rows and n_more columns."""
    b_column += n_more
    m_past = b_column >= n_columns
    return b_row + n_rows + m_past.to(b_row.dtype), tl.where(m_past, b_column - n_columns, b_column)


@triton.jit
def backward(b_row, b_column, n_rows, n_less, n_columns):
    """Inverse of `forward`."""
    b_column -= n_less
    m_before = b_column < 0
    return b_row - n_rows - m_before.to(b_row.dtype), tl.where(m_before, b_column + n_columns, b_column)
