"""LSTM and GRU layers that hold integers. Imports torch and the weights' module.

Run on integers, inputs and states too, by recurrences; or inputs stay float, and one layer's weights at a time become
floats, for a whole sequence, which torch's own kernels run: packed sequences and projections always so. The hard thing:
torch numbers weights by layer and direction in one flat list, and states are stacked in that order too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from tricomp.errors import InvalidArgument
from tricomp_torch.integers import operations, recurrences
from tricomp_torch.integers.weights import IntegerWeight

_SHARED = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size")


class _IntegerRecurrent(nn.Module):
    """What LSTM and GRU have in common. Weights and biases have torch.nn's names, `weight_ih_l0` and so on."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int

    def __init__(
        self, layer: nn.LSTM | nn.GRU, weights: Mapping[str, IntegerWeight], *, is_dynamic: bool = True
    ) -> None:
        """Of a float layer, whose biases are taken, and its weights in integers by their names.

        is_dynamic: each row of inputs and states becomes int8 too.
        """
        super().__init__()
        self.is_dynamic = is_dynamic
        for name in _SHARED:
            setattr(self, name, getattr(layer, name))
        self._names = tuple(name for names in layer._all_weights for name in names)
        for name in self._names:
            if name in weights:
                self.add_module(name, weights[name])
            else:
                self.register_parameter(name, getattr(layer, name))
        self.train(False)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"bidirectional={self.bidirectional}, bias={self.bias}, "
            f"inputs={'int8 rows' if self.is_dynamic and not self.proj_size else 'float'}"
        )

    def _flat(self, layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Weights and biases of one layer, both directions, as torch's kernels take them."""
        n_each = len(self._names) // self.num_layers
        held = [getattr(self, name) for name in self._names[layer * n_each : (layer + 1) * n_each]]
        return [value().to(dtype) if isinstance(value, IntegerWeight) else value for value in held]

    def _states(self, input: torch.Tensor, n_batch: int) -> tuple[tuple[int, ...], ...]:
        raise NotImplementedError

    def _run_layer(self, input: Any, states: Any, flat: list[torch.Tensor], batch_sizes: Any) -> tuple[Any, Any]:
        """Of float weights."""
        raise NotImplementedError

    def _run_integers(self, input: Any, states: Any, *weights: Any) -> tuple[Any, ...]:
        """One direction of one layer: outputs and states. weights: what recurrences take after the states."""
        raise NotImplementedError

    def _run_directions(
        self, layer: int, input: torch.Tensor, states: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """One layer on integers: what _run_layer gives."""
        n_each = len(self._names) // self.num_layers
        n_directions = 2 if self.bidirectional else 1
        names = self._names[layer * n_each : (layer + 1) * n_each]
        in_steps = input.transpose(0, 1) if self.batch_first else input
        outs, ends = [], []
        for i in range(n_directions):
            mine = [getattr(self, name) for name in names[i * n_each // n_directions :][: n_each // n_directions]]
            held = [tensor for weight in mine[:2] for tensor in (weight.row_codes, weight.scales)]
            biases = mine[2:4] if self.bias else [None, None]
            own = tuple(state[i] for state in states)
            out, *end = self._run_integers(in_steps, own, held, biases, mine[0].bits, mine[0].group, bool(i))
            outs.append(out)
            ends.append(end)
        whole = outs[0] if n_directions == 1 else torch.cat(outs, -1)
        lasts = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        return whole.transpose(0, 1) if self.batch_first else whole, lasts

    def _is_in_integers(self, packed: PackedSequence | None) -> bool:
        weights = [getattr(self, name) for name in self._names if name.startswith("weight")]
        is_whole = all(isinstance(weight, IntegerWeight) for weight in weights)
        return self.is_dynamic and is_whole and packed is None and not self.proj_size

    def _run(self, input: Any, states: tuple[torch.Tensor, ...] | None) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """Outputs and the last states, each [layers * directions, batch, ...], of any form of input."""
        packed = input if isinstance(input, PackedSequence) else None
        data = packed.data if packed is not None else input
        operations.refuse_gradients(data)
        if data.ndim not in ((2,) if packed is not None else (2, 3)) or data.shape[-1] != self.input_size:
            raise InvalidArgument(
                f"expected an input [..., {self.input_size}] of 2 or 3 axes, or packed sequences of such, got "
                f"{list(data.shape)}: this layer is {self!r}"
            )
        is_single = packed is None and data.ndim == 2
        if is_single:
            data = data.unsqueeze(0 if self.batch_first else 1)
            states = None if states is None else tuple(state.unsqueeze(1) for state in states)
        if packed is not None:
            n_batch = int(packed.batch_sizes[0])
            if states is not None and packed.sorted_indices is not None:
                states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
        else:
            n_batch = data.shape[0 if self.batch_first else 1]
        shapes = self._states(data, n_batch)
        if states is None:
            states = tuple(data.new_zeros(shape) for shape in shapes)
        for state, shape in zip(states, shapes, strict=True):
            if tuple(state.shape) != shape:
                raise InvalidArgument(
                    f"expected a state {list(shape)}, got {list(state.shape)}: this layer is {self!r}"
                )
        n_directions = 2 if self.bidirectional else 1
        last: list[tuple[torch.Tensor, ...]] = []
        sizes = None if packed is None else packed.batch_sizes
        for layer in range(self.num_layers):
            at = slice(layer * n_directions, (layer + 1) * n_directions)
            inward = tuple(state[at].contiguous() for state in states)
            if self._is_in_integers(packed):
                data, outward = self._run_directions(layer, data, inward)
            else:
                data, outward = self._run_layer(data, inward, self._flat(layer, data.dtype), sizes)
            last.append(outward)
        ends = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        if packed is not None:
            if packed.unsorted_indices is not None:
                ends = tuple(state.index_select(1, packed.unsorted_indices) for state in ends)
            return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), ends
        if is_single:
            return data.squeeze(0 if self.batch_first else 1), tuple(state.squeeze(1) for state in ends)
        return data, ends

    def _options(self, batch_sizes: Any) -> tuple[Any, ...]:
        """What torch's kernels take after the weights, for one layer without dropout."""
        options = (self.bias, 1, 0.0, False, self.bidirectional)
        return options if batch_sizes is not None else (*options, self.batch_first)


class IntegerLSTM(_IntegerRecurrent):
    """nn.LSTM on integer weights, with projections and packed sequences as there."""

    def forward(self, input: Any, hx: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[Any, Any]:
        """What nn.LSTM gives: outputs, (h, c). Raises InvalidArgument for inputs or states of other shapes."""
        return self._run(input, hx)

    def _states(self, input: torch.Tensor, n_batch: int) -> tuple[tuple[int, ...], ...]:
        n = self.num_layers * (2 if self.bidirectional else 1)
        return (n, n_batch, self.proj_size or self.hidden_size), (n, n_batch, self.hidden_size)

    def _run_layer(self, input: Any, states: Any, flat: list[torch.Tensor], batch_sizes: Any) -> tuple[Any, Any]:
        run: Any = torch._VF.lstm
        sizes = () if batch_sizes is None else (batch_sizes,)
        out, hidden, cell = run(input, *sizes, states, flat, *self._options(batch_sizes))
        return out, (hidden, cell)

    def _run_integers(self, input: Any, states: Any, *weights: Any) -> tuple[Any, ...]:
        return recurrences.lstm(input, *states, *weights)


class IntegerGRU(_IntegerRecurrent):
    """nn.GRU on integer weights, with packed sequences as there."""

    def forward(self, input: Any, hx: torch.Tensor | None = None) -> tuple[Any, torch.Tensor]:
        """What nn.GRU gives: outputs, h. Raises InvalidArgument for inputs or states of other shapes."""
        out, states = self._run(input, None if hx is None else (hx,))
        return out, states[0]

    def _states(self, input: torch.Tensor, n_batch: int) -> tuple[tuple[int, ...], ...]:
        return ((self.num_layers * (2 if self.bidirectional else 1), n_batch, self.hidden_size),)

    def _run_layer(self, input: Any, states: Any, flat: list[torch.Tensor], batch_sizes: Any) -> tuple[Any, Any]:
        run: Any = torch._VF.gru
        sizes = () if batch_sizes is None else (batch_sizes,)
        out, hidden = run(input, *sizes, states[0], flat, *self._options(batch_sizes))
        return out, (hidden,)

    def _run_integers(self, input: Any, states: Any, *weights: Any) -> tuple[Any, ...]:
        return recurrences.gru(input, *states, *weights)
