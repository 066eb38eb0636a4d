"""CompressedStateDict: a mapping like the state dict it was made of, its updates, and what models do with it."""

from __future__ import annotations

import copy
import os
import pickle
import pickletools
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import tricomp_torch
from tricomp_torch import CompressedStateDict

import tricomp
from tests.test_torch_adapter import random_bits, raw, same
from tricomp import codec
from tricomp.cli import main
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    MissingFile,
    MissingLeaf,
    StorageError,
    UnsupportedDtype,
    UnsupportedNode,
    WrongReference,
)


class Tied(torch.nn.Module):
    """Tied weights, buffers, module versions and an extra state, in channels_last too."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = torch.nn.Embedding(33, 20)
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = torch.nn.BatchNorm1d(20)
        self.head = torch.nn.Linear(20, 33, bias=False)
        self.head.weight = self.embed.weight
        self.extra: Any = {"scale": torch.tensor(2.5), "names": ["a", 3], "history": torch.arange(4)}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def equal(a, b):
    """Trees of tensors and plain values, equal in bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same(a, b) and a.stride() == b.stride()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def step(model, rate=1e-3):
    """Change every parameter a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * rate)


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def frozen(state_dict):
    """The same in memory of its own."""
    return copy.deepcopy(state_dict)


def n_states(held):
    return len(held._state.sources)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "a.tri")


def test_it_is_the_state_dict_that_it_was_made_of():
    state = Tied().state_dict()
    held = CompressedStateDict(state)
    assert len(held) == len(state)
    assert list(held) == list(held.keys()) == list(state)
    assert equal(dict(held.items()), dict(state))
    assert equal(list(held.values()), list(state.values()))
    assert "norm.weight" in held
    assert "nope" not in held
    assert 3 not in held
    assert held.get("nope", 7) == 7
    with pytest.raises(MissingLeaf, match="no entry 'nope' among the"):
        held["nope"]
    assert held != dict(held)
    assert hash(held)
    assert held._metadata == state._metadata  # type: ignore[attr-defined]
    n_tied = state["embed.weight"].nbytes
    n_raw = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor)) + 4 + 4 * 8
    assert held.raw_nbytes == n_raw - n_tied
    assert held.ratio == held.raw_nbytes / held.nbytes
    assert repr(held).startswith(f"<CompressedStateDict: {len(state)} entries, {held.raw_nbytes:,} -> {held.nbytes:,} ")
    assert repr(held).endswith(", keyframe + 0 deltas>")


def test_an_entry_is_decoded_when_asked_for_and_no_other(monkeypatch):
    held = CompressedStateDict({name: torch.arange(20_000.0) * i for i, name in enumerate("abc", 1)})
    decoded: list[str] = []
    original = codec.decode_many

    def noted(frames, *rest):
        decoded.extend(leaf.path for frame in frames for leaf in frame.leaves)
        return original(frames, *rest)

    monkeypatch.setattr(codec, "decode_many", noted)
    assert (len(held), "a" in held, list(held.keys())) == (3, True, ["a", "b", "c"])
    items = iter(held.items())
    assert decoded == []
    assert next(items)[0] == "a"
    assert decoded == ["a"]
    held["c"]
    assert decoded == ["a", "c"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("n_updates", [0, 3])
def test_load_state_dict_is_bit_equal(assign, n_updates):
    model, fresh = Tied(), Tied(1)
    held = CompressedStateDict(model.state_dict())
    for _ in range(n_updates):
        step(model)
        held.update(model.state_dict())
    versions = frozen(held._metadata)
    assert str(fresh.load_state_dict(held, assign=assign)) == "<All keys matched successfully>"  # type: ignore[arg-type]
    assert equal(fresh.state_dict(), model.state_dict())
    assert shares(fresh.head.weight, fresh.embed.weight)
    assert equal(fresh.extra, model.extra)
    assert held._metadata == versions  # torch writes into what it is given
    step(fresh)
    assert equal(held.to_dict(), model.state_dict())


def test_strict_loading_tells_what_does_not_fit():
    held = CompressedStateDict({**Tied().state_dict(), "more": torch.ones(1)})
    with pytest.raises(RuntimeError, match='Unexpected key\\(s\\) in state_dict: "more"'):
        Tied().load_state_dict(held)  # type: ignore[arg-type]
    assert Tied().load_state_dict(held, strict=False).unexpected_keys == ["more"]  # type: ignore[arg-type]


def test_a_gpt_with_tied_embeddings():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=24, vocab_size=101, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    held = CompressedStateDict(model.state_dict())
    step(model)
    held.update(model.state_dict())
    fresh = transformers.GPT2LMHeadModel(config)
    fresh.load_state_dict(held)
    assert equal(fresh.state_dict(), model.state_dict())
    tokens = torch.arange(16)[None]
    assert torch.equal(fresh.eval()(tokens).logits, model.eval()(tokens).logits)
    assert shares(held["lm_head.weight"], held["transformer.wte.weight"])


def test_tied_entries_share_while_one_lives_unchanged():
    weight = random_bits(torch.bfloat16, (40, 30))
    held = CompressedStateDict({"a": weight, "b": weight, "c": weight, "d": weight.clone()})
    a, b = held["a"], held["b"]
    assert shares(a, b)
    assert shares(held["c"], a)
    assert not shares(held["d"], a)
    again = held["a"]
    assert not shares(again, a)  # a new tensor each time
    assert shares(held["b"], again)
    view = held["b"].view(-1)[7:9]  # the storage lives on in a view
    assert shares(held["a"], view)
    assert shares(held["c"], view)
    parameter = torch.nn.Parameter(held["c"])
    assert not shares(parameter, view)
    assert shares(held["a"], parameter)
    again = held["a"]
    again.zero_()
    b = held["b"]
    assert not shares(b, again)
    assert same(b, weight)
    assert all(same(held[name], weight) for name in held)
    del a, b, again, view, parameter
    first = held.to_dict()
    assert shares(first["a"], first["c"])
    assert not shares(held["b"], first["a"])


def test_ties_in_nested_entries():
    weight = torch.arange(50.0)
    held = CompressedStateDict({"x": {"w": weight, "v": [weight]}, "y": weight})
    x, y = held["x"], held["y"]
    assert shares(x["w"], x["v"][0])
    assert shares(x["w"], y)
    both = held.to_dict()
    assert shares(both["x"]["w"], both["y"])
    meta = held.to_dict("meta")
    assert meta["y"].is_meta


def test_training_on_does_not_change_it():
    model = Tied()
    state = model.state_dict()
    before = frozen(state)
    held = CompressedStateDict(state)
    step(model, 1)
    model.extra["history"].zero_()
    model.norm(torch.randn(9, 20))
    assert equal(held.to_dict(), before)
    held["embed.weight"].zero_()
    held["_extra_state"]["names"].append("more")
    assert equal(held.to_dict(), before)


def test_an_average_held_compressed_while_training():
    def averages(is_compressed):
        model = Tied()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.ndim < 4], lr=0.1)
        held: Any = CompressedStateDict(model.state_dict()) if is_compressed else frozen(model.state_dict())
        generator = torch.Generator().manual_seed(0)
        for i in range(24):
            tokens = torch.randint(0, 33, (16,), generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
            optimizer.step()
            if i % 3 == 0:
                most.append(n_states(held) if is_compressed else 0)
                averaged = OrderedDict(held)
                for name, live in model.state_dict().items():
                    if isinstance(live, torch.Tensor) and live.is_floating_point() and name != "head.weight":
                        averaged[name] = averaged[name].lerp(live, 0.1)
                averaged["head.weight"] = averaged["embed.weight"]
                held.update(averaged)
        return held

    most = [0]
    plain, held = averages(False), averages(True)
    assert max(most) > 1
    assert equal(held.to_dict(), dict(plain))
    both = held.to_dict()
    assert shares(both["head.weight"], both["embed.weight"])
    fresh = Tied(3)
    fresh.load_state_dict(held)
    assert equal(fresh.state_dict(), dict(plain))


def test_update_replaces_the_named_entries():
    state: Any = OrderedDict(a=torch.arange(300.0), b=torch.arange(30_000.0), c=7, d={"x": torch.ones(3)})
    state["e"] = state["b"]
    held = CompressedStateDict(state)
    held.update({})
    assert n_states(held) == 1
    held.update({"new": torch.ones(2, 2), "a": torch.zeros(300), "c": None})
    expected = {**state, "a": torch.zeros(300), "c": None, "new": torch.ones(2, 2)}
    assert equal(held.to_dict(), OrderedDict(expected))
    assert shares(held["b"], held["e"])
    assert n_states(held) == 2
    held.update({"b": torch.arange(30_000.0) + 1})
    assert equal(held["e"], state["b"])  # no longer tied
    assert equal(held["b"], state["b"] + 1)
    held.update({"b": torch.ones(5, dtype=torch.int8), "d": torch.ones(1)})
    assert equal(held["b"], torch.ones(5, dtype=torch.int8))
    held.update(CompressedStateDict({"a": torch.ones(1)}))
    assert equal(held["a"], torch.ones(1))
    assert list(held) == ["a", "b", "c", "d", "e", "new"]


def test_update_keeps_and_merges_module_versions():
    held = CompressedStateDict(Tied().state_dict())
    versions = held._metadata
    held.update({"norm.bias": torch.ones(20)})
    assert held._metadata == versions
    more = OrderedDict(w=torch.ones(1))
    more._metadata = {"norm": {"version": 9}}  # type: ignore[attr-defined]
    held.update(more)
    assert versions is not None
    assert held._metadata == {**versions, "norm": {"version": 9}}
    assert CompressedStateDict({"w": torch.ones(1)})._metadata is None


@pytest.mark.parametrize("rate", [0, 1e-5, 1.0])
@pytest.mark.parametrize("keyframe", [1, 7])
def test_many_updates_stay_bounded(rate, keyframe):
    torch.manual_seed(0)
    weight = torch.randn(40, 50)
    held = CompressedStateDict({"w": weight, "n": 0}, keyframe=keyframe)
    alone, most = held.nbytes, 1
    for i in range(50):
        weight = weight + rate * torch.randn(40, 50)
        held.update({"w": weight, "n": i})
        assert held.nbytes < 2.1 * alone
        assert n_states(held) <= keyframe
        most = max(most, n_states(held))
    assert most == 7 if keyframe == 7 and rate == 0 else most < 7
    assert keyframe == 1 or most > 1
    assert same(held["w"], weight)


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:Sparse")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_update_that_is_broken_off_changes_nothing(monkeypatch, error):
    model = Tied()
    held = CompressedStateDict(model.state_dict())
    step(model)
    held.update(model.state_dict())
    before, n_bytes = frozen(model.state_dict()), held.nbytes
    step(model)
    original = codec.encode

    def broken(*arguments):
        frames = original(*arguments)
        yield next(frames)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", broken)
        with pytest.raises(error):
            held.update(model.state_dict())
    for bad, kind in (
        (torch.ones(2, dtype=torch.complex32), UnsupportedDtype),
        (torch.eye(2).to_sparse(), UnsupportedNode),
        (object(), UnsupportedNode),
    ):
        with pytest.raises(kind, match="'bad'"):
            held.update({**model.state_dict(), "bad": bad})
    with pytest.raises(InvalidArgument, match=r"expected a state dict, got a Tied. Pass its state_dict\(\)"):
        held.update(model)  # type: ignore[arg-type]
    assert equal(held.to_dict(), before)
    assert held.nbytes == n_bytes
    held.update(model.state_dict())  # no lock was left taken
    assert equal(held.to_dict(), model.state_dict())


def test_what_it_cannot_be_made_of():
    with pytest.raises(InvalidArgument, match=r"expected a state dict, got a Linear. Pass its state_dict\(\)"):
        CompressedStateDict(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="expected a state dict, got a list"):
        CompressedStateDict([1])  # type: ignore[arg-type]
    for keyframe in (0, -1, True, 2.0, None):
        with pytest.raises(InvalidArgument, match="keyframe: expected a number of states, 1 or more"):
            CompressedStateDict({}, keyframe=keyframe)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"spec: expected a tricomp.Spec"):
        CompressedStateDict({}, "dense")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedNode, match="'w': it is on the meta device"):
        CompressedStateDict({"w": torch.empty(2, device="meta")})
    empty = CompressedStateDict({})
    assert (len(empty), empty.raw_nbytes, empty.to_dict()) == (0, 0, {})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.bool], ids=str
)
def test_any_bits_and_shapes(dtype):
    state = {str(shape): random_bits(dtype, shape) for shape in ((), (0, 3), (1,), (33,), (7, 5, 3))}
    held = CompressedStateDict(state)
    assert equal(dict(held), state)
    other = {name: random_bits(dtype, tensor.shape, 1) for name, tensor in state.items()}
    held.update(other)
    assert equal(dict(held), other)


def test_entries_that_are_no_tensors(path):
    state: Any = {
        "a/b~c": torch.ones(2), "": torch.zeros(1), 7: torch.ones(3), "array": np.arange(3.0), "scalar": np.float32(2),
        "tuple": (1, [torch.ones(1)], {"x": None}), "size": torch.Size([2]), "dtype": torch.bfloat16, "text": "é",
        "channels": torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last), "nan": float("inf"), "empty": {},
    }  # fmt: skip
    held = CompressedStateDict(state)
    for _ in range(2):
        assert list(held) == list(state)
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                assert held[name].tobytes() == value.tobytes()
            else:
                assert equal(held[name], value), name
        held.update({"": torch.zeros(1)})
    held.save(path)
    assert list(CompressedStateDict.load(path)) == list(state)


def test_an_optimizers_state():
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    held = CompressedStateDict(optimizer.state_dict())
    for _ in range(3):
        model(torch.randn(4, 30)).square().mean().backward()
        optimizer.step()
        held.update(optimizer.state_dict())
    assert equal(held["state"], optimizer.state_dict()["state"])
    fresh = torch.optim.AdamW(torch.nn.Linear(30, 20).parameters())
    fresh.load_state_dict(held.to_dict())  # type: ignore[arg-type]
    assert equal(fresh.state_dict(), optimizer.state_dict())


def test_files(path, tmp_path, monkeypatch):
    model = Tied()
    held = CompressedStateDict(model.state_dict())
    for i in range(2):
        model.norm.bias.data.fill_(i)
        held.update(model.state_dict())
    assert n_states(held) == 3
    held.save(path)
    assert n_states(held) == 1  # coded to stand alone, and held so
    assert os.path.getsize(path) == held.nbytes
    held.save(path)
    assert os.listdir(tmp_path) == ["a.tri"]
    back: Any = tricomp_torch.load(path)
    assert equal(back, model.state_dict())
    assert back._metadata == held._metadata
    assert same(tricomp_torch.load_file(path)["norm.bias"], model.norm.bias.detach())
    with tricomp.open(path) as file:
        assert file.parent is None
    with monkeypatch.context() as patch:
        patch.setattr(codec, "decode_many", None)
        loaded = CompressedStateDict.load(path)
        assert list(loaded) == list(held)
        assert loaded.nbytes == held.nbytes
        assert loaded.raw_nbytes == held.raw_nbytes
    assert equal(loaded.to_dict(), model.state_dict())
    Tied(1).load_state_dict(loaded)  # type: ignore[arg-type]
    model.norm.bias.data.fill_(7)
    loaded.update(model.state_dict())
    assert n_states(loaded) == 2
    assert equal(loaded.to_dict(), model.state_dict())
    loaded.save(path)  # over the file that it was loaded from
    assert equal(loaded.to_dict(), model.state_dict())
    assert equal(CompressedStateDict.load(path).to_dict(), model.state_dict())
    with pytest.raises(StorageError):
        held.save(str(tmp_path / "nowhere" / "a.tri"))
    with pytest.raises(MissingFile):
        CompressedStateDict.load(str(tmp_path / "nope.tri"))


def test_files_of_others(path, tmp_path):
    tricomp_torch.save([torch.ones(2)], path)
    with pytest.raises(InvalidArgument, match="a.tri: tree is no dict, so it has no entries. Use tricomp.load"):
        CompressedStateDict.load(path)
    old, new = {"w": torch.arange(5000.0)}, {"w": torch.arange(5000.0) + 1}
    delta = str(tmp_path / "delta.tri")
    tricomp_torch.save(old, path)
    tricomp_torch.save(new, delta, reference=path)
    with pytest.raises(WrongReference, match="no reference was given"):
        CompressedStateDict.load(delta)["w"]
    held = CompressedStateDict.load(delta, reference=path, keyframe=5)
    assert same(held["w"], new["w"])
    held.update(old)
    assert n_states(held) == 3
    assert same(held["w"], old["w"])
    with pytest.raises(WrongReference):
        CompressedStateDict.load(path, reference=delta)
    safetensors = pytest.importorskip("safetensors.torch")
    other = str(tmp_path / "m.safetensors")
    safetensors.save_file({"a/b": torch.ones(3), "c": torch.zeros(2)}, other)
    assert main(["compress", "-q", other]) == 0
    assert equal(CompressedStateDict.load(f"{other}.tri").to_dict(), OrderedDict(safetensors.load_file(other)))


def test_a_damaged_file_is_told(path):
    CompressedStateDict({"w": torch.randn(30_000), "v": torch.randn(30_000)}).save(path)
    with tricomp.open(path) as file:
        offset = file._frame_of[1].offset
    with open(path, "r+b") as stored:
        stored.seek(offset + 70_000)
        stored.write(b"damage")
    held = CompressedStateDict.load(path)
    held["w"]
    with pytest.raises(CorruptFrame, match="'v'"):
        held["v"]
    with pytest.raises(CorruptFrame):
        held.update({"w": torch.ones(30_000)})
    assert list(held) == ["w", "v"]


@pytest.mark.parametrize(
    "notes",
    [
        {"ties": 3},
        {"ties": {"a": [1]}},
        {"kinds": [1]},
        {"modules": {"": 3}},
        {"modules": {"": {"a": 3}}},
        {"strides": 1},
    ],
    ids=repr,
)
def test_notes_that_do_not_fit_are_refused(path, notes):
    tricomp.save(path, {"a": np.ones(2), "b": np.zeros(2)}, metadata={"tricomp_torch": notes})
    with pytest.raises(CorruptFile, match="tricomp.load"):
        CompressedStateDict.load(path)


def test_a_tie_that_is_none_does_no_harm(path):
    tree: Any = {"a": np.ones(2), "b": np.zeros(2), "c": np.ones(3), "d": np.ones(1, np.float32)}
    tricomp.save(path, tree, metadata={"tricomp_torch": {"ties": {"b": "a", "c": "a", "d": "gone", "gone": "a"}}})
    held = CompressedStateDict.load(path)
    for state in (dict(held), held.to_dict()):
        assert all(raw(state[name]) == array.tobytes() for name, array in tree.items())


def test_reads_in_many_threads_during_updates():
    torch.manual_seed(0)
    states: list[dict[Any, torch.Tensor]] = [{name: torch.randn(6_000) * 10.0**i for name in "abcd"} for i in range(6)]
    for state in states:
        state["e"] = state["a"]
    held = CompressedStateDict(states[0], keyframe=3)
    known = {name: {raw(state[name]) for state in states} for name in held}
    wholes = [{name: raw(tensor) for name, tensor in state.items()} for state in states]
    failures: list[Any] = []
    is_over = threading.Event()

    def read():
        try:
            while not is_over.is_set():
                for name in held:
                    assert raw(held[name]) in known[name]
                assert {name: raw(tensor) for name, tensor in held.to_dict().items()} in wholes
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for state in states[1:]:
        held.update(state)
    is_over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {name: raw(tensor) for name, tensor in held.items()} == wholes[-1]


def test_updates_of_two_threads_are_both_there():
    held = CompressedStateDict({name: torch.zeros(2_000) for name in "abcd"})

    def change(name):
        for i in range(5):
            held.update({name: torch.full((2_000,), i + 1.0)})

    threads = [threading.Thread(target=change, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(tensor.eq(5).all() for tensor in held.values())


class Rows(torch.utils.data.Dataset):
    """Rows of an entry, read in worker processes."""

    def __init__(self, held):
        self.held = held

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.held["w"][i]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore")
def test_workers_read_it(context):
    weight = torch.arange(80.0).reshape(8, 10)
    held = CompressedStateDict({"w": torch.zeros(8, 10)})
    held.update({"w": weight})
    loader = torch.utils.data.DataLoader(Rows(held), batch_size=4, num_workers=1, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), weight)


def test_pickles_and_copies_hold_bytes_alone():
    model = Tied()
    held = CompressedStateDict(model.state_dict(), tricomp.Spec(tier="fast"), keyframe=4)
    step(model)
    held.update(model.state_dict())
    data = pickle.dumps(held)
    assert len(data) < held.nbytes + 1000
    names = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert not {name for name in names if "torch." in name.replace("tricomp_torch.", "") or "numpy" in name}
    for other in (pickle.loads(data), copy.copy(held), copy.deepcopy(held)):
        assert equal(other.to_dict(), model.state_dict())
        assert other.nbytes == held.nbytes
        assert other._metadata == held._metadata
        other.update({"norm.bias": torch.ones(20)})
        assert equal(held["norm.bias"], model.norm.bias.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    model = Tied().cuda()
    held = CompressedStateDict(model.state_dict())
    assert held["embed.weight"].device.type == "cpu"
    step(model)
    held.update(model.state_dict())
    state = held.to_dict("cuda")
    assert shares(state["embed.weight"], state["head.weight"])
    assert all(
        torch.equal(state[name], tensor) for name, tensor in model.state_dict().items() if name != "_extra_state"
    )
    fresh = Tied(1).cuda()
    fresh.load_state_dict(held)  # type: ignore[arg-type]
    assert torch.equal(fresh.embed.weight, model.embed.weight)
