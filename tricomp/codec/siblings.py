"""Which leaves of a Snapshot repeat another one, or are its cast to another dtype. Plans nothing, encodes nothing.

The hard thing is time: leaves are compared through a few words of each, the whole is looked at only where these are
alike, and every search is linear in the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np

from tricomp.dtypes import Words
from tricomp.layout import Snapshot
from tricomp.reference.bits import cast, is_equal

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


def siblings(snapshot: Snapshot, digests_of: Callable[[Iterable[int]], list[int]]) -> dict[int, int]:
    """Leaf number to that of an earlier equal leaf, or of a leaf that it is the cast of. No chains.

    digests_of: of leaves by number; asked for those alone that look alike.
    """
    leaves = snapshot.layout.leaves
    large = [i for i, leaf in enumerate(leaves) if leaf.n_bytes >= _LEAST_BYTES]
    alike: dict[tuple[int, int, bytes], list[int]] = {}
    for i in large:
        words = snapshot.words(i)
        alike.setdefault((leaves[i].dtype.number, len(words), _glance(words)), []).append(i)
    repeats: dict[int, int] = {}
    for members in alike.values():
        if len(members) > 1:
            repeats.update(_repeats(snapshot, members, digests_of(members)))
    found = dict(sorted(repeats.items()))
    by_shape: dict[tuple[int, ...], list[int]] = {}  # with the words at the end: a complex element has two
    for i in large:
        if i not in found:
            by_shape.setdefault((*leaves[i].shape, leaves[i].n_words), []).append(i)
    sources: set[int] = set(found.values())
    for group in by_shape.values():
        for i, source in _casts(snapshot, group, sources).items():
            found[i] = source
            sources.add(source)
    return found


def _glance(words: Words) -> bytes:
    return words[:: max(len(words) // _GLANCE_WORDS, 1)].tobytes()


def _repeats(snapshot: Snapshot, members: Sequence[int], digests: Sequence[int]) -> dict[int, int]:
    """Which of some leaves of one dtype and size repeat the first of their digest."""
    found: dict[int, int] = {}
    first_with: dict[int, int] = {}
    for i, digest in zip(members, digests, strict=True):
        j = first_with.setdefault(digest, i)
        if j != i and is_equal(snapshot.words(i), snapshot.words(j)):
            found[i] = j
    return found


def _casts(snapshot: Snapshot, alike: Sequence[int], sources: Set[int]) -> dict[int, int]:
    """Which of some leaves of one shape are casts of which others, nearly everywhere. No chains; wide before narrow.

    A few words of every leaf, cast to every dtype present, are looked up: the time is linear in the leaves.
    """
    leaves = snapshot.layout.leaves
    targets = {leaves[i].dtype for i in alike}
    if len(targets) < 2:
        return {}
    n_words = leaves[alike[0]].n_words
    probes = [np.arange(k, n_words, max(n_words // _PROBE_WORDS, 1))[:_PROBE_WORDS] for k in range(_PROBES)]
    known: dict[tuple[str, int, bytes], int] = {}
    for j in alike:
        dtype = leaves[j].dtype
        for target in targets:
            if (dtype.name, target.name) in CAST_PAIRS:
                for k, probe in enumerate(probes):
                    words = cast(snapshot.words(j)[probe], dtype, target)
                    known.setdefault((target.name, k, words.tobytes()), j)
    found: dict[int, int] = {}
    taken = set(sources)
    for i in sorted(alike, key=lambda i: leaves[i].dtype.word_bits):
        words = snapshot.words(i)
        if i in taken:
            continue
        for k, probe in enumerate(probes):
            source = known.get((leaves[i].dtype.name, k, words[probe].tobytes()))
            if source is None or source in found or not words[probe].any():
                continue
            if _is_mostly_cast(snapshot, i, source):
                found[i] = source
                taken.add(source)
                break
    return found


def _is_mostly_cast(snapshot: Snapshot, i: int, source: int) -> bool:
    """Whether leaf i is the cast of leaf source in all but 1 % of some thousand words."""
    words = snapshot.words(i)
    some = slice(None, None, max(len(words) // 4096, 1))
    dtypes = (snapshot.layout.leaves[source].dtype, snapshot.layout.leaves[i].dtype)
    is_other = cast(snapshot.words(source)[some], *dtypes) != words[some]
    return int(np.count_nonzero(is_other)) * 100 <= len(is_other)
