"""What a restore decodes straight into: tensors that objects hold, whatever their strides and whatever they share."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import tricomp_torch

from tricomp.errors import CorruptFrame

Checkpointer: Any = tricomp_torch.Checkpointer


def net(**buffers):
    made = torch.nn.Module()
    for name, tensor in buffers.items():
        made.register_buffer(name, tensor)
    return made


def ramp(*shape, dtype=torch.float32, k=0.0):
    n = torch.Size(shape).numel()
    return (torch.arange(n, dtype=torch.float64) * 1.7 + k).to(dtype).reshape(shape)


def bits(module):
    return {name: (t.dtype, t.shape, t.contiguous().view(-1).tolist()) for name, t in module.state_dict().items()}


def restored(tmp_path, saved, target, **options):
    """What a restore makes of the target, and what load_state_dict makes of an equal one; and where its tensors are."""
    Checkpointer(tmp_path).save(1, model=saved, force=True).result()
    before = {name: (t.data_ptr(), t.stride()) for name, t in target.state_dict().items()}
    ckpt = Checkpointer(tmp_path)
    assert ckpt.restore(model=target, **options).step == 1
    ckpt.close()
    assert {name: (t.data_ptr(), t.stride()) for name, t in target.state_dict().items()} == before
    return bits(target)


def test_tensors_of_any_strides_are_filled_where_they_are(tmp_path):
    saved = net(
        image=ramp(3, 5, 7, 9, k=1).to(memory_format=torch.channels_last),
        turned=ramp(301, 207).t(),
        plain=ramp(207, 301, dtype=torch.bfloat16),
        conjugate=torch.complex(ramp(9), ramp(9, k=3)).conj(),
        single=ramp(),
        nothing=ramp(0, 3),
        wide=ramp(70_001, dtype=torch.float64),
    )
    target = net(
        image=torch.zeros(3, 5, 7, 9),
        turned=torch.zeros(207, 301),
        plain=torch.zeros(301, 207, dtype=torch.bfloat16).t(),
        conjugate=torch.zeros(9, dtype=torch.complex64),
        single=torch.zeros(2)[1],
        nothing=torch.zeros(0, 3),
        wide=torch.zeros(70_001, 2, dtype=torch.float64)[:, 1],  # a column, between which there is another
    )
    assert restored(tmp_path, saved, target) == bits(saved)


@pytest.mark.parametrize("is_tied", [False, True])
def test_tensors_that_share_memory_end_as_load_state_dict_leaves_them(tmp_path, is_tied):
    """Each is written once with its own words, or as often and in that order as torch does it."""

    def target():
        memory = torch.zeros(300, 100)
        second = memory if is_tied else memory[20:220]
        return net(first=memory[:200] if not is_tied else memory, second=second, third=torch.zeros(2, 2))

    shape = (300, 100) if is_tied else (200, 100)
    saved = net(first=ramp(*shape), second=ramp(*shape, k=5), third=ramp(2, 2))
    expected, found = target(), target()
    expected.load_state_dict(saved.state_dict())
    assert restored(tmp_path, saved, found, strict=False) == bits(expected)


def test_models_that_share_a_tensor(tmp_path):
    shared = torch.zeros(40, 50)
    saved = {"a": net(x=ramp(40, 50)), "b": net(x=ramp(40, 50), y=ramp(3))}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, model=saved).result()
        both = {"a": net(x=shared), "b": net(x=shared, y=torch.zeros(3))}
        ckpt.restore(model=both)
    assert [bits(both[name]) for name in "ab"] == [bits(saved[name]) for name in "ab"]


def test_an_optimizers_state_is_filled_where_it_is(tmp_path):
    weights = [torch.nn.Parameter(ramp(30, 7)), torch.nn.Parameter(ramp(5, dtype=torch.bfloat16))]
    adamw = torch.optim.AdamW(weights)
    for weight in weights:
        adamw.state[weight] = {
            "step": torch.tensor(4.0),
            "exp_avg": ramp(*weight.shape, k=3),  # of float32, also for a bfloat16 weight
            "exp_avg_sq": ramp(*weight.shape, k=9),
        }
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, optimizer=adamw).result()
        held = [dict(adamw.state[weight]) for weight in weights]
        expected = [{key: value.tolist() for key, value in slots.items()} for slots in held]
        for slots in held:
            for value in slots.values():
                value.zero_()
        ckpt.restore(optimizer=adamw)
        for weight, slots, values in zip(weights, held, expected, strict=True):
            for key, value in adamw.state[weight].items():
                assert (value.dtype, value.tolist()) == (torch.float32, values[key])
                assert value.data_ptr() == slots[key].data_ptr()
        fresh = torch.optim.AdamW(weights)
        ckpt.restore(optimizer=fresh)
        for weight, values in zip(weights, expected, strict=True):
            assert {key: value.tolist() for key, value in fresh.state[weight].items()} == values


def test_what_is_not_asked_for_is_not_decoded(tmp_path, monkeypatch):
    from tricomp.file import File

    saved = {"a": net(x=ramp(400, 500)), "b": net(x=ramp(400, 500, k=7))}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, model=saved, extra={"note": [1], "kept": ramp(3)}).result()
        asked: list[str] = []
        load_into = File.load_into

        def spied(file, targets):
            asked.extend(targets)
            load_into(file, targets)

        monkeypatch.setattr(File, "load_into", spied)
        found = ckpt.restore(model={"b": net(x=torch.zeros(400, 500))}, rng=False)
    assert asked == ["model/b/x", "extra/kept"]
    assert found.extra["kept"].tolist() == ramp(3).tolist()


@pytest.mark.parametrize("step", [1, 2])
def test_damage_is_told_before_anything_is_changed(tmp_path, step):
    """Of the step itself, or of one that it was coded against."""
    model = net(x=ramp(300, 100), y=ramp(50_000, k=2))
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, model=model).result()
        model.y += 1
        ckpt.save(2, model=model).result()
    path = Path(tmp_path, f"step-{step:012d}.tri")
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 4
    path.write_bytes(data)
    target = net(x=torch.zeros(300, 100), y=torch.zeros(50_000))
    advice = "Load step 1, the nearest intact one" if step == 2 else "No other step can be loaded"
    with pytest.raises(CorruptFrame, match=rf"step 2: .*checksum .*{advice}"):
        Checkpointer(tmp_path).restore(model=target)
    assert not target.x.any()
    assert not target.y.any()


def test_damage_in_a_bucket_is_told_with_what_it_left(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}"
    model = net(x=ramp(300, 100), y=ramp(50_000, k=2))
    with Checkpointer(url) as ckpt:
        ckpt.save(1, model=model).result()
    files = fsspec.filesystem("memory")
    (path,) = [name for name in files.find(f"/{tmp_path.name}") if name.endswith("1.tri")]
    data = bytearray(files.cat_file(path))
    data[2 * len(data) // 3] ^= 4
    files.pipe_file(path, bytes(data))
    with pytest.raises(CorruptFrame, match=r"step 1: .*checksum") as told:
        Checkpointer(url).restore(model=net(x=torch.zeros(300, 100), y=torch.zeros(50_000)))
    assert told.value.__notes__ == ["What was given may hold parts of step 1 now: restore another step into it."]
