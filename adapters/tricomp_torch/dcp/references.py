"""What a rank's file is coded against: that file of an earlier checkpoint which has most of the same shards.

The hard thing: a delta is only worth something if what it needs can be read. So the chain is opened first, even where
its words are held in memory, and whatever is wrong with it means that the file stands alone, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import tricomp
from tricomp.content import Content
from tricomp.errors import TricompError, WrongReference
from tricomp.layout import Leaf
from tricomp_torch.dcp.chains import Access, open_chained
from tricomp_torch.dcp.index import Index, Parent, StoredFile, keys_of, path_of, read, read_files, relative

_log = logging.getLogger("tricomp")


@dataclass(frozen=True)
class Order:
    """What the coordinator tells a rank with its plan: the name of its file, and the checkpoint to code it against.

    reference: its folder; None: the file stands alone. reference_id: of the index that the coordinator has seen there.
    """

    name: str
    reference: str | None = None
    reference_id: str = ""


@dataclass(frozen=True)
class Base:
    """A file to code against, open; its words, if they are held in memory; and how the index will name it."""

    file: tricomp.File
    held: Content | None
    parent: Parent

    @property
    def words(self) -> tricomp.File | Content:
        """Where the codec takes words from."""
        return self.file if self.held is None else self.held


def find_base(content: Content, order: Order, folder: str, access: Access, held: Content | None) -> Base | None:
    """What to code content against, which goes to a folder; None if no shard is there, or it cannot be read.

    held: what this rank wrote last. Close the file of what comes.
    """
    wanted = {leaf.path: leaf for leaf in content.snapshot.layout.leaves}
    n_all = sum(leaf.n_bytes for leaf in wanted.values())
    if order.reference is None or not n_all:
        return None
    file: tricomp.File | None = None
    try:
        known = read_files(order.reference, access.options_for(order.reference))
        if known.id != order.reference_id:
            raise WrongReference(f"{order.reference}: was replaced while it was coded against.")
        stored = next((file for file in known.files if _rank(file.name) == _rank(order.name)), None)
        file = None if stored is None else open_chained(order.reference, stored, access)
        n_found = 0 if file is None else _found_in(file, wanted)
        if n_found < n_all:  # it was another number of ranks, or another sharding: then all of the index is looked at
            other, n_there = _fullest(read(order.reference, access.options_for(order.reference)), wanted)
            if n_there > n_found or not n_found:
                if file is not None:
                    file.close()
                stored, n_found, file = other, n_there, None
                file = None if stored is None else open_chained(order.reference, stored, access)
    except TricompError as error:
        _log.warning("%s/%s stands alone: its reference cannot be read: %s", folder, order.name, error)
        if file is not None:
            file.close()
        return None
    if n_found < n_all:
        text = "%s/%s: %d of %d bytes have no counterpart in one file of %s, and stand alone"
        _log.info(text, folder, order.name, n_all - n_found, n_all, order.reference)
    if stored is None or file is None:
        return None
    is_held = held is not None and held.content_id == stored.content_id
    parent = Parent(relative(order.reference, folder), stored.name, stored.content_id)
    return Base(file, held if is_held else None, parent)


def _rank(name: str) -> str:
    return name.partition("-")[0]


def _found_in(file: tricomp.File, wanted: Mapping[str, Leaf]) -> int:
    """Bytes of leaves that a file has with the same path, dtype and shape."""
    return sum(leaf.n_bytes for path, leaf in wanted.items() if path in file and file.leaf(path) == leaf)


def _fullest(index: Index, wanted: Mapping[str, Leaf]) -> tuple[StoredFile | None, int]:
    """The file that has most bytes of leaves of the same path, dtype and shape, and how many; None if none has any."""
    n_bytes: dict[int, int] = {}
    for fqn, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            leaf = wanted.get(path_of(keys_of(fqn, chunk.offsets, chunk.sizes, tensor.size)))
            if leaf is not None and (leaf.dtype.name, leaf.shape) == (tensor.dtype, chunk.sizes):
                n_bytes[chunk.file] = n_bytes.get(chunk.file, 0) + leaf.n_bytes
    if not any(n_bytes.values()):
        return None, 0
    number = max(n_bytes, key=lambda number: n_bytes[number])
    return index.files[number], n_bytes[number]
