"""One file: round trips, laziness, size, and every kind of damage or hostile content told clearly."""

import inspect
import os
import struct
import sys
import zlib

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tricomp
from tests.cases import equal
from tricomp import bounds, container
from tricomp.bounds import DEFLATED, Limits
from tricomp.container import MAGIC, TAIL_BYTES, bin_start, check_of
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    LimitExceeded,
    MissingLeaf,
    StorageError,
    TricompError,
    UnsupportedDtype,
    UnsupportedNode,
    UnsupportedVersion,
    WrongReference,
)


def weights(seed=0, n=33):
    """A small tree with structure: scales per row, constants, few distinct values, several dtypes."""
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.integers(-8, 8, (n, 1)))
    return {
        "w": (rng.standard_normal((n, 17)) * rows).astype(np.float32),
        "h": (rng.standard_normal(n) * 0.1).astype(ml_dtypes.bfloat16),
        "opt": {0: {"step": 7, "v": np.full((n, 3), 0.25)}, 1: {"step": 7, "v": np.arange(n, dtype=np.int64)}},
        "mask": rng.random(n) < 0.1,
        "empty": np.zeros((0, 4), np.float16),
    }


def nudged(tree, seed=1):
    """The tree a few training steps later."""
    rng = np.random.default_rng(seed)
    w = tree["w"] * (1 + rng.standard_normal(tree["w"].shape) * 1e-4)
    return {**tree, "w": w.astype(np.float32)}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "x.tri")


def test_save_and_load(path):
    tree = weights()
    report = tricomp.save(path, tree, metadata={"run": "a", "lr": (0.1, None)})
    assert equal(tricomp.load(path), tree)
    with tricomp.open(path) as file:
        assert list(file) == ["w", "h", "opt/0/v", "opt/1/v", "mask", "empty"]
        assert equal(file["opt/0/v"], tree["opt"][0]["v"])
        assert file.metadata == {"run": "a", "lr": (0.1, None)}
        assert file.content_id == report.content_id == tricomp.content_id(tree)
        assert file.parent is None
        assert "w" in file
        assert "nope" not in file
        assert len(file) == 6
        assert file in [file]
        assert file.leaf("mask") == tricomp.layout.Leaf("mask", tricomp.dtypes.by_name("bool"), (33,))
        assert file.plan("w").dtype.name == "float32"
        assert file.writer.startswith("tricomp ")


@pytest.mark.parametrize("tree", [None, 3, [], {}, np.float32(2), np.arange(3), (np.zeros((), bool),), {"a": [1, {}]}])
def test_small_trees(path, tree):
    tricomp.save(path, tree)
    back = tricomp.load(path)
    assert type(back) is (np.ndarray if isinstance(tree, np.generic) else type(tree))
    assert np.array_equal(back, tree)


def test_loaded_arrays_are_writable_and_of_their_own_memory(path):
    shared = np.arange(100.0)
    tricomp.save(path, {"a": shared, "b": shared, "c": [np.arange(3), np.arange(3)]})
    with tricomp.open(path) as file:
        first, again = file.load(), file.load()
        arrays = [first["a"], first["b"], *first["c"], again["a"], again["b"], *again["c"], file["a"], file["c/0"]]
        for array in arrays:
            array += 1
    assert all(np.array_equal(array, np.arange(len(array)) + 1) for array in arrays)


def test_a_delta_needs_its_reference(path, tmp_path):
    first, second, other = weights(), nudged(weights()), weights(5)
    delta = str(tmp_path / "delta.tri")
    base = tricomp.save(path, first)
    report = tricomp.save(delta, second, reference=path)
    assert report.parent == base.content_id
    with tricomp.open(path) as file:
        for reference in (path, first, file):
            assert equal(tricomp.load(delta, reference=reference), second)
        assert file["w"].size  # still open
    expected = f"was encoded against content id {base.content_id}, but the reference has {tricomp.content_id(other)}"
    with pytest.raises(WrongReference, match=f"{expected}. Pass the checkpoint it was saved against"):
        tricomp.open(delta, reference=other)
    with pytest.raises(WrongReference, match="but the reference has"):
        tricomp.open(delta, reference={**first, "w": first["w"].T})  # another shape
    with pytest.raises(WrongReference, match="stands alone and takes no reference. Open it without one"):
        tricomp.open(path, reference=first)
    with tricomp.open(delta) as file:
        assert file.metadata == {}
        with pytest.raises(WrongReference, match=f"content id {base.content_id}, and no reference was given. Pass ref"):
            file["opt/1/v"]  # unchanged, so a copy


def test_a_reference_of_other_shapes_still_encodes(path, tmp_path):
    tree = weights()
    reference = {**weights(), "w": np.zeros((3, 4), np.float32), "h": np.zeros(33, np.float64)}
    del reference["mask"]
    tricomp.save(path, tree, reference=reference)
    assert equal(tricomp.load(path, reference=reference), tree)


