"""Devices that note what is launched on them: when each kernel ran, or which kernels there will be, to compile ahead.

Imports torch and tricomp's device. The hard thing is to time the device alone: a launch costs the host more than the
device. So the device is put to sleep before the first kernel, and the host has launched all when it wakes up.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch

from tricomp.kernels.device import Device

SLEEP_CYCLES = 100_000_000  # about 50 ms
_CYCLES_A_SECOND = 2e9


@dataclass(frozen=True)
class Notes:
    """Marks before and after each launch, by kernel; and how long the host took to launch all."""

    marks: list[tuple[str, Any, Any]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def clear(self) -> None:
        self.marks.clear()
        self.host.clear()


@dataclass(frozen=True)
class TimedDevice(Device):
    """A Device that notes when its kernels began and ended, from the first launch on, all that is between included."""

    notes: Notes = field(default_factory=Notes)
    sleep_cycles: int = SLEEP_CYCLES

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        if not self.notes.marks and self.is_accelerator and self.sleep_cycles:
            torch.cuda._sleep(self.sleep_cycles)
        begin = self._mark()
        super().launch(kernel, grid, *arguments, **constants)
        self.notes.marks.append((kernel.__name__, begin, self._mark()))
        self.notes.host.append(time.perf_counter())

    def _mark(self) -> Any:
        if not self.is_accelerator:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.handle))
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin) if not self.is_accelerator else float(begin.elapsed_time(end)) / 1e3

    def told(self) -> Timed:
        """What was noted since the last time. Waits."""
        if self.is_accelerator:
            torch.cuda.synchronize(self.handle)
        marks = self.notes.marks
        kernels: dict[str, float] = {}
        for name, begin, end in marks:
            kernels[name] = kernels.get(name, 0) + self._seconds(begin, end)
        seconds = self._seconds(marks[0][1], marks[-1][2]) if marks else 0.0
        found = Timed(seconds, kernels, self.notes.host[-1] - self.notes.host[0] if marks else 0.0)
        self.notes.clear()
        return found


@dataclass(frozen=True)
class Timed:
    """Seconds from the first kernel's begin to the last one's end; of each kernel; of the host, to launch all."""

    seconds: float
    kernels: dict[str, float]
    launched: float


def median_of(runs: Iterable[Timed]) -> tuple[float, dict[str, float]]:
    """Median seconds, and those of each kernel."""
    found = list(runs)
    names = found[0].kernels
    kernels = {name: statistics.median(run.kernels.get(name, 0.0) for run in found) for name in names}
    return statistics.median(run.seconds for run in found), kernels


def timed(device: TimedDevice, call: Callable[[TimedDevice], Any], n_runs: int) -> tuple[float, dict[str, float]]:
    """Median seconds of the device for what a call launches, after one run that warms up, which counts if n_runs is 0.

    call: launches on the device given; what it returns is waited for off the clock, by its result() if it has one.
    Launching may take the host longer than the device sleeps: then the device sleeps longer, up to 2 s.
    """
    runs: list[Timed] = []
    while len(runs) <= n_runs:
        with device.running():
            waiting = call(device)
        found = device.told()
        getattr(waiting, "result", lambda: None)()
        slept = device.sleep_cycles / _CYCLES_A_SECOND
        if runs and device.is_accelerator and device.sleep_cycles and found.launched > slept < 2:
            device = replace(device, sleep_cycles=int(min(2 * found.launched, 2.0) * _CYCLES_A_SECOND))
            runs = runs[:1]
            continue
        runs.append(found)
    return median_of(runs[1:] or runs)


Variant = tuple[str, str, tuple[Any, ...], tuple[tuple[str, Any], ...]]
"""Module and name of a kernel, its arguments (a torch dtype for a tensor), constants and options."""


@dataclass(frozen=True)
class NotingDevice(Device):
    """A Device that launches nothing, but notes which kernels it was asked for."""

    variants: set[Variant] = field(default_factory=set)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        super().launch(_Noted(kernel, self.variants), grid, *arguments, **constants)


@dataclass(frozen=True)
class _Noted:
    """A kernel's place, where its launches are noted."""

    kernel: Any
    variants: set[Variant]

    @property
    def __name__(self) -> str:
        return str(self.kernel.__name__)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*arguments: Any, **constants: Any) -> None:
            told = tuple(one.dtype if isinstance(one, torch.Tensor) else one for one in arguments)
            module = self.kernel.fn.__module__
            self.variants.add((module, self.kernel.__name__, told, tuple(sorted(constants.items()))))

        return note


def compile_all(variants: Iterable[Variant], n_processes: int) -> tuple[int, list[str]]:
    """Compile kernels in so many processes, into Triton's cache on disk: how many, and what did not compile."""
    wanted = sorted(variants, key=str)
    if not wanted:
        return 0, []
    with ProcessPoolExecutor(min(n_processes, len(wanted)), get_context("spawn")) as pool:
        told = list(pool.map(_compile, wanted))
    return len(wanted), [fault for fault in told if fault]


def _compile(variant: Variant) -> str:
    module, name, arguments, constants = variant
    try:
        kernel = getattr(importlib.import_module(module), name)
        kernel.warmup(*arguments, grid=(1,), **dict(constants))
    except Exception as fault:  # it is compiled again where it is launched, and told there
        return f"{name}: {type(fault).__name__}: {fault}"[:500]
    return ""
