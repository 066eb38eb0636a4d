"""Graphs of models as plain values: what is read back computes the same, and nothing that is no graph is run."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

import msgpack
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.export import Dim, export  # noqa: E402
from tricomp_torch.integers import describing, operators, program, steps, structure  # noqa: E402

from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode, UnsupportedVersion  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:The tensor attributes self.lstm._flat_weights"
)  # torch.export's, of nn.LSTM


class Tagger(nn.Module):
    """Attention, an LSTM, tied weights, a constant, an argument that may be None, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(10, 10).tril().bool(), persistent=False)

    def forward(self, ids, *, scale=None):
        x = self.attention(self.embedding(ids))
        hidden, _ = self.lstm(x)
        n = ids.shape[1]
        logits = self.head(x)[:, -1] * (1.0 if scale is None else scale)
        return {
            "logits": logits,
            "rest": [hidden, (self.get_buffer("mask")[:n, :n], torch.tensor([1.5, float("inf")]) + n)],
        }


class Pictures(nn.Module):
    """Convolutions, batch norm, an operation in place, sizes that vary."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = nn.functional.relu(self.norm(self.convolution(x)), inplace=True)
        return self.head(y.flatten(2).mean(-1)), y[..., ::2]


@pytest.fixture(scope="module")
def tagger():
    torch.manual_seed(3)
    model = Tagger().eval()
    ids = torch.randint(0, 50, (2, 5))
    exported = export(model, (ids,), {"scale": None}, dynamic_shapes={"ids": {0: Dim("batch", max=64)}, "scale": None})
    return exported, *stored(exported)


def stored(exported):
    described, tensors = describing.describe(exported)
    return msgpack.unpackb(msgpack.packb(described), strict_map_key=False), tensors


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def equal(left, right):
    return [x.numpy().tobytes() for x in leaves(left)] == [x.numpy().tobytes() for x in leaves(right)]


def test_a_graph_that_went_through_a_file_computes_the_same_bits(tagger):
    exported, described, tensors = tagger
    ids = torch.randint(0, 50, (7, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = exported.module()(ids, scale=None)
        read = program.read(described, tensors)
        assert equal(read(ids), expected)
        assert equal(read(ids=ids, scale=None), expected)
    assert list(read(ids)) == ["logits", "rest"]
    assert isinstance(read(ids)["rest"][1], tuple)


def test_names_of_tensors_are_those_of_the_model_and_tied_ones_are_one_tensor(tagger):
    _, described, tensors = tagger
    names = {node[2] for node in described["nodes"] if node[1] == "tensor"}
    assert names == set(tensors)
    assert {"mask", "lstm.weight_ih_l0"} <= names
    assert len({tensors[name].data_ptr() for name in names & {"head.weight", "embedding.weight"}}) == 1


def test_sizes_that_vary_and_operations_in_place():
    torch.manual_seed(4)
    model = Pictures().eval()
    sizes = {0: Dim("n"), 2: Dim("h", min=2), 3: Dim("w", min=3)}
    exported = export(model, (torch.randn(2, 3, 9, 9),), dynamic_shapes={"x": sizes})
    x = torch.randn(5, 3, 7, 11)
    with torch.no_grad():
        assert equal(program.read(*stored(exported))(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "keywords", "text"),
    [
        ((), {}, "missing ['ids']"),
        ((torch.zeros(2, 6, dtype=torch.long),), {}, "expected int64 of shape (any, 5), got int64 of shape (2, 6)"),
        ((torch.zeros(2, 5),), {}, "got float32 of shape (2, 5)"),
        (([1, 2],), {}, "expected a tensor, got list"),
        ((torch.zeros(2, 5, dtype=torch.long), None, 3), {}, "takes 2 inputs"),
        ((torch.zeros(2, 5, dtype=torch.long),), {"ids": None}, "got ids twice"),
        ((torch.zeros(2, 5, dtype=torch.long),), {"mask": 1}, "unexpected ['mask']"),
        ((torch.zeros(2, 5, dtype=torch.long),), {"scale": 2.0}, "holds for that value only"),
    ],
)
def test_inputs_of_another_form_are_refused(tagger, arguments, keywords, text):
    read = program.read(*tagger[1:])
    with pytest.raises(InvalidArgument) as error:
        read(*arguments, **keywords)
    assert text in str(error.value)


def test_a_program_is_not_trained(tagger):
    read = program.read(*tagger[1:])
    assert not read.training
    assert read.eval() is read
    with pytest.raises(InvalidArgument, match="inference only"):
        read.train()


def test_a_program_is_copied_filled_anew_and_compiled_as_a_whole():
    torch.manual_seed(4)
    x = torch.randn(2, 3, 9, 9)
    read = program.read(*stored(export(Pictures().eval(), (x,))))
    made = copy.deepcopy(read)
    with torch.no_grad():
        expected = read(x)
        assert equal(made(x), expected)
        made.load_state_dict({name: torch.zeros_like(one) for name, one in made.state_dict().items()}, assign=True)
        assert not equal(made(x), expected)
        assert equal(read(x), expected)
        compiled = torch.compile(read, backend="eager", fullgraph=True)
        assert equal(compiled(x), expected)


def test_what_steps_compute_is_let_go_of_after_its_last_use():
    made: list[weakref.ref[Any]] = []

    def step(*parts, last=None):
        alive = sum(reference() is not None for reference in made)
        assert alive <= 2, "the first, which the last step asks for, and the one before"
        result = torch.ones(1)
        made.append(weakref.ref(result))
        return result

    builder = steps.Builder()
    first = before = builder.call(step, [builder.input(), builder.constant(3)], {})
    for _ in range(5):
        before = builder.call(step, [before], {})
    builder.call(step, [], {})  # nobody asks for it
    run = builder.finished([builder.call(step, [before], {"last": first})])
    for _ in range(2):
        made.clear()
        assert torch.equal(*run([], [torch.zeros(1)]), torch.ones(1))
        assert sum(reference() is not None for reference in made) == 0


def test_control_flow_is_refused_by_name():
    class Branches(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(UnsupportedNode, match="Save without the graph"):
        describing.describe(export(Branches(), (torch.ones(3),)))


@pytest.mark.parametrize(
    "name",
    [
        *("aten.from_file.default", "aten.set_.source_Tensor", "aten.resize_.default", "aten._unsafe_view.default"),
        *("prims.add.default", "aten.add", "os.system.default", "operator.attrgetter", "builtins.eval", "", None, 7),
        *("aten.add.no_such", "aten.no_such.default", "aten.__class__.default", "aten.add.__class__"),
    ],
)
def test_operators_a_file_may_not_name(name):
    with pytest.raises(CorruptFile):
        operators.operator_of(name, "graph")


def test_operators_that_only_others_have_are_told_apart():
    with pytest.raises(CorruptFile, match=f"which torch {re.escape(torch.__version__)} does not have"):
        operators.operator_of("aten.no_such.default", "graph")
    with pytest.raises(CorruptFile, match="which this tricomp does not have. Load it with a newer one"):
        operators.operator_of("tricomp.no_such.default", "graph")


HARM = "x): __import__('os').abort() #"


def damaged(described, what):
    tree: Any = copy.deepcopy(described)
    node = next(node for node in tree["nodes"] if node[1] == "aten.linear.default")
    tensor = next(node for node in tree["nodes"] if node[1] == "tensor")
    leaf = tree["inputs"]["leaves"][0]
    match what:
        case "name of an input":
            leaf["name"] = HARM
        case "keyword for an input":
            leaf["name"] = "lambda"
        case "name of a keyword":
            node[3][HARM] = 1
        case "name of a tensor":
            tensor[2] = HARM
        case "tensor that is not there":
            tensor[2] = "no.such"
        case "node that is not there":
            node[2][0] = {"node": "nobody"}
        case "node twice":
            tree["nodes"].append(copy.deepcopy(node))
        case "no arguments":
            del node[2:]
        case "unknown kind":
            node[2].append({"code": "1"})
        case "dtype that is none":
            node[2].append({"dtype": "nn"})
        case "no nodes":
            del tree["nodes"]
        case "outputs":
            tree["result"].append(1)
        case "structure":
            tree["output"] = ["set", []]
        case "structure of the inputs":
            tree["inputs"]["structures"][0] = ["tuple", []]
        case "depth":
            deep: Any = "*"
            for _ in range(200):
                deep = ["list", [deep]]
            tree["output"] = deep
        case "nodes of numbers":
            tree["nodes"][3] = 7
    return tree


@pytest.mark.parametrize(
    "what",
    [
        *(
            "name of an input",
            "keyword for an input",
            "name of a keyword",
            "name of a tensor",
            "tensor that is not there",
        ),
        *("node that is not there", "node twice", "no arguments", "unknown kind", "dtype that is none", "no nodes"),
        *("outputs", "structure", "structure of the inputs", "depth", "nodes of numbers"),
    ],
)
def test_a_damaged_graph_is_an_error_and_runs_nothing(tagger, what):
    _, described, tensors = tagger
    with pytest.raises(CorruptFile):
        program.read(damaged(described, what), {**tensors, HARM: torch.ones(1)})


def test_another_version_is_refused(tagger):
    _, described, tensors = tagger
    trees: tuple[Any, ...] = ({**described, "version": 2}, None, [])
    for tree in trees:
        with pytest.raises(UnsupportedVersion):
            program.read(tree, tensors)


def test_output_classes_come_back_as_their_fields():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    read = program.read(*stored(export(model, (), inputs, strict=False)))
    with torch.no_grad():
        assert read(**inputs)["logits"].numpy().tobytes() == model(**inputs).logits.numpy().tobytes()


def test_structures_that_no_file_can_hold():
    spec = torch.utils._pytree.tree_structure({1.5: 0})
    with pytest.raises(UnsupportedNode):
        structure.describe(spec, "output")
