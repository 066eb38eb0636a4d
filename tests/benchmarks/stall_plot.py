"""The stall benchmark's figure: what a save holds the loop for, when it is on a disk, what it leaves there.

Imports matplotlib, when it draws. The hard thing is its size in a repository: text stays text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks import stall_table

_OURS, _OTHERS = "#1f5fa8", "#9a9a9a"
_DOTS = ("o", "s", "D")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the figure as SVG; without matplotlib, nothing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    saves = results["saves"]
    rows = saves["rows"][::-1]
    places = range(len(rows))
    colours = [_OURS if stall_table.is_ours(row["who"]) else _OTHERS for row in rows]
    copy = stall_table.copy_seconds(saves, "copy_kept")
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "tricomp", "font.size": 8, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure, (hold, disk, size) = pyplot.subplots(1, 3, figsize=(10, 0.6 + 0.26 * len(rows)), sharey=True)
        hold.barh(places, [1e3 * stall_table.held(row) for row in rows], color=colours)
        hold.axvline(1e3 * copy, color="black", linewidth=0.8)
        hold.set_xscale("log")
        hold.set_xlim(left=min(1.0, 500 * copy))
        hold.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        hold.minorticks_off()
        hold.set_title("loop held, ms; line: a copy of the state")
        hold.set_yticks(places, [row["who"] for row in rows])
        for speed, dot in zip(saves["speeds"], _DOTS, strict=False):
            times = [stall_table.durable(row, speed) for row in rows]
            disk.scatter(times, places, c=colours, marker=dot, s=14, label=f"{speed / 1e9:g} GB/s")
        disk.set_xlim(left=0)
        disk.set_title("on a disk of so many GB/s, after s")
        if saves["speeds"]:
            disk.legend(frameon=False, loc="upper right")
        size.barh(places, [stall_table.written(row)[2] / saves["n_saves"] for row in rows], color=colours)
        size.axvline(saves["state_bytes"] / 1e6, color="black", linewidth=0.8)
        size.set_title("MB a step; line: the state")
        for axes in (hold, disk, size):
            axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
