"""Which leaves of a Snapshot repeat another one, or are its cast to another dtype. Plans nothing, encodes nothing.

The hard thing is time: leaves are compared through a few words of each, the whole is looked at only where these are
alike, and every search is linear in the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np

from tricomp.codec.engine import Engine
from tricomp.layout import Snapshot
from tricomp.reference.bits import cast

_LEAST_BYTES = 256  # of a leaf that is looked at
_GLANCE_WORDS = 32  # of each leaf: where they differ, leaves do
_PROBES, _PROBE_WORDS = 4, 16  # samples of a leaf, and words in each, by which casts are recognised
CAST_PAIRS = {
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("float64", "float32"),
    ("float64", "float16"),
    ("float64", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
}


def siblings(
    snapshot: Snapshot, numbers: Sequence[int], digests_of: Callable[[Iterable[int]], list[int]], engine: Engine
) -> dict[int, int]:
    """Leaf number to that of an earlier equal leaf, or of a leaf that it is the cast of, among some. No chains.

    digests_of: of leaves by number; asked for those alone that look alike.
    """
    leaves = snapshot.layout.leaves
    large = [i for i in numbers if leaves[i].n_bytes >= _LEAST_BYTES]
    alike: dict[tuple[int, int, bytes], list[int]] = {}
    steps = [max(leaves[i].n_words // _GLANCE_WORDS, 1) for i in large]
    glances = engine.strided([(snapshot.words(i), 0, step, 2 * _GLANCE_WORDS) for i, step in zip(large, steps)])
    for i, glance in zip(large, glances, strict=True):
        alike.setdefault((leaves[i].dtype.number, leaves[i].n_words, glance.tobytes()), []).append(i)
    repeats: dict[int, int] = {}
    for members in alike.values():
        if len(members) > 1:
            repeats.update(_repeats(snapshot, members, digests_of(members), engine))
    found = dict(sorted(repeats.items()))
    by_shape: dict[tuple[int, ...], list[int]] = {}  # with the words at the end: a complex element has two
    for i in large:
        if i not in found:
            by_shape.setdefault((*leaves[i].shape, leaves[i].n_words), []).append(i)
    sources: set[int] = set(found.values())
    for group in by_shape.values():
        for i, source in _casts(snapshot, group, sources, engine).items():
            found[i] = source
            sources.add(source)
    return found


def _repeats(snapshot: Snapshot, members: Sequence[int], digests: Sequence[int], engine: Engine) -> dict[int, int]:
    """Which of some leaves of one dtype and size repeat the first of their digest."""
    found: dict[int, int] = {}
    first_with: dict[int, int] = {}
    for i, digest in zip(members, digests, strict=True):
        j = first_with.setdefault(digest, i)
        if j != i and engine.is_equal(snapshot.words(i), snapshot.words(j)):
            found[i] = j
    return found


def _casts(snapshot: Snapshot, alike: Sequence[int], sources: Set[int], engine: Engine) -> dict[int, int]:
    """Which of some leaves of one shape are casts of which others, nearly everywhere. No chains; wide before narrow.

    A few words of every leaf, cast to every dtype present, are looked up: the time is linear in the leaves.
    """
    leaves = snapshot.layout.leaves
    targets = {leaves[i].dtype for i in alike}
    if len(targets) < 2:
        return {}
    n_words = leaves[alike[0]].n_words
    step = max(n_words // _PROBE_WORDS, 1)
    requests = [(snapshot.words(i), k, step, _PROBE_WORDS) for i in alike for k in range(_PROBES)]
    told = iter(engine.strided(requests))
    probes = {i: [next(told) for _ in range(_PROBES)] for i in alike}
    known: dict[tuple[str, int, bytes], int] = {}
    for j in alike:
        dtype = leaves[j].dtype
        for target in targets:
            if (dtype.name, target.name) in CAST_PAIRS:
                for k, probe in enumerate(probes[j]):
                    words = cast(probe, dtype, target)
                    known.setdefault((target.name, k, words.tobytes()), j)
    found: dict[int, int] = {}
    taken = set(sources)
    for i in sorted(alike, key=lambda i: leaves[i].dtype.word_bits):
        if i in taken:
            continue
        for k, probe in enumerate(probes[i]):
            source = known.get((leaves[i].dtype.name, k, probe.tobytes()))
            if source is None or source in found or not probe.any():
                continue
            if _is_mostly_cast(snapshot, i, source, engine):
                found[i] = source
                taken.add(source)
                break
    return found


def _is_mostly_cast(snapshot: Snapshot, i: int, source: int, engine: Engine) -> bool:
    """Whether leaf i is the cast of leaf source in all but 1 % of some thousand words."""
    n_words = snapshot.layout.leaves[i].n_words
    step = max(n_words // 4096, 1)
    wide, narrow = engine.strided([(snapshot.words(j), 0, step, n_words) for j in (source, i)])
    dtypes = (snapshot.layout.leaves[source].dtype, snapshot.layout.leaves[i].dtype)
    is_other = cast(wide, *dtypes) != narrow
    return int(np.count_nonzero(is_other)) * 100 <= len(is_other)
