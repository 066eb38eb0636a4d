"""Milliseconds of products with integer weights on a GPU, way by way, beside torch's floats and torchao's integers.

`python -m tests.benchmarks.gpu_products`. Imports torch and tricomp; torchao where it is installed. A time is recorded
only of what came out right. The hard thing is what is timed: a layer's weights of tens of MB would stay in the L2 cache
if they were used again and again, so each call takes those of another layer; and since launching a small kernel takes
the host longer than the device, times are of calls one after the other and of a CUDA graph of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tricomp_torch.integers import execution, fastest
from tricomp_torch.integers.weights import IntegerWeight

from tests.benchmarks import facts
from tests.benchmarks.facts import log
from tricomp.codec import multiplying_there
from tricomp.kernels.device import IS_INTERPRETED

PACKAGES = ("torch", "triton", "torchao")
Call = Callable[[torch.Tensor], torch.Tensor]
_BOUNDS = {True: 3e-2, False: 1e-2}  # errors of outputs of bfloat16, inputs int8 or not, against the codes' own product


@dataclass(frozen=True)
class Scale:
    """Weights [in, out], numbers of rows, bytes of weights that one turn reads, turns."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    n_bytes: int
    n_turns: int


FULL = Scale(((4096, 4096), (4096, 14336), (14336, 4096)), (1, 16, 128, 2048), 256 << 20, 9)
SMALL = Scale(((64, 48),), (1, 24), 1 << 12, 1)


@dataclass(frozen=True)
class Form:
    """How weights and inputs are kept."""

    name: str
    bits: int
    group: int | None
    is_dynamic: bool


FORMS = (
    Form("int8, inputs int8", 8, None, True),
    Form("int8", 8, None, False),
    Form("int4 in groups of 64, inputs int8", 4, 64, True),
    Form("int4 in groups of 64", 4, 64, False),
)


def milliseconds(calls: Sequence[Call], rows: torch.Tensor, n_turns: int) -> tuple[float, float | None]:
    """Medians of a call, each of another weight: one after the other, and in a CUDA graph, if it can be captured."""
    if not rows.is_cuda:
        began = time.perf_counter()
        for call in calls:
            call(rows)
        return (time.perf_counter() - began) * 1e3 / len(calls), None

    def turn() -> None:
        for call in calls:
            call(rows)

    turn()
    plain = _median(turn, n_turns) / len(calls)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            turn()
    except RuntimeError as error:
        log(f"not captured: {error}")
        torch.cuda.synchronize()
        return plain, None
    return plain, _median(graph.replay, n_turns) / len(calls)


