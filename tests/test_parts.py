"""Parts of leaves: some elements, a leaf piece by piece, and what a frame's bytes are for. Also storage in memory."""

import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tricomp
from tests.cases import equal
from tricomp import container, spool
from tricomp.checkpoint import put
from tricomp.content import content_of
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    MissingFile,
    MissingLeaf,
    StorageError,
    StoreLocked,
)
from tricomp.file import File
from tricomp.memory import Memory

SPEC = tricomp.Spec(chunk_log2=10)
N = 40_013


def tree(seed=0, nudge=0.0):
    """Leaves of every prediction, several chunks each; the same but for small changes at another nudge."""
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.integers(-9, 9, (N // 100 + 1, 1)))
    w = (rng.standard_normal((N // 100 + 1, 100)) * rows).reshape(-1)[:N]
    w = (w * (1 + nudge * np.random.default_rng(int(nudge * 1e9)).standard_normal(N))).astype(np.float32)
    few = np.random.default_rng(int(nudge * 1e9) + 7).random(N) < 0.002
    with np.errstate(over="ignore"):
        return {
            "w": w,
            "half": w.astype(ml_dtypes.bfloat16),
            "v": (w * w).reshape(-1)[:40_000].reshape(400, 100),
            "same": w[:20_011].astype(np.float64),
            "sparse": np.where(few, 3, 0).astype(np.int16),
            "palette": rng.integers(0, 9, N).astype(np.int64) ** 5,
            "noise": np.frombuffer(rng.bytes(N), np.uint8).copy(),
            "constant": np.full((3, 9, 1001), 2.5, np.float16),
            "complex": (w[:20_001] * (1 + 2j)).astype(np.complex64),
            "small": {str(i): w[i * 50 : i * 60] for i in range(5)},
            "tiny half": w[:999].astype(ml_dtypes.bfloat16),
            "tiny": w[:999].copy(),
            "empty": np.zeros((0, 3), np.float32),
            "scalar": np.float64(w[0]),
        }


@pytest.fixture(scope="module")
def chain():
    """Three checkpoints, each a delta of the one before, in memory."""
    storage = Memory()
    files: list[File] = []
    for i, nudge in enumerate((0.0, 1e-4, 2e-4)):
        put(storage, str(i), content_of(tree(nudge=nudge)), files[-1] if files else None, SPEC)
        files.append(File(storage.get(str(i)), files[-1] if files else None))
    return files


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8).tobytes()


def test_the_chain_has_every_prediction(chain):
    found = {chain[2].plan(path).predict for path in chain[2]}
    assert found >= {"delta", "copy", "cast", "sparse", "constant"}
    assert {chain[0].plan(path).predict for path in chain[0]} >= {"full", "palette", "raw", "sparse", "cast"}
    assert {chain[2].plan(path).reference for path in chain[2]} == {"none", "parent", "sibling"}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_elements_are_those_of_the_whole_leaf(chain, level):
    rng = np.random.default_rng(level)
    for path in chain[level]:
        whole = chain[level][path].reshape(-1)
        edges = [0, 1, 1023, 1024, 1025, len(whole) // 2, len(whole) - 1, len(whole), *rng.integers(0, N, 3)]
        edges = sorted({int(edge) for edge in edges if 0 <= edge <= len(whole)})
        for start in edges[::2]:
            for stop in edges:
                if start <= stop:
                    part = chain[level].elements(path, start, stop)
                    assert part.dtype == whole.dtype
                    assert part.shape == (stop - start,)
                    assert bits(part) == bits(whole[start:stop])


def test_elements_are_in_memory_of_their_own(chain):
    for path in chain[2]:
        part = chain[2].elements(path, 0, min(7, chain[2][path].size))
        before = bits(chain[2][path])
        part.view(np.uint8)[...] = 0xA5
        assert bits(chain[2][path]) == before


def test_elements_outside_the_leaf_are_refused(chain):
    for start, stop in ((-1, 3), (5, 4), (0, N + 1)):
        with pytest.raises(InvalidArgument, match=rf"leaf 'w': elements {start} to {stop} of {N}"):
            chain[0].elements("w", start, stop)
    with pytest.raises(MissingLeaf):
        chain[0].elements("nope", 0, 1)


def test_a_part_reads_its_chunks_only(tmp_path, monkeypatch):
    path = tmp_path / "x.tri"
    tricomp.save(path, {"w": tree()["w"]}, spec=SPEC)
    data = bytearray(path.read_bytes())
    with tricomp.open(path) as file:
        frame = file._frame_of[0]
        data[frame.offset + frame.n_bytes - 3] ^= 1  # in the last chunk
    path.write_bytes(data)
    with tricomp.open(path) as file:
        assert bits(file.elements("w", 0, 39 * 1024)) == bits(tree()["w"][: 39 * 1024])
        with pytest.raises(CorruptFrame, match=r"chunk 39 of 'w'"):
            file.elements("w", 39 * 1024 - 1, N)
        with pytest.raises(CorruptFrame):
            file["w"]
    read: list[int] = []
    monkeypatch.setattr(container.FrameBytes, "__getitem__", _noting(read))
    with tricomp.open(path) as file:
        file.elements("w", 5000, 5001)
        assert sum(read) < 0.1 * file.n_bytes


def _noting(read):
    original = container.FrameBytes.__getitem__

    def noted(self, part):
        found = original(self, part)
        read.append(len(found))
        return found

    return noted


def test_pieces_are_the_leaf_in_order(chain):
    for path in chain[2]:
        (piece,) = chain[2].pieces(path)  # a small leaf comes whole
        assert piece.ndim == 1
        assert bits(piece) == bits(chain[2][path])


def test_pieces_of_large_leaves_through_a_chain():
    n = (1 << 21) * 2 + 5
    x = np.zeros(n, np.float32)
    x[::1001] = np.arange(n)[::1001]
    trees = [{"x": x, "z": x[: n // 2].astype(np.complex64), "flags": x > 7}]
    later = x.copy()
    later[5::7001] += 1
    trees.append({"x": later, "z": later[: n // 2].astype(np.complex64), "flags": later > 7})
    storage = Memory()
    put(storage, "0", content_of(trees[0]))
    put(storage, "1", content_of(trees[1]), File(storage.get("0")))
    file = File(storage.get("1"), File(storage.get("0")))
    for path, whole in trees[1].items():
        pieces = list(file.pieces(path, 1 << 20))
        assert len(pieces) == -(-whole.size // (1 << 20))
        assert all(piece.dtype == whole.dtype for piece in pieces)
        assert b"".join(map(bits, pieces)) == bits(whole)  # pieces that are held stay as they are
        assert b"".join(map(bits, file.pieces(path, 1 << 20))) == bits(whole)
        assert [len(piece) for piece in file.pieces(path, 1)][:-1] == [1 << 16] * (whole.size >> 16)


def test_pieces_compare_the_digest(monkeypatch):
    n = (1 << 21) + 5
    data = (np.arange(n, dtype=np.uint32) * 2654435761 >> 7).astype(np.uint8)
    storage = Memory()
    put(storage, "x", content_of({"a": data}))
    file = File(storage.get("x"))
    assert b"".join(map(bits, file.pieces("a", 1))) == bits(data)
    object.__setattr__(file._contents, "digests", (1,))
    with pytest.raises(CorruptFrame, match=r"leaf 'a': digest 0{15}1 stored"):
        list(file.pieces("a", 1))


def test_a_delta_without_its_parent_tells_so(chain, tmp_path):
    storage = Memory()
    put(storage, "x", content_of(tree(nudge=1e-4)), chain[0], SPEC)
    alone = File(storage.get("x"))
    with pytest.raises(tricomp.WrongReference, match="no reference was given"):
        alone.elements("w", 0, 3)
    against_tree = File(storage.get("x"), content_of(tree()))
    assert bits(against_tree.elements("w", 1000, 30_000)) == bits(tree(nudge=1e-4)["w"][1000:30_000])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40_000), st.integers(0, 5000), st.sampled_from(["w", "v", "half", "sparse", "palette", "noise"]))
def test_any_part_of_any_leaf(chain, start, n, path):
    whole = chain[2][path].reshape(-1)
    start = min(start, len(whole))
    stop = min(start + n, len(whole))
    assert bits(chain[2].elements(path, start, stop)) == bits(whole[start:stop])


def test_breakdowns_add_up_to_the_frame(chain):
    for file in chain:
        for path in file:
            found = file.breakdown(path)
            assert found.total == file.coded_bytes(path)
            assert min(vars(found).values()) >= 0
    assert chain[0].breakdown("noise").raw == N
    assert chain[0].breakdown("w").remainder > chain[0].breakdown("w").symbols > 0
    assert chain[0].breakdown("sparse").patches > 0
    assert chain[0].breakdown("constant").total == 0
    assert set(chain[0].frame_leaves("small/1")) >= {"small/0", "small/1"}


@pytest.mark.parametrize("tier", ["dense", "fast"])
def test_breakdowns_tell_symbols_of_both_tiers(tier):
    storage = Memory()
    put(storage, "x", content_of({"w": tree()["w"]}), None, tricomp.Spec(tier=tier))
    found = File(storage.get("x")).breakdown("w")
    plan = File(storage.get("x")).plan("w")
    assert found.symbols > N * 2 / 8
    if tier == "fast":
        assert found.symbols == -(-313 * plan.index_bits // 8) * 128  # 313 rows of 128
    assert found.total == File(storage.get("x")).coded_bytes("w")


def test_memory_is_a_storage():
    storage = Memory("ram")
    with pytest.raises(MissingFile, match="ram: holds no 'x'"):
        storage.get("x")
    put(storage, "x", content_of({"a": np.arange(5)}))
    source, stamp = storage.get("x"), storage.list()["x"]
    put(storage, "x", content_of({"a": np.arange(6)}))
    assert storage.list()["x"] != stamp
    assert len(File(source)["a"]) == 5  # what was open stays as it was
    assert len(File(storage.get("x"))["a"]) == 6
    assert storage.n_bytes == storage.get("x").n_bytes
    with pytest.raises(CorruptFile):
        storage.get("x").read(0, storage.n_bytes + 1)
    with pytest.raises(tricomp.UnsupportedNode):
        put(storage, "x", content_of({"a": object()}))
    assert equal(File(storage.get("x")).load(), {"a": np.arange(6)})
    lock = storage.lock()
    with pytest.raises(StoreLocked):
        storage.lock()
    lock.release()
    assert storage.lock().is_held
    assert not lock.is_held
    storage.delete("x")
    storage.delete("x")
    assert storage.list() == {}


def test_progress_counts_every_raw_byte():
    seen: list[int] = []
    content = content_of(tree())
    report = put(Memory(), "x", content, on_progress=seen.append)
    assert sum(seen) == report.raw_bytes
    assert len(seen) > 5


def test_a_large_frame_waits_on_disk_and_is_the_same(monkeypatch, tmp_path):
    known = tree()
    content = content_of({"w": known["w"], "v": known["v"]})
    here, there = Memory(), Memory()
    put(here, "x", content, spec=SPEC)
    monkeypatch.setattr(spool, "MEMORY_BYTES", 1000)
    monkeypatch.setattr(spool, "_READ_BYTES", 777)
    put(there, "x", content, spec=SPEC)
    assert here.get("x").read(0, here.n_bytes) == there.get("x").read(0, there.n_bytes)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match=r"nowhere: cannot hold a large leaf .* set TMPDIR"):
        put(there, "y", content, spec=SPEC)
    assert list(there.list()) == ["x"]


def test_frames_of_several_bins(monkeypatch):
    known = tree()
    monkeypatch.setattr(container, "MAX_BIN_BYTES", 5001)
    storage = Memory()
    put(storage, "x", content_of({"w": known["w"], "v": known["v"]}), spec=SPEC)
    file = File(storage.get("x"))
    for path in ("w", "v"):
        assert len(file._frame_of[file._number(path)].sizes) > 5
        assert bits(file[path]) == bits(known[path])
        assert bits(file.elements(path, 3000, 30_000)) == bits(known[path].reshape(-1)[3000:30_000])
