"""Trees to a structure, paths and leaves, and back. Imports numpy, msgpack, bounds, errors, layout.

A structure is msgpack: the tree with every array replaced by a mark. The k-th mark is leaf k, and a leaf's path follows
from the keys above it, so neither number nor path is stored. The hard thing: what comes back must be what went in,
so anything that would come back as something else is refused.
"""

from __future__ import annotations

import keyword
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

from tricomp import bounds
from tricomp.bounds import BIG_INT, LEAF, NAMED_TUPLE, REGISTERED, TUPLE, Limits
from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode
from tricomp.layout import DeviceArray

Tree = Any
Array = np.ndarray[Any, Any]
_MARK = msgpack.ExtType(LEAF, b"")
_MARKS = {code: msgpack.ExtType(code, b"") for code in (TUPLE, NAMED_TUPLE, REGISTERED)}


@dataclass(frozen=True)
class Node:
    """A registered type: flatten(object) gives a tree of plain nodes, unflatten(tree) the object again."""

    type: type
    name: str
    flatten: Callable[[Any], Tree]
    unflatten: Callable[[Tree], Any]


_by_type: dict[type, Node] = {}
_by_name: dict[str, Node] = {}


def register_node(type: type, name: str, flatten: Callable[[Any], Tree], unflatten: Callable[[Tree], Any]) -> None:
    """Let trees hold objects of exactly this type, stored under name. Raises InvalidArgument if either is taken.

    flatten returns a tree (say a dict of the object's fields); the paths of its leaves are those of that tree.
    """
    if type in _by_type or name in _by_name:
        raise InvalidArgument(f"register_node: {type.__name__} or the name {name!r} is registered already.")
    _by_type[type] = _by_name[name] = Node(type, name, flatten, unflatten)


register_node(OrderedDict, "OrderedDict", dict, OrderedDict)


def join(path: str | None, key: str | int) -> str:
    """The path of a child: keys joined by "/", in them "~" as "~0" and "/" as "~1". path None is the tree itself."""
    if type(key) is str and "~" not in key and "/" not in key:  # as nearly all
        name = key
    else:
        name = key.replace("~", "~0").replace("/", "~1") if isinstance(key, str) else str(key)
    return name if path is None else f"{path}/{name}"


def key_of(part: str) -> str:
    """The key that stands as this part of a path: what join made of it, undone."""
    return part.replace("~1", "/").replace("~0", "~")


def flatten(tree: Tree, limits: Limits = bounds.DEFAULTS) -> tuple[bytes, tuple[str, ...], tuple[Any, ...]]:
    """Structure, paths and leaves of a tree, in the tree's own order.

    Leaves are numpy arrays of any dtype and shape, not copied, or DeviceArrays; numpy scalars become 0-d arrays.
    Raises UnsupportedNode naming the path, LimitExceeded when the tree is too deep (or holds itself).
    """
    paths: list[str] = []
    leaves: list[Array | DeviceArray] = []
    structure = msgpack.packb(_to_plain(tree, None, 0, paths, leaves, limits))
    limits.check("max_leaves", len(leaves), "tree")
    limits.check("max_table_bytes", len(structure), "tree")
    return structure, tuple(paths), tuple(leaves)


def unflatten(structure: bytes, leaves: Sequence[Any], limits: Limits = bounds.DEFAULTS, what: str = "tree") -> Tree:
    """The tree again, leaf k put at mark k. Raises CorruptFile, LimitExceeded, UnsupportedNode (unregistered type)."""
    rest = iter(leaves)
    tree = _from_plain(bounds.unpack(structure, what), None, 0, rest, limits, what)
    if next(rest, None) is not None:
        raise CorruptFile(f"{what}: the structure has fewer than {len(leaves)} leaves.")
    return tree


def paths_of(structure: bytes, limits: Limits = bounds.DEFAULTS, what: str = "tree") -> tuple[str, ...]:
    """The leaf paths of a structure; needs no registered type. Raises CorruptFile, LimitExceeded."""
    return tuple(_paths(bounds.unpack(structure, what), None, 0, limits, what))


