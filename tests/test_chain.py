"""Policies: what the next checkpoint is coded against, what is pruned; no kept step ever loses its chain."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricomp.chain import KeepEvery, KeepLast, KeyframeEvery, Link, chains, nearest, next_parent, to_prune
from tricomp.errors import InvalidArgument


def link(step, content, parent=None, since=0):
    return Link(step, content.encode(), parent.encode() if parent else None, since)


def steps_of(found):
    return {step: [link.step for link in chain] for step, chain in found.items()}


def test_chains_start_at_keyframes():
    links = [
        link(30, "c", "b"),
        link(10, "a"),
        link(20, "b", "a"),
        link(40, "d"),
        link(50, "e", "d"),
        link(60, "f", "?"),
    ]
    assert steps_of(chains(links)) == {10: [10], 20: [10, 20], 30: [10, 20, 30], 40: [40], 50: [40, 50]}


def test_equal_content_makes_no_cycle():
    links = [link(10, "a"), link(20, "a", "a"), link(30, "b", "a"), link(40, "a", "b")]
    assert steps_of(chains(links)) == {10: [10], 20: [10, 20], 30: [10, 30], 40: [10, 30, 40]}
    assert steps_of(chains([link(10, "a", "b"), link(20, "b", "a"), link(30, "c", "c")])) == {}


def test_equal_content_stands_in_for_a_lost_parent():
    assert steps_of(chains([link(20, "b", "a"), link(30, "a")])) == {20: [30, 20], 30: [30]}


def test_next_parent():
    links = [link(10, "a"), link(20, "b", "a", 1), link(30, "c", "b", 2), link(40, "x", "?", 3)]
    for n, reference, parent in (
        (3, "previous", None),
        (4, "previous", 30),
        (4, "keyframe", 10),
        (1, "previous", None),
    ):
        found = next_parent(links, 30, KeyframeEvery(n), reference)  # type: ignore[arg-type]
        assert (found and found.step) == parent
    assert next_parent(links, None, KeyframeEvery(9), "previous") is None
    assert next_parent(links, 40, KeyframeEvery(9), "previous") is None  # has no chain itself
    assert next_parent(links, 35, KeyframeEvery(9), "previous") is None  # is not there
    assert next_parent([], 35, KeyframeEvery(9), "previous") is None


@pytest.mark.parametrize("reference", ["previous", "keyframe"])
@pytest.mark.parametrize("keep", [(), (KeepLast(2),)])
def test_one_in_n_is_a_keyframe_whatever_is_pruned(reference, keep):
    links: list[Link] = []
    is_keyframe = []
    for step in range(13):
        parent = next_parent(links, step - 1 if links else None, KeyframeEvery(5), reference)
        since = next(other.since_keyframe for other in links if other.step == step - 1) + 1 if parent else 0
        links.append(Link(step, bytes([step]), parent.content_id if parent else None, since))
        is_keyframe.append(parent is None)
        gone = to_prune(links, keep)
        links = [other for other in links if other.step not in gone]
        assert len(chains(links)) == len(links)
    assert [step for step in range(13) if is_keyframe[step]] == [0, 5, 10]


def test_nearest_is_below_if_it_can_be():
    assert nearest([10, 20, 30], 25) == 20
    assert nearest([10, 20, 30], 20) == 10
    assert nearest([20, 30], 10) == 20
    assert nearest([20], 20) is None
    assert nearest([], 20) is None


def test_pruning_keeps_what_is_wanted_and_what_that_needs():
    links = [link(10, "a"), link(20, "b", "a"), link(30, "c", "b"), link(40, "d"), link(50, "e", "d")]
    assert to_prune(links, []) == ()
    assert to_prune(links, [KeepLast(1)]) == (10, 20, 30)
    assert to_prune(links, [KeepLast(3)]) == ()  # 30 needs 20 needs 10
    assert to_prune(links, [KeepLast(2)]) == (10, 20, 30)
    assert to_prune(links, [KeepLast(1), KeepEvery(20)]) == (30,)
    assert to_prune(links, [KeepLast(1)], protected=[20]) == (30,)


def test_broken_steps_neither_count_nor_are_pruned():
    links = [link(10, "a"), link(20, "b"), link(30, "x", "?"), link(40, "y", "?")]
    assert to_prune(links, [KeepLast(1)]) == (10,)


@pytest.mark.parametrize("policy", [KeyframeEvery, KeepLast, KeepEvery])
@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_policies_are_checked(policy, n):
    with pytest.raises(InvalidArgument, match=f"{policy.__name__}\\({n!r}\\): expected an integer of at least 1"):
        policy(n)


@st.composite
def graphs(draw):
    """Links of any shape: keyframes, deltas, equal contents, lost parents, cycles."""
    contents = st.sampled_from("abcdef")
    steps = draw(st.lists(st.integers(0, 20), unique=True, max_size=10))
    return [link(step, draw(contents), draw(st.none() | contents)) for step in steps]


@given(graphs(), st.lists(st.builds(KeepLast, st.integers(1, 3)) | st.builds(KeepEvery, st.integers(1, 5)), max_size=2))
def test_pruning_never_breaks_a_chain(links, keep):
    found = chains(links)
    for step, chain in found.items():
        assert chain[-1].step == step
        assert chain[0].parent is None
        assert all(child.parent == parent.content_id for parent, child in itertools.pairwise(chain))
        assert len({other.step for other in chain}) == len(chain)
    gone = to_prune(links, keep)
    rest = [other for other in links if other.step not in gone]
    assert set(chains(rest)) == set(found) - set(gone)
    if keep:
        wanted = {step for policy in keep for step in policy.kept(sorted(found))}
        assert not wanted & set(gone)
