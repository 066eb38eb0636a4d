"""`tricomp compress` and `tricomp decompress`: zstd's manners, many inputs, and everything that can go wrong."""

import json
import os
import pickle
import resource
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tricomp
from tests.cases import stepped, weights
from tests.test_archive import contents, model, save_file, sharded
from tricomp import cli

COMMAND = [sys.executable, "-m", "tricomp.cli"]


def run(*arguments, code=0, **options):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, check=False, **options)
    assert done.returncode == code, done.stderr.decode()
    return done


def call(*arguments):
    """Run the command in this process; its exit code, those of argparse too."""
    try:
        return cli.main([str(each) for each in arguments])
    except SystemExit as stopped:
        return stopped.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is where the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(capsys):
    """What came on stderr: one line without a traceback. And nothing on stdout."""
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    return shown.err


def test_there_and_back(folder, capsys):
    save_file(model(), "m.safetensors", {"x": "y"})
    data = (folder / "m.safetensors").read_bytes()
    assert call("compress", "m.safetensors") == 0
    n_bytes = os.path.getsize("m.safetensors.tri")
    share = f"{100 * n_bytes / len(data):.2f} %"
    expected = f"m.safetensors: {share} ({len(data) / 1024:.2f} KiB => {n_bytes / 1024:.2f} KiB, m.safetensors.tri)\n"
    assert one_line(capsys) == expected
    os.rename("m.safetensors", "original")
    assert call("decompress", "m.safetensors.tri") == 0
    expected = f"m.safetensors.tri: {len(data) / 1024:.2f} KiB => m.safetensors, byte for byte\n"
    assert one_line(capsys) == expected
    assert contents(folder).keys() == {"original", "m.safetensors", "m.safetensors.tri"}
    assert (folder / "m.safetensors").read_bytes() == data


def test_a_file_that_comes_back_equal_only_is_told(folder, capsys):
    np.savez_compressed("a.npz", x=weights((33, 65)))
    assert call("compress", "a.npz") == 0
    assert one_line(capsys).endswith("a.npz.tri); restores to an equal file, not byte for byte\n")
    assert call("decompress", "-f", "a.npz.tri") == 0
    assert one_line(capsys).endswith("=> a.npz, an equal file, written anew\n")


def test_quiet_verbose_and_json(folder, capsys):
    save_file(model(), "m.safetensors")
    assert call("compress", "-q", "m.safetensors") == 0
    assert capsys.readouterr() == ("", "")
    assert call("compress", "-fv", "m.safetensors") == 0
    assert "leaves, " in capsys.readouterr().err.splitlines()[1]
    assert call("compress", "-f", "--json", "m.safetensors", "none") == 1
    shown = capsys.readouterr()
    done, failed = map(json.loads, shown.out.splitlines())
    assert {key: done[key] for key in ("command", "input", "output", "format", "is_exact", "leaves", "parent")} == {
        "command": "compress",
        "input": "m.safetensors",
        "output": "m.safetensors.tri",
        "format": "safetensors",
        "is_exact": True,
        "leaves": 5,
        "parent": None,
    }
    assert done["input_bytes"] == os.path.getsize("m.safetensors")
    assert done["output_bytes"] == os.path.getsize("m.safetensors.tri")
    assert done["content_id"] == tricomp.content_id(tricomp.load("m.safetensors.tri"))
    assert failed["kind"] == "MissingFile"
    assert failed["error"] in shown.err
    assert call("decompress", "--json", "-f", "m.safetensors.tri") == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == ["m.safetensors"]


