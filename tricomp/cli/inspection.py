"""`tricomp inspect`, `verify` and `diff`: what files hold, whether they are whole, what differs between two.

The hard thing: what a file tells of itself is shown as it is, long or hostile, and the exit code alone must do for a
script: 0 all well, 1 damage or a difference, and of diff 2 for trouble, as diff(1) has it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from tricomp.archive_names import SUFFIX
from tricomp.cli import console, progress, sources
from tricomp.cli.table import entry, table
from tricomp.errors import InvalidArgument, StorageError, TricompError
from tricomp.progress import counter

if TYPE_CHECKING:
    from tricomp.comparison import Comparison, LeafChange
    from tricomp.inspection import FileFacts, GroupFacts, LeafFacts
    from tricomp.verification import Verified

TROUBLE = 2  # exit code of diff when it could not compare
_FEW = 20  # leaves that inspect lists unasked
_MOST_GROUPS = 24  # rows of groups; the others become one
_PARTS = ("symbols", "remainder", "patches", "tables", "raw")
_SORTS = ("order", "path", "raw", "coded", "bits", "ratio")


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommands inspect, verify and diff."""
    parser = commands.add_parser(
        "inspect",
        parents=common,
        help="show what a file holds and where its bits went",
        description="Show what .tri files hold and where their bits went. Only the index and the heads of the frames "
        "are read: it takes no longer for a large file, and needs no base for a delta.",
    )
    console.takes_files(
        parser.add_argument("files", nargs="+", metavar="FILE", help="a .tri file, a folder of them, or STORE@STEP")
    )
    parser.add_argument(
        "--leaves",
        action="append",
        metavar="PATTERN",
        help="only the leaves that match, each of them listed ('model/*'); may be repeated",
    )
    parser.add_argument("--sort", choices=_SORTS, default="order", help="order of groups and leaves (default: order)")
    parser.set_defaults(run=inspect)

    parser = commands.add_parser(
        "verify",
        parents=common,
        help="check files or a whole store for damage",
        description="Compare all checksums, and the digest of every decoded leaf, of .tri files or of every step of "
        "stores. Exit code 1 if anything is damaged. The leaves of a delta are decoded if its base is given; else "
        "their checksums alone are compared.",
    )
    console.takes_files(
        parser.add_argument(
            "paths", nargs="+", metavar="PATH", help="a .tri file, a store, a folder of either, or STORE@STEP"
        )
    )
    sources.add_base(parser)
    console.takes_threads(parser)
    parser.set_defaults(run=verify)

    parser = commands.add_parser(
        "diff",
        parents=common,
        help="show which leaves differ between two files, and by how much",
        description="Compare two files leaf by leaf: .tri files, files of other formats, or steps of a store "
        "(STORE@STEP). One line tells how much differs, -v the leaves. Exit code 0 if they are equal, 1 if they "
        "differ, 2 if they could not be compared.",
    )
    for name in ("a", "b"):
        console.takes_files(parser.add_argument(name, metavar=name.upper(), help="a file, or STORE@STEP"))
    sources.add_base(parser)
    console.takes_threads(parser)
    parser.set_defaults(run=diff)


def inspect(options: argparse.Namespace) -> int:
    """Show the facts of files; goes on to the next after one that cannot be read."""
    from tricomp.file import File
    from tricomp.inspection import inspect as facts_of

    n_shown, code = 0, console.DONE
    for name in _members(options.files):
        try:
            if os.path.isdir(name) and sources.is_store(name):
                advice = f"Use tricomp store list {name}, or name a step: {name}@latest"
                raise InvalidArgument(f"{name}: is a store. {advice}")
            with sources.opened([name]) as (file,):
                if not isinstance(file, File):
                    raise InvalidArgument(f"{name}: is a {file.format} file, not a .tri file. Compress it first.")
                facts = facts_of(file, options.leaves)
        except (TricompError, OSError) as error:
            console.complain(options, error)
            code = console.FAILED
            continue
        if options.json:
            console.emit(facts.to_json())
        elif not console.is_quiet(options):
            is_listed = bool(options.leaves or console.verbosity(options) or len(facts.leaves) <= _FEW)
            console.show("\n".join([""] * (n_shown > 0) + _described(facts, options.sort, is_listed)))
            n_shown += 1
    return code


