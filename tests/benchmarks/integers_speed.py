"""How fast integer layers run on the CPU beside float32, bfloat16, torchao's int8 and torch's dynamic quantisation.

python -m tests.benchmarks.integers_speed [--rounds 15] [--threads 2] prints a table for a Linear-dominated model and
for a transformer's block at batches of 1, 16 and 128. The hard thing is to be fair on a machine that others use too:
contestants take turns, each run is one forward after one that is not counted, and medians are told beside the least.
Nobody is timed whose outputs are not the float model's within its own precision.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

BATCHES = (1, 16, 128)
WITHIN = {"float32": 0.0, "bfloat16": 0.02, "int4 weights": 0.3}  # relative to the float model; others 0.05
Run = Callable[[torch.Tensor], torch.Tensor]


def layers() -> nn.Module:
    """Four times 1024 to 4096 and back: 128 MB of float32."""
    blocks = [(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(4)]
    return nn.Sequential(*(layer for block in blocks for layer in block)).eval().requires_grad_(False)


def transformer() -> nn.Module:
    """Four encoder layers of 512, as inputs [batch, 8, 512] meet them."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval().requires_grad_(False)


def contestants(model: nn.Module, example: torch.Tensor) -> dict[str, Run]:
    """Who runs the model, by name; those whose library is missing are left out."""
    from tricomp_torch import integers

    short = copy.deepcopy(model).to(torch.bfloat16)
    found: dict[str, Run] = {
        "float32": model,
        "bfloat16": lambda x: short(x.to(torch.bfloat16)),
        "tricomp int8": integers.convert(model, integers.plan(model, example)),
        "int8 weights": integers.convert(model, integers.plan(model, bits=8)),
        "int4 weights": integers.convert(model, integers.plan(model, bits=4)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(torch.ao.quantization, "quantize_dynamic"):
            found["torch dynamic"] = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError:
            return found
        theirs = copy.deepcopy(model)
        quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
        found["torchao int8"] = theirs
    return found


def measure(runs: dict[str, Run], x: torch.Tensor, n_rounds: int) -> dict[str, tuple[float, float]]:
    """Median and least milliseconds of each, taking turns. Raises SystemExit for outputs that are wrong."""
    wanted = runs["float32"](x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in list(runs.items()):
        try:
            error = float((run(x).float() - wanted).norm() / wanted.norm())
        except AttributeError:  # torch's transformer layers read weights that torch's own integer layers do not have
            del runs[name], times[name]
            continue
        if not error <= WITHIN.get(name, 0.05):
            raise SystemExit(f"{name}: outputs differ by {error:.2%} from float32's; no number is told")
    for _ in range(n_rounds):
        for name, run in runs.items():
            run(x)
            start = time.perf_counter()
            run(x)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for title, model, shape in (
        ("4 x (1024 - 4096 - 1024)", layers(), (1024,)),
        ("4 encoder layers of 512, 8 places", transformer(), (8, 512)),
    ):
        with torch.inference_mode():
            runs = contestants(model, torch.randn(4, *shape))
            print(f"\n{title}, {options.threads} threads: milliseconds, median (least), and times float32's speed")
            for batch in BATCHES:
                found = measure(runs, torch.randn(batch, *shape), options.rounds)
                base = found["float32"]
                for name, (median, least) in found.items():
                    gain = f"{base[0] / median:.2f} ({base[1] / least:.2f})"
                    print(f"  batch {batch:3}  {name:14} {median:8.2f} ({least:.2f})  {gain}")


if __name__ == "__main__":
    main()
