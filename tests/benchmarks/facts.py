"""The facts of a run: machine, date, versions; and where results go. Imports the standard library and tricomp only."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tricomp

RESULTS = Path(__file__).parent / "results"


def require(is_exact: bool, who: str) -> None:
    """End the benchmark unless a round trip was exact."""
    if not is_exact:
        raise SystemExit(f"{who}: the round trip was not exact; no number is recorded")


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """Machine, date and versions, for a results file. packages: those whose versions matter."""
    found = {name: version for name in packages if (version := _version(name))}
    system = f"{platform.system()} {platform.machine()}"
    return {
        "machine": {"cpu": _cpu_model(), "n_cores": os.cpu_count(), "system": system},
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"tricomp": tricomp.__version__, "python": platform.python_version(), **found},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(results: dict[str, Any], page: str, folder: Path, is_small: bool) -> Path:
    """Write <machine>-<date>-<benchmark>.json and .md into a folder; the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    known = results["machine"]
    name = known.get("gpu") or f"{known['cpu']} {known['n_cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    kind = f"{results['benchmark']}{'-small' if is_small else ''}"
    path = folder / f"{slug}-{results['date']}-{kind}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    return path


def log(line: str) -> None:
    """Tell how far the benchmark is."""
    print(line, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
