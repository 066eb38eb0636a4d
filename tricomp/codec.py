"""Encode and decode a Snapshot; picks a backend by where the buffers live. The only importer of all backends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from tricomp.dtypes import Words
from tricomp.layout import Leaf, Snapshot
from tricomp.plan import Plan, Spec


@dataclass(frozen=True)
class Frame:
    leaves: tuple[int, ...]
    plan: Plan
    digests: tuple[int, ...]
    data: bytes


class Reference(Protocol):
    def find(self, path: str) -> tuple[Leaf, Words] | None: ...


def digest(words: Words) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(words).view(np.uint8).data)


def encode(
    snapshot: Snapshot, reference: Reference | None = None, spec: Spec | None = None,
    threads: int | None = None, backend: str | None = None,
) -> Iterator[Frame]:
    for i, leaf in enumerate(snapshot.layout.leaves):
        words = snapshot.words(i)
        predict, ref = "raw", "none"
        data = words.tobytes()
        if reference is not None:
            found = reference.find(leaf.path)
            if found is not None and found[0].shape == leaf.shape and np.array_equal(found[1], words):
                predict, ref, data = "copy", "parent", b""
        yield Frame((i,), Plan(leaf.dtype, leaf.n_words, predict, reference=ref), (digest(words),), data)


def decode(
    frame_leaves: Sequence[Leaf], plan: Plan, data: bytes | memoryview, parent: Words | None,
    sibling: tuple[Leaf, Words] | None, threads: int | None = None, backend: str | None = None,
) -> list[Words]:
    if plan.predict == "copy":
        assert parent is not None
        return [parent]
    return [np.frombuffer(data, plan.dtype.word_dtype).copy()]
