"""Trees: what comes back is what went in, to the bit and the type; anything else is refused by name."""

import enum
import math
import struct
from collections import OrderedDict, namedtuple
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricomp import tree
from tricomp.bounds import LEAF, NAMED_TUPLE, REGISTERED, TUPLE, Limits
from tricomp.errors import CorruptFile, InvalidArgument, LimitExceeded, UnsupportedNode

Point = namedtuple("Point", "x y")


class Adam(NamedTuple):
    n: int
    mu: object
    nu: object


def same(a, b):
    """Equal in type, order and bits."""
    if hasattr(a, "_fields"):
        named = type(a).__name__ == type(b).__name__ and getattr(b, "_fields", ()) == a._fields
        return named and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(same(p, q) and same(v, w) for (p, v), (q, w) in pairs)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return a == b


def round_trip(value):
    structure, _, leaves = tree.flatten(value)
    return tree.unflatten(structure, leaves)


def test_every_kind_of_node_comes_back():
    value: dict[object, Any] = {
        "model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, ml_dtypes.bfloat16)},
        "opt": {0: {"step": 3, "m": np.float32(1.5)}, 7: (1, [], (), {}, None, True, False)},
        "adam": Adam(1, [np.array(2)], Point(np.array([True]), None)),
        "floats": [0.0, -0.0, math.inf, -math.inf, 5e-324, struct.unpack("<d", b"\1\0\0\0\0\0\xf4\x7f")[0]],
        "ints": [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**400, -(10**400), -(2**64)],
        "text": ["", "ü\0/~", b"", b"\0\xff"],
        "ordered": OrderedDict(b=1, a=np.array([1])),
        -5: "negative key",
    }
    back = round_trip(value)
    value["opt"][0]["m"] = np.array(1.5, np.float32)  # numpy scalars come back as 0-d arrays
    assert same(back, value)


def test_leaves_share_the_memory_of_the_tree():
    array = np.arange(3)
    _, _, leaves = tree.flatten([array])
    assert leaves[0] is array


def test_paths_are_keys_joined_and_escaped():
    leaf = np.array(1)
    value = {"a/b": {"~": leaf}, "l": [leaf, (leaf, leaf)], 3: leaf, "p": Point(leaf, 1), "": {"": leaf}}
    structure, paths, _ = tree.flatten(value)
    assert paths == ("a~1b/~0", "l/0", "l/1/0", "l/1/1", "3", "p/x", "/")
    assert tree.paths_of(structure) == paths
    assert tree.flatten(leaf)[1] == ("",)


def test_a_structure_is_plain_msgpack_with_marks():
    structure, _, _ = tree.flatten({"a": np.array(1), "t": (1,), "p": Point(1, 2), "o": OrderedDict()})
    mark = {code: msgpack.ExtType(code, b"") for code in (LEAF, TUPLE, NAMED_TUPLE, REGISTERED)}
    assert msgpack.unpackb(structure) == {
        "a": mark[LEAF],
        "t": [mark[TUPLE], 1],
        "p": [mark[NAMED_TUPLE], "Point", ["x", "y"], 1, 2],
        "o": [mark[REGISTERED], "OrderedDict", {}],
    }


keys = st.text(max_size=4) | st.integers(-(2**63), 2**64 - 1)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
arrays = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float32", "bool", "int64", ml_dtypes.bfloat16]),
)
trees = st.recursive(
    plain | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.builds(Point, inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=25,
)


@given(trees)
def test_any_tree_comes_back(value):
    structure, paths, leaves = tree.flatten(value)
    assert same(tree.unflatten(structure, leaves), value)
    assert tree.paths_of(structure) == paths
    assert len(paths) == len(leaves)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": {"b": [0, {1, 2}]}}, "node 'a/b/1': builtins.set cannot be stored"),
        ({"a": object}, "node 'a': builtins.type cannot be stored"),
        ({"c": Colour.RED}, "node 'c': .*Colour cannot be stored"),
        ({"c": np.ma.masked_array([1], [True])}, "node 'c': numpy.*MaskedArray cannot be stored"),
        ({"c": bytearray(b"x")}, "node 'c': builtins.bytearray cannot be stored"),
        ({"c": 1j}, "node 'c': builtins.complex cannot be stored"),
        (range(3), "the tree itself: builtins.range cannot be stored"),
        ({"a": {True: 1}}, "node 'a': the dict key True .bool. cannot be stored. Use str or 64-bit int keys"),
        ({None: 1}, "the tree itself: the dict key None"),
        ({2**64: 1}, "the dict key 18446744073709551616 .int. cannot be stored"),
        ({(1, 2): 1}, "the dict key"),
        ({"a": "\ud800"}, "node 'a': the text .* is not valid Unicode. Store it as bytes"),
        ({"\ud800": 1}, "is not valid Unicode"),
    ],
)
def test_what_cannot_be_stored_is_named(value, text):
    with pytest.raises(UnsupportedNode, match=text):
        tree.flatten(value)


