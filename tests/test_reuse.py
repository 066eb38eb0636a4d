"""Memory that is used again: only what nobody holds, whoever held it and in whatever view."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tricomp.reuse import Reuse

F4 = np.dtype(np.float32)


def place(array):
    return array.__array_interface__["data"][0]


def test_what_is_dropped_is_given_again_and_what_is_held_is_not():
    room = Reuse(1 << 12)
    first = room.array(1000, F4)
    assert (first.shape, first.dtype, first.flags.writeable) == ((1000,), F4, True)
    at = place(first)
    assert place(room.array(900, F4)) != at
    del first
    assert place(room.array(1000, F4)) == at


@pytest.mark.parametrize(
    "hold", [lambda a: a[3:5], lambda a: a.view(np.uint8).data, lambda a: a.view("<u4").reshape(2, -1)[1]]
)
def test_any_view_holds_it(hold):
    room = Reuse(1 << 12)
    array = room.array(1000, F4)
    array[...] = 7
    held = hold(array)
    before = bytes(held)
    del array
    for _ in range(9):
        room.array(1000, F4)[...] = 9
    assert bytes(held) == before


def test_many_arrays_share_a_block_and_do_not_overlap():
    room = Reuse(1 << 16)
    arrays = [room.array(n, np.dtype(np.uint16)) for n in (1, 0, 33, 1000, 7, 30_000, 40_000, 3)]
    for i, array in enumerate(arrays):
        assert place(array) % 16 == 0
        array[...] = i
    assert all((array == i).all() for i, array in enumerate(arrays))


def test_little_is_kept():
    room = Reuse(1 << 10, most=2)
    held = [room.array(n, F4) for n in (300, 1000, 5000, 200)]
    del held
    assert len(room._blocks) <= 2


def test_it_may_be_dropped_in_another_thread():
    room = Reuse(1 << 12)
    box = [room.array(1000, F4)]
    at = place(box[0])
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert place(room.array(1000, F4)) == at


def test_where_references_are_not_counted_all_memory_is_fresh(monkeypatch):
    monkeypatch.delattr("sys.getrefcount")
    room = Reuse(1 << 12)
    assert room.array(1000, F4).shape == (1000,)
    assert room._blocks == []
