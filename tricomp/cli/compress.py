"""`tricomp compress` and `tricomp decompress`, in zstd's manner: parses, calls tricomp.archive for each file, prints.

The hard thing: one file's failure is told and counted, and never stops the others or touches an input.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from tricomp.cli import console, inputs
from tricomp.cli.batch import Batch, Done, LeftAlone, Out, share
from tricomp.errors import UnsupportedFormat
from tricomp.progress import OnProgress
from tricomp.report import Report


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommands compress and decompress."""
    parser = commands.add_parser(
        "compress",
        parents=common,
        help="compress tensor files: safetensors, npz, npy, pt, Flax msgpack",
        description="Compress tensor files, each to a .tri file beside it, and keep them: safetensors (a model in "
        "shards is one, by its index), npy, npz, pt, pth, ckpt, Flax msgpack. Exit code 0: all done; 1: some failed.",
    )
    _add_files(parser, "compress", "IN.tri")
    parser.add_argument(
        "--tier",
        choices=("dense", "fast"),
        default="dense",
        help="dense: smallest (default); fast: decodes by look-ups",
    )
    parser.set_defaults(run=compress, refuse=parser.error)
    parser = commands.add_parser(
        "decompress",
        parents=common,
        help="restore what compress was given",
        description="Restore the files that .tri files were made of, byte for byte where the format allows, and keep "
        "the .tri files. A .tri file that was not made of a file: see tricomp export.",
    )
    _add_files(parser, "decompress", "IN without .tri")
    parser.set_defaults(run=decompress, refuse=parser.error)


def _add_files(parser: argparse.ArgumentParser, verb: str, default: str) -> None:
    named = parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IN",
        help=f"file to {verb}, folder (with all below it), pattern, or - for standard input (default, if it is piped)",
    )
    out = parser.add_argument(
        "-o", "--output", metavar="OUT", help=f"output file, or folder for several; - is standard output ({default})"
    )
    base = parser.add_argument(
        "--base",
        "--patch-from",
        metavar="BASE",
        help="file to compress against, and needed again to decompress: a .tri file, or any that can be compressed",
    )
    for action in (named, out, base):
        console.takes_files(action)
    parser.add_argument("-c", "--stdout", action="store_true", help="write to standard output")
    console.takes_threads(parser)
    parser.add_argument(
        "-f", "--force", action="store_true", help="replace outputs that are there; write to a terminal"
    )
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--rm", action="store_true", help="remove each input once its output is safe on the disk")
    fate.add_argument("-k", "--keep", action="store_true", help="keep inputs (default)")


def compress(options: argparse.Namespace) -> int:
    """Compress every input. Returns the exit code."""
    from tricomp import archive
    from tricomp.plan import Spec

    batch = Batch(options, is_compressed=False)

    def one(given: inputs.Input, path: str, out: Out, draw: OnProgress | None) -> Done:
        if given.is_found and batch.base is not None and os.path.samefile(path, batch.base.path):
            raise LeftAlone
        options_of_it = (batch.base, Spec(tier=options.tier), options.threads, options.force, draw)
        name = "stdin" if given.path == inputs.STANDARD else None
        try:
            made = archive.compress_file(path, out, *options_of_it, name=name, reserved=batch.outputs)
        except UnsupportedFormat:
            if given.is_found:
                raise LeftAlone from None
            raise
        report = made.report
        sizes = f"{console.count_bytes(made.input_bytes)} => {console.count_bytes(report.file_bytes)}"
        text = f"{given.path}: {share(report.file_bytes, made.input_bytes)} ({sizes}, {report.path})"
        text += "" if batch.base is None else f", against {batch.base.name}"
        text += "" if made.is_exact else "; restores to an equal file, not byte for byte"
        facts = {
            "format": made.format,
            "is_exact": made.is_exact,
            "leaves": report.n_leaves,
            "raw_bytes": report.raw_bytes,
            "content_id": report.content_id,
            "parent": report.parent,
        }
        outputs = () if batch.stream else (report.path,)
        return Done(made.input_bytes, report.file_bytes, outputs, made.files, text, facts, tuple(_plans(report)))

    return batch.run(one)


def decompress(options: argparse.Namespace) -> int:
    """Decompress every input. Returns the exit code."""
    from tricomp import archive

    batch = Batch(options, is_compressed=True)

    def one(given: inputs.Input, path: str, out: Out, draw: OnProgress | None) -> Done:
        options_of_it = (batch.base, options.force, options.threads, draw)
        made = archive.decompress_file(path, out, *options_of_it, reserved=batch.outputs, is_synced=options.rm)
        is_exact = all(file.is_exact for file in made.files)
        names = made.files[0].path if len(made.files) == 1 else f"{len(made.files)} files"
        how = "byte for byte" if is_exact else "rounded" if made.is_rounded else "an equal file, written anew"
        text = f"{given.path}: {console.count_bytes(made.n_bytes)} => {names}, {how}"
        facts = {"is_exact": is_exact, "outputs": [file.path for file in made.files], "base": made.base}
        outputs = () if batch.stream else tuple(file.path for file in made.files)
        return Done(made.file_bytes, made.n_bytes, outputs, (path,), text, facts)

    return batch.run(one)


def _plans(report: Report) -> Iterator[str]:
    """How the leaves were coded: a line for each way."""
    ways: dict[str, list[int]] = {}
    for leaf in report.leaves:
        way = ways.setdefault(leaf.predict if leaf.entropy == "none" else f"{leaf.predict}, {leaf.entropy}", [0, 0, 0])
        for i, n in enumerate((1, leaf.raw_bytes, leaf.coded_bytes)):
            way[i] += n
    for name, (n, raw, coded) in sorted(ways.items(), key=lambda way: -way[1][1]):
        sizes = f"{console.count_bytes(raw)} => {console.count_bytes(coded)}"
        yield f"{name}: {n} {'leaf' if n == 1 else 'leaves'}, {sizes}"
