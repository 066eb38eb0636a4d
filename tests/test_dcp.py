"""Distributed checkpoints on real process groups of one machine: any sharding comes back bit for bit on any other."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
import torch.distributed.checkpoint as torch_checkpoint
from tricomp_torch import dcp
from tricomp_torch.dcp import index as indices
from tricomp_torch.dcp import rebasing

import tricomp
from tests.dcp_ranks import begin, blank, state_of
from tests.dcp_scenes import PLAIN, noted, same
from tests.groups import Groups
from tricomp.checkpoint import put
from tricomp.container import check_of
from tricomp.errors import (
    CorruptFile,
    InvalidArgument,
    MissingFile,
    MissingParent,
    StorageError,
    TricompError,
    UnsupportedNode,
    UnsupportedVersion,
)

stock: Any = torch_checkpoint
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def groups():
    asked = Groups("tests.dcp_scenes")
    yield asked
    asked.end()


@pytest.fixture(scope="module")
def saved(groups, tmp_path_factory):
    """Folders of checkpoints that four ranks saved, and two."""
    folder = tmp_path_factory.mktemp("dcp")
    groups.ask(4, "save_chain", folder / "four")
    groups.ask(2, "save_chain", folder / "two", first=str(folder / "four" / "3"))
    return folder


def load_here(folder):
    """Load a checkpoint in this process, which is no rank of anything, into a whole model."""
    state = blank(state_of(begin(), plain=dict.fromkeys(PLAIN)))
    dcp.load(state, checkpoint_id=folder)
    return state


@pytest.mark.parametrize("ranks", ["four", "two"])
def test_any_number_of_ranks_loads_onto_one(saved, ranks):
    """All that save_chain saved; what it loaded itself, 4 -> 2 among it, it has compared."""
    for name in (*"0123", "behind", "over"):
        path = saved / ranks / name
        state = blank(state_of(begin(), plain=dict.fromkeys(noted(path)["plain"])))
        dcp.load(state, checkpoint_id=path)
        assert same(state, path), name
        assert state["plain"] == {**PLAIN, **({"list": [1, 2]} if name == "behind" else {})}


def test_two_ranks_load_onto_four(groups, saved, tmp_path):
    groups.ask(4, "load_onto", saved / "two" / "2", other=str(tmp_path / "next"))
    assert same(load_here(tmp_path / "next"), tmp_path / "next")


def test_a_chain_is_of_deltas_until_the_next_keyframe(saved):
    four = saved / "four"
    kinds = [[file.since_keyframe for file in indices.read(str(four / name)).files] for name in (*"0123", "behind")]
    assert kinds == [[0] * 4, [1] * 4, [2] * 4, [0] * 4, [1] * 4]
    sizes = [sum(file.n_bytes for file in indices.read(str(four / name)).files) for name in "012"]
    assert sizes[1] < 0.85 * sizes[0]
    assert sizes[2] < 0.85 * sizes[0]
    assert dcp.chain(four / "2") == [str(four / name) for name in "012"]
    assert dcp.chain(four / "3") == [str(four / "3")]


def test_shards_without_counterpart_stand_alone(saved):
    """Two ranks continued from what four had saved: what is sharded became keyframes, what is not may be a delta."""
    index = indices.read(str(saved / "two" / "0"))
    first = indices.read(str(saved / "four" / "3"))
    assert sum(file.n_bytes for file in index.files) > 0.95 * sum(file.n_bytes for file in first.files)
    assert set(dcp.chain(saved / "two" / "0")) <= {str(saved / "two" / "0"), str(saved / "four" / "3")}


def test_what_is_replaced_leaves_no_files(saved):
    over = saved / "four" / "over"
    assert {file.name for file in indices.read(str(over)).files} | {indices.INDEX_NAME} == set(os.listdir(over))


def test_files_open_as_any_other(saved):
    """A rank's file is a `.tri` file: what is in it is told and checked without the index."""
    index = indices.read(str(saved / "four" / "0"))
    sizes = []
    for stored in index.files:
        with tricomp.open(saved / "four" / "0" / stored.name) as file:
            assert file.content_id == stored.content_id
            file.check()
            sizes += [file.leaf(path).shape for path in file if path.startswith("model.inner.0.weight/")]
    assert sorted(sizes) == [(62, 131), (65, 131), (65, 131), (65, 131)]


