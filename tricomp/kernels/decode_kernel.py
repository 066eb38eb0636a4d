"""The fused decoder: streams read forwards, words put together, each written once, straight into the target.

Imports triton and the stages. A program decodes up to C chunks of one frame, 32 lanes each, from the first row of 128
words to the last. It knows byte planes that are packed or constant; coded ones are unpacked by `plane_kernel` before.
The hard thing: bytes may be hostile. The host has checked where sections begin and end, and that tables fit the plan;
what is left is a stream that asks for more words than it has. A lane takes one word a step at most, so it reads at most
one word for every position of its chunk (two with 64-bit words) from where its words begin, which is why so much slack
follows the payload. What was read there does not count: a stream that took other than all of its words is a fault.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels.bits import bit_length
from tricomp.kernels.encode_kernel import (
    DELTA,
    F_CHUNK_LOG2,
    F_N_COLUMNS,
    F_N_WORDS,
    F_REFERENCE,
    F_SHIFT,
    F_WORDS,
    FULL,
    N_FIELDS,
    PALETTE,
    PLANES,
    SCALED_DELTA,
    STACK,
    numbers_of,
    scales_at,
)
from tricomp.kernels.entropy import rans_pop
from tricomp.kernels.frame import Fault, Field, Part, Stream
from tricomp.kernels.lanes import forward, put_word, put_words, word_at, words_at
from tricomp.kernels.pack import append_row, joined_row, parted_row, row_at, stack_pop, unpack_row
from tricomp.kernels.predict import (
    MEANING_LENGTH,
    MEANING_LENGTH_MASK,
    context_of_level,
    context_of_word,
    factor_of,
    merge_delta,
    merge_full,
    rounded,
    scaled,
)

F_N_PLACES = tl.constexpr(int(Field.N_PLACES))
N_PARTS = tl.constexpr(int(Part.N))
C_NUMBER = tl.constexpr(int(Part.NUMBER))
C_SYMBOLS = tl.constexpr(int(Part.SYMBOLS))
C_SYMBOL_WORDS = tl.constexpr(int(Part.SYMBOL_WORDS))
C_N_SYMBOL_WORDS = tl.constexpr(int(Part.N_SYMBOL_WORDS))
C_SHIFTS = tl.constexpr(int(Part.SHIFTS))
C_HEADS = tl.constexpr(int(Part.HEADS))
C_STACK_WORDS = tl.constexpr(int(Part.STACK_WORDS))
C_N_STACK_WORDS = tl.constexpr(int(Part.N_STACK_WORDS))
C_CONSTANTS = tl.constexpr(int(Part.CONSTANTS))
C_PLANE = tl.constexpr(int(Part.PLANE))
N_STREAM = tl.constexpr(int(Stream.N))
S_CHUNK = tl.constexpr(int(Stream.CHUNK))
S_N_ROWS = tl.constexpr(int(Stream.N_ROWS))
S_STATES = tl.constexpr(int(Stream.STATES))
S_WORDS = tl.constexpr(int(Stream.WORDS))
S_N_WORDS = tl.constexpr(int(Stream.N_WORDS))
S_TABLE = tl.constexpr(int(Stream.TABLE))
S_TARGET = tl.constexpr(int(Stream.TARGET))
N_FAULTS = tl.constexpr(int(Fault.N))
T_SYMBOLS_END = tl.constexpr(int(Fault.SYMBOLS_END))
T_PLANES_END = tl.constexpr(int(Fault.PLANES_END))
T_SHIFT = tl.constexpr(int(Fault.SHIFT))
T_HEAD = tl.constexpr(int(Fault.HEAD))
T_STACK_END = tl.constexpr(int(Fault.STACK_END))
T_INDEX = tl.constexpr(int(Fault.INDEX))
T_PATCHES = tl.constexpr(int(Fault.PATCHES))
LOWEST_STATE = tl.constexpr(1 << 15)


@triton.jit
def pop_value(b_hold, b_held, b_length, p_stack, o_stack, b_bit, W: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Pop one remainder, as words are computed with; of 64-bit words the lower 32 bits first."""
    if W == 64:
        b_below = tl.minimum(b_length, 32)
        b_low, b_hold, b_held, o_stack = stack_pop(b_hold, b_held, b_below, p_stack, o_stack, b_bit, B, C)
        b_high, b_hold, b_held, o_stack = stack_pop(b_hold, b_held, b_length - b_below, p_stack, o_stack, b_bit, B, C)
        return b_low.to(tl.uint64) | (b_high.to(tl.uint64) << 32), b_hold, b_held, o_stack
    else:
        return stack_pop(b_hold, b_held, b_length, p_stack, o_stack, b_bit, B, C)


