"""Weights published step by step: `python -m tests.benchmarks.publishing`. Bytes and seconds of each way to say them.

Imports the public names of tricomp.publishing, torch, and the training beside it. Trains the GPT first (cached in
--state, shared with the ratio benchmark), then goes on with it at learning rates of reinforcement learning, at which
few elements of the bfloat16 copy move in a step, and at its own. The hard thing is to be fair: everybody publishes the
same versions, in turns, each into a folder of its own, and a number counts only if every version came back byte for
byte, to files and to live arrays.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file

import tricomp
from tests.benchmarks import facts, training
from tests.benchmarks.timing import shuffled
from tricomp.publishing import Publisher, apply

PACKAGES = ("numpy", "torch", "xxhash", "backports.zstd", "safetensors")
RATES = (("RL, 1e-6", 1e-6), ("RL, 5e-6", 5e-6), ("RL, 2e-5", 2e-5), ("training, 6e-4", 6e-4))
STEPS_BEFORE = 3  # at the new rate, before the first version

Weights = dict[str, np.ndarray[Any, Any]]


@dataclass
class Way:
    """One way to publish. seconds: of publish, of apply to files, of apply to live arrays; n_bytes: one a version."""

    who: str
    options: dict[str, Any]
    n_bytes: list[int] = field(default_factory=list)
    published: list[float] = field(default_factory=list)
    to_files: list[float] = field(default_factory=list)
    to_arrays: list[float] = field(default_factory=list)


def ways() -> list[Way]:
    """Everybody. A full version each time is what servers do without deltas."""
    return [
        Way("whole, safetensors", {"full": True}),
        Way("xor, zstd 1", {"encoding": "xor"}),
        Way("xor, zstd 3", {"encoding": "xor", "level": 3}),
        Way("overwrite, zstd 1", {"encoding": "overwrite"}),
        Way("`.tri`", {"format": "tri"}),
        Way("`.tri`, fast tier", {"format": "tri", "spec": tricomp.Spec(tier="fast")}),
        Way("whole, `.tri`", {"format": "tri", "full": True}),
    ]


def versions(
    run: training.Run, tokens: torch.Tensor, arrays: Mapping[str, Any], rate: float, n: int
) -> Iterator[Weights]:
    """The bfloat16 weights after successive steps at a rate, from a trained state with its moments."""
    torch.manual_seed(1)
    model = training.Gpt(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, run.beta2), weight_decay=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"w/{name}"]))
            moments = {long: torch.from_numpy(arrays[f"{k}/{name}"].copy()) for k, long in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(run.steps[-1])), **moments}
    for step in range(STEPS_BEFORE + n):
        if step >= STEPS_BEFORE:
            yield _weights(model)
        starts = torch.randint(len(tokens) - run.context - 1, (run.batch,))
        loss = training.gpt_loss(model, tokens, starts, run.context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


_MOMENTS = (("m", "exp_avg"), ("v", "exp_avg_sq"))


def _weights(model: torch.nn.Module) -> Weights:
    return {name: parameter.detach().numpy().astype(ml_dtypes.bfloat16) for name, parameter in model.named_parameters()}


def _n_changed(old: Weights, new: Weights) -> tuple[int, int]:
    """Elements that changed, and all."""
    n = sum(int((old[name].view(np.uint16) != new[name].view(np.uint16)).sum()) for name in new)
    return n, sum(array.size for array in new.values())


def _timed(seconds: list[float], call: Any) -> Any:
    began = time.perf_counter()
    found = call()
    seconds.append(time.perf_counter() - began)
    return found


def _is_same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def measure(
    run: training.Run, tokens: torch.Tensor, arrays: Mapping[str, Any], rate: float, n: int, folder: Path
) -> dict[str, Any]:
    """Everybody publishes and applies the versions of one rate."""
    everybody = ways()
    publishers: dict[str, Publisher] = {}
    live: dict[str, Weights] = {}
    shares: list[float] = []
    last: Weights = {}
    for version, weights in enumerate(versions(run, tokens, arrays, rate, n + 1)):
        n_bytes = sum(array.nbytes for array in weights.values())
        if version:
            changed, total = _n_changed(last, weights)
            shares.append(changed / total)
        for number, way in enumerate(shuffled(everybody, version)):
            place = folder / str(everybody.index(way))
            if not version:
                publishers[way.who] = Publisher(place / "run", **way.options)
                publishers[way.who].publish(weights, version)
                live[way.who] = {name: array.copy() for name, array in weights.items()}
                apply(place / "local", place / "run", version)
                continue
            publisher, own = publishers[way.who], live[way.who]
            done = _timed(way.published, partial(publisher.publish, weights, version))
            _timed(way.to_files, partial(apply, place / "local", place / "run", version))
            _timed(way.to_arrays, partial(apply, own, place / "run", version, at=version - 1))
            way.n_bytes.append(sum(path.stat().st_size for path in Path(done.path).iterdir()))
            back: Weights = {}
            for path in (place / "local").glob("*.safetensors"):
                back |= load_file(path)
            facts.require(_is_same(back, weights) and _is_same(own, weights), f"{way.who}, version {version}")
            if way.options.get("full"):
                shutil.rmtree(place / "run" / f"weight_v{version - 1:06d}")
            facts.log(f"{rate}: {version}.{number} {way.who}: {way.n_bytes[-1]} bytes, {way.published[-1]:.2f} s")
        last = weights
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "learning_rate": rate,
        "raw": n_bytes,
        "n_versions": n,
        "changed": [round(share, 5) for share in shares],
        "rows": [
            {
                "who": way.who,
                "bytes": way.n_bytes,
                "publish": [round(s, 4) for s in way.published],
                "to_files": [round(s, 4) for s in way.to_files],
                "to_arrays": [round(s, 4) for s in way.to_arrays],
            }
            for way in everybody
        ],
    }


def report(results: dict[str, Any]) -> str:
    """What was measured, as one Markdown page."""
    machine, data = results["machine"], results["data"][0]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    trained_by = f"by {data['by']} " if "by" in data else ""  # where a cached state was carried over to torch
    parts = []
    for found in results["rates"]:
        share = 100 * statistics.median(found["changed"])
        lines = [
            f"## {found['name']}: {share:.2g} % of elements change in a step",
            "",
            "| | bytes a version | of the whole | bits an element | publish, ms | to files, ms | to arrays, ms |",
            "|---|" + "---:|" * 6,
        ]
        for row in found["rows"]:
            n_bytes = statistics.median(row["bytes"])
            times = (1e3 * statistics.median(row[key]) for key in ("publish", "to_files", "to_arrays"))
            cells = [f"{n_bytes:,.0f}", f"{n_bytes / found['raw']:.2%}", f"{16 * n_bytes / found['raw']:.3f}"]
            lines.append(f"| {row['who']} | {' | '.join([*cells, *(f'{t:.0f}' for t in times)])} |")
        parts.append("\n".join(lines))
    return f"""# Weights published for inference servers, {results["date"]}

