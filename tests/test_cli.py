"""The `tricomp` command as such: version, help, errors in one line, signals, progress, completion."""

import argparse
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import tricomp
from tests.cases import weights
from tricomp import backends, cli
from tricomp.cli import completion, console, progress
from tricomp.codec.engine import cores

COMMAND = [sys.executable, "-m", "tricomp.cli"]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def test_the_version_and_the_backends_that_are_live():
    done = run("--version")
    assert done.stdout.splitlines()[0] == f"tricomp {tricomp.__version__}"
    assert done.stdout.splitlines()[1] == "backends: " + "; ".join(
        f"{name}: {state}" for name, state in backends.live().items()
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_backend_is_called_live_only_if_the_codec_takes_it():
    for name, state in backends.live().items():
        if state.startswith("none"):
            with pytest.raises(tricomp.InvalidArgument, match=name):
                list(tricomp.codec.encode(tricomp.content.content_of(np.ones(3)).snapshot, backend=name))
        else:
            assert list(tricomp.codec.encode(tricomp.content.content_of(np.ones(3)).snapshot, backend=name))


def test_the_command_starts_without_a_framework_and_without_its_extras():
    code = "import sys; from tricomp import cli; cli.parser(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"'torch'", "'jax'", "'triton'", "'tqdm'", "'shtab'", "'fsspec'"} & set(loaded.strip("[]\n").split(", "))


def test_every_subcommand_has_help_and_the_common_options(capsys):
    commands = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert {"compress", "decompress", "completion", "demo"} <= set(commands)
    for name in commands:
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0
        assert f"usage: tricomp {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["compress"], ["compress", "-q", "-v", "x"], ["--nonsense"]])
def test_wrong_use_ends_with_two(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # or nothing given would mean standard input
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: tricomp" in capsys.readouterr().err


def test_an_error_is_one_line_and_with_v_a_traceback(tmp_path, capsys):
    assert cli.main(["decompress", str(tmp_path / "none.tri")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"tricomp decompress: {tmp_path}/none.tri: there is no such file. Check the path.\n"
    assert cli.main(["decompress", "-v", str(tmp_path / "none.tri")]) == 1
    shown = capsys.readouterr()
    assert "Traceback (most recent call last):" in shown.err
    assert shown.err.splitlines()[-1].startswith("tricomp decompress: ")


def failing(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (tricomp.InvalidArgument("two\nlines\x1b[2J"), 1, r"tricomp completion: two\nlines\x1b[2J"),
        (PermissionError(13, "Permission denied", "x"), 1, "tricomp completion: [Errno 13] Permission denied: 'x'"),
        (MemoryError(), 1, "tricomp completion: there is not enough memory for this."),
        (KeyboardInterrupt(), 130, "tricomp: interrupted"),
        (cli.Stopped(signal.SIGTERM), 143, "tricomp: terminated"),
    ],
)
def test_whatever_happens_is_told_in_one_line(monkeypatch, capsys, error, code, text):
    monkeypatch.setattr(completion, "completion", failing(error))
    assert cli.main(["completion", "bash"]) == code
    assert capsys.readouterr().err == f"{text}\n"


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(completion, "completion", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["completion", "bash"])


def test_handlers_of_signals_and_logs_are_put_back(monkeypatch):
    log = logging.getLogger("tricomp")
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), log.level, list(log.handlers)]
    cli.main(["decompress", "none.tri"])
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), log.level, list(log.handlers)] == before


@pytest.mark.parametrize(
    ("options", "level"),
    [([], logging.WARNING), (["-q"], logging.ERROR), (["-v"], logging.INFO), (["-vv"], logging.DEBUG)],
)
def test_the_log_of_the_library_is_shown(monkeypatch, capsys, options, level):
    def warn(options):
        for each in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("tricomp").log(each, "at %d", each)
        return 0

    monkeypatch.setattr("tricomp.cli.compress.compress", warn)
    assert cli.main(["compress", *options, "x"]) == 0
    expected = [f"tricomp: at {each}" for each in (10, 20, 30, 40) if each >= level]
    assert capsys.readouterr().err.splitlines() == expected


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    np.save(tmp_path / "a.npy", weights((1000, 300)))
    command = [*COMMAND, "compress", "-c", tmp_path / "a.npy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.read(10)
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 1


def test_text_from_files_cannot_move_the_cursor():
    assert console.printable("ä b'\"\\") == "ä b'\"\\"
    assert console.printable("a\nb\x1b[31m\u202e\udc80") == r"a\nb\x1b[31m\u202e\udc80"


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (5 << 30, "5.00 GiB"),
        (3000 << 40, "3000.00 TiB"),
    ],
)
def test_sizes_for_people(n, text):
    assert console.count_bytes(n) == text


def test_progress_is_for_terminals_alone(monkeypatch):
    options = argparse.Namespace(quiet=False, json=False)
    with progress.shown(options, "x") as draw:
        assert draw is None
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    with progress.shown(options, "x") as draw:
        assert draw is not None
    for silent in ({"quiet": True, "json": False}, {"quiet": False, "json": True}):
        with progress.shown(argparse.Namespace(**silent), "x") as draw:
            assert draw is None


def test_progress_shows_rate_and_time_left(tmp_path):
    np.savez(tmp_path / "a.npz", *[weights((300, 301), seed) for seed in range(4)])
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, "compress", tmp_path / "a.npz"], stderr=theirs) as started:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(ours)
    assert started.returncode == 0
    assert b"a.npz:   0%" in shown or b"a.npz: 0.00B" in shown
    assert b"B/s" in shown
    assert shown.rstrip().endswith(b"a.npz.tri)")


