"""Writer: what the handlers of both versions of Orbax do. Takes a tree's memory, and writes and reads `.tri` files.

The first half, `take`, holds the training loop and ends when the tree may change; the other, `write`, may run in any
thread. The hard thing: Orbax removes steps as it likes. So a step is only coded against another whose file it has in
its own folder, by a hard link that costs nothing, or which KeepParents has promised to keep.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax

from tricomp import checkpoint, codec, storage
from tricomp.content import Content, content_of
from tricomp.errors import CorruptFile, CorruptFrame, MissingFile, MissingParent, OutOfDeviceMemory, TricompError
from tricomp.file import File
from tricomp.host_memory import HostBuffer
from tricomp.report import Report
from tricomp_jax.arrays import key_dtype
from tricomp_jax.files import Opened, load_from, with_notes
from tricomp_jax.hook import await_arrays
from tricomp_jax.modules import put_back, states_of
from tricomp_jax.orbax import places
from tricomp_jax.orbax.options import Options
from tricomp_jax.orbax.places import Place
from tricomp_jax.orbax.policy import KeepParents
from tricomp_jax.snapshot import snapshot
from tricomp_jax.trees import flatten

_log = logging.getLogger("tricomp")


@dataclass(frozen=True)
class Parent:
    """The step that another is coded against. files: see places.names."""

    step: int
    folder: Any
    content_id: str
    since_keyframe: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """A tree to be written: where, its content in memory that nobody else changes, metadata, the step promised to stay.

    buffer: that memory, None if it is the tree's own. is_chosen: whether parent is what to code against; else it is
    looked for when the file is written.
    """

    place: Place
    content: Content
    metadata: dict[str, Any]
    notes: dict[str, Any]
    buffer: HostBuffer | None = None
    parent: Parent | None = None
    is_chosen: bool = False


class Writer:
    """Writes and reads the items of one handler."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._held: dict[str, Taken] = {}  # the last written of each item
        self._buffers: list[HostBuffer] = []  # that nobody uses
        self._can_link = True

    @property
    def is_holding(self) -> bool:
        """Whether what was written is kept in memory, so that it must have been copied."""
        return self.options.reference_in == "host"

    def close(self) -> None:
        """Free what is held."""
        self._held.clear()
        self._buffers.clear()

    def take(self, folder: Any, tree: Any, metadata: Mapping[str, Any] | None, is_copied: bool) -> Taken:
        """What is to be written of a tree. Afterwards its arrays may change, be donated or deleted, if is_copied.

        Raises UnsupportedNode, UnsupportedDtype, InvalidArgument: nothing has been written then.
        """
        plain = with_notes(metadata, {})
        tree = states_of(tree)
        await_arrays(tree)
        flat = flatten(tree)
        if not is_copied:
            return Taken(Place.of(folder), content_of(flat.tree), plain, flat.notes)
        buffer = self._buffers.pop() if self._buffers else HostBuffer()
        try:
            content = content_of(snapshot(flat, buffer).tree)
        except OutOfDeviceMemory as error:
            _log.warning("copied to the host, and compressed there: %s", error)
            content = content_of(flat.tree)
            content = Content(content.structure, codec.copied(content.snapshot, to_host=True))
        return Taken(Place.of(folder), content, plain, flat.notes, buffer)

    def choose(self, taken: Taken) -> Taken:
        """The same with its parent, where a policy is to keep that: it must know before Orbax asks it."""
        keep = self.options.parents
        if not isinstance(keep, KeepParents):
            return taken
        parent = self._parent(taken.place, keep.parents(taken.place))
        if taken.place.step is not None:
            keep.note(taken.place.step, None if parent is None else parent.step)
        return replace(taken, parent=parent, is_chosen=True)

    def write(self, folder: Any, taken: Taken) -> Report:
        """Write what was taken into the item's folder, temporary or not: it is durable when this returns."""
        path = places.path_of(folder)
        parent = taken.parent if taken.is_chosen else self._linked(path, taken.place)
        held = self._held.pop(taken.place.item, None)
        is_parent = held is not None and parent is not None and held.content.content_id == parent.content_id
        report = (
            None if parent is None else self._delta(path, taken, parent, held.content if held and is_parent else None)
        )
        if report is None:
            report = self._put(path, taken, None, None)
        self._reuse(held)
        spec = self.options.spec
        if self.is_holding and not (spec and spec.keep_mantissa_bits):  # which decodes to other words
            self._held[taken.place.item] = taken
        else:
            self._reuse(taken)
        return report

    def _reuse(self, taken: Taken | None) -> None:
        """Nobody needs the content any more: let its memory be that of another."""
        if taken is not None and taken.buffer is not None:
            self._buffers.append(taken.buffer)

    def _delta(self, path: Any, taken: Taken, parent: Parent, held: Content | None) -> Report | None:
        """Write a file against its parent: the words in memory if they are the parent's. None: it cannot be read."""
        try:
            if held is not None:
                return self._put(path, taken, held, parent)
            with places.opened(parent.folder, self.options.threads, self.options.backend) as file:
                return self._put(path, taken, file, parent)
        except (CorruptFile, CorruptFrame, MissingFile, MissingParent) as error:
            _log.warning("%s: stands alone, since step %d cannot be read: %s", taken.place.folder, parent.step, error)
            self._unlink(path, parent)
            return None

    def _put(self, path: Any, taken: Taken, base: File | Content | None, parent: Parent | None) -> Report:
        notes = dict(taken.notes)
        if parent is not None and taken.is_chosen:
            notes[places.NOTE] = {"parent": parent.step, "item": taken.place.item}
        options = self.options
        return checkpoint.put(
            storage.at(os.fspath(path)),
            places.name_of(taken.place.step),
            taken.content,
            base,
            options.spec,
            with_notes(taken.metadata, notes),
            0 if parent is None else parent.since_keyframe + 1,
            codec.Engine(options.threads, options.backend),
        )

    def _parent(self, place: Place, allowed: frozenset[int] | None = None) -> Parent | None:
        """The step to code the next one against; None: it is to be a keyframe."""
        there = places.before(place, allowed)
        if there is None or there.step is None:
            return None
        options = self.options
        try:
            with places.opened(there.folder, options.threads, options.backend) as file:
                found = Parent(
                    there.step, there.folder, file.content_id, file.since_keyframe, places.names(there.folder)
                )
        except TricompError as error:
            _log.warning("%s: stands alone, since step %d cannot be read: %s", place.folder, there.step, error)
            return None
        return found if found.since_keyframe + 1 < options.keyframe.n else None

    def _linked(self, path: Any, place: Place) -> Parent | None:
        """The parent, all of whose files now have a name in the folder too; None: there is none that can be linked."""
        parent = self._parent(place) if self._can_link else None
        if parent is None or len(parent.files) != parent.since_keyframe + 1:  # its own are in other steps' folders
            return None
        if not place.steps().keys() >= set(map(places.number_of, parent.files)):
            return None  # files of removed steps are not kept longer than steps that were saved before need them
        try:
            if storage.is_url(os.fspath(path)):
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            for name in parent.files:
                os.link(parent.folder / name, path / name)
        except FileNotFoundError:  # it is being removed
            self._unlink(path, parent)
            return None
        except OSError as error:
            self._unlink(path, parent)
            self._can_link = False
            _log.warning(
                "%s: has no hard links (%s), so every step stands alone. For deltas there, let the manager keep "
                "parents: see tricomp_jax.orbax.KeepParents.",
                place.root,
                error.strerror,
            )
            return None
        return parent

    def _unlink(self, path: Any, parent: Parent) -> None:
        """Take away the names that a parent's files got, which nothing needs then."""
        if self.options.parents == "linked":
            for name in parent.files:
                with suppress(FileNotFoundError):
                    os.unlink(path / name)

    def restore(self, folder: Any, target: Any, strict: bool) -> Any:
        """A tree in a target's types; None: in plain containers. Raises what tricomp_jax.load raises, naming the step.

        Also MissingFile, MissingParent.
        """
        place = Place.of(folder)
        with places.opened(folder, self.options.threads, self.options.backend) as file:
            try:
                return put_back(target, load_from(file, states_of(target), strict))
            except TricompError as error:
                raise type(error)(f"{place.name} in {place.root}: {error}") from None

    def metadata(self, folder: Any) -> dict[str, Any]:
        """What is in an item's file, by path: a jax.ShapeDtypeStruct of each array, and the plain values."""
        with places.alone(folder) as file:
            entries = Opened(file).entries
        found: dict[str, Any] = {}
        struct: Any = jax.ShapeDtypeStruct
        for path, entry in entries.items():
            dtype = key_dtype(entry.keys) if entry.keys else entry.dtype
            found[path] = struct(entry.shape, dtype) if entry.is_array else entry.value
        return found