def test_other_meshes(groups, tmp_path):
    groups.ask(4, "meshes", tmp_path)


@pytest.mark.slow
def test_saves_behind_training_in_a_process(groups, tmp_path):
    groups.ask(2, "behind_in_a_process", tmp_path)
    assert same(load_here(tmp_path / "1"), tmp_path / "1")


def test_a_rank_that_fails(groups, tmp_path):
    groups.ask(2, "failures", tmp_path)


@pytest.mark.parametrize("phase", ["stage", "plan", "write", "finish"])
def test_a_rank_that_is_killed(groups, tmp_path, phase):
    groups.ask(2, "killed", tmp_path, codes=[-9, 7] if phase == "finish" else [7, -9], phase=phase)
    with pytest.raises(MissingFile, match=r"bad: is no complete checkpoint"):
        load_here(tmp_path / "bad")
    assert same(load_here(tmp_path / "good"), tmp_path / "good")


def small(seed=0):
    """A state of one process: several dtypes, empty, 0-d and tied tensors, and values that are none."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(37, 29, generator=generator) * torch.logspace(-4, 0, 29)
    return {
        "model": {"a/b": weight, "tied": weight, "half": torch.randn(5, 3, generator=generator).bfloat16()},
        "list": [torch.randn(4, generator=generator), {"none": torch.zeros(0, 3), "step": torch.tensor(7 + seed)}],
        "rng": ("MT19937", np.arange(5, dtype=np.uint32) + seed, 3, 0.5),
        "scale": 2.0**-1074,
        "dtype": torch.float8_e4m3fn,
    }


def bits(node):
    if isinstance(node, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(node).contiguous()
        return (
            str(node.dtype),
            list(tensor.shape),
            tensor.reshape(-1).view(torch.uint8).tolist() if len(tensor.shape) else tensor.item(),
        )
    if isinstance(node, dict):
        return {key: bits(value) for key, value in node.items()}
    return (type(node), [bits(value) for value in node]) if isinstance(node, list | tuple) else repr(node)


def loaded(folder, like=None, **options):
    state = blank(small() if like is None else like)
    dcp.load(state, checkpoint_id=folder, **options)
    return state


def rank_file(folder):
    (stored,) = indices.read(str(folder)).files
    return folder / stored.name


def test_one_process_needs_no_group(tmp_path):
    writer = dcp.TricompWriter(tmp_path / "0", threads=1)
    for step in range(3):
        dcp.save(small(step), checkpoint_id=tmp_path / f"{step}", storage_writer=writer)
    state = small(9)
    dcp.async_save(state, checkpoint_id=tmp_path / "9", reference=tmp_path / "2").result(120)
    for step in (0, 1, 2, 9):
        assert bits(loaded(tmp_path / f"{step}")) == bits(small(step))
    assert dcp.chain(tmp_path / "9") == [str(tmp_path / name) for name in "0129"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in "0129":
        os.rename(tmp_path / name, moved / name)
    assert bits(loaded(moved / "9")) == bits(small(9))


def test_memory_of_copies_is_used_again(tmp_path):
    """Two buffers take turns where one is held for the next save; what is held gives the bytes that decoding gives."""
    large = {"w": torch.randn(300, 301, generator=torch.Generator().manual_seed(0))}
    held: Any = dcp.TricompWriter()
    decoded: Any = dcp.TricompWriter(reference_in="store")
    for step in range(5):
        truth = bits(large)
        for name, writer in (("held", held), ("decoded", decoded)):
            saving = dcp.async_save(large, checkpoint_id=tmp_path / f"{name}{step}", storage_writer=writer)
            saving.result(120)
        large["w"] *= 1.001
        large["w"][step] += 1
        for name in ("held", "decoded"):
            state = {"w": torch.zeros(300, 301)}
            dcp.load(state, checkpoint_id=tmp_path / f"{name}{step}")
            assert bits(state) == truth
        bodies = [rank_file(tmp_path / f"{name}{step}").read_bytes() for name in ("held", "decoded")]
        assert bodies[0] == bodies[1]
    assert len(held._buffers) == 2
    assert len(decoded._buffers) == 1
    assert any(buffer.holds(held._held.snapshot.buffers[0]) for buffer in held._buffers)
    held.close()
    dcp.save(large, checkpoint_id=tmp_path / "closed", storage_writer=held)
    assert not np.shares_memory(held._held.snapshot.buffers[0], large["w"].numpy())  # it may change at once
    assert len(dcp.chain(tmp_path / "closed")) == 6


def test_what_is_rounded_is_coded_against_what_a_reader_sees(tmp_path):
    writer = dcp.TricompWriter(spec=tricomp.Spec(keep_mantissa_bits={"m.w": 4}))
    state = {"m": {"w": small()["model"]["a/b"], "v": small()["model"]["a/b"].square()}}
    for step in range(3):
        dcp.save(state, checkpoint_id=tmp_path / f"{step}", storage_writer=writer)
        found = blank(state)
        dcp.load(found, checkpoint_id=tmp_path / f"{step}")
        assert bits(found["m"]["v"]) == bits(state["m"]["v"])
        assert not (found["m"]["w"].view(torch.int32) & ((1 << 19) - 1)).any()
        assert torch.allclose(found["m"]["w"], state["m"]["w"], rtol=2**-5, atol=0)
        state["m"]["w"] *= 1.01
    assert len(dcp.chain(tmp_path / "2")) == 3


def test_nothing_is_pickled(tmp_path, monkeypatch):
    """Nor with torch's own planner for saves; the one for loads would unpickle, and is refused."""

    def refuse(*arguments, **options):
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    stock.save(small(), storage_writer=dcp.TricompWriter(tmp_path / "a"))
    assert bits(loaded(tmp_path / "a")) == bits(small())
    state = {"scale": 0.0}
    with pytest.raises(InvalidArgument, match=r"'scale': is no tensor, and a DefaultLoadPlanner would unpickle it"):
        dcp.load(state, checkpoint_id=tmp_path / "a", planner=stock.DefaultLoadPlanner())
    tensors = {"model": blank(small()["model"])}
    stock.load(tensors, storage_reader=dcp.TricompReader(tmp_path / "a"))
    assert bits(tensors["model"]) == bits(small()["model"])

    class Own(stock.DefaultSavePlanner):  # type: ignore[misc]
        pass

    with pytest.raises(InvalidArgument, match=r"a Own would pickle it. Derive your planner from tricomp_torch"):
        dcp.save(small(), checkpoint_id=tmp_path / "b", planner=Own())
    writer = stock.FileSystemWriter(tmp_path / "c")
    with pytest.raises(stock.CheckpointException, match="Use it with a TricompWriter"):
        stock.save(small(), storage_writer=writer, planner=dcp.TricompSavePlanner())


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (object(), r"'x.y'.*object cannot be stored"),
        (torch.Generator(), r"'x.y'.*Generator. Store its get_state"),
        ((1, torch.zeros(3)), r"'x.y/1': a tensor in a tuple"),
        (torch.zeros(3).to_sparse(), r"'x.y': its layout is torch.sparse_coo"),
        ({1, (2,)}, r"'x.y'.*set cannot be stored"),
    ],
    ids=["object", "generator", "tuple", "sparse", "set"],
)
def test_what_cannot_be_saved_is_named(tmp_path, entry, text):
    for save in (dcp.save, lambda *a, **o: dcp.async_save(*a, **o).result(120)):
        with pytest.raises(UnsupportedNode, match=text):
            save({"ok": torch.ones(3), "x": {"y": entry}}, checkpoint_id=tmp_path / "a")
    assert not (tmp_path / "a" / indices.INDEX_NAME).exists()


