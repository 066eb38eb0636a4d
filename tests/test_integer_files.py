"""Quantised arrays in `.tri` files: what comes back, what is told, what is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

import tricomp
from tests.cases import weights
from tricomp import bounds
from tricomp.errors import CorruptFile, InvalidArgument, MissingLeaf, UnsupportedNode
from tricomp.integers import Quantized, dequantize, load_file, quantize, save_file

F = np.float32


@pytest.fixture(scope="module")
def arrays():
    """A model: weights of 8 and of 4 bits, of odd sizes, and what stays in floats."""
    return {
        "h.0.attn.weight": quantize(weights((70, 130), 1)),
        "h.0.mlp.weight": quantize(weights((33, 301), 2).astype(tricomp.dtypes.by_name("bfloat16").numpy), 4, group=64),
        "h.0.mlp.bias": weights((33,), 3),
        "conv/w": quantize(weights((9, 4, 3, 3), 4).astype(np.float16), 6, scale_dtype="bfloat16"),
        "empty": quantize(np.zeros((0, 3), F), 4, group=16),
        "step": np.int64(7),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        other = found[name]
        if isinstance(array, Quantized):
            assert isinstance(other, Quantized)
            assert (other.bits, other.group, other.dtype) == (array.bits, array.group, array.dtype)
            pairs = [(other.codes, array.codes), (other.scales, array.scales)]
        else:
            pairs = [(other, array)]
        for a, b in pairs:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tobytes() == b.tobytes()


def test_what_was_saved_comes_back(arrays, tmp_path):
    path = tmp_path / "model.tri"
    report = save_file(path, arrays, {"made by": "a test"})
    assert report.file_bytes == path.stat().st_size
    found = load_file(path)
    assert_same(found, arrays)
    assert dequantize(found["conv/w"]).tobytes() == dequantize(arrays["conv/w"]).tobytes()
    with tricomp.open(path) as file:
        assert file.metadata["made by"] == "a test"
        assert file.leaf("h.0.attn.weight/codes").dtype.name == "int8"
        assert file.leaf(tricomp.tree.join(None, "conv/w") + "/scales").dtype.name == "bfloat16"
        assert file.metadata["tricomp_integers"]["arrays"]["h.0.mlp.weight"] == {
            "bits": 4,
            "group": 64,
            "dtype": "bfloat16",
        }


def test_some_entries_are_read_alone(arrays, tmp_path):
    save_file(tmp_path / "model.tri", arrays)
    found = load_file(tmp_path / "model.tri", ["step", "h.*.weight"])
    assert_same(found, {name: arrays[name] for name in ("h.0.attn.weight", "h.0.mlp.weight", "step")})
    with pytest.raises(MissingLeaf, match=r"model\.tri: no entry matches 'h\.9\.\*' among its 6"):
        load_file(tmp_path / "model.tri", ["h.9.*"])


def test_a_file_of_plain_arrays_is_a_dict_of_them(tmp_path):
    tricomp.save(tmp_path / "a.tri", {"w": weights((3, 5)), "b": np.arange(4)})
    assert_same(load_file(tmp_path / "a.tri"), {"w": weights((3, 5)), "b": np.arange(4)})
    tricomp.save(tmp_path / "b.tri", {"model": {"w": weights((3, 5))}})
    with pytest.raises(InvalidArgument, match=r"leaf 'model/w' stands in no flat dict\. Use tricomp\.load"):
        load_file(tmp_path / "b.tri")


def test_codes_take_what_they_hold(tmp_path):
    """An int8 leaf is coded to the entropy of its values, a 4-bit one too: nothing is lost for one code a byte."""
    for bits, group in ((8, None), (6, None), (4, 64)):
        array = quantize(weights((256, 1024), bits), bits, group=group)
        counts = np.bincount(array.codes.ravel().view(np.uint8))
        share = counts[counts > 0] / array.codes.size
        entropy = float(-(share * np.log2(share)).sum())
        report = save_file(tmp_path / "w.tri", {"w": array})
        codes = next(leaf for leaf in report.leaves if leaf.path == "w/codes")
        assert 8 * codes.coded_bytes / array.codes.size < entropy + 0.06
        if bits == 4:
            assert entropy < 3.8


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        ([1], InvalidArgument, "expected a dict of str to arrays, got a list"),
        ({3: np.zeros(2)}, UnsupportedNode, "the key 3 is a int, expected str"),
        ({"a": [1]}, UnsupportedNode, "entry 'a': expected a Quantized or a numpy array, got a list"),
    ],
)
def test_what_is_no_dict_of_arrays(tree, error, text, tmp_path):
    with pytest.raises(error, match=text):
        save_file(tmp_path / "a.tri", tree)
    assert list(tmp_path.iterdir()) == []


def test_own_keys_are_kept_for_notes(tmp_path):
    with pytest.raises(InvalidArgument, match="the key 'tricomp_integers' is kept for tricomp's own notes"):
        save_file(tmp_path / "a.tri", {}, {"tricomp_integers": "x"})


W: dict[str, Any] = {"codes": np.zeros((4, 20), np.int8), "scales": np.ones((4, 2), F)}
GOOD = {"bits": 4, "group": 16, "dtype": "float32"}


@pytest.mark.parametrize(
    ("note", "text"),
    [
        ({"version": 2, "arrays": {}}, "is not of version 1. Upgrade tricomp"),
        ({"version": 1, "arrays": [1]}, "is not of version 1"),
        ({"version": 1, "arrays": {"v": GOOD}}, "'v' has no codes and scales in it"),
        ({"version": 1, "arrays": {"w": {**GOOD, "bits": 9}}}, "'w': expected 8 or 4 bits .*, got 9"),
        ({"version": 1, "arrays": {"w": {**GOOD, "bits": 4.0}}}, "expected 8 or 4 bits"),
        ({"version": 1, "arrays": {"w": {**GOOD, "group": -16}}}, "multiple of 16 elements"),
        ({"version": 1, "arrays": {"w": {**GOOD, "group": 1 << 60}}}, "multiple of 16 elements"),
        ({"version": 1, "arrays": {"w": {**GOOD, "group": 32}}}, r"'w': .*expected scales \[4, 1\], got \[4, 2\]"),
        ({"version": 1, "arrays": {"w": {**GOOD, "dtype": "int8"}}}, "dtype 'int8': expected one of float32"),
        ({"version": 1, "arrays": {"w": {**GOOD, "more": 1}}}, "'w': .*more"),
        ({"version": 1, "arrays": {"w": 5}}, "'w': "),
    ],
)
def test_notes_that_lie(note, text, tmp_path):
    tricomp.save(tmp_path / "a.tri", {"w": W}, metadata={"tricomp_integers": note})
    with pytest.raises(CorruptFile, match=text):
        load_file(tmp_path / "a.tri")
    tricomp.save(
        tmp_path / "a.tri",
        {"w": {**W, "codes": W["codes"].astype(F)}},
        metadata={"tricomp_integers": {"version": 1, "arrays": {"w": GOOD}}},
    )
    with pytest.raises(CorruptFile, match="expected int8 codes"):
        load_file(tmp_path / "a.tri")


def test_notes_take_little(tmp_path):
    many = {f"layers.{i}.mlp.weight": quantize(weights((16, 16), i)) for i in range(300)}
    save_file(tmp_path / "a.tri", many)
    with tricomp.open(tmp_path / "a.tri") as file:
        assert len(msgpack.packb(file.metadata)) < 300 * 70
        bounds.DEFAULTS.check("max_header_bytes", file.n_bytes, "all of it")
