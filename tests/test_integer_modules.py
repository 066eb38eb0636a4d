"""Modules that run on integers: each against its float64 emulation, of odd shapes; no float weights stay in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence  # noqa: E402
from tricomp_torch.integers import NodePlan, Plan, convert, plan  # noqa: E402
from tricomp_torch.integers.copies import shapes_of  # noqa: E402
from tricomp_torch.integers.forms import input_first  # noqa: E402
from tricomp_torch.integers.reading import apart  # noqa: E402
from tricomp_torch.integers.weights import IntegerWeight, packed  # noqa: E402

from tricomp.errors import InvalidArgument  # noqa: E402
from tricomp.integers import pack_int4  # noqa: E402


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_layers_of_short_floats_give_their_own_dtype(dtype, activations):
    torch.manual_seed(1)
    layer = nn.Linear(70, 33).to(dtype)
    made, exact = one(layer, "linear", ["weight"], bits=4, group=16, scale_dtype="bfloat16", activations=activations)
    x = torch.randn(6, 70).to(dtype)
    close(made(x), exact(rows_in_codes(x) if activations == "dynamic" else x.double()), dtype)
    embedding, table = one(nn.Embedding(9, 20, dtype=dtype), "embedding", ["weight"])
    assert torch.equal(embedding(torch.tensor([[8, 0]])).double(), table(torch.tensor([[8, 0]])))
    convolution, exact = one(nn.Conv1d(4, 3, 3, dtype=dtype), "conv1d", ["weight"])
    x = torch.randn(2, 4, 9).to(dtype)
    close(convolution(x), exact(x.double()), dtype)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16), (4, None)])
def test_embedding(bits, group):
    layer = nn.Embedding(37, 45, padding_idx=3)
    made, exact = one(layer, "embedding", ["weight"], bits=bits, group=group)
    for ids in (torch.randint(37, (2, 5)), torch.tensor(3), torch.tensor([], dtype=torch.int32), torch.tensor([36])):
        assert torch.equal(made(ids).double(), exact(ids))
    assert made.weight.shape == (37, 45)
    assert made.padding_idx == 3
    with pytest.raises(IndexError):
        made(torch.tensor([37]))


CONVOLUTIONS = [
    ("conv1d", nn.Conv1d(6, 9, 3, padding="same", dilation=2, groups=3), (2, 6, 17)),
    ("conv1d", nn.Conv1d(3, 5, 4, stride=3, padding=2, padding_mode="reflect", bias=False), (1, 3, 20)),
    ("conv2d", nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 5, 11, 9)),
    ("conv2d", nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="circular"), (8, 12, 12)),
    ("conv2d", nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate", dilation=2), (0, 4, 12, 12)),
    ("conv_transpose1d", nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2, output_padding=1), (2, 6, 7)),
    ("conv_transpose2d", nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, bias=False), (1, 4, 8, 7)),
]


@pytest.mark.parametrize(("kind", "layer", "shape"), CONVOLUTIONS)
def test_convolutions(kind, layer, shape):
    torch.manual_seed(2)
    x = torch.randn(shape)
    for bits, group in ((8, None), (4, 16)):
        made, exact = one(copy.deepcopy(layer), kind, ["weight"], bits=bits, group=group)
        close(made(x), exact(x.double()))
    if "transpose" in kind:
        step = -1 if layer.output_padding[0] else 1
        size = [n + step for n in exact(x.double()).shape[2:]]
        close(made(x, output_size=size), exact(x.double(), output_size=size))


RECURRENT = [
    ("lstm", nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True), torch.randn(3, 6, 5)),
    ("lstm", nn.LSTM(4, 6, num_layers=2, proj_size=3, bias=False), torch.randn(5, 2, 4)),
    ("lstm", nn.LSTM(4, 6), torch.randn(5, 4)),
    ("gru", nn.GRU(5, 6, num_layers=3, batch_first=True), torch.randn(2, 4, 5)),
    ("gru", nn.GRU(5, 33, bidirectional=True, bias=False), torch.randn(4, 1, 5)),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("kind", "layer", "x"), RECURRENT)
def test_recurrent_layers(kind, layer, x):
    names = [name for name, _ in layer.named_parameters() if name.startswith("weight")]
    made, exact = one(layer, kind, names)

    def compare(got, wanted):
        for a, b in zip(flat(got), flat(wanted), strict=True):
            close(a, b)

    def flat(result):
        out, states = result
        out = pad_packed_sequence(out)[0] if isinstance(out, PackedSequence) else out
        return [out, *(states if isinstance(states, tuple) else (states,))]

    compare(made(x), exact(x.double()))
    _, states = exact(x.double())
    narrow = tuple(s.float() for s in states) if isinstance(states, tuple) else states.float()
    compare(made(x, narrow), exact(x.double(), states))
    if x.ndim == 3 and layer.batch_first:
        lengths = torch.tensor([4, 2, 5][: len(x)]).clamp(max=x.shape[1])
        packed = [pack_padded_sequence(v, lengths, batch_first=True, enforce_sorted=False) for v in (x, x.double())]
        compare(made(packed[0]), exact(packed[1]))
        compare(made(packed[0], narrow), exact(packed[1], states))
    with pytest.raises(InvalidArgument, match=r"expected an input \[\.\.\., "):
        made(x[..., :-1])
    bad = tuple(s[..., :-1] for s in narrow) if isinstance(narrow, tuple) else narrow[..., :-1]
    with pytest.raises(InvalidArgument, match="expected a state"):
        made(x, bad)


@pytest.mark.parametrize("form", ["self", "cross", "other sizes", "added keys", "one sequence"])
def test_attention(form):
    torch.manual_seed(5)
    options: dict[str, Any] = {"batch_first": form != "cross"}
    if form == "other sizes":
        options |= {"kdim": 6, "vdim": 10, "bias": False}
    if form == "added keys":
        options |= {"add_bias_kv": True, "add_zero_attn": True}
    layer = nn.MultiheadAttention(12, 3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    own = (
        ["in_proj_weight"] if layer.in_proj_weight is not None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    )
    made, exact = one(layer, "attention", [*own, "out_proj.weight"])
    x = torch.randn(4, 4, 12) if form != "one sequence" else torch.randn(4, 12)
    y, z = (
        (torch.randn(4, 4, layer.kdim), torch.randn(4, 4, layer.vdim)) if form in ("cross", "other sizes") else (x, x)
    )
    padding = torch.zeros(x.shape[:-1], dtype=torch.bool)
    padding[..., -1] = True
    heads = torch.randn(12 if x.ndim == 3 else 3, 4, 4)
    masks: list[dict[str, Any]] = [
        {},
        {"attn_mask": torch.ones(4, 4).triu(1).bool(), "is_causal": True},
        {"attn_mask": heads, "average_attn_weights": False},
        {"key_padding_mask": padding if x.ndim == 3 else padding.reshape(-1)},
        {"key_padding_mask": padding.float() * -3, "attn_mask": heads},
    ]
    for mask in masks:
        wide = {
            key: m.double() if isinstance(m, torch.Tensor) and m.is_floating_point() else m for key, m in mask.items()
        }
        for need in (True, False):
            got, weights = made(x, y, z, need_weights=need, **mask)
            wanted, exact_weights = exact(x.double(), y.double(), z.double(), need_weights=need, **wide)
            close(got, wanted)
            assert (weights is None) == (exact_weights is None)
            if weights is not None:
                close(weights, exact_weights)


class Mixed(nn.Module):
    """All kinds at once; a head that shares the embedding's weight, one weight that is read by itself."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.mixing = nn.Parameter(torch.randn(32, 32) / 6)
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.block(self.embedding(ids))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.lstm(x)[0] @ self.mixing)


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(6)
    model = Mixed().eval()
    ids = torch.randint(100, (3, 8))
    return model, convert(model, plan(model, ids)), ids


