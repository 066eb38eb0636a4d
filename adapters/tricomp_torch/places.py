"""Where the leaves of a checkpoint go when it is restored: into tensors that objects hold already, or into new ones.

A module or an optimizer that is given its own tensors as its state finds them filled: its load_state_dict copies
nothing, and does all else that it ever does. The hard thing: memory that two leaves share must not be filled twice
with different words; then each gets a tensor of its own, and load_state_dict has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from tricomp.tree import join
from tricomp_torch.filling import Filling, Target
from tricomp_torch.objects import Pair
from tricomp_torch.tensors import PLAIN, fills_memory


def targets_of(filling: Filling, pairs: Sequence[Pair], others: Iterable[str]) -> dict[str, Target]:
    """What to decode each leaf to of the states that pairs take over, and of others, paths of nodes.

    Leaves that are tied to one of those in the checkpoint are left out, unless they have a place of their own.
    """
    nodes = {*others, *(pair.path for pair in pairs if pair.state is not None)}
    wanted = [path for path in filling.file if any(node in nodes for node in _nodes_above(path))]
    held = _held(filling, pairs)
    homes = {path: home for pair in pairs for path, home in _homes(pair)}
    there = set(wanted)
    targets: dict[str, Target] = {}
    for path in wanted:
        if path in held:
            targets[path] = held[path]
        elif filling.ties.get(path) not in there:
            targets[path] = filling.new(path, homes.get(path))
    return targets


def _nodes_above(path: str) -> Iterator[str]:
    """The paths of all nodes that a leaf stands in, itself first."""
    yield path
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _held(filling: Filling, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """The tensors of objects that can be filled with the leaf at their path."""
    found: dict[str, torch.Tensor] = {}
    for pair in pairs:
        for path, tensor in _tensors(pair):
            if path in filling.file and _fits(filling, path, tensor):
                found[path] = tensor
    contested = _contested(filling, found)
    return {path: tensor for path, tensor in found.items() if path not in contested}


def _tensors(pair: Pair) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and tensor of what an object holds itself and gives out as its state."""
    if pair.state is None:
        return
    if isinstance(pair.target, torch.nn.Module):
        entries = [(pair.path, pair.target.state_dict())]
    elif isinstance(pair.target, torch.optim.Optimizer):
        above = join(pair.path, "state")
        entries = [(join(above, number), slots) for number, slots in pair.target.state_dict()["state"].items()]
    else:
        return
    for above, slots in entries:
        if isinstance(slots, Mapping):
            for key, value in slots.items():
                if type(value) in PLAIN and not is_lazy(value):
                    yield join(above, key), value.detach()


def _fits(filling: Filling, path: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is memory for a leaf, each element in a place of its own."""
    leaf = filling.file.leaf(path)
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and tuple(tensor.shape) == leaf.shape
        and str(tensor.dtype) == f"torch.{leaf.dtype.name}"
        and (tensor.is_contiguous() or fills_memory(tuple(tensor.shape), tensor.stride()))
    )


def _contested(filling: Filling, held: Mapping[str, torch.Tensor]) -> set[str]:
    """Paths of tensors whose memory is that of another one too, unless they are one tensor and hold the same."""
    spans: dict[Any, dict[tuple[int, int], list[str]]] = {}  # by device: first byte and end
    for path, tensor in held.items():
        if tensor.numel():
            begin = tensor.data_ptr()
            span = begin, begin + tensor.numel() * tensor.element_size()
            spans.setdefault(tensor.device, {}).setdefault(span, []).append(path)
    contested: set[str] = set()
    for mine in spans.values():
        for paths in mine.values():
            if len({(filling.facts(path), held[path].stride(), held[path].is_conj()) for path in paths}) > 1:
                contested.update(paths)
        end, last = 0, (0, 0)
        for span in sorted(mine):
            if span[0] < end:
                contested.update(mine[span], mine[last])
            if span[1] > end:
                end, last = span[1], span
    return contested


def _homes(pair: Pair) -> Iterator[tuple[str, torch.device]]:
    """Where an optimizer moves new state to, by path."""
    if pair.state is None or not isinstance(pair.target, torch.optim.Optimizer):
        return
    numbers = [number for group in pair.state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in pair.target.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        slots = pair.state["state"].get(number, {})
        if parameter.device.type != "cpu" and isinstance(slots, Mapping):
            for key in slots:
                if key != "step":  # which torch keeps on the host, mostly
                    yield join(join(join(pair.path, "state"), number), key), parameter.device
