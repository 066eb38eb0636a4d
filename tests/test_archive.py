"""tricomp.archive: whole files to .tri and back; bases in every form; nothing half written; memory that is bounded."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile

import ml_dtypes
import numpy as np
import pytest

import tricomp
from tests.cases import stepped, weights
from tricomp import archive_base, archive_names
from tricomp.archive import compress, compress_file, decompress
from tricomp.archive_base import Base
from tricomp.inspection import inspect

save_file = pytest.importorskip("safetensors.numpy").save_file


def model(seed=0):
    """A small model: its words have structure, sizes are odd, a leaf is empty and one has no dimensions."""
    w = weights((67, 129), seed)
    return {
        "h.0.weight": w,
        "h.0.half": w.astype(ml_dtypes.bfloat16)[:33].copy(),
        "counts": np.arange(31, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "step": np.array(7, np.int32),
    }


def sharded(folder, seed=0, n=3):
    """A model in n shards with its index, as transformers writes it; the path of the index."""
    tensors = model(seed)
    names = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    where = {key: names[i % n] for i, key in enumerate(tensors)}
    folder.mkdir(exist_ok=True)
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}, indent=2) + "\n")
    return index


def contents(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_comes_back_byte_for_byte_under_its_name(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path, {"note": "x"})
    data = path.read_bytes()
    report = compress(path)
    assert report.path == f"{path}.tri"
    assert report.n_leaves == 5
    assert report.file_bytes == os.path.getsize(f"{path}.tri") < len(data)
    assert path.read_bytes() == data
    path.unlink()
    restored = decompress(report.path)
    assert [dataclasses.astuple(file) for file in restored.files] == [(str(path), len(data), True)]
    assert (restored.n_bytes, restored.file_bytes, restored.base) == (len(data), report.file_bytes, None)
    assert path.read_bytes() == data
    assert set(contents(tmp_path)) == {"m.safetensors", "m.safetensors.tri"}


def test_a_file_of_an_archive_is_a_file_like_any_other(tmp_path):
    save_file(model(), tmp_path / "m.safetensors")
    compress(tmp_path / "m.safetensors")
    tree = tricomp.load(tmp_path / "m.safetensors.tri")
    assert {key: array.tobytes() for key, array in tree.items()} == {k: a.tobytes() for k, a in model().items()}


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_numpy_files_come_back_byte_for_byte(tmp_path, name):
    array = weights((65, 33))
    np.save(tmp_path / name, array) if name.endswith("npy") else np.savez(tmp_path / name, x=array, y=array[:1])
    data = (tmp_path / name).read_bytes()
    compress(tmp_path / name)
    decompress(tmp_path / f"{name}.tri", out=tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data


def test_a_file_that_cannot_be_rebuilt_comes_back_equal_and_says_so(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=weights((65, 33)))
    made = compress_file(path)
    assert not made.is_exact
    restored = decompress(made.report.path, out=tmp_path / "b.npz")
    assert [file.is_exact for file in restored.files] == [False]
    assert restored.n_bytes == os.path.getsize(tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as arrays:
        assert arrays["x"].tobytes() == weights((65, 33)).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_fine_tune_that_changed_one_word_in_a_hundred_takes_under_three_percent(tmp_path, dtype):
    rng = np.random.default_rng(5)
    old = {f"h.{i}.weight": weights((512, 1024), i).astype(dtype) for i in range(3)}
    new = {}
    for i, (key, array) in enumerate(old.items()):
        changed = stepped(array.astype(np.float32), i, rate=1e-2, still_share=0).astype(dtype)
        new[key] = np.where(rng.random(array.shape) < 0.01, changed, array)
    save_file(old, tmp_path / "base.safetensors")
    save_file(new, tmp_path / "tuned.safetensors")
    report = compress(tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors")
    assert report.file_bytes < 0.03 * report.raw_bytes
    decompress(report.path, out=tmp_path / "again", base=tmp_path / "base.safetensors")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()


def fine_tune(folder):
    """A base model and a fine-tune of it compressed against it; the .tri file and the original's bytes."""
    save_file(model(), folder / "base.safetensors")
    new = model() | {"h.0.weight": stepped(model()["h.0.weight"])}
    save_file(new, folder / "tuned.safetensors")
    report = compress(folder / "tuned.safetensors", base=folder / "base.safetensors")
    assert report.parent == tricomp.content_id(tricomp.load(compress(folder / "base.safetensors").path))
    return folder / "tuned.safetensors.tri", (folder / "tuned.safetensors").read_bytes()


