"""The tests of kernels in Triton's interpreter, where no GPU runs them: in processes that begin as it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.cases import ROOT

INTERPRETED = ("test_kernels_encode", "test_kernels_decode", "test_device")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs them itself")
@pytest.mark.parametrize("module", INTERPRETED)
def test_kernels_interpreted(module):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "pytest", "-q", "-x", f"tests/{module}.py"]
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout
