"""What takes minutes of tests, in processes of its own: modules in Triton's interpreter, and all kernels compiled.

In a run of the whole suite these begin with it, one after the other, on a core that the other tests do not use, and
are asked for at its end; see conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.cases import ROOT

MODULES = (
    "test_kernels_encode",
    "test_kernels_decode",
    "test_device",
    "test_kernels_quantize",
    "test_kernels_multiply",
)

_COMPILE = """
import json, sys
from pathlib import Path
from tests.kernel_code import measure_all
from tests.kernel_variants import tasks
rows = measure_all(tasks(), int(sys.argv[2]), Path(sys.argv[1]))
(Path(sys.argv[1]) / "rows.json").write_text(json.dumps(rows))
"""
_begun: dict[str, Future[Any]] = {}
_running: list[subprocess.Popen[str]] = []
_threads: list[ThreadPoolExecutor] = []


def begin() -> None:
    """Begin with all of it in another thread."""
    _threads.append(ThreadPoolExecutor(1, thread_name_prefix="behind"))
    for module in MODULES:
        _begun[module] = _threads[-1].submit(_interpret, module)
    _begun["compiled"] = _threads[-1].submit(_compile, 1)


def interpreted(module: str) -> tuple[int, str]:
    """Exit code and output of a module's tests in the interpreter, begun now if they were not before."""
    return _of(module, partial(_interpret, module))


def compiled() -> list[dict[str, Any]]:
    """What is measured of each kernel variant for each target, see kernel_code; begun now if it was not before."""
    return _of("compiled", partial(_compile, 2))


def end() -> None:
    """End what nobody will ask for."""
    for threads in _threads:
        threads.shutdown(wait=False, cancel_futures=True)
    for process in _running:
        process.kill()


def _of(name: str, work: Callable[[], Any]) -> Any:
    return _begun[name].result() if name in _begun else work()


def _interpret(module: str) -> tuple[int, str]:
    options = ("-W", "error::RuntimeWarning", "-m", "pytest", "-q", "-x", f"tests/{module}.py")
    return _run(*options, TRITON_INTERPRET="1")


def _compile(n_processes: int) -> list[dict[str, Any]]:
    with TemporaryDirectory(prefix="tricomp-triton-") as folder:
        code, output = _run("-c", _COMPILE, folder, str(n_processes), TRITON_INTERPRET="0")
        assert code == 0, output[-6000:]
        found: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return found


def _run(*options: str, **environ: str) -> tuple[int, str]:
    """Exit code and output of Python with these options."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *options], cwd=ROOT, env=environ, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    _running.append(process)
    try:
        output, _ = process.communicate()
    finally:
        _running.remove(process)
    return process.returncode, output
