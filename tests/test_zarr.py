"""The codecs for numcodecs and zarr: the same bytes come back, whatever dtype and memory order; fewer are stored."""

import json
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests.cases import ODD_SIZES, moments, of_dtype, special_words, weights
from tricomp import dtypes
from tricomp.errors import CorruptFile, CorruptFrame, InvalidArgument, UnsupportedDtype

numcodecs = pytest.importorskip("numcodecs")
zarr = pytest.importorskip("zarr", minversion="3.0")

from zarr.registry import register_codec  # noqa: E402

from tricomp.numcodecs import Tricomp  # noqa: E402
from tricomp.zarr import TricompCodec  # noqa: E402

register_codec("tricomp", TricompCodec)  # as the entry point does


def memory_of(array):
    """The bytes of an array in the order of its memory."""
    return np.asarray(array).tobytes(order="A")


@pytest.fixture(params=["dense", "fast"])
def codec(request):
    return Tricomp(tier=request.param)


# numcodecs


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_every_dtype_comes_back_byte_for_byte(codec, name):
    dtype = dtypes.by_name(name)
    special = dtypes.from_words(special_words(dtype), dtype, (14 // dtype.words_per_element,))
    for array in (*(of_dtype(name, (n,)) for n in ODD_SIZES), of_dtype(name, (7, 33)), special):
        found = codec.decode(codec.encode(array))
        assert (found.dtype, found.ndim) == (array.dtype, 1)
        assert memory_of(found) == memory_of(array)


OTHERS = [
    np.arange(35, dtype=">f4").reshape(5, 7),
    np.arange(35, dtype=">i8"),
    np.arange(35, dtype=">c16"),
    np.arange("2001-01-01", "2001-03-01", dtype="M8[D]"),
    np.arange(9, dtype=">m8[us]"),
    np.array(["a", "bcd", ""], dtype="U3"),
    np.array([b"a", b"bcd", b""], dtype="S3"),
    np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "<i4"), ("b", ">f8")]),
    np.arange(5, dtype=np.longdouble),
    np.arange(7).astype(ml_dtypes.int4),
    np.array(3.5, np.float32),
    np.array(7, ">u2"),
    np.zeros((0, 4), np.float64),
    np.zeros((4, 0), ">f4"),
    moments((9, 31)).T,
    moments((5, 7, 9)).transpose(2, 1, 0),
    weights((31, 41))[::3, 1::2],
    weights((6, 7, 8)).transpose(1, 0, 2),
    np.asfortranarray(moments((33, 33)).astype(">f4")),
    np.broadcast_to(np.float32(2), (3, 5)),
]


@pytest.mark.parametrize("array", OTHERS, ids=lambda array: f"{array.dtype.str}{list(array.shape)}")
def test_other_arrays_come_back_byte_for_byte(codec, array):
    found = codec.decode(codec.encode(array))
    assert memory_of(found) == memory_of(array)
    assert codec.encode(array) == codec.encode(array.copy(order="K"))
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    out = np.empty(array.shape, array.dtype, order=order)  # type: ignore[call-overload]
    memoryview(out.reshape(-1, order="A").view(np.uint8))[:] = b"\x55" * out.nbytes
    assert codec.decode(codec.encode(array), out=out) is out
    assert out.tobytes() == array.tobytes()


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
@pytest.mark.parametrize("data", [b"", b"\x00", bytes(range(256)) * 3])
def test_buffers_of_bytes(codec, buffer, data):
    encoded = codec.encode(buffer(data))
    assert isinstance(encoded, bytes)
    assert bytes(codec.decode(buffer(encoded))) == data
    out = bytearray(b"\x55" * len(data))
    codec.decode(encoded, out=out)
    assert out == data


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64", "complex64", "int16"])
def test_a_dtype_says_what_bytes_are(name):
    array = of_dtype(name, (40, 64))
    codec, blind = Tricomp(dtype=name), Tricomp()
    for buffer in (array.tobytes(), array.view(np.uint8), array):
        found = codec.decode(codec.encode(buffer))
        assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes())
    if dtypes.by_name(name).is_float:
        assert len(codec.encode(array.tobytes())) < len(blind.encode(array.tobytes()))
    with pytest.raises(InvalidArgument, match=f"a buffer of 7 bytes holds no whole number of elements of {name}, "):
        codec.encode(b"1234567")
    assert codec.encode(b"") == codec.encode(np.zeros(0, array.dtype))


def test_a_dtype_of_another_byte_order_is_viewed_too():
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    assert memory_of(Tricomp(dtype="float32").decode(Tricomp(dtype="float32").encode(array))) == array.tobytes()