def test_a_base_may_come_in_any_form(tmp_path):
    packed, data = fine_tune(tmp_path)
    save_file(model(), tmp_path / "renamed", {"another": "header"})
    (tmp_path / "folder").mkdir()
    os.rename(tmp_path / "base.safetensors", tmp_path / "folder" / "whatever.safetensors")
    with Base(tmp_path / "renamed") as held:
        for base in (tmp_path / "base.safetensors.tri", tmp_path / "renamed", tmp_path / "folder", held, held):
            restored = decompress(packed, out=tmp_path / "again", base=base, overwrite=True)
            assert (tmp_path / "again").read_bytes() == data
            assert restored.base is not None


def test_large_leaves_of_a_compressed_base_wait_on_a_disk(tmp_path, monkeypatch):
    fine_tune(tmp_path)
    for name in ("in-memory", "on-disk"):
        report = compress(tmp_path / "tuned.safetensors", out=tmp_path / name, base=tmp_path / "base.safetensors.tri")
        assert report.parent is not None
        monkeypatch.setattr(archive_base, "MEMORY_BYTES", 100)
    assert (tmp_path / "on-disk").read_bytes() == (tmp_path / "in-memory").read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(tricomp.StorageError, match="none: cannot hold a large leaf of the base: .* set TMPDIR"):
        compress(tmp_path / "tuned.safetensors", out=tmp_path / "x", base=tmp_path / "base.safetensors.tri")


def test_a_base_that_is_missing_or_another_is_told(tmp_path):
    packed, _ = fine_tune(tmp_path)
    before = contents(tmp_path)
    expected = r"tuned.safetensors.tri: was made against 'base.safetensors' \(content id [0-9a-f]{32}\)"
    with pytest.raises(tricomp.WrongReference, match=expected + r", and needs it. Pass that file, in any form"):
        decompress(packed, out=tmp_path / "again")
    save_file(model(seed=1), tmp_path / "other.safetensors")
    came = r", but \S+/other.safetensors has content id [0-9a-f]{32}. Pass the file"
    with pytest.raises(tricomp.WrongReference, match=expected + came):
        decompress(packed, out=tmp_path / "again", base=tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").unlink()
    assert contents(tmp_path) == before


def test_a_base_is_not_needed_where_there_was_none(tmp_path):
    packed, _ = fine_tune(tmp_path)
    restored = decompress(tmp_path / "base.safetensors.tri", out=tmp_path / "again", base=packed.with_suffix(""))
    assert restored.base is None


def test_bases_that_make_no_sense_are_refused(tmp_path):
    packed, _ = fine_tune(tmp_path)
    save_file({"h.0.weight": model()["h.0.weight"].T.copy(), "counts": np.arange(31, dtype=np.int32)}, tmp_path / "odd")
    before = contents(tmp_path)
    with pytest.raises(tricomp.InvalidArgument, match=r"odd: shares no leaf with the base .*base.safetensors: none of"):
        compress(tmp_path / "odd", base=tmp_path / "base.safetensors")
    with pytest.raises(tricomp.InvalidArgument, match=r"base.safetensors: is the base itself"):
        compress(tmp_path / "base.safetensors", out=tmp_path / "x", base=tmp_path / "base.safetensors")
    told = r"tuned.safetensors.tri: cannot be a base: it was itself made against 'base.safetensors'"
    with pytest.raises(tricomp.InvalidArgument, match=told):
        compress(tmp_path / "base.safetensors", out=tmp_path / "x", base=packed)
    with pytest.raises(tricomp.InvalidArgument, match=r"base.safetensors: is input and output at once"):
        decompress(packed, out=tmp_path / "base.safetensors", base=tmp_path / "base.safetensors", overwrite=True)
    (tmp_path / "none").mkdir()
    with pytest.raises(tricomp.UnsupportedFormat, match="holds no tensor file"):
        compress(tmp_path / "odd", base=tmp_path / "none")
    with pytest.raises(tricomp.InvalidArgument, match=r"holds 2 models \(base.safetensors, tuned.safetensors, ...\)"):
        compress(tmp_path / "odd", base=tmp_path)
    assert contents(tmp_path) == before


def test_a_model_in_shards_is_one_file(tmp_path):
    index = sharded(tmp_path / "m")
    before = contents(tmp_path / "m")
    made = compress_file(tmp_path / "m")  # the folder stands for the model in it
    assert made.report.path == str(tmp_path / "m" / "model.safetensors.index.tri")
    assert [os.path.basename(name) for name in made.files] == [index.name, *sorted(before.keys() - {index.name})]
    assert made.input_bytes == sum(map(len, before.values()))
    decompress(made.report.path, out=f"{tmp_path}/again/")
    assert contents(tmp_path / "again") == before
    decompress(made.report.path, out=tmp_path / "new")
    assert contents(tmp_path / "new") == before
    with pytest.raises(tricomp.InvalidArgument, match="holds 4 files. Give a folder for them"):
        decompress(made.report.path, out=index)
    with pytest.raises(tricomp.InvalidArgument, match="holds 4 files. Give a folder for them"):
        decompress(made.report.path, out=io.BytesIO())
    os.unlink(tmp_path / "m" / "model-00002-of-00003.safetensors")
    with pytest.raises(tricomp.InvalidArgument, match=r"is there already"):
        decompress(made.report.path)
    assert len(contents(tmp_path / "m")) == 4
    decompress(made.report.path, overwrite=True)
    os.unlink(made.report.path)
    assert contents(tmp_path / "m") == before


def test_a_fine_tune_in_shards_against_a_base_in_shards(tmp_path):
    sharded(tmp_path / "old", n=2)
    sharded(tmp_path / "new", n=3)
    before = contents(tmp_path / "new")
    report = compress(tmp_path / "new", out=tmp_path / "new.tri", base=tmp_path / "old")
    assert report.file_bytes < sum(map(len, before.values())) / 4
    decompress(tmp_path / "new.tri", out=f"{tmp_path}/again/", base=tmp_path / "old")
    assert contents(tmp_path / "again") == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, tricomp.StorageError])
