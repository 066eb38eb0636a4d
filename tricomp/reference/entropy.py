"""Entropy stage, in numpy: frequency tables, interleaved rANS, fixed-width indices. Defines the bytes.

Imports numpy, errors, job and lanes only. The hard thing: rANS is sequential within a lane, so the loops below run over
steps, and every operation covers one step of all lanes of all chunks at once. Chunks of different leaves, tables and
lengths share a call; longer chunks come first, so that the active lanes of a step are always a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp.errors import CorruptFrame
from tricomp.job import Tables
from tricomp.reference.lanes import LANES, WordQueue, active_lanes, batches, collect, from_steps, to_steps

# Frozen since format 1.
LOWEST_STATE = 1 << 15
STATE_BYTES = 4 * LANES

Array = np.ndarray[Any, Any]


def normalise(counts: Array, prob_bits: int) -> Array:
    """Frequencies that sum to 2^prob_bits, at least 1 for every counted symbol. counts: int64[n]. Returns int64[n].

    f = 1 + count (M - n_present) // total for present symbols; what is left goes to the most frequent, lowest first.
    An empty table gives everything to symbol 0.
    """
    total = int(counts.sum())
    size = 1 << prob_bits
    if total == 0:
        freqs = np.zeros(len(counts), np.int64)
        freqs[0] = size
        return freqs
    is_present = counts > 0
    spare = size - int(is_present.sum())
    # Python integers where the product could pass 2^63; histograms of whole leaves may.
    scale = 0 if total < 1 << 50 else total.bit_length() - 50
    counts, total = counts >> scale, max(total >> scale, 1)
    freqs = np.where(is_present, 1 + counts * spare // total, 0)
    freqs[int(np.argmax(counts))] += size - int(freqs.sum())
    return freqs


def encoder_entries(tables: Tables) -> Array:
    """uint32[n_tables * n_symbols]: frequency << 16 | start of the symbol's slots."""
    starts = np.cumsum(tables.freqs, axis=1) - tables.freqs
    return (tables.freqs << 16 | starts).astype(np.uint32).reshape(-1)


def decoder_slots(tables: Tables) -> Array:
    """uint32[n_tables << prob_bits]: frequency << 20 | symbol << 12 | offset in the symbol's slots."""
    n_tables, n_symbols = tables.freqs.shape
    starts = np.cumsum(tables.freqs, axis=1) - tables.freqs
    entries = tables.freqs << 20 | np.arange(n_symbols) << 12
    flat = tables.freqs.reshape(-1)
    slots = np.repeat(entries.reshape(-1), flat)
    offsets = np.tile(np.arange(1 << tables.prob_bits), n_tables) - np.repeat(starts.reshape(-1), flat)
    # A frequency of 4096 would not fit above bit 20; prob_bits <= 11 keeps it out.
    return (slots + offsets).astype(np.uint32)


@dataclass(frozen=True)
class Coded:
    """One rANS stream. states: uint32[32], where the decoder starts. words: uint16[...], as the decoder takes them."""

    states: Array
    words: Array


def rans_encode(chunks: Sequence[Array], tables: Sequence[Tables]) -> list[Coded]:
    """Encode chunks, each a stream of its own.

    chunks: rows into the chunk's table (context * n_symbols + symbol), integer[padded length] in position order.
    tables: the Tables of each chunk; equal objects are laid out once.
    """
    coded: list[Coded] = [Coded(np.empty(0), np.empty(0))] * len(chunks)
    for batch in batches([len(chunk) for chunk in chunks], [table.prob_bits for table in tables]):
        entries, offsets = _lay_out([tables[c] for c in batch], encoder_entries)
        steps = to_steps([chunks[c] for c in batch], np.uint32)
        steps += np.repeat(offsets, LANES)
        prob_bits = tables[batch[0]].prob_bits
        streams = _encode_batch(steps, [len(chunks[c]) for c in batch], entries, prob_bits)
        for c, stream in zip(batch, streams, strict=True):
            coded[c] = stream
    return coded


def _lay_out(tables: list[Tables], kind: Callable[[Tables], Array]) -> tuple[Array, Array]:
    """All distinct tables one after the other, and where each chunk's begins (uint32[n_chunks])."""
    begins: dict[int, int] = {}
    parts: list[Array] = []
    n_entries = 0
    for one in tables:
        if id(one) not in begins:
            begins[id(one)] = n_entries
            parts.append(kind(one))
            n_entries += len(parts[-1])
    return np.concatenate(parts), np.array([begins[id(one)] for one in tables], np.uint32)


