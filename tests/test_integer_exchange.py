"""Quantised arrays as safetensors files in the layout of the field, out and in, read by the format's library too."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.cases import weights
from tests.test_integer_files import arrays, assert_same  # noqa: F401 - a fixture
from tricomp import checkpoint
from tricomp.errors import CorruptFile, InvalidArgument, MissingLeaf
from tricomp.integers import (
    Quantized,
    dequantize,
    from_safetensors,
    quantization_config,
    quantize,
    save_file,
    to_safetensors,
)
from tricomp.integers.exchange import exported
from tricomp.integers.form import Form

safetensors = pytest.importorskip("safetensors.numpy")
F = np.float32


def field_unpacked(words: Any, shape: tuple[int, ...]) -> Any:
    """What readers of the field make of packed int32: eight codes plus 8 a word, the first lowest."""
    codes = np.stack([(words.view(np.uint32) >> np.uint32(4 * i)) & 15 for i in range(8)], axis=-1)
    return codes.reshape(len(words), -1)[:, : math.prod(shape[1:])].astype(np.int32).reshape(shape) - 8


def test_the_layout_is_that_of_the_field(arrays, tmp_path):  # noqa: F811
    path = tmp_path / "model.safetensors"
    n_bytes = to_safetensors(path, arrays, {"format": "pt"})
    assert n_bytes == path.stat().st_size
    with safetensors.safe_open(path, "np") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
        found = {name: opened.get_tensor(name) for name in names if not name.startswith("conv")}
    assert metadata["format"] == "pt"
    assert names >= {"h.0.attn.weight", "h.0.attn.weight_scale", "h.0.mlp.weight_packed", "h.0.mlp.bias", "step"}
    eight, four = arrays["h.0.attn.weight"], arrays["h.0.mlp.weight"]
    assert found["h.0.attn.weight"].tobytes() == eight.codes.tobytes()
    assert found["h.0.attn.weight_scale"].shape == (70, 1)
    assert found["h.0.mlp.weight_shape"].tolist() == [33, 301]
    assert found["h.0.mlp.weight_packed"].shape == (33, 38)
    assert (field_unpacked(found["h.0.mlp.weight_packed"], (33, 301)) == four.codes).all()
    assert found["h.0.mlp.weight_scale"].tobytes() == four.scales.tobytes()
    config = json.loads(metadata["quantization_config"])
    assert config["format"] == "mixed-precision"
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [4, 4, 8]


def test_there_and_back(arrays, tmp_path):  # noqa: F811
    to_safetensors(tmp_path / "a.safetensors", arrays)
    found = from_safetensors(tmp_path / "a.safetensors")
    assert_same({name: found[name] for name in arrays}, arrays)
    assert len(found) == len(arrays)
    save_file(tmp_path / "a.tri", arrays)
    with checkpoint.open_file(tmp_path / "a.tri") as file:
        assert b"".join(exported(file)) == (tmp_path / "a.safetensors").read_bytes()
        some = from_(exported(file, ["*.weight"]), tmp_path)
        assert_same(dict(sorted(some.items())), {name: arrays[name] for name in sorted(some)})
        assert set(some) == {"h.0.attn.weight", "h.0.mlp.weight"}
        floats = safetensors.load(
            b"".join(exported(file, ["h.0.attn.*", "*.bias", "empty", "step"], is_dequantized=True))
        )
        with pytest.raises(MissingLeaf, match="no entry matches 'x'"):
            exported(file, ["x"])
    expected = dequantize(arrays["h.0.attn.weight"])
    assert floats["h.0.attn.weight"].tobytes() == expected.tobytes()
    assert floats["h.0.mlp.bias"].tobytes() == arrays["h.0.mlp.bias"].tobytes()
    assert floats["empty"].shape == (0, 3)


def from_(pieces, tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"".join(pieces))
    return from_safetensors(tmp_path / "b.safetensors")


def strangers(scale_dtype=np.float16):
    """What another library may write: no note of ours, scales of 16 bits, the least codes there are."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (6, 64))
    words = np.zeros((6, 8), np.uint32)
    for i in range(8):
        words |= (codes[:, i::8] + 8).astype(np.uint32) << np.uint32(4 * i)
    tensors = {
        "a.weight_packed": words.view(np.int32),
        "a.weight_shape": np.array([6, 64]),
        "a.weight_scale": np.full((6, 2), 0.5, scale_dtype),
        "b.weight": rng.integers(-128, 128, (5, 7)).astype(np.int8),
        "b.weight_scale": np.ones((5, 1), scale_dtype),
        "b.weight_zero_point": np.zeros((5, 1), np.int8),
        "ids": np.arange(5, dtype=np.int8),
        "norm.weight": np.ones(5, F),
    }
    return codes, tensors


