"""Where a `.tri` file's leaves came from: files of other formats, and how to rebuild them byte for byte.

A file is leaves' bytes in spans and, around them, its *skeleton*; the metadata key "origin" holds the skeletons. Knows no
format and no framework. The hard thing: 100,000 spans must cost next to nothing, so they are columns of differences that
are zero for any tidy file, deflated; and what is read back is hostile until it is checked against the file's leaves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tricomp import bounds
from tricomp import tree as trees
from tricomp.bounds import Bytes, Limits
from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.storage import Source

if TYPE_CHECKING:
    from tricomp.file import File

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Span:
    """Where a leaf's bytes stand in a file: offset and n_bytes.

    axes: leaf.transpose(axes), in C order, is what stands there; None: the leaf itself. is_swapped: big-endian there.
    start: the span holds the leaf's bytes [start, start + n_bytes), in the leaf's own order (then axes is None).
    """

    leaf: str
    offset: int
    n_bytes: int
    axes: tuple[int, ...] | None = None
    is_swapped: bool = False
    start: int = 0


@dataclass(frozen=True)
class TensorFile:
    """A file of another format, opened: its tree of numpy arrays (views of the mapped file) and plain values.

    name: without folders. n_bytes: of the file, or of all parts. spans: where leaves of the tree stand, in any order, so
    that the file can be rebuilt byte for byte; None: only an equal one can be written. metadata: further keys for the
    `.tri` file's metadata (an adapter's notes; not "origin"). source: the file's bytes. parts: the shards, when this is
    an index of several files; their leaves are leaves of this tree. A context manager.
    """

    name: str
    format: str
    tree: Any
    n_bytes: int
    spans: tuple[Span, ...] | None
    source: Source
    metadata: dict[str, Any] = field(default_factory=dict)
    parts: tuple[TensorFile, ...] = ()

    def origins(self) -> list[Origin]:
        """The Origin of this file, then of its parts."""
        raise NotImplementedError

    def to_metadata(self) -> dict[str, Any]:
        """What a `.tri` file of this tree takes as metadata: the adapter's notes, and "origin"."""
        return {**self.metadata, "origin": [origin.to_metadata() for origin in self.origins()]}

    def close(self) -> None:
        """Let go of the file; arrays that still view it keep it mapped."""
        self.source.close()
        for part in self.parts:
            part.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Origin:
    """One file that leaves came from. spans: None if only an equal file can be written (by the format's writer)."""

    format: str
    name: str
    n_bytes: int
    spans: tuple[Span, ...] | None
    skeleton: bytes = b""

    @classmethod
    def of(cls, opened: TensorFile, data: Source | None = None) -> Origin:
        """The Origin of an opened file. data: its bytes, if they are not opened.source."""
        raise NotImplementedError

    def to_metadata(self) -> dict[str, Any]:
        """Plain values for a file's metadata."""
        raise NotImplementedError

    @classmethod
    def from_metadata(cls, packed: Any, file: File, limits: Limits = bounds.DEFAULTS) -> Origin:
        """One entry of metadata["origin"], checked against the leaves of its file. Raises CorruptFile, LimitExceeded."""
        raise NotImplementedError

    def pieces(self, file: File) -> Iterator[Bytes]:
        """The original file's bytes, a few MB at a time. Raises InvalidArgument if it cannot be rebuilt exactly."""
        raise NotImplementedError
