"""Origins: spans and skeletons in a file's metadata, small, checked, and enough to rebuild a file in bounded memory."""

import json
import os
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tricomp
from tests.cases import of_dtype, weights
from tests.format_cases import safetensors_of, there_and_back
from tricomp import dtypes, formats
from tricomp import tree as trees
from tricomp.bounds import Limits
from tricomp.errors import CorruptFile, InvalidArgument, LimitExceeded, TricompError
from tricomp.folder import LocalFile
from tricomp.formats import Origin, Span, TensorFile, header
from tricomp.formats.origin import is_plain_name
from tricomp.layout import Leaf


def laid_out(tmp_path, parts, name="x.bin"):
    """A TensorFile of a file made of parts: bytes, or (key, array, axes, is_swapped)."""
    data, tree, spans = b"", {}, []
    for part in parts:
        if isinstance(part, bytes):
            data += part
            continue
        key, array, axes, is_swapped = part
        there = array if axes is None else np.ascontiguousarray(array.transpose(axes))
        bits = there.reshape(-1).view(dtypes.of(array).word_dtype)
        found = (bits.byteswap() if is_swapped else bits).tobytes()
        tree[key] = array
        spans.append(Span(key, len(data), len(found), axes, is_swapped))
        data += found
    (tmp_path / name).write_bytes(data)
    source = LocalFile(str(tmp_path / name))
    return TensorFile(name, "parts", tree, len(data), tuple(reversed(spans)), source), data


def back(tmp_path, opened, reference=None):
    path = tmp_path / "x.tri"
    tricomp.save(path, opened.tree, reference, metadata=opened.to_metadata())
    with tricomp.open(path, reference) as file:
        (origin,) = formats.origins(file)
        assert (origin.name, origin.format, origin.is_exact) == (opened.name, opened.format, True)
        return b"".join(bytes(piece) for piece in origin.pieces(file))


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype_in_every_order(tmp_path, name, is_swapped):
    parts = [
        b"head",
        ("a", of_dtype(name, (5, 3, 7)), (2, 0, 1), is_swapped),
        ("b", of_dtype(name, (0, 3)), None, is_swapped),
        ("c", of_dtype(name, (0, 3)), (1, 0), is_swapped),
        ("d", of_dtype(name, ()), None, is_swapped),
        b"between",
        ("e", of_dtype(name, (33,)), (0,), is_swapped),
        ("f", of_dtype(name, (41,)), None, is_swapped),
    ]
    opened, data = laid_out(tmp_path, parts)
    assert back(tmp_path, opened) == data


def test_nothing_but_a_skeleton_and_nothing_at_all(tmp_path):
    for parts in ([b"only bytes"], [], [("a", np.zeros(0, np.int8), None, False)]):
        opened, data = laid_out(tmp_path, parts)
        assert back(tmp_path, opened) == data


def test_a_leaf_in_parts_and_twice(tmp_path):
    array = weights((50, 7))
    whole = array.tobytes()
    (tmp_path / "x").write_bytes(whole[:400] + b"!" + whole[400:] + whole[8:16])
    spans = (
        Span("", 0, 400),
        Span("", 401, 1000, start=400),
        Span("", 1401, 8, start=8),
    )
    opened = TensorFile("x", "parts", array, 1409, spans, LocalFile(str(tmp_path / "x")))
    assert back(tmp_path, opened) == (tmp_path / "x").read_bytes()


def test_a_delta_rebuilds_its_file(tmp_path):
    old = {"w": weights((300, 200)), "b": weights((5,))}
    tricomp.save(tmp_path / "base.tri", old)
    opened, data = laid_out(
        tmp_path, [b"#", ("w", old["w"] * np.float32(1.001), (1, 0), True), ("b", old["b"], None, False)]
    )
    assert back(tmp_path, opened, tmp_path / "base.tri") == data


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.booleans()), max_size=8), st.randoms())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout(tmp_path, shape, random):
    parts = []
    for i, (n, n_gap, is_swapped) in enumerate(shape):
        name = random.choice(dtypes.NAMES)
        parts += [bytes(n_gap), (str(i), of_dtype(name, (n, 3)), random.choice([None, (1, 0)]), is_swapped)]
    opened, data = laid_out(tmp_path, parts)
    random.shuffle(items := list(opened.tree.items()))
    opened.tree.clear()
    opened.tree.update(items)
    assert back(tmp_path, opened) == data


