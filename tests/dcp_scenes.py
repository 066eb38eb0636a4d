"""What ranks do in tests of distributed checkpoints. A scene runs on every rank of a group, and asserts as it goes."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tricomp_torch import dcp
from tricomp_torch.dcp import index as indices
from tricomp_torch.dcp import staging as stagers
from tricomp_torch.dcp import writer as writers

import tricomp
from tests.dcp_ranks import Net, begin, blank, restore, state_of, train, whole
from tricomp.errors import CorruptFile, StorageError, UnsupportedNode

writer: Any = writers
staging: Any = stagers
PLAIN = {"epoch": 3, "rates": [0.1, -0.0], "name": ("a", None, True), "raw": b"\0\1", "empty": (), "big": 1 << 70}


def note(folder, state):
    """Write down what was saved, for another group to compare with. On all ranks at a time."""
    truth = whole(state)
    if dist.get_rank() == 0:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        Path(f"{folder}.json").write_text(json.dumps(truth, default=repr))
    return truth


def noted(folder):
    return json.loads(Path(f"{folder}.json").read_text())


def same(state, folder):
    return json.loads(json.dumps(whole(state), default=repr)) == noted(folder)


def check_load(run, folder):
    """Load into another state of the model's form, and then into the model itself."""
    state = blank(state_of(run, plain=dict.fromkeys(PLAIN)))
    dcp.load(state, checkpoint_id=folder)
    assert same(state, folder)
    assert state["plain"] == PLAIN
    restore(run, state)
    assert same(state_of(run, plain=PLAIN), folder)


def save_behind(state, **options):
    return dcp.async_save(state, **options).result(120)


def save_chain(rank, n, folder, first=None, keyframe=3):
    """Four saves of one writer, the last of them a keyframe; one behind training; one over another."""
    run = begin(init_device_mesh("cpu", (n,)))
    train(run, 1, 0)
    if first is not None:
        check_load(run, first)
    place: Literal["host", "store"] = "host" if n == 4 else "store"
    saver = dcp.TricompWriter(reference=first, keyframe=tricomp.KeyframeEvery(keyframe), reference_in=place)
    for step in range(4):
        state = state_of(run, plain=PLAIN)
        note(f"{folder}/{step}", state)
        dcp.save(state, checkpoint_id=f"{folder}/{step}", storage_writer=saver)
        train(run, 1, step)
    check_load(begin(init_device_mesh("cpu", (n,)), seed=5), f"{folder}/2")

    state = state_of(run, plain={**PLAIN, "list": [1, 2]})
    note(f"{folder}/behind", state)
    is_trained = threading.Event()
    put = writer.put

    def wait_and_put(*arguments, **options):
        assert is_trained.wait(120)
        return put(*arguments, **options)

    writer.put = wait_and_put
    saving = dcp.async_save(state, checkpoint_id=f"{folder}/behind", storage_writer=saver)
    state["plain"]["list"].append(3)
    train(run, 2, 9)
    assert not same(state_of(run), f"{folder}/behind")
    is_trained.set()
    saving.result(120)
    writer.put = put
    state = blank(state_of(run, plain=dict.fromkeys([*PLAIN, "list"])))
    dcp.load(state, checkpoint_id=f"{folder}/behind")
    assert same(state, f"{folder}/behind")

    for step in range(2):
        state = state_of(run, plain=PLAIN)
        note(f"{folder}/over", state)
        dcp.save(state, checkpoint_id=f"{folder}/over", storage_writer=saver)
        train(run, 1, step)
    check_load(run, f"{folder}/over")


