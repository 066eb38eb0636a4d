"""apply: a copy of the model brought to a published version: files on a server's disk, or live arrays in place.

Imports lineage, updates and local. The hard thing: files change all together or not at all (see local). Live arrays
change one after the other, each verified before it is written; what is interrupted there is finished by applying again,
since each tensor that is there already is known by its checksum.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from tricomp import storage
from tricomp.bounds import Bytes
from tricomp.codec import Engine
from tricomp.errors import InvalidArgument, StorageError, WrongReference
from tricomp.folder import Folder
from tricomp.publishing import local as copies
from tricomp.publishing import shards
from tricomp.publishing.lineage import Lineage, Route
from tricomp.publishing.local import Copy
from tricomp.publishing.shards import INDEX, Shard
from tricomp.publishing.tensors import Array, Tensor, ranges, tensors_of
from tricomp.publishing.threads import in_order
from tricomp.publishing.updates import Decoded, State, full_tensors, updated
from tricomp.publishing.version import ADVICE, Full, is_full_key

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Application:
    """What apply did. version: what is there now. before: what was; None: nothing, or no telling.

    n_changed: tensors that were made anew. n_bytes: written. is_new: False: it was there already.
    """

    version: int
    before: int | None
    n_changed: int
    n_bytes: int
    seconds: float
    is_new: bool = True


def apply(
    local: Path | Mapping[str, Any],
    folder: Path,
    version: int | None = None,
    *,
    base: Path | None = None,
    at: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Application:
    """Bring a copy of the model to a published version, through all versions between or from the newest full one.

    local: a folder of safetensors files, which keeps a mark of its version; or a flat dict of numpy arrays, which are
    written to in place. folder: where versions are published, a path or URL. version: None: the newest. base: the
    folder of the model that version 0 is, for a local folder that is empty. at: the version that a dict of arrays
    holds; None: any, if there is a full version to begin at. timeout: seconds to wait for another process that applies
    to the same folder; None: as long as it takes. Needs free space of the files that change. Applying what is there
    already does nothing; a folder whose apply was interrupted is repaired by applying again.
    Raises MissingFile (not published yet), MissingParent (a version between is missing), WrongReference (what is there
    is not what was published: naming a tensor), CorruptFile, CorruptFrame (damage), InvalidArgument, StoreLocked,
    StorageError; a folder is as it was then.
    """
    lineage = Lineage(folder, storage_options)
    if isinstance(local, (str, os.PathLike)):
        if at is not None:
            raise InvalidArgument("at: is for arrays; a folder has a mark of its version.")
        return _apply_to_folder(os.fspath(local), lineage, version, base, threads, timeout)
    if base is not None:
        raise InvalidArgument("base: is for folders; arrays hold the base themselves. Say which with at=.")
    return apply_to_tensors(tensors_of(local, "apply"), lineage, version, at, threads)


# Live tensors


def apply_to_tensors(
    live: Mapping[str, Tensor], lineage: Lineage, version: int | None, at: int | None, threads: int | None = None
) -> Application:
    """What apply does with arrays, of Tensors that can be written to."""
    began = time.perf_counter()
    target = _target(lineage, version)
    if at == target:
        return Application(target, at, 0, 0, time.perf_counter() - began, is_new=False)
    _require_forward(at, target, "the arrays are")
    route = lineage.route(target, at)
    if route.full is None and at is None:
        raise InvalidArgument(f"{lineage.where.url}: has no full version to begin at. Say which version is there: at=.")
    with ExitStack() as stack:
        seed = live if route.full is None else full_tensors(route.full, stack, threads)
        state = updated(route, seed, stack, threads)
        names = sorted(state) if route.full is not None else sorted(state.changed)
        _require_like(live, state, names, strict=route.full is not None)
        if isinstance(state, Decoded):
            for file in state.files:
                file.check()  # damage is found before anything is written to
        n_changed, n_bytes = 0, 0
        for name, words in _results(state, names, _has_ties(live)):
            live[name].write(words)
            n_changed, n_bytes = n_changed + 1, n_bytes + len(words)
    return Application(target, at, n_changed, n_bytes, time.perf_counter() - began)


def _has_ties(live: Mapping[str, Tensor]) -> bool:
    known = [tensor.address for tensor in live.values() if tensor.address is not None]
    return len(set(known)) < len(known)


def _results(state: State, names: list[str], has_ties: bool) -> Iterator[tuple[str, Array]]:
    """The bytes of tensors, whole, in order."""
    if not isinstance(state, Decoded):
        # In order and one at a time where tensors may be tied: the second of a tie finds what the first became.
        for name in names:
            tensor = state[name]
            yield name, tensor.read(0, tensor.n_bytes)
        return
    files = state.files
    has_siblings = any(file.plan(path).reference == "sibling" for file in files for path in state.paths.values())
    wanted = set(names)
    paths = {path: name for name, path in state.paths.items()}
    if (has_siblings or has_ties) and files[0].parent is not None:
        # What is written to is what later leaves are decoded against: all of them first.
        for path, array in state.file.load(state.paths.values()).items():
            if paths[path] in wanted:
                yield paths[path], array.reshape(-1).view(np.uint8)
        return
    for name in names:
        path = state.paths[name]
        together = state.file.frame_leaves(path)
        if path != together[0]:
            continue
        for each, array in state.file.load(together).items():
            yield paths[each], array.reshape(-1).view(np.uint8)


def _require_like(live: Mapping[str, Tensor], state: Mapping[str, Tensor], names: Iterable[str], strict: bool) -> None:
    missing = [name for name in names if name not in live]
    unexpected = sorted(live.keys() - state.keys()) if strict else []
    if missing or unexpected:
        raise WrongReference(
            f"apply: the arrays are of another model: missing {missing[:5]}, unexpected {unexpected[:5]} "
            f"({len(missing)} and {len(unexpected)} in all). {ADVICE}"
        )
    for name in names:
        if live[name].kind != state[name].kind:
            raise WrongReference(f"tensor {name!r}: expected {state[name].kind}, got {live[name].kind}. {ADVICE}")


# Folders


def _apply_to_folder(
    path: str, lineage: Lineage, version: int | None, base: Path | None, threads: int | None, timeout: float | None
) -> Application:
    began = time.perf_counter()
    if storage.is_url(path):
        raise InvalidArgument(f"{path}: expected a local folder: servers read their weights from one.")
    with copies.locked(path, timeout), ExitStack() as stack:
        copies.recover(path)
        target = _target(lineage, version)
        before = copies.version_of(path)
        if before == target:
            return Application(target, before, 0, 0, time.perf_counter() - began, is_new=False)
        _require_forward(before, target, f"{path} is")
        here = copies.open_copy(path)
        if here is not None:
            stack.enter_context(here)
        else:
            before = None  # a mark without a model
        route = _route(path, lineage, target, before, here, base)
        layout = _layout(route, here, base, stack, path, threads)
        state = updated(route, layout.seed, stack, threads)
        _require_sizes(state, layout)
        files = _files(layout, state, Engine(threads).n_threads)
        n_bytes = copies.replace(path, before, target, files, layout.removed(here))
        n_changed = len(state.changed) if not layout.is_whole else len(state)
    return Application(target, before, n_changed, n_bytes, time.perf_counter() - began)


def _target(lineage: Lineage, version: int | None) -> int:
    if version is None:
        latest = lineage.latest()
        if latest is None:
            raise InvalidArgument(f"{lineage.where.url}: nothing is published there yet. Wait, or check the path.")
        return latest
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise InvalidArgument(f"version: expected a whole number, 0 or more, or None, got {version!r:.80}.")
    return version


def _require_forward(before: int | None, target: int, what: str) -> None:
    if before is not None and before > target:
        raise InvalidArgument(
            f"{what} at version {before}, newer than {target}. To go back, begin with an empty folder."
        )


def _route(path: str, lineage: Lineage, target: int, before: int | None, here: Copy | None, base: Path | None) -> Route:
    """The route for a folder. Raises InvalidArgument when there is nothing to begin at."""
    if before is None and base is not None and target == 0:
        return Route(0, None, ())
    route = lineage.route(target, before)
    if route.full is not None or before is not None:
        return route
    if base is not None:
        if route.start != 0:
            raise InvalidArgument(f"{lineage.where.url}: its deltas begin at version {route.start}, base is version 0.")
        return route
    if here is None:
        raise InvalidArgument(
            f"{path}: holds no model, and no full version is published. Copy the base model there, or give base=."
        )
    if not copies.is_untouched(path):
        raise InvalidArgument(
            f"{path}: another program was interrupted there, and its files may be of two versions. Remove "
            f"{copies.SYNC} there, and copy the base model anew."
        )
    return route  # a copy without a mark is taken for what the oldest delta builds on; checksums will tell


@dataclass(frozen=True)
class _Layout:
    """What files there are to be, and the tensors to begin at. is_whole: all are written; else those that change.

    heads: file to its header. order: file to names of tensors. extra: other files to copy, name to path. index: to be
    written, or None.
    """

    seed: Mapping[str, Tensor]
    heads: Mapping[str, bytes]
    order: Mapping[str, list[str]]
    is_whole: bool
    index: bytes | None = None
    extra: Mapping[str, str] | None = None

    def removed(self, here: Copy | None) -> list[str]:
        """Files of the model that was there, and that the new one has not."""
        if not self.is_whole or here is None:
            return []
        old = [shard.name for shard in here.shards if shard.name not in self.heads]
        return old + ([INDEX] if here.index and self.index is None else [])


def _layout(
    route: Route, here: Copy | None, base: Path | None, stack: ExitStack, path: str, threads: int | None
) -> _Layout:
    if route.full is None and here is not None and base is None:
        return _kept(here.tensors, here.shards, is_whole=False)
    if route.full is None and here is not None and copies.version_of(path) is not None:
        return _kept(here.tensors, here.shards, is_whole=False)
    if route.full is None:
        assert base is not None
        return _of_base(os.fspath(base), stack)
    seed = full_tensors(route.full, stack, threads)
    if route.full.format == "tri":
        entries = [shards.entry_of(name, seed[name]) for name in sorted(seed)]
        parts = shards.split(entries, shards.SHARD_BYTES)
        names = shards.names(len(parts))
        heads = {n: shards.head(part, {"format": "pt"}, n) for n, part in zip(names, parts, strict=True)}
        order = {n: [entry.name for entry in part] for n, part in zip(names, parts, strict=True)}
    else:
        with Full(route.full) as full:
            order = {shard.name: list(shard.tensors) for shard in full.shards}
            heads = {}
            for shard in full.shards:
                texts = {key: text for key, text in shard.metadata.items() if not is_full_key(key)}
                about = [shards.entry_of(name, tensor) for name, tensor in shard.tensors.items()]
                heads[shard.name] = shards.head(about, texts, shard.name)
    placed = {name: file for file, inside in order.items() for name in inside}
    total = sum(tensor.n_bytes for tensor in seed.values())
    return _Layout(seed, heads, order, True, shards.index({"total_size": total}, placed))


def _kept(tensors: Mapping[str, Tensor], opened: Iterable[Shard], is_whole: bool) -> _Layout:
    """The files as they are."""
    opened = list(opened)
    heads = {shard.name: shard.head for shard in opened}
    return _Layout(tensors, heads, {shard.name: list(shard.tensors) for shard in opened}, is_whole)


def _of_base(base: str, stack: ExitStack) -> _Layout:
    """The files of a base model, and those beside them: its configuration, its tokenizer."""
    found = copies.open_copy(base)
    if found is None or not os.path.isdir(base):
        raise InvalidArgument(f"base {base}: there is no model in safetensors. Give its folder.")
    kept = _kept(stack.enter_context(found).tensors, found.shards, is_whole=True)
    others = {name: os.path.join(base, name) for name in Folder(base).list() if not name.endswith(".safetensors")}
    return _Layout(kept.seed, kept.heads, kept.order, True, extra=others)


def _require_sizes(state: State, layout: _Layout) -> None:
    """Raise WrongReference if a changed tensor has another dtype or shape than its place in a file."""
    for name in state.changed & layout.seed.keys():
        if state[name].kind != layout.seed[name].kind:
            found = layout.seed[name].kind
            raise WrongReference(f"tensor {name!r}: expected {state[name].kind}, got {found}. {ADVICE}")


def _files(layout: _Layout, state: State, n_threads: int) -> Iterator[tuple[str, Iterable[Bytes]]]:
    """Name and pieces of each file to be written."""
    for file, names in layout.order.items():
        if layout.is_whole or not state.changed.isdisjoint(names):
            yield file, _pieces(layout.heads[file], names, state, n_threads)
    if layout.index is not None:
        yield INDEX, [layout.index]
    for name, path in (layout.extra or {}).items():
        yield name, _copied(path)


def _pieces(head: bytes, names: list[str], state: State, n_threads: int) -> Iterator[Bytes]:
    def ready(name: str) -> Tensor:
        tensor = state[name]
        tensor.read(0, 0)  # is made, and its checksum compared, here
        return tensor

    yield head
    for tensor in in_order(ready, names, n_threads):
        for start, stop in ranges(tensor.n_bytes):
            yield tensor.read(start, stop).data


def _copied(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while piece := file.read(4 << 20):
                yield piece
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}.") from error
