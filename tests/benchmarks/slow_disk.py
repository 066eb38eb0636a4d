"""A disk of a set speed for a process and all that it loads: built from slow_disk.c, which tells how it is modelled.

Imports the standard library only. The hard thing: everybody must meet the same disk, whether Python, C++ or Rust writes
for him. So it stands where all of them call the system, and whoever uses it checks that it has seen every byte.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path) -> Path | None:
    """The library, made in a folder; None where there is no C compiler, or no system that it can stand before."""
    if not sys.platform.startswith("linux"):
        return None
    made = folder / "slow_disk.so"
    command = [
        os.environ.get("CC", "cc"),
        "-O2",
        "-shared",
        "-fPIC",
        "-o",
        str(made),
        str(_SOURCE),
        "-ldl",
        "-lpthread",
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return made


def set_speed(bytes_per_second: float | None) -> None:
    """Let this process write to a disk of that speed from now on; None: to the real one. The library must be loaded."""
    call = ctypes.CDLL(None).slow_disk_set
    call.argtypes = [ctypes.c_double]
    call.restype = None
    call(bytes_per_second or 0.0)


def n_seen() -> int:
    """Bytes written to files since the speed was set."""
    call = ctypes.CDLL(None).slow_disk_seen
    call.restype = ctypes.c_uint64
    return int(call())