def test_a_state_that_does_not_fit_is_left_alone(tmp_path):
    dcp.save(small(), checkpoint_id=tmp_path)
    like = blank(small())
    changes: list[tuple[dict, str]] = [
        (
            {"model": {"half": torch.ones(5, 3)}},
            r"'model.half': was saved as torch.bfloat16, the state has torch.float32",
        ),
        ({"model": {"half": torch.ones(5, 4)}}, r"'model.half' has the shape \[5, 4\], \[5, 3\] was saved"),
        ({"model": {"half": 3}}, r"'model.half' is a int, and a tensor was saved"),
        ({"scale": torch.ones(3)}, r"'scale' is a tensor, and no tensor was saved"),
    ]
    for change, text in changes:
        state = {**like, **change}
        before = bits(state)
        with pytest.raises(InvalidArgument, match=text):
            dcp.load(state, checkpoint_id=tmp_path)
        assert bits(state) == before
    state = {"model": {"half": torch.ones(5, 3)}}
    dcp.load(state, storage_reader=dcp.TricompReader(tmp_path, allow_cast=True))
    assert torch.equal(state["model"]["half"], small()["model"]["half"].float())


def test_a_damaged_index_is_told(tmp_path):
    """Cut at every byte, and flipped everywhere: never loaded, never anything but an error of ours."""
    dcp.save(small(), checkpoint_id=tmp_path)
    whole = (tmp_path / indices.INDEX_NAME).read_bytes()
    for n in range(0, len(whole), 3):
        for broken in (whole[:n], whole[:n] + bytes([whole[n] ^ 0x10]) + whole[n + 1 :]):
            with pytest.raises(TricompError):
                indices.unpack(broken, "index")
            body = broken[: max(len(broken) - 9, 6)]
            sealed = body + b"\xcf" + check_of(body).to_bytes(8, "big")
            try:  # with a checksum that is right
                indices.unpack(sealed, "index")
            except TricompError:
                pass
    (tmp_path / indices.INDEX_NAME).write_bytes(whole[:-1])
    with pytest.raises(CorruptFile, match=r"index.tricomp: checksum .* it is cut or damaged"):
        loaded(tmp_path)
    (tmp_path / indices.INDEX_NAME).write_bytes(whole[:5] + b"\2" + whole[6:])
    with pytest.raises(UnsupportedVersion, match=r"written by format 2; this tricomp reads 1"):
        loaded(tmp_path)


