"""The GPU benchmark and the tests for a card, rehearsed: on the CPU, in Triton's interpreter, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import ROOT

pytest.importorskip("torch")
pytest.importorskip("triton")
from tests.benchmarks.gpu_products import FORMS

INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*command: str, **environ: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**INTERPRETED, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_benchmark_measures_and_tells_everything(tmp_path: Path) -> None:
    """Its figures here are the interpreter's and mean nothing; each that is there will be there of a card."""
    page = run("tests.benchmarks.gpu", "--small", "--out", str(tmp_path), "--files", str(tmp_path))
    (file,) = tmp_path.glob("*-gpu-small.json")
    assert page.strip() == file.with_suffix(".md").read_text().strip()
    results = json.loads(file.read_text())
    assert min(results["rates"][name] for name in ("copy", "to_host", "to_device")) > 0
    (row,) = results["works"]
    for one in row["tiers"].values():
        assert min(one["in"], one["out"], one["whole"]["in"], one["whole"]["out"]) > 0
        assert 0 < one["bytes"] < row["raw"]
        assert "encode_kernel" in one["kernels_in"]
        assert "decode_kernel" in one["kernels_out"]
    held = results["held"]
    assert held["copy"] > 0
    assert held["snapshot"]["whole"] > 0
    assert len(held["rows"]) == 7
    for one in held["rows"]:
        assert one["written"] > 0, one
    whole, delta = held["rows"][-2:]
    assert delta["written"] < whole["written"]
    assert results["nvcomp"] or "nvCOMP was not installed" in page
    for line in (row["work"], *(one["who"] for one in held["rows"])):
        assert f"\n| {line}" in page


def test_the_benchmark_of_products_measures_every_way(tmp_path: Path) -> None:
    run("tests.benchmarks.gpu_products", "--small", "--out", str(tmp_path))
    (file,) = tmp_path.glob("*-gpu-products-small.json")
    rows = json.loads(file.read_text())["products"]
    assert [row for row in rows if "why_not" in row] == []
    assert {row["who"] for row in rows} >= {"torch", "tricomp", "torch._int_mm"}
    assert {row["form"] for row in rows} == {"floats", *(form.name for form in FORMS)}
    assert min(row["call"] for row in rows) > 0


def test_kernels_are_noted_so_that_they_can_be_compiled_ahead() -> None:
    """Every kernel that encodes and decodes, by module, name, arguments and constants; and nothing is launched."""
    code = """
import sys, numpy as np, torch
from tests.benchmarks.gpu_device import NotingDevice
from tests.benchmarks.gpu_works import Packed, far_jobs, note_encoding, note_decoding
from tests.cases import weights
from tests.test_gpu import words_on
from dataclasses import replace
from tricomp import dtypes
from tricomp.codec import Engine
from tricomp.plan import Spec
array = weights((50, 100))
frame = (dtypes.to_words(array), None, dtypes.of(array, "a"), array.shape)
jobs = Engine(backend="native").plan_frames([(*frame, Spec(chunk_log2=10), None)])
frames = Engine(backend="native").encode(jobs, list)
there = [replace(job, words=words_on(job.words)) for job in jobs]
device = NotingDevice(torch.device("cpu"))
note_encoding(there, device)
note_decoding(Packed(there, frames, [frame.data for frame in frames]), device)
for module, name, arguments, constants in sorted(device.variants, key=str):
    print(module, name, len(arguments), dict(constants).get("IS_WHOLE"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=INTERPRETED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.split("\n")
    for kernel in ("encode_kernel", "decode_kernel"):
        module = f"tricomp.kernels.{kernel}"
        for is_whole in (0, 1):
            assert any(line.startswith(f"{module} {kernel} ") and line.endswith(str(is_whole)) for line in lines), lines


def test_tests_for_a_card_run_without_one() -> None:
    told = run("pytest", "-q", "-x", "tests/test_gpu.py", "-k", "tied", TRICOMP_REHEARSE_GPU="1")
    assert "passed" in told
    assert "skipped" not in told
