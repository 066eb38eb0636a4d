"""Checkpointer: a resumed run equals an uninterrupted one bit for bit, and what does not fit changes nothing."""

import collections
import random
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import tricomp_torch

import tricomp

Checkpointer: Any = tricomp_torch.Checkpointer  # its results are not None in most tests

from tricomp.errors import (  # noqa: E402
    CorruptFile,
    InvalidArgument,
    MissingStep,
    StorageError,
    StoreLocked,
    UnsupportedDtype,
    UnsupportedNode,
)


class Net(torch.nn.Module):
    """Tied embedding and head, buffers, dropout."""

    def __init__(self, width=6, is_tied=True):
        super().__init__()
        self.embedding = torch.nn.Embedding(9, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.middle = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, 9, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.middle(self.norm(self.embedding(tokens)))
        return self.head(torch.nn.functional.dropout(x, 0.3, self.training))


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.95), **options)


OPTIMIZERS: dict[str, Any] = {
    "adamw": adamw,
    "adamw-foreach": lambda p: adamw(p, foreach=True),
    "adamw-fused": lambda p: adamw(p, fused=True),
    "adamw-amsgrad": lambda p: adamw(p, amsgrad=True),
    "adamw-lr-tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), betas=(0.8, 0.95)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rprop": lambda p: torch.optim.Rprop(p),
}
SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 4], gamma=0.5),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


def begin(optimizer="adamw", scheduler="lambda", seed=0):
    torch.manual_seed(seed)
    model = Net()
    made = OPTIMIZERS[optimizer](model.parameters())
    return model, made, SCHEDULERS[scheduler](made)


def train(run, n_steps):
    """Steps that draw from all three generators. Returns the losses as exact text."""
    model, optimizer, scheduler = run
    losses = []
    for _ in range(n_steps):
        tokens = torch.randint(9, (8,)) + int(np.random.randint(0, 9)) + random.randrange(9)
        loss = torch.nn.functional.cross_entropy(model(tokens % 9), tokens % 9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.item()).hex())
    return losses


def bits(value):
    """A state with every tensor as bytes, comparable with ==."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [bits(entry) for entry in value]
    return type(value), repr(value)


def state(*objects):
    return [bits(thing.state_dict()) for thing in objects]


def reseed(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer):
    check_resume(tmp_path, optimizer, "lambda")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_resume(tmp_path, scheduler):
    check_resume(tmp_path, "sgd-momentum", scheduler)


def check_resume(tmp_path, optimizer, scheduler):
    run = begin(optimizer, scheduler)
    reseed(1)
    losses = train(run, 3)
    names = ("model", "optimizer", "scheduler")
    ckpt = Checkpointer(str(tmp_path / "run"), keyframe=tricomp.KeyframeEvery(2))
    for step in (3, 4, 5):  # a keyframe, a delta, a keyframe
        ckpt.save(step, **dict(zip(names, run)))
        saved = state(*run)
        losses += train(run, 1)  # while the save is being made
    losses += train(run, 3)
    ckpt.close()

    again = begin(optimizer, scheduler, seed=99)
    restored = Checkpointer(str(tmp_path / "run")).restore(**dict(zip(names, again)))
    assert restored.step == 5
    assert state(*again) == saved
    assert again[0].head.weight is again[0].embedding.weight
    assert train(again, 4) == losses[5:]
    assert state(*again) == state(*run)
    assert type(again[1].param_groups[0].get("betas", ())) is tuple


def test_before_the_first_step_of_sgd_with_momentum(tmp_path):
    model, optimizer, _ = begin("sgd-momentum")
    ckpt = Checkpointer(tmp_path)
    ckpt.save(0, model=model, optimizer=optimizer)
    again = begin("sgd-momentum", seed=5)
    ckpt.restore(model=again[0], optimizer=again[1])
    assert state(*again[:2]) == state(model, optimizer)
    model(torch.arange(9)).sum().backward()
    optimizer.state[model.middle.weight]["momentum_buffer"] = None
    ckpt.save(1, model=model, optimizer=optimizer)
    ckpt.restore(model=again[0], optimizer=again[1])
    assert again[1].state_dict()["state"][3 if 3 in optimizer.state_dict()["state"] else 0]["momentum_buffer"] is None


def test_moments_of_another_dtype_than_their_parameter_keep_their_bits(tmp_path):
    """torch's own load_state_dict would round these to bfloat16."""
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = adamw(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.randn(parameter.shape)}
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=model, optimizer=optimizer)
    again = torch.nn.Linear(3, 2).to(torch.bfloat16)
    other = adamw(again.parameters())
    ckpt.restore(model=again, optimizer=other)
    assert state(other) == state(optimizer)


