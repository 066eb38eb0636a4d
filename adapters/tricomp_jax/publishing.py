"""Weights for inference servers from JAX: publish a flat dict of arrays, apply to a folder or to such a dict.

Imports jax and tricomp.publishing. The hard thing: an array of jax never changes, so what is applied to a dict of them
is a new dict, on the same devices. Arrays come to the host to be published.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tricomp.errors import InvalidArgument, UnsupportedDtype, UnsupportedNode
from tricomp.publishing import Application, Publication
from tricomp.publishing import Publisher as HostPublisher
from tricomp.publishing import apply as apply_on_host
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.live import apply_to_tensors
from tricomp.publishing.publication import Options, open_base
from tricomp.publishing.tensors import Tensor, tensors_of
from tricomp.publishing.trainer import publish_tensors
from tricomp_jax.arrays import NARROW, Array, is_key, name_of, to_host, to_leaf

__all__ = ["Application", "Publication", "Publisher", "apply", "apply_to_arrays", "publish"]

Path = str | os.PathLike[str]
State = Mapping[str, Any]

apply = apply_on_host


def publish(
    state: State, folder: Path, version: int, *, base: State | Path | None = None, **options: Any
) -> Publication:
    """Write a flat dict of names to arrays as a version: see tricomp.publishing.publish, whose options these are.

    state, base: jax.Arrays or numpy's, readable in this process. Raises what it raises.
    """
    made = Options(**options)
    if base is None or isinstance(base, (str, os.PathLike)):
        with open_base(base) as opened:
            return publish_tensors(_tensors(state), folder, version, opened, made)
    return publish_tensors(_tensors(state), folder, version, _tensors(base), made)


def apply_to_arrays(
    arrays: State,
    folder: Path,
    version: int | None = None,
    *,
    at: int | None = None,
    threads: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Application]:
    """The arrays as a published version has them, placed as those given are, and what was done.

    at: the version of those given; None: any, if there is a full version to begin at. Raises what
    tricomp.publishing.apply raises.
    """
    hosted = {name: np.array(array) for name, array in _arrays(arrays).items()}
    done = apply_to_tensors(tensors_of(hosted, "apply"), Lineage(folder, storage_options), version, at, threads)
    made = {
        name: jax.device_put(hosted[name], array.sharding) if isinstance(array, jax.Array) else hosted[name]
        for name, array in arrays.items()
    }
    return made, done


class Publisher(HostPublisher):
    """Publishes a trainer's arrays, and keeps the last on the host. See tricomp.publishing.Publisher."""

    def tensors(self, state: Any) -> Mapping[str, Tensor]:
        return _tensors(state)


def _tensors(state: Any) -> dict[str, Tensor]:
    return tensors_of(_arrays(state))


def _arrays(state: Any) -> dict[str, Array]:
    """The arrays on the host, by name. Raises InvalidArgument, UnsupportedNode, UnsupportedDtype, naming one."""
    if not isinstance(state, Mapping):
        raise InvalidArgument(f"publishing: expected a flat dict of arrays, got a {type(state).__name__}.")
    made: dict[str, Array] = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            made[name] = value
            continue
        if not isinstance(value, jax.Array) or is_key(value):
            kind = type(value).__name__ if not isinstance(value, jax.Array) else "random key"
            raise UnsupportedNode(
                f"publishing: entry {name!r}: expected an array, got a {kind}. Flatten the tree first."
            )
        if name_of(value.dtype) in NARROW:
            raise UnsupportedDtype(f"publishing: entry {name!r}: safetensors has no {value.dtype}. Convert it.")
        made[name] = to_host(to_leaf(value, str(name)))
    return made
