"""The CPU backend: C++17 behind the plain C limited API, SIMD chosen at run time, threads over chunks, no GIL.

Imports ground and numpy. It gives the bytes of `tricomp.reference`, and is asked for by the codec alone. The hard
thing: the extension module may be missing (a wheel of Python alone) or refuse to load; that must be said once, clearly.

Environment: TRICOMP_NATIVE=require makes a missing module an error. TRICOMP_ISA=avx512|avx2|portable forces an
instruction set; unset, the best that the processor has is taken. TRICOMP_NATIVE_MODULE names another build of the
module.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType
from typing import Any

from tricomp.errors import InvalidArgument

_BUILD = "Install tricomp where there is a C++ compiler (TRICOMP_BUILD=native makes a failing build an error)."


@lru_cache(maxsize=1)
def _found() -> tuple[ModuleType | None, str]:
    """The extension module and "", or None and why it is not there."""
    path = os.environ.get("TRICOMP_NATIVE_MODULE")
    try:
        if path:
            spec = importlib.util.spec_from_file_location("tricomp.native._core", path)
            if spec is None or spec.loader is None:
                return None, f"{path} is no extension module"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, ""
        return importlib.import_module("tricomp.native._core"), ""
    except ImportError as error:
        return None, str(error)


def is_there() -> bool:
    """Whether the extension module can be used."""
    return _found()[0] is not None


def why_not() -> str:
    """Why the extension module cannot be used; empty if it can."""
    return _found()[1]


def load() -> Any:
    """The extension module. Raises InvalidArgument when it is not there, and says what to do."""
    module, reason = _found()
    if module is None:
        raise InvalidArgument(f"the native backend is not there ({reason}). {_BUILD} Or use backend='reference'.")
    return module


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable". Raises InvalidArgument when the module is missing."""
    return str(load().isa())


def n_threads(threads: int | None) -> int:
    """How many threads to use: those asked for, or one for every core that this process may run on."""
    if threads is not None:
        return threads
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


if os.environ.get("TRICOMP_NATIVE") == "require":
    load()
