"""Flat dicts of arrays in `.tri` files with the functions and argument order of safetensors.flax. Trees go by files.

The hard thing: what jax cannot hold, 64-bit numbers unless jax_enable_x64 is set, comes back as numpy's, uncut.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import tricomp
from tricomp import numpy as numpy_pair
from tricomp.errors import InvalidArgument
from tricomp.tensors import SafeOpen, require_tensors, require_text
from tricomp_jax.arrays import Array
from tricomp_jax.files import notes_of, plain_reference, with_notes
from tricomp_jax.trees import Notes, flatten

Path = str | os.PathLike[str]
_FRAMEWORKS = ("flax", "jax")


class JaxSafeOpen(SafeOpen[Any]):
    """What safe_open returns: the names of a file's arrays, and arrays of jax when asked for."""

    def __init__(self, filename: Path, reference: Any = None, threads: int | None = None) -> None:
        """See safe_open."""
        super().__init__(filename, plain_reference(reference), threads)
        self._notes = Notes(notes_of(self.file.metadata))

    def made(self, path: str, array: Array) -> Any:
        """An array on the default device."""
        if path in self._notes.keys and array.shape != self.file.leaf(path).shape:  # parts of keys are numbers
            return jax.device_put(array)
        return self._notes.made(array, path)


def save_file(
    tensors: Mapping[str, Any],
    filename: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    reference: Any = None,
    spec: tricomp.Spec | None = None,
    threads: int | None = None,
) -> tricomp.Report:
    """Write a flat dict of arrays to a `.tri` file, atomically.

    metadata: text by text key. reference: a path, an open File or a dict of arrays to code against, needed again to
    load. threads: see tricomp.open. Raises UnsupportedNode and UnsupportedDtype (naming the entry), InvalidArgument,
    StorageError.
    """
    flat = flatten(require_tensors(tensors, (jax.Array, np.ndarray, np.generic), "jax.Array"))
    notes = with_notes(require_text(metadata), flat.notes)
    base = plain_reference(reference)
    return tricomp.save(filename, flat.tree, reference=base, spec=spec, metadata=notes, threads=threads)


def load_file(filename: Path, *, reference: Any = None, threads: int | None = None) -> dict[str, Any]:
    """All arrays of a `.tri` file by name, in the order of the file, on the default device.

    reference: what it was saved against. threads: see tricomp.open. Raises what tricomp_jax.load raises.
    """
    with JaxSafeOpen(filename, reference, threads) as opened:
        return opened.get_tensors()


def safe_open(
    filename: Path, framework: str = "flax", *, reference: Any = None, threads: int | None = None
) -> JaxSafeOpen | numpy_pair.NumpySafeOpen:
    """Open any `.tri` file: keys(), metadata(), get_tensor(name), get_slice(name)[...]; nothing is decoded yet.

    framework: "flax" or "jax", or "np" for numpy's arrays. reference, threads: as in load_file. Raises what
    tricomp.open raises.
    """
    if framework in ("np", "numpy"):
        return numpy_pair.safe_open(filename, framework, reference=plain_reference(reference), threads=threads)
    if framework not in _FRAMEWORKS:
        raise InvalidArgument(f"safe_open: framework {framework!r} is not 'flax' or 'np'.")
    return JaxSafeOpen(filename, reference, threads)
