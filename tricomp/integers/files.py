"""Quantised arrays in `.tri` files, in the manner of safetensors: a flat dict out, the same dict back.

Codes are decoded straight to integers: no float array is built. FORMAT.md, "Integers". The hard thing: a file tells of
itself what its leaves are, so that nothing is believed of it before leaf and note fit each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tricomp import checkpoint, tree
from tricomp.errors import CorruptFile, InvalidArgument, MissingLeaf, UnsupportedNode
from tricomp.file import File
from tricomp.integers.form import CODES, KEY, SCALE_DTYPES, SCALES, Form, forms_of, note_of
from tricomp.integers.quantized import Quantized, scales_shape
from tricomp.notes import with_notes
from tricomp.plan import Spec
from tricomp.report import Report
from tricomp.tensors import Path, require_text

Array = np.ndarray[Any, Any]


def save_file(
    path: Path,
    arrays: Mapping[str, Quantized | Array],
    metadata: Mapping[str, str] | None = None,
    *,
    spec: Spec | None = None,
    threads: int | None = None,
) -> Report:
    """Write a flat dict of quantised and other arrays to a `.tri` file, atomically.

    metadata: text by text key. threads: see tricomp.open. Raises UnsupportedNode and UnsupportedDtype (naming the
    entry), InvalidArgument, StorageError.
    """
    packed, forms = taken_apart(arrays)
    return checkpoint.save(
        path, packed, None, spec, with_notes(require_text(metadata), note_of(forms), KEY), None, threads
    )


def load_file(path: Path, names: Iterable[str] | None = None, *, threads: int | None = None) -> dict[str, Any]:
    """The dict that save_file was given, in the order of the file: a Quantized or an array by name.

    names: entries or fnmatch patterns; None: all. threads: see tricomp.open.

    Raises MissingLeaf if a name matches nothing, InvalidArgument for a file whose tree is no flat dict, CorruptFile,
    and what tricomp.load raises.
    """
    with checkpoint.open_file(path, threads=threads) as file:
        return entries_of(file, None if names is None else list(names))


def taken_apart(arrays: Mapping[str, Quantized | Array]) -> tuple[dict[str, Any], dict[str, Form]]:
    """The tree that a file holds, and the Form of each quantised array in it by its path.

    Raises UnsupportedNode, naming the entry, for what is no array.
    """
    if not isinstance(arrays, Mapping):
        raise InvalidArgument(f"save_file: expected a dict of str to arrays, got a {type(arrays).__name__}.")
    packed: dict[str, Any] = {}
    forms: dict[str, Form] = {}
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise UnsupportedNode(f"the key {name!r} is a {type(name).__name__}, expected str. Rename the entry.")
        if isinstance(array, Quantized):
            packed[name] = {CODES: array.codes, SCALES: array.scales}
            forms[tree.join(None, name)] = Form(array.bits, array.group, array.dtype)
        elif isinstance(array, np.ndarray | np.generic):
            packed[name] = array
        else:
            raise UnsupportedNode(
                f"entry {name!r}: expected a Quantized or a numpy array, got a {type(array).__name__}. Leave it out."
            )
    return packed, forms


def names_of(file: File) -> dict[str, Form | None]:
    """Entry to its Form, None for what is not quantised, in the order of the file.

    Raises InvalidArgument if the file's tree is no flat dict, but for quantised arrays; CorruptFile.
    """
    forms = forms_of(file)
    found: dict[str, Form | None] = {}
    for path in file:
        node, _, last = path.rpartition("/")
        is_part = node in forms and last in (CODES, SCALES)
        place = node if is_part else path
        if "/" in place:
            raise InvalidArgument(f"{file.name}: leaf {path!r} stands in no flat dict. Use tricomp.load.")
        found[tree.key_of(place)] = forms[node] if is_part else None
    return found


def entries_of(file: File, patterns: Iterable[str] | None = None) -> dict[str, Any]:
    """The entries of an open file, those that match alone. Raises what load_file raises."""
    known = names_of(file)
    if patterns is not None:
        known = chosen(known, patterns, file.name)
    leaves = {name: _paths(name, form) for name, form in known.items()}
    arrays = file.load([path for paths in leaves.values() for path in paths])
    return {
        name: quantized(file.name, name, form, *(arrays.pop(path) for path in leaves[name]))
        if form is not None
        else arrays.pop(*leaves[name])
        for name, form in known.items()
    }


def chosen(known: Mapping[str, Form | None], patterns: Iterable[str], where: str) -> dict[str, Form | None]:
    """Those that match a name or pattern. Raises MissingLeaf for one that matches nothing."""
    asked: set[str] = set()
    for pattern in patterns:
        found = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            raise MissingLeaf(f"{where}: no entry matches {pattern!r} among its {len(known)}. See tricomp inspect.")
        asked.update(found)
    return {name: form for name, form in known.items() if name in asked}


def quantized(where: str, name: str, form: Form, codes: Array, scales: Array) -> Quantized:
    """A Quantized of what a file holds. Raises CorruptFile if its parts do not fit each other."""
    check_parts(where, name, form, codes.dtype.name, codes.shape, scales.dtype.name, scales.shape)
    return Quantized(codes, scales, form.bits, form.group, form.dtype)


def check_parts(
    where: str,
    name: str,
    form: Form,
    codes_dtype: str,
    codes: tuple[int, ...],
    scales_dtype: str,
    scales: tuple[int, ...],
) -> None:
    """Raise CorruptFile if leaves of these dtypes and shapes are no codes and scales of a Form."""
    if codes_dtype != "int8" or not codes or scales_dtype not in SCALE_DTYPES:
        raise CorruptFile(
            f"{where}: {name!r}: expected int8 codes [out, ...] and scales of {' or '.join(SCALE_DTYPES)}, got "
            f"{codes_dtype}{list(codes)} and {scales_dtype}. Fetch the file again."
        )
    if scales != (expected := scales_shape(codes, form.group)):
        raise CorruptFile(
            f"{where}: {name!r}: codes {list(codes)}, group {form.group}: expected scales {list(expected)}, got "
            f"{list(scales)}. Fetch the file again."
        )


def _paths(name: str, form: Form | None) -> list[str]:
    path = tree.join(None, name)
    return [path] if form is None else [f"{path}/{CODES}", f"{path}/{SCALES}"]
