"""The killed and resumed runs against the one left alone: exact bits, from what the processes wrote down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """rows: what was compared, how many, how many of them differ. differing: their names."""

    rows: tuple[tuple[str, int, int], ...]
    differing: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        return not self.differing and all(n > 0 for _, n, _ in self.rows)


def compare(
    alone: list[Event],
    killed: list[Event],
    resumed: list[Event],
    stream_of: Callable[[str], str],
    titles: Mapping[str, str],
) -> Comparison:
    """What the killed and resumed runs have in common with the uninterrupted one.

    stream_of: the stream that the leaf at a path counts to. titles: what each stream's row is called.
    """
    losses = {event["step"]: event["loss"] for event in all_of(alone, "loss")}
    others = all_of(killed + resumed, "loss")
    wrong = [f"loss at step {event['step']}" for event in others if event["loss"] != losses[event["step"]]]
    rows = [("loss", len(others), len(wrong))]
    expected, found = one_of(alone, "final")["digests"], one_of(resumed, "final")["digests"]
    paths = {name: [path for path in {**expected, **found} if stream_of(path) == name] for name in titles}
    for name, title in titles.items():
        differing = [path for path in paths[name] if expected.get(path) != found.get(path)]
        rows.append((title, len(paths[name]), len(differing)))
        wrong += differing
    return Comparison(tuple(rows), tuple(wrong))


def all_of(events: list[Event], kind: str) -> list[Event]:
    """The events of one kind."""
    return [event for event in events if event["event"] == kind]


def one_of(events: list[Event], kind: str) -> Event:
    """The one event of a kind."""
    (event,) = all_of(events, kind)
    return event
