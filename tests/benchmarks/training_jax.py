"""The GPT of training.py in Flax under Optax's AdamW: the same sizes, data and hyperparameters, on CPU. Imports both.

What differs is what differs in practice: kernels lie input first, weights and batches start from other random numbers,
and XLA adds in another order. Kept states have the keys of training.py, "w/<parameter>" and so on.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from numpy.typing import NDArray

from tests.benchmarks import training
from tests.benchmarks.training import Run

GPT, GPT_SMALL = (replace(run, name=f"{run.name}-jax") for run in (training.GPT, training.GPT_SMALL))


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm."""

    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        run, start = self.run, nn.initializers.normal(0.02)
        last = nn.initializers.normal(0.02 / (2 * run.n_blocks) ** 0.5)
        qkv = nn.Dense(3 * run.width, kernel_init=start, name="attention")(nn.LayerNorm(1e-5, name="norm_1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, run.n_heads, -1), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(run.width, kernel_init=last, name="projection")(mixed)
        up = nn.Dense(4 * run.width, kernel_init=start, name="up")(nn.LayerNorm(1e-5, name="norm_2")(x))
        return x + nn.Dense(run.width, kernel_init=last, name="down")(nn.gelu(up, approximate=False))


class Gpt(nn.Module):
    """A decoder-only transformer with tied input and output embedding."""

    run: Run

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        run, start = self.run, nn.initializers.normal(0.02)
        token = nn.Embed(run.vocabulary, run.width, embedding_init=start, name="token")
        position = nn.Embed(run.context, run.width, embedding_init=start, name="position")
        x = token(tokens) + position(jnp.arange(tokens.shape[1]))
        for i in range(run.n_blocks):
            x = Block(run, name=f"blocks_{i}")(x)
        return token.attend(nn.LayerNorm(1e-5, name="norm")(x))


@partial(jax.jit, donate_argnums=0)
def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, jax.Array]:
    """Train on rows of tokens, in the memory of the state given. Returns the next state and the loss."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def begin(run: Run) -> TrainState:
    """The state before the first step."""
    model = Gpt(run)
    params = model.init(jax.random.key(0), np.zeros((1, run.context), np.int32))["params"]

    def rate(step: jax.Array) -> jax.Array:
        return run.learning_rate * jnp.minimum(1.0, (step + 1) / run.warmup_steps)

    adamw = optax.adamw(rate, b1=0.9, b2=run.beta2, eps=1e-8, weight_decay=0.1)
    transform = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return TrainState.create(apply_fn=model.apply, params=params, tx=transform)


def arrays_of(state: TrainState) -> dict[str, NDArray[Any]]:
    """Weights and moments by name, copied: "w/blocks_0.up.kernel", "m/..." and "v/..."."""
    (adam,) = (one for one in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(one))
    arrays = {}
    for kind, tree in (("w", state.params), ("m", adam.mu), ("v", adam.nu)):
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            arrays[f"{kind}/{'.'.join(entry.key for entry in path)}"] = np.array(array)
    return arrays


def with_arrays(state: TrainState, arrays: dict[str, NDArray[Any]]) -> TrainState:
    """The state with the arrays of arrays_of, and counts of 0."""

    def of_kind(kind: str, like: Any) -> Any:
        names = [".".join(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[f"{kind}/{name}"]) for name in names])

    def moments(node: Any) -> Any:
        return node._replace(mu=of_kind("m", node.mu), nu=of_kind("v", node.nu)) if _is_adam(node) else node

    opt_state = jax.tree.map(moments, state.opt_state, is_leaf=_is_adam)
    return state.replace(params=of_kind("w", state.params), opt_state=opt_state)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def train(run: Run, folder: Path, log: Callable[[str], None]) -> None:
    """Train, and write the state at each of the run's steps, and about.json, into a folder."""
    text = b"\n".join(text for _, text in training.library_sources())
    tokens = training.tokens_of(text, run.vocabulary).astype(np.int32)
    rng, state = np.random.default_rng(0), begin(run)
    started, losses = time.perf_counter(), []
    for n in range(1, run.steps[-1] + 1):
        starts = rng.integers(len(tokens) - run.context - 1, size=run.batch)
        state, loss = step(state, tokens[starts[:, None] + np.arange(run.context + 1)])
        losses.append(float(loss))
        if n in run.steps:
            np.savez(folder / f"step{n}.npz", allow_pickle=False, **arrays_of(state))
        if n in run.steps or n % 20 == 0:
            log(f"{run.name}: step {n}, loss {losses[-1]:.3f}, {time.perf_counter() - started:.0f} s")
    about = {
        **asdict(run),
        "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "first_loss": round(losses[0], 3),
        "last_loss": round(sum(losses[-10:]) / len(losses[-10:]), 3),
        "seconds": round(time.perf_counter() - started),
        "text": f"standard library of Python {platform.python_version()}",
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1))
