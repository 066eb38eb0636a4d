"""Parts of the native backend on their own, for every instruction set that this machine has: checksum, digest sums,
comparison, and the side section in both directions, sound and damaged."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from tricomp import codec, dtypes, native
from tricomp.errors import CorruptFrame
from tricomp.job import EncodeJob, Scales, Side, Tables
from tricomp.plan import Plan
from tricomp.reference import side as reference_side
from tricomp.reference.digest import BLOCK_BYTES, digest_sum
from tricomp.reference.entropy import normalise

pytestmark = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
if native.is_there():
    from tricomp.native.digest import checksums
    from tricomp.native.encode import _request
    from tricomp.native.side import _FAULTS, read_side, side_bytes

M64 = (1 << 64) - 1


@pytest.fixture(scope="module", params=["avx512", "avx2", "portable"])
def core(request, tmp_path_factory):
    """The extension module with one instruction set: it chooses when it is loaded, and each copy of it is another."""
    path = tmp_path_factory.mktemp(request.param) / "_core.abi3.so"
    shutil.copy(native.load().__file__, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRICOMP_ISA", request.param)
        spec = importlib.util.spec_from_file_location("_core", path)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.isa() == request.param
        except ImportError as error:
            pytest.skip(str(error))
    return module


def octets(n, seed=1):
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def test_checksum_of_every_length(core):
    data = octets(1 << 20)
    for n in (*range(4097), 65_535, 65_536, 65_537, (1 << 20) - 3):
        for first in (0, 3):
            part = data[first : first + n]
            assert core.xxh3_64(part) == xxhash.xxh3_64_intdigest(part.tobytes()), (first, n)
    assert core.xxh3_64(b"") == xxhash.xxh3_64_intdigest(b"")


@pytest.mark.parametrize("fill", [None, 0, 255])
def test_digest_sums_of_parts(core, fill):
    data = octets(BLOCK_BYTES + 70_001) if fill is None else np.full(BLOCK_BYTES + 70_001, fill, np.uint8)
    for n in (0, 1, 2, 3, 4, 5, 511, 512, 513, 4099, 70_001, BLOCK_BYTES, len(data)):
        # Far into a leaf, a part is what a whole one has there where all else is zero.
        for first in (0, 512, BLOCK_BYTES - 512, 3 * BLOCK_BYTES, (1 << 45) + 5 * 512, (1 << 48) - 512):
            assert core.digest_sums([(data[:n], first)], 2) == [digest_sum(data[:n], first)], (n, first)
    cuts = [0, 512, 4096, 70 * 512, BLOCK_BYTES - 1024, BLOCK_BYTES + 512, len(data)]
    parts = [(data[begin:end], begin) for begin, end in itertools.pairwise(cuts)]
    assert sum(core.digest_sums(parts[::-1], 3)) & M64 == digest_sum(data)


def test_equality_of_every_length(core):
    data = octets(9000)
    for n in (0, 1, 7, 8, 9, 4095, 4096, 4097, 8192, 9000):
        other = data[:n].copy()
        assert core.is_equal(data[:n], other)
        for i in {0, n // 2, n - 1} if n else ():
            other[i] ^= 128
            assert not core.is_equal(data[:n], other)
            other[i] ^= 128
    assert not core.is_equal(data[:8], data[:9])


def frequencies(rng, n_tables, n_symbols, prob_bits):
    rows = []
    for _ in range(n_tables):
        counts = rng.integers(0, [2, 3, 5000][rng.integers(3)], n_symbols)
        counts[1 << prob_bits :] = 0
        rows.append(normalise(counts, prob_bits))
    return Tables(np.stack(rows), prob_bits)


def vector(rng, n, low, high):
    """Values in [low, high): few or many, near or far from each other, on a step or not."""
    spread, step = [0, 1, 3, 30, 300, 20_000][rng.integers(6)], [1, 1, 8, 129][rng.integers(4)]
    values = rng.integers(low, high) + step * np.round(rng.normal(0, 1, n) * spread).astype(np.int64)
    if rng.integers(4) == 0:
        values[rng.random(n) < 0.01] = low
    return np.clip(values, low, high - 1)


def random_job(rng, kind):
    """A plan and what its side section says; the words are zeros."""
    dtype = dtypes.by_name(str(rng.choice(["float64", "float32", "bfloat16", "float8_e4m3fn"])))
    n = int(rng.choice([1, 130, 3000, 70_000]))
    entropy = str(rng.choice(["rans", "index"]))
    plan = Plan(dtype, n, kind, entropy=entropy, n_symbols=int(rng.integers(1, 129)))
    plan = replace(plan, chunk_log2=int(rng.integers(10, 17)), prob_bits=int(rng.integers(8, 12)))
    if kind == "full":
        plan = replace(plan, remainder=str(rng.choice(["planes", "stack"])), mantissa_bits=int(rng.integers(0, 3)))
        plan = replace(plan, coded_planes=int(rng.integers(0, 1 << len(plan.plane_widths))))
    elif kind == "scaled_delta":
        plan = replace(plan, remainder="stack", reference="parent")
    if kind == "scaled_delta" or (kind == "full" and rng.integers(3)):
        n_columns = int(min(rng.choice([1, 2, 50, n]), n))
        plan = replace(plan, n_columns=n_columns, has_column_scale=bool(rng.integers(2)))
    tables, dictionary, palette, scales = None, np.zeros(0, np.uint8), np.zeros(0, np.uint8), Scales()
    if entropy == "rans":
        plan = replace(plan, n_contexts=int(rng.choice([1, 2, 8])) if plan.is_scaled else 1)
        tables = frequencies(rng, plan.n_contexts, plan.n_symbols, plan.prob_bits)
    else:
        plan = replace(plan, index_bits=int(rng.integers(1, 9)))
        n_entries = int(rng.integers(1, min(1 << plan.index_bits, plan.n_symbols) + 1))
        dictionary = np.sort(rng.permutation(plan.n_symbols)[:n_entries]).astype(np.uint8)
    if kind == "palette":
        palette = np.sort(rng.permutation(256)[: plan.n_symbols]).astype(dtype.word_dtype)
    if plan.is_scaled:
        low, high, of = (0, 1 << 16, np.uint16) if kind == "scaled_delta" else (-(1 << 14), 1 << 14, np.int16)
        rows = vector(rng, plan.n_rows, low, high).astype(of)
        scales = Scales(rows, vector(rng, plan.n_columns, low, high).astype(of) if plan.has_column_scale else None)
    planes = {
        plane: frequencies(rng, 1, 1 << width, plan.prob_bits)
        for plane, width in enumerate(plan.plane_widths)
        if plan.coded_planes >> plane & 1
    }
    words, side = np.zeros(n, dtype.word_dtype), Side(tables, planes, dictionary, palette, scales)
    return EncodeJob(plan, side, words, words if kind == "scaled_delta" else None)


def written(core, job):
    """The side section that the module writes for a job; no chunk is encoded."""
    request = (*_request(job), 0, 0, False)
    ((_, _, _, side, _),) = core.encode([request], np.empty(core.room_for([request]), np.uint8), 1)
    return side


def fault_of(core, job, section):
    """What the module says of a side section; an empty directory follows, and no words are asked for."""
    plan = replace(job.plan, side_bytes=len(section))
    head = bytes(section) + bytes(-(-plan.n_chunks * 4 * (6 + len(plan.plane_widths)) // 16) * 16)
    numbers = _request(replace(job, plan=replace(plan, side_check=xxhash.xxh3_64_intdigest(head))))[0]
    nothing = np.zeros(0, job.words.dtype)
    found = core.decode([(numbers, head, head, 0, len(head), nothing, nothing, 0, 0, False, False)], 1)
    if isinstance(found, list):
        return ""
    assert found[0] == 2, found
    return _FAULTS[found[1]]


def expected_fault(plan, section):
    try:
        reference_side.read(plan, bytes(section))
    except CorruptFrame as fault:
        return str(fault)
    return ""


def damaged(rng, section):
    """A side section with a few bytes of it changed, cut, put in or taken out."""
    found = bytearray(section)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(found) + 1)) if rng.integers(2) else int(rng.integers(min(len(found), 24) + 1))
        choice = rng.integers(5)
        if choice == 0:
            del found[at:]
        elif choice == 1:
            found[at : at + int(rng.integers(3))] = octets(int(rng.integers(3)), int(rng.integers(1 << 30))).tobytes()
        elif choice == 2:
            found += bytes(int(rng.integers(20)))
        elif at < len(found):
            found[at] = found[at] ^ 1 << rng.integers(8) if choice == 3 else int(rng.choice([0, 1, 8, 9, 17, 255]))
    return bytes(found)


@pytest.mark.parametrize("kind", ["palette", "full", "scaled_delta"])
def test_side_sections_sound_and_damaged(core, kind):
    rng = np.random.default_rng(len(kind))
    for _ in range(25):
        job = random_job(rng, kind)
        section = reference_side.write(job.plan, job.side)
        assert written(core, job) == section, job.plan
        assert fault_of(core, job, section) == ""
        for _ in range(12):
            other = damaged(rng, section)
            assert fault_of(core, job, other) == expected_fault(job.plan, other), (job.plan, other.hex())


def arrays_of(side):
    """All that a side holds, in bytes."""
    tables = [side.tables] if side.tables else []
    tables += [side.plane_tables[plane] for plane in sorted(side.plane_tables)]
    scales = [side.scales.rows] if side.scales.columns is None else [side.scales.rows, side.scales.columns]
    arrays = [*(one.freqs for one in tables), side.dictionary, side.palette, *scales]
    kinds = [array.dtype for array in arrays if len(array)]
    return [array.tolist() for array in arrays], kinds, [one.prob_bits for one in tables], sorted(side.plane_tables)


@pytest.mark.parametrize("kind", ["palette", "full", "scaled_delta"])
def test_side_sections_on_their_own(core, kind, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: core)
    rng = np.random.default_rng(len(kind))
    for _ in range(25):
        job = random_job(rng, kind)
        plan = replace(job.plan, reference="none" if job.reference is None else "parent")
        section = reference_side.write(plan, job.side)
        assert side_bytes(plan, job.side) == section
        assert arrays_of(read_side(plan, section)) == arrays_of(reference_side.read(plan, section))
        assert arrays_of(read_side(plan, memoryview(section))) == arrays_of(job.side)
        for _ in range(12):
            other = damaged(rng, section)
            text = expected_fault(plan, other)
            if text:
                with pytest.raises(CorruptFrame, match=f"^frame of 'a/b': {text}.$"):
                    read_side(plan, other, "a/b")
            else:
                assert arrays_of(read_side(plan, other)) == arrays_of(reference_side.read(plan, other))
    for name in ("bool", "float32", "uint64"):
        plan = Plan(dtypes.by_name(name), 1000, "sparse", reference="parent", word=1)
        assert side_bytes(plan, Side()) == b""
        assert arrays_of(read_side(plan, b"")) == arrays_of(Side())
        with pytest.raises(CorruptFrame, match=r"'array': its side section is too long."):
            read_side(plan, bytes(16))
    with pytest.raises(ValueError, match="contradicts itself"):
        side_bytes(replace(plan, n_columns=3), Side())
    with pytest.raises(ValueError, match="frequencies of another number"):
        side_bytes(replace(job.plan, reference="parent", entropy="rans", index_bits=0), Side())


def test_checksums_of_parts(core, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: core)
    rng = np.random.default_rng(3)
    data = octets(3_000_001)
    for n_parts, most, threads in ((0, 1, 2), (1, 3_000_000, 2), (300, 40_000, 3), (5000, 17, 2), (33, 255, 1)):
        begins = rng.integers(0, len(data) - most, n_parts)
        sizes = rng.integers(0, most + 1, n_parts)
        expected = [xxhash.xxh3_64_intdigest(data[at : at + n].tobytes()) for at, n in zip(begins, sizes)]
        found = checksums(data, begins, sizes, threads)
        assert found.dtype == np.uint64
        assert found.tolist() == expected
        assert checksums(memoryview(data), begins.tolist(), sizes.astype(np.uint32)[::1], threads).tolist() == expected
    ends = [0, 7], [len(data), len(data) - 7]
    assert checksums(data, *ends).tolist() == [xxhash.xxh3_64_intdigest(data[at:].tobytes()) for at in ends[0]]
    for wrong in (([0], [len(data) + 1]), ([len(data) + 1], [0]), ([5], [len(data) - 4]), ([1 << 63], [1 << 63])):
        with pytest.raises(ValueError, match="outside the buffer"):
            checksums(data, *wrong)
    with pytest.raises(ValueError, match="outside the buffer"):
        checksums(data, np.array([-1]), np.array([2]))
    with pytest.raises(ValueError, match="numbers of parts that differ"):
        checksums(data, [1, 2], [1])


def test_vectors_are_coded_where_the_reference_does(core):
    """Both kinds of vector, one value only, every width, 2^20 values and more."""
    rng = np.random.default_rng(5)
    f32 = dtypes.by_name("float32")
    kinds = set()
    for n, spread in ((1, 0), (300, 1), (5000, 0), (5000, 1), (5000, 40), (5000, 255), (5000, 256), (5000, 16_000)):
        values = np.round(np.clip(rng.normal(0, 1, n) * spread / 4, -spread // 2, spread // 2)).astype(np.int16)
        job = vector_job(f32, values)
        section = written(core, job)
        assert section == reference_side.write(job.plan, job.side), (n, spread)
        assert fault_of(core, job, section) == ""
        kinds.add(section[2])
    assert kinds == {0, 1}


@pytest.mark.parametrize(("n", "kind"), [(1 << 20, 1), ((1 << 20) + 1, 0)])
def test_long_vectors(core, n, kind):
    job = vector_job(dtypes.by_name("float32"), np.random.default_rng(n).normal(0, 5, n).astype(np.int16))
    section = written(core, job)
    assert section[2] == kind
    assert section == reference_side.write(job.plan, job.side)
    assert fault_of(core, job, section) == ""


def vector_job(dtype, values):
    """A frame with as many rows as there are values. Its side section begins with two bytes of dictionary."""
    plan = Plan(dtype, len(values), "full", entropy="index", n_symbols=1, index_bits=1, remainder="stack", n_columns=1)
    side = Side(dictionary=np.zeros(1, np.uint8), scales=Scales(values))
    return EncodeJob(plan, side, np.zeros(len(values), dtype.word_dtype))


def test_states_that_no_encoder_leaves(core):
    """The reference takes any state that leads to the right end; so must every instruction set."""
    states = [1 << 15] * 32
    for _ in range(16):
        states = [state // 1024 << 11 | state % 1024 | 1024 for state in states]
    assert min(states) >= 1 << 31
    table = reference_side._write_freqs(np.array([1024, 1024]))
    head = bytes([1, 1]) + (1).to_bytes(2, "little") + bytes(4) + bytes(4)
    section = bytes(2) + head + table + np.array(states, "<u4").tobytes()
    job = vector_job(dtypes.by_name("float32"), np.ones(512, np.int16))
    section += bytes(-len(section) % 16)
    assert expected_fault(job.plan, section) == fault_of(core, job, section) == ""
    damaged = bytearray(section)
    damaged[50] ^= 4
    assert expected_fault(job.plan, damaged) == fault_of(core, job, damaged) != ""


def test_the_module_refuses_sides_of_wrong_sizes(core):
    rng = np.random.default_rng(1)
    jobs = [random_job(rng, kind) for kind in ("palette", "full", "scaled_delta") for _ in range(8)]
    for job in jobs:
        side = job.side
        broken = []
        if side.tables is not None:
            broken.append(replace(side, tables=None))
            broken.append(replace(side, tables=Tables(side.tables.freqs + 1, side.tables.prob_bits)))
        if len(side.dictionary):
            broken.append(replace(side, dictionary=side.dictionary[:0]))
            broken.append(replace(side, dictionary=side.dictionary + np.uint8(job.plan.n_symbols)))
        if job.plan.predict == "palette":
            broken.append(replace(side, palette=side.palette[1:]))
        if job.plan.is_scaled:
            broken.append(replace(side, scales=Scales(side.scales.rows[1:], side.scales.columns)))
        if side.plane_tables:
            broken.append(replace(side, plane_tables={}))
        for other in broken:
            with pytest.raises(ValueError, match="frequencies|dictionary|palette|scales"):
                written(core, replace(job, side=other))


def test_sealed_bytes(core):
    data = np.random.default_rng(0).integers(0, 256, 5 << 20, np.uint8).tobytes()
    for sizes in ((), (0,), (7, 0, 9), (240,), (1, 240), (1023, 1, 1024), (100_000, 1, 200_000), (3 << 20, 5, 2 << 20)):
        ends = np.cumsum([0, *sizes])
        parts = [data[start:end] for start, end in itertools.pairwise(ends)]
        expected = b"".join(parts) + b"\xcf" + xxhash.xxh3_64_digest(b"".join(parts))
        assert codec.Engine(backend="reference").seal(parts) == expected, sizes
        for threads in (1, 3):
            assert core.seal(parts, threads) == expected, (sizes, threads)
