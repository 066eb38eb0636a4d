"""tricomp_torch.integers.plan: the nodes found, their effect on the outputs, the budget kept, the model untouched."""

import collections
import dataclasses
import logging
import math
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch
import torch.nn.functional as F
from torch import nn
from tricomp_torch import integers
from tricomp_torch.integers import Budget, Fold, Plan
from tricomp_torch.integers.choice import Unit, choose, nodes_on, usage
from tricomp_torch.integers.effect import Examples
from tricomp_torch.integers.eighth import with_eighth_bits
from tricomp_torch.integers.examples import batches_of
from tricomp_torch.integers.forms import OutputFirstConvTranspose, input_first, output_first
from tricomp_torch.integers.ladders import options, units_of
from tricomp_torch.integers.nodes import Effect, NodePlan
from tricomp_torch.integers.trials import Trials

from tests import integer_models as models
from tricomp.errors import BudgetError, InvalidArgument

make_plan: Any = integers.plan
prepare: Any = integers.prepare


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits_model():
    return models.trained_digits()


@pytest.fixture(scope="module")
def images():
    return [batch.contiguous() for batch in models.digits()[0][1100:1500].split(131)]


@pytest.fixture(scope="module")
def digits_plan(digits_model, images):
    with untouched(digits_model):
        return make_plan(digits_model, images, budget=Budget(top1=0.98, max_error=0.05))


@pytest.fixture(scope="module")
def text_model():
    return models.trained_text()


@pytest.fixture(scope="module")
def tokens():
    return models.text_batches(3, seed=7)


