"""A `.tri` file of many GB that takes no room: real header, heads, index and tail around words that are a hole."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tricomp import container, tree
from tricomp.container import Entry, Writing, bin_start, check_of
from tricomp.dtypes import by_name
from tricomp.layout import Leaf
from tricomp.plan import Plan

_CHUNK_WORDS = 1 << 16
_RAW_FLAG = 1 << 31  # of a chunk's row in the directory, see FORMAT.md


def write_sparse_file(path: Path, leaves: Mapping[str, tuple[int, ...]]) -> None:
    """Write float32 leaves of these shapes, stored raw; checksums of what is in the hole are left out."""
    structure, paths, _ = tree.flatten({name: np.empty(0) for name in leaves})
    table = [Leaf(name, by_name("float32"), leaves[name]) for name in paths]
    written = Writing(structure, table)
    with open(path, "wb") as file:
        file.write(written._header)
        for number, leaf in enumerate(table):
            n_full, rest = divmod(leaf.n_words, _CHUNK_WORDS)
            words = [_CHUNK_WORDS] * n_full + [rest] * (rest > 0)
            head = b"".join(struct.pack("<6I", 0, 0, 4 * n, _RAW_FLAG, 0, 0) for n in words)
            head += bytes(-len(head) % 16)
            plan = Plan(leaf.dtype, leaf.n_words, "raw", side_check=check_of(head))
            n_bytes = len(head) + sum(-(-4 * n // 16) * 16 for n in words[:-1]) + 4 * words[-1]
            most = container.MAX_BIN_BYTES
            sizes = tuple(min(most, n_bytes - at) for at in range(0, n_bytes, most))
            written.entries.append(Entry((number,), file.tell(), sizes, plan.to_wire(), 0))
            for i, size in enumerate(sizes):
                file.write(bin_start(size))
                file.write(b"" if i else head)
                file.seek(size - (0 if i else len(head)), os.SEEK_CUR)
        offset, index = file.tell(), written._index()
        content = container.content_id(structure, table, written.digests)
        file.write(index + container._tail(written._header, offset, index, content))
