"""What the benchmarks share: the peers, each result decoded before it counts; and the facts of a run with theirs.

Imports the peers and facts only.
"""

from __future__ import annotations

import sys
from typing import Any

from zipnn import ZipNN

from tests.benchmarks import facts
from tests.benchmarks.facts import RESULTS, log, require, write

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["RESULTS", "log", "machine", "require", "write", "zipnn", "zipnn_bytes", "zstd_bytes"]


def zstd_bytes(raw: bytes, base: bytes | None = None) -> int:
    """Size by zstd -3; with base, as `zstd -3 --patch-from` does it."""
    if base is None:
        packed = zstd.compress(raw, 3)
        require(zstd.decompress(packed) == raw, "zstd")
        return len(packed)
    names = zstd.CompressionParameter
    window_log = max((len(raw) + len(base)).bit_length(), names.window_log.bounds()[0])
    options: dict[int, int] = {
        names.compression_level: 3,
        names.enable_long_distance_matching: 1,
        names.window_log: window_log,
    }
    prefix = zstd.ZstdDict(base, is_raw=True).as_prefix
    packed = zstd.compress(raw, options=options, zstd_dict=prefix)
    limits: dict[int, int] = {zstd.DecompressionParameter.window_log_max: window_log}
    require(zstd.decompress(packed, zstd_dict=prefix, options=limits) == raw, "zstd --patch-from")
    return len(packed)


def zipnn_bytes(raw: bytes, dtype: str) -> int:
    """Size by ZipNN for that dtype, one thread."""
    n_odd = len(raw) % 4  # counted as they are: ZipNN 0.5.4 writes outside its memory where words are cut
    whole = raw[: len(raw) - n_odd]
    packed = zipnn(dtype).compress(bytearray(whole))  # which it may change
    require(bytes(zipnn(dtype).decompress(packed)) == whole, "ZipNN")
    return len(packed) + n_odd


def zipnn(dtype: str, threads: int = 1) -> Any:
    """A ZipNN for "float32", "bfloat16", "float16" or "float8_e4m3fn"."""
    return ZipNN(bytearray_dtype=dtype, input_format="byte", threads=threads)


def machine(*packages: str) -> dict[str, Any]:
    """Machine, date and versions, for a results file. packages: more whose versions matter."""
    own = () if sys.version_info >= (3, 14) else ("backports.zstd",)
    return facts.machine(("numpy", "torch", "zipnn", *own, *packages))
