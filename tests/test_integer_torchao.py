"""Codes to torchao's tensors and back: bit for bit, and what is no such code is refused."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_  # noqa: E402
from tricomp_torch.integers.exchange import from_torchao, to_torchao  # noqa: E402
from tricomp_torch.integers.linear import IntegerLinear  # noqa: E402
from tricomp_torch.integers.weights import IntegerWeight  # noqa: E402

from tricomp.errors import InvalidArgument  # noqa: E402
from tricomp.integers import dequantize, quantize  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:torchao", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 16)])
def test_codes_go_there_and_back(bits, group):
    torch.manual_seed(1)
    weight = torch.randn(23, 96) * torch.logspace(-2, 1, 23)[:, None]
    ours = IntegerWeight.of(weight, bits, group, scale_dtype="bfloat16")
    theirs = to_torchao(ours)
    assert torch.equal(theirs.dequantize(), ours())
    back = from_torchao(theirs)
    assert np.array_equal(back.codes, ours.quantized().codes)
    assert np.array_equal(back.scales.astype(np.float32), ours.quantized().scales.astype(np.float32))
    assert (back.bits, back.group, back.dtype) == (bits, group, "float32")
    assert np.array_equal(dequantize(back), weight.numpy() * 0 + ours().numpy())


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_layers_that_torchao_made_run_here(config):
    torch.manual_seed(2)
    layer = torch.nn.Linear(64, 32)
    quantize_(layer, config())
    is_dynamic = config is Int8DynamicActivationInt8WeightConfig
    made = IntegerLinear(IntegerWeight.from_quantized(from_torchao(layer.weight)), layer.bias, is_dynamic=is_dynamic)
    made.requires_grad_(False)
    x = torch.randn(5, 64)
    with torch.no_grad():
        wanted = layer(x)
    assert (made(x) - wanted).norm() / wanted.norm() < (2e-2 if is_dynamic else 1e-5)  # its inputs have 127.5 steps
    again = to_torchao(made.weight, is_dynamic=is_dynamic)
    assert torch.equal(again.qdata, layer.weight.qdata)
    assert torch.equal(again.scale, layer.weight.scale)
    assert torch.equal(torch.nn.functional.linear(x, again, layer.bias), wanted)


def test_what_is_no_plain_code_is_refused():
    with pytest.raises(InvalidArgument, match="'head': expected torchao's Int8Tensor"):
        from_torchao(torch.zeros(3, 4), "head")
    theirs = to_torchao(quantize(np.ones((4, 32), np.float32)))
    theirs.zero_point = theirs.zero_point + 1
    with pytest.raises(InvalidArgument, match="zero points other than 0"):
        from_torchao(theirs)
    with pytest.raises(InvalidArgument, match=r"expected a weight \[out, in\] in groups that divide a row"):
        to_torchao(quantize(np.ones((4, 40), np.float32), group=16))
    with pytest.raises(InvalidArgument, match="no 4-bit weights with symmetric int8 inputs"):
        to_torchao(quantize(np.ones((4, 32), np.float32), 4), is_dynamic=True)
