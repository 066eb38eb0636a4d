"""The header of a safetensors file, read and checked: which tensors there are and where. Imports no framework.

Legal is what the format's own library takes, down to odd but harmless headers: any order, spaces, entries given twice
(the last counts), unknown fields. The hard thing: it is hostile text of up to 100 MB, and Python's reader of JSON takes
more than JSON: infinities, lone surrogates, whole numbers of any size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument
from tricomp.formats import header
from tricomp.storage import Source

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
METADATA = "__metadata__"
_ADVICE = "Download or copy it again."


class Object(list[tuple[str, Any]]):
    """A JSON object as its pairs: keys may be there twice."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a header: dtype as the format names it; start, stop: of its data, from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def refuse(source: Source, what: str, advice: str = _ADVICE) -> NoReturn:
    """Raise InvalidArgument about a file."""
    raise InvalidArgument(f"{source.name}: {what}. {advice}")


def parse(source: Source) -> tuple[list[Tensor], dict[str, str] | None, int]:
    """Tensors in the order of their data, metadata, and where data begins. Raises InvalidArgument."""
    if source.n_bytes < 8:
        refuse(source, f"expected the 8 bytes of a safetensors header's length, got {source.n_bytes} bytes")
    n_bytes = int.from_bytes(source.read(0, 8), "little")
    if n_bytes > MAX_HEADER_BYTES:
        refuse(source, f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got {n_bytes}")
    if n_bytes > source.n_bytes - 8:
        refuse(source, f"expected a header of {n_bytes} bytes, got a file of {source.n_bytes}: it is cut")
    entries, metadata = _entries(source, json_of(source, source.read(8, n_bytes), "header"))
    tensors = sorted(entries, key=lambda tensor: (tensor.start, tensor.stop))
    at = 0
    for tensor in tensors:
        if tensor.start != at or tensor.stop < at:
            refuse(source, f"tensor {tensor.name!r}: expected data at {at}, got {tensor.start} to {tensor.stop}")
        expected = _n_bytes(source, tensor)
        if expected is not None and tensor.stop - tensor.start != expected:
            shape = f"{tensor.dtype}{list(tensor.shape)}"
            refuse(
                source,
                f"tensor {tensor.name!r}: expected {expected} bytes of {shape}, got {tensor.stop - tensor.start}",
            )
        at = tensor.stop
    if 8 + n_bytes + at != source.n_bytes:
        state = "it is cut" if 8 + n_bytes + at > source.n_bytes else "something follows its tensors"
        refuse(source, f"expected {8 + n_bytes + at} bytes, got {source.n_bytes}: {state}")
    return tensors, metadata, 8 + n_bytes


def _n_bytes(source: Source, tensor: Tensor) -> int | None:
    """Bytes that a tensor must have; None for a dtype of a later version of the format."""
    bits = header.BITS.get(tensor.dtype)
    n_bits = 1
    for size in (*tensor.shape, 1 if bits is None else bits):
        n_bits *= size
        if n_bits >= 1 << 64:  # on the way, too: the library takes no such shape, even if the next size is 0
            refuse(source, f"tensor {tensor.name!r}: a shape of {list(tensor.shape)} overflows")
    if bits is None:
        return None
    if n_bits % 8:
        refuse(source, f"tensor {tensor.name!r}: {tensor.dtype}{list(tensor.shape)} does not fill its last byte")
    return n_bits // 8


def json_of(source: Source, data: Bytes, what: str) -> Any:
    """JSON as the library takes it, objects as pairs. Raises InvalidArgument, naming what."""

    def number(digits: str) -> int | float:
        value = int(digits) if len(digits) <= 20 else float(digits)
        if digits == "-0" or not -(1 << 63) <= value < 1 << 64:  # where the library sees a float
            return real(digits)
        return value

    def real(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"the number {digits[:40]} is out of range")
        return value

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(
            str(data, "utf-8"),
            object_pairs_hook=Object,
            parse_int=number,
            parse_float=real,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        refuse(source, f"expected the {what} in UTF-8, got {error.object[error.start]:#x} at {error.start}")
    except (ValueError, RecursionError) as error:
        refuse(source, f"expected the {what} as JSON, got {error}")


def _entries(source: Source, found: Any) -> tuple[list[Tensor], dict[str, str] | None]:
    if not isinstance(found, Object):
        refuse(source, f"expected a map of tensors as header, got {type(found).__name__}")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] | None = None
    n_metadata = 0
    for name, value in found:
        _check_text(source, name)
        if name == METADATA:
            n_metadata += 1
            metadata = _texts(source, value)
        else:
            tensors[name] = _tensor(source, name, value)
    if n_metadata > 1:
        refuse(source, f"expected {METADATA} once, got it {n_metadata} times")
    return list(tensors.values()), metadata


def _texts(source: Source, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Object) or not all(isinstance(each, str) for _, each in value):
        refuse(source, f"expected texts in {METADATA}, got something else")
    for key, each in value:
        _check_text(source, key)
        _check_text(source, each)
    return dict(value)


def _check_text(source: Source, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(source, f"expected Unicode in the header, got {value!r}")


def _tensor(source: Source, name: str, value: Any) -> Tensor:
    """An entry; the library also takes one that is given as a list, and an unknown field."""
    keys = ("dtype", "shape", "data_offsets")
    given: list[Any] = list(value) if isinstance(value, list) else []
    if isinstance(value, Object):
        pairs = [pair for pair in value if pair[0] in keys]
        if sorted(key for key, _ in pairs) != sorted(keys):
            refuse(source, f"tensor {name!r}: expected dtype, shape and data_offsets once each, got {_keys(value)}")
        given = [dict(pairs)[key] for key in keys]
    if len(given) != 3:
        refuse(source, f"tensor {name!r}: expected a map of dtype, shape and data_offsets, got {type(value).__name__}")
    dtype, shape, offsets = given
    if isinstance(dtype, Object) and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]
    if not isinstance(dtype, str):
        refuse(source, f"tensor {name!r}: expected the name of a dtype, got {type(dtype).__name__}")
    if not _are_sizes(shape):
        refuse(source, f"tensor {name!r}: expected a shape of whole numbers, got {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        refuse(source, f"tensor {name!r}: expected two data_offsets, got {shown(offsets)}")
    return Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(each) is int and each >= 0 for each in value)


def _keys(value: Object) -> str:
    return shown([key for key, _ in value])


def shown(value: Any) -> str:
    """A value out of a header, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
