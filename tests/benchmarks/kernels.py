"""What the GPU kernels compile to, and the most that cards could make of it: `python -m tests.benchmarks.kernels`.

Needs triton, no GPU, and times nothing: registers, spills, shared memory and the loop's instructions are read off the
machine code (tests/kernel_code.py says how), and a bound is computed from them and from the bytes that move. The hard
thing is to keep the bound honest: every assumption is in the results, and a bound is no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.kernel_code import GROUPS, measure_all
from tests.kernel_variants import TARGETS, Variant, tasks, variants

RESULTS = Path(__file__).parent / "results"
ASSUMPTIONS = """A multiprocessor issues 4 instructions of a warp each cycle. Of these at most 2 are integer
arithmetic other than multiplication (64 lanes), 2 multiplications or other work of the multiplying pipe, one of which
counts twice if its product has 64 bits; every two cycles one count of bits, conversion or reduction over a warp (16
lanes); one load, store or shuffle (32 lanes), where one of 64 bits a lane counts twice and one of 128 four times. What
goes to the uniform unit and branches take an issue and nothing else. A compute unit of AMD's issues one vector
instruction of a wave of 64 each cycle, scalar ones beside it, and a load, store or shuffle every four cycles. Nothing
waits: no latency, no bank conflict, no miss of a cache, no tail of the grid, full clock. What a loop does in every
fourth or eighth trip only is counted in every trip. Planning, surveying, patches and coded byte planes are not counted.
Memory: every word and its reference is read once; coded bytes are written to scratch memory, read and written again by
the copy; flags of patches are written, one bit a word. A decoder reads the coded bytes and the reference and writes the
words. Nothing stays in the L2 cache. A coded word has the bits that the ratio benchmark found for such a stream."""


@dataclass(frozen=True)
class Card:
    """What a bound needs to know of a card. gigabytes: a second, of its memory."""

    name: str
    target: str
    units: int
    gigahertz: float
    gigabytes: float


CARDS = (
    Card("A100", "sm_80", 108, 1.41, 2039),
    Card("H100", "sm_90", 132, 1.98, 3350),
    Card("H200", "sm_90", 132, 1.98, 4800),
    Card("MI300X", "gfx942", 304, 2.1, 5300),
)


def cycles(row: dict[str, Any]) -> float:
    """Cycles of a multiprocessor for 32 words, by the busiest of its units."""
    units = row["units"]

    def n(*names: str) -> float:
        return sum(units.get(name, 0) for name in names) / GROUPS

    if row["target"].startswith("gfx"):
        return max(n("vector", "load", "store", "shuffle"), n("load", "store", "shuffle") * 4, n("scalar", "branch"))
    multiply = n("multiply") + 2 * n("wide")
    memory = n("load", "store", "shuffle") + n("load_64", "store_64") * 2 + n("load_128", "store_128") * 4
    return max(sum(units.values()) / GROUPS / 4, n("integer") / 2, multiply / 2, 2 * n("convert"), memory)


def coded_bits(variant: Variant) -> float | None:
    """Bits of a coded word, as the latest ratio benchmark found them for such state."""
    case = variant.case
    if case is None or not case.stream:
        return None
    results = json.loads(sorted(RESULTS.glob("*-ratio.json"))[-1].read_text())
    row = next(row for row in results["streams"] if row["stream"] == case.stream)
    bits: float = row["fast" if case.plan.entropy == "index" else "dense"]
    return bits * case.plan.dtype.word_bits / row["raw"]


def bounds(row: dict[str, Any], variant: Variant) -> list[dict[str, Any]]:
    """GB/s of words by card: by instructions, by memory, and the lesser. None where no stream is known."""
    bits = coded_bits(variant)
    if bits is None or variant.case is None or not row["loop"]:
        return []
    word_bits = variant.case.plan.dtype.word_bits
    is_encoder = variant.name.startswith("encode")
    read = word_bits * (2 if variant.case.kind.HAS_REFERENCE else 1)
    moved = read + 3 * bits + 1 if is_encoder else read + bits
    found = []
    for card in (card for card in CARDS if card.target == row["target"]):
        by_issue = card.units * card.gigahertz * 32 * word_bits / 8 / cycles(row)
        by_memory = card.gigabytes * word_bits / moved
        least = min(by_issue, by_memory)
        found.append({"card": card.name, "issue": round(by_issue), "memory": round(by_memory), "least": round(least)})
    return found


def report(results: dict[str, Any]) -> str:
    """All of it as one Markdown page."""
    rows = results["rows"]
    hot = [row for row in rows if row["is_hot"]]
    coders = [row for row in rows if row["variant"].startswith(("encode", "decode"))]

    def most(some: list[dict[str, Any]], number: str) -> int:
        return max((row[number] for row in some), default=0)

    lines = [
        f"# What the kernels compile to, triton {results['versions']['triton']}, {results['date']}",
        "",
        "**Not yet measured on a GPU.** Compiled ahead of time, disassembled, counted; bounds are computed, no speeds.",
        "",
        f"Bytes spilt: {most(hot, 'spilt_bytes')} in hot kernels, {most(rows, 'spilt_bytes')} in others, within loops "
        f"{most(rows, 'spills_in_loop')} instructions. Shared memory: {most(coders, 'shared')} bytes in coders.",
        "",
        "## Bounds",
        "",
        "GB/s (10^9 bytes) of words, by instructions and by memory; the lesser is the bound.",
        "",
        "| kernel | card | by instructions | by memory | bound |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        for bound in row["bounds"]:
            cells: tuple[Any, ...] = (bound["card"], bound["issue"], bound["memory"], f"**{bound['least']}**")
            lines.append(f"| {row['variant']} | {' | '.join(map(str, cells))} |")
    lines += ["", results["assumptions"], "", "## Counts", ""]
    lines += [
        "Instructions of the loop for 32 words, by what they keep busy; the whole kernel's beside them.",
        "",
        "| kernel | target | registers | spilt bytes | for 32 words | of these | whole kernel |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        units = ", ".join(f"{name} {n / GROUPS:.1f}" for name, n in row["units"].items() if n)
        counts = (row["target"], row["registers"], row["spilt_bytes"], f"{row['loop'] / GROUPS:.1f}", units)
        lines.append(f"| {row['variant']} | {' | '.join(map(str, counts))} | {row['instructions']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, count, write results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", default="", help="variants whose names contain this; results are printed, not kept")
    parser.add_argument("--all", action="store_true", help="every variant for every target, partial chunks too")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, help="folder of what was compiled before, and is not again")
    given = parser.parse_args()
    chosen = [task for task in tasks() if given.only in task[0]]
    if given.all:
        chosen = [(name, target) for name in variants() if given.only in name for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(chosen, given.processes, given.cache or Path(folder))
    if failed := [row for row in rows if "error" in row]:
        raise SystemExit("\n".join(f"{row['variant']}, {row['target']}: {row['error']}" for row in failed))
    for row in rows:
        variant = variants()[row["variant"]]
        row["bounds"] = bounds(row, variant)
        row["is_hot"] = variant.is_hot
    version = metadata.version("triton")
    results = {
        "benchmark": "kernels",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"triton": version, "python": platform.python_version()},
        "is_measured_on_a_gpu": False,
        "assumptions": ASSUMPTIONS,
        "cards": [vars(card) for card in CARDS],
        "rows": rows,
    }
    if given.only:
        print(report(results))
        return
    stem = given.out / f"kernels-{version}-{results['date']}"
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    stem.with_name(stem.name + ".json").write_text(f'{head[:-2]},\n "rows": [\n{lines}\n]}}\n')
    stem.with_name(stem.name + ".md").write_text(report(results))


if __name__ == "__main__":
    main()
