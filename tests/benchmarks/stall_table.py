"""What the stall benchmark measured, as a table, a page and the README's block. Imports the standard library only.

The hard thing is what a number stands for. Times are medians over the saves but the first, in which memory comes from
the system and nothing is there to be coded against; worst is of all saves. Those to set disks count where it says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Turns = Sequence[dict[str, Any]]


def median(turns: Turns, value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(value(turn) for turn in turns)


def real(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The saves to the real disk, but the first."""
    return [turn for turn in row["turns"][1:] if turn["speed"] is None]


def copy_seconds(saves: dict[str, Any], kind: str) -> float:
    """The median copy of the state, over all processes. kind: "copy_kept", "copy_torch", "copy_fresh"."""
    return statistics.median(turn[kind] for row in saves["rows"] for turn in row["turns"])


def held(row: dict[str, Any]) -> float:
    """Seconds that the loop waits for the call."""
    return median(real(row), lambda turn: turn["held"])


def lost(row: dict[str, Any]) -> float:
    """Seconds that a save takes of training: held, and what the steps beside it took more than others."""
    return median(real(row), lambda turn: turn["held"] + turn["beside"] - turn["n_beside"] * row["step"])


def durable(row: dict[str, Any], speed: float | None = None) -> float:
    """Seconds until a save is on a disk of that speed, None: on the real one, with training beside it."""
    if speed is None:
        return median(real(row), lambda turn: turn["durable"])
    return median([turn for turn in row["turns"] if turn["speed"] == speed], lambda turn: turn["durable"])


def written(row: dict[str, Any]) -> tuple[float, float, float]:
    """MB of the first save, of a later one, and of all."""
    found = [turn["written"] / 1e6 for turn in row["turns"]]
    return found[0], statistics.median(found[1:]), sum(found)


def peak(row: dict[str, Any]) -> float | None:
    """MB of memory at most beyond what the loop takes at its height."""
    found = [turn["peak_bytes"] for turn in row["turns"] if turn["peak_bytes"] is not None]
    return max(found) / 1e6 if found else None


def is_ours(who: str) -> bool:
    """Whether it is tricomp that saves."""
    return "heckpointer" in who or "tricomp" in who


def _speeds(saves: dict[str, Any]) -> list[str]:
    return [f"{speed / 1e9:g} GB/s" for speed in saves["speeds"]]


def _marked(row: dict[str, Any]) -> str:
    number = f"{1e3 * held(row):.1f}"
    return f"**{number}**" if is_ours(row["who"]) else number