def test_a_base(folder, capsys):
    save_file(model(), "old.safetensors")
    save_file(model() | {"h.0.weight": stepped(model()["h.0.weight"])}, "new.safetensors")
    data = (folder / "new.safetensors").read_bytes()
    assert call("compress", "new.safetensors", "--patch-from", "old.safetensors") == 0
    assert one_line(capsys).endswith(", against old.safetensors\n")
    assert call("compress", "-q", "old.safetensors", "--rm") == 0
    assert call("decompress", "-f", "new.safetensors.tri") == 1
    assert "was made against 'old.safetensors'" in one_line(capsys)
    assert call("decompress", "-f", "new.safetensors.tri", "--base", "none") == 1
    assert one_line(capsys) == "tricomp decompress: none: there is no such file. Check the path.\n"
    assert call("decompress", "-fq", "new.safetensors.tri", "--base", "old.safetensors.tri", "-o", "again") == 0
    assert (folder / "again").read_bytes() == data
    np.save("other.npy", weights((3, 5)))
    assert call("compress", "-f", "new.safetensors", "--base", "other.npy") == 1
    assert "shares no leaf with the base other.npy" in one_line(capsys)


def test_tiers_and_threads(folder):
    save_file({"w": weights((300, 301))}, "m.safetensors")
    for tier, threads in (("dense", 0), ("fast", 2)):
        assert call("compress", "-q", "--tier", tier, "-T", threads, "-o", f"{tier}.tri", "m.safetensors") == 0
    assert os.path.getsize("dense.tri") < os.path.getsize("fast.tri")
    with tricomp.open("fast.tri") as file:
        assert file.plan("w").entropy == "index"
    assert call("compress", "-T", "-1", "m.safetensors") == 2
    assert call("compress", "-T", "x", "m.safetensors") == 2


def tree_of_models(folder):
    """Folders with a model in shards, two tensor files of one name, other files, hidden ones; what is of tensors."""
    sharded(folder / "in" / "big" if (folder / "in").mkdir() or True else folder)
    (folder / "in" / "a" / "b").mkdir(parents=True)
    save_file(model(1), folder / "in" / "a" / "m.safetensors")
    np.save(folder / "in" / "a" / "b" / "m.npy", weights((17, 33)))
    known = contents(folder / "in")
    (folder / "in" / "README.md").write_text("# read me\n")
    (folder / "in" / "empty").touch()
    (folder / "in" / "big" / "config.json").write_text("{}")
    (folder / "in" / ".hidden.npy").write_bytes(b"\x93NUMPY")
    return known


def test_folders_are_mirrored(folder, capsys):
    known = tree_of_models(folder)
    before = contents(folder / "in")
    assert call("compress", "in", "-o", "packed") == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(" %; 3 other files left alone")
    assert set(contents(folder / "packed")) == {
        "a/b/m.npy.tri",
        "a/m.safetensors.tri",
        "big/model.safetensors.index.tri",
    }
    assert call("decompress", "packed", "-o", "again/") == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("3 files: ")
    assert contents(folder / "again") == known
    assert contents(folder / "in") == before


def test_folders_in_place_and_inputs_removed_when_done(folder, capsys):
    known = tree_of_models(folder)
    others = {name: data for name, data in contents(folder / "in").items() if name not in known}
    assert call("compress", "in", "--rm") == 0
    packed = contents(folder / "in")
    assert packed.keys() - others.keys() == {
        "a/b/m.npy.tri",
        "a/m.safetensors.tri",
        "big/model.safetensors.index.tri",
    }
    assert call("decompress", "in", "--rm", "-q") == 0
    assert contents(folder / "in") == known | others


def test_a_base_in_the_folder_is_left_alone(folder, capsys):
    (folder / "in").mkdir()
    for seed in range(3):
        save_file(model() | {"counts": np.full(31, seed, np.int64)}, f"in/{seed}.safetensors")
    assert call("compress", "in", "--base", "in/0.safetensors", "--rm") == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("; 1 other file left alone")
    assert contents(folder / "in").keys() == {"0.safetensors", "1.safetensors.tri", "2.safetensors.tri"}


def test_a_folder_without_anything_to_do(folder, capsys):
    (folder / "in").mkdir()
    (folder / "in" / "README.md").write_text("# read me\n")
    assert call("compress", "in") == 0
    assert one_line(capsys) == "0 files; 1 other file left alone\n"
    np.save("in/a.npy", weights((9, 9)))
    assert call("compress", "in") == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("1 file: ")


