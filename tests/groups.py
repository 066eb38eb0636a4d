"""Groups of forked ranks for tests: a process that imports a module of scenes once, and plays them when asked.

tests/dcp_ranks.py tells the protocol. What a scene needs is in its module's SCENES.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def die_in_file(at: int) -> None:
    """From now on this process dies by SIGKILL when it syncs a file for the at-th time, before the sync."""
    system: Any = os
    sync, n_saves = os.fsync, 0

    def dies(descriptor: Any) -> None:
        nonlocal n_saves
        n_saves += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if n_saves == at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    system.fsync = dies


@contextmanager
def quick() -> Iterator[None]:
    """One thread of torch for small tensors; many collections of garbage need not look at what is imported."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(n_threads)


class Groups:
    """Starts groups of ranks, one at a time. scenes: a module with SCENES."""

    def __init__(self, scenes: str) -> None:
        code = f"from tests.dcp_ranks import serve; from {scenes} import SCENES; serve(SCENES)"
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )

    def ask(self, n: int, scene: str, folder: Path, codes: list[int] | None = None, **options: object) -> None:
        """Play a scene on n ranks. codes: what each is to end with."""
        asked = {"n": n, "scene": scene, "folder": str(folder), "options": options}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        texts = sorted(answer["texts"], key=lambda text: "gloo/transport" in text)  # what failed first, first
        assert answer["codes"] == (codes or [0] * n), "\n".join(texts)[:4000]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
