"""FORMAT.md is enough: a decoder written from that page alone reads what the package writes, bit for bit.

Files, blobs and frames come from the package; words are compared as integers with the arrays' own bits. The hard
thing: a planner never picks some plans, so frames of those are made here, with data that their plan compresses."""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict, namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests import plain_reader
from tests.cases import decayed, moments, of_dtype, special_words, stepped, weights
from tests.plain_reader import Leaf, Named, Refused, Registered
from tricomp import dtypes
from tricomp.job import EncodeJob, Scales, Side, Tables
from tricomp.plan import Plan, Spec
from tricomp.reference import encode as encoder
from tricomp.reference.bits import cast, ordered, unordered
from tricomp.reference.entropy import normalise
from tricomp.reference.predict import basis, split

FORMAT = (Path(tricomp.__file__).parent / "FORMAT.md").read_text()
SPECS = {"dense": Spec(chunk_log2=10), "fast": Spec(tier="fast", chunk_log2=10)}


def expected(array):
    """What the plain reader should say of an array: dtype number, shape, words."""
    return dtypes.of(array, "").number, array.shape, dtypes.to_words(array).tolist()


def read(path, parent=None):
    return plain_reader.read_file(path.read_bytes(), parent)


def plans_of(path, reference=None):
    with tricomp.open(path, reference) as file:
        return {leaf: file.plan(leaf) for leaf in file}


def check_file(path, arrays, reference=None, spec=None):
    """Save arrays by path, read them plainly, compare. Returns their plans and the leaves read."""
    tricomp.save(path, arrays, reference, spec)
    parent = None if reference is None else {name: expected(array) for name, array in reference.items()}
    _, leaves = read(path, parent)
    assert leaves == {name: expected(array) for name, array in arrays.items()}
    return plans_of(path, reference), leaves


