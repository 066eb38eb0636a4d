"""CompressedStateDict: a state dict held compressed in memory, as a `.tri` file that was never written and its deltas.

The hard thing: what is read while an update runs, or after it was broken off, must be one state. So a state, once made,
never changes (`_State`); an update makes the next one beside it, and one assignment puts it in its place.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tricomp
from tricomp import checkpoint, folder, tree
from tricomp.codec import Engine
from tricomp.content import content_of
from tricomp.errors import CorruptFile, InvalidArgument, MissingLeaf
from tricomp.file import File
from tricomp.memory import HeldFile, Memory
from tricomp.storage import Source
from tricomp.tensors import arrays_of, entries_of
from tricomp_torch.files import notes_of, with_notes
from tricomp_torch.tensors import Array, device_of, to_array
from tricomp_torch.ties import TieMaker, is_same
from tricomp_torch.trees import Flat, flatten, maker_of, unflatten

Key = str | int
Path = str | os.PathLike[str]
_PIECE_BYTES = 1 << 24
_NAME = "compressed state dict"


class CompressedStateDict(Mapping[Key, Any]):
    """A read-only mapping from names to tensors, each decoded when asked for; `update` takes over new values.

    state_dict: of a module, an optimizer, or any dict that `tricomp_torch.save` takes; on any device. Nothing of it is
    kept but compressed bytes. spec: how to encode. keyframe: one state in so many is coded to stand alone, the others
    as deltas of the one before; with 1 it takes the least memory, and an update codes no difference. threads: to work
    with, see tricomp.open.

    Each access gives a new tensor on the CPU. Tied entries are tied: while a tensor got of one of them lives,
    unchanged, the first access to another gives a tensor of the same storage. `load_state_dict` takes it as it is.

    Reading is safe from any number of threads and in forked or spawned workers (pickling it copies the compressed bytes
    and nothing else). Updates wait for one another. What is read during an update is of the old state or the new;
    `to_dict` is wholly of one.

    >>> ema = tricomp_torch.CompressedStateDict(model.state_dict())  # doctest: +SKIP
    >>> ema.update(averaged)  # a delta of what is held  # doctest: +SKIP
    >>> model.load_state_dict(ema)  # doctest: +SKIP
    """

    def __init__(
        self,
        state_dict: Mapping[Any, Any],
        spec: tricomp.Spec | None = None,
        keyframe: int = 10,
        threads: int | None = None,
    ) -> None:
        """Raises InvalidArgument, and UnsupportedNode and UnsupportedDtype, naming the entry."""
        _require_keyframe(keyframe)
        self._spec, self._keyframe, self._engine = spec, keyframe, Engine(threads)
        self._updating = threading.Lock()
        self._state = _coded(_as_dict(state_dict), None, spec, self._engine)

    def __getitem__(self, name: Key) -> Any:
        return self._state.value(name)

    def __contains__(self, name: object) -> bool:
        return name in self._state.entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._state.entries)

    def __len__(self) -> int:
        return len(self._state.entries)

    __eq__ = object.__eq__  # equals itself only: a Mapping would compare tensors
    __hash__ = object.__hash__

    @property
    def _metadata(self) -> OrderedDict[str, dict[str, Any]] | None:
        """The versions of modules, where torch looks for them; a copy, for torch writes into it."""
        return self._state.versions() or None

    @property
    def nbytes(self) -> int:
        """Bytes held: of the keyframe and the deltas. After load, the bytes of the file count among them."""
        return sum(source.n_bytes for source in self._state.sources)

    @property
    def raw_nbytes(self) -> int:
        """Bytes of the tensors and arrays when decoded, tied ones once."""
        return self._state.raw_nbytes

    @property
    def ratio(self) -> float:
        """raw_nbytes over nbytes."""
        return self.raw_nbytes / self.nbytes

    def update(self, state_dict: Mapping[Any, Any]) -> None:
        """Replace the entries that state_dict names, and add those that are new, in its order.

        The state is coded as a delta of what is held, or to stand alone when `keyframe` says so or the deltas would
        take more memory than that. If this raises, or is interrupted, nothing has changed. Entries that are not named
        are decoded meanwhile. Raises what the constructor raises.
        """
        given = _as_dict(state_dict)
        with self._updating:
            state = self._state
            if not given:
                return
            kept = state.values([name for name in state.entries if name not in given])
            merged = OrderedDict((name, given[name] if name in given else kept[name]) for name in state.entries)
            merged.update((name, value) for name, value in given.items() if name not in merged)
            versions = {**state.versions(), **getattr(given, "_metadata", {})}
            self._state = self._next(_with_versions(merged, versions), state)

    def to_dict(self, device: str | torch.device | None = None) -> OrderedDict[Key, Any]:
        """The whole state dict, on device (None: the CPU): ties, strides and module versions included."""
        state = self._state
        return _with_versions(state.values(list(state.entries), device_of(device)), state.versions())

    def save(self, path: Path) -> None:
        """Write it to one `.tri` file that stands alone, atomically; `load`, tricomp_torch.load and all else read it.

        If deltas are held, the state is coded to stand alone first, and held like that from then on.
        Raises InvalidArgument, StorageError.
        """
        where, name = folder.split(path)
        with self._updating:
            if len(self._state.sources) > 1:
                self._state = _coded(self.to_dict(), None, self._spec, self._engine)
            (source,) = self._state.sources
        starts = range(0, source.n_bytes, _PIECE_BYTES)
        where.put(name, (source.read(at, min(_PIECE_BYTES, source.n_bytes - at)) for at in starts))

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        reference: Path | None = None,
        spec: tricomp.Spec | None = None,
        keyframe: int = 10,
        threads: int | None = None,
    ) -> CompressedStateDict:
        """Open a `.tri` file whose tree is a dict; nothing is decoded, and the file's bytes stay on the disk.

        The file must not be changed in place meanwhile. reference: the file it was saved against, if any.
        spec, keyframe: for updates, which go to memory. threads: see tricomp.open. Raises InvalidArgument, and what
        tricomp.open raises.
        """
        _require_keyframe(keyframe)
        engine = Engine(threads)
        paths = [path] if reference is None else [reference, path]
        sources = tuple(folder.LocalFile(os.fspath(path)) for path in paths)
        return cls._of(_State(sources, engine), spec, keyframe)

    @classmethod
    def _of(cls, state: _State, spec: tricomp.Spec | None, keyframe: int) -> CompressedStateDict:
        made = cls.__new__(cls)
        made._spec, made._keyframe, made._updating, made._state = spec, keyframe, threading.Lock(), state
        made._engine = state.engine
        return made

    def _next(self, merged: OrderedDict[Key, Any], state: _State) -> _State:
        """The state that follows, coded the way that the policy says."""
        first, *deltas = (source.n_bytes for source in state.sources)
        expected = sum(deltas) + (deltas[-1] if deltas else 0)
        if len(state.sources) < self._keyframe and expected <= first:
            following = _coded(merged, state, self._spec, self._engine)
            if sum(source.n_bytes for source in following.sources[1:]) <= first:
                return following
        return _coded(merged, None, self._spec, self._engine)

    def __reduce__(self) -> tuple[Callable[..., CompressedStateDict], tuple[Any, ...]]:
        sources = tuple(bytes(source.read(0, source.n_bytes)) for source in self._state.sources)
        return _from_bytes, (sources, self._spec, self._keyframe, self._engine.threads)

    def __copy__(self) -> CompressedStateDict:
        return self._of(self._state, self._spec, self._keyframe)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedStateDict:
        return self.__copy__()  # a state never changes

    def __repr__(self) -> str:
        n_deltas = len(self._state.sources) - 1
        return (
            f"<{type(self).__name__}: {len(self)} entries, {self.raw_nbytes:,} -> {self.nbytes:,} bytes "
            f"(ratio {self.ratio:.3f}), keyframe + {n_deltas} deltas>"
        )


class _State:
    """One state: files in memory or mapped, the keyframe first, each coded against the one before. Never changes.

    A File is for one thread, so each thread opens its own over the same bytes; that is also why there is no lock that a
    forked worker could find taken.
    """

    def __init__(self, sources: tuple[Source, ...], engine: Engine) -> None:
        """Raises what File raises; InvalidArgument if the tree is no dict, CorruptFile if the notes are damaged."""
        self.sources, self.engine = sources, engine
        self._local = threading.local()
        file = self._chain()
        self.entries = entries_of(file)
        notes = notes_of(file.metadata)
        maker_of(notes)  # judges the notes on ties and strides
        self._ties: Mapping[str, str] = notes.get("ties", {})
        self._strides: Mapping[str, Sequence[int]] = notes.get("strides", {})
        self._notes = _by_entry(notes, file.name)
        self._versions = self._notes.get("", {}).get("modules", {}).get("", {})
        if not isinstance(self._versions, Mapping) or not all(map(_is_mapping, self._versions.values())):
            raise CorruptFile(f"{file.name}: its notes on modules are damaged. Read it with tricomp.load.")
        self.raw_nbytes = sum(file.leaf(path).n_bytes for path in file if path not in self._ties)
        self._local.opened = file, _Living(self._ties, self._strides)

    def file(self) -> File:
        """This thread's File of the state."""
        return self._opened()[0]

    def versions(self) -> OrderedDict[str, dict[str, Any]]:
        """Module versions, as `state_dict` gives them; a copy."""
        return OrderedDict((name, dict(version)) for name, version in self._versions.items())

    def value(self, name: Key) -> Any:
        """The value of an entry. Raises MissingLeaf, CorruptFrame."""
        if name not in self.entries:
            raise MissingLeaf(f"no entry {name!r} among the {len(self.entries)} entries. See keys().")
        file, living = self._opened()
        paths = self.entries[name].paths
        arrays = file.load(paths) if len(paths) > 1 else {path: file[path] for path in paths}
        return self._value(name, [arrays[path] for path in paths], living, None)

    def values(self, names: Sequence[Key], device: torch.device | None = None) -> OrderedDict[Key, Any]:
        """The values of some entries, tied among one another and to nothing else."""
        living = _Living(self._ties, self._strides)
        arrays = arrays_of(self.file(), [path for name in names for path in self.entries[name].paths])
        found: OrderedDict[Key, Any] = OrderedDict()
        for name in names:
            found[name] = self._value(name, [next(arrays)[1] for _ in self.entries[name].paths], living, device)
        return found

    def _value(self, name: Key, arrays: list[Array], living: _Living, device: torch.device | None) -> Any:
        path = tree.join(None, name)
        notes = self._notes.get(path, {})
        plain = tree.unflatten(self.entries[name].structure, arrays, what=f"entry {name!r}")
        return unflatten(Flat({name: plain}, notes), device, living.tensor)[name]

    def _opened(self) -> tuple[File, _Living]:
        if not hasattr(self._local, "opened"):
            self._local.opened = self._chain(), _Living(self._ties, self._strides)
        opened: tuple[File, _Living] = self._local.opened
        return opened

    def _chain(self) -> File:
        file: File | None = None
        for source in self.sources:
            file = File(source, file, threads=self.engine.threads, backend=self.engine.backend)
        assert file is not None
        return file