def test_parameters_are_copied_into_in_place(tmp_path):
    model, optimizer, _ = begin()
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=model, optimizer=optimizer)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    ckpt.restore(model=model, optimizer=optimizer)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses


def test_random_state_of_torch_numpy_and_python(tmp_path):
    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.gauss(0, 1)

    ckpt = Checkpointer(tmp_path)
    reseed(7)
    random.gauss(0, 1)  # leaves one value in store
    np.random.randn()
    ckpt.save(1, model=Net())
    expected = draws()
    ckpt.restore(model=Net())
    assert draws() == expected
    ckpt.restore(model=Net(), rng=False)
    assert draws() != expected


def test_extra_takes_objects_generators_and_plain_values(tmp_path):
    model = Net()
    ema = torch.optim.swa_utils.AveragedModel(model)
    draw, numbers = torch.Generator().manual_seed(3), np.random.default_rng(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    extra: dict[str, Any] = {
        "state": model.state_dict(), "several": [ema, (draw,)],
        "ema": ema, "draw": draw, "numbers": numbers, "scaler": scaler,
        "epoch": 4, "best": (0.25, "b"), "history": [torch.ones(2), None], "bins": np.arange(3),
    }  # fmt: skip
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=model, extra=extra)
    expected = torch.rand(3, generator=draw).tolist(), numbers.random(3).tolist()

    fresh: dict[str, Any] = {
        "ema": torch.optim.swa_utils.AveragedModel(Net()),
        "draw": torch.Generator(),
        "numbers": np.random.default_rng(8),
        "scaler": torch.amp.GradScaler("cpu"),
    }
    restored = ckpt.restore(model=Net(), extra=fresh)
    assert state(fresh["ema"], fresh["scaler"]) == state(ema, scaler)
    assert (torch.rand(3, generator=fresh["draw"]).tolist(), fresh["numbers"].random(3).tolist()) == expected
    assert list(restored.extra) == list(extra)
    assert bits(restored.extra["state"]) == bits(model.state_dict())
    assert dict(restored.extra["state"]._metadata) == dict(extra["state"]._metadata)
    assert all(restored.extra[name] is thing for name, thing in fresh.items())
    assert restored.extra["epoch"] == 4
    assert restored.extra["best"] == (0.25, "b")
    assert restored.extra["history"][1] is None
    assert restored.extra["bins"].dtype == np.arange(3).dtype

    plain = ckpt.restore(extra={"epoch": 0})
    assert plain.extra["epoch"] == 4
    assert plain.extra["scaler"]["scale"] == 1024.0


def test_several_models_and_optimizers(tmp_path):
    models = {"a": Net(), "b": torch.nn.Linear(2, 2)}
    optimizers = [adamw(models["a"].parameters()), adamw(models["b"].parameters())]
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=models, optimizer=optimizers)
    fresh = {"a": Net(), "b": torch.nn.Linear(2, 2)}
    others = [adamw(fresh["a"].parameters()), adamw(fresh["b"].parameters())]
    ckpt.restore(model=fresh, optimizer=others)
    assert state(*fresh.values(), *others) == state(*models.values(), *optimizers)


def test_extra_state_of_modules(tmp_path):
    class Counting(torch.nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen, "by": (1, torch.ones(1))}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model = Counting(2, 2)
    model.seen = 41
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=model)
    fresh = Counting(2, 2)
    ckpt.restore(model=fresh)
    assert fresh.seen == 41


def test_metadata_is_the_callers(tmp_path):
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=Net(), metadata={"note": "before the change"})
    assert ckpt.restore().metadata == {"note": "before the change"}
    with ckpt.store.open(1) as file:
        assert "model/middle.weight" in file


def test_every(tmp_path):
    ckpt = Checkpointer(tmp_path, every=3)
    reports = [ckpt.save(step, model=Net()) for step in range(5)]
    assert [report is not None for report in reports] == [True, False, False, True, False]
    assert ckpt.save(4, model=Net(), force=True) is not None
    ckpt.wait()
    assert ckpt.store.steps() == [0, 3, 4]
    with pytest.raises(InvalidArgument, match="every: expected a number of steps, 1 or more, got 0"):
        Checkpointer(tmp_path, every=0)


