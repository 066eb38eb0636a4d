"""Convolutions with integer weights, by the backend that is there. Imports each backend when it is asked.

What runs models calls this for every layer: arrays go through as they are.
"""

from __future__ import annotations

from functools import lru_cache

from tricomp import native
from tricomp.native.convolve import MOST_CODES, MOST_IN
from tricomp.native.convolve import convolve as convolve
from tricomp.native.convolve import request as request


def is_fast(n_in: int, n_codes: int) -> bool:
    """Whether convolve can be called for so many weights an output, and codes a padded sample, and beats floats."""
    return n_in <= MOST_IN and n_codes < MOST_CODES and _has_vectors()


@lru_cache(maxsize=1)
def _has_vectors() -> bool:
    # What is written for no instruction set of its own has not been seen to be faster than a framework's floats.
    return native.is_there() and native.isa() != "portable"
