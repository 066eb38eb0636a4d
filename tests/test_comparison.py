"""What differs between two trees: every dtype, numbers exact, pieces of any size, plain values, in bounded memory."""

import math

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests.cases import of_dtype, stepped, weights
from tricomp import dtypes
from tricomp.comparison import LeafChange, Mismatch, TreeSide, compare, pieces_of


def changes(a, b):
    return compare(TreeSide(a), TreeSide(b)).changed


def change(a, b):
    (found,) = changes({"x": a}, {"x": b})
    return found


@pytest.mark.parametrize("name", dtypes.NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (33, 17), (0, 4)])
def test_every_dtype_is_equal_to_itself_and_each_changed_word_counts(name, shape):
    a = of_dtype(name, shape).reshape(shape)
    assert changes({"x": a}, {"x": a.copy()}) == ()
    words = dtypes.to_words(a).copy()
    if not len(words):
        return
    some = np.unique(np.array([0, len(words) // 2, len(words) - 1]))
    words[some] ^= 1
    b = dtypes.from_words(words, dtypes.by_name(name), shape)
    found = change(a, b)
    assert (found.path, found.dtype, found.n_words, found.n_changed) == ("x", name, len(words), len(some))
    assert found.largest_absolute > 0 or found.n_nonfinite
    assert 0 <= found.largest_relative <= 2


def test_the_numbers_of_a_change():
    a = np.array([1, -2, 0, 4, 8], np.float32)
    b = np.array([1, -2.5, 0.25, 4, 6], np.float32)
    expected = LeafChange("x", "float32", 5, 3, 0, 2.0, 1.0, math.hypot(0.5, 0.25, 2) / math.hypot(1, 2, 4, 8))
    assert change(a, b) == expected


def test_zeros_of_both_signs_and_nan_payloads_are_changes():
    a = np.array([0.0, np.nan, np.inf, np.inf, 1.0, np.nan])
    b = a.copy()
    b[0] = -0.0
    b.view(np.uint64)[1] ^= 1
    b[2] = -np.inf
    b[3] = 5
    found = change(a, b)
    assert (found.n_changed, found.n_nonfinite, found.largest_absolute, found.largest_relative) == (4, 3, 0, 0)
    assert found.relative_norm == 0
    assert change(np.array([0.0]), np.array([2.0])).relative_norm is None


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64"])
def test_integers_are_subtracted_exactly(name):
    least, most = np.iinfo(name).min, np.iinfo(name).max
    found = change(np.array([least, 5], name), np.array([most, 5], name))
    assert found.largest_absolute == most - least
    assert type(found.largest_absolute) is int
    assert found.largest_relative == pytest.approx(2, rel=0.01)
    assert change(np.array([2**64 - 1], np.uint64), np.array([0], np.uint64)).largest_absolute == 2**64 - 1
    assert change(np.array([2**63], np.uint64), np.array([2**63 + 1], np.uint64)).largest_absolute == 1


def test_what_overflows_float64_does_not_spoil_the_numbers():
    a, b = np.array([1e300, 1e-300, 0]), np.array([1e300, 3e-300, 0])
    assert change(a, b).relative_norm == 2e-300 / 1e300
    assert change(np.array([1e-300]), np.array([3e-300])).relative_norm == pytest.approx(2)
    found = change(np.array([1.7e308]), np.array([-1.7e308]))
    assert (found.largest_absolute, found.largest_relative) == (math.inf, 2)
    compared = compare(TreeSide({"x": np.array([1.7e308])}), TreeSide({"x": np.array([-1.7e308])})).to_json()
    assert compared["changed"][0]["largest_absolute"] is None
    assert compared["changed"][0]["relative_norm"] is None


def test_complex_elements_are_two_words():
    a = np.array([1 + 2j, 3 + 4j], np.complex64)
    b = np.array([1 + 2j, 3 + 6j], np.complex64)
    found = change(a, b)
    assert (found.n_words, found.n_changed, found.largest_absolute) == (4, 1, 2)


def test_leaves_on_one_side_and_of_other_kind():
    a = {"a": np.zeros(3), "both": np.zeros(3, np.float32), "shape": np.zeros((2, 3)), "same": np.arange(4)}
    b = {"b": np.zeros(3), "both": np.zeros(3, ml_dtypes.bfloat16), "shape": np.zeros((3, 2)), "same": np.arange(4)}
    found = compare(TreeSide(a), TreeSide(b))
    assert (found.only_in_a, found.only_in_b) == (("a",), ("b",))
    assert found.mismatched == (
        Mismatch("both", "float32[3]", "bfloat16[3]"),
        Mismatch("shape", "float64[2,3]", "float64[3,2]"),
    )
    assert (found.n_leaves, found.n_words, found.n_changed, found.is_equal) == (1, 4, 0, False)


def test_plain_values():
    a: dict = {
        "lr": 0.1,
        "step": 1,
        "z": 0.0,
        "n": None,
        "big": 1 << 80,
        "e": [],
        "t": (1, 2),
        "gone": "x",
        "nan": math.nan,
    }
    b: dict = {
        "lr": 0.2,
        "step": True,
        "z": -0.0,
        "n": None,
        "big": 1 << 81,
        "e": {},
        "t": (1, 2),
        "new": b"y",
        "nan": math.nan,
    }
    found = compare(TreeSide(a), TreeSide(b)).values
    assert {value.path: (value.a, value.b) for value in found} == {
        "lr": ("0.1", "0.2"),
        "step": ("1", "True"),
        "z": ("0.0", "-0.0"),
        "big": (str(1 << 80), str(1 << 81)),
        "e": ("[]", "{}"),
        "gone": ("'x'", ""),
        "new": ("", "b'y'"),
    }
    twice = compare(TreeSide({"a": {1: 5, "1": 6}}), TreeSide({"a": {1: 5, "1": 7}})).values
    assert twice == (Mismatch("a/1", "5, 6", "5, 7"),)


def test_equal_but_not_the_same():
    x, y = np.arange(3), np.arange(4)
    for a, b in (({"x": x, "y": y}, {"y": y, "x": x}), ([x, y], (x, y)), ({0: x}, [x])):
        found = compare(TreeSide(a), TreeSide(b))
        assert found.is_equal
        assert not found.is_same_content
    assert compare(TreeSide({"x": x}), TreeSide({"x": x.copy()})).is_same_content


def test_pieces_of_any_strides():
    whole = np.arange(2 * 3 * 5 * 7, dtype=np.int32).reshape(2, 3, 5, 7)
    for array in (whole, whole.T, whole[:, ::2, ::-1], whole.astype(">i4"), whole.swapaxes(1, 3), whole[..., :0]):
        for n in (1, 4, 7, 33, 1000):
            parts = list(pieces_of(array, n))
            assert all(part.ndim == 1 and len(part) <= n and part.dtype == "<i4" for part in parts)
            assert np.array_equal(np.concatenate([np.zeros(0, "<i4"), *parts]), np.ascontiguousarray(array).reshape(-1))


def test_files_of_a_chain_against_trees(tmp_path):
    rng = np.random.default_rng(0)
    first: dict = {"w": weights((300, 129)), "b": weights((33,)), "n": {0: {"i": rng.integers(0, 9, 100)}}, "step": 1}
    second = {**first, "w": stepped(first["w"]), "step": 2}
    third = {**second, "b": stepped(first["b"], still_share=0)}
    tricomp.save(tmp_path / "1.tri", first)
    tricomp.save(tmp_path / "2.tri", second, reference=tmp_path / "1.tri")
    with tricomp.open(tmp_path / "2.tri", reference=tmp_path / "1.tri") as file:
        tricomp.save(tmp_path / "3.tri", third, reference=file)
        with tricomp.open(tmp_path / "1.tri") as a, tricomp.open(tmp_path / "3.tri", reference=file) as b:
            found = compare(a, b)
            assert found == compare(TreeSide(first), TreeSide(third)) == compare(a, TreeSide(third))
            assert [leaf.path for leaf in found.changed] == ["w", "b"]
            assert found.changed[0].n_changed == np.count_nonzero(first["w"] != third["w"])
            assert found.values == (Mismatch("step", "1", "2"),)
            assert compare(b, TreeSide(third)).is_same_content


def test_equal_digests_are_not_decoded(tmp_path, monkeypatch):
    tree = {"a": weights((40, 40)), "b": weights((50, 50))}
    tricomp.save(tmp_path / "a.tri", tree)
    tricomp.save(tmp_path / "b.tri", {**tree, "b": stepped(tree["b"])})
    with tricomp.open(tmp_path / "a.tri") as a, tricomp.open(tmp_path / "b.tri") as b:
        decoded, pieces = [], tricomp.File.pieces

        def spied(file, path, n_elements):
            decoded.append(path)
            return pieces(file, path, n_elements)

        monkeypatch.setattr(tricomp.File, "pieces", spied)
        done: list[int] = []
        assert [leaf.path for leaf in compare(a, b, done.append).changed] == ["b"]
        assert decoded == ["b", "b"]
        assert sum(done) == sum(array.nbytes for array in tree.values())


def test_a_large_leaf_comes_in_pieces_that_need_not_match(tmp_path):
    a = np.zeros((1 << 22) + 77, np.uint8)
    b = a.copy()
    b[[0, 1 << 21, len(b) - 1]] = (3, 2, 1)
    tricomp.save(tmp_path / "a.tri", {"x": a})
    with tricomp.open(tmp_path / "a.tri") as file:
        (found,) = compare(file, TreeSide({"x": b})).changed
        assert (found.n_changed, found.largest_absolute) == (3, 3)


def test_damage_is_raised(tmp_path):
    path = tmp_path / "a.tri"
    tricomp.save(path, {"x": weights((60, 60))})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with tricomp.open(path) as file, pytest.raises(tricomp.CorruptFrame, match="'x'"):
        compare(file, TreeSide({"x": weights((60, 60))}))