def test_a_damaged_file_is_told_by_name_and_entry(tmp_path):
    for name in "ab":
        dcp.save(small(ord(name)), checkpoint_id=tmp_path / name)
    path, other = rank_file(tmp_path / "a"), rank_file(tmp_path / "b")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(CorruptFile, match=rf"'list.0': {path}: its last \d+ bytes are no tail"):
        loaded(tmp_path / "a")
    flipped = bytearray(whole)
    with tricomp.open(other) as file:
        begin_of_frames = file._contents.frames[0].offset + 4
    flipped[begin_of_frames + 40] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(TricompError, match=str(path)):
        loaded(tmp_path / "a")
    path.write_bytes(other.read_bytes())
    with pytest.raises(CorruptFile, match=rf"'list.0': {path}: has content id .* file of another save"):
        loaded(tmp_path / "a")
    path.unlink()
    with pytest.raises(MissingFile, match=rf"'list.0': {path}: is gone, though the index names it"):
        loaded(tmp_path / "a")
    with pytest.raises(MissingFile, match=r"none: is no complete checkpoint"):
        loaded(tmp_path / "none")


def test_a_parent_that_is_gone_or_another_is_told(tmp_path, caplog):
    writer = dcp.TricompWriter()
    for name in "ab":
        dcp.save(small(ord(name)), checkpoint_id=tmp_path / name, storage_writer=writer)
    os.rename(tmp_path / "a", tmp_path / "c")
    with pytest.raises(MissingParent, match=r"'list.0': .*/b/rank_.* is coded against .*/a, which is not there"):
        loaded(tmp_path / "b")
    with pytest.raises(MissingParent, match="which is not there"):
        dcp.chain(tmp_path / "b")
    dcp.save(small(5), checkpoint_id=tmp_path / "d", storage_writer=writer)  # cannot be coded against what is broken
    assert "d/rank_00000" in caplog.text
    assert "stands alone" in caplog.text
    assert dcp.chain(tmp_path / "d") == [str(tmp_path / "d")]
    assert bits(loaded(tmp_path / "d")) == bits(small(5))
    dcp.save(small(6), checkpoint_id=tmp_path / "a")
    with pytest.raises(MissingParent, match=r"the checkpoint there is another one by now"):
        loaded(tmp_path / "b")
    with pytest.raises(MissingFile, match=r"none: is no complete checkpoint"):
        dcp.save(small(), checkpoint_id=tmp_path / "e", reference=tmp_path / "none")
    with pytest.raises(InvalidArgument, match=r"would replace its own reference"):
        dcp.save(small(), checkpoint_id=tmp_path / "a", reference=tmp_path / "a")
    assert bits(loaded(tmp_path / "a")) == bits(small(6))


