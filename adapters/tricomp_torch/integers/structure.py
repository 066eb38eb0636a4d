"""What goes into a model and comes out of it, as plain values: nests of tuples, lists and dicts around leaves.

Imports torch and errors. The hard thing: outputs of user classes (dataclasses, named tuples) cannot be made from a file
that holds no code: they come back as a dict of their fields, or a tuple.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.utils._pytree as pytree

from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode

LEAF = "*"
_DEPTH = 32


def describe(spec: pytree.TreeSpec, where: str) -> Any:
    """The nest of a TreeSpec as plain values: "*" for a leaf, ["tuple"|"list", [...]] or ["dict", [[key, ...], ...]].

    Raises UnsupportedNode for containers whose parts have no names and no order.
    """
    if spec.is_leaf():
        return LEAF
    inside = [describe(child, where) for child in spec.children()]
    names = spec.context[1] if _is_defaultdict(spec) else spec.context
    if spec.type is list:
        return ["list", inside]
    if isinstance(spec.type, type) and issubclass(spec.type, tuple):
        return ["tuple", inside]
    if isinstance(names, list | tuple) and len(names) == len(inside) and all(_is_key(name) for name in names):
        return ["dict", [[name, child] for name, child in zip(names, inside)]]
    raise UnsupportedNode(
        f"{where}: a {getattr(spec.type, '__name__', spec.type)} cannot be described in a file. Take or return "
        "tensors, tuples, lists or dicts, or save without the graph."
    )


def _is_defaultdict(spec: pytree.TreeSpec) -> bool:
    return isinstance(spec.context, list | tuple) and len(spec.context) == 2 and isinstance(spec.context[1], list)


def _is_key(name: Any) -> bool:
    return isinstance(name, str | int) and not isinstance(name, bool)


def require(structure: Any, where: str, depth: int = 0) -> Any:
    """The structure itself, if describe could have made it. Raises CorruptFile."""
    if structure == LEAF and isinstance(structure, str):
        return structure
    is_pair = isinstance(structure, list) and len(structure) == 2 and isinstance(structure[1], list)
    if not is_pair or structure[0] not in ("tuple", "list", "dict") or depth > _DEPTH:
        raise CorruptFile(
            f"{where}: {str(structure)[:80]!r} describes no nest of tensors. The file is damaged; save it again."
        )
    for child in structure[1]:
        if structure[0] == "dict":
            if not (isinstance(child, list) and len(child) == 2 and _is_key(child[0])):
                raise CorruptFile(
                    f"{where}: {str(child)[:80]!r} is no entry of a dict. The file is damaged; save it again."
                )
            child = child[1]
        require(child, where, depth + 1)
    return structure


def leaves_of(value: Any, structure: Any, where: str) -> Iterator[Any]:
    """The leaves of a value of this structure, in order. Raises InvalidArgument where the value is of another form."""
    if structure == LEAF:
        yield value
        return
    kind, inside = structure
    if kind == "dict":
        if not isinstance(value, Mapping) or set(value) != {key for key, _ in inside}:
            came = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise InvalidArgument(f"{where}: expected a dict of {[key for key, _ in inside]}, got {came}.")
        for key, child in inside:
            yield from leaves_of(value[key], child, f"{where}[{key!r}]")
        return
    if not isinstance(value, tuple | list) or len(value) != len(inside):
        size = str(len(value)) if isinstance(value, tuple | list) else type(value).__name__
        raise InvalidArgument(f"{where}: expected a {kind} of {len(inside)}, got {size}.")
    for i, (part, child) in enumerate(zip(value, inside)):
        yield from leaves_of(part, child, f"{where}[{i}]")


def rebuilt(leaves: Iterator[Any], structure: Any) -> Any:
    """The nest around its leaves. The inverse of leaves_of."""
    if structure == LEAF:
        return next(leaves)
    kind, inside = structure
    if kind == "dict":
        return {key: rebuilt(leaves, child) for key, child in inside}
    parts = [rebuilt(leaves, child) for child in inside]
    return tuple(parts) if kind == "tuple" else parts


def n_leaves(structure: Any) -> int:
    """How many leaves a structure has."""
    if structure == LEAF:
        return 1
    kind, inside = structure
    return sum(n_leaves(child[1] if kind == "dict" else child) for child in inside)