def test_patterns_that_the_shell_left_alone(folder, capsys):
    for name in ("a1.npy", "a2.npy", "b1.npy", "[x].npy"):
        np.save(name, weights((9, 9)))
    assert call("compress", "a*.npy", "[x].npy") == 0
    assert set(contents(folder)) == {"a1.npy", "a1.npy.tri", "a2.npy", "a2.npy.tri", "b1.npy", "[x].npy", "[x].npy.tri"}
    assert capsys.readouterr().err.splitlines()[-1].startswith("3 files: ")
    assert call("compress", "c*.npy") == 1
    assert one_line(capsys) == "tricomp compress: c*.npy: there is no such file. Check the path.\n"
    assert call("compress", "-f", "a*.npy", "-o", "one") == 2
    assert "2 inputs need a folder; end its name with /" in capsys.readouterr().err
    assert call("compress", "-q", "a*.npy", "-o", "one/") == 0
    assert set(contents(folder / "one")) == {"a1.npy.tri", "a2.npy.tri"}


def test_an_index_stands_for_its_shards(folder, capsys):
    sharded(folder / "m")
    given = sorted(str(path) for path in (folder / "m").iterdir())
    assert call("compress", *given, *given) == 0
    assert [name for name in contents(folder / "m") if name.endswith(".tri")] == ["model.safetensors.index.tri"]
    os.unlink(folder / "m" / "model-00002-of-00003.safetensors")
    capsys.readouterr()
    assert call("compress", "-f", folder / "m" / "model.safetensors.index.json") == 1
    assert "model-00002-of-00003.safetensors" in one_line(capsys)


def test_outputs_of_one_name_are_told(folder, capsys):
    for name in ("a", "b"):
        (folder / name).mkdir()
        np.save(f"{name}/m.npy", weights((9, 9), ord(name)))
    assert call("compress", "-f", "a/m.npy", "b/m.npy", "-o", "out/") == 1
    err = capsys.readouterr().err.splitlines()
    assert err[1].startswith("tricomp compress: out/m.npy.tri: is the output of another input already")
    assert tricomp.load("out/m.npy.tri").tobytes() == weights((9, 9), ord("a")).tobytes()
    assert err[-1].endswith("; 1 failed")


def test_one_failure_does_not_stop_the_others(folder, capsys):
    np.save("a.npy", weights((9, 9)))
    np.save("b.npy", weights((9, 9)))
    (folder / "text.txt").write_text("hello")
    assert call("compress", "a.npy", "none.npy", "text.txt", "b.npy", "--rm") == 1
    assert contents(folder).keys() == {"a.npy.tri", "b.npy.tri", "text.txt"}
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["a.npy", "tricomp compress", "tricomp compress", "b.npy", "2 files"]


def test_standard_input_and_output(folder):
    save_file(model(), "m.safetensors")
    data = (folder / "m.safetensors").read_bytes()
    for arguments in (["-"], ["-", "-c"], ["-", "-o", "-"]):
        packed = run("compress", *arguments, input=data)
        assert packed.stderr == b""
        restored = run("decompress", *arguments, input=packed.stdout)
        assert (restored.stdout, restored.stderr) == (data, b"")
    (folder / "x.tri").write_bytes(packed.stdout)
    assert run("decompress", "-c", "x.tri").stdout == data
    run("compress", "-", "-o", "y.tri", input=data)
    run("decompress", "y.tri")
    assert (folder / "y.safetensors").read_bytes() == data
    failed = run("compress", "-", input=b"hello", code=1)
    assert failed.stdout == b""
    assert failed.stderr.startswith(b"tricomp compress: standard input: expected a file of tensors")
    failed = run("decompress", "-", input=b"hello", code=1)
    assert failed.stderr.startswith(b"tricomp decompress: standard input: is not a tricomp file")
    assert set(contents(folder)) == {"m.safetensors", "x.tri", "y.tri", "y.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("a.npy b.npy -c", "standard output takes one input at a time"),
        ("a.npy - ", "standard output takes one input at a time"),
        ("a.npy -c -o x", "-c and -o exclude each other"),
        ("a.npy -c --rm", "remove it yourself"),
        ("- -o x --rm", "standard input cannot be removed"),
        ("a.npy -c --json", "--json goes to standard output"),
        ("a.npy b.npy -o a.npy", "2 inputs need a folder"),
        ("a.npy --rm -k", "not allowed with argument"),
        ("a.npy --tier best", "invalid choice"),
    ],
)
def test_wrong_use_touches_nothing(folder, capsys, arguments, text):
    np.save("a.npy", weights((9, 9)))
    np.save("b.npy", weights((9, 9)))
    before = contents(folder)
    assert call("compress", *shlex.split(arguments)) == 2
    assert text in capsys.readouterr().err
    assert contents(folder) == before