def test_a_rebased_checkpoint_stands_alone(saved, tmp_path, monkeypatch):
    """Of four ranks. What is coded against it stays; broken off at any file, it loads, and can be rebased again."""
    for name in "012":
        shutil.copytree(saved / "four" / name, tmp_path / name)
        shutil.copy(f"{saved / 'four' / name}.json", f"{tmp_path / name}.json")
    n_put = 0

    def put_thrice(*arguments, **options):
        nonlocal n_put
        n_put += 1
        if n_put == 3:
            raise StorageError("no space left")
        return put(*arguments, **options)

    monkeypatch.setattr(rebasing, "put", put_thrice)
    with pytest.raises(StorageError, match="no space left"):
        dcp.rebase(tmp_path / "1")
    assert same(load_here(tmp_path / "1"), tmp_path / "1")
    assert same(load_here(tmp_path / "2"), tmp_path / "2")
    dcp.rebase(tmp_path / "1")
    assert dcp.chain(tmp_path / "1") == [str(tmp_path / "1")]
    shutil.rmtree(tmp_path / "0")
    assert same(load_here(tmp_path / "1"), tmp_path / "1")
    assert same(load_here(tmp_path / "2"), tmp_path / "2")
    assert dcp.chain(tmp_path / "2") == [str(tmp_path / name) for name in "12"]


def test_a_bucket(tmp_path):
    pytest.importorskip("fsspec")
    writer = dcp.TricompWriter()
    for step in range(2):
        dcp.save(small(step), checkpoint_id=f"memory://dcp/run/{step}", storage_writer=writer)
    assert bits(loaded("memory://dcp/run/1")) == bits(small(1))
    assert dcp.chain("memory://dcp/run/1") == ["memory://dcp/run/0", "memory://dcp/run/1"]


def test_arguments_are_checked(tmp_path):
    with pytest.raises(InvalidArgument, match="keyframe: expected"):
        dcp.TricompWriter(keyframe=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="stage_on is"):
        dcp.TricompWriter(stage_on="cpu")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="there is no folder to save to"):
        dcp.save(small())
    with pytest.raises(InvalidArgument, match="there is nothing to load"):
        dcp.load(small())
    with pytest.raises(InvalidArgument, match="spec, threads: belong to the storage_writer given"):
        dcp.save(small(), storage_writer=dcp.TricompWriter(tmp_path), spec=None, threads=1)
    with pytest.raises(InvalidArgument, match="use_collectives=False"):
        dcp.TricompWriter(tmp_path).set_up_storage_writer(True, use_collectives=False)


def test_the_adapter_does_without():
    """What needs torch.distributed is imported by name only."""
    folder = Path(dcp.__file__).parents[1]
    imports = re.compile(
        r"^\s*(from|import) (tricomp_torch\.dcp|torch\.distributed)|^from tricomp_torch import dcp", re.M
    )
    # Transformers' and Accelerate's adapters alone ask how many processes there are, and are imported by name too.
    assert [path.name for path in folder.glob("*.py") if imports.search(path.read_text())] == ["ranks.py"]
    users = {path.name for path in folder.glob("*.py") if "ranks" in path.read_text()} - {"ranks.py"}
    assert users <= {"transformers.py", "accelerate.py", "trainer_steps.py", "loaders.py"}
    assert imports.search((folder / "dcp" / "verbs.py").read_text())