def test_an_empty_store_restores_to_none_and_a_missing_step_raises(tmp_path):
    model = Net()
    before = state(model)
    ckpt = Checkpointer(tmp_path / "new")
    assert ckpt.restore(model=model) is None
    with pytest.raises(MissingStep, match="7"):
        ckpt.restore(model=model, step=7)
    assert state(model) == before


def test_a_store_brings_its_own_policies(tmp_path):
    store = tricomp.Store(str(tmp_path))
    assert Checkpointer(store).store is store
    with pytest.raises(InvalidArgument, match="keyframe, backend: belong to the Store given"):
        Checkpointer(store, keyframe=tricomp.KeyframeEvery(2), backend="native")


class Wider(Net):
    def __init__(self):
        super().__init__(width=7)


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.more = torch.nn.Linear(2, 2)


def test_what_does_not_fit_is_listed_by_name_and_changes_nothing(tmp_path):
    ckpt = Checkpointer(tmp_path)
    model, optimizer, scheduler = begin()
    ckpt.save(1, model=model, optimizer=optimizer, scheduler=scheduler)
    reseed(3)
    other = torch.optim.SGD(Net().parameters())
    fewer = adamw(model.middle.parameters())
    wider = adamw(Wider().parameters())
    cosine = SCHEDULERS["cosine"](optimizer)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": Wider()}, r"model/embedding.weight: the checkpoint holds shape \(9, 6\), the module \(9, 7\)"),
        ({"model": Longer()}, "model: missing from the checkpoint: 'more.weight', 'more.bias'"),
        ({"model": model.middle}, "model: in the checkpoint but not in the module: 'embedding.weight'"),
        ({"model": Net().double()}, "model/head.weight: the checkpoint holds torch.float32, the module torch.float64"),
        ({"optimizer": other}, "optimizer: the checkpoint holds the state of a AdamW, got a SGD"),
        ({"optimizer": fewer}, "optimizer: the checkpoint holds groups of 5 parameters, the optimizer 2"),
        ({"optimizer": wider}, r"optimizer: parameter 0 had shape \(9, 6\) when saved, now \(9, 7\)"),
        ({"model": Net().to("meta")}, r"model/head.weight: the module's tensor is on the meta device"),
        ({"scheduler": cosine}, "scheduler: the checkpoint holds the state of a LambdaLR, got a CosineAnnealingLR"),
        ({"extra": {"scaler": torch.amp.GradScaler("cpu")}}, "extra/scaler: the checkpoint holds no state for this"),
    ]
    for given, text in cases:
        things = [thing for thing in given.values() if hasattr(thing, "state_dict")]
        before = state(*things) if "meta" not in text else []
        rng = torch.get_rng_state()
        with pytest.raises(InvalidArgument, match=text) as refusal:
            ckpt.restore(**given)
        assert "step 1 does not fit; nothing was changed." in str(refusal.value)
        assert before in ([], state(*things) if before else [])
        assert torch.equal(torch.get_rng_state(), rng)


def test_one_misfit_stops_all(tmp_path):
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=begin()[0])
    model, optimizer, _ = begin(seed=2)
    before = state(model, optimizer)
    with pytest.raises(InvalidArgument, match="optimizer: the checkpoint holds no state for this AdamW"):
        ckpt.restore(model=model, optimizer=optimizer)
    assert state(model, optimizer) == before


def test_parameters_in_another_order_are_noticed(tmp_path):
    ckpt = Checkpointer(tmp_path)
    model: Any = torch.nn.Sequential(collections.OrderedDict(a=torch.nn.Linear(3, 3), b=torch.nn.Linear(3, 3)))
    optimizer = adamw(model.parameters())
    ckpt.save(1, model=model, optimizer=optimizer)
    swapped = adamw([*model.b.parameters(), *model.a.parameters()])
    with pytest.raises(InvalidArgument, match=r"parameter 0 was 'a\.weight' when saved and is 'b\.weight' now"):
        ckpt.restore(model=model, optimizer=swapped)


def test_untied_weights_do_not_go_into_tied_ones(tmp_path):
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=Net(is_tied=False))
    with pytest.raises(InvalidArgument, match=r"model/head\.weight: one tensor with 'embedding\.weight' in the module"):
        ckpt.restore(model=Net())
    ckpt.save(2, model=Net())
    assert ckpt.restore(model=Net(is_tied=False)).step == 2


