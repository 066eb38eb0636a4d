"""Room for pieces that come and go: memory that nobody holds any more is filled again. Imports numpy only.

Fresh memory costs a page fault every 4 KiB, as much as decoding does; so pieces that are written and dropped should
stand where others stood. The hard thing: a taker may keep a piece, and then it must stay as it is. So room is given
again only when no array and no view refers to it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Reuse:
    """Arrays of at most n_bytes. most: how many are kept for another use."""

    def __init__(self, n_bytes: int, most: int = 4) -> None:
        self._n_bytes, self._most = n_bytes, most
        self._held: list[Array] = []
        self._n_alone = _n_references([np.empty(0)], 0)

    def array(self, n: int, dtype: np.dtype[Any]) -> Array:
        """Room for n elements, of any content, that nothing else refers to."""
        n_bytes = n * dtype.itemsize
        if n_bytes > self._n_bytes or not self._n_alone:
            return np.empty(n, dtype)
        for i in range(len(self._held)):
            if _n_references(self._held, i) == self._n_alone:
                return self._held[i][:n_bytes].view(dtype)
        fresh = np.empty(self._n_bytes, np.uint8)
        if len(self._held) < self._most:
            self._held.append(fresh)
        return fresh[:n_bytes].view(dtype)


def _n_references(arrays: list[Array], i: int) -> int:
    """References to the array at i, however this interpreter counts; 0: it does not."""
    return sys.getrefcount(arrays[i]) if hasattr(sys, "getrefcount") else 0