def test_many_tensors_cost_next_to_nothing(tmp_path):
    found, at = {}, 0
    for i in range(20_000):
        n_rows = i % 7
        found[f"h.{i // 12}.mlp/{i % 12}"] = {
            "dtype": "F16",
            "shape": [n_rows, 3],
            "data_offsets": [at, at + 6 * n_rows],
        }
        at += 6 * n_rows
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_of(json.dumps(found, separators=(",", ":")), bytes(at)))
    with formats.read(str(path)) as opened:
        (packed,) = opened.to_metadata()["origin"]
    assert packed["is_abridged"]
    assert len(packed["spans"]) + len(packed["skeleton"]) < 20_000 / 10
    assert there_and_back(str(path)) == [path.read_bytes()]


def test_a_large_leaf_is_rebuilt_in_little_memory(tmp_path):
    n_bytes = 96 << 20
    path = tmp_path / "x.safetensors"
    head = safetensors_of({"a": {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [0, n_bytes]}})
    path.write_bytes(head)
    os.truncate(path, len(head) + n_bytes)
    with formats.read(str(path)) as opened:
        tricomp.save(tmp_path / "x.tri", opened.tree, metadata=opened.to_metadata())
    with tricomp.open(tmp_path / "x.tri") as file:
        (origin,) = formats.origins(file)
        tracemalloc.start()
        sizes = [len(piece) for piece in origin.pieces(file)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert sum(sizes) == len(head) + n_bytes
    assert max(sizes) <= 16 << 20
    assert peak < n_bytes / 2


def test_opening_a_huge_file_reads_its_table_only(tmp_path):
    n_bytes = 40 << 30
    path = tmp_path / "x.safetensors"
    head = safetensors_of({"a": {"dtype": "BF16", "shape": [n_bytes // 2], "data_offsets": [0, n_bytes]}})
    path.write_bytes(head)
    os.truncate(path, len(head) + n_bytes)
    tracemalloc.start()
    with formats.read(str(path)) as opened:
        assert opened.tree["a"].nbytes == n_bytes
        opened.to_metadata()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# from FORMAT.md alone


def swapped(data, dtype):
    n_bytes = dtypes.by_name(dtype.name).word_bits // 8
    return np.frombuffer(data, f"u{n_bytes}").byteswap().tobytes()


def plain_entry(path, array, begin):
    """How safetensors writes the entry of a leaf, as FORMAT.md says."""
    name = json.dumps(path.replace("~1", "/").replace("~0", "~"), ensure_ascii=False)
    shape = ",".join(map(str, array.shape))
    code = {"float16": "F16", "float32": "F32", "bool": "BOOL"}[array.dtype.name]
    text = f'{name}:{{"dtype":"{code}","shape":[{shape}],"data_offsets":[{begin},{begin + array.nbytes}]}}'
    return text.encode()


def plain_rebuild(origin, leaves):
    """A file rebuilt with nothing but zlib. leaves: (path, array) in the order of the `.tri` file."""
    table, short = (zlib.decompress(origin[key][8:]) for key in ("spans", "skeleton"))
    n_spans = len(table) // 40
    rows = [[int.from_bytes(table[i : i + 8], "little", signed=True) for i in range(0, len(table), 8)]]
    rows = [rows[0][i * n_spans : (i + 1) * n_spans] for i in range(5)]
    found, number, at = [], -1, 0
    for step, gap, code, start, size in zip(*rows):
        number += 1 + step
        path, array = leaves[number]
        data = (array.transpose(origin["axes"][(code >> 2) - 1]) if code >> 2 else array).tobytes()
        data = swapped(data, array.dtype) if code & 1 else data
        found.append((at + gap, data[start : start + size] if code & 2 else data, path, array))
        at = found[-1][0] + len(found[-1][1])
    if origin["is_abridged"]:
        begin = 8 + int.from_bytes(short[:8], "little")
        rest, skeleton = iter(found), short[:8]
        for byte in short[8:]:
            if byte not in (1, 2):
                skeleton += bytes((byte,))
                continue
            offset, _, path, array = next(rest)
            skeleton += plain_entry(path, array, offset - begin) if byte == 1 else b""
    else:
        skeleton = short
    assert len(skeleton) == origin["skeleton_bytes"]
    out, done = b"", 0
    for offset, data, _, _ in found:
        gap = offset - len(out)
        out += skeleton[done : done + gap] + data
        done += gap
    out += skeleton[done:]
    assert len(out) == origin["bytes"]
    return out


def test_the_documented_way_rebuilds_a_file(tmp_path):
    parts = [
        b"#!",
        ("a", weights((5, 3, 2)), (2, 0, 1), True),
        ("b", weights((0,)), None, False),
        b"!",
        ("c", weights((9,)), None, True),
    ]
    opened, data = laid_out(tmp_path, parts)
    (packed,) = opened.to_metadata()["origin"]
    assert plain_rebuild(packed, list(opened.tree.items())) == data
    names = {"é/~": weights((3, 2)), "empty": np.zeros((0, 2), np.float16), "flags": np.array([True, False])}
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save(names, {"a": "b"}))
    with formats.read(str(path)) as other:
        (packed,) = other.to_metadata()["origin"]
        _, paths, arrays = tricomp.tree.flatten(other.tree)
    assert packed["is_abridged"]
    assert zlib.decompress(packed["skeleton"][8:]).count(b"\x01") == 3
    assert plain_rebuild(packed, list(zip(paths, arrays))) == path.read_bytes()


# what does not fit


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span("nope", 0, 4), "there is no such leaf"),
        (Span("a", 0, 999), "bytes 0 to 999 of a leaf of 60"),
        (Span("a", 0, 58), "bytes 0 to 58 of a leaf of 60"),
        (Span("a", 0, 4, start=2), "bytes 2 to 6"),
        (Span("a", 0, 4, start=-4), "bytes -4 to 0"),
        (Span("a", 0, 60, axes=(0,)), "axes [0] of a leaf with 2 dimensions"),
        (Span("a", 0, 60, axes=(0, 0)), "axes [0, 0]"),
        (Span("a", 0, 40, axes=(1, 0)), "axes, and not the whole leaf"),
        (Span("a", 41, 60), "overlaps another one, or the end of the file"),
        (Span("a", -1, 60), "overlaps another one, or the end of the file"),
    ],
)
def test_spans_that_do_not_fit(tmp_path, span, message):
    (tmp_path / "x").write_bytes(bytes(100))
    opened = TensorFile("x", "parts", {"a": weights((5, 3))}, 100, (span,), LocalFile(str(tmp_path / "x")))
    with pytest.raises(InvalidArgument) as caught:
        opened.origins()
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"x: leaf {span.leaf!r} at {span.offset}")


