"""What a `.tri` file holds and what its bytes are for, as plain data. Reads index and frames' heads; decodes nothing.

So a delta is told about without its parent. The hard thing: small leaves share a frame, whose bytes are divided among
them by their words, purpose by purpose, in whole bytes that add up to the frame.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tricomp.errors import CorruptFile, CorruptFrame
from tricomp.file import File, matching
from tricomp.groups import group_names
from tricomp.integers.form import CODES, KEY, SCALES, Form, forms_of
from tricomp.report import Breakdown, divided

PURPOSES = tuple(field.name for field in fields(Breakdown))
_ORIGIN, _BASE = "origin", "base"  # keys of the metadata of a file that was compressed from files


class _Measured:
    """What is told of anything that has elements, and bytes raw and coded."""

    n_elements: int
    raw_bytes: int
    coded_bytes: int

    @property
    def bits(self) -> float | None:
        """Bits in the file per element; None if there are none."""
        return 8 * self.coded_bytes / self.n_elements if self.n_elements else None

    @property
    def ratio(self) -> float | None:
        """Raw over coded bytes; None if it takes none."""
        return _ratio(self.raw_bytes, self.coded_bytes)


@dataclass(frozen=True)
class LeafFacts(_Measured):
    """One leaf. coded_bytes, parts: its share of its frame, and of what that is for. mode: of the plan, for people.

    keep_mantissa_bits: None unless the leaf was rounded when it was saved. n_sharing: leaves in its frame. form: what
    codes of a quantised array are, for people ("int4 in groups of 64").
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    n_elements: int
    raw_bytes: int
    coded_bytes: int
    mode: str
    predict: str
    entropy: str
    reference: str
    keep_mantissa_bits: int | None
    n_sharing: int
    parts: Breakdown
    form: str | None = None


@dataclass(frozen=True)
class GroupFacts(_Measured):
    """Sums over leaves. dtypes, modes: how many leaves are of each dtype and prediction.

    keep_mantissa_bits: of the leaves that were rounded, ascending.
    """

    name: str
    n_leaves: int
    n_elements: int
    raw_bytes: int
    coded_bytes: int
    dtypes: dict[str, int]
    modes: dict[str, int]
    keep_mantissa_bits: tuple[int, ...]
    parts: Breakdown


@dataclass(frozen=True)
class OriginFacts:
    """A file that a `.tri` file was made of, as that tells. is_exact: it can be restored byte for byte."""

    format: str
    name: str
    n_bytes: int
    is_exact: bool


@dataclass(frozen=True)
class IntegerFacts:
    """Quantised arrays of one kind, see tricomp.integers. coded_bytes: of codes and scales; n_codes: of elements."""

    bits: int
    group: int | None
    form: str
    n_arrays: int
    n_codes: int
    coded_bytes: int
    scale_bytes: int


