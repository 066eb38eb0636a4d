"""`tricomp demo`, with its tiny model: killed for real, resumed, identical; and the command's own errors."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("torch")

from tricomp_torch import demo

import tricomp
from tricomp import cli
from tricomp.cli import demo as command
from tricomp.demos import report


def test_the_quick_demo_is_killed_and_resumes_identically(tmp_path, capfd):
    folder = tmp_path / "kept"
    assert demo.main(directory=str(folder), as_json=True, is_quick=True) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["is_equal"]
    assert result["differing"] == []
    compared = {name: n for name, n, _ in result["compared"]}
    assert compared["loss"] > result["n_steps"]
    assert result["restored_step"] == result["kill_step"] - result["every"]
    assert result["unfinished_bytes"] > 0
    kinds = [save["is_keyframe"] for save in result["saves"]]
    assert any(kinds)
    assert not all(kinds)
    for save in result["saves"]:
        assert save["file_bytes"] == sum(save["tricomp"].values())
    assert tricomp.Store(str(folder / "store")).latest() == result["n_steps"]

    text = report.table(result["saves"], result["loads"])
    for expected in ("moments v", "keyframe, ", "delta checkpoint, ", "zstd", "save, key", "load, key", "from 2 files"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


ALONE: list[dict[str, Any]] = [
    {"event": "loss", "step": 1, "loss": "0x1p+0"},
    {"event": "final", "digests": {"model/a": "1", "o/exp_avg": "2", "o/exp_avg_sq": "3", "o/step": "4"}},
]


def test_what_is_equal_is_called_identical():
    comparison = demo.PYTORCH.compare(ALONE, ALONE[:1], ALONE)
    assert comparison.is_equal
    assert comparison.rows[:2] == (("loss", 2, 0), ("weights", 1, 0))
    assert report.verdict(comparison.rows, comparison.differing).endswith("  -> identical")


def test_any_difference_is_found_and_named():
    other: list[dict[str, Any]] = [
        {"event": "loss", "step": 1, "loss": "0x1.0000000000001p+0"},
        {"event": "final", "digests": {**ALONE[1]["digests"], "o/exp_avg": "0", "extra": "5"}},
    ]
    comparison = demo.PYTORCH.compare(ALONE, ALONE[:1], other)
    assert not comparison.is_equal
    assert comparison.differing == ("loss at step 1", "o/exp_avg", "extra")
    text = report.verdict(comparison.rows, comparison.differing)
    assert "  differs: o/exp_avg\n" in text
    assert "first moments                             0 of    1 equal   DIFFERENT" in text
    assert text.endswith("NOT identical: this is a bug in tricomp or in its demo")


def test_nothing_to_compare_is_not_equal():
    nothing: list[dict[str, Any]] = [{"event": "final", "digests": {}}]
    assert not demo.PYTORCH.compare(nothing, [], nothing).is_equal


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"steps": 10, "every": 5}, "--steps 10 --every 5: give at least 4 saves, that is --steps 20"),
        ({"directory": "FULL"}, "expected a new or empty folder"),
    ],
)
def test_bad_options_are_refused(tmp_path, given, text):
    (tmp_path / "file").write_text("x")
    given = {key: str(tmp_path) if value == "FULL" else value for key, value in given.items()}
    with pytest.raises(tricomp.InvalidArgument, match=text):
        demo.main(**given)


def test_version():
    ran = subprocess.run([sys.executable, "-m", "tricomp.cli", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[0] == f"tricomp {tricomp.__version__}"


class Entry:
    """Stands for an installed entry point whose framework is absent."""

    name = "torch"

    def __init__(self, missing):
        self.missing = missing

    def load(self):
        raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)


def test_without_torch_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command, "entry_points", lambda group: [Entry("torch")])
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "tricomp demo: torch is not installed. Run: pip install 'tricomp[torch]'\n"
    assert cli.main(["demo", "--framework", "jax"]) == 1
    assert capsys.readouterr().err == "tricomp demo: there is no demo for 'jax'; installed: torch.\n"
    monkeypatch.setattr(command, "entry_points", lambda group: [Entry("something_else")])
    with pytest.raises(ModuleNotFoundError, match="something_else"):
        cli.main(["demo"])


def test_options_reach_the_demo_and_its_errors_the_user(monkeypatch, capsys):
    class Found:
        name = "torch"

        def load(self):
            return self.main

        def main(self, **options):
            assert options == {"steps": 8, "every": 2, "directory": "d", "as_json": True, "is_quick": True}
            raise tricomp.InvalidArgument("so it is")

    monkeypatch.setattr(command, "entry_points", lambda group: [Found()])
    assert cli.main(["demo", "--steps", "8", "--every", "2", "--dir", "d", "--json", "--quick"]) == 1
    assert capsys.readouterr().err == "tricomp demo: so it is\n"