def test_a_file_never_replaces_its_own_reference(path):
    tricomp.save(path, weights())
    with pytest.raises(InvalidArgument, match="would replace its own reference. Save to another path"):
        tricomp.save(path, weights(1), reference=path)
    assert equal(tricomp.load(path), weights())


def test_long_chains_need_no_deep_stack(tmp_path):
    tree = {"a": np.arange(5), "b": np.arange(7.0)}
    tricomp.save(tmp_path / "0.tri", tree)
    file = tricomp.open(tmp_path / "0.tri")
    for i in range(1, 150):
        following = {"a": tree["a"] + (np.arange(5) == i % 5), "b": tree["b"]} if i > 140 else tree
        tricomp.save(tmp_path / f"{i}.tri", following, reference=tree)
        file = tricomp.open(tmp_path / f"{i}.tri", reference=file)
        tree = following
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        assert equal(file.load(), tree)
    finally:
        sys.setrecursionlimit(limit)


def test_leaves_by_path_and_pattern(path):
    tree = weights()
    tricomp.save(path, tree)
    assert list(tricomp.load(path, leaves=["opt/*/v", "w"])) == ["w", "opt/0/v", "opt/1/v"]
    assert equal(tricomp.load(path, leaves=["opt/1/v"])["opt/1/v"], tree["opt"][1]["v"])
    with pytest.raises(MissingLeaf, match="no leaf matches 'opt/2/.' among its 6 leaves. See keys()"):
        tricomp.load(path, leaves=["opt/2/*"])
    with pytest.raises(InvalidArgument, match="expected a list of paths or patterns, got the text 'w'"):
        tricomp.load(path, leaves="w")
    with tricomp.open(path) as file, pytest.raises(MissingLeaf, match="no leaf 'x' among its 6 leaves"):
        file["x"]


class CountingSource:
    """A Source that remembers which bytes were asked for."""

    def __init__(self, data):
        self.name, self.data, self.n_bytes, self.reads = "counted", data, len(data), []

    def read(self, offset, n_bytes):
        self.reads.append((offset, n_bytes))
        return self.data[offset : offset + n_bytes]

    def close(self):
        pass


def test_reading_one_leaf_reads_its_bytes_only(path):
    tree = {f"w{i}": np.random.default_rng(i).integers(0, 2**62, 70_000) for i in range(8)}
    tricomp.save(path, tree)
    with open(path, "rb") as file:
        source = CountingSource(file.read())
    lazy = tricomp.File(source)
    assert sum(n for _, n in source.reads) < 2000
    source.reads.clear()
    assert equal(lazy["w3"], tree["w3"])
    assert sum(n for _, n in source.reads) < source.n_bytes / 7


def test_any_msgpack_reader_can_walk_a_file(path):
    report = tricomp.save(path, weights())
    with open(path, "rb") as file:
        objects = list(msgpack.Unpacker(file, strict_map_key=False, raw=False))
    header, *frames, index, tail = objects
    assert header["tricomp"] == 1
    assert all(type(frame) is bytes for frame in frames)
    assert set(index) == {"frames", "checks", "digests"}
    assert tail.endswith(MAGIC)
    assert len(tail) == TAIL_BYTES - 2
    assert report.file_bytes == os.path.getsize(path)


def test_a_thousand_leaves_cost_under_14_bytes_each(path):
    rng = np.random.default_rng(0)
    tree = {f"layers.{i}.norm.weight": rng.standard_normal(1000).astype(np.float32) for i in range(1000)}
    tricomp.save(path, tree)
    with tricomp.open(path) as file:
        frames = {entry.leaves: entry.n_bytes + 5 for entry in file._contents.frames}
        overhead = file.n_bytes - sum(frames.values()) + 5 * len(frames)
    assert overhead / 1000 < 14


def test_report(path):
    tree = weights()
    report = tricomp.save(path, tree)
    assert report.n_leaves == len(report.leaves) == 6
    assert report.raw_bytes == sum(leaf.raw_bytes for leaf in report.leaves) == 33 * (17 * 4 + 2 + 24 + 8 + 1)
    assert report.ratio == report.raw_bytes / report.file_bytes
    assert [leaf.path for leaf in report.leaves] == ["w", "h", "opt/0/v", "opt/1/v", "mask", "empty"]
    assert report.leaves[0].dtype == "float32"
    assert report.leaves[0].shape == (33, 17)
    assert sum(leaf.coded_bytes for leaf in report.leaves) < report.file_bytes
    assert str(report).startswith(f"{path}: 6 leaves, 3,399 -> {report.file_bytes:,} bytes (ratio ")
    assert str(report).count("\n") == 0
    assert ", keyframe, " in str(report)
    delta = tricomp.save(path, nudged(tree), reference=tree)
    assert f"delta of {report.content_id[:8]}" in str(delta)


