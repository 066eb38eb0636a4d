"""GB/s of raw in and out on the CPU, beside memcpy, zstd, blosc2 and ZipNN: `python -m tests.benchmarks.cpu`.

Imports the public names of tricomp and what is beside it. Trains the GPT first (cached in --state, shared with the
ratio benchmark). A speed is recorded only of what came back byte for byte; it is that of tricomp.encode and decode as
everybody calls them, planning, checksums and digests included. The hard thing is a size at which planning is shared out
as in real models: so the same matrix of all blocks is one leaf here, as in models that scan over their layers, and the
leaves of the small GPT as they are have rows of their own.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

import tricomp
from tests.benchmarks import contestants, cpu_table, instruction_sets, large_file, peers, table, timing, training
from tests.benchmarks.timing import Array, Contestant, Work
from tests.benchmarks.worker import backend

State = dict[str, Array]
States = dict[int, State]


@dataclass(frozen=True)
class Runs:
    """How often everything is repeated, and how large a large file is."""

    peers: int
    sets: int
    reference: int
    files: int
    file_bytes: int


FULL = Runs(peers=7, sets=7, reference=2, files=5, file_bytes=2 << 30)
SMALL = Runs(peers=1, sets=1, reference=1, files=1, file_bytes=1 << 20)


def layers(state: State, kind: str) -> list[Array]:
    """The matrices of a kind ("w", "m", "v"), each stacked over all blocks; without those of less than 1 % of all."""
    found: dict[str, list[Array]] = {}
    for name, array in training.stream(state, kind).items():
        found.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(array)
    stacks = [np.stack(alike) if len(alike) > 1 else alike[0] for alike in found.values() if alike[0].ndim > 1]
    return [stack for stack in stacks if stack.size * 100 >= sum(other.size for other in stacks)]


def _same(array: Array) -> Array:
    return array


def _bfloat16(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16)


def _float16(array: Array) -> Array:
    return array.astype(np.float16)


def _float8(array: Array) -> Array:
    return (array * (448 / np.abs(array).max())).astype(ml_dtypes.float8_e4m3fn)


def _int8(array: Array) -> Array:
    """Each row in 255 steps."""
    return np.rint(array * (127 / np.abs(array).max(-1, keepdims=True))).astype(np.int8)


def _float64(state: State) -> list[Array]:
    """Weights after a step along the momentum in float64, so that all bits of the mantissa are used."""
    pairs = zip(layers(state, "w"), layers(state, "m"), strict=True)
    return [weights.astype(np.float64) - 6e-4 * momentum.astype(np.float64) for weights, momentum in pairs]


def _some_changed(array: Array) -> Array:
    """One word in a thousand moved by a few percent."""
    rng = np.random.default_rng(0)
    factor = np.where(rng.random(array.shape) < 1e-3, 1 + 0.05 * rng.standard_normal(array.shape), 1)
    return (array * factor.astype(np.float32)).astype(array.dtype)


def _noise(array: Array) -> Array:
    return np.random.default_rng(0).integers(0, 1 << 32, array.shape, np.uint32).view(np.float32)


def _work(name: str, mode: str, new: Iterable[Array], old: Iterable[Array] | None = None, form: str = "layers") -> Work:
    return Work(name, mode, form, tuple(new), None if old is None else tuple(old))


def works(states: States) -> Iterator[Work]:
    """What is packed; each made when it is asked for."""
    first_step, _, middle_step, last_step = states
    first, middle, last = states[first_step], states[middle_step], states[last_step]
    weights = layers(last, "w")
    for name, cast in (("float32", _same), ("bfloat16", _bfloat16)):
        for kind in ("w", "m", "v"):
            yield _work(f"{kind} {name}", "full", map(cast, layers(last, kind)))
        for kind, mode, steps in (("w", "delta", list(states)[1:]), ("v", "scaled_delta", [middle_step])):
            for step in steps:
                new, old = (map(cast, layers(state, kind)) for state in (states[step], first))
                yield _work(f"{kind} {name}, {step - first_step} apart", mode, new, old)
        base = list(map(cast, weights))
        yield _work(f"w {name}, unchanged", "copy", [array.copy() for array in base], base)
        yield _work(f"w {name}, 0.1 % changed", "sparse", map(_some_changed, base), base)
    yield _work("zeros float32", "constant", map(np.zeros_like, weights))
    yield _work("random bits float32", "raw", map(_noise, weights))
    for name, cast in (("float16", _float16), ("float8_e4m3fn", _float8), ("int8", _int8)):
        yield _work(f"w {name}", "full", map(cast, weights))
        yield _work(f"w {name}, 10 apart", "delta", map(cast, layers(middle, "w")), map(cast, layers(first, "w")))
    yield _work("w float64", "full", _float64(last))
    yield _work("w float64, 10 apart", "delta", _float64(middle), _float64(first))
    yield from _other_forms(middle, first)


def _other_forms(state: State, before: State) -> Iterator[Work]:
    """The weights as the leaves that they are, each packed by itself; and all matrices mixed in one leaf."""
    for name, cast in (("float32", _same), ("bfloat16", _bfloat16)):
        new, old = (list(map(cast, training.stream(each, "w").values())) for each in (state, before))
        yield _work(f"w {name}, {len(new)} leaves", "full", new, form="leaves")
        yield _work(f"w {name}, {len(new)} leaves, 10 apart", "delta", new, old, form="leaves")
        mixed = np.concatenate([array.ravel() for array in map(cast, layers(state, "w"))])
        yield _work(f"w {name}, all in one leaf", "full", [mixed], form="one leaf")


def plan_of(work: Work, blobs: Sequence[bytes]) -> str:
    """How its largest leaf was packed, in words."""
    largest = max(range(len(blobs)), key=lambda i: work.arrays[i].nbytes)
    unpacker = msgpack.Unpacker(max_buffer_size=0, strict_map_key=False)
    unpacker.feed(blobs[largest][: 1 << 16])
    return tricomp.Plan.from_wire(unpacker.unpack()["plan"]).describe()


def race(work: Work, runners: Sequence[Contestant], n_runs: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """GB/s in and out of everybody, who take turns; how tricomp planned it, by tier. Ends if a leaf is not exact."""
    packed, plans = [], {}
    for one in runners:
        parts = one.pack(one.given())
        if one.unpack is not None:
            peers.require(timing.is_exact(work, one.unpack(parts)), f"{one.who}, {work.name}")
        if one.who.startswith("tricomp"):
            plans[one.who.removeprefix("tricomp ")] = plan_of(work, parts)
        packed.append(parts)
    _require_same_bytes(runners, packed)
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    for turn in range(n_runs):
        turns = timing.shuffled(list(zip(runners, packed, seconds, strict=True)), turn)
        for one, parts, (packing, unpacking) in turns:
            spent, result = timing.timed(one.pack, one.given())
            packing.append(spent)
            del result
            if one.unpack is not None:
                spent, result = timing.timed(one.unpack, parts)
                unpacking.append(spent)
                del result
    rows = []
    for one, parts, (packing, unpacking) in zip(runners, packed, seconds, strict=True):
        row: dict[str, Any] = {"who": one.who, "threads": one.threads}
        row["in"] = timing.gigabytes_per_second(work.n_bytes, packing)
        if one.unpack is not None:
            row |= {"out": timing.gigabytes_per_second(work.n_bytes, unpacking), "bytes": sum(map(len, parts))}
        rows.append(row)
    return rows, plans


def _require_same_bytes(runners: Sequence[Contestant], packed: Sequence[Sequence[Any]]) -> None:
    """End the benchmark unless tricomp packs the same bytes with any number of threads."""
    for tier in timing.TIERS:
        found = [parts for one, parts in zip(runners, packed, strict=True) if one.who == f"tricomp {tier}"]
        if any(parts != found[0] for parts in found):
            raise SystemExit(f"tricomp {tier} packs other bytes with more threads; no number is kept")


def measure(work: Work, threads: Sequence[int], n_runs: int) -> dict[str, Any]:
    """One row: everybody, at every number of threads."""
    with ExitStack() as stack:
        runners = [] if work.references is None else [contestants.xor_of(work)]
        for n in threads:
            runners += [stack.enter_context(timing.memcpy_of(work, n)), *contestants.all_of(work, n)]
        results, plans = race(work, runners, n_runs)
    facts: dict[str, Any] = {"work": work.name, "dtype": work.dtype, "mode": work.mode, "form": work.form}
    return {**facts, "n_leaves": len(work.arrays), "raw": work.n_bytes, "plans": plans, "results": results}


def measure_scaling(work: Work, threads: Sequence[int], n_runs: int) -> dict[str, Any]:
    """One row: tricomp and memcpy, at more numbers of threads."""
    with ExitStack() as stack:
        runners = [timing.tricomp_of(work, tier, n) for n in threads for tier in timing.TIERS]
        runners += [stack.enter_context(timing.memcpy_of(work, n)) for n in threads]
        return {"work": work.name, "raw": work.n_bytes, "results": race(work, runners, n_runs)[0]}


def _doubling(n: int) -> list[int]:
    """1, 2, 4, .. and n."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def _main_works(found: Iterable[Work], is_small: bool) -> list[Work]:
    """Those that instruction sets and thread counts are compared on: full and delta, of float32 and bfloat16."""
    names = ["w bfloat16", "w bfloat16, 10 apart"]
    if not is_small:
        names += ["w float32", "m float32", "v float32", "w float32, 10 apart", "v float32, 10 apart"]
    return [work for work in found if work.name in names]


