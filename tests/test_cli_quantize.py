"""`tricomp quantize`, and what inspect, export and diff make of its files."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests.cases import ROOT, weights
from tricomp.cli import main
from tricomp.integers import deployment, dequantize, from_safetensors, load_file, quantize

safetensors = pytest.importorskip("safetensors.numpy")
F = np.float32


def model():
    """A small transformer's tensors: weights of two dtypes, an embedding, norms, biases, a table of integers."""
    return {
        "embed.weight": weights((301, 48), 1),
        "h.0.attn.weight": weights((144, 48), 2),
        "h.0.attn.bias": weights((144,), 3),
        "h.0.mlp.weight": weights((96, 70), 4).astype(ml_dtypes.bfloat16),
        "h.0.norm.weight": np.ones(48, F),
        "conv.weight": weights((32, 16, 3, 3), 5),
        "gate.weight": weights((2, 48), 6),
        "positions": np.arange(5000).reshape(2, 2500),
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    tricomp.save(tmp_path / "model.tri", model())
    with tricomp.open(tmp_path / "model.tri") as file:
        tricomp.formats.write("safetensors", file, path)  # the format's numpy side has no bfloat16
    return path


WEIGHTS = {"embed.weight", "h.0.attn.weight", "h.0.mlp.weight", "conv.weight"}


def check(found, chosen, **options):
    assert set(found) == set(model())
    for name, array in model().items():
        if name in chosen:
            expected = quantize(array, **options)
            assert found[name].codes.tobytes() == expected.codes.tobytes()
            assert found[name].scales.tobytes() == expected.scales.tobytes()
            assert (found[name].bits, found[name].group, found[name].dtype) == (
                expected.bits,
                expected.group,
                array.dtype.name,
            )
        else:
            assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("is_large", [False, True])
def test_weights_become_integers(path, capsys, monkeypatch, is_large):
    if is_large:  # what waits on a disk, and is worked on in slices
        monkeypatch.setattr(deployment, "MEMORY_BYTES", 0)
        monkeypatch.setattr(deployment, "_SLICE_BYTES", 5000)
    assert main(["quantize", str(path)]) == 0
    printed = capsys.readouterr()
    out = path.with_name("model.int8.tri")
    check(load_file(out), WEIGHTS)
    assert "conv.weight" in printed.out
    assert "4 tensors as int8 a row" in printed.out
    assert f"4 of 8 tensors, {100 * out.stat().st_size / path.stat().st_size:.1f} %" in printed.err
    assert out.stat().st_mode & 0o077 == path.stat().st_mode & 0o077


def test_options_reach_the_codes(path, capsys):
    out = path.with_name("out.tri")
    options = ["--bits", "4", "--group", "32", "--scale-dtype", "bfloat16", "--no-clip", "-T", "1", "--json"]
    assert main(["quantize", str(path), "-o", str(out), *options, "--skip", "embed*"]) == 0
    check(load_file(out), WEIGHTS - {"embed.weight"}, bits=4, group=32, scale_dtype="bfloat16", clip=False)
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == str(out)
    assert told["file_bytes"] == out.stat().st_size
    tensors = {tensor["name"]: tensor for tensor in told["tensors"]}
    assert tensors["embed.weight"]["bits"] is None
    array = model()["h.0.attn.weight"]
    error = dequantize(load_file(out)["h.0.attn.weight"]).astype(np.float64) - array
    about = tensors["h.0.attn.weight"]
    assert (about["bits"], about["group"], about["shape"], about["raw_bytes"]) == (4, 32, [144, 48], array.nbytes)
    assert about["error_rms"] == pytest.approx(np.sqrt((error**2).mean() / (array.astype(np.float64) ** 2).mean()))
    assert about["error_max"] == pytest.approx(np.abs(error).max() / np.abs(array).max())
    with tricomp.open(out) as file:
        coded = [file.coded_bytes(f"h.0.attn.weight/{part}") for part in ("codes", "scales")]
    assert 0 < about["coded_bytes"] <= sum(coded)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--select", "h.*"], {"h.0.attn.weight", "h.0.mlp.weight"}),
        (["--select", "gate.weight"], {"gate.weight"}),
        (["--select", "*.weight", "--skip", "h.*", "--skip", "embed.weight"], {"conv.weight", "gate.weight"}),
    ],
)
def test_patterns_choose(path, options, chosen):
    out = path.with_name("out.tri")
    assert main(["quantize", "-q", str(path), "-o", str(out), *options]) == 0
    check(load_file(out), chosen)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--select", "h.7.*"], "no tensor matches 'h.7.*' among its 8"),
        (["--skip", "nothing"], "no tensor matches 'nothing' among its 8"),
        (["--select", "positions"], "'positions' matches no floats of two or more dimensions"),
        (["--select", "*.bias"], "but 1 like 'h.0.attn.bias' (float32[144])"),
        (["--skip", "*"], "nothing is left to quantise: of its 8 tensors, 5 are floats"),
        (["--group", "24"], "expected a group of a multiple of 16 elements"),
        (["--group", "-16"], "expected a group of a multiple of 16 elements"),
    ],
)
def test_wrong_use_is_told_and_writes_nothing(path, options, text, capsys):
    before = set(path.parent.iterdir())
    assert main(["quantize", str(path), *options]) == 1
    assert text in capsys.readouterr().err
    assert set(path.parent.iterdir()) == before