@dataclass(frozen=True)
class FileFacts:
    """A whole file. parent: content id, None for one that stands alone. origins: the files that it was made of.

    base: the name of the file that it was compressed against, if it says so. metadata: without these and integers, in
    JSON's types. n_leaves, raw_bytes: of the whole file, whatever leaves were asked for. other_bytes: what no frame
    holds: header, index and tail.
    """

    name: str
    n_bytes: int
    format: int
    writer: str
    content_id: str
    parent: str | None
    since_keyframe: int
    metadata: dict[str, Any]
    origins: tuple[OriginFacts, ...]
    base: str | None
    n_leaves: int
    raw_bytes: int
    other_bytes: int
    groups: tuple[GroupFacts, ...]
    leaves: tuple[LeafFacts, ...]
    integers: tuple[IntegerFacts, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Raw bytes of the leaves over bytes of the file."""
        return _ratio(self.raw_bytes, self.n_bytes)

    def to_json(self) -> dict[str, Any]:
        """A dict that json takes, with bits and ratios."""

        def plain(facts: FileFacts | GroupFacts | LeafFacts) -> dict[str, Any]:
            found = {field.name: getattr(facts, field.name) for field in fields(facts)}
            if not isinstance(facts, FileFacts):
                found |= {"parts": asdict(facts.parts), "bits": facts.bits}
            return {**found, "ratio": facts.ratio}

        nested = {"groups": [plain(group) for group in self.groups], "leaves": [plain(leaf) for leaf in self.leaves]}
        listed = {"origins": [asdict(origin) for origin in self.origins], "integers": list(map(asdict, self.integers))}
        return {**plain(self), **nested, **listed}


def inspect(file: File, leaves: Iterable[str] | None = None) -> FileFacts:
    """The facts of an open file. leaves: paths or patterns as in fnmatch; groups and leaves are then of these alone.

    Raises MissingLeaf when nothing matches a pattern, CorruptFrame when the head of a frame is damaged.
    """
    asked = set(file) if leaves is None else matching(file, leaves)
    forms = _forms(file)
    found = _leaves(file, [path for path in file if path in asked], forms)
    names = group_names([leaf.path for leaf in found], [leaf.raw_bytes for leaf in found])
    members: dict[str, list[LeafFacts]] = {}
    for leaf, name in zip(found, names):
        members.setdefault(name, []).append(leaf)
    metadata = {
        key: value for key, value in file.metadata.items() if key not in (_ORIGIN, _BASE, *([KEY] if forms else []))
    }
    base = file.metadata.get(_BASE)
    return FileFacts(
        name=file.name,
        n_bytes=file.n_bytes,
        format=file.format,
        writer=file.writer,
        content_id=file.content_id,
        parent=file.parent,
        since_keyframe=file.since_keyframe,
        metadata=to_json(metadata),
        origins=_origins(
            file.metadata.get(_ORIGIN), any(file.plan(path).keep_mantissa_bits is not None for path in file)
        ),
        base=base["name"] if isinstance(base, dict) and isinstance(base.get("name"), str) else None,
        n_leaves=len(file),
        raw_bytes=sum(file.leaf(path).n_bytes for path in file),
        other_bytes=file.n_bytes - _frames_bytes(file),
        groups=tuple(_group(name, group) for name, group in members.items()),
        leaves=tuple(found),
        integers=_integers(found, forms),
    )


def _integers(leaves: Sequence[LeafFacts], forms: Mapping[str, Form]) -> tuple[IntegerFacts, ...]:
    """Sums over the quantised arrays among some leaves, a kind each, largest first."""
    kinds: dict[tuple[int, int | None], list[LeafFacts]] = {}
    for leaf in leaves:
        node, _, last = leaf.path.rpartition("/")
        if node in forms and last in (CODES, SCALES):
            kinds.setdefault((forms[node].bits, forms[node].group), []).append(leaf)
    made = []
    for (bits, group), members in kinds.items():
        codes = [leaf for leaf in members if leaf.path.endswith(f"/{CODES}")]
        sizes = [sum(leaf.coded_bytes for leaf in some) for some in (members, codes)]
        n_codes = sum(leaf.n_elements for leaf in codes)
        form = Form(bits, group, "float32").describe()
        made.append(IntegerFacts(bits, group, form, len(codes), n_codes, sizes[0], sizes[0] - sizes[1]))
    return tuple(sorted(made, key=lambda facts: -facts.n_codes))


def to_json(value: Any) -> Any:
    """A plain value of a tree or of metadata in JSON's types: bytes as a note of their number, NaN and such as text."""
    if isinstance(value, dict):
        return {str(key): to_json(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(child) for child in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else f"<{type(value).__name__}>"


def _leaves(file: File, paths: Sequence[str], forms: Mapping[str, Form]) -> list[LeafFacts]:
    shares: dict[str, tuple[Breakdown, str, int]] = {}  # of all leaves of the frames seen
    found = []
    for path in paths:
        leaf, plan = file.leaf(path), file.plan(path)
        if path not in shares:  # once a frame, which may hold thousands
            sharing, whole = file.frame_leaves(path), file.breakdown(path)
            if whole.total != file.coded_bytes(path):
                raise CorruptFrame(
                    f"{file.name}: frame of leaf {path!r}: its directory tells of {whole.total} bytes, "
                    f"it has {file.coded_bytes(path)}. Run tricomp verify {file.name}"
                )
            n_words = [file.leaf(other).n_words for other in sharing]
            parts = zip(*(divided(getattr(whole, purpose), n_words) for purpose in PURPOSES))
            mode = replace(plan, keep_mantissa_bits=None).describe()
            shares.update((other, (Breakdown(*part), mode, len(sharing))) for other, part in zip(sharing, parts))
        share, mode, n_sharing = shares[path]
        found.append(
            LeafFacts(
                path=path,
                dtype=leaf.dtype.name,
                shape=leaf.shape,
                n_elements=math.prod(leaf.shape),
                raw_bytes=leaf.n_bytes,
                coded_bytes=share.total,
                mode=mode,
                predict=plan.predict,
                entropy=plan.entropy,
                reference=plan.reference,
                keep_mantissa_bits=plan.keep_mantissa_bits,
                n_sharing=n_sharing,
                parts=share,
                form=forms[node].describe() if (node := path.removesuffix(f"/{CODES}")) in forms else None,
            )
        )
    return found


def _forms(file: File) -> dict[str, Form]:
    """What the file tells of its integers; nothing if that contradicts itself, and is then shown as metadata."""
    try:
        return forms_of(file)
    except CorruptFile:
        return {}


def _frames_bytes(file: File) -> int:
    """Bytes of all frames together."""
    seen: set[str] = set()
    n_bytes = 0
    for path in file:
        if path not in seen:
            seen.update(file.frame_leaves(path))
            n_bytes += file.coded_bytes(path)
    return n_bytes


def _group(name: str, leaves: Sequence[LeafFacts]) -> GroupFacts:
    return GroupFacts(
        name=name,
        n_leaves=len(leaves),
        n_elements=sum(leaf.n_elements for leaf in leaves),
        raw_bytes=sum(leaf.raw_bytes for leaf in leaves),
        coded_bytes=sum(leaf.coded_bytes for leaf in leaves),
        dtypes=dict(Counter(leaf.dtype for leaf in leaves).most_common()),
        modes=dict(Counter(leaf.predict for leaf in leaves).most_common()),
        keep_mantissa_bits=tuple(sorted({bits for leaf in leaves if (bits := leaf.keep_mantissa_bits) is not None})),
        parts=Breakdown(*(sum(getattr(leaf.parts, purpose) for leaf in leaves) for purpose in PURPOSES)),
    )


def _origins(packed: Any, is_rounded: bool) -> tuple[OriginFacts, ...]:
    """What a file says of the files that it was made of, as far as that is well formed; skeletons are not read."""
    found = []
    for entry in packed if isinstance(packed, (list, tuple)) else ():
        if isinstance(entry, dict):
            format, name, n_bytes = entry.get("format"), entry.get("name"), entry.get("bytes")
            if isinstance(format, str) and isinstance(name, str) and type(n_bytes) is int:
                found.append(OriginFacts(format, name, n_bytes, entry.get("spans") is not None and not is_rounded))
    return tuple(found)


def _ratio(raw_bytes: int, coded_bytes: int) -> float | None:
    return raw_bytes / coded_bytes if coded_bytes else None
