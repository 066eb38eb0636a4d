"""save_every: an Optax optimizer that saves every so many updates by itself, from inside jit. Needs optax when called.

The hard thing: what is saved must be, to the last bit, what training goes on with. XLA may compute the sum of params
and updates twice, once rounded and once not (a fused multiply-add), so the params after an update are only known for
sure when the next one is given them: that is when they are saved.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tricomp.errors import InvalidArgument
from tricomp.store import count_of
from tricomp_jax.arrays import is_key, key_implementation, narrowed
from tricomp_jax.hook import CheckpointHook, save_from_callback
from tricomp_jax.targets import leaves_of
from tricomp_jax.trees import Flat, flatten


class SaveEveryState(NamedTuple):
    """The state of save_every: updates made so far, and the state of the optimizer inside."""

    count: Any
    inner: Any


def save_every(inner: Any, every: int, hook: CheckpointHook, *, overwrite: bool = False) -> Any:
    """An optimizer as inner is one, that has hook save {"params": ..., "opt_state": ...} after each `every` updates.

    The step is the number of updates, which is in the state, so that a resumed run counts on. What is saved is what the
    update after it is given, before it changes it: to the last bit what training went on with, whatever was done to the
    params between the two. So the last state of a run is yours to save: hook(step, state, force=True).

    It must be the outermost transformation, and update needs params, as TrainState and nnx.Optimizer give them. It
    works under jit, with donated arguments, in lax.scan, and without jit; not under vmap, where jax refuses a callback
    in a branch, not under pmap, where each device would save its own, and not in a run of several processes. Where the
    loop can call a CheckpointHook, do that: it takes all of a state, where an optimizer sees no batch statistics and no
    random keys of a model; and it compresses on the GPU, where a callback gets all arrays by way of the host, and
    sharded ones are first put together on one device.

    An error cannot leave a compiled step without ending it, and what was donated to it would be gone. So errors of a
    save are logged, and raised by hook.wait(), hook.close() and the hook's next call in the loop.

    overwrite: replace steps that are there. Raises InvalidArgument.

    >>> tx = tricomp_jax.save_every(optax.adamw(3e-4), 100, hook)  # doctest: +SKIP
    >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)  # doctest: +SKIP
    >>> target = {"params": state.params, "opt_state": state.opt_state}  # doctest: +SKIP
    >>> if restored := hook.restore_latest(target):  # doctest: +SKIP
    ...     state = state.replace(step=restored.step, **restored.state)
    """
    optax: Any = import_module("optax")

    every = count_of(every, "every: expected a number of updates")
    if not isinstance(hook, CheckpointHook):
        raise InvalidArgument(f"hook: expected a tricomp_jax.CheckpointHook, got {type(hook).__name__}.")
    if not hasattr(inner, "init") or not hasattr(inner, "update"):
        raise InvalidArgument(f"inner: expected an optax.GradientTransformation, got {type(inner).__name__}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SaveEveryState:
        return SaveEveryState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: SaveEveryState, params: Any = None, **extra: Any) -> tuple[Any, SaveEveryState]:
        if params is None:
            raise InvalidArgument("save_every: update needs the params too: tx.update(grads, opt_state, params).")
        if jax.process_count() > 1:
            raise InvalidArgument("save_every: this run has several processes. Call a CheckpointHook in the loop.")
        is_due = (state.count > 0) & (state.count % every == 0)
        jax.lax.cond(is_due, lambda: _save(hook, state.count, params, state, overwrite), lambda: None)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        return updates, SaveEveryState(state.count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _save(hook: CheckpointHook, step: Any, params: Any, state: SaveEveryState, overwrite: bool) -> None:
    """Have the hook save traced arrays when they are there."""
    tree = {"params": params, "opt_state": state}
    keys = {path: key_implementation(leaf) for path, leaf in leaves_of(tree) if hasattr(leaf, "dtype") and is_key(leaf)}
    data = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf), tree)
    flat = flatten(data, lambda leaf, _: leaf)
    notes = {**flat.notes, "keys": keys} if keys else flat.notes
    leaves, structure = jax.tree.flatten(flat.tree)

    def save(step: Any, leaves: Any) -> None:
        # No operation of jax here: on a CPU it may wait for the thread that this runs in.
        there = [narrowed(np.asarray(leaf)) for leaf in leaves]
        tree: Any = jax.tree.unflatten(structure, there)
        save_from_callback(hook, int(np.asarray(step)), Flat(tree, notes), overwrite)

    jax.experimental.io_callback(save, None, step, leaves)
