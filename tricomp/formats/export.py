"""What a flat format makes of a tree: a name for each leaf. Imports no framework and knows no format."""

from __future__ import annotations

from tricomp import tree as trees
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.layout import Leaf


def named_leaves(file: File, format: str) -> list[tuple[str, Leaf]]:
    """Name and Leaf of each leaf in order: the key in a flat dict, else the path ("model/h.0.weight").

    Raises InvalidArgument, naming its path, for a value beside the leaves.
    """
    for path, value in trees.values_of(file.structure):
        raise InvalidArgument(
            f"node {path!r}: {format} holds arrays only, and this is of type {type(value).__name__}. "
            f"Export the arrays alone (--leaves '*'), or to a format that holds plain values."
        )
    leaves = [file.leaf(path) for path in file]
    is_flat = not any("/" in leaf.path for leaf in leaves)
    return [(trees.key_of(leaf.path) if is_flat else leaf.path, leaf) for leaf in leaves]
