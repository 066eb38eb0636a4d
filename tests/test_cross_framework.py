"""One file, two frameworks: what PyTorch writes JAX reads and writes back, bit for bit, and the other way round."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

import jax
import jax.numpy as jnp
import optax
import torch
import tricomp_jax
import tricomp_torch
from flax.training.train_state import TrainState
from tricomp_torch import demo_gpt

import tricomp
from tests.benchmarks import facts, table, training, training_jax
from tests.cases import weights
from tricomp import cli
from tricomp.demos.task import Size, library_text

SIZE = Size(n_layers=2, n_heads=3, width=51, context=33, batch=3)
N_STEPS, N_SAVED = 12, 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small spend their time on waiting for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def raw(array: Any) -> bytes:
    """The bytes of an array of either framework, or numpy's, in C order."""
    if isinstance(array, torch.Tensor):
        flat = array.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array).tobytes()


def is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | jax.Array | np.ndarray)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of each leaf of a tree of plain nodes or named tuples."""
    if isinstance(node, Mapping):
        items = list(node.items())
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        items = list(zip(node._fields, node, strict=True))
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    else:
        yield path, node
        return
    for key, value in items:
        yield from leaves(value, f"{path}/{key}")


def assert_same(found: Any, expected: Any) -> None:
    """Paths, dtypes, shapes and bits of arrays, and types and values of all else, whichever framework's."""
    one, other = dict(leaves(found)), dict(leaves(expected))
    assert set(one) == set(other)
    for path, value in other.items():
        if is_array(value):
            dtypes = [str(array.dtype).removeprefix("torch.") for array in (one[path], value)]
            assert dtypes[0] == dtypes[1], path
            assert (tuple(one[path].shape), raw(one[path])) == (tuple(value.shape), raw(value)), path
        else:
            assert (type(one[path]), one[path]) == (type(value), value), path


class TorchRun:
    """A GPT with tied embeddings and dropout under AdamW; beside it a bfloat16 copy, counters and a strange layout."""

    def __init__(self, seed: int = 0) -> None:
        self.training = demo_gpt.begin(SIZE, N_STEPS, seed)
        self.norm = torch.nn.BatchNorm1d(7)
        self.losses: list[str] = []

    def steps(self, n: int) -> "TorchRun":
        for _ in range(n):
            self.losses.append(self.training.step().hex())
            self.norm(self.training.model.position[:14].detach().reshape(-1, 7))
        return self

    def state(self) -> dict[str, Any]:
        run = self.training
        model = run.model.state_dict()
        weight = model["blocks.0.up.weight"]
        return {
            "model": model,
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "norm": self.norm.state_dict(),  # num_batches_tracked: int64, no dimensions
            "rng": torch.get_rng_state(),
            "half": {"up": weight.bfloat16(), "position": model["position"].half()},
            "seen": torch.arange(-3, 30) << 40,
            "convolution": weight[:, :50].reshape(17, 2, 12, 25).to(memory_format=torch.channels_last),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        for part in ("model", "optimizer", "scheduler"):
            getattr(self.training, part).load_state_dict(state[part])
        self.norm.load_state_dict(state["norm"])
        torch.set_rng_state(state["rng"])


class Saved:
    """The file of a step by PyTorch, the state of that step and of the next, and the losses from there to the end."""

    def __init__(self, folder: Path) -> None:
        run = TorchRun().steps(N_SAVED)
        self.path = str(folder / "torch.tri")
        self.report = tricomp_torch.save(run.state(), self.path)
        self.state = tricomp_torch.load(self.path)  # a copy of its own; that it is exact is tested elsewhere
        assert_same(self.state, run.state())
        run.steps(1)
        self.next_path = str(folder / "torch-next.tri")
        tricomp_torch.save(run.state(), self.next_path)
        run.steps(N_STEPS - N_SAVED - 1)
        self.losses, self.end = run.losses[N_SAVED:], run.state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("cross"))


