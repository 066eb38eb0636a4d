"""Run tests with a module that watches its own memory: `python -m tests.sanitize`.

Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer (or, with --thread, ThreadSanitizer) into
build/sanitize-*, and runs the tests that reach it once for every instruction set of this machine. The ordinary build
and install are left alone. Further arguments go to pytest, in place of the tests' names if they name any.

The hard thing: a sanitizer must be loaded before Python is, or it does not see the memory that others allocate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests import native_build

TESTS = (
    "native",
    "native_parts",
    "native_damage",
    "native_gathered",
    "native_quantize",
    "native_convolve",
    "planner",
    "codec",
    "damage",
    "golden",
)
SETS = ("avx512", "avx2", "portable")
# The report of a sanitizer is for the terminal, and its own handler of faults for it to keep.
PYTEST = ("-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=sys")
COMPILER = os.environ.get("CXX", "g++")
OPTIONS = {
    # Without detect_stack_use_after_return: gcc before 14 then lays 64-byte vectors down where they are not aligned.
    # PYTHONMALLOC: every object of Python's in a block of its own, with guards around it.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    },
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:report_signal_unsafe=0"},
}
LIBRARIES = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}


def module(kind: str) -> Path:
    """Build the module. kind: "address" or "thread"."""
    flag = "ON" if kind == "address" else kind
    name = f"sanitize-{kind}"
    return native_build.build(name, TRICOMP_SANITIZE=flag, Python_EXECUTABLE=sys.executable) / "_core.abi3.so"


def environment(kind: str, path: Path) -> dict[str, str]:
    """What a Python needs that is to load the module at path."""
    libraries = [native_build.run(COMPILER, f"-print-file-name={name}").strip() for name in LIBRARIES[kind]]
    return {
        **os.environ,
        **OPTIONS[kind],
        "LD_PRELOAD": ":".join(libraries),
        "TRICOMP_NATIVE_MODULE": str(path),
        "TRICOMP_NATIVE": "require",
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer in place of the others")
    parser.add_argument("--isa", choices=SETS, action="append", help="this instruction set only; may be repeated")
    chosen, rest = parser.parse_known_args(arguments)
    kind = "thread" if chosen.thread else "address"
    path = module(kind)
    if not any(Path(part.partition("::")[0]).exists() for part in rest):
        rest += [f"tests/test_{name}.py" for name in TESTS if (native_build.ROOT / f"tests/test_{name}.py").exists()]
    results = {}
    for isa in chosen.isa or SETS:
        environ = {**environment(kind, path), "TRICOMP_ISA": isa}
        probe = [sys.executable, "-c", "from tricomp import native; print(native.isa())"]
        found = subprocess.run(probe, cwd=native_build.ROOT, env=environ, capture_output=True, text=True, check=False)
        if "does not have it" in found.stderr:
            print(f"{isa}: not on this processor")
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-x", *PYTEST, *rest]
        print(f"{isa}: {' '.join(command[1:])}", flush=True)
        results[isa] = subprocess.run(command, cwd=native_build.ROOT, env=environ, check=False).returncode
    print(f"{kind} sanitizer: " + ", ".join(f"{isa} {'failed' if code else 'clean'}" for isa, code in results.items()))
    return int(any(results.values()) or not results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
