"""The files of steps that a storage holds, and how they hang together; opened with their chains. Decodes nothing.

The hard thing: there is no manifest. What there is, is what the storage lists; which file needs which, headers and
tails tell. They are read once, and again when a file's stamp changes; of far files, as few as will do, together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tricomp import container
from tricomp.bucket import Bucket
from tricomp.chain import Link, chains
from tricomp.content import Content
from tricomp.errors import MissingFile, MissingParent, MissingStep, StorageError, TricompError
from tricomp.file import File
from tricomp.storage import Source, Storage

STEP_NAME = re.compile(r"step-(\d{12,18})\.tri")
_NEAR_STEPS = 12  # where a far parent is looked for first, before all files are asked


@dataclass(frozen=True)
class Stored:
    """A file of the store, as listed."""

    name: str
    stamp: object


class Steps:
    """The files of steps in a storage."""

    def __init__(self, where: Storage, threads: int | None = None, backend: str | None = None) -> None:
        """threads, backend: for the Files that are opened."""
        self.url = where.url
        self._threads, self._backend = threads, backend
        self._storage = where
        self._bucket = where if isinstance(where, Bucket) else None
        self._known: dict[str, tuple[object, Link | TricompError]] = {}

    def files(self) -> dict[int, Stored]:
        """The files of steps that are there, whole or not."""
        listed = self._storage.list()
        return {int(found[1]): Stored(name, listed[name]) for name in listed if (found := STEP_NAME.fullmatch(name))}

    def seen(self, files: Mapping[int, Stored]) -> list[int]:
        """The steps of those files that count: in a bucket, those with a sound end."""
        if self._bucket is None:
            return list(files)
        torn = self._bucket.torn([file.name for file in files.values()])
        return [step for step, file in files.items() if file.name not in torn]

    def highest(self, files: Mapping[int, Stored]) -> int | None:
        """The highest of the steps that count, or None."""
        return next((step for step in sorted(files, reverse=True) if self.seen({step: files[step]})), None)

    def links(self) -> list[Link]:
        """The links of all files whose header, index and tail are sound; read once, and again when a file changes."""
        files = self.files()
        names = {file.name for file in files.values()}
        self._known = {name: known for name, known in self._known.items() if name in names}
        return self._links_of(files)

    def _links_of(self, files: Mapping[int, Stored]) -> list[Link]:
        unknown = {}
        for step, file in files.items():
            known = self._known.get(file.name)
            # Permissions leave no stamp.
            if known is None or known[0] != file.stamp or isinstance(known[1], StorageError):
                unknown[file.name] = step
        for name, link in self._read_links(unknown):
            self._known[name] = files[unknown[name]].stamp, link
        found = [self._known.get(file.name, (None, None))[1] for file in files.values()]
        return [link for link in found if isinstance(link, Link)]

    def _read_links(self, names: Mapping[str, int]) -> Iterator[tuple[str, Link | TricompError]]:
        """The links in files, or why one cannot be read. A file that was pruned by the writer a moment ago has none."""
        sources = self._each(names) if self._bucket is None else self._bucket.each(names)
        for name, source in sources:
            if isinstance(source, MissingFile):
                continue
            try:
                yield name, source if isinstance(source, TricompError) else _link_in(source, names[name])
            except MissingFile:
                continue
            except TricompError as error:
                yield name, error

    def _each(self, names: Iterable[str]) -> Iterator[tuple[str, Source | TricompError]]:
        for name in names:
            try:
                yield name, self._storage.get(name)
            except TricompError as error:
                yield name, error

    def open(self, step: int, files: Mapping[int, Stored] | None = None, is_reference: bool = False) -> File:
        """The File of a step with its chain behind it. is_reference: a file is about to be coded against all of it.

        Raises MissingParent, CorruptFile and the like.
        """
        chain = self._chain(step, self.files() if files is None else files)
        if chain is None:
            raise self.fault(step)
        file: File | None = None
        try:
            for link in chain:
                try:
                    source = self._source(file_name(link.step), is_reference or link.step != step)
                    below = File(source, file, threads=self._threads, backend=self._backend)
                except MissingFile:
                    raise MissingStep(f"step {link.step} was removed from {self.url} while it was opened.") from None
                if file is not None:
                    below.own(file)
                file = below
        except BaseException:
            if file is not None:
                file.close()
            raise
        assert file is not None  # a chain has at least its own step
        return file

    def _source(self, name: str, is_reference: bool) -> Source:
        return self._storage.get(name) if self._bucket is None else self._bucket.near(name, is_reference)

    def _chain(self, step: int, files: Mapping[int, Stored]) -> tuple[Link, ...] | None:
        """The chain of a step, its keyframe first; None: it cannot be loaded. Few far files are asked, if few do."""
        if self._bucket is None or step not in files:
            return chains(self._links_of(files)).get(step)
        chain: list[Link] = []
        wanted: bytes | None = None
        near = [step]
        while near:
            below = near.pop(0)
            link = next(iter(self._links_of({below: files[below]})), None)
            if link is not None and (not chain or link.content_id == wanted):
                chain.insert(0, link)
                if link.parent is None:
                    return tuple(chain)
                wanted = link.parent
                near = sorted((other for other in files if other < below), reverse=True)[:_NEAR_STEPS]
        return chains(self._links_of(files)).get(step)

    def fault(self, step: int) -> TricompError:
        """Why a step has no chain."""
        links = {link.step: link for link in self.links()}
        if step not in links:
            known = self._known.get(file_name(step))
            return known[1] if known and isinstance(known[1], TricompError) else MissingStep(f"step {step} is gone.")
        ids = {link.content_id: link for link in links.values()}
        link = links[step]
        seen = {link.step}
        while link.parent in ids and ids[link.parent].step not in seen:
            link = ids[link.parent]
            seen.add(link.step)
        damaged = [other for other in self.files() if other not in links]
        note = f" (damaged there: steps {', '.join(map(str, damaged))})" if damaged else ""
        needs = f"step {step} needs" if link.step == step else f"step {step} needs step {link.step}, which needs"
        parent = link.parent.hex() if link.parent else "none"
        return MissingParent(f"{needs} a parent with content id {parent}, which is not in {self.url}{note}.")

    def summary(self, step: int) -> container.Summary:
        """What header, index and tail of a step's file tell without its leaves. Raises MissingStep, CorruptFile."""
        source = self._alone(step)
        try:
            return container.read_summary(source)
        finally:
            source.close()

    def open_alone(self, step: int, reference: File | Content | None) -> File:
        """The File of a step without its chain. Raises MissingStep, CorruptFile, WrongReference and the like."""
        source = self._alone(step)
        try:
            return File(source, reference, threads=self._threads, backend=self._backend)
        except BaseException:
            source.close()
            raise

    def _alone(self, step: int) -> Source:
        try:
            return self._storage.get(file_name(step))
        except MissingFile:
            raise MissingStep(f"step {step} is not in {self.url}.") from None


def _link_in(source: Source, step: int) -> Link:
    try:
        summary = container.read_summary(source)
    finally:
        source.close()
    return Link(step, summary.content_id, summary.parent, summary.since_keyframe)


def file_name(step: int) -> str:
    return f"step-{step:012d}.tri"


def number_of(file: File) -> int:
    """The step of a File of a store."""
    found = STEP_NAME.fullmatch(os.path.basename(file.name))
    assert found is not None  # opened by its step's name
    return int(found[1])
