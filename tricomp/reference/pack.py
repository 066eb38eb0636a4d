"""Remainder packing, in numpy: bits packed vertically, and the bit stack of each lane. Defines the bytes.

Imports numpy, errors, bits and lanes only. The hard thing is the stack: remainders of varying length, one word of a
lane's bits taken whenever it holds too few, so that neither side needs a length of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp.errors import CorruptFrame
from tricomp.reference.bits import bit_length
from tricomp.reference.lanes import LANES, ROW, WordQueue, active_lanes, batches, collect, from_steps, to_steps

Array = np.ndarray[Any, Any]


def pack_bits(values: Array, n_bits: int) -> Array:
    """Pack values of 1 to 8 bits vertically. values: uint8[n_chunks, 128 q]. Returns uint32[n_chunks, words].

    Lane l's values, in step order, fill the bits of its words from the lowest; its word j stands at 32 j + l.
    """
    n_chunks, n_words = values.shape
    n_rows = n_words // ROW
    n_groups = -(-n_rows // 8)  # eight rows fill n_bits words of a lane exactly
    lanes = values.reshape(n_chunks, n_rows, LANES, 4).astype(np.uint64)
    quads = np.zeros((n_chunks, n_groups * 8, LANES), np.uint64)
    for k in range(4):
        quads[:, :n_rows] |= lanes[..., k] << np.uint64(k * n_bits)
    packed = np.zeros((n_chunks, n_groups * n_bits + 1, LANES), np.uint64)
    for phase in range(8):
        first, offset = divmod(phase * 4 * n_bits, 32)
        part = quads[:, phase::8] << np.uint64(offset)
        packed[:, first:-1:n_bits] |= part & np.uint64(0xFFFFFFFF)
        packed[:, first + 1 :: n_bits][:, :n_groups] |= part >> np.uint64(32)
    n_out = -(-n_rows * n_bits // 8)
    return packed[:, :n_out].astype(np.uint32).reshape(n_chunks, -1)


def unpack_bits(packed: Array, n_words: int, n_bits: int) -> Array:
    """Inverse of `pack_bits`. packed: uint32[n_chunks, words]. Returns uint8[n_chunks, n_words], n_words = 128 q."""
    n_chunks = len(packed)
    n_rows = n_words // ROW
    n_groups = -(-n_rows // 8)
    words = np.zeros((n_chunks, n_groups * n_bits + 1, LANES), np.uint64)
    words[:, : packed.shape[1] // LANES] = packed.reshape(n_chunks, -1, LANES)
    out = np.empty((n_chunks, n_groups * 8, LANES, 4), np.uint8)
    mask = np.uint64((1 << n_bits) - 1)
    for phase in range(8):
        first, offset = divmod(phase * 4 * n_bits, 32)
        low = words[:, first:-1:n_bits]
        high = words[:, first + 1 :: n_bits][:, :n_groups]
        quads = (low | high << np.uint64(32)) >> np.uint64(offset)
        for k in range(4):
            out[:, phase::8, :, k] = (quads >> np.uint64(k * n_bits)) & mask
    return out[:, :n_rows].reshape(n_chunks, n_words)


def packed_bytes(n_words: int, n_bits: int) -> int:
    """Bytes of n_words values packed at n_bits; n_words = 128 q."""
    return -(-n_words // ROW * n_bits // 8) * 4 * LANES


def stack_word_bits(word_bits: int) -> int:
    """Bits of a stack's words: 16 for leaves of 8- and 16-bit words, else 32. Frozen since format 1."""
    return 16 if word_bits <= 16 else 32


@dataclass(frozen=True)
class Stacked:
    """One stack stream. heads: uint[32], each lane's first word; its highest set bit marks where the bits end.

    words: uint[...], in the order in which the decoder takes them. Both of stack_word_bits.
    """

    heads: Array
    words: Array


def stack_encode(values: Sequence[Array], lengths: Sequence[Array], word_bits: int) -> list[Stacked]:
    """Stack remainders, each chunk a stream of its own.

    values: uint[padded length] with nothing above their length. lengths: uint8[padded length], bits, 0 to the width
    of the leaf's words. word_bits: of the stack's words. Remainders over 32 bits take two steps, the low 32 first.
    """
    stacked: list[Stacked] = [Stacked(np.empty(0), np.empty(0))] * len(values)
    for batch in batches([len(value) for value in values]):
        n_words = [len(values[c]) for c in batch]
        steps = to_steps([values[c] for c in batch], values[batch[0]].dtype)
        bits = to_steps([lengths[c] for c in batch], np.uint8)
        if steps.dtype.itemsize == 8:
            steps, bits = _halve(steps, bits)
            n_words = [2 * n for n in n_words]
        for c, stream in zip(batch, _stack_batch(steps, bits, n_words, word_bits), strict=True):
            stacked[c] = stream
    return stacked


def _halve(steps: Array, bits: Array) -> tuple[Array, Array]:
    """Each step of up to 64 bits as two of up to 32: the low bits first."""
    halves = np.stack([steps & np.uint64(0xFFFFFFFF), steps >> np.uint64(32)], axis=1)
    low_bits = np.minimum(bits, 32)
    return halves.reshape(-1, steps.shape[1]), np.stack([low_bits, bits - low_bits], axis=1).reshape(-1, bits.shape[1])


