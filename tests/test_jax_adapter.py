"""tricomp_jax.flatten, unflatten, save and load: each pytree comes back with its types, each array with its bits."""

import collections
import dataclasses
import math
import subprocess
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

import flax
import jax
import jax.numpy as jnp
import optax
import tricomp_jax
from flax import nnx, struct
from flax.training.train_state import TrainState
from tricomp_jax.trees import NOTES_KEY, Flat, flatten, unflatten

import tricomp
from tests.cases import moments, stepped, weights
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    LimitExceeded,
    UnsupportedDtype,
    UnsupportedNode,
    WrongReference,
)

WIDE = ["float64", "int64", "uint64", "complex128"]
NARROW = ["int2", "int4", "uint2", "uint4", "float4_e2m1fn"]
DTYPES = [
    "float32", "float16", "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "complex64",
    "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool",
]  # fmt: skip


def random_bits(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """An array of any bit patterns that the dtype allows, NaN payloads among them."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    if name in NARROW:
        bits = 2 if name.endswith("2") else 4
        low = -(1 << (bits - 1)) if name.startswith("int") else 0
        codes = rng.integers(low, low + (1 << bits), shape, np.int8)
        return codes.view(np.uint8).view(dtype) if name.startswith("float") else codes.astype(dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    return rng.integers(0, 2 if name == "bool" else 256, n_bytes, np.uint8).view(dtype).reshape(shape)


def raw(array: Any) -> bytes:
    return np.asarray(jax.random.key_data(array) if is_key(array) else array).tobytes()


def is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def assert_same(found: Any, expected: Any) -> None:
    """Structure, types and bits of two pytrees are the same."""
    structure: Any = jax.tree.structure(expected)
    assert jax.tree.structure(found) == structure
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if hasattr(b, "dtype"):
            assert (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))
        else:
            assert type(a) is type(b)
            assert a == b


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "a.tri")


@pytest.fixture(scope="module")
def linen_state():
    """A trained TrainState: masked AdamW with clipping, a bf16 layer, static fields."""

    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.Dense(33, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)
            return flax.linen.Dense(5)(flax.linen.relu(x).astype(jnp.float32))

    net = Net()
    x = jax.random.normal(jax.random.key(1), (16, 7))
    params = net.init(jax.random.key(0), x)["params"]
    decay = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.trace(0.9), decay),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 100)),
    )
    state = TrainState.create(apply_fn=net.apply, params=params, tx=chain)
    fresh = state

    @jax.jit
    def step(state):
        def loss(params: Any) -> Any:
            found: Any = net.apply({"params": params}, x)
            return jnp.mean(found**2)

        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state)
    return state, fresh, step


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(7, 33, rngs=rngs), nnx.Linear(33, 5, rngs=rngs)])
        self.norm = nnx.BatchNorm(33, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Point(NamedTuple):
    x: Any
    y: Any


@struct.dataclass
class Averages:
    mean: Any
    name: str = struct.field(pytree_node=False, default="ema")


@jax.tree_util.register_pytree_node_class
class Pair:
    """A node that gives its children no keys."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def tree_flatten(self):
        return (self.a, self.b), None

    @classmethod
    def tree_unflatten(cls, _, values):
        return cls(*values)


# Arrays


@pytest.mark.parametrize("name", [*DTYPES, *NARROW])
def test_every_dtype_comes_back_bit_for_bit(path, name):
    host = {f"{shape}": random_bits(name, shape) for shape in [(0, 3), (), (33,), (7, 5, 3), (1, 257)]}
    tree = {key: jnp.asarray(array) for key, array in host.items()}
    assert all(tree[key].dtype == array.dtype for key, array in host.items())
    tricomp_jax.save(path, tree)
    assert_same(tricomp_jax.load(path), tree)
    assert_same(tricomp_jax.load(path, target=tree), tree)
    assert_same(tricomp_jax.load(path, target=jax.eval_shape(lambda: tree)), tree)


@pytest.mark.parametrize("name", WIDE)
def test_wide_numbers_are_never_cut(path, name):
    array = random_bits(name, (5, 7))
    with jax.enable_x64(True):
        tree = {"x": jnp.asarray(array), "numpy": array}
        tricomp_jax.save(path, tree)
        assert_same(tricomp_jax.load(path), tree)
        assert_same(tricomp_jax.load(path, target=tree), tree)
        shapes = jax.eval_shape(lambda: tree)
    found = tricomp_jax.load(path)
    assert type(found["x"]) is np.ndarray
    assert found["x"].tobytes() == array.tobytes()
    with pytest.raises(InvalidArgument, match="jax only has when jax_enable_x64 is set"):
        tricomp_jax.load(path, target=shapes)


def test_arrays_on_the_cpu_are_not_copied():
    tree = {name: jnp.asarray(random_bits(name, (64, 3))) for name in DTYPES}
    flat = flatten(tree)
    assert all(np.shares_memory(flat.tree[name], np.asarray(tree[name])) for name in DTYPES)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_stay_keys(path, implementation):
    key = jax.random.key(3, impl=implementation)
    tree = {"one": key, "many": jax.random.split(key, (2, 3)), "old": jax.random.PRNGKey(5)}
    tricomp_jax.save(path, tree)
    for found in (tricomp_jax.load(path), tricomp_jax.load(path, target=tree)):
        assert_same(found, tree)
        assert raw(jax.random.uniform(found["one"], (5,))) == raw(jax.random.uniform(key, (5,)))
    assert_same(tricomp_jax.load(path, target=jax.eval_shape(lambda: tree)), tree)
    other = jax.random.key(0, impl="rbg" if implementation == "threefry2x32" else "threefry2x32")
    with pytest.raises(InvalidArgument, match=f"'one': the checkpoint holds random keys of {implementation}"):
        tricomp_jax.load(path, target={**tree, "one": other})
    with pytest.raises(InvalidArgument, match=r"'old': the checkpoint holds uint32\[2\], the target key<"):
        tricomp_jax.load(path, target={**tree, "old": key})


def test_weakly_typed_numbers_stay_weak(path):
    tree = {"step": jnp.asarray(7), "scale": jnp.asarray(0.1), "turn": jnp.asarray(1j), "strong": jnp.float32(0.1)}
    assert [leaf.weak_type for leaf in tree.values()] == [True, True, True, False]
    tricomp_jax.save(path, tree)
    for target in (None, tree, jax.eval_shape(lambda: tree)):
        found = tricomp_jax.load(path, target=target)
        assert_same(found, tree)
        assert all(found[name].weak_type == tree[name].weak_type for name in tree)
        assert (jnp.ones(3, jnp.bfloat16) * found["scale"]).dtype == jnp.bfloat16
    nan = np.array(0x7FA00001, np.uint32).view(np.float32)
    strong = tricomp_jax.unflatten(Flat({"x": nan}, {"kinds": {"x": "weak"}}))["x"]
    assert raw(strong) == nan.tobytes()


# Trees


def test_a_train_state_comes_back_whole(path, linen_state):
    state, fresh, step = linen_state
    tricomp_jax.save(path, state)
    assert {"params/Dense_0/kernel", "opt_state/2/0/mu/Dense_1/bias"} <= set(tricomp.open(path))
    found = tricomp_jax.load(path, target=state)
    assert_same(found, state)
    assert (found.tx, found.apply_fn) == (state.tx, state.apply_fn)
    assert_same(step(found), step(state))
    # Before the first step, TrainState.step is Python's, then it is an array: either target takes either.
    assert tricomp_jax.load(path, target=fresh).step == 3
    tricomp_jax.save(path, fresh)
    found = tricomp_jax.load(path, target=state)
    assert (found.step.dtype, int(found.step)) == (state.step.dtype, 0)
    assert_same(tricomp_jax.load(path, target=jax.eval_shape(lambda: fresh)).params, fresh.params)


def test_nnx_states_have_the_paths_that_users_write(path):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    tree = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    tricomp_jax.save(path, tree)
    assert {"model/layers/0/kernel", "model/dropout/rngs/key", "optimizer/opt_state/0/mu/layers/1/bias"} <= set(
        tricomp.open(path)
    )
    assert_same(tricomp_jax.load(path, target=tree), tree)
    plain = tricomp_jax.load(path)
    assert list(plain["model"]["layers"]) == [0, 1]
    assert_same(plain["model"], nnx.to_pure_dict(tree["model"]))
    other = Net(nnx.Rngs(7))
    with pytest.raises(InvalidArgument, match=r"missing from the checkpoint: .*'layers/0/bias'"):
        tricomp_jax.load(path, target=nnx.state(other))
    nnx.update(other, tricomp_jax.load(path, target=tree)["model"])
    assert_same(nnx.state(other), tree["model"])


def test_every_kind_of_node(path):
    array = jnp.arange(33, dtype=jnp.bfloat16)
    tree: dict[str, Any] = {
        "dict": {"b": array, "a/b~": array},
        "numbers": {7: array + 1, 3: array},
        "ordered": collections.OrderedDict(z=array, a=1),
        "default": collections.defaultdict(list, k=[array]),
        "list": [array, (array, 2.5, None), []],
        "named": Point(array, Point(None, True)),
        "frozen": flax.core.freeze({"a": {"b": array}}),
        "struct": Averages(mean={"w": array}),
        "pair": Pair(array, {"x": 3}),
        "partitioned": flax.linen.Partitioned(array, names=("x",)),
        "optax": (optax.EmptyState(), optax.MaskedNode(), optax.ScaleByAdamState(jnp.zeros([], jnp.int32), {}, {})),
        "numpy": np.arange(5),
        "generic": np.float32(1.5),
        "plain": [True, -5, 1 << 40, 0.1, 1 - 2j, "text", b"bytes", None, math.inf],
    }
    tricomp_jax.save(path, tree)
    found = tricomp_jax.load(path, target=tree)
    assert_same(found, tree)
    assert list(found["dict"]) == list(tree["dict"])  # jax itself would have sorted them
    assert type(found["generic"]) is np.float32
    assert isinstance(found["optax"][1], optax.MaskedNode)
    assert_same(
        tricomp_jax.load(path),
        {
            **{key: tree[key] for key in ("dict", "numbers", "ordered", "list", "numpy", "generic", "plain")},
            "default": {"k": [array]},
            "named": {"x": array, "y": {"x": None, "y": True}},
            "frozen": {"a": {"b": array}},
            "struct": {"mean": {"w": array}},
            "pair": [array, {"x": 3}],
            "partitioned": array,
            "optax": ({}, {}, {"count": jnp.zeros([], jnp.int32), "mu": {}, "nu": {}}),
        },
    )
    assert set(tricomp.open(path)) >= {"dict/a~1b~0", "named/x", "struct/mean/w", "pair/0", "partitioned", "numbers/7"}


@pytest.mark.parametrize("leaf", [jnp.arange(5), np.arange(3), 7, "text", None, 2j, jax.random.key(1)], ids=str)
def test_a_bare_leaf_is_a_tree(path, leaf):
    tricomp_jax.save(path, leaf)
    assert_same(tricomp_jax.load(path), leaf)
    if leaf is not None:
        assert_same(tricomp_jax.load(path, target=leaf), leaf)


def test_flatten_and_unflatten_are_inverse(linen_state):
    state, *_ = linen_state
    tree = {"state": state, "key": jax.random.key(0), "four": jnp.arange(-8, 8, dtype=jnp.int4), "z": 1j}
    flat = flatten(tree)
    assert set(flat.notes) == {"keys", "dtypes", "kinds"}
    assert_same(unflatten(flat, target=tree), tree)
    assert_same(unflatten(flat)["four"], tree["four"])
    with pytest.raises(InvalidArgument, match="in the checkpoint but not in the target: 'z'"):
        unflatten(flat, target={key: tree[key] for key in tree if key != "z"})


def test_the_core_reads_what_jax_wrote_and_the_other_way_round(path):
    tree: dict[str, Any] = {
        "w": weights((40, 30)),
        "layers": [moments((7, 9)), np.arange(9, dtype=np.int32)],
        "step": 5,
    }
    tricomp_jax.save(path, jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, tree))
    found = tricomp.load(path)
    assert found["w"].tobytes() == tree["w"].tobytes()
    assert found["layers"][1].tobytes() == tree["layers"][1].tobytes()
    assert (found["step"], tricomp.open(path).metadata) == (5, {})
    tricomp.save(path, tree)
    assert_same(tricomp_jax.load(path), jax.tree.map(lambda x: x if isinstance(x, int) else jnp.asarray(x), tree))


