"""Arrays as they come: read-only, unaligned, strided, big-endian, mapped; as leaves, as references, as bytes to decode.

Whatever can be an array's memory is taken and gives the bytes that a plain copy gives, on every backend.
"""

from __future__ import annotations

import mmap
import tempfile

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests.cases import weights
from tricomp import codec, native
from tricomp import numpy as pair
from tricomp.errors import InvalidArgument, StorageError
from tricomp.job import DecodeJob
from tricomp.layout import snapshot_of
from tricomp.plan import Plan

BACKENDS = ("reference", *(["native"] if native.is_there() else []))
DTYPES = (np.float32, np.float64, np.uint16, ml_dtypes.bfloat16, np.int8, np.complex64)


def plain(dtype):
    return (weights((60, 70)) * 100).astype(dtype)


def read_only(array):
    view = array.copy()
    view.flags.writeable = False
    return view


def unaligned(array):
    data = b"\1" + array.tobytes()
    return np.frombuffer(data, array.dtype, offset=1).reshape(array.shape)


def strided(array):
    wide = np.zeros((120, 140), array.dtype)
    wide[::2, ::2] = array
    return wide[::2, ::2]


def backwards(array):
    return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]


def swapped(array):
    return array.astype(array.dtype.newbyteorder(">"))


def mapped(array):
    memory = mmap.mmap(-1, array.nbytes + 3)
    memory[3:] = array.tobytes()
    return np.frombuffer(memory, array.dtype, offset=3).reshape(array.shape)


KINDS = (read_only, unaligned, np.asfortranarray, strided, backwards, swapped, mapped)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_memory_gives_the_bytes_of_a_plain_copy(kind, dtype, backend):
    if kind is swapped and dtype is ml_dtypes.bfloat16:
        pytest.skip("numpy has no big-endian bfloat16")
    array = plain(dtype)
    step = array.copy()
    step.reshape(-1)[::7] = array.reshape(-1)[:600][::-1]
    other = kind(array)
    blob = tricomp.encode(array, backend=backend)
    assert tricomp.encode(other, backend=backend) == blob
    assert tricomp.encode(other) == blob
    delta = tricomp.encode(step, array, backend=backend)
    assert tricomp.encode(step, other, backend=backend) == delta
    back = tricomp.decode(delta, other, backend=backend)
    assert back.tobytes() == step.tobytes()
    assert back.base is None or back.base.flags.owndata
    assert back.flags.writeable


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [unaligned, strided, mapped])
def test_any_memory_goes_into_a_file(kind, backend, tmp_path):
    tree = {"w": plain(np.float32), "same": plain(np.float32), "half": plain(np.float32).astype(np.float16)}
    tricomp.save(tmp_path / "plain.tri", tree, backend=backend)
    tricomp.save(tmp_path / "other.tri", {path: kind(array) for path, array in tree.items()}, backend=backend)
    assert (tmp_path / "plain.tri").read_bytes() == (tmp_path / "other.tri").read_bytes()


def test_a_large_unaligned_leaf_waits_on_a_disk(monkeypatch, tmp_path):
    array, step = plain(np.float32), plain(np.float32)
    step[::7] += 1
    blobs = tricomp.encode(array), tricomp.encode(step, array)
    monkeypatch.setattr("tricomp.codec.engine.MEMORY_BYTES", 1000)
    monkeypatch.setattr("tricomp.codec.engine._COPY_BYTES", 777)
    assert (tricomp.encode(unaligned(array)), tricomp.encode(unaligned(step), mapped(array))) == blobs
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="none: cannot hold a large leaf while it is encoded: .* set TMPDIR"):
        tricomp.encode(unaligned(array))


def test_an_unaligned_tensor_of_a_file_is_compressed(tmp_path):
    """The header of a safetensors file may have any length, and the tensors behind it stand where they stand."""
    array = plain(np.float32)
    header = b'{"w":{"dtype":"F32","shape":[60,70],"data_offsets":[0,16800]}}'
    for n_spaces in range(4):
        head = header + b" " * n_spaces
        data = len(head).to_bytes(8, "little") + head + array.tobytes()
        path = tmp_path / f"{n_spaces}.safetensors"
        path.write_bytes(data)
        tricomp.compress(path)
        path.unlink()
        tricomp.decompress(tmp_path / f"{n_spaces}.safetensors.tri")
        assert path.read_bytes() == data


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_to_decode_stand_anywhere(backend):
    array = plain(np.float32)
    blob = tricomp.encode(array, backend=backend)
    memory = mmap.mmap(-1, len(blob) + 5)
    for shift in range(5):
        memory[shift : shift + len(blob)] = blob
        for data in (memoryview(memory)[shift : shift + len(blob)], bytearray(blob), memoryview(blob).cast("b")):
            assert np.array_equal(tricomp.decode(data, backend=backend), array)
            del data
    twice = np.repeat(np.frombuffer(blob, np.uint8), 2).data[::2]
    with pytest.raises(InvalidArgument, match=r"decode: the bytes do not stand in a row in memory\. Pass bytes"):
        tricomp.decode(twice, backend=backend)
    with pytest.raises(InvalidArgument, match=r"load: the bytes do not stand in a row in memory\. Pass bytes"):
        pair.load(twice)


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_are_decoded_into_the_arrays_given(backend):
    arrays = [plain(np.float32), np.full((3, 50_000), 7, np.int16), weights((70, 3000)).astype(np.float64)]
    snapshot = snapshot_of(["a", "b", "c"], arrays)
    engine = codec.Engine(2, backend)
    for frame in codec.encode(snapshot, backend=backend):
        (i,) = frame.leaves
        room = np.full(frame.plan.n_words + 8, 0xAA, frame.plan.dtype.word_dtype)
        into = room[4:-4]
        job = DecodeJob(Plan.from_wire(frame.plan.to_wire()), frame.data)
        ((words, total, *_),) = engine.decode([job], [into])
        assert words.__array_interface__["data"] == into.__array_interface__["data"]
        assert np.array_equal(into, snapshot.words(i))
        assert (room[:4] == 0xAA).all()
        assert (room[-4:] == 0xAA).all()
        assert codec.digest_end(total, words.nbytes) == frame.digests[0]
