"""Bits per element of real training state, beside zstd, ZipNN and the bound: `python -m tests.benchmarks.ratio`.

Imports the public names of tricomp, its peers, and the training and bound beside it. Trains first (cached in --state),
then measures; the first run takes about a quarter of an hour on two cores, --small less than a minute. A number is
recorded only after what it counts was decoded and compared, byte for byte, for the peers as well. With --framework jax
the GPT is trained by Flax and Optax, and only its state is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import tricomp
from tests.benchmarks import bound, peers, table, training

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Stream:
    """Leaves of one kind, and those of an earlier checkpoint where they are coded against one."""

    name: str
    arrays: Arrays
    references: Arrays | None = None

    @property
    def n_elements(self) -> int:
        return sum(array.size for array in self.arrays.values())

    @property
    def fields(self) -> bound.Fields:
        return bound.BFLOAT16 if next(iter(self.arrays.values())).dtype.itemsize == 2 else bound.FLOAT32


def _cast(arrays: Arrays) -> Arrays:
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


def _short_rows(arrays: Arrays, n_low_bits: Callable[[int], NDArray[np.integer[Any]]]) -> Arrays:
    """The leaves of two dimensions with that many low bits of each row cleared: lower precision, row by row."""
    short = {}
    for name, array in arrays.items():
        if array.ndim == 2:
            mask = np.uint32(0xFFFFFFFF) << n_low_bits(array.shape[0]).astype(np.uint32)[:, None]
            short[name] = (array.view(np.uint32) & mask).view(np.float32)
    return short


def gpt_streams(gpt: dict[int, Arrays]) -> list[Stream]:
    """Of the states of a GPT by step: those of the last, and of each but the first against the first."""
    first, *later = gpt
    kinds: list[tuple[str, str, Callable[[Arrays], Arrays]]] = [
        ("w float32", "w", dict), ("w bfloat16", "w", _cast), ("m", "m", dict), ("v", "v", dict),
    ]  # fmt: skip
    of = training.stream
    streams = [Stream(name, cast(of(gpt[later[-1]], kind))) for name, kind, cast in kinds]
    for step in later:
        for name, kind, cast in kinds:
            references = cast(of(gpt[first], kind))
            streams.append(Stream(f"{name}, {step - first} apart", cast(of(gpt[step], kind)), references))
    return streams


def _other_streams(gpt: dict[int, Arrays], cnn: dict[int, Arrays], sgd: dict[int, Arrays]) -> list[Stream]:
    of, rng = training.stream, np.random.default_rng(0)
    weights = of(gpt[max(gpt)], "w")
    return [
        Stream("CNN w", of(cnn[max(cnn)], "w")),
        Stream("CNN m", of(cnn[max(cnn)], "m")),
        Stream("CNN v", of(cnn[max(cnn)], "v")),
        Stream("CNN v, 10 apart", of(cnn[max(cnn)], "v"), of(cnn[min(cnn)], "v")),
        Stream("CNN SGD momentum", of(sgd[max(sgd)], "m")),
        Stream("w, every other row rounded to bfloat16", _short_rows(weights, lambda n: np.arange(n) % 2 * 16)),
        Stream("w, 8 to 16 trailing zeros a row", _short_rows(weights, lambda n: rng.integers(8, 17, n))),
    ]


def _name(fields: bound.Fields) -> str:
    return "bfloat16" if fields is bound.BFLOAT16 else "float32"


def _file_bytes(arrays: Arrays, references: Arrays | None = None, tier: Any = "dense") -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stream.tri")
        tricomp.save(path, arrays, reference=references, spec=tricomp.Spec(tier=tier))
        back = tricomp.load(path, reference=references)
        same = [_are_equal(back[name], array) for name, array in arrays.items()]
        peers.require(len(back) == len(same) and all(same), f"tricomp {tier}")
        return os.path.getsize(path)


def _are_equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def _concatenated(arrays: Arrays, fields: bound.Fields) -> NDArray[Any]:
    return np.concatenate([array.view(fields.word).ravel() for array in arrays.values()])


def measure(stream: Stream) -> dict[str, Any]:
    """One row of the table: bits per element, all side information included. Peers get a whole stream as one piece."""
    words = _concatenated(stream.arrays, stream.fields)
    n_bytes: dict[str, float] = {
        "raw": words.nbytes,
        "zstd": peers.zstd_bytes(words.tobytes()),
        "zipnn": peers.zipnn_bytes(words.tobytes(), _name(stream.fields)),
    }
    if stream.references is not None:
        changed = words ^ _concatenated(stream.references, stream.fields)
        n_bytes["zipnn_xor"] = peers.zipnn_bytes(changed.tobytes(), _name(stream.fields))
    for tier in ("fast", "dense"):
        n_bytes[tier] = _file_bytes(stream.arrays, stream.references, tier)
    bits = bound.stream_bits(stream.arrays, stream.references, stream.fields)
    n_bytes |= {"bound": bits.payload / 8, "bound_scales": bits.total / 8}
    row = {key: round(value * 8 / stream.n_elements, 3) for key, value in n_bytes.items()}
    return {"stream": stream.name, "n_elements": stream.n_elements, "n_leaves": len(stream.arrays), **row}


def measure_overhead(weights: Arrays) -> dict[str, Any]:
    """1,000 leaves of 1,000 float32, in percent: random bits over raw, real weights over the same as one leaf."""
    noise = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, np.uint32).view(np.float32)
    pool = _concatenated(weights, bound.FLOAT32).view(np.float32)
    real = np.resize(pool, 1_000_000)
    cut_noise, cut_real = (
        {f"layers.{i}.norm.weight": part for i, part in enumerate(np.split(whole, 1000))} for whole in (noise, real)
    )
    one_leaf = _file_bytes({"layers.norm.weight": real})
    return {
        "n_leaves": 1000,
        "elements_per_leaf": 1000,
        "noise_over_raw_percent": round(100 * (_file_bytes(cut_noise) / noise.nbytes - 1), 3),
        "real_over_one_leaf_percent": round(100 * (_file_bytes(cut_real) / one_leaf - 1), 3),
    }


def _median_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_speed(before: Arrays, after: Arrays) -> list[dict[str, Any]]:
    """Million elements per second in and out, one core, median of three, of one large leaf; ZipNN's beside it."""
    name = "blocks.{}.up.weight"
    n_blocks = sum("up.weight" in key for key in after)
    old, new = (np.concatenate([state[name.format(i)] for i in range(n_blocks)]) for state in (before, after))
    rows = []
    for dtype, fields in ((np.dtype(np.float32), bound.FLOAT32), (np.dtype(ml_dtypes.bfloat16), bound.BFLOAT16)):
        array, reference = new.astype(dtype), old.astype(dtype)
        for mode, base in (("full", None), ("delta", reference)):
            rows.append({"dtype": dtype.name, "mode": mode, "n_elements": array.size, **_rates(array, base, fields)})
    return rows


