"""File: one checkpoint in one file, that decodes a leaf when it is asked for. Container plus codec, reading side.

The hard thing: a delta's leaf needs the same leaf of its parent, which may need its own parent's. Frames are therefore
gathered from the file down to the keyframe first and decoded on the way back, frame by frame, without recursion.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tricomp import bounds, codec, container, tree
from tricomp.bounds import Bytes, Limits
from tricomp.container import Contents, Entry
from tricomp.content import Content
from tricomp.dtypes import Words, from_words, to_words
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    LimitExceeded,
    MissingLeaf,
    WrongReference,
)
from tricomp.layout import Leaf, snapshot_of
from tricomp.plan import Plan
from tricomp.report import Breakdown
from tricomp.storage import Source

Array = np.ndarray[Any, Any]
_Job = tuple[Sequence[Leaf], Plan, Bytes, Words | None, tuple[Leaf, Words] | None]
_BATCH_WORDS = 4 << 20  # decoded together, so that the codec has enough to do at a time
_CACHED_FRAMES = 128  # of several small leaves each, so at most 128 x 65,536 words


class File(Mapping[str, Array]):
    """A read-only mapping from leaf paths to arrays, decoded when asked for; each access gives a new array.

    Attributes: name, keys() and the other methods of a Mapping, metadata, content_id, parent, writer.
    A context manager. Decoding raises CorruptFrame (damage), WrongReference (a delta without its parent) and
    LimitExceeded (more memory than limits allow).
    """

    def __init__(
        self, source: Source, reference: File | Content | None = None, limits: Limits = bounds.DEFAULTS
    ) -> None:
        """Takes over source. Raises CorruptFile, UnsupportedVersion, LimitExceeded, WrongReference."""
        self.name = source.name
        self._source, self._limits, self._reference = source, limits, reference
        self._owned: list[File] = []
        self._contents: Contents = container.read(source, limits)
        self._index = {leaf.path: number for number, leaf in enumerate(self._contents.leaves)}
        self._frame_of = {number: entry for entry in self._contents.frames for number in entry.leaves}
        self._plans: dict[int, Plan] = {}
        self._cache: OrderedDict[int, dict[int, Words]] = OrderedDict()  # by first leaf of a shared frame
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
        return self._array(number, self._decode([number])[number])

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
        return self._plan(self._frame_of[self._number(path)])

    def digest(self, path: str) -> int:
        """Digest of the decoded leaf, as stored. Raises MissingLeaf."""
        return self._contents.digests[self._number(path)]

    def coded_bytes(self, path: str) -> int:
        """Bytes of the frame of a leaf, which small leaves share. Raises MissingLeaf."""
        return self._frame_of[self._number(path)].n_bytes

    def find(self, path: str) -> tuple[Leaf, Words] | None:
        """Leaf and words (uint[n_words], not to be written to) of that path, or None: a codec's Reference."""
        number = self._index.get(path)
        if number is None:
            return None
        entry = self._frame_of[number]
        if len(entry.leaves) > 1 and entry.leaves[0] not in self._cache:
            self._decode(self._small_from(entry))  # which caches them: the next to be asked for is likely among them
        return self._contents.leaves[number], self._decode([number])[number]

    def load(self, leaves: Iterable[str] | None = None) -> Any:
        """The whole tree; or, given paths or patterns as in fnmatch, a dict of path to array. Raises MissingLeaf."""
        if leaves is None:
            words = self._decode_all(range(len(self)))
            arrays = [self._array(number, words[number]) for number in range(len(self))]
            return tree.unflatten(self.structure, arrays, self._limits, f"{self.name}: tree")
        numbers = self._matching(leaves)
        words = self._decode_all(numbers)
        return {self._contents.leaves[number].path: self._array(number, words[number]) for number in numbers}

    def content(self) -> Content:
        """All leaves, decoded, in memory of their own, and the structure; needs no registered type."""
        words = self._decode_all(range(len(self)))
        arrays = [self._array(number, words[number]) for number in range(len(self))]
        return Content(self.structure, snapshot_of(list(self), arrays))

    def elements(self, path: str, start: int, stop: int, parent: Array | None = None) -> Array:
        """Elements [start, stop) of a leaf in C order, one-dimensional: decodes the chunks that hold them, no others.

        parent: the same elements of the parent's leaf, for a caller that has them: they are not decoded again where
        start and stop are bounds of chunks. The checksums of these chunks are compared, the leaf's digest is not.
        Raises MissingLeaf, InvalidArgument, and what decoding raises.
        """
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
        words = self._part(number, range(start * n_each, stop * n_each), given)
        return from_words(words, leaf.dtype, (stop - start,))

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
        words = self._parts(number, [range(run.start * n_each, run.stop * n_each) for run in runs])
        return [from_words(part, leaf.dtype, (len(run),)) for part, run in zip(words, runs, strict=True)]

    def pieces(self, path: str, n_elements: int = 1 << 22) -> Iterator[Array]:
        """A whole leaf in order, as one-dimensional arrays of about n_elements each: however large, in little memory.

        The digest of the leaf is compared at the end: until then what came may be wrong. Raises MissingLeaf, and what
        decoding raises.
        """
        number = self._number(path)
        leaf = self._contents.leaves[number]
        size = max(-(-n_elements // codec.DIGEST_BYTES), 1) * codec.DIGEST_BYTES * leaf.dtype.words_per_element
        if leaf.n_words <= size:
            yield self[path].reshape(-1)
            return
        found = codec.Digester()
        for start in range(0, leaf.n_words, size):
            words = self._part(number, range(start, min(start + size, leaf.n_words)))
            found.update(words)
            yield from_words(words, leaf.dtype, (len(words) // leaf.dtype.words_per_element,))
        self._compare(number, found.digest())

    def breakdown(self, path: str) -> Breakdown:
        """What the bytes of a leaf's frame are for; reads the frame's head only. Raises MissingLeaf, CorruptFrame."""
        entry = self._frame_of[self._number(path)]
        try:
            found = codec.breakdown(self._plan(entry), container.FrameBytes(self._source, entry))
        except CorruptFrame as error:
            raise CorruptFrame(f"{self.name}: frame of leaf {path!r}: {error}.") from None
        return Breakdown(**found)

    def frame_leaves(self, path: str) -> tuple[str, ...]:
        """Paths of the leaves that share the frame of a leaf, in their order. Raises MissingLeaf."""
        entry = self._frame_of[self._number(path)]
        return tuple(self._contents.leaves[number].path for number in entry.leaves)

    def check(self) -> None:
        """Compare the checksum of every frame, decoding nothing and needing no reference. Raises CorruptFrame."""
        for entry in self._contents.frames:
            container.read_frame(self._source, entry, self._contents.leaves[entry.leaves[0]].path)

    def close(self) -> None:
        """Let go of the file, and of the references that open opened for it."""
        self._source.close()
        self._cache.clear()
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

    def _number(self, path: str) -> int:
        try:
            return self._index[path]
        except KeyError:
            raise MissingLeaf(f"{self.name}: no leaf {path!r} among its {len(self)} leaves. See keys().") from None

    def _matching(self, patterns: Iterable[str]) -> list[int]:
        if isinstance(patterns, str):
            raise InvalidArgument(f"leaves: expected a list of paths or patterns, got the text {patterns!r}.")
        wanted: set[int] = set()
        for pattern in patterns:
            if pattern in self._index:
                wanted.add(self._index[pattern])
                continue
            found = {number for path, number in self._index.items() if fnmatchcase(path, pattern)}
            if not found:
                raise MissingLeaf(f"{self.name}: no leaf matches {pattern!r} among its {len(self)} leaves. See keys().")
            wanted |= found
        return sorted(wanted)

    def _plan(self, entry: Entry) -> Plan:
        first = entry.leaves[0]
        if first not in self._plans:
            leaves = [self._contents.leaves[number] for number in entry.leaves]
            plan = Plan.from_wire(entry.plan, leaves[0].path)
            n_words = sum(leaf.n_words for leaf in leaves)
            if plan.n_words != n_words or any(leaf.dtype != plan.dtype for leaf in leaves):
                raise CorruptFrame(
                    f"{self.name}: leaf {leaves[0].path!r}: its plan is for {plan.n_words} words of {plan.dtype.name}, "
                    f"its leaves have {n_words} of {leaves[0].dtype.name}."
                )
            self._limits.check("max_decoded_bytes", sum(leaf.n_bytes for leaf in leaves), f"leaf {leaves[0].path!r}")
            self._plans[first] = plan
        return self._plans[first]

    def _array(self, number: int, words: Words) -> Array:
        """An array in memory of its own: no file, cache, reference or other leaf is reached through it."""
        leaf, entry = self._contents.leaves[number], self._frame_of[number]
        is_shared = len(entry.leaves) > 1 or self._plan(entry).predict == "copy"
        owner = words if words.base is None else words.base
        is_whole = isinstance(owner, np.ndarray) and owner.base is None and owner.nbytes == words.nbytes
        is_own = is_whole and words.flags.writeable and not is_shared
        return from_words(words if is_own else words.copy(), leaf.dtype, leaf.shape)

    def _decode_all(self, numbers: Iterable[int]) -> dict[int, Words]:
        """Words of leaves by number, each frame decoded once; those that are siblings of others first."""
        wanted = set(numbers)
        n_bytes = sum(self._contents.leaves[number].n_bytes for number in wanted)
        self._limits.check("max_decoded_bytes", n_bytes, f"{self.name}: leaves to load")
        frames = {self._frame_of[number].leaves[0]: self._frame_of[number] for number in sorted(wanted)}
        ordered = sorted(frames.values(), key=lambda entry: self._plan(entry).reference == "sibling")
        done: dict[int, Words] = {}
        batch: list[int] = []
        n_words = 0
        for entry in ordered:
            batch += entry.leaves
            n_words += self._plan(entry).n_words
            if n_words >= _BATCH_WORDS or entry is ordered[-1]:
                words = self._decode(batch, done)
                done.update((number, words[number]) for number in batch if number in wanted)
                batch, n_words = [], 0
        return done

    def _decode(self, numbers: Sequence[int], done: Mapping[int, Words] | None = None) -> dict[int, Words]:
        """Words of leaves by number, decoded along the chain of files. done: leaves of this file decoded before."""
        if len(numbers) == 1 and (held := self._cache.get(self._frame_of[numbers[0]].leaves[0])) is not None:
            self._cache.move_to_end(self._frame_of[numbers[0]].leaves[0])
            return {numbers[0]: held[numbers[0]]}  # not all of a frame for each of its thousands of leaves
        levels: list[tuple[File, list[Entry]]] = []
        file, known = self, dict(done or {})
        words: dict[str, tuple[Leaf, Words]] = {}
        while numbers:
            entries = file._entries_for(numbers, known if file is self else {})
            levels.append((file, entries))
            waiting = [entry for entry in entries if entry.leaves[0] not in file._cache]
            needed = [n for entry in waiting if file._plan(entry).reference == "parent" for n in entry.leaves]
            paths = [file._contents.leaves[number].path for number in needed]
            if not paths:
                break
            above = file._parent_for(paths[0])
            if isinstance(above, Content):
                words = {path: found for path in paths if (found := above.find(path)) is not None}
                break
            numbers = [above._index[path] for path in paths if path in above._index]
            file = above
        for file, entries in reversed(levels):
            decoded = dict(known) if file is self else {}
            for is_sibling in (False, True):
                batch = [entry for entry in entries if (file._plan(entry).reference == "sibling") == is_sibling]
                file._decode_frames(batch, words, decoded, file is self)
            words = {file._contents.leaves[n].path: (file._contents.leaves[n], w) for n, w in decoded.items()}
        return decoded

    def _small_from(self, entry: Entry) -> list[int]:
        """Leaf numbers of a frame of small leaves and of some more such frames after it: decoded together, cheap."""
        first = self._contents.frames.index(entry)
        following = [other for other in self._contents.frames[first:] if len(other.leaves) > 1]
        return [number for other in following[: _CACHED_FRAMES // 2] for number in other.leaves]

    def _entries_for(self, numbers: Sequence[int], known: Mapping[int, Words]) -> list[Entry]:
        """The frames of leaves and of their siblings, but for siblings that are known."""
        wanted = {self._frame_of[number].leaves[0]: self._frame_of[number] for number in numbers}
        for entry in list(wanted.values()):
            plan = self._plan(entry)
            if plan.reference != "sibling" or plan.sibling in known:
                continue
            other = self._frame_of[self._sibling(entry)]
            wanted[other.leaves[0]] = other
        return list(wanted.values())

    def _part(self, number: int, wanted: range, parent: Words | None = None) -> Words:
        """Words of a leaf; see _parts. parent: the words wanted, of the parent's leaf, if they are known."""
        return self._parts(number, [wanted], parent)[0]

    def _parts(self, number: int, wanted: Sequence[range], parent: Words | None = None) -> list[Words]:
        """Words of a leaf, from the chunks that hold them alone, in this file and down its chain."""
        self._limits.check("max_decoded_bytes", sum(map(len, wanted)), f"{self.name}: words to decode")
        steps: list[tuple[File, int, Sequence[range], Sequence[range]]] = []  # words asked for; those of their chunks
        file = self
        words: list[Words] | None = None
        source: Leaf | None = None
        while words is None:
            entry = file._frame_of[number]
            plan, leaf = file._plan(entry), file._contents.leaves[number]
            if len(entry.leaves) > 1:
                whole = file._decode([number])[number]
                words, source = [whole[part.start : part.stop].copy() for part in wanted], leaf
                break
            size = 1 << plan.chunk_log2 if plan.n_chunks else 1
            around = [
                range(part.start // size * size, min(-(-part.stop // size) * size, leaf.n_words)) for part in wanted
            ]
            steps.append((file, number, wanted, around))
            wanted = around
            if plan.reference == "none":
                break
            if plan.reference == "sibling":
                number = file._sibling(entry)
                continue
            if parent is not None and len(steps) == 1 and [len(parent)] == [len(part) for part in around]:
                words = [parent]
                break
            above = file._parent_for(leaf.path)
            if isinstance(above, Content):
                found = above.find(leaf.path)
                whole = file._parent_words([leaf], {leaf.path: found} if found else {})
                words = [whole[part.start : part.stop] for part in around]
            else:
                other = above._index.get(leaf.path)
                file._require_parent(leaf, None if other is None else above._contents.leaves[other])
                assert other is not None
                file, number = above, other
        for file, number, asked, held in reversed(steps):
            decoded = file._decode_parts(number, held, words, source)
            words = [
                part[inner.start - outer.start : inner.stop - outer.start]
                for part, inner, outer in zip(decoded, asked, held, strict=True)
            ]
            source = file._contents.leaves[number]
        assert words is not None  # there is at least one step, or a shared frame
        return words

    def _decode_parts(
        self, number: int, parts: Sequence[range], references: Sequence[Words] | None, source: Leaf | None
    ) -> list[Words]:
        """Some words of a leaf that has a frame of its own. references: these words of its parent or its sibling."""
        entry, leaf = self._frame_of[number], self._contents.leaves[number]
        plan = self._plan(entry)
        siblings = None
        if plan.reference == "sibling" and references is not None and source is not None:
            siblings = [(source, words) for words in references]
        parents = references if plan.reference == "parent" else None
        data = container.FrameBytes(self._source, entry)
        try:
            return codec.decode_parts([leaf], plan, data, parts, parents, siblings)
        except MemoryError:
            raise LimitExceeded(
                f"{self.name}: no memory to decode {sum(map(len, parts))} words of {leaf.path!r}."
            ) from None
        except CorruptFrame as error:
            raise CorruptFrame(f"{self.name}: {error}") from error

    def _sibling(self, entry: Entry) -> int:
        """Number of the leaf that a frame was coded against. Raises CorruptFrame if it cannot be."""
        plan = self._plan(entry)
        if plan.sibling not in self._frame_of:
            raise CorruptFrame(f"{self.name}: leaf number {entry.leaves[0]} has a sibling that does not exist.")
        if self._plan(self._frame_of[plan.sibling]).reference == "sibling":
            raise CorruptFrame(f"{self.name}: leaf number {entry.leaves[0]} has a sibling that has a sibling.")
        return plan.sibling

    def _parent_for(self, path: str) -> File | Content:
        if self._reference is None:
            raise WrongReference(
                f"{self.name}: leaf {path!r} was encoded against the checkpoint with content id {self.parent}, "
                f"and no reference was given. Pass reference=, or load it through tricomp.Store."
            )
        return self._reference

    def _decode_frames(
        self,
        entries: Sequence[Entry],
        above: Mapping[str, tuple[Leaf, Words]],
        decoded: dict[int, Words],
        is_asked: bool,
    ) -> None:
        """Decode frames together and put their leaves' words into decoded. above: leaves of the parent, by path.

        is_asked: they are wanted for themselves, not for what is coded against them: those of small leaves are cached.
        """
        waiting: list[Entry] = []
        for entry in entries:
            if entry.leaves[0] in self._cache:
                self._cache.move_to_end(entry.leaves[0])
                decoded.update(self._cache[entry.leaves[0]])
            else:
                waiting.append(entry)
        try:
            found = codec.decode_many([self._job(entry, above, decoded) for entry in waiting])
        except MemoryError:
            n_bytes = sum(self._contents.leaves[number].n_bytes for entry in waiting for number in entry.leaves)
            raise LimitExceeded(f"{self.name}: no memory to decode {n_bytes} bytes.") from None
        except CorruptFrame as error:
            if str(error).startswith(f"{self.name}: "):
                raise
            raise CorruptFrame(f"{self.name}: {error}") from error
        for entry, words in zip(waiting, found, strict=True):
            for number, leaf_words in zip(entry.leaves, words, strict=True):
                self._compare(number, codec.digest(leaf_words))
            decoded.update(zip(entry.leaves, words, strict=True))
            if len(words) > 1 and is_asked:
                self._cache[entry.leaves[0]] = dict(zip(entry.leaves, words, strict=True))
                if len(self._cache) > _CACHED_FRAMES:
                    self._cache.popitem(last=False)

    def _job(self, entry: Entry, above: Mapping[str, tuple[Leaf, Words]], decoded: Mapping[int, Words]) -> _Job:
        """What the codec needs to decode one frame."""
        plan = self._plan(entry)
        leaves = [self._contents.leaves[number] for number in entry.leaves]
        parent = self._parent_words(leaves, above) if plan.reference == "parent" else None
        sibling = None
        if plan.reference == "sibling":
            sibling = self._contents.leaves[plan.sibling], decoded[plan.sibling]
        return leaves, plan, container.read_frame(self._source, entry, leaves[0].path), parent, sibling

    def _compare(self, number: int, computed: int) -> None:
        """Raise CorruptFrame unless a decoded leaf has the digest that was stored."""
        stored = self._contents.digests[number]
        if stored != computed:
            raise CorruptFrame(
                f"{self.name}: leaf {self._contents.leaves[number].path!r}: digest {stored:016x} stored, "
                f"{computed:016x} computed. Restore the file from another copy, "
                f"or list a store's intact steps: tricomp verify FOLDER."
            )

    def _parent_words(self, leaves: Sequence[Leaf], above: Mapping[str, tuple[Leaf, Words]]) -> Words:
        """The reference words of a frame's leaves, one after the other. Raises CorruptFile if they do not fit."""
        parts: list[Words] = []
        for leaf in leaves:
            found = above.get(leaf.path)
            self._require_parent(leaf, None if found is None else found[0])
            assert found is not None
            parts.append(found[1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _require_parent(self, leaf: Leaf, found: Leaf | None) -> None:
        """Raise CorruptFile unless the parent's leaf has the dtype and shape of this one."""
        if found is None or found.dtype != leaf.dtype or found.shape != leaf.shape:
            raise CorruptFile(
                f"{self.name}: leaf {leaf.path!r}: its parent has "
                f"{'no such leaf' if found is None else f'{found.dtype.name}{list(found.shape)} there'}, "
                f"expected {leaf.dtype.name}{list(leaf.shape)}."
            )
