"""Convolutions of inputs as codes: values, order in memory, dtypes, errors, graphs, files, what a plan chooses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.export import Dim, export  # noqa: E402
from tricomp_torch import integers  # noqa: E402
from tricomp_torch.integers import convolving  # noqa: E402
from tricomp_torch.integers.convolution import IntegerConv2d  # noqa: E402

from tests.integer_models import digits, trained_digits  # noqa: E402
from tests.test_integer_modules import close, one, structured  # noqa: E402
from tricomp.codec import convolving as core  # noqa: E402
from tricomp.errors import InvalidArgument  # noqa: E402
from tricomp.reference import convolve as reference  # noqa: E402

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.Conv1d(6, 9, 3, padding="same", dilation=2, groups=3), (2, 6, 17)),
    (nn.Conv1d(3, 5, 4, stride=3, padding=2, padding_mode="reflect", bias=False), (1, 3, 20)),
    (nn.Conv1d(36, 20, 4, padding="same"), (36, 19)),
    (nn.Conv2d(1, 32, 3, padding=1), (7, 1, 9, 5)),
    (nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 5, 11, 9)),
    (nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="circular"), (3, 8, 12, 12)),
    (nn.Conv2d(4, 6, (3, 4), padding="same", padding_mode="replicate", dilation=2), (2, 4, 12, 12)),
    (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1)), (2, 4, 9, 12)),
    (nn.Conv2d(68, 33, 1, stride=2), (5, 68, 7, 6)),
    (nn.Conv2d(20, 24, 3, padding=2), (20, 1, 1)),
    (nn.Conv2d(16, 40, 7, padding=3, groups=2), (2, 16, 8, 7)),
]


def dynamic(layer, **options) -> tuple[Any, nn.Module]:
    """The module that takes codes, and a float64 layer of the weights that its codes stand for."""
    kind = "conv1d" if isinstance(layer, nn.Conv1d) else "conv2d"
    return one(layer, kind, ["weight"], activations="dynamic", **options)


def rounded(x, layer):
    """Each sample as 255 levels, in float64."""
    largest = x.float().abs().amax(tuple(range(x.ndim - layer.weight.ndim + 1, x.ndim)), keepdim=True)
    factor = torch.where(largest == 0, 0.0, 127 / largest)
    return (x.float() * factor).round().double() * (largest / 127).double()


def channels_last(module) -> Any:
    """The module, its weights in that order."""
    return module.to(memory_format=torch.channels_last)


def orders(x):
    """An input as it may lie in memory."""
    yield x
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield F.pad(x, (1, 2))[..., 1:-2]
    if x.ndim == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield F.pad(x, (0, 0, 0, 0, 1, 2)).contiguous(memory_format=torch.channels_last)[:, 1:-2]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of an even kernel
@pytest.mark.parametrize("way", ["native", "floats"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_values_and_order_in_memory(layer, shape, way, monkeypatch):
    if way == "floats":
        monkeypatch.setattr(convolving, "_request", lambda *_: ((), None))
    torch.manual_seed(2)
    layer = copy.deepcopy(layer).eval()
    layer.weight.data = structured(*layer.weight.shape)
    made, exact = dynamic(layer)
    x = torch.randn(shape)
    x[..., -1] *= 20
    with torch.no_grad():
        for given in orders(x):
            y = made(given)
            close(y, exact(rounded(x, layer)))
            assert y.stride() == layer(given).stride()


@pytest.mark.parametrize("last", ["input", "weight"])
def test_outputs_lie_as_torchs_own_do(last):
    layer = nn.Conv2d(8, 20, 3).eval()
    made, exact = dynamic(copy.deepcopy(layer))
    x = torch.randn(2, 8, 7, 6)
    if last == "input":
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        layer, made = channels_last(layer), channels_last(made)
        assert not made.weight.codes.is_contiguous()
    y = made(x)
    assert y.stride() == layer(x).stride() == (400, 1, 80, 20)
    close(y, exact(rounded(x, exact)))
    y.permute(0, 2, 3, 1).view(2, -1)


def test_the_references_bits():
    if not core.is_fast(1, 1):
        pytest.skip("no vectors here")
    made, _ = dynamic(nn.Conv2d(12, 20, (3, 2), stride=2, padding=(2, 1), groups=2))
    x = torch.randn(3, 12, 9, 8)
    wanted = reference.convolve(
        *(x.numpy(), made.weight.codes.numpy(), made.weight.scales.numpy(), made.bias.numpy()),
        *((2, 2), ((2, 2), (1, 1)), (1, 1), 2),
    )
    assert made(x).numpy().tobytes() == wanted.tobytes()


def test_samples_of_zeros_of_little_and_of_infinities():
    made, _ = dynamic(nn.Conv2d(12, 20, 3))
    for way in (convolving.convolve, convolving._by_floats):
        x = torch.randn(5, 12, 6, 6)
        x[0], x[1, 3, 2, 1], x[2, 0, 0, 0], x[3] = 0, float("inf"), float("nan"), 1e-35
        y = way(x, made.weight.codes, made.weight.scales, made.bias, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        assert torch.equal(y[[0, 3]], made.bias[:, None, None].expand(2, 20, 4, 4))
        assert y[1:3].isnan().all()
        assert y[4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype):
    layer = nn.Conv2d(20, 24, 3, padding=1).to(dtype)
    made, exact = dynamic(layer)
    x = torch.randn(3, 20, 6, 5).to(dtype)
    close(made(x), exact(rounded(x, layer)), dtype)
    cast = dynamic(nn.Conv2d(20, 24, 3, padding=1))[0].to(dtype)
    assert cast.weight.scales.dtype == torch.float32
    assert cast(x).dtype == dtype


def test_no_samples():
    made, _ = dynamic(nn.Conv2d(6, 9, 3, stride=2, padding=1))
    assert made(torch.zeros(0, 6, 7, 8)).shape == (0, 9, 4, 4)


@pytest.mark.parametrize("shape", [(5, 70, 3, 2), (1, 70, 3, 2), (70, 3, 2), (0, 70, 3, 2)])
def test_a_kernel_as_large_as_the_picture(shape):
    made, exact = dynamic(nn.Conv2d(70, 33, (3, 2), stride=2))
    x = torch.randn(shape)
    close(made(x), exact(rounded(x, exact)))
    with pytest.raises(InvalidArgument, match="is larger than the input"):
        dynamic(nn.Conv2d(70, 33, (3, 2), dilation=2))[0](x)


def test_weights_of_groups_take_floats():
    layer = nn.Conv2d(16, 9, 3)
    made, exact = dynamic(layer, bits=4, group=16)
    assert not made.is_dynamic
    x = torch.randn(2, 16, 6, 6)
    close(made(x), exact(x.double()))


def test_inputs_that_do_not_fit_are_refused():
    made, _ = dynamic(nn.Conv2d(6, 9, (3, 5), padding=1))
    with pytest.raises(InvalidArgument, match=r"expected an input \[batch, 6, height, width\].*got \[2, 5, 8, 8\]"):
        made(torch.zeros(2, 5, 8, 8))
    with pytest.raises(InvalidArgument, match=r"a kernel of \[3, 5\].* is larger than the input \[2, 6, 8, 2\]"):
        made(torch.zeros(2, 6, 8, 2))
    with pytest.raises(InvalidArgument, match="expected an input"):
        made(torch.zeros(8, 8))
    with pytest.raises(InvalidArgument, match="expected an input of floats, got torch.int64"):
        made(torch.zeros(2, 6, 8, 8, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match="give no gradients"):
        made(torch.zeros(2, 6, 8, 8, requires_grad=True))


class Pictures(nn.Module):
    """What comes of a convolution is seen as rows, which holds for one order in memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 24, (3, 2), padding="same")
        self.line = nn.Conv1d(24, 32, 5, padding=2)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        y = F.relu(self.wide(self.deep(F.relu(self.stem(x)))))
        y = self.line(y.view(y.shape[0], y.shape[1], -1))
        return self.head(y.mean(-1))


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(4)
    model = Pictures().eval()
    x = torch.randn(3, 3, 13, 10)
    return model, integers.convert(model, integers.plan(model, x)), x


