"""Damaged frames and plans: an error of ours every time, never a crash, never other data without a word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import decayed, moments, stepped, weights
from tests.test_codec import plans_by_hand
from tricomp import codec, dtypes, native
from tricomp.errors import CorruptFrame, TricompError, UnsupportedVersion
from tricomp.layout import snapshot_of
from tricomp.plan import Plan, Spec
from tricomp.reference import decode as decoder
from tricomp.reference.frame import directory, head_bytes, places


def frames():
    """(leaves, frame, reference words, own words) of each kind of frame, a few kilobytes each."""
    out = []
    w, v = weights((30, 100)), moments((40, 60), zero_share=0.3)
    low = weights((40, 128))
    low.view(np.uint32)[::2] &= np.uint32(0xFFFF0000)
    for new, old in (
        (w, None),
        (stepped(w), w),
        (decayed(v), v),
        (v, None),
        (low, None),
        (np.random.default_rng(0).choice([1.0, 2.0, 7.0], 3000), None),
        (np.where(np.arange(3000) % 500 == 0, 3, 0).astype(np.int32), None),
        (np.random.default_rng(1).integers(0, 256, 2000, dtype=np.uint8), None),
    ):
        for spec in (Spec(chunk_log2=10), Spec(tier="fast", chunk_log2=10)):
            snapshot = snapshot_of(["leaf"], [new])
            parent = None if old is None else snapshot_of(["leaf"], [old])
            frame = next(iter(codec.encode(snapshot, parent, spec)))
            reference = parent.words(0) if parent is not None and frame.plan.reference == "parent" else None
            out.append((snapshot.layout.leaves, frame, reference, snapshot.words(0)))
    return out


FRAMES = frames()


def attempt(leaves, frame, plan, data, reference, words):
    """Decode what may be damaged. Anything but a TricompError escapes; other words than before must be noticed."""
    try:
        found = codec.decode(leaves, plan, data, reference, None)[0]
    except TricompError:
        return True
    return np.array_equal(found, words)


@pytest.mark.parametrize("i", range(len(FRAMES)))
def test_cut_at_every_byte(i):
    leaves, frame, reference, _ = FRAMES[i]
    for n_bytes in [*range(0, len(frame.data), 1 + len(frame.data) // 400), len(frame.data) - 1]:
        with pytest.raises(CorruptFrame):
            codec.decode(leaves, frame.plan, frame.data[:n_bytes], reference, None)
    with pytest.raises(CorruptFrame):
        codec.decode(leaves, frame.plan, frame.data + b"\0", reference, None)


@pytest.mark.parametrize("i", range(len(FRAMES)))
def test_flipped_bits(i):
    leaves, frame, reference, words = FRAMES[i]
    rng = np.random.default_rng(i)
    for bit in rng.integers(0, 8 * len(frame.data), 120):
        data = bytearray(frame.data)
        data[bit >> 3] ^= 1 << (bit & 7)
        assert attempt(leaves, frame, frame.plan, bytes(data), reference, words)


def test_messages_name_leaf_and_chunk():
    leaves, frame, reference, _ = FRAMES[0]
    data = bytearray(frame.data)
    data[-5] ^= 4
    with pytest.raises(CorruptFrame, match=r"chunk 2 of 'leaf': checksum \w{16} stored, \w{16} computed\. Restore"):
        codec.decode(leaves, frame.plan, bytes(data), reference, None)
    data = bytearray(frame.data)
    data[0] ^= 4
    with pytest.raises(CorruptFrame, match="frame of 'leaf': its side section or directory is damaged"):
        codec.decode(leaves, frame.plan, bytes(data), reference, None)


def without_checksums(monkeypatch):
    """Let every checksum pass, so that damage reaches the stages behind it."""

    class Any64:
        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

        def __format__(self, spec):
            return "any"

    class Blind:
        xxh3_64_intdigest = staticmethod(lambda data: Any64())

    monkeypatch.setattr(decoder, "xxhash", Blind)


@pytest.mark.parametrize("i", range(len(FRAMES)))
def test_hostile_bytes_behind_good_checksums(i, monkeypatch):
    """Whatever the bytes: a TricompError or some words of the right number, no crash, no huge allocation."""
    without_checksums(monkeypatch)
    leaves, frame, reference, words = FRAMES[i]
    rng = np.random.default_rng(i)
    for _ in range(150):
        data = np.frombuffer(frame.data, np.uint8).copy()
        at = rng.integers(0, len(data), rng.integers(1, 8))
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, *rng.integers(0, 256, 5)], len(at))
        try:
            found = codec.decode(leaves, frame.plan, data.tobytes(), reference, None)[0]
        except TricompError:
            continue
        assert found.shape == words.shape


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(range(len(FRAMES))), st.data())
def test_hostile_plans(i, data):
    leaves, frame, reference, words = FRAMES[i]
    wire = dict(frame.plan.to_wire())
    keys = ["d", "n", "p", "c", "r", "s", "e", "ns", "b", "pb", "nc", "cb", "cs", "k", "sg", "nk", "ks", "f", "ib", "m"]
    key = data.draw(st.sampled_from([*keys, "t", "bs", "cp", "w", "q", "sb", "sc", "zz"]))
    bad = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(0, 20), st.none(), st.text(max_size=2))
    wire[key] = data.draw(bad)
    try:
        plan = Plan.from_wire(wire, "leaf")
    except (CorruptFrame, UnsupportedVersion, TricompError):
        return
    # The container's checksum covers the plan; here other words may come out, where a field does not change a length.
    is_free = key in ("pb", "b", "k", "q", "cb", "cs", "f", "w", "r")  # a delta of no reference is one of zeros
    assert attempt(leaves, frame, plan, frame.data, reference, words) or is_free


def test_a_newer_plan_is_refused_as_such():
    wire = FRAMES[0][1].plan.to_wire()
    with pytest.raises(UnsupportedVersion, match=r"leaf 'x': its plan has the field 'replay', unknown to format 1\. U"):
        Plan.from_wire({**wire, "replay": 1}, "x")
    with pytest.raises(UnsupportedVersion, match=r"leaf 'x': plan field predict is 9, unknown to format 1. Upgrade"):
        Plan.from_wire({**wire, "p": 9}, "x")
    with pytest.raises(CorruptFrame, match="leaf 'x': its plan should be a map, found list"):
        Plan.from_wire([1], "x")
    with pytest.raises(CorruptFrame, match="leaf 'x': its plan lacks the field 'n'"):
        Plan.from_wire({key: value for key, value in wire.items() if key != "n"}, "x")


def test_a_plan_cannot_ask_for_memory_that_its_bytes_do_not_earn():
    leaves, frame, _, _ = FRAMES[0]
    huge = [replace(leaves[0], shape=(1 << 40,))]
    plan = replace(frame.plan, n_words=1 << 40)
    with pytest.raises(CorruptFrame, match="words need a longer chunk directory than it has"):
        codec.decode(huge, plan, frame.data, None, None)


def test_contradictions_in_plans_are_found():
    for plan, _ in list(plans_by_hand())[::40]:
        complete = replace(plan, n_words=2200, n_symbols=32, index_bits=3 if plan.entropy == "index" else 0, base=0)
        assert Plan.from_wire(complete.to_wire()) == complete
        for change in ({"entropy": "none"}, {"n_symbols": 0}, {"n_contexts": 8, "n_symbols": 200}, {"predict": "cast"}):
            with pytest.raises(CorruptFrame, match="its plan contradicts itself"):
                Plan.from_wire(replace(complete, **change).to_wire())
    assert dtypes.by_number(2).name == "float32"


def forged(frame, rng, n_chunks=1):
    """Plan and data of a frame with some bytes of some chunks changed, and every checksum made to fit again."""
    plan = frame.plan
    data = np.frombuffer(frame.data, np.uint8).copy()
    n_head = head_bytes(plan)
    rows = np.frombuffer(data[:n_head].tobytes(), "<u4", plan.n_chunks * (6 + len(plan.plane_widths)), plan.side_bytes)
    rows = rows.reshape(plan.n_chunks, -1).copy()
    begins, _ = places(plan, rows)
    for chunk in rng.choice(plan.n_chunks, min(n_chunks, plan.n_chunks), replace=False):
        begin, n_bytes = int(begins[chunk]), int(rows[chunk, 2])
        if rng.integers(4) == 0:  # what the directory tells
            column = int(rng.integers(3, rows.shape[1]))
            rows[chunk, column] = rng.choice(
                [0, 1, 1 << 31, 1 << 28, 2 << 28, rows[chunk, column] + 1, rng.integers(300)]
            )
        at = begin + rng.integers(0, n_bytes, rng.integers(1, 5))
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, *rng.integers(0, 256, 5)], len(at))
        check = xxhash.xxh3_64_intdigest(data[begin : begin + n_bytes].tobytes())
        rows[chunk, 0], rows[chunk, 1] = check & 0xFFFFFFFF, check >> 32
        end = begin + n_bytes
        if rng.integers(8) == 0 and chunk < plan.n_chunks - 1 and end % 16:
            data[end + rng.integers(-end % 16)] = 1
    directory = rows.astype("<u4").tobytes()
    data[plan.side_bytes : plan.side_bytes + len(directory)] = np.frombuffer(directory, np.uint8)
    return replace(plan, side_check=xxhash.xxh3_64_intdigest(data[:n_head].tobytes())), data.tobytes()


def outcome(stored, backend, threads=None):
    """What decoding gives: words, or class and text of what it raises."""
    try:
        return [
            words.tobytes()
            for found in codec.decode_many(stored, codec.Engine(threads, backend))
            for words in found.words
        ]
    except TricompError as error:
        return type(error), str(error)


def named(leaves, name):
    return [replace(leaf, path=name) for leaf in leaves]


@pytest.mark.parametrize("i", range(len(FRAMES)))
def test_a_fault_behind_good_checksums_names_its_chunk(i):
    """Also where many chunks are decoded together; and the first of several faults is told."""
    leaves, frame, reference, _ = FRAMES[i]
    rng = np.random.default_rng(i)
    texts = set()
    for _ in range(40):
        plan, data = forged(frame, rng)
        sound = codec.StoredFrame(named(leaves, "sound"), frame.plan, frame.data, reference)
        broken = codec.StoredFrame(named(leaves, "broken"), plan, data, reference)
        alone = outcome([broken], "reference")
        together = outcome([sound, broken, sound], "reference")
        assert together[1:2] == alone if isinstance(alone, list) else together == alone
        if isinstance(alone, tuple):
            texts.add(alone[1])
            later = codec.StoredFrame(named(leaves, "later"), plan, data, reference)
            assert outcome([broken, later], "reference") == alone
    if frame.plan.predict != "raw":
        assert texts
    for text in texts:
        assert text.startswith(("chunk ", "frame of 'broken': its chunks end at byte")), text
        assert "of 'broken': " in text


@pytest.mark.skipif(not native.is_there(), reason="needs the native module")
@pytest.mark.parametrize("i", range(len(FRAMES)))
def test_both_backends_refuse_alike(i):
    leaves, frame, reference, _ = FRAMES[i]
    rng = np.random.default_rng(i)
    for n_chunks in (1, 2):
        for _ in range(60):
            plan, data = forged(frame, rng, n_chunks)
            stored = [codec.StoredFrame(leaves, plan, data, reference)]
            expected = outcome(stored, "reference")
            for threads in (1, 3):
                assert outcome(stored, "native", threads) == expected
    for n_bytes in [*range(0, len(frame.data), 1 + len(frame.data) // 50), len(frame.data) - 1]:
        stored = [codec.StoredFrame(leaves, frame.plan, frame.data[:n_bytes], reference)]
        assert outcome(stored, "native") == outcome(stored, "reference")
    for bit in rng.integers(0, 8 * len(frame.data), 60):
        data = bytearray(frame.data)
        data[bit >> 3] ^= 1 << (bit & 7)
        stored = [codec.StoredFrame(leaves, frame.plan, bytes(data), reference)]
        assert outcome(stored, "native") == outcome(stored, "reference")


def test_padding_between_chunks_is_zero():
    n_tried = 0
    for leaves, frame, reference, _ in FRAMES:
        begins, _ = places(frame.plan, directory(frame.plan, frame.data))
        for chunk, begin in enumerate(begins.tolist()[1:]):
            if frame.data[begin - 1] == 0 and any(directory(frame.plan, frame.data)[chunk, 2:3] % 16):
                data = bytearray(frame.data)
                data[begin - 1] = 1
                stored = [codec.StoredFrame(leaves, frame.plan, bytes(data), reference)]
                text = f"chunk {chunk} of 'leaf': the padding after it is not zero. Restore the file from another copy"
                for backend in ("reference", *(["native"] if native.is_there() else [])):
                    assert outcome(stored, backend)[1].startswith(text)
                    part = range(chunk << 10, (chunk + 1) << 10)
                    parts = None if reference is None else [reference[part.start : part.stop]]
                    with pytest.raises(CorruptFrame, match="the padding after it is not zero"):
                        codec.decode_parts(stored[0], [part], parts, codec.Engine(backend=backend))
                n_tried += 1
    assert n_tried > 5
