"""`tricomp quantize`: the weights of a tensor file become integers in a `.tri` file. No code of a model is needed.

The hard thing: it is lossy, so it says for each tensor what it did and by how much that is off, and replaces nothing.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from tricomp.cli import console, progress
from tricomp.cli.table import table

if TYPE_CHECKING:
    from tricomp.integers.deployment import Deployed, TensorFacts

_FEW = 40  # tensors that are listed unasked


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommand quantize."""
    parser = commands.add_parser(
        "quantize",
        parents=common,
        help="turn the weights of a finished model into small integers",
        description="Turn the weights of a tensor file (safetensors, alone or by the index of its shards; npz; .tri) "
        "into integers and scales, and write a .tri file; everything else stays as it is. Not lossless: a table tells "
        "the error of each tensor. Floats of two or more dimensions, 4,096 elements or more, are quantised: linear, "
        "convolution and embedding weights; not norms and biases. A scale is for a row: the first axis is the output.",
    )
    console.takes_files(parser.add_argument("input", metavar="IN", help="file or folder of a model"))
    out = parser.add_argument("-o", "--output", metavar="OUT", help="file to write (default: IN.int8.tri)")
    console.takes_files(out)
    parser.add_argument("--bits", type=int, choices=(8, 7, 6, 5, 4), default=8, help="of a weight (default: 8)")
    parser.add_argument(
        "--group", type=int, metavar="N", help="one scale for every N weights of a row, a multiple of 16"
    )
    parser.add_argument(
        "--scale-dtype", choices=("float32", "bfloat16"), default="float32", help="of scales (default: float32)"
    )
    parser.add_argument("--no-clip", action="store_true", help="do not search for the scale with the least error")
    parser.add_argument(
        "--select",
        action="append",
        metavar="PATTERN",
        help="quantise these tensors alone ('h.*.weight'); may be repeated",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="leave these in floats; may be repeated"
    )
    console.takes_threads(parser)
    parser.add_argument("-f", "--force", action="store_true", help="replace OUT if it is there")
    parser.set_defaults(run=quantize)


def quantize(options: argparse.Namespace) -> int:
    """Quantise one model. Returns the exit code."""
    from tricomp.integers.deployment import quantize_file

    with progress.shown(options, options.input) as draw:
        made = quantize_file(
            options.input,
            options.output,
            options.bits,
            group=options.group,
            scale_dtype=options.scale_dtype,
            clip=not options.no_clip,
            select=options.select,
            skip=options.skip,
            threads=options.threads,
            overwrite=options.force,
            on_progress=draw,
        )
    if options.json:
        console.emit(_facts(options, made))
    elif not console.is_quiet(options):
        console.show("\n".join(_described(made, console.verbosity(options) > 0)))
    n = sum(tensor.form is not None for tensor in made.tensors)
    sizes = f"{console.count_bytes(made.input_bytes)} => {console.count_bytes(made.report.file_bytes)}"
    share = f"{100 * made.report.file_bytes / max(made.input_bytes, 1):.1f} %"
    console.note(options, f"{options.input}: {n} of {len(made.tensors)} tensors, {share} ({sizes}, {made.report.path})")
    return console.DONE


def _facts(options: argparse.Namespace, made: Deployed) -> dict[str, object]:
    tensors = [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bits": tensor.form.bits if tensor.form else None,
            "group": tensor.form.group if tensor.form else None,
            "error_rms": tensor.error_rms,
            "error_max": tensor.error_max,
            "raw_bytes": tensor.raw_bytes,
            "coded_bytes": tensor.coded_bytes,
        }
        for tensor in made.tensors
    ]
    report = made.report
    sizes = {"input_bytes": made.input_bytes, "file_bytes": report.file_bytes, "seconds": report.seconds}
    return {"file": options.input, "output": report.path, **sizes, "content_id": report.content_id, "tensors": tensors}


def _described(made: Deployed, is_whole: bool) -> list[str]:
    """A table of the tensors: all, or those with the largest errors if there are many."""
    quantised = [tensor for tensor in made.tensors if tensor.form is not None]
    rest = [tensor for tensor in made.tensors if tensor.form is None]
    shown = list(made.tensors)
    if len(shown) > _FEW and not is_whole:
        shown = sorted(quantised, key=lambda tensor: -tensor.error_rms)[:_FEW]
    heads = ("tensor", "type", "form", "error", "largest", "size", "coded", "bits")
    lines = table(heads, [_row(tensor) for tensor in shown], left=(0, 1, 2))
    if len(shown) < len(made.tensors):
        lines.append(f"and {len(made.tensors) - len(shown)} more with smaller errors or none; -v lists all")
    raw, coded = (sum(getattr(each, size) for each in quantised) for size in ("raw_bytes", "coded_bytes"))
    kept = sum(tensor.coded_bytes for tensor in rest)
    worst = max(quantised, key=lambda tensor: tensor.error_rms)
    return [
        *lines,
        "",
        "error: root mean square, of that of the weights; largest: error, of the largest weight",
        f"{len(quantised)} tensors as {worst.form.describe() if worst.form else ''}: "
        f"{console.count_bytes(raw)} => {console.count_bytes(coded)}; "
        f"{len(rest)} left as they are: {console.count_bytes(kept)}",
    ]


def _row(tensor: TensorFacts) -> tuple[str, ...]:
    n = max(math.prod(tensor.shape), 1)
    shape = f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"
    errors = (f"{100 * tensor.error_rms:.2f} %", f"{100 * tensor.error_max:.2f} %") if tensor.form else ("", "")
    sizes = (console.count_bytes(tensor.raw_bytes), console.count_bytes(tensor.coded_bytes))
    form = tensor.form.describe() if tensor.form else ""
    return (tensor.name, shape, form, *errors, *sizes, f"{8 * tensor.coded_bytes / n:.2f}")
