"""What a version says of one changed tensor: the payloads `xor` and `overwrite`, made and applied. Imports numpy.

Both are of bytes, not of elements, so that no dtype matters. xor: the new bytes xor the old ones, as many as the tensor
has. overwrite: how many bytes changed (u32), where each of them stands (u32 each, rising), then their new values (u8
each); little-endian. The hard thing: nothing here may take memory by the share of bytes that changed, so an overwrite
is made in passes, its positions first; and a tensor beyond 2^32 bytes has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFrame, InvalidArgument, WrongReference
from tricomp.publishing import compression
from tricomp.publishing.tensors import Array, Tensor, ranges

ENCODINGS = ("xor", "overwrite")
MOST_BYTES = 1 << 32  # of a tensor, for positions of 32 bits
_SAMPLE_BYTES = 32 << 20  # of all tensors together, looked at to choose an encoding
_BLOCK_BYTES = 64 << 10


def n_changed(new: Tensor, old: Tensor) -> int:
    """Bytes of a tensor that changed."""
    return sum(new.n_changed(old, start, stop) for start, stop in ranges(new.n_bytes))


def payload(new: Tensor, old: Tensor, encoding: str, n: int, level: int) -> list[bytes]:
    """The compressed payload of a tensor of which n bytes changed. Raises InvalidArgument: it is too large."""
    if encoding == "xor":
        pieces: Iterator[Bytes] = (new.xor(old, *part).data for part in ranges(new.n_bytes))
        return compression.compress(pieces, new.n_bytes, level)
    if new.n_bytes > MOST_BYTES or n >= MOST_BYTES:
        raise InvalidArgument(f"overwrite: its positions have 32 bits, the tensor has {new.n_bytes} bytes. Use xor.")
    return compression.compress(_overwrite(new, old, n), 4 + 5 * n, level)


def _overwrite(new: Tensor, old: Tensor, n: int) -> Iterator[Bytes]:
    yield n.to_bytes(4, "little")
    for start, stop in ranges(new.n_bytes):
        yield (np.flatnonzero(new.xor(old, start, stop)) + start).astype("<u4").view(np.uint8).data
    for start, stop in ranges(new.n_bytes):
        yield new.read(start, stop)[new.xor(old, start, stop) != 0].data


def cheaper(new: Mapping[str, Tensor], old: Mapping[str, Tensor], level: int) -> str:
    """The encoding that makes less of a state: all of a small one compressed both ways, of a large one a sample."""
    total = sum(tensor.n_bytes for tensor in new.values())
    if any(tensor.n_bytes > MOST_BYTES for tensor in new.values()):
        return "xor"
    sizes = dict.fromkeys(ENCODINGS, 0.0)
    for name, tensor in new.items():
        if not tensor.n_bytes:
            continue
        before = old[name]
        share = min(1.0, _SAMPLE_BYTES / total)
        n_blocks = -(-tensor.n_bytes // _BLOCK_BYTES)
        n_taken = max(1, round(n_blocks * share))
        starts = [i * n_blocks // n_taken * _BLOCK_BYTES for i in range(n_taken)]
        parts = [(start, min(start + _BLOCK_BYTES, tensor.n_bytes)) for start in starts]
        xors = [tensor.xor(before, *part) for part in parts]
        places = [np.flatnonzero(xor) for xor in xors]
        n = sum(map(len, places))
        if not n:
            continue
        n_bytes = sum(map(len, xors))
        sizes["xor"] += _size((xor.data for xor in xors), n_bytes, level) * n_blocks / n_taken
        positions = [(place + start).astype("<u4").view(np.uint8).data for place, (start, _) in zip(places, parts)]
        values = [tensor.read(*part)[place].data for place, part in zip(places, parts)]
        sizes["overwrite"] += _size([*positions, *values], 5 * n, level) * n_blocks / n_taken
    return min(ENCODINGS, key=lambda encoding: sizes[encoding])


def _size(pieces: Iterable[Bytes], n_bytes: int, level: int) -> int:
    return sum(map(len, compression.compress(pieces, n_bytes, level)))


def apply_payload(words: Array, data: Bytes, encoding: str, what: str) -> None:
    """Bring a tensor's bytes to the next version, in place. words: uint8[n].

    Raises CorruptFrame for damage, WrongReference if the payload is for a tensor of another size; naming what.
    """
    if encoding == "xor":
        _apply_xor(words, data, what)
    else:
        _apply_overwrite(words, data, what)


def _apply_xor(words: Array, data: Bytes, what: str) -> None:
    size = compression.size_of(data, what)
    if size is not None and size != len(words):
        raise WrongReference(
            f"{what}: is for a tensor of {size} bytes, what is here has {len(words)}. It is another model, or another "
            "version of it: begin again from the base model, or from a full version."
        )
    at = 0
    for piece in compression.decompress(data, len(words), what):
        part = words[at : at + len(piece)]
        np.bitwise_xor(part, np.frombuffer(piece, np.uint8), out=part)
        at += len(piece)
    if at != len(words):
        raise CorruptFrame(f"{what}: holds {at} bytes, expected {len(words)}. Publish the version again.")


def _apply_overwrite(words: Array, data: Bytes, what: str) -> None:
    whole = np.frombuffer(b"".join(compression.decompress(data, 4 + 5 * len(words), what)), np.uint8)
    n = int.from_bytes(whole[:4].tobytes(), "little")
    if len(whole) != 4 + 5 * n:
        raise CorruptFrame(f"{what}: {len(whole)} bytes, expected {4 + 5 * n} of {n} changes. Publish it again.")
    positions = whole[4 : 4 + 4 * n].view("<u4")
    if n and int(positions.max()) >= len(words):
        raise WrongReference(
            f"{what}: changes byte {int(positions.max())}, what is here has {len(words)} bytes. It is another model, "
            "or another version of it: begin again from the base model, or from a full version."
        )
    words[positions] = whole[4 + 4 * n :]
