"""Files of converted models: what is loaded predicts the same bits, by the graph or in the model, without floats."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from tricomp_torch import integers  # noqa: E402
from tricomp_torch.integers import files  # noqa: E402
from tricomp_torch.integers.weights import IntegerWeight  # noqa: E402

import tricomp  # noqa: E402
from tests.test_integer_program import Pictures, Tagger  # noqa: E402
from tricomp import bounds  # noqa: E402
from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedVersion  # noqa: E402
from tricomp.integers import Quantized, dequantize  # noqa: E402
from tricomp.integers import load_file as load_core  # noqa: E402


class Turned(nn.Module):
    """Weights [in, out], a transposed convolution, and a buffer that state dicts leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(20, 48) * torch.linspace(0.1, 1, 48))
        self.up = nn.ConvTranspose1d(4, 6, 3, stride=2)
        self.register_buffer("shift", torch.randn(48), persistent=False)

    def forward(self, x):
        y = x @ self.turned + self.get_buffer("shift")
        return self.up(y.reshape(x.shape[0], 4, 12))


def learnt(model):
    """Weights with structure: rows of different scale, as layers have."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            scale = torch.rand(len(parameter), *[1] * (parameter.dim() - 1)) + 0.2
            parameter.data = torch.distributions.Laplace(0.0, 0.1).sample(parameter.shape) * scale
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "tagger": (Tagger, lambda: torch.randint(0, 50, (3, 5)), {}),
    "pictures": (Pictures, lambda: torch.randn(2, 3, 9, 9), {"bits": 8}),
    "pictures int4": (Pictures, lambda: torch.randn(2, 3, 9, 9), {"bits": 4, "group": 16}),
    "turned": (Turned, lambda: torch.randn(4, 20), {}),
    "seven bits": (Tagger, lambda: torch.randint(0, 50, (3, 5)), {"bits": 7}),
    "layer": (lambda: nn.Linear(33, 7), lambda: torch.randn(2, 33), {"bits": 4}),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    make, inputs, options = MODELS[request.param]
    model = learnt(make())
    torch.manual_seed(6)
    x = inputs()
    converted = integers.convert(model, integers.plan(model, x, **options))
    path = tmp_path_factory.mktemp("integers") / "model.tri"
    report = integers.save_file(converted, path, x, {"made by": "a test"})
    return make, model, converted, x, path, report


def bits(value):
    return [leaf.numpy().tobytes() for leaf in torch.utils._pytree.tree_leaves(value)]


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def test_the_graph_predicts_the_same_bits_without_the_models_code(saved):
    _, _, converted, x, path, _ = saved
    loaded = integers.load_file(path)
    with torch.no_grad():
        assert bits(loaded(x)) == bits(converted(x))
        rows = torch.cat([x, x[:1]])  # another size of batch
        assert bits(loaded(rows)) == bits(converted(rows))
    assert loaded.integer_plan == converted.integer_plan
    assert not loaded.training
    assert tricomp.open(path).metadata["made by"] == "a test"


def test_a_model_on_the_meta_device_gets_integers_and_nothing_else(saved):
    make, _, converted, x, path, _ = saved
    with torch.device("meta"):
        empty = make()
    before = {name: id(tensor) for name, tensor in tensors_of(empty).items()}
    loaded = integers.load_file(path, empty)
    assert {name: id(tensor) for name, tensor in tensors_of(empty).items()} == before
    assert all(tensor.is_meta for tensor in tensors_of(empty).values())
    with torch.no_grad():
        assert bits(loaded(x)) == bits(converted(x))
    assert list(loaded.state_dict()) == list(converted.state_dict())
    integers_of = lambda model: [str(module) for module in model.modules() if isinstance(module, IntegerWeight)]  # noqa: E731
    assert integers_of(loaded) == integers_of(converted) != []


def test_no_floats_of_the_weights_are_held(saved):
    _, model, converted, _, path, _ = saved
    nodes = converted.integer_plan.integer_nodes
    planned = {name for node in nodes if node.tied is None for name in node.tensors}
    for loaded in (integers.load_file(path), integers.load_file(path, model)):
        named = dict(tensors_of(loaded))
        for name in planned:
            assert named[f"{name}.codes"].dtype in (torch.int8, torch.uint8)
            assert name not in named


def test_the_core_reads_the_weights_without_torch(saved):
    _, _, converted, _, path, _ = saved
    found = load_core(path)
    for name, module in converted.named_modules():
        if isinstance(module, IntegerWeight):
            quantized = found[name]
            assert isinstance(quantized, Quantized)
            assert quantized.bits == module.bits
            floats = torch.from_numpy(dequantize(quantized))
            floats = floats.t() if module.is_turned else floats
            assert floats.contiguous().numpy().tobytes() == module().contiguous().numpy().tobytes()


def test_what_was_tied_is_stored_once_and_tied_again(tmp_path):
    model = learnt(Tagger())
    x = torch.randint(0, 50, (3, 5))
    converted = integers.convert(model, integers.plan(model, x))
    integers.save_file(converted, tmp_path / "a.tri", x)
    assert (
        len([path for path in tricomp.open(tmp_path / "a.tri") if path.endswith("codes") and "lstm" not in path]) == 5
    )
    loaded = integers.load_file(tmp_path / "a.tri", Tagger())
    assert loaded.get_submodule("head.weight") is loaded.get_submodule("embedding.weight")


def test_a_model_that_cannot_be_traced_needs_its_code(tmp_path, caplog):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 8)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    model, x = learnt(Branches()), torch.randn(3, 40)
    with caplog.at_level(logging.WARNING, "tricomp"):
        converted = integers.convert(model, integers.plan(model, x))
        integers.save_file(converted, tmp_path / "a.tri", x)
    assert "saved without its graph" in caplog.text
    with pytest.raises(InvalidArgument, match="holds no graph"):
        integers.load_file(tmp_path / "a.tri")
    with torch.no_grad():
        assert bits(integers.load_file(tmp_path / "a.tri", Branches())(x)) == bits(converted(x))


def test_sizes_that_the_model_fixes_are_told(tmp_path, caplog):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 8)

        def forward(self, x):
            return self.layer(x).reshape(len(x), 2, 4)

    model, x = learnt(Fixed()), torch.randn(3, 40)
    with caplog.at_level(logging.WARNING, "tricomp"):
        integers.save_file(integers.convert(model, integers.plan(model, x)), tmp_path / "a.tri", x)
    assert "takes x of exactly 3 rows" in caplog.text
    with pytest.raises(InvalidArgument, match=r"expected float32 of shape \(3, 40\)"):
        integers.load_file(tmp_path / "a.tri")(torch.randn(4, 40))


class Speaker(nn.Module):
    """As language models are: further arguments by name, and outputs that hold a cache of a class of its own."""

    class Cache:
        pass

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)

    def forward(self, ids, **further):
        x = self.embedding(ids) * further.get("mask", torch.ones(1)).unsqueeze(-1)
        return {"logits": self.head(x.cumsum(1)), "cache": [Speaker.Cache(), x.sum()]}


def test_models_that_take_and_give_more_than_tensors(tmp_path, caplog):
    model = learnt(Speaker())
    given = {"ids": torch.randint(0, 50, (3, 7)), "mask": torch.ones(3, 7)}
    with caplog.at_level(logging.WARNING, "tricomp"):
        converted = integers.convert(model, integers.plan(model, given))
        integers.save_file(converted, tmp_path / "a.tri", given)
    assert [record.message for record in caplog.records] == [
        "the graph of Speaker gives None for its output['cache'][0], a Cache"
    ]
    loaded = integers.load_file(tmp_path / "a.tri")
    rows = {name: torch.cat([one, one]) for name, one in given.items()}
    with torch.no_grad():
        found, expected = loaded(**rows), converted(**rows)
    assert bits([found["logits"], found["cache"][1]]) == bits([expected["logits"], expected["cache"][1]])
    assert found["cache"][0] is None
    with torch.no_grad():
        assert isinstance(converted(**given)["cache"][0], Speaker.Cache), "the model is as it was"


def test_arguments_without_names_of_their_own(tmp_path):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 8)

        def forward(self, first, *rest):
            return sum((self.layer(one) for one in rest), self.layer(first))

    model, given = learnt(Sum()), (torch.randn(3, 40), torch.randn(3, 40), torch.randn(3, 40))
    converted = integers.convert(model, integers.plan(model, given))
    integers.save_file(converted, tmp_path / "a.tri", given)
    rows = [torch.cat([one, one]) for one in given]
    with torch.no_grad():
        assert bits(integers.load_file(tmp_path / "a.tri")(*rows)) == bits(converted(*rows))


def test_sizes_that_are_to_stay_open_can_be_asked_for(tmp_path):
    model, x = learnt(Speaker()), torch.randint(0, 50, (3, 7))
    converted = integers.convert(model, integers.plan(model, x))
    open_sizes = {"ids": {0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}}
    integers.save_file(converted, tmp_path / "a.tri", x, dynamic_shapes=open_sizes)
    longer = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        found = integers.load_file(tmp_path / "a.tri")(longer)
        assert bits(found["logits"]) == bits(converted(longer)["logits"])


def test_the_wrong_thing_is_refused_and_named(saved, tmp_path):
    _, model, converted, x, path, _ = saved
    with pytest.raises(InvalidArgument, match=r"expected a model from integers\.convert"):
        integers.save_file(model, tmp_path / "no.tri", x)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidArgument, match="plan was made for|another model|expected"):
        integers.load_file(path, nn.Linear(3, 4))
    tricomp.save(tmp_path / "other.tri", {"a": np.ones(3, np.float32)})
    with pytest.raises(InvalidArgument, match="holds no model"):
        integers.load_file(tmp_path / "other.tri")
    assert converted.integer_plan


def rewritten(path: Path, to: Path, change: Any) -> None:
    """The file again with something else told of its model."""
    with tricomp.open(path) as file:
        metadata = dict(file.metadata)
        told = bounds.unpack(bounds.inflate(metadata[files.KEY]["packed"], bounds.DEFAULTS, ""), "")
        note = {"version": 1, "told": told}
        change(note)
        packed = bounds.deflate(msgpack.packb(note.pop("told")))
        metadata[files.KEY] = {"packed": packed, **note}
        tricomp.save(to, tricomp.load(path), metadata=metadata)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda note: note.update(version=2), UnsupportedVersion),
        (lambda note: note.update(told=7), CorruptFile),
        (lambda note: note.update(packed=b"12345678"), tricomp.TricompError),
        (lambda note: note["told"].update(ties={"a": "nobody"}), CorruptFile),
        (lambda note: note["told"]["graph"].update(nodes=[["x", "tensor", "no.such"]]), CorruptFile),
        (lambda note: note["told"]["graph"]["nodes"].insert(0, ["x", "os.system.default", ["rm"], {}]), CorruptFile),
        (lambda note: note["told"]["plan"].update(nodes=[{}]), tricomp.TricompError),
    ],
)
def test_notes_that_somebody_changed_are_an_error(saved, tmp_path, change, error):
    rewritten(saved[4], tmp_path / "a.tri", change)
    with pytest.raises(error):
        assert integers.load_file(tmp_path / "a.tri").integer_plan


def test_a_cut_file_is_an_error(saved, tmp_path):
    data = saved[4].read_bytes()
    for at in range(0, len(data), max(len(data) // 12, 1)):
        (tmp_path / "cut.tri").write_bytes(data[:at])
        with pytest.raises(tricomp.TricompError):
            integers.load_file(tmp_path / "cut.tri")
