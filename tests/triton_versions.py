"""The kernels compiled by several versions of Triton: `python -m tests.triton_versions 3.6.0 3.7.1 3.9.0`.

Each version gets a virtual environment of its own in a temporary folder, with triton, what tricomp's ground imports and
no torch. All hot variants are compiled for all targets. Results go to tests/benchmarks/results. The hard thing: another
version may refuse what this one takes, and that is a result, not an error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from tests.kernel_code import GROUPS, measure_all
from tests.kernel_variants import TARGETS, variants

RESULTS = Path(__file__).parent / "benchmarks" / "results"
NEEDS = ("numpy", "ml_dtypes", "msgpack", "tqdm", "xxhash", "setuptools")


def environment(version: str, folder: Path) -> Path | str:
    """The Python of a new virtual environment with that triton; what pip says where it cannot be had."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "-q", "--only-binary=:all:", f"triton=={version}", *NEEDS]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # or pip finds others' packages
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    return python if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def report(results: dict[str, Any]) -> str:
    """All of it as one Markdown page."""
    versions = results["versions"]
    lines = [
        f"# The hot kernels by version of Triton, {results['date']}",
        "",
        "**Not yet measured on a GPU.** Compiled ahead of time: all hot variants for "
        f"{', '.join(results['targets'])}. Registers and instructions for 32 words: the most of all, and the mean.",
        "",
        "| triton | compiled | failed | registers | instructions | spilt bytes | shared bytes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, version in versions.items():
        if "fault" in version:
            lines.append(f"| {name} | could not be installed: {version['fault']} | | | | | |")
            continue
        rows = [row for row in version["rows"] if "error" not in row]
        failed = len(version["rows"]) - len(rows)
        cells = [name, len(rows), failed]
        for key, scale in (("registers", 1), ("loop", GROUPS)):
            values = [row[key] / scale for row in rows]
            cells.append(f"{max(values):.0f}, {sum(values) / len(values):.1f}" if values else "")
        cells += [max((row[key] for row in rows), default="") for key in ("spilt_bytes", "shared")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    faults = {
        f"{name}: {row['error'].strip().splitlines()[-1][:300]}"
        for name, version in versions.items()
        for row in version.get("rows", [])
        if "error" in row
    }
    lines += ["", *(f"- {fault}" for fault in sorted(faults))]
    known = [name for name, version in versions.items() if "rows" in version]
    lines += ["", f"| instructions for 32 words, sm_90 | {' | '.join(known)} |", "|---|" + "---:|" * len(known)]
    found = {
        (name, row["variant"]): row["loop"] / GROUPS
        for name in known
        for row in versions[name]["rows"]
        if row["target"] == "sm_90" and "error" not in row
    }
    for variant in dict.fromkeys(variant for _, variant in found):
        cells = [f"{found[name, variant]:.1f}" if (name, variant) in found else "" for name in known]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Compile with every version named; write results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    tasks = [(variant.name, target) for variant in variants().values() if variant.is_hot for target in given.targets]
    found: dict[str, Any] = {}
    for version in given.versions:
        with tempfile.TemporaryDirectory() as folder:
            python = environment(version, Path(folder) / "venv")
            if isinstance(python, str):
                found[version] = {"fault": python}
            else:
                rows = measure_all(tasks, given.processes, Path(folder) / "cache", str(python))
                assert {row["triton"] for row in rows if "error" not in row} <= {version}
                found[version] = {"rows": rows}
        print(f"triton {version}: done", file=sys.stderr)
    results = {
        "benchmark": "triton versions",
        "date": time.strftime("%Y-%m-%d"),
        "targets": given.targets,
        "is_measured_on_a_gpu": False,
        "versions": found,
    }
    stem = given.out / f"triton-versions-{results['date']}"
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(report(results))


if __name__ == "__main__":
    main()
