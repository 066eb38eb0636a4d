"""Transformers' Trainer with its checkpoints in a store: a run that was cut goes on bit for bit, or says why it cannot.

Runs are compared by all that they leave: weights, moments, learning rate, what was logged, random states.
"""

import importlib
import os
import shutil
import sys
from functools import lru_cache, partial
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
import transformers
import tricomp_torch
from tricomp_torch.transformers import TricompTrainer, TricompTrainerMixin

import tricomp
from tests.groups import Groups, quick
from tests.trainer_scenes import model, outcome, run, trainer
from tricomp.checkpoint import put
from tricomp.errors import (
    CorruptFrame,
    InvalidArgument,
    MissingParent,
    MissingStep,
    StorageError,
    StoreLocked,
)

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
def in_one_thread(groups):
    with quick():
        yield


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


@pytest.fixture(scope="module")
def first_steps(folder):
    run(folder / "short", stop=4)
    return folder / "short"


@pytest.fixture
def short(first_steps, tmp_path):
    """A run that was cut after it had saved step 3."""
    return shutil.copytree(first_steps, tmp_path / "short")


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


def test_tied_weights_are_stored_once_and_stay_tied(folder, whole):
    whole("shuffled")
    with tricomp.Store(folder / "shuffled-False" / "tricomp").open(3) as file:
        sizes = {path: file.coded_bytes(path) for path in file if path.startswith("model/")}
        assert file.metadata["saved_by"] == "TricompTrainer"
    assert sizes["model/lm_head.weight"] < 0.01 * sizes["model/transformer.wte.weight"]
    made = run(folder / "shuffled-False", resume=True)
    assert made.model.lm_head.weight is made.model.transformer.wte.weight


BEST = {"metric_for_best_model": "loss", "eval_steps": 3, "greater_is_better": True}  # the first is the best so


@pytest.mark.parametrize(("limit", "kept"), [(1, [3, 16]), (2, [3, 15, 16]), (3, [3, 12, 15, 16])])
def test_rotation_keeps_the_latest_steps_the_best_and_what_they_need(tmp_path, limit, kept):
    arguments = {**BEST, "load_best_model_at_end": True, "save_total_limit": limit}
    plain = run(tmp_path / "plain", kind=transformers.Trainer, **arguments)
    run(tmp_path / "cut", stop=11, **arguments)
    again = run(tmp_path / "cut", resume=True, **arguments)
    assert steps(tmp_path / "cut") == kept
    assert again.state.best_global_step == 3
    assert outcome(again) == outcome(plain)
    for step in kept:
        assert tricomp_torch.Checkpointer(tmp_path / "cut" / "tricomp").restore(model=model(), step=step, rng=False)


def test_the_best_model_outlives_its_folder(tmp_path):
    arguments = {**BEST, "load_best_model_at_end": True}
    whole = run(tmp_path / "whole", **arguments)
    run(tmp_path / "cut", stop=8, options={"store": tmp_path / "store"}, **arguments)
    shutil.rmtree(tmp_path / "cut")  # another machine goes on
    again = run(tmp_path / "elsewhere", resume=True, options={"store": str(tmp_path / "store")}, **arguments)
    assert outcome(again) == outcome(whole)
    assert again.state.best_model_checkpoint == str(tmp_path / "elsewhere" / "checkpoint-3")


def test_folders_hold_no_weights_unless_asked_for(tmp_path, whole):
    run(tmp_path / "small", stop=4)
    small = tmp_path / "small" / "checkpoint-3"
    assert sum(path.stat().st_size for path in small.iterdir()) < 4096
    run(tmp_path / "large", stop=4, options={"model_files": True})
    large = tmp_path / "large" / "checkpoint-3"
    loaded = transformers.GPT2LMHeadModel.from_pretrained(large).state_dict()
    fresh = model()
    tricomp_torch.Checkpointer(tmp_path / "large" / "tricomp").restore(model=fresh, step=3, rng=False)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in fresh.state_dict().items())
    assert outcome(run(tmp_path / "large", resume=str(large))) == whole("shuffled")


