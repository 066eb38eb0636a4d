"""Kernels that put coded chunks together: sections copied side by side, patches spelt out. Imports triton, the stages.

The hard thing: patches end on any byte, and their words follow their positions at once, so these are stored in pieces
of two bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.lanes import word_at


@triton.jit
def copy_kernel(p_sections, p_out, n_each, BLOCK: tl.constexpr):
    """Copy sections. p_sections: int64[n, 3]: source address; byte of the output, a multiple of 16; bytes.

    Programs (n, parts): each takes n_each bytes, a multiple of 16 * BLOCK, of one section. A section's end is filled up
    with zeros to a multiple of 16. Streams stand at multiples of 16; words of raw chunks anywhere. p_out: uint8[...].
    """
    p_section = p_sections + 3 * tl.program_id(0).to(tl.int64)
    source = tl.load(p_section)
    n_bytes = tl.load(p_section + 2)
    p_target = p_out + tl.load(p_section + 1)
    at = tl.program_id(1).to(tl.int64) * n_each
    end = tl.minimum(at + n_each, n_bytes)
    o_word = tl.arange(0, BLOCK)
    if source % 8 != 0:
        while at < end:
            o_byte = at + o_word.to(tl.int64)
            b_byte = tl.load((source + o_byte).to(tl.pointer_type(tl.uint8)), mask=o_byte < end, other=0)
            tl.store((p_target + o_byte).to(tl.pointer_type(tl.uint8)), b_byte, mask=o_byte < end)
            at += BLOCK
    while at < end:
        o_byte = at + 8 * o_word.to(tl.int64)
        m_whole = o_byte + 8 <= n_bytes
        b_whole = tl.load((source + o_byte).to(tl.pointer_type(tl.uint64)), mask=m_whole, other=0)
        tl.store((p_target + o_byte).to(tl.pointer_type(tl.uint64)), b_whole, mask=m_whole)
        at += 8 * BLOCK
    if (end == n_bytes) & (end > tl.program_id(1).to(tl.int64) * n_each):  # the last byte is this program's
        o_last = (n_bytes // 8) * 8 + tl.arange(0, 32)
        b_byte = tl.load((source + o_last).to(tl.pointer_type(tl.uint8)), mask=o_last < n_bytes, other=0)
        m_last = o_last < (n_bytes + 15) // 16 * 16
        tl.store((p_target + o_last).to(tl.pointer_type(tl.uint8)), b_byte, mask=m_last)


@triton.jit
def patch_kernel(p_patches, p_out, W: tl.constexpr):
    """Spell out the patches of chunks: their positions, then their words, then zeros up to a multiple of 16 bytes.

    p_patches: int64[n, 6]: address of the chunk's words, their number, address of the flags (for each lane, 16 bits for
    four rows), patches (0: nothing to do), byte of the output, and its W, which picks the launch that does it. p_out:
    uint8[...].
    """
    p_patch = p_patches + 6 * tl.program_id(0).to(tl.int64)
    p_words = tl.load(p_patch)
    n_words = tl.load(p_patch + 1).to(tl.int32)
    p_flags = tl.load(p_patch + 2)
    n_patches = tl.load(p_patch + 3)
    p_target = p_out + tl.load(p_patch + 4)
    o_lane = tl.arange(0, 32)
    if (n_patches > 0) & (tl.load(p_patch + 5) == W):
        n_done = tl.full((), 0, tl.int64)
        q = tl.full((), 0, tl.int32)
        while q < (n_words + 127) // 128:
            p_four = (p_flags + 2 * (32 * (q // 4) + o_lane).to(tl.int64)).to(tl.pointer_type(tl.uint16))
            b_four = tl.load(p_four).to(tl.uint32) >> (4 * (q % 4)).to(tl.uint32)
            b_0, b_1, b_2, b_3 = b_four & 1, (b_four >> 1) & 1, (b_four >> 2) & 1, (b_four >> 3) & 1
            b_count = (b_0 + b_1 + b_2 + b_3).to(tl.int32)
            n_row = tl.sum(b_count, axis=0)
            if n_row > 0:
                b_rank = n_done + (tl.cumsum(b_count, axis=0) - b_count)
                o_word = 128 * q + 4 * o_lane
                put_patch(p_words, o_word, p_target, b_rank, n_patches, b_0, W)
                b_rank += b_0.to(tl.int64)
                put_patch(p_words, o_word + 1, p_target, b_rank, n_patches, b_1, W)
                b_rank += b_1.to(tl.int64)
                put_patch(p_words, o_word + 2, p_target, b_rank, n_patches, b_2, W)
                b_rank += b_2.to(tl.int64)
                put_patch(p_words, o_word + 3, p_target, b_rank, n_patches, b_3, W)
                n_done += n_row
            q += 1
        end = n_patches * (2 + W // 8)
        o_zero = end + o_lane
        p_zero = (p_target + o_zero).to(tl.pointer_type(tl.uint8))
        tl.store(p_zero, tl.zeros_like(o_lane).to(tl.uint8), mask=o_zero < (end + 15) // 16 * 16)


@triton.jit
def put_patch(p_words, o_word, p_target, b_rank, n_patches, b_flag, W: tl.constexpr):
    """One patch a lane, where its flag is set."""
    m_patch = b_flag != 0
    p_position = (p_target + 2 * b_rank).to(tl.pointer_type(tl.uint16))
    tl.store(p_position, o_word.to(tl.uint16), mask=m_patch)
    b_word = word_at(p_words, o_word.to(tl.int64), m_patch, W)
    p_word = p_target + 2 * n_patches + (W // 8) * b_rank
    if W == 8:
        tl.store(p_word.to(tl.pointer_type(tl.uint8)), b_word.to(tl.uint8), mask=m_patch)
    else:
        for PIECE in tl.static_range(W // 16):
            b_piece = ((b_word >> (16 * PIECE)) & 0xFFFF).to(tl.uint16)
            tl.store((p_word + 2 * PIECE).to(tl.pointer_type(tl.uint16)), b_piece, mask=m_patch)