def behind_in_a_process(rank, n, folder):
    """Two saves and a failing one by the process that torch keeps for that."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    run = begin(init_device_mesh("cpu", (n,)))
    options: dict[str, Any] = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
    for step in range(2):
        state = state_of(run, plain=PLAIN)
        note(f"{folder}/{step}", state)
        reference = f"{folder}/{step - 1}" if step else None
        saving = dcp.async_save(state, checkpoint_id=f"{folder}/{step}", reference=reference, **options)
        train(run, 1, step)
        saving.result(120)
    check_load(run, f"{folder}/1")
    assert dcp.chain(f"{folder}/1") == [f"{folder}/0", f"{folder}/1"]
    with pytest.raises(UnsupportedNode, match="rank 1: node 'lock'"):
        dcp.async_save({"lock": threading.Lock() if rank else 1}, checkpoint_id=f"{folder}/bad", **options).result(120)


def load_onto(rank, n, folder, other):
    """Load what another number of ranks saved; a part of it; and save again against it."""
    run = begin(init_device_mesh("cpu", (n,)))
    check_load(run, folder)
    part: dict[str, Any] = {"model": {"inner.0.weight": torch.zeros(257, 131)}, "plain": {"name": None}}
    dcp.load(part, checkpoint_id=folder)
    saved = noted(folder)
    assert list(whole(part["model"]["inner.0.weight"])) == saved["model"]["inner.0.weight"]
    assert part["plain"] == {"name": PLAIN["name"]}
    wider: dict[str, Any] = {"plain": {"epoch": 0, "other": 5}, "new": torch.ones(3)}
    with pytest.raises(tricomp.MissingLeaf, match=r"2 of 3 entries of the state were not saved: new, plain.other"):
        dcp.load(wider, checkpoint_id=folder)
    dcp.load(wider, checkpoint_id=folder, planner=dcp.TricompLoadPlanner(allow_partial_load=True))
    assert (wider["plain"], wider["new"].tolist()) == ({"epoch": 3, "other": 5}, [1, 1, 1])
    train(run, 1, 1)
    state = state_of(run, plain=PLAIN)
    note(other, state)
    dcp.save(state, checkpoint_id=other, reference=folder)
    check_load(run, other)


def meshes(rank, n, folder):
    """Hybrid sharding, tensor parallelism alone and under FSDP: saved one way, loaded another."""
    flat, square = init_device_mesh("cpu", (n,)), init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("a", "b"))
    hybrid = begin(square)
    train(hybrid, 1, 0)
    for step in range(2):
        state = state_of(hybrid, plain=PLAIN)
        note(f"{folder}/hybrid{step}", state)
        dcp.save(state, checkpoint_id=f"{folder}/hybrid{step}", reference=f"{folder}/hybrid0" if step else None)
        train(hybrid, 1, 1)
    for file in indices.read(f"{folder}/hybrid1").files:
        assert file.parent is not None
    check_load(begin(flat, seed=3), f"{folder}/hybrid1")

    generator = torch.Generator().manual_seed(0)
    full = {
        "rows": torch.randn(9, 1031, generator=generator) * torch.logspace(-3, 3, 9)[:, None],
        "bits": torch.randint(-(1 << 62), 1 << 62, (7, 5), generator=generator),
        "half": torch.randn(3, 6, 5, generator=generator).bfloat16(),
        "few": torch.randn(2, 3, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8),
        "turns": torch.randn(5, 4, generator=generator, dtype=torch.complex64),
        "is": torch.randn(6, generator=generator) > 0,
    }
    full["rows"].view(torch.int32)[4, :2] = torch.tensor([0x7FC12345, -0x7FFFFFFF - 1])  # a NaN with payload, -0.0
    ways = [[Shard(0)], [Shard(-1)], [Replicate()]]

    def placed(mesh, places):
        return {key: distribute_tensor(value.clone(), mesh, places) for key, value in full.items()}

    for i, places in enumerate(ways):
        dcp.save(placed(flat, places), checkpoint_id=f"{folder}/way{i}")
        for mesh, others in [
            *((flat, way) for way in ways),
            (square, [Shard(0), Shard(0)]),
            (square, [Shard(0), Replicate()]),
        ]:
            state = blank(placed(mesh, others))
            dcp.load(state, checkpoint_id=f"{folder}/way{i}")
            assert whole(state) == whole(full)
    state = blank(full)
    dcp.load(state, checkpoint_id=f"{folder}/way0")  # a process that has it all
    assert whole(state) == whole(full)

    both = parallel(square)
    train(both, 1, 0)
    state = state_of(both)
    truth = note(f"{folder}/both", state)
    dcp.save(state, checkpoint_id=f"{folder}/both")
    state = blank(state_of(both))
    dcp.load(state, checkpoint_id=f"{folder}/both")
    assert whole(state) == truth
    plain = begin(flat, inner=256)
    state = blank(get_model_state_dict(plain[0]))
    dcp.load({"model": state}, checkpoint_id=f"{folder}/both")
    assert whole(state) == truth["model"]


def parallel(mesh):
    """The model under tensor parallelism in one dimension of a mesh and FSDP in the other."""
    torch.manual_seed(0)
    model = Net(inner=256)  # torch wants it even here
    parallelize_module(model.inner, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for part in (model.head, model.inner, model):
        fully_shard(part, mesh=mesh["a"])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


def failures(rank, n, folder):
    """A rank that fails in any phase: all are told, nothing is seen of that save, and the one before loads."""
    model = torch.nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters())
    train((model, optimizer), 1, 0)
    state = {"model": model.state_dict(), "plain": PLAIN}
    truth = note(f"{folder}/good", state)
    saver = dcp.TricompWriter()
    dcp.save(state, checkpoint_id=f"{folder}/good", storage_writer=saver)
    assert len(indices.read(f"{folder}/good").files) == n  # replicas are shared out

    def refuse(kind, text):
        def refusing(*arguments, **options):
            raise kind(text)

        return refusing

    def check(kind, text, saver=saver, bad=f"{folder}/bad", values=None):
        for save in (dcp.save, save_behind):
            with pytest.raises(kind, match=text):
                save(values or state, checkpoint_id=bad, storage_writer=saver)
            assert not os.path.exists(f"{bad}/{indices.INDEX_NAME}")
            dist.barrier()
            with pytest.raises(tricomp.MissingFile, match=r"bad: is no complete checkpoint"):
                dcp.load(blank(state), checkpoint_id=bad)
        found = blank(state)
        dcp.load(found, checkpoint_id=f"{folder}/good")
        assert whole(found) == truth

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(writer, "put", refuse(StorageError, "no space left"))
        check(StorageError, "rank 1: no space left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indices, "pack", refuse(StorageError, "no space for the index"))
        check(StorageError, "rank 0: no space for the index")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(writer, "stage", refuse(UnsupportedNode, "cannot be copied"))
        with pytest.raises(UnsupportedNode, match="rank 1: cannot be copied"):
            save_behind(state, checkpoint_id=f"{folder}/bad", storage_writer=saver)
    check(
        UnsupportedNode,
        r"rank 1: node 'plain': .*thread|rank 1: .*copied",
        values={"plain": threading.Lock() if rank else 1},
    )
    check(tricomp.MissingFile, "rank 0: .*none: is no complete", saver=dcp.TricompWriter(reference=f"{folder}/none"))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(indices, "read", refuse(CorruptFile, "not to be read"))
        with pytest.raises(CorruptFile, match="rank 1: not to be read"):
            dcp.load(blank(state), checkpoint_id=f"{folder}/good")
    dist.barrier()

    # A reference of which one file is damaged: that rank's file stands alone.
    if rank == 0:
        damaged = indices.read(f"{folder}/good").files[1]
        path = Path(f"{folder}/good/{damaged.name}")
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    dcp.save(state, checkpoint_id=f"{folder}/next", storage_writer=saver)
    files = sorted(indices.read(f"{folder}/next").files, key=lambda file: file.name)
    assert [file.parent is None for file in files] == [False, True]
    found = blank(state)
    dcp.load(found, checkpoint_id=f"{folder}/next")
    assert whole(found) == truth
    with pytest.raises(CorruptFile, match=r"rank \d: '[a-z.0-9]+': .*/good/rank_00001-.*\.tri: "):
        dcp.load(found, checkpoint_id=f"{folder}/good")


def killed(rank, n, folder, phase):
    """A rank that dies: the other is told by its process group, and what was saved before stays."""
    run = begin(init_device_mesh("cpu", (n,)))
    state = state_of(run, plain=PLAIN)
    note(f"{folder}/good", state)
    saver = dcp.TricompWriter()
    dcp.save(state, checkpoint_id=f"{folder}/good", storage_writer=saver)
    train(run, 1, 0)
    put = writer.put

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_put(where, name, *arguments, **options):
        def pieces_then_death(target, pieces):
            write = type(where).put

            def some():
                for i, piece in enumerate(pieces):
                    if i == 4:
                        die()
                    yield piece

            write(where, target, some())

        where.put = pieces_then_death
        return put(where, name, *arguments, **options)

    if (phase == "finish") == (rank == 0):
        if phase == "plan":
            saver.prepare_local_plan = die  # type: ignore[method-assign]
        if phase == "write":
            writer.put = die_in_put
        if phase == "finish":
            vars(indices)["pack"] = die
        if phase == "stage":
            staging.snapshot_of = die
    save = save_behind if phase == "stage" else dcp.save
    with pytest.raises(RuntimeError):
        save(state_of(run), checkpoint_id=f"{folder}/bad", storage_writer=saver)
    os._exit(7)  # there is no group any more to say goodbye to


SCENES = {scene.__name__: scene for scene in (save_chain, behind_in_a_process, load_onto, meshes, failures, killed)}