def _rates(array: NDArray[Any], base: NDArray[Any] | None, fields: bound.Fields) -> dict[str, float]:
    blob = tricomp.encode(array, reference=base, threads=1)
    peers.require(tricomp.decode(blob, reference=base, threads=1).tobytes() == array.tobytes(), "tricomp")
    raw = array.tobytes() if base is None else (array.view(fields.word) ^ base.view(fields.word)).tobytes()
    packed = peers.zipnn(_name(fields)).compress(bytearray(raw))
    peers.require(bytes(peers.zipnn(_name(fields)).decompress(packed)) == raw, "ZipNN")
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: tricomp.encode(array, reference=base, threads=1),
        "decode": lambda: tricomp.decode(blob, reference=base, threads=1),
        "zipnn_compress": lambda: peers.zipnn(_name(fields)).compress(bytearray(raw)),
        "zipnn_decompress": lambda: peers.zipnn(_name(fields)).decompress(packed),
    }
    return {key: round(array.size / 1e6 / _median_seconds(call), 1) for key, call in calls.items()}


States = tuple[list[dict[str, Any]], list[dict[int, Arrays]]]


def _torch_states(options: argparse.Namespace) -> States:
    """What each run was, and its states."""
    runs = training.SMALL if options.small else training.ALL
    about, kept = zip(*(training.states(run, options.state, peers.log) for run in runs))
    return list(about), list(kept)


def _jax_states(options: argparse.Namespace) -> States:
    """The same of the one run in JAX."""
    from tests.benchmarks import training_jax

    run = training_jax.GPT_SMALL if options.small else training_jax.GPT
    about, kept = training.states(run, options.state, peers.log, training_jax.train)
    return [about], [kept]


def main() -> None:
    """Train or find the states, measure, write <machine>-<date>-ratio.json and .md, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models: checks the benchmark, not the codec")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "tricomp-benchmark")
    parser.add_argument("--out", type=Path, default=peers.RESULTS, help="folder for the results")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="what trains the GPT")
    options = parser.parse_args()
    is_jax = options.framework == "jax"
    about, kept = _jax_states(options) if is_jax else _torch_states(options)
    gpt = kept[0]
    results: dict[str, Any] = {
        "benchmark": "ratio-jax" if is_jax else "ratio",
        **peers.machine(*(("jax", "flax", "optax") if is_jax else ())),
        "data": about,
        "streams": [],
    }
    streams = gpt_streams(gpt) + ([] if is_jax else _other_streams(*kept))
    for stream in streams:
        results["streams"].append(measure(stream))
        peers.log(str(results["streams"][-1]))
    before, *_, middle, after = (training.stream(gpt[step], "w") for step in gpt)
    results["overhead"] = measure_overhead(after)
    if not is_jax:  # on another's state it is no other speed
        results["speed"] = measure_speed(before, middle)
    peers.write(results, table.report(results), options.out, options.small)
    print(table.report(results))


if __name__ == "__main__":
    main()