@pytest.fixture(scope="module")
def text_plan(text_model, tokens):
    with untouched(text_model):
        return make_plan(text_model, tokens, bits="auto", budget=Budget(top1=0.97, cosine=0.99))


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def facts(model):
    """Everything of a model that planning could disturb: bytes, objects, modes, hooks, and torch's random state."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(name, id(tensor), tensor.requires_grad, raw(tensor)) for name, tensor in tensors],
        [
            (name, id(module), type(module), module.training, dict(module._forward_hooks), set(vars(module)))
            for name, module in model.named_modules(remove_duplicate=False)
        ],
        raw(torch.get_rng_state()),
        torch.backends.mha.get_fastpath_enabled(),
    )


@contextmanager
def untouched(model):
    before = facts(model)
    yield
    assert facts(model) == before


@contextmanager
def in_eval(model):
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was)


def same_predictions(model, plan, *inputs):
    with in_eval(model):
        wanted = model(*inputs)
    got = prepare(model, plan)(*inputs)
    if isinstance(wanted, dict):
        wanted, got = list(wanted.values()), list(got.values())
    wanted, got = (wanted, got) if isinstance(wanted, (tuple, list)) else ((wanted,), (got,))
    for a, b in zip(wanted, got, strict=True):
        scale = float(a.abs().max())
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-6 * max(scale, 1))


# The preset form


def test_norms_are_folded_where_they_are_the_only_user(digits_plan):
    assert digits_plan.trace == "export"
    assert set(digits_plan.folds) == {
        Fold("stem.0", "stem.1"),
        Fold("block.wide", "block.wide_norm"),
        Fold("up", "up_norm"),
        Fold("hidden", "hidden_norm"),
    }
    assert digits_plan.turns == ("up",)


def test_prepared_model_predicts_the_same(digits_model, digits_plan, images):
    with untouched(digits_model):
        same_predictions(digits_model, digits_plan, images[0])
        prepared = prepare(digits_model, digits_plan)
    assert not prepared.training
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert isinstance(prepared.stem[1], nn.Identity)
    assert isinstance(prepared.block.deep_norm, nn.BatchNorm2d)
    assert prepared.hidden.bias.shape == (64,)
    held = {raw(parameter) for parameter in digits_model.parameters()}
    addresses = {parameter.data_ptr() for parameter in digits_model.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in prepared.parameters()}
    assert raw(prepared.head.weight) in held


@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_convolutions_are_turned(groups):
    torch.manual_seed(groups)
    layers: list[Any] = [
        (nn.ConvTranspose1d(6, 9, 4, stride=3, padding=1, groups=groups, bias=False), (2, 6, 7)),
        (nn.ConvTranspose2d(6, 9, (3, 2), stride=(2, 1), output_padding=(1, 0), dilation=2, groups=groups), (6, 5, 4)),
    ]
    for layer, shape in layers:
        turned = OutputFirstConvTranspose(layer)
        x = torch.randn(shape)
        assert turned.weight.shape[:2] == (9, 6 // groups)
        assert torch.equal(input_first(output_first(layer.weight, groups), groups), layer.weight)
        torch.testing.assert_close(turned(x), layer(x))
        if x.ndim == 3 and layer.weight.ndim == 3:
            size = [layer(x).shape[-1] + 1]
            torch.testing.assert_close(turned(x, output_size=size), layer(x, output_size=size))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("has_norm", [False, True])
def test_padding_in_transformers(has_norm):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16) if has_norm else None)
    x = torch.randn(4, 7, 16)
    at_end, between = (torch.zeros(4, 7, dtype=torch.bool) for _ in range(2))
    at_end[0, 4:] = at_end[2, 1:] = True
    between[1, 2] = True
    plan = make_plan(model, {"src": x, "src_key_padding_mask": at_end})
    assert plan.measured.cosine > 0.999
    prepared: Any = prepare(model, plan)
    with in_eval(model):
        for mask in (at_end, between, at_end | between, at_end.float().masked_fill(at_end, -math.inf), None):
            wanted = model(x, src_key_padding_mask=mask)
            torch.testing.assert_close(prepared(x, src_key_padding_mask=mask), wanted, rtol=1e-4, atol=1e-5)
        if not has_norm:
            assert not model(x, src_key_padding_mask=at_end)[0, 4:].any()
        causal = nn.Transformer.generate_square_subsequent_mask(7)
        wanted = model(x, mask=causal, is_causal=True)
        torch.testing.assert_close(prepared(x, mask=causal, is_causal=True), wanted, rtol=1e-4, atol=1e-5)


def test_norms_are_left_where_a_layer_has_several_users_or_several_norms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.again, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.tall = nn.Linear(5, 4)  # [n, channels, 4] follows: the norm scales another axis
            self.tall_norm = nn.BatchNorm1d(4)
            self.seen, self.seen_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.seen_norm.register_forward_hook(lambda module, args, output: None)

        def forward(self, x):
            x = self.b(self.shared(self.a(self.shared(x))))
            x = self.norm(self.again(self.norm(self.again(x))))
            x = self.seen_norm(self.seen(x))
            return self.tall_norm(self.tall(x).flatten(2)[:, :, :4].contiguous() + self.tall(x)[:, :, 0])

    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4, 4, 5)
    for _ in range(4):
        net(torch.randn(5, 4, 4, 5))
    plan = make_plan(net, x)
    # "again" runs twice, each time with the same norm behind it, so it can be folded.
    assert plan.folds == (Fold("again", "norm"),)
    same_predictions(net, plan, x)
    assert plan["seen"].place == "module"


@pytest.mark.parametrize("norm", ["weight_norm", "parametrized", "spectral_norm", "parametrized spectral"])
def test_parametrizations_become_plain_weights(norm):
    parametrizations = torch.nn.utils.parametrizations
    apply: Any = {
        "weight_norm": torch.nn.utils.weight_norm,
        "parametrized": parametrizations.weight_norm,
        "spectral_norm": torch.nn.utils.spectral_norm,
        "parametrized spectral": parametrizations.spectral_norm,
    }[norm]
    torch.manual_seed(0)
    with pytest.warns(FutureWarning) if norm == "weight_norm" else _nothing():
        model = nn.Sequential(apply(nn.Conv1d(3, 6, 3)), nn.ReLU(), nn.Flatten(), apply(nn.Linear(30, 5)))
    x = torch.randn(4, 3, 7)
    model(x)  # weights are computed tensors now, which cannot be copied
    with untouched(model):
        plan = make_plan(model, x)
        same_predictions(model, plan, x)
    assert [node.tensors for node in plan.integer_nodes] == [("0.weight",), ("3.weight",)]


@contextmanager
def _nothing():
    yield


# The nodes


def test_nodes_of_a_transformer(text_model, text_plan, tokens):
    kinds = {node.name: node.kind for node in text_plan.nodes}
    assert kinds == {
        "embedding": "embedding",
        "layer.self_attn": "attention",
        "layer.linear1": "linear",
        "layer.linear2": "linear",
        "twice": "linear",
        "head": "linear",
        "attention.inward": "parameter",
        "attention.outward": "parameter",
    }
    head, embedding = text_plan["head"], text_plan["embedding"]
    assert (head.tied, head.float_bytes, head.integer_bytes) == ("embedding", 0, 0)
    assert (head.bits, head.group) == (embedding.bits, embedding.group)
    assert head.place == embedding.place == "module"
    assert text_plan["attention.outward"].turned == ("attention.outward",)
    assert text_plan["attention.inward"].turned == ()
    assert text_plan["layer.self_attn"].tensors == ("layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight")
    same_predictions(text_model, text_plan, tokens[0])
    prepared = prepare(text_model, text_plan)
    assert prepared.head.weight is prepared.embedding.weight
    n_bytes = sum(parameter.nbytes for parameter in prepared.parameters())
    assert text_plan.float_bytes == n_bytes


def test_a_weight_that_others_read_stays_where_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.gate, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.out.weight = self.gate.weight
            self.codebook = nn.Parameter(torch.randn(40, 16))
            self.loose = nn.Parameter(torch.randn(16, 16))

        def forward(self, tokens):
            x = self.out(torch.relu(self.gate(self.embedding(tokens))))
            nearest = F.embedding(tokens, self.codebook) + x @ (self.loose * 2)
            return (x + nearest) @ self.embedding.weight.T + self.gate.weight.norm()

    torch.manual_seed(0)
    net, tokens = Net(), torch.randint(0, 40, (3, 5))
    plan = make_plan(net, (tokens,))
    assert {node.name: (node.place, node.tied) for node in plan.nodes} == {
        "embedding": ("parameter", None),
        "gate": ("parameter", None),
        "out": ("parameter", "gate"),
        "codebook": ("parameter", None),
    }  # "loose" is changed before it is used
    same_predictions(net, plan, tokens)
    symbolic = make_plan(net)
    assert symbolic.trace == "symbolic"
    assert [node.name for node in symbolic.nodes] == [node.name for node in plan.nodes]
    assert [node.place for node in symbolic.nodes] == [node.place for node in plan.nodes]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_and_control_flow_that_depends_on_data(caplog, capfd):
    model, x = models.trained_series(), models.waves(9)
    with caplog.at_level(logging.WARNING, "tricomp"), untouched(model):
        plan = make_plan(model, x)
    assert capfd.readouterr().err == ""  # where torch would print its graph
    assert plan.trace == "modules"
    assert "torch.export" in plan.note
    assert "could not be traced" in caplog.text
    assert plan.folds == ()
    assert [node.name for node in plan.nodes] == ["conv", "lstm", "gru", "calm", "wild"]
    assert len(plan["lstm"].tensors) == 2 * 2 * 3  # layers, directions; of input, state, projection
    assert plan["lstm"].error > plan["wild"].error == 0.0  # this data never gets there
    assert plan.measured.cosine > 0.999
    same_predictions(model, plan, x)


def test_a_weight_that_is_read_where_no_trace_shows_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = self.outer(x).tanh()
            return x @ self.inner.weight if x.sum() > 0 else self.inner(x)

    torch.manual_seed(0)
    net, batches = Net(), [torch.ones(3, 32), -torch.ones(2, 32)]
    plan = make_plan(net, batches)
    assert plan.trace == "modules"
    assert {node.name: (node.place, node.form) for node in plan.nodes} == {
        "inner": ("parameter", "read on access"),
        "outer": ("module", "as it is"),
    }
    assert plan["inner"].error > 0
    with in_eval(net):
        converted: Any = integers.convert(net, plan)
        for batch in batches:
            torch.testing.assert_close(converted(batch), net(batch), rtol=0.02, atol=0.02)


def test_layers_that_run_something_else_are_no_nodes():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Named(nn.Linear):
        pass

    model = nn.Sequential(Scaled(8, 40), Named(40, 40), nn.Embedding(3, 16, max_norm=1.0), nn.Linear(1, 1))
    plan = make_plan(model)
    assert [node.name for node in plan.integer_nodes] == ["0.weight", "1"]
    assert plan["0.weight"].kind == "parameter"
    assert "max_norm" in plan["2"].reason
    assert "no less" in plan["3"].reason


def test_hooks_run_on():
    seen = []
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].register_forward_hook(lambda module, args, output: seen.append(module.weight.shape))
    plan = make_plan(model, torch.randn(5, 16))
    assert (plan["0"].place, plan["2"].place) == ("parameter", "module")
    seen.clear()
    prepare(model, plan)(torch.randn(2, 16))
    assert seen == [(16, 16)]


def test_a_module_at_two_paths_is_one_node():
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    plan = make_plan(model, torch.randn(5, 16))
    assert [(node.name, node.aliases) for node in plan.nodes] == [("0", ("2",))]
    prepared = prepare(model, plan)
    assert prepared[0] is prepared[2]


def test_a_model_that_is_one_layer():
    for layer, shape in [(nn.Linear(40, 8), (3, 40)), (nn.ConvTranspose1d(16, 8, 3), (2, 16, 5))]:
        plan = make_plan(layer, torch.randn(shape))
        assert [node.name for node in plan.integer_nodes] == [""]
        same_predictions(layer, plan, torch.randn(shape))
        assert "(model)" in str(plan)


def test_transposed_linear_layers_of_transformers():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(40, 16), nn.GELU(), Conv1D(16, 40))
    x = torch.randn(2, 5, 16)
    plan = make_plan(model, x)
    assert plan.turns == ("0", "2")
    assert [(node.kind, node.form) for node in plan.nodes] == [("linear", "output channel first")] * 2
    same_predictions(model, plan, x)
    assert prepare(model, plan)[0].weight.shape == (40, 16)


# Effects and the budget


def independent_effect(model, plan, batches):
    """max error and top-1 agreement of what `convert` makes, by other code than the package's."""
    with in_eval(model):
        wanted = torch.cat([model(batch) for batch in batches])
        converted: Any = integers.convert(model, plan)
        got = torch.cat([converted(batch) for batch in batches])
    error = (got - wanted).abs().max() / (wanted.max() - wanted.min())
    return float(error), float((got.argmax(1) == wanted.argmax(1)).float().mean())


