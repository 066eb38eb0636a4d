"""Accelerate's states in a store: a run that was cut goes on bit for bit, or says why it cannot."""

import importlib
import shutil
import sys
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import tricomp_torch
from accelerate.utils import DistributedType
from tricomp_torch import accelerate as adapter

from tests.accelerate_scenes import Net, Run, bits
from tests.groups import Groups, quick
from tricomp.checkpoint import put
from tricomp.errors import InvalidArgument, MissingParent, MissingStep, StorageError, TricompError

Checkpointer: Any = tricomp_torch.Checkpointer  # its results are not None in most tests
save_state: Any = adapter.save_state
load_state: Any = adapter.load_state
LOADERS: dict[str, dict[str, Any]] = {"unseeded": {}, "seeded": {"use_seedable_sampler": True}, "own": {"seed": 2}}


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(groups):
    with quick():
        yield


@pytest.fixture(scope="module")
def groups():
    asked = Groups("tests.accelerate_scenes")
    yield asked
    asked.end()


@pytest.mark.parametrize(
    ("kind", "cut"),
    [(kind, cut) for kind in LOADERS for cut in (7, 10, 20)] + [("unseeded", 2), ("own", 14)],  # 7 and 14 end a pass
)
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


def test_a_checkpoint_of_two_processes_is_taken_by_one(groups, tmp_path, caplog):
    groups.ask(2, "ranks", tmp_path)
    restored = Run().resume(Checkpointer(tmp_path))
    assert restored.step == 6
    assert "was saved by 2 processes, and there are 1 now: they keep their own random states" in caplog.text
    with Checkpointer(tmp_path) as checkpointer:
        saved = {name: words.tobytes() for name, words in checkpointer.store.load(6)["model"].items()}
    assert saved == bits(restored.model.state_dict())


def test_a_plain_loader_goes_on_by_skipping(tmp_path):
    """The way accelerate itself describes, with samplers that go by a seed."""

    def begin():
        run = Run(use_seedable_sampler=True)
        run.accelerator._custom_objects.remove(run.loader)
        return run, run.loader.loader

    def seen(run, loader, n=None):
        return [tokens.tolist() for _, tokens in zip(range(n or 99), loader, strict=False)]

    run, loader = begin()
    passes = [seen(run, loader) for _ in range(3)]
    run, loader = begin()
    assert seen(run, loader) == passes[0]
    assert seen(run, loader, 5) == passes[1][:5]
    with Checkpointer(tmp_path) as checkpointer:
        save_state(run.accelerator, checkpointer, 18)
    run, loader = begin()
    torch.manual_seed(8)
    load_state(run.accelerator, Checkpointer(tmp_path))
    assert seen(run, run.accelerator.skip_first_batches(loader, 5)) == passes[1][5:]
    loader.iteration += 1
    assert seen(run, loader) == passes[2]


def test_a_pass_that_was_broken_off_is_begun_anew(tmp_path):
    run = Run()
    for _ in zip(range(4), run.loader, strict=False):
        pass
    assert (run.loader.epoch, run.loader.n_batches, len(run.loader)) == (0, 4, 13)
    assert len(list(run.loader)) == 13
    assert (run.loader.epoch, run.loader.n_batches) == (1, 0)


def test_saves_go_by_every_and_are_futures(tmp_path):
    run = Run()
    with Checkpointer(tmp_path, every=2) as checkpointer:
        assert save_state(run.accelerator, checkpointer, 1) is None
        report = save_state(run.accelerator, checkpointer, 2, metadata={"loss": 0.5}).result()
        assert save_state(run.accelerator, checkpointer, 3, force=True).result().parent == report.content_id
        with pytest.raises(InvalidArgument, match="step 3 is already in"):
            save_state(run.accelerator, checkpointer, 3, force=True)
        save_state(run.accelerator, checkpointer, 3, force=True, overwrite=True)
    restored = load_state(run.accelerator, checkpointer, 2)
    assert (restored.step, restored.metadata["loss"]) == (2, 0.5)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    run = Run()
    with Checkpointer(tmp_path) as checkpointer:
        save_state(run.accelerator, checkpointer, 1)
    with checkpointer.store.open(1) as file:
        assert file.coded_bytes("model/head.weight") < 0.2 * file.coded_bytes("model/embedding.weight")
    again = Run(width=18).resume(Checkpointer(tmp_path))
    assert again.model.head.weight is again.model.embedding.weight


def test_a_scaler_goes_on(tmp_path):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    whole = Run(scaler=scaler()).train()
    with Checkpointer(tmp_path) as checkpointer:
        Run(scaler=scaler()).train(checkpointer, until=9)
    again = Run(scaler=scaler()).resume(Checkpointer(tmp_path)).train()
    assert again.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert again.model.state_dict().keys() == whole.model.state_dict().keys()
    assert bits(again.model.state_dict()) == bits(whole.model.state_dict())


