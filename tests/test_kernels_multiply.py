"""Products of the kernels against the reference, whatever the tile; and they compile for every target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tricomp_torch.integers import execution, fastest
from tricomp_torch.integers.linear import IntegerLinear
from tricomp_torch.integers.weights import IntegerWeight

from tests.cases import weights
from tests.kernel_cases import DEVICE
from tests.kernel_code import measure_all
from tests.kernel_variants import TARGETS, variants
from tricomp.integers import pack_int4
from tricomp.kernels import multiply as kernels
from tricomp.kernels import tiles
from tricomp.kernels.device import IS_INTERPRETED
from tricomp.kernels.multiply import Weight
from tricomp.reference import multiply as reference

Array = np.ndarray[Any, Any]
F = np.float32
HERE = DEVICE.handle
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_TILES = {*tiles.FEW, *tiles.SOME, *tiles.MANY, *tiles.MANY_OF_MORE}
# Rows, inputs, outputs, bits, group. One of each; odd ones; steps in part; groups that are no powers of 2; one group.
SHAPES = (
    (1, 1, 1, 8, None),
    (3, 7, 5, 4, None),
    (17, 259, 70, 8, None),
    (5, 385, 33, 4, 32),
    (18, 100, 66, 8, 48),
    (9, 300, 17, 4, 112),
    (2, 257, 130, 4, 256),
    (33, 144, 40, 8, 16),
    (4, 64, 16, 8, 64),
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is new holds NaN, or the largest integer."""
    settings: Any = torch.utils.deterministic
    was, was_filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)
    settings.fill_uninitialized_memory = was_filled


