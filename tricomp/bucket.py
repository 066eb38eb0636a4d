"""Storage on any file system that fsspec has: S3, GCS, Azure, SFTP, memory and the rest. Knows a file's tail, no codec.

The hard thing: no name changes hands in one instant here, as a rename does in a folder. A file is one object whose tail
comes last; an object without a sound tail is none, however it came about. Object stores show an object when its upload
is complete, and replace in one instant. On every other file system a file that would replace another is written under
a second name first, hidden, and from its last byte on it is read in the other's place, until its copy stands there.

A reader that has a file open while it is replaced finds checksums that do not match, and opens it again. A multi-part
upload that a writer's death left unfinished is no object: it is seen by nobody, and costs money until the bucket's
rules abort it (for S3: a lifecycle rule AbortIncompleteMultipartUpload of some days).
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tricomp.bounds import Bytes
from tricomp.cache import Cache, CachedFile, Filling
from tricomp.errors import MissingFile, StorageError, StoreLocked, TricompError
from tricomp.lease import LEASE_SECONDS, LeaseLock, take
from tricomp.objects import Entry, Objects
from tricomp.ranged import PART_BYTES, RangedFile
from tricomp.tail import is_of_another_format

_log = logging.getLogger("tricomp")
_FRESH_SECONDS = 10.0  # how long what a listing told of sizes is taken as true
_HELD_BYTES = 32 << 20  # of ends of files, kept
_TOGETHER = 32  # files whose ends are asked for at a time
_PLACES = ("endpoint_url", "client_kwargs", "account_name", "host")  # options that tell buckets of one name apart


class Bucket:
    """Storage at an fsspec URL, one object a file. cache: where files that serve as references are kept, whole."""

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        cache: Cache | None = None,
        lease: float = LEASE_SECONDS,
    ) -> None:
        """No request is made. Raises InvalidArgument when fsspec or the file system's package is missing."""
        options = dict(storage_options or {})
        self._objects = Objects(url, options)
        self.url = self._objects.url
        self._places = {key: str(options[key]) for key in _PLACES if key in options}
        self._cache, self._lease = cache, lease
        self._lock: weakref.ref[LeaseLock] | None = None
        self._listed: dict[str, Entry] = {}  # by the name of the file, which may stand under another as yet
        self._spares: set[str] = set()
        self._whole: dict[str, tuple[object, bool]] = {}
        self._held: OrderedDict[str, tuple[object, list[tuple[int, bytes]]]] = OrderedDict()
        self._n_puts: dict[str, int] = {}

    def put(self, name: str, pieces: Iterable[Bytes]) -> None:
        """Write a file from pieces, uploading while they come; whatever pieces raises passes through.

        Until the last byte is there, what was there before is what readers see; when something is raised, what was
        written is removed. Raises StorageError, and StoreLocked when another writer took the lock meanwhile.
        """
        before = self._find(name)
        is_replaced = before is not None and not self._objects.is_atomic and self._is_whole(before)
        filling = None if self._cache is None else self._cache.filling()
        try:
            is_new = before is None or not self._objects.is_atomic
            self._write(_spare(name) if is_replaced else name, _poured(pieces, filling), is_new)
            if is_replaced:
                self._move(_spare(name), name)
            if filling is not None and (entry := self._find(name)) is not None:
                filling.commit(self._key(name, entry), entry.n_bytes)
        finally:
            if filling is not None:
                filling.abort()

    def get(self, name: str) -> RangedFile:
        """A file, to be read in ranges. Raises MissingFile, StorageError."""
        return self._open(name, self._entry(name))

    def near(self, name: str, is_fetched: bool) -> RangedFile | CachedFile:
        """A file as get gives it, or its copy in the cache; is_fetched: which is made if there is none."""
        entry = self._entry(name)
        if self._cache is None or entry.n_bytes > self._cache.max_bytes:
            return self._open(name, entry)
        key, shown = self._key(name, entry), self._objects.shown(name)
        cached = self._cache.get(key, entry.n_bytes, shown, lambda: self._open(name, entry))
        if cached is None and is_fetched:
            filling = self._cache.filling()
            try:
                for piece in self._stretches(name, entry):
                    filling.write(piece)
                    if filling.is_full:
                        break
                filling.commit(key, entry.n_bytes)
            finally:
                filling.abort()
            cached = self._cache.get(key, entry.n_bytes, shown, lambda: self._open(name, entry))
        return self._open(name, entry) if cached is None else cached

    def each(self, names: Iterable[str]) -> Iterator[tuple[str, RangedFile | TricompError]]:
        """The files of these names, their ends fetched some dozens at a time; or why one cannot be read."""
        waiting = list(names)
        while waiting:
            some, waiting = waiting[:_TOGETHER], waiting[_TOGETHER:]
            found: dict[str, RangedFile | TricompError] = {}
            for name in some:
                try:
                    found[name] = self.get(name)
                except TricompError as error:
                    found[name] = error
            self._fetch_ends(found)
            self._fetch_ends(found)  # header and index, where the tail told that they are elsewhere
            yield from found.items()

    def torn(self, names: Iterable[str]) -> set[str]:
        """Those of the files listed last that do not end in a sound tail; asked once for each state of a file."""
        known: dict[str, bool] = {}
        unknown: list[str] = []
        for name in names:
            stamp, is_whole = self._whole.get(name, (None, False))
            if name in self._listed and stamp != self._stamp(name, self._listed[name]):
                unknown.append(name)
            elif name in self._listed:
                known[name] = is_whole
        while unknown:
            some, unknown = unknown[:_TOGETHER], unknown[_TOGETHER:]
            files: dict[str, RangedFile | TricompError] = {name: self._open(name, self._listed[name]) for name in some}
            self._fetch_ends(files)
            for name, file in files.items():
                if isinstance(file, StorageError):
                    raise file
                known[name] = isinstance(file, RangedFile) and file.is_whole
                self._whole[name] = self._stamp(name, self._listed[name]), known[name]
        return {name for name, is_whole in known.items() if not is_whole}

    def list(self) -> dict[str, object]:
        """Names of the files there, whole or not, but for hidden ones, each with a stamp. Raises StorageError."""
        entries = self._objects.listed()
        self._listed = {name: entry for name, entry in entries.items() if not name.startswith(".")}
        self._spares = {name for name in entries if _target(name) is not None and not self._objects.is_atomic}
        for spare in self._spares:
            if (target := _target(spare)) is not None and self._is_whole(entries[spare]):
                self._listed[target] = entries[spare]
        return {name: self._stamp(name, entry) for name, entry in self._listed.items()}

    def folders(self) -> tuple[str, ...]:
        """Names of the folders there, without hidden ones, in order. Raises StorageError."""
        return tuple(name for name in self._objects.folders() if not name.startswith("."))

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is gone. Raises StorageError."""
        self._forget(name)
        self._objects.delete_object(name)
        if not self._objects.is_atomic:
            self._objects.delete_object(_spare(name))

    def lock(self) -> LeaseLock:
        """Become the only writer. Raises StoreLocked, naming the holder; StorageError."""
        lock = take(self._objects, self._lease)
        self._lock = weakref.ref(lock)
        return lock

    def tidy(self, is_ours: Callable[[str], bool]) -> None:
        """Finish what a dead writer was replacing, and remove the torn files it left, among names that are ours.

        Called by who has the lock; nothing is done while the writer that had it before may still be at work.
        """
        lock = None if self._lock is None else self._lock()
        if lock is None or lock.may_have_company:
            return
        names = [name for name in self.list() if is_ours(name)]
        moved = {name: self._listed[name].name for name in names if self._listed[name].name != name}
        for spare in self._spares - set(moved.values()):
            if (target := _target(spare)) is not None and is_ours(target):
                self._objects.delete_object(spare)
        for name in self.torn([name for name in names if name not in moved]):
            file = self._open(name, self._listed[name])
            if is_of_another_format(file.read(0, min(file.n_bytes, 10))):
                _log.warning("%s: is of a newer format, or damaged: left alone", self._objects.shown(name))
                continue
            _log.warning("%s: has no sound end, and its writer is gone: removed", self._objects.shown(name))
            self.delete(name)
        for name, spare in moved.items():
            self._move(spare, name)

    def _write(self, name: str, pieces: Iterable[Bytes], is_new: bool) -> None:
        """Upload one object, and renew the lock, if there is one, meanwhile and before the end."""
        lock = None if self._lock is None else self._lock()

        def beat(is_ending: bool) -> None:
            if lock is not None and lock.is_held:
                if is_ending:
                    lock.refresh()
                else:
                    lock.refresh_if_due()

        try:
            self._objects.upload(name, pieces, is_new, beat)
        finally:
            self._forget(name)

    def _move(self, spare: str, name: str) -> None:
        """Put a whole spare in its file's place. What fails here is left for the next writer: readers see the spare."""
        try:
            found = self._objects.look_up(spare)
            if found is not None:
                self._write(name, self._stretches(name, found), is_new=False)
                self._objects.delete_object(spare)
        except StoreLocked:
            raise
        except TricompError as error:
            _log.warning("%s: is whole, under the name %s as yet: %s", self._objects.shown(name), spare, error)
        finally:
            self._forget(name)

    # What is known of files

    def _find(self, name: str) -> Entry | None:
        """What a file of that name is now: an object, or the whole one that is about to take its place."""
        if not self._objects.is_atomic:
            spare = self._objects.look_up(_spare(name))
            if spare is not None and self._is_whole(spare):
                return spare
        return self._objects.look_up(name)

    def _entry(self, name: str) -> Entry:
        entry = self._listed.get(name)
        if entry is None or time.monotonic() - entry.asked > _FRESH_SECONDS:
            entry = self._find(name)
        if entry is None:
            raise MissingFile(f"{self._objects.shown(name)}: there is no such file. Check the URL.")
        return entry

    def _stamp(self, name: str, entry: Entry) -> tuple[object, ...]:
        """The stamp of a file; another after each write here, even if size and time are the same."""
        return (entry.name, *entry.stamp, self._n_puts.get(name, 0))

    def _is_whole(self, entry: Entry) -> bool:
        stamp = self._stamp(entry.name, entry)
        known = self._whole.get(entry.name)
        if known is None or known[0] != stamp:
            known = self._whole[entry.name] = stamp, self._open(entry.name, entry).is_whole
        return known[1]

    def _forget(self, name: str) -> None:
        self._n_puts[name] = self._n_puts.get(name, 0) + 1
        self._listed.pop(name, None)
        self._whole.pop(name, None)
        self._held.pop(name, None)

    def _key(self, name: str, entry: Entry) -> str:
        """The name of a file's copy in the cache."""
        return Cache.key(self.url, self._places, name, entry.stamp)

    # Reading

    def _open(self, name: str, entry: Entry) -> RangedFile:
        """A file, with those parts of it that were fetched before."""
        stamp, held = self._held.pop(name, (None, []))
        if stamp != self._stamp(name, entry):
            held = []
        self._held[name] = self._stamp(name, entry), held
        n_bytes = 0
        for other in reversed(tuple(self._held)):
            n_bytes += sum(len(data) for _, data in self._held[other][1])
            if n_bytes > _HELD_BYTES and other != name:
                del self._held[other]
        shown = self._objects.shown(name)
        fetch = self._objects.ranges
        return RangedFile(shown, entry.n_bytes, lambda ranges: fetch(entry.name, ranges), held, entry.name)

    def _fetch_ends(self, files: dict[str, RangedFile | TricompError]) -> None:
        """Get what is wanted next of the ends of files, of all at once; one that cannot be read becomes its error."""
        opened = {name: file for name, file in files.items() if isinstance(file, RangedFile)}
        wanted = [(name, one) for name, file in opened.items() for one in file.wanted()]
        if not wanted:
            return
        came = self._objects.ranges_of_many([(opened[name].path, one) for name, one in wanted])
        for (name, one), data in zip(wanted, came, strict=True):
            if isinstance(data, TricompError):
                files[name] = data
            elif len(data) == one[1]:
                opened[name].hold([one], [data])

    def _stretches(self, name: str, entry: Entry) -> Iterator[Bytes]:
        """The whole of a file, some parts at a time."""
        file = self._open(name, entry)
        for start in range(0, entry.n_bytes, 4 * PART_BYTES):
            yield file.ranges([(start, min(4 * PART_BYTES, entry.n_bytes - start))])[0]


def _spare(name: str) -> str:
    return f".{name}.new"


def _target(name: str) -> str | None:
    """The name of the file that a spare is to replace."""
    return name[1:-4] if name.startswith(".") and name.endswith(".new") else None


def _poured(pieces: Iterable[Bytes], filling: Filling | None) -> Iterator[Bytes]:
    for piece in pieces:
        if filling is not None:
            filling.write(piece)
        yield piece
