"""The products of execution, convolving and transposing as operators of torch, so that traces see one call each.

Called directly where nothing is traced, which saves the dispatch. Imports torch and those three. The hard thing: a
traced graph holds names and plain arguments, so an operator takes codes and scales and never a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import convolving, execution, transposing

_library: Any = torch.library.Library("tricomp", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "integer_linear(Tensor input, Tensor codes, Tensor scales, Tensor? bias, int bits, int? group, bool is_dynamic)"
    " -> Tensor"
)
_library.define(
    "integer_values(Tensor codes, Tensor scales, int bits, int n_in, int? group, ScalarType dtype) -> Tensor"
)
_library.define(
    "integer_convolution(Tensor input, Tensor codes, Tensor scales, Tensor? bias, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> Tensor"
)
_library.define(
    "integer_convolution_transposed(Tensor input, Tensor codes, Tensor scales, Tensor? bias, int[] stride,"
    " int[] padding, SymInt[] output_padding, int[] dilation, int groups) -> Tensor"
)


def linear(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
    is_dynamic: bool,
) -> torch.Tensor:
    """execution.linear, of inputs without gradients. Raises InvalidArgument for those that require them."""
    if torch.compiler.is_compiling():
        return torch.ops.tricomp.integer_linear(input, codes, scales, bias, bits, group, is_dynamic)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():  # most calls; to switch them off takes as long as a small product
        return execution.linear(input, codes, scales, bias, bits, group, is_dynamic)
    refuse_gradients(input)
    with torch.no_grad():
        return execution.linear(input, codes, scales, bias, bits, group, is_dynamic)


def values(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, n_in: int, group: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """execution.values: float [out, n_in]."""
    if torch.compiler.is_compiling():
        return torch.ops.tricomp.integer_values(codes, scales, bits, n_in, group, dtype)  # type: ignore[no-any-return]
    with torch.no_grad():
        return execution.values(codes, scales, bits, n_in, group, dtype)


def convolve(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """convolving.convolve, of inputs without gradients. Raises InvalidArgument for those that require them."""
    if torch.compiler.is_compiling():
        return torch.ops.tricomp.integer_convolution(input, codes, scales, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():  # as in most calls; to say so again would take as long as a small layer
        return convolving.convolve(input, codes, scales, bias, stride, padding, dilation, groups)
    refuse_gradients(input)
    with torch.no_grad():
        return convolving.convolve(input, codes, scales, bias, stride, padding, dilation, groups)


def convolve_transposed(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """transposing.convolve, of inputs without gradients. Raises InvalidArgument for those that require them."""
    task = (input, codes, scales, bias, stride, padding, output_padding, dilation, groups)
    if torch.compiler.is_compiling():
        return torch.ops.tricomp.integer_convolution_transposed(*task)  # type: ignore[no-any-return]
    refuse_gradients(input)
    with torch.no_grad():
        return transposing.convolve(*task)


def refuse_gradients(input: torch.Tensor) -> None:
    """Raise InvalidArgument if gradients are asked of an integer layer."""
    if input.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(
            "integer layers are for inference and give no gradients, but their input requires them. Run the model "
            "under torch.no_grad(), or train the float model."
        )


def _fake_linear(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int | None,
    is_dynamic: bool,
) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], codes.shape[0])


def _fake_values(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, n_in: int, group: int | None, dtype: torch.dtype
) -> torch.Tensor:
    return scales.new_empty(codes.shape[0], n_in, dtype=dtype)


_library.impl("integer_linear", execution.linear, "CompositeExplicitAutograd")
_library.impl("integer_values", execution.values, "CompositeExplicitAutograd")
_library.impl("integer_convolution", convolving.convolve, "CompositeExplicitAutograd")
_library.impl("integer_convolution_transposed", transposing.convolve, "CompositeExplicitAutograd")
torch.library.register_fake("tricomp::integer_linear", _fake_linear, lib=_library)
torch.library.register_fake("tricomp::integer_values", _fake_values, lib=_library)
torch.library.register_fake("tricomp::integer_convolution", convolving.fake, lib=_library)
torch.library.register_fake("tricomp::integer_convolution_transposed", transposing.fake, lib=_library)

# By the names that graphs in files have for them: called so, eager programs save the dispatch too.
DIRECT: dict[str, Any] = {
    "tricomp.integer_linear.default": linear,
    "tricomp.integer_values.default": values,
    "tricomp.integer_convolution.default": convolve,
    "tricomp.integer_convolution_transposed.default": convolve_transposed,
}
