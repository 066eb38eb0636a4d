"""Results as Markdown, and the README's tables kept equal to them: `python -m tests.benchmarks.table`.

Imports the standard library, cpu_table and stall_table only.

The README names the results file in the marker before each table, `<!-- table:ratio FILE -->`, so that a test can
render that file again and compare.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import cpu_table, stall_table

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "raw": "raw",
    "zstd": "zstd -3",
    "zipnn": "ZipNN",
    "zipnn_xor": "ZipNN on XOR",
    "fast": "tricomp fast",
    "dense": "tricomp dense",
    "bound": "bound",
    "bound_scales": "bound + scales",
}
README_STREAMS = (
    "w float32", "w bfloat16", "m", "v",
    "w float32, 1 apart", "w float32, 10 apart", "w float32, 100 apart",
    "w bfloat16, 1 apart", "w bfloat16, 10 apart", "w bfloat16, 100 apart",
    "m, 1 apart", "m, 10 apart", "m, 100 apart",
    "v, 1 apart", "v, 10 apart", "v, 100 apart",
)  # fmt: skip
# Bits per element of another GPT under AdamW, which the dense tier was designed for.
TARGETS = {
    "w float32": 26.49, "w bfloat16": 10.49, "m": 26.5, "v": 23.6,
    "w float32, 1 apart": 19.3, "w float32, 10 apart": 22.4, "w float32, 100 apart": 24.4,
    "w bfloat16, 1 apart": 3.4, "w bfloat16, 10 apart": 6.4, "w bfloat16, 100 apart": 8.4,
    "v, 1 apart": 19.2, "v, 10 apart": 21.2, "v, 100 apart": 22.8,
}  # fmt: skip
README_COLUMNS = tuple(column for column in COLUMNS if column != "bound_scales")
_MARKED = re.compile(r"<!-- table:(ratio|files|cpu|stall) (\S+) -->\n.*?(<!-- /table:\1 -->)", re.DOTALL)


def ratio_table(results: dict[str, Any], names: Sequence[str] = (), columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Bits per element, a row a stream; names: the streams wanted, in their order, all if empty."""
    rows = {row["stream"]: row for row in results["streams"]}
    titles = [COLUMNS[column] for column in columns]
    lines = [f"| bits per element | {' | '.join(titles)} |", "|---|" + "---:|" * len(columns)]
    for name in names or rows:
        cells = {column: f"{rows[name][column]:.2f}" if column in rows[name] else "" for column in columns}
        cells["dense"] = f"**{cells['dense']}**"
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def targets_table(results: dict[str, Any]) -> str:
    """What was measured beside the design's targets, which were measured on another GPT's state, and the bound here."""
    rows = {row["stream"]: row for row in results["streams"]}
    lines = [
        "| bits per element | target | tricomp dense | bound here | ZipNN | holds |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, target in TARGETS.items():
        row = rows[name]
        verdict = "yes" if row["dense"] <= target else f"{row['dense'] - target:.2f} above"
        verdict += ", as is the bound" if row["dense"] > target < row["bound"] else ""
        peer = min(row["zipnn"], row.get("zipnn_xor", row["zipnn"]))
        lines.append(f"| {name} | {target} | **{row['dense']:.2f}** | {row['bound']:.2f} | {peer:.2f} | {verdict} |")
    return "\n".join(lines) + "\n"


def origin(results: dict[str, Any]) -> str:
    """Machine, date, versions and data in one sentence each."""
    machine, data = results["machine"], results["data"][0]
    model, adamw = ("a Flax GPT", "Optax's AdamW") if "optax" in data else ("a GPT", "AdamW")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Measured on {machine['cpu']} ({machine['n_cores']} cores), {results['date']}; {versions}.\n"
        f"Data: {model} of {data['n_parameters'] / 1e6:.1f} M parameters after {data['steps'][-1]} steps of {adamw}\n"
        f"(batch {data['batch']}, beta2 {data['beta2']}) on the {data['text']}.\n"
    )