def test_a_terminal_gets_no_binary(folder, capsys, monkeypatch):
    np.save("a.npy", weights((9, 9)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call("compress", "-c", "a.npy") == 2
    assert "standard output is a terminal; name an output with -o, or insist with -f" in capsys.readouterr().err


def test_outputs_that_are_there_and_places_that_are_not(folder, capsys):
    np.save("a.npy", weights((9, 9)))
    (folder / "a.npy.tri").write_bytes(b"precious")
    assert call("compress", "a.npy", "--rm") == 1
    assert one_line(capsys).startswith("tricomp compress: a.npy.tri: is there already. Pass -f (overwrite=True)")
    assert call("compress", "a.npy", "-o", "none/x.tri") == 1
    assert f"none/x.tri: cannot be written: there is no folder {folder}/none. Make it first." in one_line(capsys)
    assert call("compress", "a.npy", "-o", "a.npy/x/") == 1
    assert "a.npy/x/: cannot be written: Not a directory." in one_line(capsys)
    assert contents(folder).keys() == {"a.npy", "a.npy.tri"}
    assert (folder / "a.npy.tri").read_bytes() == b"precious"
    assert call("compress", "-fq", "a.npy") == 0
    assert call("decompress", "a.npy.tri") == 1
    assert one_line(capsys).startswith("tricomp decompress: a.npy: is there already")
    os.rename("a.npy.tri", "x")
    assert call("decompress", "x") == 1
    assert "x: does not end in .tri, so there is no name for the output. Give one with -o." in one_line(capsys)


def test_a_folder_that_is_read_only(folder, capsys):
    np.save("a.npy", weights((9, 9)))
    closed = folder / "closed"
    if os.geteuid() == 0:  # who may write everywhere, but not there
        closed = "/sys"
        if not os.path.isdir(closed):
            pytest.skip("no folder is closed to this user")
    else:
        closed.mkdir(mode=0o555)
    assert call("compress", "a.npy", "-o", f"{closed}/x.tri", "--rm") == 1
    assert f"{closed}/x.tri: cannot be written" in one_line(capsys)
    assert contents(folder).keys() == {"a.npy"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text.txt", b"hello, world\n"),
        ("empty.safetensors", b""),
        ("short.safetensors", b"\x10\0\0\0"),
        ("noise.npy", bytes(range(256))),
        ("image.png", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        ("zip.npz", b"PK\x03\x04" + bytes(100)),
        ("x.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
    ],
)
def test_what_is_no_tensor_file_is_refused(folder, capsys, name, data):
    (folder / name).write_bytes(data)
    assert call("compress", name, "--rm") == 1
    assert one_line(capsys).startswith(f"tricomp compress: {name}: ")
    assert contents(folder) == {name: data}


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "x.bin", "x.pkl", "zip.pt", "x.npy", "x.npz"])
def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(folder, capsys, name):
    trap = folder / "trap"
    state = {"w": np.ones(3), "evil": Evil(trap)}
    if name == "zip.pt":
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.ones(3), "evil": Evil(trap)}, name)
    elif name.endswith("npy"):
        np.save(name, np.array([Evil(trap)], object), allow_pickle=True)
    elif name.endswith("npz"):
        np.savez(name, w=np.ones(3), evil=np.array([Evil(trap)], object))
    else:
        (folder / name).write_bytes(pickle.dumps(state))
    data = (folder / name).read_bytes()
    assert call("compress", name, "--rm") == 1
    assert one_line(capsys).startswith(f"tricomp compress: {name}: ")
    assert contents(folder) == {name: data}
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # it would have


