"""Kernels that look at words without coding them: exact facts and digests of all, lattices of some. Imports triton.

The hard thing: a digest is a sum of products modulo 2^64 over pieces of 32 bits, each with a key of its row and column
in a block of 2 MiB; a program takes a part of one and tells its sum, which the host multiplies by the block's key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.bits import magnitude
from tricomp.kernels.lanes import put_word, word_at

# Unlike the word compared with, unlike the reference, OR of all, sums of words and of the reference, the word itself.
N_TOLD = tl.constexpr(6)


@triton.jit
def mix32(b_x):
    """Finaliser of MurmurHash3 (A. Appleby), 32 bits. b_x: uint32."""
    b_x = (b_x ^ (b_x >> 16)) * 0x85EBCA6B
    b_x = (b_x ^ (b_x >> 13)) * 0xC2B2AE35
    return b_x ^ (b_x >> 16)


@triton.jit
def product(b_piece, b_low, b_high):
    """piece * (low + 2^32 high) modulo 2^64; uint64. All uint32."""
    return b_piece.to(tl.uint64) * b_low.to(tl.uint64) + ((b_piece * b_high).to(tl.uint64) << 32)


@triton.jit
def unlike(b_x, W: tl.constexpr):
    """Which words of a piece are not 0, counted in as many bits as a word has. b_x: a piece of words of W bits."""
    if W >= 32:
        return (b_x != 0).to(tl.uint32)
    elif W == 16:
        return ((((b_x & 0x7FFF7FFF) + 0x7FFF7FFF) | b_x) >> 15) & 0x00010001
    else:
        return ((((b_x & 0x7F7F7F7F) + 0x7F7F7F7F) | b_x) >> 7) & 0x01010101


@triton.jit
def unlike_words(b_counts, W: tl.constexpr):
    """The sum of all that `unlike` counted, int64. b_counts: uint32, sums that overflow nowhere."""
    if W == 8:
        b_counts = (b_counts & 0x00FF00FF) + ((b_counts >> 8) & 0x00FF00FF)
    if W <= 16:
        b_counts = (b_counts & 0xFFFF) + (b_counts >> 16)
    return tl.sum(b_counts.to(tl.int64))


@triton.jit
def pair_at(p_base, o_byte, n_bytes, IS_WHOLE: tl.constexpr):
    """Two pieces a place, as uint64; where the words end within them, zeros follow. p_base: int64 address."""
    if IS_WHOLE:
        return tl.load((p_base + o_byte).to(tl.pointer_type(tl.uint64)))
    else:
        p_pair = (p_base + o_byte).to(tl.pointer_type(tl.uint64))
        b_pair = tl.load(p_pair, mask=o_byte + 8 <= n_bytes, other=0)
        for BYTE in tl.static_range(7):
            m_byte = (o_byte + 8 > n_bytes) & (o_byte + BYTE < n_bytes)
            b_byte = tl.load((p_base + o_byte + BYTE).to(tl.pointer_type(tl.uint8)), mask=m_byte, other=0)
            b_pair = b_pair | (b_byte.to(tl.uint64) << (8 * BYTE))
        return b_pair


@triton.jit
def there_of(o_byte, n_bytes):
    """Ones in the bits of two pieces that words fill; uint64."""
    b_left = tl.minimum(tl.maximum(n_bytes - o_byte, 0), 8)
    b_some = (tl.full((), 1, tl.uint64) << (8 * (b_left & 7)).to(tl.uint64)) - 1
    return tl.where(b_left == 8, tl.full((), 0xFFFFFFFFFFFFFFFF, tl.uint64), b_some)


@triton.jit
def counted(b_n, b_pair, W: tl.constexpr):
    """`unlike` of two pieces more. Sums overflow nowhere: see `survey_kernel`."""
    if W == 64:
        return b_n + (b_pair != 0).to(tl.uint32)
    else:
        b_n += unlike((b_pair & 0xFFFFFFFF).to(tl.uint32), W)
        return b_n + unlike((b_pair >> 32).to(tl.uint32), W)


@triton.jit
def added(b_sum, b_pair, b_row_low, b_row_high, b_low_0, b_high_0, b_low_1, b_high_1):
    """A digest's sum with two pieces more. Keys: of their row, and of both columns."""
    b_sum += product((b_pair & 0xFFFFFFFF).to(tl.uint32), b_row_low * b_low_0, b_row_high * b_high_0)
    return b_sum + product((b_pair >> 32).to(tl.uint32), b_row_low * b_low_1, b_row_high * b_high_1)


