"""A `.tri` file of many GB that takes no room: real header, heads, index and tail around words that are a hole."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tricomp import container, tree
from tricomp.bounds import Bytes
from tricomp.container import Entry, Writing, bin_start, check_of
from tricomp.dtypes import by_name
from tricomp.layout import Leaf
from tricomp.plan import Plan

_CHUNK_WORDS = 1 << 16
_RAW_FLAG = 1 << 31  # of a chunk's row in the directory, see FORMAT.md
_zeros = cache(lambda n_bytes: check_of(bytes(n_bytes)))


def write_sparse_file(
    path: Path, leaves: Mapping[str, tuple[int, ...]], dtype: str = "float32", ones: Collection[int] = ()
) -> None:
    """Write leaves of these shapes, stored raw: zeros, but that all bits of the words numbered ones are set.

    Checksums of chunks are right, those of frames and leaves are left out: so parts of leaves can be read.
    """
    structure, paths, _ = tree.flatten({name: np.empty(0) for name in leaves})
    table = [Leaf(name, by_name(dtype), leaves[name]) for name in paths]
    size = table[0].dtype.word_bits // 8
    written = Writing(structure, table)
    with open(path, "wb") as file:
        file.write(written._header)
        for number, leaf in enumerate(table):
            n_full, rest = divmod(leaf.n_words, _CHUNK_WORDS)
            words = [_CHUNK_WORDS] * n_full + [rest] * (rest > 0)
            chunks: dict[int, bytearray] = {}
            for one in (one for one in ones if one < leaf.n_words):
                chunk = chunks.setdefault(one >> 16, bytearray(size * words[one >> 16]))
                at = size * (one % _CHUNK_WORDS)
                chunk[at : at + size] = b"\xff" * size
            checks = [check_of(bytes(chunks[i])) if i in chunks else _zeros(size * n) for i, n in enumerate(words)]
            rows = zip(checks, words, strict=True)
            head = b"".join(struct.pack("<Q4I", check, size * n, _RAW_FLAG, 0, 0) for check, n in rows)
            head += bytes(-len(head) % 16)
            plan = Plan(leaf.dtype, leaf.n_words, "raw", side_check=check_of(head))
            n_bytes = len(head) + sum(-(-size * n // 16) * 16 for n in words[:-1]) + size * words[-1]
            most = container.MAX_BIN_BYTES
            sizes = tuple(min(most, n_bytes - at) for at in range(0, n_bytes, most))
            begin = file.tell()
            written.entries.append(Entry((number,), begin, sizes, plan.to_wire(), 0))
            bins = []  # where the contents of each begin
            for n in sizes:
                file.seek(begin)
                file.write(bin_start(n))
                bins.append(file.tell())
                begin = bins[-1] + n
            _write(file, bins, 0, head)
            for i, chunk in chunks.items():
                _write(file, bins, len(head) + size * (i << 16), chunk)
            file.seek(begin)
        offset, index = file.tell(), written._index()
        content = container.content_id(structure, table, written.digests)
        file.write(index + container._tail(written._header, offset, index, content))


def _write(file: BinaryIO, bins: Sequence[int], at: int, data: Bytes | bytearray) -> None:
    """Write bytes of a frame to where they stand in its bins, of which all but the last are full."""
    view, most = memoryview(data), container.MAX_BIN_BYTES
    while len(view):
        number, inside = divmod(at, most)
        part = view[: most - inside]
        file.seek(bins[number] + inside)
        file.write(part)
        at, view = at + len(part), view[len(part) :]
