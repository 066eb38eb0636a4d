"""`tricomp demo --framework jax`, with its tiny model: killed for real, resumed, identical; and what it lacks, said."""

import json
import tomllib
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

import jax
from tricomp_jax import demo, demo_gpt, demo_run

import tricomp
from tricomp import cli
from tricomp.cli import demo as command
from tricomp.demos import report
from tricomp.demos.task import QUICK

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def entry() -> EntryPoint:
    """The entry point as it is declared, whatever is installed here."""
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["tricomp.demo"]
    return EntryPoint("jax", declared["jax"], "tricomp.demo")


def test_the_quick_demo_is_killed_and_resumes_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    monkeypatch.setattr(command, "entry_points", lambda group: [entry()])
    assert cli.main(["demo", "--framework", "jax", "--quick", "--json", "--dir", str(folder)]) == 0
    result = json.loads(capfd.readouterr().out)
    assert {"jax", "flax", "optax"} <= result.keys()
    assert result["is_equal"]
    assert result["differing"] == []
    compared = {name: n for name, n, _ in result["compared"]}
    assert compared["loss"] > result["n_steps"]
    assert compared["weights"] == compared["first moments"] == compared["second moments"] == 28
    assert result["restored_step"] == result["kill_step"] - result["every"]
    assert result["unfinished_bytes"] > 0
    assert {save["is_keyframe"] for save in result["saves"]} == {True, False}
    for save in result["saves"]:
        assert save["file_bytes"] == sum(save["tricomp"].values())
        assert save["raw"]["weights"] == save["raw"]["m"] == save["raw"]["v"] == 4 * result["n_parameters"]
    store = tricomp.Store(str(folder / "store"))
    assert store.latest() == result["n_steps"]
    assert store.verify().is_clean

    text = report.table(result["saves"], result["loads"])
    for expected in ("moments v", "keyframe, ", "delta checkpoint, ", "zstd", "save, key", "load, key", "from 2 files"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


def test_each_leaf_of_the_state_has_its_row() -> None:
    state = jax.eval_shape(partial(demo_gpt.begin, QUICK, 10))
    paths = [demo_run.joined(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert len(set(paths)) == len(paths)
    rest = [path for path in paths if demo_run.stream_of(path) == "rest"]
    assert rest == ["step", "opt_state/1/0/count", "opt_state/1/2/count", "key"]


def test_one_differing_bit_is_named() -> None:
    final = {"params/a": "1", "opt_state/0/mu/a": "2", "opt_state/0/nu/a": "3", "key": "4"}
    other = {**final, "key": "5"}
    events: list[list[dict[str, Any]]] = [
        [{"event": "loss", "step": 1, "loss": "0x1p+0"}, {"event": "final", "digests": digests}]
        for digests in (final, final, other)
    ]
    assert demo.JAX.compare(events[0], [], events[1]).is_equal
    comparison = demo.JAX.compare(events[0], [], events[2])
    assert comparison.differing == ("key",)
    assert comparison.rows[-1] == ("step counts, random key", 1, 1)


def test_runs_repeat_whatever_flags_there_are() -> None:
    assert demo_gpt.deterministic({}) == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    given = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_dump_to=x --xla_cpu_multi_thread_eigen=true"}
    found = demo_gpt.deterministic(given)
    assert found["JAX_PLATFORMS"] == "cpu"
    assert found["XLA_FLAGS"].split()[::2] == [
        "--xla_dump_to=x",
        "--xla_cpu_multi_thread_eigen=false",
    ]  # the last holds


@pytest.mark.parametrize("missing", ["jax", "jaxlib", "flax", "optax"])
def test_without_a_package_the_command_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Entry:
        name = "jax"

        def load(self) -> None:
            raise ModuleNotFoundError(f"No module named '{missing}.linen'", name=f"{missing}.linen")

    monkeypatch.setattr(command, "entry_points", lambda group: [Entry()])
    assert cli.main(["demo", "--framework", "jax"]) == 1
    assert (
        capsys.readouterr().err == f"tricomp demo: {missing} is not installed. Run: pip install 'tricomp[demo-jax]'\n"
    )


def test_bad_options_are_refused() -> None:
    with pytest.raises(tricomp.InvalidArgument, match="--steps 10 --every 5: give at least 4 saves"):
        demo.main(steps=10, every=5)
