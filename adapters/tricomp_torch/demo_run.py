"""One training process of the demo: `python -m tricomp_torch.demo_run OPTIONS`, where OPTIONS is an Options as JSON.

Writes what happens as one JSON object a line, so that a killed process leaves its lines behind. The hard thing: the
uninterrupted run saves and loads nothing, or it would prove nothing; states are digested with hashlib, not tricomp.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tricomp
from tricomp_torch import rng
from tricomp_torch.checkpointer import Checkpointer
from tricomp_torch.demo_gpt import QUICK, Size, Training, begin
from tricomp_torch.demo_kill import kill_in_next_save
from tricomp_torch.demo_zstd import zstd
from tricomp_torch.trees import flatten

STREAMS = ("weights", "m", "v", "rest")


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


def stream_of(path: str) -> str:
    """The row of the table that a leaf counts to."""
    if path.startswith("model/"):
        return "weights"
    return {"exp_avg": "m", "exp_avg_sq": "v"}.get(path.rpartition("/")[2], "rest")


def run(options: Options) -> None:
    """Train from the store's latest step, or from the start, to n_steps."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.use_deterministic_algorithms(True)
    training = begin(QUICK if options.is_quick else Size(), options.n_steps)
    log = Path(options.log).open("a", encoding="utf-8")  # noqa: SIM115  (closed by the end of the process, or its death)

    def write(event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=log, flush=True)

    n_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    write("model", n_parameters=n_parameters, n_text_bytes=len(training.data))
    ckpt = _checkpointer(options) if options.store else None
    parts: dict[str, Any] = {"model": training.model, "optimizer": training.optimizer, "scheduler": training.scheduler}
    first, file_bytes = 0, 0
    if ckpt is not None:
        started = time.perf_counter()
        restored = ckpt.restore(**parts)
        if restored is not None:
            first = restored.step
            write("restore", step=first, seconds=time.perf_counter() - started)
    for step in range(first + 1, options.n_steps + 1):
        write("loss", step=step, loss=training.step().hex())
        if ckpt is not None:
            if step == options.kill_step:
                kill_in_next_save(options.store, max(1, file_bytes // 2))
            saving = ckpt.save(step, **parts)
            if saving is not None:
                report = saving.result()  # so that a kill in the next save is one
                file_bytes = report.file_bytes
                write("save", step=step, **_measured(training, report))
        _show_progress(step, options.n_steps)
    _show_progress(0, 0)
    write("final", digests=_digests(training))
    if ckpt is not None:
        for n_files, step in enumerate(_keyframe_and_delta(ckpt.store), 1):
            started = time.perf_counter()
            ckpt.restore(step=step, rng=False)
            write("load", step=step, n_files=n_files, seconds=time.perf_counter() - started)


def _checkpointer(options: Options) -> Checkpointer:
    return Checkpointer(options.store, every=options.every, keyframe=tricomp.KeyframeEvery(options.keyframe))


def _keyframe_and_delta(store: tricomp.Store) -> tuple[int, ...]:
    """The last two neighbouring steps of which the first stands alone and the second is coded against it."""
    found: tuple[int, ...] = ()
    for step, following in pairwise(store.steps()):
        with store.open(step) as a, store.open(following) as b:
            if a.parent is None and b.parent == a.content_id:
                found = step, following
    return found


def _measured(training: Training, report: tricomp.Report) -> dict[str, Any]:
    """Bytes of a checkpoint by stream: raw, by zstd level 3 (null without it), by tricomp. Tied tensors count once."""
    flat = flatten(_state(training))
    ties = flat.notes.get("ties", {})
    raw = dict.fromkeys(STREAMS, b"")
    for path, value in _leaves(flat.tree):
        if isinstance(value, np.ndarray) and path not in ties:
            raw[stream_of(path)] += value.tobytes()
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


def _state(training: Training) -> dict[str, Any]:
    """The leaves of a checkpoint, with the paths that Checkpointer gives them."""
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "rng": rng.get_state(),
    }


def _digests(training: Training) -> dict[str, str]:
    """SHA-256 of each tensor of the state by path, and of all plain values together."""
    plain: list[str] = []
    digests: dict[str, str] = {}
    for path, value in _leaves(_state(training)):
        if isinstance(value, torch.Tensor | np.ndarray):
            array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
            digests[path] = hashlib.sha256(array.tobytes()).hexdigest()
        else:
            plain.append(f"{path}={value!r}")
    digests["plain values"] = hashlib.sha256("\n".join(plain).encode()).hexdigest()
    return digests


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        entries: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list | tuple):
        entries = list(enumerate(tree))
    else:
        return [(path, tree)]
    return [leaf for key, value in entries for leaf in _leaves(value, f"{path}/{key}" if path else str(key))]


def _show_progress(step: int, n_steps: int) -> None:
    if sys.stderr.isatty():
        print(f"\r  step {step} of {n_steps} " if n_steps else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def to_json(options: Options) -> str:
    """The argument of a child process."""
    return json.dumps(asdict(options))


if __name__ == "__main__":
    run(Options(**json.loads(sys.argv[1])))
