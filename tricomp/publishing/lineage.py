"""The versions in a published folder: which there are, how to come from one to another, what is known of each.

Imports storage and version. The hard thing: a copy that is behind may go through deltas only if nothing between is
missing, and else, or where a full version lies between, begins there: the route is found before a byte is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tricomp import storage
from tricomp.errors import CorruptFile, MissingFile, MissingParent
from tricomp.publishing.version import ADVICE, Delta, Full, Version, folder_name, number_of, read_version
from tricomp.storage import Storage


@dataclass(frozen=True)
class Route:
    """How to come to a version. start: the version to begin at, full if it is to be fetched; deltas: in order.

    full: the full version to begin at; None: at what is there, which is version start.
    """

    start: int
    full: Version | None
    deltas: tuple[Version, ...]

    @property
    def format(self) -> str:
        """Of the deltas, else of the full version."""
        return self.deltas[0].format if self.deltas else self.full.format if self.full else "safetensors"


class Lineage:
    """The versions of one folder or URL. What was read of a version is kept: it never changes."""

    def __init__(self, folder: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        """No request is made. Raises InvalidArgument."""
        self.where = storage.at(folder, storage_options)
        self._options = storage_options
        self._known: dict[int, Version] = {}

    def place(self, number: int) -> Storage:
        """Where a version's files stand."""
        url = self.where.url
        return storage.at(url.rstrip("/") + "/" + folder_name(number), self._options if storage.is_url(url) else None)

    def numbers(self) -> list[int]:
        """The versions that have a folder, published or not, in order."""
        found = (number_of(name) for name in self.where.folders())
        return sorted(number for number in found if number is not None)

    def find(self, number: int) -> Version | None:
        """A version; None: it is not published."""
        if number not in self._known:
            found = read_version(self.place(number), number)
            if found is None:
                return None
            self._known[number] = found
        return self._known[number]

    def latest(self) -> int | None:
        """The newest published version; None: there is none."""
        return next((number for number in reversed(self.numbers()) if self.find(number) is not None), None)

    def route(self, target: int, applied: int | None) -> Route:
        """How to come to target from what is there. applied: its version; None: it may be any, or nothing.

        Where applied is None and no full version is found, the route begins at what the oldest delta builds on.
        Raises MissingFile (target is not published), MissingParent, CorruptFile.
        """
        deltas: list[Version] = []
        number = target
        while True:
            if number == applied:
                return _route(Route(number, None, tuple(reversed(deltas))), self.where.url)
            version = self.find(number)
            if version is None and number == target:
                latest = self.latest()
                newest = "nothing is" if latest is None else f"the newest is {latest}"
                raise MissingFile(f"{self.where.url}: version {target} is not published yet ({newest}). Wait for it.")
            if version is None:
                if applied is None:
                    return _route(Route(number, None, tuple(reversed(deltas))), self.where.url)
                raise MissingParent(
                    f"{self.where.url}: version {deltas[-1].number} builds on {number}, which is not there, and the "
                    f"copy is at {applied}. Let the trainer publish a full version."
                )
            if version.base is None:
                return _route(Route(number, version, tuple(reversed(deltas))), self.where.url)
            deltas.append(version)
            number = version.base

    def checksums(self, number: int) -> dict[str, tuple[str, str]]:
        """Format and checksum of each tensor of a version, as far as the folder knows them. In safetensors only."""
        route = self.route(number, None)
        found: dict[str, tuple[str, str]] = {}
        if route.full is not None and route.full.format == "safetensors":
            with Full(route.full) as full:
                known = {name: full.checksum(name) for name in full.tensors}
                found.update((name, value) for name, value in known.items() if value is not None)
        for version in route.deltas:
            if version.format == "safetensors":
                with Delta(version) as delta:
                    found.update((name, (version.checksum, delta.checksum(name))) for name in delta.names)
        return found


def _route(found: Route, url: str) -> Route:
    formats = {version.format for version in found.deltas}
    if len(formats) > 1:
        raise CorruptFile(f"{url}: deltas as .tri and as safetensors follow one another. {ADVICE}")
    return found