def _encode_batch(symbols: Array, lengths: list[int], table: Array, prob_bits: int) -> list[Coded]:
    n_steps, n_lanes = symbols.shape
    active = active_lanes(lengths)
    states = np.full(n_lanes, LOWEST_STATE, np.uint32)
    words = np.empty((n_lanes // LANES, n_steps, LANES), np.uint16)
    is_word = np.zeros(words.shape, np.bool_)
    size, four = np.uint32(1 << prob_bits), np.uint32(4)
    sixteen, limit_shift, low = np.uint32(16), np.uint32(31 - prob_bits), np.uint32(0xFFFF)
    scratch = np.empty((3, n_lanes), np.uint32)  # one dtype and no new arrays in the loop: twice as fast
    for step in range(n_steps - 1, -1, -1):
        n = active[step]
        state, entry, freq, rest = states[:n], scratch[0, :n], scratch[1, :n], scratch[2, :n]
        table.take(symbols[step, :n], out=entry, mode="clip")
        np.right_shift(entry, sixteen, out=freq)
        np.right_shift(state, limit_shift, out=rest)
        overflows = rest >= freq
        is_word[: n // LANES, step] = overflows.reshape(-1, LANES)
        words[: n // LANES, step] = state.reshape(-1, LANES)
        rest[:] = overflows
        np.left_shift(rest, four, out=rest)
        np.right_shift(state, rest, out=state)
        # (x // f << p) + x % f + start, with one multiplication less: x + x // f * (2^p - f) + start
        np.floor_divide(state, freq, out=rest)
        np.subtract(size, freq, out=freq)
        np.multiply(rest, freq, out=rest)
        np.add(state, rest, out=state)
        np.bitwise_and(entry, low, out=entry)
        np.add(state, entry, out=state)
    collected = collect(words, is_word)
    return [Coded(state, chunk) for state, chunk in zip(states.reshape(-1, LANES), collected, strict=True)]


def rans_decode(
    streams: Sequence[Coded], tables: Sequence[Tables], contexts: Sequence[Array | None], n_words: Sequence[int]
) -> list[Array]:
    """Decode streams. contexts: the table of every position, uint8[padded length], or None for the only one.

    n_words: padded lengths. Returns the symbols of each chunk, uint8[padded length]. Reads stay inside the words
    whatever they hold. Raises CorruptFrame when a stream does not end as an encoder begins: every word taken, every
    state back at 2^15.
    """
    decoded: list[Array] = [np.empty(0)] * len(streams)
    for batch in batches(n_words, [table.prob_bits for table in tables]):
        prob_bits = tables[batch[0]].prob_bits
        entries, offsets = _lay_out([tables[c] for c in batch], decoder_slots)
        lengths = [n_words[c] for c in batch]
        rows: Array = np.repeat(offsets, LANES)
        if any(contexts[c] is not None for c in batch):
            rows = to_steps([_or_zeros(contexts[c], n_words[c]) for c in batch], np.uint32)
            rows <<= np.uint32(prob_bits)
            rows += np.repeat(offsets, LANES)
        steps = _decode_batch([streams[c] for c in batch], lengths, entries, rows, prob_bits)
        for c, symbols in zip(batch, from_steps(steps, lengths), strict=True):
            decoded[c] = symbols
    return decoded


def _or_zeros(contexts: Array | None, n_words: int) -> Array:
    return np.zeros(n_words, np.uint8) if contexts is None else contexts


def _decode_batch(streams: list[Coded], lengths: list[int], table: Array, rows: Array, prob_bits: int) -> Array:
    states = np.concatenate([stream.states for stream in streams]).astype(np.uint32)
    words = WordQueue([stream.words for stream in streams], np.uint32)
    active = active_lanes(lengths)
    symbols = np.zeros((len(active), len(states)), np.uint8)
    mask, twelve, twenty = np.uint32((1 << prob_bits) - 1), np.uint32(12), np.uint32(20)
    low, lowest, shift, four = np.uint32(0xFFF), np.uint32(LOWEST_STATE), np.uint32(prob_bits), np.uint32(4)
    scratch = np.empty((3, len(states)), np.uint32)
    for step in range(len(active)):
        n = active[step]
        state, entry, rest, word = states[:n], scratch[0, :n], scratch[1, :n], scratch[2, :n]
        np.bitwise_and(state, mask, out=rest)
        np.add(rest, rows[step, :n] if rows.ndim == 2 else rows[:n], out=rest)
        table.take(rest, out=entry, mode="clip")
        np.right_shift(entry, twelve, out=rest)
        symbols[step, :n] = rest
        np.right_shift(state, shift, out=state)
        np.right_shift(entry, twenty, out=rest)
        np.multiply(state, rest, out=state)
        np.bitwise_and(entry, low, out=entry)
        np.add(state, entry, out=state)
        words.take(state < lowest, word, rest)
        np.left_shift(rest, four, out=rest)
        np.left_shift(state, rest, out=state)
        np.bitwise_or(state, word, out=state)
    if (states != lowest).any() or not words.is_at_end:
        raise CorruptFrame("its symbols do not end where an encoder begins")
    return symbols