@triton.jit
def survey_kernel(
    p_parts, p_keys, p_told, W: tl.constexpr, HAS_REFERENCE: tl.constexpr, IS_WHOLE: tl.constexpr, ROWS: tl.constexpr
):
    """Facts and digest sums of parts, of at most 60 * ROWS rows of 512 bytes. p_told: int64[n, N_TOLD].

    p_parts: int64[n, 6]: address of words and of the reference, multiples of 8; bytes; row of the digest's block at
    which the part begins; address of the word to compare with; row of p_told. p_keys: uint32[2, 4096], keys of the
    rows. IS_WHOLE: all parts are whole multiples of ROWS rows. ROWS: looked at at a time, four pieces a lane.
    """
    i_part = tl.program_id(0).to(tl.int64)
    p_part = p_parts + 6 * i_part
    p_words = tl.load(p_part)
    p_reference = tl.load(p_part + 1)
    n_bytes = tl.load(p_part + 2).to(tl.int32)
    first_row = tl.load(p_part + 3).to(tl.int32)
    p_first = tl.load(p_part + 4)
    o_lane = tl.arange(0, ROWS * 32) % 32
    o_row = tl.arange(0, ROWS * 32) // 32
    b_column = (4 * o_lane).to(tl.uint32)
    b_low_0, b_high_0 = mix32(b_column + 1) | 1, mix32(b_column + 129) | 1
    b_low_1, b_high_1 = mix32(b_column + 2) | 1, mix32(b_column + 130) | 1
    b_low_2, b_high_2 = mix32(b_column + 3) | 1, mix32(b_column + 131) | 1
    b_low_3, b_high_3 = mix32(b_column + 4) | 1, mix32(b_column + 132) | 1
    b_first = word_at(p_first, tl.full((), 0, tl.int64), p_first != 0, W)
    b_like = b_first.to(tl.uint64)
    if W == 8:
        b_like = b_like * 0x0101010101010101
    elif W == 16:
        b_like = b_like * 0x0001000100010001
    elif W == 32:
        b_like = b_like * 0x0000000100000001
    b_joined = tl.zeros((ROWS * 32,), tl.uint64)
    b_n_first = tl.zeros((ROWS * 32,), tl.uint32)
    b_n_reference = tl.zeros((ROWS * 32,), tl.uint32)
    b_sum = tl.zeros((ROWS * 32,), tl.uint64)
    b_reference_sum = tl.zeros((ROWS * 32,), tl.uint64)
    row = tl.full((), 0, tl.int32)
    while 512 * row < n_bytes:
        o_key = (first_row + row + o_row) & 4095  # rows past a part's end may lie past the block's
        b_row_low = tl.load(p_keys + o_key).to(tl.uint32, bitcast=True)
        b_row_high = tl.load(p_keys + 4096 + o_key).to(tl.uint32, bitcast=True)
        o_byte = 512 * (row + o_row) + 16 * o_lane
        b_one = pair_at(p_words, o_byte, n_bytes, IS_WHOLE)
        b_two = pair_at(p_words, o_byte + 8, n_bytes, IS_WHOLE)
        b_sum = added(b_sum, b_one, b_row_low, b_row_high, b_low_0, b_high_0, b_low_1, b_high_1)
        b_sum = added(b_sum, b_two, b_row_low, b_row_high, b_low_2, b_high_2, b_low_3, b_high_3)
        b_joined = b_joined | b_one | b_two
        b_unlike_one, b_unlike_two = b_one ^ b_like, b_two ^ b_like
        if not IS_WHOLE:
            b_unlike_one = b_unlike_one & there_of(o_byte, n_bytes)
            b_unlike_two = b_unlike_two & there_of(o_byte + 8, n_bytes)
        b_n_first = counted(counted(b_n_first, b_unlike_one, W), b_unlike_two, W)
        if HAS_REFERENCE:
            b_three = pair_at(p_reference, o_byte, n_bytes, IS_WHOLE)
            b_four = pair_at(p_reference, o_byte + 8, n_bytes, IS_WHOLE)
            b_reference_sum = added(
                b_reference_sum, b_three, b_row_low, b_row_high, b_low_0, b_high_0, b_low_1, b_high_1
            )
            b_reference_sum = added(
                b_reference_sum, b_four, b_row_low, b_row_high, b_low_2, b_high_2, b_low_3, b_high_3
            )
            b_n_reference = counted(counted(b_n_reference, b_one ^ b_three, W), b_two ^ b_four, W)
        row += ROWS
    p_out = p_told + N_TOLD * tl.load(p_part + 5)
    tl.store(p_out, unlike_words(b_n_first, W))
    tl.store(p_out + 1, unlike_words(b_n_reference, W))
    tl.store(p_out + 2, tl.reduce(b_joined, 0, either).to(tl.int64))
    tl.store(p_out + 3, tl.sum(b_sum, axis=0).to(tl.int64))
    tl.store(p_out + 4, tl.sum(b_reference_sum, axis=0).to(tl.int64))
    tl.store(p_out + 5, b_first.to(tl.int64))


