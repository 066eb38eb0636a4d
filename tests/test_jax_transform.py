"""save_every: what it saves from inside jit is, to the last bit, what training goes on with."""

import logging
from functools import partial
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

import jax
import jax.numpy as jnp
import optax
import tricomp_jax

import tricomp
from tests.faulty import WORLDS, World
from tests.jax_training import Linen, adamw, bits
from tricomp.errors import InvalidArgument, StorageError


def hook_at(folder, **options) -> Any:
    return tricomp_jax.CheckpointHook(str(folder), **options)


def parts(state):
    return {"params": state.params, "opt_state": state.opt_state}


def test_a_train_state_saves_itself_and_resumes(tmp_path):
    with hook_at(tmp_path, keyframe=tricomp.KeyframeEvery(2)) as hook:
        run = Linen(tx=tricomp_jax.save_every(adamw(), 2, hook))
        states, losses = {}, {}
        for step in range(1, 8):
            losses[step] = run.train(step)
            states[step] = bits(parts(run.state))
        assert hook.steps() == [2, 4, 6]

    with hook_at(tmp_path) as hook:
        again = Linen(seed=9, tx=tricomp_jax.save_every(adamw(), 2, hook))
        restored = hook.restore(4, parts(again.state))
        assert bits(restored.state) == states[4]
        restored = hook.restore_latest(parts(again.state))
        assert restored.step == 6
        again.state = again.state.replace(step=restored.step, **restored.state)
        assert again.train(7) == losses[7]
        assert bits(parts(again.state)) == states[7]
        again.train(8)
        again.train(9)
        hook.wait()
        assert hook.steps() == [2, 4, 6, 8]


def noisy():
    """An optimizer that holds typed random keys, and numbers of four bits."""

    def init(params):
        return {"key": jax.random.key(1), "tiny": jnp.arange(-4, 4, dtype=jnp.int4), "seen": jnp.zeros((), bool)}

    def update(updates, state, params=None):
        key, draw = jax.random.split(state["key"])
        updates = jax.tree.map(lambda u: u + 0.01 * jax.random.normal(draw, u.shape, u.dtype), updates)
        return updates, {**state, "key": key, "seen": ~state["seen"]}

    return optax.chain(optax.GradientTransformation(init, update), optax.sgd(0.1, momentum=0.9))


@pytest.mark.parametrize("how", ["scan", "eager", "jit"])
def test_under_scan_without_jit_and_with_keys_in_the_state(tmp_path, how):
    with hook_at(tmp_path, in_flight=2) as hook:
        tx = tricomp_jax.save_every(noisy(), 3, hook)
        params = {"w": jax.random.normal(jax.random.key(0), (301, 203)), "b": jnp.ones(77, jnp.bfloat16)}

        def step(carry, _=None):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run: Any = {
            "scan": partial(jax.jit(lambda carry, n: jax.lax.scan(step, carry, None, n)[0], static_argnums=1)),
            "jit": repeated(jax.jit(step, donate_argnums=0)),
            "eager": repeated(step),
        }[how]
        carry = run((params, tx.init(params)), 7)
        jax.block_until_ready(carry)
        assert hook.steps() == [3, 6]
        target = dict(zip(("params", "opt_state"), (params, tx.init(params))))
        restored = hook.restore(3, target).state
        again = run((restored["params"], restored["opt_state"]), 4)  # comes past 3, which is there, and 6
        assert bits(again) == bits(carry)
        with pytest.raises(InvalidArgument, match="step 6 is already in"):
            hook.wait()
        assert bits(hook.restore(6, target).state["opt_state"].inner[0]["tiny"]) == bits(carry[1].inner[0]["tiny"])


def repeated(step):
    def run(carry, n):
        carry = jax.tree.map(jnp.copy, carry)
        for _ in range(n):
            carry, _ = step(carry)
        return carry

    return run


def test_a_save_that_fails_does_not_end_the_step(caplog):
    WORLDS["jax"] = World()
    store = tricomp.Store("faulty://run", storage_options={"world": "jax"})
    hook: Any = tricomp_jax.CheckpointHook(store)
    tx = tricomp_jax.save_every(optax.adam(0.1), 1, hook)
    params = {"w": jnp.ones(333)}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(jax.tree.map(jnp.copy, params), tx.init(params))
    params, state = step(params, state)
    hook.wait()
    WORLDS["jax"].strike("fail", 1, "write")
    with caplog.at_level(logging.ERROR):
        params, state = step(params, state)
        params, state = step(params, state)
        assert int(state.count) == 4
        with pytest.raises(StorageError) as caught:
            hook.wait()
    assert any("step 2" in note for note in caught.value.__notes__)
    assert "step 2 could not be saved" in caplog.text
    hook.close()
    assert hook.steps() == [1, 3]
    last = {"params": params, "opt_state": state}
    hook(4, last)
    step(params, state)  # does not save 4 again
    hook.close()
    assert hook.steps() == [1, 3, 4]


def test_what_does_not_work_is_told(tmp_path):
    hook = hook_at(tmp_path)
    tx = tricomp_jax.save_every(optax.sgd(0.1), 5, hook)
    params = jnp.ones((2, 3))
    with pytest.raises(InvalidArgument, match="update needs the params too"):
        tx.update(params, tx.init(params))
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda p: tx.update(p, tx.init(p), p)[0])(params)
    for given, text in (
        ((optax.sgd(0.1), 0, hook), "every: expected a number of updates, 1 or more, got 0"),
        ((optax.sgd(0.1), 5, "runs/a"), "hook: expected a tricomp_jax.CheckpointHook, got str"),
        ((5, 5, hook), "inner: expected an optax.GradientTransformation, got int"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            tricomp_jax.save_every(*given)
    assert hook.steps() == []
