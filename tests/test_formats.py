"""Files of other formats: read as their own libraries read them, rebuilt byte for byte, and damage told clearly."""

import contextlib
import errno
import io
import json
import os
import struct
import zipfile
import zlib
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

import tricomp
from tests.cases import equal, of_dtype, weights
from tests.format_cases import is_exact, safetensors_of, there_and_back
from tricomp import dtypes, formats
from tricomp.errors import (
    CorruptFile,
    InvalidArgument,
    LimitExceeded,
    MissingFile,
    StorageError,
    TricompError,
    UnsupportedFormat,
)
from tricomp.formats import flax_writer, header

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = b"\x01\x02\x03\x04"


@pytest.fixture
def put(tmp_path):
    """Write a file into the test's folder; returns its path."""

    def write(data, name="x.safetensors"):
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


def check(path):
    """A file comes back byte for byte."""
    with open(path, "rb") as file:
        assert there_and_back(path) == [file.read()]
    assert is_exact(path)


def same(a, b):
    """Trees equal in structure and bits."""
    return tricomp.content_id(a) == tricomp.content_id(b)


def exported(path, format):
    with tricomp.open(path) as file:
        return b"".join(bytes(piece) for piece in formats.exported(format, file))


# safetensors


@pytest.mark.parametrize("code", [*header.BITS, "F8_FUTURE"])
def test_every_dtype_of_safetensors(put, code):
    bits = header.BITS.get(code, 8)
    data = np.random.default_rng(3).integers(0, 2 if code == "BOOL" else 256, 3 * 8 * bits // 8, np.uint8).tobytes()
    path = put(safetensors_of({"a": {"dtype": code, "shape": [3, 8], "data_offsets": [0, len(data)]}}, data))
    with formats.read(path) as opened:
        assert opened.tree["a"].tobytes() == data
        if code in header.DTYPES:
            assert (opened.tree["a"].dtype.name, opened.tree["a"].shape) == (header.DTYPES[code], (3, 8))
        else:
            assert (opened.tree["a"].dtype, opened.tree["a"].shape) == (np.uint8, (len(data),))
    check(path)


def test_bools_that_are_none_survive(put):
    entry = {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}
    path = put(safetensors_of({"a": entry}, b"\x00\x02\x01"))
    with formats.read(path) as opened:
        assert opened.tree["a"].dtype == np.uint8
    check(path)


def entries(*items):
    return "{" + ",".join(items) + "}"


LEGAL = {
    "spaces": ("  " + entries(f'"a" : {ENTRY}') + "\n\t ", FOUR),
    "misaligned": (entries(f'"abc":{ENTRY}'), FOUR),
    "twice": (entries(f'"a":{ENTRY}', f'"a":{ENTRY}'), FOUR),
    "twice, the first is wrong": (entries(f'"a":{ENTRY.replace("[1]", "[7]")}', f'"a":{ENTRY}'), FOUR),
    "twice by escape": (entries(f'"a":{ENTRY}', f'"\\u0061":{ENTRY}'), FOUR),
    "extra field": (entries(f'"a":{ENTRY[:-1]},"x":[1e5,-0,{"9" * 40},{{"y":null}}]}}'), FOUR),
    "list": ('{"a":["F32",[1],[0,4]]}', FOUR),
    "variant": (entries(f'"a":{ENTRY}').replace('"F32"', '{"F32":null}'), FOUR),
    "metadata": (entries('"__metadata__":{"b":"c","a":"\\u00e9é"}', f'"a":{ENTRY}'), FOUR),
    "metadata behind": (entries(f'"a":{ENTRY}', '"__metadata__":{}'), FOUR),
    "metadata null": (entries('"__metadata__":null', f'"a":{ENTRY}'), FOUR),
    "empty name": (entries(f'"":{ENTRY}'), FOUR),
    "odd name": (entries(f'"\\u00e9\\ud83d\\ude00é/~0~\\u0000\\n\x7f":{ENTRY}'), FOUR),
    "escaped words": (entries(f'"a":{ENTRY}').replace("dtype", "dt\\u0079pe"), FOUR),
    "0-d": (entries('"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'), FOUR),
    "order": (entries('"b":{"dtype":"F16","shape":[1],"data_offsets":[4,6]}', f'"a":{ENTRY}'), FOUR + b"56"),
    "fields' order": (entries('"a":{"shape":[1],"data_offsets":[0,4],"dtype":"F32"}'), FOUR),
    "empty": (
        entries(
            *('"{}":{{"dtype":"F32","shape":[{}],"data_offsets":[{}]}}'.format(*item) for item in
              [("z", "0", "0,0"), ("m", "3,0", "4,4"), ("b", "1", "0,4"), ("a", "0,5", "0,0"), ("e", "0", "4,4")])
        ),
        FOUR,
    ),
    "empty and huge": (entries('"a":{"dtype":"F32","shape":[18446744073709551615,0],"data_offsets":[0,0]}'), b""),
    "empty and wide": (entries('"a":{"dtype":"U8","shape":[0,4611686018427387904],"data_offsets":[0,0]}'), b""),
    "70 dimensions": (entries(f'"a":{ENTRY}').replace("[1]", str([1] * 70)), FOUR),
    "nothing": ("{}", b""),
    "deep": (entries(f'"a":{ENTRY[:-1]},"x":{"[" * 100}{"]" * 100}}}'), FOUR),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGAL)
def test_odd_but_legal_headers(put, case):
    data = safetensors_of(*LEGAL[case])
    expected = {name: (bytes(found["data"])) for name, found in deserialize(data)}
    path = put(data)
    with formats.read(path) as opened:
        assert {name: array.tobytes() for name, array in opened.tree.items()} == expected
    check(path)


def replaced(old, new):
    return safetensors_of(entries(f'"a":{ENTRY}').replace(old, new), FOUR)


ILLEGAL = {
    "cut length": (b"\x02\0\0", "expected the 8 bytes of a safetensors header's length, got 3 bytes"),
    "long header": (safetensors_of("{}", b"", 100_000_001), "at most 100000000 bytes, got 100000001"),
    "cut header": (safetensors_of("{}", b"", 60), "expected a header of 60 bytes, got a file of 10"),
    "not UTF-8": (safetensors_of(b'{"\xff":1}'), "expected the header in UTF-8, got 0xff at 2"),
    "surrogate in UTF-8": (safetensors_of(b'{"\xed\xa0\x80":1}'), "UTF-8"),
    "surrogate": (replaced('"a"', '"\\ud83d"'), "expected Unicode in the header"),
    "NUL padding": (safetensors_of(entries(f'"a":{ENTRY}') + "\0", FOUR), "expected the header as JSON"),
    "BOM": (safetensors_of("\ufeff{}"), "expected the header as JSON"),
    "no JSON": (safetensors_of("{'a':1}"), "expected the header as JSON"),
    "empty header": (safetensors_of(""), "expected the header as JSON"),
    "comma": (safetensors_of(entries(f'"a":{ENTRY},'), FOUR), "expected the header as JSON"),
    "NaN": (replaced("[1]", "NaN"), "NaN is no JSON"),
    "overflow": (replaced("[1]", "1e999"), "out of range"),
    "nested too deep": (safetensors_of("[" * 99999), "expected the header as JSON"),
    "list": (safetensors_of("[]"), "expected a map of tensors as header, got list"),
    "null": (safetensors_of('{"a":null}'), "expected a map of dtype, shape and data_offsets, got NoneType"),
    "no shape": (replaced('"shape":[1],', ""), "expected dtype, shape and data_offsets once each"),
    "dtype twice": (replaced('"shape"', '"dtype":"F32","shape"'), "once each, got ['dtype', 'dtype'"),
    "four items": (safetensors_of('{"a":["F32",[1],[0,4],1]}', FOUR), "expected a map of dtype"),
    "no dtype": (replaced('"F32"', "3"), "expected the name of a dtype, got int"),
    "float shape": (replaced("[1]", "[1.0]"), "expected a shape of whole numbers, got [1.0]"),
    "bool shape": (replaced("[1]", "[true]"), "expected a shape of whole numbers"),
    "negative shape": (replaced("[1]", "[-1]"), "expected a shape of whole numbers"),
    "negative zero": (replaced("[0,", "[-0,"), "expected two data_offsets"),
    "one offset": (replaced("[0,4]", "[0]"), "expected two data_offsets, got [0]"),
    "backwards": (replaced("[0,4]", "[0,-4]"), "expected two data_offsets"),
    "hole": (replaced("[0,4]", "[1,4]"), "tensor 'a': expected data at 0, got 1 to 4"),
    "stops before it starts": (replaced("[0,4]", "[4,0]"), "expected data at 0, got 4 to 0"),
    "overlap": (safetensors_of(entries(f'"a":{ENTRY}', f'"b":{ENTRY}'), FOUR), "tensor 'b': expected data at 4"),
    "size": (replaced("[1]", "[2]"), "tensor 'a': expected 8 bytes of F32[2], got 4"),
    "half a byte": (replaced('"F32","shape":[1]', '"F4","shape":[7]'), "F4[7] does not fill its last byte"),
    "overflowing shape": (replaced("[1]", "[18446744073709551615,2,0]"), "overflows"),
    "cut": (safetensors_of(entries(f'"a":{ENTRY}'), b"123"), "expected 66 bytes, got 65: it is cut"),
    "more": (safetensors_of(entries(f'"a":{ENTRY}'), b"12345"), "expected 66 bytes, got 67: something follows"),
    "metadata of numbers": (safetensors_of('{"__metadata__":{"a":1}}'), "expected texts in __metadata__"),
    "metadata twice": (safetensors_of('{"__metadata__":{},"__metadata__":{}}'), "__metadata__ once, got it 2 times"),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_safetensors(put, case):
    data, message = ILLEGAL[case]
    with pytest.raises(SafetensorError):
        deserialize(data)
    with pytest.raises(InvalidArgument) as caught:
        formats.read(put(data))
    assert "x.safetensors: " in str(caught.value)
    assert message in str(caught.value)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5).filter(lambda name: name != "__metadata__")


@st.composite
def safetensors_files(draw):
    """Any legal file: names, dtypes, shapes, orders, spaces and metadata at random."""
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    found, at = [], 0
    for name in draw(st.permutations(names)):
        code = draw(st.sampled_from(list(header.BITS)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), 8 if header.BITS[code] < 8 else 1]
        n_bytes = int(np.prod(shape)) * header.BITS[code] // 8
        found.append((name, {"dtype": code, "shape": shape, "data_offsets": [at, at + n_bytes]}))
        at += n_bytes
    if draw(st.booleans()):
        found.append(("__metadata__", draw(st.dictionaries(NAMES, NAMES, max_size=2))))
    indent, is_ascii = draw(st.sampled_from([None, 1])), draw(st.booleans())
    text = json.dumps(dict(draw(st.permutations(found))), indent=indent, ensure_ascii=is_ascii)
    return safetensors_of(text + " " * draw(st.integers(0, 9)), draw(st.binary(min_size=at, max_size=at)))


@given(safetensors_files())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_legal_safetensors_file(put, data):
    expected = {name: bytes(found["data"]) for name, found in deserialize(data)}
    path = put(data)
    with formats.read(path) as opened:
        assert {name: array.tobytes() for name, array in opened.tree.items()} == expected
    check(path)


def tensors():
    """Arrays of the dtypes that safetensors writes from numpy, odd names among them."""
    found: dict[str, Any] = {
        f"layer.{i}/{name}": of_dtype(name, (7, i)) for i, name in enumerate(header.DTYPES.values())
    }
    found |= {
        "": np.arange(2, dtype="f4"),
        "~é\n": weights((33, 65)),
        "0-d": np.array(3.5),
        "empty": np.zeros((0, 3), "f2"),
    }
    return found


def written_by_the_library(found, metadata=None):
    """What safetensors itself writes; its numpy module takes ml_dtypes by name."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in found.items()}, metadata)


def test_a_file_of_the_library_comes_back_and_is_written_alike(put):
    data = written_by_the_library(tensors(), {"format": "pt"})
    path = put(data)
    check(path)
    assert exported(f"{path}.tri", "safetensors") == data


def test_export_to_safetensors(tmp_path):
    tree: Any = {"model": {"w/1": weights((5, 7)), "ids": [np.arange(3), np.zeros((2, 0), bool)]}}
    tricomp.save(tmp_path / "x.tri", tree, metadata={"run": "a", "n": 3})
    data = exported(tmp_path / "x.tri", "safetensors")
    found = safetensors.numpy.load(data)
    assert list(found) == sorted(found, key=list(found).index)
    assert equal(found["model/w~11"], tree["model"]["w/1"])
    assert equal(found["model/ids/0"], tree["model"]["ids"][0])
    assert found["model/ids/1"].shape == (2, 0)
    (tmp_path / "x.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"run": "a"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": np.zeros(3, ml_dtypes.float8_e3m4)}}, "leaf 'a/b': safetensors has no float8_e3m4"),
        ({"a": np.zeros(3), "step": 7}, "node 'step': safetensors holds arrays only, and this is of type int. Export"),
        ({"a": [np.zeros(3), None]}, "node 'a/1': safetensors holds arrays only"),
        ({"__metadata__": np.zeros(3)}, "leaf '__metadata__': safetensors keeps that name"),
    ],
)
def test_what_safetensors_cannot_hold(tmp_path, tree, message):
    tricomp.save(tmp_path / "x.tri", tree)
    with pytest.raises(InvalidArgument) as caught:
        exported(tmp_path / "x.tri", "safetensors")
    assert message in str(caught.value)


# shards


def shards(folder, weight_map=None, extra=None):
    found = {"a.safetensors": {"x": weights((9, 5)), "y": np.arange(7)}, "b.safetensors": {"z": weights((3,))}}
    found["b.safetensors"] |= extra or {}
    for name, tree in found.items():
        (folder / name).write_bytes(safetensors.numpy.save(tree, {"format": "pt", "shard": name}))
    placed = {name: shard for shard, tree in found.items() for name in tree} if weight_map is None else weight_map
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}, indent=2))
    return str(index), found


def test_a_sharded_model(tmp_path):
    index, found = shards(tmp_path)
    with formats.read(index) as opened:
        assert list(opened.tree) == ["y", "x", "z"]  # shard by shard, as their data stands
        assert opened.metadata == {"safetensors": {"format": "pt"}}
        assert opened.n_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
        names = [origin.name for origin in opened.origins()]
    assert names == ["model.safetensors.index.json", "a.safetensors", "b.safetensors"]
    assert there_and_back(index) == [(tmp_path / name).read_bytes() for name in names]
    a = found["a.safetensors"]
    assert same(tricomp.load(f"{index}.tri"), {"y": a["y"], "x": a["x"], **found["b.safetensors"]})


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "..", "", ".", "b/a.safetensors", "b\\a", "\0", 3]
)
def test_shards_outside_the_folder(tmp_path, shard):
    index, _ = shards(tmp_path, {"x": shard})
    with pytest.raises(InvalidArgument, match="tensor 'x': expected the name of a shard in the same folder, got"):
        formats.read(index)


def test_an_index_of_a_variant(tmp_path):
    index, _ = shards(tmp_path)
    os.rename(index, tmp_path / "model.safetensors.index.fp16.json")
    with formats.read(str(tmp_path / "model.safetensors.index.fp16.json")) as opened:
        assert sorted(opened.tree) == ["x", "y", "z"]


def test_a_shard_is_missing(tmp_path):
    index, _ = shards(tmp_path)
    os.unlink(tmp_path / "b.safetensors")
    with pytest.raises(MissingFile, match="its shard 'b.safetensors' is not there"):
        formats.read(index)


def test_a_shard_lacks_a_tensor(tmp_path):
    index, _ = shards(tmp_path, {"x": "a.safetensors", "w": "a.safetensors"})
    with pytest.raises(InvalidArgument, match="tensor 'w': expected it in the shard a.safetensors"):
        formats.read(index)


def test_a_tensor_is_in_two_shards(tmp_path):
    index, _ = shards(tmp_path, extra={"x": np.arange(2)})
    with pytest.raises(InvalidArgument, match="tensor 'x': expected it in one shard, got it in a.safetensors and b"):
        formats.read(index)


@pytest.mark.parametrize("text", ["{}", '{"weight_map":[]}', "{", '{"weight_map":{"a":{}}}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidArgument, match="m.safetensors.index.json: "):
        formats.read(str(tmp_path / "m.safetensors.index.json"))


# npy and npz


def npy(array, version=None):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), version)
    return out.getvalue()


ARRAYS = {
    "c": weights((5, 7)),
    "fortran": np.asfortranarray(weights((5, 7, 3))),
    "fortran vector": np.asfortranarray(weights((9,))),
    "fortran row": np.asfortranarray(weights((1, 9))),
    "big": weights((5, 7)).astype(">f4"),
    "big complex": (weights((5,)) * 1j + 2).astype(">c16"),
    "big fortran": np.asfortranarray(weights((6, 5)).astype(">f8")),
    "bool": weights((11,)) > 0,
    "not bool": np.arange(3, dtype=np.uint8).view(bool),
    "0-d": np.array(2.5),
    "empty": np.zeros((0, 3), np.int16),
    "bfloat16": weights((4, 4)).astype(ml_dtypes.bfloat16),
    "float8": weights((4, 4)).astype(ml_dtypes.float8_e4m3fn),
    "other float8": weights((4, 4)).astype(ml_dtypes.float8_e5m2),
    "half": weights((3,)).astype(np.float16),
    "text": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b"bcd"]),
    "no bytes": np.array(["", ""]),
    "dates": np.array(["2026-11-22"], "M8[s]"),
    "records": np.array([(1, 2.5)], [("a", "i4"), ("é", ">f8", (2,))]),
    "long double": np.array([1.5, 2.5], np.longdouble),
    "raw": np.array([b"abc"], "V3"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_npy(put, name):
    array = ARRAYS[name]
    path = put(npy(array), "x.npy")
    with formats.read(path) as opened:
        if name in ("text", "bytes", "no bytes", "dates", "records", "long double", "raw", "float8", "not bool"):
            assert (opened.tree.dtype, opened.tree.ndim) == (np.uint8, 1)
        else:
            assert same(opened.tree, array)
        assert opened.tree.tobytes("A") == array.tobytes("A")
    check(path)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_versions(put, version):
    check(put(npy(weights((33, 5)), version), "x.npy"))


def test_npy_with_something_behind_it(put):
    check(put(npy(weights((33, 5))) + b"rest", "x.npy"))


def test_npy_of_python_2(put):
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 1L), }\n"
    path = put(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(12), "x.npy")
    with formats.read(path) as opened:
        assert opened.tree.shape == (3, 1)
    check(path)


def text_npy(text):
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x93NUMPY\4\0", "expected an npy header of version 1 to 3"),
        (b"\x93NUMPY\1\0\xff\xff", "expected an npy header of at most"),
        (text_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}") + b"1234", "expected 12 bytes of float32"),
        (text_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"), "the shape is (-3,)"),
        (text_npy("{'descr': '<f4', 'fortran_order': 1, 'shape': (3,)}"), "the order is 1"),
        (text_npy("{'descr': '<f4', 'shape': (3,)}"), "expected a dict of descr"),
        (text_npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': ()}"), "its npy header is damaged"),
        (text_npy("{'descr': 1, 'fortran_order': False, 'shape': ()}"), "its npy header is damaged"),
        (text_npy("(" * 5000), "its npy header is damaged"),
        (text_npy("__import__('os').abort()"), "its npy header is damaged"),
        (text_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}" % ("1," * 65)) + FOUR, "shape that numpy"),
    ],
)
def test_damaged_npy(put, data, message):
    with pytest.raises(InvalidArgument) as caught:
        formats.read(put(data, "x.npy"))
    assert message in str(caught.value)
    assert "x.npy: " in str(caught.value)


def test_pickles_are_refused(put, tmp_path):
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}]))
    with pytest.raises(InvalidArgument, match=r"x.npy: it is an array of Python objects, that is a pickle"):
        formats.read(put(out.getvalue(), "x.npy"))
    np.savez(tmp_path / "y.npz", a=np.arange(3), bad=np.array([None]))
    with pytest.raises(InvalidArgument, match=r"y.npz: 'bad.npy': it is an array of Python objects"):
        formats.read(str(tmp_path / "y.npz"))


def test_npz(tmp_path):
    path = str(tmp_path / "x.npz")
    arrays: dict[str, Any] = {name.replace(" ", "/"): array for name, array in ARRAYS.items()}
    np.savez(path, **arrays)
    with formats.read(path) as opened, np.load(path) as loaded:
        assert list(opened.tree) == loaded.files
        assert equal(opened.tree["c"], ARRAYS["c"])
    check(path)


def test_npz_with_other_members(tmp_path):
    path = str(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(np.arange(5)))
        archive.writestr("no suffix", npy(np.arange(3)))
        archive.writestr("notes.txt", b"hello")
        archive.writestr("folder/", b"")
    with formats.read(path) as opened, np.load(path) as loaded:
        assert list(opened.tree) == loaded.files == ["a", "no suffix", "notes.txt", "folder/"]
        assert equal(opened.tree["no suffix"], np.arange(3))
        assert opened.tree["notes.txt"].tobytes() == loaded["notes.txt"] == b"hello"
    check(path)


def test_an_empty_npz(tmp_path):
    np.savez(tmp_path / "x.npz")
    check(str(tmp_path / "x.npz"))


def test_zip64(tmp_path):
    path = str(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w", force_zip64=True) as member:
        member.write(npy(weights((40, 3))))
    check(path)


def test_a_zip_behind_something_else(tmp_path):
    out = io.BytesIO()
    np.savez(out, a=weights((9,)))
    (tmp_path / "x.npz").write_bytes(b"#!/bin/sh\n" + out.getvalue())
    check(str(tmp_path / "x.npz"))


def test_a_compressed_npz_comes_back_equal(tmp_path):
    path = str(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in ARRAYS.items():
            archive.writestr(f"{name}.npy", npy(array))
        archive.writestr("notes.txt", b"hello", zipfile.ZIP_STORED)
    assert not is_exact(path)
    (back,) = there_and_back(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(io.BytesIO(back)) as new:
        assert [info.filename for info in old.infolist()] == [info.filename for info in new.infolist()]
        assert all(old.read(name) == new.read(name) for name in old.namelist())
        assert new.getinfo("c.npy").compress_type == zipfile.ZIP_DEFLATED
        assert new.getinfo("notes.txt").compress_type == zipfile.ZIP_STORED


def hostile(method=zipfile.ZIP_STORED, old=b"", new=b""):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("a.npy", npy(np.zeros(5000)))
        archive.writestr("b.npy", npy(np.zeros(5000)))
    assert old in out.getvalue()
    return out.getvalue().replace(old, new)


def test_hostile_zips(put):
    n_bytes = len(npy(np.zeros(5000)))
    size = struct.pack("<L", n_bytes)
    cases = {
        "expected each name once": hostile(old=b"b.npy", new=b"a.npy"),
        "cannot hold the 4294967040 declared": hostile(
            method=zipfile.ZIP_DEFLATED, old=size, new=struct.pack("<L", (1 << 32) - 256)
        ),
        "bytes of its own": hostile(old=size + size, new=size + struct.pack("<L", n_bytes - 1)),
        "expected a zip": hostile()[:-30],
        "expected it stored or deflated, got method 14": hostile(method=zipfile.ZIP_LZMA),
        "expected its header at": _without_second_header(),
    }
    for message, data in cases.items():
        with pytest.raises(InvalidArgument) as caught:
            formats.read(put(data, "x.npz"))
        assert message in str(caught.value)


def _without_second_header():
    data = hostile()
    at = data.rindex(b"PK\3\4")
    return data[:at] + b"PK\3\5" + data[at + 4 :]


def test_members_that_share_their_deflated_bytes_are_refused(put):
    body = zlib.compress(bytes(1 << 20), 9)[2:-4]
    fields = struct.pack("<5HLLL", 20, 0, 8, 0, 0x21, zlib.crc32(bytes(1 << 20)), len(body), 1 << 20)
    # The header of a lies, as an extra field, before that of b: both names begin the same bytes.
    local = b"".join(
        b"PK\3\4" + fields + struct.pack("<2H", 1, extra) + name for name, extra in ((b"a", 31), (b"b", 0))
    )
    central = b"".join(
        b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<5HLL", 1, 0, 0, 0, 0, 0, 31 * i) + name
        for i, name in enumerate((b"a", b"b"))
    )
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 2, 2, len(central), len(local + body), 0)
    with pytest.raises(InvalidArgument, match="'b': expected [0-9]+ bytes of its own"):
        formats.read(put(local + body + central + end, "x.npz"))


def test_a_name_that_no_zip_could_take_back_is_refused(put):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("n" * 60_005, npy(np.zeros(3)))
    with pytest.raises(InvalidArgument, match="expected names of at most 60000 bytes"):
        formats.read(put(out.getvalue(), "x.npz"))


def test_hostile_names_of_members(put, tmp_path):
    out = io.BytesIO()
    np.savez_compressed(out, a=np.zeros(3))
    with formats.read(put(out.getvalue(), "x.npz")) as opened:
        metadata = opened.to_metadata()
        members = zlib.compress(msgpack.packb([["n" * 70_000, metadata["npz"]["contents"]["bytes"], True]]))
        metadata["npz"] = {**metadata["npz"], "members": members}
        tricomp.save(tmp_path / "x.tri", opened.tree, metadata=metadata)
    with tricomp.open(tmp_path / "x.tri") as file, pytest.raises(CorruptFile, match="cannot hold the name"):
        list(formats.restored(file, formats.origins(file)[0]))


def test_a_zip_bomb_stops_at_the_limit(put, monkeypatch):
    monkeypatch.setattr("tricomp.bounds.DEFAULTS", tricomp.Limits(max_decoded_bytes=50_000))
    with pytest.raises(LimitExceeded, match="max_decoded_bytes = 50000"):
        formats.read(put(hostile(method=zipfile.ZIP_DEFLATED), "x.npz"))


def test_no_room_to_inflate(put, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "full")

    path = put(hostile(method=zipfile.ZIP_DEFLATED), "x.npz")
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(StorageError, match=r"cannot hold what is inflated of .*x.npz: No space.* set TMPDIR to"):
        formats.read(path)


def test_export_to_npz(tmp_path):
    tree: Any = {"model": {"w": weights((5, 7)), "b": [weights((4,)).astype(ml_dtypes.bfloat16), np.array(True)]}}
    tree["model"]["f"] = weights((4,)).astype(ml_dtypes.float8_e5m2)
    tricomp.save(tmp_path / "x.tri", tree)
    with tricomp.open(tmp_path / "x.tri") as file:
        assert formats.write("npz", file, str(tmp_path / "x.npz")) == os.path.getsize(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as found:
        assert found.files == ["model/w", "model/b/0", "model/b/1", "model/f"]
        assert equal(found["model/w"], tree["model"]["w"])
        assert found["model/b/0"].view(ml_dtypes.bfloat16).tobytes() == tree["model"]["b"][0].tobytes()
        assert found["model/f"].tobytes() == tree["model"]["f"].tobytes()
        assert found["model/b/1"][()]
    check(str(tmp_path / "x.npz"))
    with formats.read(str(tmp_path / "x.npz")) as opened:
        assert opened.tree["model/b/0"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("notes", [3, "a", {"contents": 1}, None])
def test_metadata_of_those_names_may_be_anything(tmp_path, notes):
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3)}, metadata={"npz": notes, "safetensors": notes})
    assert np.load(io.BytesIO(exported(tmp_path / "x.tri", "npz")))["a"].tolist() == [0, 1, 2]
    assert list(safetensors.numpy.load(exported(tmp_path / "x.tri", "safetensors"))) == ["a"]


@pytest.mark.parametrize(
    "members", [3, b"", zlib.compress(b"\x90"), zlib.compress(b"\x91\x01"), zlib.compress(b"\xc1")]
)
def test_hostile_notes_of_an_npz(tmp_path, members):
    path = str(tmp_path / "x.npz")
    np.savez_compressed(path, a=np.arange(3))
    with formats.read(path) as opened:
        notes = opened.metadata["npz"]
        contents = notes["contents"]
        changes = [{**notes, "members": members}, {**notes, "contents": {**contents, "bytes": 9}}]
        changes.append({**notes, "contents": {key: contents[key] for key in ("format", "name", "bytes")}})
        for change in changes:
            tricomp.save(f"{path}.tri", opened.tree, metadata={"npz": change})
            with pytest.raises(CorruptFile, match="x.npz.tri: "):
                exported(f"{path}.tri", "npz")


def test_export_to_npy(tmp_path):
    tricomp.save(tmp_path / "x.tri", weights((5, 7)))
    assert equal(np.load(io.BytesIO(exported(tmp_path / "x.tri", "npy"))), weights((5, 7)))
    tricomp.save(tmp_path / "y.tri", {"a": np.zeros(2), "b": np.zeros(2)})
    with pytest.raises(InvalidArgument, match="npy holds one array, this tree has 2. Export to npz"):
        exported(tmp_path / "y.tri", "npy")


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype_exports_to_npy(tmp_path, name):
    array = of_dtype(name, (5, 3))
    tricomp.save(tmp_path / "x.tri", array)
    found = np.load(io.BytesIO(exported(tmp_path / "x.tri", "npy")))
    assert (found.shape, found.tobytes()) == ((5, 3), array.tobytes())


# flax


def flax_tree():
    leaves = {name: of_dtype(name, (3, 5)) for name in dtypes.NAMES}
    plain = {"i": -7, "big": 2**64 - 1, "f": 0.1, "t": "é", "b": b"\0\xff", "n": None, "yes": True, "l": [1, [], {}]}
    long = {"k" * n: "v" * n for n in (31, 32, 255, 256, 70000)}
    return {
        "params": {"a/b~": leaves, "0": np.arange(70000), "empty": np.zeros((0, 3)), "0-d": np.array(1.5)},
        "opt": [np.float32(2.5), weights((129,)), {"z": 1 + 2j}],
        "plain": plain,
        "long": long,
        "many": {str(i): i * 40 for i in range(70)},
    }


def test_flax(put):
    flax = pytest.importorskip("flax.serialization")
    data = flax.msgpack_serialize(flax_tree())
    path = put(data, "checkpoint_100")
    with formats.read(path) as opened:
        assert opened.format == "flax"
        assert same(opened.tree, with_arrays(flax.msgpack_restore(data)))
    check(path)


def with_arrays(tree):
    """Numpy scalars and complex numbers as 0-d arrays."""
    if isinstance(tree, dict):
        return {key: with_arrays(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_arrays(value) for value in tree]
    return np.asarray(tree) if isinstance(tree, np.generic | complex) else tree


def test_flax_writes_what_flax_writes(tmp_path):
    flax = pytest.importorskip("flax.serialization")
    tree = with_arrays(flax_tree())
    tricomp.save(tmp_path / "x.tri", tree)
    assert exported(tmp_path / "x.tri", "flax") == flax.to_bytes(tree)


def test_flax_in_chunks(put, tmp_path, monkeypatch):
    flax = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(flax, "MAX_CHUNK_SIZE", 1000)
    monkeypatch.setattr(flax_writer, "MAX_CHUNK_BYTES", 1000)
    tree = {"a": {"b": weights((3,)), "w": weights((33, 65))}, "c": of_dtype("complex64", (50, 7))}
    data = flax.msgpack_serialize(tree)
    assert b"__msgpack_chunked_array__" in data
    path = put(data, "x.msgpack")
    with formats.read(path) as opened:
        assert same(opened.tree, tree)
        assert len(opened.spans or ()) > 3
    check(path)
    assert exported(f"{path}.tri", "flax") == data


def test_a_bare_array_and_an_empty_tree(put):
    flax = pytest.importorskip("flax.serialization")
    trees: list[Any] = [weights((5,)), {}, [weights((2,))]]
    for tree in trees:
        check(put(flax.msgpack_serialize(tree), "x.msgpack"))


def nested(n, inner):
    for _ in range(n):
        inner = b"\x91" + inner
    return inner


def array_of(payload, code=1):
    return msgpack.packb({"a": msgpack.ExtType(code, payload)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x81\xa1a", "1 bytes are declared and 0 are left: it is cut"),
        (b"\x81\xa1a\x01\x02", "1 bytes follow the msgpack object"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "4294967295 items are declared"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "4294967295 items are declared and 0 bytes are left"),
        (b"\x81\xa1a\xc1", "the byte 0xc1 begins nothing"),
        (b"\x81\xa1\xff\x01", "a text is not UTF-8"),
        (b"\x81\xc3\x01", "a key is a bool"),
        (b"\x81\x91\x01\x01", "a key is a list"),
        (array_of(b"abc", 5), "extension 5 is unknown to Flax"),
        (b"\x81\xa1a\xd6\xff\0\0\0\0", "extension -1 is unknown"),
        (array_of(msgpack.packb([[2], "float32", b"1234"])), "expected 8 bytes of float32[2], got 4"),
        (array_of(msgpack.packb([[1], "float32", b"1234"]) + b"x"), "1 bytes follow what extension 1 holds"),
        (array_of(msgpack.packb([[1], "float32", b"1234"])[:-1]), "it is cut"),
        (array_of(msgpack.packb([[1], "float32"])), "an array is not (shape, dtype, bytes)"),
        (array_of(msgpack.packb([1, "float32", b"1234"])), "an array has no shape"),
        (array_of(msgpack.packb([[-1], "float32", b"1234"])), "an array has a shape that is none"),
        (array_of(msgpack.packb([[1], 3, b"1234"])), "an array has no dtype"),
        (array_of(msgpack.packb([[1], "float32", [1]])), "an array has no bytes"),
        (array_of(b"\x92\x01\xa1a", 2), "a complex number is damaged"),
        (array_of(bytes(30), 2), "a complex number is not two numbers"),
        (msgpack.packb({"__msgpack_chunked_array__": True}), "an array in chunks"),
        (msgpack.packb({"__msgpack_chunked_array__": True, "shape": {}, "chunks": {"0": 1}}), "an array in chunks"),
    ],
)
def test_damaged_flax(put, data, message):
    with pytest.raises(InvalidArgument) as caught:
        formats.read(put(data, "x.msgpack"))
    assert message in str(caught.value)
    assert "x.msgpack: " in str(caught.value)


def test_flax_too_deep(put):
    with pytest.raises(LimitExceeded, match="depth"):
        formats.read(put(nested(100_000, b"\x01"), "x.msgpack"))


def test_a_flax_dtype_that_numpy_lacks_is_bytes(put):
    for name, data in (("int4", b"123"), ("str96", b"123456789012"), ("bool", b"\1\2\3")):
        path = put(msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[3], name, data]))}), "x.msgpack")
        with formats.read(path) as opened:
            assert (opened.tree["a"].dtype, opened.tree["a"].tobytes()) == (np.uint8, data)
        check(path)


def test_what_flax_cannot_hold(tmp_path):
    tricomp.save(tmp_path / "x.tri", {"a": {"b": (np.zeros(3), 2**64)}})
    with pytest.raises(
        InvalidArgument, match="node '1' in node 'b' in node 'a' in the tree itself: flax files hold di"
    ):
        exported(tmp_path / "x.tri", "flax")


# all of them


def test_what_is_of_no_format(put, tmp_path):
    for data, message in ((b"", "It is empty"), (b"hello world, this is a text\n", "Convert it to one of them first")):
        with pytest.raises(UnsupportedFormat) as caught:
            formats.read(put(data, "x.txt"))
        assert "x.txt: expected a file of tensors (" in str(caught.value)
        assert message in str(caught.value)
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3)})
    with pytest.raises(UnsupportedFormat, match="is a .tri file already"):
        formats.read(str(tmp_path / "x.tri"))
    with pytest.raises(MissingFile):
        formats.read(str(tmp_path / "nothing.npz"))
    with (
        tricomp.open(tmp_path / "x.tri") as file,
        pytest.raises(UnsupportedFormat, match="'gif': expected one of flax"),
    ):
        formats.exported("gif", file)


def test_content_tells_the_format_and_not_the_name(put):
    assert formats.read(put(npy(np.arange(3)), "x.safetensors")).format == "npy"
    assert formats.read(put(safetensors.numpy.save({"a": np.arange(3)}), "x.npz")).format == "safetensors"
    assert {"flax", "npy", "npz", "safetensors"} <= set(formats.names())


class _Adapter:
    """A format that an adapter brings."""

    name = "gif"
    suffixes = (".gif",)

    def matches(self, head, path):
        return head.startswith(b"GIF")

    def read(self, path):
        return f"read {path}"

    def pieces(self, file):
        return iter([b"GIF", file.name.encode()])


class _EntryPoint:
    def __init__(self, name, load):
        self.name, self.load = name, load


def test_formats_of_adapters(put, tmp_path, monkeypatch):
    def broken():
        raise ImportError("No module named 'frames'")

    found = [_EntryPoint("other", broken), _EntryPoint("gif", _Adapter)]
    monkeypatch.setattr(
        "tricomp.formats._entry_points", lambda group="tricomp.formats": found if "form" in group else []
    )
    path = put(b"GIF89a", "picture")
    assert str(formats.read(path)) == f"read {path}"
    assert formats.names() == ("flax", "gif", "npy", "npz", "other", "safetensors")
    assert str(formats.read(put(b"not a gif", "x.gif"))) == f"read {tmp_path / 'x.gif'}"  # which will say what is wrong
    with pytest.raises(UnsupportedFormat, match=r"missing: No module named 'frames'\). Install it, or convert"):
        formats.read(put(b"PNG", "x.png"))
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3)})
    with tricomp.open(tmp_path / "x.tri") as file:
        assert b"".join(formats.exported("gif", file)) == b"GIF" + file.name.encode()
        with pytest.raises(UnsupportedFormat, match="'other': expected one of .*[.] The format 'other' needs a"):
            formats.exported("other", file)


def test_formats_that_need_no_adapter_load_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tricomp.formats._adapters", lambda _: pytest.fail("torch would be imported"))
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3)})
    for format in ("safetensors", "npz", "flax"):
        assert exported(tmp_path / "x.tri", format)


def test_write_to_a_stream_and_to_a_path(tmp_path):
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(3)})
    out = io.BytesIO()
    with tricomp.open(tmp_path / "x.tri") as file:
        assert formats.write("safetensors", file, out) == len(out.getvalue())
        formats.write("safetensors", file, tmp_path / "y")
        assert equal(formats.read(tmp_path / "y").tree, {"a": np.arange(3)})
        tricomp.save(tmp_path / "z.tri", {"a": np.arange(3), "step": 1})
        with tricomp.open(tmp_path / "z.tri") as other, pytest.raises(InvalidArgument):
            formats.write("safetensors", other, str(tmp_path / "y"))
    assert (tmp_path / "y").read_bytes() == out.getvalue()


SMALL = {
    "x.safetensors": lambda: safetensors.numpy.save({"a": weights((3,)), "b": np.arange(2)}, {"k": "v"}),
    "x.npy": lambda: npy(np.asfortranarray(weights((2, 3)))),
    "x.npz": lambda: _npz(np.savez),
    "y.npz": lambda: _npz(np.savez_compressed),
    "x.msgpack": lambda: msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[3], "int8", b"123"])), "b": [1, None]}),
}


def _npz(save):
    out = io.BytesIO()
    save(out, a=np.arange(3), b=weights((2,)))
    return out.getvalue()


def gives_an_error_or_itself(path, data):
    try:
        opened = formats.read(path)
    except TricompError:
        return
    with opened:
        if is_exact(path):
            with contextlib.suppress(TricompError):  # such as a name twice, that a tree cannot have
                assert there_and_back(path) == [data]


@pytest.mark.parametrize("name", SMALL)
def test_cut_anywhere(put, name):
    data = SMALL[name]()
    for n_bytes in range(len(data)):
        path = put(data[:n_bytes], name)
        try:
            formats.read(path).close()
        except TricompError:
            continue
        assert there_and_back(path) == [data[:n_bytes]]


@pytest.mark.parametrize("name", SMALL)
def test_bits_flipped_anywhere(put, name):
    data = SMALL[name]()
    rng = np.random.default_rng(1)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        gives_an_error_or_itself(put(bytes(damaged), name), bytes(damaged))
