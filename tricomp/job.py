"""What the codec hands to a backend and gets back: jobs, the Side of a frame, encoded frames. Imports ground and numpy.

Every backend takes and gives these, so that none imports another. The hard thing: they hold data alone; what the data
means is FORMAT.md's, and each backend's own business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from tricomp.bounds import Bytes, Cut
from tricomp.dtypes import DType, Words
from tricomp.plan import Plan, Spec

Array = np.ndarray[Any, Any]
Found = TypeVar("Found", covariant=True)


class Later(Protocol[Found]):
    """Work that a backend has begun, on a device maybe. Its result is waited for, and asked for once."""

    def result(self) -> Found: ...


class Coding(Later[Found], Protocol[Found]):
    """The same of what has bytes. fetch: wait until some are there to cross to the host, and start that."""

    def fetch(self) -> None: ...


@dataclass(frozen=True)
class Tables:
    """Frequency tables of several contexts, one after the other.

    freqs: int64[n_tables, n_symbols], each row sums to 2^prob_bits; a symbol of frequency 0 cannot be coded.
    """

    freqs: Array
    prob_bits: int

    def favourites(self) -> Array:
        """int64[n_tables]: the most frequent symbol of each table, lowest first; stands in for patched words."""
        return np.asarray(np.argmax(self.freqs, axis=1))


@dataclass(frozen=True)
class Scales:
    """Vectors of the scale model or of the factors. rows: int16 or uint16[n_rows]; columns: [n_columns] or None."""

    rows: Array = field(default_factory=lambda: np.zeros(0, np.int16))
    columns: Array | None = None


@dataclass(frozen=True)
class Side:
    """What the decoder needs beside the Plan.

    tables: of the symbols, one row a context, None unless rANS. plane_tables: of each coded plane, by plane number.
    dictionary: uint8, ascending symbols, for `index`. palette: uint, ascending words. scales: see Scales.
    """

    tables: Tables | None = None
    plane_tables: dict[int, Tables] = field(default_factory=dict)
    dictionary: Array = field(default_factory=lambda: np.zeros(0, np.uint8))
    palette: Array = field(default_factory=lambda: np.zeros(0, np.uint8))
    scales: Scales = field(default_factory=Scales)


@dataclass(frozen=True)
class Lattice:
    """Places in a frame: the words at rows[i] * n_columns + columns[j], row by row. rows, columns: int64[...].

    use: what the planner reads it for, a number of its own.
    has_reference: the reference's words at the same places are wanted too. is_mean: of each row no words are wanted but
    an int16, the mean of the octaves of its words that are not zero. An octave counts eighths: all bits but the sign,
    M - 3 bits shifted down (or 3 - M up), of M mantissa bits. Of n words: floor((2 * sum + n) / (2 * n)); of none: -1.
    """

    use: int
    rows: Array
    columns: Array
    n_columns: int
    has_reference: bool
    is_mean: bool

    @property
    def n_words(self) -> int:
        """Words that are looked at."""
        return len(self.rows) * len(self.columns)

    @property
    def n_wanted(self) -> int:
        """Numbers that are gathered: words or means."""
        return len(self.rows) if self.is_mean else self.n_words


@dataclass(frozen=True)
class Facts:
    """What was counted over a whole frame.

    first: its first word, 0 where it has none. n_unlike_first: words that differ from that one. n_unlike_reference:
    words that differ from the reference at the same place; None: there is no reference. joined: OR of all words.
    """

    first: int
    n_unlike_first: int
    n_unlike_reference: int | None
    joined: int

    @property
    def is_exact(self) -> bool:
        """Whether the frame is constant or equal to its reference: then its plan needs no lattice."""
        return self.n_unlike_first == 0 or self.n_unlike_reference == 0


@dataclass(frozen=True)
class Gathered:
    """A frame whose words are elsewhere: what its plan is made from.

    shape: of the leaf; None for several small ones. words, reference: what each lattice wants, of dtype.word_dtype or
    int16; None in reference where a lattice has none. lattices may be empty where the facts are exact. reference: None
    where there is none. n_unlike_commonest: words that differ from the one that the planner found worth counting; None
    where there is none.
    """

    n_words: int
    dtype: DType
    shape: Sequence[int] | None
    spec: Spec
    keep_mantissa_bits: int | None
    facts: Facts
    lattices: Sequence[Lattice]
    words: Sequence[Array]
    reference: Sequence[Array | None] | None = None
    n_unlike_commonest: int | None = None

    def extended(
        self, lattices: Sequence[Lattice], words: Sequence[Array], reference: Sequence[Array | None] | None = None
    ) -> Gathered:
        """The same with more lattices, and what they want."""
        old = None if self.reference is None else (*self.reference, *(reference or [None] * len(words)))
        return replace(self, lattices=(*self.lattices, *lattices), words=(*self.words, *words), reference=old)


@dataclass(frozen=True)
class EncodeJob:
    """One frame to encode. words, reference: uint[n_words]. For `cast`: source is the dtype of the reference.

    wants_reference_sum: see Encoded. digest_sum, reference_sum: as there, where planning has told them.
    """

    plan: Plan
    side: Side
    words: Words
    reference: Words | None = None
    source: DType | None = None
    wants_reference_sum: bool = False
    digest_sum: int | None = None
    reference_sum: int | None = None


class Compared(NamedTuple):
    """Whether words are those they were compared with, False where there were none; and what they add to a digest.

    digest_sum: see Encoded, None where the backend did not take it on the way.
    """

    is_equal: bool
    digest_sum: int | None = None


class Room(Protocol):
    """Where the payloads of a frame wait until its head is known. A list is one."""

    def append(self, piece: Bytes, /) -> None: ...

    def __iter__(self) -> Iterator[Bytes]: ...


@dataclass(frozen=True)
class Encoded:
    """A frame's data in pieces, and its plan, completed by side_bytes and side_check.

    digest_sum: what the words add to the digest of the frame's one leaf, see digest_end, where the backend took it on
    the way; reference_sum: what the reference adds to its own, where the job wanted it too.
    """

    plan: Plan
    n_bytes: int
    head: bytes
    payloads: Iterable[Bytes]
    digest_sum: int | None = None
    reference_sum: int | None = None

    def pieces(self) -> Iterator[Bytes]:
        """The data in order."""
        if self.head:
            yield self.head
        yield from self.payloads

    @property
    def data(self) -> bytes:
        """All of the data at once."""
        return b"".join(self.pieces())


@dataclass(frozen=True)
class DecodeJob:
    """One frame to decode, or the words [start, stop) of it. For `cast`: source is the reference's dtype.

    reference: uint[stop - start] as the plan asks. start: of a chunk; stop: of one, or the frame's end; None: the end.
    name: what errors call the frame, a leaf's path. leaf_words: of each leaf, where a whole frame has several.
    wants_reference_sum: see Summed. is_checked: whoever asks compares a checksum of all of data, so those of its chunks
    are left alone.
    """

    plan: Plan
    data: bytes | memoryview | Cut
    reference: Words | None = None
    source: DType | None = None
    name: str = "array"
    start: int = 0
    stop: int | None = None
    leaf_words: Sequence[int] = ()
    wants_reference_sum: bool = False
    is_checked: bool = False

    @property
    def end(self) -> int:
        return self.plan.n_words if self.stop is None else self.stop

    @property
    def cut(self) -> memoryview | Cut:
        """The frame's bytes, to be sliced."""
        return memoryview(self.data).cast("B") if isinstance(self.data, bytes | memoryview) else self.data


class Summed(NamedTuple):
    """Decoded words, and what they add to the digest of the frame's one leaf, see digest_end.

    reference_sum: what the reference adds to its own digest, where the job wanted it. leaf_sums: what each leaf adds to
    its digest, where the frame has several and the backend took them on the way.
    """

    words: Words
    digest_sum: int
    reference_sum: int | None = None
    leaf_sums: Sequence[int] | None = None
