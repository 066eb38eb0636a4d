"""JAX on a real card: arrays go to the kernels by DLPack and come back, and a hook saves the state of its call.

Needs a jax that sees a GPU, a torch that does, and Triton. jax takes most of a card's memory when it starts: run with
XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("torch")
pytest.importorskip("triton")

import jax
import jax.numpy as jnp
import optax
import tricomp_jax
from tricomp_jax import arrays

import tricomp
from tests.cases import decayed, moments, of_dtype, stepped, weights
from tricomp.layout import DeviceArray


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _has_gpu(), reason="jax sees no GPU")]

NAMES = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
    "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool",
]  # fmt: skip


def state(step: int = 0) -> dict[str, Any]:
    """A training state's arrays: weights, moments, a bfloat16 copy, odd dtypes and sizes."""
    w, v = weights((700, 333)), moments((700, 333))
    for number in range(step):
        w, v = stepped(w, seed=number), decayed(v, seed=number)
    odd = {name: of_dtype(name, (33, 65)) for name in NAMES}
    return {
        "w": w,
        "v": v,
        "half": w.astype(jnp.bfloat16),
        "odd": odd,
        "count": np.int32(step),
        "none": np.zeros((0, 3)),
    }


def on_gpu(tree: Any) -> Any:
    device = jax.devices("gpu")[0]
    return jax.tree.map(lambda array: jax.device_put(jnp.asarray(array), device), tree)


def same(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(
        (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes()) for a, b in pairs
    )


def test_leaves_stay_on_the_card() -> None:
    flat = tricomp_jax.flatten(on_gpu(state()))
    leaves = jax.tree.leaves(flat.tree, is_leaf=lambda node: isinstance(node, DeviceArray))
    assert all(isinstance(leaf, DeviceArray) and leaf.words.is_cuda for leaf in leaves)


def test_the_bytes_are_those_of_the_host(tmp_path: Any) -> None:
    there, here = tmp_path / "gpu.tri", tmp_path / "cpu.tri"
    first, second = state(), state(1)
    for tree, reference in ((first, None), (second, first)):
        base = None if reference is None else on_gpu(reference)
        tricomp_jax.save(there, on_gpu(tree), reference=base, backend="triton")
        tricomp_jax.save(here, jax.tree.map(jnp.asarray, tree), reference=reference, backend="native")
        with tricomp.open(there, reference=reference) as a, tricomp.open(here, reference=reference) as b:
            assert a.content_id == b.content_id
            assert [a.plan(path) for path in a] == [b.plan(path) for path in b]
        assert there.read_bytes() == here.read_bytes()


def test_arrays_come_back_to_the_card(tmp_path: Any) -> None:
    tree = on_gpu(state())
    tricomp_jax.save(tmp_path / "a.tri", tree)
    for found in (tricomp_jax.load(tmp_path / "a.tri"), tricomp_jax.load(tmp_path / "a.tri", target=tree)):
        assert same(found, tree)
        assert all(arrays.is_on_gpu(leaf) for leaf in jax.tree.leaves(found))


def test_a_hook_saves_what_was_there_when_it_was_called(tmp_path: Any) -> None:
    optimizer = optax.adamw(1e-2)
    params = on_gpu({"w": weights((900, 700))})
    opt_state = optimizer.init(params)

    def step(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum(jnp.tanh(p["w"]) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    expected = {}
    with tricomp_jax.CheckpointHook(tmp_path, every=1) as hook:
        for number in range(4):
            params, opt_state = jitted(params, opt_state)
            expected[number] = jax.tree.map(lambda leaf: np.array(leaf), (params, opt_state))
            hook(number, (params, opt_state))
        for number, tree in expected.items():
            restored = hook.restore(number, (params, opt_state))
            assert same(restored.state, tree)