@dataclass(frozen=True)
class _Given:
    """A tensor that was given out: its storage, if that lives, its shape and strides, and the paths it serves."""

    storage: weakref.ref[torch.UntypedStorage]
    shape: torch.Size
    strides: tuple[int, ...]
    paths: set[str]


class _Living(TieMaker):
    """Makes tensors, and knows those it made to which others are tied for as long as they live; for one thread."""

    def __init__(self, ties: Mapping[str, str], strides: Mapping[str, Sequence[int]]) -> None:
        self._first, self._tied, self._noted = ties, {*ties, *ties.values()}, strides
        self._given: dict[str, _Given] = {}

    def tensor(self, path: str, array: Array, device: torch.device | None) -> torch.Tensor:
        """A new tensor; for a tied path, a view of the one that was given out, if that lives and is unchanged."""
        made = self._shared(path, array)
        if made is None:
            made = TieMaker({}, self._noted).tensor(path, array, device)
            if path in self._tied:
                storage = weakref.ref(made.untyped_storage())
                self._given[self._first.get(path, path)] = _Given(storage, made.shape, made.stride(), {path})
        return made

    def _shared(self, path: str, array: Array) -> torch.Tensor | None:
        """The view, for a path that has none of that tensor yet: a second access to an entry gives a new tensor."""
        given = self._given.get(self._first.get(path, path))
        storage = None if given is None else given.storage()
        if given is None or storage is None or path in given.paths or storage.nbytes() != array.nbytes:
            return None
        dtype = getattr(torch, array.dtype.name)
        view = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, given.shape, given.strides)
        if not view.is_meta and not is_same(to_array(view, path), array):
            return None  # trained on since, or two leaves that differ though a file calls them tied
        given.paths.add(path)
        return view