def _median(turn: Callable[[], None], n_turns: int) -> float:
    found = []
    for _ in range(n_turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        turn()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def contenders(
    weights: Sequence[torch.Tensor], form: Form, n_rows: int
) -> Iterator[tuple[str, list[Call], torch.Tensor]]:
    """Who multiplies by integers: a name, a call for each weight, and the first weight's floats as float64."""
    made = [IntegerWeight.of(weight, form.bits, form.group) for weight in weights]
    held = [(one.row_codes, one.scales, None, form.bits, form.group, form.is_dynamic) for one in made]
    exact = execution.values(held[0][0], held[0][1], form.bits, weights[0].shape[1], form.group, torch.float64)
    probe = weights[0].new_empty(n_rows, weights[0].shape[1])
    for name in multiplying_there.ways(probe, *held[0]):
        yield name, [partial(_by, name, one) for one in held], exact
    yield "tricomp", [partial(_as_layers_do, one) for one in held], exact
    yield from _torchao(weights, form)


def _by(name: str, arguments: Any, rows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = multiplying_there.ways(rows, *arguments)[name]()
    return found


def _as_layers_do(arguments: Any, rows: torch.Tensor) -> torch.Tensor:
    return execution.linear(rows, *arguments)


def _float(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return F.linear(rows, weight)


def _torchao(weights: Sequence[torch.Tensor], form: Form) -> Iterator[tuple[str, list[Call], torch.Tensor]]:
    """The same form by torchao, as it runs without being compiled."""
    try:
        from torchao import quantization
    except ImportError:
        return
    if form.bits != 8:
        return
    dynamic = quantization.Int8DynamicActivationInt8WeightConfig
    config = dynamic() if form.is_dynamic else quantization.Int8WeightOnlyConfig()
    layers = []
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        quantization.quantize_(layer, config)
        layers.append(layer)
    theirs: Any = layers[0].weight
    yield "torchao", list(layers), theirs.dequantize().double()


def measure(scale: Scale, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """All products; what no time is left for is missing."""
    found: list[dict[str, Any]] = []
    began = time.perf_counter()
    for n_in, n_out in scale.shapes:
        n_weights = max(2, -(-scale.n_bytes // (n_in * n_out)))
        torch.manual_seed(n_in)
        weights = [torch.randn(n_out, n_in, device=device).mul_(0.02).bfloat16() for _ in range(n_weights)]
        for n_rows in scale.rows:
            rows = torch.randn(n_rows, n_in, device=device).bfloat16()
            floats: list[Call] = [partial(_float, weight) for weight in weights]
            everybody = [("floats", "torch", floats, weights[0].double(), False)]
            for form in FORMS:
                try:
                    some = list(contenders(weights, form, n_rows))
                except Exception as error:  # a library of others may not run here at all
                    log(f"{form.name}: {type(error).__name__}: {error}")
                    continue
                everybody += [(form.name, *one, form.is_dynamic) for one in some]
            for form_name, who, calls, exact, is_dynamic in everybody:
                if time.perf_counter() - began > seconds:
                    return found
                row: dict[str, Any] = {"in": n_in, "out": n_out, "rows": n_rows, "form": form_name, "who": who}
                try:
                    wanted = rows.double() @ exact.t()
                    row["error"] = float((calls[0](rows).double() - wanted).norm() / wanted.norm())
                    if not row["error"] <= _BOUNDS[is_dynamic]:
                        raise ArithmeticError(f"it is wrong by {row['error']:.1e}")
                    row["call"], row["graph"] = milliseconds(calls, rows, scale.n_turns)
                except Exception as error:
                    row["why_not"] = f"{type(error).__name__}: {error}"[:300]
                found.append(row)
                log(str(row))
    return found


def report(results: dict[str, Any]) -> str:
    """All of it as one Markdown page."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Products with integer weights on a GPU, {results['date']}",
        "",
        f"Measured on {machine['gpu']} ({machine['cpu']}, {machine['n_cores']} cores); {versions}. Inputs and outputs "
        "are bfloat16. Milliseconds of a product, each of another weight, so that none is in the L2 cache: called one "
        "after the other, and in a CUDA graph. *tricomp* is what a layer does: the fastest of the ways above it, by a "
        "clock of its own at the first call. torchao is not compiled.",
        "",
        "| weight, rows | form | who | ms, called | ms, in a graph | error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in results["products"]:
        told = [row.get("why_not", ""), "", ""]
        if "call" in row:
            graph = "" if row["graph"] is None else f"{row['graph']:.4f}"
            told = [f"{row['call']:.4f}", graph, f"{row['error']:.1e}"]
        where = f"{row['in']} x {row['out']}, {row['rows']}"
        lines.append(f"| {where} | {row['form']} | {row['who']} | {' | '.join(told)} |")
    lines += ["", "Chosen:", "", *(f"- {key}: {name}" for key, name in results["chosen"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write <gpu>-<date>-gpu-products.json and .md, print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny products: checks the benchmark, not the kernels")
    parser.add_argument("--out", type=Path, default=facts.RESULTS, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=240, help="about as long as it may take")
    given = parser.parse_args()
    is_there = torch.cuda.is_available() and not IS_INTERPRETED
    if not is_there and not (given.small and IS_INTERPRETED):
        raise SystemExit("torch sees no GPU. With --small and TRITON_INTERPRET=1 it runs on the CPU, to check itself.")
    device = torch.device("cuda", 0) if is_there else torch.device("cpu")
    results: dict[str, Any] = {"benchmark": "gpu-products", **facts.machine(PACKAGES)}
    results["machine"]["gpu"] = torch.cuda.get_device_name(device) if is_there else "interpreter"
    with torch.no_grad():
        results["products"] = measure(SMALL if given.small else FULL, device, given.seconds)
    results["chosen"] = {" ".join(map(str, key)): name for key, name in fastest.chosen().items()}  # type: ignore[call-overload]
    path = facts.write(results, report(results), given.out, given.small)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