def test_several_models_go_on(tmp_path):
    def begin():
        run = Run(n_averages=2)
        teacher = run.accelerator.prepare(Net(width=9))
        run.accelerator.prepare(torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9))
        return run, teacher

    run, teacher = begin()
    with Checkpointer(tmp_path) as checkpointer:
        run.train(checkpointer, until=3)
    expected, weights = run.outcome(), bits(teacher.state_dict())
    run, teacher = begin()
    torch.nn.init.zeros_(teacher.middle.weight)
    run.resume(Checkpointer(tmp_path))
    assert (run.outcome(), bits(teacher.state_dict())) == (expected, weights)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store with steps 1 to 4."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpointer:
        Run().train(checkpointer, until=4)
    return folder


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"width": 9}, r"model/embedding.weight: the checkpoint holds shape \(11, 18\), the module \(11, 9\)"),
        ({"optimizer": torch.optim.SGD}, "optimizer: the checkpoint holds the state of a AdamW, got a SGD"),
        ({"n_averages": 0}, "registered: saved Average; the accelerator has none"),
        ({"n_averages": 2}, "registered: saved Average; the accelerator has Average, Average"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "extra/scaler: the checkpoint holds no state for this GradScaler"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_and_changes_nothing(saved, other, match):
    run = Run(**other)
    before = run.outcome()
    with pytest.raises(InvalidArgument, match=match) as caught:
        run.resume(Checkpointer(saved))
    assert "nothing was changed" in str(caught.value)
    assert run.outcome() == before


def test_a_checkpoint_without_optimizer_is_refused_unless_only_weights_are_asked_for(tmp_path):
    run = Run()
    accelerator = run.accelerator
    optimizers, accelerator._optimizers = accelerator._optimizers, []
    with Checkpointer(tmp_path) as checkpointer:
        save_state(accelerator, checkpointer, 5)
    accelerator._optimizers = optimizers
    with torch.no_grad():
        weights = bits(run.model.state_dict())
        run.model.middle.weight.zero_()
    with pytest.raises(InvalidArgument, match="optimizer: saved none; the accelerator has AdamW.*\n.*models_only=True"):
        run.resume(checkpointer)
    assert not run.model.middle.weight.any()
    run.resume(checkpointer, models_only=True)
    assert (bits(run.model.state_dict()), run.step) == (weights, 5)


def test_what_is_not_there_or_not_ours_is_told(saved, tmp_path):
    run = Run()
    with Checkpointer(tmp_path) as checkpointer:
        assert load_state(run.accelerator, checkpointer) is None
        with pytest.raises(MissingStep, match="step 3 is not in"):
            load_state(run.accelerator, checkpointer, 3)
        checkpointer.save(7, model=run.model)
        with pytest.raises(InvalidArgument, match="step 7 of .* was not saved by save_state"):
            load_state(run.accelerator, checkpointer)
        with pytest.raises(MissingStep, match="The nearest is step 4"):
            load_state(run.accelerator, Checkpointer(saved), 9)


def test_damage_and_lost_parents_name_the_step_to_load(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "store")
    path = folder / "step-000000000004.tri"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    run = Run()
    before = run.outcome()
    with pytest.raises(TricompError, match="Load step 3, the nearest intact one"):
        run.resume(Checkpointer(folder))
    (folder / "step-000000000002.tri").unlink()
    with pytest.raises(MissingParent, match="Load step 1, the nearest intact one"):
        run.resume(Checkpointer(folder), 3)
    assert run.outcome() == before
    assert run.resume(Checkpointer(folder), 1).step == 1


def test_a_full_disk_is_told_and_the_last_good_step_loads(tmp_path, monkeypatch):
    def full(folder, name, *args, **options):
        if name.endswith("3.tri"):
            raise StorageError(f"{name}: no space left on device")
        return put(folder, name, *args, **options)

    monkeypatch.setattr("tricomp.store.put", full)
    with pytest.raises(StorageError, match="no space left"), Checkpointer(tmp_path) as checkpointer:
        Run().train(checkpointer)
    assert Run().resume(Checkpointer(tmp_path)).step == 2


def test_a_save_amid_accumulated_gradients_is_refused(tmp_path):
    run = Run()
    for tokens in run.loader:
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(run.model(tokens).sum())
        break
    with pytest.raises(InvalidArgument, match="step 1 is amid gradients that are being accumulated"):
        save_state(run.accelerator, Checkpointer(tmp_path), 1)


def test_what_cannot_be_stored_whole_is_refused(tmp_path, monkeypatch):
    run = Run()
    monkeypatch.setattr(run.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(InvalidArgument, match="FSDP: each process holds a part .* tricomp_torch.dcp"):
        save_state(run.accelerator, Checkpointer(tmp_path), 1)
    monkeypatch.undo()
    monkeypatch.setattr(run.loader.loader, "use_stateful_dataloader", True, raising=False)
    with pytest.raises(InvalidArgument, match="use a ResumableLoader"):
        save_state(run.accelerator, Checkpointer(tmp_path), 1)


def test_the_library_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "tricomp_torch.accelerate")
    with pytest.raises(ImportError, match="pip install .tricomp.accelerate"):
        importlib.import_module("tricomp_torch.accelerate")
