"""What a save costs a training loop, and what it leaves on the disk: `python -m tests.benchmarks.stall`.

torch.save, safetensors, torch's distributed checkpoints with and without zstd, and tricomp's Checkpointer and dcp save
the same run of the benchmarks' GPT. Imports the modules beside it. The hard thing is to be fair: everybody has a
process of his own that trains the same run, bit for bit, and they take turns in another order each time, so that noise
hits them alike. Each save is read back here, in another process, and compared bit for bit before the next one begins.
Besides the real disk there are set ones, see slow_disk.c. About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.benchmarks import facts, slow_disk, stall_plot, stall_table, stall_training, training
from tests.benchmarks.stall_loop import quieten, serve
from tests.benchmarks.stall_savers import SAVERS, Saver, available, saver_of
from tests.benchmarks.timing import n_cores, shuffled

PACKAGES = ("numpy", "torch", "safetensors", "zstandard")
SPEEDS = (1e9, 0.5e9, 0.2e9)  # bytes a second, of set disks
_DIFFERS = "training itself, which differs from process to process:"


class Contestant:
    """A process that trains and saves in one way. given: to its `serve`, beside the name. begun: its first digest."""

    def __init__(self, processes: Any, who: str, *given: Any) -> None:
        self.who = who
        self.turns: list[dict[str, Any]] = []
        self._end, end = processes.Pipe()
        self._process = processes.Process(target=serve, args=(end, who, *given))
        self._process.start()
        end.close()
        self.begun = self.answer()  # before the next one begins, so that they do not train all at once

    def answer(self) -> Any:
        """What the process says. Ends the benchmark if it says nothing any more."""
        try:
            return self._end.recv()
        except EOFError:
            raise SystemExit(f"{self.who}: its process has ended; no number is recorded") from None

    def turn(self, number: int, speed: float | None) -> dict[str, Any]:
        """Let it save and train on; what it measured."""
        self._end.send((number, speed))
        self.turns.append(self.answer())
        return self.turns[-1]

    @property
    def step(self) -> float:
        """Seconds of a step with no save beside it, the median."""
        return round(statistics.median(second for turn in self.turns for second in turn["quiet"]), 5)

    def close(self) -> None:
        """Let the process end."""
        with suppress(OSError):
            self._end.send(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()


class Judge:
    """Reads back what the processes saved, into a state of its own that is spoilt each time."""

    def __init__(self, run: training.Run, folder: Path) -> None:
        self._training = stall_training.begin(run, folder)
        self._folder = folder
        self._savers: dict[str, Saver] = {}

    def require(self, who: str, number: int, digest: str) -> None:
        """End the benchmark unless a save comes back bit for bit. What no later one needs is then removed."""
        saver = self._savers.setdefault(who, saver_of(who, self._folder))
        self._training.poison()
        saver.restore(number, self._training)
        facts.require(self._training.digest() == digest, f"{who}, save {number}")
        if not saver.is_chained:
            place = saver.at(number)
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def measure(
    run: training.Run, folder: Path, whos: list[str], n_cycles: int, n_between: int, threads: int
) -> dict[str, Any]:
    """Turns of everybody: the real disk and the set ones, one after the other."""
    library = slow_disk.build(folder)
    if library is None:
        facts.log("no C compiler, or not Linux: there are no set disks")
    speeds = SPEEDS if library else ()
    plan = [kind for _ in range(n_cycles) for speed in SPEEDS for kind in (None, speed if library else None)]
    with contestants(whos, library, run, folder, n_between, threads) as everybody:
        facts.require(len({one.begun for one in everybody}) == 1, _DIFFERS)
        judge = Judge(run, folder)
        for number, speed in enumerate(plan, 1):
            digests = set()
            for one in shuffled(everybody, number):
                turn = one.turn(number, speed)
                judge.require(one.who, number, turn["digest"])
                digests.add(turn["digest"])
                facts.log(
                    f"{number}, {'real disk' if speed is None else f'{speed / 1e9:.1f} GB/s'}: {one.who}: held "
                    f"{turn['held']:.3f} s, durable {turn['durable']:.3f} s, {turn['written'] / 1e6:.1f} MB; a copy "
                    f"{turn['copy_kept']:.3f} s"
                )
            facts.require(len(digests) == 1, _DIFFERS)
    tensors = stall_training.begin(run, folder).tensors()
    return {
        "state_bytes": sum(tensor.nbytes for tensor in tensors),
        "n_tensors": len(tensors),
        "n_saves": len(plan),
        "steps_between": n_between,
        "speeds": list(speeds),
        "rows": [
            {"who": one.who, "step": one.step, "turns": [_short(turn) for turn in one.turns]} for one in everybody
        ],
    }


@contextmanager
def contestants(whos: list[str], library: Path | None, *given: Any) -> Iterator[list[Contestant]]:
    """A process for each name, all with the library of slow_disk, if there is one; they are ended at the end."""
    processes = multiprocessing.get_context("forkserver" if sys.platform.startswith("linux") else "spawn")
    processes.set_forkserver_preload(["tests.benchmarks.stall_loop"])  # torch is imported once
    made: list[Contestant] = []
    before = os.environ.get("LD_PRELOAD")
    try:
        if library is not None:
            os.environ["LD_PRELOAD"] = str(library) if before is None else f"{library}:{before}"
        for who in whos:
            made.append(Contestant(processes, who, *given))
        yield made
    finally:
        os.environ.pop("LD_PRELOAD", None)
        if before is not None:
            os.environ["LD_PRELOAD"] = before
        for one in made:
            one.close()


def _short(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn for the results file: without what is put together elsewhere, and times in few digits."""
    wanted = {key: value for key, value in turn.items() if key not in ("digest", "quiet")}
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in wanted.items()}


def main() -> None:
    """Train or find the state, measure, write <machine>-<date>-stall.json, .md and .svg, print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: checks the benchmark, not the savers")
    parser.add_argument("--cycles", type=int, default=2, help="of six saves, three of them to set disks")
    parser.add_argument("--between", type=int, default=3, help="steps from one save to the next")
    parser.add_argument("--threads", type=int, default=n_cores(), help="to train with")
    parser.add_argument("--only", nargs="+", default=available(), choices=SAVERS, metavar="NAME", help="who saves")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to save to")
    parser.add_argument("--out", type=Path, default=facts.RESULTS, help="folder for the results")
    options = parser.parse_args()
    quieten()
    run = training.GPT_SMALL if options.small else training.STALL
    about, states = training.states(run, options.state, facts.log)
    folder, load = Path(tempfile.mkdtemp(prefix="tricomp-stall-", dir=options.folder)), os.getloadavg()[0]
    try:
        stall_training.leave(run, states[run.steps[-1]], folder)
        saves = measure(run, folder, options.only, options.cycles, options.between, options.threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results: dict[str, Any] = {"benchmark": "stall", **facts.machine(PACKAGES), "data": [about]}
    results |= {"load": [load, os.getloadavg()[0]], "saves": saves}
    page = stall_table.report(results)
    path = facts.write(results, page, options.out, options.small)
    stall_plot.draw(results, path.with_suffix(".svg"))
    print(page)


if __name__ == "__main__":
    main()
