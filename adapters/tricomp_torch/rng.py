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

_ADVICE = "Pass rng=False to keep this process's own."


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


def problems(state: Any, strict: bool = True) -> list[str]:
    """Why this process cannot take over the state, as sentences; none if it can. Tries it on generators of its own.

    strict=False lets pass that CUDA devices are missing here.
    """
    if state is None:
        return [f"rng: the checkpoint holds no random state. {_ADVICE}"]
    try:
        torch.Generator().set_state(state["torch"].cpu())
        here = np.random.get_state(legacy=False)["bit_generator"]
        np.random.RandomState(getattr(np.random, here)()).set_state(state["numpy"])
        random.Random().setstate(_python(state["python"]))
        n_stored = len(state.get("cuda", ()))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return [f"rng: the checkpoint's random state cannot be used ({type(error).__name__}: {error}). {_ADVICE}"]
    n_here = torch.cuda.device_count() if n_stored else 0
    if strict and n_stored > n_here:
        return [f"rng: the checkpoint holds the state of {n_stored} CUDA devices, this process has {n_here}. {_ADVICE}"]
    return []


def set_state(state: Mapping[str, Any]) -> None:
    """Take over the states. CUDA devices that are not there are passed over; `problems` has spoken of them."""
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state(state["numpy"])
    random.setstate(_python(state["python"]))
    for i, cuda in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), i)


def _python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return state["version"], tuple(int(word) for word in state["words"]), state["gauss_next"]
