"""tricomp_jax.integers: the codes are the core's, jit takes them, and products on int8 are those of the codes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import tricomp_jax
from jax import lax
from tricomp_jax import integers

from tests.cases import weights
from tricomp import integers as core
from tricomp.errors import InvalidArgument


def tree():
    """Weights of every form, of several dtypes, beside what must stay as it is."""
    return {
        "dense": {"kernel": jnp.asarray(weights((37, 50))), "bias": jnp.ones(50)},
        "query": {"kernel": jnp.asarray(weights((37, 3, 8)), jnp.bfloat16)},
        "out": {"kernel": jnp.asarray(weights((3, 8, 37)), jnp.float16)},
        "table": {"embedding": jnp.asarray(weights((90, 37)))},
        "step": 3,
        "ids": jnp.arange(6).reshape(2, 3),
    }


EVERY = ("*kernel", "*embedding")
FORMS = [(8, None), (8, 16), (4, None), (4, 32)]


def rows_of(array, axes):
    host = np.asarray(array)
    n_out = math.prod(host.shape[axis] for axis in axes)
    return np.moveaxis(host, axes, range(len(axes))).reshape(n_out, -1)


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_codes_and_floats_are_those_of_the_core(bits, group):
    made = integers.quantize(tree(), EVERY, bits=bits, group=group)
    back = integers.dequantize(made)
    for name, axes in (("dense", (1,)), ("query", (1, 2)), ("out", (2,)), ("table", (0,))):
        ((key, array),) = ((key, leaf) for key, leaf in tree()[name].items() if key != "bias")
        found = made[name][key]
        expected = core.quantize(np.ascontiguousarray(rows_of(array, axes)), bits, group=group)
        assert found.axes == axes
        assert np.asarray(found.codes.astype(jnp.int8)).tobytes() == expected.codes.tobytes()
        assert np.asarray(found.scales).tobytes() == expected.scales.tobytes()
        assert rows_of(back[name][key], axes).tobytes() == core.dequantize(expected).tobytes()
        assert back[name][key].dtype == array.dtype
        assert found.nbytes == expected.nbytes
        assert str(found.codes.dtype) == f"int{bits}"
    assert made["step"] == 3
    assert made["dense"]["bias"] is not None


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 32)])
@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_products_are_those_of_the_codes(bits, group, activations):
    made = integers.quantize(tree(), EVERY, bits=bits, group=group)
    for name, axes in (("dense", (1,)), ("query", (1, 2)), ("out", (2,)), ("table", (0,))):
        ((_, q),) = ((key, leaf) for key, leaf in made[name].items() if key != "bias")
        rest = tuple(size for axis, size in enumerate(q.shape) if axis not in axes)
        x = weights((7, 2, *rest)) * 3
        x[0] = 0
        found = np.asarray(jax.jit(lambda x, q: integers.dot(x, q, activations=activations))(jnp.asarray(x), q))
        flat = x.reshape(14, -1).astype(np.float64)
        if activations == "dynamic":
            scale = np.abs(flat).max(axis=1, keepdims=True) / 127
            scale[scale == 0] = 1
            flat = np.rint((flat / scale).astype(np.float32)) * scale
        floats = rows_of(integers.dequantize(q).astype(jnp.float32), axes).astype(np.float64)
        expected = flat @ floats.T
        outputs = tuple(q.shape[axis] for axis in axes)
        assert found.shape == (7, 2, *outputs)
        # The codes' own floats are not rounded to the array's dtype on the way: half a unit of it in each element.
        unit = {"float32": 0, "bfloat16": 2.0**-9, "float16": 2.0**-11}[q.dtype]
        # A row's element on the edge of two codes may fall to either side, as float32 rounds: then by one code.
        edge = np.abs(flat).max(axis=1, keepdims=True) / 127 * np.abs(floats).max() if activations == "dynamic" else 0
        allowed = (np.abs(flat) @ np.abs(floats).T) * (unit + 1e-5) + edge + 1e-6
        assert (np.abs(found.reshape(14, -1) - expected) <= allowed).all()
        assert not found[0].any()


def test_dimension_numbers_as_lax_takes_them():
    q = integers.quantize({"kernel": tree()["out"]["kernel"]})["kernel"]  # [3, 8 | 37]
    floats = integers.dequantize(q).astype(jnp.float32)
    x = jnp.asarray(weights((8, 5, 3)))
    numbers = (((0, 2), (1, 0)), ((), ()))
    found = integers.dot_general(x, q, numbers, activations="float", preferred_element_type=jnp.float32)
    expected = lax.dot_general(x, floats, numbers)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5)
    partial = (((2,), (0,)), ((), ()))  # over a part of the rows: on floats
    np.testing.assert_allclose(
        integers.dot_general(x, q, partial), lax.dot_general(x, floats, partial), rtol=1e-3, atol=1e-6
    )
    plain = integers.dot_general(x, floats, numbers)
    assert np.asarray(plain).tobytes() == np.asarray(expected).tobytes()


def test_rows_of_a_table_are_read_without_the_rest():
    for bits, group in FORMS:
        q = integers.quantize(tree()["table"], EVERY, bits=bits, group=group)["embedding"]
        ids = jnp.array([[3, 3], [89, 0], [41, 7]])
        found = jax.jit(integers.take)(q, ids)
        assert np.asarray(found).tobytes() == np.asarray(integers.dequantize(q)[ids]).tobytes()
    with pytest.raises(InvalidArgument, match="axis 0"):
        integers.take(integers.quantize(tree()["dense"])["kernel"], ids)


def test_a_row_that_is_not_finite_gives_no_number():
    q = integers.quantize(tree()["dense"])["kernel"]
    x = jnp.ones((3, 37)).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
    found = np.isfinite(np.asarray(integers.dot(x, q)))
    assert not found[:2].any()
    assert found[2].all()


class Tagger(nn.Module):
    """A small encoder of text, with attention, an embedding used twice and a convolution."""

    @nn.compact
    def __call__(self, ids, deterministic=True):
        table = nn.Embed(64, 32, name="table")
        x = table(ids)
        x = x + nn.Conv(32, (3,), name="conv")(x)
        x = x + nn.MultiHeadDotProductAttention(4, dropout_rate=0.1, deterministic=deterministic)(nn.LayerNorm()(x))
        x = x + nn.Dense(32)(nn.gelu(nn.Dense(96)(nn.LayerNorm()(x))))
        return table.attend(x)


def test_a_linen_model_runs_on_its_codes():
    model: Any = Tagger()
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 64, (5, 11)))
    variables = jax.jit(model.init)(jax.random.key(1), ids)
    before = jax.tree.map(np.asarray, variables)
    made = integers.quantize(variables, EVERY)
    floats = jax.jit(model.apply)(integers.dequantize(made), ids)
    found = jax.jit(lambda v, ids: integers.apply(model, v, ids, activations="float"))(made, ids)
    np.testing.assert_allclose(found, floats, atol=2e-5)
    dynamic = jax.jit(lambda v, ids: integers.apply(model, v, ids))(made, ids)
    expected = jax.jit(model.apply)(variables, ids)
    assert np.corrcoef(np.ravel(dynamic), np.ravel(expected))[0, 1] > 0.999
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), before, variables))
    # The products of the layers are of int8 by int8: this is no model of floats made of codes.
    text = str(jax.make_jaxpr(lambda v, ids: integers.apply(model, v, ids))(made, ids))
    assert text.count("preferred_element_type=int32") == 6


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_files_of_codes(tmp_path, bits, group):
    made = integers.quantize(tree(), EVERY, bits=bits, group=group)
    tricomp_jax.save(tmp_path / "tree.tri", made)
    loaded = tricomp_jax.load(tmp_path / "tree.tri", target=made)
    assert str(jax.tree.structure(loaded)) == str(jax.tree.structure(made))
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(made)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    arrays: dict[str, Any] = {"w": core.quantize(weights((40, 6, 8)), bits, group=group), "b": weights((40,))}
    core.save_file(tmp_path / "flat.tri", arrays)
    found = integers.load_file(tmp_path / "flat.tri")
    assert np.asarray(integers.dequantize(found["w"])).tobytes() == core.dequantize(arrays["w"]).tobytes()
    assert np.asarray(found["b"]).tobytes() == arrays["b"].tobytes()
    assert integers.dot(jnp.ones((2, 6, 8)), found["w"]).shape == (2, 40)


def test_a_linen_model_without_codes_is_applied_as_it_is():
    model: Any = nn.Dense(5)
    variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    x = jnp.asarray(weights((2, 3)))
    assert np.asarray(integers.apply(model, variables, x)).tobytes() == np.asarray(model.apply(variables, x)).tobytes()


def test_what_is_asked_wrongly_is_told():
    with pytest.raises(InvalidArgument, match=r"matches none.*dense/kernel"):
        integers.quantize(tree(), "no such")
    with pytest.raises(InvalidArgument, match="dense/kernel.*cannot be the outputs"):
        integers.quantize(tree(), "dense*", axes=lambda path, array: (0, 1))
    bad = {"a": {"kernel": jnp.ones((4, 20)).at[2, 3].set(jnp.nan)}}
    with pytest.raises(InvalidArgument, match="'a/kernel': 1 of its 80"):
        integers.quantize(bad)
    q = integers.quantize(tree()["dense"])["kernel"]
    with pytest.raises(InvalidArgument, match="'dynamic' or 'float'"):
        integers.dot(jnp.ones((2, 37)), q, activations="int8")
