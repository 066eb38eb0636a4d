"""The fused encoder: each word and its reference read once; symbols coded, remainders packed, misfits marked.

Imports triton and the stages. A program encodes up to C chunks of one frame, 32 lanes each, from the last row of 128
words to the first. The hard thing: nobody knows how long a stream will be, so each goes to its own part of the chunk's
scratch memory, words from the end down, and collect_kernel.py puts the parts together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tricomp.kernels import frame
from tricomp.kernels.bits import bit_length, low_bits
from tricomp.kernels.entropy import PATCH_MASK, rans_push
from tricomp.kernels.frame import Field, Result
from tricomp.kernels.lanes import (
    backward,
    forward,
    least_of_chunk,
    most_of_chunk,
    population,
    sum_of_chunk,
    words_at,
)
from tricomp.kernels.pack import hold_of_rows, joined_row, pack_row, stack_push, unpack_row
from tricomp.kernels.predict import (
    context_of_word,
    factor_of,
    place_in,
    rounded,
    scaled,
    split_delta,
    split_full,
)

ENTRIES_ALIGN = tl.constexpr(frame.ENTRIES_ALIGN)
LONGEST_ROW = tl.constexpr(1 << 30)
N_FIELDS = tl.constexpr(int(Field.N))
N_RESULTS = tl.constexpr(int(Result.N))
F_WORDS = tl.constexpr(int(Field.WORDS))
F_REFERENCE = tl.constexpr(int(Field.REFERENCE))
F_N_WORDS = tl.constexpr(int(Field.N_WORDS))
F_CHUNK_LOG2 = tl.constexpr(int(Field.CHUNK_LOG2))
F_K = tl.constexpr(int(Field.K))
F_BASE = tl.constexpr(int(Field.BASE))
F_N_SYMBOLS = tl.constexpr(int(Field.N_SYMBOLS))
F_HAS_SIGN = tl.constexpr(int(Field.HAS_SIGN))
F_N_CONTEXTS = tl.constexpr(int(Field.N_CONTEXTS))
F_CONTEXT_BASE = tl.constexpr(int(Field.CONTEXT_BASE))
F_CONTEXT_SHIFT = tl.constexpr(int(Field.CONTEXT_SHIFT))
F_N_COLUMNS = tl.constexpr(int(Field.N_COLUMNS))
F_FACTOR = tl.constexpr(int(Field.FACTOR))
F_ROWS = tl.constexpr(int(Field.ROWS))
F_COLUMNS = tl.constexpr(int(Field.COLUMNS))
F_TABLE = tl.constexpr(int(Field.TABLE))
F_MEANINGS = tl.constexpr(int(Field.MEANINGS))
F_SHIFT = tl.constexpr(int(Field.SHIFT))
F_LIST = tl.constexpr(int(Field.LIST))
F_PLACES = tl.constexpr(int(Field.PLACES))
F_WORD = tl.constexpr(int(Field.WORD))
F_SCRATCH = tl.constexpr(int(Field.SCRATCH))
F_STRIDE = tl.constexpr(int(Field.STRIDE))
F_FIRST_CHUNK = tl.constexpr(int(Field.FIRST_CHUNK))
F_STATES = tl.constexpr(int(Field.STATES))
F_SYMBOLS_END = tl.constexpr(int(Field.SYMBOLS_END))
F_FLAGS = tl.constexpr(int(Field.FLAGS))
F_SHIFTS = tl.constexpr(int(Field.SHIFTS))
F_HEADS = tl.constexpr(int(Field.HEADS))
F_STACK_END = tl.constexpr(int(Field.STACK_END))
F_PLANE = tl.constexpr(int(Field.PLANE))
R_SYMBOL_WORDS = tl.constexpr(int(Result.SYMBOL_WORDS))
R_STACK_WORDS = tl.constexpr(int(Result.STACK_WORDS))
R_N_PATCHES = tl.constexpr(int(Result.N_PATCHES))
R_PLANE_ANY = tl.constexpr(int(Result.PLANE_ANY))
R_PLANE_ALL = tl.constexpr(int(Result.PLANE_ALL))
R_PLANE_WORDS = tl.constexpr(int(Result.PLANE_WORDS))
SPARSE = tl.constexpr(frame.SPARSE)
FULL = tl.constexpr(frame.FULL)
DELTA = tl.constexpr(frame.DELTA)
SCALED_DELTA = tl.constexpr(frame.SCALED_DELTA)
CAST = tl.constexpr(frame.CAST)
PALETTE = tl.constexpr(frame.PALETTE)
PLANES = tl.constexpr(frame.PLANES)
STACK = tl.constexpr(frame.STACK)


@triton.jit
def numbers_of(p_f):
    """What splitting and merging ask of a frame's row: int32 up to the contexts, then addresses and factor.

    k, base, n_symbols, has_sign, context_base, context_shift, n_contexts, rows, columns, factor, table, meanings, list,
    places.
    """
    return (
        tl.load(p_f + F_K).to(tl.int32),
        tl.load(p_f + F_BASE).to(tl.int32),
        tl.load(p_f + F_N_SYMBOLS).to(tl.int32),
        tl.load(p_f + F_HAS_SIGN).to(tl.int32),
        tl.load(p_f + F_CONTEXT_BASE).to(tl.int32),
        tl.load(p_f + F_CONTEXT_SHIFT).to(tl.int32),
        tl.load(p_f + F_N_CONTEXTS).to(tl.int32),
        tl.load(p_f + F_ROWS),
        tl.load(p_f + F_COLUMNS),
        tl.load(p_f + F_FACTOR),
        tl.load(p_f + F_TABLE),
        tl.load(p_f + F_MEANINGS),
        tl.load(p_f + F_LIST),
        tl.load(p_f + F_PLACES),
    )


@triton.jit
def scales_at(
    p_rows,
    p_columns,
    b_row,
    b_column,
    n_columns,
    b_left,
    TYPE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BY_FOUR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Row and column scales of a lane's four words, int32: four of rows, four of columns; 0 for columns without any.

    p_rows, p_columns: pointers to TYPE, 16 bits. b_row, b_column: int32, of the first word. BY_FOUR: n_columns is a
    multiple of 4, so all four are in one row, and their columns stand in 8 bytes.
    """
    if BY_FOUR:
        b_r0 = scale_at(p_rows, b_row, b_left > 0, IS_WHOLE)
        b_r1, b_r2, b_r3 = b_r0, b_r0, b_r0
        b_c0 = tl.zeros_like(b_r0)
        b_c1, b_c2, b_c3 = b_c0, b_c0, b_c0
        if HAS_COLUMNS:
            p_four = (p_columns + b_column).to(tl.pointer_type(tl.uint64))
            if IS_WHOLE:
                b_four = tl.load(p_four)
            else:
                b_four = tl.load(p_four, mask=b_left > 0, other=0)
            b_low, b_high = (b_four & 0xFFFFFFFF).to(tl.uint32), (b_four >> 32).to(tl.uint32)
            b_c0, b_c1 = (b_low & 0xFFFF).to(tl.uint16), (b_low >> 16).to(tl.uint16)
            b_c2, b_c3 = (b_high & 0xFFFF).to(tl.uint16), (b_high >> 16).to(tl.uint16)
            b_c0, b_c1 = b_c0.to(TYPE, bitcast=True).to(tl.int32), b_c1.to(TYPE, bitcast=True).to(tl.int32)
            b_c2, b_c3 = b_c2.to(TYPE, bitcast=True).to(tl.int32), b_c3.to(TYPE, bitcast=True).to(tl.int32)
    else:
        b_row1, b_column1 = forward(b_row, b_column, 0, 1, n_columns)
        b_row2, b_column2 = forward(b_row1, b_column1, 0, 1, n_columns)
        b_row3, b_column3 = forward(b_row2, b_column2, 0, 1, n_columns)
        b_r0 = scale_at(p_rows, b_row, b_left > 0, IS_WHOLE)
        b_r1 = scale_at(p_rows, b_row1, b_left > 1, IS_WHOLE)
        b_r2 = scale_at(p_rows, b_row2, b_left > 2, IS_WHOLE)
        b_r3 = scale_at(p_rows, b_row3, b_left > 3, IS_WHOLE)
        b_c0 = tl.zeros_like(b_r0)
        b_c1, b_c2, b_c3 = b_c0, b_c0, b_c0
        if HAS_COLUMNS:
            b_c0 = scale_at(p_columns, b_column, b_left > 0, IS_WHOLE)
            b_c1 = scale_at(p_columns, b_column1, b_left > 1, IS_WHOLE)
            b_c2 = scale_at(p_columns, b_column2, b_left > 2, IS_WHOLE)
            b_c3 = scale_at(p_columns, b_column3, b_left > 3, IS_WHOLE)
    return b_r0, b_r1, b_r2, b_r3, b_c0, b_c1, b_c2, b_c3


