"""flatten and unflatten: a pytree of JAX arrays to the core's tree of numpy arrays, and back. Imports no file code.

The core's tree keeps dict, list, tuple, named tuple and plain values by themselves. Any other node that jax knows (Flax
dataclasses, FrozenDict, nnx.State, what a user registered) stands in it as a dict or list of its children by their
typed keys: a static field is no child and is not kept. A box that holds one value (nnx.Variable, flax's Partitioned)
stands as that value, so that paths are those that a user would write. The hard thing: notes on what a leaf was come
back from a file and are not to be trusted.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from tricomp.errors import CorruptFile, LimitExceeded, UnsupportedNode
from tricomp.layout import DeviceArray
from tricomp.tree import join
from tricomp_jax import arrays
from tricomp_jax.arrays import Leaf, is_key, key_implementation, narrowed, to_host, to_leaf, widened
from tricomp_jax.parts import Divided

NOTES_KEY = "tricomp_jax"
"""The key in a file's metadata under which the notes stand."""

_PLAIN_NODES = (dict, OrderedDict, list, tuple)


@dataclass(frozen=True)
class Flat:
    """A flattened tree: the tree with numpy arrays for jax's, and the notes that unflatten needs.

    notes: tables by path. "keys": the generator that random keys belong to. "dtypes": of leaves that are stored as
    another. "kinds": "ndarray" and "generic" of what was numpy's, "weak" of weakly typed numbers, "complex" of Python's
    complex numbers.
    """

    tree: Any
    notes: dict[str, Any] = field(default_factory=dict)


def flatten(tree: Any, to_leaf: Callable[[jax.Array, str], Leaf] = to_leaf) -> Flat:
    """The core's tree for a pytree of arrays and plain values.

    Arrays share memory with the result where they can, so it must be used before they are donated. to_leaf: what makes
    the leaf of an array (of random keys: of their data) and its path. Raises UnsupportedNode or UnsupportedDtype,
    naming the path, and LimitExceeded if the tree is too deep (or holds itself); what else the core can judge is left
    to it.
    """
    notes: dict[str, dict[str, str]] = {"keys": {}, "dtypes": {}, "kinds": {}}

    def leaf(value: jax.Array, path: str) -> Leaf:
        if is_key(value):
            arrays.require_data(value, path)
            notes["keys"][path] = key_implementation(value)
            value = jax.random.key_data(value)
        elif (name := arrays.name_of(value.dtype)) in arrays.NARROW:
            notes["dtypes"][path] = name
        elif arrays.is_weak(value):
            notes["kinds"][path] = "weak"
        return to_leaf(value, path)

    def walk(node: Any, path: str | None) -> Any:
        name = path or ""
        if isinstance(node, jax.Array):
            return leaf(node, name)
        if isinstance(node, np.ndarray | np.generic):
            notes["kinds"][name] = "ndarray" if isinstance(node, np.ndarray) else "generic"
            if node.dtype.name in arrays.NARROW:
                notes["dtypes"][name] = node.dtype.name
            return narrowed(np.asarray(node)) if type(node) is np.ndarray or isinstance(node, np.generic) else node
        if type(node) is complex:
            notes["kinds"][name] = "complex"
            return (node.real, node.imag)
        if isinstance(node, DeviceArray):
            return node
        parts = children(node)
        if parts is None:
            _refuse_known(node, name)
            return node
        if is_box(node):
            return walk(parts.values[0], path)
        values = [walk(value, join(path, key)) for key, value in zip(parts.keys, parts.values, strict=True)]
        return parts.plain(values)

    try:
        flat = walk(tree, None)
    except RecursionError:
        raise LimitExceeded("tree: it is nested too deeply, or holds itself. Flatten it first.") from None
    return Flat(flat, {key: value for key, value in notes.items() if value})


@dataclass(frozen=True)
class Children:
    """One level of a node: keys and values of its children, the same node of others, and as a plain node."""

    keys: Sequence[str | int]
    values: Sequence[Any]
    made: Callable[[Sequence[Any]], Any]
    plain: Callable[[Sequence[Any]], Any]


def children(node: Any) -> Children | None:
    """The children of a node, of whatever type jax knows; None for a leaf and for None, which both stand as they are.

    dicts keep the order that they have; of all other nodes it is jax's.
    """
    kind = type(node)
    if node is None:
        return None
    if kind is dict or kind is OrderedDict:
        keys = list(node)

        def mapping(values: Sequence[Any]) -> Any:
            return kind(zip(keys, values, strict=True))

        return Children(keys, list(node.values()), mapping, mapping)
    if kind is list or kind is tuple:
        return Children(range(len(node)), node, kind, kind)
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        return Children(kind._fields, tuple(node), lambda values: kind(*values), lambda values: kind(*values))
    found, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda one: one is not node)
    treedef: Any = structure
    if jax.tree_util.treedef_is_leaf(treedef):
        return None
    entries = [path[0] for path, _ in found]
    values = [value for _, value in found]
    if entries and all(isinstance(entry, SequenceKey | FlattenedIndexKey) for entry in entries):
        return Children(range(len(values)), values, treedef.unflatten, list)
    keys = [_key_of(entry) for entry in entries]
    return Children(keys, values, treedef.unflatten, lambda values: dict(zip(keys, values, strict=True)))


def _key_of(entry: Any) -> Any:
    if isinstance(entry, GetAttrKey):
        return entry.name
    if isinstance(entry, DictKey | FlattenedIndexKey):
        return entry.key
    return entry.idx if isinstance(entry, SequenceKey) else str(entry)


