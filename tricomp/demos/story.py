"""The demo's story: a run killed in the middle of a save and resumed, against one left alone.

Starts three training processes and compares what they wrote down. The hard thing is to prove something: the run left
alone saves nothing and restores nothing, the kill is a SIGKILL, and every comparison is of exact bits.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tricomp
from tricomp.demos.comparison import Comparison, Event, all_of, compare, one_of
from tricomp.demos.kill import unfinished_bytes
from tricomp.demos.report import megabytes, table, verdict
from tricomp.demos.training import Options, to_json
from tricomp.errors import InvalidArgument

_KEYFRAME = 4


@dataclass(frozen=True)
class Framework:
    """What trains: its name for people, versions by package, and the module of one training process.

    stream_of: the stream ("weights", "m", "v" or "rest") of a leaf, by its path. rest: what "rest" is called.
    remark: lines on what the comparison shows.
    """

    title: str
    versions: Mapping[str, str]
    module: str
    stream_of: Callable[[str], str]
    rest: str
    remark: str = ""

    def compare(self, alone: list[Event], killed: list[Event], resumed: list[Event]) -> Comparison:
        """What the killed and resumed runs have in common with the uninterrupted one."""
        titles = {"weights": "weights", "m": "first moments", "v": "second moments", "rest": self.rest}
        return compare(alone, killed, resumed, self.stream_of, titles)


def tell(
    framework: Framework,
    *,
    steps: int | None = None,
    every: int | None = None,
    directory: str | None = None,
    as_json: bool = False,
    is_quick: bool = False,
) -> int:
    """Run the demo and print what it found. Returns 0 only if the resumed run equals the uninterrupted one bit for bit.

    directory: kept afterwards, must be empty or new; None: a temporary one. Raises InvalidArgument.
    """
    steps = (10 if is_quick else 40) if steps is None else steps
    every = (2 if is_quick else 5) if every is None else every
    if not hasattr(signal, "SIGKILL"):
        return _failed("it kills a process with SIGKILL, which this system does not have; run it on Linux or macOS")
    if every < 1 or steps < 4 * every:
        raise InvalidArgument(f"--steps {steps} --every {every}: give at least 4 saves, that is --steps {4 * every}.")
    if directory is not None:
        folder = Path(directory)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidArgument(f"--dir {directory}: expected a new or empty folder. Choose another.")
        folder.mkdir(parents=True, exist_ok=True)
        return _run(framework, folder, steps, every, as_json, is_quick, is_kept=True)
    with tempfile.TemporaryDirectory(prefix="tricomp-demo-") as name:
        return _run(framework, Path(name), steps, every, as_json, is_quick, is_kept=False)


def _run(
    framework: Framework, folder: Path, n_steps: int, n_between: int, as_json: bool, is_quick: bool, is_kept: bool
) -> int:
    started = time.perf_counter()
    store = str(folder / "store")
    kill_step = (n_steps * 6 // 10) // n_between * n_between
    say = _silent if as_json else _say

    def child(name: str, store: str = "", kill_step: int = 0) -> tuple[int, list[Event]]:
        log = folder / f"{name}.jsonl"
        options = Options(str(log), n_steps, store, n_between, _KEYFRAME, kill_step, is_quick)
        command = [sys.executable, "-P", "-m", framework.module, to_json(options)]
        code = subprocess.run(command, check=False).returncode
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return code, [json.loads(line) for line in lines]

    say(f"tricomp {tricomp.__version__} demo: {framework.title}, {os.cpu_count()} CPU cores\n")
    say(f"1  Train a GPT for {n_steps} steps, uninterrupted and without tricomp.")
    code, alone = child("uninterrupted")
    if code != 0:
        return _failed(f"the uninterrupted run ended with exit code {code}")
    model = one_of(alone, "model")
    text_size = megabytes(model["n_text_bytes"])
    say(f"     {model['n_parameters']:,} parameters, AdamW, on {text_size} of Python's own sources")
    losses = {event["step"]: event["loss"] for event in all_of(alone, "loss")}
    say(f"     loss {float.fromhex(losses[1]):.4f} -> {float.fromhex(losses[n_steps]):.4f}")

    say(f"2  The same again, saving every {n_between} steps; SIGKILL in the middle of saving step {kill_step}.")
    code, killed = child("killed", store, kill_step)
    if code != -signal.SIGKILL:
        return _failed(f"the run to be killed ended with exit code {code}, not by SIGKILL")
    n_left = unfinished_bytes(store)
    latest = tricomp.Store(store).latest()
    say(f"     killed; {megabytes(n_left)} of an unfinished file left behind; the store's last step is {latest}")
    if latest != kill_step - n_between:
        return _failed(f"expected the last committed step to be {kill_step - n_between}")

    say(f"3  Start a new process on that store and train on to step {n_steps}.")
    code, resumed = child("resumed", store)
    if code != 0:
        return _failed(f"the resumed run ended with exit code {code}")
    restore = one_of(resumed, "restore")
    say(f"     restored step {restore['step']} in {restore['seconds']:.2f} s")

    comparison = framework.compare(alone, killed, resumed)
    result = {
        "tricomp": tricomp.__version__,
        **framework.versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "n_cores": os.cpu_count(),
        "n_parameters": model["n_parameters"],
        "n_steps": n_steps,
        "every": n_between,
        "kill_step": kill_step,
        "unfinished_bytes": n_left,
        "restored_step": restore["step"],
        "restore_seconds": restore["seconds"],
        "is_equal": comparison.is_equal,
        "compared": comparison.rows,
        "differing": comparison.differing,
        "saves": all_of(killed + resumed, "save"),
        "loads": all_of(resumed, "load"),
        "seconds": time.perf_counter() - started,
    }
    if as_json:
        print(json.dumps(result, indent=1))
    say("\nAgainst the uninterrupted run, bit for bit:")
    say(verdict(comparison.rows, comparison.differing))
    if framework.remark and comparison.is_equal:
        say(framework.remark)
    say("\n" + table(result["saves"], result["loads"]))
    if is_kept:
        say(f"\nThe checkpoints are in {store}.")
    say(f"\n{result['seconds']:.0f} s in all.")
    return 0 if comparison.is_equal else 1


def _failed(reason: str) -> int:
    print(f"tricomp demo: {reason}", file=sys.stderr)
    return 1


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass
