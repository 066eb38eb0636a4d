"""The extension module as it is built: that it is there, what it shares with others, that code of one instruction set
is never taken for another's, and that everything works without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import native_build
from tricomp import native
from tricomp.errors import InvalidArgument

ROOT = Path(__file__).resolve().parents[1]
SETS = ("avx512", "avx2", "portable")  # best first
ABSENT = "does not have it"
HAS_MODULE = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
HAS_COMPILER = pytest.mark.skipif(not native_build.has_compiler(), reason="no C++ compiler here")
HAS_NM = pytest.mark.skipif(not native_build.tool("nm"), reason="no nm here")
HAS_OBJDUMP = pytest.mark.skipif(not native_build.tool("objdump"), reason="no objdump here")
ON_X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="not an x86-64")

ROUND_TRIP = (
    "import numpy, tricomp; from tricomp import native;"
    "array = numpy.random.default_rng(0).normal(size=(300, 301)).astype('f4');"
    "assert (tricomp.decode(tricomp.encode(array)) == array).all();"
)


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if key not in ("TRICOMP_NATIVE", "TRICOMP_ISA")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**known, **environ}, capture_output=True, text=True, check=False
    )


@HAS_COMPILER
def test_the_module_is_there_where_a_compiler_is() -> None:
    """A build that failed leaves a Python that works, and is slow: not to go by unseen."""
    assert native.is_there(), f"{native.why_not()}: pip install -e . was without TRICOMP_BUILD=native and went wrong?"


@HAS_MODULE
def test_the_best_instruction_set_is_taken_and_any_can_be_forced() -> None:
    found = {}
    for isa in SETS:
        done = python("from tricomp import native; print(native.isa())", TRICOMP_ISA=isa)
        if done.returncode == 0:
            assert done.stdout.strip() == isa
            found[isa] = True
        else:
            assert f"TRICOMP_ISA={isa}: this processor or build {ABSENT}" in done.stderr
    assert "portable" in found
    assert python("from tricomp import native; print(native.isa())").stdout.strip() == next(iter(found))


@HAS_MODULE
@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx5122", " "])
def test_an_instruction_set_that_there_is_not(isa: str) -> None:
    message = f"TRICOMP_ISA={isa}: this processor or build {ABSENT}. Choose avx512, avx2 or portable, or unset it."
    done = python("from tricomp import native; print(native.is_there(), native.why_not())", TRICOMP_ISA=isa)
    assert done.stdout == f"False {message}\n", done.stderr
    done = python("from tricomp import native", TRICOMP_ISA=isa, TRICOMP_NATIVE="require")
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("place", ["nothing", "nothing.abi3.so"])
def test_the_reference_works_without_the_module(place: str) -> None:
    environ = {"TRICOMP_NATIVE_MODULE": place}
    done = python(ROUND_TRIP + "print(native.is_there())", **environ)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
    done = python("from tricomp import native; native.load()", **environ)
    assert "InvalidArgument: the native backend is not there (" in done.stderr
    assert "TRICOMP_BUILD=native" in done.stderr
    done = python(ROUND_TRIP, TRICOMP_NATIVE="require", **environ)
    assert "InvalidArgument: the native backend is not there (" in done.stderr


def test_a_file_that_is_no_module_is_no_module(tmp_path: Path) -> None:
    path = tmp_path / "_core.abi3.so"
    path.write_bytes(b"text")
    done = python("from tricomp import native; print(native.why_not())", TRICOMP_NATIVE_MODULE=str(path))
    assert "invalid ELF header" in done.stdout or "file too short" in done.stdout, done.stderr


def test_asking_for_a_missing_module_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_found", lambda: (None, "it is elsewhere"))
    with pytest.raises(InvalidArgument, match=r"^the native backend is not there \(it is elsewhere\)\. Install"):
        native.load()


@HAS_MODULE
def test_a_child_can_encode_after_a_fork() -> None:
    """Also if the parent was encoding in another thread just then."""
    code = """
import os, signal, threading, numpy, tricomp
signal.alarm(120)
array = numpy.random.default_rng(0).normal(size=(600, 601)).astype("f4")
expected, is_over = tricomp.encode(array), []
def work():
    while not is_over:
        assert tricomp.encode(array) == expected
