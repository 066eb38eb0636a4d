"""flatten and unflatten: a tree of torch tensors to the core's tree of numpy arrays, and back. Imports no file code.

The core's tree keeps dict, list, tuple, named tuple, OrderedDict and plain values. What a torch checkpoint holds beyond
that (which entries are tied, strides, what tensor subclasses are made of, module versions, Counters, dtypes, which
arrays were numpy's) goes into *notes*, a small plain map kept in the file's metadata. So the tree itself stays readable
by everybody, and a file without notes loads too. The hard thing: notes come back from a file and are not to be trusted;
each is checked before it is used.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tricomp.errors import CorruptFile, LimitExceeded, UnsupportedNode
from tricomp.layout import DeviceArray
from tricomp.tree import join
from tricomp_torch import subclasses
from tricomp_torch.tensors import PLAIN, Leaf, to_leaf, to_numpy, unusual_strides
from tricomp_torch.ties import TieFinder, TieMaker

NOTES_KEY = "tricomp_torch"
"""The key in a file's metadata under which the notes stand."""


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


def _size(sizes: tuple[Any, ...]) -> torch.Size:
    if not all(type(size) is int and abs(size) < 1 << 63 for size in sizes):  # torch itself notices when it shows them
        raise TypeError("sizes are integers of 64 bits")
    return torch.Size(sizes)


# Node kinds noted by path: the type of the plain node that stands for each in the tree, and how it is made again.
_MAKE_NODE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "Counter": (dict, Counter),
    "Size": (tuple, _size),
    "set": (list, set),
    "bytearray": (bytes, bytearray),
    "complex": (tuple, lambda parts: complex(*parts)),
    "device": (str, torch.device),
    "dtype": (str, _dtype),
}
# How a leaf takes part in training, noted of files of torch.save alone: a state_dict is of plain tensors.
_TAKE_PART: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Parameter": torch.nn.Parameter,
    "frozen Parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "tensor": torch.Tensor.requires_grad_,
}
_SCALARS = (bool, int, float, str, bytes)
_ORDERED_DICT_META = "_metadata"  # torch's name for the module versions that a state_dict carries


@dataclass(frozen=True)
class Flat:
    """A flattened tree: the tree with numpy arrays for tensors, and the notes that unflatten needs."""

    tree: Any
    notes: dict[str, Any] = field(default_factory=dict)


def flatten(tree: Any, on_leaf: Callable[[str, torch.Tensor], None] | None = None) -> Flat:
    """The core's tree for a tree of tensors and plain values.

    Tensors share memory with the result, on whatever device, so it must be used before they change. on_leaf gets path
    and tensor of every leaf. Raises UnsupportedNode or UnsupportedDtype, naming the path, and LimitExceeded if the tree
    is too deep (or holds itself); what else the core can judge is left to it.
    """
    ties = TieFinder()
    kinds: dict[str, str] = {}
    modules: dict[str, Any] = {}
    strides: dict[str, list[int]] = {}
    parts: dict[str, Any] = {}

    def leaf(tensor: torch.Tensor, path: str) -> Leaf:
        array = to_leaf(tensor, path)
        ties.add(path, tensor)
        if on_leaf is not None:
            on_leaf(path, tensor)
        unusual = unusual_strides(tensor)
        if unusual is not None:
            strides[path] = list(unusual)
        return array

    def walk(node: Any, path: str | None) -> Any:
        name = path or ""
        if isinstance(node, torch.Tensor):
            if type(node) in PLAIN:
                return leaf(node, name)
            inner, parts[name] = subclasses.take_apart(node, name)
            return {key: walk(value, join(path, key)) for key, value in inner.items()}
        if node is None or type(node) in _SCALARS:
            return node
        if type(node) is np.ndarray or isinstance(node, np.generic):  # subclasses, masked arrays say, are refused
            kinds[name] = "ndarray" if isinstance(node, np.ndarray) else "generic"
            return np.asarray(node)
        if isinstance(node, dict):
            if type(node) not in (dict, OrderedDict, Counter):
                raise UnsupportedNode(f"{name!r}: expected a dict, got its subclass {type(node).__name__}. Convert it.")
            if type(node) is Counter:
                kinds[name] = "Counter"
            versions = getattr(node, _ORDERED_DICT_META, None)
            if isinstance(versions, Mapping):
                modules[name] = {str(module): dict(version) for module, version in versions.items()}
            entries = {key: walk(value, join(path, key)) for key, value in node.items()}
            return OrderedDict(entries) if type(node) is OrderedDict else entries
        if type(node) is list:
            return [walk(value, join(path, i)) for i, value in enumerate(node)]
        if type(node) is torch.Size:
            kinds[name] = "Size"
            return tuple(node)
        if type(node) is tuple or (isinstance(node, tuple) and hasattr(node, "_fields")):
            return _map_tuple(node, path, walk)
        kind, plain = _plain(node)
        if kind:
            kinds[name] = kind
            return plain
        _refuse_known(node, name)
        return node

    try:
        flat = walk(tree, None)
    except RecursionError:
        raise LimitExceeded("tree: it is nested too deeply, or holds itself. Flatten it first.") from None
    notes = {"ties": ties.ties, "kinds": kinds, "modules": modules, "strides": strides, "subclasses": parts}
    return Flat(flat, {key: value for key, value in notes.items() if value})


