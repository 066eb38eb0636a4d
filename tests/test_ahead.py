"""An iterator ahead of its taker: order, how far ahead, and that nothing is left of it however it ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest

from tricomp.ahead import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "tricomp-ahead"]


@pytest.mark.parametrize("n_ahead", [1, 2, 5])
def test_all_items_come_in_order(n_ahead):
    assert list(ahead(iter(range(100)), n_ahead)) == list(range(100))
    assert list(ahead([], n_ahead)) == []
    assert threads() == []


@pytest.mark.parametrize("n_ahead", [1, 3])
def test_it_is_no_further_ahead_than_agreed(n_ahead):
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    for i in ahead(items(), n_ahead):
        deadline = time.monotonic() + 5
        while len(made) < min(i + 1 + n_ahead, 20) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(made) == min(i + 1 + n_ahead, 20)


def test_how_far_ahead_may_be_told_in_bytes():
    made = []

    def items():
        for n_bytes in (5, 5, 50, 1, 1, 1, 100, 3):
            made.append(n_bytes)
            yield bytes(n_bytes)

    ready = ahead(items(), 10, len)
    for n_made in (3, 3, 7, 7, 7, 7, 8, 8):
        next(ready)
        deadline = time.monotonic() + 5
        while len(made) < n_made and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(made) == n_made
    assert list(ready) == []


def test_it_works_while_the_taker_does():
    seen = threading.Event()

    def items():
        yield 0
        seen.set()
        yield 1

    ready = ahead(items())
    assert next(ready) == 0
    assert seen.wait(5)
    assert list(ready) == [1]


def test_what_the_items_raise_is_raised_at_the_taker():
    def items():
        yield 0
        raise ZeroDivisionError("here")

    taken: list[int] = []
    with pytest.raises(ZeroDivisionError, match="here") as caught:
        taken.extend(ahead(items()))
    assert taken == [0]
    assert "items" in [frame.name for frame in caught.traceback]
    assert threads() == []


def test_closing_it_closes_the_items_and_ends_the_thread():
    is_closed = False

    def items():
        nonlocal is_closed
        try:
            yield from range(1000)
        finally:
            is_closed = True

    ready = ahead(items())
    assert next(ready) == 0
    ready.close()
    assert is_closed
    assert threads() == []
    ready = ahead(items())
    assert next(ready) == 0
    del ready
    gc.collect()
    assert threads() == []


def test_items_are_let_go_of():
    class Item:
        pass

    known = []

    def items():
        for _ in range(4):
            item = Item()
            known.append(weakref.ref(item))
            yield item
            del item

    for item in ahead(items()):
        del item
        gc.collect()
        assert sum(one() is not None for one in known) <= 1
    assert not any(one() is not None for one in known)


def test_without_threads_items_are_taken_here(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(ahead(iter(range(5)))) == list(range(5))


def test_an_interrupt_ends_it():
    code = """
        import os, signal, threading, time
        from tricomp.ahead import ahead
        def items():
            while True:
                time.sleep(0.01)
                yield 0
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        ready = ahead(items())
        try:
            for _ in ready: time.sleep(0.001)
        except KeyboardInterrupt:
            ready.close()
            print([t.name for t in threading.enumerate() if t.name == "tricomp-ahead"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