def verify(options: argparse.Namespace) -> int:
    """Check files and stores; goes on to the next after damage."""
    from tricomp.cli.stores import verify_store
    from tricomp.file import File
    from tricomp.verification import verify as verified

    code = console.DONE
    for path in _members(options.paths):
        try:
            if sources.step_of(path) is None and sources.is_store(path):
                code = max(code, verify_store(options, path))
                continue
            with sources.opened([path], options.bases, options.threads) as (file,):
                if not isinstance(file, File):
                    raise InvalidArgument(f"{path}: is a {file.format} file, which has no checksums to compare.")
                total = sum(file.leaf(leaf).n_bytes for leaf in file)
                with progress.shown(options, path) as draw:
                    found = verified(file, counter(draw, total))
        except (TricompError, OSError) as error:
            if options.json:
                console.emit({"name": path, "is_clean": False, "faults": [str(error)]})
            console.complain(options, error)
            code = console.FAILED
            continue
        code = max(code, tell_verified(options, found))
    return code


def tell_verified(options: argparse.Namespace, found: Verified) -> int:
    """Print what a check found; faults go to stderr. Returns the exit code."""
    if options.json:
        console.emit({**asdict(found), "is_clean": found.is_clean})
    for fault in found.faults:
        console.complain(options, fault)
    if not options.json and not console.is_quiet(options):
        if not found.is_clean:
            what = f"damaged in {len(found.faults)} places" if len(found.faults) > 1 else "damaged"
        elif not found.n_skipped:
            what = "intact"
        else:
            what = (
                f"checksums are right; {found.n_skipped} of its leaves could not be decoded without what they were "
                f"made against: give it with --base"
            )
        console.show(f"{found.name}: {what} ({_leaves(found.n_leaves)}, {console.count_bytes(found.raw_bytes)})")
    return console.DONE if found.is_clean else console.FAILED


def diff(options: argparse.Namespace) -> int:
    """Compare two files."""
    from tricomp.comparison import TreeSide, compare
    from tricomp.file import File

    try:
        with sources.opened([options.a, options.b], options.bases, options.threads) as opened:
            a, b = (file if isinstance(file, File) else TreeSide(file.tree) for file in opened)
            total = sum(a.leaf(path).n_bytes for path in a if path in b)
            with progress.shown(options, "diff") as draw:
                found = compare(a, b, counter(draw, total))
    except (TricompError, OSError, MemoryError) as error:
        console.complain(options, error)
        return TROUBLE
    if options.json:
        console.emit({"a": options.a, "b": options.b, **found.to_json()})
    elif not console.is_quiet(options):
        console.show("\n".join(_told(options.a, options.b, found, console.verbosity(options) > 0)))
    return console.DONE if found.is_equal else console.FAILED


def _members(names: Sequence[str]) -> Iterator[str]:
    """The names; in place of a folder that is no store, the stores and `.tri` files in it, as of compress -o FOLDER/.

    Raises StorageError if a folder cannot be read.
    """

    def refused(error: OSError) -> NoReturn:
        raise StorageError(f"{error.filename}: cannot be read: {error.strerror}.") from error

    for name in names:
        found: list[str] = []
        if "://" not in name and os.path.isdir(name) and not sources.is_store(name):
            for where, folders, files in os.walk(name, onerror=refused):
                if where != name and sources.is_store(where):
                    found.append(where)
                    folders.clear()
                else:
                    folders[:] = sorted(each for each in folders if not each.startswith("."))
                    shown = sorted(each for each in files if each.endswith(SUFFIX) and not each.startswith("."))
                    found += [os.path.join(where, each) for each in shown]
        yield from found or [name]


