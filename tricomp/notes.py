"""Notes: what an adapter keeps in a file beside the caller's metadata, under a key of its own. Imports errors only.

The hard thing: notes come back from a file, which anybody may have written, so that not even their form is certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tricomp.errors import InvalidArgument


def with_notes(metadata: Mapping[str, Any] | None, notes: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The caller's metadata with the notes beside it, if there are any. Raises InvalidArgument if it uses their key."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InvalidArgument(f"metadata: expected a dict of plain values, got {type(metadata).__name__}.")
    metadata = dict(metadata or {})
    if key in metadata:
        raise InvalidArgument(f"metadata: the key {key!r} is kept for tricomp's own notes. Use another key.")
    return {**metadata, key: dict(notes)} if notes else metadata


def notes_of(metadata: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """The notes in a file's metadata, empty for files that another program wrote."""
    notes = (metadata or {}).get(key, {})
    return dict(notes) if isinstance(notes, Mapping) else {}


def without_notes(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The caller's part of a file's metadata."""
    return {name: value for name, value in metadata.items() if name != key}