def table(results: dict[str, Any]) -> str:
    """Everything, a row a method."""
    saves = results["saves"]
    copy = copy_seconds(saves, "copy_kept")
    titles = ["loop held, ms", "in copies", "worst, ms", "training lost, ms", "durable, ms"]
    titles += [f"at {speed}" for speed in _speeds(saves)] + ["MB, first", "MB, later", "MB, run", "memory, MB"]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in saves["rows"]:
        worst = max(turn["held"] for turn in row["turns"] if turn["speed"] is None)
        over = peak(row)
        cells = [_marked(row), f"{held(row) / copy:.2f}", f"{1e3 * worst:.0f}"]
        cells += [f"{1e3 * lost(row):.0f}", f"{1e3 * durable(row):.0f}"]
        cells += [f"{1e3 * durable(row, speed):.0f}" for speed in saves["speeds"]]
        cells += [f"{size:.1f}" for size in written(row)[:2]]
        cells += [f"{written(row)[2]:.0f}", "" if over is None else f"{over:.0f}"]
        lines.append(f"| {row['who']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme(results: dict[str, Any]) -> str:
    """The README's table: what a save costs the loop, when it is on a disk, and what it leaves there."""
    saves = results["saves"]
    copy = copy_seconds(saves, "copy_kept")
    titles = ["loop held, ms", "in copies", *[f"on disk at {speed}, ms" for speed in _speeds(saves)]]
    titles += ["MB a step", "memory, MB"]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in saves["rows"]:
        over = peak(row)
        cells = [_marked(row), f"{held(row) / copy:.1f}"]
        cells += [f"{1e3 * durable(row, speed):.0f}" for speed in saves["speeds"]]
        cells += [f"{written(row)[2] / saves['n_saves']:.1f}", "" if over is None else f"{over:.0f}"]
        lines.append(f"| {row['who']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def origin(results: dict[str, Any]) -> str:
    """Machine, date, versions and data."""
    machine, data, saves = results["machine"], results["data"][0], results["saves"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Measured on {machine['cpu']} ({machine['n_cores']} cores), {results['date']}; {versions}.\n"
        f"Data: a GPT of {data['n_parameters'] / 1e6:.1f} M parameters after {data['steps'][-1]} steps of AdamW\n"
        f"(batch {data['batch']}, beta2 {data['beta2']}) on the {data['text']}: {saves['state_bytes'] / 1e6:.1f} MB\n"
        f"in {saves['n_tensors']} tensors, saved {saves['n_saves']} times, {saves['steps_between']} steps apart.\n"
    )


def how(results: dict[str, Any]) -> str:
    """How the README's numbers came about, in a few lines."""
    kept = 1e3 * copy_seconds(results["saves"], "copy_kept")
    return (
        f"A copy: of the state to memory that is there, by numpy in one thread, {kept:.1f} ms. Medians of all\n"
        "saves but the first; MB: mean of all; memory: at most, beyond the loop's own.\n"
    )


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What tricomp is to reach, each with what was measured and whether it holds."""
    saves = results["saves"]
    rows = {row["who"]: row for row in saves["rows"]}
    copy = copy_seconds(saves, "copy_kept")
    found = []
    for who in ("Checkpointer", "tricomp dcp.async_save"):
        if who in rows:
            quotient = held(rows[who]) / copy
            found.append((f"{who}: the loop is held for {quotient:.2f} copies; 1.3 at most", quotient <= 1.3))
    for ours, theirs in (
        ("Checkpointer", "DCP async_save"),
        ("Checkpointer, every step alone", "DCP async_save"),
        ("tricomp dcp.async_save", "DCP async_save"),
        ("tricomp dcp.save", "DCP save"),
    ):
        for speed in saves["speeds"] if {ours, theirs} <= rows.keys() else ():
            quotient = durable(rows[ours], speed) / durable(rows[theirs], speed)
            text = f"{ours}: at {speed / 1e9:g} GB/s durable in {quotient:.2f} of the time of {theirs}; 1 at most"
            found.append((text, quotient <= 1))
    return found


def report(results: dict[str, Any]) -> str:
    """Everything that was measured, as one Markdown page."""
    saves = results["saves"]
    kept, by_torch, fresh = (1e3 * copy_seconds(saves, f"copy_{kind}") for kind in ("kept", "torch", "fresh"))
    steps = 1e3 * statistics.median(row["step"] for row in saves["rows"])
    lines = "\n".join(f"- {'yes' if is_reached else 'no'}: {text}" for text, is_reached in verdicts(results))
    return f"""# Saves of a PyTorch training loop, {results["date"]}

{origin(results)}
{table(results)}
loop held: by the call. In copies: of the state to memory that is there, {kept:.1f} ms by numpy in one thread; torch
with its threads takes {by_torch:.1f} ms, and {fresh:.1f} ms to fresh memory. Medians of copies made before each save,
every tensor by itself. Training lost: held, and what the steps beside the save took more than others, which take
{steps:.0f} ms. Durable: from the call's beginning until all is on the disk: synced, renamed, and the folder synced, for
everybody (torch's distributed writer syncs its files but not the folder; here it does). At so many GB/s: the same with
nothing trained meanwhile, on a disk that takes so many bytes a second from when it is asked for them, by fsync or a
request to begin, as Linux asks it; tests/benchmarks/slow_disk.c has the model, and stands where Python, C++ and Rust
call the system. MB: first save, median of the later ones, the whole run. Memory: at most, beyond what the loop itself
takes at its height.

Times are medians of all saves but the first; worst is of all on the real disk. All processes trained the same run bit
for bit, and every save came back bit for bit in another process. Safetensors holds the optimizer's tensors by number
and name, and the rest as JSON. Others used the machine at the same time: load averages over a minute were
{results["load"][0]:.1f} at the start and {results["load"][1]:.1f} at the end.

{lines}
"""
