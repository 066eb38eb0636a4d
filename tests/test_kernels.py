"""The tests of kernels in Triton's interpreter, where no GPU runs them."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from tests import behind


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs them itself")
@pytest.mark.parametrize("module", behind.MODULES)
def test_kernels_interpreted(module):
    code, output = behind.interpreted(module)
    assert code == 0, output[-6000:]
    assert "skipped" not in output
