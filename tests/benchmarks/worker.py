"""One repetition at a time in a process of its own: `python -m tests.benchmarks.worker`, driven by instruction_sets.

Imports numpy, timing and tricomp only, so that it starts fast. The hard thing: the backend and its instruction set are
fixed when tricomp is imported, by TRICOMP_BACKEND and TRICOMP_ISA, so each needs a process; and the parent takes turns
among them, so each waits on its standard input. Both sides speak in pickles.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import sys
from typing import Any

import numpy as np

import tricomp
from tests.benchmarks.timing import Contestant, Work, is_exact, timed, tricomp_of


def backend() -> dict[str, Any]:
    """What works in this process: the backend, and the instruction set of the native one."""
    native: Any = importlib.import_module("tricomp.native")
    is_native = os.environ.get("TRICOMP_BACKEND") != "reference" and _has_native()
    return {"backend": "native" if is_native else "reference", "isa": native.isa() if is_native else None}


def _has_native() -> bool:
    """Whether the codec takes the native backend, when it is told to."""
    before = os.environ.get("TRICOMP_BACKEND")
    os.environ["TRICOMP_BACKEND"] = "native"
    try:
        tricomp.encode(np.zeros(3, np.float32))
    except tricomp.TricompError:
        return False
    finally:
        del os.environ["TRICOMP_BACKEND"]
        if before is not None:
            os.environ["TRICOMP_BACKEND"] = before
    return True


class Turns:
    """The contestants of one Work, by tier, and what they packed."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work = work
        self.contestants: dict[str, Contestant] = {tier: tricomp_of(work, tier, threads) for tier in ("dense", "fast")}
        self.packed: dict[str, list[bytes]] = {}

    def prove(self, tier: str) -> dict[str, Any]:
        """Pack and unpack once: is all the same again, and a hash of what was packed."""
        one = self.contestants[tier]
        self.packed[tier] = one.pack(one.given())
        hashes = hashlib.sha256(b"".join(self.packed[tier])).hexdigest()
        return {"is_exact": is_exact(self.work, one.unpack(self.packed[tier])) if one.unpack else False, "hash": hashes}

    def turn(self, tier: str) -> tuple[float, float]:
        """Seconds to pack, and to unpack."""
        one = self.contestants[tier]
        assert one.unpack is not None
        pack_seconds, packed = timed(one.pack, one.given())
        del packed
        unpack_seconds, back = timed(one.unpack, self.packed[tier])
        del back
        return pack_seconds, unpack_seconds


def main() -> None:
    """Answer questions until the input ends: ("work", Work, threads), ("prove", tier), ("turn", tier)."""
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    turns: Turns | None = None
    pickle.dump(backend(), answers)
    answers.flush()
    while True:
        try:
            name, *arguments = pickle.load(questions)
        except EOFError:
            return
        if name == "work":
            turns = Turns(*arguments)
            answer: Any = None
        else:
            assert turns is not None
            answer = turns.prove(*arguments) if name == "prove" else turns.turn(*arguments)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
