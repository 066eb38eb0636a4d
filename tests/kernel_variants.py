"""The kernel variants that matter: what launches make of the plans that real state gets. Imports tricomp's ground.

A variant is a kernel with its constants. These come from a Plan by way of `kernels.frame.kind_of`, as a launch takes
them, and never by hand. The hard thing is which ones: all dtypes times all that a plan may say are thousands, so each
way of predicting, coding and packing is here for the dtypes that training state has, and once for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

from tricomp import dtypes
from tricomp.kernels.frame import Kind, flow_of, kind_of
from tricomp.kernels.tiles import FEW, MANY, MANY_OF_MORE, SOME, constants_of
from tricomp.plan import Plan

C = 8  # chunks a program, and warps that code them, as kernels.device has them
WARPS = 4
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """A plan that frames get. stream: the ratio benchmark's, whose size the bound takes; hot: its speed matters."""

    name: str
    plan: Plan
    source: str = ""
    is_hot: bool = False
    stream: str = ""

    @property
    def kind(self) -> Kind:
        source = dtypes.by_name(self.source) if self.source else None
        return kind_of(self.plan, self.plan.reference != "none", source)


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants. case: the plan's, if it codes words; argument types as Triton writes them.

    even: arguments that are multiples of 16, beside pointers.
    """

    name: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    is_hot: bool = False
    case: Case | None = None
    warps: int = WARPS
    even: tuple[str, ...] = ()

    def constants_on(self, target: str) -> dict[str, int]:
        """The constants of a launch there: some kernels are told whose card it is."""
        known = dict(self.constants)
        return known | {"IS_NVIDIA": int(target.startswith("sm"))} if "IS_NVIDIA" in known else known

    def function(self) -> Any:
        """The kernel; imports triton."""
        return getattr(import_module(f"tricomp.kernels.{self.module}"), self.kernel)


def _plan(dtype: str, predict: str, **fields: Any) -> Plan:
    return Plan(dtypes.by_name(dtype), 1 << 24, predict, **fields)


def _full(dtype: str, **fields: Any) -> Plan:
    return _plan(dtype, "full", **{"entropy": "rans", "n_symbols": 64, "remainder": "planes", **fields})


def _delta(dtype: str, **fields: Any) -> Plan:
    common = {"entropy": "rans", "n_symbols": 48, "remainder": "stack", "reference": "parent"}
    return _plan(dtype, "delta", **{**common, **fields})


def _scaled_delta(dtype: str, **fields: Any) -> Plan:
    return replace(_delta(dtype, n_columns=4096, **fields), predict="scaled_delta")


_SCALES = {"n_columns": 4096, "has_column_scale": True}
_INDEX = {"entropy": "index", "n_contexts": 1}


def _hot() -> Iterator[Case]:
    """What nearly all bytes of a checkpoint are: weights and moments in bfloat16 and float32."""
    for name, k in (("bfloat16", 1), ("float32", 2)):
        w = f"w {name}"
        yield Case(f"{name} full", _full(name), stream=w)
        yield Case(f"{name} full, scales", _full(name, n_contexts=4, mantissa_bits=2, **_SCALES), stream=w)
        yield Case(f"{name} delta", _delta(name, n_contexts=8, mantissa_bits=1), stream=f"{w}, 10 apart")
        yield Case(f"{name} full, index 4", _full(name, **_INDEX, index_bits=4), stream=w)
        yield Case(f"{name} delta, index 4", _delta(name, **_INDEX, index_bits=4), stream=f"{w}, 10 apart")
        yield Case(f"{name} scaled delta", _scaled_delta(name, mantissa_bits=k, has_sign=False), stream="v, 10 apart")
    yield Case("float32 full, 8 phases", _full("float32", n_contexts=8, has_sign=False, **_SCALES), stream="v")


def _others() -> Iterator[Case]:
    for name in ("float16", "float64", "float8_e4m3fn"):
        k = min(2, dtypes.by_name(name).mantissa_bits)
        yield Case(f"{name} full", _full(name, mantissa_bits=k))
        yield Case(f"{name} full, scales", _full(name, mantissa_bits=k, n_contexts=4, **_SCALES))
        yield Case(f"{name} full, index 4", _full(name, **_INDEX, mantissa_bits=k, index_bits=4))
        yield Case(f"{name} delta", _delta(name, n_contexts=8))
        yield Case(f"{name} delta, index 4", _delta(name, **_INDEX, index_bits=4))
    for name in ("float16", "float64"):
        yield Case(f"{name} scaled delta", _scaled_delta(name, n_contexts=4, has_column_scale=True))
    for name in ("int8", "int16", "int32", "int64", "uint32"):
        yield Case(f"{name} delta", _delta(name))
        yield Case(f"{name} delta from 0", _delta(name, reference="none", has_sign=False))
    for name in ("bfloat16", "float32"):
        yield Case(f"{name} full, rows", _full(name, n_columns=4096, n_contexts=4, mantissa_bits=2))
        yield Case(f"{name} full, stack", _full(name, remainder="stack"))
        yield Case(f"{name} full, block shifts", _full(name, remainder="stack", has_block_shifts=True, mantissa_bits=2))
        yield Case(f"{name} delta, block shifts", _delta(name, has_block_shifts=True, n_contexts=8))
        yield Case(f"{name} delta, one context", _delta(name))
        yield Case(f"{name} delta, index 2", _delta(name, **_INDEX, index_bits=2))
        yield Case(f"{name} scaled delta, columns", _scaled_delta(name, n_contexts=8, has_column_scale=True))
        yield Case(f"{name} scaled delta, index 4", _scaled_delta(name, **_INDEX, index_bits=4))
    for bits in (2, 3, 7):
        yield Case(f"bfloat16 full, index {bits}", _full("bfloat16", **_INDEX, index_bits=bits))
    yield Case("float32 full, 2 planes", _full("float32", shift=8))
    no_remainder = {"mantissa_bits": 3, "has_sign": False, "remainder": "none"}
    yield Case("float8_e4m3fn full, all in the symbol", _full("float8_e4m3fn", **no_remainder))
    for name in ("int8", "int64", "bfloat16"):
        yield Case(f"{name} palette", _plan(name, "palette", entropy="rans", n_symbols=40))
        yield Case(f"{name} palette, index 3", _plan(name, "palette", entropy="index", index_bits=3, n_symbols=8))
    for name in ("int8", "bfloat16", "float32", "float64"):
        yield Case(f"{name} sparse", _plan(name, "sparse", word=7))
        yield Case(f"{name} sparse against the parent", _plan(name, "sparse", reference="parent"))
    for source, name in (
        ("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32"), ("float64", "float16"),
        ("float64", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32"),
    ):  # fmt: skip
        yield Case(f"{name} cast from {source}", _plan(name, "cast", reference="sibling"), source=source)


def cases() -> Iterator[Case]:
    """All plans, hot ones first."""
    yield from (replace(case, is_hot=True) for case in _hot())
    yield from _others()


def _variant(
    name: str,
    module: str,
    kernel: str,
    types: tuple[tuple[str, str], ...],
    constants: dict[str, int],
    is_hot: bool = False,
    case: Case | None = None,
) -> Variant:
    signature = (*types, *((constant, "constexpr") for constant in constants))
    return Variant(name, module, kernel, signature, tuple(constants.items()), is_hot, case)


def _encoders() -> Iterator[Variant]:
    pointers = (("p_programs", "*i64"), ("p_frames", "*i64"), ("p_results", "*i32"))
    for case in cases():
        for is_whole in (True, False):
            constants = {**case.kind.constants(), **flow_of(case.plan, is_whole).constants(), "C": C}
            name = f"encode {case.name}" + ("" if is_whole else ", partial")
            is_hot = case.is_hot and is_whole
            yield _variant(name, "encode_kernel", "encode_kernel", pointers, constants, is_hot, case)
    for width in (1, 6, 8):
        constants = {"WIDTH": width, "P": 11, "C": C}
        yield _variant(f"encode plane of {width} bits", "encode_kernel", "plane_kernel", pointers, constants)


def _collectors() -> Iterator[Variant]:
    sections = (("p_sections", "*i64"), ("p_out", "*u8"), ("n_each", "i32"))
    yield _variant("copy", "collect_kernel", "copy_kernel", sections, {"BLOCK": 256})
    for width in (8, 16, 32, 64):
        patches = (("p_patches", "*i64"), ("p_out", "*u8"))
        yield _variant(f"patches of {width} bits", "collect_kernel", "patch_kernel", patches, {"W": width})


def _decoders() -> Iterator[Variant]:
    pointers = (("p_programs", "*i64"), ("p_frames", "*i64"), ("p_chunks", "*i64"), ("p_told", "*u8"))
    for case in cases():
        if case.plan.entropy == "none":  # copies, casts and patches, see below
            continue
        for is_whole in (True, False):
            flow = flow_of(case.plan, is_whole)
            constants = {**case.kind.constants(), **flow.constants(), "IS_LONG": 0, "C": C}
            name = f"decode {case.name}" + ("" if is_whole else ", partial")
            is_hot = case.is_hot and is_whole
            yield _variant(name, "decode_kernel", "decode_kernel", pointers, constants, is_hot, case)
    pieces = (("p_pieces", "*i64"),)
    for width in (1, 6, 8):
        streams = (("p_programs", "*i64"), ("p_streams", "*i64"), ("p_told", "*u8"))
        constants = {"WIDTH": width, "P": 11, "C": C}
        yield _variant(f"decode plane of {width} bits", "decode_kernel", "plane_kernel", streams, constants)
    for width in (8, 16, 32, 64):
        patches = (("p_patches", "*i64"), ("p_told", "*u8"))
        constants = {"W": width, "BLOCK": 1024}
        yield _variant(f"decode patches of {width} bits", "decode_kernel", "patch_kernel", patches, constants)
        yield _variant(
            f"decode copy of {width} bits", "decode_kernel", "copy_kernel", pieces, {"U": width, "BLOCK": 1024}
        )
    for case in cases():
        if case.plan.predict == "cast":
            kind = case.kind
            constants = {"FROM_W": kind.FROM_W, "FROM_M": kind.FROM_M, "W": kind.W, "M": kind.M, "BLOCK": 1024}
            yield _variant(f"decode {case.name}", "decode_kernel", "cast_kernel", pieces, constants)


def _surveyors() -> Iterator[Variant]:
    for width in (8, 16, 32, 64):
        for has_reference, is_whole in ((True, True), (False, True), (True, False)):
            constants = {"W": width, "HAS_REFERENCE": int(has_reference), "IS_WHOLE": int(is_whole), "ROWS": 8}
            name = f"survey of {width} bits" + (" and the reference" if has_reference else "")
            parts = (("p_parts", "*i64"), ("p_keys", "*i32"), ("p_told", "*i64"))
            yield _variant(name + ("" if is_whole else ", tail"), "survey_kernel", "survey_kernel", parts, constants)
        pointers = (("p_programs", "*i64"), ("p_lattices", "*i64"))
        yield _variant(
            f"gather of {width} bits", "survey_kernel", "gather_kernel", pointers, {"W": width, "BLOCK": 1024}
        )
        if width > 8:
            constants = {"W": width, "ROWS": 8, "COLUMNS": 128}
            yield _variant(f"means of {width} bits", "survey_kernel", "mean_kernel", pointers, constants)


def _quantizers() -> Iterator[Variant]:
    """Groups that a program holds many of, or one of, or parts of one; and back. Not in the committed table."""
    numbers = (("n_groups_in_all", "i64"), ("n", "i64"), ("group", "i64"), ("n_groups", "i64"))
    results = (("p_shares", "*fp32"), ("p_codes", "*i8"), ("p_scales", "*i32"), ("p_counts", "*i32"), *numbers)
    for i, (name, words, most, groups, size) in enumerate(
        (("float32", "*i32", 7, 8, 128), ("bfloat16", "*i16", 127, 1, 2048), ("float16", "*i16", 127, 64, 16),
         ("float64", "*fp64", 7, 1, 1024))
    ):  # fmt: skip
        constants = {"FORMAT": i, "MOST": most, "IS_BF16": 0, "IS_CLIPPED": 1, "GROUPS": groups, "SIZE": size}
        constants["IS_ONE"] = int(size < 1024)
        pointers = (("p_words", words), *results)
        yield _variant(f"quantize {name}", "quantize_kernel", "quantize_kernel", pointers, constants)
        back = (("p_codes", "*i8"), ("p_scales", "*i32"), ("p_words", words), *numbers, ("largest", "fp32"))
        constants = {"FORMAT": i, "IS_BF16": 0, "GROUPS": groups, "SIZE": size}
        yield _variant(f"dequantize {name}", "quantize_kernel", "dequantize_kernel", back, constants)


def _multipliers() -> Iterator[Variant]:
    """Products of inputs with integer weights: of few rows and many, in whole steps or not, of every kind of input.

    Not in the committed table.
    """
    names = ("n_rows", "n_out", "n_in", "row_stride", "piece_stride", "code_stride", "n_groups")
    sizes = tuple((name, "i32") for name in names)
    for given, to, bits, group, n_in, tile in (
        ("codes", "bf16", 8, 0, 4096, MANY[0]),
        ("codes", "bf16", 4, 32, 4096, FEW[2]),
        ("bf16", "bf16", 8, 0, 4096, FEW[0]),
        ("fp16", "fp16", 4, 128, 4096, MANY_OF_MORE[0]),
        ("fp32", "fp32", 8, 0, 4096, SOME[0]),
        ("codes", "fp32", 8, 0, 4095, FEW[0]),
        ("codes", "fp16", 8, 16, 4096, SOME[1]),
        ("fp32", "fp32", 4, 64, 4090, FEW[1]),
    ):
        is_dynamic, is_long = given == "codes", given == "fp32"
        constants = constants_of(tile, n_in, bits, group, is_dynamic, 3 if is_long else 1)
        constants |= {"HAS_BIAS": int(to != "fp32"), "IS_WIDENED": 0, "IS_NVIDIA": 1}
        rows, scales = {"codes": "*i8", "fp32": "*bf16"}.get(given, f"*{given}"), "*bf16" if group else "*fp32"
        inputs = (("p_rows", rows), ("p_factors", "*fp32"), ("p_codes", "*i8"), ("p_scales", scales))
        pointers = (*inputs, ("p_bias", f"*{to}"), ("p_out", f"*{to}"))
        name = f"multiply {given} by {bits} bits{f' in groups of {group}' if group else ''}, {tile} to {to}"
        found = _variant(name, "multiply_kernel", "product_kernel", (*pointers, *sizes), constants)
        yield replace(found, warps=tile.warps, even=names[2:6] if constants["IS_EVEN"] else ())
    shape = (("n_rows", "i32"), ("n_in", "i32"), ("row_stride", "i32"))
    size = {"ROWS": 1, "SIZE": 2048}
    arguments: tuple[tuple[str, str], ...] = (("p_rows", "*bf16"), ("p_codes", "*i8"), ("p_factors", "*fp32"), *shape)
    yield _variant("codes of rows", "multiply_kernel", "codes_kernel", arguments, size)
    arguments = (("p_rows", "*fp32"), ("p_pieces", "*bf16"), *shape)
    yield _variant("pieces of rows", "multiply_kernel", "pieces_kernel", arguments, {"PIECES": 3, **size})
    results = (("p_bias", "*bf16"), ("p_out", "*bf16"), *sizes[:2])
    arguments = (("p_sums", "*i32"), ("p_factors", "*fp32"), ("p_scales", "*fp32"), *results)
    size = {"HAS_BIAS": 1, "ROWS": 1, "OUTS": 256}
    yield _variant("outputs of sums", "multiply_kernel", "finish_kernel", arguments, size)


@cache
def variants() -> dict[str, Variant]:
    """All variants by name."""
    found = [*_encoders(), *_collectors(), *_decoders(), *_surveyors(), *_quantizers(), *_multipliers()]
    assert len({variant.name for variant in found}) == len(found)
    return {variant.name: variant for variant in found}


def tasks() -> list[tuple[str, str]]:
    """What the table has and a test compiles again: hot variants for all targets, the others for one.

    Of the others, those of partial chunks are left out: they are the same but for masks, and the last chunks of leaves.
    Those that quantise, and those that multiply, have tests of their own.
    """
    hot = [(variant.name, target) for variant in variants().values() if variant.is_hot for target in TARGETS]
    apart = ("quantize_kernel", "multiply_kernel")
    known = [variant for variant in variants().values() if variant.module not in apart]
    others = [variant.name for variant in known if not variant.is_hot and "partial" not in variant.name]
    return [*hot, *((name, "sm_90") for name in others)]
