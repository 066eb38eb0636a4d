"""A tensor as publishing sees it: bytes with a dtype and a shape, read in parts, wherever it lives. Imports numpy only.

The hard thing: what differs from the last version is asked of the newer tensor, so that one in the memory of a GPU can
find it there (see the adapter) and nothing but its answer is copied. Ranges are of bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tricomp import dtypes
from tricomp.errors import InvalidArgument, UnsupportedNode
from tricomp.formats import header
from tricomp.formats.header_reader import METADATA
from tricomp.publishing.checksums import hasher
from tricomp.storage import Source

Array = np.ndarray[Any, Any]
PIECE_BYTES = 4 << 20  # looked at together: in a core's cache, and quick enough for zstd


class Tensor(ABC):
    """code: the dtype as safetensors names it. shape. n_bytes."""

    code: str
    shape: tuple[int, ...]
    n_bytes: int

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """Bytes [start, stop) on the host: uint8, to be looked at only."""

    @abstractmethod
    def leaf(self) -> Any:
        """The whole as a `.tri` file takes it: an array, or a DeviceArray."""

    def write(self, words: Array) -> None:
        """Replace the whole in place. words: uint8[n_bytes]. Raises InvalidArgument for what cannot be written to."""
        raise InvalidArgument(f"a {type(self).__name__} cannot be written to.")

    def xor(self, old: Tensor, start: int, stop: int) -> Array:
        """What differs from an older tensor of the same size: uint8 on the host."""
        return self.read(start, stop) ^ old.read(start, stop)

    def n_changed(self, old: Tensor, start: int, stop: int) -> int:
        """Bytes that differ."""
        return int(np.count_nonzero(self.read(start, stop) != old.read(start, stop)))

    def pieces(self) -> Iterator[Array]:
        """All bytes in order."""
        return (self.read(start, stop) for start, stop in ranges(self.n_bytes))

    def checksum(self, format: str) -> str:
        """The checksum of its bytes."""
        found = hasher(format)
        for piece in self.pieces():
            found.update(piece)
        return found.hexdigest()

    def copied(self) -> Tensor:
        """A copy on the host, which stays as it is."""
        return HostTensor(plain_copy(self.leaf()), "a copy")

    def take(self, other: Tensor) -> None:
        """Become a copy of another of the same kind. Only for what copied gave."""
        raise InvalidArgument(f"a {type(self).__name__} cannot be written to.")

    @property
    def address(self) -> int | None:
        """Where it begins in memory, to tell tensors that are tied; None: nothing is tied to it."""
        return None

    @property
    def kind(self) -> str:
        """Dtype and shape, for messages and to be compared."""
        return f"{self.code}{list(self.shape)}"


class HostTensor(Tensor):
    """A numpy array, of whatever strides and byte order; copied only if they are not the usual ones."""

    def __init__(self, array: Array, name: str) -> None:
        """Raises UnsupportedDtype, naming the tensor."""
        self._array = array
        self._bytes = dtypes.to_words(array, name).view(np.uint8)
        self.code = code_of(dtypes.of(array, name))
        self.shape, self.n_bytes = array.shape, self._bytes.nbytes

    def read(self, start: int, stop: int) -> Array:
        return self._bytes[start:stop]

    def leaf(self) -> Array:
        return self._array

    @property
    def address(self) -> int | None:
        return self._array.ctypes.data if self.n_bytes else None

    def take(self, other: Tensor) -> None:
        assert not self.n_bytes or np.may_share_memory(self._array, self._bytes)  # else leaf() would stay as it was
        for start, stop in ranges(self.n_bytes):
            self._bytes[start:stop] = other.read(start, stop)

    def write(self, words: Array) -> None:
        if not self._array.flags.writeable:
            raise InvalidArgument("the array is read-only. Give a copy of it.")
        self._array[...] = words.view(self._array.dtype.newbyteorder("<")).reshape(self.shape)


class StoredTensor(Tensor):
    """A tensor in a file that is open: mapped, or fetched in ranges."""

    def __init__(self, source: Source, begin: int, code: str, shape: tuple[int, ...], n_bytes: int) -> None:
        self._source, self._begin = source, begin
        self.code, self.shape, self.n_bytes = code, shape, n_bytes

    def read(self, start: int, stop: int) -> Array:
        if start == stop:
            return np.zeros(0, np.uint8)
        return np.frombuffer(self._source.read(self._begin + start, stop - start), np.uint8)

    def leaf(self) -> Array:
        return shaped(self.read(0, self.n_bytes), self.code, self.shape)


def code_of(dtype: dtypes.DType) -> str:
    """safetensors' name of a dtype, or its own where safetensors has none."""
    return header.NAMES.get(dtype.name, dtype.name)


def plain_copy(array: Array) -> Array:
    """A copy in C order and little-endian, so that its bytes are views of it."""
    return np.array(array, array.dtype.newbyteorder("<"), order="C")


def shaped(words: Array, code: str, shape: tuple[int, ...]) -> Array:
    """Bytes as an array of that dtype and shape; flat bytes for dtypes that numpy lacks. words: uint8."""
    if code not in header.DTYPES:
        return words
    return words.view(dtypes.by_name(header.DTYPES[code]).numpy).reshape(shape)


def ranges(n_bytes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the pieces of so many bytes."""
    return ((start, min(start + PIECE_BYTES, n_bytes)) for start in range(0, n_bytes, PIECE_BYTES))


def tensors_of(state: Any, what: str = "publish") -> dict[str, Tensor]:
    """The Tensors of a flat dict of arrays or Tensors, by name, in the order of the names.

    Raises InvalidArgument, UnsupportedNode, UnsupportedDtype (naming the entry).
    """
    if not isinstance(state, Mapping):
        raise InvalidArgument(f"{what}: expected a dict of str to arrays, got a {type(state).__name__}.")
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or name == METADATA:
            raise UnsupportedNode(f"{what}: the key {name!r:.80} is no name of a tensor. Rename the entry.")
        if isinstance(value, Tensor):
            made[name] = value
        elif isinstance(value, np.ndarray):
            made[name] = HostTensor(value, name)
        else:
            kind = type(value).__name__
            raise UnsupportedNode(
                f"{what}: entry {name!r}: expected a numpy array, got a {kind}. Give a flat dict of names to arrays; "
                "for torch use tricomp_torch.publishing."
            )
    return dict(sorted(made.items()))