def test_not_strict_takes_what_fits_and_reports_the_rest(tmp_path):
    ckpt = Checkpointer(tmp_path)
    model = Net()
    ckpt.save(1, model=model)
    longer = Longer()
    restored = ckpt.restore(model=longer, optimizer=adamw(longer.parameters()), strict=False)
    assert restored.missing_keys == ("more.weight", "more.bias")
    assert bits(longer.middle.state_dict()) == bits(model.middle.state_dict())
    with pytest.raises(InvalidArgument, match=r"the checkpoint holds shape \(9, 6\), the module \(9, 7\)"):
        ckpt.restore(model=Wider(), strict=False)


def test_missing_random_state(tmp_path):
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=Net(), rng=False)
    with pytest.raises(InvalidArgument, match=r"rng: the checkpoint holds no random state\. Pass rng=False"):
        ckpt.restore(model=Net())
    assert ckpt.restore(model=Net(), rng=False).step == 1
    assert ckpt.restore(model=Net(), strict=False).step == 1


def test_random_state_that_does_not_fit_changes_nothing(tmp_path):
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=Net()).result()
    tree, metadata = ckpt.store.load(1), ckpt.store.open(1).metadata
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cuda": [tree["rng"]["torch"]] * 3}, "the state of 3 CUDA devices, this process has 0. Pass rng=False"),
        ({"torch": np.zeros(3, np.uint8)}, "random state cannot be used"),
        ({"python": {"version": 3}}, "random state cannot be used .KeyError: 'words'"),
        ({"numpy": {**tree["rng"]["numpy"], "bit_generator": "PCG64"}}, "random state cannot be used"),
    ]
    model = Net()
    before, rng = state(model), torch.get_rng_state()
    for step, (change, text) in enumerate(cases, 2):
        ckpt.store.save(step, {**tree, "rng": {**tree["rng"], **change}}, metadata)
        with pytest.raises(InvalidArgument, match=text):
            ckpt.restore(model=model)
        assert state(model) == before
        assert torch.equal(torch.get_rng_state(), rng)
    assert ckpt.restore(model=model, step=2, strict=False).step == 2


def test_files_that_no_checkpointer_wrote_are_refused(tmp_path):
    ckpt = Checkpointer(tmp_path)
    ckpt.store.save(1, {"model": np.zeros(3)})
    ckpt.store.save(2, np.zeros(3))
    notes: dict[str, Any] = {"classes": {"model": "Net"}, "parameters": {"optimizer": [[1]]}}
    ckpt.store.save(3, {"model": np.zeros(4)}, {"tricomp_torch": notes})
    for step in (1, 2):
        with pytest.raises(InvalidArgument, match=rf"step {step} of .*: it was not saved by a Checkpointer\."):
            ckpt.restore(model=Net(), step=step)
    with pytest.raises(CorruptFile, match=r"step 3 of .*: its notes on classes and parameters are damaged"):
        ckpt.restore(model=Net(), step=3)


def test_bad_arguments_are_refused_by_name(tmp_path):
    ckpt = Checkpointer(tmp_path)
    with pytest.raises(InvalidArgument, match=r"model: expected an object with state_dict and .* got dict"):
        ckpt.save(1, model={"w": torch.ones(1)})
    with pytest.raises(InvalidArgument, match=r"step: expected an integer from 0 to .*, got -1"):
        ckpt.save(-1, model=Net())
    with pytest.raises(InvalidArgument, match=r"step: expected an integer, got 1\.5"):
        ckpt.save(1.5, model=Net())
    for every in ("a", 2.0, True, 0):
        with pytest.raises(InvalidArgument, match=f"every: expected a number of steps, 1 or more, got {every!r}"):
            Checkpointer(tmp_path, every=every)
    for step in ("4", None, True):
        with pytest.raises(InvalidArgument, match=f"step: expected an integer.*, got {step!r}"):
            Checkpointer(tmp_path, every=2).save(step, model=Net())
    with pytest.raises(InvalidArgument, match="extra: expected a dict, got list"):
        ckpt.save(1, model=Net(), extra=[1])
    with pytest.raises(InvalidArgument, match="metadata: expected a dict of plain values, got list"):
        ckpt.save(1, model=Net(), metadata=[1])
    with pytest.raises(InvalidArgument, match="save: nothing to save"):
        ckpt.save(1)
    with pytest.raises(UnsupportedNode, match="'extra/config'"):
        ckpt.save(1, model=Net(), extra={"config": object()})
    assert ckpt.store.latest() is None