def test_the_budget_holds_for_all_nodes_together(digits_model, digits_plan, images):
    measured, nodes = digits_plan.measured, digits_plan.integer_nodes
    assert measured.max_error <= 0.05
    assert measured.top1 >= 0.98
    assert len(nodes) == len(digits_plan.nodes) == 7
    error, top1 = independent_effect(digits_model, digits_plan, images)
    assert error == pytest.approx(measured.max_error, rel=1e-3)
    assert top1 == pytest.approx(measured.top1)
    others = tuple(node if node.name == "hidden" else node.in_float("") for node in nodes)
    alone, _ = independent_effect(digits_model, dataclasses.replace(digits_plan, nodes=others), images)
    assert alone == pytest.approx(digits_plan["hidden"].error, rel=1e-3)


def test_a_tight_budget_keeps_nodes_in_float(digits_model, digits_plan, images):
    loose = digits_plan.measured.max_error
    plan = make_plan(digits_model, images, budget=Budget(max_error=loose / 3))
    assert plan.measured.max_error <= loose / 3
    assert plan.integer_bytes > digits_plan.integer_bytes or any(
        a.activations != b.activations for a, b in zip(plan.nodes, digits_plan.nodes)
    )
    left = [node for node in plan.nodes if not node.is_integer]
    assert all(node.reason == "the budget" for node in left)
    assert independent_effect(digits_model, plan, images)[0] <= loose / 3 * 1.001


