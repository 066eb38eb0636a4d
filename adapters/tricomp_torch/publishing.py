"""Weights for inference servers from torch: publish a state_dict or a module, apply to a folder or to live tensors.

Imports torch and tricomp.publishing. The hard thing is a state in the memory of a GPU: what differs from the last
version is found there; each tensor crosses the bus once for its checksum, in parts, and so does what differs. As
`.tri`, the whole difference is coded there, and only coded bytes cross.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from tricomp.errors import InvalidArgument, UnsupportedNode
from tricomp.publishing import Application, Publication
from tricomp.publishing import Publisher as HostPublisher
from tricomp.publishing import apply as apply_on_host
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.live import apply_to_tensors
from tricomp.publishing.publication import Options, open_base
from tricomp.publishing.tensors import Array, HostTensor, Tensor, code_of, plain_copy, tensors_of
from tricomp.publishing.trainer import publish_tensors
from tricomp_torch.objects import unwrapped
from tricomp_torch.tensors import is_on_host, to_array, to_leaf, to_numpy

__all__ = ["Application", "Publication", "Publisher", "apply", "publish"]

Path = str | os.PathLike[str]
State = Mapping[str, torch.Tensor] | torch.nn.Module


class DeviceTensor(Tensor):
    """A tensor that numpy does not see, compared where it lives with another that lives there."""

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        """Raises UnsupportedNode, UnsupportedDtype, naming the tensor."""
        self._tensor, self._leaf = tensor, to_leaf(tensor, name)
        if isinstance(self._leaf, np.ndarray):  # of a CPU after all
            self._bytes = torch.from_numpy(self._leaf.reshape(-1).view(np.uint8))
            self.code = HostTensor(self._leaf, name).code
        else:
            self._bytes = self._leaf.words.view(torch.uint8)
            self.code = code_of(self._leaf.dtype)
        self.shape, self.n_bytes = tuple(tensor.shape), len(self._bytes)

    def read(self, start: int, stop: int) -> Array:
        found: Array = self._bytes[start:stop].cpu().numpy()
        return found

    def leaf(self) -> Any:
        return self._leaf

    def write(self, words: Array) -> None:
        there = torch.from_numpy(words if words.flags.writeable else words.copy()).to(self._bytes.device)
        self._bytes.copy_(there)
        if self._tensor.numel() and self._bytes.data_ptr() != self._tensor.data_ptr():  # of other strides: a copy
            made = self._bytes.view(self._tensor.dtype).reshape(self._tensor.shape)
            self._tensor.detach().copy_(made)

    @property
    def address(self) -> int | None:
        return self._tensor.data_ptr() if self.n_bytes else None

    def xor(self, old: Tensor, start: int, stop: int) -> Array:
        if not isinstance(old, DeviceTensor) or old._bytes.device != self._bytes.device:
            return super().xor(old, start, stop)
        found: Array = (self._bytes[start:stop] ^ old._bytes[start:stop]).cpu().numpy()
        return found

    def n_changed(self, old: Tensor, start: int, stop: int) -> int:
        if not isinstance(old, DeviceTensor) or old._bytes.device != self._bytes.device:
            return super().n_changed(old, start, stop)
        return int(torch.count_nonzero(self._bytes[start:stop] != old._bytes[start:stop]))

    def copied(self) -> Tensor:
        leaf = self._leaf
        return HostTensor(plain_copy(leaf) if isinstance(leaf, np.ndarray) else to_numpy(leaf), "a copy")

    def take(self, other: Tensor) -> None:
        if isinstance(other, DeviceTensor):
            self._bytes.copy_(other._bytes)
        else:
            self._bytes.copy_(torch.from_numpy(np.array(other.read(0, other.n_bytes))))

    def copied_there(self) -> Tensor:
        """A copy beside it."""
        return DeviceTensor(self._tensor.detach().clone(memory_format=torch.contiguous_format), "a copy")


def publish(
    state: State,
    folder: Path,
    version: int,
    *,
    base: State | Path | None = None,
    **options: Any,
) -> Publication:
    """Write a state_dict, or a module's, as a version: see tricomp.publishing.publish, whose options these are.

    state, base: tensors on any device, tied ones too (each name is published for itself). Raises what it raises.
    """
    made = Options(**options)
    if base is None or isinstance(base, (str, os.PathLike)):
        with open_base(base) as opened:
            return publish_tensors(_tensors(state), folder, version, opened, made)
    return publish_tensors(_tensors(state), folder, version, _tensors(base), made)


def apply(
    local: State | Path,
    folder: Path,
    version: int | None = None,
    *,
    base: Path | None = None,
    at: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Application:
    """Bring a folder of safetensors, a dict of live tensors, or a module, to a published version.

    Tensors are written to in place, on whatever device they are; tied ones stay tied. at: the version that they hold;
    None: any, if there is a full version to begin at. The rest, and what is raised: tricomp.publishing.apply.
    """
    if isinstance(local, (str, os.PathLike)):
        return apply_on_host(
            local, folder, version, base=base, at=at, threads=threads, timeout=timeout, storage_options=storage_options
        )
    if base is not None:
        raise InvalidArgument("base: is for folders; tensors hold the base themselves. Say which with at=.")
    return apply_to_tensors(_tensors(local), Lineage(folder, storage_options), version, at, threads)


class Publisher(HostPublisher):
    """Publishes a trainer's states, and keeps the last one to compare with. For one thread.

    >>> publisher = tricomp_torch.publishing.Publisher("/shared/run", base="/models/base")  # doctest: +SKIP
    >>> publisher.publish(model, version)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: Path,
        base: State | Path | None = None,
        reference_in: Literal["device", "host", "folder"] = "device",
        full_every: int | None = None,
        **options: Any,
    ) -> None:
        """base, full_every, options: as for tricomp.publishing.Publisher.

        reference_in: where the last version is kept: beside the tensors (takes their memory once more), on the host,
        or nowhere: then it is made of what is in the folder each time. Raises InvalidArgument.
        """
        if reference_in not in ("device", "host", "folder"):
            raise InvalidArgument(f"reference_in: expected 'device', 'host' or 'folder', got {reference_in!r:.80}.")
        given = base if base is None or isinstance(base, (str, os.PathLike)) else _tensors(base)
        super().__init__(folder, given, "folder" if reference_in == "folder" else "host", full_every, **options)
        self._is_on_device = reference_in == "device"

    def tensors(self, state: Any) -> Mapping[str, Tensor]:
        return _tensors(state)

    def copied(self, tensor: Tensor) -> Tensor:
        return tensor.copied_there() if self._is_on_device and isinstance(tensor, DeviceTensor) else tensor.copied()


def _tensors(state: Any) -> dict[str, Tensor]:
    """The Tensors of a state_dict, or a module's, by name."""
    if isinstance(state, torch.nn.Module):
        state = unwrapped(state).state_dict()
    if not isinstance(state, Mapping):
        raise InvalidArgument(f"publishing: expected a state_dict or a module, got a {type(state).__name__}.")
    made: dict[Any, Any] = {}
    for name, value in state.items():
        what = str(name)
        if not isinstance(value, torch.Tensor):
            raise UnsupportedNode(f"publishing: entry {what!r}: expected a tensor, got a {type(value).__name__}.")
        made[name] = HostTensor(to_array(value, what), what) if is_on_host(value) else DeviceTensor(value, what)
    return tensors_of(made)