def test_a_delta_needs_its_reference(path, tmp_path):
    old: dict[str, Any] = {"w": jnp.asarray(weights((300, 200))), "key": jax.random.key(1)}
    new: dict[str, Any] = {"w": jnp.asarray(stepped(np.asarray(old["w"]))), "key": jax.random.key(2)}
    tricomp_jax.save(path, old)
    other = tmp_path / "b.tri"
    full = tricomp_jax.save(other, new).file_bytes
    for reference in (path, old, tricomp.open(path)):
        report = tricomp_jax.save(other, new, reference=reference)
        assert report.file_bytes < 0.9 * full
        assert_same(tricomp_jax.load(other, reference=reference), new)
        assert_same(tricomp_jax.load(other, target=old, reference=reference), new)
    with pytest.raises(WrongReference):
        tricomp_jax.load(other, target=old)


def test_some_leaves_alone(path):
    tree: dict[str, Any] = {
        "a": {"*": jnp.arange(3), "x": jax.random.key(0)},
        "b[0]": jnp.arange(5, dtype=jnp.int4),
        "c": 1,
    }
    tricomp_jax.save(path, tree)
    found = tricomp_jax.load(path, leaves=["a/x", "b*"])
    assert_same(found, {"a/x": tree["a"]["x"], "b[0]": tree["b[0]"]})
    assert_same(
        tricomp_jax.load(path, target={"a": {"*": jnp.ones(3, int)}}, strict=False), {"a": {"*": tree["a"]["*"]}}
    )
    with pytest.raises(InvalidArgument, match="give target= or leaves="):
        tricomp_jax.load(path, tree, leaves=["a/x"])


