"""Small training runs in jax, as users write them, with donated state: Flax linen, flax.nnx, and plain Optax."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState


class Net(nn.Module):
    """Embedding, norm, dense; of odd sizes."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(37, 19, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(tokens).astype(jnp.float32)
        return nn.Dense(37)(nn.LayerNorm()(nn.gelu(nn.Dense(33)(x))))


def batch(step: int) -> Any:
    """Tokens of a step."""
    return jnp.asarray(np.random.default_rng(step).integers(0, 37, (8, 5)))


def _loss(logits: Any, tokens: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, (3 * tokens + 1) % 37).mean()


@cache
def adamw() -> Any:
    """With a schedule and a mask, so that its state has counts and MaskedNodes."""
    mask = partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 1e-3, 9), mask=mask))


class Linen:
    """A TrainState. What all runs have: state, train(step) -> the loss as exact text, leaves()."""

    def __init__(self, seed: int = 0, tx: Any = None) -> None:
        self.state: Any = TrainState.create(apply_fn=_apply, params=_init(seed), tx=tx or adamw())

    def train(self, step: int) -> str:
        self.state, loss = _linen_step(self.state, batch(step))
        return float(loss).hex()

    def restored(self, state: Any) -> None:
        self.state = state


_apply = Net().apply  # one for all: jit compiles anew for each


@jax.jit
def _init(seed: int) -> Any:
    return Net().init(jax.random.key(seed), jnp.zeros((8, 5), jnp.int32))


@partial(jax.jit, donate_argnums=0)
def _linen_step(state: Any, tokens: Any) -> Any:
    loss, grads = jax.value_and_grad(lambda params: _loss(state.apply_fn(params, tokens), tokens))(state.params)
    return state.apply_gradients(grads=grads), loss


class Plain(Linen):
    """(params, opt_state), and random keys that every step draws from."""

    def __init__(self, seed: int = 0, tx: Any = None) -> None:
        self.tx = tx or adamw()
        params = {"w": jax.random.normal(jax.random.key(seed), (37, 37)), "b": jnp.zeros(37, jnp.float16)}
        self.state = (params, self.tx.init(params), jax.random.key(seed))

    def train(self, step: int) -> str:
        self.state, loss = _plain_step(self.state, batch(step), self.tx)
        return float(loss).hex()


@partial(jax.jit, donate_argnums=0, static_argnums=2)
def _plain_step(state: Any, tokens: Any, tx: Any) -> Any:
    params, opt_state, key = state
    key, draw = jax.random.split(key)

    def loss_of(params: Any) -> Any:
        logits = jax.nn.one_hot(tokens, 37) @ params["w"] + params["b"]
        return _loss(logits + 0.1 * jax.random.normal(draw, logits.shape), tokens)

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, key), loss


class NnxNet(nnx.Module):
    """With dropout, whose random state is the model's, and batch statistics."""

    def __init__(self, rngs: Any) -> None:
        self.embed = nnx.Embed(37, 19, rngs=rngs)
        self.norm = nnx.BatchNorm(19, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(19, 37, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        return self.head(self.dropout(self.norm(self.embed(tokens))))


class Nnx(Linen):
    """A module and its optimizer, which training and restoring change in place."""

    def __init__(self, seed: int = 0, tx: Any = None) -> None:
        model = NnxNet(nnx.Rngs(seed))
        self.state = {"model": model, "optimizer": nnx.Optimizer(model, tx or adamw(), wrt=nnx.Param)}

    def train(self, step: int) -> str:
        return float(_jit_nnx_step(self.state["model"], self.state["optimizer"], batch(step))).hex()


def _nnx_step(model: Any, optimizer: Any, tokens: Any) -> Any:
    loss, grads = nnx.value_and_grad(lambda model: _loss(model(tokens), tokens))(model)
    optimizer.update(model, grads)
    return loss


_jit_nnx_step: Any = nnx.jit(_nnx_step, donate_argnums=(0, 1))


RUNS: dict[str, Any] = {"linen": Linen, "plain": Plain, "nnx": Nnx}


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Every leaf of a tree, with its path, comparable with ==."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        if type(leaf) is int:  # as jit makes of it
            array = array.astype(np.int32)
        found.append((jax.tree_util.keystr(path), str(array.dtype), array.shape, array.tobytes()))
    return found
