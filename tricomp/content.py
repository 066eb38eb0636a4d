"""What goes into a file and what it is coded against: a tree's structure and Snapshot, under one content id.

The hard thing: the content id is that of the decoded leaves, so it can be told before a file is written, and must be
told again from the words that are kept to code the next file against.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tricomp import bounds, codec, container, tree
from tricomp.dtypes import Words
from tricomp.layout import DeviceArray, Leaf, Snapshot, snapshot_of


@dataclass(frozen=True)
class Content:
    """The structure of a tree (see tricomp.tree) and the Snapshot of its leaves. Serves the codec as a Reference."""

    structure: bytes
    snapshot: Snapshot

    @cached_property
    def content_id(self) -> str:
        """32 hex digits; those of a file of this, unless the spec rounds. Told from the words as they are at first."""
        leaves, words = self.snapshot.layout.leaves, self.snapshot.words
        return container.content_id(self.structure, leaves, codec.digests([words(i) for i in range(len(leaves))])).hex()

    def find(self, path: str) -> tuple[Leaf, Words] | None:
        """Leaf and words of that path, or None."""
        return self.snapshot.find(path)


def content_of(value: Any) -> Content:
    """The Content of a tree, sharing its memory where it is contiguous and little-endian.

    Raises UnsupportedNode, UnsupportedDtype; LimitExceeded if more would have to be copied than the machine holds.
    """
    structure, paths, arrays = tree.flatten(value)
    n_copied = 0
    for path, array in zip(paths, arrays, strict=True):
        if isinstance(array, DeviceArray):
            continue
        if not array.flags.c_contiguous or not array.dtype.isnative:
            n_copied += array.nbytes  # of a tensor that was expanded, more than it has in memory, or in its file
            bounds.DEFAULTS.check("max_decoded_bytes", n_copied, f"leaf {path!r}: bytes to copy")
    return Content(structure, snapshot_of(paths, arrays))


def content_id(tree: Any) -> str:
    """The content id, 32 hex digits, that a file of this tree gets. Raises UnsupportedNode, UnsupportedDtype."""
    return content_of(tree).content_id
