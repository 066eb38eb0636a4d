"""The page and the plot of the integers benchmark, from its results. Imports matplotlib when it plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS = ("tricomp int8", "tricomp int8 of 8 bits", "tricomp int4")


def report(results: dict[str, Any]) -> str:
    """What was measured, as one Markdown page, with what was to be reached."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [_model(model) for model in results["models"]]
    verdicts = "\n".join(
        f"| {what} | {wanted} | {found} | {'yes' if ok else '**no**'} |" for what, wanted, found, ok in targets(results)
    )
    return f"""# Finished models as integers, {results["date"]}

Measured on {machine["cpu"]} ({machine["n_cores"]} cores), {results["date"]}; {versions}.
Medians of {results["n_rounds"]} rounds, everybody in turns. Load: file to first prediction of one input, in a process
that has torch, the file in the system's cache. Not cached: the file was written to the disk (fsync) and its pages given
up (posix_fadvise, POSIX_FADV_DONTNEED) before each load, and the cache held none of them (mincore); no number stands
where the system keeps them. float32 and bfloat16 are read by safetensors into a model made on the meta device, which
its tensors are put into; "as usual", into a model whose weights were drawn at random first. What was loaded predicted
the same as what was saved, input by input, or nothing would stand here.
tricomp's int8 is what `plan` gives unasked: codes of 7 bits, and of 8 where an error is out of proportion to its bytes.

{chr(10).join(parts)}

| to be reached | at least or most | measured | reached |
|---|---:|---:|---|
{verdicts}

Others used the machine at the same time: load averages over a minute were {results["load"][0]:.1f} at the start and
{results["load"][1]:.1f} at the end.
"""


def _model(model: dict[str, Any]) -> str:
    rows = model["rows"]
    base = rows[0]
    judged = (
        f"{model['n_parameters'] / 1e6:.2f} M parameters, {model['n_held_out']} inputs held out"
        if model["is_trained"]
        else f"{model['n_parameters'] / 1e6:.2f} M parameters, not trained: to time, not to judge"
    )
    lines = [
        f"## {model['model']}: {judged}",
        "",
        "| | file, % of float32 | accuracy, % | same top-1 as float32, % | load, ms | load, file not cached, ms "
        "| batch 1, ms | batch 16, ms | batch 128, ms |",
        "|---|" + "---:|" * 8,
    ]
    for row in rows:
        latencies = [row["latency_median"].get(n) for n in _batches(base)]
        found = [row["load_median"], row.get("load_cold_median"), *latencies]
        name = f"**{row['who']}**" if row["who"] in OURS else row["who"]
        judgement = (
            (f"{100 * row['accuracy']:.2f}", f"{100 * row['agreement']:.2f}") if model["is_trained"] else ("", "")
        )
        cells = [f"{100 * row['bytes'] / base['bytes']:.1f}", *judgement]
        cells += ["" if seconds is None else f"{1e3 * seconds:.2f}" for seconds in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _batches(row: dict[str, Any]) -> list[Any]:
    """The sizes of batches as the results have them: numbers, or their text once they were in a file."""
    return sorted(row["latency_median"], key=int)


def targets(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What was to be reached: what, how much, what was measured, and whether that is enough."""
    found: list[tuple[str, str, str, bool]] = []
    for model in results["models"]:
        rows = {row["who"]: row for row in model["rows"]}
        base, int8, int4 = rows["float32"], rows["tricomp int8"], rows["tricomp int4"]
        name = model["model"]

        def add(what: str, wanted: float, value: float, unit: str, is_least: bool, name: str = name) -> None:
            is_reached = value >= wanted if is_least else value <= wanted
            found.append((f"{name}: {what}", f"{wanted:g}{unit}", f"{value:.4g}{unit}", is_reached))

        if model["is_trained"]:
            add("int8, same top-1", 99.5, 100 * int8["agreement"], " %", True)
            add("int8, accuracy lost", 0.2, 100 * (base["accuracy"] - int8["accuracy"]), " points", False)
            add("int8 file", 22, 100 * int8["bytes"] / base["bytes"], " %", False)
            add("int4 file", 12.5, 100 * int4["bytes"] / base["bytes"], " %", False)
        if name == "transformer":
            for how, other in (("model on the meta device", base), ("model made as usual", rows["float32 as usual"])):
                for what, key in (("cached", "load_median"), ("not cached", "load_cold_median")):
                    if key in other and key in int8:
                        add(f"load, file {what}, against float32, {how}", 2, other[key] / int8[key], "x", True)
        small, medium, large = _batches(int8)
        speeds = {n: base["latency_median"][n] / int8["latency_median"][n] for n in (small, medium, large)}
        if name == "MLP":
            add("int8 speed, batch 1", 3, speeds[small], "x", True)
            add("int8 speed, batch 16", 3, speeds[medium], "x", True)
        add("int8 speed, batch 128", 1, speeds[large], "x", True)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of what each way takes, relative to float32, for every model; lower is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "tricomp"
    whats = ["file", "load", "batch 1", "batch 16", "batch 128"]
    figure, axes = plt.subplots(len(results["models"]), 1, figsize=(9, 2.6 * len(results["models"])), squeeze=False)
    for axis, model in zip(axes[:, 0], results["models"]):
        rows = [row for row in model["rows"] if row["latency_median"]]
        numbers = {
            row["who"]: [row["bytes"], row["load_median"], *(row["latency_median"][n] for n in _batches(row))]
            for row in rows
        }
        base = numbers["float32"]
        for i, (who, found) in enumerate(numbers.items()):
            places = [place + (i - len(rows) / 2) * 0.8 / len(rows) for place in range(len(whats))]
            style: dict[str, Any] = {"edgecolor": "black", "linewidth": 1.2} if who in OURS else {}
            axis.bar(places, [a / b for a, b in zip(found, base)], 0.8 / len(rows), label=who, **style)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(whats)), whats)
        axis.set_ylabel("of float32")
        axis.set_title(model["model"], loc="left", fontsize=10)
    axes[0, 0].legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
