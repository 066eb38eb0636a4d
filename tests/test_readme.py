"""README.md: its examples run, its commands name extras that are there, its table is that of its results file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^```sh\n(.*?)\n```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(code: str, tmp_path: Path) -> None:
    if "torch" in code:
        pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_two_commands_and_ci_finds_the_second() -> None:
    assert [command.partition(" && ")[2] for command in COMMANDS] == ["tricomp demo", "pytest"]
    pattern = re.search(r'grep -x -E "(.+)" README.md', (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    assert re.findall(f"^{pattern[1]}$", README, re.MULTILINE) == [COMMANDS[1]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_extras_of_the_commands_pin_torch_and_triton(command: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extra = re.search(r"\.\[(\w+)\]", command)
    assert extra is not None
    assert [requirement.partition(";")[0] for requirement in extras[extra[1]]][:2] == ["torch==2.13.0", "triton==3.7.1"]


def _rendered(page: str) -> str:
    code = "import sys; from tests.benchmarks import table; sys.stdout.write(table.with_tables(sys.stdin.read()))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, input=page, capture_output=True, text=True, check=True).stdout


def test_the_tables_are_those_of_their_results_files() -> None:
    assert _rendered(README) == README


@pytest.mark.parametrize("number", [r"\*\*(\d\d\.\d\d)\*\*", r"\*\*(\d\d\.\d %)\*\*", r"\*\*(\d[\d.]* / \d[\d.]*)\*\*"])
def test_a_table_that_was_edited_is_noticed(number: str) -> None:
    first_number = re.search(number, README)
    assert first_number is not None
    assert _rendered(README.replace(first_number[0], "**1.00**", 1)) == README


def _results(kind: str = "ratio") -> dict[str, Any]:
    file = re.search(rf"<!-- table:{kind} (\S+) -->", README)
    assert file is not None
    found: dict[str, Any] = json.loads((ROOT / file[1]).read_text())
    return found


def _table(kind: str) -> str:
    found = re.search(rf"<!-- table:{kind} .*?<!-- /table:{kind} -->", README, re.DOTALL)
    assert found is not None
    return found[0]


def test_results_name_machine_date_versions_and_data() -> None:
    results = _results()
    assert results["machine"]["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
    assert {"tricomp", "torch", "zipnn", "numpy"} <= results["versions"].keys()
    assert results["data"][0]["n_parameters"] > 10_000_000


def test_results_hold_what_the_codec_promises() -> None:
    results = _results()
    rows = {row["stream"]: row for row in results["streams"]}
    for name, row in rows.items():
        assert row["dense"] < min(row["zipnn"], row.get("zipnn_xor", row["zipnn"])), name
        if not name.startswith("w, "):  # the files of mixed precision are held against ZipNN alone
            bound = row["bound_scales" if name.startswith("CNN") else "bound"]  # small leaves pay for their scales
            assert row["dense"] <= max(bound * 1.01, bound + 0.1), name
    assert rows["v"]["dense"] <= rows["v"]["zipnn"] - 1.5
    assert rows["w bfloat16, 10 apart"]["dense"] <= 0.85 * rows["w bfloat16, 10 apart"]["zipnn_xor"]
    assert results["overhead"]["noise_over_raw_percent"] < 0.5
    assert results["overhead"]["real_over_one_leaf_percent"] < 0.5
    assert all(min(row["encode"], row["decode"]) >= 10 for row in results["speed"])


def test_results_hold_what_the_command_promises() -> None:
    results = _results("files")
    for row in results["files"]:
        assert row["tricomp"] < min(row["zstd"], row["zipnn"]), row["file"]
        if "1 %" in row["file"]:
            assert row["tricomp"] < 0.03 * row["raw"]
    assert results["inspect"]["file_bytes"] > 10e9
    assert results["inspect"]["seconds"] < 1
    assert results["inspect"]["peak_bytes"] < 100e6


def test_results_of_speed_say_what_they_were_measured_with() -> None:
    results = _results("cpu")
    assert results["machine"]["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
    assert {"tricomp", "numpy", "zipnn", "blosc2"} <= results["versions"].keys()
    assert results["backend"] == "native"
    assert results["isa"] in ("avx512", "avx2", "portable")
    assert results["data"][0]["n_parameters"] > 10_000_000
    assert 1 in results["threads"]


def test_tricomp_is_as_fast_as_the_page_says() -> None:
    rows = {row["work"]: row["results"] for row in _results("cpu")["works"]}
    shown = re.findall(r"^\| ([^|]+) \|", _table("cpu"), re.MULTILINE)[1:]
    assert len(shown) >= 10
    for work in shown:
        on_one = {one["who"]: one for one in rows[work] if one["threads"] == 1}
        dense = on_one["tricomp dense"]
        for peer in ("zstd -1", "blosc2 zstd", "ZipNN"):
            assert dense["in"] > on_one[peer]["in"], (work, peer)
            least = 0.9 if (peer, work) == ("ZipNN", "w float32, 100 apart") else 1
            assert dense["out"] > least * on_one[peer]["out"], (work, peer)
