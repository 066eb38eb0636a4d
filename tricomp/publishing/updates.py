"""The tensors of a version, made of an earlier state and the deltas between, each when it is asked for.

Imports lineage and, for `.tri` deltas, File. The hard thing: several versions are gone through tensor by tensor, so
that a copy that is four versions behind is read once and written once, and yet every step on the way is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from tricomp import codec
from tricomp.content import Content, content_of
from tricomp.dtypes import to_words
from tricomp.errors import CorruptFile, InvalidArgument, WrongReference
from tricomp.file import File
from tricomp.publishing.fetched import near
from tricomp.publishing.lineage import Lineage, Route
from tricomp.publishing.tensors import Array, Tensor, code_of, shaped
from tricomp.publishing.version import ADVICE, NOTE, TRI, Delta, Full, Version, digest_of
from tricomp.tensors import names_of

BASE_DIGESTS = "base_digests"
"""The key, in the note of a `.tri` delta, of the digests of its base's leaves: u64 LE each, in the file's order."""


class State(Mapping[str, Tensor]):
    """Tensors by name. changed: those that are not as they were where the route began."""

    changed: frozenset[str] = frozenset()


def state_of(lineage: Lineage, number: int, stack: ExitStack, threads: int | None = None) -> Mapping[str, Tensor]:
    """A version out of the folder alone. Files stay open until stack ends. Raises InvalidArgument: no full version."""
    route = lineage.route(number, None)
    if route.full is None:
        raise InvalidArgument(
            f"{lineage.where.url}: version {number} goes back to version {route.start}, which is not in the folder. "
            f"Give base=: the state of version {number}, or the folder of a model that equals it."
        )
    return updated(route, full_tensors(route.full, stack, threads), stack, threads)


def full_tensors(version: Version, stack: ExitStack, threads: int | None = None) -> Mapping[str, Tensor]:
    """The tensors of a full version. Open until stack ends."""
    if version.format == "tri":
        return Decoded([stack.enter_context(File(near(version.where.get(TRI)), threads=threads))])
    full = stack.enter_context(Full(version))
    what = f"{version.where.url}: tensor"
    return {name: Checked(tensor, full.checksum(name), f"{what} {name!r}") for name, tensor in full.tensors.items()}


def updated(route: Route, seed: Mapping[str, Tensor], stack: ExitStack, threads: int | None = None) -> State:
    """The state at the end of a route. seed: that at its start. Open until stack ends.

    Raises WrongReference, naming a tensor, CorruptFile, MissingFile, StorageError; a tensor also when it is read.
    """
    if route.deltas and route.format == "tri":
        return Decoded(_chain(route, seed, stack, threads))
    return Folded(route, seed, stack)


class Checked(Tensor):
    """A stored tensor, and the checksum that its bytes are to have; None: not known."""

    def __init__(self, stored: Tensor, expected: tuple[str, str] | None, what: str) -> None:
        self._stored, self._expected, self._what = stored, expected, what
        self.code, self.shape, self.n_bytes = stored.code, stored.shape, stored.n_bytes

    def read(self, start: int, stop: int) -> Array:
        if self._expected is not None:
            format, checksum = self._expected
            found = self._stored.checksum(format)
            if found != checksum:
                raise CorruptFile(
                    f"{self._what}: its data are damaged: checksum {checksum} stored, {found} computed. "
                    "Publish the version again."
                )
            self._expected = None
        return self._stored.read(start, stop)

    def leaf(self) -> Any:
        self.read(0, 0)
        return self._stored.leaf()


class Made(Tensor):
    """A tensor whose bytes are made when they are first read, and held until it is dropped."""

    def __init__(self, code: str, shape: tuple[int, ...], n_bytes: int, make: Callable[[], Array]) -> None:
        self.code, self.shape, self.n_bytes = code, shape, n_bytes
        self._make: Callable[[], Array] | None = make
        self._words = np.zeros(0, np.uint8)

    def read(self, start: int, stop: int) -> Array:
        if self._make is not None:
            self._words, self._make = self._make(), None
        return self._words[start:stop]

    def leaf(self) -> Array:
        return shaped(self.read(0, self.n_bytes), self.code, self.shape)


class Folded(State):
    """A state brought forward by deltas in safetensors."""

    def __init__(self, route: Route, seed: Mapping[str, Tensor], stack: ExitStack) -> None:
        self._seed = seed
        self._deltas = [stack.enter_context(Delta(version)) for version in route.deltas]
        self.changed = frozenset().union(*(delta.names for delta in self._deltas))
        missing = sorted(self.changed - seed.keys())
        if missing:
            raise WrongReference(
                f"{route.deltas[-1].where.url}: tensor {missing[0]!r} changed ({len(missing)} such in all), and what "
                f"is here has none of that name. It is another model than the one that is published. {ADVICE}"
            )

    def __getitem__(self, name: str) -> Tensor:
        seed = self._seed[name]
        if name not in self.changed:
            return seed
        return Made(seed.code, seed.shape, seed.n_bytes, lambda: self._fold(name, seed))

    def _fold(self, name: str, seed: Tensor) -> Array:
        words = np.array(seed.read(0, seed.n_bytes))
        mine = [delta for delta in self._deltas if name in delta.names]
        try:
            for delta in mine:
                delta.fold(name, words)
        except WrongReference:
            words = np.array(seed.read(0, seed.n_bytes))
            # In live tensors it may be there already: by a tie, or an apply that was interrupted.
            if digest_of(words, mine[-1].version.checksum) != mine[-1].checksum(name):
                raise
        return words

    def __iter__(self) -> Iterator[str]:
        return iter(self._seed)

    def __len__(self) -> int:
        return len(self._seed)


class Decoded(State):
    """The state in a `.tri` file. files: that one last, before it those that it builds on, beginning with a delta."""

    def __init__(self, files: list[File]) -> None:
        self.files, self.file = files, files[-1]
        self.paths = names_of(self.file)
        before = _base_digests(files[0])
        self.changed = frozenset(
            name for name, path in self.paths.items() if before.get(path) != self.file.digest(path)
        )

    def __getitem__(self, name: str) -> Tensor:
        path = self.paths[name]
        leaf = self.file.leaf(path)
        make: Callable[[], Array] = lambda: to_words(self.file[path], path).view(np.uint8)  # noqa: E731
        return Made(code_of(leaf.dtype), leaf.shape, leaf.n_bytes, make)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def _chain(route: Route, seed: Mapping[str, Tensor], stack: ExitStack, threads: int | None) -> list[File]:
    """The `.tri` files of a route, each against the one before, the first against the seed."""
    reference = seed.file if isinstance(seed, Decoded) else _content(route.deltas[0], seed)
    made: list[File] = []
    for version in route.deltas:
        try:
            file = File(near(version.where.get(TRI)), reference, threads=threads)
        except WrongReference as error:
            raise _named(version, reference) or error from None
        made.append(stack.enter_context(file))
        reference = file
    return made


def _content(version: Version, seed: Mapping[str, Tensor]) -> Content:
    """The Content of the seed's tensors that a delta has. Raises WrongReference if it lacks one."""
    with File(version.where.get(TRI)) as file:
        names = list(names_of(file))
        missing = [name for name in names if name not in seed]
        if missing:
            raise WrongReference(
                f"{file.name}: tensor {missing[0]!r} ({len(missing)} such in all) is not in what is here. It is "
                f"another model than the one that is published. {ADVICE}"
            )
        return content_of({name: seed[name].leaf() for name in names})


def _base_digests(file: File) -> dict[str, int]:
    """The digests of a delta's base, by path; none of a file that stands alone, or does not tell."""
    note = file.metadata.get(NOTE)
    told = note.get(BASE_DIGESTS) if isinstance(note, dict) else None
    if file.parent is None or not isinstance(told, bytes) or len(told) != 8 * len(file):
        return {}
    return dict(zip(file, np.frombuffer(told, "<u8").tolist(), strict=True))


def _named(version: Version, reference: File | Content) -> WrongReference | None:
    """The error of a base that is another, naming the first tensor of it that is."""
    with File(version.where.get(TRI)) as file:
        for path, digest in _base_digests(file).items():
            if isinstance(reference, File):
                is_same = path in reference and reference.digest(path) == digest
            else:
                found = reference.find(path)
                same_kind = found is not None and found[0] == file.leaf(path)
                is_same = found is not None and same_kind and codec.digest(found[1]) == digest
            if not is_same:
                return WrongReference(
                    f"{file.name}: tensor {path!r}: what is here is not version {version.base} of it. {ADVICE}"
                )
    return None
