"""Copies of a state into kept memory: bit for bit, of any dtype, shape and strides, whatever the memory held before."""

import ml_dtypes
import numpy as np
import pytest

from tests.cases import of_dtype
from tricomp import dtypes, host_memory
from tricomp.host_memory import HostBuffer


def arrays(seed=0):
    found = [of_dtype(name, shape, seed) for name in dtypes.NAMES for shape in [(), (0, 3), (33,), (7, 65)]]
    grid = of_dtype("float32", (300, 500), seed)
    return [*found, grid.T, grid[::2, ::-3], np.broadcast_to(grid[0], (9, 500)), grid.astype(">f4")]


def test_every_array_is_copied_bit_for_bit():
    buffer = HostBuffer()
    for seed in (0, 1):  # the second time into the memory of the first
        sources = arrays(seed)
        made = buffer.copies(sources)
        for source, copy in zip(sources, made, strict=True):
            assert (copy.dtype, copy.shape, copy.tobytes()) == (source.dtype, source.shape, source.tobytes())
            assert copy.flags.c_contiguous
            assert copy.ctypes.data % 64 == 0 or not copy.nbytes
            assert not np.shares_memory(copy, source)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("dtype", ["u1", ml_dtypes.bfloat16, "f4", "c16"])
def test_large_arrays_are_cut_and_small_ones_share_a_thread(dtype, n_threads, monkeypatch):
    monkeypatch.setattr(host_memory, "_n_threads", lambda: n_threads)
    n_elements = (13 << 20) // np.dtype(dtype).itemsize + 1
    large = np.random.default_rng(0).integers(0, 256, n_elements * np.dtype(dtype).itemsize, np.uint8).view(dtype)
    sources = [large, *(large[i : i + 100] for i in range(500)), large[: n_elements // 2], large[::2]]
    for source, copy in zip(sources, HostBuffer().copies(sources), strict=True):
        assert copy.tobytes() == source.tobytes()


def test_memory_is_kept_until_it_is_released_or_too_small():
    buffer = HostBuffer()
    (first,) = buffer.copies([np.arange(1000)])
    (second,) = buffer.copies([np.arange(900)])
    assert np.shares_memory(first, second)
    (third,) = buffer.copies([np.arange(2000)])
    assert not np.shares_memory(second, third)
    buffer.release()
    assert not np.shares_memory(third, buffer.copies([np.arange(5)])[0])
    assert buffer.copies([]) == []


def test_memory_is_free_when_nobody_holds_a_copy():
    buffer = HostBuffer()
    assert buffer.is_free
    copies = buffer.copies([np.arange(100), np.arange(7, dtype="i2")])
    part = copies[1][2:5].view(np.uint8)
    assert buffer.holds(copies[0])
    assert buffer.holds(part)
    assert not buffer.holds(np.arange(100))
    assert not buffer.holds(copies[0][::2])
    assert not buffer.is_free
    del copies
    assert not buffer.is_free
    del part
    assert buffer.is_free