def report(results: dict[str, Any]) -> str:
    """Everything that was measured, as one Markdown page."""
    overhead = results["overhead"]
    return f"""# Ratio benchmark, {results["date"]}

{origin(results)}
{ratio_table(results)}
zstd and ZipNN get each stream as one piece; tricomp writes it as a file. The bound is the entropy of the codec's
models, the best one for each leaf, symbol tables free; bound + scales adds the row and column scales at their entropy.
tricomp comes under it where its symbols hold more than the model's: a difference's sign and bits below its leading one.

Beside the targets that the dense tier was designed for, which were measured on the state of another GPT:

{targets_table(results)}
{overhead["n_leaves"]:,} leaves of {overhead["elements_per_leaf"]:,} float32: random bits cost
{overhead["noise_over_raw_percent"]} % more than raw; real weights cost {overhead["real_over_one_leaf_percent"]} % more
than the same elements in one leaf.
{_speeds(results.get("speed", []))}"""


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = ("encode", "decode", "ZipNN compress", "ZipNN decompress")
    lines = [f"\n| M elements/s, one core | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [str(row[column.lower().replace(" ", "_")]) for column in columns]
        lines.append(f"| {row['dtype']}, {row['mode']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def files_table(results: dict[str, Any]) -> str:
    """Sizes of whole files in percent of raw."""
    lines = ["| file | raw, MB | zstd -3 | ZipNN | tricomp |", "|---|---:|---:|---:|---:|"]
    for row in results["files"]:
        cells = [f"{100 * row[key] / row['raw']:.1f} %" for key in ("zstd", "zipnn", "tricomp")]
        lines.append(f"| {row['file']} | {row['raw'] / 1e6:.1f} | {cells[0]} | {cells[1]} | **{cells[2]}** |")
    return "\n".join(lines) + "\n"


def files_report(results: dict[str, Any]) -> str:
    """What the files benchmark measured, as one Markdown page."""
    inspect = results["inspect"]
    lines = ["| MB/s of raw, one core, one run | compress | decompress |", "|---|---:|---:|"]
    for row in results["files"]:
        rates = [f"{row['raw'] / 1e6 / max(row['seconds'][key], 1e-3):.0f}" for key in ("compress", "decompress")]
        lines.append(f"| {row['file']} | {' | '.join(rates)} |")
    return f"""# Files benchmark, {results["date"]}

{origin(results)}
{files_table(results)}
Against a base, zstd is run as --patch-from, and ZipNN gets the file or its XOR with the base, whichever comes out
smaller. Every file came back byte for byte.

{chr(10).join(lines)}

`tricomp inspect` of a file of {inspect["file_bytes"] / 1e9:.1f} GB with {inspect["n_leaves"]} leaves:
{inspect["seconds"]:.2f} s from start to end (median of 5), {inspect["peak_bytes"] / 1e6:.0f} MB of memory at most.
"""


def _rendered(kind: str, results: dict[str, Any]) -> str:
    if kind == "files":
        return f"{files_table(results)}\n{origin(results)}"
    if kind == "cpu":
        return f"{cpu_table.readme(results)}\n{origin(results)}{cpu_table.how(results)}"
    if kind == "stall":
        return f"{stall_table.readme(results)}\n{stall_table.origin(results)}{stall_table.how(results)}"
    return f"{ratio_table(results, README_STREAMS, README_COLUMNS)}\n{origin(results)}"


def with_tables(readme: str, root: Path = ROOT, files: Mapping[str, str] | None = None) -> str:
    """The README's text with its tables rendered from the files that their markers name, or from others, by kind."""
    missing = {"ratio", "files", "cpu", "stall"} - {match[1] for match in _MARKED.finditer(readme)}
    if missing:
        names = ", ".join(sorted(missing))
        raise SystemExit(f"README.md lacks <!-- table:KIND FILE --> ... <!-- /table:KIND --> for {names}")

    def rendered(match: re.Match[str]) -> str:
        file = (files or {}).get(match[1], match[2])
        body = _rendered(match[1], json.loads((root / file).read_text()))
        return f"<!-- table:{match[1]} {file} -->\n{body}{match[3]}"

    return _MARKED.sub(rendered, readme)


def main() -> None:
    """Write the README's tables again; arguments name other results files of the repository, each of its kind."""
    path = ROOT / "README.md"
    named = [Path(name).resolve() for name in sys.argv[1:]]
    files = {json.loads(file.read_text())["benchmark"]: file.relative_to(ROOT).as_posix() for file in named}
    path.write_text(with_tables(path.read_text(), files=files))


if __name__ == "__main__":
    main()
