"""What people read of the `tricomp` command: long and foreign names, wrong numbers, progress that fits its line."""

import argparse
import contextlib
import errno
import os
import subprocess

import numpy as np
import pytest

import tricomp
from tests.test_cli import COMMAND
from tricomp import cli
from tricomp.cli import progress


@pytest.mark.parametrize("columns", [0, 60, 80, 120])
def test_a_long_name_leaves_room_for_rate_and_time_left(columns, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    looks = {}
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    monkeypatch.setattr(progress, "_size", lambda: columns)
    monkeypatch.setattr(tqdm, "tqdm", lambda **given: looks.update(given) or contextlib.nullcontext())
    with progress.shown(argparse.Namespace(quiet=False, json=False), "model-7b-" * 20 + ".safetensors"):
        pass
    scale = {"ncols": columns or 80, "unit": "B", "unit_scale": True}
    line = tqdm.std.tqdm.format_meter(500 << 30, 900 << 30, 7200, prefix=looks["desc"], **scale)
    assert "<" in line.split("[")[1]
    assert line.endswith("B/s]")
    assert looks["desc"].endswith("nsors")


def test_letters_that_standard_output_cannot_show_are_escaped(tmp_path):
    tricomp.save(tmp_path / "\u91cd.tri", {"\u00fc": np.arange(3)})
    for encoding, shown in (("ascii", rb"\u91cd.tri: 1 leaf"), ("utf-8", "\u91cd.tri: 1 leaf".encode())):
        command = [*COMMAND, "inspect", "\u91cd.tri"]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(shown)


def test_where_nothing_may_be_written_no_space_is_to_be_freed(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", np.arange(3))

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "makedirs", refused)
    assert cli.main(["compress", str(tmp_path / "a.npy"), "-o", "no/"]) == 1
    told = "no/: cannot be written: Permission denied. Choose another place."
    assert capsys.readouterr().err == f"tricomp compress: {told}\n"


@pytest.mark.parametrize("arguments", [["s3://b/a.npy"], ["a.npy", "-o", "s3://b/a"], ["a.npy", "--base", "s3://b/c"]])
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_url_is_refused_in_words(command, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *arguments])
    assert stopped.value.code == 2
    url = next(word for word in arguments if "://" in word)
    assert f"error: {url}: a URL is not taken here; pipe the file in or out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compress", "-T", "x", "a.npy"], "-T/--threads: expected 0 or more, got 'x'"),
        (["compress", "-T", "-1", "a.npy"], "-T/--threads: expected 0 or more, got '-1'"),
        (["store", "prune", "runs/a", "--keep-last", "0"], "--keep-last: expected 1 or more, got '0'"),
        (["store", "rebase", "runs/a", "last"], "STEP: expected the number of a step, or latest, got 'last'"),
    ],
)
def test_a_wrong_number_is_told_in_words(arguments, told, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert capsys.readouterr().err.endswith(f"error: argument {told}\n")