def test_plans_choose_codes_where_they_gain(pictures):
    model, made, x = pictures
    chosen = {node.name: node.activations for node in made.integer_plan.nodes if node.is_integer}
    assert chosen.pop("deep", "float") == "float"  # a channel a group
    assert chosen == dict.fromkeys(["stem", "wide", "line", "head"], "dynamic")
    assert "inputs=int8 samples" in repr(made.wide)
    error = (made(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.05
    for options in ({"activations": "float"}, {"bits": 4}):
        plan = integers.plan(model, x, **options)
        assert {node.activations for node in plan.nodes if node.kind != "linear"} == {"float"}
    assert {node.activations for node in integers.plan(model).nodes} == {"float"}


def test_graphs_with_sizes_that_vary(pictures):
    _, made, x = pictures
    sizes = {0: Dim("n"), 2: Dim("h", min=4, max=500), 3: Dim("w", min=4, max=500)}
    exported = export(made, (x,), dynamic_shapes=(sizes,))
    assert "tricomp.integer_convolution.default" in {str(node.target) for node in exported.graph.nodes}
    for shape in ((1, 3, 13, 10), (5, 3, 8, 21)):
        other = torch.randn(shape)
        assert torch.equal(exported.module()(other), made(other))
    with torch.no_grad():
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), made(x))
        last = torch.compile(made.stem, backend="aot_eager")(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.tricomp.integer_convolution.default,
        (x, made.stem.weight.codes, made.stem.weight.scales, made.stem.bias, [2, 2], [1, 1, 1, 1], [1, 1], 1),
    )


def test_files(pictures, tmp_path):
    model, made, x = pictures
    integers.save_file(made, tmp_path / "graph.tri", x)
    integers.save_file(made, tmp_path / "plain.tri")
    for name, given in (("graph", None), ("graph", model), ("plain", model)):
        loaded: Any = integers.load_file(tmp_path / f"{name}.tri", model=given)
        assert torch.equal(loaded(x), made(x))
    assert loaded.wide.is_dynamic
    integers.save_file(channels_last(copy.deepcopy(made)), tmp_path / "last.tri", x)
    assert torch.equal(integers.load_file(tmp_path / "last.tri")(x), made(x))


def test_digits_are_told_as_by_floats():
    model, (images, labels) = trained_digits().eval(), digits()
    plan = integers.plan(model, images[:256], budget=integers.Budget(top1=0.995))
    assert plan["stem.0"].activations == "dynamic"
    made = integers.convert(model, plan)
    assert isinstance(made.down, IntegerConv2d)
    with torch.no_grad():
        expected, found = model(images).argmax(1), made(images).argmax(1)
        last = channels_last(copy.deepcopy(made))(images).argmax(1)
    assert (found == expected).float().mean() >= 0.995
    assert torch.equal(last, found)
    right, wanted = (found == labels).float().mean(), (expected == labels).float().mean()
    assert np.isclose(right, wanted, atol=0.002)
