"""The preset form: batch norm folded into the layer before it, weights with output channels first. Imports torch.

`prepare` makes a float model in that form, which predicts what the original does within float rounding. The hard
thing: transposed convolutions keep weights as [in, out / groups, ...], so they get a module of their own here, which
holds [out, in / groups, ...] and turns the weight, as a view where it can, when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tricomp.errors import InvalidArgument
from tricomp_torch.integers.copies import check_same, frozen_copy
from tricomp_torch.integers.nodes import Fold, Plan

# It reads output_padding of its first argument, and nothing else.
_output_padding: Any = nn.ConvTranspose2d._output_padding

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class OutputFirstConvTranspose(nn.Module):
    """A transposed convolution whose weight is [out, in / groups, ...], one row per output channel."""

    def __init__(self, layer: nn.ConvTranspose1d | nn.ConvTranspose2d) -> None:
        """Of a layer of torch.nn; its weight is copied into the new order, its bias is taken."""
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.output_padding, self.dilation, self.groups = layer.output_padding, layer.dilation, layer.groups
        turned = output_first(layer.weight.detach(), layer.groups)
        self.weight = nn.Parameter(turned, requires_grad=False)
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """What the layer computes. input: [batch, in, ...] or [in, ...]."""
        n_space = len(self.kernel_size)
        size = None if output_size is None else list(output_size)
        padding = _output_padding(
            self, input, size, self.stride, self.padding, self.kernel_size, n_space, self.dilation
        )
        run: Callable[..., torch.Tensor] = F.conv_transpose1d if n_space == 1 else F.conv_transpose2d
        weight = input_first(self.weight, self.groups)
        return run(input, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class ZeroPaddedEncoder(nn.TransformerEncoder):
    """torch's encoder by parts. As in its fused form, outputs are zero, before the norm, where the input is padding."""

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """What nn.TransformerEncoder gives without gradients. src: [batch, n, features]."""
        if mask is not None or src_key_padding_mask is None or src.ndim != 3:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(output, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
        is_padding = src_key_padding_mask.bool()
        # The fused form takes padding at the end of rows only, and leaves all else to the parts.
        is_at_end = (is_padding[:, :-1] <= is_padding[:, 1:]).all()
        output = output.masked_fill((is_padding & is_at_end)[..., None], 0.0)
        return output if self.norm is None else self.norm(output)


def output_first(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A transposed convolution's weight [in, out / groups, ...] as [out, in / groups, ...], contiguous."""
    n_in, n_out, *kernel = weight.shape
    parts = weight.reshape(groups, n_in // groups, n_out, *kernel)
    return parts.transpose(1, 2).reshape(groups * n_out, n_in // groups, *kernel).contiguous()


def input_first(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The way back from output_first; a view if there is one group."""
    n_out, n_in, *kernel = weight.shape
    parts = weight.reshape(groups, n_out // groups, n_in, *kernel)
    return parts.transpose(1, 2).reshape(groups * n_in, n_out // groups, *kernel)


def prepare(model: nn.Module, plan: Plan, *, needs_data: bool = True) -> nn.Module:
    """A new float model in the preset form of a plan, in eval mode; the given one is not touched.

    needs_data: False takes a model on the meta device too. Raises InvalidArgument if the plan was made for a model of
    other tensors, or the model cannot be copied.
    """
    check_same(model, plan.shapes)
    copy = frozen_copy(model, needs_data=needs_data)
    try:
        return in_preset_form(copy, plan.folds, plan.turns)
    except (AttributeError, TypeError, RuntimeError) as error:  # a plan may come from a file
        raise InvalidArgument(f"the plan's folds and turns do not fit this model: {error}. Plan this model.") from error


def in_preset_form(model: nn.Module, folds: Sequence[Fold], turns: Sequence[str]) -> nn.Module:
    """The model, changed in place; returned, for the model may itself be a layer that is replaced."""
    for path in turns:
        model = replaced(model, path, _turned(model.get_submodule(path), path))
    for step in folds:
        layer, norm = model.get_submodule(step.layer), model.get_submodule(step.norm)
        _fold(layer, norm)
        model = replaced(model, step.norm, nn.Identity().eval())
    for module in model.modules():
        _run_by_parts(module)
    return model


def replaced(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The model with another module at a path, and at all others where the same one stood."""
    held = model.get_submodule(path)
    for other, found in list(model.named_modules(remove_duplicate=False)):
        if found is held and other:
            owner, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module)
    return module if held is model else model


def _turned(layer: nn.Module, path: str) -> nn.Module:
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return OutputFirstConvTranspose(layer).eval()
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise InvalidArgument(f"{path!r}: the plan turns its weight, but it is a {type(layer).__name__} without one")
    # A layer that computes x @ weight + bias, as transformers' Conv1D does, is linear.
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta").eval()
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = bias
    return linear


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Multiply a norm's scale into the rows of a layer, and give the layer its shift. In double precision, so that
    one rounding is all that changes."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    scale = (norm.running_var.double() + norm.eps).rsqrt()  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * norm.weight.double()  # type: ignore[operator]
    shift = -norm.running_mean.double() * scale  # type: ignore[operator]
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale  # type: ignore[operator]
    if norm.bias is not None:
        shift = shift + norm.bias.double()  # type: ignore[operator]
    rows = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(rows.to(weight.dtype).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _run_by_parts(module: nn.Module) -> None:
    """Keep torch's transformer layers from reading the weights of their parts, which will not be there."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0  # only the fused path reads it
    elif type(module) is nn.TransformerEncoder:
        if getattr(module, "use_nested_tensor", False):
            module.__class__ = ZeroPaddedEncoder
        module.enable_nested_tensor = module.use_nested_tensor = False