def values_of(
    structure: bytes, limits: Limits = bounds.DEFAULTS, what: str = "tree", with_empty: bool = False
) -> Iterator[tuple[str, Any]]:
    """Path and value of each plain value beside the leaves of a structure; needs no registered type.

    with_empty: dicts, lists and tuples that hold nothing too. Raises CorruptFile, LimitExceeded.
    """
    for path, value in _values(bounds.unpack(structure, what), None, 0, limits, what):
        if with_empty or not isinstance(value, (dict, list, tuple)):
            yield path, value


def plain(values: Tree, what: str = "metadata", limits: Limits = bounds.DEFAULTS) -> Any:
    """A tree without leaves as a msgpack-able object, for a file's header. Raises UnsupportedNode on an array."""
    paths: list[str] = []
    packed = _to_plain(values, what, 0, paths, [], limits)
    if paths:
        raise UnsupportedNode(f"{paths[0]!r}: an array cannot be stored here. Put it in the tree.")
    return packed


def from_plain(packed: Any, what: str = "metadata", limits: Limits = bounds.DEFAULTS) -> Tree:
    """What went into plain. Raises CorruptFile, LimitExceeded, UnsupportedNode."""
    return _from_plain(packed, None, 0, iter(()), limits, what)


def _refusal(path: str | None, what: str, advice: str) -> UnsupportedNode:
    return UnsupportedNode(f"{'the tree itself' if path is None else f'node {path!r}'}: {what}. {advice}")