def test_auto_mixes_4_and_8_bits(text_plan, text_model, tokens):
    assert text_plan.measured.top1 >= 0.97
    assert text_plan.measured.cosine >= 0.99
    four = make_plan(text_model, tokens, bits=4, group=32)
    eight = make_plan(text_model, tokens, bits=8)
    assert four.integer_bytes <= text_plan.integer_bytes <= eight.integer_bytes
    assert 4 in {node.bits for node in text_plan.nodes}
    assert {node.bits for node in four.nodes} == {4}
    assert {node.activations for node in eight.nodes if node.kind == "linear" and not node.tied} == {"dynamic"}
    assert four.measured.cosine < eight.measured.cosine


def test_int8_takes_7_bits_and_8_where_an_error_is_out_of_proportion(digits_model, images):
    plans = {bits: make_plan(digits_model, images[:1], bits=bits) for bits in ("int8", 7, 8)}
    found = {node.name: node.bits for node in plans["int8"].nodes}
    assert set(found.values()) == {7, 8}
    assert found["stem.0"] == found["head"] == 8
    assert found["hidden"] == 7  # it has most of the bytes
    losses = {bits: 1 - plan.measured.cosine for bits, plan in plans.items()}
    assert losses[8] < losses["int8"] < losses[7]
    assert losses["int8"] - losses[8] < (losses[7] - losses[8]) / 2
    assert all(node.activations == "dynamic" for node in plans["int8"].nodes if node.kind == "linear")
    text = str(plans["int8"])
    assert "int8 (7 bits) x int8" in text
    alone = make_plan(digits_model)
    assert {"stem.0", "head"} <= {node.name for node in alone.nodes if node.bits == 8}
    assert alone["hidden"].bits == 7
    tight = make_plan(digits_model, images[:1], budget=Budget(cosine=1 - 1.5 * losses[8]))
    assert tight.measured.cosine >= 1 - 1.5 * losses[8]
    assert {node.name for node in tight.nodes if node.bits == 8} > {"stem.0", "head"}


