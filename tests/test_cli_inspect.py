"""tricomp inspect, verify and diff: what is told is true, exit codes, hostile names, 10 GB told about in 100 MB."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import tricomp
from tests.cases import moments, stepped, weights
from tests.sparse_file import write_sparse_file
from tricomp.cli import main
from tricomp.container import bin_start
from tricomp.groups import MOST_GROUPS, group_names
from tricomp.inspection import inspect
from tricomp.plan import Plan


def checkpoint(step):
    """A model of odd sizes with the state of an optimizer, as a Checkpointer keeps it."""
    model, state = {}, {}
    for i, shape in enumerate([(130, 257), (33,), (3, 5, 7)]):
        w, v = weights(shape, i), moments(shape, i)
        for k in range(step):
            w, v = stepped(w, k), v * np.float32(0.999)
        model[f"h.{i}.weight"] = w
        state[i] = {"step": np.float32(step), "exp_avg": weights(shape, 9 + i + step), "exp_avg_sq": v}
    return {"model": model, "optimizer": {"state": state, "lr": 0.1 / (1 + step)}, "ids": np.arange(300)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """0.tri, 1.tri and 2.tri, each a delta of the one before; fast.tri, bounded.tri; run: a store of the same."""
    path = tmp_path_factory.mktemp("inspect")
    tricomp.save(path / "0.tri", checkpoint(0), metadata={"run": "a", "lr": 0.5, "notes": {"x": 1}})
    tricomp.save(path / "1.tri", checkpoint(1), reference=path / "0.tri")
    with tricomp.open(path / "1.tri", reference=path / "0.tri") as one:
        tricomp.save(path / "2.tri", checkpoint(2), reference=one)
    tricomp.save(path / "fast.tri", checkpoint(0), spec=tricomp.Spec(tier="fast"))
    kept = {"*/exp_avg": 7, "*/exp_avg_sq": 3}
    tricomp.save(path / "bounded.tri", checkpoint(0), spec=tricomp.Spec(keep_mantissa_bits=kept))
    with tricomp.Store(path / "run") as store:
        for step in range(3):
            store.save(step * 10, checkpoint(step))
    return path


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run the command in the folder: exit code, stdout, stderr."""
    monkeypatch.chdir(folder)

    def run(*argv):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def flipped(path, target, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    target.write_bytes(data)


# inspect


@pytest.mark.parametrize("name", ["0.tri", "1.tri", "2.tri", "fast.tri", "bounded.tri"])
def test_facts_add_up(run, folder, name):
    code, out, err = run("inspect", name, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    facts = json.loads(out)
    with tricomp.open(folder / name) as file:  # a delta without its parent
        assert facts["content_id"] == file.content_id
        assert facts["parent"] == file.parent
        assert [leaf["path"] for leaf in facts["leaves"]] == list(file)
        for leaf in facts["leaves"]:
            about, plan = file.leaf(leaf["path"]), file.plan(leaf["path"])
            assert (leaf["dtype"], leaf["shape"]) == (about.dtype.name, list(about.shape))
            assert (leaf["raw_bytes"], leaf["predict"], leaf["entropy"]) == (about.n_bytes, plan.predict, plan.entropy)
            assert leaf["keep_mantissa_bits"] == plan.keep_mantissa_bits
            if leaf["n_sharing"] == 1:
                assert leaf["coded_bytes"] == file.coded_bytes(leaf["path"])
    for kind in ("leaves", "groups"):
        for entry in facts[kind]:
            assert sum(entry["parts"].values()) == entry["coded_bytes"]
            assert entry["bits"] == 8 * entry["coded_bytes"] / entry["n_elements"]
        assert sum(entry["coded_bytes"] for entry in facts[kind]) + facts["other_bytes"] == facts["n_bytes"]
        assert sum(entry["raw_bytes"] for entry in facts[kind]) == facts["raw_bytes"]
    assert facts["n_bytes"] == os.path.getsize(folder / name)
    assert [group["name"] for group in facts["groups"]] == [
        "model",
        "optimizer/state/*/step",
        "optimizer/state/*/exp_avg",
        "optimizer/state/*/exp_avg_sq",
        "ids",
    ]


def test_text(run):
    code, out, err = run("inspect", "0.tri")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("0.tri: 13 leaves, ")
    assert "format 1, tricomp " in lines[1]
    assert lines[2:4] == ["  stands alone", "  metadata: run=a, lr=0.5, notes (1 entry)"]
    assert any(line.startswith("group ") and "ratio  symbols  remainder" in line for line in lines)
    assert any(line.startswith("model/h.0.weight ") and "float32[130,257]" in line for line in lines)
    assert all(len(line) <= 120 and line == line.rstrip() for line in lines)
    assert "\x1b" not in out
    _, out, _ = run("inspect", "2.tri", "run@latest")
    first, second = out.split("\n\nrun/step-000000000020.tri: ")
    with tricomp.open("1.tri") as file:
        assert f"delta of content id {file.content_id}, 2 saves after a keyframe" in first
        assert f"delta of content id {file.content_id}, 2 saves after a keyframe" in second
    assert run("inspect", "0.tri", "-q") == (0, "", "")


def test_rounded_leaves_are_shown(run):
    _, out, _ = run("inspect", "bounded.tri")
    assert "  rounded: 3 leaves, 3 mantissa bits kept\n  rounded: 3 leaves, 7 mantissa bits kept\n" in out
    assert any("exp_avg " in line and ", 7 mantissa bits kept" in line for line in out.splitlines())
    groups = json.loads(run("inspect", "bounded.tri", "--json")[1])["groups"]
    assert [group["keep_mantissa_bits"] for group in groups] == [[], [], [7], [3], []]


def test_leaves_and_sort(run):
    _, out, _ = run("inspect", "0.tri", "--leaves", "model/*", "--leaves", "ids", "--sort", "raw", "--json")
    facts = json.loads(out)
    assert [leaf["path"] for leaf in facts["leaves"]] == [*(f"model/h.{i}.weight" for i in range(3)), "ids"]
    assert facts["n_leaves"] == 13
    _, out, _ = run("inspect", "0.tri", "--leaves", "*_sq", "--leaves", "ids", "--sort", "raw")
    order = [line.split()[0] for line in out.splitlines() if line.startswith(("opt", "ids")) and "[" in line]
    assert order == [f"optimizer/state/{i}/exp_avg_sq" for i in (0,)] + ["ids"] + [
        f"optimizer/state/{i}/exp_avg_sq" for i in (2, 1)
    ]
    for sort in ("order", "path", "coded", "bits", "ratio"):
        assert run("inspect", "0.tri", "--sort", sort)[0] == 0
    code, out, err = run("inspect", "0.tri", "--leaves", "nope*")
    assert (code, out) == (1, "")
    advice = "See keys() or tricomp inspect -v."
    assert err == f"tricomp inspect: 0.tri: no leaf matches 'nope*' among its 13 leaves. {advice}\n"


def test_hostile_and_long_names(run, tmp_path):
    names = ["a\x1b[31m\n\u202eb", "x" * 200 + ".weight", "y" * 200 + ".weight"]
    tricomp.save(tmp_path / "h.tri", {name: np.arange(3) for name in names}, metadata={"k\n": "v\x07" * 100})
    _, out, err = run("inspect", str(tmp_path / "h.tri"))
    assert not any(c in out + err for c in "\x1b\x07\u202e")
    rows = [line for line in out.splitlines() if "int64[3]" in line]
    assert len(rows) == 3
    assert sum("xx..xx" in row and "x.weight" in row for row in rows) == 1
    assert all(len(row) <= 120 for row in rows[1:])


def test_what_is_no_file_to_inspect(run, folder, tmp_path):
    assert run("inspect", "run")[::2] == (
        1,
        "tricomp inspect: run: is a store. Use tricomp store list run, or name a step: run@latest\n",
    )
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    code, _, err = run("inspect", str(tmp_path / "a.npz"))
    assert code == 1
    assert err.endswith("a.npz: is a npz file, not a .tri file. Compress it first.\n")
    code, _, err = run("inspect", "nope.tri")
    assert (code, err) == (1, "tricomp inspect: nope.tri: there is no such file. Check the path.\n")
    (tmp_path / "cut.tri").write_bytes((folder / "0.tri").read_bytes()[:-1])
    code, _, err = run("inspect", str(tmp_path / "cut.tri"))
    assert code == 1
    assert "are no tail: it was cut at" in err
    assert err.count("\n") == 1
    assert run("inspect", "run@5")[::2] == (1, "tricomp inspect: step 5 is not in run. The nearest is step 0.\n")
    assert run("inspect")[0] == 2


def test_one_file_that_fails_does_not_keep_the_others_from_being_shown(run):
    code, out, err = run("inspect", "nope.tri", "0.tri", "run", "1.tri")
    assert (code, err.count("\n")) == (1, 2)
    heads = [line for line in out.splitlines() if line and not line.startswith(" ") and ".tri: " in line]
    assert [head.split(":")[0] for head in heads] == ["0.tri", "1.tri"]
    assert not out.startswith("\n")


def test_folders_of_files_and_stores(run, folder, tmp_path):
    for name in ("a.tri", "b/c.tri", ".hidden.tri", ".old/d.tri"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "0.tri", tmp_path / name)
    shutil.copytree(folder / "run", tmp_path / "b" / "run")
    assert run("verify", str(tmp_path), "--json")[0] == 0
    lines = run("verify", str(tmp_path))[1].splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/{name}" for name in ("a.tri", "b/c.tri", "b/run")]
    assert lines[2].endswith("3 steps intact")
    flipped(folder / "0.tri", tmp_path / "b" / "c.tri", 5000)
    assert run("verify", "-q", str(tmp_path))[0] == 1
    code, out, err = run("inspect", str(tmp_path / "b"), "--json")
    assert (code, json.loads(out)["name"]) == (1, f"{tmp_path}/b/c.tri")
    assert "b/run: is a store." in err
    (tmp_path / "none").mkdir()
    assert "holds no tensor file" in run("verify", str(tmp_path / "none"))[2]


def test_a_damaged_head_is_an_error(run, folder, tmp_path):
    with tricomp.open(folder / "0.tri") as file:
        entry = file._contents.frames[0]
    begin = entry.offset + len(bin_start(entry.sizes[0]))
    plan = Plan.from_wire(entry.plan)
    flipped(folder / "0.tri", tmp_path / "d.tri", begin + plan.side_bytes + 8)  # bytes of chunk 0
    code, out, err = run("inspect", str(tmp_path / "d.tri"))
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_a_thousand_small_leaves_share(run, tmp_path):
    tree = {f"layers.{i}.bias": weights((7,), i) for i in range(3000)} | {"w": weights((40, 40)), "e": np.zeros((0, 3))}
    tricomp.save(tmp_path / "s.tri", tree)
    with tricomp.open(tmp_path / "s.tri") as file:
        facts = inspect(file)
        assert sum(leaf.coded_bytes for leaf in facts.leaves) + facts.other_bytes == facts.n_bytes
        assert facts.leaves[0].n_sharing > 2900
    _, out, _ = run("inspect", str(tmp_path / "s.tri"))
    assert "layers.*.bias" in out
    assert "layers.7.bias" not in out
    assert "layers.7.bias" in run("inspect", "-v", str(tmp_path / "s.tri"))[1]


def test_where_a_compressed_file_came_from(run, tmp_path):
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(a, weights((40, 50)))
    np.save(b, stepped(weights((40, 50))))
    assert main(["compress", "-q", str(a), str(b), "-o", f"{tmp_path}/"]) in (0, None)
    assert main(["compress", "-q", "-f", str(b), "--base", str(a)]) == 0
    _, out, _ = run("inspect", f"{b}.tri")
    assert "  made of b.npy (npy, 7.94 KiB), restored byte for byte\n" in out
    assert "(a.npy)\n" in out
    facts = json.loads(run("inspect", f"{b}.tri", "--json")[1])
    expected = {"format": "npy", "name": "b.npy", "n_bytes": os.path.getsize(b), "is_exact": True}
    assert facts["origins"] == [expected]
    assert (facts["base"], facts["metadata"]) == ("a.npy", {})


def names(*paths):
    found = group_names(paths, [1] * len(paths))
    return {name: found.count(name) for name in found}


def test_groups_of_a_checkpoint():
    blocks = [f"h.{i}.{name}" for i in range(12) for name in ("ln_1.weight", "attn.weight", "mlp.weight")]
    slots = [f"optimizer/state/{i}/{slot}" for i in range(36) for slot in ("step", "exp_avg", "exp_avg_sq")]
    assert names(*(f"model/{name}" for name in blocks), *slots, "rng/torch", "rng/numpy/key") == {
        "model": 36,
        "optimizer/state/*/step": 36,
        "optimizer/state/*/exp_avg": 36,
        "optimizer/state/*/exp_avg_sq": 36,
        "rng": 2,
    }
    assert names("params/Dense_0/kernel", "opt/0/mu/Dense_0/kernel", "opt/0/nu/Dense_0/kernel", "opt/0/count") == {
        "params": 1,
        "opt/*/mu": 1,
        "opt/*/nu": 1,
        "opt/*/count": 1,
    }
    models = [f"model/{i}/{name}" for i in range(2) for name in blocks]
    assert names(*models, "x/y") == {"model/*": 72, "x": 1}


def test_groups_of_a_flat_dict():
    layers = [f"model.layers.{i}.{part}.weight" for i in range(32) for part in ("q", "k", "v", "norm")]
    assert names(*layers, "lm_head.weight") == {
        "model.layers.*.q.weight": 32,
        "model.layers.*.k.weight": 32,
        "model.layers.*.v.weight": 32,
        "model.layers.*.norm.weight": 32,
        "lm_head.weight": 1,
    }
    assert names("w", "b") == {"w": 1, "b": 1}
    assert names("a", "a.b", "a.c") == {"a": 1, "a.b": 1, "a.c": 1}
    assert names("") == {"": 1}
    assert names() == {}
    flat = [f"{letter}.x" for letter in "abcdefghi"]
    assert names("opt/0/v", "opt/1/v", *flat) == {"opt/*/v": 2, "": 9}
    assert names("a", "a.b", *(f"a.{i}.{c}" for i in range(9) for c in "xyzuvwrst")) == {"a": 83}
    many = [f"{letter}{other}.x" for letter in "abcdefgh" for other in "abcdefgh"]
    assert names(*many) == {"": 64}
    assert len(names(*(f"{a}.{b}.{c}" for a in "abc" for b in "abcd" for c in "abcde"))) <= MOST_GROUPS


MEASURED = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_DATA, (100 << 20, 100 << 20))
done = subprocess.run([sys.executable, "-m", "tricomp.cli", *sys.argv[1:]], stdout=subprocess.PIPE)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.stdout.flush()
sys.stdout.buffer.write(done.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB, sparse files")
def test_ten_gigabytes_in_little_memory(tmp_path):
    path = tmp_path / "large.tri"
    leaves = {f"model.layers.{i}.{part}.weight": (2048, 4099) for i in range(59) for part in ("q", "k", "v", "o", "up")}
    write_sparse_file(path, {"wte.weight": (50257, 12288), **leaves})  # wte has three bins
    assert os.path.getsize(path) > 10e9
    assert os.stat(path).st_blocks * 512 < 100 << 20
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for options in ([], ["-v"], ["--json"]):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, "inspect", str(path), *options],
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        print(f"inspect {options}: {time.perf_counter() - began:.2f} s")
        first, _, out = done.stdout.partition("\n")
        code, n_kib = map(int, first.split())
        print(f"{n_kib} KiB")
        assert (code, done.stderr) == (0, "")
        assert n_kib < 100 << 10
        if options == ["--json"]:
            facts = json.loads(out)
            assert len(facts["leaves"]) == 296
            assert {leaf["ratio"] < 1 for leaf in facts["leaves"]} == {True}
        else:
            assert "model.layers.*.q.weight" in out
            assert ("model.layers.58.up.weight" in out) == bool(options)


# verify


def test_verify(run):
    assert run("verify", "0.tri") == (0, "0.tri: intact (13 leaves, 395.50 KiB)\n", "")
    code, out, err = run("verify", "1.tri")
    assert (code, err) == (0, "")
    assert out.startswith("1.tri: checksums are right; ")
    assert " of its leaves could not be decoded without what they were made against: give it with --base" in out
    assert run("verify", "2.tri", "--base", "1.tri", "--base", "0.tri")[1].startswith("2.tri: intact (")
    assert run("verify", "run@20", "run")[:2] == (
        0,
        "run/step-000000000020.tri: intact (13 leaves, 395.50 KiB)\nrun: 3 steps intact\n",
    )
    assert run("verify", "-q", "0.tri", "run") == (0, "", "")
    results = [json.loads(line) for line in run("verify", "--json", "0.tri", "run")[1].splitlines()]
    assert results[0] == {
        "name": "0.tri",
        "n_leaves": 13,
        "n_skipped": 0,
        "raw_bytes": 404988,
        "faults": [],
        "is_clean": True,
    }
    assert results[1] == {"name": "run", "is_clean": True, "intact": [0, 10, 20], "broken": []}


def test_verify_takes_the_right_base_only(run, tmp_path):
    code, out, err = run("verify", "1.tri", "--base", "2.tri")
    assert (code, out) == (1, "")
    with tricomp.open("0.tri") as zero, tricomp.open("2.tri") as two:
        assert err == (
            f"tricomp verify: 1.tri: was made against content id {zero.content_id}, but given are 2.tri "
            f"({two.content_id}). Give what it was made against with --base.\n"
        )
    np.savez(tmp_path / "b.npz", w=weights((40, 40)))
    tricomp.save(tmp_path / "d.tri", {"w": stepped(weights((40, 40)))}, reference={"w": weights((40, 40))})
    assert "d.tri: intact (" in run("verify", str(tmp_path / "d.tri"), "--patch-from", str(tmp_path / "b.npz"))[1]


def test_verify_finds_damage_everywhere_and_goes_on(run, folder, tmp_path):
    size = os.path.getsize(folder / "0.tri")
    for at in [0, 5, 9, 10, 200, *range(size // 11, size, size // 11), size - 80, size - 1]:
        flipped(folder / "0.tri", tmp_path / "d.tri", at)
        code, out, err = run("verify", str(tmp_path / "d.tri"), "0.tri")
        assert code == 1, at
        assert "0.tri: intact (" in out
        assert err.startswith("tricomp verify: ")
        assert "Traceback" not in err


def test_verify_names_every_damaged_leaf(run, folder, tmp_path):
    data = bytearray((folder / "0.tri").read_bytes())
    with tricomp.open(folder / "0.tri") as file:
        for path in ("model/h.0.weight", "optimizer/state/0/exp_avg"):
            entry = file._frame_of[file._index[path]]
            data[entry.offset + entry.n_bytes // 2] ^= 1
    (tmp_path / "d.tri").write_bytes(data)
    code, out, err = run("verify", str(tmp_path / "d.tri"))
    assert code == 1
    assert out == f"{tmp_path}/d.tri: damaged in 2 places (13 leaves, 395.50 KiB)\n"
    assert "'model/h.0.weight'" in err
    assert "'optimizer/state/0/exp_avg'" in err
    (result,) = map(json.loads, run("verify", "--json", str(tmp_path / "d.tri"))[1].splitlines())
    assert (result["is_clean"], len(result["faults"])) == (False, 2)


def test_verify_of_what_is_none(run, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    code, _, err = run("verify", str(tmp_path / "a.npy"), "nope.tri", str(tmp_path))
    lines = err.splitlines()
    assert (code, len(lines)) == (1, 3)
    assert lines[0].endswith("a.npy: is a npy file, which has no checksums to compare.")
    assert lines[1] == "tricomp verify: nope.tri: there is no such file. Check the path."
    code, out, _ = run("verify", "--json", "nope.tri")
    assert (code, json.loads(out)["is_clean"]) == (1, False)


# diff


def test_diff(run, tmp_path):
    code, out, err = run("diff", "0.tri", "2.tri", "--base", "1.tri")
    assert (code, err, out.count("\n")) == (1, "", 1)
    assert out.startswith("0.tri and 2.tri differ: 12 of 13 leaves changed in ")
    assert out.endswith(" %); 1 plain value\n")
    assert run("diff", "run@0", "run@latest")[1].replace("run@0", "0.tri").replace("run@latest", "2.tri") == out
    assert run("diff", "0.tri", "1.tri")[0] == 1  # the one is the base of the other
    assert run("diff", "1.tri", "0.tri")[0] == 1
    assert run("diff", "-q", "0.tri", "1.tri") == (1, "", "")
    code, out, _ = run("diff", "-v", "0.tri", "1.tri")
    assert "  optimizer/lr: 0.1 and 0.05\n" in out
    assert any(line.startswith("model/h.0.weight ") for line in out.splitlines())
    assert run("diff", "0.tri", "run@0") == (0, "0.tri and run@0 are equal: 13 leaves, 100,947 words\n", "")


def test_diff_in_json(run):
    code, out, _ = run("diff", "0.tri", "1.tri", "--json")
    facts = json.loads(out)
    assert (code, facts["a"], facts["b"], facts["is_equal"]) == (1, "0.tri", "1.tri", False)
    a, b = (checkpoint(step)["model"]["h.0.weight"] for step in (0, 1))
    change = next(change for change in facts["changed"] if change["path"] == "model/h.0.weight")
    assert change["n_changed"] == np.count_nonzero(a != b)
    assert change["largest_absolute"] == np.abs(a.astype(float) - b).max()
    assert change["relative_norm"] == pytest.approx(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(a))
    assert facts["values"] == [{"path": "optimizer/lr", "a": "0.1", "b": "0.05"}]
    assert json.loads(run("diff", "0.tri", "0.tri", "--json")[1])["is_equal"]


def test_diff_of_other_formats(run, tmp_path):
    arrays: dict = {"w": weights((40, 40)), "b": weights((9,)), "only": np.arange(3)}
    np.savez(tmp_path / "a.npz", **arrays)
    tricomp.save(tmp_path / "a.tri", {"b": arrays["b"], "w": stepped(arrays["w"]), "i": np.zeros(2, np.int8)})
    code, out, _ = run("diff", str(tmp_path / "a.npz"), str(tmp_path / "a.tri"), "-v")
    assert code == 1
    assert "differ: 1 of 2 leaves changed in " in out
    assert "; 1 leaf only in " in out
    assert out.count("only in") == 4
    tricomp.save(tmp_path / "d.tri", {**arrays, "b": arrays["b"] * 2}, reference=arrays)
    assert run("diff", str(tmp_path / "a.npz"), str(tmp_path / "d.tri"))[0] == 1  # the npz is the delta's base


def test_diff_says_when_it_could_not_compare(run, folder, tmp_path):
    flipped(folder / "0.tri", tmp_path / "d.tri", os.path.getsize(folder / "0.tri") // 2)
    for argv in (
        ("0.tri", "nope.tri"),
        ("0.tri", "run"),
        ("0.tri", "run@7"),
        ("0.tri", "nope@7"),
        ("0.tri", "2.tri"),
        ("1.tri", "2.tri", "--base", "fast.tri"),
        (str(tmp_path / "d.tri"), "1.tri", "--base", "0.tri"),
    ):
        code, out, err = run("diff", *argv)
        if argv == ("1.tri", "2.tri", "--base", "fast.tri"):
            assert (code, err) == (1, "")  # the same content as 0.tri, coded otherwise
            continue
        assert (code, out) == (2, ""), argv
        assert err.startswith("tricomp diff: ")
        assert err.count("\n") == 1
    assert "is a store of several steps. Name one, as in run@20\n" in run("diff", "0.tri", "run")[2]
    assert run("diff", "0.tri")[0] == 2