def _described(facts: FileFacts, sort: str, is_listed: bool) -> list[str]:
    """The facts of a file as lines of text."""
    size = f"{console.count_bytes(facts.n_bytes)} for {console.count_bytes(facts.raw_bytes)}"
    made = f"format {facts.format}, {facts.writer}"
    lines = [
        f"{facts.name}: {_leaves(facts.n_leaves)}, {size} (ratio {_number(facts.ratio, 3)})",
        f"  content id {facts.content_id}, {made}",
    ]
    if facts.parent is None:
        lines.append("  stands alone")
    else:
        name = f" ({facts.base})" if facts.base else ""
        saves = f", {facts.since_keyframe} saves after a keyframe" if facts.since_keyframe > 1 else ""
        lines.append(f"  delta of content id {facts.parent}{name}{saves}")
    if facts.origins:
        shown = [f"{one.name} ({one.format}, {console.count_bytes(one.n_bytes)})" for one in facts.origins[:3]]
        more = f" and {len(facts.origins) - 3} more" if len(facts.origins) > 3 else ""
        how = "byte for byte" if all(one.is_exact for one in facts.origins) else "as an equal file"
        lines.append(f"  made of {', '.join(shown)}{more}, restored {how}")
    if facts.metadata:
        lines.append("  metadata: " + ", ".join(entry(key, value) for key, value in facts.metadata.items()))
    rounded: dict[int, int] = {}
    for leaf in facts.leaves:
        if leaf.keep_mantissa_bits is not None:
            rounded[leaf.keep_mantissa_bits] = rounded.get(leaf.keep_mantissa_bits, 0) + 1
    for bits, count in sorted(rounded.items()):
        lines.append(f"  rounded: {_leaves(count)}, {bits} mantissa bits kept")
    for kind in facts.integers:
        arrays = f"{kind.n_arrays:,} array" if kind.n_arrays == 1 else f"{kind.n_arrays:,} arrays"
        lines.append(
            f"  {arrays} as {kind.form}: {kind.n_codes:,} codes in {console.count_bytes(kind.coded_bytes)}, "
            f"{console.count_bytes(kind.scale_bytes)} of it scales ({8 * kind.coded_bytes / max(kind.n_codes, 1):.2f} "
            f"bits each)"
        )
    groups = _sorted(facts.groups, sort, "name")
    if len(groups) > 1 or not is_listed:
        lines += ["", *_group_table(groups)]
    if is_listed and facts.leaves:
        lines += ["", *_leaf_table(_sorted(facts.leaves, sort, "path"))]
    if facts.leaves:
        lines += ["", "bits: of the file for each element; symbols and so on: the part of them that goes there"]
    return lines


def _sorted(facts: Sequence[Any], sort: str, name: str) -> list[Any]:
    """Groups or leaves in the order asked for; numbers from the largest down."""
    if sort == "order":
        return list(facts)
    if sort == "path":
        return sorted(facts, key=lambda fact: getattr(fact, name))
    key = {"raw": "raw_bytes", "coded": "coded_bytes"}.get(sort, sort)
    return sorted(facts, key=lambda fact: -1 if getattr(fact, key) is None else getattr(fact, key), reverse=True)


def _group_table(groups: Sequence[GroupFacts]) -> list[str]:
    heads = ("group", "leaves", "dtype", "size", "coded", "bits", "ratio", *_PARTS)
    rows = []
    for group in groups[:_MOST_GROUPS]:
        dtype = next(iter(group.dtypes)) if len(group.dtypes) == 1 else f"{len(group.dtypes)} dtypes"
        sizes = (console.count_bytes(group.raw_bytes), console.count_bytes(group.coded_bytes))
        numbers = (_number(group.bits), _number(group.ratio))
        rows.append((group.name or "(no group)", f"{group.n_leaves:,}", dtype, *sizes, *numbers, *_parts(group)))
    lines = table(heads, rows)
    return [*lines, f"and {len(groups) - _MOST_GROUPS} more groups"] if len(groups) > _MOST_GROUPS else lines


