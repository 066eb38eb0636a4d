"""Linear layers and embeddings that hold integers. Imports torch and the weights' module.

They keep torch.nn's names, so that a model's code finds what it looks for: `layer.weight` is there, a module that says
its shape, dtype and device.
"""

from __future__ import annotations

import torch
from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import operations
from tricomp_torch.integers.weights import IntegerWeight


class IntegerLinear(nn.Module):
    """nn.Linear on an integer weight [out, in]. input: float [..., in]; gives [..., out] in the input's dtype."""

    bias: nn.Parameter | None

    def __init__(self, weight: IntegerWeight, bias: nn.Parameter | None = None, *, is_dynamic: bool = True) -> None:
        """is_dynamic: each row of the input becomes int8 too, by its largest magnitude."""
        super().__init__()
        self.in_features, self.out_features = weight.n_in, weight.n_out
        self.is_dynamic = is_dynamic
        self.weight = weight
        self.register_parameter("bias", bias)
        self.train(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Raises InvalidArgument if the input's last axis is another, or it requires gradients."""
        weight = self.weight
        if input.shape[-1] != self.in_features:
            raise InvalidArgument(
                f"expected an input [..., {self.in_features}], got {list(input.shape)}: this layer is {self!r}"
            )
        return operations.linear(
            input, weight.row_codes, weight.scales, self.bias, weight.bits, weight.group, self.is_dynamic
        )

    def extra_repr(self) -> str:
        activations = "int8 rows" if self.is_dynamic else "float"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, inputs={activations}"
