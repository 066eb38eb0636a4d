"""Weights published for inference servers: bytes of the layout by hand, round trips, catching up, damage, death."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tricomp_torch
import xxhash
from backports import zstd
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, save_file
from tricomp_jax import publishing as jax_publishing
from tricomp_torch import publishing as torch_publishing

from tests.cases import of_dtype, stepped, weights
from tests.publishing_cases import (
    FORMATS,
    INDEX,
    State,
    bytes_in,
    checksum,
    first_state,
    model_in,
    plainly_applied,
    raw,
    raw_in,
    read_shard,
    run_of,
    same,
    save_in_shards,
)  # fmt: skip
from tricomp import errors
from tricomp.folder import Folder
from tricomp.formats import header
from tricomp.publishing import Publisher, apply, difference, publish
from tricomp.publishing.local import locked

Array = np.ndarray[Any, Any]


def write_golden(folder: Path, about: dict[str, str], shards: dict[str, dict[str, tuple[bytes, str]]]) -> None:
    """A version by hand: shard to tensor to payload (not compressed yet) and checksum."""
    folder.mkdir(parents=True)
    for shard, tensors in shards.items():
        head: dict[str, Any] = {"__metadata__": {name: digest for name, (_, digest) in tensors.items()}}
        data = b""
        for name, (payload, _) in tensors.items():
            packed = zstd.compress(payload, 3)
            head[name] = {"dtype": "U8", "shape": [len(packed)], "data_offsets": [len(data), len(data) + len(packed)]}
            data += packed
        text = json.dumps(head).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + data)
    placed = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": about, "weight_map": placed}))


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = bytes_in(folder)
    yield
    assert bytes_in(folder) == before


# The layout


@pytest.mark.parametrize("algorithm", ["xxh3-128", "adler32"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_directory_made_by_hand_is_applied(encoding: str, algorithm: str, tmp_path: Path) -> None:
    old, new = bytes(range(100)), bytearray(range(100))
    new[3], new[4], new[99] = 250, 251, 252
    payload = bytes(a ^ b for a, b in zip(old, new, strict=True))
    if encoding == "overwrite":
        payload = bytes.fromhex("03000000030000000400000063000000fafbfc")
    about = {
        "version": "000001",
        "base_version": "000000",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": algorithm,
    }
    shard = {"a.weight": (payload, checksum(algorithm, bytes(new)))}
    write_golden(tmp_path / "run" / "weight_v000001", about, {"model-00000-of-00001.safetensors": shard})
    about |= {"version": "000002", "base_version": "000001"}
    write_golden(tmp_path / "run" / "weight_v000002", about, {})  # nothing changed: no shard at all
    local = tmp_path / "local"
    local.mkdir()
    kept = np.arange(7, dtype=np.int64)
    save_file({"a.weight": np.frombuffer(old, np.uint16).reshape(25, 2), "b": kept}, local / "model.safetensors")
    done = apply(local, tmp_path / "run")
    assert (done.version, done.before, done.n_changed, done.is_new) == (2, None, 1, True)
    expected: State = {"a.weight": np.frombuffer(bytes(new), np.uint16).reshape(25, 2), "b": kept}
    assert same(load_file(local / "model.safetensors"), expected)
    assert json.loads((local / ".weight_sync" / "state.json").read_text()) == {"version": "000002"}


@pytest.mark.parametrize("algorithm", ["xxh3-128", "adler32"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_reader_of_the_layout_reads_ours(encoding: Any, algorithm: Any, tmp_path: Path) -> None:
    states = run_of(4)
    publish(states[0], tmp_path, 0, checksum=algorithm)
    for version in (1, 2, 3):
        done = publish(states[version], tmp_path, version, encoding=encoding, checksum=algorithm, shard_bytes=4000)
        assert (done.base, done.encoding, done.is_new) == (version - 1, encoding, True)
        assert 3 <= done.n_changed <= 5
    local: dict[str, bytes] = {}
    for version, state in enumerate(states):
        local = plainly_applied(local, tmp_path / f"weight_v{version:06d}")
        assert local == raw(state)
    folder = tmp_path / "weight_v000003"
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {
        "version": "000003",
        "base_version": "000002",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": algorithm,
    }
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    full = json.loads((tmp_path / "weight_v000000" / INDEX).read_text())["metadata"]
    n_bytes = sum(array.nbytes for array in states[0].values())
    assert full == {"total_size": n_bytes, "version": "000000", "checksum_format": algorithm}


def test_the_bytes_of_a_delta(tmp_path: Path) -> None:
    old, new = {"w": np.arange(3, dtype=np.uint16)}, {"w": np.array([0, 1, 0x0302], np.uint16)}
    publish(new, tmp_path, 12, base=old, encoding="overwrite")
    folder = tmp_path / "weight_v000012"
    assert (folder / INDEX).read_bytes() == (
        b'{"metadata":{"version":"000012","base_version":"000011","delta_encoding":"overwrite",'
        b'"compression_format":"zstd","checksum_format":"xxh3-128"},'
        b'"weight_map":{"w":"model-00001-of-00001.safetensors"}}\n'
    )
    found, metadata = read_shard(folder / "model-00001-of-00001.safetensors")
    assert metadata == {"w": xxhash.xxh3_128(b"\0\0\1\0\2\3").hexdigest()}
    assert zstd.decompress(found["w"][2]) == bytes.fromhex("010000000500000003")


def test_versions_and_names_of_others_are_left_alone(tmp_path: Path) -> None:
    states = run_of(2)
    for name in ("weight_v1", "weight_v00000x", "latest", "weight_v000009"):
        (tmp_path / name).mkdir()
    publish(states[0], tmp_path, 1)
    assert publish(states[1], tmp_path, 2).base == 1
    assert apply(tmp_path / "local", tmp_path).version == 2


# Round trips


@pytest.mark.parametrize(
    ("format", "encoding"), [("safetensors", "xor"), ("safetensors", "overwrite"), ("tri", "auto")]
)
def test_every_dtype_and_odd_size(format: Any, encoding: Any, tmp_path: Path) -> None:
    shapes = [(0,), (), (1,), (31,), (33, 3), (4097,)]
    states: list[State] = [
        {f"{name}.{i}": of_dtype(name, shape, seed) for name in header.NAMES for i, shape in enumerate(shapes)}
        for seed in (0, 1)
    ]
    publish(states[0], tmp_path / "run", 3, format=format)
    publish(states[1], tmp_path / "run", 4, format=format, encoding=encoding)
    apply(tmp_path / "local", tmp_path / "run", 3)
    assert raw_in(tmp_path / "local") == raw(states[0])
    apply(tmp_path / "local", tmp_path / "run")
    assert raw_in(tmp_path / "local") == raw(states[1])
    live = {name: array.copy() for name, array in states[0].items()}
    apply(live, tmp_path / "run", 4, at=3)
    assert same(live, states[1])


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_of_any_strides_and_byte_order(format: Any, tmp_path: Path) -> None:
    base = weights((40, 30), 1)
    old = {"t": base.T, "b": base.astype(">f4"), "s": base[::3, ::2]}
    new = {name: stepped(array, 5) for name, array in old.items()}
    publish(old, tmp_path, 0, format=format)
    publish({"t": new["t"], "b": new["b"].astype(">f4"), "s": new["s"]}, tmp_path, 1, format=format)
    live = {"t": np.zeros((40, 30), np.float32).T, "b": np.zeros((40, 30), ">f4"), "s": np.zeros((14, 15), np.float32)}
    apply(live, tmp_path)
    assert all(np.array_equal(live[name], new[name]) for name in live)


@pytest.mark.parametrize("format", FORMATS)
def test_a_base_model_in_shards_follows(format: Any, tmp_path: Path) -> None:
    states = run_of(5)
    save_in_shards(states[0], tmp_path / "base")
    publisher = Publisher(tmp_path / "run", base=tmp_path / "base", format=format)
    for version in (1, 2, 3, 4):
        assert publisher.publish(states[version], version).base == version - 1
    local = tmp_path / "local"
    heads = {path.name: path.read_bytes()[:8] for path in (tmp_path / "base").glob("*.safetensors")}
    assert apply(local, tmp_path / "run", 1, base=tmp_path / "base").before is None
    assert same(model_in(local), states[1])
    assert (local / "config.json").exists()
    assert apply(local, tmp_path / "run").before == 1  # three versions at once
    assert same(model_in(local), states[4])
    assert {path.name: path.read_bytes()[:8] for path in local.glob("*.safetensors")} == heads
    with unchanged(local):
        assert not apply(local, tmp_path / "run").is_new
        assert not apply(local, tmp_path / "run", 4).is_new
    with pytest.raises(errors.InvalidArgument, match="newer than 2"):
        apply(local, tmp_path / "run", 2)


@pytest.mark.parametrize("format", FORMATS)
def test_catching_up_begins_at_the_newest_full_version(format: Any, tmp_path: Path) -> None:
    states = run_of(6)
    run, local = tmp_path / "run", tmp_path / "local"
    for version, state in enumerate(states):
        publish(state, run, version, format=format, full=version == 3 or None)
    apply(local, run, 1)
    for shard in (run / "weight_v000002").iterdir():
        shard.unlink()  # not needed any more
    apply(local, run)
    assert same(model_in(local), states[5])
    live = {name: np.zeros_like(array) for name, array in states[0].items()}
    assert apply(live, run).version == 5
    assert same(live, states[5])
    with pytest.raises(errors.MissingFile, match="version 6 is not published yet"):
        apply(local, run, 6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_live_arrays_follow(format: Any, is_tied: bool, tmp_path: Path) -> None:
    states = run_of(5)
    for version, state in enumerate(states):
        publish(state, tmp_path, version, format=format)
    live = {name: array.copy() for name, array in states[0].items()}
    if is_tied:
        live["lm_head.weight"] = live["model.embed_tokens.weight"]
    for before, version in ((0, 1), (1, 4)):
        apply(live, tmp_path, version, at=before)
        assert same(live, states[version])
    assert not apply(live, tmp_path, 4, at=4).is_new
    (frozen := live["model.layers.0.norm.weight"]).flags.writeable = False
    with pytest.raises(errors.InvalidArgument, match="read-only"):
        apply(live, tmp_path)
    frozen.flags.writeable = True


@pytest.mark.parametrize("format", FORMATS)
def test_few_of_many_small_tensors_change(format: Any, tmp_path: Path) -> None:
    """Small leaves of a `.tri` file share frames, and not all of a frame change."""
    old: State = {f"{i:03d}": weights((i % 7, 5), i).astype(np.float16) for i in range(300)}
    new = {name: array + np.float16(1) if int(name) % 11 == 5 else array for name, array in old.items()}
    publish(old, tmp_path / "run", 0, format=format)
    publish(new, tmp_path / "run", 1, format=format)
    live = {name: array.copy() for name, array in old.items()}
    changed = [name for name in old if int(name) % 11 == 5 and old[name].size]
    assert apply(live, tmp_path / "run", at=0).n_changed == len(changed)
    assert same(live, new)
    apply(tmp_path / "local", tmp_path / "run", 0)
    assert apply(tmp_path / "local", tmp_path / "run").n_changed == len(changed)
    assert same(model_in(tmp_path / "local"), new)


def test_a_version_that_is_missing_between(tmp_path: Path) -> None:
    states = run_of(4)
    run, local = tmp_path / "run", tmp_path / "local"
    for version, state in enumerate(states):
        publish(state, run, version)
    apply(local, run, 1)
    (run / "weight_v000002" / INDEX).unlink()  # not published, as far as anybody sees
    with unchanged(local), pytest.raises(errors.MissingParent, match="version 3 builds on 2"):
        apply(local, run)
    assert publish(states[3], run, 5).why == "version 4 is not published, the newest is 3"
    assert apply(local, run).version == 5


@pytest.mark.parametrize("format", FORMATS)
def test_publishing_again_compares(format: Any, tmp_path: Path) -> None:
    states = run_of(4)
    for version in (1, 2):
        publish(states[version], tmp_path, version, base=states[version - 1], format=format)
    with unchanged(tmp_path):
        assert not publish(states[2], tmp_path, 2, base=states[1], format=format).is_new
        moved = {**states[2], "model.layers.0.scale": np.array(2, np.float32)}  # of which no delta tells
        with pytest.raises(errors.InvalidArgument, match=r"its tensor 'model\.layers\.0\.scale' is another"):
            publish(moved, tmp_path, 2, base=states[1], format=format)
        if format == "safetensors":
            with pytest.raises(errors.InvalidArgument, match="To compare it give base="):
                publish(states[2], tmp_path, 2)
        with pytest.raises(errors.InvalidArgument, match=r"version 2 is published, and its tensor '.*' is another"):
            publish(states[3], tmp_path, 2, format=format)
        with pytest.raises(errors.InvalidArgument, match="0 would come before"):
            publish(states[0], tmp_path, 0, format=format)
        other = {**states[2], "model.layers.0.mlp.weight": states[1]["model.layers.0.mlp.weight"]}
        with pytest.raises(errors.WrongReference, match="'model.layers.0.mlp.weight' of the base is not what was"):
            publish(states[3], tmp_path, 3, base=other, format=format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s | {"new": np.ones(3, np.float32)}, "tensor 'new' is new"),
        (lambda s: {n: a for n, a in s.items() if not n.startswith("lm")}, "tensor 'lm_head.weight' is gone"),
        (lambda s: s | {"lm_head.weight": s["lm_head.weight"].T.copy()}, "tensor 'lm_head.weight' is BF16"),
        (lambda s: s | {"lm_head.weight": s["lm_head.weight"].astype("f4")}, "tensor 'lm_head.weight' is F32"),
    ],
    ids=["new", "gone", "shape", "dtype"],
)  # fmt: skip
def test_another_model_is_published_whole(
    format: Any, change: Callable[[State], State], why: str, tmp_path: Path
) -> None:
    states = run_of(2)
    publish(states[0], tmp_path / "run", 0, format=format)
    apply(tmp_path / "local", tmp_path / "run")
    other = change(states[1])
    with pytest.raises(errors.InvalidArgument, match=why):
        publish(other, tmp_path / "run", 1, format=format, full=False)
    done = publish(other, tmp_path / "run", 1, format=format)
    assert done.base is None
    assert done.why.startswith(why)
    apply(tmp_path / "local", tmp_path / "run")
    assert same(model_in(tmp_path / "local"), other)


@pytest.mark.parametrize("format", FORMATS)
def test_a_trainer_that_comes_back_goes_on(format: Any, tmp_path: Path) -> None:
    states = run_of(7)
    run, local = tmp_path / "run", tmp_path / "local"
    for version in range(1, 7):
        every = 4 if version >= 3 else None
        publisher = Publisher(run, base=states[0], format=format, full_every=every)  # a new one each time
        assert not publisher.publish(states[version - 1], version - 1).is_new if version > 1 else True
        done = publisher.publish(states[version], version)
        assert done.base == (None if version == 4 else version - 1)
        assert not Publisher(run, base=states[0], format=format).publish(states[version], version).is_new
    save_in_shards(states[0], tmp_path / "base")
    for version in (3, 6):
        apply(local, run, version, base=tmp_path / "base")
        assert same(model_in(local), states[version])
    with pytest.raises(errors.InvalidArgument, match="full_every: expected"):
        Publisher(run, full_every=0)


def test_a_publisher_goes_on_after_an_error_in_the_memory_it_has(tmp_path: Path) -> None:
    states = run_of(5)
    publisher = Publisher(tmp_path / "run")
    publisher.publish(states[0], 0)
    lock = Folder(str(tmp_path / "run")).lock()
    with pytest.raises(errors.StoreLocked):
        publisher.publish(states[1], 1)
    lock.release()
    tracemalloc.start()
    try:
        for version in (1, 2, 3, 4):
            moving = {name: array.copy("F") for name, array in states[version].items()}
            assert publisher.publish(moving, version).base == version - 1
            for array in moving.values():
                array[...] = 7  # training goes on
            del moving, array
            if version == 1:
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < sum(array.nbytes for array in states[0].values()) // 2
    apply(tmp_path / "local", tmp_path / "run")
    assert same(model_in(tmp_path / "local"), states[4])


def test_a_second_publisher_is_refused(tmp_path: Path) -> None:
    states = run_of(2)
    publish(states[0], tmp_path, 0)
    lock = Folder(str(tmp_path)).lock()
    with pytest.raises(errors.StoreLocked):
        publish(states[1], tmp_path, 1)
    lock.release()
    assert publish(states[1], tmp_path, 1).base == 0


def test_a_change_of_format_begins_with_a_full_version(tmp_path: Path) -> None:
    states = run_of(4)
    run, local = tmp_path / "run", tmp_path / "local"
    for version, format in enumerate(("safetensors", "safetensors", "tri", "tri")):
        done = publish(states[version], run, version, format=format)  # type: ignore[arg-type]
        assert (done.base is None) == (version in (0, 2))
        apply(local, run)
        assert same(model_in(local), states[version])


def test_the_encoding_that_makes_less_is_chosen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = {"w": rng.integers(0, 1 << 16, 200_000, dtype=np.uint16)}
    sizes: dict[float, dict[str, int]] = {}
    for number, share in enumerate((0.00001, 0.3)):
        new = {"w": np.where(rng.random(200_000) < share, old["w"] ^ 3, old["w"])}
        found = sizes[share] = {}
        for encoding in ("auto", "xor", "overwrite"):
            done = publish(new, tmp_path / f"{number}{encoding}", 1, base=old, encoding=encoding)
            found[encoding] = done.file_bytes
        assert found["auto"] == min(found["xor"], found["overwrite"])
    assert sizes[0.00001]["overwrite"] < sizes[0.00001]["xor"]
    assert sizes[0.3]["overwrite"] > sizes[0.3]["xor"]


def test_positions_have_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "MOST_BYTES", 1000)
    old, new = {"large": np.zeros(1001, np.uint8)}, {"large": np.eye(1001, 1, dtype=np.uint8)[:, 0]}
    with pytest.raises(errors.InvalidArgument, match="tensor 'large': overwrite: its positions have 32 bits"):
        publish(new, tmp_path, 1, base=old, encoding="overwrite")
    assert publish(new, tmp_path, 1, base=old).encoding == "xor"


@pytest.mark.parametrize("format", FORMATS)
def test_a_bucket_serves_as_well(format: Any, tmp_path: Path) -> None:
    url = f"memory://publishing-{format}-{os.urandom(4).hex()}/run"
    states = run_of(3)
    for version, state in enumerate(states):
        publish(state, url, version, format=format)
    apply(tmp_path / "local", url, 1)
    apply(tmp_path / "local", url)
    assert same(model_in(tmp_path / "local"), states[2])
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_bucket_is_asked_few_times(format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each file of a version, not for each tensor."""
    url = f"memory://few-{format}-{os.urandom(4).hex()}/run"
    calls: list[str] = []
    real = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *parts: Any, **options: Any) -> Any:
        calls.append(path)
        return real(self, path, *parts, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    old: State = {f"{i:03d}": weights((9, 11), i) for i in range(200)}
    new = {name: stepped(array, 1) for name, array in old.items()}
    publish(old, url, 0, format=format)
    publish(new, url, 1, format=format, base=old)
    calls.clear()
    apply(tmp_path / "local", url)
    assert same(model_in(tmp_path / "local"), new)
    assert 2 <= len(calls) < 30
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.parametrize("deed", ["publish", "apply"])
def test_a_full_disk_changes_nothing_for_good(deed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = run_of(2)
    publish(states[0], tmp_path / "run", 0)
    if deed == "apply":
        publish(states[1], tmp_path / "run", 1)
    real, n_left = os.fsync, 0

    def fsync(number: int) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    def done() -> bool:
        if deed == "publish":
            return publish(states[1], tmp_path / "run", 1).is_new
        return apply(tmp_path / "local", tmp_path / "run").is_new

    apply(tmp_path / "local", tmp_path / "run", 0)
    before = bytes_in(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    n_failed = 0
    while True:
        n_left = n_failed
        try:
            assert done() or n_failed
            break
        except errors.StorageError:
            n_failed += 1
            if not (tmp_path / "local" / ".weight_sync" / "tricomp.json").exists():
                assert same(model_in(tmp_path / "local"), states[0])
    assert n_failed > 3
    monkeypatch.setattr(os, "fsync", real)
    apply(tmp_path / "local", tmp_path / "run")
    assert same(model_in(tmp_path / "local"), states[1])
    assert {name.rsplit("/", 1)[-1] for name in bytes_in(tmp_path)} == {name.rsplit("/", 1)[-1] for name in before}


def test_memory_is_some_tensors_not_the_state(tmp_path: Path) -> None:
    n_bytes = 1 << 19
    old = {f"w{i:02d}": weights((n_bytes // 4,), i) for i in range(24)}
    new = {name: stepped(array, 1, 1e-7, 0.9) for name, array in old.items()}
    publish(old, tmp_path / "run", 0)
    apply(tmp_path / "local", tmp_path / "run")
    tracemalloc.start()
    try:
        publish(new, tmp_path / "run", 1, base=old, encoding="xor", threads=1)
        written, published = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        apply(tmp_path / "local", tmp_path / "run", threads=1)
        applied = tracemalloc.get_traced_memory()[1] - written
    finally:
        tracemalloc.stop()
    delta = sum(path.stat().st_size for path in (tmp_path / "run" / "weight_v000001").iterdir())
    assert published < 6 * n_bytes + delta
    assert applied < 6 * n_bytes


# Bad input


@pytest.fixture
def served(tmp_path: Path) -> tuple[list[State], Path, Path]:
    """States 0 and 1 published, and a copy at 0."""
    states = run_of(3)
    publish(states[0], tmp_path / "run", 0)
    publish(states[1], tmp_path / "run", 1, encoding="xor")
    apply(tmp_path / "local", tmp_path / "run", 0)
    return states, tmp_path / "run", tmp_path / "local"


@pytest.mark.parametrize("encoding", ["xor", "overwrite", "tri"])
def test_damage_is_found_and_changes_nothing(encoding: str, tmp_path: Path) -> None:
    states = run_of(2)
    run, local = tmp_path / "run", tmp_path / "local"
    options: dict[str, Any] = {"format": "tri"} if encoding == "tri" else {"encoding": encoding}
    publish(states[0], run, 0)
    publish(states[1], run, 1, base=states[0], **options)
    apply(local, run, 0)
    (victim,) = [path for path in (run / "weight_v000001").iterdir() if path.suffix in (".tri", ".safetensors")]
    whole = victim.read_bytes()
    places = sorted({*range(0, len(whole), len(whole) // 40), 0, 7, 8, 9, len(whole) - 1})
    n_found = 0
    with unchanged(local):
        for place in places:
            for damaged in (
                whole[:place],
                whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            ):
                victim.write_bytes(damaged)
                try:
                    apply(local, run)
                except errors.TricompError:
                    n_found += 1
                    continue
                assert same(model_in(local), states[1])  # of zstd's own head some bits do not matter
                shutil.rmtree(local)
                apply(local, run, 0)
    assert n_found >= 2 * len(places) - 3
    victim.write_bytes(whole)
    apply(local, run)
    assert same(model_in(local), states[1])


def test_wrong_bases_are_named(served: Any) -> None:
    states, run, local = served
    with unchanged(local):
        (shard,) = local.glob("*.safetensors")
        good = shard.read_bytes()
        bad = {**states[0], "model.layers.0.mlp.weight": stepped(states[0]["model.layers.0.mlp.weight"], 99)}
        save_file(bad, shard)
        with pytest.raises(
            errors.WrongReference, match="'model.layers.0.mlp.weight': what it was applied to is not version 0"
        ):
            apply(local, run)  # fmt: skip
        shorter = {**states[0], "model.layers.0.mlp.weight": states[0]["model.layers.0.mlp.weight"][1:].copy()}
        save_file(shorter, shard)
        with pytest.raises(errors.WrongReference, match="is for a tensor of 16770 bytes, what is here has 16640"):
            apply(local, run)
        del bad["model.layers.0.mlp.weight"]
        save_file(bad, shard)
        (local / INDEX).rename(local / "index")
        with pytest.raises(errors.WrongReference, match="'model.layers.0.mlp.weight' changed"):
            apply(local, run)
        shard.write_bytes(good)
        (local / "index").rename(local / INDEX)
    live = {name: array.copy() for name, array in states[2].items()}
    with pytest.raises(errors.WrongReference, match="is not version 0"):
        apply(live, run, 1, at=0)


def test_a_wrong_base_of_a_tri_is_named(tmp_path: Path) -> None:
    states = run_of(2)
    publish(states[1], tmp_path / "run", 1, base=states[0], format="tri")
    bad = {**states[0], "lm_head.weight": states[1]["lm_head.weight"]}
    (tmp_path / "local").mkdir()
    save_file(bad, tmp_path / "local" / "model.safetensors")
    with pytest.raises(errors.WrongReference, match="'lm_head.weight': what is here is not version 0 of it"):
        apply(tmp_path / "local", tmp_path / "run")
    del bad["lm_head.weight"]
    with pytest.raises(errors.WrongReference, match=r"tensor 'lm_head.weight' \(1 such"):
        apply(bad, tmp_path / "run", at=0)


def _edited(index: Path, **changes: Any) -> None:
    found = json.loads(index.read_text())
    found["metadata"] |= changes
    index.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "000002"}, "expected version 000001, got '000002'"),
        ({"version": None}, "expected version 000001, got None"),
        ({"base_version": "000001"}, "expected a base_version before 000001"),
        ({"base_version": "-1"}, "expected a base_version"),
        ({"delta_encoding": "sum"}, "delta_encoding: expected xor or overwrite, got 'sum'"),
        ({"delta_encoding": ["xor"]}, "delta_encoding: expected xor or overwrite"),
        ({"compression_format": "lz4"}, "compression_format: expected zstd"),
        ({"checksum_format": "md5"}, "checksum_format: expected xxh3-128"),
        ({"checksum_format": "adler32"}, "is not version 0"),
        ({"delta_encoding": "overwrite"}, "model-00001"),
    ],
)
def test_an_index_that_says_something_else(changes: dict[str, Any], message: str, served: Any) -> None:
    _, run, local = served
    _edited(run / "weight_v000001" / INDEX, **changes)
    with unchanged(local), pytest.raises(errors.TricompError, match=message):
        apply(local, run)


def test_shards_that_are_missing_or_elsewhere(served: Any) -> None:
    _states, run, local = served
    folder = run / "weight_v000001"
    (shard,) = folder.glob("*.safetensors")
    index = json.loads((folder / INDEX).read_text())
    shard.rename(folder / "away")
    with unchanged(local), pytest.raises(errors.MissingFile, match="the index names this shard"):
        apply(local, run)
    (folder / "away").rename(shard)
    for name in ("../model.safetensors", "/etc/passwd", "", "a\\b", 3):
        changed = {**index, "weight_map": dict.fromkeys(index["weight_map"], name)}
        (folder / INDEX).write_text(json.dumps(changed))
        with unchanged(local), pytest.raises(errors.CorruptFile, match="expected the name of a shard"):
            apply(local, run)
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    with unchanged(local), pytest.raises(errors.CorruptFile, match="'lm_head.weight' is in it, and not in the index"):
        apply(local, run)


def test_an_overwrite_that_lies(tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    save_file({"w": np.arange(10, dtype=np.uint8)}, local / "model.safetensors")
    about = {
        "version": "000001", "base_version": "000000", "delta_encoding": "overwrite", "compression_format": "zstd",
        "checksum_format": "adler32",
    }  # fmt: skip
    for number, (payload, message) in enumerate(
        [
            (struct.pack("<IIB", 1, 10, 7), "changes byte 10, what is here has 10"),
            (struct.pack("<IIB", 1 << 31, 1, 7), "9 bytes, expected"),
            (b"", "0 bytes, expected 4"),
            (bytes(1 << 20), "more than the 54 bytes"),
        ]
    ):
        run = tmp_path / f"run{number}"
        write_golden(run / "weight_v000001", about, {"m.safetensors": {"w": (payload, "00000000")}})
        with unchanged(local / ".."), pytest.raises(errors.TricompError, match=message):
            apply(local, run)


def test_what_publish_does_not_take(tmp_path: Path) -> None:
    state = first_state()
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ({"a": {"b": np.ones(3)}}, {}, "entry 'a': expected a numpy array, got a dict"),
        ({3: np.ones(3)}, {}, "the key 3 is no name"),
        ({"__metadata__": np.ones(3)}, {}, "is no name of a tensor"),
        ({"c": np.ones(3, complex)}, {}, "tensor 'c': safetensors has no complex128"),
        ([np.ones(3)], {}, "expected a dict"),
        (state, {"version": -1}, "version: expected a whole number"),
        (state, {"version": True}, "version: expected a whole number"),
        (state, {"encoding": "sum"}, "encoding: expected one of auto, xor, overwrite"),
        (state, {"checksum": "md5"}, "checksum: expected one of"),
        (state, {"level": 99}, "level: expected a level of zstd"),
        (state, {"format": "pt"}, "format: expected one of"),
        (state, {"full": False}, "is empty, and full=False"),
        (state, {"base": tmp_path}, "there is no model in safetensors"),
    ]
    for given, options, message in bad:
        options = {"version": 1, **options}
        with pytest.raises(errors.InvalidArgument, match=message):
            publish(given, tmp_path / "run", **options)
    assert not list((tmp_path / "run").glob("*/*.json"))
    for options, message in (
        ({"local": tmp_path / "none"}, "nothing is published there yet"),
        ({"local": tmp_path / "none", "at": 1}, "at: is for arrays"),
        ({"local": state, "base": tmp_path}, "base: is for folders"),
        ({"local": "memory://x"}, "expected a local folder"),
    ):
        with pytest.raises(errors.InvalidArgument, match=message):
            apply(folder=tmp_path / "run", **options)


def test_blake3_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(errors.InvalidArgument, match="pip install blake3"):
        publish(first_state(), tmp_path, 1, checksum="blake3")

    class Module:
        blake3 = staticmethod(hashlib.sha256)  # as good here: something with update and hexdigest

    monkeypatch.setitem(sys.modules, "blake3", Module)
    states = run_of(2)
    for version, state in enumerate(states):
        publish(state, tmp_path / "run", version, checksum="blake3")
    apply(tmp_path / "local", tmp_path / "run", 0)
    apply(tmp_path / "local", tmp_path / "run")
    assert same(model_in(tmp_path / "local"), states[1])


# Others at work


def test_one_at_a_time(served: Any) -> None:
    _, run, local = served
    with locked(str(local), None), pytest.raises(errors.StoreLocked, match="another process is applying"):
        apply(local, run, timeout=0.05)


def test_the_marks_of_another_program_count(served: Any, tmp_path: Path) -> None:
    """SGLang keeps the same mark, withdraws it before it writes in place, and empties the lock."""
    states, run, _local = served
    other = tmp_path / "other"
    save_in_shards(states[0], other)
    (other / ".weight_sync").mkdir()
    (other / ".weight_sync" / "lock").touch()
    (run / "weight_v000000" / INDEX).rename(run / "index")  # no full version any more
    with unchanged(other), pytest.raises(errors.InvalidArgument, match="another program was interrupted there"):
        apply(other, run)
    (other / ".weight_sync" / "state.json").write_text('{"version": "000000"}')
    assert apply(other, run).before == 0
    assert same(model_in(other), states[1])
    (other / ".weight_sync" / "state.json").unlink()
    (other / ".weight_sync" / "lock").write_bytes(b"")
    (run / "index").rename(run / "weight_v000000" / INDEX)
    assert apply(other, run).before is None  # from the full version
    assert same(model_in(other), states[1])


KILLS = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.publishing_cases import DEEDS

os.fsync = lambda number: None  # a process that dies loses nothing of what it wrote

def forked(deed, *arguments):
    child = os.fork()
    if not child:
        try:
            deed(*arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def dying(at, deed, *arguments):
    n = 0
    def hook(event, given):
        nonlocal n
        is_written = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)
        if is_written or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "fcntl.flock"):
            n += 1
            if n == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    deed(*arguments)

for number, (name, (begin, deed, check)) in enumerate(DEEDS.items()):
    folder = Path(sys.argv[2], str(number))
    folder.mkdir()
    assert forked(begin, folder / "begin") == 0
    at, code = 0, -9
    while code:
        at += 1 if "safetensors" in name else 2  # the moves are the same
        place = folder / str(at)
        shutil.copytree(folder / "begin", place)
        code = forked(dying, at, deed, place)
        assert code in (0, -9), code
        assert forked(check, place, code) == 0, (name, at)
        shutil.rmtree(place)
    print(at)
"""


def test_kill_9_at_any_instant(tmp_path: Path) -> None:
    """Each deed is killed at each of its calls that change the disk (with `.tri`, at each second), one process each."""
    command = [sys.executable, "-c", KILLS, str(Path(__file__).resolve().parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 4
    assert min(counts) >= 6


# torch


def _module() -> torch.nn.Module:
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(67, 32), torch.nn.Linear(32, 67, bias=False)
    head.weight = embedding.weight
    convolution = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.nn.ModuleDict({"e": embedding, "h": head, "c": convolution, "n": torch.nn.BatchNorm1d(33)}).bfloat16()


def _moved(module: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.1))


def _bits(module: torch.nn.Module) -> dict[str, list[int]]:
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.dtype == torch.bfloat16}
    return {name: tensor.contiguous().view(-1).view(torch.int16).tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("reference_in", ["device", "host", "folder"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_module_follows_in_place(format: Any, reference_in: Any, tmp_path: Path) -> None:
    trained, served = _module(), _module()
    publisher = torch_publishing.Publisher(tmp_path, reference_in=reference_in, format=format)
    for version in range(1, 5):
        assert (publisher.publish(trained, version).base is None) == (version == 1)
        if version in (1, 2, 4):
            at = None if version == 1 else {2: 1, 4: 2}[version]
            torch_publishing.apply(served, tmp_path, at=at)
            assert _bits(served) == _bits(trained)
            assert served.get_parameter("e.weight") is served.get_parameter("h.weight")
            assert served.get_parameter("c.weight").stride() == trained.get_parameter("c.weight").stride()
        _moved(trained, version)
    torch_publishing.apply(tmp_path / "local", tmp_path, 1)
    assert model_in(tmp_path / "local")["n.num_batches_tracked"].dtype == np.int64


def test_tensors_that_numpy_does_not_see_are_compared_where_they_are(tmp_path: Path) -> None:
    """What a GPU's tensors go through, on a CPU."""
    module = _module()
    names = [name for name, tensor in module.state_dict().items() if tensor.dtype == torch.bfloat16]

    def tensors() -> dict[str, torch_publishing.DeviceTensor]:
        state = module.state_dict()
        return {name: torch_publishing.DeviceTensor(state[name], name) for name in names}

    held = {name: tensor.copied_there() for name, tensor in tensors().items()}
    publish(held, tmp_path, 0)
    publisher = torch_publishing.Publisher(tmp_path / "own")
    publisher.tensors = lambda state: {**tensors()}  # type: ignore[method-assign]
    _moved(module, 3)
    for encoding in ("xor", "overwrite"):
        done = publish(tensors(), tmp_path / encoding, 1, base=held, encoding=encoding)
        plain = {name: tensor.copied() for name, tensor in tensors().items()}
        assert not publish(plain, tmp_path / encoding, 1, base=held).is_new
        again = publish(plain, tmp_path / f"{encoding}2", 1, base=held, encoding=encoding)
        assert done.file_bytes == again.file_bytes
    for version in range(4):
        _moved(module, 10 + version)
        assert publisher.publish(module, version).base == (version - 1 if version else None)
    arrays = {name: tensor.copied().leaf() for name, tensor in tensors().items()}
    apply(tmp_path / "local", tmp_path / "own")
    assert same(model_in(tmp_path / "local"), arrays)
    publish(tensors(), tmp_path / "whole", 1)
    expected = _bits(module)
    _moved(module, 5)
    assert _bits(module) != expected
    apply(tensors(), tmp_path / "whole")
    assert _bits(module) == expected


def test_an_interrupted_apply_to_live_tensors_is_finished(tmp_path: Path) -> None:
    states = run_of(4)
    for version, state in enumerate(states):
        publish(state, tmp_path, version)
    live = {name: array.copy() for name, array in states[1].items()}
    for name in sorted(live)[:3]:
        live[name] = states[3][name].copy()  # so far it came
    apply(live, tmp_path, 3, at=1)
    assert same(live, states[3])


def test_the_public_names() -> None:
    assert torch_publishing.Publication is not None
    assert "publishing" not in vars(tricomp_torch) or tricomp_torch.publishing is torch_publishing


# JAX


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_of_jax_follow(format: Any, tmp_path: Path) -> None:
    states = run_of(4)
    held = [{name: jnp.asarray(array) for name, array in state.items()} for state in states]
    publisher = jax_publishing.Publisher(tmp_path, format=format)
    for version in range(3):
        assert publisher.publish(held[version], version).version == version
    made, done = jax_publishing.apply_to_arrays(held[1], tmp_path, at=1)
    assert done.version == 2
    assert all(isinstance(array, jax.Array) for array in made.values())
    assert same({name: np.asarray(array) for name, array in made.items()}, states[2])
    assert same({name: np.asarray(array) for name, array in held[1].items()}, states[1])
    assert jax_publishing.publish(held[3], tmp_path, 3, base=held[2], format=format).base == 2
    jax_publishing.apply(tmp_path / "local", tmp_path)
    assert same(model_in(tmp_path / "local"), states[3])
    for value, message in (
        (jax.random.key(0), "got a random key"),
        ({"b": jnp.ones(3)}, "got a dict"),
        (jnp.ones(3, jnp.int4), "safetensors has no int4"),
    ):
        with pytest.raises(errors.InvalidArgument, match=f"entry 'a': .*{message}|{message}"):
            jax_publishing.publish({"a": value}, tmp_path / "bad", 1)
