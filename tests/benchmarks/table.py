"""Results as Markdown, and the README's table kept equal to them: `python -m tests.benchmarks.table`.

Imports the standard library only.

The README names the results file in the marker before its table, `<!-- table:ratio FILE -->`, so that a test can
render that file again and compare.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
README_COLUMNS = tuple(column for column in COLUMNS if column != "bound_scales")
_MARKED = re.compile(r"<!-- table:ratio (\S+) -->\n.*?(<!-- /table:ratio -->)", re.DOTALL)


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


def origin(results: dict[str, Any]) -> str:
    """Machine, date, versions and data in one sentence each."""
    machine, data = results["machine"], results["data"][0]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Measured on {machine['cpu']} ({machine['n_cores']} cores), {results['date']}; {versions}.\n"
        f"Data: a GPT of {data['n_parameters'] / 1e6:.1f} M parameters after {data['steps'][-1]} steps of AdamW\n"
        f"(batch {data['batch']}, beta2 {data['beta2']}) on the {data['text']}.\n"
    )


def report(results: dict[str, Any]) -> str:
    """Everything that was measured, as one Markdown page."""
    overhead = results["overhead"]
    columns = ("encode", "decode", "ZipNN compress", "ZipNN decompress")
    speeds = [f"| M elements/s, one core | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in results["speed"]:
        cells = [str(row[column.lower().replace(" ", "_")]) for column in columns]
        speeds.append(f"| {row['dtype']}, {row['mode']} | {' | '.join(cells)} |")
    return f"""# Ratio benchmark, {results["date"]}

{origin(results)}
{ratio_table(results)}
zstd and ZipNN get each stream as one piece; tricomp writes it as a file. The bound is the entropy of the codec's
models, the best one for each leaf, symbol tables free; bound + scales adds the row and column scales at their entropy.
tricomp comes under it where its symbols hold more than the model's: a difference's sign and bits below its leading one.

{overhead["n_leaves"]:,} leaves of {overhead["elements_per_leaf"]:,} float32: random bits cost
{overhead["noise_over_raw_percent"]} % more than raw; real weights cost {overhead["real_over_one_leaf_percent"]} % more
than the same elements in one leaf.

{chr(10).join(speeds)}
"""


def with_table(readme: str, root: Path = ROOT, results_file: str | None = None) -> str:
    """The README's text with its table rendered from results_file, or from the file that its marker names."""
    match = _MARKED.search(readme)
    if match is None:
        raise SystemExit("README.md has no <!-- table:ratio FILE --> ... <!-- /table:ratio --> pair")
    file = results_file or match.group(1)
    results = json.loads((root / file).read_text())
    body = f"{ratio_table(results, README_STREAMS, README_COLUMNS)}\n{origin(results)}"
    return f"{readme[: match.start()]}<!-- table:ratio {file} -->\n{body}{readme[match.start(2) :]}"


def main() -> None:
    """Write the README's table again; an argument names another results file of the repository."""
    path = ROOT / "README.md"
    file = Path(sys.argv[1]).resolve().relative_to(ROOT).as_posix() if len(sys.argv) > 1 else None
    path.write_text(with_table(path.read_text(), results_file=file))


if __name__ == "__main__":
    main()
