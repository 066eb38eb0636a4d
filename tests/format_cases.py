"""Files of other formats, made by hand, and the way of a file through a `.tri` file and back. Imports tricomp."""

from __future__ import annotations

import json
import struct
from typing import Any

import tricomp
from tricomp import formats


def safetensors_of(header: str | bytes | dict[str, Any], data: bytes = b"", n_bytes: int | None = None) -> bytes:
    """A safetensors file with a header as given; n_bytes: the length it declares, if not the true one."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if n_bytes is None else n_bytes) + text + data


def there_and_back(path: str) -> list[bytes]:
    """The files that a file and its parts come back as, from a `.tri` file that is made of it."""
    with formats.read(path) as opened:
        assert opened.n_bytes > 0
        tricomp.save(f"{path}.tri", opened.tree, metadata=opened.to_metadata())
    with tricomp.open(f"{path}.tri") as file:
        return [b"".join(bytes(piece) for piece in formats.restored(file, origin)) for origin in formats.origins(file)]


def is_exact(path: str) -> bool:
    with formats.read(path) as opened:
        return all(origin.is_exact for origin in opened.origins())
