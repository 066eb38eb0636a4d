"""tricomp store and tricomp export: what is listed is true, what is removed was not needed, exports equal steps."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import tricomp
from tests.cases import equal, moments, stepped, weights
from tricomp import codec
from tricomp.cli import main
from tricomp.errors import TricompError
from tricomp.file import File
from tricomp.subset import Subset
from tricomp.verification import verify

STEPS = range(0, 60, 10)


def checkpoint(step):
    model = {"0.weight": weights((130, 129)), "0.bias": weights((33,), 1), "tied.weight": weights((130, 129))}
    for k in range(step // 10):
        model["0.weight"] = stepped(model["0.weight"], k)
    slots = {i: {"exp_avg": weights((130, 129), 5 + step + i), "exp_avg_sq": moments((33,), i)} for i in range(2)}
    return {"model": model, "optimizer": {"state": slots, "lr": 1.0 / (1 + step)}, "step": step}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "run"
    with tricomp.Store(path, keyframe=tricomp.KeyframeEvery(4)) as store:
        for step in STEPS:
            store.save(step, checkpoint(step), metadata={"loss": step / 10, "notes": {"a": 1}})
    return path


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A folder of one's own, which is the current one, with the store run in it: keyframes 0 and 40."""
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run the command: exit code, stdout, stderr."""

    def run(*argv):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def file_of(step, store="run"):
    return f"{store}/step-{step:012d}.tri"


def damage(path, at=None):
    with open(path, "r+b") as file:
        at = os.path.getsize(path) // 2 if at is None else at
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x5A]))


# store list


def test_list(run):
    code, out, err = run("store", "list", "run")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 8)
    assert lines[0].split() == ["step", "size", "of", "ratio", "kind", "saved", "metadata"]
    kinds = ["keyframe", "delta of 0", "delta of 10", "delta of 20", "keyframe", "delta of 40"]
    for line, step, kind in zip(lines[1:], STEPS, kinds, strict=False):
        assert re.fullmatch(
            rf" *{step} +\S+ KiB +\S+ KiB +\d\.\d\d  {kind} +\d{{4}}-\d\d-\d\d \d\d:\d\d  "
            rf"loss={step / 10}, notes \(1 entry\)",
            line,
        )
    assert lines[-1].startswith("run: 6 steps, ")


def test_list_in_json(run):
    facts = json.loads(run("store", "list", "run", "--json")[1])
    assert [step["step"] for step in facts["steps"]] == list(STEPS)
    assert [step["parent_step"] for step in facts["steps"]] == [None, 0, 10, 20, None, 40]
    assert facts["n_bytes"] == sum(os.path.getsize(file_of(step)) for step in STEPS)
    with tricomp.Store("run") as store:
        for step in facts["steps"]:
            with store.open(step["step"]) as file:
                assert (step["content_id"], step["parent"]) == (file.content_id, file.parent)
                assert step["metadata"] == file.metadata
                assert (step["n_bytes"], step["n_leaves"], step["is_loadable"]) == (file.n_bytes, len(file), True)
                assert step["saved"] == os.path.getmtime(file.name)


def test_list_tells_of_damaged_and_lost_steps(run):
    os.remove(file_of(10))
    damage(file_of(50), 20)
    code, out, err = run("store", "list", "run")
    assert code == 1
    assert err.startswith("tricomp store: run/step-000000000050.tri: header: checksum ")
    kinds = ["keyframe", "delta, parent missing", "delta, cannot be loaded", "keyframe"]
    assert all(f"  {kind}  " in line for kind, line in zip(kinds, out.splitlines()[1:-1], strict=True))
    facts = json.loads(run("store", "list", "run", "--json")[1])
    assert [step["is_loadable"] for step in facts["steps"]] == [True, False, False, True]
    assert [broken["step"] for broken in facts["damaged"]] == [50]


@pytest.mark.parametrize("action", [["list"], ["verify"], ["prune", "--keep-last", "1"], ["rebase", "1"]])
def test_a_store_that_is_not_there_is_not_made(run, folder, action):
    code, out, err = run("store", action[0], "nope", *action[1:])
    assert (code, out) == (1, "")
    assert err == "tricomp store: there are no checkpoints in nope. Check the path.\n"
    assert sorted(os.listdir(folder)) == ["run"]


# store verify


def test_verify(run):
    assert run("store", "verify", "run") == (0, "run: 6 steps intact\n", "")
    assert run("store", "verify", "run", "-q") == (0, "", "")
    damage(file_of(20))
    code, out, err = run("store", "verify", "run")
    assert (code, out) == (1, "run: 4 steps intact (0, 10, 40, 50), 2 damaged or without what they need\n")
    lines = err.splitlines()
    assert lines[0].startswith("tricomp store: run: step 20: run/step-000000000020.tri: ")
    assert lines[1:] == ["tricomp store: run: step 30: needs step 20, which is broken."]
    facts = json.loads(run("store", "verify", "run", "--json")[1])
    assert (facts["intact"], [one["step"] for one in facts["broken"]]) == ([0, 10, 40, 50], [20, 30])


def test_verify_finds_what_loading_finds(folder):
    """Each byte position of a few: those steps are intact whose trees, and those behind them, decode as a whole."""
    store = tricomp.Store("run")
    behind = {0: [0], 10: [0, 10], 20: [0, 10, 20], 30: [0, 10, 20, 30], 40: [40], 50: [40, 50]}
    for step in (0, 30):
        data = Path(file_of(step)).read_bytes()
        for at in range(len(data) // 4, len(data), len(data) // 4):
            damage(file_of(step), at)
            found = store.verify()
            loaded = [other for other in STEPS if loads(store, other)]
            assert found.intact == tuple(other for other in STEPS if {*behind[other]} <= {*loaded}), (step, at)
            assert [one.step for one in found.broken] == [step for step in STEPS if step not in found.intact]
            Path(file_of(step)).write_bytes(data)
    os.remove(file_of(10))
    found = store.verify()
    assert (found.intact, len(found.broken)) == ((0, 40, 50), 2)
    assert "needs a parent with content id" in found.broken[0].reason


def loads(store, step):
    try:
        store.load(step)
    except TricompError:
        return False
    return True


def test_verify_decodes_every_chunk_once(folder, monkeypatch):
    """A step is not decoded again for each step behind it: the work grows with the store, not with its square."""
    n_decoded: dict[str, int] = {}
    decode = codec.Engine.decode

    def spied(engine, jobs, into=None):
        for job in jobs:
            n_words = job.plan.n_words if job.stop is None else job.stop - job.start
            n_decoded[job.name] = n_decoded.get(job.name, 0) + n_words
        return decode(engine, jobs, into)

    monkeypatch.setattr(codec.Engine, "decode", spied)
    assert tricomp.Store("run").verify().is_clean
    assert n_decoded["model/0.weight"] == 130 * 129 * (len(STEPS) + 1)  # once more for its copy in step 0
    n_words = sum(130 * 129 * n for n in (1, 1, 2)) + 3 * 33
    assert sum(n_decoded.values()) <= 1.1 * n_words * len(STEPS)


def test_verify_goes_in_pieces(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    first = np.repeat(rng.integers(0, 9, 5000), 1000).astype(np.uint8)  # more than two pieces
    second, third = first.copy(), first[:-1].copy()
    second[[0, 2 << 20, len(second) - 1]] += 1
    with tricomp.Store(tmp_path / "run") as store:
        for step, array in enumerate((first, second, third)):
            store.save(step, {"x": array, "small": np.arange(step + 2)})
        sizes, summed = [], File.summed

        def spied(file, path, start, stop, parent=None):
            sizes.append(stop - start)
            return summed(file, path, start, stop, parent)

        monkeypatch.setattr(File, "summed", spied)
        monkeypatch.setattr(tricomp.file, "PIECE_BYTES", 1)
        monkeypatch.setattr(tricomp.file, "_THREAD_WORDS", 1)
        done: list[int] = []
        assert store.verify(done.append).is_clean
        assert max(sizes) == 1 << 16 < len(third)
        assert sum(done) == 3 * len(first) - 1 + 8 * (2 + 3 + 4)
        with store.open(1) as file:
            assert verify(file).is_clean
        monkeypatch.setattr(codec, "digest_end", lambda total, n_bytes: 7)
        report = store.verify()
        assert [one.step for one in report.broken] == [0, 1, 2]
        assert "leaf 'x': digest " in report.broken[0].reason
        assert report.broken[0].reason.endswith(" (1 more leaves are damaged)")


# store prune


def test_prune(run):
    code, out, _ = run("store", "prune", "run", "--keep-last", "1", "--dry-run")
    assert (code, out.split(", ")[0]) == (0, "run: 4 steps would be removed (0")
    assert "4 steps would be removed (0, 10, 20, 30)" in out
    assert len(tricomp.Store("run").steps()) == 6
    facts = json.loads(run("store", "prune", "run", "--keep-last", "1", "-n", "--json")[1])
    assert (facts["removed"], facts["kept"], facts["is_dry_run"]) == ([0, 10, 20, 30], [40, 50], True)
    assert facts["n_bytes"] == sum(os.path.getsize(file_of(step)) for step in (0, 10, 20, 30))
    code, out, _ = run("store", "prune", "run", "--keep-every", "20", "-v")
    assert (code, out) == (0, out)
    assert "2 steps removed (30, 50), " in out
    assert out.endswith("; 4 kept (0, 10, 20, 40)\n")
    assert tricomp.Store("run").steps() == [0, 10, 20, 40]
    assert run("store", "prune", "run", "--keep-every", "20", "--keep-last", "1")[1] == (
        "run: 0 steps removed, 0 B; 4 kept\n"
    )


def test_prune_asks_what_to_keep(run):
    for argv in ([], ["--dry-run"], ["--keep-last", "0"], ["--keep-every", "x"]):
        code, out, err = run("store", "prune", "run", *argv)
        assert (code, out) == (2, "")
        assert "tricomp store prune: error: " in err
    assert len(tricomp.Store("run").steps()) == 6


def test_prune_waits_for_no_other_writer(run):
    with tricomp.Store("run") as store:
        store.rebase(10)
        code, _, err = run("store", "prune", "run", "--keep-last", "1")
    assert (code, "is being written by process" in err, err.count("\n")) == (1, True, 1)


# store rebase


def test_rebase(run):
    code, out, err = run("store", "rebase", "run", "20")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"run: step 20 stands alone \(\S+ KiB, was \S+ KiB\)\n", out)
    with tricomp.Store("run") as store:
        with store.open(20) as file:
            assert file.parent is None
            assert file.metadata == {"loss": 2.0, "notes": {"a": 1}}
        assert all(equal(store.load(step), checkpoint(step)) for step in STEPS)
    assert run("store", "rebase", "run", "20")[1].endswith("step 20 stands alone (and did before)\n")
    assert json.loads(run("store", "rebase", "run", "latest", "--json")[1])["step"] == 50
    assert run("store", "rebase", "run", "7")[::2] == (
        1,
        "tricomp store: step 7 is not in run. The nearest is step 0.\n",
    )
    assert run("store", "rebase", "run", "-1")[0] == 2


# export


def test_export_a_step_that_stands_alone(run):
    code, out, err = run("store", "export", "run", "30", "-o", "30.tri")
    assert (code, out) == (0, "")
    assert re.fullmatch(r"run/step-000000000030\.tri: 7 leaves -> 30\.tri \(tri, \S+ KiB\)\n", err)
    with tricomp.open("30.tri") as file:
        assert file.parent is None
        assert file.metadata == {"loss": 3.0, "notes": {"a": 1}}
        assert equal(file.load(), checkpoint(30))
    assert run("store", "export", "run", "30", "--to", "tri")[0] == 0
    assert equal(tricomp.load("step-30.tri"), checkpoint(30))
    code, _, err = run("store", "export", "run", "30", "-o", "30.tri")
    assert (code, err) == (
        1,
        "tricomp store: 30.tri: is there already. Pass -f (overwrite=True) to replace it, or choose another.\n",
    )
    assert run("store", "export", "run", "latest", "-o", "30.tri", "-f")[0] == 0
    assert equal(tricomp.load("30.tri"), checkpoint(50))
    code, _, err = run("store", "export", "run", "30", "-o", file_of(30), "-f")
    assert (code, "is input and output at once" in err) == (1, True)
    assert run("store", "export", "run", "30")[0] == 2


def test_the_model_of_a_step_under_its_own_names(run):
    from safetensors.numpy import load_file

    for out in ("m.safetensors", "m.npz"):
        assert run("store", "export", "run", "20", "--leaves", "model/*", "-o", out)[0] == 0
        arrays = dict(load_file(out) if out.endswith("safetensors") else np.load(out))
        model = checkpoint(20)["model"]
        assert set(arrays) == set(model)
        assert all(equal(arrays[name], model[name]) for name in model)


def test_export_to_torch(run):
    torch = pytest.importorskip("torch")
    assert run("store", "export", "run", "20", "--leaves", "model/*", "-o", "m.pt")[0] == 0
    state = torch.load("m.pt", weights_only=True)
    model = checkpoint(20)["model"]
    assert set(state) == set(model)
    assert all(equal(state[name].numpy(), model[name]) for name in model)
    assert run("store", "export", "run", "20", "--to", "torch")[0] == 0
    assert torch.load("step-20.pt", weights_only=True)["optimizer"]["lr"] == 1 / 21
    assert run("diff", "m.pt", "run@20")[0] == 1
    assert run("diff", "step-20.pt", "run@20")[0] == 0


def test_export_takes_deltas_with_their_bases(run):
    code, _, err = run("export", file_of(10), "--leaves", "model/*", "--to", "npz", "-o", "x.npz")
    assert (code, "no reference was given" in err, os.path.exists("x.npz")) == (1, True, False)
    assert run("export", file_of(10), "--base", file_of(0), "--leaves", "*/0.*", "--to", "npz", "-o", "x.npz")[0] == 0
    assert set(np.load("x.npz")) == {"0.weight", "0.bias"}
    assert equal(np.load("x.npz")["0.weight"], checkpoint(10)["model"]["0.weight"])
    code, out, _ = run("export", "run@10", "--leaves", "model/*", "-o", "y.safetensors", "--json")
    facts = json.loads(out)
    assert (code, facts["format"], facts["n_leaves"], facts["output"]) == (0, "safetensors", 3, "y.safetensors")
    assert facts["n_bytes"] == os.path.getsize("y.safetensors")


def test_export_chooses_names_and_formats(run, folder):
    tricomp.save("a.npz.tri", {"w": np.arange(3)})
    tricomp.save("b.tri", {"w": np.arange(4)})
    assert run("export", "a.npz.tri", "--to", "safetensors", "-q") == (0, "", "")
    assert run("export", "b.tri", "--to", "npz", "-q") == (0, "", "")
    assert run("export", "b.tri", "-o", "c.npy", "-q") == (0, "", "")
    assert equal(np.load("c.npy"), np.arange(4))
    assert sorted(os.listdir(folder)) == ["a.npz.tri", "a.safetensors", "b.npz", "b.tri", "c.npy", "run"]
    for argv, told in (
        (["b.tri", "-o", "x"], "its name does not tell the format. Give --to FORMAT"),
        (["b.tri", "--to", "gguf"], "format 'gguf': expected one of "),
        (["b.tri", "--to", "npz"], "is there already"),
        (["b.npz", "--to", "npy"], "is a npz file, not a .tri file"),
        (["b.tri", "-o", "x.npz", "--leaves", "q*"], "no leaf matches 'q*'"),
        (["b.tri", "-o", "no/x.npz"], "there is no folder"),
        (["run@50", "-o", "x.safetensors"], "of type float. Export the arrays alone (--leaves '*'), or"),
    ):
        code, out, err = run("export", *argv)
        assert (code, out, err.count("\n")) == (1, "", 1), argv
        assert told in err
    for argv in (["export", "b.tri"], ["store", "export", "run", "latest"]):
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert "what is to be written? Give --to FORMAT or -o OUT" in err
    assert len(os.listdir(folder)) == 6


def test_export_to_standard_output(folder, capfdbinary):
    assert main(["export", "run@20", "--leaves", "model/*", "--to", "npz", "-o", "-", "-q"]) == 0
    with open("out.npz", "wb") as file:
        file.write(capfdbinary.readouterr().out)
    assert equal(np.load("out.npz")["0.bias"], checkpoint(20)["model"]["0.bias"])


def test_a_damaged_file_leaves_no_export_behind(run, folder):
    damage(file_of(40))
    assert run("store", "export", "run", "40", "--leaves", "*", "-o", "x.npz")[0] == 1
    assert run("store", "export", "run", "40", "-o", "x.tri")[0] == 1
    assert sorted(os.listdir(folder)) == ["run"]


def test_a_subset_is_a_file_of_its_own(folder):
    with tricomp.Store("run").open(20) as file:
        tree = checkpoint(20)
        part = Subset(file, ["optimizer/state/0/exp_avg", "optimizer/state/1/exp_avg"])
        assert list(part) == ["0/exp_avg", "1/exp_avg"]
        expected = {str(i): {"exp_avg": tree["optimizer"]["state"][i]["exp_avg"]} for i in range(2)}
        assert equal(part.load(), expected)
        assert equal(part.load(["1/exp_avg"])["1/exp_avg"], expected["1"]["exp_avg"])
        assert part.content().content_id == tricomp.content_id(expected)
        assert part.leaf("0/exp_avg").path == "0/exp_avg"
        assert equal(np.concatenate(list(part.pieces("0/exp_avg"))).reshape(130, 129), part["0/exp_avg"])
        assert part.metadata == {}
        assert "optimizer/state/0/exp_avg" not in part
        one = Subset(file, ["model/0.bias"])
        assert equal(one.load(), {"0.bias": tree["model"]["0.bias"]})
        whole = Subset(file, list(file))
        assert list(whole) == list(file)
        with pytest.raises(tricomp.MissingLeaf, match="no leaf 'model/0.bias' was chosen"):
            one["model/0.bias"]
        with pytest.raises(tricomp.InvalidArgument, match="no leaves were chosen"):
            Subset(file, [])
        part.close()
        assert len(file["model/0.bias"]) == 33  # still open
    tricomp.save("odd.tri", {"a/b": {"~": np.arange(3)}, "c": np.arange(4)})
    with tricomp.open("odd.tri") as file:
        assert equal(Subset(file, list(file)).load(), {"a/b": {"~": np.arange(3)}, "c": np.arange(4)})


def test_stores_on_urls(run):
    pytest.importorskip("fsspec")
    url = "memory://tricomp-cli/run"
    with tricomp.Store(url) as store:
        for step in (0, 10, 20):
            store.save(step, checkpoint(step))
    facts = json.loads(run("store", "list", url, "--json")[1])
    assert [step["parent_step"] for step in facts["steps"]] == [None, 0, 10]
    assert run("verify", url)[:2] == (0, f"{url}: 3 steps intact\n")
    assert run("diff", f"{url}@20", "run@20") == (0, f"{url}@20 and run@20 are equal: 7 leaves, 67,179 words\n", "")
    assert run("inspect", f"{url}@latest")[1].startswith(f"{url}/step-000000000020.tri: 7 leaves, ")
    assert run("export", f"{url}@10", "--to", "tri")[0] == 0
    assert equal(tricomp.load("run@10.tri"), checkpoint(10))
    assert run("store", "rebase", url, "20")[0] == 0
    assert "2 steps removed (0, 10)" in run("store", "prune", url, "--keep-last", "1")[1]
    assert tricomp.Store(url).steps() == [20]
    assert run("store", "list", "memory://tricomp-cli/nope")[0] == 1
