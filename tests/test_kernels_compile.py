"""Every kernel variant compiles ahead of time, without a GPU, and to code no worse than the committed table says.

Compiling is done by processes of its own (tests.kernel_code): in this one Triton may be set to interpret.
"""

from __future__ import annotations

import json
from importlib import metadata, util
from typing import Any

import pytest

from tests import behind
from tests.benchmarks import kernels
from tests.kernel_code import GROUPS
from tests.kernel_variants import TARGETS, WARPS, C, variants

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    """What the table has, measured again."""
    return {(row["variant"], row["target"]): row for row in behind.compiled()}


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    """The committed table of the installed version of Triton; empty if there is none."""
    files = sorted(kernels.RESULTS.glob(f"kernels-{metadata.version('triton')}-*.json"))
    return {(row["variant"], row["target"]): row for row in json.loads(files[-1].read_text())["rows"]} if files else {}


def test_all_compile(rows: dict[tuple[str, str], Row]) -> None:
    assert {key: row["error"] for key, row in rows.items() if "error" in row} == {}


def test_nothing_is_spilt(rows: dict[tuple[str, str], Row]) -> None:
    """But for what the assembler lays by over a loop, a word or two, so that more programs fit; not where it counts."""
    assert {key: row["spills_in_loop"] for key, row in rows.items() if row["spills_in_loop"]} == {}
    assert {key: row["spilt_bytes"] for key, row in rows.items() if row["spilt_bytes"] > 8} == {}
    hot = {name for name, variant in variants().items() if variant.is_hot}
    assert {key: row["spilt_bytes"] for key, row in rows.items() if row["spilt_bytes"] and key[0] in hot} == {}


def test_coders_share_no_memory(rows: dict[tuple[str, str], Row]) -> None:
    """It would mean that lanes of a chunk are spread over warps, with a barrier at every step."""
    coders = {name for name, variant in variants().items() if variant.module in ("encode_kernel", "decode_kernel")}
    assert {key: row["shared"] for key, row in rows.items() if row["shared"] and key[0] in coders} == {}


def test_loops_are_found(rows: dict[tuple[str, str], Row]) -> None:
    cases = {name for name, variant in variants().items() if variant.case is not None}
    assert [key for key, row in rows.items() if row["loop"] < 5 * GROUPS and key[0] in cases] == []
    assert all(sum(row["units"].values()) == row["loop"] for row in rows.values())


def test_code_is_no_worse_than_the_committed_table(
    rows: dict[tuple[str, str], Row], table: dict[tuple[str, str], Row]
) -> None:
    """After a change for the better, or for a good reason: python -m tests.benchmarks.kernels writes a new one."""
    if not table:
        pytest.skip(f"no table for triton {metadata.version('triton')}")
    assert rows.keys() <= table.keys()
    worse = {
        (*key, number): (row[number], table[key][number])
        for key, row in rows.items()
        for number in ("registers", "loop")
        if row[number] > 1.1 * table[key][number]
    }
    assert worse == {}


def test_the_table_says_what_a_gpu_has_not_said(table: dict[tuple[str, str], Row]) -> None:
    for path in kernels.RESULTS.glob("kernels-*.json"):
        results = json.loads(path.read_text())
        page = path.with_suffix(".md").read_text()
        assert results["is_measured_on_a_gpu"] is False
        assert "Not yet measured on a GPU" in page
        assert kernels.report(results) == page
    hot = {(variant.name, target) for variant in variants().values() if variant.is_hot for target in TARGETS}
    assert not table or all(table[key]["bounds"] for key in hot if any(card.target == key[1] for card in kernels.CARDS))


def test_launches_are_as_wide_as_what_is_compiled() -> None:
    torch = pytest.importorskip("torch")
    from tricomp.kernels import device

    on_a_card = device.Device(torch.device("cpu"))
    assert on_a_card.warps == WARPS
    assert device.IS_INTERPRETED or on_a_card.chunks_a_program == C
