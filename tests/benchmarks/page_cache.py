"""Files out of the system's cache, so that to read them is to read the disk. Imports the standard library only.

The hard thing: a system may take the advice and do nothing (memory file systems, files that others have mapped, pages
not yet written), so it is looked at, page by page, whether the cache still holds the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop(path: Path) -> bool:
    """Ask the system to forget a file's pages, once they are on the disk. Gives whether it did."""
    if not hasattr(os, "posix_fadvise") or path.stat().st_size == 0:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return cached_part(path) == 0


def cached_part(path: Path) -> float | None:
    """Which part of a file's pages the system's cache holds; None where there is no way to tell."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None) if os.name == "posix" else None
    if mincore is None:
        return None
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = (ctypes.c_char * size).from_buffer(mapped)
        failed = mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(size), held)
        del begin  # the map cannot be closed before
    return None if failed else sum(page & 1 for page in held) / len(held)