def _to_plain(
    node: Tree,
    path: str | None,
    depth: int,
    paths: list[str],
    leaves: list[Array | DeviceArray],
    limits: Limits,
) -> Any:
    if depth > limits.max_depth:  # asked here, since a text for each node takes longer than the rest
        limits.check("max_depth", depth, f"depth of the tree at {path!r}")

    kind = type(node)
    if kind is np.ndarray or kind is DeviceArray:
        paths.append("" if path is None else path)
        leaves.append(node)
        return _MARK

    def child(value: Tree, key: str | int) -> Any:
        return _to_plain(value, join(path, key), depth + 1, paths, leaves, limits)

    if node is None or kind is bool or kind is float or kind is bytes:
        return node
    if kind is int:
        if -(1 << 63) <= node < 1 << 64:
            return node
        return msgpack.ExtType(BIG_INT, node.to_bytes(node.bit_length() // 8 + 1, "little", signed=True))
    if kind is str:
        return _text(node, path)
    if kind is dict:
        return {_key(key, path): child(value, key) for key, value in node.items()}
    if kind is list:
        return [child(value, i) for i, value in enumerate(node)]
    if kind is tuple:
        return [_MARKS[TUPLE], *(child(value, i) for i, value in enumerate(node))]
    if kind is np.memmap or isinstance(node, np.generic):
        paths.append("" if path is None else path)
        leaves.append(np.asarray(node))
        return _MARK
    if kind in _by_type:
        registered = _by_type[kind]
        inner = _to_plain(registered.flatten(node), path, depth + 1, paths, leaves, limits)
        return [_MARKS[REGISTERED], registered.name, inner]
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        fields = list(kind._fields)
        named = [child(value, key) for key, value in zip(fields, node, strict=True)]
        return [_MARKS[NAMED_TUPLE], kind.__name__, fields, *named]
    module = kind.__module__.partition(".")[0]
    if module in ("torch", "jax", "jaxlib"):
        advice = f"Use tricomp_{module.removesuffix('lib')}.save, or turn it into a numpy array."
    else:
        advice = "Convert it to dict, list, tuple, plain values or numpy arrays, or call tricomp.register_node first."
    raise _refusal(path, f"{kind.__module__}.{kind.__qualname__} cannot be stored", advice)


def _text(text: str, path: str | None) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal(path, f"the text {text!r} is not valid Unicode", "Store it as bytes.") from None
    return text


def _key(key: Any, path: str | None) -> str | int:
    if type(key) is str:
        return key if key.isascii() else _text(key, path)
    if type(key) is int and -(1 << 63) <= key < 1 << 64:
        return key
    raise _refusal(path, f"the dict key {key!r} ({type(key).__name__}) cannot be stored", "Use str or 64-bit int keys.")


def _is_key(key: Any) -> bool:
    return type(key) is str or type(key) is int


def _kind(node: list[Any], what: str) -> int:
    """0 for a list, else the code of the mark that opens it, with the form behind the mark checked."""
    if not node or not isinstance(node[0], msgpack.ExtType) or node[0].code not in _MARKS:
        return 0
    code: int = node[0].code
    if code == REGISTERED and not (len(node) == 3 and isinstance(node[1], str)):
        raise CorruptFile(f"{what}: a registered node is not [mark, name, tree].")
    if code == NAMED_TUPLE:
        is_named = len(node) >= 3 and isinstance(node[1], str) and isinstance(node[2], list)
        if not is_named or len(node[2]) != len(node) - 3 or not all(isinstance(name, str) for name in node[2]):
            raise CorruptFile(f"{what}: a named tuple is not [mark, name, fields, values...].")
    return code


def _children(node: Any, path: str | None, what: str) -> Iterator[tuple[str | None, Any]]:
    """Path and value of each child of a structure's node; nothing for a plain value."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not _is_key(key):
                raise CorruptFile(f"{what}: a dict key of type {type(key).__name__} at {path!r}.")
            yield join(path, key), value
    elif isinstance(node, list):
        kind = _kind(node, what)
        if kind == REGISTERED:
            yield path, node[2]
        elif kind == NAMED_TUPLE:
            yield from ((join(path, key), value) for key, value in zip(node[2], node[3:], strict=True))
        else:
            yield from ((join(path, i), value) for i, value in enumerate(node[1:] if kind else node))


def _paths(node: Any, path: str | None, depth: int, limits: Limits, what: str) -> Iterator[str]:
    limits.check("max_depth", depth, f"{what}: depth")
    if isinstance(node, msgpack.ExtType):
        if node.code == LEAF:
            yield "" if path is None else path
    else:
        for child_path, child in _children(node, path, what):
            if isinstance(child, (dict, list, msgpack.ExtType)):
                yield from _paths(child, child_path, depth + 1, limits, what)


def _values(node: Any, path: str | None, depth: int, limits: Limits, what: str) -> Iterator[tuple[str, Any]]:
    limits.check("max_depth", depth, f"{what}: depth")
    is_leaf = isinstance(node, msgpack.ExtType) and node.code == LEAF
    children = list(_children(node, path, what))
    if not children and not is_leaf:
        yield "" if path is None else path, _from_plain(node, path, depth, iter(()), limits, what)
    for child_path, child in children:
        yield from _values(child, child_path, depth + 1, limits, what)


def _from_plain(node: Any, path: str | None, depth: int, leaves: Iterator[Any], limits: Limits, what: str) -> Tree:
    limits.check("max_depth", depth, f"{what}: depth")
    if node is None or isinstance(node, (bool, int, float, str, bytes)):
        return node
    if isinstance(node, msgpack.ExtType):
        return _from_extension(node, path, leaves, what)
    if not isinstance(node, (dict, list)):
        raise CorruptFile(f"{what}: a {type(node).__name__} at {path!r}.")
    children = [_from_plain(value, p, depth + 1, leaves, limits, what) for p, value in _children(node, path, what)]
    if isinstance(node, dict):
        return dict(zip(node, children, strict=True))
    kind = _kind(node, what)
    if kind == TUPLE:
        return tuple(children)
    if kind == NAMED_TUPLE:
        return _named_tuple(node[1], tuple(node[2]), what)(*children)
    if kind == REGISTERED:
        if node[1] not in _by_name:
            advice = "Register it with tricomp.register_node, or read its leaves by path."
            raise _refusal(path, f"the type stored as {node[1]!r} is not registered here", advice)
        return _by_name[node[1]].unflatten(children[0])
    return children


def _from_extension(node: msgpack.ExtType, path: str | None, leaves: Iterator[Any], what: str) -> Any:
    if node.code == LEAF and not node.data:
        for leaf in leaves:
            return leaf
        raise CorruptFile(f"{what}: a leaf at {path!r} that the file does not have.")
    if node.code == BIG_INT:
        return int.from_bytes(node.data, "little", signed=True)
    raise CorruptFile(f"{what}: unknown extension {node.code} at {path!r}.")


@lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...], what: str) -> Any:
    """A named tuple type of that name and fields, the same for every load of this process."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise CorruptFile(f"{what}: {name!r} is no name for a named tuple.")
    try:
        return namedtuple(name, fields)
    except ValueError as error:
        raise CorruptFile(f"{what}: named tuple {name!r}: {error}.") from None
