"""What runs of the whole suite need: the longest tests go on beside all others, and are asked for last.

Those of JAX come before them: after JAX has computed something, a process should not fork, as some tests do.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from tests import behind

_LATE = ("tests/test_kernels_compile.py", "tests/test_kernels.py")
_JAX = ("tests/test_jax", "tests/test_demo_jax", "tests/test_cross_framework", "tests/test_cli_export_jax")
_MANY = 500  # tests: a run of the whole suite


def _is_late(item: pytest.Item) -> bool:
    return item.nodeid.startswith(_LATE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask for what is made behind at the end."""
    items.sort(key=lambda item: 2 if _is_late(item) else item.nodeid.startswith(_JAX))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with it, in a run of many tests on more than one core."""
    is_run = not session.config.option.collectonly and os.environ.get("TRITON_INTERPRET") != "1"
    is_whole = len(session.items) > _MANY and sum(map(_is_late, session.items)) > len(behind.MODULES)
    if is_run and is_whole and find_spec("triton") and (os.cpu_count() or 1) > 1:
        behind.begin()


def pytest_sessionfinish() -> None:
    """Leave nothing behind that runs."""
    behind.end()
