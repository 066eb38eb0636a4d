"""The header of a safetensors file as text: dtype names, an entry as the format's library writes it, a header abridged.

Imports no framework. The hard thing: an origin keeps the whole header, and offsets and names do not deflate well; but
nearly every header is what the library would have written for these leaves. An abridged header has a mark in the
place of each such entry, so that a tidy one costs nothing for each tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tricomp.errors import CorruptFile
from tricomp.layout import Leaf
from tricomp.tree import key_of

# The library sorts tensors by this order, backwards, then by name. Frozen since format 1: abridged headers rest on it.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64",
}  # fmt: skip
NAMES = {name: code for code, name in DTYPES.items()}
_ENTRY, _SKIP = b"\x01", b"\x02"  # an entry left out; one that is not (the next mark is for the next leaf)
_MARKS = re.compile(b"([\x01\x02])")  # JSON text holds neither byte
_TRIES = 8  # leaves among which one must have an entry as expected


def text(value: object) -> bytes:
    """JSON as the library writes it: no spaces, only what must be escaped is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def entry(name: str, leaf: Leaf, start: int) -> bytes:
    """A tensor's entry, name included; start: of its data, counted from the end of the header. Its dtype has a code."""
    shape = ",".join(map(str, leaf.shape))
    return (
        text(name)
        + (
            f':{{"dtype":"{NAMES[leaf.dtype.name]}","shape":[{shape}],"data_offsets":[{start},{start + leaf.n_bytes}]}}'
        ).encode()
    )


def abridge(whole: bytes, placed: Sequence[tuple[Leaf, int]]) -> bytes | None:
    """A header (its 8 bytes of length included) with marks for entries; None if it cannot be abridged.

    placed: leaves and their offsets in the file, in file order.
    """
    if len(whole) != _end(whole) or _ENTRY in whole[8:] or _SKIP in whole[8:]:
        return None
    entries = [_entry_at(whole, leaf, offset) for leaf, offset in placed]
    found = ((i, at) for i, each in enumerate(entries[:_TRIES]) if each and (at := whole.find(each, 8)) > 0)
    first, at = next(found, (0, 0))
    if not at:
        return None
    parts, done = [_SKIP * first], 8
    for each in entries[first:]:
        if each and whole.startswith(each, at):
            parts += [whole[done:at], _ENTRY]
            done = at + len(each)
            at = done + 1  # behind a comma
        else:
            parts.append(_SKIP)
            comma = whole.find(b'},"', at)  # the next entry stands behind it, if no name is odd
            at = comma + 2 if comma >= 0 else len(whole)
    short = whole[:8] + b"".join(parts) + whole[done:]
    return short if expand(short, placed, len(whole), "header") == whole else None


def expand(short: bytes, placed: Sequence[tuple[Leaf, int]], n_bytes: int, what: str) -> bytes:
    """The header of n_bytes that was abridged. Raises CorruptFile, naming what, if it does not come out so."""
    n_marks = short.count(_ENTRY, 8) + short.count(_SKIP, 8)
    if n_marks > len(placed):
        raise CorruptFile(
            f"{what}: a mark in it stands for no leaf that a header could name: {n_marks} marks, {len(placed)} spans."
        )
    rest = iter(placed)
    parts: list[bytes] = [short[:8]]
    missing = n_bytes - len(parts[0])
    for part in re.split(_MARKS, short[8:]):
        if part in (_ENTRY, _SKIP):
            leaf, offset = next(rest, (None, 0))
            each = None if leaf is None else b"" if part == _SKIP else _entry_at(short, leaf, offset)
            if each is None:
                raise CorruptFile(f"{what}: a mark in it stands for no leaf that a header could name.")
            part = each
        missing -= len(part)
        if missing < 0:
            break
        parts.append(part)
    if missing:
        raise CorruptFile(f"{what}: it is not of the {n_bytes} bytes that are declared.")
    return b"".join(parts)


def _end(whole: bytes) -> int:
    """Where the header ends and the data begins."""
    return 8 + int.from_bytes(whole[:8], "little")


def _entry_at(whole: bytes, leaf: Leaf, offset: int) -> bytes | None:
    """The entry of a leaf that stands at offset of the file, as the library writes it; None: it would write none."""
    if leaf.dtype.name not in NAMES:
        return None
    return entry(key_of(leaf.path), leaf, offset - _end(whole))
