"""What a save wrote and what a verify found, as plain data that prints well. Imports container and plan only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tricomp.container import Writing
from tricomp.plan import Plan


@dataclass(frozen=True)
class LeafReport:
    """How one leaf was coded. coded_bytes: its share, by words, of its frame's bytes."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    raw_bytes: int
    coded_bytes: int
    predict: str
    entropy: str


@dataclass(frozen=True)
class Breakdown:
    """What the bytes of a frame are for.

    side: frequency tables, scales, palettes. directory: where chunks begin, their checksums, and padding. symbols:
    the entropy-coded or indexed high parts. remainder: the low bits. patches: words that did not fit. raw: chunks
    stored as they are.
    """

    side: int = 0
    directory: int = 0
    symbols: int = 0
    remainder: int = 0
    patches: int = 0
    raw: int = 0

    @property
    def total(self) -> int:
        """All bytes of the frame."""
        return self.side + self.directory + self.symbols + self.remainder + self.patches + self.raw


@dataclass(frozen=True)
class Report:
    """What a save wrote. content_id, parent: 32 hex digits; parent None: the file stands alone. seconds: wall clock."""

    path: str
    raw_bytes: int
    file_bytes: int
    n_leaves: int
    seconds: float
    content_id: str
    parent: str | None
    leaves: tuple[LeafReport, ...]

    @property
    def ratio(self) -> float:
        """Raw bytes of the leaves over bytes of the file."""
        return self.raw_bytes / self.file_bytes

    def __str__(self) -> str:
        kind = f"delta of {self.parent[:8]}" if self.parent else "keyframe"
        return (
            f"{self.path}: {self.n_leaves} leaves, {self.raw_bytes:,} -> {self.file_bytes:,} bytes "
            f"(ratio {self.ratio:.3f}), {kind}, {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class BrokenStep:
    """A step that cannot be loaded, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """Steps whose every leaf was decoded and found equal to its digest, and those where that failed."""

    intact: tuple[int, ...]
    broken: tuple[BrokenStep, ...]

    @property
    def is_clean(self) -> bool:
        return not self.broken

    def __str__(self) -> str:
        lines = [f"{len(self.intact)} steps intact, {len(self.broken)} broken"]
        return "\n".join([*lines, *(f"step {broken.step}: {broken.reason}" for broken in self.broken)])


def report_of(path: str, written: Writing, seconds: float) -> Report:
    """The Report of a finished Writing."""
    leaves: dict[int, LeafReport] = {}
    for entry in written.entries:
        plan = Plan.from_wire(entry.plan, written.leaves[entry.leaves[0]].path)
        shares = divided(entry.n_bytes, [written.leaves[number].n_words for number in entry.leaves])
        for number, n_bytes in zip(entry.leaves, shares, strict=True):
            leaf = written.leaves[number]
            raw = (leaf.path, leaf.dtype.name, leaf.shape, leaf.n_bytes)
            leaves[number] = LeafReport(*raw, n_bytes, plan.predict, plan.entropy)
    return Report(
        path=path,
        raw_bytes=sum(leaf.n_bytes for leaf in written.leaves),
        file_bytes=written.n_bytes,
        n_leaves=len(written.leaves),
        seconds=seconds,
        content_id=written.content_id.hex(),
        parent=written.parent.hex() if written.parent else None,
        leaves=tuple(leaves[number] for number in range(len(written.leaves))),
    )


def divided(n_bytes: int, n_words: Sequence[int]) -> list[int]:
    """n_bytes divided in proportion to n_words, in whole bytes that add up to it."""
    ends = list(accumulate(n_words, initial=0))
    shares = [n_bytes * end // ends[-1] if ends[-1] else 0 for end in ends]
    shares[-1] = n_bytes
    return [end - begin for begin, end in pairwise(shares)]
