"""restore: what was stored, in the types, dtypes and places of a target pytree. Imports jax, numpy and this adapter.

Everything is judged before anything is decoded, from what a file's header says: what is missing, what is unexpected,
and every leaf of another shape or dtype are told together. The hard thing: a number may be Python's in the target and
an array in the file, or the other way round, since a jitted step turns the one into the other.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from tricomp.dtypes import DType
from tricomp.errors import InvalidArgument
from tricomp.layout import DeviceArray
from tricomp.tree import join
from tricomp_jax import arrays
from tricomp_jax.arrays import Leaf, is_key, to_host
from tricomp_jax.parts import Divided
from tricomp_jax.trees import Children, Flat, Notes, children, is_box

_N_SHOWN = 8
_NUMBERS: dict[type, str] = {bool: "b", int: "iu", float: "f", complex: "c"}


@dataclass(frozen=True)
class Entry:
    """What stands at a path: an array of shape and dtype, by name, perhaps the data of random keys; or a plain value.

    keys: the generator that they belong to, "" for other arrays.
    """

    shape: tuple[int, ...] = ()
    dtype: str = ""
    keys: str = ""
    value: Any = None

    @property
    def is_array(self) -> bool:
        return bool(self.dtype)

    def __str__(self) -> str:
        if self.keys:
            return f"random keys of {self.keys}, shape {list(self.shape)}"
        return (
            f"{self.dtype}{list(self.shape)}"
            if self.is_array
            else f"the {type(self.value).__name__} {self.value!r:.40}"
        )


def _told(value: Any) -> str:
    return f"the {type(value).__name__} {reprlib.repr(value)}"


class Source(Protocol):
    """Where a target is restored from."""

    @property
    def notes(self) -> Notes:
        """Of the leaves."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """By path; a None is no entry."""

    def read(self, targets: Mapping[str, Any]) -> dict[str, Leaf]:
        """The arrays at some paths, as they are stored. targets: by path, what they are for; None: numpy's memory."""


class Held:
    """A flattened tree in memory as a Source."""

    def __init__(self, flat: Flat) -> None:
        self.notes = Notes(flat.notes)
        self._leaves: dict[str, Leaf] = {}
        values: dict[str, Any] = {}
        for path, node in _items(flat.tree, None):
            (self._leaves if isinstance(node, np.ndarray | DeviceArray) else values)[path] = node
        self.entries = entries_of(((p, a.shape, a.dtype) for p, a in self._leaves.items()), values.items(), self.notes)

    def read(self, targets: Mapping[str, Any]) -> dict[str, Leaf]:
        """The arrays, shared."""
        return {path: self._leaves[path] for path in targets}


def _items(node: Any, path: str | None) -> Iterator[tuple[str, Any]]:
    if isinstance(node, np.ndarray | DeviceArray):
        yield path or "", node
        return
    parts = children(node)
    if parts is None:
        yield path or "", node
        return
    for key, value in zip(parts.keys, parts.values, strict=True):
        yield from _items(value, join(path, key))


def entries_of(
    leaves: Iterable[tuple[str, tuple[int, ...], DType | np.dtype[Any]]],
    values: Iterable[tuple[str, Any]],
    notes: Notes,
) -> dict[str, Entry]:
    """Entries by path, of leaves (path, shape, dtype as stored) and plain values. Raises CorruptFile."""
    found: dict[str, Entry] = {}
    for path, shape, dtype in leaves:
        keys = notes.keys.get(path, "")
        if keys:
            inner = len(arrays.key_shape(keys))
            found[path] = Entry(shape[: len(shape) - inner], "uint32", keys)
        else:
            found[path] = Entry(shape, notes.dtypes.get(path, dtype.name))
    plain = {path: value for path, value in values if value is not None}
    for path, kind in notes.kinds.items():
        if kind == "complex" and path not in found:
            parts = tuple(plain.pop(join(path or None, i), None) for i in range(2))
            plain[path] = notes.complex_of(parts, path)
    found |= {path: Entry(value=value) for path, value in plain.items()}
    return found


def restore(target: Any, source: Source, strict: bool) -> Any:
    """The target's tree with what the source holds. Raises InvalidArgument listing all that does not fit."""
    wanted = dict(leaves_of(target))
    entries = source.entries
    problems = list(_problems(wanted, entries, strict))
    if problems:
        lines = "\n  ".join(problems)
        advice = "" if not strict else " Pass strict=False to take what fits and keep the rest of the target."
        raise InvalidArgument(
            f"the target does not fit what was saved.\n  {lines}\nRestore into what was saved.{advice}"
        )
    leaves = source.read({path: leaf for path, leaf in wanted.items() if path in entries and entries[path].is_array})

    def made(leaf: Any, path: str) -> Any:
        if path not in entries:
            return leaf
        if path in leaves:
            return _of_array(leaf, source.notes.array(leaves.pop(path), path), path, source.notes)
        return _of_value(leaf, entries[path].value)

    return _mapped(target, None, made)


def leaves_of(node: Any, path: str | None = None) -> Iterator[tuple[str, Any]]:
    """Path and leaf of each leaf of a pytree; a box stands as what it holds."""
    parts = _parts(node)
    if parts is None:
        if node is not None:
            yield path or "", node
        return
    for key, value in zip(parts.keys, parts.values, strict=True):
        yield from leaves_of(value, path if is_box(node) else join(path, key))


def _parts(node: Any) -> Children | None:
    return None if isinstance(node, jax.Array | np.ndarray | np.generic) else children(node)


