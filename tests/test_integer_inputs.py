"""Weights of 4 bits with inputs that become int8: what a plan chooses, and that it runs, is saved and traced alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tricomp_torch import integers
from tricomp_torch.integers import Budget


@pytest.fixture
def model():
    torch.manual_seed(11)
    made = nn.Sequential(nn.Linear(67, 130), nn.GELU(), nn.Linear(130, 96, bias=False), nn.Tanh(), nn.Linear(96, 5))
    return made.eval()


@pytest.fixture
def inputs():
    torch.manual_seed(12)
    rows = torch.randn(150, 67)
    rows[:, 3] *= 15
    return rows


def forms(plan):
    return {(node.bits, node.group, node.activations) for node in plan.nodes}


def test_inputs_become_int8_where_there_are_examples(model, inputs):
    given = (inputs,)
    assert forms(integers.plan(model, given, bits=4, group=32)) == {(4, 32, "dynamic")}
    assert forms(integers.plan(model, bits=4, group=32)) == {(4, 32, "float")}
    assert forms(integers.plan(model, bits=4, group=32, activations="dynamic")) == {(4, 32, "dynamic")}
    assert forms(integers.plan(model, given, bits=4, group=32, activations="float")) == {(4, 32, "float")}


def test_a_budget_that_such_inputs_break(model, inputs):
    inputs[:, 3] *= 40
    cosines = {}
    for activations in ("float", "dynamic"):
        plan = integers.plan(model, (inputs,), bits=4, group=32, activations=activations)
        assert plan.measured is not None
        cosines[activations] = plan.measured.cosine
    assert cosines["dynamic"] < cosines["float"]
    found = integers.plan(model, (inputs,), bits=4, group=32, budget=Budget(cosine=cosines["float"]))
    assert found.measured is not None
    assert found.measured.cosine >= cosines["float"]
    assert forms(found) != {(4, 32, "dynamic")}


def test_rows_one_by_one_and_all_at_once(model, inputs, tmp_path):
    plan = integers.plan(model, (inputs,), bits=4, group=32)
    made = integers.convert(model, plan)
    with torch.inference_mode():
        whole, wanted = made(inputs), model(inputs)
        some = torch.cat([made(part) for part in inputs.split([1, 2, 17, 64, 66])])
    # Groups are summed in another order, and the last bit of an output may be another code of the next layer's input.
    assert (whole - some).abs().max() <= 1e-2 * whole.abs().max()
    assert torch.nn.functional.cosine_similarity(whole.flatten(), wanted.flatten(), 0) > 0.98
    integers.save_file(made, tmp_path / "a.tri", example_inputs=(inputs[:2],))
    with torch.inference_mode():
        assert torch.equal(integers.load_file(tmp_path / "a.tri")(inputs), whole)
    exported = torch.export.export(made, (inputs,)).module()
    assert torch.equal(exported(inputs), whole)


def test_attention_with_both(inputs):
    torch.manual_seed(13)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(3, 21, 64)
    plan = integers.plan(layer, (x,), bits=4, group=32)
    assert {node.activations for node in plan.nodes} == {"dynamic"}
    assert {node.kind for node in plan.nodes} == {"linear", "attention"}
    with torch.inference_mode():
        got, wanted = integers.convert(layer, plan)(x), layer(x)
    assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), 0) > 0.98