def limited(n_bytes):
    """What makes files above n_bytes fail in a subprocess, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("name", ["one", "many"])
def test_a_disk_that_fills_up_leaves_no_part_of_an_output(folder, name):
    path = sharded(folder / "m")
    if name == "one":
        path = folder / "m" / "m.safetensors"
        save_file(model(), path)
    before = contents(folder)
    failed = run("compress", path, "--rm", code=1, preexec_fn=limited(10_000))
    assert failed.stderr.count(b"\n") == 1
    assert b"The disk is full" in failed.stderr
    assert contents(folder) == before
    run("compress", path)
    packed = next(folder.rglob("*.tri"))
    before = contents(folder)
    failed = run("decompress", packed, "-o", f"{folder}/again/", "--rm", code=1, preexec_fn=limited(10_000))
    assert failed.stderr.count(b"\n") == 1
    assert b"The disk is full" in failed.stderr
    assert contents(folder) == before
    failed = run("compress", "-", "-o", "x.tri", input=bytes(100_000), code=1, preexec_fn=limited(10_000))
    assert b"standard input: cannot be kept in" in failed.stderr
    assert contents(folder) == before


@pytest.mark.parametrize(("number", "code", "text"), [(2, 130, "interrupted"), (15, 143, "terminated")])
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_signal_in_the_middle_leaves_no_part_of_an_output(folder, command, number, code, text):
    save_file({str(i): weights((512, 1024), i) for i in range(12)}, "m.safetensors")
    given = "m.safetensors"
    if command == "decompress":
        assert call("compress", "-q", "--tier", "fast", given, "--rm") == 0
        given += ".tri"
    before = contents(folder)
    with subprocess.Popen([*COMMAND, command, given, "--rm"], stderr=subprocess.PIPE, cwd=folder) as started:
        assert started.stderr is not None
        while len(os.listdir(folder)) == len(before) and started.poll() is None:
            time.sleep(0.001)
        assert started.poll() is None, "it was done before it could be stopped"
        started.send_signal(number)
        assert started.stderr.read() == f"tricomp: {text}\n".encode()
    assert started.returncode == code
    assert contents(folder) == before


def test_a_signal_while_standard_input_is_read(folder):
    with subprocess.Popen(
        [*COMMAND, "compress", "-", "-o", "x.tri"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as started:
        assert started.stdin is not None
        assert started.stderr is not None
        while not os.listdir(folder):
            time.sleep(0.001)
        started.stdin.write(bytes(1 << 17))
        time.sleep(0.1)  # so that it waits for more
        started.send_signal(signal.SIGINT)
        assert started.stderr.read() == b"tricomp: interrupted\n"
    assert started.returncode == 130
    assert contents(folder) == {}


def test_names_as_long_as_a_file_system_takes(folder):
    name = f"{'x' * 247}.npy"
    np.save(name, weights((9, 9)))
    assert call("compress", "-q", "--rm", name) == 0
    assert contents(folder).keys() == {f"{name}.tri"}
    assert call("decompress", "-q", f"{name}.tri") == 0
    assert np.array_equal(np.load(name), weights((9, 9)))


def test_several_files_need_a_folder(folder, capsys):
    for name in ("a.npy", "b.npy"):
        np.save(name, weights((9, 9)))
    assert call("compress", "a.npy", "b.npy", "-o", "one.tri") == 2
    assert "-o one.tri: 2 inputs need a folder; end its name with /" in capsys.readouterr().err
    assert set(contents(folder)) == {"a.npy", "b.npy"}