def test_content_id_depends_on_content_alone(path):
    tree = weights()
    ids = {
        tricomp.save(path, tree, spec=spec, reference=reference, metadata=metadata).content_id
        for spec in (None, tricomp.Spec(tier="fast"))
        for reference in (None, nudged(tree))
        for metadata in (None, {"a": 1})
    }
    assert ids == {tricomp.content_id(tree)}
    changed = weights()
    changed["opt"][0]["step"] = 8
    reordered = dict(reversed(tree.items()))
    reshaped = {**tree, "w": tree["w"].reshape(17, 33)}
    others = {tricomp.content_id(other) for other in (changed, reordered, reshaped, nudged(tree))}
    assert len(others | ids) == 5


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        ({"a": [np.array(["x"])]}, UnsupportedDtype, "leaf 'a/0': dtype '?str"),
        ({"a": np.array([None])}, UnsupportedDtype, "leaf 'a': dtype 'object'"),
        ({"a": {1, 2}}, UnsupportedNode, "node 'a': builtins.set"),
        ({1: np.array(1), "1": np.array(2)}, InvalidArgument, "leaf '1' appears twice"),
    ],
)
def test_what_cannot_be_saved_leaves_no_file(path, tmp_path, tree, error, text):
    with pytest.raises(error, match=text):
        tricomp.save(path, tree)
    assert os.listdir(tmp_path) == []


def test_metadata_is_plain_values(path):
    with pytest.raises(InvalidArgument, match="metadata: expected a dict of plain values, got list"):
        tricomp.save(path, 1, metadata=[1])  # type: ignore[arg-type]
    with pytest.raises(UnsupportedNode, match="'metadata/a': an array cannot be stored here. Put it in the tree"):
        tricomp.save(path, 1, metadata={"a": np.array(1)})


def test_a_path_that_is_no_plain_file_is_not_replaced(tmp_path):
    with pytest.raises(InvalidArgument, match="is not a regular file and will not be replaced"):
        tricomp.save(tmp_path, 1)
    with pytest.raises(InvalidArgument, match="is not a regular file and will not be replaced"):
        tricomp.save("/dev/null", 1)
    with pytest.raises(StorageError, match="there is no folder .*/no. Make it first"):
        tricomp.save(tmp_path / "no" / "x.tri", 1)
    with pytest.raises(InvalidArgument, match="is a folder. Give a .tri file, or use tricomp.Store"):
        tricomp.open(tmp_path)
    with pytest.raises(tricomp.MissingFile, match="there is no such file. Check the path."):
        tricomp.open(tmp_path / "x.tri")


def test_save_follows_a_link(tmp_path):
    tricomp.save(tmp_path / "real.tri", 1)
    (tmp_path / "link.tri").symlink_to("real.tri")
    tricomp.save(tmp_path / "link.tri", 2)
    assert (tmp_path / "link.tri").is_symlink()
    assert tricomp.load(tmp_path / "real.tri") == 2


def test_a_closed_file_says_so(path):
    tricomp.save(path, weights())
    file = tricomp.open(path)
    kept = file["w"]
    file.close()
    file.close()
    assert equal(kept, weights()["w"])
    with pytest.raises(InvalidArgument, match="is closed. Open it again"):
        file["w"]


# The file of FORMAT.md's example. Frozen since format 1.
FORMAT_1 = bytes.fromhex(
    """
    87 a7 74 72 69 63 6f 6d 70 01 a6 77 72 69 74 65 72 ad 74 72 69 63 6f 6d 70 20 30 2e 31 2e 30 a6
    70 61 72 65 6e 74 c0 ae 73 69 6e 63 65 5f 6b 65 79 66 72 61 6d 65 00 a8 6d 65 74 61 64 61 74 61
    81 a3 72 75 6e a1 61 a4 74 72 65 65 c4 13 82 a4 73 74 65 70 03 a2 6c 72 cb 3f e0 00 00 00 00 00
    00 a6 6c 65 61 76 65 73 c4 04 93 90 90 90 83 a6 66 72 61 6d 65 73 c4 04 93 90 90 90 a6 63 68 65
    63 6b 73 c4 00 a7 64 69 67 65 73 74 73 c4 00 c4 48 6e 00 00 00 00 00 00 00 40 ac b3 37 ce 56 bf
    6c 6e 00 00 00 00 00 00 00 21 00 00 00 00 00 00 00 74 c4 09 44 6f f5 75 34 1a f7 fd 74 7b f0 32
    34 36 87 ce 96 71 ed 64 13 4f e8 9b b7 70 51 e4 fc 89 54 52 49 0d 0a 1a 0a
    """
)


def test_a_file_of_format_1_byte_for_byte(path):
    with open(path, "wb") as file:
        file.write(FORMAT_1)
    with tricomp.open(path) as opened:
        assert opened.load() == {"step": 3, "lr": 0.5}
        assert opened.metadata == {"run": "a"}
        assert opened.writer == "tricomp 0.1.0"
        assert opened.content_id == "1af7fd747bf032343687ce9671ed6413" == tricomp.content_id({"step": 3, "lr": 0.5})
    tricomp.save(path, {"step": 3, "lr": 0.5}, metadata={"run": "a"})
    with open(path, "rb") as file:
        written = file.read()
    # What stands before and after names the writer, and the checksum of that.
    parts = slice(FORMAT_1.index(b"\xa6parent"), FORMAT_1.index(b"\xc4\x48"))
    assert written[written.index(b"\xa6parent") : written.index(b"\xc4\x48")] == FORMAT_1[parts]