MakeTensor = Callable[[str, Any, torch.device | None], torch.Tensor]


def unflatten(flat: Flat, device: torch.device | None = None, make: MakeTensor | None = None) -> Any:
    """The tree of tensors that `flatten` was given, on device (None: the CPU), sharing no memory with the arrays.

    make: how a leaf's tensor is made of path, array and device, if otherwise. Raises CorruptFile if the notes do not
    fit the tree, UnsupportedDtype if torch lacks a leaf's dtype, UnsupportedNode for tensor subclasses not known here.
    """
    kinds, modules = table(flat.notes, "kinds"), table(flat.notes, "modules")
    make = make or maker_of(flat.notes).tensor
    gradients = table(flat.notes, "gradients")
    parts = table(flat.notes, "subclasses")
    subclasses.require_notes(parts)
    _require_maps(modules)

    def walk(node: Any, path: str | None) -> Any:
        name = path or ""
        kind = kinds.get(name)
        if isinstance(node, DeviceArray):
            if kind in ("ndarray", "generic"):
                return walk(to_numpy(node), path)
            return _taking_part(make(name, node, device), gradients.get(name), name)
        if isinstance(node, np.ndarray):
            if kind == "ndarray":
                return node
            if kind == "generic" and node.shape == ():
                return node[()]
            return _taking_part(make(name, node, device), gradients.get(name), name)
        made: Any = node
        if isinstance(node, dict):
            made = type(node)((key, walk(value, join(path, key))) for key, value in node.items())
        elif isinstance(node, tuple):
            made = _map_tuple(node, path, walk)
        elif isinstance(node, list):
            made = [walk(value, join(path, i)) for i, value in enumerate(node)]
        if kind in _MAKE_NODE:
            plain, make_node = _MAKE_NODE[kind]
            try:
                made = make_node(made) if type(node) is plain else None
            except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError):
                made = None
            if made is None:
                what = f"is {node!r}" if isinstance(node, str) else f"is a {type(node).__name__}"
                raise CorruptFile(f"{name!r} is noted as {kind}, but {what}. Use tricomp.load.")
        if isinstance(made, OrderedDict) and name in modules:
            setattr(made, _ORDERED_DICT_META, OrderedDict(modules[name]))
        if isinstance(made, dict) and name in parts:
            made = subclasses.put_together(made, parts[name], name)
        return made

    return walk(flat.tree, None)


def gradient_of(tensor: torch.Tensor) -> str:
    """The note on a tensor that takes part in training, or is a Parameter; "" for one that does not."""
    if type(tensor) is torch.nn.Parameter:
        return "Parameter" if tensor.requires_grad else "frozen Parameter"
    return "tensor" if tensor.requires_grad else ""


def _taking_part(tensor: torch.Tensor, note: str | None, path: str) -> torch.Tensor:
    if note is None:
        return tensor
    try:
        return _TAKE_PART[note](tensor)
    except (KeyError, RuntimeError):
        raise CorruptFile(f"{path!r} is noted as {note}, but is a {tensor.dtype}. Use tricomp.load.") from None


