"""What the demo trains: a small Flax GPT on bytes of Python's own standard library. Imports jax, flax and optax.

Batches and dropout draw from random keys in the state, so that a resumed run must restore them to agree. Nothing here
saves. The hard thing: the same program must compute the same bits in every process; see `deterministic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from tricomp.demos.task import VOCABULARY, Size, library_text

# XLA may share a matrix product among threads, and may share it otherwise where there are more of them. One thread
# leaves it no choice; and the CPU has no atomic additions, whose order a GPU would leave open.
_FLAGS = ("--xla_cpu_multi_thread_eigen=false",)
_QUICK_FLAGS = ("--xla_backend_optimization_level=0",)  # a tiny model is compiled longer than it is trained


def deterministic(environ: Mapping[str, str], is_quick: bool = False) -> dict[str, str]:
    """Environment variables to set before jax is used, so that runs repeat bit for bit: one CPU device, one thread.

    environ: the variables there are; their own flags of XLA stay. is_quick: compile quickly, not well.
    """
    flags = [*environ.get("XLA_FLAGS", "").split(), *_FLAGS, *(_QUICK_FLAGS if is_quick else ())]
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and added to its input."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, drop = self.size, nn.Dropout(self.size.dropout, deterministic=False)
        qkv = nn.Dense(3 * size.width, name="qkv")(nn.LayerNorm(name="norm_1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, size.n_heads, -1), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + drop(nn.Dense(size.width, name="projection")(mixed))
        up = nn.Dense(4 * size.width, name="up")(nn.LayerNorm(name="norm_2")(x))
        change: jax.Array = drop(nn.Dense(size.width, name="down")(nn.gelu(up)))
        return x + change


class GPT(nn.Module):
    """A byte-level GPT whose output layer is its embedding. int[batch, context] to logits."""

    size: Size

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size = self.size
        embedding = nn.Embed(VOCABULARY, size.width, name="embedding")
        position = self.param("position", nn.initializers.zeros, (size.context, size.width))
        x = nn.Dropout(size.dropout, deterministic=False)(embedding(tokens) + position)
        for i in range(size.n_layers):
            x = Block(size, name=f"blocks_{i}")(x)
        logits: jax.Array = embedding.attend(nn.LayerNorm(name="norm")(x))
        return logits


class State(TrainState):  # type: ignore[no-untyped-call]  # as all of flax is
    """All that a run changes: step, parameters and optimizer state are Flax's; key is what random numbers come from."""

    key: jax.Array


def _drawn(shapes: Any, rng: np.random.Generator) -> Any:
    """Parameters of some shapes, random where they are matrices. model.init would be compiled for seconds first."""

    def drawn(path: tuple[Any, ...], shape: Any) -> jax.Array:
        if len(shape.shape) > 1:
            return jnp.asarray(rng.normal(0, 0.02, shape.shape), shape.dtype)
        return jnp.full(shape.shape, 1.0 if path[-1].key == "scale" else 0.0, shape.dtype)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def begin(size: Size, n_steps: int, seed: int = 0) -> State:
    """A fresh run: AdamW with weight decay on matrices, warmup and cosine decay to n_steps, gradients clipped."""
    model = GPT(size)
    key = jax.random.key(seed)
    shapes = jax.eval_shape(model.init, {"params": key, "dropout": key}, np.zeros((1, size.context), np.int32))
    params = _drawn(shapes["params"], np.random.default_rng(seed))
    rate = optax.warmup_cosine_decay_schedule(1e-4, 1e-3, max(1, n_steps // 10), n_steps, 1e-4)
    adamw = optax.adamw(
        rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    )
    transform = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    create: Any = State.create
    state: State = create(apply_fn=model.apply, params=params, tx=transform, key=key)
    return state.replace(step=jnp.zeros((), jnp.int32))


def text() -> jax.Array:
    """The text that is trained on. uint8[n]."""
    return jnp.asarray(library_text())


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def train_step(state: State, data: jax.Array, size: Size) -> tuple[State, jax.Array]:
    """One step on a random batch, in the memory of the state given. Returns the next state and the loss."""
    key, key_batch, key_dropout = jax.random.split(state.key, 3)
    starts = jax.random.randint(key_batch, (size.batch,), 0, len(data) - size.context - 1)
    rows = data[starts[:, None] + jnp.arange(size.context + 1)].astype(jnp.int32)

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, rows[:, :-1], rngs={"dropout": key_dropout})
        mean: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
        return mean

    value, gradients = jax.value_and_grad(loss)(state.params)
    apply: Any = state.apply_gradients
    return apply(grads=gradients, key=key), value
