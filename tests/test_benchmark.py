"""The benchmarks run as their commands say, on tiny models, and write what the README's tables need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("torch", "zipnn"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "-m", "tests.benchmarks.ratio", "--small", "--state", str(folder), "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_files_come_back_and_have_every_column(out: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.files", "--small", "--state", str(out), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results, page = (next(out.glob(f"*-files-small.{suffix}")).read_text() for suffix in ("json", "md"))
    rows = json.loads(results)["files"]
    assert len(rows) == 8
    for row in rows:
        assert 0 < row["tricomp"] < min(row["zstd"], row["zipnn"]) < row["raw"]
        assert f"\n| {row['file']} |" in page


def test_published_versions_come_back_and_deltas_are_smaller(out: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.publishing", "--small", "--state", str(out), "--out", str(out)]
    done = subprocess.run([*command, "--versions", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, page = (next(out.glob(f"*-publishing-small.{suffix}")).read_text() for suffix in ("json", "md"))
    for found in json.loads(text)["rates"]:
        n_bytes = {row["who"]: row["bytes"][0] for row in found["rows"]}
        assert n_bytes["`.tri`"] < n_bytes["xor, zstd 1"] < n_bytes["whole, safetensors"]
        assert f"## {found['name']}: " in page


def test_speeds_are_those_of_everybody_in_every_mode_and_dtype(out: Path) -> None:
    pytest.importorskip("blosc2")
    command = [sys.executable, "-m", "tests.benchmarks.cpu", "--small", "--state", str(out), "--out", str(out)]
    done = subprocess.run([*command, "--threads", "1", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, page = (next(out.glob(f"*-cpu-small.{suffix}")).read_text() for suffix in ("json", "md"))
    results = json.loads(text)
    works = results["works"]
    modes = {"full", "delta", "scaled_delta", "copy", "sparse", "constant", "raw"}
    assert {row["mode"] for row in works} == modes
    assert {row["dtype"] for row in works} == {"float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int8"}
    for row in works:
        found = {(one["who"], one["threads"]): one for one in row["results"]}
        for who in ("tricomp dense", "tricomp fast", "zstd -1", "zstd -3", "blosc2 zstd", "blosc2 lz4"):
            assert all(min(found[who, n][key] for key in ("in", "out", "bytes")) > 0 for n in (1, 2))
        assert all(found["memcpy", n]["in"] > 0 for n in (1, 2))
        assert (("ZipNN", 1) in found) == (row["dtype"] not in ("float64", "int8"))
        assert (("XOR", 1) in found) == ("apart" in row["work"] or row["mode"] in ("copy", "sparse"))
        assert f"\n| {row['work']} |" in page
    assert all(len(row["results"]) >= 2 for row in results["sets"])
    assert all(row["seconds"]["decompress"] > 0 for row in results["files"]["rows"])


def test_a_save_is_timed_for_everybody_on_every_disk(out: Path) -> None:
    for needed in ("safetensors", "xxhash", "zstandard"):
        pytest.importorskip(needed)
    whos = ["DCP async_save, zstd", "Checkpointer"]
    options = [
        "--small",
        "--cycles",
        "1",
        "--between",
        "1",
        "--threads",
        "1",
        "--only",
        *whos,
        "--state",
        str(out),
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "tests.benchmarks.stall", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, page = (next(out.glob(f"*-stall-small.{suffix}")).read_text() for suffix in ("json", "md"))
    saves = json.loads(text)["saves"]
    assert [row["who"] for row in saves["rows"]] == whos
    for row in saves["rows"]:
        assert [turn["speed"] for turn in row["turns"][::2]] == [None] * 3
        assert [turn["speed"] for turn in row["turns"][1::2]] == (saves["speeds"] or [None] * 3)
        for turn in row["turns"]:
            assert 0 < turn["held"] <= turn["durable"]
            assert turn["durable"] >= turn["written"] / (turn["speed"] or 1e12)
            assert 0 < turn["written"] < 1.05 * saves["state_bytes"]
        assert f"\n| {row['who']} |" in page
    zstd, ours = ([turn["written"] for turn in row["turns"]] for row in saves["rows"])
    assert max(ours[1:]) < ours[0] < min(zstd)


def test_finished_models_are_judged_and_timed_beside_everybody(tmp_path: Path) -> None:
    for needed in ("torch", "torchao", "safetensors", "sklearn", "matplotlib"):
        pytest.importorskip(needed)
    folders = ["--state", str(tmp_path), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tests.benchmarks.integers", "--small", "--rounds", "1", *folders]
    done = subprocess.run(
        [*command, "--models", "transformer"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # so small a model gains nothing by more
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, page = (next(tmp_path.glob(f"*-integers-small.{suffix}")).read_text() for suffix in ("json", "md"))
    assert next(tmp_path.glob("*-integers-small.svg")).stat().st_size > 1000
    found = {model["model"]: {row["who"]: row for row in model["rows"]} for model in json.loads(text)["models"]}
    assert list(found) == ["transformer"]
    for rows in found.values():
        names = ["float32", "float32 as usual", "bfloat16", "torchao int8 dynamic", "torchao int8 weights"]
        ours = ["tricomp int8", "tricomp int8 of 8 bits", "tricomp int4"]
        assert [name for name in rows if name != "torch dynamic int8"] == [*names, *ours]
        for name, row in rows.items():
            assert len(row["load"]) == 1
            assert len(row["load_cold"]) == ("load_cold_median" in row)
            assert set(row["latency"]) == (set() if name == "float32 as usual" else {"1", "16", "128"})
            label = f"**{name}**" if name in ours else name
            assert [line.count("|") for line in page.splitlines() if line.startswith(f"| {label} |")] == [10]
        sizes = [rows[name]["bytes"] for name in ("tricomp int4", "tricomp int8", "tricomp int8 of 8 bits", "float32")]
        assert sizes == sorted(set(sizes))
    judged = page.partition("| to be reached |")[2]
    for what in ("int8, same top-1", "int8 file", "int4 file", "int8 speed, batch 128"):
        assert f"\n| transformer: {what} |" in judged
    loads = [line for line in judged.splitlines() if line.startswith("| transformer: load, file ")]
    is_cold = "load_cold_median" in found["transformer"]["float32"]
    assert len(loads) == (4 if is_cold else 2)
    assert sum("model made as usual" in line for line in loads) == len(loads) / 2


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to tell the system")
def test_a_file_leaves_the_cache_or_it_is_told(tmp_path: Path) -> None:
    from tests.benchmarks import page_cache

    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 777)
    assert page_cache.cached_part(path) in (1.0, None)
    assert page_cache.drop(path) == (page_cache.cached_part(path) == 0)
    path.write_bytes(b"")
    assert not page_cache.drop(path)


def test_a_verdict_is_the_quotient_of_two_speeds() -> None:
    def one(who: str, speed_in: float, speed_out: float, threads: int = 1) -> dict[str, object]:
        return {"who": who, "threads": threads, "in": speed_in, "out": speed_out}

    work = {"work": "w bfloat16", "dtype": "bfloat16", "mode": "full", "form": "layers"}
    seconds = {"cp_raw": 3.0, "read_raw": 1.0, "cp_packed": 2.0, "read_packed": 0.5, "decompress": 5.0}
    results = {
        "works": [{**work, "results": [one("tricomp dense", 2, 4.9), one("tricomp fast", 4, 8), one("ZipNN", 0.5, 2)]}],
        "scaling": [{**work, "results": [one("tricomp dense", 2, 5), one("tricomp dense", 3.6, 8, 2)]}],
        "sets": [{**work, "results": [{"isa": isa, "tier": "fast", "in": 2, "out": 3} for isa in ("avx512", "avx2")]}],
        "files": {"rows": [{"file": "f", "seconds": seconds}]},
    }
    code = """
