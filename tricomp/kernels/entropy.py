"""Entropy stage in registers: one step of interleaved rANS, forwards and backwards. Imports triton and lanes.

Mirrors `tricomp.reference.entropy`. The hard thing is division: an encoder's entry brings a reciprocal that is exact
for every state below 2^31, see tables.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.lanes import ballot, population

# Fields of the upper half of an encoder's entry, see tables.py: complement, shift, patch, bias.
COMPLEMENT_MASK = tl.constexpr((1 << 11) - 1)
SHIFT_BEGIN = tl.constexpr(11)
SHIFT_MASK = tl.constexpr((1 << 5) - 1)
PATCH_MASK = tl.constexpr(1 << 16)
BIAS_BEGIN = tl.constexpr(20)


@triton.jit
def rans_push(b_state, b_entry, p_words, o_next, m_lane, b_bit, P: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr):
    """Encode one symbol a lane. b_entry: uint64, of its symbol. p_words: int64 address of u16, filled downwards.

    o_next: int32, one past where the last of the next words goes. ALL: every lane takes part, whatever m_lane says.
    Returns states and o_next.
    """
    b_fields = (b_entry >> 32).to(tl.uint32)
    b_complement = b_fields & COMPLEMENT_MASK
    b_shift = (b_fields >> SHIFT_BEGIN) & SHIFT_MASK
    m_full = (b_state >> (31 - P)) + b_complement >= (1 << P)
    if not ALL:
        m_full = m_full & m_lane
    b_full = ballot(m_full, b_bit, C)
    o_word = o_next - population(b_full & (0 - b_bit))  # those of this lane and of the lanes above it are still to come
    p_word = (p_words + 2 * o_word.to(tl.int64)).to(tl.pointer_type(tl.uint16))
    tl.store(p_word, (b_state & 0xFFFF).to(tl.uint16), mask=m_full)
    b_state = tl.where(m_full, b_state >> 16, b_state)
    b_quotient = tl.umulhi(b_state, (b_entry & 0xFFFFFFFF).to(tl.uint32)) >> b_shift
    b_pushed = b_state + (b_fields >> BIAS_BEGIN) + b_quotient * b_complement
    if not ALL:
        b_pushed = tl.where(m_lane, b_pushed, b_state)
    return b_pushed, o_next - population(b_full)


@triton.jit
def rans_pop(
    b_state,
    p_slots,
    b_table,
    p_words,
    o_next,
    m_lane,
    b_bit,
    P: tl.constexpr,
    C: tl.constexpr,
    ALL: tl.constexpr,
):
    """Decode one symbol a lane. p_slots: int64 address of the decoder's tables, u32; b_table: int32, which of them.

    p_words: int64 address of u16, taken upwards; o_next: int32, the next. ALL: every lane takes part, whatever m_lane
    says. Returns symbols (uint32), states and o_next. Whatever the words hold, a step moves o_next by 32 at most; lanes
    that take none read one too, of those 32, since that costs less than to hold them back.
    """
    b_slot = (b_state & ((1 << P) - 1)).to(tl.int32) + (b_table << P)
    b_entry = tl.load((p_slots + 4 * b_slot.to(tl.int64)).to(tl.pointer_type(tl.uint32)))
    b_popped = (b_entry >> 20) * (b_state >> P) + (b_entry & 0xFFF)
    m_short = b_popped < (1 << 15)
    if not ALL:
        m_short = m_short & m_lane
    b_short = ballot(m_short, b_bit, C)
    o_word = o_next + population(b_short & (b_bit - 1))
    b_word = tl.load((p_words + 2 * o_word.to(tl.int64)).to(tl.pointer_type(tl.uint16))).to(tl.uint32)
    b_popped = tl.where(m_short, (b_popped << 16) | b_word, b_popped)
    if not ALL:
        b_popped = tl.where(m_lane, b_popped, b_state)
    return (b_entry >> 12) & 0xFF, b_popped, o_next + population(b_short)