def test_torch_tensors_are_sent_to_their_adapter():
    torch = pytest.importorskip("torch")
    with pytest.raises(UnsupportedNode, match="node 'w': torch.Tensor cannot be stored. Use tricomp_torch.save"):
        tree.flatten({"w": torch.zeros(1)})


def test_a_tree_that_holds_itself_is_too_deep():
    value: list[object] = []
    value.append(value)
    with pytest.raises(LimitExceeded, match="exceeds the limit max_depth = 128"):
        tree.flatten(value)


class Registered:
    def __init__(self, fields):
        self.fields = fields


def test_registered_types_come_back_and_their_leaves_have_plain_paths():
    tree.register_node(Registered, "test.Registered", lambda node: node.fields, Registered)
    try:
        structure, paths, leaves = tree.flatten({"s": Registered({"w": np.array([1])})})
        assert paths == ("s/w",)
        back = tree.unflatten(structure, leaves)["s"]
        assert type(back) is Registered
        assert back.fields["w"] is leaves[0]
        with pytest.raises(InvalidArgument, match="registered already"):
            tree.register_node(Registered, "other", lambda node: node.fields, Registered)
    finally:
        del tree._by_type[Registered], tree._by_name["test.Registered"]
    assert tree.paths_of(structure) == ("s/w",)
    with pytest.raises(UnsupportedNode, match="stored as 'test.Registered' is not registered here. Register it"):
        tree.unflatten(structure, leaves)


def pack(value):
    return msgpack.packb(value)


MARK = msgpack.ExtType(LEAF, b"")


@pytest.mark.parametrize(
    ("structure", "text"),
    [
        (b"", "cut"),
        (b"\x92\x01", "cut"),
        (b"\x01\x01", "1 bytes follow"),
        (b"\xc1", "not valid msgpack"),
        (b"\x81\x90\x01", "not valid msgpack"),  # a list as dict key
        (b"\xa1\xff", "not valid msgpack"),
        (b"\x91" * 5000 + b"\xc0", "not valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", "cut"),  # an array that declares 4 G elements
        ((b"\xdd\x00\x0f\xff\xff") * 1000, "cut"),  # nested ones
        (b"\xdf\xff\xff\xff\xff", "cut"),
        (pack({1.5: 1}), "dict key of type float"),
        (pack(msgpack.ExtType(99, b"")), "unknown extension 99"),
        (pack(msgpack.ExtType(LEAF, b"x")), "unknown extension 32"),
        (b"\xd6\xff\0\0\0\1", "a Timestamp"),
        (pack([MARK, MARK]), "a leaf at '1' that the file does not have"),
        (pack([]), "fewer than 1 leaves"),
        (pack([msgpack.ExtType(REGISTERED, b""), 3, 4]), "registered node is not"),
        (pack([msgpack.ExtType(NAMED_TUPLE, b""), "P", ["x"]]), "named tuple is not"),
        (pack([msgpack.ExtType(NAMED_TUPLE, b""), "P", [1], 1]), "named tuple is not"),
        (pack([msgpack.ExtType(NAMED_TUPLE, b""), "P(", ["x"], MARK]), "no name for a named tuple"),
        (pack([msgpack.ExtType(NAMED_TUPLE, b""), "P", ["x y"], MARK]), "named tuple 'P'"),
        (pack([msgpack.ExtType(NAMED_TUPLE, b""), "P", ["_x"], MARK]), "named tuple 'P'"),
    ],
)
def test_hostile_structures_are_corrupt(structure, text):
    with pytest.raises(CorruptFile, match=text):
        tree.unflatten(structure, [np.array(1)])


def test_a_structure_deeper_than_the_limit():
    structure = b"\x91" * 200 + pack(MARK)
    for read in (tree.paths_of, lambda s: tree.unflatten(s, [1])):
        with pytest.raises(LimitExceeded, match="max_depth"):
            read(structure)
    assert tree.paths_of(structure, Limits(max_depth=201)) == ("/".join(["0"] * 200),)


@given(st.binary(max_size=60))
def test_random_bytes_are_a_tree_or_an_error(structure):
    for read in (tree.paths_of, lambda s: tree.unflatten(s, [])):
        try:
            read(structure)
        except (CorruptFile, LimitExceeded, UnsupportedNode):
            pass


def test_metadata_takes_no_arrays():
    with pytest.raises(UnsupportedNode, match="'metadata/a/b': an array cannot be stored here"):
        tree.plain({"a": {"b": np.array(1)}})
    value = {"a": (1, 2), 3: [None, 2.5]}
    assert same(tree.from_plain(msgpack.unpackb(pack(tree.plain(value)), strict_map_key=False)), value)
