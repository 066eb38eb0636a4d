"""Saves behind training: order, back-pressure, errors that reach somebody, and the end of the interpreter."""

import logging
import subprocess
import sys
import threading
from functools import partial

import pytest

from tricomp.background import Background
from tricomp.errors import StorageError


def test_saves_run_one_after_the_other_in_order():
    behind: Background[int] = Background(in_flight=3)
    go, done = threading.Event(), []

    def save(number):
        go.wait(10)
        done.append(number)
        return number

    savings = []
    for number in range(3):
        behind.ready()
        savings.append(behind.submit(f"step {number}", partial(save, number)))
    assert not any(saving.done() for saving in savings)
    assert not behind.is_idle
    go.set()
    assert [saving.result(10) for saving in savings] == done == [0, 1, 2]
    behind.wait()
    assert behind.is_idle


def test_no_more_than_agreed_are_in_flight():
    behind: Background[bool] = Background(in_flight=2)
    gates = [threading.Event() for _ in range(3)]
    begun = []
    for number in range(2):
        behind.ready()
        behind.submit(f"step {number}", partial(gates[number].wait, 10))

    def third():
        behind.ready()
        begun.append(gates[0].is_set())

    thread = threading.Thread(target=third)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    gates[0].set()
    thread.join(10)
    assert begun == [True]
    gates[1].set()
    behind.wait()


def failing(text):
    def save():
        raise StorageError(text)

    return save


@pytest.mark.parametrize("call", ["ready", "wait"])
def test_an_error_is_raised_by_the_next_call_once(call, caplog):
    behind: Background[int] = Background()
    with caplog.at_level(logging.ERROR):
        behind.submit("step 7", failing("the disk is full"))
        with pytest.raises(StorageError, match="the disk is full") as caught:
            getattr(behind, call)()
    assert caught.value.__notes__ == ["This is what became of step 7, which was saved in the background."]
    assert "step 7 could not be saved: StorageError: the disk is full" in caplog.text
    behind.wait()
    behind.ready()
    assert behind.submit("step 8", lambda: 8).result(10) == 8


def test_an_error_that_its_future_told_is_not_told_again():
    behind: Background[int] = Background(in_flight=2)
    first = behind.submit("step 1", failing("one"))
    second = behind.submit("step 2", failing("two"))
    with pytest.raises(StorageError, match="one"):
        first.result(10)
    assert isinstance(second.exception(10), StorageError)
    behind.wait()


def test_of_several_errors_the_first_is_raised():
    behind: Background[int] = Background(in_flight=2)
    for number in (1, 2):
        behind.submit(f"step {number}", failing(f"number {number}"))
    with pytest.raises(StorageError, match="number 1"):
        behind.wait()
    behind.wait()


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise ValueError('training broke')"])
def test_the_interpreter_ends_after_the_last_save(tmp_path, end):
    code = (
        "import sys, time, tricomp, numpy as np\nfrom tricomp.background import Background\n"
        "behind = Background(2)\n"
        "def save(step):\n    time.sleep(0.3)\n    return store.save(step, {'w': np.arange(70000.0) * step})\n"
        f"store = tricomp.Store({str(tmp_path)!r})\n"
        "for step in (1, 2):\n    behind.ready()\n    behind.submit(str(step), lambda step=step: save(step))\n" + end
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == {"pass": 0, "sys.exit(3)": 3}.get(end, 1), ran.stderr
    from tricomp import Store

    assert Store(tmp_path).steps() == [1, 2]
    assert str(Store(tmp_path).verify()) == "2 steps intact, 0 broken"