@triton.jit
def scale_at(p_scales, b_place, m_word, IS_WHOLE: tl.constexpr):
    """One scale a lane, int32."""
    if IS_WHOLE:
        return tl.load(p_scales + b_place).to(tl.int32)
    else:
        return tl.load(p_scales + b_place, mask=m_word, other=0).to(tl.int32)


@triton.jit
def split_word(
    b_x,
    b_y,
    b_r,
    b_c,
    m_word,
    numbers,
    p_lengths,
    PREDICT: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_CONTEXTS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """A word's coder entry (rans: uint64; index: its place, uint32), remainder, length, PATCH_MASK if it is a patch.

    b_r, b_c: its scales; numbers: see `numbers_of`; p_lengths: of a byte for each entry, if HAS_LENGTHS. Padding, where
    m_word is not set, takes the stand-in of context 0 and no remainder.
    """
    k, base, n_symbols, has_sign = numbers[0], numbers[1], numbers[2], numbers[3]
    b_context = tl.zeros(b_x.shape, tl.int32)
    n_each = (n_symbols + ENTRIES_ALIGN) // ENTRIES_ALIGN * ENTRIES_ALIGN  # entries of a context
    if PREDICT == FULL:
        b_level = b_r
        if HAS_COLUMNS:
            b_level = b_r + b_c
        b_place, b_remainder = split_full(b_x, b_level, k, base, n_symbols, has_sign, W, M, HAS_SCALES)
        if HAS_CONTEXTS:
            # The phase is left where it stands in the level, and the number of entries shifted in its stead.
            b_context = b_level & (8 - (1 << numbers[5]))
            n_each = n_each >> numbers[5]
    elif PREDICT == PALETTE:
        b_symbol = place_in(b_x, numbers[12], n_symbols, W)
        b_place = tl.where(b_symbol == 0, n_symbols, b_symbol - 1).to(tl.uint32)
        b_remainder = tl.zeros_like(b_x)
    else:
        if PREDICT == SCALED_DELTA:
            b_factor = tl.full((), 1 << 15, tl.uint64)
            if HAS_COLUMNS:
                b_factor = b_c.to(tl.uint64)
            b_y = scaled(b_y, factor_of(b_r.to(tl.uint64), b_factor, numbers[9]), W, M)
        b_place, b_remainder = split_delta(b_x, b_y, k, base, n_symbols, has_sign, W, IS_FLOAT, IS_SIGNED)
        if HAS_CONTEXTS:
            b_context = context_of_word(b_y, numbers[4], numbers[5], numbers[6], W, M, IS_FLOAT, IS_SIGNED)
    if not IS_WHOLE:
        b_place = tl.where(m_word, b_place, (n_symbols - 1).to(tl.uint32))
        b_context = tl.where(m_word, b_context, 0)
    if HAS_CONTEXTS:
        b_place = (b_context * n_each).to(tl.uint32) + b_place
    o_entry = b_place.to(tl.int64)
    if INDEX_BITS > 0:
        b_entry = tl.load((numbers[13] + 2 * o_entry).to(tl.pointer_type(tl.uint16))).to(tl.uint32)
        b_patch = (b_entry << 1) & PATCH_MASK
        b_entry = b_entry & 0xFF
    else:
        b_entry = tl.load((numbers[10] + 8 * o_entry).to(tl.pointer_type(tl.uint64)))
        b_patch = (b_entry >> 32).to(tl.uint32) & PATCH_MASK
    b_length = tl.zeros(b_x.shape, tl.int32)
    if HAS_LENGTHS:
        b_length = tl.load((p_lengths + o_entry).to(tl.pointer_type(tl.uint8))).to(tl.int32)
    b_remainder = tl.where(b_patch != 0, 0, b_remainder)
    if not IS_WHOLE:
        b_length = tl.where(m_word, b_length, 0)
        b_patch = tl.where(m_word, b_patch, 0)
    return b_entry, b_remainder, b_length, b_patch


@triton.jit
def patch_of(m_other, m_word, IS_WHOLE: tl.constexpr):
    """PATCH_MASK for words that are others than predicted."""
    if not IS_WHOLE:
        m_other = m_other & m_word
    return tl.where(m_other, PATCH_MASK, 0).to(tl.uint32)


@triton.jit
def encode_kernel(
    p_programs,
    p_frames,
    p_results,
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
    C: tl.constexpr,
):
    """Encode chunks. p_programs: int64[n, 4]: frame, first chunk, chunks, row of the results.

    p_frames, p_results: see Field and Result. IS_WHOLE: all chunks are full, and loads are aligned; then programs of
    less than C chunks code their last one several times over, to the same bytes at the same place, and nothing in the
    loop asks who takes part. BY_FOUR: see `scales_at`. HAS_SHIFT: planes leave out bits at the bottom.
    """
    tl.static_assert(W == 8 or W == 16 or W == 32 or W == 64)
    tl.static_assert((REMAINDER == PLANES) == (N_PLANES > 0))
    B: tl.constexpr = 16 if W <= 16 else 32
    WORD: tl.constexpr = tl.uint64 if W == 64 else tl.uint32
    SCALE: tl.constexpr = tl.int16 if PREDICT == FULL else tl.uint16
    i_program = tl.program_id(0).to(tl.int64)
    p_f = p_frames + tl.load(p_programs + 4 * i_program) * N_FIELDS
    first_chunk = tl.load(p_programs + 4 * i_program + 1)
    n_chunks = tl.load(p_programs + 4 * i_program + 2).to(tl.int32)
    o_lane = tl.arange(0, C * 32) % 32
    o_chunk = tl.arange(0, C * 32) // 32
    m_here = o_chunk < n_chunks
    if IS_WHOLE:
        o_chunk = tl.minimum(o_chunk, n_chunks - 1)
    b_bit = tl.full((), 1, tl.uint32) << o_lane.to(tl.uint32)
    chunk_log2 = tl.load(p_f + F_CHUNK_LOG2).to(tl.int32)
    first_word = first_chunk << chunk_log2
    n_left = tl.minimum(tl.load(p_f + F_N_WORDS) - first_word, C << chunk_log2).to(tl.int32)
    b_first = o_chunk << chunk_log2  # of a chunk's words, counted from the program's first
    b_size = tl.minimum(tl.maximum(n_left - b_first, 0), 1 << chunk_log2)
    b_size = tl.where(o_chunk < n_chunks, b_size, 0)
    b_n_rows = (b_size + 127) // 128
    n_rows = (tl.minimum(n_left, 1 << chunk_log2) + 127) // 128
    p_words = tl.load(p_f + F_WORDS) + first_word * (W // 8)
    p_reference = tl.load(p_f + F_REFERENCE) + first_word * ((FROM_W if FROM_W > 0 else W) // 8)
    # Places in scratch memory are counted from the program's, in int32: eight chunks of a column of addresses each
    # would cost registers that the loop needs.
    stride = tl.load(p_f + F_STRIDE)
    p_base = tl.load(p_f + F_SCRATCH) + (first_chunk - tl.load(p_f + F_FIRST_CHUNK)) * stride
    o_scratch = o_chunk * stride.to(tl.int32)
    numbers = numbers_of(p_f)
    # Where the last row's words stand in the split, one row past it, and how far one row of 128 is.
    n_columns = tl.load(p_f + F_N_COLUMNS)
    b_row = tl.zeros((C * 32,), tl.int32)
    b_column = tl.zeros((C * 32,), tl.int32)
    n_rows_back, n_columns_back = n_rows, n_rows
    p_rows = numbers[7].to(tl.pointer_type(SCALE))
    p_columns = numbers[8].to(tl.pointer_type(SCALE))
    if HAS_SCALES:
        first_row = first_word // n_columns
        p_rows += first_row
        # Of rows longer than any program only their end matters; those have no scales of columns, see encode.py.
        spare = tl.maximum(n_columns - LONGEST_ROW, 0)
        first_column = tl.maximum(first_word - first_row * n_columns - spare, 0).to(tl.int32)
        n_columns = (n_columns - spare).to(tl.int32)
        n_rows_back, n_columns_back = 128 // n_columns, 128 % n_columns
        b_last = first_column + b_first + 128 * n_rows + 4 * o_lane
        b_row = b_last // n_columns
        b_column = b_last - b_row * n_columns
    b_state = tl.full((C * 32,), 1 << 15, tl.uint32)
    symbols_end = tl.load(p_f + F_SYMBOLS_END).to(tl.int32)
    o_symbols = (o_scratch + symbols_end) // 2
    b_hold = tl.zeros((C * 32,), tl.uint32 if B == 16 else tl.uint64)
    b_held = tl.zeros((C * 32,), tl.int32)
    stack_end = tl.load(p_f + F_STACK_END).to(tl.int32)
    o_stack = (o_scratch + stack_end) // (B // 8)
    b_n_patches = tl.zeros((C * 32,), tl.int32)
    b_flags = tl.zeros((C * 32,), tl.uint32)  # in its upper half, since that is where entries have them
    b_index_hold = hold_of_rows(INDEX_BITS if INDEX_BITS > 0 else 8, C)
    b_plane_hold = hold_of_rows(LAST_BITS if N_PLANES > 0 else 8, C)
    b_any = tl.zeros((C * 32,), WORD)  # OR of all remainders that planes hold, and AND
    b_all = b_any - 1
    p_flags = p_base + tl.load(p_f + F_FLAGS)
    shift = tl.load(p_f + F_SHIFT)
    p_shifts = p_base + tl.load(p_f + F_SHIFTS)
    p_plane = p_base + tl.load(p_f + F_PLANE)  # and one after the other
    plane_bytes = tl.load(p_f + F_PLANE + 1) - tl.load(p_f + F_PLANE)
    n_entries = numbers[6] * ((numbers[2] + ENTRIES_ALIGN) // ENTRIES_ALIGN * ENTRIES_ALIGN)
    p_lengths = (numbers[13] + 2 * n_entries) if INDEX_BITS > 0 else (numbers[10] + 8 * n_entries)
    b_o = b_first + 4 * o_lane
    o_packed = o_scratch // 4 + o_lane
    q = n_rows
    while q > 0:
        q -= 1
        m_row = tl.full((C * 32,), 1, tl.int1) if IS_WHOLE else q < b_n_rows
        b_left = b_size - 128 * q - 4 * o_lane
        b_x0, b_x1, b_x2, b_x3 = words_at(p_words + (128 * (W // 8)) * q, b_o.to(tl.int64), b_left, W, IS_WHOLE)
        if PREDICT == SPARSE or PREDICT == CAST:
            if PREDICT == CAST:
                p_from = p_reference + (128 * (FROM_W // 8)) * q
                b_s0, b_s1, b_s2, b_s3 = words_at(p_from, b_o.to(tl.int64), b_left, FROM_W, IS_WHOLE)
                b_y0 = rounded(b_s0, FROM_W, FROM_M, W, M)
                b_y1 = rounded(b_s1, FROM_W, FROM_M, W, M)
                b_y2 = rounded(b_s2, FROM_W, FROM_M, W, M)
                b_y3 = rounded(b_s3, FROM_W, FROM_M, W, M)
            elif HAS_REFERENCE:
                p_from = p_reference + (128 * (W // 8)) * q
                b_y0, b_y1, b_y2, b_y3 = words_at(p_from, b_o.to(tl.int64), b_left, W, IS_WHOLE)
            else:
                b_y0 = tl.zeros_like(b_x0) + tl.load(p_f + F_WORD).to(b_x0.dtype)
                b_y1, b_y2, b_y3 = b_y0, b_y0, b_y0
            b_p0 = patch_of(b_x0 != b_y0, b_left > 0, IS_WHOLE)
            b_p1 = patch_of(b_x1 != b_y1, b_left > 1, IS_WHOLE)
            b_p2 = patch_of(b_x2 != b_y2, b_left > 2, IS_WHOLE)
            b_p3 = patch_of(b_x3 != b_y3, b_left > 3, IS_WHOLE)
        else:
            b_y0, b_y1, b_y2, b_y3 = tl.zeros_like(b_x0), tl.zeros_like(b_x1), tl.zeros_like(b_x2), tl.zeros_like(b_x3)
            if HAS_REFERENCE:
                p_from = p_reference + (128 * (W // 8)) * q
                b_y0, b_y1, b_y2, b_y3 = words_at(p_from, b_o.to(tl.int64), b_left, W, IS_WHOLE)
            b_s0, b_s1, b_s2, b_s3 = b_row, b_row, b_row, b_row
            b_c0, b_c1, b_c2, b_c3 = b_row, b_row, b_row, b_row
            if HAS_SCALES:
                b_row, b_column = backward(b_row, b_column, n_rows_back, n_columns_back, n_columns)
                b_s0, b_s1, b_s2, b_s3, b_c0, b_c1, b_c2, b_c3 = scales_at(
                    p_rows, p_columns, b_row, b_column, n_columns, b_left, SCALE, HAS_COLUMNS, BY_FOUR, IS_WHOLE
                )
            b_e0, b_r0, b_l0, b_p0 = split_word(
                b_x0,
                b_y0,
                b_s0,
                b_c0,
                b_left > 0,
                numbers,
                p_lengths,
                PREDICT,
                W,
                M,
                IS_FLOAT,
                IS_SIGNED,
                HAS_SCALES,
                HAS_COLUMNS,
                HAS_CONTEXTS,
                INDEX_BITS,
                IS_WHOLE,
                REMAINDER == STACK,
            )
            b_e1, b_r1, b_l1, b_p1 = split_word(
                b_x1,
                b_y1,
                b_s1,
                b_c1,
                b_left > 1,
                numbers,
                p_lengths,
                PREDICT,
                W,
                M,
                IS_FLOAT,
                IS_SIGNED,
                HAS_SCALES,
                HAS_COLUMNS,
                HAS_CONTEXTS,
                INDEX_BITS,
                IS_WHOLE,
                REMAINDER == STACK,
            )
            b_e2, b_r2, b_l2, b_p2 = split_word(
                b_x2,
                b_y2,
                b_s2,
                b_c2,
                b_left > 2,
                numbers,
                p_lengths,
                PREDICT,
                W,
                M,
                IS_FLOAT,
                IS_SIGNED,
                HAS_SCALES,
                HAS_COLUMNS,
                HAS_CONTEXTS,
                INDEX_BITS,
                IS_WHOLE,
                REMAINDER == STACK,
            )
            b_e3, b_r3, b_l3, b_p3 = split_word(
                b_x3,
                b_y3,
                b_s3,
                b_c3,
                b_left > 3,
                numbers,
                p_lengths,
                PREDICT,
                W,
                M,
                IS_FLOAT,
                IS_SIGNED,
                HAS_SCALES,
                HAS_COLUMNS,
                HAS_CONTEXTS,
                INDEX_BITS,
                IS_WHOLE,
                REMAINDER == STACK,
            )
            if P > 0:
                b_state, o_symbols = rans_push(b_state, b_e3, p_base, o_symbols, m_row, b_bit, P, C, IS_WHOLE)
                b_state, o_symbols = rans_push(b_state, b_e2, p_base, o_symbols, m_row, b_bit, P, C, IS_WHOLE)
                b_state, o_symbols = rans_push(b_state, b_e1, p_base, o_symbols, m_row, b_bit, P, C, IS_WHOLE)
                b_state, o_symbols = rans_push(b_state, b_e0, p_base, o_symbols, m_row, b_bit, P, C, IS_WHOLE)
            else:
                b_indices = joined_row(b_e0, b_e1, b_e2, b_e3, INDEX_BITS)
                if not IS_WHOLE:
                    b_indices = tl.where(m_row, b_indices, 0)
                b_index_hold = pack_row(b_index_hold, b_indices, p_base + symbols_end, o_packed, q, m_row, INDEX_BITS)
            if REMAINDER == PLANES:
                if not IS_WHOLE:
                    b_any = b_any | tl.where(m_row, b_r0 | b_r1 | b_r2 | b_r3, 0)
                    b_all = tl.where(m_row, b_all & (b_r0 & b_r1 & b_r2 & b_r3), b_all)
                else:
                    b_any = b_any | b_r0 | b_r1 | b_r2 | b_r3
                    b_all = b_all & b_r0 & b_r1 & b_r2 & b_r3
                if HAS_SHIFT:
                    b_down = shift.to(WORD)
                    b_r0, b_r1, b_r2, b_r3 = b_r0 >> b_down, b_r1 >> b_down, b_r2 >> b_down, b_r3 >> b_down
                for PLANE in tl.static_range(N_PLANES):
                    b_plane_hold = pack_row(
                        b_plane_hold,
                        octets_of_row(b_r0, b_r1, b_r2, b_r3, PLANE, N_PLANES, LAST_BITS),
                        p_plane + PLANE * plane_bytes,
                        o_packed,
                        q,
                        m_row,
                        LAST_BITS if PLANE == N_PLANES - 1 else 8,
                    )
            if REMAINDER == STACK:
                if HAS_BLOCK_SHIFTS:
                    b_joined = b_r0 | b_r1 | b_r2 | b_r3
                    # Of the lowest set bit less one, the least is that of all lanes joined.
                    b_below = (b_joined ^ (b_joined - 1)) >> 1
                    b_below = tl.where(b_joined == 0, low_bits(tl.full((), W - 1, tl.int32), b_joined), b_below)
                    b_zeros = bit_length(b_below, W)
                    b_longest = tl.maximum(tl.maximum(b_l0, b_l1), tl.maximum(b_l2, b_l3))
                    b_shift = tl.minimum(least_of_chunk(b_zeros, C), most_of_chunk(b_longest, C))
                    p_shift = (p_shifts + (o_scratch + q).to(tl.int64)).to(tl.pointer_type(tl.uint8))
                    tl.store(p_shift, b_shift.to(tl.uint8), mask=m_row & (o_lane == 0))
                    b_down = b_shift.to(b_r0.dtype)
                    b_r0, b_r1, b_r2, b_r3 = b_r0 >> b_down, b_r1 >> b_down, b_r2 >> b_down, b_r3 >> b_down
                    b_l0, b_l1 = tl.maximum(b_l0 - b_shift, 0), tl.maximum(b_l1 - b_shift, 0)
                    b_l2, b_l3 = tl.maximum(b_l2 - b_shift, 0), tl.maximum(b_l3 - b_shift, 0)
                b_hold, b_held, o_stack = push_word(b_hold, b_held, b_r3, b_l3, p_base, o_stack, m_row, b_bit, W, B, C)
                b_hold, b_held, o_stack = push_word(b_hold, b_held, b_r2, b_l2, p_base, o_stack, m_row, b_bit, W, B, C)
                b_hold, b_held, o_stack = push_word(b_hold, b_held, b_r1, b_l1, p_base, o_stack, m_row, b_bit, W, B, C)
                b_hold, b_held, o_stack = push_word(b_hold, b_held, b_r0, b_l0, p_base, o_stack, m_row, b_bit, W, B, C)
        b_flags = (b_flags << 4) + b_p0 + b_p1 * 2 + b_p2 * 4 + b_p3 * 8
        if q % 4 == 0:  # 16 bits a lane; those of the rows before have left at the top
            b_rows = b_flags >> 16
            b_n_patches += population(b_rows)
            o_rows = (o_scratch + 2 * o_lane + 16 * q).to(tl.int64)
            tl.store((p_flags + o_rows).to(tl.pointer_type(tl.uint16)), b_rows.to(tl.uint16), mask=m_row)
    p_result = p_results + (tl.load(p_programs + 4 * i_program + 3) + o_chunk) * N_RESULTS
    m_first = m_here & (o_lane == 0)
    tl.store(p_result + R_N_PATCHES, sum_of_chunk(b_n_patches, C), mask=m_first)
    if P > 0:
        n_symbol_words = (o_scratch + symbols_end) // 2 - o_symbols
        finish_stream(p_base, o_symbols, n_symbol_words, o_lane, m_here, 16)
        tl.store(p_result + R_SYMBOL_WORDS, n_symbol_words, mask=m_first)
        p_state = p_base + tl.load(p_f + F_STATES) + (o_scratch + 4 * o_lane).to(tl.int64)
        p_state = p_state.to(tl.pointer_type(tl.uint32))
        tl.store(p_state, b_state, mask=m_here)
    if REMAINDER == STACK:
        n_stack_words = (o_scratch + stack_end) // (B // 8) - o_stack
        finish_stream(p_base, o_stack, n_stack_words, o_lane, m_here, B)
        tl.store(p_result + R_STACK_WORDS, n_stack_words, mask=m_first)
        b_end = tl.full((), 1, b_hold.dtype) << b_held.to(b_hold.dtype)
        b_head = (b_hold & (b_end - 1)) | b_end
        p_heads = p_base + tl.load(p_f + F_HEADS) + o_scratch.to(tl.int64)
        if B == 16:
            tl.store((p_heads + 2 * o_lane).to(tl.pointer_type(tl.uint16)), b_head.to(tl.uint16), mask=m_here)
        else:
            tl.store((p_heads + 4 * o_lane).to(tl.pointer_type(tl.uint32)), b_head.to(tl.uint32), mask=m_here)
    if REMAINDER == PLANES:
        for PLANE in tl.static_range(N_PLANES):
            tell_plane(
                p_result + PLANE,
                b_any,
                b_all,
                shift,
                m_first,
                PLANE,
                LAST_BITS if PLANE == N_PLANES - 1 else 8,
                C,
            )


@triton.jit
def octets_of(b_r, shift, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """One byte plane of remainders, uint32."""
    b_low = shift.to(b_r.dtype) + 8 * PLANE
    return ((b_r >> b_low) & ((1 << WIDTH) - 1)).to(tl.uint32)


@triton.jit
def octets_of_row(b_r0, b_r1, b_r2, b_r3, PLANE: tl.constexpr, N_PLANES: tl.constexpr, LAST_BITS: tl.constexpr):
    """One byte plane of a lane's four remainders, side by side; uint32. Above the last plane they have no bits."""
    if PLANE == N_PLANES - 1:
        LOW: tl.constexpr = 8 * PLANE
        b_0, b_1 = (b_r0 >> LOW).to(tl.uint32), (b_r1 >> LOW).to(tl.uint32)
        b_2, b_3 = (b_r2 >> LOW).to(tl.uint32), (b_r3 >> LOW).to(tl.uint32)
        return joined_row(b_0, b_1, b_2, b_3, LAST_BITS)
    else:
        # Two planes at once, of the first and third word and of the second and fourth; both planes share this.
        LOW: tl.constexpr = 16 * (PLANE // 2)
        b_0, b_1 = (b_r0 >> LOW).to(tl.uint32), (b_r1 >> LOW).to(tl.uint32)
        b_2, b_3 = (b_r2 >> LOW).to(tl.uint32), (b_r3 >> LOW).to(tl.uint32)
        b_even = (b_0 & 0xFFFF) | (b_2 << 16)
        b_odd = (b_1 & 0xFFFF) | (b_3 << 16)
        if PLANE % 2 == 0:
            return (b_even & 0x00FF00FF) | ((b_odd << 8) & 0xFF00FF00)
        else:
            return ((b_even >> 8) & 0x00FF00FF) | (b_odd & 0xFF00FF00)


@triton.jit
def tell_plane(p_result, b_any, b_all, shift, m_first, PLANE: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """Store OR and AND of a plane's octets. b_any, b_all: of each lane's remainders.

    Over lanes both are taken bit by bit, by the greatest and the least, once a chunk.
    """
    b_some = octets_of(b_any, shift, PLANE, WIDTH).to(tl.int32)
    b_every = octets_of(b_all, shift, PLANE, WIDTH).to(tl.int32)
    b_or = tl.zeros_like(b_some)
    b_and = tl.zeros_like(b_some)
    for BIT in tl.static_range(WIDTH):
        b_or = b_or | (most_of_chunk((b_some >> BIT) & 1, C) << BIT)
        b_and = b_and | (least_of_chunk((b_every >> BIT) & 1, C) << BIT)
    tl.store(p_result + R_PLANE_ANY, b_or, mask=m_first)
    tl.store(p_result + R_PLANE_ALL, b_and, mask=m_first)


@triton.jit
def push_word(
    b_hold,
    b_held,
    b_remainder,
    b_length,
    p_stack,
    o_stack,
    m_row,
    b_bit,
    W: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """Push one remainder; of 64-bit words the upper part first, so that a decoder meets the lower one first.

    Rows that a chunk does not have push nothing: the lengths there are 0, and so are the remainders.
    """
    if W == 64:
        b_above = tl.maximum(b_length - 32, 0)
        b_upper, b_lower = b_remainder >> 32, b_remainder & 0xFFFFFFFF
        b_hold, b_held, o_stack = stack_push(b_hold, b_held, b_upper, b_above, p_stack, o_stack, m_row, b_bit, B, C)
        b_length = b_length - b_above
        b_hold, b_held, o_stack = stack_push(b_hold, b_held, b_lower, b_length, p_stack, o_stack, m_row, b_bit, B, C)
    else:
        b_hold, b_held, o_stack = stack_push(
            b_hold, b_held, b_remainder, b_length, p_stack, o_stack, m_row, b_bit, B, C
        )
    return b_hold, b_held, o_stack


@triton.jit
def finish_stream(p_base, o_next, b_n_words, o_lane, m_here, B: tl.constexpr):
    """Zeros before the words of a stream, down to a multiple of 16 bytes. o_next: int32, of the first word."""
    N_EACH: tl.constexpr = 128 // B
    b_spare = b_n_words % N_EACH
    m_zero = m_here & (b_spare > 0) & (o_lane < N_EACH - b_spare)
    o_zero = (o_next - 1 - o_lane).to(tl.int64)
    if B == 16:
        tl.store((p_base + 2 * o_zero).to(tl.pointer_type(tl.uint16)), tl.zeros_like(o_lane).to(tl.uint16), mask=m_zero)
    else:
        tl.store((p_base + 4 * o_zero).to(tl.pointer_type(tl.uint32)), tl.zeros_like(o_lane).to(tl.uint32), mask=m_zero)


@triton.jit
def plane_kernel(p_programs, p_frames, p_results, WIDTH: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Encode a byte plane, which the encoder has packed, with its frequency table: rans beside the packed octets.

    p_programs: int64[n, 9]: frame, first chunk, chunks, row of the results, plane, and where in the chunk's scratch its
    packed octets begin, its states stand and its words end; address of the entries.
    """
    i_program = tl.program_id(0).to(tl.int64)
    p_program = p_programs + 9 * i_program
    p_f = p_frames + tl.load(p_program) * N_FIELDS
    first_chunk = tl.load(p_program + 1)
    o_lane = tl.arange(0, C * 32) % 32
    o_chunk = tl.arange(0, C * 32) // 32
    m_here = o_chunk < tl.load(p_program + 2)
    b_bit = tl.full((), 1, tl.uint32) << o_lane.to(tl.uint32)
    chunk_log2 = tl.load(p_f + F_CHUNK_LOG2)
    n_words = tl.load(p_f + F_N_WORDS)
    size = tl.full((), 1, tl.int64) << chunk_log2
    b_size = tl.minimum(tl.maximum(n_words - ((first_chunk + o_chunk).to(tl.int64) << chunk_log2), 0), size)
    b_n_rows = (tl.where(m_here, b_size, 0).to(tl.int32) + 127) // 128
    n_rows = ((tl.minimum(n_words - (first_chunk << chunk_log2), size) + 127) // 128).to(tl.int32)
    b_scratch = tl.load(p_f + F_SCRATCH) + (first_chunk - tl.load(p_f + F_FIRST_CHUNK) + o_chunk) * tl.load(
        p_f + F_STRIDE
    )
    p_plane = b_scratch + tl.load(p_program + 5)
    p_words = b_scratch + tl.load(p_program + 7)
    p_table = tl.load(p_program + 8)
    b_state = tl.full((C * 32,), 1 << 15, tl.uint32)
    o_words = tl.zeros((C * 32,), tl.int32)
    q = n_rows
    while q > 0:
        q -= 1
        m_row = q < b_n_rows
        b_0, b_1, b_2, b_3 = unpack_row(p_plane, q, m_row, o_lane, WIDTH)
        b_state, o_words = push_octet(b_state, b_3, p_table, p_words, o_words, m_row, b_bit, P, C)
        b_state, o_words = push_octet(b_state, b_2, p_table, p_words, o_words, m_row, b_bit, P, C)
        b_state, o_words = push_octet(b_state, b_1, p_table, p_words, o_words, m_row, b_bit, P, C)
        b_state, o_words = push_octet(b_state, b_0, p_table, p_words, o_words, m_row, b_bit, P, C)
    finish_stream(p_words, o_words, -o_words, o_lane, m_here, 16)
    p_state = (b_scratch + tl.load(p_program + 6) + 4 * o_lane).to(tl.pointer_type(tl.uint32))
    tl.store(p_state, b_state, mask=m_here)
    p_result = p_results + (tl.load(p_program + 3) + o_chunk) * N_RESULTS + R_PLANE_WORDS + tl.load(p_program + 4)
    tl.store(p_result, -o_words, mask=m_here & (o_lane == 0))


@triton.jit
def push_octet(
    b_state,
    b_octet,
    p_table,
    p_words,
    o_words,
    m_row,
    b_bit,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """One step of a byte plane."""
    b_entry = tl.load((p_table + 8 * b_octet.to(tl.int64)).to(tl.pointer_type(tl.uint64)))
    return rans_push(b_state, b_entry, p_words, o_words, m_row, b_bit, P, C, False)
