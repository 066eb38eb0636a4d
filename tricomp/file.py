"""File: one checkpoint in one file, that decodes a leaf when it is asked for.

The hard thing is in tricomp.frames: leaves of a delta are decoded along the chain of files. Here are the names, the
facts, and what a caller gets: arrays in memory of their own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tricomp import bounds, codec, container, tree
from tricomp.bounds import Limits
from tricomp.content import Content
from tricomp.dtypes import Words, from_words, of, to_words
from tricomp.errors import CorruptFrame, InvalidArgument, MissingLeaf, WrongReference
from tricomp.frames import Frames
from tricomp.layout import DeviceArray, Leaf, snapshot_of
from tricomp.plan import MAX_CHUNK_LOG2, Plan
from tricomp.report import Breakdown
from tricomp.reuse import Reuse
from tricomp.storage import Source

Array = np.ndarray[Any, Any]

PIECE_BYTES = 4 << 20  # decoded at a time, about: enough chunks for the codec to be quick, and few enough for a cache
_THREAD_WORDS = 1 << 19  # words of a piece that keep one thread busy
_WORDS_A_CHUNK = 256  # of a piece, for each chunk of its leaf: the directory, read for each piece, is small beside it
_WHOLE_CHUNKS = 1 << MAX_CHUNK_LOG2


def piece_elements(leaf: Leaf, n_threads: int = 1, n_elements: int | None = None) -> int:
    """Elements of a leaf to decode at a time, whole chunks: about n_elements, or as many as decode quickly together."""
    if n_elements is None:
        n_words = max(8 * PIECE_BYTES // leaf.dtype.word_bits, _THREAD_WORDS * n_threads)
        n_words = max(n_words, leaf.n_words // _WHOLE_CHUNKS * _WORDS_A_CHUNK)
        n_elements = n_words // leaf.dtype.words_per_element
    return max(-(-n_elements // _WHOLE_CHUNKS), 1) * _WHOLE_CHUNKS


class File(Mapping[str, Array]):
    """A read-only mapping from leaf paths to arrays, decoded when asked for; each access gives a new array.

    Attributes: name, keys() and the other methods of a Mapping, metadata, content_id, parent, writer.
    A context manager. Decoding raises CorruptFrame (damage), WrongReference (a delta without its parent) and
    LimitExceeded (more memory than limits allow).
    """

    def __init__(
        self,
        source: Source,
        reference: File | Content | None = None,
        limits: Limits = bounds.DEFAULTS,
        threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Takes over source. threads, backend: to decode with, see codec.Engine.

        Raises CorruptFile, UnsupportedVersion, LimitExceeded, WrongReference, InvalidArgument.
        """
        engine = codec.Engine(threads, backend)
        self.name = source.name
        self._source, self._limits, self._reference = source, limits, reference
        self._owned: list[File] = []
        base = reference._frames if isinstance(reference, File) else reference
        self._frames: Frames = Frames(source, base, limits, engine)
        self._contents, self._index, self._frame_of = self._frames.contents, self._frames.index, self._frames.frame_of
        self._check_reference()

    @property
    def content_id(self) -> str:
        """32 hex digits that name the decoded content."""
        return self._contents.summary.content_id.hex()

    @property
    def parent(self) -> str | None:
        """Content id of the reference this file was coded against; None: it stands alone."""
        parent = self._contents.summary.parent
        return None if parent is None else parent.hex()

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given to save as metadata."""
        return self._contents.summary.metadata

    @property
    def writer(self) -> str:
        """Name and version of the program that wrote the file."""
        return self._contents.summary.writer

    @property
    def format(self) -> int:
        """Number of the format that the file is in."""
        return bytes(self._source.read(len(container.START) + 1, 1))[0]

    @property
    def since_keyframe(self) -> int:
        """Checkpoints saved since the last one that stands alone; 0 if this one does."""
        return self._contents.summary.since_keyframe

    @property
    def structure(self) -> bytes:
        """The tree without its leaves, see tricomp.tree."""
        return self._contents.structure

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self._source.n_bytes

    def __getitem__(self, path: str) -> Array:
        number = self._number(path)
        return self._frames.array(number, self._frames.decode([number])[number])

    def __contains__(self, path: object) -> bool:
        return path in self._index

    __eq__ = object.__eq__  # a File equals itself only: a Mapping would compare arrays
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def leaf(self, path: str) -> Leaf:
        """Path, dtype and shape of a leaf, without decoding it. Raises MissingLeaf."""
        return self._contents.leaves[self._number(path)]

    def plan(self, path: str) -> Plan:
        """How the frame of a leaf was coded. Raises MissingLeaf, CorruptFrame."""
        return self._frames.plan(self._frame_of[self._number(path)])

    def digest(self, path: str) -> int:
        """Digest of the decoded leaf, as stored. Raises MissingLeaf."""
        return self._contents.digests[self._number(path)]

    def coded_bytes(self, path: str) -> int:
        """Bytes of the frame of a leaf, which small leaves share. Raises MissingLeaf."""
        return self._frame_of[self._number(path)].n_bytes

    def find(self, path: str) -> tuple[Leaf, Words] | None:
        """Leaf and words (uint[n_words], not to be written to) of that path, or None: a codec's Reference."""
        return self._frames.find(path)

    def find_all(self, paths: Sequence[str]) -> list[tuple[Leaf, Words] | None]:
        """What find gives for each path, decoded together."""
        return self._frames.find_all(paths)

    def on(self, device: Any) -> Frames:
        """A Reference to the same leaves, whose words are decoded to a torch device. Raises BackendError."""
        return self._frames.at(device)

    def select(self, leaves: Iterable[str]) -> list[str]:
        """The paths that are given or match patterns as in fnmatch, in the file's order. Raises MissingLeaf."""
        return [self._contents.leaves[n].path for n in sorted(self._index[path] for path in matching(self, leaves))]

    def load(self, leaves: Iterable[str] | None = None) -> Any:
        """The whole tree; or, given paths or patterns as in fnmatch, a dict of path to array. Raises MissingLeaf."""
        if leaves is None:
            words = self._frames.decode_all(range(len(self)))
            arrays = [self._frames.array(number, words.pop(number)) for number in range(len(self))]
            return tree.unflatten(self.structure, arrays, self._limits, f"{self.name}: tree")
        numbers = sorted(self._index[path] for path in matching(self, leaves))
        words = self._frames.decode_all(numbers)
        return {self._contents.leaves[n].path: self._frames.array(n, words.pop(n)) for n in numbers}

    def load_to(self, device: Any, leaves: Iterable[str] | None = None) -> Any:
        """What load gives, decoded on a torch device, or one of that name: leaves are DeviceArrays of their own there.

        Only compressed bytes cross the bus. Raises what load raises, BackendError where no kernel can run there, and
        OutOfDeviceMemory.
        """
        frames = self._frames.at(device)
        if leaves is None:
            words = frames.decode_all(range(len(self)))
            arrays = [frames.device_array(number, words.pop(number)) for number in range(len(self))]
            return tree.unflatten(self.structure, arrays, self._limits, f"{self.name}: tree")
        numbers = sorted(self._index[path] for path in matching(self, leaves))
        words = frames.decode_all(numbers)
        return {self._contents.leaves[n].path: frames.device_array(n, words.pop(n)) for n in numbers}

    def load_into(self, targets: Mapping[str, DeviceArray | Array]) -> None:
        """Decode leaves into memory that is there, batch by batch: little more is taken. targets: by path.

        A target is a C-contiguous numpy array, or a DeviceArray, to whose words kernels write; it may be part of a
        larger one. Raises MissingLeaf; InvalidArgument, naming the leaf, before anything is written, if a target has
        another dtype or shape; and what load and load_to raise: then targets may hold anything.
        """
        homes: dict[Any, dict[int, Any]] = {}
        for path, target in targets.items():
            leaf = self.leaf(path)
            words = target.words if isinstance(target, DeviceArray) else _writable_words(target, path)
            dtype = target.dtype if isinstance(target, DeviceArray) else of(target, path)
            if (dtype, target.shape, len(words)) != (leaf.dtype, leaf.shape, leaf.n_words):
                raise InvalidArgument(
                    f"leaf {path!r}: expected a target of {leaf.dtype.name}{list(leaf.shape)}, got one of "
                    f"{dtype.name}{list(target.shape)} with {len(words)} words."
                )
            homes.setdefault(codec.home_of(words), {})[self._index[path]] = words
        mine: dict[int, Any]
        for device, mine in homes.items():
            frames = self._frames.into(mine) if device is None else self._frames.at(device, mine)
            for found in frames.stream(mine):
                for number in list(found):
                    decoded: Any = found.pop(number)
                    if decoded is mine[number]:
                        continue
                    if device is None:  # of a frame that leaves share
                        mine[number][...] = decoded
                    elif decoded.data_ptr() != mine[number].data_ptr():
                        mine[number].copy_(decoded)

    def stream(self, paths: Iterable[str]) -> Iterator[tuple[str, Array]]:
        """Path and array of each leaf, once, in no promised order: of any number of leaves, in little memory.

        An array is to be looked at or copied, not written to, and dropped before the next is asked for: its memory is
        not its own. Raises MissingLeaf, and what decoding raises.
        """
        numbers = [self._number(path) for path in paths]
        for found in self._frames.stream(numbers, Reuse()):
            for number in list(found):
                leaf = self._contents.leaves[number]
                yield leaf.path, from_words(found.pop(number), leaf.dtype, leaf.shape)

    def content(self) -> Content:
        """All leaves, decoded, in memory of their own, and the structure; needs no registered type."""
        words = self._frames.decode_all(range(len(self)))
        arrays = [self._frames.array(number, words.pop(number)) for number in range(len(self))]
        return Content(self.structure, snapshot_of(list(self), arrays))

    def elements(self, path: str, start: int, stop: int, parent: Array | None = None) -> Array:
        """Elements [start, stop) of a leaf in C order, one-dimensional: decodes the chunks that hold them, no others.

        parent: the same elements of the parent's leaf, for a caller that has them: they are not decoded again where
        start and stop are bounds of chunks. The checksums of these chunks are compared, the leaf's digest is not.
        Raises MissingLeaf, InvalidArgument, and what decoding raises.
        """
        number, part, given = self._part(path, start, stop, parent)
        (words,) = self._frames.parts(number, [part], given)
        return from_words(words, self._contents.leaves[number].dtype, (stop - start,))

    def summed(self, path: str, start: int, stop: int, parent: Array | None = None) -> tuple[Array, int]:
        """What elements gives, and what it adds to the leaf's digest, see codec.digest_end.

        start and stop must be bounds of chunks, or the leaf's end: multiples of piece_elements.
        """
        number, part, given = self._part(path, start, stop, parent)
        words, added = self._frames.summed(number, part, given)
        return from_words(words, self._contents.leaves[number].dtype, (stop - start,)), added

    def runs(self, path: str, runs: Sequence[range]) -> list[Array]:
        """Several runs of elements of a leaf, each as `elements` gives it, but decoded together: chunks that are far
        apart cost one decoding, not one each. Raises what elements raises."""
        number = self._number(path)
        leaf = self._contents.leaves[number]
        n_each = leaf.dtype.words_per_element
        n_elements = leaf.n_words // n_each
        for run in runs:
            if not 0 <= run.start <= run.stop <= n_elements or run.step != 1:
                raise InvalidArgument(f"leaf {path!r}: {run} of {n_elements} elements. Ask for elements inside it.")
        words = self._frames.parts(number, [range(run.start * n_each, run.stop * n_each) for run in runs])
        return [from_words(part, leaf.dtype, (len(run),)) for part, run in zip(words, runs, strict=True)]

    def borrowed(self, paths: Sequence[str], room: Reuse) -> dict[str, Array]:
        """Leaves by path, decoded together, to be looked at and dropped: their memory is not their own, but room's.

        Raises MissingLeaf, and what decoding raises.
        """
        numbers = [self._number(path) for path in paths]
        words = self._frames.decode_all(numbers, room)
        leaves = [self._contents.leaves[number] for number in numbers]
        return {leaf.path: from_words(words[n], leaf.dtype, leaf.shape) for n, leaf in zip(numbers, leaves)}

    def pieces(self, path: str, n_elements: int | None = None, room: Reuse | None = None) -> Iterator[Array]:
        """A whole leaf in order, as one-dimensional arrays of about n_elements each: however large, in little memory.

        n_elements: None: as many as decode quickly together, see piece_elements. The digest of the leaf is compared at
        the end: until then what came may be wrong. room: for the pieces; where nobody holds one any more, others come.
        Raises MissingLeaf, and what decoding raises.
        """
        number = self._number(path)
        leaf = self._contents.leaves[number]
        size = self.piece_elements(path, n_elements) * leaf.dtype.words_per_element
        room, total = room or Reuse(), 0
        if leaf.n_words <= size:
            yield self.borrowed([path], room)[path].reshape(-1)
            return
        for start in range(0, leaf.n_words, size):
            part = range(start, min(start + size, leaf.n_words))
            words, added = self._frames.summed(number, part, into=room.array(len(part), leaf.dtype.word_dtype))
            total += added
            array = from_words(words, leaf.dtype, (len(words) // leaf.dtype.words_per_element,))
            del words
            yield array
            del array
        self._frames.compare(number, codec.digest_end(total, leaf.n_bytes))

    def piece_elements(self, path: str, n_elements: int | None = None) -> int:
        """Elements of a leaf that a piece holds. Raises MissingLeaf."""
        return piece_elements(self.leaf(path), self._frames.engine.n_threads, n_elements)

    def breakdown(self, path: str) -> Breakdown:
        """What the bytes of a leaf's frame are for; reads the frame's head only. Raises MissingLeaf, CorruptFrame."""
        entry = self._frame_of[self._number(path)]
        try:
            found = codec.breakdown(self._frames.plan(entry), container.FrameBytes(self._source, entry))
        except CorruptFrame as error:
            raise CorruptFrame(f"{self.name}: frame of leaf {path!r}: {error}.") from None
        return Breakdown(**found)

    def frame_leaves(self, path: str) -> tuple[str, ...]:
        """Paths of the leaves that share the frame of a leaf, in their order. Raises MissingLeaf."""
        entry = self._frame_of[self._number(path)]
        return tuple(self._contents.leaves[number].path for number in entry.leaves)

    def check(self, decoded: Container[str] = ()) -> None:
        """Compare the checksum of every frame, decoding nothing and needing no reference. Raises CorruptFrame.

        decoded: leaves whose frames were decoded, which compares more; of them only the bytes around are compared.
        """
        for entry in self._contents.frames:
            paths = [self._contents.leaves[number].path for number in entry.leaves]
            if all(path in decoded for path in paths):
                container.check_bins(self._source, entry, paths[0])
            else:
                container.read_frame(self._source, entry, paths[0])

    def chain(self) -> Iterator[File]:
        """This file, and those that it was coded against, as far as they were opened for it."""
        above: File | Content | None = self
        while isinstance(above, File):
            yield above
            above = above._reference

    def close(self) -> None:
        """Let go of the file, and of the references that open opened for it."""
        self._source.close()
        self._frames.cache.clear()
        for file in self._owned:
            file.close()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tricomp.File {self.name}: {len(self)} leaves, {self.content_id[:8]}>"

    def own(self, file: File) -> File:
        """Close file together with this one."""
        self._owned.append(file)
        return file

    def _check_reference(self) -> None:
        if self._reference is None:
            return
        if self.parent is None:
            raise WrongReference(f"{self.name}: stands alone and takes no reference. Open it without one.")
        if self._reference.content_id != self.parent:
            raise WrongReference(
                f"{self.name}: was encoded against content id {self.parent}, "
                f"but the reference has {self._reference.content_id}. Pass the checkpoint it was saved against."
            )

    def _part(self, path: str, start: int, stop: int, parent: Array | None) -> tuple[int, range, Words | None]:
        """Number of a leaf, words of elements, words of the parent's elements. Raises MissingLeaf, InvalidArgument."""
        number = self._number(path)
        leaf = self._contents.leaves[number]
        n_each = leaf.dtype.words_per_element
        if not 0 <= start <= stop <= leaf.n_words // n_each:
            raise InvalidArgument(
                f"leaf {path!r}: elements {start} to {stop} of {leaf.n_words // n_each}. Ask for elements inside it."
            )
        given = None if parent is None else to_words(parent, path)
        if given is not None and (len(given) != (stop - start) * n_each or given.dtype != leaf.dtype.word_dtype):
            raise InvalidArgument(f"leaf {path!r}: the parent's elements are {len(given)} words of {given.dtype}.")
        return number, range(start * n_each, stop * n_each), given

    def _number(self, path: str) -> int:
        try:
            return self._index[path]
        except KeyError:
            raise MissingLeaf(f"{self.name}: no leaf {path!r} among its {len(self)} leaves. See keys().") from None


def _writable_words(array: Array, path: str) -> Words:
    """The words of an array that can be written to, in its own memory. Raises InvalidArgument, naming the leaf."""
    words = to_words(array, path)
    if not array.flags.carray or (array.size and not np.shares_memory(words, array)):
        raise InvalidArgument(f"leaf {path!r}: expected a writable, aligned, C-contiguous array as its target.")
    return words


def matching(file: File, patterns: Iterable[str]) -> set[str]:
    """Paths of a file's leaves that are given or match patterns as in fnmatch; in no order, as the file may be long.

    Raises MissingLeaf when nothing matches a pattern, InvalidArgument for a text in the place of a list.
    """
    if isinstance(patterns, str):
        raise InvalidArgument(f"leaves: expected a list of paths or patterns, got the text {patterns!r}.")
    wanted: set[str] = set()
    for pattern in patterns:
        found = {pattern} if pattern in file else {path for path in file if fnmatchcase(path, pattern)}
        if not found:
            advice = "See keys() or tricomp inspect -v."
            raise MissingLeaf(f"{file.name}: no leaf matches {pattern!r} among its {len(file)} leaves. {advice}")
        wanted |= found
    return wanted