def test_a_plain_trainer_refuses_our_folders(tmp_path):
    """It would take the model files, and a fresh optimizer."""
    for has_files in (False, True):
        run(tmp_path, stop=4, options={"model_files": has_files, "store": tmp_path / f"store-{has_files}"})
        with pytest.raises(Exception, match="valid checkpoint" if not has_files else "[Ww]eights"):
            run(tmp_path, resume=str(tmp_path / "checkpoint-3"), kind=transformers.Trainer)


def test_a_trainers_own_folder_is_taken_if_it_is_complete(tmp_path):
    whole = run(tmp_path / "whole", kind=transformers.Trainer)
    run(tmp_path / "cut", stop=7, kind=transformers.Trainer)
    place = tmp_path / "cut" / "checkpoint-6"
    again = run(tmp_path / "cut", resume=str(place))
    assert outcome(again)[:4] == outcome(whole)[:4]
    assert steps(tmp_path / "cut") == [9, 12, 15, 16]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (place / name).rename(tmp_path / "away")
        with pytest.raises(InvalidArgument, match=f"checkpoint-6: {name} not found; Trainer would go on"):
            run(tmp_path / "cut", resume=place, options={"store": tmp_path / "new"})
        (tmp_path / "away").rename(place / name)


def test_a_trainers_own_folder_stays_until_the_store_has_another(tmp_path, monkeypatch):
    def look(folder, name, *args, **options):
        if name.endswith("6.tri"):
            assert (tmp_path / "checkpoint-3" / "optimizer.pt").stat().st_size > 10_000
        return put(folder, name, *args, **options)

    run(tmp_path, stop=4, kind=transformers.Trainer)
    monkeypatch.setattr("tricomp.store.put", look)
    run(tmp_path, stop=10, resume=tmp_path / "checkpoint-3", save_total_limit=1)
    assert steps(tmp_path) == [9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", "tricomp"]


def refused(error, match, tmp_path, resume: Any = True, **options):
    """The trainer of a run that cannot be resumed, which has trained nothing."""
    made = trainer(tmp_path, **options)
    with pytest.raises(error, match=match) as caught:
        made.train(resume_from_checkpoint=resume)
    assert made.state.global_step == 0 or made._progress.own is None
    return caught.value


def test_a_step_without_optimizer_is_refused(tmp_path):
    run(tmp_path, stop=4, save_only_model=True)
    error = refused(InvalidArgument, "optimizer: the checkpoint holds no state for this AdamW", tmp_path)
    assert "For the weights alone" in error.__notes__[0]


def test_a_trainer_that_never_asks_for_the_optimizer_is_refused(short):
    class Forgetful(TricompTrainer):
        def _load_optimizer_and_scheduler(self, checkpoint):
            pass

    refused(InvalidArgument, "did not ask for the optimizer", short, kind=Forgetful)


def test_a_trainer_without_what_is_overridden_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(transformers.Trainer, "_load_rng_state")
    with pytest.raises(InvalidArgument, match="needs a Trainer with _load_rng_state"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"n_embd": 24}, r"transformer.wte.weight: the checkpoint holds shape \(256, 32\), the module \(256, 24\)"),
        ({"n_layer": 2}, "model: missing from the checkpoint: 'transformer.h.1.ln_1.weight'"),
        ({"n_layer": 0}, "model: in the checkpoint but not in the module: 'transformer.h.0.ln_1.weight'"),
    ],
)
def test_another_model_is_refused(short, other, match):
    refused(InvalidArgument, match, short, of=partial(model, **other))


def test_another_optimizer_is_refused(short):
    refused(InvalidArgument, "holds the state of a AdamW, got a SGD", short, optim="sgd")


