"""numpy's arrays in `.tri` files with the functions and argument order of safetensors.numpy. Flat dicts only.

Trees of any shape go through tricomp.save and tricomp.load. The hard thing is this module's name: within the package,
`import numpy` still means numpy, since imports are absolute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tricomp import checkpoint
from tricomp.bounds import Bytes
from tricomp.codec import Engine
from tricomp.content import content_of
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.memory import HeldFile, Memory
from tricomp.plan import Spec
from tricomp.report import Report
from tricomp.tensors import Path, SafeOpen, Slice, arrays_of, names_of, require_tensors, require_text

Array = np.ndarray[Any, Any]

__all__ = ["NumpySafeOpen", "Slice", "load", "load_file", "safe_open", "save", "save_file"]

_KINDS = (np.ndarray, np.generic)
_FRAMEWORKS = ("np", "numpy")


class NumpySafeOpen(SafeOpen[Array]):
    """What safe_open returns: the names of a file's tensors, and its arrays when asked for."""

    def made(self, path: str, array: Array) -> Array:
        """The array as it is."""
        return array


def save_file(
    tensors: Mapping[str, Array],
    filename: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    reference: Any = None,
    spec: Spec | None = None,
    threads: int | None = None,
) -> Report:
    """Write a flat dict of arrays to a `.tri` file, atomically.

    metadata: text by text key. reference: a path, an open File or a dict of arrays to code against, needed again to
    load. threads: see tricomp.open. Raises UnsupportedNode and UnsupportedDtype (naming the entry), InvalidArgument,
    StorageError.
    """
    tree = require_tensors(tensors, _KINDS, "numpy array")
    return checkpoint.save(filename, tree, reference, spec, require_text(metadata), threads=threads)


def load_file(filename: Path, *, reference: Any = None, threads: int | None = None) -> dict[str, Array]:
    """All arrays of a `.tri` file by name, in the order of the file. Raises what tricomp.load raises."""
    with safe_open(filename, reference=reference, threads=threads) as opened:
        return opened.get_tensors()


def safe_open(
    filename: Path,
    framework: str = "np",
    device: str | None = "cpu",
    *,
    reference: Any = None,
    threads: int | None = None,
) -> NumpySafeOpen:
    """Open any `.tri` file: keys(), metadata(), get_tensor(name), get_slice(name)[...]; nothing is decoded yet.

    framework: "np" or "numpy". device: "cpu". threads: see tricomp.open. Raises what tricomp.open raises.
    """
    if framework not in _FRAMEWORKS:
        raise InvalidArgument(
            f"safe_open: framework {framework!r} is not 'np'. For torch, use tricomp_torch.safe_open."
        )
    if device not in ("cpu", None):
        raise InvalidArgument(f"safe_open: device {device!r}: numpy's arrays are on the CPU. Leave device out.")
    return NumpySafeOpen(filename, reference, threads)


def save(
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    *,
    spec: Spec | None = None,
    threads: int | None = None,
) -> bytes:
    """The bytes of the file that save_file would write."""
    engine = Engine(threads)
    memory = Memory()
    content = content_of(require_tensors(tensors, _KINDS, "numpy array"))
    checkpoint.put(memory, "bytes", content, None, spec, require_text(metadata), engine=engine)
    held = memory.get("bytes")
    return bytes(held.read(0, held.n_bytes))


def load(data: Bytes | bytearray, *, threads: int | None = None) -> dict[str, Array]:
    """All arrays of a `.tri` file by name, given its bytes. Raises what tricomp.load raises."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InvalidArgument(f"load: expected the bytes of a .tri file, got a {type(data).__name__}. See load_file.")
    if isinstance(data, memoryview) and not data.c_contiguous:
        raise InvalidArgument("load: the bytes do not stand in a row in memory. Pass bytes(data).")
    with File(HeldFile(memoryview(data), "bytes"), threads=threads) as file:
        names = {path: name for name, path in names_of(file).items()}
        return {names[path]: array for path, array in arrays_of(file, names)}
