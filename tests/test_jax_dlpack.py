"""Arrays of jax as words on a device, by DLPack, and back: up to the kernels, on the CPU where there is no GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("torch")

import jax
import tricomp_jax
from tricomp_jax import arrays

from tests.cases import ROOT, of_dtype, special_words
from tricomp import codec, dtypes
from tricomp.errors import BackendError
from tricomp.layout import DeviceArray

NARROW = ("int2", "int4", "uint2", "uint4", "float4_e2m1fn")  # jax has no float6
KINDS = ("float32", "bfloat16", "float8_e4m3fn", "complex64", "int64", "bool", "int4", "float4_e2m1fn")  # each its way
SHAPES = [(31, 3), (), (0, 3), (129,)]


def host_array(name, shape):
    """An array of structure and special words; of a narrow dtype, every code that it has."""
    if name in NARROW:
        dtype = np.dtype(getattr(ml_dtypes, name))
        n_codes = 1 << (2 if name.endswith("2") else 4)
        codes = np.resize(np.arange(n_codes, dtype=np.uint8), shape)
        return codes.view(dtype) if name.startswith("float") else codes.astype(dtype)
    array = np.array(of_dtype(name, (math.prod(shape),)).reshape(shape))
    words = array.reshape(-1).view(dtypes.by_name(name).word_dtype)
    if name != "bool":
        special = special_words(dtypes.by_name(name))[: len(words)]
        words[: len(special)] = special
    return array


def tree_of(names):
    return {name: host_array(name, (31, 9)) for name in names}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", [*dtypes.NAMES, *NARROW])
def test_words_of_every_dtype_and_back(name):
    for shape in SHAPES:
        host = host_array(name, shape)
        value = jax.device_put(host)
        stored = arrays.narrowed(host)
        leaf = arrays.device_array(value)
        assert isinstance(leaf, DeviceArray)
        assert (leaf.dtype.name, leaf.shape) == (stored.dtype.name, shape)
        assert leaf.words.numpy().tobytes() == stored.tobytes()
        assert arrays.to_host(leaf).tobytes() == stored.tobytes()
        back = arrays.from_device_array(leaf)
        assert (back.dtype.name, back.shape) == (stored.dtype.name, shape)
        assert np.asarray(back).tobytes() == stored.tobytes()
        if host.size and name not in ("bool", *NARROW) and not name.startswith("float8"):
            assert leaf.words.data_ptr() == value.unsafe_buffer_pointer()  # nothing was copied


def test_an_array_on_a_gpu_never_crosses_the_host(monkeypatch):
    monkeypatch.setattr(arrays, "is_on_gpu", lambda value: True)
    values = {name: jax.device_put(host) for name, host in tree_of((*dtypes.NAMES, *NARROW)).items()}
    keys = jax.random.split(jax.random.key(3), 5)

    def no_host(*_):
        raise AssertionError("an array was copied to the host")

    with monkeypatch.context() as patch:
        patch.setattr(np, "asarray", no_host)
        flat = tricomp_jax.flatten({**values, "keys": keys})
    assert all(type(leaf) is DeviceArray for leaf in flat.tree.values())
    back = tricomp_jax.unflatten(flat, {**values, "keys": keys})
    for name, value in values.items():
        assert (back[name].dtype, np.asarray(back[name]).tobytes()) == (value.dtype, np.asarray(value).tobytes())
    assert np.array_equal(jax.random.key_data(back["keys"]), jax.random.key_data(keys))


def test_what_torch_does_not_take_goes_by_the_host_with_one_warning(monkeypatch, caplog):
    def refuse(_):
        raise BackendError("no such device.")

    monkeypatch.setattr(arrays, "is_on_gpu", lambda value: True)
    monkeypatch.setattr(codec, "from_dlpack", refuse)
    arrays._warn_of_host.cache_clear()
    host = host_array("bfloat16", (31, 3))
    flat = tricomp_jax.flatten([jax.device_put(host), jax.device_put(host)])
    assert [leaf.tobytes() for leaf in flat.tree] == [host.tobytes()] * 2
    assert len(caplog.records) == 1
    assert "copied to the host and compressed there: torch does not take them: BackendError" in caplog.text


INTERPRETED = """
import json
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
import tricomp, tricomp_jax
from tricomp.kernels.device import IS_INTERPRETED
from tricomp_jax import arrays, files
from tests.test_jax_dlpack import KINDS, tree_of
assert IS_INTERPRETED
hosts = tree_of(KINDS)
values = {name: jax.device_put(host) for name, host in hosts.items()}
spec = tricomp.Spec(chunk_log2=10)
tricomp_jax.save("native.tri", values, spec=spec, backend="native")
arrays.is_on_gpu = lambda value: True
flat = tricomp_jax.flatten(values)
assert all(type(leaf) is tricomp.layout.DeviceArray for leaf in flat.tree.values())
tricomp_jax.save("triton.tri", values, spec=spec, backend="triton")
assert open("native.tri", "rb").read() == open("triton.tri", "rb").read()
files._gpu_name = lambda device: "cpu"
found = []
kept = arrays.from_device_array
arrays.from_device_array = lambda leaf: found.append(leaf) or kept(leaf)
back = tricomp_jax.load("triton.tri", values)
for name, value in values.items():
    assert (back[name].dtype, np.asarray(back[name]).tobytes()) == (value.dtype, np.asarray(value).tobytes()), name
print(json.dumps(len(found)))
"""


def test_kernels_write_the_same_file(tmp_path):
    pytest.importorskip("triton")
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == 6  # decoded on the device; narrow ones are checked on the host
