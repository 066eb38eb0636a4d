"""Flat named tensors in `.tri` files, in safetensors' manner: names, metadata, slices, an open file. No framework.

numpy's functions are in tricomp.numpy, torch's in tricomp_torch.safe. The hard thing: any `.tri` file is to open like
this, whatever its tree, so each leaf has a name: its key in a flat dict, else its path.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgpack
import numpy as np

from tricomp import bounds, tree
from tricomp.checkpoint import open_file
from tricomp.dtypes import DType
from tricomp.errors import InvalidArgument, MissingLeaf, UnsupportedNode
from tricomp.file import File
from tricomp.formats.header import NAMES
from tricomp.selection import select

Array = np.ndarray[Any, Any]
Path = str | os.PathLike[str]
Tensor = TypeVar("Tensor")

ORIGINAL_KEY = "safetensors"
"""The key of a file's metadata under which the text metadata of a safetensors file stands that it was made of."""
OWN_KEYS = ("base", "origin", ORIGINAL_KEY, "tricomp_integers", "tricomp_torch", "tricomp_jax")
"""Keys of a file's metadata under which tricomp and its adapters keep what they need."""
_BATCH_WORDS = 8 << 20  # decoded together by arrays_of


@dataclass(frozen=True)
class Entry:
    """An entry of a tree that is a dict: the structure of its value (see tricomp.tree) and the paths of its leaves."""

    structure: bytes
    paths: tuple[str, ...]


class Slice(Generic[Tensor]):
    """A tensor of an open file of which parts can be read: part[2:5, ::8] decodes only the chunks that hold them.

    The parts' chunks have checksums, which are compared; the digest of the tensor is not, unless all of it is read.
    """

    def __init__(self, opened: SafeOpen[Tensor], name: str, path: str) -> None:
        self._opened, self._name, self._path = opened, name, path

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._opened.file.leaf(self._path).shape)

    def get_dtype(self) -> str:
        """Its dtype by safetensors' name ("F32", "BF16", ...), or by its own where safetensors has none."""
        return code_of(self._opened.file.leaf(self._path).dtype)

    def __getitem__(self, index: Any) -> Tensor:
        """A part: ints, slices of any step, ..., None, lists or arrays of ints or booleans, or a tuple of such.

        The result is contiguous, in memory of its own. Raises InvalidIndex (an IndexError), CorruptFrame.
        """
        file = self._opened.file
        leaf = file.leaf(self._path)
        wanted = select(leaf.shape, index, f"slice of {self._name!r}")
        if wanted.is_whole:
            block = file[self._path]
        else:
            plan = file.plan(self._path)
            chunk_elements = (1 << plan.chunk_log2) // leaf.dtype.words_per_element
            block = wanted.fetch(lambda runs: file.runs(self._path, runs), leaf.dtype.numpy, chunk_elements)
        return self._opened.made(self._path, wanted.of(block, self._opened.is_int_first))


class SafeOpen(ABC, Generic[Tensor]):
    """A `.tri` file opened in the manner of safetensors.safe_open: names to tensors, decoded when asked for.

    A context manager. is_int_first: how ints count beside arrays in an index, see Selection.of.
    """

    is_int_first = False

    def __init__(self, filename: Path, reference: Any = None, threads: int | None = None) -> None:
        """filename: of any `.tri` file. reference: what it was saved against. Raises what tricomp.open raises."""
        self._file: File | None = open_file(filename, reference, threads=threads)
        self._paths = names_of(self._file)

    @property
    def file(self) -> File:
        """The open file. Raises InvalidArgument when it was closed."""
        if self._file is None:
            raise InvalidArgument("the file is closed. Read inside the with block of safe_open.")
        return self._file

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self.offset_keys())

    def offset_keys(self) -> list[str]:
        """The names of the tensors in the order of the file: as they were given, or as the original file had them."""
        _ = self.file
        return list(self._paths)

    def metadata(self) -> dict[str, str] | None:
        """The text metadata, as given to save_file or found in the original file; None if there is none."""
        return metadata_of(self.file.metadata)

    def get_tensor(self, name: str) -> Tensor:
        """A whole tensor. Raises MissingLeaf, CorruptFrame, WrongReference."""
        path = self.path_of(name)
        return self.made(path, self.file[path])

    def get_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, in the order of the file."""
        names = {path: name for name, path in self._paths.items()}
        return {names[path]: self.made(path, array) for path, array in arrays_of(self.file, names)}

    def get_slice(self, name: str) -> Slice[Tensor]:
        """A tensor to read parts of. Raises MissingLeaf."""
        return Slice(self, name, self.path_of(name))

    @abstractmethod
    def made(self, path: str, array: Array) -> Tensor:
        """The framework's tensor of an array that is nobody else's."""

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def path_of(self, name: str) -> str:
        """The path of the leaf of a name. Raises MissingLeaf."""
        file = self.file
        if name not in self._paths:
            raise MissingLeaf(f"{file.name}: no tensor {name!r} among its {len(self._paths)} tensors. See keys().")
        return self._paths[name]


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Name to path of leaves: their keys if all stand in the tree's outermost dict or list, else their paths."""
    paths = list(paths)
    is_flat = not any("/" in path for path in paths)
    return {tree.key_of(path) if is_flat else path: path for path in paths}