Measured on {machine["cpu"]} ({machine["n_cores"]} cores), {results["date"]}; {versions}.
Data: bfloat16 copies of a GPT of {data["n_parameters"] / 1e6:.1f} M parameters,
trained {trained_by}for {data["steps"][-1]} steps of AdamW (batch {data["batch"]})
on the {data["text"]}, then step by step in torch at the rate given;
{results["rates"][0]["raw"]:,} bytes, a version a step, {results["rates"][0]["n_versions"]} versions at each rate.
Medians; milliseconds are of all {machine["n_cores"]} cores.

{(chr(10) * 2).join(parts)}

"xor" and "overwrite" are the two encodings of the layout that inference servers read, with zstd at the level given; all
with xxh3-128 checksums. The last version is held in memory by the publisher. Publishing and applying to files sync what
they write to the disk; applying verifies every tensor. Whole versions are what is published without deltas. Every
version came back byte for byte, in files and in arrays. Others used the machine at the same time: load averages over a
minute were {results["load"][0]:.1f} at the start and {results["load"][1]:.1f} at the end.
"""


def main() -> None:
    """Train or find the state, measure, write <machine>-<date>-publishing.json and .md, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: checks the benchmark, not the codec")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--out", type=Path, default=facts.RESULTS, help="folder for the results")
    parser.add_argument("--versions", type=int, default=7)
    options = parser.parse_args()
    run = training.GPT_SMALL if options.small else training.GPT
    about, states = training.states(run, options.state, facts.log)
    results: dict[str, Any] = {"benchmark": "publishing", **facts.machine(PACKAGES), "data": [about], "rates": []}
    text = b"\n".join(text for _, text in training.library_sources())
    tokens, load = torch.from_numpy(training.tokens_of(text, run.vocabulary)), os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="tricomp-publishing-"))
    try:
        for name, rate in RATES:
            found = measure(run, tokens, states[run.steps[-1]], rate, options.versions, folder / name)
            results["rates"].append({"name": name, **found})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results["load"] = [load, os.getloadavg()[0]]
    page = report(results)
    facts.write(results, page, options.out, options.small)
    print(page)


if __name__ == "__main__":
    main()