def test_the_configuration_makes_the_same_codec():
    assert Tricomp().get_config() == {"id": "tricomp", "tier": "dense", "dtype": None}
    codec = Tricomp(tier="fast", dtype=ml_dtypes.bfloat16)
    assert codec.get_config() == {"id": "tricomp", "tier": "fast", "dtype": "bfloat16"}
    again = numcodecs.get_codec(json.loads(json.dumps(codec.get_config())))
    assert again == codec
    assert again != Tricomp()
    assert repr(again) == "Tricomp(dtype='bfloat16', tier='fast')"
    assert Tricomp(dtype="<f4").dtype == Tricomp(dtype=np.float32).dtype == "float32"
    with pytest.raises(InvalidArgument, match="tier"):
        Tricomp(tier="best")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedDtype, match="datetime64"):
        Tricomp(dtype="M8[s]")


def test_what_cannot_be_encoded_or_decoded_is_told():
    codec = Tricomp()
    for array in (np.array([1, "a"], object), np.zeros(2, [("a", object)])):
        with pytest.raises(UnsupportedDtype, match="holds Python objects. Encode them to bytes by another codec first"):
            codec.encode(array)
    encoded = codec.encode(weights((20, 30)))
    for out in (bytearray(2399), np.zeros(601, np.float32)):
        with pytest.raises(InvalidArgument, match="out: has .* bytes, and 2400 were encoded"):
            codec.decode(encoded, out=out)
    for data in (b"", b"\xc3", encoded[:-1], b"\xc3\xc3" + encoded, encoded[:50] + b"\x00" + encoded[51:]):
        with pytest.raises((CorruptFile, CorruptFrame)):
            codec.decode(data)


def test_the_codec_knows_shape_and_order():
    array = moments((64, 300))
    flat = len(Tricomp().encode(array.reshape(-1)))
    assert len(Tricomp().encode(array)) < 0.98 * flat
    assert len(Tricomp().encode(np.asfortranarray(array))) < 0.98 * flat


def test_the_entry_points_name_what_is_there():
    found = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert found["numcodecs.codecs"] == {"tricomp": "tricomp.numcodecs:Tricomp"}
    assert found["zarr.codecs"] == {"tricomp": "tricomp.zarr:TricompCodec"}


# zarr

FORMATS = {
    2: {"zarr_format": 2, "compressors": Tricomp()},
    3: {"zarr_format": 3, "serializer": TricompCodec(), "compressors": None},
}


def stored(array, zarr_format, store=None, **options):
    """A zarr array of that format with tricomp's codec."""
    store = zarr.storage.MemoryStore() if store is None else store
    options = {"chunks": (20, 33), **FORMATS[zarr_format], **options}
    return zarr.create_array(store, data=array, **options)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["float32", "float16", "float64", "complex64", "int32", "uint8", "bool"])
def test_arrays_are_read_as_they_were_written(tmp_path, zarr_format, order, name):
    array = of_dtype(name, (47, 100))
    made = stored(array, zarr_format, str(tmp_path), config={"order": order})
    made[3:5, 7:50] = array[3:5, 7:50]  # a chunk is read and written again
    found = zarr.open_array(str(tmp_path), mode="r")
    assert found[:].tobytes() == array.tobytes()
    assert found[13:41, 30:40].tobytes() == array[13:41, 30:40].tobytes()
    assert found[46, 99].tobytes() == array[46, 99].tobytes()
    codec = found.compressors[0] if zarr_format == 2 else found.serializer
    assert codec == (Tricomp() if zarr_format == 2 else TricompCodec())


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", [">f4", ">i8", "M8[s]", "S5", "U4"])
def test_dtypes_that_tricomp_does_not_know_and_big_endian_ones(zarr_format, dtype):
    array = np.arange(47 * 100).reshape(47, 100).astype(dtype)
    if dtype in ("S5", "U4", "M8[s]"):
        pytest.importorskip("zarr", minversion="3.1")
    store = zarr.storage.MemoryStore()
    stored(array, zarr_format, store)
    found = zarr.open_array(store, mode="r")[:]
    assert found.astype(array.dtype).tobytes() == array.tobytes()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_that_were_never_written_hold_the_fill_value(zarr_format):
    options = {"shape": (50, 70), "chunks": (20, 33), "dtype": "f4", **FORMATS[zarr_format]}
    made = zarr.create_array(zarr.storage.MemoryStore(), fill_value=2.5, **options)
    assert (made[:] == 2.5).all()
    made[0:3, 5] = 1
    assert made[:].sum() == 2.5 * (50 * 70 - 3) + 3
    plain = zarr.create_array(zarr.storage.MemoryStore(), **options)
    plain[10:20, 10:20] = np.nan
    assert np.isnan(plain[:]).sum() == 100
    assert not np.isnan(plain[30:]).any()


