"""How long a save holds a JAX training loop: `python -m tests.benchmarks.jax_hook`. CheckpointHook beside its peers.

Imports the public names of tricomp_jax, Flax, Orbax, and the training beside it. Trains the Flax GPT first (cached in
--state, shared with the ratio benchmark). The hard thing is to be fair: everybody saves the same states in turns, each
in arrays of its own that are donated to a computation as soon as the call returns, nobody's writing goes on while
another is measured, and a time counts only if every state came back bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tricomp_jax
import xxhash
from flax.training import checkpoints

import tricomp
from tests.benchmarks import facts, training, training_jax
from tests.benchmarks.timing import shuffled
from tricomp.host_memory import HostBuffer

PACKAGES = ("numpy", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore")
STEPS_BETWEEN = 2
_jax: Any = jax  # some of its functions have no types


@dataclass
class Saver:
    """One way to save. begin: is what the loop waits for. finish: waits until the step is in its files."""

    who: str
    begin: Callable[[int, Any], Any]
    finish: Callable[[], Any]
    restore: Callable[[int, Any], Any]
    folder: Path
    held: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


def savers(folder: Path) -> Iterator[Saver]:
    """Everybody, each in a folder of its own."""
    hook: Any = tricomp_jax.CheckpointHook(str(folder / "hook"), keyframe=tricomp.KeyframeEvery(1000))
    yield Saver("CheckpointHook", hook, hook.wait, lambda n, like: hook.restore(n, like).state, folder / "hook")
    alone: Any = tricomp_jax.CheckpointHook(str(folder / "alone"), keyframe=tricomp.KeyframeEvery(1))
    name = "CheckpointHook, every step alone"
    yield Saver(name, alone, alone.wait, lambda n, like: alone.restore(n, like).state, folder / "alone")

    store = tricomp.Store(str(folder / "sync"), keyframe=tricomp.KeyframeEvery(1000))
    yield Saver(
        "Store.save, not behind",
        lambda n, state: store.save(n, tricomp_jax.flatten(state).tree),
        lambda: None,
        lambda n, like: tricomp_jax.unflatten(tricomp_jax.Flat(store.load(n)), like),
        folder / "sync",
    )
    manager: Any = ocp.CheckpointManager(folder / "orbax", options=ocp.CheckpointManagerOptions())
    yield Saver(
        "Orbax CheckpointManager, async",
        lambda n, state: manager.save(n, args=ocp.args.StandardSave(state)),
        manager.wait_until_finished,
        lambda n, like: manager.restore(n, args=ocp.args.StandardRestore(like)),
        folder / "orbax",
    )
    legacy: Any = checkpoints
    behind = legacy.AsyncManager()
    for name, among in (("flax save_checkpoint", None), ("flax save_checkpoint, AsyncManager", behind)):
        place = folder / ("flax" if among is None else "flax-async")
        yield Saver(
            name,
            partial(_flax_save, legacy, place, among),
            partial(_flax_finish, among),
            partial(_flax_restore, legacy, place),
            place,
        )


def _flax_save(legacy: Any, place: Path, among: Any, n: int, state: Any) -> None:
    legacy.save_checkpoint(str(place), state, n, keep=1000, async_manager=among)


def _flax_finish(among: Any) -> None:
    if among is not None:
        among.save_future.result()


def _flax_restore(legacy: Any, place: Path, n: int, like: Any) -> Any:
    return legacy.restore_checkpoint(str(place), like, step=n)


@partial(jax.jit, donate_argnums=0)
def _spoilt(state: Any) -> Any:
    """Something else in the memory of a state."""
    return jax.tree.map(lambda array: array * 0 + 1, state)


def _digest(state: Any) -> str:
    found = xxhash.xxh3_128()
    for leaf in jax.tree.leaves(state):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save(saver: Saver, n: int, state: Any) -> None:
    """One save, timed; what it is given is written over as soon as it returns."""
    own = _jax.block_until_ready(jax.tree.map(jnp.copy, state))
    before = _size(saver.folder)
    gc.collect()
    began = time.perf_counter()
    saver.begin(n, own)
    saver.held.append(time.perf_counter() - began)
    own = _spoilt(own)
    saver.finish()
    saver.done.append(time.perf_counter() - began)
    saver.written.append(_size(saver.folder) - before)


class Copies:
    """What copying the state takes, to be compared with."""

    def __init__(self, state: Any) -> None:
        self._kept = [np.array(leaf) for leaf in jax.tree.leaves(state)]
        self._buffer = HostBuffer()
        self.seconds: dict[str, list[float]] = {}

    def measure(self, state: Any) -> None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        self._time("fresh", lambda: [np.copy(leaf) for leaf in leaves])
        self._time("kept", lambda: list(map(np.copyto, self._kept, leaves)))
        self._time("as the hook", lambda: self._buffer.copies(leaves))

    def _time(self, what: str, call: Callable[[], Any]) -> None:
        began = time.perf_counter()
        made = call()
        self.seconds.setdefault(what, []).append(time.perf_counter() - began)
        del made


def measure(run: training.Run, arrays: dict[str, Any], folder: Path, n_rounds: int) -> dict[str, Any]:
    """Train, and let everybody save each of n_rounds states, a few steps apart."""
    text = b"\n".join(text for _, text in training.library_sources())
    tokens = training.tokens_of(text, run.vocabulary).astype(np.int32)
    rng, state = np.random.default_rng(1), training_jax.begin(run)
    state = training_jax.with_arrays(state, arrays)
    everybody, digests, copies = list(savers(folder)), {}, Copies(state)
    for n in range(1, n_rounds + 1):
        for _ in range(STEPS_BETWEEN):
            starts = rng.integers(len(tokens) - run.context - 1, size=run.batch)
            state, loss = training_jax.step(state, tokens[starts[:, None] + np.arange(run.context + 1)])
        _jax.block_until_ready(state)
        digests[n] = _digest(state)
        copies.measure(state)
        for saver in shuffled(everybody, n):
            _save(saver, n, state)
            facts.log(f"{n}: {saver.who}: {saver.held[-1]:.3f} s held, {saver.done[-1]:.3f} s until done")
        facts.log(f"{n}: loss {float(loss):.3f}; copies: { {k: round(v[-1], 4) for k, v in copies.seconds.items()} }")
    like = jax.tree.map(jnp.zeros_like, state)
    for saver in everybody:
        for n, digest in digests.items():
            facts.require(_digest(saver.restore(n, like)) == digest, f"{saver.who}, step {n}")
    return {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "n_leaves": len(jax.tree.leaves(state)),
        "n_rounds": n_rounds,
        "steps_between": STEPS_BETWEEN,
        "copy": {what: [round(one, 5) for one in found] for what, found in copies.seconds.items()},
        "rows": [
            {
                "who": saver.who,
                "held": [round(one, 5) for one in saver.held],
                "done": [round(one, 4) for one in saver.done],
                "written": saver.written,
            }
            for saver in everybody
        ],
    }


def report(results: dict[str, Any]) -> str:
    """What was measured, as one Markdown page. Medians are of all rounds but the first."""
    machine, data, found = results["machine"], results["data"][0], results["saves"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    copy = {what: statistics.median(seconds[1:]) for what, seconds in found["copy"].items()}
    lines = [
        "| | loop held, ms | in copies to kept memory | in fresh copies | first save, ms | in its files after, ms "
        "| MB, first | MB, later |",
        "|---|" + "---:|" * 7,
    ]
    for row in found["rows"]:
        held, done = statistics.median(row["held"][1:]), statistics.median(row["done"][1:])
        later = statistics.median(row["written"][1:])
        cells = [
            f"**{1e3 * held:.0f}**",
            f"{held / copy['kept']:.2f}",
            f"{held / copy['fresh']:.2f}",
            f"{1e3 * row['held'][0]:.0f}",
            f"{1e3 * done:.0f}",
            f"{row['written'][0] / 1e6:.1f}",
            f"{later / 1e6:.1f}",
        ]
        lines.append(f"| {row['who']} | {' | '.join(cells)} |")
    (hook,) = (row for row in found["rows"] if row["who"] == "CheckpointHook")
    held = statistics.median(hook["held"][1:])
    return f"""# Saves of a JAX training loop, {results["date"]}

