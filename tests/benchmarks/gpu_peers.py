"""What tricomp is measured beside on a GPU: a copy on the device, the bus, and nvCOMP on the same bytes.

Imports torch, and nvCOMP where it is installed. Against references nvCOMP gets the XOR of the two, and its time counts
in both directions. The hard thing: it is closed and changes from version to version, so whatever it refuses is written
down in its words, and nothing is recorded of it that did not come back byte for byte.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack

GIB = 1 << 30
_CODES = {  # algorithm, and which type it is told that the bytes are
    "nvCOMP ANS": ("ANS", "bytes"),
    "nvCOMP ANS, floats": ("ANS", "floats"),
    "nvCOMP Bitcomp": ("Bitcomp", "integers"),
    "nvCOMP zstd": ("Zstd", "bytes"),
}
_TYPES = {
    ("bytes", 2): ("|u1", torch.uint8),
    ("bytes", 4): ("|u1", torch.uint8),
    ("floats", 2): ("<f2", torch.float16),
    ("floats", 4): ("<f4", torch.float32),
    ("integers", 2): ("<i2", torch.int16),
    ("integers", 4): ("<i4", torch.int32),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, n_runs: int) -> float:
    """Median seconds of a call, its work on the device included, after one that warms up, if n_runs is not 0."""
    if n_runs:
        call()
    found = []
    for _ in range(max(n_runs, 1)):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def copy_rates(device: torch.device, n_bytes: int, n_runs: int) -> dict[str, float]:
    """GB/s of bytes copied: on the device (each is read once and written once), to the host and from it, pinned."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    found = {"copy": _rate(lambda: target.copy_(source), device, n_bytes, n_runs)}
    n_host = min(n_bytes, GIB)
    host = torch.empty(n_host, dtype=torch.uint8, pin_memory=device.type == "cuda")
    found["to_host"] = _rate(lambda: host.copy_(source[:n_host], non_blocking=True), device, n_host, n_runs)
    found["to_device"] = _rate(lambda: target[:n_host].copy_(host, non_blocking=True), device, n_host, n_runs)
    return found


def _rate(call: Callable[[], Any], device: torch.device, n_bytes: int, n_runs: int) -> float:
    if device.type != "cuda":
        return n_bytes / 1e9 / max(seconds_of(call, device, n_runs), 1e-9)
    call()
    seconds = []
    for _ in range(n_runs):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        call()
        marks[1].record()
        torch.cuda.synchronize(device)
        seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return n_bytes / 1e9 / statistics.median(seconds)


def nvcomp_version() -> str:
    """The version of nvCOMP, or "" where it is not installed, and why in words."""
    try:
        from nvidia import nvcomp  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return ""
    return str(nvcomp.__version__)


def nvcomp_rows(new: torch.Tensor, old: torch.Tensor | None, device: torch.device, n_runs: int) -> list[dict[str, Any]]:
    """GB/s in and out and packed bytes of each of its codes. new, old: int tensors [n] of words, on the device."""
    return [_nvcomp_row(who, *code, new, old, device, n_runs) for who, code in _CODES.items()]


def _nvcomp_row(
    who: str,
    algorithm: str,
    kind: str,
    new: torch.Tensor,
    old: torch.Tensor | None,
    device: torch.device,
    n_runs: int,
) -> dict[str, Any]:
    from nvidia import nvcomp

    try:
        name, dtype = _TYPES[kind, new.element_size()]
        options = {} if kind == "bytes" else {"data_type": name}
        stream = torch.cuda.current_stream(device).cuda_stream
        codec = nvcomp.Codec(algorithm=algorithm, cuda_stream=stream, **options)
        state: dict[str, Any] = {}

        def pack() -> None:
            words = new if old is None else new ^ old
            state["packed"] = _into(codec.encode, nvcomp.as_array(words.view(dtype), stream), state.get("packed"))
            state["words"] = words  # lives until the stream has read it

        def unpack() -> None:
            state["back"] = _into(codec.decode, state["packed"], state.get("back"))
            if old is not None:
                torch.bitwise_xor(_tensor_of(state["back"]).view(new.dtype), old, out=state["result"])

        state["result"] = torch.empty_like(new)
        spent_in = seconds_of(pack, device, n_runs)
        spent_out = seconds_of(unpack, device, n_runs)
        back = state["result"] if old is not None else _tensor_of(state["back"]).view(new.dtype)
        if not torch.equal(back.reshape(-1)[: len(new)], new):
            return {"who": who, "why_not": "it did not come back byte for byte"}
        packed = int(state["packed"].buffer_size)
        return {"who": who, "in": new.nbytes / 1e9 / spent_in, "out": new.nbytes / 1e9 / spent_out, "bytes": packed}
    except Exception as fault:
        return {"who": who, "why_not": f"{type(fault).__name__}: {fault}"[:300]}


def _tensor_of(array: Any) -> torch.Tensor:
    """An array of nvCOMP's as a tensor that shares its memory."""
    found: torch.Tensor = torch.utils.dlpack.from_dlpack(array)
    return found


def _into(call: Callable[..., Any], source: Any, target: Any) -> Any:
    """Let nvCOMP write to what it gave before, where its version can: so that nobody's allocations are timed."""
    if target is not None:
        try:
            return call(source, out=target) or target
        except TypeError:
            pass
    return call(source)
