"""Spec (what the caller asks), Plan (what the encoder chose and recorded), Frame (a Plan and chunks). Imports ground.

A decoder takes no Spec. The hard thing: a Plan comes from a file that may be hostile, so `from_wire` checks every
field against the limits of FORMAT.md before any byte of the frame is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

from tricomp.bounds import Bytes
from tricomp.dtypes import DType, by_number
from tricomp.errors import CorruptFrame, InvalidArgument, UnsupportedVersion

# Frozen since format 1: position in the tuple is the number in a file.
PREDICTIONS = ("raw", "constant", "copy", "palette", "sparse", "full", "delta", "scaled_delta", "cast")
ENTROPIES = ("none", "index", "rans")
REMAINDERS = ("none", "planes", "stack")
REFERENCES = ("none", "parent", "sibling")

MAX_CHUNK_LOG2 = 16
MIN_CHUNK_LOG2 = 10
MAX_CONTEXTS = 8
MAX_SYMBOLS = 256
MAX_TABLE_ENTRIES = 1024
MAX_MANTISSA_BITS = 4
MAX_PHASE_BITS = 3


@dataclass(frozen=True)
class Spec:
    """What the caller asks for.

    tier: "dense" (rANS; smallest, the default) or "fast" (fixed-width index).
    keep_mantissa_bits: leaf path pattern (as in fnmatch) to mantissa bits kept; float leaves that match are *rounded*
        to nearest even before coding: not lossless, relative error at most 2^-(bits+1), or more in
        subnormal numbers. Never on by default.
    chunk_log2: log2 of the words in a chunk, 10 to 16.
    """

    tier: Literal["dense", "fast"] = "dense"
    keep_mantissa_bits: Mapping[str, int] = field(default_factory=dict)
    chunk_log2: int = 16

    def __post_init__(self) -> None:
        if self.tier not in ("dense", "fast"):
            raise InvalidArgument(f"Spec.tier: expected 'dense' or 'fast', got {self.tier!r}")
        if type(self.chunk_log2) is not int or not MIN_CHUNK_LOG2 <= self.chunk_log2 <= MAX_CHUNK_LOG2:
            raise InvalidArgument(
                f"Spec.chunk_log2: expected {MIN_CHUNK_LOG2} to {MAX_CHUNK_LOG2}, got {self.chunk_log2!r}"
            )
        if not isinstance(self.keep_mantissa_bits, Mapping):
            raise InvalidArgument(
                f"Spec.keep_mantissa_bits: expected a dict of path pattern to bits, got {self.keep_mantissa_bits!r}"
            )
        for pattern, bits in self.keep_mantissa_bits.items():
            if not isinstance(pattern, str):
                raise InvalidArgument(f"Spec.keep_mantissa_bits: expected leaf path patterns, got {pattern!r}")
            if type(bits) is not int or not 0 <= bits <= 52:
                raise InvalidArgument(f"Spec.keep_mantissa_bits[{pattern!r}]: expected 0 to 52 bits, got {bits!r}")

    def mantissa_bits_of(self, path: str) -> int | None:
        """Mantissa bits to keep of the leaf at path: the first pattern that matches; None: all."""
        return next((bits for pattern, bits in self.keep_mantissa_bits.items() if fnmatchcase(path, pattern)), None)


def check_spec(spec: Any) -> None:
    """Raise InvalidArgument unless spec is a Spec or None."""
    if spec is not None and not isinstance(spec, Spec):
        raise InvalidArgument(f"spec: expected a tricomp.Spec, got {type(spec).__name__} {spec!r:.80}.")


@dataclass(frozen=True)
class Plan:
    """How one frame is coded; FORMAT.md, "Plan", defines every field and its key in a file (in `metadata`)."""

    dtype: DType = field(metadata={"key": "d"})
    n_words: int = field(metadata={"key": "n", "max": 1 << 48})
    predict: str = field(metadata={"key": "p", "names": PREDICTIONS})
    chunk_log2: int = field(default=16, metadata={"key": "c", "min": MIN_CHUNK_LOG2, "max": MAX_CHUNK_LOG2})
    reference: str = field(default="none", metadata={"key": "r", "names": REFERENCES})
    sibling: int = field(default=0, metadata={"key": "s", "max": 1 << 32})
    entropy: str = field(default="none", metadata={"key": "e", "names": ENTROPIES})
    n_symbols: int = field(default=0, metadata={"key": "ns", "max": MAX_SYMBOLS})
    base: int = field(default=0, metadata={"key": "b", "min": -(1 << 16), "max": 1 << 16})
    prob_bits: int = field(default=11, metadata={"key": "pb", "min": 8, "max": 11})
    n_contexts: int = field(default=1, metadata={"key": "nc", "min": 1, "max": MAX_CONTEXTS})
    context_base: int = field(default=0, metadata={"key": "cb", "min": -(1 << 12), "max": 1 << 12})
    context_shift: int = field(default=0, metadata={"key": "cs", "max": 12})
    mantissa_bits: int = field(default=0, metadata={"key": "k", "max": MAX_MANTISSA_BITS})
    has_sign: bool = field(default=True, metadata={"key": "sg"})
    n_columns: int = field(default=0, metadata={"key": "nk", "max": 1 << 48})
    has_column_scale: bool = field(default=False, metadata={"key": "ks"})
    factor: int = field(default=1 << 30, metadata={"key": "f", "min": 1, "max": (1 << 32) - 1})
    index_bits: int = field(default=0, metadata={"key": "ib", "max": 8})
    remainder: str = field(default="none", metadata={"key": "m", "names": REMAINDERS})
    shift: int = field(default=0, metadata={"key": "t", "max": 63})
    has_block_shifts: bool = field(default=False, metadata={"key": "bs"})
    coded_planes: int = field(default=0, metadata={"key": "cp", "max": 255})
    word: int = field(default=0, metadata={"key": "w", "max": (1 << 64) - 1})
    keep_mantissa_bits: int | None = field(default=None, metadata={"key": "q", "max": 52})
    side_bytes: int = field(default=0, metadata={"key": "sb", "max": 1 << 48})
    side_check: int = field(default=0, metadata={"key": "sc", "max": (1 << 64) - 1})

    @property
    def n_chunks(self) -> int:
        """Chunks of the frame; constant and copy have none."""
        if self.predict in ("constant", "copy"):
            return 0
        return -(-self.n_words >> self.chunk_log2)

    @property
    def phase_bits(self) -> int:
        """log2 of the phases of the scale model: its contexts are the top bits of the fraction of an octave."""
        return self.n_contexts.bit_length() - 1

    @property
    def remainder_bits(self) -> int:
        """Bits of a remainder of fixed width in `full`, before `shift`; 0 for other predictions."""
        if self.predict != "full":
            return 0
        return self.dtype.mantissa_bits - self.mantissa_bits + self.has_sign

    @property
    def plane_widths(self) -> tuple[int, ...]:
        """Bits of each byte plane of the remainder, lowest first; empty unless remainder is "planes"."""
        if self.remainder != "planes":
            return ()
        n_bits = self.remainder_bits - self.shift
        return (8,) * (n_bits // 8) + ((n_bits % 8,) if n_bits % 8 else ())

    @property
    def n_rows(self) -> int:
        """Rows of the split that the scale model or the factors see; the last may be partial."""
        return -(-self.n_words // self.n_columns) if self.n_columns else 0

    @property
    def is_scaled(self) -> bool:
        return self.n_columns > 0

    def describe(self) -> str:
        """One short phrase for people: 'full k=2 scale 768x3072 rans x4'."""
        words = [self.predict]
        if self.reference == "sibling":
            words.append(f"of leaf {self.sibling}")
        if self.predict == "full":
            words.append(f"k={self.mantissa_bits}")
        if self.is_scaled:
            words.append(f"scale {self.n_rows}x{self.n_columns if self.has_column_scale else 1}")
        if self.entropy == "rans":
            words.append(f"rans x{self.n_contexts}" if self.n_contexts > 1 else "rans")
        if self.entropy == "index":
            words.append(f"index {self.index_bits} bits")
        if self.keep_mantissa_bits is not None:
            words.append(f"bounded: {self.keep_mantissa_bits} mantissa bits kept")
        return " ".join(words)

    def to_wire(self) -> dict[str, int]:
        """The Plan as a msgpack map of integers; fields at their default are left out."""
        wire: dict[str, int] = {}
        for spec in _known().values():
            value = getattr(self, spec.name)
            if value == spec.default:
                continue
            names = spec.metadata.get("names")
            wire[spec.metadata["key"]] = names.index(value) if names else int(getattr(value, "number", value))
        return wire

    @classmethod
    def from_wire(cls, wire: Any, leaf: str = "array") -> Plan:
        """The Plan of a msgpack map. Raises CorruptFrame (names the leaf and the field), UnsupportedVersion."""
        if not isinstance(wire, dict):
            raise CorruptFrame(f"leaf {leaf!r}: its plan should be a map, found {type(wire).__name__}. {_ADVICE}")
        known = _known()
        for key in wire:
            if key not in known:
                raise UnsupportedVersion(
                    f"leaf {leaf!r}: its plan has the field {key!r}, unknown to format 1. Upgrade tricomp to read it."
                )
        for key in _REQUIRED:
            if key not in wire:
                raise CorruptFrame(f"leaf {leaf!r}: its plan lacks the field {key!r}. {_ADVICE}")
        plan = cls(**{known[key].name: _field_from_wire(known[key], value, leaf) for key, value in wire.items()})
        _check(plan, leaf)
        return plan


@cache
def _known() -> dict[str, Field[Any]]:
    """The fields of a Plan by their keys in a file."""
    return {spec.metadata["key"]: spec for spec in fields(Plan)}


_REQUIRED = ("d", "n", "p")
_ADVICE = "The file is damaged: restore it from another copy, or list a store's intact steps: tricomp verify FOLDER."


def _field_from_wire(spec: Any, value: Any, leaf: str) -> Any:
    if type(value) is not int:
        raise CorruptFrame(f"leaf {leaf!r}: plan field {spec.name} should be an integer, found {value!r}. {_ADVICE}")
    if spec.name == "dtype":
        return by_number(value, leaf)
    names = spec.metadata.get("names")
    if names:
        if not 0 <= value < len(names):
            raise UnsupportedVersion(
                f"leaf {leaf!r}: plan field {spec.name} is {value}, unknown to format 1. Upgrade tricomp to read it."
            )
        return names[value]
    if spec.type == "bool":
        if value not in (0, 1):
            raise CorruptFrame(f"leaf {leaf!r}: plan field {spec.name} should be 0 or 1, found {value}. {_ADVICE}")
        return bool(value)
    if not spec.metadata.get("min", 0) <= value <= spec.metadata["max"]:
        raise CorruptFrame(f"leaf {leaf!r}: plan field {spec.name} is out of range: {value}. {_ADVICE}")
    return value


def _check(plan: Plan, leaf: str) -> None:
    """Raise CorruptFrame unless the fields fit each other."""
    needs_reference = plan.predict in ("copy", "scaled_delta", "cast")
    is_delta = plan.predict in ("delta", "scaled_delta")
    is_symbolic = plan.predict in ("palette", "full", "delta", "scaled_delta")
    rules = (
        (plan.word >> plan.dtype.word_bits == 0, "word is wider than the dtype"),
        (not needs_reference or plan.reference != "none", "prediction without its reference"),
        (plan.predict != "cast" or plan.reference == "sibling", "cast needs a sibling"),
        (plan.predict in ("copy", "cast") or plan.reference != "sibling", "needless sibling"),
        (plan.reference == "none" or plan.predict not in ("raw", "constant", "palette", "full"), "needless reference"),
        (is_symbolic == (plan.entropy != "none"), "prediction and entropy do not fit"),
        (is_symbolic == (plan.n_symbols > 0), "prediction and symbols do not fit"),
        (plan.n_contexts * plan.n_symbols <= MAX_TABLE_ENTRIES, "too many table entries"),
        (plan.n_contexts == 1 or plan.entropy == "rans", "contexts without rans"),
        (plan.n_contexts == 1 or plan.predict in ("full", "delta", "scaled_delta"), "contexts without a model"),
        ((plan.entropy == "index") == (plan.index_bits > 0), "index without its width"),
        (plan.predict not in ("full", "scaled_delta") or plan.dtype.is_float, "prediction for floats only"),
        (plan.predict != "full" or plan.mantissa_bits <= plan.dtype.mantissa_bits, "k exceeds the mantissa"),
        (plan.predict != "full" or plan.n_contexts & (plan.n_contexts - 1) == 0, "phases are no power of two"),
        (plan.predict != "full" or plan.n_contexts == 1 or plan.is_scaled, "phases without a scale model"),
        (plan.predict == "full" or plan.remainder != "planes", "planes without full"),
        (plan.predict in ("full", "delta", "scaled_delta") or plan.remainder == "none", "needless remainder"),
        (not is_delta or plan.remainder == "stack", "delta without its stack"),
        (plan.remainder == "planes" or plan.shift == 0, "shift without planes"),
        (plan.remainder != "planes" or plan.shift <= plan.remainder_bits, "shift exceeds the remainder"),
        (plan.remainder == "stack" or not plan.has_block_shifts, "block shifts without a stack"),
        (plan.remainder != "none" or plan.predict != "full" or plan.remainder_bits == 0, "full without remainder"),
        (plan.coded_planes >> len(plan.plane_widths) == 0, "coded planes that do not exist"),
        (plan.is_scaled == (plan.predict == "scaled_delta") or plan.predict == "full", "scales do not fit"),
        (plan.is_scaled or not plan.has_column_scale, "column scale without columns"),
        (plan.predict == "scaled_delta" or plan.factor == 1 << 30, "factor without scaled delta"),
        (plan.n_columns <= max(plan.n_words, 1), "more columns than words"),
        (not is_delta or 0 <= plan.base <= 1 << 12, "window of sizes out of range"),
        (not is_delta or plan.mantissa_bits < plan.dtype.word_bits, "k exceeds the word"),
    )
    for holds, fault in rules:
        if not holds:
            raise CorruptFrame(f"leaf {leaf!r}: its plan contradicts itself ({fault}). {_ADVICE}")


@dataclass(frozen=True)
class Frame:
    """One encoded leaf of any size, or several small leaves of one dtype, one after the other.

    leaves: their numbers in the Layout. digests: 64 bits of each decoded leaf. pieces: of its data (side section,
    directory, chunks), n_bytes together; to be read once or more, but before the Frame is let go.
    """

    leaves: tuple[int, ...]
    plan: Plan
    digests: tuple[int, ...]
    n_bytes: int
    pieces: Callable[[], Iterable[Bytes]]

    @property
    def data(self) -> bytes:
        """All of the data at once."""
        return b"".join(self.pieces())
