"""Backends and threads: what may be asked for, what is used, and what is said when the native module is missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import tricomp
from tests.cases import weights
from tricomp import backends, codec, native
from tricomp import numpy as pair
from tricomp.codec.engine import MOST_THREADS, Engine, cores
from tricomp.errors import InvalidArgument

ARRAY = weights((130, 129))


def python(code, **environ):
    """Run code without the native module."""
    environ = {"TRICOMP_NATIVE_MODULE": "/nowhere/_core.so", "PATH": "/usr/bin", **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ)


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, True, False, 2.0, "2", b"2", [2], np.float32(2)])
def test_threads_that_are_no_number_from_1_are_refused(threads, tmp_path):
    blob = tricomp.encode(ARRAY)
    tricomp.save(tmp_path / "a.tri", {"w": ARRAY})
    np.save(tmp_path / "a.npy", ARRAY)
    tricomp.compress(tmp_path / "a.npy", tmp_path / "b.tri")
    for call in (
        lambda: Engine(threads),
        lambda: tricomp.encode(ARRAY, threads=threads),
        lambda: tricomp.decode(blob, threads=threads),
        lambda: tricomp.save(tmp_path / "c.tri", {"w": ARRAY}, threads=threads),
        lambda: tricomp.load(tmp_path / "a.tri", threads=threads),
        lambda: tricomp.open(tmp_path / "a.tri", threads=threads),
        lambda: tricomp.Store(tmp_path / "run", threads=threads),
        lambda: tricomp.compress(tmp_path / "a.npy", tmp_path / "c.tri", threads=threads),
        lambda: tricomp.decompress(tmp_path / "b.tri", tmp_path / "c.npy", threads=threads),
        lambda: pair.save_file({"w": ARRAY}, tmp_path / "c.tri", threads=threads),
        lambda: pair.load_file(tmp_path / "a.tri", threads=threads),
        lambda: pair.safe_open(tmp_path / "a.tri", threads=threads),
        lambda: pair.save({"w": ARRAY}, threads=threads),
        lambda: codec.encode(tricomp.content.content_of({"w": ARRAY}).snapshot, threads=threads),
    ):
        with pytest.raises(InvalidArgument, match=rf"threads: expected a number from 1 to {MOST_THREADS}, or None for"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.tri", "b.tri"]


@pytest.mark.parametrize("threads", [None, 1, 2, np.int64(3), np.uint8(5)])
def test_the_bytes_do_not_depend_on_the_threads(threads, tmp_path):
    assert tricomp.encode(ARRAY, threads=threads) == tricomp.encode(ARRAY, threads=1)
    tree = {f"w{i}": weights((40 + i, 700), seed=i) for i in range(5)}
    tricomp.save(tmp_path / "1.tri", tree, threads=1)
    tricomp.save(tmp_path / "n.tri", tree, threads=threads)
    assert (tmp_path / "1.tri").read_bytes() == (tmp_path / "n.tri").read_bytes()
    back = tricomp.load(tmp_path / "n.tri", threads=threads)
    assert all(np.array_equal(back[path], tree[path]) for path in tree)


def test_by_default_there_is_a_thread_for_each_core():
    assert Engine().n_threads == cores() >= 1
    three: Any = np.int8(3)
    assert Engine(3).n_threads == Engine(three).n_threads == 3
    assert type(Engine(three).threads) is int


NAMES = "'auto', 'triton', 'native' or 'reference'"


def test_a_backend_is_asked_for_by_name(monkeypatch):
    for name in ("abacus", "Native", 3):
        for call in (
            lambda name=name: tricomp.encode(ARRAY, backend=name),
            lambda name=name: tricomp.decode(b"", backend=name),
            lambda name=name: tricomp.Store("nowhere", backend=name),
            lambda name=name: tricomp.open("nowhere.tri", backend=name),
        ):
            with pytest.raises(InvalidArgument, match=f"backend: expected {NAMES}, got {name!r}"):
                call()
    monkeypatch.setenv("TRICOMP_BACKEND", "reference")
    assert Engine().coder.name == Engine(backend="reference").coder.name == "reference"
    monkeypatch.setenv("TRICOMP_BACKEND", "abacus")
    with pytest.raises(InvalidArgument, match=f"TRICOMP_BACKEND: expected {NAMES}, got 'abacus'"):
        Engine()
    monkeypatch.setenv("TRICOMP_BACKEND", "")
    assert Engine().coder is Engine(backend="auto").coder


@pytest.mark.skipif(not native.is_there(), reason="needs the native module")
def test_auto_is_native_where_it_is_there(monkeypatch, tmp_path):
    monkeypatch.delenv("TRICOMP_BACKEND", raising=False)
    assert Engine().coder is Engine(backend="native").coder
    assert Engine().coder.name == "native"
    assert backends.live()["native"] == f"{native.isa()}, {cores()} threads"
    for backend in ("native", "reference"):
        tricomp.save(tmp_path / f"{backend}.tri", {"w": ARRAY, "small": np.arange(7)}, backend=backend)
        for other in ("native", "reference"):
            back = tricomp.load(tmp_path / f"{backend}.tri", backend=other)
            assert np.array_equal(back["w"], ARRAY)
    assert (tmp_path / "native.tri").read_bytes() == (tmp_path / "reference.tri").read_bytes()
    assert tricomp.encode(ARRAY, backend="native") == tricomp.encode(ARRAY, backend="reference")


def test_without_the_module_the_reference_works_and_says_so_once():
    code = (
        "import numpy as np, tricomp; a = np.arange(5000.); blob = tricomp.encode(a);"
        "assert (tricomp.decode(blob) == a).all(); tricomp.encode(a); print(tricomp.backends.live()['native'])"
    )
    done = python(f"import tricomp.backends\n{code}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the native backend is not there (") == 1
    assert "the reference backend does the work, many times slower. Install tricomp where there is a C++" in done.stderr
    assert done.stdout.startswith("none: ")
    quiet = python(f"import tricomp.backends\n{code}", TRICOMP_BACKEND="reference")
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_without_the_module_native_is_refused_and_told_how_to_get():
    code = "import numpy as np, tricomp; tricomp.encode(np.ones(3){})"
    for done in (python(code.format(", backend='native'")), python(code.format(""), TRICOMP_BACKEND="native")):
        assert done.returncode == 1
        error = done.stderr.strip().split("\n")[-1]
        assert error.startswith("tricomp.errors.InvalidArgument: the native backend is not there (")
        assert "C++ compiler" in error
        assert "backend='reference'" in error
    done = python("import tricomp", TRICOMP_NATIVE="require")
    assert "InvalidArgument: the native backend is not there (" in done.stderr


def test_importing_and_inspecting_look_for_no_module(tmp_path):
    tricomp.save(tmp_path / "a.tri", {"w": ARRAY})
    code = f"from tricomp.cli import main; main(['inspect', {str(tmp_path / 'a.tri')!r}])"
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