def _stack_batch(steps: Array, bits: Array, n_words: list[int], word_bits: int) -> list[Stacked]:
    word_dtype, hold_dtype = (np.uint16, np.uint32) if word_bits == 16 else (np.uint32, np.uint64)
    n_steps, n_lanes = steps.shape
    active = active_lanes(n_words)
    holds, n_helds = np.zeros(n_lanes, hold_dtype), np.zeros(n_lanes, hold_dtype)
    words = np.empty((n_lanes // LANES, n_steps, LANES), word_dtype)
    is_word = np.zeros(words.shape, np.bool_)
    one, width, below = hold_dtype(1), hold_dtype(word_bits), hold_dtype(word_bits - 1)
    scratch = np.empty((2, n_lanes), hold_dtype)  # one dtype and no new arrays in the loop: twice as fast
    for step in range(n_steps - 1, -1, -1):
        n = active[step]
        hold, n_held, length, rest = holds[:n], n_helds[:n], scratch[0, :n], scratch[1, :n]
        length[:] = bits[step, :n]
        rest[:] = steps[step, :n]
        np.left_shift(hold, length, out=hold)
        np.bitwise_or(hold, rest, out=hold)
        np.add(n_held, length, out=n_held)
        is_word[: n // LANES, step] = (n_held >= width).reshape(-1, LANES)
        np.bitwise_and(n_held, below, out=n_held)
        np.right_shift(hold, n_held, out=rest)
        words[: n // LANES, step] = rest.reshape(-1, LANES)
        np.left_shift(one, n_held, out=rest)
        np.subtract(rest, one, out=rest)
        np.bitwise_and(hold, rest, out=hold)
    heads = (holds | one << n_helds).astype(word_dtype)
    collected = collect(words, is_word)
    return [Stacked(head, chunk) for head, chunk in zip(heads.reshape(-1, LANES), collected, strict=True)]


def stack_decode(streams: Sequence[Stacked], lengths: Sequence[Array], word_bits: int, dtype: Any) -> list[Array]:
    """Inverse of `stack_encode`. lengths: uint8[padded length] of each chunk. Returns dtype[padded length] each.

    Reads stay inside the words whatever they hold. Raises CorruptFrame when a stream does not end empty.
    """
    values: list[Array] = [np.empty(0)] * len(streams)
    is_halved = np.dtype(dtype).itemsize == 8
    for batch in batches([len(length) for length in lengths]):
        n_words = [len(lengths[c]) for c in batch]
        bits = to_steps([lengths[c] for c in batch], np.uint8)
        if is_halved:
            bits = _halve(np.zeros((1, bits.shape[1]), np.uint64), bits)[1]
        steps = _unstack_batch([streams[c] for c in batch], bits, [n << is_halved for n in n_words], word_bits)
        if is_halved:
            steps = steps[0::2].astype(np.uint64) | steps[1::2].astype(np.uint64) << np.uint64(32)
        for c, value in zip(batch, from_steps(steps.astype(dtype, copy=False), n_words), strict=True):
            values[c] = value
    return values


def _unstack_batch(streams: list[Stacked], bits: Array, lengths: list[int], word_bits: int) -> Array:
    word_dtype, hold_dtype = (np.uint16, np.uint32) if word_bits == 16 else (np.uint32, np.uint64)
    heads = np.concatenate([stream.heads for stream in streams])
    words = WordQueue([stream.words for stream in streams], hold_dtype)
    if (heads == 0).any():
        raise CorruptFrame("a lane of its remainders has no first word")
    one, width_log2 = hold_dtype(1), hold_dtype(word_bits.bit_length() - 1)
    n_helds: Array = (bit_length(heads) - np.uint8(1)).astype(hold_dtype)
    markers: Array = one << n_helds
    holds: Array = heads.astype(hold_dtype) - markers
    active = active_lanes(lengths)
    steps = np.zeros(bits.shape, word_dtype)
    scratch = np.empty((3, len(heads)), hold_dtype)
    for step in range(len(active)):
        n = active[step]
        hold, n_held, length, rest, word = holds[:n], n_helds[:n], scratch[0, :n], scratch[1, :n], scratch[2, :n]
        length[:] = bits[step, :n]
        words.take(n_held < length, word, rest)
        np.left_shift(word, n_held, out=word)
        np.bitwise_or(hold, word, out=hold)
        np.left_shift(rest, width_log2, out=rest)
        np.add(n_held, rest, out=n_held)
        np.left_shift(one, length, out=rest)
        np.subtract(rest, one, out=rest)
        np.bitwise_and(hold, rest, out=rest)
        steps[step, :n] = rest
        np.right_shift(hold, length, out=hold)
        np.subtract(n_held, length, out=n_held)
    if holds.any() or n_helds.any() or not words.is_at_end:
        raise CorruptFrame("its remainders do not end where an encoder begins")
    return steps
