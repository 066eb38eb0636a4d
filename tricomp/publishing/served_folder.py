"""A folder of safetensors files brought to a published version: which files there are to be, and what stands in them.

Imports lineage, updates and local. The hard thing: what is there, what is fetched and what is to be are three layouts
of one model. A file is written anew, as it stands there, if one tensor of it changed; or all are, as a full version has
them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from tricomp import storage
from tricomp.bounds import Bytes
from tricomp.codec import Engine
from tricomp.errors import InvalidArgument, StorageError, WrongReference
from tricomp.folder import Folder
from tricomp.publishing import local as copies
from tricomp.publishing import shards
from tricomp.publishing.application import Application, require_forward, target_of
from tricomp.publishing.lineage import Lineage, Route
from tricomp.publishing.local import Copy
from tricomp.publishing.shards import INDEX, Shard
from tricomp.publishing.tensors import Tensor, ranges
from tricomp.publishing.threads import in_order
from tricomp.publishing.updates import State, full_tensors, updated
from tricomp.publishing.version import ADVICE, Full, is_full_key

Path = str | os.PathLike[str]


def apply_to_folder(
    path: str, lineage: Lineage, version: int | None, base: Path | None, threads: int | None, timeout: float | None
) -> Application:
    """What apply does with a folder."""
    began = time.perf_counter()
    if storage.is_url(path):
        raise InvalidArgument(f"{path}: expected a local folder: servers read their weights from one.")
    with copies.locked(path, timeout), ExitStack() as stack:
        copies.recover(path)
        target = target_of(lineage, version)
        before = copies.version_of(path)
        if before == target:
            return Application(target, before, 0, 0, time.perf_counter() - began, is_new=False)
        require_forward(before, target, f"{path} is")
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
