"""Builds of the extension for the tests: a wheel, sanitized modules, a program for another machine. Imports no tricomp.

Each has a folder of its own under build/, kept from run to run, so that only what has changed is compiled again. The
folder of an editable install, build/Release, is not among them. The hard thing: two test runs may want the same one.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tricomp" / "native"
BUILDS = ROOT / "build"
_BACKEND = "import sys; import scikit_build_core.build as build; print(getattr(build, sys.argv[1])(sys.argv[2], {}))"


def tool(name: str) -> str | None:
    """Where a program is: this environment's, else the system's."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def has_compiler() -> bool:
    """Whether the extension can be built here. Said by TRICOMP_BUILD where that is set, so that none is missed."""
    wanted = os.environ.get("TRICOMP_BUILD")
    return wanted == "native" or (wanted != "pure" and any(map(tool, (os.environ.get("CXX", "c++"), "g++", "clang++"))))


def run(*command: object, **environ: str) -> str:
    """What a command prints. Raises AssertionError with all of it if it fails."""
    paths = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PATH": paths, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def folder(name: str) -> Iterator[Path]:
    """A build folder, for this process alone while it is in use."""
    path = BUILDS / name
    path.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def package(kind: str, out: Path, settings: dict[str, str] | None = None, **environ: str) -> Path:
    """What the build backend makes of the repository, without network. kind: "build_wheel" or "build_sdist"."""
    code = _BACKEND.replace("{}", repr(settings or {}))
    return out / run(sys.executable, "-c", code, kind, out, **environ).split()[-1]


@functools.cache
def wheel() -> Path:
    """The native wheel of these sources; what it was linked from lies beside it, see `objects`."""
    with folder("wheel") as path:
        for old in path.glob("*.whl"):
            old.unlink()
        return package("build_wheel", path, {"build-dir": str(path)}, TRICOMP_BUILD="native")


def objects(part: str) -> list[Path]:
    """Object files of the wheel. part: "coders", "kernels_portable", "kernels_avx2", "kernels_avx512"."""
    wheel()
    return sorted((BUILDS / "wheel" / "CMakeFiles" / f"{part}.dir").glob("*.o"))


def build(name: str, **definitions: object) -> Path:
    """Configure and build into the folder build/name with CMake definitions; returns the folder."""
    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake is not None, "no cmake here: pip install cmake ninja"
    defined = [f"-D{key}={value}" for key, value in definitions.items()]
    with folder(name) as path:
        run(cmake, *(["-G", "Ninja"] if ninja else []), "-S", SOURCES, "-B", path, *defined)
        run(cmake, "--build", path, "--parallel", len(os.sched_getaffinity(0)))
        return path
