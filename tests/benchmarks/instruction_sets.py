"""The same work by every instruction set, and by the reference: one worker process each, taking turns.

Imports timing, worker and peers. The hard thing: all must pack the very same bytes, or there is no speed to compare.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.timing import TIERS, Work, gigabytes_per_second, shuffled
from tests.benchmarks.worker import backend

ROOT = Path(__file__).resolve().parents[2]
SETS = ("avx512", "avx2", "portable")


class Worker:
    """A process with a backend of its own. about: what it says it is; empty if it could not start so."""

    def __init__(self, environment: dict[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("TRICOMP_ISA", "TRICOMP_BACKEND")}
        command = [sys.executable, "-m", "tests.benchmarks.worker"]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, cwd=ROOT, env={**kept, **environment}, stdin=pipe, stdout=pipe)
        self.about: dict[str, Any] = {}

    def hello(self) -> dict[str, Any]:
        """Wait until it is there."""
        try:
            self.about = self._answer()
        except EOFError:
            self.about = {}
        return self.about

    def ask(self, *question: Any) -> Any:
        """Its answer to a question; see worker."""
        assert self.child.stdin is not None
        pickle.dump(question, self.child.stdin, protocol=5)
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        return pickle.load(self.child.stdout)

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


@contextmanager
def _workers() -> Iterator[dict[str, Worker]]:
    """Every instruction set that this machine has, by name, and the reference."""
    has_native = backend()["backend"] == "native"
    wanted = {"reference": {"TRICOMP_BACKEND": "reference"}}
    wanted |= {name: {"TRICOMP_ISA": name, "TRICOMP_BACKEND": "native"} for name in SETS if has_native}
    with ExitStack() as stack:
        started = {name: Worker(environment) for name, environment in wanted.items()}
        for worker in started.values():
            stack.callback(worker.close)
        found = {name: worker for name, worker in started.items() if worker.hello()}
        for name in [name for name in found if name in SETS and found[name].about["isa"] != name]:
            del found[name]
        for name in started.keys() - found.keys():
            peers.log(f"instruction sets: no {name} here")
        yield found


def measure(works: Sequence[Work], n_runs: int, n_reference_runs: int) -> list[dict[str, Any]]:
    """One row a Work: GB/s in and out by tier and instruction set, one thread, median; the reference in fewer runs."""
    rows = []
    with _workers() as workers:
        for work in works:
            row: dict[str, Any] = {"work": work.name, "raw": work.n_bytes, "results": []}
            for worker in workers.values():
                worker.ask("work", work, 1)
            for tier in TIERS:
                row["results"] += _measure_tier(work, tier, workers, n_runs, n_reference_runs)
            rows.append(row)
            peers.log(str(row))
    return rows


def _measure_tier(
    work: Work, tier: str, workers: dict[str, Worker], n_runs: int, n_reference_runs: int
) -> list[dict[str, Any]]:
    proofs = {name: worker.ask("prove", tier) for name, worker in workers.items()}
    for name, proof in proofs.items():
        peers.require(proof["is_exact"], f"tricomp {tier}, {work.name}, {name}")
    if len({proof["hash"] for proof in proofs.values()}) > 1:
        raise SystemExit(f"tricomp {tier}, {work.name}: other bytes in one of {', '.join(proofs)}; no number is kept")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for turn in range(n_runs):
        for name in shuffled(list(workers), turn):
            if name != "reference" or turn < n_reference_runs:
                seconds[name].append(workers[name].ask("turn", tier))
    return [
        {
            "isa": name,
            "tier": tier,
            **{way: gigabytes_per_second(work.n_bytes, runs) for way, runs in zip(("in", "out"), zip(*pairs))},
        }
        for name, pairs in seconds.items()
    ]
