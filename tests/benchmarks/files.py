"""Whole files by `tricomp compress`, beside zstd and ZipNN: `python -m tests.benchmarks.files`.

Imports the public names of tricomp, safetensors, torch, the peers and the training beside it. Trains the GPT first
(cached in --state, shared with the ratio benchmark). The hard thing is to be fair: zstd gets the base too
(--patch-from), ZipNN the XOR with it where the files' bytes lie alike, and a size counts only if the file came back
byte for byte. The last row is no size: what `tricomp inspect` of a file of 10 GB takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import tricomp
from tests.benchmarks import peers, table, training
from tests.sparse_file import write_sparse_file

Arrays = dict[str, NDArray[Any]]
Tensors = dict[str, torch.Tensor]
# The most that this process held in memory; getrusage would count what its parent had when it was started.
_PEAK = """
import sys
from tricomp.cli import main
main(["inspect", sys.argv[1]])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Case:
    """A file, and the one that it is compressed against, if any. dtype: for ZipNN."""

    name: str
    path: Path
    base: Path | None
    dtype: str


def _tensors(arrays: Arrays, dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def _one_percent_changed(tensors: Tensors) -> Tensors:
    """One word in a hundred, anywhere, moved by a few percent: a sparse fine-tune."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, tensor in tensors.items():
        is_changed = torch.rand(tensor.shape, generator=generator) < 0.01
        factor = 1 + 0.05 * torch.randn(tensor.shape, generator=generator)
        changed[name] = torch.where(is_changed, (tensor.float() * factor).to(tensor.dtype), tensor)
    return changed


def _checkpoint(arrays: Arrays, step: int) -> dict[str, Any]:
    """A training checkpoint as torch.save gets it: model and AdamW state."""
    names = list(training.stream(arrays, "w"))
    moments = {kind: _tensors(training.stream(arrays, kind)) for kind in ("m", "v")}
    state = {
        i: {"step": torch.tensor(float(step)), "exp_avg": moments["m"][name], "exp_avg_sq": moments["v"][name]}
        for i, name in enumerate(names)
    }
    groups = [{"lr": 6e-4, "betas": (0.9, 0.99), "params": list(range(len(names)))}]
    model = _tensors(training.stream(arrays, "w"))
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}, "step": step}


def cases(states: dict[int, Arrays], folder: Path) -> Iterator[Case]:
    """The files, written into folder when they are asked for."""
    first, _, middle, last = states
    weights = {step: training.stream(states[step], "w") for step in states}
    for dtype in ("float32", "bfloat16"):
        files = {name: folder / f"{name}-{dtype}.safetensors" for name in ("model", "tuned", "earlier", "later")}
        tensors = _tensors(weights[last], getattr(torch, dtype))
        save_file(tensors, files["model"])
        yield Case(f"model, {dtype}", files["model"], None, dtype)
        save_file(_one_percent_changed(tensors), files["tuned"])
        yield Case(f"the same with 1 % of words changed, --base, {dtype}", files["tuned"], files["model"], dtype)
        save_file(_tensors(weights[first], getattr(torch, dtype)), files["earlier"])
        yield Case(f"model, --base of {last - first} steps before, {dtype}", files["model"], files["earlier"], dtype)
    torch.save(_checkpoint(states[middle], middle), folder / "checkpoint.pt")
    torch.save(_checkpoint(states[first], first), folder / "before.pt")
    yield Case("checkpoint.pt with AdamW state, float32", folder / "checkpoint.pt", None, "float32")
    name = f"the same, --base of {middle - first} steps before"
    yield Case(name, folder / "checkpoint.pt", folder / "before.pt", "float32")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One row: bytes, by tricomp (a file of its own) and by the peers."""
    raw = case.path.read_bytes()
    base = None if case.base is None else case.base.read_bytes()
    packed, back = folder / "packed.tri", folder / "back"
    seconds = {}
    seconds["compress"] = _seconds(lambda: tricomp.compress(case.path, packed, case.base, overwrite=True))
    seconds["decompress"] = _seconds(lambda: tricomp.decompress(packed, back, case.base, overwrite=True))
    peers.require(back.read_bytes() == raw, "tricomp")
    row: dict[str, Any] = {"file": case.name, "raw": len(raw), "tricomp": packed.stat().st_size}
    row["zstd"] = peers.zstd_bytes(raw, base)
    alone = peers.zipnn_bytes(raw, case.dtype)
    row["zipnn"] = alone
    if base is not None and len(base) == len(raw):
        xor = np.frombuffer(raw, np.uint8) ^ np.frombuffer(base, np.uint8)
        row["zipnn"] = min(alone, peers.zipnn_bytes(xor.tobytes(), case.dtype))
    return {**row, "seconds": seconds}


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return round(time.perf_counter() - started, 2)


def measure_inspect(folder: Path, is_small: bool) -> dict[str, Any]:
    """Seconds (median of 5) and memory of `tricomp inspect` of a file of 10 GB, a process from start to end."""
    path = folder / "large.tri"
    n_layers = 2 if is_small else 59
    layers = {f"model.layers.{i}.{part}.weight": (2048, 4099) for i in range(n_layers) for part in "qkvou"}
    write_sparse_file(path, {"wte.weight": (50257, 12288), **layers})
    command = [sys.executable, "-m", "tricomp.cli", "inspect", str(path)]

    def inspect() -> None:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    seconds = sorted(_seconds(inspect) for _ in range(5))
    command = [sys.executable, "-c", _PEAK, str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    n_bytes = int(told.split()[-2]) * 1024
    return {
        "file_bytes": path.stat().st_size,
        "n_leaves": 1 + len(layers),
        "seconds": seconds[2],
        "peak_bytes": n_bytes,
    }


def main() -> None:
    """Train or find the states, measure, write <machine>-<date>-files.json and .md, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: checks the benchmark, not the codec")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--out", type=Path, default=peers.RESULTS, help="folder for the results")
    options = parser.parse_args()
    run = (training.SMALL if options.small else training.ALL)[0]
    about, states = training.states(run, options.state, peers.log)
    results: dict[str, Any] = {"benchmark": "files", **peers.machine(), "data": [about], "files": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["inspect"] = measure_inspect(folder, options.small)
        for case in cases(states, folder):
            results["files"].append(measure(case, folder))
            peers.log(str(results["files"][-1]))
    page = table.files_report(results)
    peers.write(results, page, options.out, options.small)
    print(page)


if __name__ == "__main__":
    main()