def is_box(node: Any) -> bool:
    """Whether a node only holds one value: a variable of flax.nnx, or a partitioned parameter of flax.linen."""
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    is_one = nnx is not None and isinstance(node, nnx.Variable)
    return is_one or (meta is not None and isinstance(node, meta.AxisMetadata))


def unflatten(flat: Flat, target: Any = None, *, strict: bool = True) -> Any:
    """The pytree that `flatten` was given.

    target: a pytree of the types, shapes and dtypes to come back, of arrays or jax.ShapeDtypeStructs; arrays go to the
    shardings of its arrays. strict: what it lacks, or the tree lacks, is an error; else only what both have is taken.
    None: dicts, lists and tuples of jax arrays on the default device; named tuples and other nodes come back as dicts
    or lists. A leaf of a 64-bit dtype stays numpy's unless jax_enable_x64 is set.

    Raises InvalidArgument listing all that does not fit; CorruptFile if the notes do not fit the tree.
    """
    from tricomp_jax.targets import Held, restore

    if target is not None:
        return restore(target, Held(flat), strict)
    notes = Notes(flat.notes)

    def walk(node: Any, path: str | None) -> Any:
        name = path or ""
        if isinstance(node, np.ndarray | DeviceArray):
            return notes.made(node, name)
        if notes.kinds.get(name) == "complex":
            return notes.complex_of(node, name)
        kind = type(node)
        if isinstance(node, dict):
            return kind((key, walk(value, join(path, key))) for key, value in node.items())
        if isinstance(node, tuple) and hasattr(kind, "_fields"):
            return {key: walk(value, join(path, key)) for key, value in zip(kind._fields, node, strict=True)}
        if isinstance(node, list | tuple):
            return kind(walk(value, join(path, i)) for i, value in enumerate(node))
        return node

    return walk(flat.tree, None)


class Notes:
    """The notes of a file, checked: what each leaf was, by its path."""

    def __init__(self, notes: Mapping[str, Any]) -> None:
        """Raises CorruptFile if they are damaged."""
        self.keys = _table(notes, "keys")
        self.dtypes = _table(notes, "dtypes")
        self.kinds = _table(notes, "kinds")
        for path, name in self.dtypes.items():
            if name not in arrays.NARROW:
                raise CorruptFile(f"leaf {path!r} is noted as {name!r}, which is no dtype. Use tricomp.load.")

    def array(self, leaf: Leaf, path: str) -> Leaf:
        """A leaf in the dtype that it had."""
        if path not in self.dtypes:
            return leaf
        if isinstance(leaf, Divided):
            name = self.dtypes[path]
            return leaf.changed(lambda box: widened(box, name, path), jax.numpy.dtype(name))
        return widened(to_host(leaf), self.dtypes[path], path)

    def made(self, leaf: Leaf, path: str) -> Any:
        """The array of a leaf, where no target says what it is to be. Raises CorruptFile."""
        leaf = self.array(leaf, path)
        if self.kinds.get(path) in ("ndarray", "generic"):
            host: Any = to_host(leaf)
            return host[()] if self.kinds[path] == "generic" and host.shape == () else host
        if path in self.keys:
            return self.wrapped(arrays.to_array(leaf), path)
        if not arrays.holds(leaf.dtype.name):
            return to_host(leaf)
        array = arrays.to_array(leaf)
        return arrays.weakened(array) if self.kinds.get(path) == "weak" and array.shape == () else array

    def wrapped(self, data: jax.Array, path: str) -> jax.Array:
        """The typed random keys of their data. Raises CorruptFile if it is no key data."""
        implementation = self.keys[path]
        inner = arrays.key_shape(implementation)
        if data.dtype != np.uint32 or data.shape[data.ndim - len(inner) :] != inner:
            raise CorruptFile(
                f"leaf {path!r} is noted to hold keys of {implementation}, but is {data.dtype}{list(data.shape)}. "
                "Use tricomp.load."
            )
        keys: jax.Array = jax.random.wrap_key_data(data, impl=implementation)
        return keys

    def complex_of(self, node: Any, path: str) -> complex:
        """A Python complex number of its parts. Raises CorruptFile."""
        if type(node) is not tuple or len(node) != 2 or not all(type(part) is float for part in node):
            raise CorruptFile(f"{path!r} is noted as complex, but is a {type(node).__name__}. Use tricomp.load.")
        return complex(*node)


def _table(notes: Mapping[str, Any], name: str) -> Mapping[str, str]:
    table = notes.get(name, {}) if isinstance(notes, Mapping) else None
    if not isinstance(table, Mapping) or not all(isinstance(entry, str) for entry in table.values()):
        raise CorruptFile(f"the file's notes for jax are damaged at {name!r}. Read the file with tricomp.load.")
    return table


def _refuse_known(node: Any, name: str) -> None:
    """Refuse by name what jax users pass by mistake, with what to do; the core refuses everything else unknown."""
    if isinstance(node, jax.ShapeDtypeStruct):
        raise UnsupportedNode(f"leaf {name!r}: expected an array, got a jax.ShapeDtypeStruct, which has no data.")
    if callable(node):
        kind = getattr(node, "__name__", type(node).__name__)
        raise UnsupportedNode(
            f"node {name!r}: {kind} is a function. Leave it out: make it again in code, and restore into a target."
        )