def _leaf_table(leaves: Sequence[LeafFacts]) -> list[str]:
    heads = ("leaf", "type", "mode", "bits", "ratio", "symbols", "remainder", "rest")
    rows = []
    for leaf in leaves:
        symbols, remainder, *rest = _part_bits(leaf)
        kept = "" if leaf.keep_mantissa_bits is None else f", {leaf.keep_mantissa_bits} mantissa bits kept"
        kept += "" if leaf.form is None else f", {leaf.form}"
        shape = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        numbers = (_number(leaf.bits), _number(leaf.ratio), _number(symbols), _number(remainder))
        rows.append((leaf.path or "(the tree)", shape, leaf.mode + kept, *numbers, _number(sum(rest))))
    return table(heads, rows, left=(0, 1, 2))


def _part_bits(facts: GroupFacts | LeafFacts) -> tuple[float, ...]:
    """Bits per element by purpose, as in _PARTS."""
    parts, n = facts.parts, max(facts.n_elements, 1)
    found = (parts.symbols, parts.remainder, parts.patches, parts.side + parts.directory, parts.raw)
    return tuple(8 * n_bytes / n for n_bytes in found)


def _parts(facts: GroupFacts | LeafFacts) -> list[str]:
    return [_number(bits) if bits else "" for bits in _part_bits(facts)]


def _number(value: float | None, n_digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{n_digits}f}"


def _leaves(n: int) -> str:
    return f"{n:,} leaf" if n == 1 else f"{n:,} leaves"


def _told(a: str, b: str, found: Comparison, is_verbose: bool) -> list[str]:
    """What differs, as lines of text."""
    if found.is_equal:
        note = "" if found.is_same_content else ", but for the order of keys or the kinds of containers"
        return [f"{a} and {b} are equal: {_leaves(found.n_leaves)}, {found.n_words:,} words{note}"]
    parts = []
    if found.changed:
        share = 100 * found.n_changed / found.n_words
        parts.append(
            f"{len(found.changed):,} of {_leaves(found.n_leaves)} changed in {found.n_changed:,} of "
            f"{found.n_words:,} words ({share:.3g} %)"
        )
    counts = (
        (found.mismatched, "of another dtype or shape"),
        (found.only_in_a, f"only in {a}"),
        (found.only_in_b, f"only in {b}"),
    )
    parts += [f"{_leaves(len(what))} {how}" for what, how in counts if what]
    if found.values:
        parts.append(f"{len(found.values):,} plain value{'s' * (len(found.values) > 1)}")
    lines = [f"{a} and {b} differ: {'; '.join(parts)}"]
    if is_verbose:
        lines += [f"  only in {a}: {path}" for path in found.only_in_a]
        lines += [f"  only in {b}: {path}" for path in found.only_in_b]
        lines += [f"  {other.path}: {other.a} and {other.b}" for other in found.mismatched]
        lines += [f"  {value.path}: {value.a or 'nothing'} and {value.b or 'nothing'}" for value in found.values]
        if found.changed:
            lines += ["", *_change_table(found.changed)]
    return lines


def _change_table(changed: Sequence[LeafChange]) -> list[str]:
    heads = ("leaf", "dtype", "words", "changed", "share", "largest change", "relative", "norm", "NaN, inf")
    rows = []
    for change in changed:
        norm = "-" if change.relative_norm is None else f"{change.relative_norm:.3g}"
        counts = (f"{change.n_words:,}", f"{change.n_changed:,}", f"{100 * change.n_changed / change.n_words:.3g} %")
        sizes = (f"{change.largest_absolute:.3g}", f"{change.largest_relative:.3g}", norm)
        odd = f"{change.n_nonfinite:,}" if change.n_nonfinite else ""
        rows.append((change.path or "(the tree)", change.dtype, *counts, *sizes, odd))
    return table(heads, rows, left=(0, 1))
