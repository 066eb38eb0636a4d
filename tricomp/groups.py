"""Leaf paths to the few groups that a person wants sums of: the weights, each slot of an optimizer. Pure functions.

The hard thing: trees differ. A checkpoint keeps `optimizer/state/0/exp_avg` in nested dicts, a state dict 300 dotted
names in one. So numbers become "*", the tree's own levels go first, and a tree that is one group is split further.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

MOST_GROUPS = 16  # that a split of one large group leads to
_MOST_SLOTS = (
    8  # names behind a number, or beside all dicts, that are told apart: an optimizer has few, a model hundreds
)
_SEPARATOR = re.compile(r"([/.])")
_NUMBERED = re.compile(r"(.*[^0-9]_?)?[0-9]+")


def group_names(paths: Sequence[str], weights: Sequence[int]) -> list[str]:
    """The name of each path's group. weights: what each path counts when large groups are split first, say bytes."""
    names = _top_level(paths)
    if len(set(names)) > 1:
        return names
    return _split(paths, weights)


def _top_level(paths: Sequence[str]) -> list[str]:
    """The top-level key of each path; where numbers stand below it, the keys up to the one behind the last number."""
    keys = [path.split("/") for path in paths]
    ends = [_end(parts) for parts in keys]
    slots: dict[tuple[str, ...], set[str]] = {}
    for parts, end in zip(keys, ends):
        if end > 1:
            slots.setdefault(_starred(parts[: end - 1]), set()).add(parts[end - 1])
    n_alone = len({_star(parts[0]) for parts, end in zip(keys, ends) if end == 0})
    names = []
    for parts, end in zip(keys, ends):
        if end == 0 and n_alone <= _MOST_SLOTS:
            end = 1
        if end > 1 and len(slots[_starred(parts[: end - 1])]) > _MOST_SLOTS:
            end -= 1
        names.append("/".join(_starred(parts[:end])))
    return names


def _end(parts: Sequence[str]) -> int:
    """How many keys name the group: none of a path that is one key, which is a name in a flat dict."""
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    if numbered:
        return numbered[-1] + 2
    return 1 if len(parts) > 1 else 0


def _starred(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(_star(part) for part in parts)


@lru_cache(maxsize=1 << 16)
def _star(part: str) -> str:
    """A key with the number that it is, or that it ends with, as "*": 12, layer12 and Dense_12."""
    found = _NUMBERED.fullmatch(part)
    return f"{found[1] or ''}*" if found else part


def _split(paths: Sequence[str], weights: Sequence[int]) -> list[str]:
    """Groups by beginnings of names, cut at "/" and ".": the heaviest are made longer while there are not too many."""
    tokens = [[part if part in "/." else _star(part) for part in _SEPARATOR.split(path)] for path in paths]
    groups: dict[tuple[str, ...], list[int]] = {(): list(range(len(paths)))}
    done: set[tuple[str, ...]] = set()
    while waiting := [start for start in groups if start not in done]:
        start = max(waiting, key=lambda start: sum(weights[i] for i in groups[start]))
        longer: dict[tuple[str, ...], list[int]] = {}
        for i in groups[start]:
            longer.setdefault(tuple(tokens[i][: len(start) + 2 - (not start)]), []).append(i)
        if start in longer or len(groups) - 1 + len(longer) > MOST_GROUPS:
            done.add(start)
        else:
            del groups[start]
            groups.update(longer)
    names = [""] * len(paths)
    for start, members in groups.items():
        for i in members:
            names[i] = "".join(start)
    return names