def test_spans_that_overlap(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    spans = (Span("a", 0, 60), Span("b", 56, 8))
    tree = {"a": weights((5, 3)), "b": weights((2,))}
    opened = TensorFile("x", "parts", tree, 100, spans, LocalFile(str(tmp_path / "x")))
    with pytest.raises(InvalidArgument, match="leaf 'b' at 56, 8 bytes: overlaps another one"):
        opened.origins()


def test_a_file_that_is_hardly_tensors_is_not_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("tricomp.bounds.DEFAULTS", Limits(max_table_bytes=1000))
    opened, _ = laid_out(tmp_path, [bytes(1001), ("a", weights((5,)), None, False)])
    (origin,) = opened.origins()
    assert not origin.is_exact
    assert origin.to_metadata() == {"format": "parts", "name": "x.bin", "bytes": 1021}


def test_an_inexact_origin(tmp_path):
    opened = TensorFile("x.npz", "npz", {"a": np.arange(3)}, 0, None, _empty(tmp_path))
    tricomp.save(tmp_path / "x.tri", opened.tree, metadata=opened.to_metadata())
    with tricomp.open(tmp_path / "x.tri") as file:
        (origin,) = formats.origins(file)
        with pytest.raises(InvalidArgument, match=r"'x.npz' cannot be rebuilt byte for byte. Write an equal file"):
            next(origin.pieces(file))
        assert b"".join(map(bytes, formats.restored(file, origin))).startswith(b"PK")


def _empty(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    return LocalFile(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("model.safetensors", "model.safetensors"),
        ("Ä ü.npz", "Ä ü.npz"),
        ("a:b\\c\n.npz", "a_b_c_.npz"),
        ("a\udcff.npz", "a_.npz"),
        ("x" * 300 + ".npz", "file.npz"),
    ],
)
def test_names_are_those_of_a_file_in_one_folder(tmp_path, name, kept):
    opened = TensorFile(name, "parts", {}, 0, (), _empty(tmp_path))
    assert opened.origins()[0].name == kept
    assert is_plain_name(kept)


# hostile metadata


def packed_of(tmp_path):
    opened, data = laid_out(
        tmp_path, [b"head", ("a", weights((5, 3)), (1, 0), True), ("b", weights((7,)), None, False)]
    )
    return opened, opened.to_metadata()["origin"][0], data


def deflated(raw, n_bytes=None):
    return (len(raw) if n_bytes is None else n_bytes).to_bytes(8, "little") + zlib.compress(raw)


def columns(*rows):
    return deflated(np.array(rows, "<i8").tobytes())


GOOD = ([0, 0], [4, 0], [4 + 1, 0], [0, 0], [0, 0])


def test_the_columns_are_as_documented(tmp_path):
    _, packed, _ = packed_of(tmp_path)
    assert packed["spans"] == zlib_of(columns(*GOOD))
    assert (packed["axes"], packed["skeleton_bytes"], packed["bytes"]) == ([[1, 0]], 4, 92)


def zlib_of(packed):
    return packed[:8] + zlib.compress(zlib.decompress(packed[8:]), 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "expected a map that names a format"),
        ({"name": "../x"}, "expected the name of a file in the same folder, got '../x'"),
        ({"name": "/x"}, "same folder"),
        ({"name": ".."}, "same folder"),
        ({"name": ""}, "same folder"),
        ({"name": None}, "same folder"),
        ({"name": "a\0"}, "same folder"),
        ({"name": "C:x"}, "same folder"),
        ({"bytes": -1}, "-1 is no size of a file"),
        ({"bytes": 1 << 62}, "is no size of a file"),
        ({"bytes": 93}, "spans: they hold 88 bytes, 89 are declared"),
        ({"bytes": 91}, "it ends behind the file"),
        ({"skeleton_bytes": None}, "a skeleton of None bytes"),
        ({"skeleton_bytes": 93}, "a skeleton of 93 bytes in a file of 92"),
        ({"skeleton_bytes": 3}, "they hold 88 bytes, 89 are declared"),
        ({"is_abridged": 1}, "a skeleton of 4 bytes"),
        (
            {"is_abridged": True, "skeleton": deflated(bytes(8) + b"\1\1\1"), "skeleton_bytes": 1000, "bytes": 1088},
            "skeleton: a mark in it stands for no leaf that a header could name",
        ),
        ({"skeleton": "text"}, "skeleton: expected bytes, got str"),
        ({"skeleton": b""}, "expected a packed table"),
        ({"skeleton": deflated(b"heads")}, "a skeleton of 5 bytes, 4 are declared"),
        ({"skeleton": deflated(b"head", 5)}, "declared 5 bytes inflated"),
        ({"skeleton": deflated(b"head")[:-1]}, "declared 4 bytes inflated"),
        ({"spans": 7}, "spans: expected bytes, got int"),
        ({"spans": deflated(bytes(39))}, "39 bytes are no columns"),
        ({"axes": None}, "expected lists of axes"),
        ({"axes": [["x", "y"]]}, "expected lists of axes"),
        ({"axes": [[0, 0]]}, "axes [0, 0] of a leaf with 2 dimensions"),
        ({"axes": []}, "number 0 is of a leaf, or has axes, that the file does not have"),
        ({"spans": columns([2, 0], *GOOD[1:])}, "number 0 is of a leaf"),
        ({"spans": columns([0, -3], *GOOD[1:])}, "number 1 is of a leaf"),
        ({"spans": columns([0, 2**62], *GOOD[1:])}, "number 1 is of a leaf"),
        ({"spans": columns([0, 0], [4, -1], *GOOD[2:])}, "number 1 is of a leaf"),
        ({"spans": columns([0, 0], [4, 2**62], *GOOD[2:])}, "leaf 'b': it ends behind the file"),
        ({"spans": columns(*GOOD[:2], [5, 2], [0, 0], [0, 0])}, "they hold 60 bytes, 88 are declared"),
        ({"spans": columns(*GOOD[:2], [5, 2], [0, 0], [0, 32])}, "bytes 0 to 32 of a leaf of 28"),
        ({"spans": columns(*GOOD[:2], [5, 2], [0, -4], [0, 28])}, "bytes -4 to 24"),
        ({"spans": columns(*GOOD[:2], [7, 0], [0, 0], [4, 0])}, "axes, and not the whole leaf"),
        ({"spans": columns(*GOOD[:2], [-1, 0], *GOOD[3:])}, "has axes"),
    ],
)  # fmt: skip
def test_hostile_origins(tmp_path, change, message):
    opened, packed, data = packed_of(tmp_path)
    tricomp.save(tmp_path / "x.tri", opened.tree)
    with tricomp.open(tmp_path / "x.tri") as file:
        assert b"".join(map(bytes, Origin.from_metadata(packed, file).pieces(file))) == data
        with pytest.raises(CorruptFile) as caught:
            Origin.from_metadata({**packed, **change}, file)
        assert message in str(caught.value)
        assert "x.tri: origin" in str(caught.value)


