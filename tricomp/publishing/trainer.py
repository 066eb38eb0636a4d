"""publish: the state of a trainer as the next version in a folder, as a delta if it can be one.

Imports lineage, updates and writing. The hard thing: a delta is for servers that hold the version before, all of it. So
its base is compared with what was published; and a version that is there never changes: to publish it again is to
compare it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, Literal

from tricomp import codec
from tricomp.content import Content
from tricomp.errors import InvalidArgument, WrongReference
from tricomp.file import File
from tricomp.plan import Spec
from tricomp.publishing import difference, shards
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.publication import Options, Publication, State, open_base
from tricomp.publishing.tensors import tensors_of
from tricomp.publishing.threads import in_order
from tricomp.publishing.updates import full_tensors, state_of, updated
from tricomp.publishing.version import TRI, folder_name
from tricomp.publishing.writing import Written, content_by_name, write_delta, write_full

_log = logging.getLogger("tricomp")
Path = str | os.PathLike[str]


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
    base: the state of version - 1, or of the version that the folder's deltas begin at; or the folder or file of a
    model that equals one of these. None: the state of version - 1 is made of what is in the folder, which needs a full
    version there. An empty folder without a base gets a full version. full: True: write the
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
                return work.compared(base, began)
            if latest is not None and version < latest:
                raise InvalidArgument(
                    f"{lineage.where.url}: version {latest} is published, and {version} would come before it. "
                    f"Publish version {latest + 1}, or into a new folder."
                )
            why, old = work.chosen(base, latest, is_known)
            if old is None:
                return work.told(None, write_full(new, work.where, version, options), began, why)
            return work.told(version - 1, write_delta(new, old, work.where, version, options), began)
    finally:
        lock.release()


class _Work:
    """One publication."""

    def __init__(self, new: State, lineage: Lineage, version: int, options: Options, stack: ExitStack) -> None:
        self.new, self.lineage, self.version, self.options, self.stack = new, lineage, version, options, stack
        self.where = lineage.place(version)

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
            old = self._verified(old, before)
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

    def _verified(self, base: State, before: int) -> State:
        """The state of the version before, from a base that is that, or is what the folder's deltas begin at.

        Raises WrongReference, naming a tensor.
        """
        route = self.lineage.route(before, None)
        if self.options.format == "tri":
            with File(self.lineage.place(before).get(TRI)) as file:
                name = _first_unlike(content_by_name(base), file)
        else:
            name = self._first_mismatch(base, self.lineage.checksums(before))
        if name is None:
            return base
        if route.full is None:
            with suppress(WrongReference):
                found = updated(route, base, self.stack, self.options.threads)
                if self.options.format == "tri" or self._first_mismatch(found, self.lineage.checksums(before)) is None:
                    return found
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

    def compared(self, base: State | None, began: float) -> Publication:
        """What publishing a version again does. Raises InvalidArgument if the state is another."""
        found = self.lineage.find(self.version)
        assert found is not None
        if found.format == "tri":
            with File(found.where.get(TRI)) as file:
                name = _first_unlike(content_by_name(self.new), file)
        else:
            known = self.lineage.checksums(self.version)
            name = self._first_mismatch(self.new, known) or self._first_other(known, base)
        if name is not None:
            raise InvalidArgument(
                f"{self.lineage.where.url}: version {self.version} is published, and its tensor {name!r} is another "
                f"than the one given. A version never changes: publish version {self.version + 1}."
            )
        return self.told(found.base, None, began)

    def _first_other(self, known: Mapping[str, object], base: State | None) -> str | None:
        """The first tensor that is another, among those of which the folder tells no checksum.

        Raises InvalidArgument if it cannot be known: they did not change since a base that is not in the folder.
        """
        route = self.lineage.route(self.version, None)
        old = base if route.full is None else full_tensors(route.full, self.stack, self.options.threads)
        if old is None:
            raise InvalidArgument(
                f"{self.lineage.where.url}: version {self.version} is published, and goes back to version "
                f"{route.start}, which is not in the folder. To compare it give base=, as when it was published."
            )
        odd = sorted(self.new.keys() ^ old.keys())
        if odd:
            return odd[0]
        for name in sorted(self.new.keys() - known.keys()):
            if self.new[name].kind != old[name].kind or difference.n_changed(self.new[name], old[name]):
                return name
        return None

    def told(self, base: int | None, written: Written | None, began: float, why: str = "") -> Publication:
        """What was done. written: None: nothing."""
        n_bytes = sum(tensor.n_bytes for tensor in self.new.values())
        done = written or Written(0, 0)
        path = self.lineage.where.url.rstrip("/") + "/" + folder_name(self.version)
        about = (path, self.version, base, self.options.format, done.encoding, len(self.new), done.n_changed)
        return Publication(*about, n_bytes, done.n_bytes, time.perf_counter() - began, why, written is not None)


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
