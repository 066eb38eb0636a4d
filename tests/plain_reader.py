"""A decoder of `.tri` files and of blobs in plain Python integers, written from tricomp/FORMAT.md alone.

It is the readable twin of that document: loops over elements, one function a section, no speed. It shares no line
with the package, so where both agree, the document says enough. Imports msgpack, xxhash, zlib and struct only."""

import math
import struct
import zlib
from types import SimpleNamespace
from typing import NamedTuple

import msgpack
import xxhash

RAW, CONSTANT, COPY, PALETTE, SPARSE, FULL, DELTA, SCALED, CAST = range(9)
NO_REFERENCE, PARENT, SIBLING = range(3)
NO_ENTROPY, INDEX, RANS = range(3)
NO_REMAINDER, PLANES, STACK = range(3)


class Refused(Exception):
    """The bytes are damaged, of a newer format, or not what they are said to be."""


def need(condition, what):
    if not condition:
        raise Refused(what)


def roundup(n, m):
    return -(-n // m) * m


def checksum(data):
    return xxhash.xxh3_64_intdigest(data)


class Cursor:
    """Reads sections one after the other; `end` proves that nothing is left."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        need(0 <= size <= len(self.data) - self.at, "a section is cut")
        self.at += size
        return self.data[self.at - size : self.at]

    def words(self, count, n_bits):
        size = n_bits // 8
        data = self.take(count * size)
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]

    def padding(self, size):
        need(not any(self.take(size)), "padding is not zero")

    def align(self):
        self.padding(-self.at % 16)

    def end(self):
        need(self.at == len(self.data), "bytes are left over")


class Bits:
    """A bit string, lowest bits first, from a cursor; `end` drops the zeros that fill the last byte."""

    def __init__(self, cursor):
        self.cursor, self.hold, self.held = cursor, 0, 0

    def take(self, width):
        while self.held < width:
            self.hold |= self.cursor.take(1)[0] << self.held
            self.held += 8
        value = self.hold & ((1 << width) - 1)
        self.hold >>= width
        self.held -= width
        return value

    def end(self):
        need(self.held < 8 and self.hold == 0, "a bit string is not filled up with zeros")


# Words and dtypes


class Dtype(NamedTuple):
    W: int
    E: int
    M: int
    signed: bool


LAYOUTS = {1: (64, 11, 52), 2: (32, 8, 23), 3: (16, 5, 10), 4: (16, 8, 7), 5: (8, 3, 4), 6: (8, 4, 3), 7: (8, 4, 3)}
LAYOUTS |= {8: (8, 4, 3), 9: (8, 4, 3), 10: (8, 5, 2), 11: (8, 5, 2), 13: (32, 8, 23), 14: (64, 11, 52)}
DTYPES = {number: Dtype(*layout, True) for number, layout in LAYOUTS.items()} | {12: Dtype(8, 0, 0, False)}
DTYPES |= {16 + i: Dtype(8 << i, 0, 0, True) for i in range(4)}
DTYPES |= {20 + i: Dtype(8 << i, 0, 0, False) for i in range(4)} | {24: Dtype(8, 0, 0, False)}
COMPLEX = (13, 14)
CASTS = {(2, 4), (2, 3), (1, 2), (1, 3), (1, 4), (4, 2), (3, 2)}


def mag(x, dtype):
    top = 1 << (dtype.W - 1)
    if dtype.E:
        return x & (top - 1)
    return (1 << dtype.W) - x if dtype.signed and x & top else x


def ord_(x, dtype):
    top = 1 << (dtype.W - 1)
    if not dtype.signed:
        return x
    return x ^ (2 * top - 1) if dtype.E and x & top else x ^ top


def unord(o, dtype):
    top = 1 << (dtype.W - 1)
    if not dtype.signed:
        return o
    return o ^ (2 * top - 1) if dtype.E and not o & top else o ^ top


def expo(x, dtype):
    return mag(x, dtype) >> dtype.M if dtype.E else mag(x, dtype).bit_length()


def count_words(number, shape):
    return math.prod(shape) * (2 if number in COMPLEX else 1)


# Plan

FIELDS = {  # key: field, least, greatest, default (None: required)
    "d": ("dtype", 1, 24, None),
    "n": ("n_words", 0, 1 << 48, None),
    "p": ("predict", 0, 8, None),
    "c": ("chunk_log2", 10, 16, 16),
    "r": ("reference", 0, 2, 0),
    "s": ("sibling", 0, 1 << 32, 0),
    "e": ("entropy", 0, 2, 0),
    "ns": ("n_symbols", 0, 256, 0),
    "b": ("base", -(1 << 16), 1 << 16, 0),
    "pb": ("prob_bits", 8, 11, 11),
    "nc": ("n_contexts", 1, 8, 1),
    "cb": ("context_base", -(1 << 12), 1 << 12, 0),
    "cs": ("context_shift", 0, 12, 0),
    "k": ("mantissa_bits", 0, 4, 0),
    "sg": ("has_sign", 0, 1, 1),
    "nk": ("n_columns", 0, 1 << 48, 0),
    "ks": ("has_column_scale", 0, 1, 0),
    "f": ("factor", 1, (1 << 32) - 1, 1 << 30),
    "ib": ("index_bits", 0, 8, 0),
    "m": ("remainder", 0, 2, 0),
    "t": ("shift", 0, 63, 0),
    "bs": ("has_block_shifts", 0, 1, 0),
    "cp": ("coded_planes", 0, 255, 0),
    "w": ("word", 0, (1 << 64) - 1, 0),
    "q": ("keep_mantissa_bits", 0, 52, 0),
    "sb": ("side_bytes", 0, 1 << 48, 0),
    "sc": ("side_check", 0, (1 << 64) - 1, 0),
}
TOGETHER = {  # predict: references, entropies, remainders
    RAW: ((0,), (0,), (0,)),
    CONSTANT: ((0,), (0,), (0,)),
    COPY: ((1, 2), (0,), (0,)),
    PALETTE: ((0,), (1, 2), (0,)),
    SPARSE: ((0, 1), (0,), (0,)),
    FULL: ((0,), (1, 2), (0, 1, 2)),
    DELTA: ((0, 1), (1, 2), (2,)),
    SCALED: ((1,), (1, 2), (2,)),
    CAST: ((2,), (0,), (0,)),
}


def read_plan(stored):
    """The Plan's fields by name, with `type` (the Dtype) and `plane_widths` (bits of each byte plane) added."""
    need(stored.keys() <= FIELDS.keys(), "a plan field of a newer format")
    plan = SimpleNamespace()
    for key, (name, least, greatest, default) in FIELDS.items():
        value = stored.get(key, default)
        need(type(value) is int and least <= value <= greatest, f"plan field {key!r}")
        setattr(plan, name, value)
    need(plan.dtype in DTYPES, "a dtype of a newer format")
    plan.type = DTYPES[plan.dtype]
    references, entropies, remainders = TOGETHER[plan.predict]
    need(plan.reference in references and plan.entropy in entropies and plan.remainder in remainders, "plan fields")
    need(plan.type.E or plan.predict not in (FULL, SCALED), "a prediction of floats for another dtype")
    need(plan.n_contexts * plan.n_symbols <= 1024, "too many contexts")
    need(plan.n_contexts == 1 or plan.entropy == RANS, "contexts without rans")
    need((plan.n_symbols > 0) == (plan.entropy != NO_ENTROPY), "symbols without entropy, or the reverse")
    need((plan.index_bits > 0) == (plan.entropy == INDEX), "an index without its width, or the reverse")
    need(plan.predict == FULL or (plan.n_columns > 0) == (plan.predict == SCALED), "scales without their prediction")
    need(plan.word >> plan.type.W == 0 and plan.side_bytes % 16 == 0, "plan field 'w' or 'sb'")
    plan.plane_widths = []
    if plan.remainder == PLANES:
        width = plan.type.M - plan.mantissa_bits + plan.has_sign - plan.shift
        plan.plane_widths = [min(8, width - low) for low in range(0, width, 8)]
    return plan


# Entropy


def steps(n_positions):
    """(lane, position) in the order of decoding: step after step, lane after lane."""
    for step in range(n_positions // 32):
        for lane in range(32):
            yield lane, 128 * (step // 4) + 4 * lane + step % 4


def read_tables(cursor, n_rows, n_symbols, prob_bits):
    """Frequency tables that share a bit string."""
    bits, tables = Bits(cursor), []
    for _ in range(n_rows):
        table = []
        for _ in range(n_symbols):
            v = bits.take(4)
            table.append((1 << (v - 1)) + bits.take(v - 1) if v else 0)
        need(sum(table) == 1 << prob_bits, "a frequency table does not sum up")
        tables.append(table)
    bits.end()
    return tables


def read_rans(cursor, n_words, tables, prob_bits, contexts, has_padding=True):
    """The symbols of a stream, one for each of contexts (a multiple of 128 positions)."""
    states = cursor.words(32, 32)
    if has_padding:
        cursor.padding(-2 * n_words % 16)
    words = iter(cursor.words(n_words, 16))
    owners = [[s for s, f in enumerate(table) for _ in range(f)] for table in tables]
    starts = [[sum(table[:s]) for s in range(len(table))] for table in tables]
    symbols = [0] * len(contexts)
    for lane, i in steps(len(contexts)):
        table, owner, start = (rows[contexts[i]] for rows in (tables, owners, starts))
        slot = states[lane] & ((1 << prob_bits) - 1)
        s = symbols[i] = owner[slot]
        state = table[s] * (states[lane] >> prob_bits) + slot - start[s]
        if state < 1 << 15:
            word = next(words, None)
            need(word is not None, "a rans stream is short of words")
            state = state << 16 | word
        states[lane] = state
    need(states == [1 << 15] * 32 and next(words, None) is None, "a rans stream does not end where it began")
    return symbols


def read_vertical(cursor, width, n_positions):
    """Values of `width` bits, packed vertically."""
    n_rows = -(-n_positions * width // 1024)
    words = cursor.words(32 * n_rows, 32)
    lanes = [sum(words[32 * j + lane] << 32 * j for j in range(n_rows)) for lane in range(32)]
    values = [0] * n_positions
    for lane, i in steps(n_positions):
        values[i] = lanes[lane] & ((1 << width) - 1)
        lanes[lane] >>= width
    need(not any(lanes), "packed values are not filled up with zeros")
    return values


# Side section


def read_vector(cursor, count, least, greatest):
    kind, width, step, low = struct.unpack("<BBHi", cursor.take(8))
    need((kind == 0 and width <= 17) or (kind == 1 and width <= 8), "kind or width of a vector")
    if kind == 0:
        bits = Bits(cursor)
        offsets = [bits.take(width) for _ in range(count)]
        bits.end()
    else:
        (n_words,) = cursor.words(1, 32)
        tables = read_tables(cursor, 1, 1 << width, 11)
        offsets = read_rans(cursor, n_words, tables, 11, [0] * roundup(count, 128), has_padding=False)[:count]
    values = [low + step * offset for offset in offsets]
    need(all(least <= value <= greatest for value in values), "a scale is out of range")
    return values


def read_side(cursor, plan):
    """What the side section holds, and the number of its bytes without padding."""
    side = SimpleNamespace(tables=[], planes={}, dictionary=[], palette=[], rows=None, columns=None)
    if plan.entropy == RANS:
        side.tables = read_tables(cursor, plan.n_contexts, plan.n_symbols, plan.prob_bits)
    coded = [j for j in range(8) if plan.coded_planes >> j & 1]
    need(all(j < len(plan.plane_widths) for j in coded), "a table for a plane that is not there")
    for j in coded:
        side.planes[j] = read_tables(cursor, 1, 1 << plan.plane_widths[j], plan.prob_bits)
    if plan.entropy == INDEX:
        n_entries = cursor.take(1)[0] + 1
        side.dictionary = list(cursor.take(n_entries))
        need(n_entries <= 1 << plan.index_bits, "a dictionary is too long for its indices")
        need(side.dictionary == sorted(set(side.dictionary)), "a dictionary is not ascending")
        need(side.dictionary[-1] < plan.n_symbols, "an entry of a dictionary that is no symbol")
    if plan.predict == PALETTE:
        side.palette = cursor.words(plan.n_symbols, plan.type.W)
        need(side.palette == sorted(set(side.palette)), "a palette is not ascending")
    if plan.n_columns:
        least, greatest = (-(1 << 14), (1 << 14) - 1) if plan.predict == FULL else (0, (1 << 16) - 1)
        side.rows = read_vector(cursor, -(-plan.n_words // plan.n_columns), least, greatest)
        if plan.has_column_scale:
            side.columns = read_vector(cursor, plan.n_columns, least, greatest)
    cursor.align()
    need(cursor.at == plan.side_bytes, "the side section has another size")
    return side


# Predictions


def cast(x, source, target):
    """The word of the number x of dtype source, rounded to nearest even in dtype target."""
    sign = x >> (source.W - 1) << (target.W - 1)
    field, mantissa = expo(x, source), x & ((1 << source.M) - 1)
    infinity = ((1 << target.E) - 1) << target.M
    if mag(x, source) == 0:
        return sign
    if field == (1 << source.E) - 1:
        if mantissa == 0:
            return sign | infinity
        mantissa = mantissa << target.M >> source.M
        return sign | infinity | mantissa | 1 << (target.M - 1)
    # The number is g << exponent; the result, Q << unit, where unit is that of the result's last place.
    g = mantissa + (1 << source.M if field else 0)
    exponent = max(field, 1) - ((1 << (source.E - 1)) - 1) - source.M
    bias = (1 << (target.E - 1)) - 1
    unit = max(exponent + g.bit_length() - 1, 1 - bias) - target.M
    drop = unit - exponent
    if drop <= 0:
        Q = g << -drop
    else:
        Q, rest = g >> drop, g & ((1 << drop) - 1)
        Q += 2 * rest + (Q & 1) > 1 << drop
    return sign | min(((unit + target.M + bias - 1) << target.M) + Q, infinity)


def scaled(z, r, c, factor, dtype):
    """The reference word z times the factors, as a word."""
    W, E, M, _ = dtype
    field, mantissa = expo(z, dtype), z & ((1 << M) - 1)
    sign = z >> (W - 1) << (W - 1)
    if field in (0, (1 << E) - 1):
        return z
    F = min((r * c * factor) >> 30, (1 << 32) - 1)
    g = (1 << M) + mantissa
    P, point = g * F, M + 30
    if W == 64:
        P, point = (g >> 24) * F + (((g & ((1 << 24) - 1)) * F) >> 24), M + 6
    if P == 0:
        return sign
    drop = P.bit_length() - 1 - M
    Q = (P + ((1 << drop) >> 1)) >> drop if drop >= 0 else P << -drop
    field += P.bit_length() - 1 - point
    if field < 1:
        return sign
    return sign | min(((field - 1) << M) + Q, (((1 << E) - 1) << M) - 1)


def predict(plan, side, reference, i):
    """What is known of word i before its symbol: L for full, the word y for the deltas."""
    row = column = 0
    if plan.n_columns:
        row, column = side.rows[i // plan.n_columns], 0 if plan.predict == FULL else 1 << 15
        if plan.has_column_scale:
            column = side.columns[i % plan.n_columns]
    if plan.predict == FULL:
        return row + column
    if plan.predict == SCALED:
        return scaled(reference[i], row, column, plan.factor, plan.type)
    return reference[i] if plan.predict == DELTA and reference is not None else 0


def context(plan, known):
    if plan.predict == FULL:
        return (known & 7) >> (3 - (plan.n_contexts.bit_length() - 1))
    if plan.predict in (DELTA, SCALED):
        place = (expo(known, plan.type) - plan.context_base) >> plan.context_shift
        return min(max(place, 0), plan.n_contexts - 1)
    return 0


def delta_code(plan, symbol):
    """(bitlen of a, k bits below its leading one, is negative) of a symbol; the last is 0 if the remainder tells."""
    code, is_negative = symbol + plan.base, 0
    if not plan.has_sign:
        code, is_negative = code >> 1, code & 1
    length = code >> plan.mantissa_bits
    need(1 <= length <= plan.type.W, "a symbol without meaning")
    return length, code & ((1 << plan.mantissa_bits) - 1), is_negative


def remainder_width(plan, symbol):
    if symbol == 0 or plan.predict == PALETTE:
        return 0
    if plan.predict == FULL:
        return plan.type.M - plan.mantissa_bits + plan.has_sign
    length, _, _ = delta_code(plan, symbol)
    return max(length - 1 - plan.mantissa_bits, 0) + plan.has_sign


def join(plan, side, known, symbol, remainder):
    """The word of a symbol and its remainder."""
    dtype, k = plan.type, plan.mantissa_bits
    if plan.predict == PALETTE:
        return side.palette[symbol]
    if plan.predict == FULL:
        if symbol == 0:
            return 0
        high = (symbol - 1 + plan.base + ((known >> 3) << k)) & ((1 << (dtype.E + k)) - 1)
        low = dtype.M - k
        return (remainder >> low) << (dtype.W - 1) | high << low | remainder & ((1 << low) - 1)
    d = 0
    if symbol:
        length, below, is_negative = delta_code(plan, symbol)
        r = max(length - 1 - k, 0)
        if plan.has_sign:
            is_negative = remainder >> r
        a = (((1 << k) + below) << r | remainder & ((1 << r) - 1)) >> max(k - (length - 1), 0)
        d = -a if is_negative else a
    return unord((ord_(known, dtype) + d) % (1 << dtype.W), dtype)


# Remainders


def read_planes(cursor, plan, side, row, n_positions):
    remainders = [0] * n_positions
    for j, width in enumerate(plan.plane_widths):
        mode, value = row[6 + j] >> 28, row[6 + j] & ((1 << 28) - 1)
        if mode == 0:
            plane = read_vertical(cursor, width, n_positions)
        elif mode == 1:
            need(value >> width == 0, "a constant byte plane is too wide")
            plane = [value] * n_positions
        else:
            need(mode == 2 and j in side.planes, "mode of a byte plane")
            plane = read_rans(cursor, value, side.planes[j], plan.prob_bits, [0] * n_positions)
        for i in range(n_positions):
            remainders[i] |= plane[i] << (8 * j + plan.shift)
    return remainders


def read_stack(cursor, plan, n_words, widths):
    """The remainders of a stack: one for each position, of the widths given."""
    n_bits = 16 if plan.type.W <= 16 else 32
    shifts = [0] * (len(widths) // 128)
    if plan.has_block_shifts:
        shifts = list(cursor.take(len(shifts)))
        need(all(shift < plan.type.W for shift in shifts), "a block shift exceeds the word")
        cursor.align()
    heads = cursor.words(32, n_bits)
    need(all(heads), "a head of a stack is 0")
    cursor.padding(-(n_bits // 8) * n_words % 16)
    words = iter(cursor.words(n_words, n_bits))
    held = [head.bit_length() - 1 for head in heads]
    holds = [head - (1 << n) for head, n in zip(heads, held, strict=True)]

    def pop(lane, width):
        if held[lane] < width:
            word = next(words, None)
            need(word is not None, "a stack is short of words")
            holds[lane] |= word << held[lane]
            held[lane] += n_bits
        value = holds[lane] & ((1 << width) - 1)
        holds[lane] >>= width
        held[lane] -= width
        return value

    remainders = [0] * len(widths)
    for step in range(len(widths) // 32):
        row, k = divmod(step, 4)
        lanes = [(lane, 128 * row + 4 * lane + k) for lane in range(32)]
        left = [max(widths[i] - shifts[row], 0) for _, i in lanes]
        for lane, i in lanes:
            remainders[i] = pop(lane, min(left[lane], 32)) << shifts[row]
        for lane, i in lanes:
            remainders[i] |= pop(lane, max(left[lane] - 32, 0)) << (shifts[row] + 32)
    need(not any(holds) and not any(held) and next(words, None) is None, "a stack does not end empty")
    return remainders


# Frame


def read_chunk(data, row, plan, side, reference, first, size):
    """The words first .. first + size - 1 of the frame, from the bytes of their chunk and its directory row."""
    cursor = Cursor(data)
    if row[3] == 1 << 31:
        words = cursor.words(size, plan.type.W)
        cursor.end()
        return words
    need(plan.predict != RAW, "a coded chunk in a raw frame")
    if plan.predict in (SPARSE, CAST):
        words = [plan.word] * size if reference is None else reference[first : first + size]
    else:
        n_positions = roundup(size, 128)
        n_padding = n_positions - size
        known = [predict(plan, side, reference, first + i) for i in range(size)]
        contexts = [context(plan, value) for value in known] + [0] * n_padding
        if plan.entropy == RANS:
            symbols = read_rans(cursor, row[4], side.tables, plan.prob_bits, contexts)
        else:
            indices = read_vertical(cursor, plan.index_bits, n_positions)
            need(max(indices) < len(side.dictionary), "an index past the dictionary")
            symbols = [side.dictionary[index] for index in indices]
        remainders = [0] * n_positions
        if plan.remainder == PLANES:
            remainders = read_planes(cursor, plan, side, row, n_positions)
        if plan.remainder == STACK:
            widths = [remainder_width(plan, symbol) for symbol in symbols[:size]] + [0] * n_padding
            remainders = read_stack(cursor, plan, row[5], widths)
        words = [join(plan, side, known[i], symbols[i], remainders[i]) for i in range(size)]
    positions = cursor.words(row[3], 16)
    need(positions == sorted(set(positions)) and all(i < size for i in positions), "positions of patches")
    for i, word in zip(positions, cursor.words(row[3], plan.type.W), strict=True):
        words[i] = word
    cursor.end()
    return words


def read_frame(data, stored_plan, reference=None, reference_dtype=None):
    """The words of a frame. reference: the words that its Plan refers to; reference_dtype: their dtype number."""
    plan = read_plan(stored_plan)
    need((reference is not None) == (plan.reference != NO_REFERENCE), "a reference is missing, or one too many")
    if reference is not None:
        need(len(reference) == plan.n_words, "the reference has another number of words")
        need(plan.predict == CAST or reference_dtype == plan.dtype, "the reference has another dtype")
    if plan.predict in (CONSTANT, COPY) or plan.n_words == 0:
        need(not data, "a frame that should be empty")
        return list(reference) if plan.predict == COPY else [plan.word] * plan.n_words
    if plan.predict == CAST:
        need((reference_dtype, plan.dtype) in CASTS, "a cast that format 1 does not know")
        reference = [cast(x, DTYPES[reference_dtype], plan.type) for x in reference]
    chunk_words = 1 << plan.chunk_log2
    n_chunks, n_columns = -(-plan.n_words // chunk_words), 6 + len(plan.plane_widths)
    need(plan.side_bytes + 4 * n_chunks * n_columns <= len(data), "the frame is cut")
    cursor = Cursor(data)
    side = read_side(cursor, plan)
    rows = [cursor.words(n_columns, 32) for _ in range(n_chunks)]
    cursor.align()
    need(checksum(data[: cursor.at]) == plan.side_check, "checksum of side section and directory")
    words = []
    for i, row in enumerate(rows):
        cursor.align()
        chunk = cursor.take(row[2])
        need(checksum(chunk) == row[1] << 32 | row[0], f"checksum of chunk {i}")
        size = min(chunk_words, plan.n_words - i * chunk_words)
        words += read_chunk(chunk, row, plan, side, reference, i * chunk_words, size)
    cursor.end()
    return words


# Digest


def mix32(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % (1 << 32)
    x = (x ^ x >> 13) * 0xC2B2AE35 % (1 << 32)
    return x ^ x >> 16


def mix64(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
    return x ^ x >> 31


def digest(words, dtype):
    data = b"".join(word.to_bytes(dtype.W // 8, "little") for word in words)
    total = len(data) * 0x9E3779B97F4A7C15
    columns = [(mix32(j + 1) | 1, mix32(j + 129) | 1) for j in range(128)]
    for first in range(0, len(data), 512):
        b, q = divmod(first // 512, 4096)
        low, high = mix32(q ^ 0x9E3779B9) | 1, mix32(q ^ 0x7F4A7C15) | 1
        row = data[first : first + 512].ljust(512, b"\0")
        part = 0
        for w, (low_j, high_j) in zip(struct.unpack("<128I", row), columns, strict=True):
            part += w * (low * low_j % (1 << 32) + (high * high_j % (1 << 32) << 32))
        total += part * (mix64(b) | 1)
    return mix64(total % (1 << 64))


# Tree


class Leaf(NamedTuple):
    path: str


class Named(NamedTuple):
    name: str
    fields: tuple
    values: tuple


class Registered(NamedTuple):
    name: str
    content: object


def unpack(data):
    def unique(pairs):
        need(len(dict(pairs)) == len(pairs), "a key twice in a map")
        return dict(pairs)

    return msgpack.unpackb(data, strict_map_key=False, object_pairs_hook=unique)


def read_table(stored):
    """(the object, its msgpack bytes) of a packed table."""
    if isinstance(stored, bytes):
        return unpack(stored), stored
    need(isinstance(stored, msgpack.ExtType) and stored.code == 37, "a packed table of another kind")
    (size,) = struct.unpack("<Q", stored.data[:8])
    stream = zlib.decompressobj()
    data = stream.decompress(stored.data[8:], size + 1)
    need(len(data) == size and stream.eof and not stream.unused_data, "a packed table has another size")
    return unpack(data), data


def read_tree(node, keys, paths):
    """The tree of a structure; the path of every leaf is added to paths, in order."""

    def below(key, child):
        return read_tree(child, [*keys, str(key).replace("~", "~0").replace("/", "~1")], paths)

    if isinstance(node, dict):
        need(all(type(key) in (str, int) for key in node), "a key that is neither str nor int")
        return {key: below(key, child) for key, child in node.items()}
    if isinstance(node, list):
        code = node[0].code if node and isinstance(node[0], msgpack.ExtType) else None
        if code not in (34, 35, 36):
            return [below(i, child) for i, child in enumerate(node)]
        need(node[0].data == b"", "a mark that is not empty")
        if code == 34:
            return tuple(below(i, child) for i, child in enumerate(node[1:]))
        if code == 36:
            _, name, content = node
            return Registered(name, read_tree(content, keys, paths))
        _, name, fields, *values = node
        return Named(name, tuple(fields), tuple(below(*item) for item in zip(fields, values, strict=True)))
    if isinstance(node, msgpack.ExtType):
        if node.code == 33:
            return int.from_bytes(node.data, "little", signed=True)
        need(node.code == 32 and node.data == b"", "an ext of a newer format")
        paths.append("/".join(keys))
        return Leaf(paths[-1])
    return node


# File


def check_start(data):
    need(data[:1] and 0x80 <= data[0] <= 0x8F and data[1:9] == b"\xa7tricomp", "no tricomp file")
    need(data[9:10] == b"\x01", "a newer format")


def take_bin(cursor, size):
    """The content of a bin of that size, which must have its shortest start."""
    n_bytes, first = (1, 0xC4) if size < 1 << 8 else (2, 0xC5) if size < 1 << 16 else (4, 0xC6)
    need(cursor.take(1 + n_bytes) == bytes([first]) + size.to_bytes(n_bytes, "big"), "start of a bin")
    return cursor.take(size)


def read_parts(data):
    """(header, index, content id) of a file, the checksums of all three proven."""
    check_start(data)
    tail = data[-74:]
    need(len(tail) == 74 and tail[:2] == b"\xc4\x48" and tail[66:] == b"\x89TRI\r\n\x1a\n", "no tail")
    header_size, header_check, index_at, index_size, index_check = struct.unpack_from("<5Q", tail, 2)
    need(checksum(tail[:58]) == int.from_bytes(tail[58:66], "little"), "checksum of the tail")
    need(header_size <= index_at and index_at + index_size + 74 == len(data), "the tail does not fit the file")
    header, index = data[:header_size], data[index_at : index_at + index_size]
    need(checksum(header) == header_check, "checksum of the header")
    need(checksum(index) == index_check, "checksum of the index")
    return unpack(header), unpack(index), header_size, index_at, tail[42:58]


def read_ids(data):
    """(content id, content id of the parent or None) of a file."""
    header, _, _, _, content_id = read_parts(data)
    return content_id, header["parent"]


def read_metadata(data):
    return read_tree(read_parts(data)[0]["metadata"], [], [])


def read_file(data, parent=None):
    """(tree, leaves) of a file. tree has a Leaf in the place of each array; leaves maps its path to (dtype number,
    shape, words). parent: the leaves of the file whose content id `read_ids` names."""
    header, index, header_size, index_at, content_id = read_parts(data)
    structure, structure_bytes = read_table(header["tree"])
    (numbers, shapes, places), leaves_bytes = read_table(header["leaves"])
    paths: list[str] = []
    tree = read_tree(structure, [], paths)
    need(len(set(paths)) == len(paths) == len(numbers) == len(places), "paths and leaves do not match")
    need(all(math.prod(max(n, 1) for n in shape) < 1 << 59 for shape in shapes), "a shape is too large")
    shapes = [tuple(shapes[place]) for place in places]

    whole = b"".join(struct.pack("<Q", len(part)) + part for part in (structure_bytes, leaves_bytes, index["digests"]))
    need(xxhash.xxh3_128_digest(whole) == content_id, "content id")
    digests = Cursor(index["digests"]).words(len(paths), 64)
    need(len(index["digests"]) == 8 * len(paths), "a digest a leaf")

    (differences, sizes, plans), _ = read_table(index["frames"])
    need(len(differences) == len(sizes) == len(plans) == len(index["checks"]) // 8, "frames do not match")
    checks = Cursor(index["checks"]).words(len(plans), 64)
    cursor, last, frames = Cursor(data[:index_at]), -1, []
    cursor.take(header_size)
    for steps_, sizes_, plan, check in zip(differences, sizes, plans, checks, strict=True):
        members = []
        for step in steps_:
            last += step
            members.append(last)
        content = b"".join(take_bin(cursor, size) for size in sizes_)
        need(members and sizes_ and checksum(content) == check, "checksum of a frame")
        frames.append((members, plan, content))
    cursor.end()
    need(sorted(leaf for members, _, _ in frames for leaf in members) == list(range(len(paths))), "a frame a leaf")

    words: dict[int, list[int]] = {}  # by number of the leaf
    for pass_is_sibling in (False, True):  # a sibling itself has none
        known = dict(words)
        for members, stored_plan, content in frames:
            plan = read_plan(stored_plan)
            if (plan.reference == SIBLING) != pass_is_sibling:
                continue
            counts = [count_words(numbers[leaf], shapes[leaf]) for leaf in members]
            need(all(numbers[leaf] == plan.dtype for leaf in members) and sum(counts) == plan.n_words, "its leaves")
            need(len(members) == 1 or plan.n_words <= 65536, "too many words for a frame of several leaves")
            reference = reference_dtype = None
            if plan.reference == PARENT:
                need(parent is not None and header["parent"] is not None, "the parent is missing")
                held = [parent[paths[leaf]] for leaf in members]
                same = all(found[:2] == (numbers[leaf], shapes[leaf]) for leaf, found in zip(members, held))
                need(same, "a leaf of the parent has another dtype or shape")
                reference, reference_dtype = [word for _, _, part in held for word in part], plan.dtype
            if plan.reference == SIBLING:
                need(plan.sibling in known, "a sibling that is not there, or has one itself")
                reference, reference_dtype = known[plan.sibling], numbers[plan.sibling]
            decoded = read_frame(content, stored_plan, reference, reference_dtype)
            for leaf, count in zip(members, counts):
                words[leaf], decoded = decoded[:count], decoded[count:]
                need(digest(words[leaf], DTYPES[plan.dtype]) == digests[leaf], f"digest of leaf {paths[leaf]!r}")
    return tree, {path: (numbers[i], shapes[i], words[i]) for i, path in enumerate(paths)}


# Blob


def read_blob(data, reference=None):
    """(dtype number, shape, words) of a blob. reference: the same three of the array it was encoded against."""
    check_start(data)
    need(data[-9] == 0xCF and checksum(data[:-9]) == int.from_bytes(data[-8:], "big"), "checksum of the blob")
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    header = unpacker.unpack()
    need(unpacker.tell() <= 1 << 16, "the header of a blob is too long")
    cursor = Cursor(data[:-9])
    cursor.take(unpacker.tell())
    content = b""
    while not content or cursor.at < len(cursor.data):
        n_bytes = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(data[cursor.at], 0)
        size = int.from_bytes(data[cursor.at + 1 : cursor.at + 1 + n_bytes], "big")
        content += take_bin(cursor, size)
        if not size:
            break
    cursor.end()
    number, shape, plan = header["dtype"], tuple(header["shape"]), header["plan"]
    need(plan["d"] == number and plan["n"] == count_words(number, shape), "plan and header of a blob")
    words = None
    if plan.get("r", 0) == PARENT:
        need(reference is not None and reference[:2] == (number, shape), "the reference")
        need(digest(reference[2], DTYPES[number]) == header["parent"], "digest of the reference")
        words = reference[2]
    decoded = read_frame(content, plan, words, number)
    need(digest(decoded, DTYPES[number]) == header["digest"], "digest of the blob")
    return number, shape, decoded
