"""The GPU benchmark's results as Markdown, and its verdict on what must be reached. Standard library only.

The hard thing: every figure here is computed from the results file, and a run that was cut has only some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Results = dict[str, Any]
TIERS = ("dense", "fast")
WAYS = ("in", "out")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _speed(gigabytes: float | None) -> str:
    if gigabytes is None:
        return "no kernel"
    return f"{gigabytes:.3g}" if gigabytes < 100 else f"{gigabytes:.0f}"


def _both_ways(one: Results) -> str:
    return " / ".join(_speed(one.get(way)) for way in WAYS)


def _ratio(raw: float, packed: float) -> str:
    return f"{raw / max(packed, 1):.4g}"


def verdicts(results: Results) -> Iterator[tuple[str, str, float, float, bool]]:
    """What must be reached, on what, the target, what was measured, and whether that reaches it."""
    for row in results["works"]:
        for tier, one in row["tiers"].items():
            target = _target(row, tier)
            if target is None:
                continue
            for way in WAYS:
                if one[way] is not None:
                    what = f"{row['work']}, {tier}, {way}"
                    yield f"GB/s, {tier}, {row['mode']}", what, target, one[way], one[way] >= target
            if (row["work"], tier) == ("w bfloat16", "dense"):
                ratio = row["raw"] / one["bytes"]
                yield "ratio of dense bfloat16", row["work"], 1.48, ratio, ratio >= 1.48
    held = results.get("held")
    if held:
        share = held["snapshot"]["whole"] / max(held["copy"], 1e-9)
        yield "loop held by a snapshot, in copies of the state", held["run"], 1.3, share, share <= 1.3


def _target(row: Results, tier: str) -> float | None:
    if row["mode"] in ("delta", "scaled_delta"):
        return 350.0
    if row["dtype"] == "bfloat16" and row["mode"] == "full":
        return 600.0 if tier == "dense" else 1200.0
    return None


def verdict_table(results: Results) -> str:
    """Everything that must be reached, the furthest from it first."""
    rows = [
        (f"{must}: {what}", f"{target:g}", f"{measured:.3g}", "reached" if is_reached else "**not reached**")
        for must, what, target, measured, is_reached in verdicts(results)
    ]
    rows.sort(key=lambda row: row[3])
    return _table("must reach", ("target", "measured", ""), rows)


def speed_table(results: Results) -> str:
    """The device alone: GB/s, shares of a copy, ratio; and all of the codec."""
    copy = results["rates"]["copy"]
    lines = []
    for row in results["works"]:
        for tier, one in row["tiers"].items():
            shares = " / ".join("" if one[way] is None else f"{one[way] / copy:.0%}" for way in WAYS)
            cells = [_both_ways(one), shares, _ratio(row["raw"], one["bytes"]), _both_ways(one["whole"]), one["plan"]]
            lines.append([f"{row['work']}, {tier}", *cells])
    columns = ("device alone", "share of a copy", "raw / packed", "whole codec", "plan of the largest leaf")
    return _table("GB/s of raw, in / out", columns, lines)


def nvcomp_table(results: Results) -> str:
    """nvCOMP on the same bytes, or that it was not there."""
    if not results["nvcomp"]:
        return "nvCOMP was not installed.\n"
    lines = []
    for row in results["works"]:
        for one in row.get("nvcomp", []):
            cells = ["", "", one.get("why_not", "")]
            if "why_not" not in one:
                cells[:2] = _both_ways(one), _ratio(row["raw"], one["bytes"])
            lines.append([f"{row['work']}, {one['who']}", *cells])
    return _table(f"nvCOMP {results['nvcomp']}: GB/s of raw, in / out", ("speed", "raw / packed", "why not"), lines)


def kernel_table(results: Results) -> str:
    """Where the time goes: milliseconds of each kernel."""
    lines = []
    for row in results["works"]:
        for tier, one in row["tiers"].items():
            for way in WAYS:
                spent = sorted(one[f"kernels_{way}"].items(), key=lambda item: -item[1])
                lines.append([f"{row['work']}, {tier}, {way}", ", ".join(f"{name} {ms:.3g}" for name, ms in spent)])
    return _table("ms of each kernel", ("",), lines)


def sweep_table(results: Results) -> str:
    """Widths and precisions."""
    if not results["sweep"]:
        return "Not swept (--sweep).\n"
    lines = []
    for row in results["sweep"]:
        width = f"{row['chunks']} chunks, {row['warps']} warps, {row['prob_bits']} bits"
        lines.append([f"{row['work']}, {row['tier']}, {width}", _both_ways(row), _ratio(row["raw"], row["bytes"])])
    return _table("GB/s of raw, in / out, the device alone", ("speed", "raw / packed"), lines)


def held_table(results: Results) -> str:
    """What saves cost the loop."""
    held = results.get("held")
    if not held:
        return "Not measured: there was no time left.\n"
    copy = max(held["copy"], 1e-9)
    lines = []
    for row in held["rows"]:
        if "why_not" in row:
            lines.append([row["who"], "", "", "", "", "", row["why_not"]])
            continue
        seconds = [f"{row[key] * 1e3:,.1f}" for key in ("call", "held", "lost")]
        copies = f"{row['held'] / copy:,.1f}"
        lines.append([row["who"], *seconds, copies, f"{row['written'] / 1e9:.2f}", f"{row['n_steps']:g} steps"])
    snapshot = held["snapshot"]
    columns = ("call, ms", "held, ms", "lost in all, ms", "held, in copies", "GB written", "meanwhile")
    return (
        f"A GPT of {held['n_parameters'] / 1e6:.0f} M parameters ({held['run']}), {held['state_bytes'] / 1e9:.1f} GB "
        f"of weights and moments; a step takes {held['step'] * 1e3:.1f} ms, a copy of the state on the device "
        f"{held['copy'] * 1e3:.2f} ms, a snapshot alone {snapshot['whole'] * 1e3:.2f} ms (its call "
        f"{snapshot['call'] * 1e3:.2f} ms). Medians of {held['n_rounds']} rounds.\n\n{_table('save', columns, lines)}"
    )


def origin(results: Results) -> str:
    """Machine, date, versions and data in one sentence each."""
    machine, data = results["machine"], results.get("data")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = (
        f"Measured on {machine['gpu']} ({machine['cpu']}, {machine['n_cores']} cores), {results['date']}; {versions}.\n"
    )
    if data:
        one = data[0]
        text += (
            f"Data: a GPT of {one['n_parameters'] / 1e6:.0f} M parameters ({one['name']}) after {one['n_steps']} steps "
            f"of AdamW in bfloat16 autocast on the device, loss {one['first_loss']} to {one['last_loss']}.\n"
        )
    return text


def report(results: Results) -> str:
    """Everything that was measured, as one Markdown page."""
    rates = results["rates"]
    compiled = ", ".join(f"{one['n']} in {one['seconds']} s" for one in results.get("compiled", [])) or "none ahead"
    return f"""# Speed on a GPU, {results["date"]}