@pytest.mark.parametrize("name", ["one", "many"])
def test_what_stops_in_the_middle_leaves_nothing(tmp_path, name, stop):
    (tmp_path / "m").mkdir()
    path = sharded(tmp_path / "m")
    if name == "one":
        path = tmp_path / "m" / "m.safetensors"
        save_file({str(i): weights((257, 65), i) for i in range(4)}, path)

    def stopping(done, total):
        assert 0 < done <= total
        raise stop("in the middle")

    before = contents(tmp_path)
    with pytest.raises(stop):
        compress(path, on_progress=stopping)
    assert contents(tmp_path) == before
    report = compress(path)
    (tmp_path / "again").mkdir()
    before = contents(tmp_path)
    with pytest.raises(stop):
        decompress(report.path, out=tmp_path / "again", on_progress=stopping)
    assert contents(tmp_path) == before
    assert list((tmp_path / "again").iterdir()) == []


def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)

    def touch(done, total):
        os.utime(path, ns=(1, 1))

    with pytest.raises(tricomp.InvalidArgument, match="m.safetensors: changed while it was read. Nothing was written"):
        compress(path, on_progress=touch)
    assert list(contents(tmp_path)) == ["m.safetensors"]


def test_a_base_that_changes_while_it_is_read_is_noticed(tmp_path):
    fine_tune(tmp_path)
    with Base(tmp_path / "base.safetensors") as base:
        save_file(model(seed=2), tmp_path / "base.safetensors")
        with pytest.raises(tricomp.InvalidArgument, match="base.safetensors: changed while it was read"):
            compress(tmp_path / "tuned.safetensors", out=tmp_path / "x.tri", base=base)
    assert not (tmp_path / "x.tri").exists()


def test_a_shard_of_the_base_that_changes_while_it_is_read_is_noticed(tmp_path):
    index = sharded(tmp_path / "old")
    sharded(tmp_path / "new", seed=1)
    with Base(index) as base:
        shard = next((tmp_path / "old").glob("*.safetensors"))
        os.utime(shard, ns=(1, 1))
        with pytest.raises(tricomp.InvalidArgument, match=f"{shard.name}: changed while it was read"):
            compress(tmp_path / "new", out=tmp_path / "x.tri", base=base)
    assert not (tmp_path / "x.tri").exists()


