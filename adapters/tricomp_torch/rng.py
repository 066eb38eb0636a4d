"""The random number generators of a training process, as a tree, and back: torch (CPU and CUDA), numpy, Python.

CUDA's generators are read only if CUDA is in use already: reading them would start CUDA on every device. The hard
thing: a state must be judged before any generator is changed, so `problems` and `set_state` are two functions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def get_state() -> dict[str, Any]:
    """States of all global generators. numpy: np.random's, whatever its bit generator; python: random's."""
    version, words, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss_next": gauss_next},
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def problems(state: Any) -> list[str]:
    """Why this process cannot take over the state, as sentences; none if it can."""
    if not isinstance(state, Mapping) or not {"torch", "numpy", "python"} <= set(state):
        return ["rng: the checkpoint holds no random state. Pass rng=False to keep this process's own."]
    n_stored = len(state.get("cuda", ()))
    n_here = torch.cuda.device_count() if n_stored else 0
    if n_stored > n_here:
        return [
            f"rng: the checkpoint holds the random state of {n_stored} CUDA devices, this process has {n_here}. "
            "Pass rng=False to keep this process's own."
        ]
    return []


def set_state(state: Mapping[str, Any]) -> None:
    """Take over the states. CUDA devices that are not there are passed over; `problems` has spoken of them."""
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state(state["numpy"])
    python = state["python"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss_next"]))
    for i, cuda in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), i)
