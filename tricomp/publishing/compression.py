"""zstd, one frame a payload, from the standard library (3.14) or backports.zstd. Imports errors only.

The hard thing: readers of the layout want one frame with its content size in its head, and a payload of many GB must
not stand in memory raw. So the size is told first, and pieces go in and come out.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFrame, InvalidArgument

_PIECE_BYTES = 4 << 20


@cache
def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InvalidArgument(
        "publishing: this layout is compressed with zstd, which is not installed. "
        'Run "pip install \'tricomp[publishing]\'", or publish with format="tri".'
    )


def check_level(level: Any) -> None:
    """Raise InvalidArgument unless zstd has that level, or where there is no zstd."""
    lowest, highest = _zstd().CompressionParameter.compression_level.bounds()
    if type(level) is not int or not lowest <= level <= highest:
        raise InvalidArgument(f"level: expected a level of zstd, {lowest} to {highest}, got {level!r:.80}.")


def compress(pieces: Iterable[Bytes], n_bytes: int, level: int) -> list[bytes]:
    """One frame of n_bytes in all, with its content size and a checksum, as the pieces it came in."""
    parameter = _zstd().CompressionParameter
    worker = _zstd().ZstdCompressor(options={parameter.compression_level: level, parameter.checksum_flag: 1})
    worker.set_pledged_input_size(n_bytes)
    made = [worker.compress(piece) for piece in pieces]
    made.append(worker.flush())
    return [piece for piece in made if piece]


def size_of(data: Bytes, what: str) -> int | None:
    """Bytes that a frame declares to hold; None: it does not say. Raises CorruptFrame, naming what."""
    try:
        size: int | None = _zstd().get_frame_info(data).decompressed_size
    except _zstd().ZstdError as error:
        raise CorruptFrame(f"{what}: is no zstd frame ({error}). Publish the version again.") from None
    return size


def decompress(data: Bytes, most_bytes: int, what: str) -> Iterator[bytes]:
    """The content of a frame, some MB at a time. Raises CorruptFrame, naming what, if it is damaged or too long."""
    worker, n_bytes = _zstd().ZstdDecompressor(), 0
    try:
        piece = worker.decompress(data, max_length=_PIECE_BYTES)
        while True:
            n_bytes += len(piece)
            if n_bytes > most_bytes:
                raise CorruptFrame(f"{what}: holds more than the {most_bytes} bytes that it can. Do not trust it.")
            if piece:
                yield piece
            if worker.eof:
                break
            if worker.needs_input:
                raise CorruptFrame(f"{what}: the zstd frame is cut. Publish the version again.")
            piece = worker.decompress(b"", max_length=_PIECE_BYTES)
    except _zstd().ZstdError as error:
        raise CorruptFrame(f"{what}: is damaged ({error}). Publish the version again.") from None
    if worker.unused_data:
        raise CorruptFrame(f"{what}: something follows the zstd frame. Publish the version again.")
