"""Products of float rows with integer weights, by the backend that is there. Imports each backend when it is asked.

What runs models calls this for every layer: arrays go through as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tricomp import native
from tricomp.native.multiply import MOST_IN
from tricomp.native.multiply import multiply as multiply

Array = np.ndarray[Any, Any]


def is_fast(n_in: int) -> bool:
    """Whether multiply can be called for rows of so many: the native module is there."""
    return 0 < n_in <= MOST_IN and native.is_there()


def is_wide() -> bool:
    """Whether the native module runs on vectors of 512 bits, where it is as fast as BLAS for any number of rows."""
    return native.isa() == "avx512"