# Damage


@pytest.fixture
def damaged(tmp_path):
    """A function that writes bytes to a file and returns its path."""

    def write(data):
        target = tmp_path / "damaged.tri"
        target.write_bytes(data)
        return str(target)

    return write


def saved(tmp_path, tree, **more):
    tricomp.save(tmp_path / "whole.tri", tree, **more)
    return (tmp_path / "whole.tri").read_bytes()


def small():
    return {"w": np.array([[1, 2, 3], [4, 5, 6.5]], np.float32), "s": 3, "n": np.arange(5)}


def test_cut_at_every_byte(tmp_path, damaged):
    data = saved(tmp_path, small())
    for n in range(len(data)):
        with pytest.raises(CorruptFile, match="is cut|it was cut|is empty"):
            tricomp.open(damaged(data[:n]))


def test_trailing_bytes(tmp_path, damaged):
    data = saved(tmp_path, small())
    for extra in (b"\0", b"garbage" * 100):
        with pytest.raises(CorruptFile, match="it was cut at .* bytes, or something was appended to it. Restore"):
            tricomp.open(damaged(data + extra))
    with pytest.raises(CorruptFile, match="was cut or joined"):
        tricomp.open(damaged(data + data))


def test_every_bit_flipped(tmp_path, damaged):
    tree = {**small(), "m": np.array([0.5] * 40, np.float32), "k": np.arange(50) % 3}
    data = saved(tmp_path, tree, metadata={"a": 1})
    for i in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(TricompError):
            tricomp.load(damaged(bytes(flipped)))


def test_every_bit_of_a_delta_flipped(tmp_path, damaged):
    tree = small()
    data = saved(tmp_path, {**tree, "w": tree["w"] * np.float32(1.001)}, reference=tree)
    for i in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(TricompError):
            tricomp.load(damaged(bytes(flipped)), reference=tree)


def test_errors_of_damage_say_what_and_where(tmp_path, damaged):
    tree = {"w": np.random.default_rng(0).integers(0, 2**60, 1000), "n": np.arange(50, dtype=np.int32)}
    data = bytearray(saved(tmp_path, tree))
    with tricomp.open(tmp_path / "whole.tri") as file:
        index_offset, frame = file._contents.summary.index_offset, file._frame_of[0].offset
    for place, error, text in (
        (20, CorruptFile, "damaged.tri: header: checksum [0-9a-f]{16} stored, [0-9a-f]{16} computed. Restore it"),
        (index_offset + 20, CorruptFile, "damaged.tri: index: checksum .* Restore it"),
        (len(data) - 30, CorruptFile, "damaged.tri: tail: checksum .* Restore it"),
        (frame + 20, CorruptFrame, "damaged.tri: frame of 'w': its side section or directory is damaged. Restore the"),
        (frame + 2000, CorruptFrame, "damaged.tri: chunk 0 of 'w': checksum [0-9a-f]{16} stored, .* Restore the file"),
        (frame, CorruptFrame, "damaged.tri: leaf 'w': no frame begins at byte"),
    ):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(error, match=text):
            tricomp.load(damaged(bytes(flipped)))
        if error is CorruptFrame:  # the rest is still there
            with tricomp.open(damaged(bytes(flipped))) as file:
                assert equal(file["n"], tree["n"])
                with pytest.raises(CorruptFrame, match="frame of leaf 'w': checksum .* Restore it|no frame begins"):
                    file.check()


def test_files_of_other_kinds(damaged):
    with pytest.raises(CorruptFile, match=r"is empty \(0 bytes\)"):
        tricomp.open(damaged(b""))
    for data in (
        b"PK\x03\x04 a zip archive, as torch.save writes",
        b"\x89PNG",
        b"{}" * 99,
        b"\0" * 500,
        b"\x81\xa1a\1",
    ):
        with pytest.raises(CorruptFile, match="is not a tricomp file: it begins with b'"):
            tricomp.open(damaged(data))
    with pytest.raises(CorruptFile):
        tricomp.open(damaged(tricomp.encode(np.arange(3))))


def test_a_newer_version(tmp_path, damaged):
    data = saved(tmp_path, small())
    newer = data[:9] + b"\x07" + data[10:]
    with pytest.raises(UnsupportedVersion, match="was written by format 7; this tricomp reads 1. Upgrade"):
        tricomp.open(damaged(newer))
    with pytest.raises(CorruptFile, match="there is no format 0"):
        tricomp.open(damaged(data[:9] + b"\0" + data[10:]))


# Hostile files: every checksum right, the content not


