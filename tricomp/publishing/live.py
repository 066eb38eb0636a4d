"""Live tensors brought to a published version, in place.

Imports lineage and updates. The hard thing: they change one after the other, each verified before it is written; what
is interrupted is finished by applying again, since a tensor that is there already is known by its checksum. And what a
tensor is decoded against may be another that is to be written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import numpy as np

from tricomp.errors import InvalidArgument, WrongReference
from tricomp.publishing.application import Application, require_forward, target_of
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.tensors import Array, Tensor
from tricomp.publishing.updates import Decoded, State, full_tensors, updated
from tricomp.publishing.version import ADVICE


def apply_to_tensors(
    live: Mapping[str, Tensor], lineage: Lineage, version: int | None, at: int | None, threads: int | None = None
) -> Application:
    """What apply does with arrays, of Tensors that can be written to."""
    began = time.perf_counter()
    target = target_of(lineage, version)
    if at == target:
        return Application(target, at, 0, 0, time.perf_counter() - began, is_new=False)
    require_forward(at, target, "the arrays are")
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
        for name, words in _results(state, names, live if route.full is None else None):
            live[name].write(words)
            n_changed, n_bytes = n_changed + 1, n_bytes + len(words)
    return Application(target, at, n_changed, n_bytes, time.perf_counter() - began)


def _has_ties(live: Mapping[str, Tensor]) -> bool:
    known = [tensor.address for tensor in live.values() if tensor.address is not None]
    return len(set(known)) < len(known)


def _has_siblings(state: Decoded) -> bool:
    return any(file.plan(path).reference == "sibling" for file in state.files for path in state.paths.values())


def _results(state: State, names: list[str], live: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Array]]:
    """The bytes of tensors, whole. live: those that the first delta builds on, if they are what is written to."""
    if not isinstance(state, Decoded):
        # In order and one at a time where tensors may be tied: the second of a tie finds what the first became.
        for name in names:
            tensor = state[name]
            yield name, tensor.read(0, tensor.n_bytes)
        return
    wanted = set(names)
    paths = {path: name for name, path in state.paths.items()}
    if live is not None and (_has_ties(live) or _has_siblings(state)):
        # What is written to is what later leaves are decoded against: all of them first.
        for path, array in state.file.load(state.paths.values()).items():
            if paths[path] in wanted:
                yield paths[path], array.reshape(-1).view(np.uint8)
        return
    for name in names:
        if name not in wanted:
            continue  # came with another that shares its frame
        for path, array in state.file.load(state.file.frame_leaves(state.paths[name])).items():
            if paths[path] in wanted:
                wanted.remove(paths[path])
                yield paths[path], array.reshape(-1).view(np.uint8)


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
