"""Which leaves of a Snapshot repeat another one, or are its cast to another dtype. Plans nothing, encodes nothing.

The hard thing is time: leaves are compared through a few words of each, the whole is looked at only where these are
alike, and every search is linear in the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tricomp.codec.engine import Engine
from tricomp.dtypes import Words
from tricomp.layout import Snapshot
from tricomp.reference.bits import cast

_LEAST_BYTES = 256  # of a leaf that is looked at
_GLANCE_WORDS = 32  # of each leaf: where they differ, leaves do
_PROBES, _PROBE_WORDS = 4, 16  # samples of a leaf, and words in each, by which casts are recognised
_LOOKED_AT = 1024  # pairs of leaves at a time: of each some thousand words
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

    digests_of: of leaves by number; asked for those alone that look alike. Each step looks at all leaves together: on a
    device each is a wait.
    """
    leaves = snapshot.layout.leaves
    large = [i for i in numbers if leaves[i].n_bytes >= _LEAST_BYTES]
    glances, probes = _glances(snapshot, large, engine)
    found = dict(sorted(_repeats(snapshot, glances, digests_of, engine).items()))
    sources: set[int] = set(found.values())
    groups = _mixed(snapshot, [i for i in large if i not in found])
    names = [_candidates(snapshot, group, probes) for group in groups]
    pairs = [(i, source) for candidates in names for i, some in candidates.items() for source in some]
    casts = _mostly_casts(snapshot, pairs, engine)
    for group, candidates in zip(groups, names, strict=True):
        narrow_first = sorted(group, key=lambda i: leaves[i].dtype.word_bits)
        taken = set(sources)
        mine: dict[int, int] = {}
        for i in narrow_first:
            for source in candidates.get(i, ()):
                if i not in taken and source not in mine and (i, source) in casts:
                    mine[i] = source
                    taken.add(source)
                    break
        found |= mine
        sources |= taken
    return found


def _mixed(snapshot: Snapshot, numbers: Iterable[int]) -> list[list[int]]:
    """Leaves of one shape and of several dtypes, together."""
    leaves = snapshot.layout.leaves
    by_shape: dict[tuple[int, ...], list[int]] = {}  # with the words at the end: a complex element has two
    for i in numbers:
        by_shape.setdefault((*leaves[i].shape, leaves[i].n_words), []).append(i)
    return [group for group in by_shape.values() if len({leaves[i].dtype for i in group}) > 1]


def _glances(
    snapshot: Snapshot, large: Sequence[int], engine: Engine
) -> tuple[dict[int, Words], dict[int, list[Words]]]:
    """A few words of each leaf, by which equal ones are found, and samples of those that may be casts."""
    leaves = snapshot.layout.leaves
    requests = [(snapshot.words(i), 0, max(leaves[i].n_words // _GLANCE_WORDS, 1), 2 * _GLANCE_WORDS) for i in large]
    probed = [i for group in _mixed(snapshot, large) for i in group]
    for i in probed:
        step = max(leaves[i].n_words // _PROBE_WORDS, 1)
        requests += [(snapshot.words(i), k, step, _PROBE_WORDS) for k in range(_PROBES)]
    told = iter(engine.strided(requests))
    glances = {i: next(told) for i in large}
    return glances, {i: [next(told) for _ in range(_PROBES)] for i in probed}


def _repeats(
    snapshot: Snapshot,
    glances: Mapping[int, Words],
    digests_of: Callable[[Iterable[int]], list[int]],
    engine: Engine,
) -> dict[int, int]:
    """Which leaves repeat the first of their dtype, size and digest."""
    leaves = snapshot.layout.leaves
    alike: dict[tuple[int, int, bytes], list[int]] = {}
    for i, glance in glances.items():
        alike.setdefault((leaves[i].dtype.number, leaves[i].n_words, glance.tobytes()), []).append(i)
    some = {i: kind for kind, members in alike.items() if len(members) > 1 for i in members}
    first_with: dict[tuple[object, int], int] = {}
    pairs = []
    for (i, kind), digest in zip(some.items(), digests_of(some), strict=True):
        j = first_with.setdefault((kind, digest), i)
        if j != i:
            pairs.append((i, j))
    equal = engine.are_equal([(snapshot.words(i), snapshot.words(j)) for i, j in pairs])
    return {i: j for (i, j), is_equal in zip(pairs, equal, strict=True) if is_equal}


def _candidates(
    snapshot: Snapshot, alike: Sequence[int], probes: Mapping[int, Sequence[Words]]
) -> dict[int, list[int]]:
    """Leaf number to those of leaves that it may be the cast of, among some of one shape, likely ones first.

    A few words of every leaf, cast to every dtype present, are looked up: the time is linear in the leaves.
    """
    leaves = snapshot.layout.leaves
    targets = {leaves[i].dtype for i in alike}
    known: dict[tuple[str, int, bytes], int] = {}
    for j in alike:
        dtype = leaves[j].dtype
        for target in targets:
            if (dtype.name, target.name) in CAST_PAIRS:
                for k, probe in enumerate(probes[j]):
                    words = cast(probe, dtype, target)
                    known.setdefault((target.name, k, words.tobytes()), j)
    found: dict[int, list[int]] = {}
    for i in alike:
        for k, probe in enumerate(probes[i]):
            source = known.get((leaves[i].dtype.name, k, probe.tobytes()))
            if source is not None and probe.any() and source not in found.get(i, ()):
                found.setdefault(i, []).append(source)
    return found


def _mostly_casts(snapshot: Snapshot, candidates: Sequence[tuple[int, int]], engine: Engine) -> set[tuple[int, int]]:
    """Which leaves are the cast of the other one in all but 1 % of some thousand words."""
    leaves = snapshot.layout.leaves
    found = set()
    for first in range(0, len(candidates), _LOOKED_AT):
        part = candidates[first : first + _LOOKED_AT]
        requests = []
        for pair in part:
            n_words = leaves[pair[0]].n_words
            requests += [(snapshot.words(j), 0, max(n_words // 4096, 1), n_words) for j in pair]
        told = iter(engine.strided(requests))
        for i, source in part:
            narrow, wide = next(told), next(told)
            is_other = cast(wide, leaves[source].dtype, leaves[i].dtype) != narrow
            if int(np.count_nonzero(is_other)) * 100 <= len(is_other):
                found.add((i, source))
    return found
