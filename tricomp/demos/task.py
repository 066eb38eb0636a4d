"""What every demo trains on: the text of Python's standard library, and the size of the model. Imports numpy only.

The text is a fixed function of the Python installation, so that runs repeat bit for bit on one machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Size:
    """Size of the model and of a training step."""

    n_layers: int = 4
    n_heads: int = 4
    width: int = 256
    context: int = 64
    batch: int = 8
    dropout: float = 0.1


QUICK = Size(n_layers=2, n_heads=2, width=48, context=32, batch=4)
"""A model small enough for a test."""


def library_text(n_bytes: int = 3_000_000) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first n_bytes of the standard library's own .py files, in order of name. uint8[n]."""
    pieces: list[bytes] = []
    n_left = n_bytes
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        pieces.append(path.read_bytes()[:n_left])
        n_left -= len(pieces[-1])
    return np.frombuffer(bytearray(b"".join(pieces)), np.uint8)
