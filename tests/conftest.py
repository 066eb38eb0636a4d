"""What runs of the whole suite need: the interpreted tests of kernels go on beside all others, and come last."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from tests import interpreted

_MANY = 500  # tests: a run of the whole suite


def _is_interpreted(item: pytest.Item) -> bool:
    return item.name.startswith("test_kernels_interpreted[")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask for the interpreted tests at the end."""
    items.sort(key=_is_interpreted)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with them, in a run of many tests."""
    is_run = not session.config.option.collectonly and os.environ.get("TRITON_INTERPRET") != "1"
    n_interpreted = sum(map(_is_interpreted, session.items))
    if is_run and find_spec("triton") and n_interpreted == len(interpreted.MODULES) and len(session.items) > _MANY:
        interpreted.begin()


def pytest_sessionfinish() -> None:
    """Leave nothing behind that runs."""
    interpreted.end()
