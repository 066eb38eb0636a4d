"""What tests of kernels share: the device they run on, words on it, and frames of every kind. Imports numpy, torch,
pytest and tricomp.

The hard thing: Triton decides when it is imported whether it compiles or interprets, and whatever imports torch may
import it. So where there is no GPU these tests skip, unless the process began with TRITON_INTERPRET=1; test_kernels.py
begins such processes. The interpreter's cost is by operation, however many words that covers: so frames are short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests import golden_cases  # noqa: E402
from tests.cases import decayed, moments, of_dtype, special_words, stepped, weights  # noqa: E402
from tests.damage_cases import CASTS  # noqa: E402
from tricomp import dtypes  # noqa: E402
from tricomp.dtypes import DType  # noqa: E402
from tricomp.job import EncodeJob, Scales, Side, Tables  # noqa: E402
from tricomp.kernels.device import IS_INTERPRETED, Device, current_device  # noqa: E402
from tricomp.kernels.frame import RAW_FLAG  # noqa: E402
from tricomp.plan import Plan, Spec  # noqa: E402
from tricomp.reference.bits import cast  # noqa: E402
from tricomp.reference.encode import encode  # noqa: E402
from tricomp.reference.entropy import normalise  # noqa: E402
from tricomp.reference.frame import directory  # noqa: E402
from tricomp.reference.planner import plan_frame  # noqa: E402

if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: test_kernels.py has these interpreted", allow_module_level=True)

Array = np.ndarray[Any, Any]
DEVICE = Device(current_device())
_CARRIERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GUARD = 64  # bytes around words


def on_device(words: Array | None, shift: int = 0) -> Any:
    """Words as a tensor, so many words past a multiple of 16 bytes; None for None."""
    if words is None:
        return None
    room = torch.empty(words.nbytes + 16 + 8 * 8, dtype=torch.uint8, device=DEVICE.handle)
    first = -room.data_ptr() % 16 + shift * words.itemsize
    tensor = room[first : first + words.nbytes].view(_CARRIERS[words.itemsize])
    return tensor.copy_(torch.from_numpy(np.ascontiguousarray(words).view(f"i{words.itemsize}")))


class Poisoned:
    """A tensor to decode to, in the midst of a larger one, so many words past a multiple of 16 bytes."""

    def __init__(self, dtype: np.dtype[Any], n_words: int, shift: int = 0) -> None:
        n_bytes = n_words * dtype.itemsize
        self._room = torch.full((n_bytes + 2 * _GUARD + 16 + 8 * 8,), 0xA5, dtype=torch.uint8, device=DEVICE.handle)
        self._first = -self._room.data_ptr() % 16 + _GUARD + shift * dtype.itemsize
        self._last = self._first + n_bytes
        self.tensor = self._room[self._first : self._last].view(_CARRIERS[dtype.itemsize])

    def octets(self) -> bytes:
        """What it holds; the poison around must be there still."""
        room = self._room.cpu().numpy()
        assert (room[: self._first] == 0xA5).all()
        assert (room[self._last :] == 0xA5).all()
        return room[self._first : self._last].tobytes()


def jobs_of_every_kind() -> list[EncodeJob]:
    """Frames of plans by hand, one for each way through a kernel, of as few rows of 128 as pay for a coder.

    Each has some patches, and a last row that is not full.
    """
    found = []
    for name in ("float64", "float32", "bfloat16", "float8_e5m2", "int8", "uint16", "int32", "uint64"):
        dtype = dtypes.by_name(name)
        old = golden_cases.words(dtype, 980, dtype.number)
        for plan, scales in _plans(dtype):
            new = golden_cases.moved(old, dtype, dtype.number + 50)
            before = old
            if plan.has_block_shifts:
                is_low = np.arange(980) // 128 % 2 == 1
                mask = dtype.word_dtype.type((1 << dtype.word_bits) - 4)
                new, before = (np.where(is_low, words & mask, words) for words in (new, old))
            if plan.predict == "delta" and plan.reference == "none":
                new = new - old  # small numbers of both signs
            if plan.predict == "full" and plan.remainder == "stack" and plan.entropy == "index":
                new = np.where(np.arange(980) % 3 == 0, 0, new).astype(new.dtype)  # which leave nothing on a stack
            if not plan.has_sign and plan.predict == "full":
                new = new & dtype.word_dtype.type((1 << dtype.word_bits - 1) - 1)
            found.append(_shortest(plan, scales, new, before if plan.reference == "parent" else None))
    return found


def _plans(dtype: DType) -> Iterator[tuple[Plan, Scales]]:
    """Plans whose windows and tables are yet to be filled in."""
    blank = Plan(dtype, 0, "delta", chunk_log2=10, n_symbols=64, entropy="rans", remainder="stack")
    delta = replace(blank, reference="parent")
    top = (1 << dtype.exponent_bits) * 3 // 4 if dtype.is_float else 5  # of exponents, see golden_cases.words
    contexts: dict[str, Any] = {"n_contexts": 4, "context_base": top - 3}
    yield replace(delta, mantissa_bits=1, has_sign=False), Scales()
    yield replace(delta, **contexts, context_shift=0 if dtype.is_float else 1), Scales()
    yield replace(delta, has_block_shifts=True), Scales()
    yield replace(delta, entropy="index", index_bits=4), Scales()
    if not dtype.is_float:
        yield replace(blank, mantissa_bits=2), Scales()
        return
    rows, ratios = Scales(np.arange(900, 905, dtype=np.int16)), Scales(np.full(5, 31_000, np.uint16))
    columns = {"columns": np.arange(200, dtype=np.int16) % 5}
    scaled = replace(delta, predict="scaled_delta", n_columns=200, factor=(1 << 30) - 77)
    yield replace(scaled, **contexts), ratios
    yield replace(scaled, has_column_scale=True, has_block_shifts=True), Scales(ratios.rows, np.full(200, 33_000, "u2"))
    full = replace(blank, predict="full", remainder="planes")
    yield full, Scales()
    yield (
        replace(full, mantissa_bits=1, n_columns=200, has_column_scale=True, n_contexts=4),
        Scales(rows.rows, **columns),
    )
    yield replace(full, n_columns=200, n_contexts=8, remainder="stack"), rows
    yield replace(full, has_sign=False, has_block_shifts=True, remainder="stack"), Scales()
    yield replace(full, entropy="index", index_bits=4), Scales()
    yield replace(full, entropy="index", index_bits=3, remainder="stack"), Scales()


def _shortest(plan: Plan, scales: Scales, new: Array, old: Array | None) -> EncodeJob:
    """The job of the first words that are not raw when they are coded."""
    for n_words in (231, 360, 615, 980):
        cut = Scales(scales.rows[: -(-n_words // 200)], scales.columns) if plan.is_scaled else Scales()
        reference = None if old is None else old[:n_words]
        job = golden_cases.filled(replace(plan, n_words=n_words), cut, new[:n_words], reference)
        if not is_raw(job).any():
            break
    return job


def is_raw(job: EncodeJob) -> Array:
    """Whether each chunk of a frame is raw when it is coded."""
    coded = encode([job])[0]
    return directory(coded.plan, coded.data)[:, 3] == RAW_FLAG


def planned_jobs() -> Iterator[EncodeJob]:
    """What the planner makes of training state: a full chunk and a tail each."""
    dense, fast = Spec(chunk_log2=10), Spec(tier="fast", chunk_log2=10)
    w, v = weights((10, 120)), moments((10, 120), zero_share=0.2)
    low = weights((9, 128))
    low.view(np.uint32)[::2] &= np.uint32(0xFFFF0000)
    few = np.random.default_rng(0).choice([0.0, 1.5, -2.25], (10, 120))
    half, next_half = of_dtype("bfloat16", (10, 120), 3), of_dtype("bfloat16", (10, 120), 4)
    cases: list[tuple[Array, Array | None, Spec]] = [(w, None, dense), (w, None, fast), (stepped(w), w, dense)]
    cases += [(stepped(w), w, fast), (v, None, dense), (decayed(v), v, dense), (few, None, dense), (few, None, fast)]
    cases += [(low, None, dense), (np.where(np.arange(1100) % 61 == 0, 3, 0), None, dense)]
    cases += [(half, None, dense), (half, None, fast), (next_half, half, dense), (half.astype(np.float16), None, dense)]
    for name in ("float64", "float8_e4m3fn", "int16", "uint8"):
        cases.append((of_dtype(name, (10, 120), 4), of_dtype(name, (10, 120), 3), dense))
    for new, old, spec in cases:
        known = None if old is None else dtypes.to_words(old)
        yield plan_frame(dtypes.to_words(new), known, dtypes.of(new), new.shape, spec)


def odd_jobs() -> Iterator[EncodeJob]:
    """Sizes around rows and chunks, of special words and of words that fall off."""
    for name in ("float32", "bfloat16", "int64"):
        dtype = dtypes.by_name(name)
        for n_words in (1, 31, 33, 127, 128, 129, 1023, 1024, 1025) if name == "float32" else (32, 1000, 1025):
            old = golden_cases.words(dtype, n_words, 5)
            new = golden_cases.moved(old, dtype, 6)
            special = special_words(dtype)
            new[: len(special)] = special[:n_words]
            has_reference = n_words % 2 == 1 and name != "bfloat16"
            yield plan_frame(new, old if has_reference else None, dtype, (n_words,), Spec(chunk_log2=10))


def plain_jobs() -> Iterator[EncodeJob]:
    """Predictions that need no coder: raw, constant, copy, sparse, and casts of every pair."""
    side = Side()
    for name in ("uint8", "bfloat16", "float32", "int64"):
        dtype = dtypes.by_name(name)
        words = golden_cases.words(dtype, 2100, 11)
        zeros = np.zeros_like(words)
        zeros[::77] = words[::77] | dtype.word_dtype.type(1)
        plan = Plan(dtype, 2100, "raw", chunk_log2=10)
        changed = words ^ zeros
        changed[1030:1500] ^= dtype.word_dtype.type(5)  # a chunk that is raw for its many patches
        yield EncodeJob(plan, side, words)
        yield EncodeJob(replace(plan, predict="sparse"), side, zeros)
        yield EncodeJob(replace(plan, predict="sparse", word=9), side, zeros)
        yield EncodeJob(replace(plan, predict="sparse", reference="parent"), side, changed, words)
        yield EncodeJob(replace(plan, predict="constant", word=9), side, zeros * 0 + 9)
        yield EncodeJob(replace(plan, predict="copy", reference="parent"), side, words, words)
    yield EncodeJob(Plan(dtypes.by_name("float32"), 0, "raw"), side, np.zeros(0, np.uint32))
    for source_name, name in CASTS:
        source, dtype = dtypes.by_name(source_name), dtypes.by_name(name)
        wide = np.concatenate([special_words(source), golden_cases.words(source, 1085, 9)])
        narrow = cast(wide, source, dtype)
        narrow[::300] ^= narrow.dtype.type(1)
        plan = Plan(dtype, len(wide), "cast", chunk_log2=10, reference="sibling")
        yield EncodeJob(plan, side, narrow, wide, source)


def long_row_job() -> EncodeJob:
    """A split with a row that 32 bits cannot count, of which only the first words are there."""
    dtype = dtypes.by_name("float32")
    plan = Plan(dtype, 600, "full", chunk_log2=10, n_symbols=64, entropy="rans", remainder="stack", n_contexts=8)
    plan = replace(plan, n_columns=(1 << 31) + 3)
    return golden_cases.filled(plan, Scales(np.full(1, 901, np.int16)), golden_cases.words(dtype, 600, 4), None)


def plane_jobs() -> Iterator[EncodeJob]:
    """Byte planes of every width: coded, constant and packed ones in one frame."""
    dtype = dtypes.by_name("float32")
    for shift in range(8):
        words = golden_cases.words(dtype, 1024 + 256 if shift == 2 else 380, shift)
        words &= np.uint32(0xFFFFFFFF << shift & 0xFFFFFFFF)
        words[:1024] &= ~np.uint32(0xF00000 | 0xFF00 >> shift)  # worth coding; and all one bit or few
        plan = Plan(dtype, len(words), "full", chunk_log2=10, entropy="rans", n_symbols=64, remainder="planes")
        plan = replace(plan, shift=shift, base=150)
        tables = Tables(normalise(np.arange(1, 65), 11)[None], 11)
        skewed = {
            plane: Tables(normalise(np.where(np.arange(1 << width) % 16 == 0, 50, 1), 11)[None], 11)
            for plane, width in enumerate(plan.plane_widths)
        }
        plan = replace(plan, coded_planes=(1 << len(skewed)) - 1)
        yield EncodeJob(plan, Side(tables, skewed), words)