def code_of(dtype: DType) -> str:
    """safetensors' name of a dtype, or its own where safetensors has none."""
    return NAMES.get(dtype.name, dtype.name)


def metadata_of(metadata: Mapping[str, Any]) -> dict[str, str] | None:
    """The text metadata of the safetensors file that a file was made of, else the text in its own; None if none."""
    original = metadata.get(ORIGINAL_KEY)
    found = original if isinstance(original, Mapping) else {k: v for k, v in metadata.items() if k not in OWN_KEYS}
    texts = {key: text for key, text in found.items() if isinstance(key, str) and isinstance(text, str)}
    return texts if texts or found is original else None


def arrays_of(file: File, paths: Iterable[str]) -> Iterator[tuple[str, Array]]:
    """Path and array of each leaf, in order, decoded together as far as little memory allows."""
    batch: list[str] = []
    n_words = 0
    for path in paths:
        batch.append(path)
        n_words += file.leaf(path).n_words
        if n_words >= _BATCH_WORDS:
            yield from _popped(batch, file.load(batch))
            batch, n_words = [], 0
    if batch:
        yield from _popped(batch, file.load(batch))


def _popped(paths: list[str], arrays: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    for path in paths:
        yield path, arrays.pop(path)  # so that an array lives no longer than its taker needs it


def require_tensors(tensors: Any, kinds: tuple[type, ...], expected: str) -> dict[str, Any]:
    """The tensors as a dict, if all keys are str and all values of kinds. Raises InvalidArgument, UnsupportedNode."""
    if not isinstance(tensors, Mapping):
        raise InvalidArgument(f"save_file: expected a dict of str to {expected}, got a {type(tensors).__name__}.")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise UnsupportedNode(f"the key {name!r} is a {type(name).__name__}, expected str. Rename the entry.")
        if not isinstance(tensor, kinds):
            advice = "Leave it out, or save the whole with save, which takes any tree."
            raise UnsupportedNode(f"entry {name!r}: expected a {expected}, got a {type(tensor).__name__}. {advice}")
    return dict(tensors)


def require_text(metadata: Any) -> dict[str, Any]:
    """The metadata given to save_file as a dict. Raises InvalidArgument unless it is a dict of str to str or None."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise InvalidArgument(f"metadata: expected a dict of str to str, got a {type(metadata).__name__}.")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            odd = key if not isinstance(key, str) else value
            raise InvalidArgument(
                f"metadata: expected a dict of str to str, got the {type(odd).__name__} {odd!r:.80} at {key!r:.80}. "
                "Turn it into text, say with json.dumps."
            )
        if key in OWN_KEYS:
            raise InvalidArgument(f"metadata: the key {key!r} is kept for tricomp's own notes. Use another key.")
    return dict(metadata)


def entries_of(file: File) -> dict[str | int, Entry]:
    """The entries of a file whose tree is a dict, in order. Raises InvalidArgument if it is none, CorruptFile."""
    what = f"{file.name}: tree"
    packed = bounds.unpack(file.structure, what)
    if isinstance(packed, list) and packed[:2] == [msgpack.ExtType(bounds.REGISTERED, b""), "OrderedDict"]:
        packed = packed[2] if len(packed) == 3 else None
    if not isinstance(packed, dict):
        raise InvalidArgument(f"{what} is no dict, so it has no entries. Use tricomp.load.")
    found: dict[str | int, Entry] = {}
    paths, n_done = tuple(file), 0
    for key, value in packed.items():
        structure = msgpack.packb(value)
        n_leaves = len(tree.paths_of(structure, what=what))
        found[key] = Entry(structure, paths[n_done : n_done + n_leaves])
        n_done += n_leaves
    return found
