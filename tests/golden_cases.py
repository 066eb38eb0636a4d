"""Data of the golden files, from integers alone, so that no library's random numbers matter; and what makes the files.

`python -m tests.golden_cases` writes tests/golden/ anew. After a format version is released its files never change.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import tricomp
from tricomp import dtypes
from tricomp.dtypes import DType
from tricomp.job import EncodeJob, Scales, Side, Tables
from tricomp.plan import Plan
from tricomp.reference import encode as encoder
from tricomp.reference.bits import ordered, trailing_zeros, unordered
from tricomp.reference.entropy import normalise
from tricomp.reference.predict import basis, split

FOLDER = Path(__file__).parent / "golden"
Array = np.ndarray[Any, Any]
N_WORDS = 2200


def noise(n: int, seed: int) -> Array:
    """uint64[n]: SplitMix64 of a counter."""
    x = np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def words(dtype: DType, n: int, seed: int) -> Array:
    """Floats whose exponents fall off geometrically from a row's and a column's; integers of all lengths; zeros."""
    bits = noise(n, seed)
    fall = trailing_zeros(noise(n, seed + 1)).astype(np.int64)
    if dtype.name == "bool":
        return (fall > 1).astype(np.uint8)
    if not dtype.is_float:
        return (bits >> np.minimum(fall * 3, 63).astype(np.uint64)).astype(dtype.word_dtype)
    place = np.arange(n)
    top = (1 << dtype.exponent_bits) * 3 // 4
    field = np.clip(top - fall + place // 200 % 5 + place % 200 % 3, 1, (1 << dtype.exponent_bits) - 2)
    mantissa = bits & np.uint64((1 << dtype.mantissa_bits) - 1)
    sign = (noise(n, seed + 2) & np.uint64(1)) << np.uint64(dtype.word_bits - 1)
    word = sign | field.astype(np.uint64) << np.uint64(dtype.mantissa_bits) | mantissa
    word[place % 37 == 0] = 0
    return word.astype(dtype.word_dtype)


def moved(old: Array, dtype: DType, seed: int) -> Array:
    """The words after a small change: differences of all lengths, a third none."""
    if dtype.name == "bool":
        return old ^ (noise(len(old), seed) % np.uint64(9) == 0).astype(np.uint8)
    bits = noise(len(old), seed)
    length = np.minimum(trailing_zeros(noise(len(old), seed + 1)) * 2, dtype.word_bits - 3).astype(np.uint64)
    size = (bits & ((np.uint64(1) << length) - np.uint64(1))).astype(old.dtype)
    is_down = (noise(len(old), seed + 2) & np.uint64(1)).astype(old.dtype)
    change = np.where(is_down == 1, ~size + old.dtype.type(1), size)
    return np.where(bits % np.uint64(3) == 0, old, unordered(ordered(old, dtype) + change, dtype))


def tree(step: int) -> dict[str, Any]:
    """A checkpoint with a leaf of every dtype, others for the predictions, and plain values. step: 0 or 1."""
    leaves: dict[str, Any] = {}
    for name in dtypes.NAMES:
        dtype = dtypes.by_name(name)
        word = words(dtype, N_WORDS, 3 * dtype.number)
        leaves[name] = moved(word, dtype, 99).view(dtype.numpy) if step else word.view(dtype.numpy)
    f32, bf16 = dtypes.by_name("float32"), dtypes.by_name("bfloat16")
    master = words(f32, 20_000, 500)
    positive = words(f32, 24_000, 600) & np.uint32(0x7FFFFFFF)
    if step:
        master, positive = moved(master, f32, 501), moved(positive, f32, 601) & np.uint32(0x7FFFFFFF)
    half = (master + np.uint32(0x7FFF) + (master >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)).astype(np.uint16)
    low = words(f32, 20_480, 700).reshape(64, 320)
    low[::2] &= np.uint32(0xFFFF0000)
    sparse = np.zeros(20_000, np.int64)
    sparse[:: 997 - step] = 5 + step
    return {
        "leaves": leaves,
        "master": master.view(f32.numpy).reshape(100, 200),
        "half": half.view(bf16.numpy).reshape(100, 200),
        "again": master.view(f32.numpy).reshape(100, 200),
        "second": positive.view(f32.numpy).reshape(120, 200),
        "low": low.view(f32.numpy),
        "sparse": sparse,
        "random": noise(17_000, 800 + step).astype(np.uint16),
        "still": noise(17_000, 900).astype(np.uint16),
        "few": (noise(20_000, 1000) % np.uint64(5)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(1.5 + step),
        "plain": [step, 2**70, -1.5, None, True, "text", b"bytes", (1, ()), {7: "seven", "a/b~": 0}],
    }


def jobs() -> Iterator[tuple[str, EncodeJob]]:
    """Frames of plans by hand: every prediction, entropy, remainder and place of the sign at many widths."""
    rows = Scales(np.arange(900, 911, dtype=np.int16), np.arange(200, dtype=np.int16) % 5)
    ratios = Scales(np.full(11, 31_000, np.uint16), np.full(200, 33_000, np.uint16))
    for name in ("float64", "float32", "bfloat16", "float8_e5m2", "int8", "int16", "uint32", "int64"):
        dtype = dtypes.by_name(name)
        old = words(dtype, N_WORDS, dtype.number)
        new = moved(old, dtype, dtype.number + 50)
        blank = Plan(dtype, N_WORDS, "delta", chunk_log2=10, n_symbols=32, entropy="rans", remainder="stack")
        plans: list[tuple[Plan, Scales, Array | None]] = []
        plans += [(replace(blank, mantissa_bits=k, has_sign=k % 2 == 0), Scales(), None) for k in range(3)]
        with_parent = replace(blank, reference="parent")
        plans.append((replace(with_parent, n_contexts=4, context_base=2, context_shift=1), Scales(), old))
        plans.append((replace(with_parent, has_block_shifts=True, mantissa_bits=1), Scales(), old))
        plans.append((replace(with_parent, entropy="index", index_bits=3), Scales(), old))
        if dtype.is_float:
            scaled = replace(with_parent, predict="scaled_delta", n_columns=200, factor=(1 << 30) - 77)
            plans.append((replace(scaled, has_column_scale=True, has_sign=False), ratios, old))
            plans.append((scaled, Scales(ratios.rows, None), old))
            full = replace(blank, predict="full", mantissa_bits=min(dtype.mantissa_bits, 2))
            plans.append(
                (replace(full, remainder="planes", n_columns=200, has_column_scale=True, n_contexts=4), rows, None)
            )
            plans.append((replace(full, remainder="planes", coded_planes=1), Scales(), None))
            plans.append((replace(full, has_sign=False, has_block_shifts=True), Scales(), None))
            plans.append((replace(full, entropy="index", index_bits=4, remainder="planes"), Scales(), None))
        for i, (plan, scales, reference) in enumerate(plans):
            yield f"{name} {i}: {plan.describe()}", filled(plan, scales, new, reference)


def filled(plan: Plan, scales: Scales, new: Array, reference: Array | None) -> EncodeJob:
    """Fill in a window around the middle, and tables from the data, less one symbol."""
    known = basis(plan, reference, scales, 0, len(new))
    if plan.predict == "full":
        field = new >> plan.dtype.mantissa_bits & new.dtype.type((1 << plan.dtype.exponent_bits) - 1)
        level = 0 if known.level is None else int(np.sort(known.level >> 3)[len(new) // 2])
        base = (int(np.sort(field)[len(new) // 2]) - level << plan.mantissa_bits) - 16
    else:
        wide = split(replace(plan, n_symbols=256), new, known, new[:0])
        base = max(int(np.sort(wide.symbols)[len(new) // 2]) - 16, 0)
    plan = replace(plan, base=base)
    parts = split(plan, new, known, new[:0])
    planes: dict[int, Tables] = {}
    if plan.coded_planes:
        planes[0] = Tables(normalise(np.ones(1 << plan.plane_widths[0], np.int64), 11)[None], 11)
    if plan.entropy == "index":
        common = np.argsort(-np.bincount(parts.symbols, minlength=plan.n_symbols), kind="stable")
        dictionary = np.sort(common[: (1 << plan.index_bits) - 1]).astype(np.uint8)
        return EncodeJob(plan, Side(None, planes, dictionary, scales=scales), new, reference)
    context = np.zeros(len(new), np.int64) if parts.contexts is None else parts.contexts
    counts = np.zeros((plan.n_contexts, plan.n_symbols), np.int64)
    np.add.at(counts, (context, parts.symbols), 1)
    counts[:, 7] = 0
    tables = Tables(np.stack([normalise(row, 11) for row in counts]), 11)
    return EncodeJob(plan, Side(tables, planes, scales=scales), new, reference)


def frame_checks() -> dict[str, str]:
    """xxh3-128 of every frame of `jobs`."""
    names, frames = zip(*jobs())
    return {name: xxhash.xxh3_128_hexdigest(coded.data) for name, coded in zip(names, encoder.encode(frames))}


def main() -> int:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    tricomp.save(str(FOLDER / "format1-keyframe.tri"), tree(0), metadata={"made": "by golden_cases"})
    tricomp.save(str(FOLDER / "format1-delta.tri"), tree(1), reference=str(FOLDER / "format1-keyframe.tri"))
    fast = tricomp.Spec(tier="fast", chunk_log2=12)
    tricomp.save(
        str(FOLDER / "format1-fast.tri"), {"master": tree(0)["master"], "second": tree(0)["second"]}, spec=fast
    )
    (FOLDER / "format1-frames.json").write_text(json.dumps(frame_checks(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
