"""The demo's table: bytes of its checkpoints by stream, and times. Text from plain events."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

_STREAMS = {"weights": "weights", "m": "first moments m", "v": "second moments v", "rest": "all else, and headers"}
_ROW = "  {:<26}{:>11}{:>19}{:>19}"


def megabytes(n_bytes: int) -> str:
    """n_bytes in MB, or in kB below a tenth of one."""
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 100_000 else f"{n_bytes / 1e3:.1f} kB"


def table(saves: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]]) -> str:
    """Mean bytes of a keyframe and of a delta by stream; then median times. Takes events as training writes them."""
    lines = ["Bytes of one checkpoint, in the mean:", _ROW.format("", "raw", "zstd -3", "tricomp")]
    for title, group in _groups(saves):
        lines.append(f"  {title}, {len(group)} saved")
        for key, name in _STREAMS.items():
            lines.append(_row(f"  {name}", *(_mean(group, kind, [key]) for kind in ("raw", "zstd", "tricomp"))))
        lines.append(_row("  together", *(_mean(group, kind, list(_STREAMS)) for kind in ("raw", "zstd", "tricomp"))))
    if saves[0]["zstd"] is None:
        lines.append("  (zstd is not installed: pip install backports.zstd)")
    lines += ["", "Seconds, median:"]
    for title, group in _groups(saves):
        lines.append(_time(f"save, {title}", group))
    for n_files in sorted({event["n_files"] for event in loads}):
        title = "keyframe" if n_files == 1 else f"delta checkpoint from {n_files} files"
        lines.append(_time(f"load, {title}", [event for event in loads if event["n_files"] == n_files]))
    return "\n".join(lines)


def verdict(rows: Sequence[tuple[str, int, int]], differing: Sequence[str]) -> str:
    """What was compared, as text: rows of name, count and how many differ, and the first names of those."""
    lines = [
        f"  {name:<38}{n - n_wrong:>5} of {n:>4} equal{'   DIFFERENT' if n_wrong else ''}" for name, n, n_wrong in rows
    ]
    lines += [f"  differs: {name}" for name in differing[:10]]
    lines.append("  -> NOT identical: this is a bug in tricomp or in its demo" if differing else "  -> identical")
    return "\n".join(lines)


def _groups(saves: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    keyframes = [event for event in saves if event["is_keyframe"]]
    deltas = [event for event in saves if not event["is_keyframe"]]
    return [(title, group) for title, group in (("keyframe", keyframes), ("delta checkpoint", deltas)) if group]


def _time(name: str, events: Sequence[dict[str, Any]]) -> str:
    return f"  {name:<38}{median(event['seconds'] for event in events):>8.2f}   of {len(events)}"


def _mean(group: Sequence[dict[str, Any]], kind: str, streams: Sequence[str]) -> int | None:
    if any(event[kind] is None for event in group):
        return None
    return int(sum(event[kind][stream] for event in group for stream in streams)) // len(group)


def _row(name: str, raw: int | None, zstd: int | None, tricomp: int | None) -> str:
    return _ROW.format(name, megabytes(raw or 0), _with_share(zstd, raw), _with_share(tricomp, raw))


def _with_share(n_bytes: int | None, raw: int | None) -> str:
    if n_bytes is None or not raw:
        return "-"
    share = 100 * n_bytes / raw
    return f"{megabytes(n_bytes)} {share:5.1f} %" if share < 1000 else megabytes(n_bytes)
