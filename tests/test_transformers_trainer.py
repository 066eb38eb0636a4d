"""Transformers' Trainer with its checkpoints in a store: a run that was cut goes on bit for bit, or says why it cannot.

Runs are compared by all that they leave: weights, moments, learning rate, what was logged, random states.
"""

import os
from functools import lru_cache
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
from tricomp_torch.transformers import TricompTrainer

import tricomp
from tests.groups import Groups
from tests.trainer_scenes import outcome, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STRATEGIES: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "unseeded": {"accelerator_config": {"use_seedable_sampler": False}},
    "by-length": {"train_sampling_strategy": "group_by_length", "optim": "adafactor"},
    "epochs": {"save_strategy": "epoch", "eval_strategy": "epoch", "lr_scheduler_type": "cosine", "optim": "sgd"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def groups():
    asked = Groups("tests.trainer_scenes")
    yield asked
    asked.end()


@pytest.fixture(scope="module")
def whole(folder):
    """What a run leaves that nobody cut, by strategy; plain: Trainer itself ran it."""

    @lru_cache
    def of(strategy, plain=False):
        kind = transformers.Trainer if plain else TricompTrainer
        return outcome(run(folder / f"{strategy}-{plain}", kind=kind, **STRATEGIES[strategy]))

    return of


def steps(place):
    return tricomp.Store(place / "tricomp").steps()


def test_saving_changes_nothing_of_a_run(whole):
    assert whole("shuffled") == whole("shuffled", plain=True)


@pytest.mark.parametrize(
    ("strategy", "cut", "expected"),
    [
        ("shuffled", 5, [3]),  # within the first epoch; the last log was before the save
        ("shuffled", 14, [3, 6, 9, 12]),
        ("unseeded", 14, [3, 6, 9, 12]),
        ("by-length", 13, [3, 6, 9, 12]),
        ("epochs", 9, [8]),
    ],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(whole, tmp_path, strategy, cut, expected):
    run(tmp_path, stop=cut, **STRATEGIES[strategy])
    assert steps(tmp_path) == expected
    again = run(tmp_path, resume=True, **STRATEGIES[strategy])
    assert outcome(again) == whole(strategy)


def test_a_run_that_was_killed_while_it_saved_goes_on_bit_for_bit(whole, groups, tmp_path):
    groups.ask(1, "killed", tmp_path, codes=[-9], at=3)
    assert steps(tmp_path) == [3, 6]
    assert any(name.startswith(".") for name in os.listdir(tmp_path / "tricomp") if name != ".tricomp.lock")
    assert outcome(run(tmp_path, resume=True)) == whole("shuffled")


def test_processes_of_a_distributed_run_go_on_bit_for_bit(groups, tmp_path):
    groups.ask(2, "ranks", tmp_path)
