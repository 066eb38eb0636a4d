"""`tricomp export`: the leaves of a `.tri` file as a file of another format, or as one that stands alone.

The hard thing: what a flat format cannot hold is refused by name before a byte is written, and a file is there whole or
not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from tricomp.cli import console, progress, sources
from tricomp.errors import InvalidArgument
from tricomp.progress import counter

if TYPE_CHECKING:
    from tricomp.file import File

_SUFFIXES = {"torch": ".pt", "flax": ".msgpack"}  # of formats that are not called as their files are
_FORMATS = {".pt": "torch", ".pth": "torch", ".ckpt": "torch", ".bin": "torch", ".msgpack": "flax"}
_TRI = "tri"


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommand export."""
    parser = commands.add_parser(
        "export",
        parents=common,
        help="write a .tri file as safetensors, torch, npz, npy, Flax or Orbax",
        description="Write the leaves of a .tri file as a file of another format (a folder for Orbax), or as a .tri "
        "file that stands alone. "
        "With --leaves, the leaves that match alone, without the keys that all of them share: "
        "--leaves 'model/*' gives the model of a checkpoint under the names that it has in torch. "
        "Integers that tricomp quantize made go to safetensors as compressed-tensors has them.",
    )
    console.takes_files(parser.add_argument("file", metavar="FILE", help="a .tri file or STORE@STEP"))
    add_output(parser, "default: FILE with the suffix of the format; - is standard output")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="write floats in the place of the integers that tricomp quantize made (to safetensors)",
    )
    sources.add_base(parser)
    console.takes_threads(parser)
    parser.set_defaults(run=export, refuse=parser.error)


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say what to write, and where. default: of OUT, for the help."""
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help="safetensors, torch, npz, npy, flax, orbax or tri (default: told by the suffix of OUT)",
    )
    console.takes_files(parser.add_argument("-o", "--output", metavar="OUT", help=f"file to write ({default})"))
    parser.add_argument("--leaves", action="append", metavar="PATTERN", help="only leaves that match; may be repeated")
    parser.add_argument("-f", "--force", action="store_true", help="replace OUT if it is there")


def export(options: argparse.Namespace) -> int:
    """Write a `.tri` file as a file of another format."""
    from tricomp.file import File
    from tricomp.integers.form import forms_of

    with sources.opened([options.file], options.bases, options.threads) as (file,):
        if not isinstance(file, File):
            raise InvalidArgument(f"{options.file}: is a {file.format} file, not a .tri file.")
        stem = (os.path.basename(options.file) if "://" in options.file else options.file).removesuffix(f".{_TRI}")
        if os.path.splitext(stem)[1] in (".safetensors", ".npz", ".npy", *_FORMATS):
            stem = os.path.splitext(stem)[0]
        if options.dequantize and not forms_of(file):
            raise InvalidArgument(f"{options.file}: holds no integers that stand for floats. Leave out --dequantize.")
        return write(options, file, stem)


def write(options: argparse.Namespace, file: File, stem: str) -> int:
    """Write an open file, or some leaves of it, as options ask. stem: the output's name but for its suffix."""
    from tricomp import archive_names, checkpoint, folder, formats
    from tricomp.archive_output import put, put_folder, write_ahead
    from tricomp.codec import Engine
    from tricomp.file import matching
    from tricomp.integers.exchange import exported
    from tricomp.integers.form import forms_of
    from tricomp.subset import Subset

    if options.output is None and options.to is None:
        options.refuse("what is to be written? Give --to FORMAT or -o OUT")
    out: str = options.output or stem + _SUFFIXES.get(options.to, f".{options.to}")
    suffix = os.path.splitext(out)[1].lower()
    to = options.to or _FORMATS.get(suffix, suffix[1:])
    if not to:
        raise InvalidArgument(f"{out}: its name does not tell the format. Give --to FORMAT.")
    is_stream = out == "-"
    as_folder = None if to == _TRI else formats.folder(to)
    if as_folder is not None and is_stream:
        raise InvalidArgument(f"export: {to} is a folder, not a file for standard output. Give -o OUT.")
    if as_folder is not None:
        archive_names.check_folder(out, [file.name], options.force, as_folder)
    elif not is_stream:
        archive_names.check_output(out, [file.name], options.force)
    chosen = file
    as_integers = to == "safetensors" and bool(forms_of(file))
    if getattr(options, "dequantize", False) and not as_integers:
        raise InvalidArgument(f"export: --dequantize writes safetensors, not {to}. Give --to safetensors.")
    if options.leaves is not None and not as_integers:
        asked = matching(file, options.leaves)
        chosen = Subset(file, [path for path in file if path in asked])
    total = sum(chosen.leaf(path).n_bytes for path in chosen)
    with progress.shown(options, out) as draw:
        count = counter(draw, total)
        if as_folder is not None:
            n_bytes = put_folder(out, partial(as_folder.write, chosen), lambda _: options.force)
            if count is not None:
                count(total)
        elif to != _TRI:
            pieces = exported(file, options.leaves, options.dequantize) if as_integers else formats.exported(to, chosen)
            n_bytes = write_ahead(sys.stdout.buffer, pieces, count) if is_stream else put(out, pieces, on_bytes=count)
        elif is_stream:
            raise InvalidArgument("export: a .tri file goes to a file, not to standard output. Give -o OUT.")
        else:
            where, name = folder.split(out)
            metadata = {key: value for key, value in chosen.metadata.items() if key != "base"}
            engine = Engine(options.threads)
            report = checkpoint.put(where, name, chosen.content(), metadata=metadata, engine=engine, on_progress=count)
            n_bytes = report.file_bytes
    if options.json and not is_stream:
        facts = {"format": to, "n_leaves": len(chosen), "raw_bytes": total, "n_bytes": n_bytes}
        console.emit({"file": file.name, "output": out, **facts})
    n_leaves = f"{len(chosen):,} leaf" if len(chosen) == 1 else f"{len(chosen):,} leaves"
    console.note(options, f"{file.name}: {n_leaves} -> {out} ({to}, {console.count_bytes(n_bytes)})")
    return console.DONE