def forged(data, header=None, index=None, frames=None):
    """A file with parts of its header, index or frames exchanged, and all checksums made right."""
    summary = container.read_summary(CountingSource(data))
    old_index = msgpack.unpackb(bytes(summary.index))
    content = summary.content_id
    new_header = msgpack.packb({**summary.header, **(header or {})})
    new_index = msgpack.packb({**old_index, **(index or {})})
    body = data[summary.header_bytes : summary.index_offset] if frames is None else frames
    tail = container._tail(new_header, len(new_header) + len(body), new_index, content)
    return new_header + body + new_index + tail


def table(*values):
    return msgpack.packb(list(values))


def bomb(n_bytes, declared=None):
    return msgpack.ExtType(DEFLATED, (declared or n_bytes).to_bytes(8, "little") + zlib.compress(bytes(n_bytes)))


SHAPES = [[2, 3], [5]]


@pytest.mark.parametrize(
    ("header", "index", "error", "text"),
    [
        ({"tree": b"\xc1"}, {}, CorruptFile, "tree: not valid msgpack"),
        ({"tree": b"\xdd\xff\xff\xff\xff"}, {}, CorruptFile, "tree: the msgpack object is cut"),
        ({"tree": b"\x91" * 900 + b"\xc0"}, {}, LimitExceeded, "max_depth = 128"),
        ({"tree": 3}, {}, CorruptFile, "tree: expected a packed table, got int"),
        ({"tree": bomb(1 << 20, 1 << 40)}, {}, LimitExceeded, "max_table_bytes"),
        ({"tree": bomb(1 << 20, 100)}, {}, CorruptFile, "declared 100 bytes inflated, and does not hold them"),
        ({"tree": bomb(1 << 10, 1 << 20)}, {}, CorruptFile, "declared 1048576 bytes inflated"),
        ({"tree": msgpack.ExtType(DEFLATED, b"\5" + bytes(7) + b"xxxxx")}, {}, CorruptFile, "tree: Error -3"),
        ({"leaves": table([2, 18], SHAPES)}, {}, CorruptFile, "leaves: expected 3 columns"),
        ({"leaves": table([2], SHAPES, [0])}, {}, CorruptFile, "leaves: 1 dtypes and 1 shapes for 2 leaves"),
        ({"leaves": table([2, 250], SHAPES, [0, 1])}, {}, UnsupportedDtype, "leaf 'n': dtype number 250 is unknown"),
        ({"leaves": table([2, 19], SHAPES, [0, 2])}, {}, CorruptFile, "leaves: expected an array of integers"),
        ({"leaves": table([2, 19], [[2, -3], [5]], [0, 1])}, {}, CorruptFile, "expected an array of integers"),
        ({"leaves": table([2, 19], [[2, 2**62], [5]], [0, 1])}, {}, CorruptFile, "a leaf of shape"),
        ({"leaves": table([2, 19], [[1] * 65, [5]], [0, 1])}, {}, LimitExceeded, "max_dimensions = 64"),
        ({"leaves": table([2, 19], [[2, 4], [5]], [0, 1])}, {}, CorruptFile, "content id is not that of its tree"),
        ({"parent": b"short"}, {}, CorruptFile, "parent, since_keyframe or writer is of the wrong kind"),
        ({"writer": 1}, {}, CorruptFile, "parent, since_keyframe or writer is of the wrong kind"),
        ({"since_keyframe": -1}, {}, CorruptFile, "parent, since_keyframe or writer is of the wrong kind"),
        ({"metadata": [1]}, {}, CorruptFile, "metadata is a list, not a map"),
        ({}, {"digests": b"\0" * 15}, CorruptFile, "digests: expected 16 bytes"),
        ({}, {"digests": b"\0" * 16}, CorruptFile, "content id is not that of its tree"),
        ({}, {"checks": b""}, CorruptFile, "checks: expected 16 bytes"),
        ({}, {"frames": table([[1], [1]], [[4], [4]])}, CorruptFile, "frames: expected 3 columns"),
        ({}, {"frames": table([[1], [1]], [[4]], [{}, {}])}, CorruptFile, "frames: columns of 2, 1 and 2 frames"),
        ({}, {"frames": table([[1], []], [[4], [4]], [{}, {}])}, CorruptFile, "a frame without leaves or without"),
        ({}, {"frames": table([[1], [1]], [[4], []], [{}, {}])}, CorruptFile, "a frame without leaves or without"),
        ({}, {"frames": table([[1], [1]], [[1 << 30], [4]], [{}, {}])}, CorruptFile, "frames: expected an array"),
        ({}, {"frames": table([[1], [1]], [[-9], [4]], [{}, {}])}, CorruptFile, "frames: expected an array"),
        ({}, {"frames": table([[1], [1]], [[9], [900]], [{}, {}])}, CorruptFile, "but the index begins at"),
    ],
)
def test_hostile_headers_and_indexes(tmp_path, damaged, header, index, error, text):
    data = saved(tmp_path, small())
    with pytest.raises(error, match=text):
        tricomp.load(damaged(forged(data, header, index)))