def test_weights_of_which_few_are_large_keep_8_bits():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    with torch.no_grad():
        model[2].weight[:, 3] *= 30
    for inputs in (None, torch.randn(64, 256)):
        plan = make_plan(model, inputs)
        assert [(node.bits, node.weight_error > 0.02) for node in plan.nodes] == [(7, False), (8, True)]
        assert {node.bits for node in make_plan(model, inputs, bits=7).nodes} == {7}
    assert {node.bits for node in make_plan(model, budget=Budget(weight_error=0.1)).nodes} == {7}


def test_the_eighth_bit_is_judged_by_error_for_each_byte():
    def unit(name, at7, n_bytes, weight_error=0.015):
        forms: list[Any] = [(7, 1 - at7), (8, None)]
        nodes = [
            NodePlan(name, "linear", bits, None, (name,), "", 0.0, cosine, 4 * n_bytes, n_bytes)
            for bits, cosine in forms
        ]
        nodes = [dataclasses.replace(node, weight_error=weight_error) for node in nodes]
        return Unit((*((node,) for node in nodes), (nodes[0].in_float(""),)))

    def measured(units, rungs):
        made = list(units)
        for i, (rung,) in rungs.items():
            name = units[i].rungs[0][0].name
            asked.append(name)
            nodes = tuple(dataclasses.replace(node, cosine=1 - at8[name]) for node in units[i].rungs[rung])
            made[i] = Unit((*units[i].rungs[:rung], nodes, *units[i].rungs[rung + 1 :]))
        return made

    asked: list[str] = []
    at8 = {"small": 1e-4, "inputs": 3.99e-4}
    units = [
        unit("small", 4e-4, 1000),
        unit("inputs", 4e-4, 1000),
        unit("large", 4e-4, 1_000_000),
        unit("tail", 1e-6, 1_000_000, weight_error=0.03),
    ]
    found = with_eighth_bits(units, measured, None)
    assert [unit.rungs[0][0].bits for unit in found] == [8, 7, 7, 8]
    assert asked == ["small", "inputs"]
    assert [unit.rungs[0][0].bits for unit in with_eighth_bits(units, measured, 0.05)] == [8, 7, 7, 7]
    blind = with_eighth_bits(units, None, None)
    assert [unit.rungs[0][0].bits for unit in blind] == [8, 8, 7, 8]
    only = [unit("one", 1.0, 1000)]
    assert with_eighth_bits(only, measured, None) == only


def test_what_a_form_costs():
    model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(64, 64))
    nodes = make_plan(model).nodes
    units = units_of(nodes, options("int8", None, "auto", has_examples=True), Trials(prepare(model, make_plan(model))))
    forms = [[(unit.rungs[i][0].bits, unit.rungs[i][0].activations) for i in range(len(unit.rungs))] for unit in units]
    assert forms[0] == [(7, "dynamic"), (8, "dynamic"), (7, "float"), (8, "float"), (None, "float")]
    assert forms[1] == [(7, "float"), (8, "float"), (None, "float")]
    for unit in units:
        costs = [unit.cost(i) for i in range(len(unit.rungs))]
        assert costs == sorted(set(costs))
    assert units[0].n_bytes(0) == units[0].n_bytes(2) == units[0].n_bytes(1) * 7 / 8


def test_bytes_are_those_of_codes_and_scales(text_model, tokens):
    from tricomp_torch.tensors import to_array

    from tricomp.integers import quantize

    for bits in (8, 4):
        plan = make_plan(text_model, tokens[:1], bits=bits, group=48, activations="float")
        for node in plan.nodes:
            n_bytes = 0
            for name in node.tensors if not node.tied else ():
                array = to_array(text_model.get_parameter(name), name)
                array = array.T if name in node.turned else array
                made = quantize(array, node.bits, group=node.group, scale_dtype=node.scale_dtype)
                n_bytes += made.nbytes
            assert n_bytes == node.integer_bytes, node.name


