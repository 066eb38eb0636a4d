"""Modules that run on integers: each against its float64 emulation, of odd shapes; no float weights stay in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from tricomp_torch.integers import NodePlan, Plan, convert  # noqa: E402
from tricomp_torch.integers.copies import shapes_of  # noqa: E402
from tricomp_torch.integers.forms import input_first  # noqa: E402


def convert_layer(layer, kind, names, bits=8, group=None, activations="float", **rest):
    """The module that takes a layer's place."""
    model = nn.Module()
    model.layer = layer
    model.eval().requires_grad_(False)
    tensors = tuple(f"layer.{name}" for name in names)
    node = NodePlan("layer", kind, bits, group, tensors, "", 0.0, None, 0, 0, activations=activations, **rest)
    turns = ("layer",) if "transpose" in kind else ()
    return convert(model, Plan((node,), turns=turns, shapes=shapes_of(model))).layer


def one(layer, kind, names, **options):
    """The integer module of a float layer, and a float64 layer of the very weights that its codes stand for."""
    made: Any = convert_layer(layer, kind, names, **options)
    exact = copy.deepcopy(layer).eval().requires_grad_(False)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        weight = made.get_submodule(owner)._modules[attribute]()
        if "transpose" in kind:
            weight = input_first(weight, layer.groups)
        getattr(exact.get_submodule(owner), attribute).copy_(weight)
    return made, exact.double()


def rows_in_codes(x):
    """Each row as 255 levels, in float64."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (x.float() / scale).round().double() * scale.double()


def structured(*shape):
    """Weights whose rows differ in size by orders of magnitude, with a few outliers, as trained ones do."""
    weight = torch.randn(*shape) * torch.logspace(-3, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return weight * torch.where(torch.rand(*shape) < 0.01, 8.0, 1.0)


def close(got, exact, dtype=torch.float32):
    """Equal but for rounding in float32 (or the output's dtype) of a sum of products."""
    bound = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (got.dtype, got.shape) == (dtype, exact.shape)
    assert torch.isfinite(got).all()
    if exact.numel():  # biases are of size 1: a sum may cancel against them
        assert (got.double() - exact).abs().max().item() <= bound * max(exact.abs().max().item(), 1.0)


@pytest.mark.parametrize("activations", ["float", "dynamic"])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (3, 7), (33, 65), (64, 32), (100, 1), (259, 130), (1027, 300)])
def test_linear(n_in, n_out, activations):
    torch.manual_seed(n_in)
    for bits, group, bias in ((8, None, True), (8, 16, False), (4, None, False), (4, 32, True)):
        layer = nn.Linear(n_in, n_out, bias=bias)
        layer.weight.data = structured(n_out, n_in)
        made, exact = one(layer, "linear", ["weight"], bits=bits, group=group, activations=activations)
        for shape in ((0,), (1,), (5,), (9,), (17,), (50,), (2, 3), (3, 1, 4), ()):
            x = torch.randn(*shape, n_in)
            x[..., -1] *= 20
            given = rows_in_codes(x) if activations == "dynamic" else x.double()
            close(made(x), exact(given))


def test_linear_of_rows_of_zeros_and_of_infinities():
    made, _ = one(nn.Linear(40, 6), "linear", ["weight"], activations="dynamic")
    x = torch.randn(3, 40)
    x[0], x[1, 3] = 0, float("inf")
    y = made(x)
    assert torch.equal(y[0], made.bias)
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()
