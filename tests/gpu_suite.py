"""All that a borrowed card is needed for, in one call: `python -m tests.gpu_suite OUT [--minutes 9]`.

Runs the tests marked gpu, then the benchmarks, and leaves under OUT: tests.xml (JUnit), the log of everything, and the
benchmarks' results as JSON and Markdown; prints a screen of summary. Standard library only; torch, triton, pytest,
hypothesis and the native module must be there. The hard thing is time: a card is lent for minutes, and a few hundred
kernels take seconds each to compile. So the tests whose kernels are many run side by side, one process a part, those
that need the card to themselves after them, and whatever is late is ended, so that the rest still runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/test_gpu.py"
# Side by side: parity of many kernels. By themselves: what fills the card, or listens to its clock.
APART = ("by_hand", "trained_state", "mixed_trees or odd_sizes or damage", "width_of_programs", "slice")
ALONE = ("not ({})".format(" or ".join(APART)),)
N_PARTS = 16  # of the plans by hand, see test_gpu.py
KERNELS = (
    "tests/test_kernels_encode.py",
    "tests/test_kernels_decode.py",
    "tests/test_kernels_quantize.py",
    "tests/test_kernels_multiply.py",
    "tests/test_device.py",
)


@dataclass
class Job:
    """One process: its command, where it writes, when it must have ended."""

    name: str
    command: list[str]
    log: Path
    seconds: float
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.perf_counter)
    is_late: bool = False

    def start(self) -> None:
        self.began = time.perf_counter()
        paths = [str(ROOT), str(ROOT / "adapters"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> int:
        """Its return code; what is late is ended."""
        assert self.process is not None
        left = self.seconds - (time.perf_counter() - self.began)
        try:
            return self.process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            self.is_late = True
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it began
            return self.process.wait()


def pytest_job(name: str, arguments: Sequence[str], folder: Path, seconds: float) -> Job:
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *arguments]
    return Job(name, [*command, f"--junitxml={folder / f'{name}.xml'}"], folder / f"{name}.log", seconds)


def side_by_side(folder: Path, seconds: float) -> list[Job]:
    """The parity tests in parts, and the tests of the kernels, which run compiled where there is a card."""
    jobs = [
        pytest_job(f"by-hand-{part}", [f"{TESTS}::test_plans_by_hand_give_the_native_bytes[{part}]"], folder, seconds)
        for part in range(N_PARTS)
    ]
    jobs += [pytest_job(f"apart-{i}", [TESTS, "-k", names], folder, seconds) for i, names in enumerate(APART[1:])]
    known = [path for path in KERNELS if (ROOT / path).exists()]
    return jobs + [pytest_job(Path(path).stem, [path], folder, seconds) for path in known]


def run_all(jobs: Sequence[Job], n_at_once: int) -> None:
    """Start so many at a time, and wait for all."""
    waiting = list(jobs)
    running: list[Job] = []
    while waiting or running:
        while waiting and len(running) < n_at_once:
            running.append(waiting.pop(0))
            running[-1].start()
        job = running.pop(0)
        code = job.wait()
        spent = time.perf_counter() - job.began
        print(f"{job.name}: {'late, ended' if job.is_late else f'code {code}'}, {spent:.0f} s", flush=True)


def merged(folder: Path, target: Path) -> tuple[dict[str, int], list[str]]:
    """All JUnit files in one: how many tests passed, failed, skipped; and each failure's name and first line."""
    suites = xml.Element("testsuites")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for path in sorted(folder.glob("*.xml")):
        try:
            root = xml.parse(path).getroot()
        except xml.ParseError:
            continue
        for suite in root.iter("testsuite"):
            suites.append(suite)
            for case in suite.iter("testcase"):
                faults = [child for child in case if child.tag in ("failure", "error")]
                skips = [child for child in case if child.tag == "skipped"]
                counts["failed" if faults else "skipped" if skips else "passed"] += 1
                for fault in faults:
                    text = (fault.get("message") or fault.text or "").strip().split("\n")[0]
                    failures.append(f"{case.get('name')}: {text[:160]}")
    xml.ElementTree(suites).write(target, encoding="unicode")
    return counts, failures


