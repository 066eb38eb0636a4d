"""Files of torch.save (.pt, .pth, .ckpt) as the format "torch": read into trees, written again. No code in them is run.

They are pickles, and torch.load(weights_only=True) alone opens them here: what else a pickle asks for is named and
refused. The hard thing: of a file that is one leaf a storage, the leaves' bytes are found where they stand, so that the
file can be rebuilt byte for byte without torch.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch

from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, TricompError, UnsupportedFormat
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats import Span, TensorFile
from tricomp_torch.pt_archive import Archive, read_archive, spans_of
from tricomp_torch.pt_export import written
from tricomp_torch.subclasses import known_classes
from tricomp_torch.trees import NOTES_KEY, flatten, gradient_of

_ZIP = b"PK\3\4"
_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")  # torch's magic number, pickled first in files from before the zip form
_N_SHOWN = 4
_ADVICE = "Load it where you trust it, and save tensors and plain values only, such as model.state_dict()."
# What arrays of numpy pickle as. The dtypes are the plain ones: neither objects nor records.
_NUMPY: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.{core}.multiarray.{name}": getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
       for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
}  # fmt: skip
_NUMPY_DTYPES = sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}, key=str)


class Torch:
    """The format "torch", see tricomp.formats.base.Format."""

    name = "torch"
    suffixes = (".pt", ".pth", ".ckpt")

    def matches(self, head: bytes, path: str) -> bool:
        """A zip with a data.pkl in its one folder, or the magic number of earlier files."""
        if not head.startswith(_ZIP):
            return head[:1] == b"\x80" and _LEGACY in head[:40]
        try:
            source = LocalFile(path)
            try:
                return read_archive(path, source) is not None
            finally:
                source.close()
        except (TricompError, OSError):
            return path.lower().endswith(self.suffixes)

    def read(self, path: str) -> TensorFile:
        """The tree that `tricomp_torch.flatten` makes of what torch.load gives; tensors are mapped, not read.

        Files from before the zip form are read into memory. Raises UnsupportedFormat, and InvalidArgument if the file
        is damaged, or holds a program or an object that torch.load(weights_only=True) would refuse, which is named.
        """
        source = LocalFile(path)
        try:
            archive = _archive(path, source)
            obj = _load(path, archive)
            if archive is not None:
                _require_finite(obj, archive.pickle_bytes, path)
            leaves: list[tuple[str, torch.Tensor]] = []
            try:
                flat = flatten(obj, lambda leaf, tensor: leaves.append((leaf, tensor)))
            except InvalidArgument as error:
                raise type(error)(f"{path}: {error}") from error
            spans: tuple[Span, ...] | None = None
            if archive is not None and archive.is_mappable and archive.is_little:
                spans = spans_of(leaves, archive, source)
        except BaseException:
            source.close()
            raise
        gradients = {leaf: note for leaf, tensor in leaves if (note := gradient_of(tensor))}
        own = {**flat.notes, "gradients": gradients} if gradients else flat.notes
        notes = {NOTES_KEY: own} if own else {}
        return TensorFile(os.path.basename(path), self.name, flat.tree, source.n_bytes, spans, source, notes)

    def pieces(self, file: File) -> Iterator[Bytes]:
        """As torch.save writes the tree that tricomp_torch.load gives."""
        return written(file, self.read)


FORMAT = Torch()


def _archive(path: str, source: LocalFile) -> Archive | None:
    """The zip archive that a file is; None: it is of the earlier form. Raises InvalidArgument, UnsupportedFormat."""
    head = bytes(source.read(0, min(source.n_bytes, 64)))
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise UnsupportedFormat(
            f"{path}: reading files of torch.save needs torch 2.6 or later, this is {torch.__version__}."
        )
    if not head.startswith(_ZIP):
        if _LEGACY in head[:40]:
            return None
        what = "a pickle that torch.save did not write" if head[:1] == b"\x80" else "something else"
        what, advice = (what, _ADVICE) if head else ("an empty file", "Download or copy it again.")
        raise UnsupportedFormat(f"{path}: expected a file of torch.save, got {what}. {advice}")
    archive = read_archive(path, source)
    if archive is None:
        raise UnsupportedFormat(f"{path}: expected a file of torch.save, got a zip archive without a data.pkl.")
    if archive.is_script:
        raise InvalidArgument(
            f"{path}: is a TorchScript archive, which holds a program; nothing of it was run. "
            "Load it where you trust it with torch.jit.load, and save its state_dict()."
        )
    return archive


def _load(path: str, archive: Archive | None) -> Any:
    """What torch.load(weights_only=True) gives, storages mapped where they can be."""
    allowed: list[Any] = []
    if archive is not None:
        asked = _unsafe_globals(path)
        classes = known_classes(asked)
        refused = sorted(asked - set(classes) - set(_NUMPY) - {_full_name(cls) for cls in _NUMPY_DTYPES})
        if refused:
            _refuse(path, refused)
        allowed += classes.values()
    allowed += _NUMPY_DTYPES
    allowed += [(value, name) for name, value in _NUMPY.items()]
    is_mapped = archive is not None and archive.is_mappable
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and odd classes: what matters is an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # whatever a hostile pickle can make torch raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            _refuse(path, [found[1]])
        raise InvalidArgument(
            f"{path}: torch.load(weights_only=True) cannot read it: {_reason(error)}. "
            "It is damaged, or holds more than tensors and plain values."
        ) from error


def _reason(error: Exception) -> str:
    """What torch says is wrong, in one line, without its advice to trust the file."""
    said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return said.partition("\n")[0].strip().rstrip(".")[:200] or type(error).__name__


def _unsafe_globals(path: str) -> set[str]:
    """Names that the pickle asks for and torch.load(weights_only=True) would not give it; read, not run."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of a pickle that is no such; torch.load then says what is wrong with it
        return set()


def _refuse(path: str, names: list[str]) -> NoReturn:
    shown = ", ".join(names[:_N_SHOWN]) + (f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else "")
    raise InvalidArgument(f"{path}: its pickle asks for {shown}, so it may hold code; nothing of it was run. {_ADVICE}")


def _require_finite(obj: Any, n_bytes: int, path: str) -> None:
    """Raise CorruptFile for a tree that a few bytes of pickle blow up by naming the same containers again and again."""
    waiting, n_left = [obj], 1000 + 4 * n_bytes
    while waiting:
        node = waiting.pop()
        entries = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple, set)) else ()
        n_left -= 1 + len(entries)
        if n_left < 0:
            raise CorruptFile(f"{path}: a pickle of {n_bytes} bytes that unfolds to a tree without end.")
        waiting += entries


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