def _one_of_a_kind(found: Iterable[Work]) -> Iterator[Work]:
    """Of works alike, the first: no mode, dtype or form is left out."""
    seen: set[object] = set()
    for work in found:
        kinds = {work.mode, work.dtype, work.form}
        if kinds - seen:
            yield work
        seen |= kinds


def _models(states: States) -> dict[str, State]:
    """The leaves of the large files."""
    kinds = {
        f"{kind}.{step}.{i}": array
        for step, state in states.items()
        for kind in ("w", "m", "v")
        for i, array in enumerate(layers(state, kind))
    }
    weights = {name: _bfloat16(array) for name, array in kinds.items() if name.startswith("w")}
    return {"weights, bfloat16": weights, "weights and moments, float32": kinds}


def main() -> None:
    """Train or find the state, measure, write <machine>-<date>-cpu.json and .md, print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: checks the benchmark, not the codec")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--out", type=Path, default=peers.RESULTS, help="folder for the results")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="numbers of them; default: 1 and all cores")
    shared_memory = Path("/dev/shm")
    scratch = shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--files", type=Path, default=scratch, help="where the large files go: best in memory")
    options = parser.parse_args()
    threads = sorted(set(options.threads or (1, timing.n_cores())))
    runs = SMALL if options.small else FULL
    began, load = time.perf_counter(), os.getloadavg()[0]
    about, states = training.states(training.GPT_SMALL if options.small else training.GPT, options.state, peers.log)
    results: dict[str, Any] = {"benchmark": "cpu", **peers.machine("blosc2"), **backend(), "data": [about]}
    results |= {"runs": vars(runs), "threads": threads, "works": []}
    for work in _one_of_a_kind(works(states)) if options.small else works(states):
        results["works"].append(measure(work, threads, runs.peers))
        peers.log(str(results["works"][-1]))
    main_works = _main_works(works(states), options.small)
    results["sets"] = instruction_sets.measure(main_works, runs.sets, runs.reference)
    results["scaling"] = [measure_scaling(work, _doubling(max(threads)), runs.peers) for work in main_works]
    folder = options.files / f"tricomp-benchmark-{secrets.token_hex(4)}"
    results["files"] = large_file.measure_all(_models(states), folder, runs.file_bytes, runs.files)
    results["load"] = {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)}
    results["seconds"] = round(time.perf_counter() - began)
    page = cpu_table.report(results, table.origin(results))
    peers.write(results, page, options.out, options.small)
    print(page)


if __name__ == "__main__":
    main()
