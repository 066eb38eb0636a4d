"""Digests of decoded leaves, natively, with threads. Imports ground and numpy. FORMAT.md, "Digest"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tricomp import native
from tricomp.dtypes import Words

_M64 = (1 << 64) - 1


def digest_sums(parts: Sequence[tuple[Words, int]], threads: int | None = None) -> list[int]:
    """The sum of each part: words that stand at a byte, a multiple of 512, of their leaf."""
    given = [(np.ascontiguousarray(words), first_byte) for words, first_byte in parts]
    found: list[int] = native.load().digest_sums(given, native.n_threads(threads))
    return found


def digest_end(total: int, n_bytes: int) -> int:
    """The digest of a leaf of so many bytes whose parts have this sum."""
    x = (total + n_bytes * 0x9E3779B97F4A7C15) & _M64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _M64
    return x ^ x >> 31


def digests(leaves: Sequence[Words], threads: int | None = None) -> list[int]:
    """The digest of each leaf. leaves: uint[n] each."""
    sums = digest_sums([(words, 0) for words in leaves], threads)
    return [digest_end(total, words.nbytes) for total, words in zip(sums, leaves, strict=True)]
