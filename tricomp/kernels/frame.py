"""What the memory kernels are told: the kind of a frame, which picks the kernel, and its row of the frame table.

Imports ground and numpy. The hard thing: one launch serves many frames, so whatever differs between frames of a kind is
a number in device memory, int64 each; what changes the shape of the work is a constant of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tricomp.dtypes import DType
from tricomp.plan import ENTROPIES, PREDICTIONS, REMAINDERS, Plan

# Frozen since format 1.
LANES = 32
ROW = 128
ALIGN = 16
RAW_FLAG = 1 << 31
DIRECTORY_FIELDS = 6
PLANE_RAW, PLANE_CONSTANT, PLANE_RANS = 0, 1, 2

MOST_PLANES = 8
ENTRIES_ALIGN = 8  # an encoder's entries of a context are filled up to a multiple of this
STATE_BYTES = 4 * LANES

RAW, SPARSE, FULL, DELTA, SCALED_DELTA, CAST, PALETTE = (
    PREDICTIONS.index(name) for name in ("raw", "sparse", "full", "delta", "scaled_delta", "cast", "palette")
)
PLANES, STACK = REMAINDERS.index("planes"), REMAINDERS.index("stack")
INDEX, RANS = ENTROPIES.index("index"), ENTROPIES.index("rans")


class Field(IntEnum):
    """Columns of the frame table. Addresses are of device memory; 0 where there is nothing."""

    WORDS = 0
    REFERENCE = 1
    N_WORDS = 2
    CHUNK_LOG2 = 3
    K = 4
    BASE = 5
    N_SYMBOLS = 6
    HAS_SIGN = 7
    N_CONTEXTS = 8
    CONTEXT_BASE = 9
    CONTEXT_SHIFT = 10
    N_COLUMNS = 11
    FACTOR = 12
    ROWS = 13
    COLUMNS = 14
    TABLE = 15  # encoder: entries; decoder: slots
    MEANINGS = 16  # decoder: of the symbols, see tables.py
    SHIFT = 17
    LIST = 18  # palette: its words; decoder with index: in the order of the dictionary
    PLACES = 19  # index: encoder: place of every symbol; decoder: dictionary
    N_PLACES = 20
    WORD = 21
    SCRATCH = 22  # of the chunk FIRST_CHUNK; what follows are bytes from there, or from the chunk's own
    STRIDE = 23  # bytes from one chunk to the next
    FIRST_CHUNK = 24
    STATES = 25
    SYMBOLS_END = 26  # rans: one past the words; index: where the packed words begin
    FLAGS = 27
    SHIFTS = 28
    HEADS = 29
    STACK_END = 30
    PLANE = 31  # and the seven after it
    N = 39


class Part(IntEnum):
    """Columns of what a decoder is told of a chunk, int64 each. Addresses are of device memory; 0: nothing there."""

    NUMBER = 0  # of the chunk in its frame
    SYMBOLS = 1  # rans: states; index: packed places
    SYMBOL_WORDS = 2
    N_SYMBOL_WORDS = 3
    SHIFTS = 4
    HEADS = 5
    STACK_WORDS = 6
    N_STACK_WORDS = 7
    CONSTANTS = 8  # an octet of each plane, lowest first, that stands for all where a plane is constant
    PLANE = 9  # where each plane stands packed, if it does; and the seven after it
    N = 17


class Stream(IntEnum):
    """Columns of what a decoder is told of a coded byte plane, int64 each."""

    CHUNK = 0  # its row of the told faults
    N_ROWS = 1
    STATES = 2
    WORDS = 3
    N_WORDS = 4
    TABLE = 5
    TARGET = 6
    N = 7


class Fault(IntEnum):
    """Columns of what a decoder tells of a chunk, uint8 each: not 0 if so.

    The first five in the order in which they are told; what the other two mean is found out on the host.
    """

    SYMBOLS_END = 0
    PLANES_END = 1
    SHIFT = 2
    HEAD = 3
    STACK_END = 4
    INDEX = 5
    PATCHES = 6
    N = 8


class Result(IntEnum):
    """Columns of what an encoder tells of a chunk, int32 each."""

    SYMBOL_WORDS = 0
    STACK_WORDS = 1
    N_PATCHES = 2
    PLANE_ANY = 3  # OR of a plane's octets, and the seven after it
    PLANE_ALL = 11  # AND of them
    PLANE_WORDS = 19  # of a coded plane's rans stream
    N = 27


@dataclass(frozen=True)
class Kind:
    """What is constant in a kernel. Frames of one kind share launches. HAS_COLUMNS: the scales have columns too."""

    W: int
    M: int
    IS_FLOAT: bool
    IS_SIGNED: bool
    PREDICT: int
    HAS_REFERENCE: bool
    HAS_SCALES: bool
    HAS_COLUMNS: bool
    HAS_CONTEXTS: bool
    INDEX_BITS: int
    P: int
    REMAINDER: int
    N_PLANES: int
    LAST_BITS: int
    HAS_BLOCK_SHIFTS: bool
    FROM_W: int = 0  # cast: the reference's words
    FROM_M: int = 0

    def constants(self) -> dict[str, int]:
        """By name, as launches take them."""
        return {name: int(value) for name, value in self.__dict__.items()}


def kind_of(plan: Plan, has_reference: bool, source: DType | None) -> Kind:
    """The kind of a frame."""
    dtype = plan.dtype
    is_cast = plan.predict == "cast" and source is not None
    widths = plan.plane_widths
    # Remainders that are zero throughout are planes too, but none of them is left.
    remainder = plan.remainder if widths or plan.remainder != "planes" else "none"
    return Kind(
        W=dtype.word_bits,
        M=dtype.mantissa_bits,
        IS_FLOAT=dtype.is_float,
        IS_SIGNED=dtype.is_signed,
        PREDICT=PREDICTIONS.index(plan.predict),
        HAS_REFERENCE=has_reference,
        HAS_SCALES=plan.is_scaled,
        HAS_COLUMNS=plan.has_column_scale,
        HAS_CONTEXTS=plan.n_contexts > 1,
        INDEX_BITS=plan.index_bits,
        P=plan.prob_bits if plan.entropy == "rans" else 0,
        REMAINDER=REMAINDERS.index(remainder),
        N_PLANES=len(widths),
        LAST_BITS=widths[-1] if widths else 0,
        HAS_BLOCK_SHIFTS=plan.has_block_shifts,
        FROM_W=source.word_bits if is_cast and source is not None else 0,
        FROM_M=source.mantissa_bits if is_cast and source is not None else 0,
    )


@dataclass(frozen=True)
class Flow:
    """What else is constant in an encoder, without which its loop would ask at every row.

    IS_WHOLE: all chunks of a program are full, and their words aligned. BY_FOUR: rows of the split hold a multiple of
    four words. HAS_SHIFT: planes leave out bits at the bottom.
    """

    IS_WHOLE: bool
    BY_FOUR: bool
    HAS_SHIFT: bool

    def constants(self) -> dict[str, int]:
        """By name, as launches take them."""
        return {name: int(value) for name, value in self.__dict__.items()}


def flow_of(plan: Plan, is_whole: bool) -> Flow:
    """The flow of an encoder. Without a split, rows are long enough."""
    return Flow(is_whole, plan.n_columns % 4 == 0, plan.shift > 0)


def numbers_of(plan: Plan) -> dict[Field, int]:
    """What the plan alone tells of a frame's row."""
    return {
        Field.N_WORDS: plan.n_words,
        Field.CHUNK_LOG2: plan.chunk_log2,
        Field.K: plan.mantissa_bits,
        Field.BASE: plan.base,
        Field.N_SYMBOLS: plan.n_symbols,
        Field.HAS_SIGN: int(plan.has_sign),
        Field.N_CONTEXTS: plan.n_contexts,
        Field.CONTEXT_BASE: plan.context_base,
        Field.CONTEXT_SHIFT: 3 - plan.phase_bits if plan.predict == "full" else plan.context_shift,
        Field.N_COLUMNS: max(plan.n_columns, 1),
        Field.FACTOR: plan.factor,
        Field.SHIFT: plan.shift,
        Field.WORD: plan.word - (1 << 64 if plan.word >> 63 else 0),
    }


def stack_word_bits(word_bits: int) -> int:
    """Bits of a stack's words. Frozen since format 1."""
    return 16 if word_bits <= 16 else 32


def packed_bytes(n_padded: int, n_bits: int) -> int:
    """Bytes of values packed vertically; n_padded = 128 q."""
    return -(-n_padded // ROW * n_bits // 8) * 4 * LANES


def aligned(n_bytes: int) -> int:
    """n_bytes rounded up to 16."""
    return -(-n_bytes // ALIGN) * ALIGN
