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


def test_the_quick_demo_is_killed_and_resumes_identically(tmp_path, capfd):
    folder = tmp_path / "kept"
    assert demo.main(directory=str(folder), as_json=True, is_quick=True) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["is_equal"]
    assert result["differing"] == []
    assert result["n_losses_compared"] > result["n_steps"]
    assert result["restored_step"] == result["kill_step"] - result["every"]
    assert result["unfinished_bytes"] > 0
    kinds = [save["is_keyframe"] for save in result["saves"]]
    assert any(kinds)
    assert not all(kinds)
    for save in result["saves"]:
        assert save["file_bytes"] == sum(save["tricomp"].values())
    assert tricomp.Store(str(folder / "store")).latest() == result["n_steps"]


def test_the_text_has_its_verdict_and_its_table(capfd):
    assert demo.main(is_quick=True, steps=8, every=2) == 0
    text = capfd.readouterr().out
    for expected in ("-> identical", "moments v", "delta checkpoint", "zstd", "save, keyframe", "load, keyframe"):
        assert expected in text


def test_a_difference_is_found():
    alone: list[dict[str, Any]] = [
        {"event": "loss", "step": 1, "loss": "0x1p+0"},
        {"event": "final", "digests": {"model/a": "1", "b/exp_avg": "2"}},
    ]
    same: list[dict[str, Any]] = [{"event": "loss", "step": 1, "loss": "0x1p+0"}]
    assert demo._compare(alone, same, alone).is_equal
    other: list[dict[str, Any]] = [
        {"event": "loss", "step": 1, "loss": "0x1.8p+0"},
        {"event": "final", "digests": {"model/a": "1"}},
    ]
    assert demo._compare(alone, same, other).differing == ("loss at step 1", "b/exp_avg")


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
    assert ran.stdout == f"tricomp {tricomp.__version__}\n"


class Entry:
    """Stands for an installed entry point whose framework is absent."""

    name = "torch"

    def __init__(self, missing):
        self.missing = missing

    def load(self):
        raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)


def test_without_torch_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry("torch")])
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "tricomp demo: torch is not installed. Run: pip install 'tricomp[torch]'\n"
    assert cli.main(["demo", "--framework", "jax"]) == 1
    assert capsys.readouterr().err == "tricomp demo: there is no demo for 'jax'; installed: torch.\n"
    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry("something_else")])
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

    monkeypatch.setattr(cli, "entry_points", lambda group: [Found()])
    assert cli.main(["demo", "--steps", "8", "--every", "2", "--dir", "d", "--json", "--quick"]) == 1
    assert capsys.readouterr().err == "tricomp demo: so it is\n"