@pytest.mark.parametrize(
    ("resume", "error", "match"),
    [
        (True, MissingStep, "there are no checkpoints in .*tricomp. Train without it first"),
        (7, MissingStep, "step 7 is not in"),
        ("checkpoint-7", MissingStep, "there is no folder checkpoint-7, and no step 7 in"),
        ("some/where", InvalidArgument, "expected a folder named checkpoint-<step>, got 'some/where'"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, resume, error, match):
    refused(error, match, tmp_path, resume)


def test_a_store_that_goes_on_beyond_the_run_is_refused(tmp_path, whole):
    run(tmp_path, stop=8)
    refused(InvalidArgument, "has checkpoints up to step 6, beyond step -1. Pass resume", tmp_path, None)
    refused(InvalidArgument, r"up to step 6, beyond step 3. Take them away with .*rewind\(3\)", tmp_path, 3)
    with tricomp.Store(tmp_path / "tricomp") as store:
        store.rewind(3)
    assert outcome(run(tmp_path, resume=3)) == whole("shuffled")


def test_a_store_of_another_kind_is_refused(tmp_path):
    with tricomp_torch.Checkpointer(tmp_path / "tricomp") as checkpointer:
        checkpointer.save(3, model=model())
    refused(InvalidArgument, "step 3 of .* was not saved by a TricompTrainer", tmp_path)


def test_a_store_that_is_written_to_is_refused_before_training(tmp_path):
    with tricomp.Store(tmp_path / "tricomp") as store:
        store.claim()
        refused(StoreLocked, "is being written by process", tmp_path, None)


def test_damage_and_lost_parents_name_the_step_to_load(tmp_path, whole):
    store = tricomp.Store(tmp_path / "tricomp", keyframe=tricomp.KeyframeEvery(2))
    run(tmp_path, stop=13, options={"store": store})
    (tmp_path / "tricomp" / "step-000000000009.tri").unlink()  # 12 needs it
    refused(MissingParent, "Load step 6, the nearest intact one", tmp_path)
    store.rewind(6)
    store.close()
    path = tmp_path / "tricomp" / "step-000000000006.tri"
    sound = path.read_bytes()
    path.write_bytes(sound[:5000] + bytes([sound[5000] ^ 4]) + sound[5001:])
    refused(CorruptFrame, "Load step 3, the nearest intact one", tmp_path)
    store.rewind(3)
    store.close()
    assert outcome(run(tmp_path, resume=True)) == whole("shuffled")


def test_a_full_disk_ends_the_run_and_the_last_good_step_goes_on(tmp_path, whole, monkeypatch):
    def full(folder, name, *args, **options):
        if name.endswith("9.tri"):
            raise StorageError(f"{name}: no space left on device")
        return put(folder, name, *args, **options)

    monkeypatch.setattr("tricomp.store.put", full)
    with pytest.raises(StorageError, match="no space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert steps(tmp_path) == [3, 6]
    assert outcome(run(tmp_path, resume=True)) == whole("shuffled")


def test_states_of_callbacks_and_scaler_go_on(tmp_path):
    def made(place, stop=None):
        callbacks = [transformers.EarlyStoppingCallback(early_stopping_patience=4)]
        arguments = {**BEST, "restore_callback_states_from_checkpoint": True, "load_best_model_at_end": True}
        trainer_ = trainer(tmp_path / place, stop, callbacks=callbacks, **arguments)
        trainer_.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        return trainer_

    whole = made("whole")
    whole.train()
    assert whole.state.global_step == 15  # the fifth evaluation
    with pytest.raises(KeyboardInterrupt):
        made("cut", stop=11).train()
    again = made("cut")
    again.train(resume_from_checkpoint=True)
    assert outcome(again) == outcome(whole)
    assert again.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert whole.accelerator.scaler.get_scale() == 64.0 * 2**7


def test_a_model_in_parts_is_sent_elsewhere(tmp_path):
    class Sharded(TricompTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(InvalidArgument, match="FSDP: each process holds a part .* tricomp_torch.dcp"):
        trainer(tmp_path, kind=Sharded)


def test_a_mixin_in_the_wrong_place_is_refused():
    with pytest.raises(InvalidArgument, match="class Late: TricompTrainerMixin comes before Trainer"):
        type("Late", (transformers.Trainer, TricompTrainerMixin), {})


def test_trials_of_a_search_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="trials of a search"):
        trainer(tmp_path).train(trial={"lr": 1})


def test_the_library_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "tricomp_torch.transformers")
    with pytest.raises(ImportError, match="pip install .tricomp.transformers"):
        importlib.import_module("tricomp_torch.transformers")