@triton.jit
def decode_word(
    b_y,
    b_r,
    b_c,
    b_place,
    b_remainder,
    b_shift,
    b_state,
    o_symbols,
    b_hold,
    b_held,
    o_stack,
    p_symbols,
    p_stack,
    m_row,
    m_word,
    b_bit,
    numbers,
    W: tl.constexpr,
    M: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    PREDICT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_CONTEXTS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    P: tl.constexpr,
    REMAINDER: tl.constexpr,
    HAS_BLOCK_SHIFTS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    C: tl.constexpr,
):
    """One word a lane. Returns words, and what was carried: states and o_symbols, holds, held and o_stack.

    b_y: its reference; b_r, b_c: its scales. b_place: its index. b_remainder: from planes. b_shift: int32, of its row.
    numbers: see `numbers_of`; for the meanings see tables.py. Where there are indices, they
    stand for symbols in meanings and palettes. Padding, where m_word is not set, has context 0 and no remainder.
    """
    B: tl.constexpr = 16 if W <= 16 else 32
    k, base, has_sign = numbers[0], numbers[1], numbers[3]
    b_level = b_r
    if HAS_COLUMNS:
        b_level = b_r + b_c
    if PREDICT == SCALED_DELTA:
        b_column_factor = tl.full((), 1 << 15, tl.uint64)
        if HAS_COLUMNS:
            b_column_factor = b_c.to(tl.uint64)
        b_y = scaled(b_y, factor_of(b_r.to(tl.uint64), b_column_factor, numbers[9]), W, M)
    if INDEX_BITS > 0:
        b_symbol = b_place.to(tl.int32)
        if PREDICT == FULL:
            p_symbol = (numbers[13] + b_place.to(tl.int64)).to(tl.pointer_type(tl.uint8))
            b_symbol = tl.load(p_symbol).to(tl.int32)
    else:
        b_context = tl.zeros(m_row.shape, tl.int32)
        if HAS_CONTEXTS:
            if PREDICT == FULL:
                b_context = context_of_level(b_level, numbers[5])
            else:
                b_context = context_of_word(b_y, numbers[4], numbers[5], numbers[6], W, M, IS_FLOAT, IS_SIGNED)
            if not IS_WHOLE:
                b_context = tl.where(m_word, b_context, 0)
        b_popped, b_state, o_symbols = rans_pop(
            b_state, numbers[10], b_context, p_symbols, o_symbols, m_row, b_bit, P, C, IS_WHOLE
        )
        b_symbol = b_popped.to(tl.int32)
    b_meaning = b_symbol
    if PREDICT == DELTA or PREDICT == SCALED_DELTA:
        b_meaning = tl.load((numbers[11] + 4 * b_symbol.to(tl.int64)).to(tl.pointer_type(tl.uint32)))
    if REMAINDER == STACK:
        if PREDICT == FULL:
            b_length = tl.where(b_symbol == 0, 0, M - k + has_sign)
        else:
            b_length = ((b_meaning >> MEANING_LENGTH) & MEANING_LENGTH_MASK).to(tl.int32)
        if not IS_WHOLE:
            b_length = tl.where(m_word, b_length, 0)
        if HAS_BLOCK_SHIFTS:
            b_length = tl.maximum(b_length - b_shift, 0)
        b_remainder, b_hold, b_held, o_stack = pop_value(b_hold, b_held, b_length, p_stack, o_stack, b_bit, W, B, C)
        if HAS_BLOCK_SHIFTS:
            b_remainder = b_remainder << b_shift.to(b_remainder.dtype)
    if PREDICT == PALETTE:
        b_word = word_at(numbers[12], b_symbol.to(tl.int64), m_row, W)
    elif PREDICT == FULL:
        b_word = merge_full(b_symbol, b_remainder, b_level, k, base, W, M, HAS_SCALES)
    else:
        b_word = merge_delta(b_meaning, b_remainder, b_y, W, IS_FLOAT, IS_SIGNED)
    return b_word, b_state, o_symbols, b_hold, b_held, o_stack