def held_bytes(model):
    """Bytes of all tensors that can be reached from a model, whatever attribute holds them."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(thing):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, (list, tuple, set)):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(vars(model))
    return sum(found.values())


def test_no_float_weights_stay(mixed):
    model, made, ids = mixed
    before = held_bytes(made)
    made(ids)
    assert held_bytes(made) == before
    assert before < 0.36 * held_bytes(model)  # scales and biases are much of so small a model
    assert all(parameter.ndim == 1 for parameter in made.parameters())
    assert made.embedding.weight is made.head.weight


def test_the_original_is_as_it_was(mixed):
    model, made, ids = mixed
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight is model.embedding.weight
    error = (made(ids) - model(ids)).norm() / model(ids).norm()
    assert error < 0.03


def test_states_copies_and_casts(mixed, tmp_path):
    model, made, ids = mixed
    other = convert(model, plan(model, ids))
    state = made.state_dict()
    assert state["head.weight.codes"].dtype == torch.int8
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(ids), made(ids))
    assert torch.equal(copy.deepcopy(made)(ids), made(ids))
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    half = copy.deepcopy(made).to(torch.bfloat16)
    scales = half.head.weight.scales
    assert scales.dtype == torch.float32
    assert half(ids).dtype == torch.bfloat16
    assert (half(ids).float() - made(ids)).norm() / made(ids).norm() < 0.05
    with pytest.raises(InvalidArgument, match="expected torch.int8, got torch.float32"):
        other.load_state_dict({**state, "head.weight.codes": state["head.weight.codes"].float()})


def test_graphs_hold_integers(mixed):
    _, made, ids = mixed
    with apart(made):  # weights that are read in place
        exported = torch.export.export(made, (ids,), dynamic_shapes=({0: torch.export.Dim("n")},))
    named = {str(node.target) for node in exported.graph.nodes}
    assert "tricomp.integer_linear.default" in named
    assert torch.equal(exported.module()(ids[:2]), made(ids[:2]))
    compiled = torch.compile(made.block, backend="aot_eager")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), made.block(x))


def test_there_are_no_gradients(mixed):
    _, made, _ = mixed
    x = torch.randn(1, 4, 32, requires_grad=True)
    for layer in (made.block.linear1, made.lstm, made.block.self_attn.out_proj):
        with pytest.raises(InvalidArgument, match="give no gradients"):
            layer(x)
        with torch.no_grad():
            layer(x)
    with pytest.raises(InvalidArgument, match=r"expected an input \[\.\.\., 32\], got \[2, 31\]"):
        made.block.linear1(torch.randn(2, 31))


def test_what_stays_in_place_is_read_as_floats():
    torch.manual_seed(7)
    model = nn.Sequential(nn.LSTM(16, 16, batch_first=True)).eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 16)
    made: Any = convert(model, plan(model, x))
    held = {name: parameter for name, parameter in made.named_parameters() if parameter.ndim > 1}
    assert not held
    out, wanted = made(x)[0], model(x)[0]
    assert len(calls) >= 2
    assert (out - wanted).norm() / wanted.norm() < 0.02
    assert torch.equal(copy.deepcopy(made)(x)[0], out)
    with pytest.raises(TypeError, match="cannot assign"):
        made[0].weight_ih_l0 = torch.zeros(64, 16)


def test_weights_know_their_codes():
    weight = structured(5, 3, 7)
    for bits in (8, 4):
        made = IntegerWeight.of(weight, bits, 16, scale_dtype="bfloat16")
        again = IntegerWeight.from_quantized(made.quantized())
        assert torch.equal(again.codes, made.codes)
        assert torch.equal(again(), made())
        assert made.codes.numel() == (105 if bits == 8 else 5 * 11)
    turned = IntegerWeight.of(weight[:, 0], is_turned=True)
    assert turned.shape == (5, 7)
    assert turned.codes.shape == (7, 5)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_codes_are_packed_where_they_are_as_the_core_packs_them(n):
    codes = torch.randint(-7, 8, (5, n), dtype=torch.int8)
    expected = pack_int4(codes.numpy())
    given = codes.clone()
    assert packed(given).numpy().tobytes() == expected.tobytes()
    assert torch.equal(given, codes)
