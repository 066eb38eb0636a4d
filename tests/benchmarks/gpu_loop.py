"""How long a save holds the training loop, on a GPU: torch.save, torch's distributed checkpoints, and tricomp.

Imports torch and tricomp_torch. The hard thing: what a save costs the loop is more than the call takes, since copies
and kernels run beside the steps that follow. So steps are counted until all that a save began has ended, and what they
took beyond as many undisturbed steps is told too.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import tricomp_torch

from tests.benchmarks.facts import log
from tests.benchmarks.gpu_peers import seconds_of, synchronise
from tests.benchmarks.gpu_training import BYTES_A_PARAMETER, Training, n_parameters

_distributed: Any = import_module("torch.distributed.checkpoint")

MOST_ROUNDS = 7


class Background:
    """A call in a thread of its own, which is asked whether it is done."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._failure: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as failure:
            self._failure = failure

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure


@dataclass(frozen=True)
class Saver:
    """One way to save. begin: starts it, and gives what has done() and result(), None if it is done.

    opened: gives what begin is given, for a path. has_parent: a checkpoint goes before, a step earlier, that counts for
    nothing.
    """

    who: str
    begin: Callable[[Training, Any], Any]
    opened: Callable[[Path], AbstractContextManager[Any]] = nullcontext
    has_parent: bool = False


def _snapshot_and_save(training: Training, path: Path) -> Background:
    taken = tricomp_torch.snapshot(training.tree())
    return Background(lambda: tricomp_torch.save(taken, str(path)))


def _checkpointer(path: Path) -> tricomp_torch.Checkpointer:
    """One that keeps what it saved on the device, for the next one to be coded against."""
    return tricomp_torch.Checkpointer(str(path), reference_in="device")


def _next_step(training: Training, checkpointer: tricomp_torch.Checkpointer) -> Any:
    step = len(checkpointer.store.steps()) + 1
    return checkpointer.save(step, model=training.model, optimizer=training.optimizer)


def savers() -> Iterator[Saver]:
    """Everybody, the plain ones first."""
    yield Saver("torch.save", lambda training, path: torch.save(training.tree(), path))
    yield Saver("distributed save", lambda training, path: _none(_distributed.save(training.tree(), **_at(path))))
    yield Saver("distributed async_save", lambda training, path: _distributed.async_save(training.tree(), **_at(path)))
    yield Saver("tricomp_torch.save", lambda training, path: _none(tricomp_torch.save(training.tree(), str(path))))
    yield Saver("tricomp_torch.snapshot, saved in a thread", _snapshot_and_save)
    yield Saver("tricomp_torch.Checkpointer, whole", _next_step, _checkpointer)
    yield Saver("tricomp_torch.Checkpointer, against the step before", _next_step, _checkpointer, has_parent=True)


def _at(path: Path) -> dict[str, str]:
    return {"checkpoint_id": str(path)}


def _none(_: Any) -> None:
    return None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder; 0 where there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def measure(training: Training, folder: Path, seconds: float, n_device_runs: int) -> dict[str, Any]:
    """Hold times of everybody, medians of as many rounds as fit into about so many seconds, at least one.

    folder: where files go, each removed once it was counted; best in memory, so that no disk is measured.
    """
    device = training.device
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch.distributed")
    for _ in range(3):
        training.step()
    step_seconds = _step_seconds(training, 5)
    n_bytes = n_parameters(training.run) * BYTES_A_PARAMETER
    found: dict[str, Any] = {"n_parameters": n_parameters(training.run), "run": training.run.name}
    found |= {"state_bytes": n_bytes, "step": step_seconds, "copy": _copy_seconds(training, n_device_runs)}
    found["snapshot"] = _held_by_snapshot(training, n_device_runs)
    log(f"held: {found}")
    rows: dict[str, list[dict[str, Any]]] = {}
    refusals: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rounds: list[float] = []
    try:
        while not rounds or (len(rounds) < MOST_ROUNDS and time.perf_counter() - began + rounds[-1] < seconds):
            started = time.perf_counter()
            for saver in savers():
                if saver.who in refusals:
                    continue
                try:
                    row = _held(training, saver, folder / "checkpoint", step_seconds)
                except Exception as fault:
                    refusals[saver.who] = f"{type(fault).__name__}: {fault}"[:300]
                    continue
                finally:
                    _remove(folder / "checkpoint")
                rows.setdefault(saver.who, []).append(row)
                log(f"held: {saver.who}: {row}")
            rounds.append(time.perf_counter() - started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    synchronise(device)
    found["rows"] = [
        {"who": who, **{key: statistics.median(run[key] for run in runs) for key in runs[0]}}
        for who, runs in rows.items()
    ]
    found["rows"] += [{"who": who, "why_not": why} for who, why in refusals.items()]
    return {**found, "n_rounds": len(rounds)}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step_seconds(training: Training, n: int) -> float:
    found = []
    for _ in range(n):
        synchronise(training.device)
        began = time.perf_counter()
        training.step()
        synchronise(training.device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _copy_seconds(training: Training, n_runs: int) -> float:
    """One copy of the state on the device, to memory that is there already."""
    sources = [t.detach() for t in _tensors(training.tree()) if t.device.type == training.device.type]
    targets = [torch.empty_like(tensor) for tensor in sources]
    return seconds_of(lambda: torch._foreach_copy_(targets, sources), training.device, n_runs)


def _held_by_snapshot(training: Training, n_runs: int) -> dict[str, float]:
    """Seconds that a snapshot alone takes: the host's call, and until the device has gone past it."""
    calls, wholes = [], []
    for _ in range(n_runs + 1):
        tree = training.tree()
        synchronise(training.device)
        began = time.perf_counter()
        taken = tricomp_torch.snapshot(tree)
        calls.append(time.perf_counter() - began)
        synchronise(training.device)
        wholes.append(time.perf_counter() - began)
        del taken
    return {"call": statistics.median(calls[1:] or calls), "whole": statistics.median(wholes[1:] or wholes)}


def _held(training: Training, saver: Saver, path: Path, step_seconds: float) -> dict[str, Any]:
    """Seconds: of the call; that the loop was held, the next step's delay included; lost in all until it was done.

    written: bytes. n_steps: as many as were made meanwhile. The save and its steps are real: training goes on.
    """
    _remove(path)
    with saver.opened(path) as place:
        if saver.has_parent:
            saver.begin(training, place).result()
            training.step()
        n_before = size_of(path)
        synchronise(training.device)
        began = time.perf_counter()
        waiting = saver.begin(training, place)
        called = time.perf_counter() - began
        training.step()
        synchronise(training.device)
        held = time.perf_counter() - began - step_seconds
        n_steps = 1
        while waiting is not None and not waiting.done():
            training.step()
            synchronise(training.device)
            n_steps += 1
        if waiting is not None:
            waiting.result()
        lost = time.perf_counter() - began - n_steps * step_seconds
    written = size_of(path) - n_before
    return {"call": called, "held": held, "lost": lost, "n_steps": n_steps, "written": written}
