"""A file of a bucket, read in ranges: the Source of a far storage. Knows the tail of a file; imports errors and tail.

The hard thing: a request costs tens of milliseconds however small it is. So both ends of a file (tail, index, header)
come in at most three requests, two of them together; one leaf is one request for its bytes and no others; and only
who reads frame after frame gets ever longer stretches ahead of what was asked.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, StorageError
from tricomp.tail import Ends, ends_in

END_BYTES = 1 << 16  # of the end of a file, in the first request: holds the tail, most indexes, and a small file whole
PART_BYTES = 16 << 20  # a longer range is read in parts of this, together
_LONGEST_END = 1 << 28  # a header or index that claims more is left to who reads it and knows the limits
_FIRST_AHEAD, _MOST_AHEAD = 1 << 18, 8 << 20
_STREAMS = 16  # places where reading may go on, remembered

Range = tuple[int, int]
"""Offset and number of bytes."""
Fetch = Callable[[Sequence[Range]], list[bytes]]


class RangedFile:
    """A Source over an object of a bucket. name is for messages; fetch gets ranges of it, together where it can."""

    def __init__(
        self, name: str, n_bytes: int, fetch: Fetch, held: list[tuple[int, bytes]] | None = None, path: str = ""
    ) -> None:
        """held: offsets and bytes that are here already; what is fetched of the ends is added to it. path: there."""
        self.name, self.n_bytes, self.path = name, n_bytes, path
        self._fetch = fetch
        self._held = [] if held is None else held
        self._ends: Ends | None = None
        self._has_ends, self._is_open = False, True
        self._ahead: deque[tuple[int, bytes]] = deque(maxlen=4)
        self._streams: OrderedDict[int, int] = OrderedDict()  # where a read ended: bytes to read ahead from there

    def read(self, offset: int, n_bytes: int) -> Bytes:
        """These bytes. Raises CorruptFile when not all are in the file, MissingFile, StorageError."""
        if not self._is_open:
            raise InvalidArgument(f"{self.name}: is closed. Open it again.")
        if not 0 <= offset <= offset + n_bytes <= self.n_bytes:
            raise CorruptFile(f"{self.name}: bytes {offset}..{offset + n_bytes} of a file of {self.n_bytes} bytes.")
        self.fetch_ends()
        parts: list[Bytes] = []
        at, end = offset, offset + n_bytes
        while at < end:
            found = next((view for view in map(_view_of(at), (*self._held, *self._ahead)) if view is not None), None)
            part = self._next(at, end) if found is None else found[: end - at]
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Let go of what was read ahead."""
        self._is_open = False
        self._ahead.clear()

    @property
    def is_whole(self) -> bool:
        """Whether the file ends in a sound tail."""
        while self._ends is None and (wanted := self.wanted()[:1]):
            self.hold(wanted, self.ranges(wanted))
        return self._ends is not None

    def fetch_ends(self) -> None:
        """Get tail, header and index, if they are not here yet."""
        while not self._has_ends and (wanted := self.wanted()):
            self.hold(wanted, self.ranges(wanted))

    def wanted(self) -> list[Range]:
        """The ranges to get next of both ends of the file; none: all are here."""
        first = max(self.n_bytes - END_BYTES, 0)
        last = next((view for view in map(_view_of(first), self._held) if view is not None), None)
        if last is None and self.n_bytes:
            return [(first, self.n_bytes - first)]
        self._ends = None if last is None else ends_in(last, self.n_bytes)
        if self._ends is None:
            self._has_ends = True
            return []
        spans = [(0, self._ends.header_bytes), (self._ends.index_offset, self._ends.index_bytes)]
        missing = [
            (offset, min(n_bytes, first - offset))
            for offset, n_bytes in spans
            if offset < first and n_bytes <= _LONGEST_END and not any(map(_view_of(offset), self._held))
        ]
        self._has_ends = not missing
        return missing

    def hold(self, ranges: Sequence[Range], found: Sequence[bytes]) -> None:
        """Keep what came for these ranges."""
        self._held += [(offset, data) for (offset, _), data in zip(ranges, found, strict=True)]

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of these ranges, long ones in parts. Raises CorruptFile when fewer came, StorageError when more."""
        pieces = [
            (start, min(PART_BYTES, offset + n_bytes - start))
            for offset, n_bytes in ranges
            for start in range(offset, offset + n_bytes, PART_BYTES)
        ]
        came = iter(self._fetch(pieces))
        found = []
        for _, n_bytes in ranges:
            parts = [next(came) for _ in range(0, n_bytes, PART_BYTES)]
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            if len(data) > n_bytes:
                raise StorageError(
                    f"{self.name}: {len(data)} bytes came where {n_bytes} were asked for: its server does not serve "
                    "ranges. Download the file and open the copy."
                )
            if len(data) < n_bytes:
                raise CorruptFile(
                    f"{self.name}: {len(data)} bytes came where {n_bytes} were asked for: it was cut or replaced "
                    "while it was open. Open it again."
                )
            found.append(data)
        return found

    def _next(self, at: int, end: int) -> Bytes:
        """The bytes from at to end at the most; more are fetched, and kept, if it was read up to at before."""
        starts = [offset for offset, _ in self._held if offset > at]
        limit = min(starts, default=self.n_bytes)
        stop = min(end, limit)
        ahead = self._streams.pop(at, None)
        length = min(stop + (ahead or 0), limit) - at
        (data,) = self.ranges([(at, length)])
        self._streams[at + length] = 0 if ahead is None else min(max(2 * ahead, _FIRST_AHEAD), _MOST_AHEAD)
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        if length > stop - at:
            self._ahead.append((at, data))
        return memoryview(data)[: stop - at]


def _view_of(at: int) -> Callable[[tuple[int, bytes]], memoryview | None]:
    """From an offset and bytes to those of them from at on; None if at is not among them."""

    def view(block: tuple[int, bytes]) -> memoryview | None:
        offset, data = block
        return memoryview(data)[at - offset :] if offset <= at < offset + len(data) else None

    return view