def _mapped(node: Any, path: str | None, made: Callable[[Any, str], Any]) -> Any:
    parts = _parts(node)
    if parts is None:
        return None if node is None else made(node, path or "")
    return parts.made(
        [
            _mapped(value, path if is_box(node) else join(path, key), made)
            for key, value in zip(parts.keys, parts.values, strict=True)
        ]
    )


def _problems(wanted: Mapping[str, Any], entries: Mapping[str, Entry], strict: bool) -> Iterator[str]:
    missing = [path for path in wanted if path not in entries]
    unexpected = [path for path in entries if path not in wanted]
    if strict and missing:
        yield f"missing from the checkpoint: {shown(missing)}"
    if strict and unexpected:
        yield f"in the checkpoint but not in the target: {shown(unexpected)}"
    empty = [path for path in missing if isinstance(wanted[path], jax.ShapeDtypeStruct)]
    if not strict and empty:
        yield f"missing from the checkpoint, and without a value in the target: {shown(empty)}"
    for path, leaf in wanted.items():
        if path in entries:
            misfit = _misfit(leaf, entries[path], strict)
            if misfit:
                yield f"{path!r}: the checkpoint holds {entries[path]}, {misfit}"


def shown(paths: Sequence[str]) -> str:
    """Paths in a sentence, the first of many."""
    listed = ", ".join(map(repr, paths[:_N_SHOWN]))
    return listed if len(paths) <= _N_SHOWN else f"{listed} and {len(paths) - _N_SHOWN} more"


def _misfit(leaf: Any, entry: Entry, strict: bool) -> str:
    """What the target has instead, if the entry does not fit it; else ""."""
    kind = type(leaf)
    if kind in _NUMBERS:
        is_alike = type(entry.value) is kind
        if entry.is_array:
            is_alike = entry.shape == () and not entry.keys and _kind_of(entry.dtype) in _NUMBERS[kind]
        return "" if is_alike else f"the target {_told(leaf)}"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        is_alike = kind in (str, bytes) and type(entry.value) is kind
        return "" if is_alike else f"the target a {kind.__name__}"
    here = f"the target {leaf.dtype}{list(leaf.shape)}"
    if not entry.is_array:
        return "" if leaf.shape == () and not is_key(leaf) and _is_exact(entry.value, leaf.dtype) else here
    if tuple(leaf.shape) != entry.shape or is_key(leaf) != bool(entry.keys):
        return here
    if entry.keys:
        return "" if arrays.key_dtype(entry.keys) == leaf.dtype else here
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not arrays.holds(leaf.dtype.name):
        return f"{here}, which jax only has when jax_enable_x64 is set"
    return here if strict and leaf.dtype.name != entry.dtype else ""


def _kind_of(name: str) -> str:
    """numpy's letter for a kind of dtype, also for those of ml_dtypes."""
    dtype = jax.numpy.dtype(name)
    return next(letter for letter, kind in _KINDS.items() if jax.numpy.issubdtype(dtype, kind))


_KINDS = {"b": np.bool_, "i": np.signedinteger, "u": np.unsignedinteger, "f": np.floating, "c": np.complexfloating}


def _is_exact(value: Any, dtype: Any) -> bool:
    """Whether a Python number is one of a dtype: of its kind, and none is lost."""
    if type(value) not in _NUMBERS or _kind_of(dtype.name) not in _NUMBERS[type(value)]:
        return False
    try:
        there = np.asarray(value, dtype).item()
    except (OverflowError, ValueError):
        return False
    return bool(there == value or (there != there and value != value))


def _of_value(leaf: Any, value: Any) -> Any:
    """A plain value, as an array where the target has one."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _placed(np.asarray(value, leaf.dtype), leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(value, leaf.dtype) if isinstance(leaf, np.ndarray) else leaf.dtype.type(value)
    return value


def _of_array(leaf: Any, stored: Leaf, path: str, notes: Notes) -> Any:
    """A stored array as what the target has there."""
    kind = type(leaf)
    if kind in _NUMBERS:
        return kind(to_host(stored)[()].item())
    if is_key(leaf):
        where, there = sharding_of(leaf), data_sharding_of(leaf)
        keys = notes.wrapped(arrays.to_array(stored, there), path)
        return keys if where is None or keys.sharding == where else jax.device_put(keys, where)
    if leaf.dtype.name != stored.dtype.name:  # not strict
        is_divided, dtype = isinstance(stored, Divided), leaf.dtype
        stored = stored.changed(lambda box: box.astype(dtype), dtype) if is_divided else to_host(stored).astype(dtype)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _placed(stored, leaf)
    host = to_host(stored)
    return host if isinstance(leaf, np.ndarray) else host[()]


def _placed(stored: Leaf, leaf: Any) -> jax.Array:
    """The array of a leaf where the target has its own, as weakly typed as that is."""
    where = sharding_of(leaf)
    array = arrays.to_array(stored, where)
    return arrays.weakened(array, where) if arrays.is_weak(leaf) else array


def sharding_of(leaf: Any) -> Any:
    """Where an array of a target is to be: None where jax may choose, as it did for the target."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed or len(leaf.devices()) > 1 else None
    return leaf.sharding


def data_sharding_of(leaf: Any) -> Any:
    """Where what is stored of an array of a target is to be: the same place, of keys that of their data."""
    where = sharding_of(leaf)
    if where is None or not is_key(leaf):
        return where
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf).sharding
    return where if isinstance(where, NamedSharding | SingleDeviceSharding) else None
