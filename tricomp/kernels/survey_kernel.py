"""Kernels that look at words without coding them: exact facts and digests of all, lattices of some. Imports triton.

The hard thing: a digest is a sum of products modulo 2^64 over pieces of 32 bits, each with a key of its row and column
in a block of 2 MiB; a program takes a part of one and tells its sum, which the host multiplies by the block's key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.bits import magnitude
from tricomp.kernels.lanes import population, put_word, word_at

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
def n_unlike(b_x, W: tl.constexpr):
    """How many of the words in a piece are not 0. b_x: uint32, of words of W <= 32 bits. Returns int32."""
    if W == 32:
        return (b_x != 0).to(tl.int32)
    elif W == 16:
        return population((((b_x & 0x7FFF7FFF) + 0x7FFF7FFF) | b_x) & 0x80008000)
    else:
        return population((((b_x & 0x7F7F7F7F) + 0x7F7F7F7F) | b_x) & 0x80808080)


@triton.jit
def piece_at(p_base, o_byte, n_bytes):
    """A piece a place, u32; where the words end within it, zeros follow. p_base: int64, a multiple of 4."""
    b_piece = tl.load((p_base + o_byte).to(tl.pointer_type(tl.uint32)), mask=o_byte + 4 <= n_bytes, other=0)
    if n_bytes % 4 != 0:
        for BYTE in tl.static_range(3):
            m_byte = (o_byte + 4 > n_bytes) & (o_byte + BYTE < n_bytes)
            b_byte = tl.load((p_base + o_byte + BYTE).to(tl.pointer_type(tl.uint8)), mask=m_byte, other=0)
            b_piece = b_piece | (b_byte.to(tl.uint32) << (8 * BYTE))
    return b_piece


@triton.jit
def survey_kernel(p_parts, p_told, W: tl.constexpr, HAS_REFERENCE: tl.constexpr, ROWS: tl.constexpr):
    """Facts and digest sums of parts. p_parts: int64[n, 5]: address of words and of the reference, both multiples of 4;

    bytes; row of 512 bytes in the digest's block at which the part begins; address of the word to compare with.
    p_told: int64[n, N_TOLD]. ROWS: looked at at a time.
    """
    i_part = tl.program_id(0).to(tl.int64)
    p_part = p_parts + 5 * i_part
    p_words = tl.load(p_part)
    p_reference = tl.load(p_part + 1)
    n_bytes = tl.load(p_part + 2)
    first_row = tl.load(p_part + 3).to(tl.int32)
    p_first = tl.load(p_part + 4)
    o_piece = tl.arange(0, ROWS * 128)
    b_column = (o_piece % 128).to(tl.uint32)
    b_column_low = mix32(b_column + 1) | 1
    b_column_high = mix32(b_column + 129) | 1
    # The word to compare with as a piece; one of 64 bits as two, the upper one in odd columns.
    if W == 8:
        b_like = tl.load(p_first.to(tl.pointer_type(tl.uint8))).to(tl.uint32) * 0x01010101
    elif W == 16:
        b_like = tl.load(p_first.to(tl.pointer_type(tl.uint16))).to(tl.uint32) * 0x00010001
    elif W == 32:
        b_like = tl.load(p_first.to(tl.pointer_type(tl.uint32)))
    else:
        b_like = tl.load((p_first + 4 * (b_column & 1).to(tl.int64)).to(tl.pointer_type(tl.uint32)))
    b_joined = tl.zeros((ROWS * 128,), tl.uint32)
    b_n_first = tl.zeros((ROWS * 128,), tl.int32)
    b_n_reference = tl.zeros((ROWS * 128,), tl.int32)
    b_sum = tl.zeros((ROWS * 128,), tl.uint64)
    b_reference_sum = tl.zeros((ROWS * 128,), tl.uint64)
    at = tl.full((), 0, tl.int64)
    while at < n_bytes:
        o_byte = at + 4 * o_piece.to(tl.int64)
        b_row = (first_row + (at // 512).to(tl.int32) + o_piece // 128).to(tl.uint32)
        b_low = (mix32(b_row ^ 0x9E3779B9) | 1) * b_column_low
        b_high = (mix32(b_row ^ 0x7F4A7C15) | 1) * b_column_high
        b_piece = piece_at(p_words, o_byte, n_bytes)
        b_sum += product(b_piece, b_low, b_high)
        b_joined = b_joined | b_piece
        b_left = tl.minimum(tl.maximum(n_bytes - o_byte, 0), 4).to(tl.uint32)
        b_mask = tl.where(b_left == 4, 0xFFFFFFFF, ((tl.full((), 1, tl.uint32) << (8 * (b_left & 3))) - 1)).to(
            tl.uint32
        )
        b_unlike = (b_piece ^ b_like) & b_mask
        if W == 64:
            b_n_first += either_half(b_unlike, ROWS)
        else:
            b_n_first += n_unlike(b_unlike, W)
        if HAS_REFERENCE:
            b_other = piece_at(p_reference, o_byte, n_bytes)
            b_reference_sum += product(b_other, b_low, b_high)
            if W == 64:
                b_n_reference += either_half(b_piece ^ b_other, ROWS)
            else:
                b_n_reference += n_unlike(b_piece ^ b_other, W)
        at += 512 * ROWS
    p_out = p_told + N_TOLD * i_part
    tl.store(p_out, tl.sum(b_n_first.to(tl.int64), axis=0))
    tl.store(p_out + 1, tl.sum(b_n_reference.to(tl.int64), axis=0))
    if W == 64:
        b_joined_wide = b_joined.to(tl.uint64) << (32 * (b_column & 1)).to(tl.uint64)
        tl.store(p_out + 2, tl.reduce(b_joined_wide, 0, either).to(tl.int64))
    else:
        tl.store(p_out + 2, tl.reduce(b_joined.to(tl.uint64), 0, either).to(tl.int64))
    tl.store(p_out + 3, tl.sum(b_sum, axis=0).to(tl.int64))
    tl.store(p_out + 4, tl.sum(b_reference_sum, axis=0).to(tl.int64))
    tl.store(p_out + 5, word_at(p_first, tl.full((), 0, tl.int64), p_first != 0, W).to(tl.int64))


@triton.jit
def either(b_one, b_other):
    """Bits of one or the other."""
    return b_one | b_other


@triton.jit
def either_half(b_x, ROWS: tl.constexpr):
    """At even places 1 if a pair of neighbours is not all 0, else 0; int32."""
    b_pairs = tl.reshape((b_x != 0).to(tl.int32), (ROWS * 64, 2))
    b_any = tl.max(b_pairs, axis=1)
    b_place = tl.arange(0, ROWS * 128)
    b_both = tl.reshape(tl.broadcast_to(tl.expand_dims(b_any, 1), (ROWS * 64, 2)), (ROWS * 128,))
    return tl.where(b_place % 2 == 0, b_both, 0)


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
