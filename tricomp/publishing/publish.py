"""publish: the state of a trainer as the next version in a folder, as a delta if it can be one.

Imports lineage, updates, shards and, for `.tri`, checkpoint. The hard thing: readers come at any instant, and so may
death: shards are written first and the index last, whole or not at all; and a version that is there never changes: to
publish it again is to compare it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tricomp import checkpoint, codec
from tricomp.codec import Engine
from tricomp.content import Content, content_of
from tricomp.errors import InvalidArgument, WrongReference
from tricomp.file import File
from tricomp.plan import Spec, check_spec
from tricomp.publishing import checksums, compression, difference, shards
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.local import open_copy
from tricomp.publishing.shards import INDEX, Entry
from tricomp.publishing.tensors import Tensor, tensors_of
from tricomp.publishing.threads import in_order
from tricomp.publishing.updates import BASE_DIGESTS, Decoded, state_of
from tricomp.publishing.version import NOTE, TRI, folder_name, full_key
from tricomp.spool import Spool
from tricomp.tree import join

_log = logging.getLogger("tricomp")
Path = str | os.PathLike[str]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Publication:
    """What publish did. path: of the version's folder. base: the version a delta builds on; None: it is full.

    encoding: of a delta's payloads in safetensors, else "". n_changed: tensors that were written, of n_tensors.
    raw_bytes: of the state. file_bytes: written, but for an index. why: it is full, though a base was there. is_new:
    False: this very version was there already, and nothing was written.
    """

    path: str
    version: int
    base: int | None
    format: str
    encoding: str
    n_tensors: int
    n_changed: int
    raw_bytes: int
    file_bytes: int
    seconds: float
    why: str = ""
    is_new: bool = True


@dataclass(frozen=True)
class Options:
    """How to publish, see publish."""

    full: bool | None = None
    format: str = "safetensors"
    encoding: str = "auto"
    checksum: str = "xxh3-128"
    level: int = 1
    spec: Spec | None = None
    shard_bytes: int = shards.SHARD_BYTES
    threads: int | None = None
    storage_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises InvalidArgument."""
        _require(self.format, ("safetensors", "tri"), "format")
        _require(self.encoding, ("auto", *difference.ENCODINGS), "encoding")
        _require(self.checksum, checksums.FORMATS, "checksum")
        if self.full not in (None, True, False):
            raise InvalidArgument(f"full: expected True, False or None, got {self.full!r:.80}.")
        if type(self.shard_bytes) is not int or self.shard_bytes < 1:
            raise InvalidArgument(f"shard_bytes: expected bytes, 1 or more, got {self.shard_bytes!r:.80}.")
        check_spec(self.spec)
        if self.spec is not None and self.spec.keep_mantissa_bits:
            raise InvalidArgument("spec: keep_mantissa_bits rounds, and what is published must be what was given.")
        if self.format == "safetensors":
            compression.check_level(self.level)
            checksums.hasher(self.checksum)

    @property
    def n_threads(self) -> int:
        return Engine(self.threads).n_threads