def test_a_budget_that_nothing_keeps(digits_model, images):
    with pytest.raises(BudgetError) as caught, untouched(digits_model):
        make_plan(digits_model, images[:1], budget=Budget(max_error=1e-8), activations="float")
    text = str(caught.value)
    assert "allows no node" in text
    assert "stem.0: int8, largest error" in text
    assert "all of them together: largest error" in text
    with pytest.raises(BudgetError, match="at .*% of their float bytes"):
        make_plan(digits_model, images[:1], budget=Budget(max_error=0.01, size=0.1))
    with pytest.raises(BudgetError, match="weight_error=0.0"):
        make_plan(digits_model, budget=Budget(weight_error=1e-5))


def test_weights_alone_need_no_data(digits_model):
    with untouched(digits_model):
        plan = make_plan(digits_model, bits="auto", budget=Budget(weight_error=0.05))
    assert plan.trace == "symbolic"
    assert plan.measured is None
    assert Fold("stem.0", "stem.1") in plan.folds
    assert Fold("hidden", "hidden_norm") not in plan.folds  # the number of axes is not known
    assert all(node.error == node.weight_error <= 0.05 for node in plan.integer_nodes)
    assert {node.activations for node in plan.nodes} == {"float"}
    same_predictions(digits_model, plan, torch.rand(5, 1, 8, 8))
    assert make_plan(digits_model, activations="dynamic")["head"].activations == "dynamic"


def test_selection(digits_model, images):
    plan = make_plan(digits_model, images[0][:9], select=["block.*", "head"])
    assert [node.name for node in plan.integer_nodes] == ["block.wide", "block.deep", "head"]
    assert plan["hidden"].reason == "not selected"
    plan = make_plan(digits_model, select=lambda name, module: isinstance(module, nn.Linear))
    assert [node.name for node in plan.integer_nodes] == ["hidden", "head"]
    for nothing in ("blocks.*", ["head", "nothing"], lambda name, module: False):
        with pytest.raises(InvalidArgument, match=r"select: .*'stem.0', 'block.wide'"):
            make_plan(digits_model, select=nothing)


def test_weights_come_back_bit_for_bit(text_model, text_plan, tokens):
    prepared = prepare(text_model, text_plan)
    trials: Any = Trials(prepared)
    for nodes in (text_plan.nodes, [text_plan["head"], text_plan["embedding"]]):
        with untouched(prepared):
            with trials.applied(nodes) as model:
                assert model.head.weight.codes.dtype == torch.int8
                assert model.head.weight is model.embedding.weight
            with pytest.raises(ZeroDivisionError), trials.applied(nodes):
                raise ZeroDivisionError


@dataclasses.dataclass
class Answer:
    loss: torch.Tensor | None
    logits: torch.Tensor
    ids: torch.Tensor


