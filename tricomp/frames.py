"""Frames: the leaves of one file, decoded along its chain, whole or in parts. Container plus codec, behind File.

The hard thing: a delta's leaf needs the same leaf of its parent, which may need its own parent's. Frames are therefore
gathered from the file down to the keyframe first and decoded on the way back, frame by frame, without recursion. And
of a leaf of many GB, some chunks alone: those that are asked for, at every level of the chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from tricomp import codec, container
from tricomp.bounds import Limits
from tricomp.codec import Engine, StoredFrame
from tricomp.container import Contents, Entry
from tricomp.content import Content
from tricomp.dtypes import Words, from_words
from tricomp.errors import CorruptFile, CorruptFrame, LimitExceeded, WrongReference
from tricomp.layout import DeviceArray, Leaf
from tricomp.plan import MAX_CHUNK_LOG2, Plan
from tricomp.reuse import Reuse
from tricomp.storage import Source

Array = np.ndarray[Any, Any]
_BATCH_WORDS = 8 << 20  # decoded together, so that the codec has enough to do at a time
_THREAD_WORDS = 1 << 20  # words of a batch that keep one thread busy: batches are larger for many threads
_ROW_BITS = 8 * 512  # of a row of the digest: parts of a leaf that has no chunks begin at rows
_LARGE_BYTES = 4 << 20  # a backend may take as much more, to have words begin at a large page
_CACHED_FRAMES = 128  # of several small leaves each, so at most 128 x 65,536 words


class Frames:
    """The frames of one open file. Leaves go by their numbers.

    contents: all of the file but the frames' bytes. index: path to number of leaf. frame_of: number of leaf to entry.
    """

    def __init__(self, source: Source, reference: Frames | Content | None, limits: Limits, engine: Engine) -> None:
        """reference: what the file was coded against. Raises CorruptFile, UnsupportedVersion, LimitExceeded."""
        self.name, self.engine = source.name, engine
        self.source, self.limits, self.reference = source, limits, reference
        self.contents: Contents = container.read(source, limits)
        self.index = {leaf.path: number for number, leaf in enumerate(self.contents.leaves)}
        self.frame_of = {number: entry for entry in self.contents.frames for number in entry.leaves}
        self.plans: dict[int, Plan] = {}
        self.cache: OrderedDict[int, dict[int, Words]] = OrderedDict()  # by first leaf of a shared frame
        self.targets: Mapping[int, Words] = {}  # where to decode leaves to that have a frame of their own

    def at(self, device: Any, targets: Mapping[int, Words] | None = None) -> Frames:
        """The same frames, and those below them, decoded to a torch device. Their words are int tensors there.

        targets: by number of leaf, words to decode to, where it has a frame of its own. Raises BackendError where no
        backend works there.
        """
        there = copy(self)
        there.engine, there.cache = self.engine.at(device).there(), OrderedDict()
        there.targets = targets or {}
        if isinstance(self.reference, Frames):
            there.reference = self.reference.at(device)
        return there

    def plan(self, entry: Entry) -> Plan:
        """The Plan of a frame, checked against its leaves. Raises CorruptFrame, LimitExceeded."""
        first = entry.leaves[0]
        if first not in self.plans:
            leaves = [self.contents.leaves[number] for number in entry.leaves]
            plan = Plan.from_wire(entry.plan, leaves[0].path)
            n_words = sum(leaf.n_words for leaf in leaves)
            if plan.n_words != n_words or any(leaf.dtype != plan.dtype for leaf in leaves):
                raise CorruptFrame(
                    f"{self.name}: leaf {leaves[0].path!r}: its plan is for {plan.n_words} words of {plan.dtype.name}, "
                    f"its leaves have {n_words} of {leaves[0].dtype.name}."
                )
            self.limits.check("max_decoded_bytes", sum(leaf.n_bytes for leaf in leaves), f"leaf {leaves[0].path!r}")
            self.plans[first] = plan
        return self.plans[first]

    def array(self, number: int, words: Words) -> Array:
        """An array in memory of its own: no file, cache, reference or other leaf is reached through it."""
        leaf, entry = self.contents.leaves[number], self.frame_of[number]
        assert isinstance(words, np.ndarray)
        is_own = len(entry.leaves) == 1 and words.flags.writeable and _is_alone(words)
        return from_words(words if is_own else words.copy(), leaf.dtype, leaf.shape)

    def device_array(self, number: int, words: Any) -> DeviceArray:
        """The same of words on a device."""
        leaf, entry = self.contents.leaves[number], self.frame_of[number]
        return DeviceArray(leaf.dtype, leaf.shape, words if len(entry.leaves) == 1 else words.clone())

    def into(self, targets: Mapping[int, Words]) -> Frames:
        """The same frames, whose leaves are decoded to words that are there. targets: as of at, on the host."""
        there = copy(self)
        there.targets = targets
        return there

    def decode_all(self, numbers: Iterable[int], room: Reuse | None = None) -> dict[int, Words]:
        """Words of leaves by number, each frame decoded once.

        room: for leaves that have a frame of their own.
        """
        wanted = set(numbers)
        n_bytes = sum(self.contents.leaves[number].n_bytes for number in wanted)
        self.limits.check("max_decoded_bytes", n_bytes, f"{self.name}: leaves to load")
        done: dict[int, Words] = {}
        for words in self.stream(wanted, room):
            done.update(words)
        return done

    def stream(self, numbers: Iterable[int], room: Reuse | None = None) -> Iterator[dict[int, Words]]:
        """Words of leaves by number, batch by batch, each frame decoded once; what repeats a sibling comes after it.

        All plans are read before the first batch. While batches come, nobody may write to the words. room: as above.
        """
        wanted = set(numbers)
        groups = self._groups({self.frame_of[n].leaves[0]: self.frame_of[n] for n in sorted(wanted)})
        most_words = max(_BATCH_WORDS, _THREAD_WORDS * self.engine.n_threads)
        if self.engine.device is not None:
            most_words = self.engine.batch_words
        below = Reuse()
        batch: list[int] = []
        n_words = 0
        for group in groups:
            first: dict[int, Words] = {}  # kept until those are decoded that repeat it
            for entry in group:
                is_last = entry is group[-1]
                large = self._is_in_pieces(entry, most_words)
                if not large:
                    batch += entry.leaves
                    n_words += self.plan(entry).n_words
                    if n_words < most_words and not (is_last and group is groups[-1]):
                        continue
                words = self.decode(batch, first, room, below) if batch else {}
                if large:
                    batch += entry.leaves
                    words[entry.leaves[0]] = self._in_pieces(entry, most_words, room)
                first = {} if is_last else {number: words[number] for number in group[0].leaves}
                found = {number: words[number] for number in batch if number in wanted}
                batch, n_words = [], 0
                del words
                yield found
                del found

    def _is_in_pieces(self, entry: Entry, most_words: int) -> bool:
        """Whether a frame is so large that its parent's words should not be in memory as a whole."""
        plan = self.plan(entry)
        is_delta = plan.reference == "parent" and isinstance(self.reference, Frames)
        is_large = plan.n_words > most_words and len(entry.leaves) == 1 and self.engine.device is None
        return is_delta and is_large and (not plan.n_chunks or codec.head_bytes(plan) <= entry.n_bytes)

    def _in_pieces(self, entry: Entry, n_words: int, room: Reuse | None) -> Words:
        """The words of a frame of one leaf, decoded along the chain so many at a time."""
        (number,) = entry.leaves
        leaf = self.contents.leaves[number]
        words: Words | None = self.targets.get(number)
        if words is None:
            dtype = leaf.dtype.word_dtype
            words = np.empty(leaf.n_words, dtype) if room is None else room.array(leaf.n_words, dtype)
        total = 0
        size = -(-n_words >> MAX_CHUNK_LOG2) << MAX_CHUNK_LOG2
        for start in range(0, leaf.n_words, size):
            target = words[start : start + size]
            found, added = self.summed(number, range(start, start + len(target)), into=target)
            if found is not target:
                target[...] = found
            total += added
        self.compare(number, codec.digest_end(total, leaf.n_bytes))
        return words

    def _groups(self, frames: Mapping[int, Entry]) -> list[list[Entry]]:
        """Frames, by first leaf, in order; after each those that were coded against it."""
        groups: dict[int, list[Entry]] = {}
        followers: list[tuple[int, Entry]] = []
        for first, entry in frames.items():
            if self.plan(entry).reference == "sibling":
                other = self.frame_of[self._sibling(entry)].leaves[0]
                if other in frames:
                    followers.append((other, entry))
                    continue
            groups[first] = [entry]
        for other, entry in followers:
            groups[other].append(entry)
        return list(groups.values())

    def decode(
        self,
        numbers: Sequence[int],
        done: Mapping[int, Words] | None = None,
        room: Reuse | None = None,
        below: Reuse | None = None,
    ) -> dict[int, Words]:
        """Words of leaves by number, decoded along the chain of files. done: leaves of this file decoded before.

        room, below: for the words of this file, and for those of the files below it.
        """
        if len(numbers) == 1 and (held := self.cache.get(self.frame_of[numbers[0]].leaves[0])) is not None:
            self.cache.move_to_end(self.frame_of[numbers[0]].leaves[0])
            return {numbers[0]: held[numbers[0]]}  # not all of a frame for each of its thousands of leaves
        levels: list[tuple[Frames, list[Entry]]] = []
        frames, known = self, dict(done or {})
        words: dict[str, tuple[Leaf, Words]] = {}
        while numbers:
            entries = frames._entries_for(numbers, known if frames is self else {})
            levels.append((frames, entries))
            waiting = [entry for entry in entries if entry.leaves[0] not in frames.cache]
            needed = [n for entry in waiting if frames.plan(entry).reference == "parent" for n in entry.leaves]
            paths = [frames.contents.leaves[number].path for number in needed]
            if not paths:
                break
            above = frames._parent_for(paths[0])
            if isinstance(above, Content):
                words = {path: found for path in paths if (found := above.find(path)) is not None}
                break
            numbers = [above.index[path] for path in paths if path in above.index]
            frames = above
        for frames, entries in reversed(levels):
            decoded = dict(known) if frames is self else {}
            for is_sibling in (False, True):
                batch = [entry for entry in entries if (frames.plan(entry).reference == "sibling") == is_sibling]
                frames._decode_frames(batch, words, decoded, frames is self, room if frames is self else below)
            words = {frames.contents.leaves[n].path: (frames.contents.leaves[n], w) for n, w in decoded.items()}
        return decoded

    def find(self, path: str) -> tuple[Leaf, Words] | None:
        """Leaf and words of that path, or None: a codec's Reference."""
        number = self.index.get(path)
        if number is None:
            return None
        self.fill_cache(number)
        return self.contents.leaves[number], self.decode([number])[number]

    def find_all(self, paths: Sequence[str]) -> list[tuple[Leaf, Words] | None]:
        """What find gives for each path, decoded together."""
        numbers = {path: self.index[path] for path in paths if path in self.index}
        words = self.decode_all(numbers.values())
        return [(self.contents.leaves[n], words[n]) if (n := numbers.get(path)) is not None else None for path in paths]

    def parts(self, number: int, wanted: Sequence[range], parent: Words | None = None) -> list[Words]:
        """Words of a leaf, from the chunks that hold them alone, in this file and down its chain."""
        return [words for words, _ in self._parts(number, wanted, parent, None, is_summed=False)]

    def summed(
        self, number: int, part: range, parent: Words | None = None, into: Words | None = None
    ) -> tuple[Words, int]:
        """The same of one part, which begins and ends at a chunk or the leaf's end; and what it adds to the digest.

        into: room for the words, which is used where that saves a copy.
        """
        (found,) = self._parts(number, [part], parent, into, is_summed=True)
        return found

    def _parts(
        self, number: int, wanted: Sequence[range], parent: Words | None, into: Words | None, is_summed: bool
    ) -> list[tuple[Words, int]]:
        self.limits.check("max_decoded_bytes", sum(map(len, wanted)), f"{self.name}: words to decode")
        steps: list[tuple[Frames, int, Sequence[range], Sequence[range]]] = []  # words asked for; those of their chunks
        frames, sums = self, [0] * len(wanted)
        words: list[Words] | None = None
        source: Leaf | None = None
        while words is None:
            entry = frames.frame_of[number]
            plan, leaf = frames.plan(entry), frames.contents.leaves[number]
            if len(entry.leaves) > 1:
                whole = frames.decode([number])[number]
                words, source = [whole[part.start : part.stop].copy() for part in wanted], leaf
                if not steps and is_summed:
                    firsts = [part.start * whole.itemsize for part in wanted]
                    sums = self.engine.digest_sums(list(zip(words, firsts, strict=True)))
                break
            size = 1 << plan.chunk_log2 if plan.n_chunks else _ROW_BITS // plan.dtype.word_bits
            around = [
                range(part.start // size * size, min(-(-part.stop // size) * size, leaf.n_words)) for part in wanted
            ]
            steps.append((frames, number, wanted, around))
            wanted = around
            if plan.reference == "none":
                break
            if plan.reference == "sibling":
                number = frames._sibling(entry)
                continue
            if parent is not None and len(steps) == 1 and [len(parent)] == [len(part) for part in around]:
                words = [parent]
                break
            above = frames._parent_for(leaf.path)
            if isinstance(above, Content):
                found = above.find(leaf.path)
                whole = frames._parent_words([leaf], {leaf.path: found} if found else {})
                words = [whole[part.start : part.stop] for part in around]
            else:
                other = above.index.get(leaf.path)
                frames._require_parent(leaf, None if other is None else above.contents.leaves[other])
                assert other is not None
                frames, number = above, other
        while steps:
            frames, number, asked, held = steps.pop()
            room = None if steps or into is None else [into]
            decoded = frames._decode_parts(number, held, words, source, room)
            words = [
                part[inner.start - outer.start : inner.stop - outer.start]
                for (part, _), inner, outer in zip(decoded, asked, held, strict=True)
            ]
            sums = [total for _, total in decoded]
            source = frames.contents.leaves[number]
        assert words is not None  # there is at least one step, or a shared frame
        return list(zip(words, sums, strict=True))

    def fill_cache(self, number: int) -> None:
        """Decode the shared frame of a leaf, unless it is cached, and more such frames after it: it costs little."""
        entry = self.frame_of[number]
        if len(entry.leaves) > 1 and entry.leaves[0] not in self.cache:
            first = self.contents.frames.index(entry)
            following = [other for other in self.contents.frames[first:] if len(other.leaves) > 1]
            self.decode([number for other in following[: _CACHED_FRAMES // 2] for number in other.leaves])

    def compare(self, number: int, computed: int) -> None:
        """Raise CorruptFrame unless a decoded leaf has the digest that was stored."""
        stored = self.contents.digests[number]
        if stored != computed:
            raise CorruptFrame(
                f"{self.name}: leaf {self.contents.leaves[number].path!r}: digest {stored:016x} stored, "
                f"{computed:016x} computed. Restore the file from another copy, "
                f"or list a store's intact steps: tricomp verify FOLDER."
            )

    def _entries_for(self, numbers: Sequence[int], known: Mapping[int, Words]) -> list[Entry]:
        """The frames of leaves and of their siblings, but for siblings that are known."""
        wanted = {self.frame_of[number].leaves[0]: self.frame_of[number] for number in numbers}
        for entry in list(wanted.values()):
            plan = self.plan(entry)
            if plan.reference != "sibling" or plan.sibling in known:
                continue
            other = self.frame_of[self._sibling(entry)]
            wanted[other.leaves[0]] = other
        return list(wanted.values())

    def _decode_parts(
        self,
        number: int,
        parts: Sequence[range],
        references: Sequence[Words] | None,
        source: Leaf | None,
        into: Sequence[Words] | None,
    ) -> list[tuple[Words, int]]:
        """Some words of a leaf that has a frame of its own. references: these words of its parent or its sibling."""
        entry, leaf = self.frame_of[number], self.contents.leaves[number]
        plan = self.plan(entry)
        sibling = (source, np.empty(0)) if plan.reference == "sibling" and source is not None else None
        frame = StoredFrame([leaf], plan, container.FrameBytes(self.source, entry), None, sibling)
        try:
            return codec.decode_parts(frame, parts, references, self.engine, into)
        except MemoryError:
            raise LimitExceeded(
                f"{self.name}: no memory to decode {sum(map(len, parts))} words of {leaf.path!r}."
            ) from None
        except CorruptFrame as error:
            raise CorruptFrame(f"{self.name}: {error}") from error

    def _sibling(self, entry: Entry) -> int:
        """Number of the leaf that a frame was coded against. Raises CorruptFrame if it cannot be."""
        plan = self.plan(entry)
        if plan.sibling not in self.frame_of:
            raise CorruptFrame(f"{self.name}: leaf number {entry.leaves[0]} has a sibling that does not exist.")
        if self.plan(self.frame_of[plan.sibling]).reference == "sibling":
            raise CorruptFrame(f"{self.name}: leaf number {entry.leaves[0]} has a sibling that has a sibling.")
        return plan.sibling

    def _parent_for(self, path: str) -> Frames | Content:
        if self.reference is None:
            parent = self.contents.summary.parent
            raise WrongReference(
                f"{self.name}: leaf {path!r} was encoded against the checkpoint with content id "
                f"{parent.hex() if parent else None}, and no reference was given. "
                f"Pass reference=, or load it through tricomp.Store."
            )
        return self.reference

    def _decode_frames(
        self,
        entries: Sequence[Entry],
        above: Mapping[str, tuple[Leaf, Words]],
        decoded: dict[int, Words],
        is_asked: bool,
        room: Reuse | None,
    ) -> None:
        """Decode frames together and put their leaves' words into decoded. above: leaves of the parent, by path.

        is_asked: they are wanted for themselves, not for what is coded against them: those of small leaves are cached.
        """
        waiting: list[Entry] = []
        for entry in entries:
            if entry.leaves[0] in self.cache:
                self.cache.move_to_end(entry.leaves[0])
                decoded.update(self.cache[entry.leaves[0]])
            else:
                waiting.append(entry)
        into: list[Any] | None = None
        if self.targets:
            into = [self.targets.get(entry.leaves[0]) if len(entry.leaves) == 1 else None for entry in waiting]
        elif room is not None and self.engine.device is None:
            into = [self._room(entry, room) for entry in waiting]
        try:
            stored = [self._stored_frame(entry, above, decoded) for entry in waiting]
            found = codec.decode_many(stored, self.engine, into)
        except MemoryError:
            n_bytes = sum(self.contents.leaves[number].n_bytes for entry in waiting for number in entry.leaves)
            raise LimitExceeded(f"{self.name}: no memory to decode {n_bytes} bytes.") from None
        except CorruptFrame as error:
            if str(error).startswith(f"{self.name}: "):
                raise
            raise CorruptFrame(f"{self.name}: {error}") from error
        for entry, (words, digests, _) in zip(waiting, found, strict=True):
            for number, digest in zip(entry.leaves, digests, strict=True):
                self.compare(number, digest)
            decoded.update(zip(entry.leaves, words, strict=True))
            if len(words) > 1 and is_asked:
                self.cache[entry.leaves[0]] = dict(zip(entry.leaves, words, strict=True))
                if len(self.cache) > _CACHED_FRAMES:
                    self.cache.popitem(last=False)

    def _room(self, entry: Entry, room: Reuse) -> Words:
        """Where to decode a frame to; one of several leaves stays, so it gets memory of its own."""
        plan = self.plan(entry)
        dtype = plan.dtype.word_dtype
        return room.array(plan.n_words, dtype) if len(entry.leaves) == 1 else np.empty(plan.n_words, dtype)

    def _stored_frame(
        self, entry: Entry, above: Mapping[str, tuple[Leaf, Words]], decoded: Mapping[int, Words]
    ) -> StoredFrame:
        """What the codec needs to decode one frame. Its head and chunks have checksums, so its own is not compared."""
        plan = self.plan(entry)
        leaves = [self.contents.leaves[number] for number in entry.leaves]
        parent = self._parent_words(leaves, above) if plan.reference == "parent" else None
        sibling = None
        if plan.reference == "sibling":
            sibling = self.contents.leaves[plan.sibling], decoded[plan.sibling]
        data = container.read_frame(self.source, entry, leaves[0].path, is_checked=False)
        return StoredFrame(leaves, plan, data, parent, sibling)

    def _parent_words(self, leaves: Sequence[Leaf], above: Mapping[str, tuple[Leaf, Words]]) -> Words:
        """The reference words of a frame's leaves, one after the other. Raises CorruptFile if they do not fit."""
        parts: list[Words] = []
        for leaf in leaves:
            found = above.get(leaf.path)
            self._require_parent(leaf, None if found is None else found[0])
            assert found is not None
            parts.append(self.engine.adopted(found[1]))
        return parts[0] if len(parts) == 1 else self.engine.joined(parts)

    def _require_parent(self, leaf: Leaf, found: Leaf | None) -> None:
        """Raise CorruptFile unless the parent's leaf has the dtype and shape of this one."""
        if found is None or found.dtype != leaf.dtype or found.shape != leaf.shape:
            raise CorruptFile(
                f"{self.name}: leaf {leaf.path!r}: its parent has "
                f"{'no such leaf' if found is None else f'{found.dtype.name}{list(found.shape)} there'}, "
                f"expected {leaf.dtype.name}{list(leaf.shape)}."
            )


def _is_alone(words: Words) -> bool:
    """Whether little else than the words is in their memory: it is kept as long as they are."""
    return words.base is None or (
        type(words.base) is np.ndarray and words.base.flags.owndata and words.base.nbytes <= words.nbytes + _LARGE_BYTES
    )
