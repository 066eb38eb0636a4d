"""Joined: one step that several processes wrote, each its own parts, as one Source. Knows Stores; writes nothing.

Headers alone tell what there is: the files' chains are opened, and leaves decoded, for parts that somebody here asked
for, each once. Of a part of which only some rows are asked for, only the chunks of these are decoded. The hard thing:
what a set of files says of its arrays need not fit together, so it is checked before anything is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

import tricomp
from tricomp import tree
from tricomp.errors import CorruptFile, TricompError
from tricomp_jax.arrays import Leaf
from tricomp_jax.files import notes_of, read_for
from tricomp_jax.parts import Box, Divided, box_at, box_of, is_grid, shared, whole_box
from tricomp_jax.targets import data_sharding_of, entries_of
from tricomp_jax.trees import Flat, Notes, children

SHARDS = "shards"
"""The table in a file's notes of the arrays that stand in parts: their shapes, by path."""
_FEW_WORDS = 1 << 18  # a part of no more is decoded whole, together with others

Given = TypeVar("Given")


@dataclass(frozen=True)
class Part:
    """A box of an array: a leaf of the file of some process, by its path there."""

    box: Box
    file: int
    path: str


class Joined:
    """The files of one step, one for each process, the first's first. A context manager."""

    def __init__(self, step: int, stores: Sequence[tricomp.Store]) -> None:
        """Raises MissingStep, CorruptFile and the like, naming the step and the process's folder."""
        self.step = step
        self._stores = stores
        self._opened: dict[int, tricomp.File] = {}
        with ExitStack() as closing:
            self._heads: list[tricomp.File] = []
            for number, store in enumerate(stores):
                head = self._named(number, lambda store=store: store.open_alone(step))  # type: ignore[misc]
                self._heads.append(closing.enter_context(head))
            self.metadata = self._heads[0].metadata
            self.notes = Notes(notes_of(self.metadata))
            self._parts, leaves = self._found()
            values = tree.values_of(self._heads[0].structure, what=self._heads[0].name)
            self.entries = entries_of(((path, *leaves[path]) for path in leaves), values, self.notes)
            self._leaves = leaves
            self._closing = closing.pop_all()

    def __enter__(self) -> Joined:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def read(self, targets: Mapping[str, Any]) -> dict[str, Leaf]:
        """The arrays at the paths of some targets: of those that are in parts, or whose target is, what is asked here.

        Raises CorruptFrame, CorruptFile, MissingParent, naming the step and the process's folder.
        """
        wanted: list[dict[str, Any]] = [{} for _ in self._heads]
        some: dict[str, list[Box]] = {}
        for path, target in targets.items():
            boxes = self._boxes(path, target)
            if boxes is None and len(self._parts[path]) == 1 and self._parts[path][0].path == path:
                wanted[self._parts[path][0].file][path] = target
            else:
                some[path] = [whole_box(self._leaves[path][0])] if boxes is None else boxes
        held = self._held(some)
        found: dict[str, Leaf] = {
            path: Divided(self._leaves[path][0], self._leaves[path][1].numpy, held[path]) for path in some
        }
        for number, mine in enumerate(wanted):
            if mine:
                found |= self._decoded(number, lambda file, mine=mine: read_for(file, mine))  # type: ignore[misc]
        return found

    def flat(self) -> Flat:
        """The whole tree, every array put together on the host, with the notes that unflatten needs."""
        found = self.read(dict.fromkeys(self._leaves))
        arrays = {path: leaf.whole() if isinstance(leaf, Divided) else leaf for path, leaf in found.items()}
        head = self._heads[0]
        marks: list[Any] = [None] * len(head)

        def filled(node: Any, path: str | None) -> Any:
            if (path or "") in arrays:
                return arrays[path or ""]
            parts = children(node)
            if parts is None:
                return node
            keyed = zip(parts.keys, parts.values, strict=True)
            return parts.made([filled(value, tree.join(path, key)) for key, value in keyed])

        return Flat(filled(tree.unflatten(head.structure, marks, what=head.name), None), notes_of(self.metadata))

    def _found(self) -> tuple[dict[str, list[Part]], dict[str, tuple[tuple[int, ...], Any]]]:
        """Parts, and shape and dtype, of each array by path, as all headers together tell. Raises CorruptFile."""
        shapes: dict[str, tuple[int, ...]] = {}
        for head in self._heads:
            for path, shape in _shapes(head):
                if shapes.setdefault(path, shape) != shape:
                    raise self._misfit(path, f"{head.name} tells of another shape of it than others.")
        parts: dict[str, list[Part]] = {path: [] for path in shapes}
        leaves: dict[str, tuple[tuple[int, ...], Any]] = {}
        for number, head in enumerate(self._heads):
            for leaf in map(head.leaf, head):
                above, _, key = leaf.path.rpartition("/")
                box = box_at(key, leaf.shape) if above in shapes else None
                path = leaf.path if box is None else above
                shape = leaf.shape if box is None else shapes[above]
                if leaves.setdefault(path, (shape, leaf.dtype)) != (shape, leaf.dtype):
                    raise self._misfit(path, f"{head.name} holds another dtype or shape of it than others.")
                parts.setdefault(path, []).append(Part(box or whole_box(shape), number, leaf.path))
        for path, found in parts.items():
            shape = shapes[path] if path in shapes else leaves[path][0]
            if not is_grid([part.box for part in found], shape):
                raise self._misfit(path, self._lack(found, shape))
        return parts, leaves

    def _lack(self, found: Sequence[Part], shape: tuple[int, ...]) -> str:
        counts = [sum(part.file == number for part in found) for number in range(len(self._heads))]
        told = ", ".join(f"{store.url} holds {n}" for store, n in zip(self._stores, counts, strict=True))
        return f"its parts are not all there, or not of one array of shape {list(shape)}: {told}."

    def _misfit(self, path: str, what: str) -> CorruptFile:
        return CorruptFile(f"step {self.step}: leaf {path!r}: {what} Load another step.")

    def _boxes(self, path: str, target: Any) -> list[Box] | None:
        """The boxes of an array that devices of this process are to have; None: all of it, in one place."""
        if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
            return None
        shape, where = self._leaves[path][0], data_sharding_of(target)
        if where is None or (where.is_fully_addressable and path == self._parts[path][0].path):
            return None
        return list({box_of(index, shape) for index in where.addressable_devices_indices_map(shape).values()})

    def _held(self, wanted: Mapping[str, Sequence[Box]]) -> dict[str, list[tuple[Box, Any]]]:
        """What the files hold in boxes, by the path of the array: parts, or those of their rows that are asked for."""
        held: dict[str, list[tuple[Box, Any]]] = {path: [] for path in wanted}
        whole: dict[int, list[tuple[str, Part]]] = {}
        for path, boxes in wanted.items():
            for part in self._parts[path]:
                common = [found for box in boxes if (found := shared(box, part.box)) is not None]
                if not common:
                    continue
                rows = _rows(common, part.box)
                if rows is None or self._heads[part.file].leaf(part.path).n_words <= _FEW_WORDS:
                    whole.setdefault(part.file, []).append((path, part))
                else:
                    held[path].append((rows, self._read_rows(part, rows)))
        for number, several in whole.items():
            names = [part.path for _, part in several]
            arrays = self._decoded(number, lambda file, names=names: file.load(names))  # type: ignore[misc]
            for path, part in several:
                held[path].append((part.box, arrays[part.path]))
        return held

    def _read_rows(self, part: Part, rows: Box) -> Any:
        """Some rows of a part, which are a run of its elements."""
        shape = [end - begin for begin, end in rows]
        start = (rows[0][0] - part.box[0][0]) * math.prod(shape[1:])
        stop = start + math.prod(shape)
        return self._decoded(part.file, lambda file: file.elements(part.path, start, stop)).reshape(shape)

    def _decoded(self, number: int, read: Callable[[tricomp.File], Given]) -> Given:
        """What is read of a file, whose chain is opened for the first time that something is."""

        def opened() -> Given:
            if number not in self._opened:
                self._opened[number] = self._closing.enter_context(self._stores[number].open(self.step))
            return read(self._opened[number])

        return self._named(number, opened)

    def _named(self, number: int, action: Callable[[], Given]) -> Given:
        try:
            return action()
        except TricompError as error:
            raise type(error)(f"step {self.step} in {self._stores[number].url}: {error}") from error


def _rows(boxes: Sequence[Box], part: Box) -> Box | None:
    """The rows of a part that have all of some boxes in it; None: all rows."""
    if not part:
        return None
    first, last = min(box[0][0] for box in boxes), max(box[0][1] for box in boxes)
    return None if (first, last) == part[0] else ((first, last), *part[1:])


def _shapes(head: tricomp.File) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of arrays that stand in parts. Raises CorruptFile."""
    table = notes_of(head.metadata).get(SHARDS, {})
    for path, shape in table.items() if isinstance(table, Mapping) else [("", None)]:
        if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise CorruptFile(f"{head.name}: the notes on its shards are damaged. Load another step.")
        yield path, tuple(shape)