@triton.jit
def plane_at(p_chunk, PLANE: tl.constexpr, N_PLANES: tl.constexpr):
    """Where a plane stands packed; 0 if it does not, or is none of the frame's."""
    if PLANE < N_PLANES:
        return tl.load(p_chunk + C_PLANE + PLANE)
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def constant_row(b_constants, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """A row of a plane that is constant, as it would be packed. b_constants: int64, an octet of each plane."""
    b_octet = ((b_constants >> (8 * PLANE)) & 0xFF).to(tl.uint32)
    return joined_row(b_octet, b_octet, b_octet, b_octet, WIDTH)


@triton.jit
def with_plane(b_r, b_octet, shift, PLANE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Remainders with a plane's octets in their place."""
    b_octet = b_octet.to(b_r.dtype) << (8 * PLANE)
    if HAS_SHIFT:
        b_octet = b_octet << shift.to(b_r.dtype)
    return b_r | b_octet


@triton.jit
def tell(p_told, b_chunk, m_fault, FAULT: tl.constexpr):
    """Note a fault of chunks; all lanes that see it write the same."""
    tl.store(p_told + N_FAULTS * b_chunk + FAULT, tl.zeros_like(b_chunk).to(tl.uint8) + 1, mask=m_fault)


@triton.jit
def decode_kernel(
    p_programs,
    p_frames,
    p_chunks,
    p_told,
    W: tl.constexpr,
    M: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    PREDICT: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_CONTEXTS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    P: tl.constexpr,
    REMAINDER: tl.constexpr,
    N_PLANES: tl.constexpr,
    LAST_BITS: tl.constexpr,
    HAS_BLOCK_SHIFTS: tl.constexpr,
    FROM_W: tl.constexpr,
    FROM_M: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BY_FOUR: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IS_LONG: tl.constexpr,
    C: tl.constexpr,
):
    """Decode chunks that are not raw. p_programs: int64[n, 2 + C]: frame, most rows of 128, chunks' rows of p_chunks.

    A program with fewer than C chunks names its last one again; the same bytes are then written twice. IS_WHOLE: all
    are full, and loads and stores aligned. BY_FOUR, HAS_SHIFT: see Flow. IS_LONG: columns are counted in 64 bits.
    p_frames, p_chunks, p_told: see Field, Part and Fault. Positions are counted in the frame, so the address of its
    words is where its first word would be.
    """
    tl.static_assert(W == 8 or W == 16 or W == 32 or W == 64)
    tl.static_assert(PREDICT == FULL or PREDICT == DELTA or PREDICT == SCALED_DELTA or PREDICT == PALETTE)
    tl.static_assert((P > 0) != (INDEX_BITS > 0))
    tl.static_assert((REMAINDER == PLANES) == (N_PLANES > 0))
    B: tl.constexpr = 16 if W <= 16 else 32
    SCALE: tl.constexpr = tl.int16 if PREDICT == FULL else tl.uint16
    i_program = tl.program_id(0).to(tl.int64)
    p_program = p_programs + (2 + C) * i_program
    p_f = p_frames + tl.load(p_program) * N_FIELDS
    n_rows = tl.load(p_program + 1).to(tl.int32)
    o_lane = tl.arange(0, C * 32) % 32
    b_bit = tl.full((), 1, tl.uint32) << o_lane.to(tl.uint32)
    b_chunk = tl.load(p_program + 2 + tl.arange(0, C * 32) // 32)
    p_chunk = p_chunks + N_PARTS * b_chunk
    chunk_log2 = tl.load(p_f + F_CHUNK_LOG2)
    b_first = tl.load(p_chunk + C_NUMBER) << chunk_log2
    size = tl.full((), 1, tl.int64) << chunk_log2
    b_size = tl.minimum(tl.load(p_f + F_N_WORDS) - b_first, size).to(tl.int32)
    b_n_rows = (b_size + 127) // 128
    # Of each lane's first word of a row, and from there to the reference's.
    p_words = tl.load(p_f + F_WORDS) + (W // 8) * (b_first + 4 * o_lane)
    to_reference = tl.load(p_f + F_REFERENCE) - tl.load(p_f + F_WORDS)
    none = tl.full((), 0, tl.int64)
    numbers = numbers_of(p_f)
    # Where each lane's first word stands in the split, rows counted from its chunk's first; how far a row of 128 is.
    COUNT: tl.constexpr = tl.int64 if IS_LONG else tl.int32
    n_columns = tl.load(p_f + F_N_COLUMNS)
    p_rows = numbers[7].to(tl.pointer_type(SCALE))
    p_columns = numbers[8].to(tl.pointer_type(SCALE))
    b_row = tl.zeros((C * 32,), tl.int32)
    b_column = tl.zeros((C * 32,), COUNT)
    n_rows_on, n_columns_on = n_rows, n_rows
    if HAS_SCALES:
        b_first_row = b_first // n_columns
        p_rows = p_rows + b_first_row
        b_column = (b_first - b_first_row * n_columns).to(COUNT) + 4 * o_lane
        n_columns = n_columns.to(COUNT)
        b_row = (b_column // n_columns).to(tl.int32)
        b_column = b_column - b_row * n_columns
        n_rows_on, n_columns_on = (128 // n_columns).to(tl.int32), 128 % n_columns
    p_symbols = tl.load(p_chunk + C_SYMBOLS)
    b_state = tl.full((C * 32,), LOWEST_STATE, tl.uint32)
    o_symbols = tl.zeros((C * 32,), tl.int32)
    if P > 0:
        b_state = tl.load((p_symbols + 4 * o_lane).to(tl.pointer_type(tl.uint32)))
        p_symbols = tl.load(p_chunk + C_SYMBOL_WORDS)
    b_largest = tl.zeros((C * 32,), tl.uint32)
    p_planes = (
        plane_at(p_chunk, 0, N_PLANES),
        plane_at(p_chunk, 1, N_PLANES),
        plane_at(p_chunk, 2, N_PLANES),
        plane_at(p_chunk, 3, N_PLANES),
        plane_at(p_chunk, 4, N_PLANES),
        plane_at(p_chunk, 5, N_PLANES),
        plane_at(p_chunk, 6, N_PLANES),
        plane_at(p_chunk, 7, N_PLANES),
    )
    shift = tl.load(p_f + F_SHIFT)
    b_zero = tl.zeros((C * 32,), tl.uint64 if W == 64 else tl.uint32)
    b_constants = tl.zeros((C * 32,), tl.int64)
    if REMAINDER == PLANES:
        b_constants = tl.load(p_chunk + C_CONSTANTS)
    b_hold = tl.zeros((C * 32,), tl.uint32 if B == 16 else tl.uint64)
    b_held = tl.zeros((C * 32,), tl.int32)
    o_stack = tl.zeros((C * 32,), tl.int32)
    p_stack = tl.load(p_chunk + C_STACK_WORDS)
    p_shifts = tl.load(p_chunk + C_SHIFTS)
    b_shift = tl.zeros((C * 32,), tl.int32)
    b_most_shift = tl.zeros((C * 32,), tl.int32)
    if REMAINDER == STACK:
        b_head = word_at(tl.load(p_chunk + C_HEADS), o_lane, o_lane < 32, B)
        tell(p_told, b_chunk, b_head == 0, T_HEAD)
        b_held = tl.maximum(bit_length(b_head, B) - 1, 0)
        b_hold = b_head.to(b_hold.dtype) ^ (tl.full((), 1, b_hold.dtype) << b_held.to(b_hold.dtype))
    q = tl.full((), 0, tl.int32)
    while q < n_rows:
        b_left = b_size - 128 * q - 4 * o_lane
        if IS_WHOLE:
            m_row = tl.full((C * 32,), 1, tl.int1)
            m_0, m_1, m_2, m_3 = m_row, m_row, m_row, m_row
        else:
            m_row = q < b_n_rows
            m_0, m_1, m_2, m_3 = b_left > 0, b_left > 1, b_left > 2, b_left > 3
        b_y0, b_y1, b_y2, b_y3 = b_zero, b_zero, b_zero, b_zero
        if HAS_REFERENCE:
            b_y0, b_y1, b_y2, b_y3 = words_at(p_words + to_reference, none, b_left, W, IS_WHOLE)
        b_s0, b_s1, b_s2, b_s3 = b_row, b_row, b_row, b_row
        b_c0, b_c1, b_c2, b_c3 = b_row, b_row, b_row, b_row
        if HAS_SCALES:
            b_s0, b_s1, b_s2, b_s3, b_c0, b_c1, b_c2, b_c3 = scales_at(
                p_rows, p_columns, b_row, b_column, n_columns, b_left, SCALE, HAS_COLUMNS, BY_FOUR, IS_WHOLE
            )
            b_row, b_column = forward(b_row, b_column, n_rows_on, n_columns_on, n_columns)
        b_i0, b_i1, b_i2, b_i3 = b_largest, b_largest, b_largest, b_largest
        if INDEX_BITS > 0:
            b_i0, b_i1, b_i2, b_i3 = unpack_row(p_symbols, q, m_row, o_lane, INDEX_BITS)
            b_largest = tl.maximum(b_largest, tl.maximum(tl.maximum(b_i0, b_i1), tl.maximum(b_i2, b_i3)))
        b_r0, b_r1, b_r2, b_r3 = b_zero, b_zero, b_zero, b_zero
        if REMAINDER == PLANES:
            for PLANE in tl.static_range(N_PLANES):
                b_octets = row_at(
                    p_planes[PLANE],
                    q,
                    m_row & (p_planes[PLANE] != 0),
                    constant_row(b_constants, PLANE, LAST_BITS if PLANE == N_PLANES - 1 else 8),
                    o_lane,
                    LAST_BITS if PLANE == N_PLANES - 1 else 8,
                )
                b_o0, b_o1, b_o2, b_o3 = parted_row(b_octets, LAST_BITS if PLANE == N_PLANES - 1 else 8)
                b_r0 = with_plane(b_r0, b_o0, shift, PLANE, HAS_SHIFT)
                b_r1 = with_plane(b_r1, b_o1, shift, PLANE, HAS_SHIFT)
                b_r2 = with_plane(b_r2, b_o2, shift, PLANE, HAS_SHIFT)
                b_r3 = with_plane(b_r3, b_o3, shift, PLANE, HAS_SHIFT)
        if HAS_BLOCK_SHIFTS:
            p_shift = (p_shifts + q).to(tl.pointer_type(tl.uint8))
            b_shift = tl.load(p_shift, mask=m_row, other=0).to(tl.int32)
            b_most_shift = tl.maximum(b_most_shift, b_shift)
            b_shift = tl.minimum(b_shift, W - 1)  # what a damaged stream may exceed
        b_x0, b_state, o_symbols, b_hold, b_held, o_stack = decode_word(
            b_y0,
            b_s0,
            b_c0,
            b_i0,
            b_r0,
            b_shift,
            b_state,
            o_symbols,
            b_hold,
            b_held,
            o_stack,
            p_symbols,
            p_stack,
            m_row,
            m_0,
            b_bit,
            numbers,
            W,
            M,
            IS_FLOAT,
            IS_SIGNED,
            PREDICT,
            HAS_SCALES,
            HAS_COLUMNS,
            HAS_CONTEXTS,
            INDEX_BITS,
            P,
            REMAINDER,
            HAS_BLOCK_SHIFTS,
            IS_WHOLE,
            C,
        )
        b_x1, b_state, o_symbols, b_hold, b_held, o_stack = decode_word(
            b_y1,
            b_s1,
            b_c1,
            b_i1,
            b_r1,
            b_shift,
            b_state,
            o_symbols,
            b_hold,
            b_held,
            o_stack,
            p_symbols,
            p_stack,
            m_row,
            m_1,
            b_bit,
            numbers,
            W,
            M,
            IS_FLOAT,
            IS_SIGNED,
            PREDICT,
            HAS_SCALES,
            HAS_COLUMNS,
            HAS_CONTEXTS,
            INDEX_BITS,
            P,
            REMAINDER,
            HAS_BLOCK_SHIFTS,
            IS_WHOLE,
            C,
        )
        b_x2, b_state, o_symbols, b_hold, b_held, o_stack = decode_word(
            b_y2,
            b_s2,
            b_c2,
            b_i2,
            b_r2,
            b_shift,
            b_state,
            o_symbols,
            b_hold,
            b_held,
            o_stack,
            p_symbols,
            p_stack,
            m_row,
            m_2,
            b_bit,
            numbers,
            W,
            M,
            IS_FLOAT,
            IS_SIGNED,
            PREDICT,
            HAS_SCALES,
            HAS_COLUMNS,
            HAS_CONTEXTS,
            INDEX_BITS,
            P,
            REMAINDER,
            HAS_BLOCK_SHIFTS,
            IS_WHOLE,
            C,
        )
        b_x3, b_state, o_symbols, b_hold, b_held, o_stack = decode_word(
            b_y3,
            b_s3,
            b_c3,
            b_i3,
            b_r3,
            b_shift,
            b_state,
            o_symbols,
            b_hold,
            b_held,
            o_stack,
            p_symbols,
            p_stack,
            m_row,
            m_3,
            b_bit,
            numbers,
            W,
            M,
            IS_FLOAT,
            IS_SIGNED,
            PREDICT,
            HAS_SCALES,
            HAS_COLUMNS,
            HAS_CONTEXTS,
            INDEX_BITS,
            P,
            REMAINDER,
            HAS_BLOCK_SHIFTS,
            IS_WHOLE,
            C,
        )
        put_words(p_words, none, b_x0, b_x1, b_x2, b_x3, b_left, W, IS_WHOLE)
        p_words += 128 * (W // 8)
        q += 1
    # Looked up again, so that the loop has its registers.
    b_chunk = tl.load(p_program + 2 + tl.arange(0, C * 32) // 32)
    p_chunk = p_chunks + N_PARTS * b_chunk
    if P > 0:
        b_n_words = tl.load(p_chunk + C_N_SYMBOL_WORDS)
        tell(p_told, b_chunk, (b_state != LOWEST_STATE) | (o_symbols != b_n_words), T_SYMBOLS_END)
    else:
        tell(p_told, b_chunk, b_largest.to(tl.int64) >= tl.load(p_f + F_N_PLACES), T_INDEX)
    if REMAINDER == STACK:
        b_n_words = tl.load(p_chunk + C_N_STACK_WORDS)
        tell(p_told, b_chunk, (b_hold != 0) | (b_held != 0) | (o_stack != b_n_words), T_STACK_END)
        if HAS_BLOCK_SHIFTS:
            tell(p_told, b_chunk, b_most_shift >= W, T_SHIFT)


@triton.jit
def plane_kernel(p_programs, p_streams, p_told, WIDTH: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Decode coded byte planes, of any frames, into the layout of packed ones.

    p_programs: int64[n, 1 + C]: most rows of 128, rows of p_streams; as in `decode_kernel` the last may stand there
    again. p_streams, p_told: see Stream and Fault.
    """
    i_program = tl.program_id(0).to(tl.int64)
    p_program = p_programs + (1 + C) * i_program
    n_rows = tl.load(p_program).to(tl.int32)
    o_lane = tl.arange(0, C * 32) % 32
    b_bit = tl.full((), 1, tl.uint32) << o_lane.to(tl.uint32)
    p_stream = p_streams + N_STREAM * tl.load(p_program + 1 + tl.arange(0, C * 32) // 32)
    b_n_rows = tl.load(p_stream + S_N_ROWS).to(tl.int32)
    p_words = tl.load(p_stream + S_WORDS)
    p_table = tl.load(p_stream + S_TABLE)
    p_target = tl.load(p_stream + S_TARGET)
    b_state = tl.load((tl.load(p_stream + S_STATES) + 4 * o_lane).to(tl.pointer_type(tl.uint32)))
    o_words = tl.zeros((C * 32,), tl.int32)
    b_table = tl.zeros((C * 32,), tl.int32)
    b_hold = tl.zeros((C * 32,), tl.uint64)
    q = tl.full((), 0, tl.int32)
    while q < n_rows:
        m_row = q < b_n_rows
        b_0, b_state, o_words = rans_pop(b_state, p_table, b_table, p_words, o_words, m_row, b_bit, P, C, False)
        b_1, b_state, o_words = rans_pop(b_state, p_table, b_table, p_words, o_words, m_row, b_bit, P, C, False)
        b_2, b_state, o_words = rans_pop(b_state, p_table, b_table, p_words, o_words, m_row, b_bit, P, C, False)
        b_3, b_state, o_words = rans_pop(b_state, p_table, b_table, p_words, o_words, m_row, b_bit, P, C, False)
        b_hold = append_row(b_hold, joined_row(b_0, b_1, b_2, b_3, WIDTH), p_target, q, m_row, o_lane, WIDTH)
        q += 1
    m_fault = (b_state != LOWEST_STATE) | (o_words != tl.load(p_stream + S_N_WORDS))
    tell(p_told, tl.load(p_stream + S_CHUNK), m_fault, T_PLANES_END)


@triton.jit
def copy_kernel(p_pieces, U: tl.constexpr, BLOCK: tl.constexpr):
    """Copy or fill units of U bits. p_pieces: int64[n, 4]: source address (0: none), target address, units, value."""
    p_piece = p_pieces + 4 * tl.program_id(0).to(tl.int64)
    source = tl.load(p_piece)
    target = tl.load(p_piece + 1)
    n_units = tl.load(p_piece + 2)
    value = tl.load(p_piece + 3)
    at = tl.full((), 0, tl.int64)
    while at < n_units:
        o_unit = at + tl.arange(0, BLOCK)
        m_unit = o_unit < n_units
        b_unit = word_at(source, o_unit, m_unit & (source != 0), U)
        b_unit = tl.where(source != 0, b_unit, value.to(b_unit.dtype))
        put_word(target, o_unit, b_unit, m_unit, U)
        at += BLOCK


@triton.jit
def cast_kernel(
    p_pieces,
    FROM_W: tl.constexpr,
    FROM_M: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round floats of one dtype to another. p_pieces: int64[n, 4]: source address, target address, words, nothing."""
    p_piece = p_pieces + 4 * tl.program_id(0).to(tl.int64)
    source = tl.load(p_piece)
    target = tl.load(p_piece + 1)
    n_words = tl.load(p_piece + 2)
    at = tl.full((), 0, tl.int64)
    while at < n_words:
        o_word = at + tl.arange(0, BLOCK)
        b_word = word_at(source, o_word, o_word < n_words, FROM_W)
        put_word(target, o_word, rounded(b_word, FROM_W, FROM_M, W, M), o_word < n_words, W)
        at += BLOCK


@triton.jit
def patch_kernel(p_patches, p_told, W: tl.constexpr, BLOCK: tl.constexpr):
    """Put patches in their places. p_patches: int64[n, 5]: row of p_told, address of the patches, their number, address
    of the chunk's words, and their number.

    Positions that do not ascend, or lie outside the chunk, are a fault; the latter are not written.
    """
    p_patch = p_patches + 5 * tl.program_id(0).to(tl.int64)
    chunk = tl.load(p_patch)
    p_positions = tl.load(p_patch + 1)
    n_patches = tl.load(p_patch + 2)
    target = tl.load(p_patch + 3)
    n_words = tl.load(p_patch + 4)
    at = tl.full((), 0, tl.int64)
    while at < n_patches:
        o_patch = at + tl.arange(0, BLOCK)
        m_patch = o_patch < n_patches
        b_position = word_at(p_positions, o_patch, m_patch, 16).to(tl.int64)
        b_before = word_at(p_positions, o_patch - 1, m_patch & (o_patch > 0), 16).to(tl.int64)
        m_inside = b_position < n_words
        m_after = (b_position > b_before) | (o_patch == 0)
        tell(p_told, tl.zeros_like(o_patch) + chunk, m_patch & ((m_inside & m_after) == 0), T_PATCHES)
        # Words stand behind the positions, at any multiple of two bytes.
        p_word = p_positions + 2 * n_patches + (W // 8) * o_patch
        b_word = word_at(p_word, tl.zeros_like(o_patch), m_patch, 8 if W == 8 else 16)
        for PIECE in tl.static_range(1, W // 16):
            b_piece = word_at(p_word, tl.zeros_like(o_patch) + PIECE, m_patch, 16)
            if W == 64:
                b_word = b_word.to(tl.uint64) | (b_piece.to(tl.uint64) << (16 * PIECE))
            else:
                b_word = b_word | (b_piece << (16 * PIECE))
        put_word(target, b_position, b_word, m_patch & m_inside, W)
        at += BLOCK