# Targets that do not fit


def test_all_that_does_not_fit_is_told_at_once(path, linen_state):
    state, *_ = linen_state
    tricomp_jax.save(path, state)
    wrong = {
        "params": {"Dense_0": {"kernel": jnp.ones((7, 33)), "bias": jnp.ones(32, jnp.bfloat16)}, "extra": jnp.ones(2)},
        "step": "three",
    }
    with pytest.raises(InvalidArgument) as caught:
        tricomp_jax.load(path, target=wrong)
    lines = str(caught.value).split("\n")
    assert lines[0] == "the target does not fit what was saved."
    assert "  missing from the checkpoint: 'params/extra'" in lines
    assert any(line.startswith("  in the checkpoint but not in the target: 'params/Dense_1/bias'") for line in lines)
    assert any(line.endswith(" and 6 more") for line in lines)
    assert "  'params/Dense_0/kernel': the checkpoint holds bfloat16[7, 33], the target float32[7, 33]" in lines
    assert "  'params/Dense_0/bias': the checkpoint holds bfloat16[33], the target bfloat16[32]" in lines
    assert "  'step': the checkpoint holds int32[], the target a str" in lines


def test_a_target_is_judged_before_anything_is_decoded(path):
    tricomp_jax.save(path, {"w": jnp.asarray(weights((300, 200)))})
    with open(path, "r+b") as file:
        file.seek(3000)
        file.write(b"\x55" * 40)
    with pytest.raises(InvalidArgument, match="'w': the checkpoint holds"):
        tricomp_jax.load(path, target={"w": jnp.ones(3)})
    with pytest.raises(CorruptFrame, match="'w'"):
        tricomp_jax.load(path, target={"w": jnp.ones((300, 200))})