def _coded(tensors: OrderedDict[Key, Any], base: _State | None, spec: tricomp.Spec | None, engine: Engine) -> _State:
    """The state of these tensors, coded against base or to stand alone."""
    flat = flatten(tensors)
    memory = Memory()
    older = () if base is None else base.sources
    reference = None if base is None else base.file()
    notes = with_notes(None, flat.notes)
    checkpoint.put(memory, _NAME, content_of(flat.tree), reference, spec, notes, len(older), engine)
    return _State((*older, memory.get(_NAME)), engine)


def _as_dict(state_dict: Any) -> OrderedDict[Key, Any]:
    """A state dict as an OrderedDict of the same values, module versions included."""
    if isinstance(state_dict, CompressedStateDict):
        return state_dict.to_dict()
    if not isinstance(state_dict, Mapping):
        advice = " Pass its state_dict()." if callable(getattr(state_dict, "state_dict", None)) else ""
        raise InvalidArgument(f"expected a state dict, got a {type(state_dict).__name__}.{advice}")
    versions = getattr(state_dict, "_metadata", None)
    return _with_versions(OrderedDict(state_dict), versions if isinstance(versions, Mapping) else {})


def _with_versions(tensors: OrderedDict[Key, Any], versions: Mapping[str, Any]) -> OrderedDict[Key, Any]:
    if versions:
        tensors._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return tensors


def _by_entry(notes: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """The notes on each entry by its path, so that rebuilding one looks at no others; but for makers'."""
    found: dict[str, dict[str, Any]] = {}
    for table_name in ("kinds", "modules", "subclasses"):
        table = notes.get(table_name, {})
        if not isinstance(table, Mapping) or not all(isinstance(path, str) for path in table):
            raise CorruptFile(f"{what}: its notes for torch are damaged at {table_name!r}. Read it with tricomp.load.")
        for path, note in table.items():
            found.setdefault(path.partition("/")[0], {}).setdefault(table_name, {})[path] = note
    return found


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _require_keyframe(keyframe: Any) -> None:
    if type(keyframe) is not int or keyframe < 1:
        raise InvalidArgument(f"keyframe: expected a number of states, 1 or more, got {keyframe!r}.")


def _from_bytes(
    sources: tuple[bytes, ...], spec: tricomp.Spec | None, keyframe: int, threads: int | None = None
) -> CompressedStateDict:
    """What __reduce__ took apart."""
    held = tuple(HeldFile(data, _NAME) for data in sources)
    return CompressedStateDict._of(_State(held, Engine(threads)), spec, keyframe)