@pytest.mark.parametrize(("shell", "option"), [("bash", "-n"), ("zsh", "-n"), ("fish", "-n")])
def test_completion_is_a_script_of_its_shell(shell, option, tmp_path, capsys):
    shtab = pytest.importorskip("shtab")
    if shell not in shtab.SUPPORTED_SHELLS:
        pytest.skip(f"this shtab does not know {shell}")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for expected in ("decompress", "patch-from", "completion", "verbose", shtab.FILE[shell]):
        assert expected in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, option, tmp_path / "script"], check=True)


def test_bash_completes_subcommands_options_and_files(tmp_path):
    pytest.importorskip("shtab")
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    (tmp_path / "weights.npy").touch()
    script = run("completion", "bash").stdout

    def completed(*words):
        line = f"{script}\ncompopt() {{ :; }}\nCOMP_WORDS=({' '.join(map(repr, words))})\nCOMP_CWORD={len(words) - 1}\n"
        line += '"$(complete -p tricomp | sed "s/.*-F \\([^ ]*\\).*/\\1/")"\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False)
        return {word.strip() for word in done.stdout.split("\n")}

    assert "compress" in completed("tricomp", "comp")
    assert "--patch-from" in completed("tricomp", "compress", "--pa")
    assert "dense" in completed("tricomp", "compress", "--tier", "d")
    assert "weights.npy" in completed("tricomp", "compress", "we")


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "tricomp completion: shtab is not installed. Run: pip install 'tricomp[cli]'\n"


def test_nothing_but_the_file_goes_to_standard_output_when_standard_error_is_closed(tmp_path):
    np.save(tmp_path / "a.npy", weights((33, 65)))
    command = [*COMMAND, "compress", "-v", "-c", "a.npy"]
    expected = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    closing = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    assert subprocess.run(closing, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout == expected
    done = subprocess.run([*closing[:-1], "none.npy"], cwd=tmp_path, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_closed_standard_output_is_one_line_unless_nothing_goes_there(tmp_path):
    np.save(tmp_path / "a.npy", weights((33, 65)))
    for arguments, told in ((["compress", "-q", "a.npy"], ""), *(
        (arguments, "standard output is closed")
        for arguments in (["compress", "-c", "a.npy"], ["inspect", "a.npy.tri"], ["inspect", "--json", "a.npy.tri"])
    )):  # fmt: skip
        closing = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *arguments]
        done = subprocess.run(closing, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == (1 if told else 0)
        assert told in done.stderr
        assert done.stderr.count("\n") == bool(told)


@pytest.mark.parametrize("command", ["inspect", "verify", "export --to npz", "compress --base"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    np.save(tmp_path / "a.npy", weights((5, 3)))
    done = run(*command.split(), "pipe", *(["a.npy"] if "base" in command else []), cwd=tmp_path, timeout=60)
    assert done.returncode in (1, 2)
    assert "pipe: is not a regular file." in done.stderr


@pytest.mark.parametrize(
    ("short", "command"), [("-z", "compress"), ("-d", "decompress"), ("-t", "verify"), ("-l", "inspect")]
)
def test_the_letters_of_zstd_are_the_commands(short, command, tmp_path, capsys):
    np.save(tmp_path / "a.npy", weights((30, 31)))
    given = tmp_path / ("a.npy" if command == "compress" else "a.npy.tri")
    if command != "compress":
        assert cli.main(["compress", str(tmp_path / "a.npy"), "-q"]) == 0
    assert cli.main([short, str(given), *(["-f"] if command == "decompress" else [])]) == 0
    told = capsys.readouterr()
    assert "a.npy" in told.out + told.err


def test_no_input_is_standard_input(tmp_path):
    np.save(tmp_path / "a.npy", weights((30, 31)))
    packed = subprocess.run(
        [*COMMAND, "compress"], input=(tmp_path / "a.npy").read_bytes(), capture_output=True, check=True
    )
    back = subprocess.run([*COMMAND, "-d"], input=packed.stdout, capture_output=True, check=True)
    assert back.stdout == (tmp_path / "a.npy").read_bytes()


def test_threads_are_taken_wherever_something_is_coded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(70_000, dtype=np.float32))
    np.save("base.npy", np.arange(1, 70_001, dtype=np.float32))
    with tricomp.Store("run") as store:
        store.save(1, {"w": np.arange(7)})
        store.save(2, {"w": np.arange(1, 8)})
    seen: list[int | None] = []
    made = tricomp.codec.Engine.__post_init__

    def noted(engine):
        made(engine)
        seen.append(engine.threads)

    monkeypatch.setattr(tricomp.codec.Engine, "__post_init__", noted)
    for threads, expected in (("3", 3), ("0", None)):
        for command in (
            ["compress", "a.npy", "-f"],
            ["compress", "a.npy", "--base", "base.npy", "-o", "b.tri", "-f"],
            ["decompress", "b.tri", "--base", "base.npy", "-o", "b.npy", "-f"],
            ["verify", "a.npy.tri", "run"],
            ["diff", "a.npy.tri", "a.npy"],
            ["export", "a.npy.tri", "--to", "npz", "-f"],
            ["export", "a.npy.tri", "--to", "tri", "-o", "c.tri", "-f"],
            ["store", "verify", "run"],
            ["store", "rebase", "run", "2"],
            ["store", "export", "run", "1", "--to", "npz", "-f"],
        ):
            seen.clear()
            assert cli.main([*command, "-q", "-T", threads]) == 0, capsys.readouterr().err
            decoding = {max((expected or cores()) - 1, 1)} if command[0] == "decompress" else set()  # one writes
            assert set(seen) - {None} == {expected} - {None} | decoding, command
    assert cli.main(["verify", "a.npy.tri", "-T", "100000"]) == 1
    assert "tricomp verify: threads: expected a number from 1 to 4096" in capsys.readouterr().err
