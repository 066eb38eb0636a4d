"""Whether files are whole: checksums of all bytes, digests of all leaves, in memory for a few pieces. Decodes.

The hard thing: along a chain every leaf is needed again by the next file. So files go together, piece by piece: a
piece is decoded once, and handed on to those that were made against it. And one damage must not hide another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tricomp import codec
from tricomp.chain import Link, chains
from tricomp.errors import CorruptFile, CorruptFrame, TricompError, WrongReference
from tricomp.file import Array, File
from tricomp.progress import OnBytes
from tricomp.report import BrokenStep, VerifyReport
from tricomp.steps import Steps


@dataclass(frozen=True)
class Verified:
    """What a check of one file found.

    n_skipped: leaves whose checksums alone were compared, since they were coded against a parent that was not given.
    faults: in words, one a damaged leaf, or one of a place that no leaf shows.
    """

    name: str
    n_leaves: int
    n_skipped: int
    raw_bytes: int
    faults: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether no damage was found."""
        return not self.faults


def verify(file: File, on_progress: OnBytes | None = None) -> Verified:
    """Compare every checksum and every digest of an open file; damage is told, not raised. Raises LimitExceeded."""
    return _verify_together([file], [None], on_progress)[0]


def verify_steps(steps: Steps, on_progress: OnBytes | None = None) -> VerifyReport:
    """Verify every step of a store, chain by chain, in little memory. Raises LimitExceeded, StorageError."""
    found = chains(steps.links())
    reasons: dict[int, str] = {}
    together: dict[int, list[int]] = {}
    for step, chain in sorted(found.items(), key=lambda item: len(item[1])):
        together.setdefault(chain[0].step, []).append(step)
    for members in together.values():
        _verify_chain(steps, members, {step: _above(found[step]) for step in members}, reasons, on_progress)
    for step in steps.files():
        if step not in found:
            reasons[step] = str(steps.fault(step))
    intact = tuple(step for step in sorted(found) if step not in reasons)
    return VerifyReport(intact, tuple(BrokenStep(step, reasons[step]) for step in sorted(reasons)))


def _above(chain: Sequence[Link]) -> int | None:
    """The step against which the last one of a chain was coded."""
    return chain[-2].step if len(chain) > 1 else None


def _verify_chain(
    steps: Steps,
    members: Sequence[int],
    parents: Mapping[int, int | None],
    reasons: dict[int, str],
    on_progress: OnBytes | None,
) -> None:
    """Verify the steps behind one keyframe, parents first, and add to reasons why some are broken."""
    with ExitStack() as stack:
        files: dict[int, File] = {}
        for step in members:
            above = parents[step]
            try:
                if above is None or above in files:
                    reference = None if above is None else files[above]
                    files[step] = stack.enter_context(steps.open_alone(step, reference))
            except (TricompError, OSError) as error:
                reasons[step] = str(error)
        there = list(files)
        numbers = [None if (above := parents[step]) is None else there.index(above) for step in there]
        for step, one in zip(there, _verify_together(list(files.values()), numbers, on_progress)):
            if one.faults:
                more = f" ({len(one.faults) - 1} more leaves are damaged)" if len(one.faults) > 1 else ""
                reasons[step] = one.faults[0] + more
        for step in members:
            if step not in reasons and parents[step] in reasons:
                reasons[step] = f"needs step {parents[step]}, which is broken."


@dataclass
class _Check:
    """The check of one file so far, and of the leaf that is being decoded."""

    file: File
    parent: int | None
    children: list[int] = field(default_factory=list)
    n_skipped: int = 0
    faults: dict[str, None] = field(default_factory=dict)
    decoded: set[str] = field(default_factory=set)
    digest_sum: int = 0
    is_lost: bool = False  # the leaf cannot be decoded


def _verify_together(
    files: Sequence[File], parents: Sequence[int | None], on_progress: OnBytes | None
) -> list[Verified]:
    """Verify files of one chain or tree. parents: position of each file's parent, which comes before it."""
    checks = [_Check(file, parent) for file, parent in zip(files, parents)]
    for i, parent in enumerate(parents):
        if parent is not None:
            checks[parent].children.append(i)
    for path in dict.fromkeys(path for file in files for path in file):
        _verify_leaf(checks, path, on_progress)
    for check in checks:
        try:
            check.file.check(check.decoded)
        except CorruptFrame as error:
            if not check.faults:  # damage that no leaf shows
                check.faults[str(error)] = None
    return [
        Verified(
            check.file.name,
            len(check.file),
            check.n_skipped,
            sum(check.file.leaf(path).n_bytes for path in check.file),
            tuple(check.faults),
        )
        for check in checks
    ]


def _verify_leaf(checks: list[_Check], path: str, on_progress: OnBytes | None) -> None:
    """Decode one leaf of all files that have it, and compare digests."""
    having = [check for check in checks if path in check.file]
    tops = [i for i, check in enumerate(checks) if path in check.file and not _hands_on(checks, check, path)]
    for check in having:
        check.digest_sum, check.is_lost = 0, False
    leaves = [(check, check.file.leaf(path)) for check in having]
    sizes = {id(check): leaf.n_words // leaf.dtype.words_per_element for check, leaf in leaves}
    n_each = min(check.file.piece_elements(path) for check in having)
    for start in range(0, max(sizes.values()), n_each):
        pending: list[tuple[int, Array | None]] = [(i, None) for i in tops]
        while pending:  # depth first, so that few pieces are held
            i, above = pending.pop()
            check = checks[i]
            stop = min(start + n_each, sizes[id(check)])
            piece = None
            if start < stop and not check.is_lost:
                try:
                    piece, added = check.file.summed(path, start, stop, above)
                    check.digest_sum += added
                except WrongReference:
                    check.n_skipped += 1
                    check.is_lost = True
                except (CorruptFile, CorruptFrame) as error:
                    check.is_lost = True
                    if not any(str(error).startswith(f"{other.file.name}: ") for other in checks if other is not check):
                        check.faults[str(error)] = None
            if piece is not None and on_progress:
                on_progress(piece.nbytes)
            pending += [(child, piece) for child in check.children if _hands_on(checks, checks[child], path)]
    for check in having:
        if check.is_lost:
            continue
        n_bytes = check.file.leaf(path).n_bytes
        stored, computed = check.file.digest(path), codec.digest_end(check.digest_sum, n_bytes)
        if n_bytes:
            check.decoded.add(path)
        if stored != computed:
            fault = f"{check.file.name}: leaf {path!r}: digest {stored:016x} stored, {computed:016x} computed."
            check.faults[fault] = None


def _hands_on(checks: Sequence[_Check], check: _Check, path: str) -> bool:
    """Whether the leaf of a file's parent can serve to decode its own."""
    if check.parent is None or path not in check.file or path not in checks[check.parent].file:
        return False
    return checks[check.parent].file.leaf(path) == check.file.leaf(path)
