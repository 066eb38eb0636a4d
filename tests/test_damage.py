"""Damaged frames and plans: an error of ours every time, never a crash, never other data without a word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import decayed, moments, stepped, weights
from tests.test_codec import plans_by_hand
from tricomp import codec, dtypes
from tricomp.errors import CorruptFrame, TricompError, UnsupportedVersion
from tricomp.layout import snapshot_of
from tricomp.plan import Plan, Spec
from tricomp.reference import decode as decoder


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
    for plan, *_ in list(plans_by_hand())[::40]:
        complete = replace(plan, n_words=2200, n_symbols=32, index_bits=3 if plan.entropy == "index" else 0, base=0)
        assert Plan.from_wire(complete.to_wire()) == complete
        for change in ({"entropy": "none"}, {"n_symbols": 0}, {"n_contexts": 8, "n_symbols": 200}, {"predict": "cast"}):
            with pytest.raises(CorruptFrame, match="its plan contradicts itself"):
                Plan.from_wire(replace(complete, **change).to_wire())
    assert dtypes.by_number(2).name == "float32"