def test_a_torch_checkpoint_opens_in_jax_as_the_same_arrays(saved: Saved) -> None:
    state = tricomp_jax.load(saved.path)
    assert_same(state, saved.state)
    assert [path for path, _ in leaves(state)] == [path for path, _ in leaves(saved.state)]
    assert type(state["model"]) is OrderedDict
    assert list(state["optimizer"]["state"]) == list(range(28))  # keys that are ints
    wide = [path for path, value in leaves(state) if type(value) is np.ndarray]
    assert wide == ["/norm/num_batches_tracked", "/seen"]  # int64, which jax would cut
    assert state["optimizer"]["state"][0]["step"].shape == ()


def test_a_torch_checkpoint_opens_in_jax_into_a_target(saved: Saved) -> None:
    expected = tricomp_jax.load(saved.path)
    like = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else leaf, expected)
    assert_same(tricomp_jax.load(saved.path, target=like), saved.state)
    like["model"]["position"] = like["model"]["position"].astype(jnp.bfloat16)
    with pytest.raises(tricomp.InvalidArgument, match=r"'model/position'.*float32\[33, 51\].*bfloat16\[33, 51\]"):
        tricomp_jax.load(saved.path, target=like)


def test_a_torch_run_goes_on_from_what_jax_wrote(saved: Saved, tmp_path: Path) -> None:
    report = tricomp_jax.save(tmp_path / "jax.tri", tricomp_jax.load(saved.path))
    coded = [{leaf.path: leaf.coded_bytes for leaf in one.leaves} for one in (report, saved.report)]
    assert coded[0] == coded[1]  # tied weights too
    assert coded[0]["model/head.weight"] == 0
    state = tricomp_torch.load(tmp_path / "jax.tri")
    assert_same(state, saved.state)
    run = TorchRun(seed=1)
    run.load(state)
    assert run.training.model.head.weight is run.training.model.embedding.weight
    run.steps(N_STEPS - N_SAVED)
    assert run.losses == saved.losses
    assert_same(run.state(), saved.end)


def test_a_delta_is_told_from_the_other_frameworks_file(saved: Saved, tmp_path: Path) -> None:
    state = tricomp_jax.load(saved.path)
    following = tricomp_jax.load(saved.next_path)
    whole = tricomp_jax.save(tmp_path / "jax.tri", state)
    by_jax = tricomp_jax.save(tmp_path / "jax-delta.tri", following, reference=saved.path)
    by_torch = tricomp_torch.save(
        tricomp_torch.load(saved.next_path), tmp_path / "torch-delta.tri", reference=tmp_path / "jax.tri"
    )
    for report in (by_jax, by_torch):
        assert report.file_bytes < 0.85 * whole.file_bytes
    coded = [{leaf.path: leaf.coded_bytes for leaf in report.leaves} for report in (by_jax, by_torch)]
    assert coded[0] == coded[1]
    expected = tricomp_torch.load(saved.next_path)
    for reference in (saved.path, str(tmp_path / "jax.tri")):  # either's file holds the same
        for load in (tricomp_torch.load, tricomp_jax.load):
            assert_same(load(str(tmp_path / "jax-delta.tri"), reference=reference), expected)
            assert_same(load(str(tmp_path / "torch-delta.tri"), reference=reference), expected)
    with pytest.raises(tricomp.WrongReference):
        tricomp_torch.load(str(tmp_path / "jax-delta.tri"), reference=saved.next_path)


def test_the_command_knows_no_difference(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "jax.tri")
    tricomp_jax.save(path, tricomp_jax.load(saved.path))
    listed = []
    for one in (saved.path, path):
        assert cli.main(["verify", one]) == 0
        assert capsys.readouterr().out.startswith(f"{one}: intact (")
        assert cli.main(["inspect", "--json", one]) == 0
        listed.append(json.loads(capsys.readouterr().out)["leaves"])
    assert listed[0] == listed[1]
    assert cli.main(["diff", saved.path, path]) == 0
    assert f"{saved.path} and {path} are equal" in capsys.readouterr().out
    assert cli.main(["diff", saved.next_path, path]) == 1


