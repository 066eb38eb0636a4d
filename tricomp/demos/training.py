"""One training process of a demo: what a framework trains is stepped, saved, killed, restored and digested.

Writes what happens as one JSON object a line, so that a killed process leaves its lines behind. The hard thing: the
uninterrupted run saves and loads nothing, or it would prove nothing; states are digested with hashlib, not tricomp.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import tricomp
from tricomp.demos.kill import kill_in_next_save
from tricomp.demos.zstd import zstd

STREAMS = ("weights", "m", "v", "rest")
Leaves = Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class Options:
    """What one process does. log: path of its lines. store: "" trains without saving. kill_step: 0 for never."""

    log: str
    n_steps: int
    store: str = ""
    every: int = 5
    keyframe: int = 4
    kill_step: int = 0
    is_quick: bool = False


class Saver(Protocol):
    """How an adapter saves a Trainee to a Store."""

    @property
    def store(self) -> tricomp.Store:
        """Where the steps are."""

    def restore(self) -> int | None:
        """Put the latest step's state into what trains. Returns the step; None if there is none."""

    def save(self, step: int) -> Future[tricomp.Report] | None:
        """Begin to save, if it is time to."""

    def read(self, step: int) -> None:
        """Decode all of a step, and use none of it."""


class Trainee(Protocol):
    """What a demo trains."""

    @property
    def n_parameters(self) -> int:
        """Of the model."""

    @property
    def n_text_bytes(self) -> int:
        """Of the text that it trains on."""

    def step(self) -> float:
        """Train one step. Returns its loss."""

    def state(self) -> Leaves:
        """Path and value of everything that a run changes, arrays as numpy's."""

    def saved(self) -> Leaves:
        """Path and numpy array of each array that a checkpoint holds, tied ones once."""

    def saver(self, options: Options) -> Saver:
        """What saves to options.store each options.every steps, each options.keyframe-th standing alone."""


def run(options: Options, trainee: Trainee, stream_of: Callable[[str], str]) -> None:
    """Train from the store's latest step, or from the start, to n_steps. stream_of: of a leaf, by its path."""
    log = Path(options.log).open("a", encoding="utf-8")  # noqa: SIM115  (closed by the end of the process, or its death)

    def write(event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=log, flush=True)

    write("model", n_parameters=trainee.n_parameters, n_text_bytes=trainee.n_text_bytes)
    saver = trainee.saver(options) if options.store else None
    first, file_bytes = 0, 0
    if saver is not None:
        started = time.perf_counter()
        restored = saver.restore()
        if restored is not None:
            first = restored
            write("restore", step=first, seconds=time.perf_counter() - started)
    for step in range(first + 1, options.n_steps + 1):
        write("loss", step=step, loss=trainee.step().hex())
        if saver is not None:
            if step == options.kill_step:
                kill_in_next_save(options.store, max(1, file_bytes // 2))
            saving = saver.save(step)
            if saving is not None:
                report = saving.result()  # so that a kill in the next save is one
                file_bytes = report.file_bytes
                write("save", step=step, **_measured(trainee.saved(), report, stream_of))
        _show_progress(step, options.n_steps)
    _show_progress(0, 0)
    write("final", digests=digests(trainee.state()))
    if saver is not None:
        for n_files, step in enumerate(_keyframe_and_delta(saver.store), 1):
            started = time.perf_counter()
            saver.read(step)
            write("load", step=step, n_files=n_files, seconds=time.perf_counter() - started)


def _keyframe_and_delta(store: tricomp.Store) -> tuple[int, ...]:
    """The last two neighbouring steps of which the first stands alone and the second is coded against it."""
    found: tuple[int, ...] = ()
    for step, following in pairwise(store.steps()):
        with store.open(step) as a, store.open(following) as b:
            if a.parent is None and b.parent == a.content_id:
                found = step, following
    return found


def _measured(saved: Leaves, report: tricomp.Report, stream_of: Callable[[str], str]) -> dict[str, Any]:
    """Bytes of a checkpoint by stream: raw, by zstd level 3 (null without it), by tricomp."""
    raw = dict.fromkeys(STREAMS, b"")
    for path, array in saved:
        raw[stream_of(path)] += array.tobytes()
    coded = {name: sum(leaf.coded_bytes for leaf in report.leaves if stream_of(leaf.path) == name) for name in STREAMS}
    coded["rest"] += report.file_bytes - sum(coded.values())  # header, index and plain values
    return {
        "is_keyframe": report.parent is None,
        "seconds": report.seconds,
        "file_bytes": report.file_bytes,
        "raw": {name: len(data) for name, data in raw.items()},
        "zstd": {name: len(zstd(data)) for name, data in raw.items()} if zstd else None,
        "tricomp": coded,
    }


def digests(state: Leaves) -> dict[str, str]:
    """SHA-256 of each array of a state by path, and of all plain values together."""
    plain: list[str] = []
    found: dict[str, str] = {}
    for path, value in state:
        if isinstance(value, np.ndarray):
            found[path] = hashlib.sha256(value.tobytes()).hexdigest()
        else:
            plain.append(f"{path}={value!r}")
    found["plain values"] = hashlib.sha256("\n".join(plain).encode()).hexdigest()
    return found


def _show_progress(step: int, n_steps: int) -> None:
    if sys.stderr.isatty():
        print(f"\r  step {step} of {n_steps} " if n_steps else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def to_json(options: Options) -> str:
    """The argument of a child process."""
    return json.dumps(asdict(options))


def from_arguments() -> Options:
    """The Options that this process was started with."""
    return Options(**json.loads(sys.argv[1]))
