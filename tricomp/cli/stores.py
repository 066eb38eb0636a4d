"""`tricomp store list|verify|prune|rebase|export`: the steps of a run.

The hard thing: what removes or replaces files says before and after what it does, and a store that is not there is an
error, never an empty store that gets made.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tricomp.chain import Keep, KeepEvery, KeepLast, Link, chains, nearest, to_prune
from tricomp.cli import console, export, progress
from tricomp.cli.table import entry, table
from tricomp.errors import MissingStep, TricompError
from tricomp.progress import counter

if TYPE_CHECKING:
    from tricomp.file import File
    from tricomp.store import Store


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommand store, and export, which is of a file what store export is of a step."""
    store = commands.add_parser(
        "store",
        help="list, verify, prune, rebase or export the steps of a store",
        description="Work on a store: the folder, or the URL, that holds the checkpoints of one training run.",
    )
    actions = store.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str, description: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, parents=common, help=help, description=description)
        console.takes_files(parser.add_argument("store", metavar="DIR", help="folder or URL of the store"))
        return parser

    parser = action("list", "show the steps", "Show all steps: size, ratio, kind, date, metadata. Nothing is decoded.")
    parser.set_defaults(run=list_steps)

    parser = action("verify", "check every step", "Decode every leaf of every step. Exit code 1 if one is damaged.")
    console.takes_threads(parser)
    parser.set_defaults(run=lambda options: verify_store(options, options.store))

    parser = action(
        "prune",
        "remove old steps",
        "Remove the steps that no option wants kept and that no kept step needs to be loaded.",
    )
    parser.add_argument("--keep-last", type=_count, metavar="N", help="keep the N highest steps")
    parser.add_argument("--keep-every", type=_count, metavar="N", help="keep the steps that are multiples of N")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be removed; remove nothing")
    parser.set_defaults(run=prune, refuse=parser.error)

    parser = action(
        "rebase",
        "make a step stand alone",
        "Write a step again so that it needs no other. What was made against it still loads.",
    )
    parser.add_argument("step", type=_step, metavar="STEP", help="number of the step, or latest")
    console.takes_threads(parser)
    parser.set_defaults(run=rebase)

    parser = action("export", "write a step as a file", "Write one step as a file that stands alone.")
    parser.add_argument("step", type=_step, metavar="STEP", help="number of the step, or latest")
    export.add_output(parser, "required unless --to is given")
    console.takes_threads(parser)
    parser.set_defaults(run=export_step, refuse=parser.error)
    export.add(commands, common)


@dataclass(frozen=True)
class _Step:
    """What a store tells of a step. saved: seconds since 1970, None if the storage does not tell."""

    step: int
    n_bytes: int
    raw_bytes: int
    n_leaves: int
    link: Link
    metadata: dict[str, Any]
    saved: float | None


def list_steps(options: argparse.Namespace) -> int:
    """Show the steps of a store; damaged ones are told on stderr."""
    store = _store(options.store)
    steps, damaged = _steps(store)
    found = chains([step.link for step in steps])
    ids = {step.link.content_id for step in steps}
    rows, results = [], []
    for step in steps:
        chain = found.get(step.step)
        if step.link.parent is None:
            kind, parent = "keyframe", None
        elif chain is None:
            kind, parent = "delta, cannot be loaded" if step.link.parent in ids else "delta, parent missing", None
        else:
            parent = chain[-2].step
            kind = f"delta of {parent}"
        ratio = step.raw_bytes / step.n_bytes
        saved = "" if step.saved is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(step.saved))
        notes = ", ".join(entry(key, value) for key, value in step.metadata.items())
        sizes = (console.count_bytes(step.n_bytes), console.count_bytes(step.raw_bytes), f"{ratio:.2f}")
        rows.append((f"{step.step}", *sizes, kind, saved, notes))
        results.append(
            {
                "step": step.step,
                "n_bytes": step.n_bytes,
                "raw_bytes": step.raw_bytes,
                "n_leaves": step.n_leaves,
                "ratio": ratio,
                "content_id": step.link.content_id.hex(),
                "parent": step.link.parent.hex() if step.link.parent else None,
                "parent_step": parent,
                "is_loadable": chain is not None,
                "saved": step.saved,
                "metadata": step.metadata,
            }
        )
    for error in damaged.values():
        console.complain(options, error)
    n_bytes, raw_bytes = sum(step.n_bytes for step in steps), sum(step.raw_bytes for step in steps)
    if options.json:
        broken = [{"step": number, "reason": str(error)} for number, error in damaged.items()]
        console.emit({"store": store.url, "steps": results, "damaged": broken, "n_bytes": n_bytes})
    elif not console.is_quiet(options):
        heads = ("step", "size", "of", "ratio", "kind", "saved", "metadata")
        total = f"{_steps_of(len(steps))}, {console.count_bytes(n_bytes)} for {console.count_bytes(raw_bytes)}"
        if raw_bytes:
            total += f" (ratio {raw_bytes / n_bytes:.3f})"
        console.show(
            "\n".join([*(table(heads, rows, left=(4, 5, 6), flexible=6) if rows else []), f"{store.url}: {total}"])
        )
    return console.FAILED if damaged else console.DONE