{origin(results)}
A copy on the device: {rates["copy"]:.0f} GB/s of bytes copied (each is read once and written once); to pinned host
memory {rates["to_host"]:.1f} GB/s, from it {rates["to_device"]:.1f} GB/s. Medians of {results["runs"]} runs after one
that warms up; GB are 10^9 bytes. Whatever was timed came back bit for bit first.

*Device alone*: from the first kernel's begin to the last one's end, by CUDA events, all launched before the first
began: words and frames lie on the device (decoding: compressed bytes are there already). *Whole codec*: planning,
digests, checksums and the bus included, from tensors to bytes on the host and back. *n apart*: packed against the state
n steps earlier. Matrices of the model are leaves as they are. All took {results["seconds"]} s; kernels compiled:
{compiled}.

## Verdict

{verdict_table(results)}
## Speed

{speed_table(results)}
## nvCOMP

{nvcomp_table(results)}
It packs each stream as one piece, from device memory to device memory; against a reference the XOR of the two, whose
time counts.

## The training loop

{held_table(results)}
*call*: what the call itself takes; *held*: until the next step has ended, beyond what a step takes; *lost in all*:
until all that the save began has ended, beyond as many undisturbed steps.

## Kernels

{kernel_table(results)}
## Sweep

{sweep_table(results)}"""