# Behind training


class Gate:
    """Holds every save of a store up until it is opened, and tells how many began."""

    def __init__(self, ckpt, monkeypatch):
        self.opened, self.n_begun = threading.Event(), 0
        save = ckpt.store.save

        def held(*arguments):
            self.n_begun += 1
            assert self.opened.wait(30)
            return save(*arguments)

        monkeypatch.setattr(ckpt.store, "save", held)


def test_training_goes_on_while_a_save_is_made(tmp_path, monkeypatch):
    run = begin()
    names = ("model", "optimizer", "scheduler")
    train(run, 2)
    with Checkpointer(tmp_path) as ckpt:
        gate = Gate(ckpt, monkeypatch)
        metadata, history = {"list": [1]}, [0.5]
        expected = state(*run)
        saving = ckpt.save(2, **dict(zip(names, run)), extra={"history": history}, metadata=metadata)
        train(run, 3)
        metadata["list"].append(2)
        history.append(0.25)
        assert not saving.done()
        gate.opened.set()
        assert saving.result(30).path.endswith("step-000000000002.tri")
        again = begin(seed=4)
        restored = ckpt.restore(**dict(zip(names, again)))
    assert state(*again) == expected
    assert (restored.extra, restored.metadata) == ({"history": [0.5]}, {"list": [1]})


@pytest.mark.parametrize("in_flight", [1, 2])
def test_no_more_saves_than_agreed_are_on_their_way(tmp_path, monkeypatch, in_flight):
    model = Net()
    with Checkpointer(tmp_path, in_flight=in_flight) as ckpt:
        gate = Gate(ckpt, monkeypatch)
        expected = []
        for step in range(in_flight):
            expected.append(state(model))
            ckpt.save(step, model=model)
            with torch.no_grad():
                model.middle.weight.add_(1)
        beyond = threading.Thread(target=ckpt.save, args=(9,), kwargs={"model": model})
        beyond.start()
        beyond.join(0.2)
        assert beyond.is_alive()
        gate.opened.set()
        beyond.join(30)
        ckpt.wait()
        assert ckpt.store.steps() == [*range(in_flight), 9]
        for step, saved in enumerate(expected):
            ckpt.restore(model=model, step=step)
            assert state(model) == saved


@pytest.mark.parametrize("call", ["save", "wait", "restore", "close"])
def test_a_save_that_failed_is_told_once_and_nothing_is_lost(tmp_path, monkeypatch, call):
    model = Net()
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, model=model).result()
    expected = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(ckpt.store, "save", lambda *_: (_ for _ in ()).throw(StorageError("no space left on device")))
        ckpt.save(2, model=model)
        calls = {"save": lambda: ckpt.save(3, model=model), "restore": lambda: ckpt.restore(model=model)}
        with pytest.raises(StorageError, match="no space left on device") as caught:
            calls.get(call, getattr(ckpt, call))()
        assert caught.value.__notes__ == ["This is what became of step 2, which was saved in the background."]
    again = Net()
    assert ckpt.restore(model=again).step == 1
    assert state(again) == expected
    assert ckpt.save(3, model=model).result().parent is not None
    ckpt.close()


def test_a_run_that_raises_still_has_its_last_step(tmp_path):
    def run():
        with Checkpointer(tmp_path) as ckpt:
            ckpt.save(1, model=Net())
            raise ValueError("training broke")

    with pytest.raises(ValueError, match="training broke"):
        run()
    assert tricomp.Store(tmp_path).steps() == [1]


def test_what_is_wrong_is_told_before_the_save_is_begun(tmp_path):
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, model=Net()).result()
        with pytest.raises(InvalidArgument, match=r"step 1 is already in .*overwrite=True"):
            ckpt.save(1, model=Net())
        ckpt.save(1, model=Net(), overwrite=True).result()
        with pytest.raises(StoreLocked):
            Checkpointer(tmp_path).save(2, model=Net())
        with pytest.raises(UnsupportedNode, match="object"):
            ckpt.save(2, model=Net(), metadata={"a": object()})
        with pytest.raises(UnsupportedDtype, match="'extra/names'"):
            ckpt.save(2, model=Net(), extra={"names": np.array(["a"])})
        assert ckpt.save(2, model=Net()).result().parent is not None
    for wrong in (0, True, 1.5):
        with pytest.raises(InvalidArgument, match="in_flight: expected a number of saves, 1 or more"):
            Checkpointer(tmp_path, in_flight=wrong)


