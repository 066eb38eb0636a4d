"""flatten and unflatten: a tree of torch tensors to the core's tree of numpy arrays, and back. Imports no file code.

The core's tree keeps dict, list, tuple, named tuple, OrderedDict and plain values. What a torch checkpoint holds beyond
that (which entries are tied, module versions, Counters, which arrays were numpy's) goes into *notes*, a small plain
map kept in the file's metadata. So the tree itself stays readable by everybody, and a file without notes loads too.
The hard thing: notes come back from a file and are not to be trusted; each is checked before it is used.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tricomp.errors import CorruptFile, UnsupportedNode
from tricomp.tree import join
from tricomp_torch.tensors import Array, to_array
from tricomp_torch.ties import TieFinder, TieMaker

NOTES_KEY = "tricomp_torch"
"""The key in a file's metadata under which the notes stand."""

# Node kinds noted by path, and how each is made again from the plain node that stands for it in the tree.
_MAKE_NODE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "Counter": (dict, Counter),
    "Size": (tuple, torch.Size),
}
_ORDERED_DICT_META = "_metadata"  # torch's name for the module versions that a state_dict carries


@dataclass(frozen=True)
class Flat:
    """A flattened tree: the tree with numpy arrays for tensors, and the notes that unflatten needs."""

    tree: Any
    notes: dict[str, Any] = field(default_factory=dict)


def flatten(tree: Any) -> Flat:
    """The core's tree for a tree of tensors and plain values.

    CPU tensors share memory with the result, so it must be used before they change; other devices are copied to the
    host. Raises UnsupportedNode or UnsupportedDtype, naming the path; what the core can judge is left to it.
    """
    ties = TieFinder()
    kinds: dict[str, str] = {}
    modules: dict[str, Any] = {}

    def walk(node: Any, path: str | None) -> Any:
        name = path or ""
        if isinstance(node, torch.Tensor):
            array = to_array(node, name)
            ties.add(name, node)
            return array
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
        _refuse_known(node, name)
        return node

    flat = walk(tree, None)
    notes = {"ties": ties.ties, "kinds": kinds, "modules": modules}
    return Flat(flat, {key: value for key, value in notes.items() if value})


def unflatten(flat: Flat, device: torch.device | None = None) -> Any:
    """The tree of tensors that `flatten` was given, on device (None: the CPU), sharing no memory with the arrays.

    Raises CorruptFile if the notes do not fit the tree, UnsupportedDtype if torch lacks a leaf's dtype.
    """
    kinds, modules = _table(flat.notes, "kinds"), _table(flat.notes, "modules")
    maker = TieMaker(_table(flat.notes, "ties"))
    _require_maps(modules)

    def walk(node: Any, path: str | None) -> Any:
        name = path or ""
        kind = kinds.get(name)
        if isinstance(node, np.ndarray):
            if kind == "ndarray":
                return node
            if kind == "generic" and node.shape == ():
                return node[()]
            return maker.tensor(name, node, device)
        made: Any = node
        if isinstance(node, dict):
            made = type(node)((key, walk(value, join(path, key))) for key, value in node.items())
        elif isinstance(node, tuple):
            made = _map_tuple(node, path, walk)
        elif isinstance(node, list):
            made = [walk(value, join(path, i)) for i, value in enumerate(node)]
        if kind in _MAKE_NODE:
            plain, make = _MAKE_NODE[kind]
            if type(node) is not plain:
                raise CorruptFile(f"{name!r} is noted as {kind}, but is a {type(node).__name__}. Use tricomp.load.")
            made = make(made)
        if isinstance(made, OrderedDict) and name in modules:
            setattr(made, _ORDERED_DICT_META, OrderedDict(modules[name]))
        return made

    return walk(flat.tree, None)


def unflatten_leaves(leaves: Mapping[str, Array], notes: Mapping[str, Any], device: torch.device | None) -> Any:
    """Tensors of some leaves of a tree, by path. Ties among them are kept."""
    kinds = _table(notes, "kinds")
    maker = TieMaker(_table(notes, "ties"))
    made: dict[str, Any] = {}
    for path, array in leaves.items():
        is_numpy = kinds.get(path) in ("ndarray", "generic")
        made[path] = array if is_numpy else maker.tensor(path, array, device)
    return made


def _map_tuple(node: tuple[Any, ...], path: str | None, walk: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if hasattr(node, "_fields"):  # a named tuple, whose entries go by name
        return type(node)(*(walk(value, join(path, key)) for key, value in zip(node._fields, node, strict=True)))
    return tuple(walk(value, join(path, i)) for i, value in enumerate(node))


def _table(notes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = notes.get(name, {}) if isinstance(notes, Mapping) else None
    if not isinstance(table, Mapping) or (name != "modules" and not all(isinstance(v, str) for v in table.values())):
        raise CorruptFile(f"the file's notes for torch are damaged at {name!r}. Read the file with tricomp.load.")
    return table


def _require_maps(modules: Mapping[str, Any]) -> None:
    for path, versions in modules.items():
        if not isinstance(versions, Mapping) or not all(isinstance(entry, Mapping) for entry in versions.values()):
            raise CorruptFile(f"the file's notes on modules at {path!r} are damaged. Read the file with tricomp.load.")


def _refuse_known(node: Any, name: str) -> None:
    """Refuse by name what torch users pass by mistake, with what to do; the core refuses everything else unknown."""
    kind = type(node).__name__
    if isinstance(node, torch.dtype | torch.device):
        raise UnsupportedNode(f"{name!r}: a {node!r} is not data. Store its name, str(...).")
    if isinstance(node, torch.Generator):
        raise UnsupportedNode(f"{name!r}: expected plain data, got a Generator. Store its get_state().")
    if callable(getattr(node, "state_dict", None)):
        raise UnsupportedNode(f"{name!r}: expected plain data, got a {kind}. Store its state_dict().")