def test_limits_are_checked_before_inflating(tmp_path):
    opened, packed, _ = packed_of(tmp_path)
    tricomp.save(tmp_path / "x.tri", opened.tree)
    with tricomp.open(tmp_path / "x.tri") as file:
        for change in ({"skeleton_bytes": 1 << 40, "bytes": 1 << 41}, {"spans": deflated(b"", 1 << 40)}):
            with pytest.raises(LimitExceeded, match="max_table_bytes"):
                Origin.from_metadata({**packed, **change}, file)


def test_limits_hold_for_all_origins_together(tmp_path, monkeypatch):
    opened, packed, _ = packed_of(tmp_path)
    tree = {**opened.tree, "none": np.zeros(0)}
    skeletons = {"name": "other", "bytes": 1 << 30, "skeleton_bytes": 1 << 28}
    spans = {"name": "other", "spans": deflated(bytes(40 * ((1 << 20) + 8)))}
    for change, match in ((skeletons, "max_table_bytes"), (spans, "leaves stand in 1048586 pieces")):
        tricomp.save(tmp_path / "x.tri", tree, metadata={"origin": [packed, {**packed, **change}]})
        with tricomp.open(tmp_path / "x.tri") as file, pytest.raises(LimitExceeded, match=match):
            formats.origins(file)
    assert opened.origins()
    monkeypatch.setattr("tricomp.formats.origin._MOST_SPANS", -1)
    with pytest.raises(LimitExceeded, match="pieces"):
        opened.origins()