@pytest.mark.parametrize("scale_dtype", [np.float16, F])
def test_files_of_others(tmp_path, scale_dtype):
    codes, tensors = strangers(scale_dtype)
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    found = from_safetensors(tmp_path / "a.safetensors")
    assert set(found) == {"a.weight", "b.weight", "ids", "norm.weight"}
    a, b = found["a.weight"], found["b.weight"]
    assert isinstance(a, Quantized)
    assert (a.codes == codes).all()
    assert (a.bits, a.group, a.dtype, a.scales.dtype) == (4, 32, np.dtype(scale_dtype).name, F)
    assert (b.bits, b.group) == (8, None)
    assert (b.codes == tensors["b.weight"]).all()
    assert (dequantize(a) == codes * 0.5).all()
    assert found["ids"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("b.weight_zero_point", np.ones((5, 1), np.int8), r"'b\.weight': has zero points other than 0"),
        ("a.weight_g_idx", np.arange(64, dtype=np.int32), "has its columns in another order"),
        ("a.weight_scale", np.ones((6, 3), F), r"scales \[6, 3\] for codes \[6, 64\]: expected one a row"),
        ("a.weight_scale", np.ones((6, 8), F), "multiple of 16"),
        ("a.weight_shape", np.array([6, 80]), r"int32\[6, 8\] does not hold codes of shape \[6, 80\]"),
        ("a.weight_shape", np.array([-6, -64]), "does not hold codes"),
        ("a.weight_packed", np.zeros((6, 8), F), r"float32\[6, 8\] does not hold codes"),
    ],
)
def test_what_is_not_read(name, tensor, text, tmp_path):
    _, tensors = strangers()
    safetensors.save_file({**tensors, name: tensor}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidArgument, match=text):
        from_safetensors(tmp_path / "a.safetensors")


def test_words_of_eight_bits_are_read(tmp_path):
    codes = np.random.default_rng(1).integers(-128, 128, (3, 10)).astype(np.int8)
    octets = np.zeros((3, 12), np.uint8)
    octets[:, :10] = (codes.astype(np.int16) + 128).astype(np.uint8)
    tensors = {
        "w_packed": octets.view(np.int32),
        "w_shape": np.array([3, 10]),
        "w_scale": np.ones((3, 1), F),
    }
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    found = from_safetensors(tmp_path / "a.safetensors")["w"]
    assert (found.codes == codes).all()
    assert found.bits == 8


def test_notes_of_ours_that_lie_are_not_believed(tmp_path):
    to_safetensors(tmp_path / "a.safetensors", {"w": quantize(weights((4, 40)), group=16)})
    for note in ('{"w": {"bits": 8, "group": 32, "dtype": "float32"}}', "[", '{"w": 3}', "[[[["):
        data = safetensors.load_file(tmp_path / "a.safetensors")
        safetensors.save_file(data, tmp_path / "b.safetensors", {"tricomp.integers": note})
        with pytest.raises(InvalidArgument, match="expected scales|expected one a row"):
            from_safetensors(tmp_path / "b.safetensors")


def test_names_that_collide(tmp_path):
    array = quantize(weights((3, 4)))
    with pytest.raises(InvalidArgument, match="'w_scale': two tensors would get that name"):
        to_safetensors(tmp_path / "a.safetensors", {"w": array, "w_scale": np.ones(3, F)})
    assert list(tmp_path.iterdir()) == []


def test_damage_is_told_before_anything_is_written(tmp_path):
    note = {"version": 1, "arrays": {"w": {"bits": 8, "group": 16, "dtype": "float32"}}}
    tree = {"w": {"codes": np.zeros((4, 20), np.int8), "scales": np.ones((4, 1), F)}}
    checkpoint.save(tmp_path / "a.tri", tree, metadata={"tricomp_integers": note})
    with (
        checkpoint.open_file(tmp_path / "a.tri") as file,
        pytest.raises(CorruptFile, match=r"expected scales \[4, 2\]"),
    ):
        exported(file)


def test_the_config_of_one_kind():
    config = quantization_config({"b.weight": Form(4, 128, "float32"), "a.weight": Form(4, 128, "bfloat16")})
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == "pack-quantized"
    assert group["targets"] == ["a", "b"]
    assert group["weights"]["strategy"] == "group"
    assert group["weights"]["group_size"] == 128
