"""Optimizers, schedulers and the like: state saved, restored into fresh objects, trained on, equal to the bit; and
tensor subclasses, torchao's among them, taken apart and put together again."""

import collections
import importlib
import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import tricomp_torch
from tricomp_torch import subclasses
from tricomp_torch.trees import Flat, flatten, unflatten

import tricomp
from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode

Checkpointer: Any = tricomp_torch.Checkpointer
optim: Any = torch.optim


class Net(torch.nn.Module):
    """Embedding, convolution, linear layers large enough for torchao to quantise their moments, and an unused one."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 64)
        self.convolution = torch.nn.Conv2d(1, 2, 3, padding=1)
        self.mixing = torch.nn.Conv2d(2, 1, 3, padding=1)
        self.wide = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 7)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, tokens):
        x = self.convolution(self.embedding(tokens).view(-1, 1, 8, 8)).relu()
        return self.head(self.wide(self.mixing(x).flatten(1)).tanh())


class Lion(torch.optim.Optimizer):
    """Sign of an average, kept in float32 whatever the parameter is; and odd plain state beside it."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "note": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros(parameter.shape), n=0, history=[], pair=(None, torch.zeros(2)))
                gradient, (fast, slow) = parameter.grad.float(), group["betas"]
                update = state["exp_avg"].lerp(gradient, 1 - fast).sign()
                parameter.sub_((group["lr"] * update).to(parameter.dtype))
                state["exp_avg"].lerp_(gradient, 1 - slow)
                state["n"] += 1
                state["history"] = [*state["history"][-2:], gradient.norm()]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices; plain momentum for the rest."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                x = buffer / (buffer.norm() + 1e-7)
                if x.ndim == 2:
                    for _ in range(3):
                        x = 1.5 * x - 0.5 * x @ x.T @ x
                parameter.sub_(group["lr"] * x)


def torchao(name):
    def make(groups):
        return getattr(pytest.importorskip("torchao.optim"), name)(groups)

    return make


def flat(groups):
    return [parameter for group in groups for parameter in group["params"]]


def matrices(groups):
    return [parameter for parameter in flat(groups) if parameter.ndim == 2]


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda g: optim.AdamW(g),
    "adamw-foreach": lambda g: optim.AdamW(g, foreach=True),
    "adamw-fused": lambda g: optim.AdamW(g, fused=True),
    "adamw-amsgrad": lambda g: optim.AdamW(g, amsgrad=True, maximize=True),
    "adamw-lr-tensor": lambda g: optim.AdamW(g, lr=torch.tensor(1e-2)),
    "adam": lambda g: optim.Adam(g, weight_decay=0.1),
    "adamax": lambda g: optim.Adamax(g),
    "nadam": lambda g: optim.NAdam(g),
    "radam": lambda g: optim.RAdam(g),
    "sgd": lambda g: optim.SGD(g, lr=0.1),
    "sgd-momentum": lambda g: optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-fused": lambda g: optim.SGD(g, lr=0.1, momentum=0.9, fused=True),
    "adagrad": lambda g: optim.Adagrad(g, initial_accumulator_value=0.1),
    "adagrad-fused": lambda g: optim.Adagrad(g, fused=True),
    "rmsprop": lambda g: optim.RMSprop(g),
    "rmsprop-centered": lambda g: optim.RMSprop(g, centered=True, momentum=0.5),
    "adadelta": lambda g: optim.Adadelta(g),
    "asgd": lambda g: optim.ASGD(g, t0=1),
    "rprop": lambda g: optim.Rprop(g),
    "adafactor": lambda g: optim.Adafactor(g),
    "lbfgs": lambda g: optim.LBFGS(flat(g), max_iter=3, history_size=3, line_search_fn="strong_wolfe"),
    "lbfgs-plain": lambda g: optim.LBFGS(flat(g), lr=0.1, max_iter=3),
    "sparse-adam": lambda g: optim.SparseAdam(g),
    "muon": lambda g: optim.Muon(matrices(g)),
    "lion-like": Lion,
    "muon-like": Muon,
    "torchao-8bit": torchao("AdamW8bit"),
    "torchao-4bit": torchao("AdamW4bit"),
    "torchao-fp8": torchao("AdamWFp8"),
}