def test_what_is_not_strict_keeps_the_rest_of_the_target(path):
    tricomp_jax.save(path, {"a": jnp.arange(3, dtype=jnp.float32), "b": jnp.ones(2), "n": 5})
    target = {"a": jnp.zeros(3, jnp.bfloat16), "c": jnp.full(2, 7), "n": 0}
    found = tricomp_jax.load(path, target=target, strict=False)
    assert_same(found, {"a": jnp.arange(3, dtype=jnp.bfloat16), "c": target["c"], "n": 5})
    with pytest.raises(InvalidArgument, match=r"'a': the checkpoint holds float32\[3\], the target float32\[4\]"):
        tricomp_jax.load(path, target={"a": jnp.zeros(4)}, strict=False)
    with pytest.raises(InvalidArgument, match="without a value in the target: 'c'"):
        tricomp_jax.load(path, target={"c": jax.ShapeDtypeStruct((2,), jnp.int32)}, strict=False)


@pytest.mark.parametrize(
    ("saved", "target", "fits"),
    [
        (5, jnp.zeros([], jnp.int32), True),
        (5, jnp.zeros([], jnp.float32), False),
        (1 << 40, jnp.zeros([], jnp.int32), False),
        (300, jnp.zeros([], jnp.uint8), False),
        (0.5, jnp.zeros([], jnp.bfloat16), True),
        (0.1, jnp.zeros([], jnp.float32), False),
        (math.nan, jnp.zeros([]), True),
        (True, jnp.zeros([], bool), True),
        (True, 1, False),
        (5, 1.0, False),
        (5, np.int64(0), True),
        (5, np.zeros((), np.int16), True),
        (jnp.int32(7), 1, True),
        (jnp.bfloat16(0.5), 1.0, True),
        (jnp.ones(1), 1.0, False),
        (jnp.ones([], bool), False, True),
        (jnp.complex64(1j), 0j, True),
        (jnp.ones([]), 1, False),
        ("a", b"a", False),
        ("a", "b", True),
        (None, 3, False),
        (3, None, False),
        ({"a": 1}, [1], False),
    ],
    ids=str,
)
def test_numbers_of_python_and_of_jax(path, saved, target, fits):
    tricomp_jax.save(path, {"x": saved})
    if not fits:
        with pytest.raises(InvalidArgument, match="'x"):
            tricomp_jax.load(path, target={"x": target})
        return
    found = tricomp_jax.load(path, target={"x": target})["x"]
    assert isinstance(found, jax.Array) if isinstance(target, jax.Array) else type(found) is type(target)
    assert np.array_equal(np.asarray(found), np.asarray(saved), equal_nan=saved != saved)


