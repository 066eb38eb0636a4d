"""The digest: its definition piece by piece, and the accidents that it must notice."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from tests.cases import weights
from tricomp.reference.digest import BLOCK_BYTES, digest, digest_end, digest_sum

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def mix32(x):
    x = (x ^ x >> 16) * 0x85EBCA6B & M32
    x = (x ^ x >> 13) * 0xC2B2AE35 & M32
    return x ^ x >> 16


def mix64(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def plain(data):
    total = len(data) * 0x9E3779B97F4A7C15
    for i, (piece,) in enumerate(struct.iter_unpack("<I", data + bytes(-len(data) % 4))):
        block, row, column = i >> 19, i >> 7 & 4095, i & 127
        low = (mix32(row ^ 0x9E3779B9) | 1) * (mix32(column + 1) | 1) & M32
        high = (mix32(row ^ 0x7F4A7C15) | 1) * (mix32(column + 129) | 1) & M32
        total += piece * (low | high << 32) * (mix64(block) | 1)
    return mix64(total & M64)


@pytest.mark.parametrize("n_bytes", [0, 1, 2, 3, 4, 5, 511, 512, 513, 4096, 70_001])
def test_definition(n_bytes):
    data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8)
    assert digest(data) == plain(data.tobytes())


def test_definition_over_blocks():
    data = np.zeros((4 << 20) + 6, np.uint8)
    data[[3, 2 << 20, (2 << 20) + 5, (4 << 20) + 5]] = 7
    assert digest(data) == plain(data.tobytes())


def test_parts_in_any_order_give_the_same():
    data = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES + 70_003, dtype=np.uint8)
    cuts = [0, 512, 4096, 70 * 512, BLOCK_BYTES - 1024, BLOCK_BYTES + 512, len(data)]
    total = sum(digest_sum(data[begin:end], begin) for begin, end in reversed(list(itertools.pairwise(cuts))))
    assert digest_end(total, len(data)) == digest(data)
    first = 3 * BLOCK_BYTES + 512
    behind = np.append(np.zeros(first % BLOCK_BYTES, np.uint8), data[:5000])
    assert digest_sum(data[:5000], first) == digest_sum(behind, first - first % BLOCK_BYTES)
    assert digest_sum(data[:0], first) == 0


def test_accidents_are_noticed():
    words = weights((64, 700)).view(np.uint32).reshape(-1)
    assert digest(words.view(np.uint16)) == digest(words)
    swapped = words.copy()
    swapped[[3, 900]] = words[[900, 3]]
    seen = {digest(case) for case in (words, words[:-1], words[::-1], np.roll(words, 1), swapped)}
    n_cases = 5
    for i, j in ((0, 1), (5, 133), (128, 256), (7, 44_000)):
        for a, b in ((1 << 31, 1 << 31), (1, M32), (1 << 16, 1 << 15), (int(words[j]), int(words[i]))):
            changed = words.copy()
            changed[i : i + 1] += np.uint32(a)
            changed[j : j + 1] += np.uint32(b)
            if not np.array_equal(changed, words):
                seen.add(digest(changed))
                n_cases += 1
    assert len(seen) == n_cases
    assert len({digest(np.zeros(n, np.uint8)) for n in range(50)}) == 50