def test_what_is_not_finite_is_told_by_tensor_and_row(tmp_path, capsys):
    tensors = {"a.weight": weights((80, 60), 1), "b.weight": weights((90, 70), 2)}
    tensors["b.weight"][41, 3] = np.nan
    tensors["b.weight"][88, 5:7] = np.inf
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    assert main(["quantize", str(tmp_path / "a.safetensors")]) == 1
    told = capsys.readouterr().err
    assert "leaf 'b.weight': 3 of its 6300 elements are infinite or NaN, in 2 of 90 rows, the first in row 41" in told
    assert main(["quantize", "-q", str(tmp_path / "a.safetensors"), "--skip", "b.*"]) == 0


def test_nothing_is_replaced_unasked(path, capsys):
    out = path.with_name("model.int8.tri")
    out.write_bytes(b"mine")
    assert main(["quantize", str(path)]) == 1
    assert "is there already. Pass -f" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert main(["quantize", "-q", "-f", str(path)]) == 0
    check(load_file(out), WEIGHTS)
    assert main(["quantize", "-f", str(path), "-o", str(path)]) == 1
    assert "input and output at once" in capsys.readouterr().err


def test_models_in_shards_and_other_formats(path, tmp_path):
    tensors = {name: array for name, array in model().items() if array.dtype != ml_dtypes.bfloat16}
    shards: dict[str, dict[str, Any]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for i, (name, array) in enumerate(tensors.items()):
        shards[f"model-{i % 2 + 1}.safetensors"][name] = array
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name, part in shards.items():
        safetensors.save_file(part, folder / name)
    placed = {tensor: name for name, part in shards.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert main(["quantize", "-q", str(folder)]) == 0
    found = load_file(folder / "model.int8.tri")
    assert set(found) == set(tensors)
    np.savez(tmp_path / "other.npz", **tensors)
    assert main(["quantize", "-q", str(tmp_path / "other.npz")]) == 0
    other = load_file(tmp_path / "other.int8.tri")
    assert main(["quantize", "-q", str(path.with_name("model.tri"))]) == 0
    check(load_file(path.with_name("model.int8.tri")), WEIGHTS)
    for name in WEIGHTS - {"h.0.mlp.weight"}:
        assert found[name].codes.tobytes() == other[name].codes.tobytes() == quantize(tensors[name]).codes.tobytes()


def test_trees_that_are_no_flat_dict(tmp_path, capsys):
    tricomp.save(tmp_path / "a.tri", {"model": {"w": weights((64, 64))}})
    assert main(["quantize", str(tmp_path / "a.tri")]) == 1
    assert "expected a flat dict of float tensors" in capsys.readouterr().err
    np.save(tmp_path / "a.npy", weights((64, 64)))
    assert main(["quantize", str(tmp_path / "a.npy")]) == 1
    assert "expected a flat dict of float tensors" in capsys.readouterr().err


def test_quantised_files_are_not_quantised_again(path, capsys):
    assert main(["quantize", "-q", str(path)]) == 0
    assert main(["quantize", str(path.with_name("model.int8.tri")), "-o", str(path.with_name("b.tri"))]) == 1
    assert "expected a flat dict of float tensors" in capsys.readouterr().err


def test_inspect_tells_of_integers(path, capsys):
    assert main(["quantize", "-q", "--bits", "4", "--group", "64", str(path)]) == 0
    out = str(path.with_name("model.int4.tri"))
    assert main(["inspect", out]) == 0
    told = capsys.readouterr().out
    n_codes = sum(model()[name].size for name in WEIGHTS)
    assert f"4 arrays as int4 in groups of 64: {n_codes:,} codes in " in told
    assert "palette rans, int4 in groups of 64" in told
    assert "tricomp_integers" not in told
    assert main(["inspect", "--json", out]) == 0
    facts = json.loads(capsys.readouterr().out)
    (kind,) = facts["integers"]
    assert (kind["bits"], kind["group"], kind["n_arrays"], kind["n_codes"]) == (4, 64, 4, n_codes)
    leaves = {leaf["path"]: leaf for leaf in facts["leaves"]}
    assert leaves["conv.weight/codes"]["form"] == "int4 in groups of 64"
    assert kind["coded_bytes"] == sum(leaf["coded_bytes"] for name, leaf in leaves.items() if "/" in name)
    tricomp.save(path.with_name("odd.tri"), {"w": np.zeros(3)}, metadata={"tricomp_integers": {"version": 9}})
    assert main(["inspect", str(path.with_name("odd.tri"))]) == 0
    assert "tricomp_integers (1 entry)" in capsys.readouterr().out


def test_export_writes_integers_or_floats(path, capsys):
    assert main(["quantize", "-q", "--bits", "4", "--group", "32", str(path)]) == 0
    out = path.with_name("model.int4.tri")
    assert main(["export", str(out), "--to", "safetensors", "-o", str(path.with_name("ints.safetensors"))]) == 0
    check(from_safetensors(path.with_name("ints.safetensors")), WEIGHTS, bits=4, group=32)
    floats = path.with_name("floats.safetensors")
    assert main(["export", str(out), "--dequantize", "-o", str(floats), "--leaves", "h.*"]) == 0
    found = from_safetensors(floats)
    assert set(found) == {name for name in model() if name.startswith("h.")}
    expected = dequantize(quantize(model()["h.0.mlp.weight"], 4, group=32))
    assert found["h.0.mlp.weight"].dtype == ml_dtypes.bfloat16
    assert found["h.0.mlp.weight"].tobytes() == expected.tobytes()
    capsys.readouterr()
    assert main(["export", str(out), "--dequantize", "--to", "npz"]) == 1
    assert "--dequantize writes safetensors, not npz" in capsys.readouterr().err
    assert main(["export", str(path.with_name("model.tri")), "--dequantize", "--to", "safetensors"]) == 1
    assert "holds no integers that stand for floats" in capsys.readouterr().err
    assert main(["verify", "-q", str(out)]) == 0


def test_no_framework_is_loaded(path):
    code = (
        "import sys; from tricomp.cli import main; code = main(['quantize', '-q', sys.argv[1]]);"
        "print(code, sorted({'torch', 'jax', 'triton', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "0 []\n", done.stderr