def test_containers_of_a_target_may_be_others(path):
    tricomp_jax.save(path, {"state": Point([jnp.ones(3)], 2.0)})
    found = tricomp_jax.load(path, target={"state": {"x": (jnp.zeros(3),), "y": 0.0}})
    assert_same(found, {"state": {"x": (jnp.ones(3),), "y": 2.0}})


# What cannot be stored


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        ({"a": [jax.ShapeDtypeStruct((3,), jnp.int32)]}, UnsupportedNode, "leaf 'a/0': expected an array, got a jax"),
        ({"a": {"f": jnp.tanh}}, UnsupportedNode, "node 'a/f': tanh is a function. Leave it out"),
        ({"a": {(1, 2): jnp.ones(3)}}, UnsupportedNode, r"the dict key \(1, 2\)"),
        ({"a": object()}, UnsupportedNode, "node 'a': builtins.object cannot be stored"),
        ({"a": np.array(["x"])}, UnsupportedDtype, "leaf 'a': dtype 'str"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_stored_is_named(path, tree, error, text):
    with pytest.raises(error, match=text):
        tricomp_jax.save(path, tree)


def test_arrays_without_data_are_named(path):
    given = jax.device_put(jnp.ones((64, 64)))
    _ = jax.jit(lambda x: x + 1, donate_argnums=0)(given)
    assert given.is_deleted()
    with pytest.raises(UnsupportedNode, match="leaf 'w': its memory was given away, as jit's donate_argnums does"):
        tricomp_jax.save(path, {"w": given})
    with pytest.raises(UnsupportedNode, match="leaf 'w': it is traced by jax.jit"):
        jax.jit(lambda x: tricomp_jax.save(path, {"w": x}))(jnp.ones(3))
    with pytest.raises(UnsupportedNode, match="leaf 'k': it is traced"):
        jax.jit(lambda x: tricomp_jax.save(path, {"k": x}))(jax.random.key(0))


def test_wrong_arguments(path):
    with pytest.raises(InvalidArgument, match=r"tricomp_jax.save\(path, tree\), got a dict"):
        tricomp_jax.save({"a": 1}, path)  # type: ignore[arg-type]
    tricomp_jax.save(path, {"a": 1}, metadata={"run": 7})
    assert tricomp.open(path).metadata == {"run": 7}
    with pytest.raises(InvalidArgument, match="kept for tricomp's own notes"):
        tricomp_jax.save(path, {"a": 1}, metadata={NOTES_KEY: 1})
    with pytest.raises(InvalidArgument, match="metadata: expected a dict"):
        tricomp_jax.save(path, {"a": 1}, metadata=[1])  # type: ignore[arg-type]
    held: list[Any] = []
    held.append(held)
    with pytest.raises(LimitExceeded, match="holds itself"):
        tricomp_jax.save(path, held)


@pytest.mark.parametrize(
    "notes",
    [
        {"keys": {"w": "dice"}},
        {"keys": {"w": "threefry2x32"}},
        {"keys": {"w": 5}},
        {"keys": [1]},
        {"dtypes": {"w": "int4"}},
        {"dtypes": {"i": "int4"}},
        {"dtypes": {"u": "float4_e2m1fn"}},
        {"dtypes": {"w": "exec"}},
        {"kinds": {"t": "complex"}},
    ],
    ids=str,
)
def test_damaged_notes_are_refused(path, notes):
    tree = {"w": np.ones(3, np.float32), "i": np.arange(9, dtype=np.int8), "u": np.arange(99, dtype=np.uint8), "t": [1]}
    tricomp.save(path, tree, metadata={NOTES_KEY: notes})
    for target in (None, jax.tree.map(jnp.asarray, tree)):
        with pytest.raises((CorruptFile, InvalidArgument)):
            tricomp_jax.load(path, target=target)
    with pytest.raises(CorruptFile):
        unflatten(Flat(tree, notes))


# Flat files


def test_flat_files_in_the_manner_of_safetensors(path):
    tensors: dict[str, Any] = {
        "w": jnp.asarray(weights((300, 20))),
        "f8": jnp.asarray(random_bits("float8_e5m2", (9, 3))),
    }
    tensors |= {
        "four": jnp.arange(-8, 8, dtype=jnp.int4),
        "long": np.arange(5),
        "keys": jax.random.split(jax.random.key(1)),
    }
    tricomp_jax.save_file(tensors, path, {"epoch": "3"})
    assert_same(tricomp_jax.load_file(path), tensors)
    with tricomp_jax.safe_open(path) as opened:
        assert opened.keys() == sorted(tensors)
        assert opened.metadata() == {"epoch": "3"}
        assert_same(opened.get_tensor("four"), tensors["four"])
        assert_same(opened.get_slice("w")[5:7, ::3], tensors["w"][5:7, ::3])
        assert_same(opened.get_slice("four")[3:5], tensors["four"][3:5])
        assert_same(opened.get_slice("keys")[:1], jax.random.key_data(tensors["keys"])[:1])
    with tricomp_jax.safe_open(path, "np") as opened:
        assert opened.get_tensor("w").tobytes() == raw(tensors["w"])
    with pytest.raises(InvalidArgument, match="framework 'pt'"):
        tricomp_jax.safe_open(path, "pt")
    with pytest.raises(UnsupportedNode, match="entry 'a': expected a jax.Array, got a list"):
        tricomp_jax.save_file({"a": [1]}, path)
    assert_same(tricomp_jax.load_file(path), tensors)


def test_the_import_says_what_to_install():
    code = "import sys; sys.modules['jax'] = None\nimport tricomp_jax"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "ModuleNotFoundError: tricomp_jax needs jax, which is not installed. Install it: pip install" in ran.stderr


def test_it_needs_neither_flax_nor_optax():
    code = (
        "import sys\nfor name in ('flax', 'optax', 'orbax', 'torch'): sys.modules[name] = None\n"
        "import jax.numpy as jnp, tricomp_jax\n"
        "flat = tricomp_jax.flatten({'a': jnp.ones(3), 'n': (1, None)})\n"
        "assert tricomp_jax.unflatten(flat, target={'a': jnp.zeros(3), 'n': (0, None)})['n'] == (1, None)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_dataclasses_that_jax_knows(path):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Batch:
        x: Any
        n: int = dataclasses.field(metadata={"static": True}, default=3)

    tree = Batch(jnp.arange(4), 9)
    tricomp_jax.save(path, tree)
    assert_same(tricomp_jax.load(path, target=tree), tree)
    assert_same(tricomp_jax.load(path), {"x": tree.x})
