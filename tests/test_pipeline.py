"""Encoding and decoding ahead of writing: the same bytes, errors at the caller, nothing left behind."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tricomp
from tests.cases import weights
from tricomp import codec
from tricomp.archive_output import put_together, write_ahead
from tricomp.checkpoint import put
from tricomp.content import content_of
from tricomp.folder import Folder
from tricomp.memory import Memory

TREE = {f"w{i}": weights((50 + i, 400), seed=i) for i in range(12)}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("tricomp.codec.engine.BATCH_WORDS", 45_000)  # two leaves
    monkeypatch.setattr("tricomp.codec.engine.THREAD_WORDS", 1)


def working():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tricomp-ahead")]


def test_batches_change_no_byte(tmp_path, monkeypatch):
    old = {path: array + 1 for path, array in TREE.items()}
    tricomp.save(tmp_path / "old.tri", old)
    for name, reference in (("full", None), ("delta", old), ("delta of a file", tmp_path / "old.tri")):
        tricomp.save(tmp_path / "one.tri", TREE, reference)
        with monkeypatch.context() as patch:
            patch.setattr("tricomp.codec.engine.BATCH_WORDS", 45_000)
            patch.setattr("tricomp.codec.engine.THREAD_WORDS", 1)
            tricomp.save(tmp_path / "many.tri", TREE, reference)
        assert (tmp_path / "one.tri").read_bytes() == (tmp_path / "many.tri").read_bytes(), name
    assert working() == []


def test_frames_are_encoded_while_others_are_written(small_batches, monkeypatch):
    """And never more than a batch ahead."""
    encoded, real = [], codec.Engine.begin_encoding
    is_ahead = threading.Event()

    def noted(engine, jobs, room):
        encoded.append(len(jobs))
        if len(encoded) == 2:
            is_ahead.set()
        return real(engine, jobs, room)

    monkeypatch.setattr(codec.Engine, "begin_encoding", noted)
    frames = codec.encode(content_of(TREE).snapshot)
    next(frames)
    assert is_ahead.wait(10)  # the second batch is at work while a frame of the first is here
    time.sleep(0.2)
    assert len(encoded) == 2
    assert len(list(frames)) == 11
    assert sum(encoded) == 12
    assert working() == []


@pytest.mark.parametrize("n_pieces", [0, 1, 3, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt, tricomp.StorageError, MemoryError])
def test_what_goes_wrong_in_writing_ends_the_encoder(small_batches, error, n_pieces):
    class Full(Memory):
        def put(self, name, pieces):
            for i, _ in enumerate(pieces):
                if i == n_pieces:
                    raise error("here")

    with pytest.raises(error, match="here"):
        put(Full(), "a.tri", content_of(TREE))
    assert working() == []


@pytest.mark.parametrize("n_batches", [0, 1, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, tricomp.StorageError])
def test_what_goes_wrong_in_the_encoder_ends_the_writing(small_batches, monkeypatch, tmp_path, error, n_batches):
    real, n_done = codec.Engine.begin_encoding, 0

    def failing(engine, jobs, room):
        nonlocal n_done
        n_done += 1
        if n_done > n_batches:
            raise error("here")
        return real(engine, jobs, room)

    (tmp_path / "a.tri").write_bytes(b"before")
    monkeypatch.setattr(codec.Engine, "begin_encoding", failing)
    with pytest.raises(error, match="here"):
        tricomp.save(tmp_path / "a.tri", TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tri"]
    assert (tmp_path / "a.tri").read_bytes() == b"before"
    assert working() == []


def test_who_takes_some_frames_only_leaves_no_thread(small_batches):
    frames = codec.encode(content_of(TREE).snapshot)
    next(frames)
    frames.close()
    assert working() == []


def damaged(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_damage_that_is_found_while_others_are_written(tmp_path, monkeypatch, share):
    monkeypatch.setattr("tricomp.formats.span.BATCH_BYTES", 200_000)
    monkeypatch.setattr("tricomp.archive_output.AHEAD_BYTES", 100_000)
    np.savez(tmp_path / "a.npz", **TREE)  # type: ignore[arg-type]
    tricomp.compress(tmp_path / "a.npz")
    damaged(tmp_path / "a.npz.tri", share)
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(tricomp.TricompError):
        tricomp.decompress(tmp_path / "a.npz.tri", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.tri"]
    assert (tmp_path / "a.npz").read_bytes() == before
    assert working() == []


def test_a_callback_is_called_where_the_caller_is(tmp_path, small_batches):
    seen = set()
    np.savez(tmp_path / "a.npz", **TREE)  # type: ignore[arg-type]
    tricomp.compress(tmp_path / "a.npz", on_progress=lambda done, total: seen.add(threading.current_thread()))
    tricomp.decompress(
        tmp_path / "a.npz.tri", tmp_path / "b.npz", on_progress=lambda done, total: seen.add(threading.current_thread())
    )
    assert seen == {threading.main_thread()}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tricomp.decompress(tmp_path / "a.npz.tri", tmp_path / "c.npz", on_progress=stop)
    with pytest.raises(KeyboardInterrupt):
        tricomp.compress(tmp_path / "a.npz", tmp_path / "c.tri", on_progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.tri", "b.npz"]
    assert working() == []


def test_pieces_that_wait_are_bounded(tmp_path, monkeypatch):
    """However slow the writer is, a few MB are decoded ahead of it."""
    made = 0

    def pieces():
        nonlocal made
        for _ in range(100):
            made += 1
            yield bytes(1000)

    class Slow:
        n_written = 0

        def write(self, data):
            self.n_written += 1
            assert made <= self.n_written + 6
            return len(data)

    monkeypatch.setattr("tricomp.archive_output.AHEAD_BYTES", 4000)
    assert write_ahead(Slow(), pieces()) == 100_000  # type: ignore[arg-type]


@pytest.mark.parametrize("is_synced", [False, True])
def test_a_file_is_synced_where_that_is_asked_for(tmp_path, monkeypatch, is_synced):
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    np.save(tmp_path / "a.npy", TREE["w0"])
    tricomp.compress(tmp_path / "a.npy")
    assert synced
    synced.clear()
    tricomp.decompress(tmp_path / "a.npy.tri", tmp_path / "b.npy", is_synced=is_synced)
    assert bool(synced) == is_synced
    synced.clear()
    put_together([str(tmp_path / name) for name in "xy"], [[b"x"], [b"y"]], is_synced)
    assert bool(synced) == is_synced


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system is not told of bytes that are written")
@pytest.mark.parametrize("refuses", [False, True])
def test_the_disk_begins_while_pieces_are_made(tmp_path, monkeypatch, refuses):
    """Each byte is asked for once, in order, as soon as enough are there; who refuses changes nothing."""
    begun: list[tuple[int, int]] = []

    def advise(descriptor: int, begin: int, n_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert os.fstat(descriptor).st_size >= begin + n_bytes - io.DEFAULT_BUFFER_SIZE
        begun.append((begin, n_bytes))
        if refuses:
            raise OSError("not on this file system")

    monkeypatch.setattr("os.posix_fadvise", advise)
    monkeypatch.setattr("tricomp.folder._BEGUN_BYTES", 100_000)
    pieces = [np.random.default_rng(i).bytes(30_011) for i in range(11)]
    Folder(str(tmp_path)).put("a", iter(pieces))
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)
    assert begun == [(0, 4 * 30_011), (4 * 30_011, 4 * 30_011)]
    begun.clear()
    Folder(str(tmp_path)).put("a", iter(pieces), is_synced=False)
    assert not begun