def test_shards_of_the_base_are_no_outputs(tmp_path):
    sharded(tmp_path / "old")
    sharded(tmp_path / "new", seed=1)
    before = contents(tmp_path / "old")
    shard = next((tmp_path / "old").glob("*.safetensors"))
    with pytest.raises(tricomp.InvalidArgument, match="is input and output at once"):
        compress(tmp_path / "new", out=shard, base=tmp_path / "old", overwrite=True)
    compress(tmp_path / "new", out=tmp_path / "x.tri", base=tmp_path / "old")
    with pytest.raises(tricomp.InvalidArgument, match="is input and output at once"):
        decompress(tmp_path / "x.tri", out=tmp_path / "old", base=tmp_path / "old", overwrite=True)
    assert contents(tmp_path / "old") == before


@pytest.mark.parametrize("is_refused", [True, False])
def test_shards_are_replaced_all_or_none(tmp_path, monkeypatch, is_refused):
    packed = compress(sharded(tmp_path / "new", seed=1), out=tmp_path / "x.tri").path
    sharded(tmp_path / "old")
    (tmp_path / "old" / "model-00001-of-00003.safetensors").unlink()
    last = tmp_path / "old" / "model-00003-of-00003.safetensors"
    last.unlink()
    last.mkdir()
    before = contents(tmp_path / "old")
    if is_refused:
        with pytest.raises(tricomp.InvalidArgument, match="00003.safetensors: is not a regular file"):
            decompress(packed, out=tmp_path / "old", overwrite=True)
    else:
        monkeypatch.setattr(archive_names, "check_output", lambda *_: None)
        with pytest.raises(tricomp.StorageError, match="old: cannot be written"):
            decompress(packed, out=tmp_path / "old", overwrite=True)
    assert contents(tmp_path / "old") == before
    assert len(list((tmp_path / "old").iterdir())) == 3