def rows_like(m: int, n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows as layers get them, of very different size, with outliers and zeros; not side by side in memory."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((m, n + 3)).astype(F) * rng.choice(np.array([1e-3, 1, 40], F), (m, 1))
    array[rng.random(array.shape) < 0.02] *= 20
    array[m // 2, : n // 2] = 0
    return torch.from_numpy(array).to(dtype).to(HERE)[:, :n]


def weight_like(n_in: int, n_out: int, bits: int, group: int | None, seed: int) -> tuple[Weight, Array, Array]:
    """A weight on the device, scales of either dtype, with a bias or not; its codes one a byte, scales as float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128 if bits == 8 else -8, 128 if bits == 8 else 8, (n_out, n_in), np.int8)
    n_groups = 1 if group is None else -(-n_in // group)
    scales = torch.from_numpy(rng.random((n_out, n_groups)).astype(F) * F(0.01))
    scales = scales.bfloat16() if seed % 2 else scales
    bias = torch.from_numpy(rng.standard_normal(n_out).astype(F)).to(DTYPES[seed % 3]) if seed % 4 < 3 else None
    saved = torch.from_numpy(pack_int4(codes) if bits == 4 else codes).to(HERE)
    there = None if bias is None else bias.to(HERE)
    return Weight(saved, scales.to(HERE), there, bits, group, n_in), codes, scales.float().numpy()


def exact(rows: torch.Tensor, weight: Weight, codes: Array, scales: Array, is_dynamic: bool) -> Array:
    """The reference's product, float32."""
    saved = pack_int4(codes) if weight.bits == 4 else codes
    bias = None if weight.bias is None else weight.bias.float().cpu().numpy()
    given = rows.float().cpu().numpy()
    return reference.multiply(given, saved, scales, bias, weight.bits, weight.group, is_dynamic)


def in_order(rows: torch.Tensor, weight: Weight, codes: Array, scales: Array) -> torch.Tensor:
    """The product of codes, each float operation a single one in the order that kernels state."""
    given = rows.float().cpu().numpy()
    factors = np.abs(given).max(1, keepdims=True) / F(127)
    factors[factors == 0] = 1
    taken = np.rint(given / factors).astype(np.int64)
    step = tiles.constants_of(tiles.MANY[0], weight.n_in, weight.bits, weight.shared, True, 1)["STEP"]
    step = step if weight.shared else weight.n_in
    total = np.zeros((len(given), len(codes)), F)
    for first in range(0, weight.n_in, step):
        sums = taken[:, first : first + step] @ codes[:, first : first + step].astype(np.int64).T
        total += sums.astype(np.int32).astype(F) * scales[:, first // (weight.shared or weight.n_in)]
    total *= factors
    if weight.bias is not None:
        total += weight.bias.float().cpu().numpy()
    return torch.from_numpy(total).to(rows.dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_codes(dtype: torch.dtype) -> None:
    """The same bytes as in the order stated, close to the reference's, by every way."""
    for seed, (m, n_in, n_out, bits, group) in enumerate(SHAPES):
        rows = rows_like(m, n_in, dtype, seed)
        weight, codes, scales = weight_like(n_in, n_out, bits, group, seed)
        expected = in_order(rows, weight, codes, scales)
        for name, way in kernels.ways(rows, weight, True).items():
            found = way()
            assert (found.dtype, found.shape, found.device) == (dtype, (m, n_out), rows.device)
            assert raw(found) == raw(expected), (name, SHAPES[seed])
        wanted = exact(rows, weight, codes, scales, True)
        bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert np.abs(expected.float().numpy() - wanted).max() <= bound * max(np.abs(wanted).max(), 1)


def test_no_tile_changes_bytes() -> None:
    """Nor does torch._int_mm: what is fastest may be chosen by a clock."""
    for m, n_in, n_out, bits, group in ((24, 272, 48, 8, None), (19, 203, 37, 4, 32), (7, 515, 20, 8, 256)):
        rows = rows_like(m, n_in, torch.bfloat16, m)
        weight, codes, scales = weight_like(n_in, n_out, bits, group, m)
        expected = raw(in_order(rows, weight, codes, scales))
        for tile in ALL_TILES:
            assert tile.depth >= tiles.MOST_STEP
            assert raw(kernels.multiply(rows, weight, True, tile)) == expected, (tile, bits, group)
        if group is None:
            assert "torch._int_mm" in kernels.ways(rows, weight, True)
            assert raw(kernels.multiply_by_torch(rows, weight)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_floats(dtype: torch.dtype) -> None:
    """Weights are exact, and so are inputs: only sums are rounded, and the output."""
    for seed, (m, n_in, n_out, bits, group) in enumerate(SHAPES):
        rows = rows_like(m, n_in, dtype, seed)
        weight, codes, scales = weight_like(n_in, n_out, bits, group, seed)
        wanted = exact(rows, weight, codes, scales, False)
        bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        for name, way in kernels.ways(rows, weight, False).items():
            found = way()
            assert (found.dtype, found.shape) == (dtype, (m, n_out))
            error = np.abs(found.float().cpu().numpy() - wanted).max()
            assert error <= bound * max(np.abs(wanted).max(), 1), (name, SHAPES[seed], error)
    for tile in ALL_TILES:
        tiled = kernels.multiply(rows, weight, False, tile).float().cpu().numpy()
        assert np.abs(tiled - wanted).max() <= bound * max(np.abs(wanted).max(), 1), tile


def test_float32_is_not_rounded_unless_torch_may() -> None:
    """Three pieces add up to every number of usual size, and to less than 2^-133 from others; two to 16 of its bits."""
    bits = np.random.default_rng(5).integers(0, 1 << 32, (37, 1029), np.uint64).astype(np.uint32)
    bits[0, :6] = [0x80000000, 1, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00800001]
    rows = torch.from_numpy(bits.view(F))
    finite = rows.isfinite()
    pieces = kernels.to_pieces(rows.to(HERE), 3).cpu().double()
    error = (pieces.sum(1) - rows.double())[finite].abs()
    assert error.max() < 2**-133
    assert not error[rows[finite].abs() >= 2**-110].any()
    bad = torch.tensor([[float("inf"), float("-inf"), float("nan")]])
    bad = torch.cat([bad, torch.tensor([[0x7F800001]], dtype=torch.int32).view(torch.float32)], 1)
    assert torch.equal(kernels.to_pieces(bad.to(HERE), 3).cpu().float().sum(1).isnan(), bad.isnan())
    assert kernels.to_pieces(bad.to(HERE), 3)[0, 0, :2].cpu().float().equal(bad[0, :2])
    usual = rows_like(3, 200, torch.float32, 1)
    two = kernels.to_pieces(usual, 2).double().sum(1)
    assert ((two - usual.double()).abs() <= usual.double().abs() * 2**-15).all()
    matmul: Any = torch.backends.cuda.matmul
    was = matmul.fp32_precision
    try:
        for precision, is_rounded in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = precision
            assert kernels._is_tf32() is is_rounded
    finally:
        matmul.fp32_precision = was


def test_codes_and_factors_of_rows() -> None:
    """Zeros, subnormal numbers, the largest, halves between codes, and rows that are not finite."""
    rows = rows_like(11, 2500, torch.float32, 2).clone()
    rows[1] = 0
    rows[2] = torch.linspace(-127, 127, 2500).mul(2).round().div(2)
    rows[3] *= 1e-38
    rows[4] = torch.finfo(torch.bfloat16).max
    rows[5, 7], rows[6, 8], rows[7, 9] = float("inf"), float("-inf"), float("nan")
    given = rows.cpu().numpy()
    for dtype in (torch.float32, torch.bfloat16):
        codes, factors = kernels.to_codes(rows.to(dtype))
        taken = given if dtype == torch.float32 else rows.to(dtype).float().cpu().numpy()
        good = [0, 1, 2, 3, 4, 8, 9, 10]
        largest = np.abs(taken[good]).max(1) / F(127)
        largest[largest == 0] = 1
        assert factors.cpu().numpy()[good].tobytes() == largest.tobytes()
        assert np.array_equal(codes.cpu().numpy()[good], np.rint(taken[good] / largest[:, None]))
        assert factors[5:8].isnan().all()


def test_rows_that_are_not_finite_stay_so() -> None:
    for dtype in DTYPES:
        for is_dynamic in (False, True):
            rows = torch.ones(6, 70, dtype=dtype, device=HERE)
            rows[1, 3], rows[2, 69], rows[3, 0], rows[4] = float("nan"), float("inf"), float("-inf"), 0
            codes, scales = torch.ones(20, 70, dtype=torch.int8), torch.ones(20, 1)
            weight = Weight(codes.to(HERE), scales.to(HERE), None, 8, None, 70)
            for way in kernels.ways(rows, weight, is_dynamic).values():
                found = way().cpu()
                assert not found[1:4].isfinite().any()
                assert (found[4] == 0).all()
                assert torch.allclose(found[5].float(), torch.tensor(70.0), rtol=1e-2)


def test_extremes_of_codes_do_not_overflow() -> None:
    """The longest rows of which sums fit; longer ones have no way, unless groups are summed by themselves."""
    most = 2**31 // (127 * 128)
    rows = torch.full((17, most), -1.0, device=HERE)
    codes = torch.full((16, most), -128, dtype=torch.int8, device=HERE)
    codes[7:] = 127
    weight = Weight(codes, torch.ones(16, 1, device=HERE), None, 8, None, most)
    (way, *_) = kernels.ways(rows, weight, True).values()
    expected = -codes[:, 0].cpu().float() * most
    assert torch.allclose(way().cpu(), expected.expand(17, 16))
    for group, has_ways in ((None, False), (1 << 17, False), (1 << 18, False), (1 << 16, True)):
        longer = torch.empty(16, 1 << 18, dtype=torch.int8)
        weight = Weight(longer, torch.ones(16, 1), None, 8, group, 1 << 18)
        is_whole = group is not None and group < 1 << 18
        assert bool(kernels.ways(torch.ones(17, 1 << 18), weight, True)) == (has_ways or is_whole)
        assert kernels.ways(torch.ones(17, 1 << 18), weight, False)


def test_what_has_no_way() -> None:
    weight, _, _ = weight_like(32, 16, 8, None, 0)
    assert kernels.ways(torch.ones(2, 32, dtype=torch.float64), weight, False) == {}
    assert kernels.ways(torch.ones(0, 32), weight, True) == {}
    assert kernels.ways(torch.ones(2, 0), Weight(torch.empty(3, 0), torch.empty(3), None, 8, None, 0), True) == {}


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_layers_on_a_gpu_run_on_kernels(is_dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own call, of inputs of any axes; close to the CPU's."""
    monkeypatch.setattr(execution, "_is_on_gpu", lambda codes: True)
    used, original = [], fastest.run

    def run(key: Any, ways: dict[str, Any], *rest: Any) -> torch.Tensor:
        used.append(list(ways))
        return original(key, ways, *rest)

    monkeypatch.setattr(fastest, "run", run)
    for dtype, bits, group in ((torch.float32, 8, None), (torch.bfloat16, 4, 32), (torch.float16, 6, 16)):
        weight = torch.from_numpy(weights((37, 131))).to(dtype)
        made = IntegerLinear(
            IntegerWeight.of(weight, bits, group), torch.nn.Parameter(weight[:, 0]), is_dynamic=is_dynamic
        )
        made.requires_grad_(False)
        rows = rows_like(6, 131, dtype, bits).reshape(2, 3, 131)
        found = made.to(HERE)(rows)
        assert (found.shape, found.dtype) == ((2, 3, 37), dtype)
        made.to("cpu")
        codes, scales = made.weight.row_codes.numpy(), made.weight.scales.float().numpy()
        flat, added = rows.reshape(6, 131).float().cpu().numpy(), weight[:, 0].float().numpy()
        wanted = reference.multiply(flat, codes, scales.reshape(37, -1), added, bits, group, is_dynamic)
        bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert np.abs(found.reshape(6, 37).float().cpu().numpy() - wanted).max() <= bound * np.abs(wanted).max()
    assert [names[0].startswith("tiles of") for names in used] == [True] * 3
    assert all(("torch of floats" in names) is not is_dynamic for names in used)
    with torch.no_grad():  # what kernels do not take, torch does
        wide = made.double()(rows.cpu().double())
    assert (wide.reshape(6, 37).float() - torch.from_numpy(wanted)).abs().max() <= 2e-3 * np.abs(wanted).max()
    assert made(torch.empty(0, 131, dtype=torch.float16)).shape == (0, 37)


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU compiles them itself")
def test_kernels_compile_for_every_target(tmp_path: Any) -> None:
    """Products on the tensor cores, nothing spilt; and where the order of floats is stated, nothing is fused."""
    names = [name for name, variant in variants().items() if variant.module == "multiply_kernel"]
    tasks = [(name, target) for i, name in enumerate(names) for target in TARGETS if i < 5 or target == "sm_90"]
    rows = measure_all(tasks, 1, tmp_path)
    assert {(row["variant"], row["target"]): row["error"] for row in rows if "error" in row} == {}
    assert {(row["variant"], row["target"]): row["spilt_bytes"] for row in rows if row["spilt_bytes"]} == {}
    found = [path.read_text() for path in tmp_path.rglob("*.ptx")]
    assert len(found) == sum(target.startswith("sm") for _, target in tasks)
    assert any("0xF0F0F0F0" in text for text in found)  # four bits, four bytes at a time
    for text in found:
        assert not any(word in text for word in (".ftz", "div.full", "div.approx", "fma.rn.f32"))
        assert "product_kernel" not in text or any(word in text for word in ("wgmma", "mma.sync", "tcgen05.mma"))
