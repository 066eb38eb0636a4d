"""What a Lightning checkpoint holds beside tensors and plain values, as plain nodes with notes, and back.

Hyper-parameters hold paths, Namespaces and Lightning's AttributeDicts; callbacks' states hold dicts whose keys are
neither text nor integers. The hard thing: the notes come back from a file and are not to be trusted; each is checked
before it is used, and names no class but those here.
"""

from __future__ import annotations

import pathlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from tricomp.errors import CorruptFile, LimitExceeded, UnsupportedDtype, UnsupportedNode
from tricomp.tree import join
from tricomp_torch.files import with_notes
from tricomp_torch.lightning import library
from tricomp_torch.trees import Flat, flatten, unflatten

_NOTE = "lightning"  # among the adapter's notes
_Namespace = import_module("argparse").Namespace  # as a value that people keep: nothing is parsed here
_ADVICE = {
    "hyper_parameters": "Leave it out with self.save_hyperparameters(ignore=[...]), or give plain values there: "
    "OmegaConf.to_container(config), say.",
    "callbacks": "Let that callback's state_dict() give tensors and plain values.",
}
_ATTRIBUTE_DICTS = {"AttributeDict": "pytorch.utilities.parsing", "fabric.AttributeDict": "fabric.utilities.data"}
# What stands for each kind in the tree, and how it is made again.
_MAKE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "Namespace": (dict, lambda entries: _Namespace(**entries)),
    "Path": (str, pathlib.Path),
    **{
        kind: (dict, lambda entries, where=where: library.part(where).AttributeDict(entries))  # type: ignore[misc]
        for kind, where in _ATTRIBUTE_DICTS.items()
    },
}


@dataclass(frozen=True)
class _Kinds:
    """By path: what was no plain node. pairs: dicts that stand as lists of (key, value), for the sake of their keys."""

    objects: dict[str, str] = field(default_factory=dict)
    pairs: list[str] = field(default_factory=list)


def packed(checkpoint: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The core's tree of a checkpoint, sharing memory with it, and the file's metadata.

    Raises UnsupportedNode, UnsupportedDtype naming the entry; LimitExceeded.
    """
    kinds = _Kinds()
    try:
        flat = flatten(_to_plain(checkpoint, None, kinds))
    except RecursionError:
        raise LimitExceeded("checkpoint: it is nested too deeply, or holds itself. Flatten it first.") from None
    own = {name: value for name, value in vars(kinds).items() if value}
    counts = {key: checkpoint[key] for key in ("epoch", "global_step") if type(checkpoint.get(key)) is int}
    return flat.tree, with_notes(counts, {**flat.notes, _NOTE: own} if own else flat.notes)


def unpacked(tree: Any, notes: Mapping[str, Any], device: torch.device | None) -> Any:
    """The checkpoint that was packed, its tensors on device (None: the CPU). Raises CorruptFile and the like."""
    kinds = _kinds_in(notes.get(_NOTE, {}))
    found = unflatten(Flat(tree, dict(notes)), device)
    return _from_plain(found, None, kinds) if kinds.objects or kinds.pairs else found


def advised(error: UnsupportedNode | UnsupportedDtype, path: str) -> UnsupportedNode | UnsupportedDtype:
    """The error with the file that was to be written, and what to do about an entry of that part of a checkpoint."""
    advice = next((f" {said}" for part, said in _ADVICE.items() if part in str(error)), "")
    return type(error)(f"{path}: was not written, since {error}{advice} What was there before is unchanged.")


def _to_plain(node: Any, path: str | None, kinds: _Kinds) -> Any:
    """The node itself where nothing in it has to change: then what hangs on it, module versions say, is kept."""
    name = path or ""
    if isinstance(node, pathlib.PurePath):
        kinds.objects[name] = "Path"
        return str(node)
    if type(node) is _Namespace:
        kinds.objects[name] = "Namespace"
        node = dict(vars(node))
    elif isinstance(node, dict) and type(node).__name__ == "AttributeDict":
        for kind, where in _ATTRIBUTE_DICTS.items():
            if any(type(node) is module.AttributeDict for module in library.loaded(where)):
                kinds.objects[name], node = kind, dict(node)
                break
    if type(node) is dict and _has_odd_keys(node):
        kinds.pairs.append(name)
        node = list(node.items())
    if type(node) in (dict, OrderedDict):
        entries = {key: _to_plain(value, join(path, key), kinds) for key, value in node.items()}
        if all(entries[key] is value for key, value in node.items()):
            return node
        made = type(node)(entries)
        if type(node) is OrderedDict:
            vars(made).update(vars(node))
        return made
    if type(node) in (list, tuple):
        found = [_to_plain(value, join(path, i), kinds) for i, value in enumerate(node)]
        is_same = all(new is old for new, old in zip(found, node, strict=True))
        return node if is_same else type(node)(found)
    return node


def _has_odd_keys(node: dict[Any, Any]) -> bool:
    """Whether the core would refuse keys of a dict, or give two of them one path."""
    if not all(type(key) is str or (type(key) is int and -(1 << 63) <= key < 1 << 64) for key in node):
        return True
    return len({str(key) for key in node}) < len(node)


def _from_plain(node: Any, path: str | None, kinds: _Kinds) -> Any:
    name = path or ""
    made = node
    if type(node) in (dict, OrderedDict):
        for key, value in node.items():
            node[key] = _from_plain(value, join(path, key), kinds)  # it is the reader's own
    elif type(node) in (list, tuple):
        made = type(node)(_from_plain(value, join(path, i), kinds) for i, value in enumerate(node))
    if name in kinds.pairs:
        try:
            made = dict(made) if type(node) is list else None
        except (TypeError, ValueError):
            made = None
        if made is None:
            raise CorruptFile(f"{name!r} is noted as pairs of keys and values, but is none. Use tricomp_torch.load.")
    if name in kinds.objects:
        plain, make = _MAKE[kinds.objects[name]]
        if not isinstance(made, plain):
            raise CorruptFile(
                f"{name!r} is noted as {kinds.objects[name]}, but is a {type(made).__name__}. Use tricomp_torch.load."
            )
        made = make(made)
    return made


def _kinds_in(notes: Any) -> _Kinds:
    """The notes of a file, which anybody may have written. Raises CorruptFile."""
    objects = notes.get("objects", {}) if isinstance(notes, Mapping) else None
    pairs = notes.get("pairs", []) if isinstance(notes, Mapping) else None
    if not isinstance(objects, Mapping) or not isinstance(pairs, list) or not set(map(type, pairs)) <= {str}:
        raise CorruptFile("the file's notes for Lightning are damaged. Read the file with tricomp_torch.load.")
    if unknown := [kind for kind in objects.values() if not isinstance(kind, str) or kind not in _MAKE]:
        raise CorruptFile(f"the file's notes for Lightning name {unknown[0]!r}, which is not known here.")
    return _Kinds(dict(objects), pairs)
