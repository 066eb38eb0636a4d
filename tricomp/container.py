"""The `.tri` file: header map, frames' bytes, index map, tail. Bytes only; never imports the codec.

The hard thing: the file is written in one pass, append-only, and must be known as cut wherever it is cut. So the tail,
of fixed size, comes last and holds where the index begins and the checksums of header, index and itself. Frames stand
in a row without gaps, so their offsets are sums of sizes and cannot overlap or point outside.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import msgpack
import xxhash

from tricomp import bounds, dtypes, tail, tree
from tricomp.bounds import Bytes, Limits
from tricomp.errors import CorruptFile, CorruptFrame, InvalidArgument, UnsupportedVersion
from tricomp.layout import Leaf, is_shape
from tricomp.plan import Frame
from tricomp.storage import Source

FORMAT, START = tail.FORMAT, tail.START
MAGIC, TAIL_BYTES, _TAIL = tail.MAGIC, tail.TAIL_BYTES, tail.FIELDS
VERSION = "0.7.0"
# Frozen since format 1.
MAX_BIN_BYTES = (1 << 30) - 1
_ADVICE = "Restore it from another copy, or list a store's intact steps: tricomp verify FOLDER."


@dataclass(frozen=True)
class Summary:
    """What a chain needs of a file, and where the rest stands. content_id, parent: 16 bytes.

    since_keyframe: checkpoints since the last one that stands alone; 0 for one that does.
    """

    writer: str
    content_id: bytes
    parent: bytes | None
    since_keyframe: int
    metadata: dict[str, Any]
    header: dict[str, Any]
    header_bytes: int
    index_offset: int
    index: Bytes


@dataclass(frozen=True)
class Entry:
    """One frame in the index: leaf numbers, where its bins begin in the file, sizes of their contents, plan as a map,
    xxh3-64 of the contents together."""

    leaves: tuple[int, ...]
    offset: int
    sizes: tuple[int, ...]
    plan: Any
    check: int

    @property
    def n_bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Contents:
    """Everything in a file but the frames' bytes. structure: msgpack of the tree. digests: u64 of each leaf."""

    summary: Summary
    structure: bytes
    leaves: tuple[Leaf, ...]
    frames: tuple[Entry, ...]
    digests: tuple[int, ...]


def check_of(data: Bytes) -> int:
    """xxh3-64 of data."""
    return xxhash.xxh3_64_intdigest(data)


def content_id(structure: bytes, leaves: Sequence[Leaf], digests: Sequence[int]) -> bytes:
    """16 bytes that name the decoded content, however it was coded: xxh3-128 of structure, leaf table and digests."""
    table = _leaf_table(leaves)
    state = xxhash.xxh3_128()
    for part in (structure, table, struct.pack(f"<{len(digests)}Q", *digests)):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


