"""Native products with integer weights against the reference: shapes that fill no vector, every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import told_by
from tricomp import native
from tricomp.integers import pack_int4
from tricomp.native.multiply import multiply
from tricomp.reference import multiply as reference

pytestmark = pytest.mark.skipif(not native.is_there(), reason="no native module")

SHAPES = [(1, 1, 1), (3, 7, 5), (4, 64, 16), (5, 65, 17), (1, 127, 33), (2, 129, 3), (9, 1027, 130), (1, 1024, 64)]
MANY_ROWS = [(17, 129, 49), (33, 70, 5), (50, 258, 97), (64, 1030, 31), (65, 33, 100), (330, 77, 50), (830, 39, 33)]


def cases():
    """Rows, codes as saved, scales, bias, bits, group, whether dynamic: of every shape and form."""
    random = np.random.default_rng(3)
    for m, n_in, n_out in SHAPES + MANY_ROWS:
        rows = random.standard_normal((m, n_in)).astype(np.float32)
        rows[:, -1] *= 30
        rows[0, : n_in // 2] = 0
        for bits, top in ((8, 127), (4, 7)):
            codes = random.integers(-top, top + 1, (n_out, n_in), np.int8)
            for group in (None, 16, 48, 64, 112, 128, 512) if m < 10 else (None, 16, 48, 512):
                n_groups = 1 if group is None else -(-n_in // group)
                scales = (random.random((n_out, n_groups)) + 0.1).astype(np.float32)
                bias = random.standard_normal(n_out).astype(np.float32) if n_out % 2 else None
                saved = pack_int4(codes) if bits == 4 else codes
                yield rows, saved, scales, bias, bits, group


def check(threads=1):
    for rows, codes, scales, bias, bits, group in cases():
        for is_dynamic in (False, True):
            for is_short in (False, True):
                words = scales.view(np.uint32) >> 16
                kept = (words << 16).view(np.float32) if is_short else scales
                wanted = reference.multiply(rows, codes, kept, bias, bits, group, is_dynamic)
                out = np.full(wanted.shape, np.nan, np.float32)
                given = words.astype(np.uint16) if is_short else scales
                multiply(rows, codes, given, bias, out, bits, group, is_dynamic, threads)
                error = np.abs(out - wanted).max()
                assert error <= 2e-6 * max(1, np.abs(wanted).max()), (rows.shape, codes.shape, bits, group, is_dynamic)


@pytest.mark.parametrize("threads", [1, 3])
def test_products_equal_the_references(threads):
    check(threads)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_products_on_older_processors(isa):
    assert told_by(isa, "from tests.test_native_multiply import check, native; check(); print(native.isa())") == isa


def test_rows_that_are_not_finite_stay_so():
    rows = np.ones((5, 70), np.float32)
    rows[1, 3], rows[2, 69], rows[3, 0], rows[4] = np.nan, np.inf, -np.inf, 0
    codes, scales = np.ones((20, 70), np.int8), np.ones((20, 1), np.float32)
    out = np.zeros((5, 20), np.float32)
    multiply(rows, codes, scales, None, out, 8, None, True, 1)
    assert not np.isfinite(out[1:4]).any()
    assert (out[4] == 0).all()
    assert np.allclose(out[0], 70)


def test_extremes_of_codes_do_not_overflow():
    n_in = 1 << 16
    rows = np.full((5, n_in), -1, np.float32)
    for code in (-128, 127):
        codes, out = np.full((17, n_in), code, np.int8), np.zeros((5, 17), np.float32)
        multiply(rows, codes, np.ones((17, 1), np.float32), None, out, 8, None, True, 1)
        assert np.allclose(out, -code * n_in)


@pytest.mark.parametrize("n_rows", [1, 3, 70])
def test_codes_are_what_division_rounds_to(n_rows):
    """Quotients within a few roundings of the middle between two codes, by weights that show each code alone."""
    random = np.random.default_rng(5)
    n_in = 150
    scales = np.exp(random.uniform(-40, 40, (n_rows, 1))).astype(np.float32)
    halves = random.integers(-127, 127, (n_rows, n_in)) + 0.5
    near = (halves * scales).astype(np.float32).view(np.int32) + random.integers(-3, 4, (n_rows, n_in), np.int32)
    rows = near.view(np.float32)
    rows[:, 75] = (scales * np.float32(127))[:, 0]
    found, identity = np.zeros((n_rows, n_in), np.float32), np.eye(n_in, dtype=np.int8)
    multiply(rows, identity, np.ones((n_in, 1), np.float32), None, found, 8, None, True, 1)
    scales = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    assert found.tobytes() == (np.rint(rows / scales) * scales + np.float32(0)).astype(np.float32).tobytes()


def test_a_row_gives_the_same_whatever_stands_beside_it():
    """With one scale a row of weights: sums are whole numbers, and what is done to them is the same in every form."""
    random = np.random.default_rng(7)
    rows = random.standard_normal((203, 301)).astype(np.float32)
    scales, bias = random.random((75, 1), np.float32), random.standard_normal(75).astype(np.float32)
    wide, narrow = random.integers(-128, 128, (75, 301), np.int8), random.integers(0, 256, (75, 151), np.uint8)
    for bits, codes in ((8, wide), (4, narrow)):
        all_rows, some = np.zeros((203, 75), np.float32), np.zeros((203, 75), np.float32)
        multiply(rows, codes, scales, bias, all_rows, bits, None, True, 2)
        for first, last in ((0, 1), (1, 4), (4, 12), (12, 25), (25, 90), (90, 203)):
            multiply(rows[first:last], codes, scales, bias, some[first:last], bits, None, True, 1)
        assert some.tobytes() == all_rows.tobytes()


@pytest.mark.parametrize("what", ["rows", "codes", "scales", "bias", "out", "group", "rows of too many"])
def test_what_does_not_fit_is_refused(what):
    rows, codes, scales = np.zeros((2, 32), np.float32), np.zeros((3, 32), np.int8), np.zeros((3, 2), np.float32)
    given: dict[str, Any] = {"rows": rows, "codes": codes, "scales": scales, "bias": np.zeros(3, np.float32)}
    given["out"] = np.zeros((2, 3), np.float32)
    group = 16
    if what == "group":
        group = 8
    elif what == "rows of too many":
        given |= {"rows": np.zeros((1, 65537), np.float32), "codes": np.zeros((3, 65537), np.int8)}
    else:
        given[what] = given[what][..., :-1].copy()
    with pytest.raises(ValueError, match="another number|contradicts itself"):
        multiply(given["rows"], given["codes"], given["scales"], given["bias"], given["out"], 8, group, False, 1)
