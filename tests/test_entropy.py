"""Entropy and packing stages alone: round trips, sizes, what the tables promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tricomp.errors import CorruptFrame
from tricomp.job import Tables
from tricomp.reference import entropy, lanes, pack


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=256), st.integers(8, 11))
def test_normalise_sums_and_keeps_every_symbol(counts, prob_bits):
    freqs = entropy.normalise(np.array(counts, np.int64), prob_bits)
    assert freqs.sum() == 1 << prob_bits
    if any(counts):
        assert ((freqs > 0) == (np.array(counts) > 0)).all()


def table_of(chunks, contexts, n_contexts, n_symbols, prob_bits=11):
    counts = np.zeros((n_contexts, n_symbols), np.int64)
    for chunk, context in zip(chunks, contexts):
        np.add.at(counts, (context, chunk), 1)
    return Tables(np.stack([entropy.normalise(row, prob_bits) for row in counts]), prob_bits)


def test_rans_round_trip_of_unlike_chunks_in_one_call():
    rng = np.random.default_rng(0)
    chunks, contexts, tables, rows = [], [], [], []
    for n, n_symbols, n_contexts, prob_bits in [
        (128, 1, 1, 11),
        (65_536, 20, 4, 11),
        (4096, 256, 1, 11),
        (1280, 30, 8, 8),
        (128, 2, 2, 9),
        (65_536, 3, 1, 10),
    ]:
        symbols = np.minimum(rng.geometric(0.3, n) - 1, n_symbols - 1).astype(np.uint8)
        context = rng.integers(0, n_contexts, n).astype(np.uint8)
        chunks.append(symbols)
        contexts.append(context)
        tables.append(table_of([symbols], [context], n_contexts, n_symbols, prob_bits))
        rows.append(context.astype(np.uint16) * np.uint16(n_symbols) + symbols)
    streams = entropy.rans_encode(rows, tables)
    alone = [entropy.rans_encode([row], [table])[0] for row, table in zip(rows, tables)]
    for together, single in zip(streams, alone):  # bytes do not depend on the batch
        assert np.array_equal(together.states, single.states)
        assert np.array_equal(together.words, single.words)
    decoded = entropy.rans_decode(streams, tables, contexts, [len(chunk) for chunk in chunks])
    for chunk, back in zip(chunks, decoded):
        assert np.array_equal(chunk, back)


def test_rans_is_close_to_the_entropy():
    rng = np.random.default_rng(1)
    symbols = np.minimum(rng.geometric(0.35, 65_536) - 1, 31).astype(np.uint8)
    tables = table_of([symbols], [np.zeros(65_536, np.uint8)], 1, 32)
    stream = entropy.rans_encode([symbols], [tables])[0]
    share = np.bincount(symbols) / 65_536
    bound = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert (stream.words.nbytes + 128) * 8 / 65_536 < bound + 0.025


def test_a_certain_symbol_costs_no_words():
    tables = Tables(np.array([[0, 2048, 0]]), 11)
    assert len(entropy.rans_encode([np.ones(65_536, np.uint8)], [tables])[0].words) == 0


def test_rans_refuses_a_stream_that_ends_elsewhere():
    symbols = np.arange(1280) % 7
    tables = table_of([symbols], [np.zeros(1280, np.uint8)], 1, 7)
    stream = entropy.rans_encode([symbols], [tables])[0]
    assert len(stream.words)
    for bad in (
        entropy.Coded(stream.states ^ np.uint32(1), stream.words),
        entropy.Coded(stream.states, np.append(stream.words, np.uint16(3))),
        entropy.Coded(stream.states, stream.words[:-1]),
    ):
        with pytest.raises(CorruptFrame):
            entropy.rans_decode([bad], [tables], [None], [1280])


@pytest.mark.parametrize("n_bits", range(1, 9))
@pytest.mark.parametrize("n_words", [128, 256, 1024, 128 * 9, 128 * 17, 65_536])
def test_vertical_packing(n_bits, n_words):
    rng = np.random.default_rng(n_bits)
    values = rng.integers(0, 1 << n_bits, (3, n_words)).astype(np.uint8)
    packed = pack.pack_bits(values, n_bits)
    assert packed.nbytes == 3 * pack.packed_bytes(n_words, n_bits)
    assert np.array_equal(pack.unpack_bits(packed, n_words, n_bits), values)
    # The definition, one value at a time: lane l's values in step order fill its words from the lowest bit.
    lane, first = 5, packed[0].reshape(-1, 32)
    bits = "".join(f"{int(word):032b}"[::-1] for word in first[:, lane])
    own = values[0].reshape(-1, 32, 4)[:, lane].reshape(-1)
    assert all(int(bits[i * n_bits : (i + 1) * n_bits][::-1], 2) == value for i, value in enumerate(own))


def test_vertical_packing_of_bytes_is_the_bytes():
    values = np.arange(256, dtype=np.uint8)[None]
    assert pack.pack_bits(values, 8).astype("<u4").tobytes() == values.tobytes()


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([8, 16, 32, 64]), st.lists(st.sampled_from([128, 256, 1280]), min_size=1, max_size=4), st.data())
def test_stack_round_trip(width, sizes, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dtype = np.dtype(f"u{width // 8}")
    values, lengths = [], []
    for n in sizes:
        length = rng.integers(0, rng.integers(1, width + 2), n).astype(np.uint8)
        value = rng.integers(0, 2**width, n, dtype=dtype.type)
        value = value >> np.minimum(width - length, width - 1).astype(dtype)
        values.append(np.where(length > 0, value, 0).astype(dtype))
        lengths.append(length)
    word_bits = pack.stack_word_bits(width)
    streams = pack.stack_encode(values, lengths, word_bits)
    n_bits = sum(int(length.sum(dtype=np.int64)) for length in lengths)
    n_stored = sum(8 * (stream.heads.nbytes + stream.words.nbytes) for stream in streams)
    assert n_bits <= n_stored <= n_bits + 32 * word_bits * len(sizes)
    for value, back in zip(values, pack.stack_decode(streams, lengths, word_bits, dtype)):
        assert back.dtype == value.dtype
        assert np.array_equal(value, back)
    broken = [pack.Stacked(stream.heads, np.append(stream.words, stream.heads[:1])) for stream in streams]
    with pytest.raises(CorruptFrame):
        pack.stack_decode(broken, lengths, word_bits, dtype)


def test_ranks_count_within_chunks():
    rng = np.random.default_rng(2)
    flags = rng.random(32 * 5) < 0.4
    expected = np.cumsum(flags.reshape(5, 32), axis=1)
    assert np.array_equal(lanes.ranks(flags), expected)