def begin(name, seed=0):
    torch.manual_seed(seed)
    model: Any = Net()
    if name == "lion-like":
        model = model.to(torch.bfloat16)
    if name == "sparse-adam":
        model.embedding.sparse = True
        return model, OPTIMIZERS[name]([{"params": list(model.embedding.parameters())}])
    if "lbfgs" not in name:  # which takes contiguous gradients only
        model = model.to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[:3], "lr": 3e-3}, {"params": parameters[3:]}]
    return model, OPTIMIZERS[name](groups)


def train(run, steps):
    """Train on data that follows from the step. Returns the losses as exact text."""
    model, optimizer = run
    is_lbfgs = isinstance(optimizer, optim.LBFGS)
    losses = []
    for step in steps:
        tokens = torch.randint(7, (5,), generator=torch.Generator().manual_seed(step))

        def closure(tokens=tokens):
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(tokens).float(), tokens)
            loss.backward()
            return loss

        losses.append((optimizer.step(closure) if is_lbfgs else closure()).item().hex())
        if not is_lbfgs:
            optimizer.step()
    return losses


def exact(value):
    """A tree with all that must come back, comparable with ==: types, order, dtypes, strides, bits."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            inner = [(name, exact(getattr(value, name))) for name in names]
            return type(value).__name__, inner, repr(context), value.dtype, tuple(value.shape)
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return value.dtype, tuple(value.shape), value.stride(), data
    if isinstance(value, dict):
        return type(value), [(key, exact(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [exact(entry) for entry in value]
    return type(value), repr(value)


def states(*objects):
    return [exact(thing.state_dict()) for thing in objects]


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its steps; here it is not to."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_comes_back_and_trains_on_as_if_nothing_had_been(tmp_path, name):
    run = begin(name)
    train(run, range(2))
    checkpointer = Checkpointer(tmp_path / "run")
    old, new = tmp_path / "old.tri", tmp_path / "new.tri"
    for step, path in ((2, old), (3, new)):  # a checkpoint that stands alone, and a delta
        train(run, [step])
        checkpointer.save(step, model=run[0], optimizer=run[1])
        tree = {"model": run[0].state_dict(), "optimizer": run[1].state_dict()}
        tricomp_torch.save(tree, path, reference=old if path is new else None)
    saved = states(*run)
    losses = train(run, range(4, 7))
    checkpointer.close()
    after = states(*run)

    again = begin(name, seed=9)
    Checkpointer(tmp_path / "run").restore(model=again[0], optimizer=again[1])
    assert states(*again) == saved
    assert train(again, range(4, 7)) == losses
    assert states(*again) == after

    loaded = tricomp_torch.load(new, reference=old)
    assert [exact(loaded["model"]), exact(loaded["optimizer"])] == saved
    if name == "lion-like":
        return  # load_state_dict rounds its averages to the parameters' dtype, which the Checkpointer mends
    again = begin(name, seed=9)
    again[0].load_state_dict(loaded["model"])
    again[1].load_state_dict(loaded["optimizer"])
    assert train(again, range(4, 7)) == losses
    assert states(*again) == after


def test_every_optimizer_of_torch_is_tried():
    tried = {type(begin(name)[1]) for name in OPTIMIZERS}
    there = {cls for cls in vars(torch.optim).values() if isinstance(cls, type) and cls is not torch.optim.Optimizer}
    assert {cls for cls in there if issubclass(cls, torch.optim.Optimizer)} <= tried


def test_a_capturable_state_keeps_tensors_where_others_have_numbers(tmp_path):
    """Capturable optimizers step on accelerators only, so their state is made by another and given to them."""
    model, plain = begin("adamw")
    train((model, plain), range(2))

    def capturable(net):
        return optim.AdamW(net.parameters(), lr=torch.tensor(1e-2), capturable=True)

    optimizer = capturable(model)
    optimizer.state.update(plain.state)
    saved = states(optimizer)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, optimizer=optimizer)
    again = capturable(begin("adamw", seed=9)[0])
    checkpointer.restore(optimizer=again)
    assert states(again) == saved
    assert isinstance(again.param_groups[0]["lr"], torch.Tensor)
    assert all(entry["step"].dtype == torch.float32 for entry in again.state.values())


def test_a_learning_rate_goes_to_the_device_it_is_on_in_this_process(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, optimizer=begin("adamw-lr-tensor")[1])
    again = begin("adamw-lr-tensor")[1]
    again.param_groups[1]["lr"] = torch.empty((), device="meta")  # in the place of an accelerator
    checkpointer.restore(optimizer=again)
    assert again.param_groups[0]["lr"] == 3e-3
    assert again.param_groups[1]["lr"].device.type == "meta"


def test_inner_tensors_of_torchao_are_leaves_of_their_own(tmp_path):
    run = begin("torchao-8bit")
    train(run, range(2))
    path = tmp_path / "a.tri"
    tricomp_torch.save({"optimizer": run[1].state_dict()}, path)
    with tricomp.open(path) as file:
        number = next(key for key in file if key.endswith("exp_avg/codes")).split("/")[2]
        prefix = f"optimizer/state/{number}/exp_avg"
        assert {key for key in file if key.startswith(f"{prefix}/")} == {
            f"{prefix}/{n}" for n in ("codes", "scale", "qmap")
        }
        assert file.metadata["tricomp_torch"]["subclasses"][prefix]["class"].endswith("OptimState8bit")
    plain = tricomp.load(path)["optimizer"]["state"][int(number)]["exp_avg"]
    held = run[1].state_dict()["state"][int(number)]["exp_avg"]
    assert plain["codes"].tobytes() == held.codes.numpy().tobytes()
    some = tricomp_torch.load(path, leaves=[f"{prefix}/*"])
    assert torch.equal(some[f"{prefix}/scale"], held.scale)


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda s, o: s.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.5**step]),
    "multiplicative": lambda s, o: s.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda s, o: s.StepLR(o, 2),
    "multistep": lambda s, o: s.MultiStepLR(o, [2, 4, 4]),
    "constant": lambda s, o: s.ConstantLR(o),
    "linear": lambda s, o: s.LinearLR(o),
    "exponential": lambda s, o: s.ExponentialLR(o, 0.9),
    "polynomial": lambda s, o: s.PolynomialLR(o, 9, 2.0),
    "cosine": lambda s, o: s.CosineAnnealingLR(o, 9),
    "restarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda s, o: s.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range"),
    "onecycle": lambda s, o: s.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lambda s, o: s.ReduceLROnPlateau(o, patience=1),
    "chained": lambda s, o: s.ChainedScheduler([s.ConstantLR(o), s.MultiStepLR(o, [1, 3])], optimizer=o),
    "sequential": lambda s, o: s.SequentialLR(o, [s.LinearLR(o), s.ExponentialLR(o, 0.9)], [3]),
    "swa": lambda s, o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=4),
    "swa-linear": lambda s, o: optim.swa_utils.SWALR(o, [0.05, 0.02], 4, "linear"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_goes_on_where_it_was(tmp_path, name):
    def make():
        run = begin("sgd-momentum")
        return (*run, SCHEDULERS[name](torch.optim.lr_scheduler, run[1]))

    def go(run, n_steps):
        rates = []
        for _ in range(n_steps):
            run[1].step()
            run[2].step(*[1.0] if name == "plateau" else [])
            rates.append([group["lr"].hex() for group in run[1].param_groups])
        return rates

    run = make()
    go(run, 3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, optimizer=run[1], scheduler=run[2])
    saved = states(*run[1:])
    again = make()
    checkpointer.restore(optimizer=again[1], scheduler=again[2])
    assert states(*again[1:]) == saved
    assert go(again, 4) == go(run, 4)
    assert states(*again[1:]) == states(*run[1:])


def test_an_average_of_weights_and_a_gradient_scaler_go_on(tmp_path):
    def make(seed):
        model, optimizer = begin("sgd-momentum", seed)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        return model, optimizer, average, torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)

    def go(run, steps):
        model, optimizer, average, scaler = run
        for step in steps:
            tokens = torch.randint(7, (5,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(torch.nn.functional.cross_entropy(model(tokens), tokens)).backward()
            if step == 2:
                model.head.weight.grad[0, 0] = float("inf")  # this step is left out and the scale halved
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)

    run = make(0)
    go(run, range(5))
    checkpointer = Checkpointer(tmp_path)
    model, optimizer, average, scaler = run
    checkpointer.save(3, model=model, optimizer=optimizer, extra={"average": average, "scaler": scaler})
    saved = states(*run)
    assert scaler.get_scale() != 2.0**12
    again = make(5)
    model, optimizer, average, scaler = again
    checkpointer.restore(model=model, optimizer=optimizer, extra={"average": average, "scaler": scaler})
    assert states(*again) == saved
    go(again, range(5, 8))
    go(run, range(5, 8))
    assert states(*again) == states(*run)


SHAPES = {
    "channels-last": lambda x: x.reshape(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "one-channel": lambda x: x.reshape(24, 1, 5, 1).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.reshape(8, 15).t(),
    "permuted": lambda x: x.reshape(2, 3, 4, 5).permute(2, 0, 3, 1),
    "channels-last-3d": lambda x: x.reshape(2, 3, 4, 5, 1).to(memory_format=torch.channels_last_3d),
}
DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_strides_of_tensors_that_fill_their_memory_come_back(tmp_path, name, dtype):
    tensor = SHAPES[name](torch.arange(120) % 7).to(dtype)
    tricomp_torch.save([tensor, {"tied": tensor}, tensor.contiguous()], tmp_path / "a.tri")
    back = tricomp_torch.load(tmp_path / "a.tri")
    assert exact(back) == exact([tensor, {"tied": tensor}, tensor.contiguous()])
    assert back[0].data_ptr() == back[1]["tied"].data_ptr()
    assert tricomp.load(tmp_path / "a.tri")[0].flags.c_contiguous
    assert exact(tricomp_torch.load(tmp_path / "a.tri", leaves=["1/tied"])["1/tied"]) == exact(tensor)


def test_other_strides_become_usual_ones():
    base = torch.arange(60.0).reshape(3, 4, 5)
    for view in (base[:, ::2], base[:, :, 1:3], base[:1].expand(6, 4, 5), torch.empty(0, 3).t(), torch.tensor(2.0)):
        back = unflatten(flatten(view))
        assert torch.equal(back, view)
        assert back.is_contiguous()
        assert "strides" not in flatten(view).notes


@pytest.mark.parametrize("strides", [[1], [1, 1], [0, 1], [2, 1], [1, 3], [2, -1], [1, 2.0], "ab", [1 << 64, 1]])
def test_strides_that_do_not_fit_are_refused(strides):
    with pytest.raises(CorruptFile, match=r"strid.*tricomp\.load"):
        unflatten(Flat({"a": np.zeros((2, 3))}, {"strides": {"a": strides}}))


class Pair(torch.Tensor):
    """A tensor made of two, and some plain values."""

    @staticmethod
    def __new__(cls, a, b, context):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, strides=a.stride())

    def __init__(self, a, b, context):
        self.a, self.b, self.context = a, b, context

    def __tensor_flatten__(self):
        return ["a", "b"], self.context

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Pair(inner["a"], inner["b"], context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func}")


CONTEXT = {
    "dtype": torch.bfloat16,
    "size": torch.Size([3]),
    5: [None, (1, -0.0), {"x": b"y"}],
    "text": "é",
    "flag": True,
}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(subclasses, "_registered", {})
    return subclasses.register_tensor(Pair)


def test_a_registered_subclass_comes_back(tmp_path, registered):
    inner = torch.arange(6.0).reshape(2, 3)
    tree = {
        "x": Pair(inner, torch.ones(3), CONTEXT),
        "tied": inner,
        "deep": [Pair(Pair(inner.t(), inner, 1), inner, ())],
    }
    tricomp_torch.save(tree, tmp_path / "a.tri")
    back = tricomp_torch.load(tmp_path / "a.tri")
    assert exact(back) == exact(tree)
    assert type(back["x"].context["size"]) is torch.Size
    assert back["tied"].data_ptr() == back["x"].a.data_ptr() == back["deep"][0].b.data_ptr()
    assert sorted(tricomp.load(tmp_path / "a.tri")["x"]) == ["a", "b"]


def test_a_bare_subclass_is_a_tree_too(tmp_path, registered):
    pair = Pair(torch.ones(2), torch.zeros(0), None)
    tricomp_torch.save(pair, tmp_path / "a.tri")
    assert exact(tricomp_torch.load(tmp_path / "a.tri")) == exact(pair)


def test_unknown_subclasses_are_refused_by_name_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(subclasses, "_registered", {})
    pair = Pair(torch.ones(2), torch.ones(2), None)
    with pytest.raises(
        UnsupportedNode, match=r"leaf 'm/x': .* subclass Pair, .* tricomp_torch.register_tensor\(Pair\)"
    ):
        tricomp_torch.save({"m": {"x": pair}}, tmp_path / "a.tri")
    subclasses.register_tensor(Pair)
    cases = {"a set": {1, 2}, "a device": torch.device("cpu"), "a function": len, "a tensor": torch.ones(1)}
    for context in cases.values():
        with pytest.raises(UnsupportedNode, match=r"leaf 'x': Pair holds a \S+ beside its tensors, which is not plain"):
            flatten({"x": Pair(torch.ones(2), torch.ones(2), [context])})
    with pytest.raises(UnsupportedNode, match="leaf 'x': its inner tensor 'b' is a int"):
        flatten({"x": Pair(torch.ones(2), 3, None)})
    with pytest.raises(UnsupportedNode, match="leaf 'x/b': its layout is torch.sparse_coo"):
        flatten({"x": Pair(torch.ones(2), torch.eye(2).to_sparse(), None)})


def test_a_subclass_that_does_not_come_back_is_refused_when_saved(registered, monkeypatch):
    monkeypatch.setattr(
        Pair, "__tensor_unflatten__", staticmethod(lambda inner, *rest: Pair(inner["b"], inner["b"], 0))
    )
    with pytest.raises(UnsupportedNode, match="leaf 'x': Pair cannot be made again of what its __tensor_flatten__"):
        flatten({"x": Pair(torch.ones(2), torch.ones(3), None)})


def test_register_tensor_takes_tensor_classes_only():
    for wrong in (torch.ones(1), int, "Pair"):
        with pytest.raises(InvalidArgument, match="register_tensor: expected a subclass of torch.Tensor"):
            subclasses.register_tensor(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="Parameter lacks __tensor_flatten__"):
        subclasses.register_tensor(torch.nn.Parameter)


def note(**changes):
    entry = {
        "class": "torchao.optim.subclass_fp8.OptimStateFp8",
        "dtype": "torch.float32",
        "shape": [4],
        "strides": [1],
    }
    return {**entry, "context": {"list": [{"dtype": "float32"}]}, **changes}


HOSTILE: dict[str, Any] = {
    "unknown-class": (note(**{"class": "os.system"}), UnsupportedNode, r"subclass 'os.system', which is not known"),
    "private-class": (note(**{"class": "torchao.optim.AdamW8bit"}), UnsupportedNode, "which is not known here"),
    "no-class": ({"context": 1}, CorruptFile, "note on the tensor at 'x' is damaged"),
    "not-a-map": (3, CorruptFile, "note on the tensor at 'x' is damaged"),
    "bad-shape": (note(shape=[-1]), CorruptFile, "note on the tensor at 'x' is damaged"),
    "other-shape": (note(shape=[5]), CorruptFile, "its parts do not make the"),
    "other-dtype": (note(dtype="torch.float64"), CorruptFile, "its parts do not make the"),
    "no-context": (note(context=None), CorruptFile, "its parts do not make the"),
    "context-call": (
        note(context={"list": [{"enum": ["os.path", "join"]}]}),
        CorruptFile,
        "note on its class is damaged",
    ),
    "context-record": (note(context={"record": ["subprocess.Popen", {"args": "true"}]}), CorruptFile, "is damaged"),
    "context-dtype": (note(context={"dtype": "load"}), CorruptFile, "note on its class is damaged"),
    "context-kind": (note(context={"what": 1}), CorruptFile, "note on its class is damaged"),
    "context-many": (note(context={"list": [], "tuple": []}), CorruptFile, "note on its class is damaged"),
    "context-plain": (note(context=[1]), CorruptFile, "note on its class is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_notes_from_a_file_lead_to_nothing_unforeseen(name, monkeypatch):
    pytest.importorskip("torchao")
    entry, error, text = HOSTILE[name]
    imported: list[str] = []
    kept = importlib.import_module

    def recorded(name):
        imported.append(name)
        return kept(name)

    monkeypatch.setattr(importlib, "import_module", recorded)
    tree = {"x": {"codes": np.zeros(4, ml_dtypes.float8_e4m3fn), "scale": np.ones(2, np.float32)}}
    with pytest.raises(error, match=text):
        unflatten(Flat(tree, {"subclasses": {"x": entry}}))
    assert all(module.startswith("torchao.") for module in imported)


def test_a_class_that_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnsupportedNode, match=r"which this environment lacks \(No module named .*Install the torchao"):
        unflatten(Flat({"x": {}}, {"subclasses": {"x": note()}}))


def quantized(config, **options):
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)).to(torch.bfloat16)
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model


CONFIGS = [
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_of_torchao(tmp_path, config):
    torch.manual_seed(1)
    model = quantized(config)
    state = model.state_dict()
    assert any(hasattr(value, "__tensor_flatten__") for value in state.values())
    tricomp_torch.save(state, tmp_path / "a.tri")
    back = tricomp_torch.load(tmp_path / "a.tri")
    assert exact(back) == exact(state)
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    expected = model(x)
    fresh = quantized(config)
    fresh.load_state_dict(back, assign=True)
    assert torch.equal(fresh(x), expected)

    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(1, model=model)
    fresh = quantized(config)
    checkpointer.restore(model=fresh)
    assert torch.equal(fresh(x), expected)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)).to(torch.bfloat16)
    before = states(plain)
    with pytest.raises(
        InvalidArgument, match=r"model/0\.weight: the checkpoint holds a \w+, the module a Tensor; they do"
    ):
        checkpointer.restore(model=plain)
    assert states(plain) == before


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_of_other_blocks_do_not_fit(tmp_path):
    config = pytest.importorskip("torchao.quantization.granularity")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, model=quantized("IntxWeightOnlyConfig", granularity=config.PerGroup(32)))
    other = quantized("IntxWeightOnlyConfig", granularity=config.PerGroup(16))
    with pytest.raises(InvalidArgument, match="the module a IntxUnpackedToInt8Tensor of other parts; they do not fit"):
        checkpointer.restore(model=other)


def test_tied_quantised_weights_stay_tied(tmp_path):
    model = quantized("Int8WeightOnlyConfig")
    tree = {"a": model[0].weight, "b": model[0].weight}
    tricomp_torch.save(tree, tmp_path / "a.tri")
    back = tricomp_torch.load(tmp_path / "a.tri")
    assert back["a"].qdata.data_ptr() == back["b"].qdata.data_ptr()
    assert exact(back) == exact(tree)


def test_plain_values_that_torch_save_keeps(tmp_path):
    tree = {
        "dtype": torch.bfloat16, "device": torch.device("cuda:1"), "complex": [1 - 2j, complex("nan")],
        "bytes": bytearray(b"\0x"), "sets": ({1, "a", None}, set()),
    }  # fmt: skip
    tricomp_torch.save(tree, tmp_path / "a.tri")
    back = tricomp_torch.load(tmp_path / "a.tri")
    assert back.pop("sets") == tree.pop("sets")  # whose order a repr would show
    assert repr(back) == repr(tree)


def test_a_set_is_stored_in_one_order_in_every_process():
    code = """
import tricomp, tricomp_torch
print(tricomp.content_id(tricomp_torch.flatten({"s": {"a", "b", "c", None, 1, 2.5, b"x"}}).tree))
"""
    ids = set()
    for seed in "123":
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        ids.add(subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True).stdout)
    assert len(ids) == 1


@pytest.mark.parametrize("kind", ["dtype", "device", "complex", "set", "bytearray", "Size"])
def test_kinds_that_do_not_fit_are_refused(kind):
    for value in ({"x": 1}, "os", ("a", 1, 2), (10**400, 1), [1], b"", 5):
        if (kind, type(value)) in {("bytearray", bytes), ("set", list)}:
            continue
        with pytest.raises(CorruptFile, match=f"'a' is noted as {kind}, but is"):
            unflatten(Flat({"a": value}, {"kinds": {"a": kind}}))


def test_state_dicts_hold_their_order_and_types(tmp_path):
    state = begin("adamw")[0].state_dict()
    tricomp_torch.save(state, tmp_path / "a.tri")
    back = tricomp_torch.load(tmp_path / "a.tri")
    assert type(back) is collections.OrderedDict
    assert exact(back) == exact(state)
    assert back["mixing.weight"].stride() == (18, 1, 6, 2)