@triton.jit
def either(b_one, b_other):
    """Bits of one or the other."""
    return b_one | b_other


@triton.jit
def gather_kernel(p_programs, p_lattices, W: tl.constexpr, BLOCK: tl.constexpr):
    """Gather the words of lattices. p_programs: int64[n, 2]: lattice, first place of BLOCK.

    p_lattices: int64[n, 8]: address of the words, of int64 rows and of int64 columns, columns of a row, how many rows
    and columns, address of the output, and what `mean_kernel` shifts by.
    """
    i_program = tl.program_id(0).to(tl.int64)
    p_lattice = p_lattices + 8 * tl.load(p_programs + 2 * i_program)
    o_place = tl.load(p_programs + 2 * i_program + 1) + tl.arange(0, BLOCK)
    n_columns = tl.load(p_lattice + 5)
    m_place = o_place < tl.load(p_lattice + 4) * n_columns
    p_row = (tl.load(p_lattice + 1) + 8 * (o_place // n_columns)).to(tl.pointer_type(tl.int64))
    p_column = (tl.load(p_lattice + 2) + 8 * (o_place % n_columns)).to(tl.pointer_type(tl.int64))
    o_word = tl.load(p_row, mask=m_place, other=0) * tl.load(p_lattice + 3) + tl.load(p_column, mask=m_place, other=0)
    b_word = word_at(tl.load(p_lattice), o_word, m_place, W)
    put_word(tl.load(p_lattice + 6), o_place, b_word, m_place, W)


@triton.jit
def mean_kernel(p_programs, p_lattices, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean octave of each row of lattices of at most COLUMNS columns, int16; job.Lattice says what that is.

    p_programs: int64[n, 2]: lattice, first of ROWS rows. p_lattices: see `gather_kernel`; floats of W bits are shifted
    down by the last column, or up where it is negative.
    """
    i_program = tl.program_id(0).to(tl.int64)
    p_lattice = p_lattices + 8 * tl.load(p_programs + 2 * i_program)
    o_row = tl.load(p_programs + 2 * i_program + 1) + tl.arange(0, ROWS)
    o_column = tl.arange(0, COLUMNS)
    m_row = o_row < tl.load(p_lattice + 4)
    m_column = o_column < tl.load(p_lattice + 5)
    p_row = (tl.load(p_lattice + 1) + 8 * o_row).to(tl.pointer_type(tl.int64))
    p_column = (tl.load(p_lattice + 2) + 8 * o_column).to(tl.pointer_type(tl.int64))
    b_row = tl.load(p_row, mask=m_row, other=0) * tl.load(p_lattice + 3)
    b_column = tl.load(p_column, mask=m_column, other=0)
    m_word = m_row[:, None] & m_column[None, :]
    b_word = word_at(tl.load(p_lattice), b_row[:, None] + b_column[None, :], m_word, W)
    shift = tl.load(p_lattice + 7)
    b_magnitude = magnitude(b_word, W, True, True)
    b_octave = (b_magnitude >> tl.maximum(shift, 0).to(b_word.dtype)) << tl.maximum(-shift, 0).to(b_word.dtype)
    m_counted = b_word != 0
    b_sum = tl.sum(tl.where(m_counted, b_octave.to(tl.int32), 0), axis=1)
    b_n = tl.sum(m_counted.to(tl.int32), axis=1)
    b_mean = tl.where(b_n > 0, (2 * b_sum + b_n) // tl.maximum(2 * b_n, 1), -1)
    p_mean = (tl.load(p_lattice + 6) + 2 * o_row).to(tl.pointer_type(tl.int16))
    tl.store(p_mean, b_mean.to(tl.int16), mask=m_row)
