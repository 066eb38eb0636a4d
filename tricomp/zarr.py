"""The array codec for zarr's format 3: `zarr.create_array(..., serializer=TricompCodec())`. Imports zarr.

Not imported by `import tricomp`: zarr finds it by its entry point. The hard thing: as a serializer it sees the chunk
with its dtype and shape, which is what it needs; a compressor behind a serializer would see bytes. Give it no
compressor behind it: `compressors=None`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from tricomp.blob import decode, encode
from tricomp.codec import Engine
from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.numcodecs import encodable
from tricomp.plan import Spec

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

_NAME = "tricomp"


@dataclass(frozen=True)
class TricompCodec(ArrayBytesCodec):
    """Lossless compression of chunks of numbers, as `tricomp.encode` does it. tier: "dense" or "fast".

    Dtypes that tricomp does not know are coded as bytes; objects are refused. threads: to work with, see tricomp.open;
    no part of an array's metadata, and zarr itself has several chunks coded at a time. Raises InvalidArgument.
    """

    tier: Literal["dense", "fast"] = "dense"
    threads: int | None = field(default=None, compare=False)
    is_fixed_size: ClassVar[bool] = False  # type: ignore[misc]  # zarr declares it of instances

    def __post_init__(self) -> None:
        Spec(tier=self.tier)
        Engine(self.threads)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TricompCodec:
        """From an array's metadata. Raises InvalidArgument."""
        options = data.get("configuration") or {}
        if data.get("name") != _NAME or not isinstance(options, dict) or not set(options) <= {"tier"}:
            raise InvalidArgument(f"codec {data!r}: expected the name {_NAME!r} and at most a tier. Upgrade tricomp.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """For an array's metadata."""
        return {"name": _NAME, "configuration": {"tier": self.tier}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Nobody knows before. Raises NotImplementedError, as zarr wants."""
        raise NotImplementedError

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        data = await asyncio.to_thread(self._encoded, chunk_data.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        array = await asyncio.to_thread(
            _decoded, chunk_data.to_bytes(), chunk_spec.dtype.to_native_dtype(), chunk_spec.shape, self.threads
        )
        return chunk_spec.prototype.nd_buffer.from_numpy_array(array)

    def _encoded(self, array: np.ndarray[Any, Any]) -> bytes:
        # Metadata of format 3 tells no byte order: a chunk is little-endian.
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return encode(encodable(little), spec=Spec(tier=self.tier), threads=self.threads)


def _decoded(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], threads: int | None) -> np.ndarray[Any, Any]:
    little = dtype.newbyteorder("<")
    found = decode(data, threads=threads).reshape(-1).view(np.uint8)
    if found.nbytes != int(np.prod(shape, dtype=object)) * little.itemsize:
        raise CorruptFile(f"chunk: holds {found.nbytes} bytes, expected {dtype.name}{list(shape)}.")
    return found.view(little).reshape(shape).astype(dtype, copy=False)
