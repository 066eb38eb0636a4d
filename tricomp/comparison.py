"""What differs between two trees, each an open `.tri` file or a tree in memory. Streams; nothing is held but pieces.

The hard thing: two sides come in pieces of different sizes, and numbers must be right for every dtype: integers up to
64 bits are subtracted exactly, NaNs and infinities are counted apart, norms do not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from tricomp import tree
from tricomp.dtypes import of
from tricomp.errors import MissingLeaf
from tricomp.layout import Leaf
from tricomp.progress import OnBytes

Array = np.ndarray[Any, Any]
_PIECE = 1 << 20  # elements asked for at a time; a File rounds up
_BLOCK = 1 << 17  # numbers compared at a time, so that what is made of them stays in the caches


class Side(Protocol):
    """One of the two trees: an open File, or a TreeSide. Iterates over leaf paths."""

    @property
    def structure(self) -> bytes: ...

    @property
    def content_id(self) -> str | None: ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, path: object) -> bool: ...

    def leaf(self, path: str) -> Leaf: ...

    def digest(self, path: str) -> int | None: ...

    def pieces(self, path: str, n_elements: int) -> Iterator[Array]: ...


class TreeSide:
    """A tree of numpy arrays (views of a mapped file, say) and plain values as a Side."""

    content_id = None  # telling it would mean reading everything

    def __init__(self, value: Any) -> None:
        """Raises UnsupportedNode, UnsupportedDtype."""
        self.structure, paths, arrays = tree.flatten(value)
        self._arrays = dict(zip(paths, arrays, strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __contains__(self, path: object) -> bool:
        return path in self._arrays

    def leaf(self, path: str) -> Leaf:
        """Path, dtype and shape."""
        if path not in self._arrays:
            raise MissingLeaf(f"no leaf {path!r} among {len(self._arrays)} leaves.")
        return Leaf(path, of(self._arrays[path], path), self._arrays[path].shape)

    def digest(self, path: str) -> None:
        """Not known."""

    def pieces(self, path: str, n_elements: int = _PIECE) -> Iterator[Array]:
        """The leaf's elements in C order, one-dimensional and little-endian, at most n_elements at a time."""
        return pieces_of(self._arrays[path], n_elements)


@dataclass(frozen=True)
class LeafChange:
    """A leaf of which words changed. Words: elements as bits; a complex element is two.

    n_nonfinite: changed words that are NaN or infinite on one side or both; what follows is of all others.
    largest_absolute: an int for integers. largest_relative: to the larger of the two magnitudes, so at most 2.
    relative_norm: norm of the change over the norm of A's leaf; None if that is 0.
    """

    path: str
    dtype: str
    n_words: int
    n_changed: int
    n_nonfinite: int
    largest_absolute: float | int
    largest_relative: float
    relative_norm: float | None


@dataclass(frozen=True)
class Mismatch:
    """A leaf of another dtype or shape in B, or a plain value that is another there. a, b: shown for people."""

    path: str
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """What differs between A and B. n_leaves, n_words: compared word by word, of the same dtype and shape in both.

    values: plain values that differ, or stand on one side only. is_same_content: to the last key: then A and B have one
    content id. Equal leaves and values in another order, or in containers of another kind, are equal, but not the same.
    """

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    changed: tuple[LeafChange, ...]
    values: tuple[Mismatch, ...]
    n_leaves: int
    n_words: int
    is_same_content: bool

    @property
    def is_equal(self) -> bool:
        """Whether both have the same leaves and plain values, bit for bit."""
        return not (self.only_in_a or self.only_in_b or self.mismatched or self.changed or self.values)

    @property
    def n_changed(self) -> int:
        """Words that changed."""
        return sum(change.n_changed for change in self.changed)

    def to_json(self) -> dict[str, Any]:
        """A dict that json takes: numbers that are not finite as None."""
        found = asdict(self)
        for change in found["changed"]:
            odd = [key for key, value in change.items() if isinstance(value, float) and not math.isfinite(value)]
            change.update(dict.fromkeys(odd))
        return {"is_equal": self.is_equal, "n_changed": self.n_changed, **found}


def compare(a: Side, b: Side, on_progress: OnBytes | None = None) -> Comparison:
    """What differs between two trees. Leaves whose digests are known and equal are not decoded.

    on_progress gets the bytes of a leaf or piece done since the last call. Raises what decoding raises.
    """
    only_in_a = tuple(path for path in a if path not in b)
    only_in_b = tuple(path for path in b if path not in a)
    mismatched, changed = [], []
    n_leaves = n_words = 0
    for path in a:
        if path not in b:
            continue
        leaf, other = a.leaf(path), b.leaf(path)
        if (leaf.dtype, leaf.shape) != (other.dtype, other.shape):
            mismatched.append(Mismatch(path, _shown(leaf), _shown(other)))
            continue
        n_leaves, n_words = n_leaves + 1, n_words + leaf.n_words
        if a.digest(path) is not None and a.digest(path) == b.digest(path):
            change = None
            if on_progress:
                on_progress(leaf.n_bytes)
        else:
            change = _change(leaf, a.pieces(path, _PIECE), b.pieces(path, _PIECE), on_progress)
        if change is not None:
            changed.append(change)
    values = tuple(_values(a.structure, b.structure))
    is_equal = not (only_in_a or only_in_b or mismatched or changed or values)
    return Comparison(
        only_in_a,
        only_in_b,
        tuple(mismatched),
        tuple(changed),
        values,
        n_leaves,
        n_words,
        is_equal and a.structure == b.structure,
    )