class Output(collections.OrderedDict):
    """As transformers' outputs are."""


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass", "ordered", "infinite"])
def test_outputs_of_any_form(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(32, 8)

        def forward(self, x, scale=1.0, mask=None):
            y = self.layer(x) * scale
            noise = torch.rand(())  # would differ from run to run
            masked = y.masked_fill(mask, -math.inf) if mask is not None else y
            ids = y.argmax(-1)
            return {
                "tensor": y,
                "tuple": (ids, [y, noise * y]),
                "dict": {"features": x, "logits": y, "ids": ids},
                "dataclass": Answer(None, y, ids),
                "ordered": Output(hidden=(x,), logits=y),
                "infinite": masked,
            }[kind]

    x, mask = torch.randn(7, 3, 32), torch.rand(7, 3, 8) > 0.8
    plan = make_plan(Net(), [{"x": x, "mask": mask}, (x, 2.0, mask)], budget=Budget(top1=0.9, max_error=0.1))
    assert 0 < plan.measured.max_error < 0.05
    assert 0.9 <= plan.measured.top1 <= 1.0
    assert 0.999 < plan.measured.cosine < 1.0


def test_effects_of_unlike_outputs():
    class Fixed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return self.value

    wanted = torch.tensor([[1.0, 2.0], [4.0, -math.inf]])
    examples = Examples(Fixed(wanted), batches_of(torch.ones(1)), Budget())
    assert examples.effect(Fixed(wanted)) == Effect(0.0, 1.0, 1.0)
    other = examples.effect(Fixed(torch.tensor([[2.0, 1.4], [4.0, -math.inf]])))
    assert other.max_error == pytest.approx(1 / 3)
    assert other.top1 == 0.5
    assert examples.effect(Fixed(torch.full((2, 2), 4.0))).max_error == math.inf
    assert examples.effect(Fixed(torch.full((2, 2), math.nan))).cosine == -1.0
    assert examples.effect(Fixed(torch.ones(3, 2))).max_error == math.inf
    assert usage(other, Budget(max_error=0.5)) == pytest.approx(2 / 3)
    assert usage(other, Budget(top1=0.5)) == 1.0
    assert usage(other, Budget(top1=1.0)) == math.inf
    assert usage(other, Budget()) == 0.0


def _unit(name, losses, n_bytes):
    nodes = [
        NodePlan(name, "linear", 8 if loss else None, None, (name,), "", loss, 1 - loss, 100, size)
        for loss, size in zip(losses, n_bytes, strict=True)
    ]
    return Unit(tuple((node,) for node in nodes))


def test_the_choice_is_the_smallest_that_holds():
    sizes = [(25, 50, 100), (250, 500, 1000), (10, 20, 40), (30, 60, 120)]
    losses = [(0.3, 0.01, 0), (0.2, 0.05, 0), (0.001, 0.0005, 0), (0.5, 0.4, 0)]
    units = [_unit(f"n{i}", loss, size) for i, (loss, size) in enumerate(zip(losses, sizes))]
    n_calls = 0

    def measure(nodes):
        nonlocal n_calls
        n_calls += 1
        return Effect(sum(node.error for node in nodes), 1.0, None)

    best = {}
    for limit in (0.001, 0.02, 0.1, 0.3, 0.6, 2.0):
        n_calls = 0
        found = choose(units, Budget(max_error=limit), measure)
        assert found.effect.max_error <= limit
        assert n_calls <= 20
        best[limit] = sum(node.integer_bytes for node in nodes_on(units, found.rungs))
    assert best[2.0] == sum(size[0] for size in sizes)
    assert list(best.values()) == sorted(best.values(), reverse=True)
    assert best[0.3] == 50 + 250 + 10 + 120  # the fourth costs much and weighs little, the first is better at 8 bits


# What a plan is


def test_plans_are_plain_data(text_plan, digits_plan):
    for plan in (text_plan, digits_plan):
        assert Plan.from_bytes(plan.to_bytes()) == plan
        assert Plan.from_dict(msgpack.unpackb(msgpack.packb(plan.to_dict()))) == plan
    state = digits_plan.to_dict()
    damaged: list[Any] = [
        {},
        {**state, "version": 99},
        {**state, "nodes": [{"name": 1, "pickle": 2}]},
        {**state, "nodes": 3},
        {**state, "folds": [{"layer": "a"}]},
        {**state, "surprise": 1},
        {**state, "nodes": [{**state["nodes"][0], "bits": 3}]},
        {**state, "nodes": [{**state["nodes"][0], "bits": "8"}]},
        {**state, "nodes": [{**state["nodes"][0], "name": 3}]},
        {**state, "nodes": [{**state["nodes"][0], "tensors": "stem"}]},
        {**state, "nodes": [{**state["nodes"][0], "integer_bytes": True}]},
        {**state, "trace": None},
        {**state, "shapes": {"stem": [1, None]}},
        {key: value for key, value in state.items() if key != "nodes"},
        [],
    ]
    for bad in damaged:
        with pytest.raises(InvalidArgument, match="plan"):
            Plan.from_dict(bad)
    for data in (b"", b"\xc1", digits_plan.to_bytes()[:-9], msgpack.packb(5)):
        with pytest.raises(InvalidArgument, match="plan"):
            Plan.from_bytes(data)


def test_the_report_tells_each_node(digits_plan, text_plan):
    text = integers.report(digits_plan)
    assert text == str(digits_plan)
    lines = text.splitlines()
    assert lines[0].split() == ["node", "kind", "form", "type", "error", "cosine", "bytes"]
    assert [line.split()[0] for line in lines[2 : 2 + len(digits_plan.nodes)]] == [n.name for n in digits_plan.nodes]
    assert "output channel first, batch norm folded" in text
    assert "7 of 7 nodes in integers" in text
    assert "traced by torch.export; 4 batch norms folded" in text
    assert "top-1 agreement at least 98.00%" in text
    assert "shared with embedding" in str(text_plan)
    assert max(map(len, lines)) <= 170


def test_a_plan_fits_its_model_only(digits_model, digits_plan, text_model):
    with pytest.raises(InvalidArgument, match="plan was made for another model"):
        prepare(text_model, digits_plan)
    with pytest.raises(InvalidArgument, match=r"'stem.0.weight' is of shape \[24, 1, 3, 3\] there and \[8, 1, 3, 3\]"):
        prepare(models.Digits(8), digits_plan)
    for change in (
        {"folds": (Fold("stem.2", "stem.1"),)},
        {"folds": (Fold("stem.0", "nowhere"),)},
        {"folds": (Fold("stem.0", "head"),)},
        {"folds": (Fold("stem.0", "hidden_norm"),)},
        {"turns": ("stem.1",)},
        {"turns": ("up.weight",)},
    ):
        with pytest.raises(InvalidArgument, match="Plan this model|without one"):
            prepare(digits_model, dataclasses.replace(digits_plan, **change))
    with pytest.raises(InvalidArgument, match="no node 'nowhere'"):
        digits_plan["nowhere"]


# Bad input


def test_weights_that_are_not_finite():
    model: Any = models.Digits()
    with torch.no_grad():
        model.block.deep.weight[3:5, 0, 1] = math.nan
        model.up_norm.running_var[2] = math.inf
    with pytest.raises(InvalidArgument, match=r"'block.deep.weight' \(6 of 216\), 'up_norm.running_var' \(1 of 16\)"):
        make_plan(model)


def test_inputs_the_model_does_not_take(digits_model):
    for inputs, text in [
        (torch.rand(5, 3, 8, 8), r"batch 0: the model raised RuntimeError: .*float32\[5, 3, 8, 8\] on cpu"),
        (
            [torch.rand(5, 1, 8, 8), (torch.rand(2), 3)],
            r"batch 1: the model raised TypeError: .*float32\[2\] on cpu, 3",
        ),
        ({"y": torch.rand(5, 1, 8, 8)}, "batch 0: .*y=float32"),
        ([], "empty list"),
        ("images", "got str"),
        ([3], r"example_inputs\[0\]: expected a tensor, .*got int"),
        (iter([torch.rand(5, 1, 8, 8)]), "list of a few batches"),
    ]:
        with pytest.raises(InvalidArgument, match=text), untouched(digits_model):
            make_plan(digits_model, inputs)
    ids = nn.Sequential(nn.Linear(4, 3), _Ids())
    with pytest.raises(InvalidArgument, match=r"the model returned int64\[2\].*no floating-point tensor"):
        make_plan(ids, torch.rand(2, 4))
    with pytest.raises(InvalidArgument, match="budget.top1: no output has two or more axes"):
        make_plan(nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), torch.rand(2, 4), budget=Budget(top1=0.9))


