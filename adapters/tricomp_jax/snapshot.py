"""snapshot: a copy of what flatten gave, done when it returns, so that the next step may be given the arrays' memory.

Imports numpy, the core's memory and codec, and the adapter's trees; no jax. The hard thing is what need not be copied:
an array that jax has put together for the host is nobody else's, but one that a user has locked may be unlocked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tricomp import codec, dtypes
from tricomp import tree as plain_trees
from tricomp.host_memory import HostBuffer
from tricomp.layout import DeviceArray, snapshot_of
from tricomp_jax.trees import Flat


def snapshot(flat: Flat, buffer: HostBuffer | None = None) -> Flat:
    """Copy every leaf of a flattened tree: those of the host into the buffer, those of a GPU to fresh memory of it.

    jax must have computed the arrays. What jax put together for flatten alone, an array that was sharded, is taken as
    it is. buffer: None: fresh memory. Returns when all is copied. Raises UnsupportedDtype and UnsupportedNode, naming
    the path; OutOfDeviceMemory, with nothing changed: then encode flat while nothing changes.
    """
    structure, paths, leaves = plain_trees.flatten(flat.tree)
    done = _device_copies(paths, leaves)
    kinds = flat.notes.get("kinds", {})
    live: list[int] = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if i in done:
            continue
        dtypes.of(leaf, path)  # what holds objects cannot be copied as bytes
        if type(leaf) is not np.ndarray:
            done[i] = leaf.copy()  # with what its class adds, which the core judges
        elif leaf.flags.owndata and not leaf.flags.writeable and kinds.get(path) != "ndarray":
            done[i] = leaf
        else:
            live.append(i)
    copies, finish = (buffer or HostBuffer()).begin([leaves[i] for i in live])
    done |= zip(live, copies, strict=True)
    waiting = {id(leaf): done[i] for i, leaf in enumerate(leaves)}
    seen: set[int] = set()
    tree = _replaced(flat.tree, waiting, seen)
    if len(seen) < len(waiting):  # a leaf was another object in the tree, or is in a node of another type
        tree = plain_trees.unflatten(structure, [done[i] for i in range(len(leaves))])
    finish()
    return Flat(tree, flat.notes)


def _replaced(node: Any, copies: Mapping[int, Any], seen: set[int]) -> Any:
    """A flattened tree with other leaves, by the identities of its own; seen: gets those that it has."""
    if id(node) in copies:
        seen.add(id(node))
        return copies[id(node)]
    kind = type(node)
    if isinstance(node, dict):
        return kind((key, _replaced(value, copies, seen)) for key, value in node.items())
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        return kind(*(_replaced(value, copies, seen) for value in node))
    return kind(_replaced(value, copies, seen) for value in node) if isinstance(node, list | tuple) else node


def _device_copies(paths: Sequence[str], leaves: Sequence[Any]) -> dict[int, Any]:
    """Copies of the leaves that are on a device, by their numbers. Waits for them. Raises OutOfDeviceMemory."""
    far = [i for i, leaf in enumerate(leaves) if isinstance(leaf, DeviceArray)]
    if not far:
        return {}
    held = codec.copied(snapshot_of([paths[i] for i in far], [leaves[i] for i in far]), to_host=False)
    return {i: replace(leaves[i], words=words) for i, words in zip(far, held.buffers, strict=True)}