def verify_store(options: argparse.Namespace, path: str) -> int:
    """Check every step of a store."""
    store = _store(path, options.threads)
    total = sum(step.raw_bytes for step in _steps(store)[0])
    with progress.shown(options, path) as draw:
        report = store.verify(counter(draw, total))
    if options.json:
        broken = [{"step": one.step, "reason": one.reason} for one in report.broken]
        console.emit({"name": path, "is_clean": report.is_clean, "intact": list(report.intact), "broken": broken})
    for one in report.broken:
        console.complain(options, f"{path}: step {one.step}: {one.reason}")
    if not options.json and not console.is_quiet(options):
        told = f"{_steps_of(len(report.intact))} intact"
        if report.intact and (report.broken or console.verbosity(options)):
            told += f" ({', '.join(map(str, report.intact))})"
        if report.broken:
            told += f", {len(report.broken)} damaged or without what they need"
        console.show(f"{path}: {told}")
    return console.DONE if report.is_clean else console.FAILED


def prune(options: argparse.Namespace) -> int:
    """Remove what no policy wants and nothing kept needs, or show it."""
    keep: list[Keep] = []
    if options.keep_last is not None:
        keep.append(KeepLast(options.keep_last))
    if options.keep_every is not None:
        keep.append(KeepEvery(options.keep_every))
    if not keep:
        options.refuse("what is to be kept? Give --keep-last N, --keep-every N, or both")
    from tricomp.store import Store

    steps, _ = _steps(_store(options.store))
    sizes = {step.step: step.n_bytes for step in steps}
    if options.dry_run:
        removed = to_prune([step.link for step in steps], keep)
    else:
        with Store(options.store, keep=keep) as store:
            removed = store.prune()
    n_bytes = sum(sizes.get(step, 0) for step in removed)
    kept = [step for step in sizes if step not in removed]
    if options.json:
        emitted = {"removed": list(removed), "kept": kept, "n_bytes": n_bytes, "is_dry_run": options.dry_run}
        console.emit({"store": options.store, **emitted})
    elif not console.is_quiet(options):
        verb = "would be removed" if options.dry_run else "removed"
        which = f" ({_shown(removed)})" if removed else ""
        told = f"{_steps_of(len(removed))} {verb}{which}, {console.count_bytes(n_bytes)}; {len(kept)} kept"
        console.show(f"{options.store}: {told}{f' ({_shown(kept)})' if console.verbosity(options) else ''}")
    return console.DONE


def rebase(options: argparse.Namespace) -> int:
    """Make a step stand alone."""
    with _store(options.store, options.threads) as store:
        step = _known_step(store, options.step)
        with store.open_alone(step) as file:
            before, was_delta = file.n_bytes, file.parent is not None
        n_bytes = store.rebase(step).file_bytes if was_delta else before
    if options.json:
        console.emit({"store": store.url, "step": step, "n_bytes": n_bytes, "n_bytes_before": before})
    elif not console.is_quiet(options):
        what = f"{console.count_bytes(n_bytes)}, was {console.count_bytes(before)}" if was_delta else "and did before"
        console.show(f"{store.url}: step {step} stands alone ({what})")
    return console.DONE


def export_step(options: argparse.Namespace) -> int:
    """Write a step as a file."""
    with _store(options.store, options.threads) as store, store.open(options.step) as file:
        return export.write(options, file, f"step-{_known_step(store, options.step)}")


def _store(path: str, threads: int | None = None) -> Store:
    """An existing store, to be decoded with so many threads. Raises MissingStep if there is none."""
    from tricomp.store import Store

    store = Store(path, threads=threads)
    if not store.steps():
        raise MissingStep(f"there are no checkpoints in {path}. Check the path.")
    return store


def _steps(store: Store) -> tuple[list[_Step], dict[int, TricompError]]:
    """The steps of a store, ascending, and the errors of those that cannot be opened."""
    from tricomp.inspection import to_json

    found: list[_Step] = []
    damaged: dict[int, TricompError] = {}
    for step in store.steps():
        try:
            with store.open_alone(step) as file:
                parent = bytes.fromhex(file.parent) if file.parent else None
                link = Link(step, bytes.fromhex(file.content_id), parent, file.since_keyframe)
                metadata = {key: value for key, value in to_json(file.metadata).items() if key != "origin"}
                raw_bytes = sum(file.leaf(path).n_bytes for path in file)
                found.append(_Step(step, file.n_bytes, raw_bytes, len(file), link, metadata, _saved(file)))
        except MissingStep:  # pruned a moment ago
            continue
        except TricompError as error:
            damaged[step] = error
    return found, damaged


def _saved(file: File) -> float | None:
    """When a file was written, where the file system tells."""
    try:
        return os.stat(file.name).st_mtime
    except OSError:
        return None


def _known_step(store: Store, step: int | None) -> int:
    """The step asked for, the latest if None, which is in the store. Raises MissingStep."""
    steps = store.steps()
    number = max(steps) if step is None else step
    if number not in steps:
        other = nearest(steps, number)
        raise MissingStep(f"step {number} is not in {store.url}. The nearest is step {other}.")
    return number


def _count(text: str) -> int:
    """An argument that counts. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text!r}")
    return int(text)


def _step(text: str) -> int | None:
    """An argument that names a step; None: the latest. Raises ArgumentTypeError."""
    if text != "latest" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected the number of a step, or latest, got {text!r}")
    return None if text == "latest" else int(text)


def _steps_of(n: int) -> str:
    return f"{n:,} step" if n == 1 else f"{n:,} steps"


def _shown(steps: Sequence[int]) -> str:
    """Some steps for people: all of a few, else the first and the last ones."""
    some = [*map(str, steps)] if len(steps) <= 8 else [*map(str, steps[:4]), "...", *map(str, steps[-3:])]
    return ", ".join(some)