def unflatten_leaves(
    leaves: Mapping[str, Leaf],
    notes: Mapping[str, Any],
    device: torch.device | None,
    maker: TieMaker | None = None,
) -> Any:
    """Tensors of some leaves of a tree, by path. Ties among them are kept; inner tensors of a tensor subclass stand by
    themselves, at paths of their own. maker: as make of unflatten."""
    kinds = table(notes, "kinds")
    maker = maker or maker_of(notes)
    made: dict[str, Any] = {}
    for path, array in leaves.items():
        if kinds.get(path) in ("ndarray", "generic"):
            made[path] = to_numpy(array) if isinstance(array, DeviceArray) else array
        else:
            made[path] = maker.tensor(path, array, device)
    return made


def maker_of(notes: Mapping[str, Any], kind: Callable[..., TieMaker] = TieMaker) -> TieMaker:
    """What makes the tensors of leaves. Raises CorruptFile if the notes on ties and strides are damaged."""
    return kind(table(notes, "ties"), table(notes, "strides"))


def plain_leaves(tensor: torch.Tensor, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor that is a leaf, with its path; of a subclass, the leaves that it is made of."""
    if type(tensor) in PLAIN:
        yield path, tensor
        return
    inner, _ = subclasses.take_apart(tensor, path)
    for key, value in inner.items():
        yield from plain_leaves(value, join(path, key))


def _map_tuple(node: tuple[Any, ...], path: str | None, walk: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if hasattr(node, "_fields"):  # a named tuple, whose entries go by name
        return type(node)(*(walk(value, join(path, key)) for key, value in zip(node._fields, node, strict=True)))
    return tuple(walk(value, join(path, i)) for i, value in enumerate(node))


_IS_ENTRY: dict[str, Callable[[Any], bool]] = {
    "ties": lambda entry: isinstance(entry, str),
    "kinds": lambda entry: isinstance(entry, str),
    "gradients": lambda entry: isinstance(entry, str),
    "strides": subclasses.is_sizes,
}


def table(notes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One of the tables of a file's notes, by path; empty where there is none. Raises CorruptFile if it is damaged."""
    table = notes.get(name, {}) if isinstance(notes, Mapping) else None
    is_entry = _IS_ENTRY.get(name, lambda entry: True)
    if not isinstance(table, Mapping) or not all(is_entry(entry) for entry in table.values()):
        raise CorruptFile(f"the file's notes for torch are damaged at {name!r}. Read the file with tricomp.load.")
    return table


def _require_maps(modules: Mapping[str, Any]) -> None:
    for path, versions in modules.items():
        if not isinstance(versions, Mapping) or not all(isinstance(entry, Mapping) for entry in versions.values()):
            raise CorruptFile(f"the file's notes on modules at {path!r} are damaged. Read the file with tricomp.load.")


def _plain(node: Any) -> tuple[str, Any]:
    """Kind and plain node of a value that the core does not keep but torch.save does; kind "" for all else."""
    if isinstance(node, torch.dtype):
        return "dtype", str(node).removeprefix("torch.")
    if isinstance(node, torch.device):
        return "device", str(node)
    if type(node) is complex:
        return "complex", (node.real, node.imag)
    if type(node) is bytearray:
        return "bytearray", bytes(node)
    if type(node) is set and all(type(entry) in (str, int, float, bool, bytes) or entry is None for entry in node):
        # Not in its own order, which is another in each process: equal trees have one content id.
        return "set", sorted(node, key=lambda entry: (type(entry).__name__, repr(entry)))
    return "", None


def _refuse_known(node: Any, name: str) -> None:
    """Refuse by name what torch users pass by mistake, with what to do; the core refuses everything else unknown."""
    kind = type(node).__name__
    if isinstance(node, torch.UntypedStorage | torch.storage.TypedStorage):
        raise UnsupportedNode(f"{name!r}: expected a tensor, got its storage. Store the tensor, or torch.tensor(...).")
    if isinstance(node, torch.Generator):
        raise UnsupportedNode(f"{name!r}: expected plain data, got a Generator. Store its get_state().")
    if callable(getattr(node, "state_dict", None)):
        raise UnsupportedNode(f"{name!r}: expected plain data, got a {kind}. Store its state_dict().")