thread = threading.Thread(target=work)
thread.start()
for _ in range(8):
    child = os.fork()
    if not child:
        is_right = tricomp.encode(array) == expected and (tricomp.decode(expected) == array).all()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
is_over.append(True)
thread.join()
print("done")
"""
    done = python(code)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


@HAS_MODULE
@HAS_NM
def test_one_module_serves_every_python_from_3_11() -> None:
    path = native.load().__file__
    assert path.endswith(".abi3.so")
    wanted = set(re.findall(r"\b_?Py\w+", native_build.run("nm", "-D", "--undefined-only", path)))
    # The limited API is declared by Py_LIMITED_API; what begins with _Py is private, but for these.
    stable = {"_Py_NoneStruct", "_Py_TrueStruct", "_Py_FalseStruct", "_Py_Dealloc", "_Py_IncRef", "_Py_DecRef"}
    assert {name for name in wanted if name.startswith("_Py") and not name.endswith("_SizeT")} <= stable
    assert "PyModuleDef_Init" in wanted


@HAS_COMPILER
@HAS_NM
@HAS_OBJDUMP
def test_the_module_shows_one_symbol_and_asks_for_little() -> None:
    """The C++ library is inside; of the C library, what glibc 2.34 (2021) has, where pthreads became part of it."""
    native_build.wheel()
    path = native_build.BUILDS / "wheel" / "_core.abi3.so"
    shown = native_build.run("nm", "-D", "--defined-only", path).split()
    assert shown[2:] == ["PyInit__core"]
    assert "RUNPATH" not in native_build.run("objdump", "-p", path)
    versions = re.findall(r"\((\w+?)_([\d.]+)\)", native_build.run("objdump", "-T", path))
    latest: dict[str, tuple[int, ...]] = {}
    for library, version in versions:
        number = tuple(map(int, version.split(".")))
        latest[library] = max(latest.get(library, number), number)
    assert latest["GLIBC"] <= (2, 34)
    assert latest.keys() <= {"GLIBC", "GCC"}


@HAS_COMPILER
@HAS_NM
@ON_X86
@pytest.mark.parametrize("isa", SETS)
def test_no_code_of_an_instruction_set_can_be_taken_by_others(isa: str) -> None:
    """What an object shows the linker lies in its own namespace, so that no other object has a symbol of that name."""
    [path] = native_build.objects(f"kernels_{isa}")
    symbols = [line.split()[-2:] for line in native_build.run("nm", "--defined-only", path).splitlines() if line]
    shown = {name for kind, name in symbols if kind.isupper() or kind in "uvw"}
    own = re.compile(rf"_Z(GV|T[VTISC])?Z?N[KVRO]*7tricomp{len(isa)}{isa}")
    assert f"_ZN7tricomp{len(isa) + 8}{isa}_kernelsE" in shown
    assert {name for name in shown if not own.match(name)} == {f"_ZN7tricomp{len(isa) + 8}{isa}_kernelsE"}


@HAS_COMPILER
@HAS_OBJDUMP
@ON_X86
def test_baseline_code_runs_on_every_processor() -> None:
    """No register and no instruction that the first x86-64 lacked. (tzcnt is not looked for: there, it is bsf.)"""
    paths = [path for part in ("coders", "_core", "kernels_portable") for path in native_build.objects(part)]
    assert {"module.cpp.o", "decode.cpp.o", "dispatch.cpp.o", "kernels.cpp.o"} <= {path.name for path in paths}
    modern = re.compile(r"%[yz]mm|%k[0-7]\b|\t(v[a-z]\w+|lzcnt|popcnt|pdep|pext|bzhi|shlx|shrx|sarx|andn|mulx|pshufb) ")
    for path in paths:
        code = native_build.run("objdump", "-d", "--no-show-raw-insn", path)
        found = [line for line in code.splitlines() if modern.search(line)]
        assert not found, (path.name, found[:5])
    wide = native_build.run("objdump", "-d", "--no-show-raw-insn", *native_build.objects("kernels_avx512"))
    assert modern.search(wide)
    assert "%zmm" in wide
