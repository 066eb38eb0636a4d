"""What the benchmarks share: the peers, each result decoded before it counts, and the facts of the machine.

Imports numpy, the peers and tricomp's version only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from zipnn import ZipNN

import tricomp

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

RESULTS = Path(__file__).parent / "results"


def require(is_exact: bool, who: str) -> None:
    """End the benchmark unless a round trip was exact."""
    if not is_exact:
        raise SystemExit(f"{who}: the round trip was not exact; no number is recorded")


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
    names = ("numpy", "torch", "zipnn", *(() if sys.version_info >= (3, 14) else ("backports.zstd",)), *packages)
    found = {name: importlib.metadata.version(name) for name in names}
    system = f"{platform.system()} {platform.machine()}"
    return {
        "machine": {"cpu": _cpu_model(), "n_cores": os.cpu_count(), "system": system},
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"tricomp": tricomp.__version__, "python": platform.python_version(), **found},
    }


def write(results: dict[str, Any], page: str, folder: Path, is_small: bool) -> None:
    """Write <machine>-<date>-<benchmark>.json and .md into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["cpu"].lower()).strip("-")
    kind = f"{results['benchmark']}{'-small' if is_small else ''}"
    stem = f"{slug}-{results['machine']['n_cores']}-cores-{results['date']}-{kind}"
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page)


def log(line: str) -> None:
    """Tell how far the benchmark is."""
    print(line, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
