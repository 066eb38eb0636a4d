"""`tricomp compress` and `decompress` of large files, beside what `cp` takes to read and to write as many bytes.

Imports the public names of tricomp, safetensors, torch, and timing and peers beside it. The hard thing is what to hold
it against: cp reads and writes the same number of bytes, decompress reads few and writes many. So cp is timed on both
files, with its output thrown away too, and its cost is put together: reading one file, and writing the other.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

import tricomp
from tests.benchmarks import peers
from tests.benchmarks.timing import Array, shuffled

ROOT = Path(__file__).resolve().parents[2]


def _tensor(array: Array) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_model(path: Path, leaves: Mapping[str, Array], n_bytes: int) -> None:
    """A safetensors file of at least so many bytes: matrices, and again with their rows moved on: all differ."""
    n_times = -(-n_bytes // sum(array.nbytes for array in leaves.values()))
    moved = ((f"{i}.{name}", np.roll(array, i, axis=-2)) for i in range(n_times) for name, array in leaves.items())
    save_file({name: _tensor(array) for name, array in moved}, path)


def _command(*arguments: str | Path) -> Callable[[], None]:
    def run() -> None:
        subprocess.run(list(map(str, arguments)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    return run


def _has_gnu_cp() -> bool:
    done = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False)
    return "GNU coreutils" in done.stdout


def measure(name: str, raw: Path, folder: Path, n_runs: int) -> dict[str, Any]:
    """One row: bytes, and the median seconds of every contestant; all take turns, outputs are new files each time."""
    packed, back, copy = folder / "packed.tri", folder / "back", folder / "copy"
    plain = ["cp"]
    cp = ["cp", "--reflink=never"] if _has_gnu_cp() else plain  # reads and writes; no copying inside the kernel
    cli = [sys.executable, "-m", "tricomp.cli"]
    again = folder / "again.tri"
    calls: dict[str, Callable[[], Any]] = {
        "compress": _command(*cli, "compress", "-q", "-T", "0", raw, "-o", again),
        "decompress": _command(*cli, "decompress", "-q", "-T", "0", packed, "-o", back),
        "compress_call": lambda: tricomp.compress(raw, again),
        "decompress_call": lambda: tricomp.decompress(packed, back),
        "compress_call_1": lambda: tricomp.compress(raw, again, threads=1),
        "decompress_call_1": lambda: tricomp.decompress(packed, back, threads=1),
        "start": _command(*cli, "--version"),
        "cp_raw": _command(*cp, raw, copy),
        "cp_packed": _command(*cp, packed, copy),
        "read_raw": _command(*cp, raw, os.devnull),
        "read_packed": _command(*cp, packed, os.devnull),
        "cp_raw_plain": _command(*plain, raw, copy),
    }
    tricomp.compress(raw, packed)
    seconds: dict[str, list[float]] = {who: [] for who in calls}
    for turn in range(n_runs + 1):  # the first warms up, and proves
        for who in shuffled(list(calls), turn):
            shutil.copyfile(raw, copy)  # a virtual machine gives free memory back, and who asks first pays to have it
            copy.unlink()
            started = time.perf_counter()
            calls[who]()
            seconds[who].append(time.perf_counter() - started)
            if turn == 0:
                _prove(who, {again: packed, back: raw})
            for made in (again, back, copy):
                made.unlink(missing_ok=True)
    medians = {who: round(statistics.median(runs[1:]), 4) for who, runs in seconds.items()}
    row = {"file": name, "raw": raw.stat().st_size, "packed": packed.stat().st_size, "seconds": medians}
    packed.unlink()
    return row


def _prove(who: str, originals: Mapping[Path, Path]) -> None:
    for made, original in originals.items():
        if made.exists():
            peers.require(filecmp.cmp(made, original, shallow=False), f"tricomp {who} of a file")


def measure_all(leaves: Mapping[str, Mapping[str, Array]], folder: Path, n_bytes: int, n_runs: int) -> dict[str, Any]:
    """A row for each of some models, in files of at least n_bytes in a folder made for them and taken away again."""
    folder.mkdir(parents=True)
    rows = []
    try:
        for name, arrays in leaves.items():
            raw = folder / "model.safetensors"
            write_model(raw, arrays, n_bytes)
            rows.append(measure(name, raw, folder, n_runs))
            peers.log(str(rows[-1]))
            raw.unlink()
    finally:
        shutil.rmtree(folder)
    return {"file_system": _file_system(folder.parent), "rows": rows}


def _file_system(folder: Path) -> str:
    """Its kind, as df tells."""
    command = ["stat", "-f", "-c", "%T", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
