"""What a quantised array is, as a file tells it: bits, group, dtype. Imports errors and numbers only.

A file holds such an array as two leaves beside each other, `<name>/codes` and `<name>/scales`, and here is the note
that says so, under the key "tricomp_integers" of its metadata. The hard thing: a note comes from a file, which anybody
may have written, so that it is checked before it is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tricomp.errors import CorruptFile, InvalidArgument
from tricomp.file import File
from tricomp.notes import notes_of

KEY = "tricomp_integers"
"""The key of a file's metadata under which quantised arrays are told: {"version": 1, "arrays": {path: Form}}."""
CODES, SCALES = "codes", "scales"
BITS = (8, 7, 6, 5, 4)
FLOATS = ("float32", "bfloat16", "float16", "float64")
SCALE_DTYPES = ("float32", "bfloat16")
GROUP_STEP = 16  # a group is a multiple of it
_VERSION = 1


@dataclass(frozen=True)
class Form:
    """bits: of a code, 8 or 4 or between. group: elements of a row that share a scale; None: all of a row.

    dtype: name of the float dtype that the array had. Raises InvalidArgument for others.
    """

    bits: int
    group: int | None
    dtype: str

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise InvalidArgument(f"expected 8 or 4 bits (or 5 to 7), got {self.bits!r}.")
        is_whole = type(self.group) is int and 0 < self.group < 1 << 48 and self.group % GROUP_STEP == 0
        if self.group is not None and not is_whole:
            raise InvalidArgument(
                f"expected a group of a multiple of {GROUP_STEP} elements, or None for one scale a row, got "
                f"{self.group!r}."
            )
        if self.dtype not in FLOATS:
            raise InvalidArgument(f"dtype {self.dtype!r}: expected one of {', '.join(FLOATS)}.")

    def describe(self) -> str:
        """For people: "int8 a row", "int4 in groups of 64"."""
        return f"int{self.bits} " + ("a row" if self.group is None else f"in groups of {self.group}")


def note_of(forms: Mapping[str, Form]) -> dict[str, Any]:
    """The note of a file with these arrays, by the path of the node that holds codes and scales."""
    return {"version": _VERSION, "arrays": {path: asdict(form) for path, form in forms.items()}}


def forms_of(file: File) -> dict[str, Form]:
    """Path to Form of the quantised arrays in an open file; empty for a file of others. Raises CorruptFile."""
    note = notes_of(file.metadata, KEY)
    what = f"{file.name}: what it tells of its integers"
    if not note:
        return {}
    arrays = note.get("arrays")
    if note.get("version") != _VERSION or not isinstance(arrays, Mapping):
        raise CorruptFile(f"{what} is not of version {_VERSION}. Upgrade tricomp, or fetch the file again.")
    found: dict[str, Form] = {}
    for path, told in arrays.items():
        leaves = [f"{path}/{name}" for name in (CODES, SCALES)]
        if not isinstance(path, str) or not all(leaf in file for leaf in leaves):
            raise CorruptFile(f"{what}: {path!r:.80} has no codes and scales in it. Fetch the file again.")
        try:
            found[path] = Form(**told)
        except (InvalidArgument, TypeError) as error:
            raise CorruptFile(f"{what}: {path!r}: {error} Fetch the file again.") from None
    return found
