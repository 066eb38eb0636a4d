"""Finished models as integers: `python -m tests.benchmarks.integers`. Size, accuracy, loading and speed, beside peers.

Imports the public names of tricomp_torch.integers, torchao and safetensors. Trains the models first (cached in
--state). The hard thing is to be fair: everybody runs the same models on the same inputs in turns, files are read from
the system's cache by the fastest way that each has, and a speed stands beside what it costs in accuracy.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tricomp_torch import integers

from tests.benchmarks import facts, integer_models, page_cache
from tests.benchmarks.integer_models import Finished
from tests.benchmarks.integers_table import plot, report
from tests.benchmarks.timing import shuffled

PACKAGES = ("numpy", "torch", "torchao", "safetensors", "scikit-learn")
BATCHES = (1, 16, 128)
MODELS = ("CNN", "transformer", "MLP")
_FEW = 200  # inputs that are held out, where the benchmark itself is checked
Model = Callable[[Tensor], Tensor]


@dataclass
class Entry:
    """One way to keep and run a model. load: reads the file and gives what predicts. is_loaded_only: it runs as another
    does, and is not timed again."""

    who: str
    file: Path
    load: Callable[[], Model]
    model: Model
    is_half: bool = False
    is_loaded_only: bool = False
    loads: list[float] = field(default_factory=list)
    cold_loads: list[float] = field(default_factory=list)
    latencies: dict[int, list[float]] = field(default_factory=dict)

    def given(self, inputs: Tensor) -> Tensor:
        """Inputs as the model wants them."""
        return inputs.bfloat16() if self.is_half and inputs.is_floating_point() else inputs


def entries(finished: Finished, folder: Path) -> Iterator[Entry]:
    """Everybody, with what they wrote in the folder."""
    yield _plain("float32", finished, finished.model, folder)
    yield _usual("float32 as usual", finished, folder)
    yield _plain("bfloat16", finished, copy.deepcopy(finished.model).bfloat16(), folder, is_half=True)
    yield from _torchao(finished, folder)
    yield from _dynamic(finished, folder)
    yield _tricomp("tricomp int8", finished, folder)
    yield _tricomp("tricomp int8 of 8 bits", finished, folder, bits=8)
    yield _tricomp("tricomp int4", finished, folder, bits=4, group=64)


def _plain(who: str, finished: Finished, model: nn.Module, folder: Path, is_half: bool = False) -> Entry:
    file = folder / f"{who}.safetensors"
    safetensors.torch.save_file(dict(model.state_dict()), file)

    def load() -> Model:
        with torch.device("meta"):
            empty = finished.make()
        empty.load_state_dict(safetensors.torch.load_file(file), assign=True)
        return empty.eval()

    return Entry(who, file, load, model.eval(), is_half)


def _usual(who: str, finished: Finished, folder: Path) -> Entry:
    """As most code does: make the model, which draws its weights at random, and then fill it."""
    file = folder / f"{who}.safetensors"
    safetensors.torch.save_file(dict(finished.model.state_dict()), file)

    def load() -> Model:
        model = finished.make()
        model.load_state_dict(safetensors.torch.load_file(file))
        return model.eval()

    return Entry(who, file, load, finished.model, is_loaded_only=True)


def _torchao(finished: Finished, folder: Path) -> Iterator[Entry]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    for who, config in (
        ("torchao int8 dynamic", Int8DynamicActivationInt8WeightConfig),
        ("torchao int8 weights", Int8WeightOnlyConfig),
    ):
        model = copy.deepcopy(finished.model)
        quantize_(model, config())
        file = folder / f"{who}.pt"
        torch.save(model.state_dict(), file)
        yield Entry(who, file, partial(_load_torchao, finished, file), model.eval())


def _load_torchao(finished: Finished, file: Path) -> Model:
    with torch.device("meta"):
        empty = finished.make()
    empty.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return empty.eval()


def _dynamic(finished: Finished, folder: Path) -> Iterator[Entry]:
    make = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if make is None:
        return
    model = make(copy.deepcopy(finished.model), {nn.Linear}, dtype=torch.qint8)
    file = folder / "dynamic.pt"
    torch.save(model.state_dict(), file)

    def load() -> Model:
        with torch.device("meta"):
            empty = finished.make()
        empty = make(empty.to_empty(device="cpu"), {nn.Linear}, dtype=torch.qint8)
        empty.load_state_dict(torch.load(file, weights_only=False))  # its packed weights are objects of torch
        loaded: Model = empty.eval()
        return loaded

    yield Entry("torch dynamic int8", file, load, model.eval())


def _tricomp(who: str, finished: Finished, folder: Path, **options: Any) -> Entry:
    plan = integers.plan(finished.model, (finished.examples,), **options)
    model = integers.convert(finished.model, plan)
    file = folder / f"{who}.tri"
    integers.save_file(model, file, example_inputs=(finished.examples[:2],))
    return Entry(who, file, partial(integers.load_file, file), model)


def _predictions(entry: Entry, inputs: Tensor, model: Model | None = None) -> Tensor:
    with torch.inference_mode():
        return torch.cat([(model or entry.model)(entry.given(some)).float() for some in inputs.split(128)])


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _first_prediction(entry: Entry, inputs: Tensor) -> None:
    with torch.inference_mode():
        entry.load()(inputs)


def measure(finished: Finished, folder: Path, n_rounds: int) -> dict[str, Any]:
    """What everybody makes of one model."""
    folder.mkdir(parents=True)
    everybody = list(entries(finished, folder))
    rows: dict[str, dict[str, Any]] = {}
    expected = _predictions(everybody[0], finished.inputs).argmax(-1)
    for entry in everybody:
        found = _predictions(entry, finished.inputs).argmax(-1)
        loaded = _predictions(entry, finished.inputs, entry.load()).argmax(-1)
        facts.require(torch.equal(found, loaded), f"{finished.name}, {entry.who}: what is loaded predicts the same")
        rows[entry.who] = {
            "who": entry.who,
            "bytes": entry.file.stat().st_size,
            "accuracy": round(float((found == finished.labels).float().mean()), 5),
            "agreement": round(float((found == expected).float().mean()), 5),
        }
        facts.log(f"{finished.name}: {rows[entry.who]}")
    first = finished.inputs[:1]
    batches = {n: finished.inputs[torch.arange(n) % len(finished.inputs)] for n in BATCHES}
    for n_round in range(n_rounds):
        for entry in shuffled(everybody, n_round):
            gc.collect()
            load = partial(_first_prediction, entry, entry.given(first))
            entry.loads.append(_timed(load))
            if page_cache.drop(entry.file):
                entry.cold_loads.append(_timed(load))
            for n, inputs in batches.items() if not entry.is_loaded_only else ():
                given = entry.given(inputs)
                with torch.inference_mode():
                    entry.model(given)  # everybody is warm
                    n_calls = 8 // max(n // 16, 1) if n < 128 else 1
                    seconds = _timed(lambda: [entry.model(given) for _ in range(n_calls)]) / n_calls  # noqa: B023
                entry.latencies.setdefault(n, []).append(seconds)
        facts.log(f"{finished.name}: round {n_round + 1} of {n_rounds}")
    for entry in everybody:
        rows[entry.who]["load"] = [round(one, 5) for one in entry.loads]
        rows[entry.who]["latency"] = {n: [round(one, 6) for one in found] for n, found in entry.latencies.items()}
        rows[entry.who]["load_cold"] = [round(one, 5) for one in entry.cold_loads]
        rows[entry.who]["load_median"] = statistics.median(entry.loads[1:] or entry.loads)
        if len(entry.cold_loads) == len(entry.loads):
            rows[entry.who]["load_cold_median"] = statistics.median(entry.cold_loads[1:] or entry.cold_loads)
        rows[entry.who]["latency_median"] = {n: statistics.median(found) for n, found in entry.latencies.items()}
    return {
        "model": finished.name,
        "n_parameters": finished.n_parameters,
        "n_held_out": len(finished.labels),
        "is_trained": finished.is_trained,
        "rows": list(rows.values()),
    }


def finished_models(names: Sequence[str], is_small: bool, cache: Path) -> Iterator[Finished]:
    """The models of these names, trained now unless the cache has them."""
    steps = (30, 30) if is_small else (600, 400)
    sizes = (64, 1, 512, 32) if is_small else (256, 4, 4096, 48)
    made = {
        "CNN": lambda: integer_models.digits(steps[0], 8 if is_small else 32, cache),
        "transformer": lambda: integer_models.passages(steps[1], *sizes, cache),
        "MLP": lambda: integer_models.layers(*((64, 2) if is_small else (1024, 4))),
    }
    for name in names:
        finished = made[name]()
        every = max(1, len(finished.labels) // _FEW) if is_small else 1
        yield replace(finished, inputs=finished.inputs[::every], labels=finished.labels[::every])


def main() -> None:
    """Train or find the models, measure, write <machine>-<date>-integers.json, .md and .svg, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models: checks the benchmark, not tricomp")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--out", type=Path, default=facts.RESULTS, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    cache = options.state / ("integers-small" if options.small else "integers")
    load = os.getloadavg()[0]
    results: dict[str, Any] = {"benchmark": "integers", **facts.machine(PACKAGES), "models": []}
    with tempfile.TemporaryDirectory(prefix="tricomp-integers-") as folder:
        for finished in finished_models(options.models, options.small, cache):
            results["models"].append(measure(finished, Path(folder) / finished.name, options.rounds))
    results |= {"n_rounds": options.rounds, "load": [load, os.getloadavg()[0]]}
    page = report(results)
    path = facts.write(results, page, options.out, options.small)
    plot(results, path.with_suffix(".svg"))
    print(page)


if __name__ == "__main__":
    main()