def test_a_run_of_torch_goes_through_jax_in_one_store(tmp_path: Path) -> None:
    """With the metadata that it restored, what a hook saves is a Checkpointer's again: objects, ties and generators."""
    run = demo_gpt.begin(SIZE, N_STEPS)
    with tricomp_torch.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            run.step()
            checkpointer.save(step, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    expected = [run.step().hex() for _ in range(3)]

    store = tricomp.Store(tmp_path)
    with tricomp_jax.CheckpointHook(store) as hook:
        restored = hook.restore_latest(tricomp_jax.unflatten(tricomp_jax.Flat(store.load())))
        assert restored is not None
        assert restored.step == 3
        saving = hook(4, restored.state, restored.metadata)
        assert saving is not None
        assert saving.result().parent is not None

    run = demo_gpt.begin(SIZE, N_STEPS, seed=1)
    with tricomp_torch.Checkpointer(tmp_path) as checkpointer:
        found = checkpointer.restore(model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    assert found is not None
    assert found.step == 4
    assert [run.step().hex() for _ in range(3)] == expected


# Wide enough for its matrices to be coded each by itself, as in any real model. Leaves that share a frame have no
# scales by row and column, and then it matters that Flax kernels lie the other way round.
RUN = replace(training_jax.GPT_SMALL, width=131, n_heads=1, vocabulary=389, context=41)
RATES = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
N_PAIR, N_BEFORE = 40, 30


def flax_path(name: str) -> tuple[str, ...]:
    """Where a parameter of the torch GPT stands in the Flax one."""
    *modules, last = name.replace("blocks.", "blocks_").split(".")
    if last == "weight":
        last = "scale" if "norm" in modules[-1] else "embedding" if modules[-1] in ("token", "position") else "kernel"
    return (*modules, last)


def flax_params(model: torch.nn.Module) -> dict[str, Any]:
    """The parameters of the torch GPT as the Flax one has them: kernels lie input first."""
    params: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        *modules, last = flax_path(name)
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        array = parameter.detach().numpy()
        node[last] = jnp.array(array.T if last == "kernel" else array)
    return params


class Pair:
    """One GPT stepped by torch.optim.AdamW and by optax.adamw: from the same weights, on the same batches."""

    def __init__(self) -> None:
        tokens = training.tokens_of(library_text(300_000).tobytes(), RUN.vocabulary)
        torch.manual_seed(0)
        model, loss_of = training.Gpt(RUN), torch.nn.functional.cross_entropy
        betas = (RATES["b1"], RATES["b2"])
        adamw = torch.optim.AdamW(
            model.parameters(), RUN.learning_rate, betas, eps=RATES["eps"], weight_decay=RATES["weight_decay"]
        )
        create: Any = TrainState.create
        transform = optax.adamw(RUN.learning_rate, **RATES)
        state = create(apply_fn=training_jax.Gpt(RUN).apply, params=flax_params(model), tx=transform)
        self.state = state.replace(step=jnp.zeros((), jnp.int32))  # of one type from the first step on
        rng = np.random.default_rng(0)
        self.losses: list[tuple[float, float]] = []
        self.kept: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
        for n in range(1, N_PAIR + 1):
            starts = rng.integers(len(tokens) - RUN.context - 1, size=RUN.batch)
            self.rows = tokens[starts[:, None] + np.arange(RUN.context + 1)]
            rows = torch.from_numpy(self.rows)
            loss = loss_of(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            self.state, jax_loss = training_jax.step(self.state, self.rows.astype(np.int32))
            self.losses.append((loss.item(), float(jax_loss)))
            if n in (N_BEFORE, N_PAIR):
                self.kept[n] = (training.arrays_of(model, adamw), training_jax.arrays_of(self.state))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def file_bits(arrays: dict[str, np.ndarray], path: Path, reference: dict[str, np.ndarray] | None = None) -> float:
    """Bits per element of a file of arrays, which come back from it."""
    report = tricomp.save(path, arrays, reference=reference)
    found = tricomp.load(path, reference=reference)
    assert {name: raw(array) for name, array in found.items()} == {name: raw(one) for name, one in arrays.items()}
    return 8 * report.file_bytes / sum(array.size for array in arrays.values())


@pytest.mark.parametrize("kind", ["m", "v"])
@pytest.mark.parametrize("is_delta", [False, True], ids=["whole", "10 apart"])
def test_moments_of_torch_and_optax_compress_alike(pair: Pair, tmp_path: Path, kind: str, is_delta: bool) -> None:
    assert all(abs(a - b) < 1e-3 * a for a, b in pair.losses)  # the same model on the same data
    bits = []
    for of in range(2):
        now, before = (training.stream(pair.kept[n][of], kind) for n in (N_PAIR, N_BEFORE))
        bits.append(file_bits(now, tmp_path / "moments.tri", before if is_delta else None))
        assert bits[-1] < 28
    assert abs(bits[1] / bits[0] - 1) < 0.005, bits


def test_a_flax_state_opens_in_torch_and_trains_on(pair: Pair, tmp_path: Path) -> None:
    table = jnp.asarray(weights((33, 65)))
    tree = {
        "train": pair.state,
        "key": jax.random.key(7),
        "half": {"bfloat16": table.astype(jnp.bfloat16), "float8": table.astype(jnp.float8_e4m3fn)},
        "small": jnp.arange(-8, 8, dtype=jnp.int4),
        "none": jnp.zeros((0, 5), jnp.uint16),
    }
    tricomp_jax.save(tmp_path / "jax.tri", tree)
    state = tricomp_torch.load(tmp_path / "jax.tri")
    assert state["train"]["opt_state"][0]._fields == ("count", "mu", "nu")
    # PyTorch knows random keys as their data, and int4 as the int8 in which it is stored; and so does what it writes.
    plain = {**tree, "key": jax.random.key_data(tree["key"]), "small": tree["small"].astype(jnp.int8)}
    train = {name: getattr(pair.state, name) for name in ("step", "params", "opt_state")}
    assert_same(state, {**plain, "train": train})
    assert type(state["train"]["params"]["token"]["embedding"]) is torch.Tensor
    assert (state["key"].dtype, state["half"]["float8"].dtype) == (torch.uint32, torch.float8_e4m3fn)

    tricomp_torch.save(state, tmp_path / "torch.tri")
    assert cli.main(["diff", str(tmp_path / "jax.tri"), str(tmp_path / "torch.tri")]) == 0
    back = tricomp_jax.load(tmp_path / "torch.tri", target=plain)
    structure: Any = jax.tree.structure(plain)
    assert jax.tree.structure(back) == structure
    rows = pair.rows.astype(np.int32)
    (expected, loss), (found, loss_found) = (training_jax.step(one["train"], rows) for one in (tree, back))
    assert float(loss).hex() == float(loss_found).hex()
    assert [raw(leaf) for leaf in jax.tree.leaves(found)] == [raw(leaf) for leaf in jax.tree.leaves(expected)]


def test_the_benchmark_measures_states_of_jax_by_stream(pair: Pair) -> None:
    pytest.importorskip("zipnn")
    from tests.benchmarks import ratio

    streams = {stream.name: stream for stream in ratio.gpt_streams({n: kept[1] for n, kept in pair.kept.items()})}
    assert list(streams)[4:] == [f"{kind}, 10 apart" for kind in ("w float32", "w bfloat16", "m", "v")]
    row = ratio.measure(streams["v, 10 apart"])
    assert row["n_elements"] == sum(leaf.size for leaf in jax.tree.leaves(pair.state.params))
    assert 0 < row["dense"] < row["zipnn_xor"] < row["raw"] == 32


def test_what_was_measured_on_optax_state_is_told_and_leads() -> None:
    path = sorted(facts.RESULTS.glob("*-ratio-jax.json"))[-1]
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == table.report(results)
    assert len(results["streams"]) == 16
    for row in results["streams"]:
        assert row["dense"] < min(row["zipnn"], row.get("zipnn_xor", row["zipnn"]), row["zstd"]), row["stream"]
