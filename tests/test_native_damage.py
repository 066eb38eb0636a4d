"""Damaged frames and hostile plans: both backends refuse them with the same words, or decode them to the same ones."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.damage_cases import damaged, sound
from tricomp import native
from tricomp.errors import TricompError
from tricomp.reference import decode as reference

pytestmark = pytest.mark.skipif(not native.is_there(), reason=f"no native module: {native.why_not()}")
if native.is_there():
    from tricomp.native import decode as backend
    from tricomp.native import side

FRAMES = sound()


def outcome(decode, job, **options):
    """What comes of a job: an error's class and text, or bytes. Anything else escapes."""
    try:
        return decode([job], **options)[0].tobytes()
    except TricompError as error:
        return type(error), str(error)


def guarded(job, threads):
    """Decode natively into the midst of an array that is checked to be as it was around."""
    n_words = max(job.end - job.start, 0)
    around = np.full(n_words + 256, 0xA5, job.plan.dtype.word_dtype)
    found = outcome(backend.decode, job, threads=threads, into=[around[128 : 128 + n_words]])
    assert (around[:128] == 0xA5).all()
    assert (around[128 + n_words :] == 0xA5).all()
    return found


def check(job, threads=1):
    expected = outcome(reference.decode, job)
    found = guarded(job, threads)
    if isinstance(expected, tuple) or isinstance(found, tuple):
        assert found == expected, job.plan
    assert found == expected, job.plan
    return expected


def test_sound_frames_decode():
    for frame in FRAMES:
        assert check(frame.decode_job()) == frame.job.words.tobytes(), frame.name


class Slices:
    """Bytes that are read as they are asked for."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, part):
        return self.data[part]


def variants(job, number):
    """The whole frame, and now and then a part of it, from memory or as it is read."""
    yield job
    size, n_words = 1 << job.plan.chunk_log2, job.plan.n_words
    if number % 3 == 0 and n_words > size:
        start, stop = size, min(size * (2 + number % 2), n_words)
        old = None if job.reference is None else job.reference[start:stop]
        data = Slices(job.data) if number % 2 else job.data
        yield replace(job, start=start, stop=stop, reference=old, data=data)


def test_damage():
    """Every fault that there is comes up."""
    texts: Counter[str] = Counter()
    for number, frame in enumerate(FRAMES):
        for job in damaged(frame, seed=number, n=24):
            for variant in variants(job, sum(texts.values())):
                found = check(variant, 1 + number % 3)
                texts[found[1].split("': ", 1)[1] if isinstance(found, tuple) else "decoded"] += 1
    told = "\n".join(texts)
    for fault in (*backend._CHUNK_FAULTS, *side._FAULTS):
        assert re.search(re.sub(r"\\{.*?\\}", r"\\w+", re.escape(fault)), told), fault
    for fault in (
        "side section or directory is damaged",
        "its chunks end at byte",
        "longer chunk directory",
        "leaves none",
    ):
        assert fault in told
    assert 0.1 < texts["decoded"] / sum(texts.values()) < 0.6