@pytest.mark.parametrize("reference_in", ["device", "host", "store"])
def test_where_the_previous_words_are_held(tmp_path, reference_in):
    run = begin()
    with Checkpointer(tmp_path, reference_in=reference_in) as ckpt:
        for step in range(3):
            ckpt.save(step, model=run[0], optimizer=run[1])
            expected = state(*run[:2])
            train(run, 1)
        again = begin(seed=8)
        ckpt.restore(model=again[0], optimizer=again[1])
        assert state(*again[:2]) == expected
        with ckpt.store.open(2) as file:
            assert file.parent is not None


@pytest.mark.parametrize("in_flight", [1, 2])
def test_the_previous_words_are_held_as_they_were_copied(tmp_path, monkeypatch, in_flight):
    """No second copy is made of them, and no later save writes over them, also where one fails after it was written."""
    run, expected = begin(), {}
    with Checkpointer(tmp_path, in_flight=in_flight) as ckpt:
        for step in range(8):
            expected[step] = state(*run[:2])
            with monkeypatch.context() as patch:
                if step == 4:
                    ckpt.wait()
                    patch.setattr(ckpt.store, "_prune", lambda: 1 // 0)
                saving = ckpt.save(step, model=run[0], optimizer=run[1])
                train(run, 1)
                if step == 4:
                    with pytest.raises(ZeroDivisionError):
                        saving.result()
        ckpt.wait()
        assert [ckpt.store.holds(buffer.holds) for buffer in ckpt._buffers].count(True) == 1
        again = begin(seed=8)
        for step, found in expected.items():
            ckpt.restore(model=again[0], optimizer=again[1], step=step)
            assert state(*again[:2]) == found
            with ckpt.store.open(step) as file:
                assert (file.parent is None) == (step == 0)
        assert ckpt.store.verify().is_clean


def test_no_memory_is_kept_for_words_in_the_store(tmp_path):
    run = begin()
    with Checkpointer(tmp_path, reference_in="store") as ckpt:
        for step in range(3):
            ckpt.save(step, model=run[0], optimizer=run[1]).result()
        assert not ckpt.store.holds(lambda words: True)
        assert [buffer._memory is None for buffer in ckpt._buffers].count(False) == 1


def test_wrappers_of_modules_have_the_keys_of_what_they_wrap(tmp_path):
    """What torch.compile or DataParallel was trained with goes into the plain module, and the other way round."""
    model = Net()
    compiled: Any = torch.compile(model)
    parallel = torch.nn.DataParallel(Net())
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, model=compiled, optimizer=adamw(compiled.parameters()), extra={"ema": parallel})
        other, plain = Net(), Net()
        ckpt.restore(model=other, optimizer=adamw(other.parameters()), extra={"ema": plain})
        assert state(other, plain) == state(model, parallel.module)
        with ckpt.store.open(1) as file:
            assert {"model/middle.weight", "extra/ema/middle.weight"} <= set(file)
        ckpt.save(2, model=model)
        fresh: Any = torch.compile(Net())
        ckpt.restore(model=fresh)
        assert state(fresh._orig_mod) == state(model)


def test_bfloat16_weights_beside_their_masters_cost_next_to_nothing(tmp_path):
    masters = {name: tensor.clone() for name, tensor in torch.nn.Linear(400, 300).state_dict().items()}
    model = torch.nn.Linear(400, 300).bfloat16()
    model.load_state_dict(masters)  # which rounds
    with Checkpointer(tmp_path) as ckpt:
        report = ckpt.save(1, model=model, extra={"masters": masters}).result()
        mine = [leaf for leaf in report.leaves if leaf.path.startswith("model/")]
        assert sum(leaf.coded_bytes for leaf in mine) < 0.01 * sum(leaf.raw_bytes for leaf in mine)
        again = torch.nn.Linear(400, 300).bfloat16()
        restored = ckpt.restore(model=again)
    assert state(again) == state(model)
    assert bits(restored.extra["masters"]) == bits(masters)
