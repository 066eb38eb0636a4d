"""Digests of decoded leaves, and checksums of stored bytes, natively, with threads. Imports ground and numpy.

FORMAT.md, "Digest". The hard thing: both are taken while others wait, so threads share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tricomp import native
from tricomp.bounds import Bytes
from tricomp.dtypes import Words

Array = np.ndarray[Any, Any]

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


def checksums(
    buffer: Bytes | Words, begins: Sequence[int] | Array, sizes: Sequence[int] | Array, threads: int | None = None
) -> Array:
    """XXH3 with 64 bits of each part of a buffer: uint64[n]. begins, sizes: in bytes, integers[n].

    Raises ValueError where a part reaches beyond the buffer.
    """
    found = np.zeros(len(begins), np.uint64)
    places = [np.ascontiguousarray(numbers, np.uint64) for numbers in (begins, sizes)]
    native.load().checksums(buffer, *places, found, native.n_threads(threads))
    return found