@pytest.mark.parametrize("shape", [(), (1,), (1000,), (3, 4, 5, 6), (0, 5)])
def test_shapes(shape):
    array = np.asarray(weights(shape) if shape else np.float32(1.5))
    made = zarr.create_array(zarr.storage.MemoryStore(), data=array, **FORMATS[3])
    assert (made.shape, made[...].tobytes()) == (shape, array.tobytes())


def test_shards(tmp_path):
    array = moments((90, 128))
    stored(array, 3, str(tmp_path), chunks=(15, 32), shards=(45, 64))
    found = zarr.open_array(str(tmp_path), mode="r+")
    assert found[17:33, 30:70].tobytes() == array[17:33, 30:70].tobytes()
    found[0:2] = 7
    assert (found[0:2] == 7).all()
    assert found[2:].tobytes() == array[2:].tobytes()


def test_the_fast_tier_and_a_compressor_behind():
    array = moments((47, 100))
    codec = TricompCodec(tier="fast")
    made = stored(array, 3, serializer=codec, compressors=zarr.codecs.ZstdCodec())
    assert made[:].tobytes() == array.tobytes()
    assert TricompCodec.from_dict(codec.to_dict()) == codec
    assert TricompCodec.from_dict({"name": "tricomp"}) == TricompCodec()
    with pytest.raises(InvalidArgument, match="expected the name 'tricomp' and at most a tier. Upgrade tricomp"):
        TricompCodec.from_dict({"name": "tricomp", "configuration": {"level": 3}})
    with pytest.raises(InvalidArgument, match="tier"):
        TricompCodec(tier="best")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        codec.compute_encoded_size(1, None)  # type: ignore[arg-type]


def test_damaged_chunks_are_told(tmp_path):
    array = weights((20, 33))
    stored(array, 3, str(tmp_path))
    chunk = tmp_path / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    chunk.write_bytes(data[:-9])
    with pytest.raises(CorruptFile, match="it is cut or damaged"):
        zarr.open_array(str(tmp_path))[:]
    chunk.write_bytes(tricomp.encode(array[:3]))
    with pytest.raises(CorruptFile, match=r"chunk: holds 396 bytes, expected float32\[20, 33\]"):
        zarr.open_array(str(tmp_path))[:]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("make", [moments, weights])
def test_training_state_takes_less_than_by_zarrs_default_and_by_blosc(zarr_format, make):
    array = make((512, 400))

    def n_bytes(**options):
        store = zarr.storage.MemoryStore()
        zarr.create_array(store, data=array, chunks=(256, 400), zarr_format=zarr_format, **options)
        return sum(len(data) for key, data in store._store_dict.items() if not key.endswith((".json", ".zattrs")))

    blosc = {
        2: {"compressors": numcodecs.Blosc(cname="zstd", clevel=9, shuffle=numcodecs.Blosc.SHUFFLE)},
        3: {"compressors": zarr.codecs.BloscCodec(cname="zstd", clevel=9, shuffle="shuffle")},
    }
    options = {key: value for key, value in FORMATS[zarr_format].items() if key != "zarr_format"}
    ours = n_bytes(**options)
    assert ours < 0.97 * n_bytes()
    assert ours < 0.98 * n_bytes(**blosc[zarr_format])


# threads


def test_threads_are_no_part_of_what_is_stored():
    array = weights((70, 90))
    one, many = Tricomp(threads=1), Tricomp(threads=3)
    assert one.get_config() == many.get_config() == Tricomp().get_config()
    assert one == many
    assert "threads" not in repr(many)
    assert one.encode(array) == many.encode(array)
    assert np.array_equal(many.decode(one.encode(array)).reshape(array.shape), array)
    assert TricompCodec(threads=3) == TricompCodec()
    assert TricompCodec(threads=3).to_dict() == TricompCodec().to_dict()
    store = zarr.storage.MemoryStore()
    made = zarr.create_array(
        store, shape=array.shape, chunks=(30, 40), dtype="f4", serializer=TricompCodec(threads=2), compressors=None
    )
    made[:] = array
    assert np.array_equal(zarr.open_array(store, mode="r")[:], array)
    for threads in (0, "2", True):
        for kind in (Tricomp, TricompCodec):
            with pytest.raises(InvalidArgument, match="threads: expected a number from 1 to 4096"):
                kind(threads=threads)  # type: ignore[arg-type]
