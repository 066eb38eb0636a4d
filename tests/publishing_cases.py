"""Weights to publish, a reader of the layout that shares nothing with ours, and what is killed. No torch in here.

Imports numpy, zstd, safetensors, tricomp. The hard thing: processes that are forked and killed by the hundred should be
small.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from backports import zstd
from safetensors.numpy import load_file, save_file

from tests.cases import stepped, weights
from tricomp.publishing import apply, publish

Array = np.ndarray[Any, Any]
State = dict[str, Array]
INDEX = "model.safetensors.index.json"
FORMATS = ("safetensors", "tri")


def read_shard(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + n])
    metadata = head.pop("__metadata__", {})
    assert n % 8 == 0
    assert sorted(end for _, end in (e["data_offsets"] for e in head.values()))[-1:] in ([], [len(data) - 8 - n])
    return {
        name: (e["dtype"], e["shape"], data[8 + n + e["data_offsets"][0] : 8 + n + e["data_offsets"][1]])
        for name, e in head.items()
    }, metadata


def checksum(algorithm: str, data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest() if algorithm == "xxh3-128" else f"{zlib.adler32(data):08x}"


def plainly_applied(local: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """A version applied to raw bytes by name, as the layout says it is to be done."""
    index = json.loads((folder / INDEX).read_text())
    about = index["metadata"]
    if "delta_encoding" not in about:
        shards = {name: read_shard(folder / name)[0] for name in set(index["weight_map"].values())}
        return {name: shards[shard][name][2] for name, shard in index["weight_map"].items()}
    assert about["compression_format"] == "zstd"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    new = dict(local)
    for shard in set(index["weight_map"].values()):
        found, checksums = read_shard(folder / shard)
        assert {name for name, where in index["weight_map"].items() if where == shard} == found.keys()
        for name, (dtype, shape, payload) in found.items():
            assert (dtype, shape) == ("U8", [len(payload)])
            assert zstd.get_frame_info(payload).decompressed_size is not None
            raw, old = zstd.decompress(payload), local[name]
            if about["delta_encoding"] == "xor":
                assert len(raw) == len(old)
                made = bytes(a ^ b for a, b in zip(raw, old, strict=True))
            else:
                (n,) = struct.unpack("<I", raw[:4])
                assert len(raw) == 4 + 5 * n
                changed = bytearray(old)
                for place, value in zip(struct.unpack(f"<{n}I", raw[4 : 4 + 4 * n]), raw[4 + 4 * n :], strict=True):
                    assert changed[place] != value
                    changed[place] = value
                made = bytes(changed)
            assert checksums[name] == checksum(about["checksum_format"], made)
            new[name] = made
    return new


def first_state() -> State:
    """A small model: names as models have them, a tied pair, odd sizes, an empty tensor and a scalar."""
    embedding = weights((67, 33), 1).astype(ml_dtypes.bfloat16)
    return {
        "lm_head.weight": embedding,
        "model.embed_tokens.weight": embedding.copy(),
        "model.layers.0.mlp.weight": weights((129, 65), 2).astype(ml_dtypes.bfloat16),
        "model.layers.0.norm.weight": weights((33,), 3),
        "model.layers.0.scale": np.array(1.5, np.float32),
        "model.layers.0.unused": np.zeros((0, 3), np.float16),
        "model.layers.1.bias": weights((1,), 4).astype(np.float16),
    }


def next_state(state: State, seed: int) -> State:
    """A step later: bfloat16 moves in few of its elements, one tensor stays."""
    new = {name: stepped(array, seed, 2e-5) for name, array in state.items()}
    new["model.layers.0.scale"] = state["model.layers.0.scale"]
    new["lm_head.weight"] = new["model.embed_tokens.weight"].copy()
    return new


def run_of(n: int) -> list[State]:
    made = [first_state()]
    for seed in range(1, n):
        made.append(next_state(made[-1], seed))
    return made


def raw(state: State) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.items()}


def same(a: State, b: State) -> bool:
    kinds = [{name: (array.dtype.name, array.shape) for name, array in sorted(state.items())} for state in (a, b)]
    return kinds[0] == kinds[1] and raw(a) == raw(b)


def model_in(folder: Path) -> State:
    """What a server would load."""
    index = folder / INDEX
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ()
    found: State = {}
    for path in [folder / name for name in names] or sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def raw_in(folder: Path) -> dict[str, bytes]:
    shards = (read_shard(path)[0] for path in folder.glob("*.safetensors"))
    return {name: data for shard in shards for name, (_, _, data) in shard.items()}


def save_in_shards(state: State, folder: Path) -> None:
    """A base model as two shards with an index, and a file beside."""
    folder.mkdir()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
    placed = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    (folder / "config.json").write_text("{}")


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def _begin(format: Any, place: Path) -> None:
    states = run_of(4)
    place.mkdir()
    for version in (1, 2, 3):
        publish(states[version], place / "run", version, base=states[version - 1], format=format)
    save_in_shards(states[0], place / "local")
    apply(place / "local", place / "run", 1)


def _check_apply(place: Path, code: int) -> None:
    states, local = run_of(4), place / "local"
    mark = local / ".weight_sync" / "state.json"
    if mark.exists():
        version = int(json.loads(mark.read_text())["version"])
        assert version in (1, 3)
        assert same(model_in(local), states[version])
    done = apply(local, place / "run")
    assert done.version == 3
    assert same(model_in(local), states[3])
    assert sorted(os.listdir(local / ".weight_sync")) == ["lock", "state.json"]
    assert sorted(path.name for path in local.iterdir()) == [
        ".weight_sync", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX,
    ]  # fmt: skip


def _begin_publish(format: Any, place: Path) -> None:
    states = run_of(3)
    publish(states[0], place / "run", 0, format=format)
    publish(states[1], place / "run", 1, format=format)


def _publish_two(format: Any, place: Path) -> None:
    publish(run_of(3)[2], place / "run", 2, format=format, shard_bytes=4000)


def _check_publish(format: Any, place: Path, code: int) -> None:
    states = run_of(3)
    local = place / "local"
    done = apply(local, place / "run")
    assert same(model_in(local), states[done.version])
    again = publish(states[2], place / "run", 2, format=format, shard_bytes=4000)
    assert again.is_new == (done.version == 1)
    apply(local, place / "run")
    assert same(model_in(local), states[2])
    if format == "safetensors":
        assert plainly_applied(raw(states[1]), place / "run" / "weight_v000002") == raw(states[2])
    assert sorted(path.name for path in (place / "run").iterdir() if not path.name.startswith(".")) == [
        f"weight_v{version:06d}" for version in range(3)
    ]


DEEDS: dict[str, tuple[Callable[..., object], Callable[..., object], Callable[..., object]]] = {}
for _format in FORMATS:
    DEEDS[f"apply {_format}"] = (
        lambda place, format=_format: _begin(format, place),
        lambda place: apply(place / "local", place / "run"),
        _check_apply,
    )
    DEEDS[f"publish {_format}"] = (
        lambda place, format=_format: _begin_publish(format, place),
        lambda place, format=_format: _publish_two(format, place),
        lambda place, code, format=_format: _check_publish(format, place, code),
    )