@pytest.mark.parametrize("numbers", [[[1], [0]], [[2], [1]], [[1], [2]], [[1, 0], [1]], [[1, 1], [1]], [[-1], [2]]])
def test_leaf_numbers_twice_missing_or_out_of_range(tmp_path, damaged, numbers):
    data = saved(tmp_path, small())
    with tricomp.open(tmp_path / "whole.tri") as file:
        entries = file._contents.frames
    frames = table(numbers, [list(entry.sizes) for entry in entries], [entry.plan for entry in entries])
    with pytest.raises(CorruptFile, match="a leaf has two frames or none, or is not of the tree"):
        tricomp.open(damaged(forged(data, index={"frames": frames})))


def exchanged_plans(tmp_path, **fields):
    """The bytes of a whole file with fields of every plan exchanged."""
    with tricomp.open(tmp_path / "whole.tri") as file:
        entries = file._contents.frames
    frames = table(
        [[1] for _ in entries],
        [list(entry.sizes) for entry in entries],
        [{**entry.plan, **fields} for entry in entries],
    )
    return forged((tmp_path / "whole.tri").read_bytes(), index={"frames": frames})


def test_plans_that_do_not_fit_their_leaves(tmp_path, damaged):
    saved(tmp_path, small())
    for fields in ({"n": 1 << 47}, {"n": 0}, {"d": 1}):
        with pytest.raises(CorruptFrame):
            tricomp.load(damaged(exchanged_plans(tmp_path, **fields)))
    with pytest.raises(TricompError):
        tricomp.load(damaged(exchanged_plans(tmp_path, r=2, p=8, s=9)))
    with pytest.raises(TricompError):
        tricomp.load(damaged(exchanged_plans(tmp_path, r=2, p=8, s=0)))  # its own sibling


def test_a_huge_constant_leaf_is_refused_before_memory_is_taken(tmp_path, damaged):
    shape = [1 << 40]
    structure, leaves = b"\xc7\x00\x20", table([20], [shape], [0])
    leaf = tricomp.layout.Leaf("", tricomp.dtypes.by_number(20), (1 << 40,))
    content = container.content_id(structure, [leaf], [0])
    header = {"tricomp": 1, "writer": "", "parent": None, "metadata": {}, "tree": structure, "leaves": leaves}
    plan = {"d": 20, "n": 1 << 40, "p": 1}
    index = {"frames": table([[1]], [[0]], [plan]), "checks": struct.pack("<Q", check_of(b"")), "digests": bytes(8)}
    head, body, foot = msgpack.packb(header), bin_start(0), msgpack.packb(index)
    data = head + body + foot + container._tail(head, len(head) + len(body), foot, content)
    with tricomp.open(damaged(data)) as file:
        assert file.leaf("").n_bytes == 1 << 40
        for read in (file.load, lambda: file[""], lambda: file.find("")):
            with pytest.raises(LimitExceeded, match="exceeds the limit max_decoded_bytes = .*Pass limits=Limits"):
                read()


def test_limits_are_the_callers_choice(path):
    tricomp.save(path, weights())
    for limits, name in ((Limits(max_header_bytes=10), "max_header_bytes"), (Limits(max_leaves=5), "max_leaves")):
        with pytest.raises(LimitExceeded, match=f"exceeds the limit {name}"):
            tricomp.open(path, limits=limits)
    with tricomp.open(path, limits=Limits(max_decoded_bytes=1000)) as file:
        assert file["h"].size == 33
        with pytest.raises(LimitExceeded, match="max_decoded_bytes = 1000"):
            file["w"]


def test_a_parent_that_lacks_the_leaf(tmp_path, damaged):
    tree, lacking = small(), {"s": 3}
    data = saved(tmp_path, tree, reference=tree)
    other = forged(data, header={"parent": bytes.fromhex(tricomp.content_id(lacking))})
    with pytest.raises(CorruptFile, match="leaf 'w': its parent has no such leaf, expected float32"):
        tricomp.load(damaged(other), reference=lacking)
    reshaped = {**tree, "w": np.zeros((3, 2), np.float32)}
    other = forged(data, header={"parent": bytes.fromhex(tricomp.content_id(reshaped))})
    with pytest.raises(CorruptFile, match=r"leaf 'w': its parent has float32\[3, 2\] there, expected float32\[2, 3\]"):
        tricomp.load(damaged(other), reference=reshaped)


# Blobs


