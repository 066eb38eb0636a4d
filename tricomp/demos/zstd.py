"""zstd level 3, to compare with: from the standard library (3.14) or backports.zstd; None where neither is there."""

from __future__ import annotations

import importlib
from collections.abc import Callable


def _find() -> Callable[[bytes], bytes] | None:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return lambda data: bytes(module.compress(data, level=3))
    return None


zstd = _find()
