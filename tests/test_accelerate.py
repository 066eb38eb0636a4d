"""Accelerate's states in a store: a run that was cut goes on bit for bit, or says why it cannot."""

from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import tricomp_torch

from tests.accelerate_scenes import Run
from tests.groups import Groups

Checkpointer: Any = tricomp_torch.Checkpointer
LOADERS: dict[str, dict[str, Any]] = {"unseeded": {}, "seeded": {"use_seedable_sampler": True}}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def groups():
    asked = Groups("tests.accelerate_scenes")
    yield asked
    asked.end()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("cut", [2, 7, 13, 14, 20])  # 7 and 14 end a pass
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path, kind, cut):
    whole = Run(**LOADERS[kind]).train()
    expected = whole.outcome(), whole.losses
    with Checkpointer(tmp_path) as checkpointer:
        Run(**LOADERS[kind]).train(checkpointer, until=cut)
    again = Run(**LOADERS[kind]).resume(Checkpointer(tmp_path)).train()
    assert (again.outcome(), again.losses) == (expected[0], expected[1][cut:])


def test_a_run_that_was_killed_while_it_saved_goes_on_bit_for_bit(groups, tmp_path):
    groups.ask(1, "killed", tmp_path, codes=[-9], at=4)
    whole = Run().train()
    expected = whole.outcome(), whole.losses
    again = Run().resume(Checkpointer(tmp_path)).train()
    assert (again.outcome(), again.losses) == (expected[0], expected[1][9:])


@pytest.mark.parametrize("kind", LOADERS)
def test_processes_of_a_distributed_run_go_on_bit_for_bit(groups, tmp_path, kind):
    groups.ask(2, "ranks", tmp_path, **LOADERS[kind])
