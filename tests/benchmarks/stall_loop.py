"""A training loop that saves in one way, in a process of its own, turn by turn: what `stall` drives and compares.

Imports torch and the training beside it; the saver comes by name. The hard thing: all processes train the same run, so
that everybody saves the same states, which their digests prove; and what a save costs is told apart from the loop's own
work: time held, time lost by the steps beside it, and memory beyond what the loop takes at its height.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import slow_disk, stall_training, training
from tests.benchmarks.stall_savers import Saver, saver_of, sync
from tests.benchmarks.stall_training import Training

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Turn:
    """One save and the steps after it. Seconds, but for bytes.

    held: the loop, by the call. durable: from the call's beginning. lost: held, and by what the steps beside the save
    were slower than others; None on a set disk, where nothing is trained until all is durable. n_beside: those steps.
    """

    digest: str
    speed: float | None
    copy_fresh: float
    copy_kept: float
    copy_torch: float
    held: float
    durable: float
    n_beside: int
    beside: float
    quiet: list[float]
    written: int
    peak_bytes: int | None


class Loop:
    """Training with one saver. n_between: steps from one save to the next."""

    def __init__(self, training: Training, saver: Saver, n_between: int) -> None:
        self.training, self._saver, self._n_between = training, saver, n_between
        self._kept = [torch.empty_like(tensor) for tensor in training.tensors()]
        training.step()
        self._copies()
        _forget_peak()
        training.step()
        self._own_peak = _peak_bytes()

    def turn(self, number: int, speed: float | None) -> Turn:
        """One save, to a disk of that speed (None: the real one, with training beside it), and the steps after it."""
        digest, copies = self.training.digest(), self._copies()
        before = files_of(self._saver.folder)
        gc.collect()
        _forget_peak()
        if speed is not None:
            slow_disk.set_speed(speed)
        held, durable, beside = self._save(number, is_training=speed is None)
        peak = _peak_bytes()
        new = {path: size for path, size in files_of(self._saver.folder).items() if path not in before}
        written = sum(new.values())
        if speed is not None:
            seen = slow_disk.n_seen()
            slow_disk.set_speed(None)
            if not written <= seen <= 1.02 * written + 65536:
                raise SystemExit(f"the set disk has seen {seen} of {written} bytes; no number is recorded")
            for path in new:  # so that nothing of it disturbs the next
                sync(path)
        quiet = [self.training.step() for _ in range(self._n_between - len(beside))]
        over = None if peak is None or self._own_peak is None else max(peak - self._own_peak, 0)
        return Turn(digest, speed, *copies, held, durable, len(beside), sum(beside), quiet, written, over)

    def _save(self, number: int, is_training: bool) -> tuple[float, float, list[float]]:
        beside: list[float] = []
        ended: list[float] = []
        began = time.perf_counter()
        waiting = self._saver.begin(number, self.training)
        held = time.perf_counter() - began
        if waiting is None:
            return held, held, beside
        waiting.add_done_callback(lambda _: ended.append(time.perf_counter() - began))
        while is_training and not waiting.done() and len(beside) < self._n_between:
            beside.append(self.training.step())
        waiting.result()
        while not ended:  # called a moment after result returns
            time.sleep(1e-4)
        return held, ended[0], beside

    def _copies(self) -> tuple[float, float, float]:
        """Seconds of one copy of the state: to fresh memory; to memory that is there, by numpy in one thread; by torch.

        Each is of every tensor by itself.
        """
        tensors = self.training.tensors()
        began = time.perf_counter()
        made = [tensor.clone() for tensor in tensors]
        fresh = time.perf_counter() - began
        del made
        began = time.perf_counter()
        for target, tensor in zip(self._kept, tensors, strict=True):
            np.copyto(target.numpy(), tensor.numpy())
        kept = time.perf_counter() - began
        began = time.perf_counter()
        for target, tensor in zip(self._kept, tensors, strict=True):
            target.copy_(tensor)
        return fresh, kept, time.perf_counter() - began


def files_of(folder: Path) -> dict[Path, int]:
    """Bytes of each file below a folder."""
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _forget_peak() -> None:
    """Let the most memory that this process has had be what it has now, where the system can."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def _peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not tell, or cannot forget."""
    if not _CLEAR.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def serve(connection: Any, who: str, run: training.Run, folder: Path, n_between: int, threads: int) -> None:
    """What a process does: turns as they are asked for, until None comes. threads: to train with."""
    quieten()
    torch.set_num_threads(threads)
    saver = saver_of(who, folder)
    loop = Loop(stall_training.begin(run, folder), saver, n_between)
    connection.send(loop.training.digest())
    while (question := connection.recv()) is not None:
        connection.send(asdict(loop.turn(*question)))
    saver.close()


def quieten() -> None:
    """Leave out what torch's distributed part tells about being used by one process."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch.distributed")
