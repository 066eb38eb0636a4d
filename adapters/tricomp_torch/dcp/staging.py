"""stage: a state whose tensors are copies, so that training goes on while it is saved. Imports the adapter's snapshot.

Tensors of a mesh become tensors of the same mesh around a copy of their local part. The hard thing is what may not be
touched: everything that training can still change must be a copy, plain values in containers too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tricomp.errors import OutOfDeviceMemory
from tricomp.host_memory import HostBuffer
from tricomp.layout import DeviceArray
from tricomp.tree import join
from tricomp_torch.dcp.planners import flat_values
from tricomp_torch.snapshot import snapshot_of
from tricomp_torch.tensors import from_device_array, to_leaf, to_numpy, view_as_tensor
from tricomp_torch.ties import TieFinder
from tricomp_torch.trees import Flat

_log = logging.getLogger("tricomp")


def stage(state: Any, to_host: bool = False, buffer: HostBuffer | None = None) -> Any:
    """The same state with a copy of every tensor, made before this returns: on a device where it lives, or on the host.

    Where a device has no memory for the copies, they go to the host. buffer: memory for copies there; None: fresh.
    Raises UnsupportedNode and UnsupportedDtype, naming the entry.
    """
    found: dict[str, Any] = {}
    with torch.no_grad():
        _map(state, "", lambda node, path: found.setdefault(path, node))
        flat_values({path: node for path, node in found.items() if not isinstance(node, torch.Tensor)})
        found = {path: _local(node) for path, node in found.items() if isinstance(node, torch.Tensor)}
        leaves = {path: to_leaf(tensor, path) for path, tensor in found.items()}
        finder = TieFinder()
        for path, tensor in found.items():
            finder.add(join(None, path), tensor)
        copies = _copied(leaves, finder.ties, to_host, buffer)

        def copy_of(node: Any, path: str) -> Any:
            if not isinstance(node, torch.Tensor):
                return node.copy() if isinstance(node, np.ndarray | bytearray | set) else node
            leaf = copies[path]
            made = from_device_array(leaf, path) if isinstance(leaf, DeviceArray) else view_as_tensor(leaf, path)
            return _with_local(node, made) if isinstance(node, DTensor) else made

        return _map(state, "", copy_of)


def _copied(leaves: dict[str, Any], ties: dict[str, str], to_host: bool, buffer: HostBuffer | None) -> dict[str, Any]:
    if to_host:
        leaves = {path: to_numpy(leaf) if isinstance(leaf, DeviceArray) else leaf for path, leaf in leaves.items()}
    try:
        taken = snapshot_of(Flat(leaves, {"ties": ties}), buffer=buffer)
    except OutOfDeviceMemory as error:
        _log.warning("the state is copied to the host: %s", error)
        return _copied(leaves, ties, True, buffer)
    taken.wait()  # who saves does so on another stream
    return dict(zip(leaves, taken.leaves, strict=True))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _with_local(tensor: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _map(node: Any, path: str, change: Callable[[Any, str], Any]) -> Any:
    """The same containers around what change makes of each entry. Paths are torch's: keys joined by dots."""

    def inner(value: Any, key: Any) -> Any:
        return _map(value, f"{path}.{key}" if path else str(key), change)

    if isinstance(node, torch.Tensor):  # most are, and training waits
        return change(node, path)
    if isinstance(node, Mapping):
        return {key: inner(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [inner(value, i) for i, value in enumerate(node)]
    if isinstance(node, tuple) and not isinstance(node, torch.Size):
        parts = [inner(value, i) for i, value in enumerate(node)]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return change(node, path)