@pytest.mark.parametrize("origin", [3, {}, [3], [[]], [{}], [{"format": "npz"}]])
def test_what_is_no_origin(tmp_path, origin):
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3)}, metadata={"origin": origin})
    with tricomp.open(tmp_path / "x.tri") as file, pytest.raises(CorruptFile, match="x.tri: origin"):
        formats.origins(file)


def test_two_files_of_one_name(tmp_path):
    opened, packed, _ = packed_of(tmp_path)
    tricomp.save(tmp_path / "x.tri", opened.tree, metadata={"origin": [packed, packed]})
    with tricomp.open(tmp_path / "x.tri") as file, pytest.raises(CorruptFile, match="two files of one name"):
        formats.origins(file)


def test_an_origin_of_other_leaves(tmp_path):
    _, packed, _ = packed_of(tmp_path)
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3), "b": np.arange(2)}, metadata={"origin": [packed]})
    with tricomp.open(tmp_path / "x.tri") as file, pytest.raises(TricompError):
        formats.origins(file)


# headers abridged


def placed(*shapes, begin=0):
    found, at = [], begin
    for i, shape in enumerate(shapes):
        leaf = Leaf(f"n~1{i}", dtypes.by_name("float32"), shape)
        found.append((leaf, at))
        at += leaf.n_bytes
    return found