def publish(
    state: Mapping[str, Any],
    folder: Path,
    version: int,
    *,
    base: Mapping[str, Any] | Path | None = None,
    full: bool | None = None,
    format: Literal["safetensors", "tri"] = "safetensors",
    encoding: Literal["auto", "xor", "overwrite"] = "auto",
    checksum: Literal["xxh3-128", "blake3", "adler32"] = "xxh3-128",
    level: int = 1,
    spec: Spec | None = None,
    shard_bytes: int = shards.SHARD_BYTES,
    threads: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Publication:
    """Write a state as a version into a folder: what changed since the version before, or the whole.

    state: tensor name to numpy array, flat; it must not change meanwhile. folder: a path, or a URL that fsspec knows.
    base: the state of version - 1, or the folder or file of a model that equals it; None: it is made of what is in the
    folder, which needs a full version there. An empty folder without a base gets a full version. full: True: write the
    whole; False: refuse to; None: where a delta cannot be, because names, dtypes or shapes changed or version - 1 is
    not there (see Publication.why). format: "safetensors", which inference servers read, or "tri", which apply reads
    and which is smaller. encoding, checksum, level (of zstd), shard_bytes: of safetensors. spec: of tri. To publish a
    version that is there compares it with state and writes nothing.
    Raises InvalidArgument, UnsupportedDtype, UnsupportedNode (naming the entry), WrongReference (base is not what was
    published as version - 1), StoreLocked, StorageError.
    """
    options = Options(full, format, encoding, checksum, level, spec, shard_bytes, threads, storage_options)
    with open_base(base) as given:
        return publish_tensors(tensors_of(state), folder, version, given, options)


def publish_tensors(
    new: State, folder: Path, version: int, base: State | None, options: Options, is_known: bool = False
) -> Publication:
    """What publish does, of Tensors. is_known: base is certain to be version - 1, and is not compared."""
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < 10**12:
        raise InvalidArgument(f"version: expected a whole number, 0 or more, got {version!r:.80}.")
    began = time.perf_counter()
    lineage = Lineage(folder, options.storage_options)
    lock = lineage.where.lock()
    try:
        with ExitStack() as stack:
            work = _Work(new, lineage, version, options, stack)
            latest = lineage.latest()
            if lineage.find(version) is not None:
                return work.compared(began)
            if latest is not None and version < latest:
                raise InvalidArgument(
                    f"{lineage.where.url}: version {latest} is published, and {version} would come before it. "
                    f"Publish version {latest + 1}, or into a new folder."
                )
            why, old = work.chosen(base, latest, is_known)
            if old is None:
                return work.full(why, began)
            return work.delta(old, began)
    finally:
        lock.release()


class _Work:
    """One publication."""

    def __init__(self, new: State, lineage: Lineage, version: int, options: Options, stack: ExitStack) -> None:
        self.new, self.lineage, self.version, self.options, self.stack = new, lineage, version, options, stack
        self.where = lineage.place(version)
        self.n_bytes = sum(tensor.n_bytes for tensor in new.values())

    # What to write

    def chosen(self, base: State | None, latest: int | None, is_known: bool) -> tuple[str, State | None]:
        """Why the version is to be full, and None; or the state that a delta builds on."""
        before, options = self.version - 1, self.options
        if options.full:
            return "", None
        if latest is None and (base is None or before < 0):
            if options.full is False:
                raise InvalidArgument(
                    f"{self.lineage.where.url}: is empty, and full=False. Give the base of the delta."
                )
            return "", None
        why, old = "", base
        previous = self.lineage.find(before) if before >= 0 else None
        if previous is None and latest is not None:
            why = f"version {before} is not published, the newest is {latest}"
        elif previous is not None and not self._fits(before):
            why = f"version {before} is published in another format"
        elif old is None:
            old = state_of(self.lineage, before, self.stack, options.threads)
        elif previous is not None and not is_known:
            self._require_base(old, before)
        if not why and old is not None:
            why = _unlike(self.new, old)
        if not why:
            return "", old
        if options.full is False:
            raise InvalidArgument(f"version {self.version}: no delta is possible: {why}. Leave out full=False.")
        _log.info("%s: version %d is full: %s", self.lineage.where.url, self.version, why)
        return why, None

    def _fits(self, before: int) -> bool:
        """Whether a delta of this format may follow a version."""
        return self.lineage.route(before, None).format == self.options.format

    def _require_base(self, old: State, before: int) -> None:
        """Raise WrongReference, naming a tensor, unless a base is what was published."""
        if self.options.format == "tri":
            with File(self.lineage.place(before).get(TRI)) as file:
                name = _first_unlike(content_of({name: tensor.leaf() for name, tensor in old.items()}), file)
        else:
            name = self._first_mismatch(old, self.lineage.checksums(before))
        if name is not None:
            raise WrongReference(
                f"{self.lineage.where.url}: tensor {name!r} of the base is not what was published as version {before}. "
                "Give the state as it was published, or none, or publish with full=True."
            )

    def _first_mismatch(self, state: State, known: Mapping[str, tuple[str, str]]) -> str | None:
        """The first tensor that has another checksum, or is not there."""

        def is_same(name: str) -> bool:
            return name in state and state[name].checksum(known[name][0]) == known[name][1]

        names = sorted(known)
        return next((n for n, same in zip(names, in_order(is_same, names, self.options.n_threads)) if not same), None)

    def compared(self, began: float) -> Publication:
        """What publishing a version again does. Raises InvalidArgument if the state is another."""
        found = self.lineage.find(self.version)
        assert found is not None
        name: str | None = None
        if found.format == "tri":
            with File(found.where.get(TRI)) as file:
                content = content_of({name: tensor.leaf() for name, tensor in self.new.items()})
                if content.content_id != file.content_id:
                    name = _first_unlike(content, file) or "(the names)"
        else:
            route, known = self.lineage.route(self.version, None), self.lineage.checksums(self.version)
            name = self._first_mismatch(self.new, known)
            if name is None and route.full is not None and found.is_full:
                extra = sorted(self.new.keys() - known.keys()) if known else []
                name = extra[0] if extra else None
        if name is not None:
            raise InvalidArgument(
                f"{self.lineage.where.url}: version {self.version} is published, and its tensor {name!r} is another "
                f"than the one given. A version never changes: publish version {self.version + 1}."
            )
        return self._told(found.base, found.encoding, 0, 0, began, is_new=False)

    def _told(
        self,
        base: int | None,
        encoding: str,
        n_changed: int,
        n_bytes: int,
        began: float,
        why: str = "",
        is_new: bool = True,
    ) -> Publication:
        path = self.lineage.where.url.rstrip("/") + "/" + folder_name(self.version)
        seconds, format = time.perf_counter() - began, self.options.format
        about = (len(self.new), n_changed, self.n_bytes, n_bytes)
        return Publication(path, self.version, base, format, encoding, *about, seconds, why, is_new)

    # Writing

    def full(self, why: str, began: float) -> Publication:
        if self.options.format == "tri":
            return self._told(None, "", len(self.new), self._tri(None), began, why)
        format = self.options.checksum
        placed: dict[str, str] = {}
        n_bytes = 0
        entries = [shards.entry_of(name, tensor) for name, tensor in self.new.items()]
        parts = shards.split(entries, self.options.shard_bytes)
        for file, part in zip(shards.names(len(parts)), parts, strict=True):
            # Each tensor is read twice, since its checksum stands in the header.
            found = in_order(lambda e: self.new[e.name].checksum(format), part, self.options.n_threads)
            texts = {full_key(format, entry.name): checksum for entry, checksum in zip(part, found, strict=True)}
            head = shards.head(part, {"format": "pt", **texts}, f"{self.where.url}/{file}")
            self.where.put(file, shards.written(head, (self.new[entry.name] for entry in part)))
            placed.update((entry.name, file) for entry in part)
            n_bytes += len(head) + sum(entry.n_bytes for entry in part)
        about = {"total_size": self.n_bytes, "version": f"{self.version:06d}", "checksum_format": format}
        self._commit(about, placed)
        return self._told(None, "", len(self.new), n_bytes, began, why)

    def delta(self, old: State, began: float) -> Publication:
        options, base = self.options, self.version - 1
        if options.format == "tri":
            return self._told(base, "", len(self.new), self._tri(old), began)
        encoding = options.encoding
        if encoding == "auto":
            encoding = difference.cheaper(self.new, old, options.level)

        def changed(name: str) -> tuple[str, list[bytes], str] | None:
            new, before = self.new[name], old[name]
            n = difference.n_changed(new, before)
            if not n:
                return None
            try:
                made = difference.payload(new, before, encoding, n, options.level)
            except InvalidArgument as error:
                raise InvalidArgument(f"tensor {name!r}: {error}") from None
            return name, made, new.checksum(options.checksum)

        spools: list[tuple[Spool, list[Entry], dict[str, str]]] = []
        for found in in_order(changed, self.new, options.n_threads):
            if found is None:
                continue
            name, pieces, checksum = found
            n_bytes = sum(map(len, pieces))
            if not spools or spools[-1][0].n_bytes + n_bytes > options.shard_bytes:
                spools.append((Spool(), [], {}))
            for piece in pieces:
                spools[-1][0].append(piece)
            spools[-1][1].append(Entry(name, "U8", (n_bytes,), n_bytes))
            spools[-1][2][name] = checksum
        placed: dict[str, str] = {}
        total = 0
        for file, (spool, entries, texts) in zip(shards.names(len(spools)), spools, strict=True):
            head = shards.head(entries, texts, f"{self.where.url}/{file}")
            self.where.put(file, _after(head, spool))
            placed.update((entry.name, file) for entry in entries)
            total += len(head) + spool.n_bytes
        about = {
            "version": f"{self.version:06d}",
            "base_version": f"{base:06d}",
            "delta_encoding": encoding,
            "compression_format": "zstd",
            "checksum_format": options.checksum,
        }
        self._commit(about, placed)
        return self._told(base, encoding, len(placed), total, began)

    def _commit(self, about: Mapping[str, object], placed: Mapping[str, str]) -> None:
        """Remove what an interrupted publication left, which some readers would take for shards; then the index."""
        for name in self.where.list():
            if name.endswith(".safetensors") and name not in placed.values():
                self.where.delete(name)
        self.where.put(INDEX, [shards.index(about, placed)])

    def _tri(self, old: State | None) -> int:
        """Write the one file of a version; its bytes."""
        content = content_of({name: tensor.leaf() for name, tensor in self.new.items()})
        base: File | Content | None = None
        note: dict[str, Any] = {"version": f"{self.version:06d}"}
        if old is not None:
            base = old.file if isinstance(old, Decoded) else content_of({n: t.leaf() for n, t in sorted(old.items())})
            if isinstance(base, File):
                digests = [base.digest(join(None, name)) for name in self.new]
            else:
                digests = codec.digests([base.snapshot.words(i) for i in range(len(self.new))])
            note |= {"base_version": f"{self.version - 1:06d}", BASE_DIGESTS: np.array(digests, "<u8").tobytes()}
        since = 0 if old is None else 1
        engine = Engine(self.options.threads)
        report = checkpoint.put(self.where, TRI, content, base, self.options.spec, {NOTE: note}, since, engine)
        return report.file_bytes


def _after(head: bytes, spool: Spool) -> Iterator[bytes | memoryview]:
    yield head
    yield from spool


def _unlike(new: State, old: State) -> str:
    """Why no delta leads from one state to another; empty: one does."""
    for name in sorted(new.keys() ^ old.keys()):
        return f"tensor {name!r} is {'new' if name in new else 'gone'}"
    for name, tensor in new.items():
        if tensor.kind != old[name].kind:
            return f"tensor {name!r} is {tensor.kind}, and was {old[name].kind}"
    return ""


def _first_unlike(content: Content, file: File) -> str | None:
    """The first leaf that a file has otherwise."""
    leaves = content.snapshot.layout.leaves
    digests = codec.digests([content.snapshot.words(i) for i in range(len(leaves))])
    for leaf, digest in zip(leaves, digests, strict=True):
        if leaf.path not in file or file.leaf(leaf.path) != leaf or file.digest(leaf.path) != digest:
            return leaf.path
    return next((path for path in file if path not in content.snapshot.layout.index), None)


@contextmanager
def open_base(base: Mapping[str, Any] | Path | None) -> Iterator[State | None]:
    """The state that was given as base. Raises InvalidArgument, CorruptFile, UnsupportedNode, UnsupportedDtype."""
    if base is None or not isinstance(base, (str, os.PathLike)):
        yield None if base is None else tensors_of(base, "publish: base")
        return
    found = open_copy(os.fspath(base))
    if found is None:
        raise InvalidArgument(f"{os.fspath(base)}: there is no model in safetensors. Give its folder.")
    with found:
        yield dict(sorted(found.tensors.items()))


def _require(value: Any, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise InvalidArgument(f"{what}: expected one of {', '.join(allowed)}, got {value!r:.80}.")
