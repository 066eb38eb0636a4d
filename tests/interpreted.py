"""Test modules in Triton's interpreter: in processes of their own that begin as it needs, one after the other.

They take minutes on one core. So in a run of the whole suite they begin with it, beside all other tests, and are asked
for at its end; see conftest.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

from tests.cases import ROOT

MODULES = ("test_kernels_encode", "test_kernels_decode", "test_device")

_begun: dict[str, Future[tuple[int, str]]] = {}
_running: list[subprocess.Popen[str]] = []
_threads: list[ThreadPoolExecutor] = []


def begin() -> None:
    """Begin with all modules, one after the other, in another thread."""
    _threads.append(ThreadPoolExecutor(1, thread_name_prefix="interpreted"))
    _begun.update((module, _threads[-1].submit(_run, module)) for module in MODULES)


def outcome(module: str) -> tuple[int, str]:
    """Exit code and output of a module's tests, begun now if they were not before."""
    return _begun[module].result() if module in _begun else _run(module)


def end() -> None:
    """End what nobody will ask for."""
    for threads in _threads:
        threads.shutdown(wait=False, cancel_futures=True)
    for process in _running:
        process.kill()


def _run(module: str) -> tuple[int, str]:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "pytest", "-q", "-x", f"tests/{module}.py"]
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    _running.append(process)
    try:
        output, _ = process.communicate()
    finally:
        _running.remove(process)
    return process.returncode, output
