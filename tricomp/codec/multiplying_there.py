"""Products of float rows with integer weights on a GPU. Imports the kernels when it is asked.

What runs models calls this for every layer: tensors go through as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any


@cache
def is_there() -> bool:
    """Whether Triton is, of which the kernels are made."""
    return find_spec("torch") is not None and find_spec("triton") is not None


def ways(
    rows: Any, codes: Any, scales: Any, bias: Any | None, bits: int, group: int | None, is_dynamic: bool
) -> dict[str, Callable[[], Any]]:
    """Functions that give rows [m, in] times the transpose of a weight [out, in], and the bias, in the rows' dtype.

    By name, the likeliest first; tensors all on one device, codes as saved. Empty where no kernel is, or none fits.
    Dynamic ones all give the same bytes. One that does not run here raises BackendError.
    """
    if not is_there():
        return {}
    from tricomp.kernels.multiply import Weight
    from tricomp.kernels.multiply import ways as found

    return found(rows, Weight(codes, scales, bias, bits, group, rows.shape[1]), is_dynamic)