def about() -> str:
    """The machine, in some lines."""
    lines = [f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores"]
    smi = shutil.which("nvidia-smi")
    if smi:
        wanted = "--query-gpu=name,memory.total,driver_version"
        told = subprocess.run([smi, wanted, "--format=csv,noheader"], capture_output=True, text=True)
        lines.append(told.stdout.strip())
    code = "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, torch.version.cuda)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines.append((done.stdout or done.stderr.strip()[-300:]).strip())
    return "\n".join(lines)


def main() -> None:
    """Run everything, leave logs and results, print a screen, and end with 1 if a test failed or was late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=9, help="that all may take")
    parser.add_argument("--sweep", action="store_true", help="benchmark: also widths of programs, precision of tables")
    parser.add_argument("--tests-only", action="store_true", help="no benchmark")
    parser.add_argument("--benchmark-only", action="store_true", help="no tests")
    parser.add_argument("--rehearse", action="store_true", help="few tests and the tiny benchmark: needs no card")
    options = parser.parse_args()
    began, seconds = time.perf_counter(), 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    head = about()
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        share = 1.0 if options.tests_only else 0.6
        if options.rehearse:
            os.environ |= {"TRITON_INTERPRET": "1", "TRICOMP_REHEARSE_GPU": "1"}
            jobs.append(pytest_job("rehearsal", [TESTS, "-k", "tied"], folder, seconds))
            run_all(jobs, 1)
        elif not options.benchmark_only:
            # Each process has a context on the card, of half a gigabyte or so.
            n_at_once = max(1, min(len(os.sched_getaffinity(0)) * 5 // 4, 20))
            jobs += side_by_side(folder, share * 0.75 * seconds)
            run_all(jobs, n_at_once)
            left = share * seconds - (time.perf_counter() - began)
            alone = [pytest_job("alone", [TESTS, "-k", ALONE[0]], folder, max(left, 30))]
            run_all(alone, 1)
            jobs += alone
        if not options.tests_only:
            for name, module, part, more in (
                ("products", "gpu_products", 0.2, []),
                ("benchmark", "gpu", 1.0, ["--sweep"] if options.sweep else []),
            ):
                left = part * (seconds - (time.perf_counter() - began) - 10)
                command = [sys.executable, "-m", f"tests.benchmarks.{module}", "--out", str(options.out), *more]
                command += ["--seconds", f"{max(left - 15, 5):.0f}", *(["--small"] if options.rehearse else [])]
                jobs.append(Job(name, command, folder / f"{name}.log", left))
                run_all(jobs[-1:], 1)
        counts, failures = merged(folder, options.out / "tests.xml")
        with (options.out / "suite.log").open("w") as log:
            log.write(head + "\n")
            for job in jobs:
                log.write(f"\n===== {job.name}\n{job.log.read_text(errors='replace') if job.log.exists() else ''}")
        ends = [
            (job.name, job.log.read_text(errors="replace").strip().split("\n")[-1][:160])
            for job in jobs
            if job.is_late or (job.process is not None and job.process.returncode)
        ]
    pages = sorted(options.out.glob("*gpu*.md"), key=lambda path: path.stat().st_mtime)  # the products' first
    if pages and not options.tests_only:
        text = pages[-1].read_text()
        for title in ("## Verdict", "## Speed", "## The training loop"):
            if title in text:
                print("\n".join(text[text.index(title) :].split("\n## ")[0].split("\n")[:40]))
    print(f"\ntests: {counts}; all took {time.perf_counter() - began:.0f} s; logs and results: {options.out}")
    for failure in failures[:20]:
        print(f"FAILED {failure}")
    for name, last in ends:
        print(f"{name} ended badly: {last}")
    sys.exit(1 if ends or failures else 0)


if __name__ == "__main__":
    main()