class _Ids(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


def test_models_that_cannot_be_planned():
    class Held(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.lines: Any = (line for line in "")

    for model, text in [
        (nn.Linear(3, 3, device="meta"), "'weight' is on the meta device"),
        (nn.LazyLinear(3), "'weight' has no shape yet"),
        (nn.Sequential(nn.ReLU()), "no node of this Sequential"),
        (Held(), "the Held cannot be copied: TypeError"),
        (torch.jit.trace(nn.Linear(3, 3), torch.rand(2, 3)), "scripted"),
        (nn.DataParallel(nn.Linear(3, 3)), r"Give model.module"),
        (torch.compile(nn.Linear(3, 3)), r"Give model._orig_mod"),
        ({"weight": torch.rand(3, 3)}, "expected a torch.nn.Module, got dict"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            make_plan(model)


def test_weights_that_are_integers_already():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantization.quantize_(model[0], quantization.Int8WeightOnlyConfig())
    plan = make_plan(model, torch.rand(3, 64))
    assert [node.name for node in plan.integer_nodes] == ["2"]
    assert plan["0"].reason.endswith("already")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 3}, 'bits: expected "int8", "auto", 8, 4'),
        ({"bits": "int7"}, "bits: expected"),
        ({"group": 30}, "group: expected a multiple of 16"),
        ({"activations": "int8"}, "activations: expected"),
        ({"budget": 0.99}, "budget: expected a Budget, got float"),
        ({"budget": Budget(cosine=1.5)}, "budget.cosine: expected a number from -1 to 1"),
        ({"budget": Budget(top1=99.5)}, "budget.top1"),
        ({"budget": Budget(top1="0.9")}, "budget.top1: expected a number from 0 to 1, got '0.9'"),  # type: ignore[arg-type]
        ({"budget": Budget(max_error=-1.0)}, "of at least 0"),
        ({"budget": Budget(max_error=math.nan)}, "budget.max_error"),
        ({"budget": Budget(top1=0.9)}, "without example_inputs"),
        ({"bits": "auto"}, "needs a budget"),
        ({"select": [3]}, "select: expected patterns"),
        ({"select": 3}, "select: expected patterns"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(InvalidArgument, match=text):
        make_plan(nn.Linear(64, 64), **options)