import json, sys
from tests.benchmarks import cpu_table
print(json.dumps([[v.measured, v.is_reached] for v in cpu_table.verdicts(json.load(sys.stdin))]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(results), capture_output=True, text=True, check=True)
    measured = [[round(number, 6), is_reached] for number, is_reached in json.loads(done.stdout)]
    zipnn, tiers, threads, sets = [[4, True], [2.45, False]], [[2, True]], [[1.8, True], [1.6, False]], [[1, True]] * 2
    assert measured == [*zipnn, *tiers, *threads, *sets, [0.5, False]]


def test_every_stream_has_every_column(out: Path) -> None:
    streams = json.loads(next(out.glob("*-ratio-small.json")).read_text())["streams"]
    assert len(streams) == 23
    for row in streams:
        columns = {"raw", "zstd", "zipnn", "fast", "dense", "bound", "bound_scales"} | (
            {"zipnn_xor"} if "apart" in row["stream"] else set()
        )
        assert columns <= row.keys()
        assert 0 < row["bound"] <= row["bound_scales"] < row["raw"]


def test_small_leaves_cost_little(out: Path) -> None:
    overhead = json.loads(next(out.glob("*-ratio-small.json")).read_text())["overhead"]
    assert (overhead["n_leaves"], overhead["elements_per_leaf"]) == (1000, 1000)
    assert 0 < overhead["noise_over_raw_percent"] < 0.5
    assert overhead["real_over_one_leaf_percent"] < 0.5


def test_the_page_shows_every_stream(out: Path) -> None:
    results, page = (next(out.glob(f"*-ratio-small.{suffix}")).read_text() for suffix in ("json", "md"))
    assert all(f"\n| {row['stream']} |" in page for row in json.loads(results)["streams"])


def test_the_bound_is_the_entropy_of_a_known_source() -> None:
    """32 exponents equally often, uniform mantissa and sign; then half of the words changed by one."""
    code = """
import numpy as np
from tests.benchmarks import bound
rng = np.random.default_rng(0)
words = rng.integers(0, 1 << 28, 1 << 20, np.uint32) + np.uint32(100 << 23)
words |= rng.integers(0, 2, words.size, np.uint32) << np.uint32(31)
print(bound.full_bits(words.view(np.float32), bound.FLOAT32).total / words.size)
step = rng.integers(0, 2, words.size, np.uint32)
new, old = (words + step).view(np.float32), words.view(np.float32)
print(bound.delta_bits(new, old, bound.FLOAT32).total / words.size)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    full, delta = map(float, done.stdout.split())
    assert 28.99 < full <= 29  # 5 bits of exponent, 23 of mantissa, sign
    assert 1.49 < delta <= 1.51  # one bit for whether it changed; half did, and pay their sign
