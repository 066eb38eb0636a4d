"""Transposed convolutions on inputs as codes: against torch's own on what the codes stand for; in plans and files."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from tricomp_torch.integers import convert, load_file, plan, save_file, transposing  # noqa: E402
from tricomp_torch.integers.convolving import rounded_samples  # noqa: E402

from tricomp.errors import InvalidArgument  # noqa: E402


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """By codes, however small; threads have nothing to share."""
    monkeypatch.setattr(transposing, "_LEAST_PLACES", 0)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def weights(n_out, n_in, groups, *kernel):
    """Codes [out, in / groups, ...], scales, a bias; and the floats as torch's transposed convolution takes them."""
    codes = torch.randint(-127, 128, (n_out, n_in // groups, *kernel), dtype=torch.int8)
    scales, bias = torch.rand(n_out) * 0.01 + 1e-4, torch.randn(n_out)
    values = codes.double() * scales.double().reshape(-1, 1, *[1] * len(kernel))
    parts = values.reshape(groups, n_out // groups, n_in // groups, *kernel).transpose(1, 2)
    return codes, scales, bias, parts.reshape(n_in, n_out // groups, *kernel)


def cases():
    """Ways in which a kernel, a stride, a padding and a dilation can meet on one axis: every fifth of all."""
    ranges = ((1, 2, 3, 4, 5), (1, 2, 3, 4), (0, 1, 2), (1, 2, 3), (0, 1), (1, 2), (3, 5))
    for kernel, stride, padding, dilation, beyond, groups, size in itertools.islice(
        itertools.product(*ranges), 0, None, 5
    ):
        n_out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + beyond + 1
        if beyond < max(stride, dilation) and n_out > 0:
            yield kernel, stride, padding, dilation, beyond, groups, size


def test_every_place_of_a_kernel_finds_its_inputs():
    torch.manual_seed(0)
    n_cases = n_cropped = 0
    for kernel, stride, padding, dilation, beyond, groups, size in cases():
        x = torch.randn(2, 4, size)
        codes, scales, bias, floats = weights(6, 4, groups, kernel)
        exact = rounded_samples(x).double()
        wanted = F.conv_transpose1d(exact, floats, bias.double(), stride, padding, beyond, groups, dilation)
        found = transposing.convolve(x, codes, scales, bias, (stride,), (padding,), (beyond,), (dilation,), groups)
        torch.testing.assert_close(found, wanted.float(), atol=2e-5, rtol=2e-5)
        n_cases += 1
        made = transposing.phases(size, kernel, stride, padding, dilation, wanted.shape[-1])
        n_cropped += any(phase.before < 0 or phase.after < 0 for phase in made)
    assert n_cases > 200
    assert n_cropped < n_cases / 3, "most do not fall back"


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [True, False])
def test_pictures(order, has_bias):
    torch.manual_seed(1)
    x = (torch.randn(3, 10, 9, 7) * torch.tensor([1e-3, 1.0, 50.0]).reshape(3, 1, 1, 1)).to(memory_format=order)
    codes, scales, bias, floats = weights(6, 10, 2, 4, 3)
    held = bias if has_bias else None
    task = ((2, 3), (1, 0), (1, 2), (1, 2), 2)
    found = transposing.convolve(x, codes, scales, held, *task)
    exact = rounded_samples(x).double()
    wanted = F.conv_transpose2d(exact, floats, bias.double() if has_bias else None, (2, 3), (1, 0), (1, 2), 2, (1, 2))
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right.float(), atol=1e-5 * float(right.abs().max()), rtol=1e-5)
    assert found.is_contiguous(memory_format=order)
    assert transposing.fake(x, codes, scales, held, *task).stride() == found.stride()
    one = transposing.convolve(x[1], codes, scales, held, *task)
    assert torch.equal(one, transposing.convolve(x[1:2], codes, scales, held, *task)[0])
    assert transposing.convolve(x[:0], codes, scales, held, *task).shape == (0, *found.shape[1:])
    with pytest.raises(InvalidArgument, match=r"expected an input \[batch, 10, height, width\]"):
        transposing.convolve(x[:, 1:], codes, scales, held, *task)
    with pytest.raises(InvalidArgument, match="expected an input of floats"):
        transposing.convolve(x.long(), codes, scales, held, *task)


class Upward(nn.Module):
    """As decoders are: pictures and rows that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(64, 48, 4, 2, 1)
        self.norm = nn.BatchNorm2d(48)
        self.rows = nn.ConvTranspose1d(48, 40, 5, 3, 1, output_padding=1)
        self.small = nn.ConvTranspose2d(40, 2, 1)

    def forward(self, x):
        y = F.relu(self.norm(self.up(x)))
        rows = self.rows(y.flatten(2), output_size=[3 * y[0, 0].numel()])
        return self.small(rows.unsqueeze(2))


def test_planned_converted_saved_and_loaded(tmp_path):
    torch.manual_seed(2)
    model, x = Upward().eval(), torch.randn(3, 64, 5, 4)
    with torch.no_grad():
        model.norm.weight.mul_(2)
        wanted = model(x)
    planned = plan(model, x)
    assert [planned[name].activations for name in ("up", "rows", "small")] == ["dynamic", "dynamic", "float"]
    made: Any = convert(model, planned)
    with torch.no_grad():
        found = made(x)
        assert (found - wanted).norm() / wanted.norm() < 0.03
        save_file(made, tmp_path / "a.tri", x)
        more = torch.cat([x, x])
        assert torch.equal(load_file(tmp_path / "a.tri")(more), made(more))
    with pytest.raises(InvalidArgument, match="gradients"):
        made(x.clone().requires_grad_())
    weights_only = plan(model, x, bits=4)
    assert {node.activations for node in weights_only.nodes} == {"float"}
