"""SIGKILL at random instants of a save: the last committed step loads bit for bit, and the next writer goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import tricomp
from tests.cases import equal

N_KILLS = 50

# One line on stdin starts one writer, in a fork of a process that has imported everything already.
WRITERS = """
import os, sys
import numpy as np
import tricomp
from tests.cases import equal
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from test_crash import state

def say(word, number):  # in one write, so that lines of two processes do not mix
    os.write(1, f"{word} {number}\\n".encode())

def to_store(folder):
    options = {"keyframe": tricomp.KeyframeEvery(4), "keep": [tricomp.KeepLast(2)]}
    store = tricomp.Store(folder, **options)
    step = (store.latest() or 0) + 1
    if step > 1:
        store.load()
    while True:
        say("saving", step)
        store.save(step, state(step))
        say("saved", step)
        step += 1

def to_path(folder):
    step = 1
    while True:
        say("saving", step)
        tricomp.save(os.path.join(folder, "x.tri"), state(step))
        say("saved", step)
        step += 1

for line in sys.stdin:
    writer = os.fork()
    if not writer:
        {"store": to_store, "path": to_path}[sys.argv[2]](sys.argv[3])
    say("writer", writer)
    os.waitpid(writer, 0)
    say("killed", writer)
"""


def state(step):
    """A training state with structure, different at every step."""
    rng = np.random.default_rng(3)
    rows = np.exp2(rng.integers(-6, 6, (60, 1)))
    w = rng.standard_normal((60, 150)) * rows
    w *= 1 + np.random.default_rng(step).standard_normal(w.shape) * 1e-4
    moments = {i: {"v": (w[i::3] ** 2).astype(np.float32), "step": step} for i in range(3)}
    return {"w": w.astype(np.float32), "opt": moments, "few": np.arange(500) // 100 + step}


class Killer:
    """Starts writers, one after the other, and kills each somewhere in a save."""

    def __init__(self, mode, folder):
        command = [sys.executable, "-c", WRITERS, os.path.abspath(__file__), mode, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked, self.answers = self.process.stdin, self.process.stdout
        self.writer = 0
        self.random = random.Random(0)
        self.durations = [0.02]

    def read(self):
        word, number = self.answers.readline().split()
        return word, int(number)

    def kill_one(self):
        """Start a writer, let it save up to twice, kill it in the save after. Returns the last step it saved, or 0."""
        self.asked.write("go\n")
        self.asked.flush()
        begun, saved, n_saves = 0.0, 0, self.random.choice([0, 0, 1, 2])
        while True:
            word, number = self.read()
            if word == "writer":
                self.writer = number
            elif word == "saving":
                begun = time.perf_counter()
            elif word == "saved":
                saved, n_saves = number, n_saves - 1
                self.durations = [*self.durations[-4:], time.perf_counter() - begun]
            if self.writer and word == "saving" and n_saves <= 0:
                break
        time.sleep(self.random.uniform(0, 1.1) * sorted(self.durations)[len(self.durations) // 2])
        os.kill(self.writer, signal.SIGKILL)
        while True:
            word, number = self.read()
            if word == "saved":
                saved = number
            elif word == "killed":
                self.writer = 0
                return saved

    def close(self):
        """Kill what still runs."""
        if self.writer:
            os.kill(self.writer, signal.SIGKILL)
        self.process.kill()
        self.process.wait(20)
        self.asked.close()
        self.answers.close()


@contextmanager
def killer(mode, folder):
    found = Killer(mode, folder)
    try:
        yield found
    finally:
        found.close()


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_a_store_survives_kills_at_random_instants(tmp_path):
    folder = tmp_path / "run"
    last, n_torn = 0, 0
    with killer("store", folder) as writers:
        for _ in range(N_KILLS):
            last = max(last, writers.kill_one())
            store = tricomp.Store(folder)
            latest = store.latest()
            # A step counts from the rename on, which may come before the writer could say so.
            assert (latest or 0) in (last, last + 1)
            last = latest or 0
            n_torn += bool(os.path.exists(folder) and leftovers(folder))
            if latest is not None:
                assert equal(store.load(), state(latest))
                report = store.verify()
                assert report.is_clean, str(report)
                assert latest in report.intact
    assert last > N_KILLS / 4  # they did save in between
    assert n_torn > N_KILLS / 10  # and were killed in the middle of it
    with tricomp.Store(folder) as store:
        store.save(last + 1, state(last + 1))
        assert leftovers(folder) == []
        assert equal(store.load(), state(last + 1))
        assert store.verify().is_clean


def test_a_path_survives_kills_at_random_instants(tmp_path):
    path = Path(tmp_path / "x.tri")
    tricomp.save(path, state(1))
    with killer("path", tmp_path) as writers:
        for _ in range(10):
            last = writers.kill_one()
            tree = tricomp.load(path)
            step = tree["opt"][0]["step"]
            assert step >= last
            assert equal(tree, state(step))
    tricomp.save(path, state(2))
    assert os.listdir(tmp_path) == ["x.tri"]