class Writing:
    """One file being written: the pieces of bytes in order, and afterwards what was written.

    structure, leaves: of the tree, see tree.flatten. parent: content id of the reference. metadata: plain values.
    """

    def __init__(
        self,
        structure: bytes,
        leaves: Sequence[Leaf],
        parent: bytes | None = None,
        since_keyframe: int = 0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.structure, self.leaves, self.parent = structure, tuple(leaves), parent
        for leaf in self.leaves:
            if not is_shape(leaf.shape):
                raise InvalidArgument(
                    f"leaf {leaf.path!r}: shape {list(leaf.shape)}: its sizes multiply to 2^59 or more. Drop the leaf."
                )
        self.entries: list[Entry] = []
        self.digests: list[int] = [0] * len(self.leaves)
        self.content_id = b""
        self.n_bytes = 0
        header = {
            "tricomp": FORMAT,
            "writer": f"tricomp {VERSION}",
            "parent": parent,
            "since_keyframe": since_keyframe,
            "metadata": tree.plain(metadata or {}),
            "tree": bounds.pack_table(structure),
            "leaves": bounds.pack_table(_leaf_table(self.leaves)),
        }
        self._header: bytes = msgpack.packb(header)
        bounds.DEFAULTS.check("max_header_bytes", len(self._header), "header (tree and metadata)")

    def pieces(self, frames: Iterable[Frame]) -> Iterator[Bytes]:
        """The bytes of the file, piece by piece, while frames come. Raises what frames raises, InvalidArgument."""
        yield self._header
        offset = len(self._header)
        missing = set(range(len(self.leaves)))
        for frame in frames:
            if not missing.issuperset(frame.leaves):
                raise InvalidArgument(f"frame of leaves {frame.leaves}: one was written already, or is not of the tree")
            missing.difference_update(frame.leaves)
            for number, digest in zip(frame.leaves, frame.digests, strict=True):
                self.digests[number] = digest
            sizes, check, begin = bin_sizes(frame.n_bytes), xxhash.xxh3_64(), offset
            for piece in in_bins(_checked(frame.pieces(), check), sizes):
                yield piece
                offset += len(piece)
            self.entries.append(Entry(frame.leaves, begin, sizes, frame.plan.to_wire(), check.intdigest()))
        if missing:
            raise InvalidArgument(f"leaf {self.leaves[min(missing)].path!r}: no frame came for it")
        index = self._index()
        yield index
        self.content_id = content_id(self.structure, self.leaves, self.digests)
        end = _tail(self._header, offset, index, self.content_id)
        yield end
        self.n_bytes = offset + len(index) + len(end)

    def _index(self) -> bytes:
        table = [
            [list(_steps(numbers)) for numbers in _rebased([entry.leaves for entry in self.entries])],
            [list(entry.sizes) for entry in self.entries],
            [entry.plan for entry in self.entries],
        ]
        index = {
            "frames": bounds.pack_table(msgpack.packb(table)),
            "checks": struct.pack(f"<{len(self.entries)}Q", *(entry.check for entry in self.entries)),
            "digests": struct.pack(f"<{len(self.digests)}Q", *self.digests),
        }
        packed: bytes = msgpack.packb(index)
        bounds.DEFAULTS.check("max_index_bytes", len(packed), "index")
        return packed


def bin_start(n_bytes: int) -> bytes:
    """The bytes before the contents of a msgpack bin, in their shortest form."""
    if n_bytes < 1 << 8:
        return b"\xc4" + n_bytes.to_bytes(1, "big")
    if n_bytes < 1 << 16:
        return b"\xc5" + n_bytes.to_bytes(2, "big")
    return b"\xc6" + n_bytes.to_bytes(4, "big")


def bin_sizes(n_bytes: int) -> tuple[int, ...]:
    """Sizes of the contents of the bins that a frame of so many bytes is cut into: at least one."""
    n_full, rest = divmod(n_bytes, MAX_BIN_BYTES)
    return (MAX_BIN_BYTES,) * n_full + ((rest,) if rest or not n_full else ())


def in_bins(pieces: Iterable[Bytes], sizes: Sequence[int]) -> Iterator[Bytes]:
    """Pieces as the contents of msgpack bins of these sizes, each begun as a bin."""
    waiting = iter(sizes)
    left = next(waiting)
    yield bin_start(left)
    for piece in pieces:
        if len(piece) <= left:
            yield piece
            left -= len(piece)
            continue
        view = memoryview(piece)
        while len(view):
            if not left:
                left = next(waiting)
                yield bin_start(left)
            part = view[:left]
            yield part
            view, left = view[len(part) :], left - len(part)


def _checked(pieces: Iterable[Bytes], check: xxhash.xxh3_64) -> Iterator[Bytes]:
    """Pieces as they come, each taken into a checksum."""
    for piece in pieces:
        check.update(piece)
        yield piece


def _tail(header: bytes, index_offset: int, index: bytes, content: bytes) -> bytes:
    start = tail.TAIL_START
    fields = _TAIL.pack(len(header), check_of(header), index_offset, len(index), check_of(index), content)
    return start + fields + check_of(start + fields).to_bytes(8, "little") + MAGIC


def read_summary(source: Source, limits: Limits = bounds.DEFAULTS) -> Summary:
    """Header, index and tail of a file, their checksums compared. Raises CorruptFile, UnsupportedVersion."""
    name, n_bytes = source.name, source.n_bytes
    _check_start(source)
    if n_bytes < TAIL_BYTES:
        raise CorruptFile(f"{name}: is cut: {n_bytes} bytes, and the smallest file has more. {_ADVICE}")
    end = bytes(source.read(n_bytes - TAIL_BYTES, TAIL_BYTES))
    if not end.endswith(MAGIC) or not end.startswith(tail.TAIL_START):
        raise CorruptFile(
            f"{name}: its last {TAIL_BYTES} bytes are no tail: it was cut at {n_bytes} bytes, "
            f"or something was appended to it. {_ADVICE}"
        )
    body = end[: 2 + _TAIL.size]
    _compare(name, "tail", int.from_bytes(end[len(body) : len(body) + 8], "little"), check_of(body))
    header_bytes, header_check, index_offset, index_bytes, index_check, content = _TAIL.unpack(body[2:])
    if not 0 < header_bytes <= index_offset or index_offset + index_bytes + TAIL_BYTES != n_bytes:
        raise CorruptFile(
            f"{name}: its tail tells of header {header_bytes}, index at {index_offset} with {index_bytes} bytes, "
            f"but the file has {n_bytes} bytes: it was cut or joined. {_ADVICE}"
        )
    limits.check("max_header_bytes", header_bytes, f"{name}: header")
    limits.check("max_index_bytes", index_bytes, f"{name}: index")
    packed = source.read(0, header_bytes)
    _compare(name, "header", header_check, check_of(packed))
    index = source.read(index_offset, index_bytes)
    _compare(name, "index", index_check, check_of(index))
    header = _map(bounds.unpack(packed, f"{name}: header"), f"{name}: header", "writer tree leaves metadata")
    parent, since, writer = header.get("parent"), header.get("since_keyframe", 0), header["writer"]
    is_parent = parent is None or (isinstance(parent, bytes) and len(parent) == 16)
    if not is_parent or type(since) is not int or since < 0 or not isinstance(writer, str):
        raise CorruptFile(f"{name}: header: parent, since_keyframe or writer is of the wrong kind. {_ADVICE}")
    metadata = tree.from_plain(header["metadata"], f"{name}: metadata", limits)
    if not isinstance(metadata, dict):
        raise CorruptFile(f"{name}: metadata is a {type(metadata).__name__}, not a map. {_ADVICE}")
    return Summary(writer, content, parent, since, metadata, header, header_bytes, index_offset, index)


def read(source: Source, limits: Limits = bounds.DEFAULTS) -> Contents:
    """Everything but the frames. Raises CorruptFile, UnsupportedVersion, UnsupportedDtype, LimitExceeded."""
    summary, name = read_summary(source, limits), source.name
    structure = bounds.unpack_table(summary.header["tree"], limits, f"{name}: tree")
    paths = tree.paths_of(structure, limits, f"{name}: tree")
    limits.check("max_leaves", len(paths), f"{name}: tree")
    if len(set(paths)) != len(paths):
        raise CorruptFile(f"{name}: a leaf path appears twice. {_ADVICE}")
    table = bounds.unpack_table(summary.header["leaves"], limits, f"{name}: leaves")
    leaves = _leaves(bounds.unpack(table, f"{name}: leaves"), paths, limits, f"{name}: leaves")
    index = _map(bounds.unpack(summary.index, f"{name}: index"), f"{name}: index", "frames checks digests")
    digests = _u64s(index["digests"], len(leaves), f"{name}: digests")
    frames = bounds.unpack_table(index["frames"], limits, f"{name}: frames")
    entries = _entries(bounds.unpack(frames, f"{name}: frames"), index["checks"], summary, len(leaves), name)
    if content_id(structure, leaves, digests) != summary.content_id:
        raise CorruptFile(f"{name}: its content id is not that of its tree, leaves and digests. {_ADVICE}")
    return Contents(summary, structure, leaves, entries, digests)


def read_frame(source: Source, entry: Entry, leaf: str, is_checked: bool = True) -> Bytes:
    """The bytes of one frame; a view of the file where it stands in one bin. Raises CorruptFrame.

    is_checked: the frame's checksum is compared; whoever decodes all of it compares others, and can do without.
    """
    parts: list[Bytes] = []
    offset = entry.offset
    for size in entry.sizes:
        n_start = len(bin_start(size))
        found = source.read(offset, n_start + size)
        _check_bin(source, offset, size, found, leaf)
        parts.append(memoryview(found)[n_start:])
        offset += len(found)
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    if is_checked:
        computed = check_of(data)
        if computed != entry.check:
            raise CorruptFrame(
                f"{source.name}: frame of leaf {leaf!r}: checksum {entry.check:016x} stored, {computed:016x} computed. "
                f"{_ADVICE}"
            )
    return data


def check_bins(source: Source, entry: Entry, leaf: str) -> None:
    """Compare the few bytes around a frame that none of its checksums covers. Raises CorruptFrame."""
    offset = entry.offset
    for size in entry.sizes:
        n_start = len(bin_start(size))
        _check_bin(source, offset, size, source.read(offset, n_start), leaf)
        offset += n_start + size


def _check_bin(source: Source, offset: int, size: int, found: Bytes, leaf: str) -> None:
    """Raise CorruptFrame unless what was found at an offset begins as a bin of that size."""
    start = bin_start(size)
    if bytes(found[: len(start)]) != start:
        raise CorruptFrame(f"{source.name}: leaf {leaf!r}: no frame begins at byte {offset}. {_ADVICE}")


class FrameBytes:
    """The bytes of one frame, read as slices of them are taken; nothing is compared with the frame's checksum."""

    def __init__(self, source: Source, entry: Entry) -> None:
        self._source = source
        self._bins: list[tuple[int, int, int]] = []  # first byte in the frame, in the file, size
        first, offset = 0, entry.offset
        for size in entry.sizes:
            offset += len(bin_start(size))
            self._bins.append((first, offset, size))
            first, offset = first + size, offset + size
        self._n_bytes = first

    def __len__(self) -> int:
        return self._n_bytes

    def __getitem__(self, part: slice, /) -> Bytes:
        start, stop, _ = part.indices(self._n_bytes)
        parts: list[Bytes] = []
        for first, offset, size in self._bins:
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                parts.append(self._source.read(offset + low, high - low))
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _check_start(source: Source) -> None:
    """Raise unless the file begins as a file of format 1, or as the beginning of one."""
    name, head = source.name, bytes(source.read(0, min(source.n_bytes, 10)))
    if not head:
        raise CorruptFile(f"{name}: is empty (0 bytes). {_ADVICE}")
    if not 0x80 <= head[0] <= 0x8F or head[1:9] != START[: max(len(head) - 1, 0)]:
        raise CorruptFile(
            f"{name}: is not a tricomp file: it begins with {head!r}. For tensor files of other formats there are "
            "tricomp compress and tricomp.formats.read."
        )
    if len(head) == 10 and head[9] != FORMAT:
        version = str(head[9]) if head[9] < 0x80 else "above 127"
        if version == "0":
            raise CorruptFile(f"{name}: header: there is no format 0. {_ADVICE}")
        raise UnsupportedVersion(
            f"{name}: was written by format {version}; this tricomp reads {FORMAT}. Upgrade tricomp to read it."
        )


def _compare(name: str, what: str, stored: int, computed: int) -> None:
    if stored != computed:
        raise CorruptFile(f"{name}: {what}: checksum {stored:016x} stored, {computed:016x} computed. {_ADVICE}")


def _map(found: Any, what: str, keys: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(key in found for key in keys.split()):
        raise CorruptFile(f"{what}: expected a map with {keys}. {_ADVICE}")
    return found


def _leaf_table(leaves: Sequence[Leaf]) -> bytes:
    """msgpack of [dtype number of each leaf, distinct shapes, number of the shape of each leaf]."""
    shapes: dict[tuple[int, ...], int] = {}
    which = [shapes.setdefault(leaf.shape, len(shapes)) for leaf in leaves]
    packed: bytes = msgpack.packb([[leaf.dtype.number for leaf in leaves], list(map(list, shapes)), which])
    return packed


def _ints(found: Any, what: str, low: int = 0, high: int = 1 << 63) -> list[int]:
    if not isinstance(found, list) or not all(type(value) is int and low <= value < high for value in found):
        raise CorruptFile(f"{what}: expected an array of integers from {low} to below {high}. {_ADVICE}")
    return found


def _u64s(found: Any, n: int, what: str) -> tuple[int, ...]:
    if not isinstance(found, bytes) or len(found) != 8 * n:
        raise CorruptFile(f"{what}: expected {8 * n} bytes. {_ADVICE}")
    return struct.unpack(f"<{n}Q", found)


def _columns(found: Any, n: int, what: str) -> list[list[Any]]:
    if not isinstance(found, list) or len(found) != n or not all(isinstance(column, list) for column in found):
        raise CorruptFile(f"{what}: expected {n} columns. {_ADVICE}")
    return found


def _leaves(found: Any, paths: Sequence[str], limits: Limits, what: str) -> tuple[Leaf, ...]:
    numbers, shapes, which = _columns(found, 3, what)
    if len(numbers) != len(paths) or len(which) != len(paths):
        raise CorruptFile(f"{what}: {len(numbers)} dtypes and {len(which)} shapes for {len(paths)} leaves. {_ADVICE}")
    known: list[tuple[int, ...]] = []
    for shape in shapes:
        known.append(tuple(_ints(shape, what)))
        limits.check("max_dimensions", len(shape), what)
        if not is_shape(known[-1]):
            raise CorruptFile(f"{what}: a leaf of shape {known[-1]}. {_ADVICE}")
    chosen = _ints(which, what, high=len(known))
    return tuple(
        Leaf(path, dtypes.by_number(number, path), known[shape])
        for path, number, shape in zip(paths, _ints(numbers, what), chosen, strict=True)
    )


def _rebased(groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Each group of leaf numbers with the number before it in front: the last of the group before; -1 at first."""
    last = -1
    for group in groups:
        yield [last, *group]
        last = group[-1] if group else last


def _steps(numbers: Sequence[int]) -> Iterator[int]:
    """Differences of neighbours: in a file, almost all are 1, and deflate to nothing."""
    return (b - a for a, b in pairwise(numbers))


def _entries(found: Any, checks: Any, summary: Summary, n_leaves: int, name: str) -> tuple[Entry, ...]:
    what = f"{name}: frames"
    steps, sizes, plans = _columns(found, 3, what)
    if not len(steps) == len(sizes) == len(plans):
        raise CorruptFile(f"{what}: columns of {len(steps)}, {len(sizes)} and {len(plans)} frames. {_ADVICE}")
    entries: list[Entry] = []
    last, offset = -1, summary.header_bytes
    rows = zip(steps, sizes, plans, _u64s(checks, len(steps), f"{name}: checks"), strict=True)
    for differences, parts, plan, check in rows:
        numbers = tuple(accumulate(_ints(differences, what, -(1 << 32), 1 << 32), initial=last))[1:]
        if not numbers or not _ints(parts, what, high=MAX_BIN_BYTES + 1):
            raise CorruptFile(f"{what}: a frame without leaves or without bytes. {_ADVICE}")
        entries.append(Entry(numbers, offset, tuple(parts), plan, check))
        offset += sum(len(bin_start(size)) + size for size in parts)
        last = numbers[-1]
    if offset != summary.index_offset:
        raise CorruptFile(f"{what}: end at byte {offset}, but the index begins at {summary.index_offset}. {_ADVICE}")
    if sorted(number for entry in entries for number in entry.leaves) != list(range(n_leaves)):
        raise CorruptFile(f"{what}: a leaf has two frames or none, or is not of the tree. {_ADVICE}")
    return tuple(entries)