def pieces_of(array: Array, n_elements: int) -> Iterator[Array]:
    """The elements of an array of any strides in C order, one-dimensional, little-endian, n_elements or fewer each."""
    if array.flags.c_contiguous or array.size <= n_elements:
        flat = array.reshape(-1)
        for start in range(0, len(flat), n_elements):
            part = flat[start : start + n_elements]
            yield np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
        return
    n_rows = n_elements * len(array) // array.size
    if n_rows == 0:  # one row is more than a piece
        for row in array:
            yield from pieces_of(row, n_elements)
        return
    for start in range(0, len(array), n_rows):
        yield from pieces_of(array[start : start + n_rows], n_elements)


def _shown(leaf: Leaf) -> str:
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"


def _values(a: bytes, b: bytes) -> Iterator[Mismatch]:
    """Plain values of two structures that are not the same."""
    if a == b:
        return
    sides: list[dict[str, list[str]]] = [{}, {}]
    for found, structure in zip(sides, (a, b)):
        for path, value in tree.values_of(structure, with_empty=True):
            found.setdefault(path, []).append(f"{value!r}")  # tells 1, 1.0 and True, and zeros of both signs, apart
    for path in dict.fromkeys([*sides[0], *sides[1]]):
        one, other = (found.get(path, []) for found in sides)
        if one != other:
            yield Mismatch(path, ", ".join(one), ", ".join(other))


def _change(leaf: Leaf, a: Iterable[Array], b: Iterable[Array], on_progress: OnBytes | None) -> LeafChange | None:
    """What changed in a leaf whose elements come in pieces; None: nothing."""
    tally = _Tally()
    for x, y in _aligned(a, b):
        if leaf.dtype.words_per_element > 1:
            part = np.dtype(f"<f{leaf.dtype.word_bits // 8}")
            x, y = x.view(part), y.view(part)
        for start in range(0, len(x), _BLOCK):
            tally.add(x[start : start + _BLOCK], y[start : start + _BLOCK])
        if on_progress:
            on_progress(x.nbytes)
    if not tally.n_changed:
        return None
    return LeafChange(
        path=leaf.path,
        dtype=leaf.dtype.name,
        n_words=leaf.n_words,
        n_changed=tally.n_changed,
        n_nonfinite=tally.n_nonfinite,
        largest_absolute=tally.largest_absolute,
        largest_relative=tally.largest_relative,
        relative_norm=tally.change_norm / tally.norm if tally.norm else None,
    )


def _aligned(a: Iterable[Array], b: Iterable[Array]) -> Iterator[tuple[Array, Array]]:
    """Pieces of two rows of equal length, cut so that they match. Both are taken to their ends: digests come last."""
    others = iter(b)
    rest: Array | None = None
    for piece in a:
        while len(piece):
            if rest is None or not len(rest):
                rest = next(others)
            n = min(len(piece), len(rest))
            yield piece[:n], rest[:n]
            piece, rest = piece[n:], rest[n:]
    for _ in others:
        pass


class _Tally:
    """What changed so far. change_norm, norm: of the change and of A, over what is finite on both sides, and in A."""

    def __init__(self) -> None:
        self.n_changed = self.n_nonfinite = 0
        self.largest_absolute: float | int = 0
        self.largest_relative = self.change_norm = self.norm = 0.0

    def add(self, x: Array, y: Array) -> None:
        """Take some numbers of A and B, one-dimensional, of one dtype."""
        word = np.dtype(f"<u{x.dtype.itemsize}")
        where = np.flatnonzero(x.view(word) != y.view(word))
        self.n_changed += len(where)
        with np.errstate(all="ignore"):  # NaNs and overflows are told apart below
            reals = x.astype(np.float64)
            self.norm = math.hypot(self.norm, _norm(reals[np.isfinite(reals)]))
            if len(where):
                self._add_changed(x[where], y[where], reals[where], word)

    def _add_changed(self, x: Array, y: Array, p: Array, word: np.dtype[Any]) -> None:
        q = y.astype(np.float64)
        is_finite = np.isfinite(p) & np.isfinite(q)
        self.n_nonfinite += len(p) - int(np.count_nonzero(is_finite))
        if x.dtype.kind in "iu":  # modulo 2^W, so exact
            exact = np.maximum(x, y).view(word) - np.minimum(x, y).view(word)
            self.largest_absolute = max(self.largest_absolute, int(exact.max()))
            change = exact.astype(np.float64)
        else:
            p, q = p[is_finite], q[is_finite]
            change = np.abs(q - p)
            self.largest_absolute = max(self.largest_absolute, float(change.max(initial=0)))
        larger = np.maximum(np.abs(p), np.abs(q))
        relative = np.minimum(change / np.where(larger > 0, larger, 1), 2.0)  # 2 where the change overflows
        self.largest_relative = max(self.largest_relative, float(relative.max(initial=0)))
        self.change_norm = math.hypot(self.change_norm, _norm(change))


def _norm(numbers: Array) -> float:
    """The Euclidean norm of non-NaN float64[n], whose squares may be too large or small for a float64."""
    largest = float(np.abs(numbers).max(initial=0))
    if largest in (0.0, math.inf):
        return largest
    if 1e-100 < largest < 1e100:
        return math.sqrt(float(np.dot(numbers, numbers)))
    scaled = numbers / largest
    return largest * math.sqrt(float(np.dot(scaled, scaled)))
