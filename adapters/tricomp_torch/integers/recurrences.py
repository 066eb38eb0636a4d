"""One layer and direction of an LSTM or GRU in integers, inputs and states too: operators of torch.

What goes in is multiplied for all steps at once; of each step's state, int8 rows are made as linear layers make them.
The gates are those of torch.nn (Hochreiter and Schmidhuber 1997; Cho et al. 2014). The hard thing: a traced graph is to
hold one call, for a loop would be unrolled to as many steps as the example had. Imports torch and execution.

Time of these by that of torch's own kernels on floats, one core of AMD Zen 4 with AVX512-VNNI, torch 2.13, LSTM:

    units   1 row   16 rows   128 rows
      128     4.3       1.1        1.1
      256     1.4       0.8        0.6
      512     0.6       0.5        0.4
     1024     0.2       0.3        0.3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tricomp_torch.integers import execution
from tricomp_torch.integers.operations import refuse_gradients

_library: Any = torch.library.Library("tricomp", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "integer_lstm(Tensor input, Tensor hidden, Tensor cell, Tensor[] weights, Tensor?[] biases, int bits, int? group,"
    " bool is_backward) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "integer_gru(Tensor input, Tensor hidden, Tensor[] weights, Tensor?[] biases, int bits, int? group,"
    " bool is_backward) -> (Tensor, Tensor)"
)
Biases = Sequence[torch.Tensor | None]


def lstm(
    input: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Biases,
    bits: int,
    group: int | None,
    is_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [steps, batch, n] and the last hidden and cell state, of input [steps, batch, in], states [batch, n].

    weights: codes and scales for the input, then for the state, as execution.linear takes them. biases: for each.
    Raises InvalidArgument for an input that requires gradients.
    """
    if torch.compiler.is_compiling():
        return torch.ops.tricomp.integer_lstm(input, hidden, cell, weights, biases, bits, group, is_backward)  # type: ignore[no-any-return]
    refuse_gradients(input)
    with torch.no_grad():
        return _lstm(input, hidden, cell, weights, biases, bits, group, is_backward)


def gru(
    input: torch.Tensor,
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Biases,
    bits: int,
    group: int | None,
    is_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and the last state; terms and errors as for lstm."""
    if torch.compiler.is_compiling():
        return torch.ops.tricomp.integer_gru(input, hidden, weights, biases, bits, group, is_backward)  # type: ignore[no-any-return]
    refuse_gradients(input)
    with torch.no_grad():
        return _gru(input, hidden, weights, biases, bits, group, is_backward)


def _lstm(
    input: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Biases,
    bits: int,
    group: int | None,
    is_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = hidden.shape[-1]
    from_input = execution.linear(input, weights[0], weights[1], biases[0], bits, group, True)
    out = input.new_empty(*input.shape[:2], n)
    hidden, cell = hidden.clone(), cell.clone()
    for step in _steps(len(input), is_backward):
        gates = execution.linear(hidden, weights[2], weights[3], biases[1], bits, group, True).add_(from_input[step])
        let_in, kept = gates[:, : 2 * n].sigmoid_().chunk(2, 1)
        cell.mul_(kept).addcmul_(let_in, gates[:, 2 * n : 3 * n].tanh_())
        hidden = out[step]
        torch.mul(gates[:, 3 * n :].sigmoid_(), cell.tanh(), out=hidden)
    return out, hidden.clone(), cell


def _gru(
    input: torch.Tensor,
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Biases,
    bits: int,
    group: int | None,
    is_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = hidden.shape[-1]
    from_input = execution.linear(input, weights[0], weights[1], biases[0], bits, group, True)
    out = input.new_empty(*input.shape[:2], n)
    for step in _steps(len(input), is_backward):
        gates = execution.linear(hidden, weights[2], weights[3], biases[1], bits, group, True)
        here = from_input[step]
        reset, kept = gates[:, : 2 * n].add_(here[:, : 2 * n]).sigmoid_().chunk(2, 1)
        new = torch.addcmul(here[:, 2 * n :], reset, gates[:, 2 * n :]).tanh_()
        out[step] = torch.lerp(new, hidden, kept)
        hidden = out[step]
    return out, hidden.clone()


def _steps(n: int, is_backward: bool) -> range:
    return range(n - 1, -1, -1) if is_backward else range(n)


def _fake_lstm(
    input: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = input.new_empty(input.shape[0], input.shape[1], hidden.shape[-1])
    return out, torch.empty_like(hidden), torch.empty_like(cell)


def _fake_gru(input: torch.Tensor, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return input.new_empty(input.shape[0], input.shape[1], hidden.shape[-1]), torch.empty_like(hidden)


_library.impl("integer_lstm", _lstm, "CompositeExplicitAutograd")
_library.impl("integer_gru", _gru, "CompositeExplicitAutograd")
torch.library.register_fake("tricomp::integer_lstm", _fake_lstm, lib=_library)
torch.library.register_fake("tricomp::integer_gru", _fake_gru, lib=_library)

# By the names that graphs in files have for them.
DIRECT: dict[str, Any] = {"tricomp.integer_lstm.default": lstm, "tricomp.integer_gru.default": gru}