def test_the_documents_own_examples():
    rows = re.findall(r"^\| (\d+) \| `([0-9a-f ]+)` \|", FORMAT.split("### A file, byte by byte")[1], re.M)
    data = b"".join(bytes.fromhex(row) for _, row in rows)
    assert len(data) == 217
    assert plain_reader.read_file(data) == ({"step": 3, "lr": 0.5}, {})
    assert plain_reader.read_metadata(data) == {"run": "a"}
    text = FORMAT.split("## A frame, byte by byte")[1]
    data = b"".join(bytes.fromhex(row) for row in re.findall(r"^ *\d+: ([0-9a-f ]+)$", text, re.M))
    plan = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", text.split("`")[1])}
    assert plain_reader.read_frame(data, plan) == [200 if i == 77 else 7 if i % 4 else 9 for i in range(130)]


def arrays_by_prediction():
    """What the planner should pick, with the arrays by path that make it, and their parents; the last path counts."""
    rng = np.random.default_rng(0)
    base, second = weights((40, 60)), moments((40, 60))
    sparse = base.copy()
    sparse[3, ::9] += 1
    half = weights((70, 80)).astype(ml_dtypes.bfloat16)
    half[::7, 5] += 1
    yield "raw", {"a": rng.integers(0, 1 << 32, 1200, np.uint32)}, None
    yield "constant", {"a": np.full(1500, -0.0)}, None
    yield "constant", {"a": np.full(530_001, 7.5, np.float32)}, None  # two blocks of the digest
    yield "copy", {"a": base}, {"a": base}
    yield "copy", {"a": weights((70, 80)), "b": weights((70, 80))}, None
    yield (
        "palette",
        {"a": rng.choice(np.array([0, 1.5, -2.25, np.nan], np.float16), 3000, p=[0.5, 0.3, 0.1, 0.1])},
        None,
    )
    yield "sparse", {"a": sparse}, {"a": base}
    yield "sparse", {"a": np.where(np.arange(4000) % 999, np.int64(-1), np.arange(4000))}, None
    yield "full", {"a": base}, None
    yield "delta", {"a": stepped(base)}, {"a": base}
    yield "delta", {"a": np.arange(3000) % 1000 * (np.arange(3000) % 3)}, None
    yield "scaled_delta", {"a": decayed(second)}, {"a": second}
    yield "cast", {"a": weights((70, 80)), "b": half}, None


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize(("predict", "arrays", "parents"), list(arrays_by_prediction()))
def test_every_prediction(tmp_path, predict, arrays, parents, tier):
    plans, _ = check_file(tmp_path / "a.tri", arrays, parents, SPECS[tier])
    assert plans[list(arrays)[-1]].predict == predict


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype(tmp_path, name, tier):
    """With special words, without elements and without dimensions; without and with a reference; as file and blob."""
    old = {"large": of_dtype(name, (21, 70), 1), "empty": of_dtype(name, (3, 0), 1), "scalar": of_dtype(name, (), 1)}
    new = {path: array.copy() for path, array in old.items()}
    words = dtypes.to_words(new["large"])
    words[::3] ^= words.dtype.type(1)
    check_file(tmp_path / "old.tri", old, None, SPECS[tier])
    check_file(tmp_path / "new.tri", new, old, SPECS[tier])
    for path, array in new.items():
        assert plain_reader.read_blob(tricomp.encode(array, spec=SPECS[tier])) == expected(array)
        blob = tricomp.encode(array, old[path], spec=SPECS[tier])
        assert plain_reader.read_blob(blob, expected(old[path])) == expected(array)


@pytest.mark.parametrize("tier", SPECS)
@pytest.mark.parametrize(("shape", "make"), [((64, 100), moments), ((4000,), weights), ((500, 7), moments)])
def test_full_with_and_without_scales(tmp_path, tier, shape, make):
    array = make(shape)
    array.reshape(-1)[::31] = 0
    plans, _ = check_file(tmp_path / "a.tri", {"a": array}, None, Spec(tier=tier, chunk_log2=11))
    assert plans["a"].predict == "full"


def test_rows_of_lower_precision(tmp_path):
    array = weights((300, 256))
    array.view(np.uint32)[::2] &= np.uint32(0xFFFF0000)
    plans, _ = check_file(tmp_path / "a.tri", {"a": array})
    assert plans["a"].has_block_shifts


def test_groups_of_small_leaves(tmp_path):
    arrays = {f"layers.{i}": moments((50 + i,), i) for i in range(30)}
    arrays |= {f"counts.{i}": np.arange(i, dtype=np.int64) for i in range(8)}
    old = {path: array * array.dtype.type(2) for path, array in arrays.items()}
    for name, reference in (("alone.tri", None), ("delta.tri", old)):
        check_file(tmp_path / name, arrays, reference)
        header, index, *_ = plain_reader.read_parts((tmp_path / name).read_bytes())
        assert header["tricomp"] == 1
        assert len(plain_reader.read_table(index["frames"])[0][0]) < len(arrays) / 2


@pytest.mark.parametrize("tier", SPECS)
def test_a_chain_of_three_files(tmp_path, tier):
    states: list[dict[str, Any]] = [{"w": weights((30, 80)), "v": moments((30, 80)), "step": np.int64(0)}]
    for step in (1, 2):
        last = states[-1]
        states.append({"w": stepped(last["w"], step), "v": decayed(last["v"], step), "step": np.int64(step)})
    with tricomp.Store(tmp_path, spec=SPECS[tier]) as store:
        for step, state in enumerate(states):
            store.save(step, state)
    leaves = before = None
    for step, state in enumerate(states):
        data = (tmp_path / f"step-{step:012}.tri").read_bytes()
        content_id, parent = plain_reader.read_ids(data)
        assert parent == before
        assert content_id.hex() == tricomp.content_id(state)
        if parent is not None:
            with pytest.raises(Refused, match="parent"):
                plain_reader.read_file(data)
        _, leaves = plain_reader.read_file(data, leaves)
        assert leaves == {path: expected(np.asarray(array)) for path, array in state.items()}
        before = content_id


Point = namedtuple("Point", "x y")


def test_every_kind_of_node(tmp_path):
    a, b = np.arange(5, dtype=np.int8), weights((7,))
    tree = {
        "plain": [None, True, False, "text é", b"bytes", 1.5, -0.0, 0, -(1 << 63), (1 << 64) - 1, 1 << 64, -(1 << 90)],
        7: {"in/side~": a, -1: (b, (), [])},
        "point": Point(a, {"deep": [b]}),
        "ordered": OrderedDict(z=b, y=OrderedDict()),
        "": a,
    }
    path = tmp_path / "a.tri"
    tricomp.save(path, tree, metadata={"note": (1, [2.5, None])})
    read_tree, leaves = read(path)
    assert read_tree == {
        "plain": tree["plain"],
        7: {"in/side~": Leaf("7/in~1side~0"), -1: (Leaf("7/-1/0"), (), [])},
        "point": Named("Point", ("x", "y"), (Leaf("point/x"), {"deep": [Leaf("point/y/deep/0")]})),
        "ordered": Registered("OrderedDict", {"z": Leaf("ordered/z"), "y": Registered("OrderedDict", {})}),
        "": Leaf(""),
    }
    assert list(read_tree) == list(tree)
    assert math.copysign(1, read_tree["plain"][6]) == -1
    arrays = {"7/in~1side~0": a, "7/-1/0": b, "point/x": a, "point/y/deep/0": b, "ordered/z": b, "": a}
    assert leaves == {name: expected(array) for name, array in arrays.items()}
    assert plain_reader.read_metadata(path.read_bytes()) == {"note": (1, [2.5, None])}
    tricomp.save(path, {f"layers.{i}.norm.weight": None for i in range(200)})  # tables large enough to be deflated
    assert len(read(path)[0]) == 200
    tricomp.save(path, a)
    assert read(path) == (Leaf(""), {"": expected(a)})


def test_damage_is_refused(tmp_path):
    """One flipped bit anywhere in a file."""
    path = tmp_path / "a.tri"
    arrays, parents = {"w": stepped(weights((9, 30))), "c": np.arange(40)}, {"w": weights((9, 30))}
    tricomp.save(path, arrays, parents)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 23):
        data[at] ^= 1 << at % 8
        with pytest.raises(Exception):  # noqa: B017, PT011 - of msgpack too
            plain_reader.read_file(bytes(data), {"w": expected(parents["w"])})
        data[at] ^= 1 << at % 8
    assert plain_reader.read_file(bytes(data), {"w": expected(parents["w"])})[1]["c"] == expected(arrays["c"])


# Frames of plans that the planner seldom picks

N_WORDS, N_COLUMNS = 5000, 250


def near_words(dtype, seed=0):
    """Words in a narrow window of exponents or numbers, every second row of 128 of lower precision, zeros, specials."""
    rng = np.random.default_rng(seed)
    step = rng.geometric(0.6, N_WORDS).astype(np.uint64)
    if dtype.is_float:
        low = rng.integers(0, 1 << dtype.mantissa_bits, N_WORDS, np.uint64)
        low[np.arange(N_WORDS) // 128 % 2 == 1] &= np.uint64((1 << 64) - (1 << dtype.mantissa_bits // 2))
        middle = np.uint64((1 << dtype.exponent_bits - 1) - 1)
        words = (middle - np.minimum(step, middle)) << np.uint64(dtype.mantissa_bits) | low
    else:
        words = step * (step & np.uint64(1)) * np.uint64(1 if dtype.word_bits == 8 else 37)
    words[rng.random(N_WORDS) < 0.2] = 0
    words = words.astype(dtype.word_dtype)
    special = special_words(dtype)
    words[rng.permutation(N_WORDS)[: len(special)]] = special
    return words


def moved_words(old, dtype, seed=1):
    """Words a little above or below the old ones in order, or the same."""
    rng = np.random.default_rng(seed)
    spread = rng.geometric(0.5, N_WORDS) << rng.integers(0, 2 if dtype.word_bits == 8 else 7, N_WORDS)
    spread *= rng.choice([-1, 0, 1], N_WORDS, p=[0.3, 0.4, 0.3])
    return unordered(ordered(old, dtype) + spread.astype(dtype.word_dtype), dtype)


def plans_by_hand():
    """(plan, scales, new, old)."""
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"):
        dtype = dtypes.by_name(name)
        words = near_words(dtype)
        flat = Plan(dtype, N_WORDS, "full", chunk_log2=12, entropy="rans", remainder="planes")
        levels = np.random.default_rng(2).integers(-9, 9, N_WORDS // N_COLUMNS + 1).astype(np.int16)
        rows, columns = Scales(levels[:-1]), Scales(levels[:-1], np.arange(N_COLUMNS, dtype=np.int16) // 9)
        for k in range(0, min(4, dtype.mantissa_bits) + 1, 1 if dtype.word_bits <= 16 else 2):
            plan = replace(flat, mantissa_bits=k)
            yield plan, Scales(), words, None
            yield replace(plan, entropy="index", remainder="stack"), Scales(), words, None
            yield replace(plan, has_sign=False, remainder="stack", has_block_shifts=True), Scales(), words, None
            many = Scales(np.minimum(np.random.default_rng(k).geometric(0.6, -(-N_WORDS // 3)), 40).astype(np.int16))
            yield replace(plan, n_columns=3, n_contexts=8), many, words, None  # a vector that rANS codes
            yield replace(plan, n_columns=N_COLUMNS, n_contexts=2 << k % 3, prob_bits=8 + k % 4), rows, words, None
            plan = replace(plan, n_columns=N_COLUMNS, has_column_scale=True, entropy="index", has_sign=False)
            yield plan, columns, words, None
    for name in dtypes.NAMES:
        dtype = dtypes.by_name(name)
        old = near_words(dtype, 3)
        new = moved_words(old, dtype)
        scales = Scales(np.full(20, 32_800, np.uint16), np.arange(32_600, 32_850, dtype=np.uint16))
        for k in (0, 1, 4) if dtype.is_float else (0, 2):
            plan = Plan(dtype, N_WORDS, "delta", chunk_log2=12, entropy="rans", remainder="stack", mantissa_bits=k)
            yield replace(plan, entropy="index"), Scales(), old, None
            plan = replace(plan, reference="parent")
            yield replace(plan, has_sign=False, entropy="index" if k else "rans"), Scales(), new, old
            contexts: dict[str, Any] = {"n_contexts": 5, "context_base": 2, "context_shift": k // 2, "prob_bits": 9}
            yield replace(plan, has_block_shifts=True, **contexts), Scales(), new, old
            if dtype.is_float:
                plan = replace(plan, predict="scaled_delta", n_columns=N_COLUMNS)
                yield replace(plan, has_column_scale=True, factor=(1 << 30) - 7), scales, new, old
                yield replace(plan, has_sign=False, n_contexts=3, factor=1_080_000_000), Scales(scales.rows), new, old


def complete(plan, scales, words, old):
    """The plan with a window, the side section, from counts of the data itself; some symbols stay unknown."""
    plan = replace(plan, n_symbols=16)
    known = basis(plan, old, scales, 0, N_WORDS)
    if plan.predict == "full":
        dtype = plan.dtype
        high = (words.astype(np.uint64) << np.uint64(64 - dtype.word_bits + 1) >> np.uint64(1)).astype(np.int64)
        high >>= 63 - dtype.word_bits + 1 + dtype.mantissa_bits - plan.mantissa_bits
        if known.level is not None:
            high -= (known.level >> 3).astype(np.int64) << plan.mantissa_bits
        plan = replace(plan, n_symbols=40, base=int(np.median(high[words != 0])) - 30)
    parts = split(plan, words, known, words[:0])
    if plan.entropy == "index":
        common = [symbol for symbol, _ in Counter(parts.symbols.tolist()).most_common(13)]
        return replace(plan, index_bits=4), Side(None, {}, np.array(sorted(common), np.uint8), scales=scales)
    counts = np.zeros((plan.n_contexts, plan.n_symbols), np.int64)
    np.add.at(counts, (np.zeros(N_WORDS, int) if parts.contexts is None else parts.contexts, parts.symbols), 1)
    counts[:, 3] = 0
    tables = Tables(np.stack([normalise(row, plan.prob_bits) for row in counts]), plan.prob_bits)
    planes = {}
    for j, width in enumerate(plan.plane_widths):
        if j != 1 or len(plan.plane_widths) == 2:
            octets = (parts.remainders >> 8 * j).astype(np.uint8) & ((1 << width) - 1)
            counts = np.bincount(octets, minlength=1 << width) + (plan.prob_bits > 8)
            planes[j] = Tables(normalise(counts, plan.prob_bits)[None], plan.prob_bits)
    return replace(plan, coded_planes=sum(1 << j for j in planes)), Side(tables, planes, scales=scales)


def test_plans_by_hand():
    """Most chunks must be coded, not raw, or this would show nothing."""
    seen: Counter[str] = Counter()
    for plan, scales, new, old in plans_by_hand():
        if plan.remainder == "planes" and not plan.plane_widths:
            plan = replace(plan, remainder="none")
        plan, side = complete(plan, scales, new, old)
        encoded = encoder.encode([EncodeJob(plan, side, new, old)])[0]
        plan, data = encoded.plan, encoded.data
        words = plain_reader.read_frame(data, plan.to_wire(), None if old is None else old.tolist(), plan.dtype.number)
        assert words == new.tolist(), plan
        first = int.from_bytes(data[plan.side_bytes + 12 : plan.side_bytes + 16], "little")
        seen["raw" if first == 1 << 31 else "coded"] += 1
        seen["patched"] += 0 < first < 1 << 31
    assert seen["coded"] > 150
    assert seen["patched"] > 100


@pytest.mark.parametrize(("source", "target"), sorted(plain_reader.CASTS))
def test_casts(source, target):
    """Ties, subnormals, overflow, NaNs with payloads, and patches; the float words of every magnitude."""
    source, target = dtypes.by_number(source, ""), dtypes.by_number(target, "")
    rng = np.random.default_rng(source.number)
    old = rng.integers(0, 1 << source.word_bits, 3000, np.uint64).astype(source.word_dtype)
    with np.errstate(over="ignore"):
        numbers = (rng.normal(size=3000) * 10.0 ** rng.integers(-9, 6, 3000)).astype(source.numpy)
    tied = numbers.view(source.word_dtype) >> source.mantissa_bits // 3 << source.mantissa_bits // 3
    old = np.concatenate([old, tied, special_words(source), numbers.view(source.word_dtype)])
    new = cast(old, source, target)
    new[::71] ^= 1
    plan = Plan(target, len(new), "cast", reference="sibling")
    encoded = encoder.encode([EncodeJob(plan, Side(), new, old, source)])[0]
    plan, data = encoded.plan, encoded.data
    assert len(data) < new.nbytes / 4
    assert plain_reader.read_frame(data, plan.to_wire(), old.tolist(), source.number) == new.tolist()
