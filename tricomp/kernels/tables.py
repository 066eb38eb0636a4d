"""Frequency tables as kernels look them up: an encoder's entries, a decoder's slots. Imports ground and numpy.

The hard thing: an encoder divides by a frequency. With k = ceil(log2 f) and m = ceil(2^(31 + k) / f), the upper half of
x * m shifted right by k - 1 is x // f for every x below 2^31 and f up to 2^12 (Alverson, "Integer division using
reciprocals"); f = 1 takes m = 2^32 - 1, which gives x - 1, and makes up for it in the bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp.job import Side, Tables
from tricomp.plan import Plan

Array = np.ndarray[Any, Any]

# Fields of an entry's upper half, mirrored in entropy.py; the complement to 2^prob_bits is at its bottom. The topmost
# is added as it is shifted down, in one instruction, and so is the one above the complement used without a mask.
SHIFT_BEGIN, PATCH_BIT, BIAS_BEGIN = 11, 16, 20


def encoder_entries(tables: Tables) -> Array:
    """uint64[n_contexts, n_symbols + 1]: reciprocal, and in the upper half the fields above.

    A symbol without frequency, and the one after the last, have the entry of their context's stand-in with the patch
    bit set.
    """
    freqs = tables.freqs.astype(np.int64)
    size = 1 << tables.prob_bits
    starts = np.cumsum(freqs, axis=1) - freqs
    f = np.maximum(freqs, 1)
    log2 = np.ceil(np.log2(f)).astype(np.int64)
    reciprocal = -(-(np.int64(1) << (31 + log2)) // f)
    is_one = f == 1
    reciprocal = np.where(is_one, (1 << 32) - 1, reciprocal)
    bias = starts + np.where(is_one, size - 1, 0)
    shift = np.maximum(log2 - 1, 0)
    high = (size - f) | shift << SHIFT_BEGIN | bias << BIAS_BEGIN
    entries = reciprocal.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    stand_in = np.take_along_axis(entries, tables.favourites()[:, None], 1) | np.uint64(1 << 32 + PATCH_BIT)
    entries = np.where(freqs == 0, stand_in, entries)
    return np.concatenate([entries, stand_in], axis=1)


def entry_lengths(plan: Plan, side: Side) -> Array:
    """uint8[n_contexts, n_symbols + 1]: bits of the remainder that goes with each entry."""
    lengths = symbol_lengths(plan)
    if side.tables is None:
        is_coded = np.isin(np.arange(plan.n_symbols), side.dictionary)[None]
        stand_ins = side.dictionary[:1].astype(np.int64)
    else:
        is_coded, stand_ins = side.tables.freqs > 0, side.tables.favourites()
    of_patches = lengths[stand_ins][:, None]
    return np.concatenate([np.where(is_coded, lengths, of_patches), of_patches], axis=1).astype(np.uint8)


def symbol_lengths(plan: Plan) -> Array:
    """int64[n_symbols]: bits that each symbol's remainder leaves on a stack."""
    if plan.remainder != "stack":
        return np.zeros(plan.n_symbols, np.int64)
    if plan.predict != "full":
        return (meanings(plan) >> np.uint32(6) & np.uint32(127)).astype(np.int64)
    lengths = np.full(plan.n_symbols, plan.remainder_bits)
    lengths[:1] = 0
    return lengths


def decoder_slots(tables: Tables) -> Array:
    """uint32[n_contexts << prob_bits]: frequency << 20 | symbol << 12 | offset in the symbol's slots."""
    n_tables, n_symbols = tables.freqs.shape
    freqs = tables.freqs.astype(np.int64)
    starts = np.cumsum(freqs, axis=1) - freqs
    flat = freqs.reshape(-1)
    slots = np.repeat((freqs << 20 | np.arange(n_symbols) << 12).reshape(-1), flat)
    offsets = np.tile(np.arange(1 << tables.prob_bits), n_tables) - np.repeat(starts.reshape(-1), flat)
    return (slots + offsets).astype(np.uint32)


def index_places(dictionary: Array, n_symbols: int) -> Array:
    """uint16[n_symbols + 1]: the place of every symbol in the dictionary; 2^15 for one that it lacks."""
    places = np.full(n_symbols + 1, 1 << 15, np.uint16)
    places[dictionary] = np.arange(len(dictionary))
    return places


def meanings(plan: Plan) -> Array:
    """uint32[n_symbols]: what each symbol of a delta says of a difference; 0 for symbol 0: there is none.

    Bits below its leading ones; bits of its remainder << 6; 1 << 13 if it is negative and the symbol says so; the
    leading one and the k bits after it << 16.
    """
    k, word_bits = plan.mantissa_bits, plan.dtype.word_bits
    codes = np.arange(plan.n_symbols) + plan.base
    is_negative = np.zeros(plan.n_symbols, np.int64)
    if not plan.has_sign:
        is_negative, codes = codes & 1, codes >> 1
    length = np.minimum(codes >> k, word_bits)  # what a damaged plan may exceed
    lead = (codes & (1 << k) - 1 | 1 << k) >> np.maximum(k + 1 - length, 0)
    low = np.maximum(length - 1 - k, 0)
    found = low | low + plan.has_sign << 6 | is_negative << 13 | lead << 16
    found[0] = 0
    return np.asarray(found, np.uint32)
