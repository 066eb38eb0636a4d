"""Golden files: what format 1 wrote must decode to the same bits, and a plan must give the same bytes, for ever."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tricomp
from tests.cases import same_bits
from tests.golden_cases import FOLDER, frame_checks, jobs, tree
from tricomp import container
from tricomp import tree as trees
from tricomp.dtypes import to_words
from tricomp.folder import LocalFile
from tricomp.job import DecodeJob, EncodeJob, Side
from tricomp.reference import decode as decoder
from tricomp.reference import encode as encoder
from tricomp.reference import side

KEYFRAME, DELTA, FAST = (str(FOLDER / f"format1-{name}.tri") for name in ("keyframe", "delta", "fast"))


def assert_same(found, expected):
    (structure, paths, arrays), (other, _, wanted) = trees.flatten(found), trees.flatten(expected)
    assert structure == other
    for path, array, want in zip(paths, arrays, wanted, strict=True):
        assert same_bits(np.asarray(array), np.asarray(want)), path


def test_files_decode_to_the_same_bits():
    assert_same(tricomp.load(KEYFRAME), tree(0))
    assert_same(tricomp.load(DELTA, reference=KEYFRAME), tree(1))
    assert_same(tricomp.load(FAST), {key: tree(0)[key] for key in ("master", "second")})
    with tricomp.open(DELTA, reference=KEYFRAME) as file:
        assert file.parent == tricomp.content_id(tree(0))
        assert {file.plan(path).predict for path in file} >= {"copy", "cast", "delta", "palette", "raw"}


@pytest.mark.parametrize("name", [KEYFRAME, DELTA, FAST], ids=["keyframe", "delta", "fast"])
def test_plans_in_files_give_the_same_bytes(name):
    reference = KEYFRAME if name == DELTA else None
    with tricomp.open(name, reference=reference) as file:
        source = LocalFile(name)
        parent = None if reference is None else tricomp.open(reference)
        for entry in container.read(source).frames:
            paths = [list(file)[number] for number in entry.leaves]
            plan = file.plan(paths[0])
            data = bytes(container.read_frame(source, entry, paths[0]))
            words = np.concatenate([to_words(file[path]) for path in paths])
            old, origin = None, None
            if plan.reference == "parent":
                assert parent is not None
                old = np.concatenate([to_words(parent[path]) for path in paths])
            if plan.reference == "sibling":
                sibling = list(file)[plan.sibling]
                old, origin = to_words(file[sibling]), file.leaf(sibling).dtype
            known = side.read(plan, data[: plan.side_bytes]) if plan.n_chunks else Side()
            encoded = encoder.encode([EncodeJob(plan, known, words, old, origin)])[0]
            again, coded = encoded.plan, encoded.data
            assert coded == data, (paths, plan)
            assert again == plan
        source.close()
        if parent is not None:
            parent.close()


def test_frames_of_plans_by_hand_have_the_same_bytes_and_decode():
    stored = json.loads((FOLDER / "format1-frames.json").read_text(encoding="utf-8"))
    assert frame_checks() == stored
    names, cases = zip(*jobs())
    encoded = encoder.encode(cases)
    frames = [DecodeJob(coded.plan, coded.data, case.reference) for case, coded in zip(cases, encoded)]
    decoded = decoder.decode(frames)
    for name, case, words in zip(names, cases, decoded):
        assert np.array_equal(words, case.words), name