@pytest.mark.parametrize("shape", [(), (0,), (1,), (33, 3), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int8", "bool", "complex64", ">f8"])
def test_blobs(shape, dtype):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal(shape) * 9).astype(dtype)
    other = np.flip(array)
    for reference in (None, array, other):
        back = tricomp.decode(tricomp.encode(array, reference), reference)
        assert back.shape == array.shape
        assert back.dtype == array.dtype.newbyteorder("<")
        assert back.tobytes() == array.astype(back.dtype).tobytes()
        back[...] = 0


@pytest.mark.parametrize("threads", [1, 3])
def test_large_blobs(threads):
    """Their checksum is taken beside decoding, and damage is still called damage, wherever it is."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((1000, 1500), np.float32)
    reference = array + rng.standard_normal(array.shape, np.float32) / 1000
    blob = tricomp.encode(array, reference, threads=threads)
    assert len(blob) > 2 << 20
    assert tricomp.decode(blob, reference, threads).tobytes() == array.tobytes()
    with pytest.raises(WrongReference, match="this one has"):
        tricomp.decode(blob, array, threads)
    for at in [*rng.integers(10, 400, 40), *rng.integers(400, len(blob), 20), len(blob) - 1]:
        damaged = bytearray(blob)
        damaged[at] ^= 1 << rng.integers(8)
        with pytest.raises(CorruptFile, match="it is cut or damaged"):
            tricomp.decode(bytes(damaged), reference, threads)


def test_wrong_references_of_blobs():
    array = np.arange(100.0).reshape(4, 25)
    blob = tricomp.encode(array, array)
    with pytest.raises(WrongReference, match="encoded against a reference of digest [0-9a-f]{16}. Pass reference="):
        tricomp.decode(blob)
    with pytest.raises(WrongReference, match="this one has [0-9a-f]{16}. Pass the array it was encoded against"):
        tricomp.decode(blob, array + 1)
    for reference in (array.T, array.astype(np.float32)):
        with pytest.raises(WrongReference, match="Pass a reference of the same dtype and shape"):
            tricomp.decode(blob, reference)
        with pytest.raises(WrongReference, match=r"the array is float64\[4, 25\], its reference .*, or none"):
            tricomp.encode(array, reference)


def test_what_is_no_array():
    with pytest.raises(InvalidArgument, match="expected a numpy array, got list. Use np.asarray"):
        tricomp.encode([1, 2])  # type: ignore[arg-type]
    with pytest.raises(UnsupportedDtype, match="dtype 'object'"):
        tricomp.encode(np.array([None]))


def test_damaged_blobs():
    array = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    for reference in (None, array * np.float32(1.01)):
        blob = tricomp.encode(array, reference)
        for n in range(len(blob)):
            with pytest.raises(CorruptFile, match="cut|no blob"):
                tricomp.decode(blob[:n], reference)
        for i in range(len(blob) * 8):
            flipped = bytearray(blob)
            flipped[i // 8] ^= 1 << i % 8
            with pytest.raises(TricompError):
                tricomp.decode(flipped, reference)
    with pytest.raises(CorruptFile, match="cut or damaged"):
        tricomp.decode(tricomp.encode(array) + b"\0")
    with pytest.raises(UnsupportedVersion, match="was written by format 9; this tricomp reads 1. Upgrade"):
        tricomp.decode(blob[:9] + b"\x09" + blob[10:])


def test_hostile_blobs(path):
    def sealed(header, frames=b"\xc4\x00"):
        body = msgpack.packb(header) + frames
        return body + b"\xcf" + check_of(body).to_bytes(8, "big")

    plan = {"d": 20, "n": 1 << 40, "p": 1}
    header = {"tricomp": 1, "dtype": 20, "shape": [1 << 40], "digest": 0, "plan": plan, "parent": None}
    with pytest.raises(LimitExceeded, match="max_decoded_bytes"):
        tricomp.decode(sealed(header))
    for change, text in (
        ({"shape": [2**63]}, "shape"),
        ({"shape": [-1]}, "shape"),
        ({"shape": 3}, "shape is missing or of the wrong kind"),
        ({"digest": "x"}, "digest is missing or of the wrong kind"),
        ({"shape": [9]}, "its plan does not fit"),
        ({"tree": b""}, "is a .tri file, not the blob of one array. Use tricomp.open"),
    ):
        with pytest.raises(TricompError, match=text):
            tricomp.decode(sealed({**header, **change}))
    with pytest.raises(CorruptFile, match="not a row of msgpack bins"):
        tricomp.decode(sealed({**header, "shape": [4], "plan": {**plan, "n": 4}}, b"\xc6\xff\xff\xff\xff"))
    tricomp.save(path, small())
    with open(path, "rb") as file, pytest.raises(CorruptFile, match="cut or damaged"):
        tricomp.decode(file.read())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_under_right_checksums_is_an_error_or_harmless(tmp_path, damaged, data):
    """Bytes of the inflated tables, of the maps around them or of a frame exchanged, and every checksum made right."""
    tree = {**small(), "m": np.full(40, 0.5, np.float32), "t": (1, [2.5, b"x"])}
    whole = saved(tmp_path, tree, reference=small() if data.draw(st.booleans()) else None)
    summary = container.read_summary(CountingSource(whole))
    maps = {"header": dict(summary.header), "index": msgpack.unpackb(bytes(summary.index))}
    body = whole[summary.header_bytes : summary.index_offset]
    target = data.draw(st.sampled_from(["tree", "leaves", "frames", "digests", "header", "index", "body"]))

    def changed(raw):
        raw = bytearray(raw)
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        return bytes(raw)

    for name, found in maps.items():
        if target in found:
            packed = found[target]
            found[target] = changed(packed if target == "digests" else bounds.unpack_table(packed, Limits(), target))
        maps[name] = msgpack.packb(found)
        if target == name:
            maps[name] = changed(maps[name])
    if target == "body":
        body = changed(body)
        index = msgpack.unpackb(maps["index"])
        sizes = msgpack.unpackb(bounds.unpack_table(index["frames"], Limits(), ""))[1]
        checks, offset = [], 0
        for (size,) in sizes:
            offset += len(bin_start(size))
            checks.append(check_of(body[offset : offset + size]))
            offset += size
        maps["index"] = msgpack.packb({**index, "checks": struct.pack(f"<{len(checks)}Q", *checks)})
    content = summary.content_id
    try:
        structure, leaves, digests = tables_of(maps)
        content = container.content_id(structure, leaves, digests)
    except (TricompError, ValueError, KeyError, TypeError):
        pass
    tail = container._tail(maps["header"], len(maps["header"]) + len(body), maps["index"], content)
    forged_path = damaged(maps["header"] + body + maps["index"] + tail)
    try:
        with tricomp.open(forged_path, limits=Limits(max_decoded_bytes=1 << 24)) as file:
            parent = None if file.parent is None else small()
        with tricomp.open(forged_path, parent, Limits(max_decoded_bytes=1 << 24)) as file:
            file.check()
            file.load()
    except TricompError:  # and no other kind of error
        pass


def tables_of(maps):
    """Structure, leaves and digests of a changed file, where they can still be read."""
    header, index = msgpack.unpackb(maps["header"]), msgpack.unpackb(maps["index"])
    structure = bounds.unpack_table(header["tree"], Limits(), "")
    table = msgpack.unpackb(bounds.unpack_table(header["leaves"], Limits(), ""))
    leaves = container._leaves(table, tricomp.tree.paths_of(structure), Limits(), "")
    return structure, leaves, container._u64s(index["digests"], len(leaves), "")


def test_a_wrong_path_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, shown in (({"w": 1}, "a dict"), (3, "a int"), (b"x.tri", "b'x.tri'"), ("", "''"), ("a\0b", r"'a\\x00b'")):
        with pytest.raises(InvalidArgument, match=rf"expected a path, as in tricomp.save\(path, tree\), got {shown}"):
            tricomp.save(path, "x.tri")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_damage_names_a_way_to_find_what_is_intact(tmp_path):
    (tmp_path / "a.tri").write_bytes(b"")
    with pytest.raises(CorruptFile, match="or list a store's intact steps: tricomp verify FOLDER"):
        tricomp.load(tmp_path / "a.tri")


def test_damage_of_a_frame_names_the_file_once(tmp_path):
    path = tmp_path / "a.tri"
    tricomp.save(path, {"w": np.random.default_rng(0).normal(size=(60, 70)).astype(np.float32)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptFrame, match="chunk 0 of 'w': checksum") as caught:
        tricomp.load(path)
    assert str(caught.value).count("a.tri") == 1


def test_an_object_in_metadata_is_refused_by_its_place(tmp_path):
    with pytest.raises(UnsupportedNode, match="node 'metadata/run/at': builtins.object cannot be stored"):
        tricomp.save(tmp_path / "a.tri", 1, metadata={"run": {"at": object()}})


def test_a_spec_of_another_type_or_form_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="spec: expected a tricomp.Spec, got str 'fast'"):
        tricomp.save(tmp_path / "a.tri", {"w": np.ones(3)}, spec="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="spec: expected a tricomp.Spec, got dict"):
        tricomp.encode(np.ones(3), spec={"tier": "fast"})  # type: ignore[arg-type]
    for bits, text in ((7, "expected a dict of"), ({3: 7}, "got 3"), ({"w": True}, "got True")):
        with pytest.raises(InvalidArgument, match=f"Spec.keep_mantissa_bits.*{text}"):
            tricomp.Spec(keep_mantissa_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="Spec.chunk_log2: expected 10 to 16, got '12'"):
        tricomp.Spec(chunk_log2="12")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_masked_array_is_no_leaf():
    with pytest.raises(InvalidArgument, match="leaf 'array': it is a masked array. Store its data and its mask as two"):
        tricomp.encode(np.ma.array([1.0, 2.0], mask=[False, True]))


def test_decode_says_what_it_expects():
    for other in ("abc", None, 3, [1]):
        with pytest.raises(InvalidArgument, match=r"decode: expected the bytes that encode gave, got \w+\."):
            tricomp.decode(other)  # type: ignore[arg-type]


def test_a_shape_that_no_reader_takes_is_not_written(path):
    with pytest.raises(InvalidArgument, match=r"leaf 'a': shape \[0, 4611686018427387904\]: its sizes multiply to"):
        tricomp.save(path, {"a": np.empty((0, 1 << 62), np.uint8)})
    assert not os.path.exists(path)
