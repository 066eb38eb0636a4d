"""Which checkpoint to code the next one against, and which to keep. Pure functions; imports errors only.

The hard thing: a delta names its parent by content, not by step, and several steps may hold the same content. So
chains are found from the keyframes outwards, shortest first: then there is no cycle, and equal content is as good as
the parent itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tricomp.errors import InvalidArgument

ReferenceChoice = Literal["previous", "keyframe"]


@dataclass(frozen=True)
class Link:
    """One checkpoint in a chain: its step, its content id, its parent's (None: a keyframe).

    since_keyframe: checkpoints saved since the last keyframe; 0 for a keyframe.
    """

    step: int
    content_id: bytes
    parent: bytes | None = None
    since_keyframe: int = 0


@dataclass(frozen=True)
class KeyframeEvery:
    """One checkpoint in n stands alone; n = 1: all do. Raises InvalidArgument unless n >= 1."""

    n: int

    def __post_init__(self) -> None:
        _require_positive(self)


class Keep(Protocol):
    """A retention policy: the steps, of those given in ascending order, that it wants kept."""

    def kept(self, steps: Sequence[int]) -> Iterable[int]: ...


@dataclass(frozen=True)
class KeepLast:
    """Keep the n highest steps. Raises InvalidArgument unless n >= 1."""

    n: int

    def __post_init__(self) -> None:
        _require_positive(self)

    def kept(self, steps: Sequence[int]) -> Iterable[int]:
        return steps[-self.n :]


@dataclass(frozen=True)
class KeepEvery:
    """Keep the steps that are multiples of n. Raises InvalidArgument unless n >= 1."""

    n: int

    def __post_init__(self) -> None:
        _require_positive(self)

    def kept(self, steps: Sequence[int]) -> Iterable[int]:
        return [step for step in steps if step % self.n == 0]


def _require_positive(policy: KeyframeEvery | KeepLast | KeepEvery) -> None:
    if type(policy.n) is not int or policy.n < 1:
        raise InvalidArgument(f"{type(policy).__name__}({policy.n!r}): expected an integer of at least 1.")


def chains(links: Collection[Link]) -> dict[int, tuple[Link, ...]]:
    """The chain of every step that can be loaded: its keyframe first, itself last. Steps without one are absent."""
    ordered = sorted(links, key=lambda link: link.step)
    by_parent: dict[bytes, list[Link]] = {}
    for link in ordered:
        if link.parent is not None:
            by_parent.setdefault(link.parent, []).append(link)
    found: dict[int, tuple[Link, ...]] = {link.step: (link,) for link in ordered if link.parent is None}
    known: set[bytes] = set()
    front = list(found.values())
    while front:
        following: list[tuple[Link, ...]] = []
        for chain in front:
            if chain[-1].content_id in known:
                continue
            known.add(chain[-1].content_id)
            for child in by_parent.get(chain[-1].content_id, ()):
                if child.step not in found:
                    found[child.step] = (*chain, child)
                    following.append(found[child.step])
        front = following
    return found


def next_parent(
    links: Collection[Link], previous: int | None, keyframe: KeyframeEvery, reference: ReferenceChoice
) -> Link | None:
    """The checkpoint to code the next one against; None: the next is a keyframe.

    previous: the step that the next one continues. A step that cannot be loaded is never the answer.
    """
    chain = chains(links).get(previous) if previous is not None else None
    if chain is None or chain[-1].since_keyframe + 1 >= keyframe.n:
        return None
    return chain[-1] if reference == "previous" else chain[0]


def nearest(steps: Iterable[int], step: int) -> int | None:
    """The highest of steps below step, else the lowest above it, else None."""
    others = [other for other in steps if other != step]
    below = [other for other in others if other < step]
    return max(below) if below else min(others, default=None)


def to_prune(links: Collection[Link], keep: Sequence[Keep], protected: Collection[int] = ()) -> tuple[int, ...]:
    """The steps, ascending, that neither a policy nor protected wants, and that no kept step's chain needs.

    Only steps that can be loaded count and are pruned, so that damaged ones never push out good ones.
    No policy: nothing is pruned.
    """
    if not keep:
        return ()
    found = chains(links)
    steps = sorted(found)
    wanted = {step for policy in keep for step in policy.kept(steps)} | (set(protected) & found.keys())
    needed = {link.step for step in wanted for link in found[step]}
    return tuple(step for step in steps if step not in needed)
