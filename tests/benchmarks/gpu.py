"""GB/s on a GPU beside a copy and nvCOMP, and how long saves hold training: `python -m tests.benchmarks.gpu`.

Imports torch and tricomp. Trains a GPT on the device first. A speed is recorded only of what came back bit for bit.
The hard thing is time: a borrowed card is there for minutes, and every kind of frame is a kernel to compile. So all
kernels are noted first and compiled in as many processes as there are cores, whatever is measured has its share of
--seconds, and results are written after each part, so that a run that is cut leaves what it has.
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tests.benchmarks import facts, gpu_loop, gpu_peers, gpu_table, gpu_training, gpu_works
from tests.benchmarks.facts import log
from tests.benchmarks.gpu_device import NotingDevice, TimedDevice, compile_all, timed
from tests.benchmarks.gpu_works import Packed, Work
from tricomp.codec import Engine
from tricomp.job import EncodeJob
from tricomp.kernels.decode import decode as decode_there
from tricomp.kernels.device import IS_INTERPRETED
from tricomp.kernels.encode import encode as encode_there
from tricomp.plan import Spec

PACKAGES = ("numpy", "torch", "triton", "nvidia-nvcomp-cu12", "nvidia-nvcomp-cu13")
TIERS: tuple[Literal["dense", "fast"], ...] = ("dense", "fast")
WIDTHS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 4), (16, 8))  # chunks a program, warps
PROB_BITS = (9, 10, 11)
GB = 10**9


@dataclass(frozen=True)
class Scale:
    """How much of everything. steps: as many as the GPT is trained, and those kept. widths, prob_bits: of the sweep."""

    is_small: bool
    tiers: tuple[Literal["dense", "fast"], ...]
    n_runs: int
    chunk_log2: int
    least_words: int
    most_words: int
    copy_bytes: int
    names: tuple[str, ...]
    widths: tuple[tuple[int, int], ...]
    prob_bits: tuple[int, ...]


FULL = Scale(False, TIERS, 5, 16, gpu_works.SMALL_WORDS, 1 << 62, 2 << 30, (), WIDTHS, PROB_BITS)
# Whole chunks of a few rows in leaves of a size: the interpreter takes a second or so for each kernel that is launched.
SMALL = Scale(True, TIERS[1:], 0, 10, 3000, 5000, 1 << 20, ("w bfloat16, 10 apart",), ((4, 1),), (10,))
SWEPT = ("w bfloat16", "w float32", "v float32", "w bfloat16, 10 apart", "v float32, 10 apart")


class Benchmark:
    """One run of everything on one device; what is found is in results, and written after each part."""

    def __init__(self, device: torch.device, scale: Scale, out: Path, seconds: float) -> None:
        self.device, self.scale, self.out = device, scale, out
        self.began, self.seconds = time.perf_counter(), seconds
        self.results: dict[str, Any] = {"benchmark": "gpu", **facts.machine(PACKAGES)}
        self.results["machine"]["gpu"] = _name_of(device)
        self.results |= {"runs": scale.n_runs, "nvcomp": gpu_peers.nvcomp_version(), "works": [], "sweep": []}

    @property
    def reserve(self) -> float:
        """Seconds that are kept for the training loop."""
        return 0.25 * self.seconds

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def engine(self) -> Engine:
        """A new one each time: it follows what its device has been given."""
        return Engine(backend="triton", device=self.device)

    def spec(self, tier: Literal["dense", "fast"]) -> Spec:
        return Spec(tier=tier, chunk_log2=self.scale.chunk_log2)

    def on(self, width: tuple[int, int] | None = None) -> TimedDevice:
        """The device that is timed, its stream after all that was launched."""
        device = TimedDevice(self.device)
        if width is not None:
            device = TimedDevice(self.device, chunks_a_program=width[0], warps=width[1])
        return device.after_current()  # type: ignore[return-value]

    def write(self) -> Path:
        self.results["seconds"] = round(time.perf_counter() - self.began)
        return facts.write(self.results, gpu_table.report(self.results), self.out, self.scale.is_small)

    def train(self) -> gpu_training.Kept:
        """A GPT as large as makes streams that fill the device, at steps that are 1, 10 and more apart."""
        if self.scale.is_small:
            found = gpu_training.kept(gpu_training.TINY, self.device, 60, log=log)
        else:
            most = min(0.03 * torch.cuda.get_device_properties(self.device).total_memory, 2.5 * GB)
            run = gpu_training.largest(most, (200, 201, 210, 300))
            kinds = {200: "wv", 201: "w", 210: "wv", 300: "wmv"}
            found = gpu_training.kept(run, self.device, 0.12 * self.seconds, kinds.__getitem__, log)
        self.results["data"] = [found.about]
        return found

    def chosen(self, kept: gpu_training.Kept) -> Iterable[Work]:
        names = self.scale.names
        return (
            w
            for w in gpu_works.works(kept, self.scale.least_words, self.scale.most_words)
            if not names or w.name in names
        )

    def measure_copies(self) -> None:
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 8 * self.scale.copy_bytes
        self.results["rates"] = gpu_peers.copy_rates(
            self.device, min(self.scale.copy_bytes, free // 8), self.scale.n_runs
        )
        log(f"copies: {self.results['rates']}")

    def compile(self, note: Callable[[NotingDevice], None]) -> None:
        """Compile what note launches, in processes."""
        if self.device.type != "cuda":
            return
        device = NotingDevice(self.device).after_current()
        assert isinstance(device, NotingDevice)
        note(device)
        began = time.perf_counter()
        n, faults = compile_all(device.variants, _n_processes())
        log(f"compiled {n} kernels in {time.perf_counter() - began:.0f} s; {len(faults)} failed {faults[:3]}")
        self.results.setdefault("compiled", []).append(
            {"n": n, "seconds": round(time.perf_counter() - began), "faults": faults}
        )

    def measure_works(self, kept: gpu_training.Kept) -> None:
        """Every stream in every mode and tier: the device alone, all of the codec, and nvCOMP."""
        plans: dict[tuple[str, str], list[EncodeJob]] = {}
        for work in self.chosen(kept):
            for tier in self.scale.tiers:
                plans[work.name, tier] = gpu_works.planned(work, self.spec(tier), self.engine())
            log(f"planned {work.name}")
            # Words are made again for each work: here plans alone are kept.
            plans.update({key: _light(jobs) for key, jobs in plans.items() if key[0] == work.name})
        self.compile(lambda device: self._note_encoding(kept, plans, device))
        self.compile(lambda device: self._note_decoding(kept, plans, device))
        for work in self.chosen(kept):
            if self.left < self.reserve:
                log(f"no time left for {work.name}")
                break
            self.results["works"].append(self._work(work, plans))
            log(str(self.results["works"][-1]))
            self.write()

    def _note_encoding(
        self, kept: gpu_training.Kept, plans: dict[tuple[str, str], list[EncodeJob]], device: NotingDevice
    ) -> None:
        for work in self.chosen(kept):
            for tier in self.scale.tiers:
                jobs = gpu_works.one_of_each(_heavy(plans[work.name, tier], work, self.engine()))
                gpu_works.note_encoding(jobs, device)

    def _note_decoding(
        self, kept: gpu_training.Kept, plans: dict[tuple[str, str], list[EncodeJob]], device: NotingDevice
    ) -> None:
        for work in self.chosen(kept):
            for tier in self.scale.tiers:
                jobs = gpu_works.one_of_each(_heavy(plans[work.name, tier], work, self.engine()))
                gpu_works.note_decoding(gpu_works.packed(jobs, self.engine()), device)

    def _work(self, work: Work, plans: dict[tuple[str, str], list[EncodeJob]]) -> dict[str, Any]:
        row: dict[str, Any] = {"work": work.name, "dtype": work.dtype, "mode": work.mode, "raw": work.n_bytes}
        row |= {"n_leaves": len(work.leaves), "tiers": {}}
        for tier in self.scale.tiers:
            jobs = _heavy(plans[work.name, tier], work, self.engine())
            found = gpu_works.packed(jobs, self.engine())
            waiting, targets = gpu_works.decode_jobs(found)
            device = self.on()
            with device.running():
                decode_there(waiting, device).result()
            device.told()
            facts.require(gpu_works.is_exact(work, targets), f"{work.name}, {tier}, on the device")
            del waiting, targets
            one = gpu_works.measure_device(work, found, device, self.scale.n_runs)
            one["bytes"] = found.n_bytes
            one["plan"] = max(zip(found.frames, found.data), key=lambda pair: len(pair[1]))[0].plan.describe()
            whole, exact = gpu_works.measure_whole(
                work, self.spec(tier), self.engine, self.device, min(self.scale.n_runs, 5)
            )
            facts.require(exact, f"{work.name}, {tier}, all of the codec")
            row["tiers"][tier] = {**one, "whole": whole}
        if self.results["nvcomp"] and work.mode not in ("copy",):
            row["nvcomp"] = gpu_peers.nvcomp_rows(*work.joined(), self.device, min(self.scale.n_runs, 5))
        return row

    def sweep(self, kept: gpu_training.Kept, seconds: float) -> None:
        """Chunks a program x warps, at the codec's precision; then other precisions at the best of these."""
        ends = time.perf_counter() + seconds
        wanted = self.scale.names[:1] or SWEPT
        works = [work for work in self.chosen(kept) if work.name in wanted]
        packs: dict[tuple[str, str], tuple[Work, Packed]] = {}
        for work in works:
            for tier in self.scale.tiers if work.name == SWEPT[0] else self.scale.tiers[:1]:
                jobs = gpu_works.planned(work, self.spec(tier), self.engine())
                packs[work.name, tier] = work, gpu_works.packed(jobs, self.engine())

        def note(device: NotingDevice) -> None:
            for width in self.scale.widths:
                at = NotingDevice(self.device, *width, stream=device.stream, variants=device.variants)
                for _, found in packs.values():
                    gpu_works.note_encoding(found.jobs, at)
                    gpu_works.note_decoding(found, at)

        self.compile(note)
        for (name, level), (work, found) in packs.items():
            rows = []
            for width in self.scale.widths:
                if time.perf_counter() < ends:
                    rows.append(self._swept(work, found, level, width, None))
            for bits in self.scale.prob_bits if rows and (level == "dense" or self.scale.is_small) else ():
                best = max(rows, key=lambda row: row["in"] + row["out"])
                jobs = [other for job in found.jobs if (other := gpu_works.with_prob_bits(job, bits)) is not None]
                if time.perf_counter() < ends and len(jobs) == len(found.jobs):
                    again = gpu_works.packed(jobs, self.engine())
                    rows.append(self._swept(work, again, level, (best["chunks"], best["warps"]), bits))
            self.results["sweep"] += rows
            log(f"swept {name}, {level}")
            self.write()

    def _swept(
        self, work: Work, found: Packed, tier: str, width: tuple[int, int], prob_bits: int | None
    ) -> dict[str, Any]:
        """One point: exact first, then timed, few runs."""
        row: dict[str, Any] = {"work": work.name, "tier": tier, "chunks": width[0], "warps": width[1]}
        row |= {"prob_bits": prob_bits or found.jobs[0].plan.prob_bits, "bytes": found.n_bytes, "raw": work.n_bytes}
        device = self.on(width)
        jobs = gpu_works.far_jobs(found.jobs)
        with device.running():
            coded = encode_there(jobs, device).result()
        whole = [data[len(data) - len(one.payload) :] for data, one in zip(found.data, coded, strict=True)]
        facts.require(all(bytes(c.payload) == w for c, w in zip(coded, whole)), f"{work.name} at {width}")
        waiting, targets = gpu_works.decode_jobs(found)
        with device.running():
            decode_there(waiting, device).result()
        facts.require(gpu_works.is_exact(work, targets), f"{work.name} at {width}")
        device.told()
        n_runs = min(self.scale.n_runs, 5)
        spent_in, _ = timed(device, lambda on: encode_there(jobs, on), n_runs)
        spent_out, _ = timed(device, lambda on: decode_there(waiting, on), n_runs)
        return {**row, "in": work.n_bytes / GB / spent_in, "out": work.n_bytes / GB / spent_out}

    def hold(self, folder: Path, seconds: float, most_bytes: float) -> None:
        """Train the largest GPT that fits, and save it in every way."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
            # State, gradients, a snapshot, the step before, what encoding waits in, activations; and two files and
            # their staging on the host.
            host = min(_host_bytes(), _free_bytes(folder)) / 3.5
            run = gpu_training.largest(min(free / 5, host, most_bytes), batch=8)
        else:
            run = gpu_training.TINY
        training = gpu_training.Training(run, self.device)
        self.results["held"] = gpu_loop.measure(
            training, folder, 0 if self.scale.is_small else seconds, self.scale.n_runs
        )
        self.write()


def _light(jobs: Sequence[EncodeJob]) -> list[EncodeJob]:
    """Plans without words."""
    nothing: Any = None
    return [replace(job, words=nothing, reference=nothing) for job in jobs]


def _heavy(jobs: Sequence[EncodeJob], work: Work, engine: Engine) -> list[EncodeJob]:
    """Plans with words again."""
    found = []
    for job, (name, tensor) in zip(jobs, work.leaves.items(), strict=True):
        old: Any = None
        if job.plan.reference == "parent" and work.old is not None:
            old = engine.adopted(gpu_works.words_of(work.old[name]))
        found.append(replace(job, words=engine.adopted(gpu_works.words_of(tensor)), reference=old))
    return found


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _n_processes() -> int:
    """Processes to compile in: each has a context of its own on the device."""
    return max(1, min(len(os.sched_getaffinity(0)), 16))


def _host_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_bytes(folder: Path) -> int:
    place = os.statvfs(folder.parent)
    return place.f_bavail * place.f_frsize


def run(options: argparse.Namespace, device: torch.device) -> Path:
    """Everything asked for, in order of its worth. Returns the results file."""
    one = Benchmark(device, SMALL if options.small else FULL, options.out, options.seconds)
    folder = options.files / f"tricomp-benchmark-{secrets.token_hex(4)}"
    one.measure_copies()
    kept = one.train()
    one.measure_works(kept)
    if options.sweep:
        one.sweep(kept, max(one.left - one.reserve, 0))
    del kept
    one.hold(folder, max(one.left - 40, 0), options.held_gigabytes * GB)
    return one.write()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--small", action="store_true", help="a tiny model: checks the benchmark, not the codec")
    found.add_argument("--out", type=Path, default=facts.RESULTS, help="folder for the results")
    found.add_argument("--seconds", type=float, default=540, help="about as long as it may take")
    found.add_argument("--sweep", action="store_true", help="also chunks a program x warps x precision of tables")
    found.add_argument("--held-gigabytes", type=float, default=20, help="most state of the model that is saved")
    memory = Path("/dev/shm")
    scratch = memory if memory.is_dir() else Path(tempfile.gettempdir())
    found.add_argument("--files", type=Path, default=scratch, help="where checkpoints go: best in memory")
    return found


def main() -> None:
    """Measure, write <gpu>-<date>-gpu.json and .md, print the page."""
    options = parser().parse_args()
    if not torch.cuda.is_available() and not (options.small and IS_INTERPRETED):
        raise SystemExit("torch sees no GPU. With --small and TRITON_INTERPRET=1 it runs on the CPU, to check itself.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not IS_INTERPRETED else torch.device("cpu")
    path = run(options, device)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