def whole(entries, begin=b"{", end=b"}", sep=b","):
    text = begin + sep.join(entries) + end
    return len(text).to_bytes(8, "little") + text


def entries_of(leaves):
    return [header.entry(trees.key_of(leaf.path), leaf, at) for leaf, at in leaves]


@pytest.mark.parametrize(
    ("change", "n_marks"),
    [
        (lambda e: whole(e), 5),
        (lambda e: whole(e, b'{"__metadata__":{"a":"},\\""},', b"}    "), 5),
        (lambda e: whole([e[0], e[1].replace(b":", b" :"), *e[2:]]), 4),
        (lambda e: whole([e[0].replace(b":", b" :"), *e[1:]]), 4),
        (lambda e: whole([*e[:4], e[4].replace(b":", b" :")]), 4),
        (lambda e: whole([*e, b'"x":1']), 5),
        (lambda e: whole(e[::-1]), None),
        (lambda e: whole(e, sep=b", "), None),
        (lambda e: whole([]), None),
    ],
)
def test_a_header_is_abridged_as_far_as_it_is_usual(change, n_marks):
    leaves = placed((3,), (0, 2), (), (4, 5), (1,))
    data = change(entries_of(leaves))
    base = len(data)
    moved = [(leaf, at + base) for leaf, at in leaves]
    short = header.abridge(data, moved)
    if short is None:
        assert n_marks is None
        return
    assert header.expand(short, moved, len(data), "x") == data
    assert n_marks is None or short[8:].count(b"\x01") == n_marks


def test_hostile_abridged_headers():
    leaves = placed((3,), (4,))
    for short, n_bytes in (
        (bytes(8) + b"\x01" * 3, 10**6),
        (bytes(8) + b"\x02" * 3, 8),
        (bytes(8) + b"\x01", 9),
        (bytes(8) + b"\x01", 10**6),
        (b"", 4),
        (b"\x01\x02", 8),
    ):
        with pytest.raises(CorruptFile, match="x: "):
            header.expand(short, leaves, n_bytes, "x")
    with pytest.raises(CorruptFile, match="could name: 1048576 marks, 2 spans"):
        header.expand(bytes(8) + b"\x02" * (1 << 20), leaves, 0, "x")
    odd = [(Leaf("a", dtypes.by_name("complex128"), (2,)), 0)]
    with pytest.raises(CorruptFile, match="no leaf that a header could name"):
        header.expand(bytes(8) + b"\x01", odd, 100, "x")