Measured on {machine["cpu"]} ({machine["n_cores"]} cores), {results["date"]}; {versions}.
Data: a Flax GPT of {data["n_parameters"] / 1e6:.1f} M parameters after {results["from_step"]} steps of Optax's AdamW
(batch {data["batch"]}, beta2 {data["beta2"]}) on the {data["text"]}: {found["state_bytes"] / 1e6:.1f} MB of state in
{found["n_leaves"]} leaves, saved {found["n_rounds"]} times, {found["steps_between"]} steps apart.

{chr(10).join(lines)}

One copy of the state in memory, medians: {1e3 * copy["kept"]:.1f} ms to kept memory (np.copyto of every leaf),
{1e3 * copy["fresh"]:.1f} ms to fresh memory (np.copy of every leaf), {1e3 * copy["as the hook"]:.1f} ms to kept
memory as CheckpointHook does it. The loop is to be held for at most 1.3 copies: it is for
{held / copy["fresh"]:.2f} copies to fresh memory, and for {held / copy["kept"]:.2f} to kept memory.

Medians are of all rounds but the first, in which CheckpointHook also gets its memory from the system. Everybody saved
the same states, in turns, from arrays that were donated to another computation as soon as the call returned; every
state came back bit for bit. Nothing was trained while files were written. tricomp and TensorStore, which writes for
Orbax, sync their files to the disk; Flax does not. Others used the machine at the same time: load averages over a
minute were {results["load"][0]:.1f} at the start and {results["load"][1]:.1f} at the end.
"""


def main() -> None:
    """Train or find the state, measure, write <machine>-<date>-jax-hook.json and .md, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: checks the benchmark, not the hook")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--out", type=Path, default=facts.RESULTS, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    flax.config.update("flax_use_orbax_checkpointing", False)
    run = training_jax.GPT_SMALL if options.small else training_jax.GPT
    about, states = training.states(run, options.state, facts.log, training_jax.train)
    from_step = run.steps[2]
    results: dict[str, Any] = {"benchmark": "jax-hook", **facts.machine(PACKAGES), "data": [about]}
    folder, load = Path(tempfile.mkdtemp(prefix="tricomp-jax-hook-")), os.getloadavg()[0]
    try:
        saves = measure(run, states[from_step], folder, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results |= {"from_step": from_step, "load": [load, os.getloadavg()[0]], "saves": saves}
    page = report(results)
    facts.write(results, page, options.out, options.small)
    print(page)


if __name__ == "__main__":
    main()
