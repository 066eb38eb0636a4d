"""The tensors of a file of weights, read one by one by name, and which of them become integers.

The hard thing: a file of any format, mapped, and a `.tri` file, decoded, are one thing here; and a pattern that chooses
nothing must be told, as a slip in it would ship floats.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tricomp import archive_names, checkpoint, dtypes, formats, tree
from tricomp.codec import Engine
from tricomp.errors import InvalidArgument, MissingLeaf
from tricomp.file import File
from tricomp.integers.form import FLOATS, KEY
from tricomp.tensors import ORIGINAL_KEY

Array = np.ndarray[Any, Any]

LEAST_ELEMENTS = 4096  # of a tensor that is quantised unasked: smaller ones are not worth an error


class Weights:
    """A file of tensors. files: that it is made of. is_mapped: its arrays take no memory. metadata: to be kept."""

    def __init__(self, path: str, stack: ExitStack, engine: Engine) -> None:
        archive_names.check_input(path)
        self.path = path
        self.files: tuple[str, ...] = (path,)
        self._file: File | None = None
        self._arrays: Mapping[str, Any] = {}
        self.is_mapped = not archive_names.is_compressed(path)
        self.metadata: dict[str, Any] = {}
        if self.is_mapped:
            opened = stack.enter_context(formats.read(path))
            self.files = (path, *(os.path.join(os.path.dirname(path), part.name) for part in opened.parts))
            self.input_bytes = opened.n_bytes
            self.metadata = {key: text for key, text in opened.metadata.items() if key == ORIGINAL_KEY}
            self._arrays = opened.tree if isinstance(opened.tree, dict) else {}
            names: list[Any] = list(self._arrays)
            is_flat = isinstance(opened.tree, dict)
            is_flat = is_flat and all(isinstance(array, np.ndarray | np.generic) for array in self._arrays.values())
        else:
            self._file = stack.enter_context(checkpoint.open_file(path, threads=engine.threads, backend=engine.backend))
            self.input_bytes = self._file.n_bytes
            self.metadata = {key: text for key, text in self._file.metadata.items() if key == ORIGINAL_KEY}
            names = [tree.key_of(leaf) for leaf in self._file]
            is_flat = not any("/" in leaf for leaf in self._file) and KEY not in self._file.metadata
        if not is_flat or not all(isinstance(name, str) for name in names):
            raise InvalidArgument(
                f"{path}: expected a flat dict of float tensors, as a safetensors file is, got another tree. "
                f"Export the weights first: tricomp export --to safetensors."
            )
        self.names: tuple[str, ...] = tuple(names)

    def about(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        if self._file is not None:
            leaf = self._file.leaf(tree.join(None, name))
            return leaf.dtype.name, leaf.shape
        array = self._arrays[name]
        return dtypes.of(np.asarray(array), name).name, array.shape

    def n_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        if self._file is not None:
            return self._file.leaf(tree.join(None, name)).n_bytes
        return int(self._arrays[name].nbytes)

    def array(self, name: str) -> Array:
        """A tensor."""
        return self._file[tree.join(None, name)] if self._file is not None else np.asarray(self._arrays[name])


def is_weight(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor is quantised unasked: floats of two or more dimensions, 4,096 of them or more.

    So linear, convolution and embedding weights are; norms, biases, tables of integers and small tensors are not.
    """
    return dtype in FLOATS and len(shape) > 1 and math.prod(shape) >= LEAST_ELEMENTS and shape[0] > 1


def picked(source: Weights, select: Sequence[str] | None, skip: Sequence[str]) -> set[str]:
    """Names of the tensors to quantise. select, skip: see quantize_file. Raises MissingLeaf, InvalidArgument."""
    about = {name: source.about(name) for name in source.names}
    can = {name for name, (dtype, shape) in about.items() if dtype in FLOATS and len(shape) > 1}
    if select is None:
        found = {name for name, (dtype, shape) in about.items() if is_weight(shape, dtype)}
    else:
        found = set()
        for pattern in select:
            matched = _matched(source, pattern)
            if not matched & can:
                name = min(matched)
                dtype, shape = about[name]
                raise InvalidArgument(
                    f"{source.path}: {pattern!r} matches no floats of two or more dimensions, but {len(matched)} like "
                    f"{name!r} ({dtype}{list(shape)}). Choose weights: [out, ...]."
                )
            found |= matched & can
    for pattern in skip:
        found -= _matched(source, pattern)
    if not found:
        raise InvalidArgument(
            f"{source.path}: nothing is left to quantise: of its {len(about)} tensors, {len(can)} are floats of two or "
            f"more dimensions. Choose some with select."
        )
    return found


def _matched(source: Weights, pattern: str) -> set[str]:
    found = {name for name in source.names if name == pattern or fnmatchcase(name, pattern)}
    if not found:
        some = ", ".join(source.names[:3])
        raise MissingLeaf(
            f"{source.path}: no tensor matches {pattern!r} among its {len(source.names)} ({some}, ...). "
            f"See tricomp inspect, or tricomp quantize without a pattern."
        )
    return found