def test_a_pipe_is_no_base(tmp_path):
    sharded(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(tricomp.InvalidArgument, match="pipe: is not a regular file"):
        compress(tmp_path / "new", base=tmp_path / "pipe")


def test_a_rounded_file_is_not_said_to_come_back_byte_for_byte(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    assert compress_file(path, spec=tricomp.Spec(keep_mantissa_bits={"none": 3})).is_exact
    made = compress_file(path, spec=tricomp.Spec(keep_mantissa_bits={"h.0.weight": 3}), overwrite=True)
    restored = decompress(made.report.path, out=tmp_path / "again")
    assert (tmp_path / "again").read_bytes() != path.read_bytes()
    assert not made.is_exact
    assert not restored.files[0].is_exact
    assert restored.is_rounded
    with tricomp.open(made.report.path) as file:
        assert not inspect(file).origins[0].is_exact


def test_a_damaged_file_is_not_restored(tmp_path):
    (tmp_path / "again").mkdir()
    for path in (sharded(tmp_path / "m"), tmp_path / "m.safetensors"):
        if not path.exists():
            save_file(model(), path)
        packed = compress(path, out=tmp_path / "x.tri", overwrite=True).path
        data = bytearray((tmp_path / "x.tri").read_bytes())
        data[len(data) * 2 // 3] ^= 4
        (tmp_path / "x.tri").write_bytes(data)
        with pytest.raises(tricomp.TricompError, match=r"x.tri"):
            decompress(packed, out=tmp_path / "again")
        assert list((tmp_path / "again").iterdir()) == []


def test_outputs_that_are_there_stay(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    (tmp_path / "m.safetensors.tri").write_bytes(b"precious")
    with pytest.raises(tricomp.InvalidArgument, match=r".tri: is there already. Pass -f \(overwrite=True\)"):
        compress(path)
    assert (tmp_path / "m.safetensors.tri").read_bytes() == b"precious"
    compress(path, overwrite=True)
    with pytest.raises(tricomp.InvalidArgument, match="m.safetensors: is there already"):
        decompress(f"{path}.tri")
    with pytest.raises(tricomp.InvalidArgument, match="is input and output at once"):
        compress(path, out=path, overwrite=True)
    os.symlink(path, tmp_path / "link")
    with pytest.raises(tricomp.InvalidArgument, match="is input and output at once"):
        compress(path, out=tmp_path / "link", overwrite=True)
    with pytest.raises(tricomp.InvalidArgument, match="is compressed already"):
        compress(f"{path}.tri")
    with pytest.raises(tricomp.StorageError, match="there is no folder"):
        compress(path, out=tmp_path / "none" / "x.tri")


def test_a_file_that_was_not_made_of_a_file_says_what_to_do(tmp_path):
    tricomp.save(tmp_path / "x.tri", {"a": np.arange(5)})
    with pytest.raises(tricomp.InvalidArgument, match=r'Run "tricomp export --to safetensors \S+x.tri"'):
        decompress(tmp_path / "x.tri")


@pytest.mark.parametrize(
    "name", ["../evil.npy", "/tmp/evil.npy", "a/b.npy", "..", ".bashrc", "x.sh", "x.json", "evil\n.npy", ""]
)
def test_a_name_that_points_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.npy"
    np.save(path, weights((9, 9)))
    compress(path, out=tmp_path / "in" / "plain.tri")
    with tricomp.open(tmp_path / "in" / "plain.tri") as file:
        told = file.metadata["origin"][0]
    two = [told | {"name": name}, told | {"name": "b.npy"}]
    tricomp.save(tmp_path / "in" / "x.tri", np.load(path), metadata={"origin": two})
    before = contents(tmp_path)
    with pytest.raises(tricomp.TricompError, match=r"x.tri: "):
        decompress(tmp_path / "in" / "x.tri")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("index", "shard", "is_refused"),
    [
        ("m.safetensors.index.json", "a.weights", True),
        ("m.safetensors.index.json", ".a.safetensors", True),
        (".m.safetensors.index.json", "a.safetensors", True),
        ("m.safetensors.index.JSON", "A.SAFETENSORS", False),
        ("m.safetensors.index.fp16.json", "a.safetensors", False),
    ],
)
def test_shards_are_compressed_only_if_they_could_be_written_again(tmp_path, index, shard, is_refused):
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a": weights((9, 9))}, folder / shard)
    (folder / index).write_text(json.dumps({"weight_map": {"a": shard}}))
    if is_refused:
        with pytest.raises(tricomp.InvalidArgument, match="a name that decompress would not write.* Rename the file"):
            compress(folder / index, out=tmp_path / "x.tri")
        assert not (tmp_path / "x.tri").exists()
    else:
        compress(folder / index, out=tmp_path / "x.tri")
        decompress(tmp_path / "x.tri", out=tmp_path / "again")
        assert contents(tmp_path / "again") == contents(folder)


def test_the_name_in_a_file_gives_its_suffix_at_most(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, weights((9, 9)))
    compress(path, out=tmp_path / "b.tri")
    assert decompress(tmp_path / "b.tri").files[0].path == str(tmp_path / "b.npy")
    with tricomp.open(tmp_path / "b.tri") as file:
        told = file.metadata["origin"][0]
    tricomp.save(tmp_path / "c.tri", np.load(path), metadata={"origin": [told | {"name": "a.sh"}]})
    assert decompress(tmp_path / "c.tri", out=f"{tmp_path}/deep/er/").files[0].path == f"{tmp_path}/deep/er/c.npy"


def test_names():
    assert archive_names.compressed("m/x.safetensors") == "m/x.safetensors.tri"
    assert archive_names.compressed("m/model.safetensors.index.json") == "m/model.safetensors.index.tri"
    assert archive_names.restored("m/x.ckpt.tri", "torch", "y.pt") == "m/x.ckpt"
    assert archive_names.restored("m/x.tri", "torch", "y.pth") == "m/x.pth"
    assert archive_names.restored("m/X.NPY.tri", "npy", "X.NPY") == "m/X.NPY"
    assert archive_names.restored("m/x.tri", "safetensors", "stdin") == "m/x.safetensors"
    for path in ("m/x", "m/.tri", ".tri"):
        with pytest.raises(tricomp.InvalidArgument, match=r"does not end in .tri|no name"):
            archive_names.restored(path, "npy", "y.npy")


def test_streams(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    packed, again = io.BytesIO(), io.BytesIO()
    assert compress(path, out=packed).file_bytes == len(packed.getvalue())
    (tmp_path / "m.tri").write_bytes(packed.getvalue())
    assert decompress(tmp_path / "m.tri", out=again).n_bytes == len(again.getvalue())
    assert again.getvalue() == path.read_bytes()
    assert set(contents(tmp_path)) == {"m.safetensors", "m.tri"}


class Slow(io.RawIOBase):
    """A stream that takes a few bytes at a time."""

    def __init__(self):
        self.data = b""

    def writable(self):
        return True

    def write(self, piece):
        self.data += bytes(piece[:1001])
        return min(len(piece), 1001)


def test_streams_that_take_a_little_at_a_time_get_everything(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    stream, whole = Slow(), io.BytesIO()
    compress(path, out=stream)  # type: ignore[arg-type]
    compress(path, out=whole)
    assert stream.data == whole.getvalue()


def test_progress_counts_up_to_all(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({str(i): weights((257, 65), i) for i in range(4)}, path)
    seen = []
    report = compress(path, on_progress=lambda *both: seen.append(both))
    assert seen[-1] == (report.raw_bytes, report.raw_bytes)
    assert len(seen) == 4
    seen.clear()
    decompress(report.path, overwrite=True, on_progress=lambda *both: seen.append(both))
    assert seen[-1] == (os.path.getsize(path), os.path.getsize(path))
    assert seen == sorted(seen)


def test_what_others_could_not_read_they_cannot_read_afterwards(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    for mode in (0o600, 0o644):
        os.chmod(path, mode)
        packed = compress(path, overwrite=True).path
        decompress(packed, out=tmp_path / "again", overwrite=True)
        assert os.stat(packed).st_mode & 0o777 & ~mode == 0
        assert os.stat(tmp_path / "again").st_mode & 0o777 & ~mode == 0


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(tricomp.MissingFile, match="none: there is no such file"):
        compress(tmp_path / "none")
    with pytest.raises(tricomp.MissingFile, match="none: there is no such file"):
        decompress(tmp_path / "none")
    with pytest.raises(tricomp.InvalidArgument, match="compress: expected a path, got 7"):
        compress(7)  # type: ignore[arg-type]
    save_file(model(), tmp_path / "m")
    with pytest.raises(tricomp.InvalidArgument, match="out: expected a path"):
        compress(tmp_path / "m", out="")
    with pytest.raises(tricomp.InvalidArgument, match="spec: expected a tricomp.Spec"):
        compress(tmp_path / "m", spec="fast")  # type: ignore[arg-type]
    with pytest.raises(tricomp.InvalidArgument, match="is a folder; expected a file"):
        decompress(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(tricomp.InvalidArgument, match="is not a regular file"):
        compress(tmp_path / "pipe")
    (tmp_path / "text.tri").write_text("hello, world")
    with pytest.raises(tricomp.CorruptFile, match="is not a tricomp file"):
        decompress(tmp_path / "text.tri")


LIMITED = """
import resource, sys
from tricomp import cli
import tricomp.archive, tricomp.codec
with open("/proc/self/status") as file:
    used = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (400 << 20),) * 2)
sys.exit(cli.main(sys.argv[1:]))
"""


def sparse_file(path):
    """A safetensors file of 1.6 GB that takes a few MB of disk: leaves of over 500 MB, with words here and there."""
    shapes = {"real": ("F32", (1 << 18,)), "big": ("I8", (3, 180_000_000)), "zero": ("BF16", (260_000_000,))}
    shapes["whole"] = "F32", (135_000, 1000)
    header, offset = {}, 0
    for key, (dtype, shape) in shapes.items():
        n_bytes = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "I8": 1}[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    packed = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        start = file.tell()
        file.truncate(start + offset)
        for at, n in ((0, 1 << 18), (800 << 20, 1 << 14), (offset - (1 << 16), 1 << 14)):
            file.seek(start + at)
            file.write(weights((n,), at % 7).tobytes())
    return start + offset


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's limit on data")
def test_a_file_much_larger_than_the_memory_allowed(tmp_path):
    path = tmp_path / "m.safetensors"
    n_bytes = sparse_file(path)
    command = [sys.executable, "-c", LIMITED]
    subprocess.run([*command, "compress", "-q", str(path)], check=True, timeout=300)
    assert os.path.getsize(f"{path}.tri") < 1 << 21
    out = subprocess.Popen([*command, "decompress", "-q", "-c", f"{path}.tri"], stdout=subprocess.PIPE)
    assert out.stdout is not None
    with open(path, "rb") as original:
        n_equal = 0
        while piece := out.stdout.read(1 << 20):
            assert piece == original.read(len(piece))
            n_equal += len(piece)
    assert (out.wait(), n_equal) == (0, n_bytes)
