"""Lightning under the names it goes by: `lightning`, or `pytorch_lightning` and `lightning_fabric`. Imports them late.

The hard thing: the two are separate copies of the same classes. What this process has imported already is what its
Trainer is of; only if it has none is one of them chosen here.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_SPLIT = {"fabric": "lightning_fabric", "pytorch": "pytorch_lightning"}
_ADVICE = "tricomp_torch.lightning needs Lightning: pip install lightning."


def part(name: str) -> ModuleType:
    """A module of Lightning, such as "fabric.plugins". Raises ImportError that says what to install."""
    top, _, rest = name.partition(".")
    is_loaded = {family: sys.modules.get(family) is not None for family in ("lightning", _SPLIT[top])}
    families = sorted(is_loaded, key=lambda family: not is_loaded[family])  # stable: `lightning` is first of equals
    for family in families:
        if is_loaded[family] or find_spec(family) is not None:
            return import_module(f"{family}.{name}" if family == "lightning" else f"{family}.{rest}")
    raise ImportError(_ADVICE)


def loaded(name: str) -> list[ModuleType]:
    """The copies of a module of Lightning that this process has imported."""
    top, _, rest = name.partition(".")
    names = (f"lightning.{name}", f"{_SPLIT[top]}.{rest}")
    return [module for full in names if (module := sys.modules.get(full)) is not None]
