"""The lane layout that entropy and stack streams share, and batches of chunks. Imports numpy only.

The hard thing: 32 lanes are too few for numpy, so the chunks of a batch stand side by side, the longest first, and a
step works on the lanes of all chunks that still have symbols: a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Frozen since format 1.
LANES = 32
ROW = 128  # positions of four steps: lane l holds positions 128 q + 4 l + k at step 4 q + k

BATCH_CHUNKS = 128  # encoder's and decoder's own choice; does not change a byte

Array = np.ndarray[Any, Any]


def padded(n_words: int) -> int:
    """n_words rounded up to whole rows of 128."""
    return -(-n_words // ROW) * ROW


def batches(n_words: Sequence[int], kinds: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Numbers of the chunks, longest first, up to BATCH_CHUNKS at a time, of one kind each.

    n_words: padded length of each chunk. kinds: what must not be mixed in a batch; None: anything may.
    """
    for kind in sorted(set(kinds)) if kinds is not None else (None,):
        members = [c for c in range(len(n_words)) if kinds is None or kinds[c] == kind]
        members.sort(key=lambda c: -n_words[c])
        for first in range(0, len(members), BATCH_CHUNKS):
            yield members[first : first + BATCH_CHUNKS]


def active_lanes(n_words: Sequence[int]) -> Array:
    """How many lanes still work at each step. n_words: padded lengths, descending. Returns int64[steps]."""
    n_steps = np.array(n_words, np.int64) // LANES
    steps = np.arange(int(n_steps[0]) if len(n_steps) else 0)
    return np.searchsorted(-n_steps, -steps, side="left") * LANES


def to_steps(chunks: Sequence[Array], dtype: Any) -> Array:
    """Chunks in position order, longest first -> [steps, n_chunks * 32] in step order, 0 where a chunk has ended."""
    out = np.zeros((len(chunks[0]) // LANES, len(chunks), LANES), dtype)
    for c, chunk in enumerate(chunks):
        out[: len(chunk) // LANES, c] = chunk.reshape(-1, LANES, 4).transpose(0, 2, 1).reshape(-1, LANES)
    return out.reshape(len(out), -1)


def from_steps(steps: Array, n_words: Sequence[int]) -> list[Array]:
    """Inverse of `to_steps`: one array a chunk, in position order."""
    by_chunk = steps.reshape(len(steps), -1, LANES)
    return [
        by_chunk[: n // LANES, c].reshape(-1, 4, LANES).transpose(0, 2, 1).reshape(-1) for c, n in enumerate(n_words)
    ]


def ranks(flags: Array) -> Array:
    """How many lanes of the same chunk at or below each lane have their flag set. flags: bool[n_chunks * 32].

    Returns uint8[n_chunks, 32]. Multiplying eight bytes by 0x01...01 leaves each byte the sum of those up to it.
    """
    ones = np.uint64(0x0101010101010101)
    sums = (flags.view(np.uint64) * ones).reshape(-1, LANES // 8)
    totals = sums >> np.uint64(56)
    sums[:, 1:] += np.cumsum(totals[:, :-1], axis=1) * ones
    return sums.view(np.uint8).reshape(-1, LANES)


class WordQueue:
    """The words of a batch of chunks, and how far each chunk has come in them. words: of each chunk, any uint."""

    def __init__(self, chunks: Sequence[Array], dtype: Any) -> None:
        n_words = np.array([len(chunk) for chunk in chunks])
        self._words = np.concatenate([*chunks, np.zeros(1, dtype)]).astype(dtype)
        # One before the next word of each chunk: ranks count from one.
        self._positions = np.cumsum(n_words) - n_words - 1
        self._ends = self._positions + n_words

    def take(self, is_short: Array, word: Array, is_taken: Array) -> None:
        """Give every short lane the next word of its chunk, lowest lane first, and the others 0.

        is_short: bool[n_lanes], a prefix of all lanes. word, is_taken: scratch of n_lanes and the words' dtype; the
        words, and 1 where one was taken. Reads stay inside the words whatever the lanes ask for.
        """
        position = self._positions[: len(is_short) // LANES]
        places = position[:, None] + ranks(is_short)
        self._words.take(places.reshape(-1), out=word, mode="clip")
        is_taken[:] = is_short
        np.multiply(word, is_taken, out=word)
        position[:] = places[:, -1]

    @property
    def is_at_end(self) -> bool:
        """Whether every word of every chunk was taken, and none beyond."""
        return bool((self._positions == self._ends).all())


def collect(words: Array, flags: Array) -> list[Array]:
    """The flagged words of each chunk, in the order in which a decoder takes them. Both [n_chunks, steps, 32]."""
    return [np.compress(is_word.reshape(-1), chunk.reshape(-1)) for is_word, chunk in zip(flags, words, strict=True)]
