"""LSTM and GRU on integers, their inputs and states too: against steps in float64, in plans, in files."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402
from tricomp_torch.integers import convert, load_file, plan, save_file  # noqa: E402
from tricomp_torch.integers.recurrent import IntegerGRU, IntegerLSTM  # noqa: E402
from tricomp_torch.integers.weights import IntegerWeight  # noqa: E402

from tricomp.errors import InvalidArgument  # noqa: E402


def rounded(rows):
    """What int8 rows stand for, by a scale for each."""
    scales = rows.abs().amax(-1, keepdim=True) / 127
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (rows / scales).round() * scales


def stepped(layer, weights, x):
    """One direction of one layer, step by step in float64, of inputs and states rounded to int8 rows."""
    n = layer.hidden_size
    w_ih, w_hh = (weights[name]().double() for name in ("weight_ih_l0", "weight_hh_l0"))
    b_ih, b_hh = (getattr(layer, f"bias_{kind}_l0", torch.zeros(len(w_ih))).double() for kind in ("ih", "hh"))
    hidden = cell = torch.zeros(x.shape[1], n, dtype=torch.float64)
    out = []
    for row in x:
        a, b = rounded(row).double() @ w_ih.T + b_ih, rounded(hidden.float()).double() @ w_hh.T + b_hh
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (a + b).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            (r, z), new = (a + b).chunk(3, -1)[:2], a[:, 2 * n :]
            new = (new + r.sigmoid() * b[:, 2 * n :]).tanh()
            hidden = new + z.sigmoid() * (hidden - new)
        out.append(hidden)
    return torch.stack(out), (hidden, cell) if isinstance(layer, nn.LSTM) else (hidden,)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("n_in", "n", "steps", "rows", "bias"), [(40, 33, 5, 3, True), (65, 20, 1, 1, False)])
def test_recurrent_layers_with_integer_states(kind, n_in, n, steps, rows, bias):
    torch.manual_seed(6)
    layer = kind(n_in, n, bias=bias).eval()
    x = torch.randn(steps, rows, n_in) * torch.linspace(0.01, 3, rows)[:, None]
    weights = {name: IntegerWeight.of(one, 8) for name, one in layer.named_parameters() if one.ndim == 2}
    made = {nn.LSTM: IntegerLSTM, nn.GRU: IntegerGRU}[kind](layer, weights)
    out, states = made(x)
    expected, ends = stepped(layer, weights, x)
    torch.testing.assert_close(out, expected.float(), atol=2e-3, rtol=0)  # a code may be the next one
    for got, wanted in zip(states if isinstance(states, tuple) else (states,), ends, strict=True):
        torch.testing.assert_close(got[0], wanted.float(), atol=4e-3, rtol=0)
    begun = made(x[: steps // 2])[1] if steps > 1 else None
    assert torch.equal(made(x[steps // 2 :], begun)[0], out[steps // 2 :]), "in two parts"
    with pytest.raises(InvalidArgument, match="gradients"):
        made(x.clone().requires_grad_())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True, "num_layers": 2}])
def test_recurrent_layers_with_integer_states_are_planned_saved_and_packed(kind, options, tmp_path):
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(24, 320, **options)

        def forward(self, x):
            out, states = self.layer(x)
            return out, states

    torch.manual_seed(7)
    model, x = Tail().eval(), torch.randn(3, 4, 24)
    planned = plan(model, x)
    assert planned["layer"].activations == "dynamic"
    made: Any = convert(model, planned)
    with torch.no_grad():
        out, wanted = made(x), model(x)
    assert (out[0] - wanted[0]).norm() / wanted[0].norm() < 0.03
    sizes = {"x": {0: torch.export.Dim("a", min=2), 1: torch.export.Dim("b", min=2)}}
    save_file(made, tmp_path / "a.tri", x, dynamic_shapes=sizes)
    for longer in (x, torch.randn(5, 7, 24)):
        with torch.no_grad():
            found, expected = load_file(tmp_path / "a.tri")(longer), made(longer)
        for one, other in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)):
            assert torch.equal(one, other)
    lengths = torch.tensor([3, 1, 2, 3])[: 3 if made.layer.batch_first else 4]
    packed = pack_padded_sequence(x, lengths, made.layer.batch_first, enforce_sorted=False)
    with torch.no_grad():
        got, wanted = made.layer(packed)[0], model.layer(packed)[0]
    assert (got.data - wanted.data).norm() / wanted.data.norm() < 0.03
