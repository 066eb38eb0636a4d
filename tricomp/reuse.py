"""Room for pieces that come and go: memory that nobody holds any more is filled again. Imports numpy only.

Fresh memory costs a page fault every 4 KiB, as much as decoding does; so pieces that are written and dropped should
stand where others stood. The hard thing: a taker may keep a piece, and then it must stay as it is. So memory is given
again only when no array and no view refers to any of it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_ALIGN = 64


class Reuse:
    """Arrays out of some blocks of n_bytes, or of what the largest array takes. most: blocks that are kept.

    For one thread; what it gave may be dropped in any other.
    """

    def __init__(self, n_bytes: int = 8 << 20, most: int = 6) -> None:
        self._n_bytes, self._most = n_bytes, most
        self._blocks: list[Array] = []
        self._used: list[int] = []  # bytes of each block that were given since it was free
        self._n_alone = _n_references([np.empty(0)], 0)

    def array(self, n: int, dtype: np.dtype[Any]) -> Array:
        """Room for n elements, of any content, that nothing else refers to."""
        n_bytes = n * dtype.itemsize
        for i, used in enumerate(self._used):
            if _n_references(self._blocks, i) == self._n_alone:
                used = 0
            if used + n_bytes <= self._blocks[i].nbytes:
                self._used[i] = used + -(-n_bytes // _ALIGN) * _ALIGN
                return self._blocks[i][used : used + n_bytes].view(dtype)
        block = np.empty(max(self._n_bytes, n_bytes), np.uint8)
        if self._n_alone:
            self._blocks.append(block)
            self._used.append(-(-n_bytes // _ALIGN) * _ALIGN)
            if len(self._blocks) > self._most:
                del self._blocks[0], self._used[0]
        return block[:n_bytes].view(dtype)


def _n_references(arrays: list[Array], i: int) -> int:
    """References to the array at i, however this interpreter counts; 0: it does not."""
    return sys.getrefcount(arrays[i]) if hasattr(sys, "getrefcount") else 0
