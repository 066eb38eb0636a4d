"""Files of torch.save: read without running them, rebuilt byte for byte where that can be, else as equal objects."""

import collections
import io
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import tricomp_torch
from tricomp_torch.pt import FORMAT
from tricomp_torch.trees import NOTES_KEY, Flat, unflatten

import tricomp
from tests.test_torch_states import begin, exact, train
from tricomp import archive, formats
from tricomp.errors import InvalidArgument, TricompError, UnsupportedFormat

optim: Any = torch.optim


def saved(path, obj, **options):
    torch.save(obj, path, **options)
    return str(path)


def compressed(path):
    """The `.tri` file of a file of torch.save. Returns its path and whether it holds where the leaves stand."""
    with FORMAT.read(path) as opened:
        tricomp.save(f"{path}.tri", opened.tree, metadata=opened.to_metadata())
        return f"{path}.tri", opened.spans is not None


def restored(path):
    """The bytes that the original file is restored to."""
    with tricomp.open(path) as file:
        (origin,) = formats.origins(file)
        return b"".join(formats.restored(file, origin))


def read_back(data):
    numpy: Any = np
    allowed: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "fdIlB")]
    for name in ("_reconstruct", "scalar"):
        allowed.append((getattr(numpy._core.multiarray, name), f"numpy._core.multiarray.{name}"))
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(data), weights_only=True)


def random_bits(dtype, n):
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, n * dtype.itemsize, np.uint8)).view(dtype)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight


def training():
    model, optimizer = begin("adamw")
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    train((model, optimizer), range(2))
    rng = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": tuple(range(625))}
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return {**states, "rng": rng, "epoch": 3, "best": np.float64(0.25)}


def lightning():
    """What a .ckpt of Lightning holds, plain values of all kinds."""
    return {
        "epoch": 1, "global_step": 20, "pytorch-lightning_version": "2.4.0", "state_dict": Tied().state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}, "flags": [True, None]}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "kth": ""}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-3, "dtype": torch.bfloat16},
    }  # fmt: skip


def conv():
    return torch.arange(60.0).reshape(2, 5, 3, 2).to(memory_format=torch.channels_last)


DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64, torch.complex128, torch.float16,
          torch.int8, torch.uint16, torch.uint64, torch.int64]  # fmt: skip
EXACT: dict[str, Any] = {
    "state-dict": lambda: Tied().state_dict(),
    "tensor": lambda: torch.arange(33.0),
    "0-d": lambda: [torch.tensor(5), torch.tensor(True), torch.tensor(1j)],
    "empty": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, dtype=torch.int64), "c": torch.ones(1)},
    "no-tensors": lambda: {"epoch": 1, "text": "é", "big": 2**80, "none": None, "bytes": b"\0", "empty": {}},
    "dtypes": lambda: [random_bits(dtype, 17) for dtype in DTYPES],
    "bools": lambda: torch.tensor([True, False] * 9),
    "nan-payloads": lambda: torch.tensor([0x7FC00001, 0x7F800123, -0x80000000]).int().view(torch.float32),
    "tied": lambda: [(x := torch.ones(2, 3)), x, {"again": x.view(2, 3)}],
    "views-in-full": lambda: [(x := torch.arange(12.0)), x[2:5], x.view(3, 4), x[::2], x.expand(2, 12)],
    "channels-last": lambda: {"x": conv(), "y": conv().to(torch.bfloat16)},
    "transposed": lambda: torch.arange(24).reshape(4, 6).t(),
    "one-wide": lambda: torch.arange(6.0).reshape(6, 1).t().unsqueeze(1),
    "parts": lambda: list(torch.arange(40).split(10)),
    "training": training,
    "lightning": lightning,
    "sets": lambda: {"set": {1, "a"}, "complex": 2j, "bytearray": bytearray(b"x"), "device": torch.device("cpu"),
                     "size": torch.Size([2]), "counter": collections.Counter("aab")},
    "module-versions": lambda: collections.OrderedDict(Tied().state_dict()),
    "parameters": lambda: list(Tied().parameters()),
}  # fmt: skip
EQUAL: dict[str, Any] = {
    "slice-of-much": lambda: {"x": torch.arange(200_000.0)[1000:1010], "y": torch.ones(3)},
    "stepped": lambda: torch.arange(200_000.0)[::2],
    "expanded-conjugate": lambda: [torch.tensor([1 + 2j]).conj(), torch.ones(30_000)[:1].expand(5)],
}


@pytest.mark.parametrize("name", EXACT)
def test_a_file_comes_back_byte_for_byte(tmp_path, name):
    obj = EXACT[name]()
    path = saved(tmp_path / "x.pt", obj)
    packed, is_exact = compressed(path)
    assert is_exact
    data = (tmp_path / "x.pt").read_bytes()
    assert restored(packed) == data
    assert exact(tricomp_torch.load(packed)) == exact(unflatten(tricomp_torch.flatten(read_back(data))))


@pytest.mark.parametrize("name", [*EXACT, *EQUAL])
def test_an_equal_file_is_written_where_the_same_cannot_be(tmp_path, name):
    obj = {**EXACT, **EQUAL}[name]()
    path = saved(tmp_path / "x.pt", obj)
    packed, is_exact = compressed(path)
    assert is_exact == (name in EXACT)
    with tricomp.open(packed) as file:
        data = b"".join(formats.exported("torch", file))
    if not is_exact:
        assert restored(packed) == data
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert exact(read_back(data)) == exact(tricomp_torch.load(packed))
    loaded = read_back((tmp_path / "x.pt").read_bytes())
    assert repr(read_back(data)).replace(", requires_grad=True", "").replace("Parameter containing:\n", "") == repr(
        loaded
    ).replace(", requires_grad=True", "").replace("Parameter containing:\n", "")


def test_leaves_are_found_where_they_stand(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.arange(50, dtype=torch.int16), "b": [conv(), torch.ones(7)[:5]]})
    data = (tmp_path / "x.pt").read_bytes()
    with FORMAT.read(path) as opened:
        spans = {span.leaf: span for span in opened.spans or ()}
        assert set(spans) == {"a", "b/0", "b/1"}
        assert spans["b/0"].axes == (0, 2, 3, 1)
        for leaf, array in (("a", opened.tree["a"]), ("b/0", opened.tree["b"][0]), ("b/1", opened.tree["b"][1])):
            span = spans[leaf]
            ordered = array if span.axes is None else array.transpose(span.axes)
            assert data[span.offset : span.offset + span.n_bytes] == ordered.tobytes()


def test_arrays_are_mapped_not_read(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1000)})
    opened = FORMAT.read(path)
    with open(path, "r+b") as file:  # a change to the file is seen through a map
        (span,) = opened.spans or ()
        file.seek(span.offset)
        file.write(struct.pack("<f", 3.0))
    assert opened.tree["a"][0] == 3.0
    opened.close()


@pytest.mark.parametrize("name", ["state-dict", "training", "channels-last", "parts"])
def test_files_from_before_the_zip_form(tmp_path, name):
    path = saved(tmp_path / "x.pth", obj := EXACT[name](), _use_new_zipfile_serialization=False)
    packed, is_exact = compressed(path)
    assert not is_exact
    assert exact(read_back(restored(packed))) == exact(unflatten(tricomp_torch.flatten(obj)))


def rezipped(path, out, change=lambda name, data: data, method=zipfile.ZIP_STORED, more=()):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        for name, data in more:
            new.writestr(name, data)
    return str(out)


def test_other_writers_of_the_archive(tmp_path):
    obj = {"a": torch.arange(3000.0), "b": conv(), "c": torch.tensor(3)}
    path = saved(tmp_path / "x.pt", obj)
    plain = rezipped(path, tmp_path / "plain.pt")  # records at odd places, checksums in front
    packed, is_exact = compressed(plain)
    assert is_exact
    assert restored(packed) == (tmp_path / "plain.pt").read_bytes()
    deflated = rezipped(path, tmp_path / "deflated.pt", method=zipfile.ZIP_DEFLATED)
    packed, is_exact = compressed(deflated)
    assert not is_exact
    assert exact(read_back(restored(packed))) == exact(obj)
    more = rezipped(path, tmp_path / "more.pt", more=[("x/data/77", bytes(range(200))), ("x/notes", b"hello" * 99)])
    packed, is_exact = compressed(more)
    assert is_exact
    assert restored(packed) == (tmp_path / "more.pt").read_bytes()


def test_big_endian_files_are_equal_after(tmp_path):
    obj = {"a": torch.arange(300.0), "b": torch.ones(3, dtype=torch.int64)}
    path = saved(tmp_path / "x.pt", obj)

    def swapped(name, data):
        if name.endswith("byteorder"):
            return b"big"
        if "/data/" in name:
            return np.frombuffer(data, "<u4" if name.endswith("/0") else "<u8").byteswap().tobytes()
        return data

    packed, is_exact = compressed(rezipped(path, tmp_path / "big.pt", swapped))
    assert not is_exact
    assert exact(tricomp_torch.load(packed)) == exact(obj)


def test_bytes_of_bools_that_are_neither(tmp_path):
    path = saved(tmp_path / "x.pt", torch.ones(300, dtype=torch.bool))
    odd = bytes(i % 251 for i in range(300))
    hostile = rezipped(path, tmp_path / "odd.pt", lambda name, data: odd if "/data/" in name else data)
    packed, is_exact = compressed(hostile)
    assert is_exact
    assert restored(packed) == (tmp_path / "odd.pt").read_bytes()


def test_unused_records_of_one_size(tmp_path):
    """Which record a storage is of must not be guessed: the bytes of the file would change."""
    path = saved(tmp_path / "x.pt", [torch.full((4096,), float(i)) for i in range(4)])
    cut = saved(tmp_path / "y.pt", [torch.full((4096,), float(i)) for i in (0, 1)])
    with zipfile.ZipFile(cut) as other:
        fewer = other.read("y/data.pkl")
    changed = rezipped(path, tmp_path / "z.pt", lambda name, data: fewer if name.endswith(".pkl") else data)
    packed, is_exact = compressed(changed)
    if is_exact:
        assert restored(packed) == (tmp_path / "z.pt").read_bytes()
    assert tricomp_torch.load(packed)[1][0] == 1.0


def test_a_small_file_of_a_huge_expanded_tensor_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 42)}, tmp_path / "a.pt")
    with pytest.raises(tricomp.LimitExceeded, match="leaf 'w': bytes to copy: 17592186044416 exceeds the limit"):
        tricomp.compress(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_an_archive_behind_something_else_is_refused(tmp_path):
    path = saved(tmp_path / "x.pt", torch.ones(5))
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "y.pt").write_bytes(data[:4] + bytes(4092) + data)
    with pytest.raises(InvalidArgument, match="something stands before its zip archive"):
        FORMAT.read(str(tmp_path / "y.pt"))
    assert FORMAT.read(path).spans


def test_an_unused_record_that_could_be_another_makes_no_guess(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(4096)})
    more = rezipped(path, tmp_path / "more.pt", more=[("x/data/9", b"\1" * 16384)])
    packed, _ = compressed(more)
    back = read_back(restored(packed))
    assert exact(back) == exact({"a": torch.zeros(4096)})


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/tricomp-was-here",))


class Plain:
    pass


CODE: dict[str, Any] = {
    "system": (lambda: {"w": torch.ones(2), "x": Evil()}, r"(posix|nt)\.system"),
    "module": (lambda: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "object": (lambda: [Plain()], r"test_pt\.Plain"),
    "function": (lambda: {"f": np.array([print], object)}, r"builtins\.print|got <class 'numpy\.dtypes\.ObjectDType'>"),
    "objects-of-numpy": (lambda: np.array([1, "a"], object), r"damaged, or holds more than tensors and plain values"),
    "records-of-numpy": (lambda: np.zeros(2, [("a", "f4")]), r"damaged, or holds more than tensors and plain values"),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", CODE)
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path, name, is_zip):
    make, text = CODE[name]
    path = saved(tmp_path / "x.pt", make(), _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InvalidArgument, match=text) as refusal:
        FORMAT.read(path)
    assert "\n" not in str(refusal.value)
    if name in ("system", "module", "object"):
        assert "so it may hold code; nothing of it was run" in str(refusal.value)
    assert not os.path.exists("/tmp/tricomp-was-here")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_by_name(tmp_path):
    class Add(torch.nn.Module):
        def forward(self, x):
            return x + 1

    torch.jit.save(torch.jit.script(Add()), str(tmp_path / "x.pt"))
    with pytest.raises(InvalidArgument, match="is a TorchScript archive, which holds a program; nothing of it was run"):
        FORMAT.read(str(tmp_path / "x.pt"))
    with pytest.raises(InvalidArgument, match="TorchScript"):
        formats.read(str(tmp_path / "x.pt"))


def test_tensors_that_cannot_be_stored_are_named(tmp_path):
    path = saved(tmp_path / "x.pt", {"m": {"s": torch.eye(3).to_sparse()}})
    with pytest.raises(InvalidArgument, match=r"x\.pt: leaf 'm/s': its layout is torch.sparse_coo"):
        FORMAT.read(path)


def test_what_is_no_such_file(tmp_path):
    import pickle

    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}, 2))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_bytes(b"hello" * 20)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as other:
        other.writestr("a.txt", "b")
    for name, text in {"plain": "a pickle that torch.save did not write", "empty": "an empty file"}.items():
        with pytest.raises(UnsupportedFormat, match=text):
            FORMAT.read(str(tmp_path / f"{name}.pt"))
    with pytest.raises(UnsupportedFormat, match=r"zip archive without a data\.pkl"):
        FORMAT.read(str(tmp_path / "other.pt"))
    for name in ("plain.pt", "empty.pt", "text.ckpt", "other.pt"):
        with pytest.raises(UnsupportedFormat):
            formats.read(str(tmp_path / name))


def test_the_format_is_told_by_content(tmp_path):
    path = saved(tmp_path / "weights.bin", Tied().state_dict())
    legacy = saved(tmp_path / "legacy.bin", Tied().state_dict(), _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    for name in (path, legacy):
        with formats.read(name) as opened:
            assert opened.format == "torch"
    with formats.read(str(tmp_path / "x.npz")) as opened:
        assert opened.format == "npz"
    assert "torch" in formats.names()
    for head in (b"", b"\x80", b"PK\3\4", b"PK\3\4" + bytes(60), b"\x80\x02" + bytes(20)):
        assert not FORMAT.matches(head, str(tmp_path / "missing.bin"))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    saved(tmp_path / "x.pt", {"a": torch.arange(40.0), "b": 5})
    data = (tmp_path / "x.pt").read_bytes()
    for n_bytes in [*range(0, 100, 7), *range(100, len(data), 41)]:
        (tmp_path / "cut.pt").write_bytes(data[:n_bytes])
        with pytest.raises(TricompError):
            FORMAT.read(str(tmp_path / "cut.pt"))
    legacy = saved(tmp_path / "y.pt", {"a": torch.arange(40.0), "b": 5}, _use_new_zipfile_serialization=False)
    data = (tmp_path / "y.pt").read_bytes()
    for n_bytes in range(0, len(data), 23):
        (tmp_path / "cut.pt").write_bytes(data[:n_bytes])
        with pytest.raises(TricompError):
            FORMAT.read(str(tmp_path / "cut.pt"))
    assert FORMAT.read(legacy).spans is None


def test_flipped_bits_never_crash_and_never_restore_something_else(tmp_path):
    saved(tmp_path / "x.pt", {"a": torch.arange(9.0), "b": {"c": torch.ones(3, dtype=torch.int16)}, "d": [1, "two"]})
    data = (tmp_path / "x.pt").read_bytes()
    n_read = 0
    for at in range(0, len(data), 11):
        hostile = bytearray(data)
        hostile[at] ^= 1 << at % 8
        (tmp_path / "flip.pt").write_bytes(hostile)
        try:
            packed, is_exact = compressed(str(tmp_path / "flip.pt"))
        except TricompError:
            continue
        n_read += 1
        if is_exact:
            assert restored(packed) == bytes(hostile)
    assert n_read > 10


def test_a_tree_that_unfolds_without_end_is_refused(tmp_path):
    level: list[Any] = []
    for _ in range(60):
        level = [level, level]
    path = saved(tmp_path / "x.pt", level)
    with pytest.raises(TricompError, match="unfolds to a tree without end"):
        FORMAT.read(path)
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(TricompError, match="unfolds to a tree without end"):
        FORMAT.read(saved(tmp_path / "y.pt", itself))
    with pytest.raises(TricompError, match="nested too deeply, or holds itself"):
        tricomp_torch.flatten(itself)


@pytest.mark.parametrize("name", ["torchao-8bit", "torchao-4bit", "torchao-fp8"])
def test_states_of_torchao_in_a_file(tmp_path, name):
    torch.compiler.set_stance("force_eager")
    try:
        run = begin(name)
        train(run, range(2))
    finally:
        torch.compiler.set_stance("default")
    state = run[1].state_dict()
    path = saved(tmp_path / "x.pt", state)
    packed, is_exact = compressed(path)
    assert is_exact
    assert restored(packed) == (tmp_path / "x.pt").read_bytes()
    assert exact(tricomp_torch.load(packed)) == exact(state)
    with tricomp.open(packed) as file:
        assert any(key.endswith("exp_avg/codes") for key in file)
        data = b"".join(formats.exported("torch", file))
    assert exact(read_back(data)) == exact(state)


def test_torchao_is_imported_for_its_own_files_only(tmp_path):
    import subprocess

    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    path = saved(tmp_path / "x.pt", {"state": subclass.OptimState8bit.zeros((64, 8))})
    plain = saved(tmp_path / "y.pt", {"state": torch.ones(3)})
    code = (
        "import sys; from tricomp_torch.pt import FORMAT; FORMAT.read(sys.argv[1]); "
        "assert 'torchao' not in sys.modules; notes = FORMAT.read(sys.argv[2]).metadata['tricomp_torch']; "
        "print(notes['subclasses']['state']['class'])"
    )
    ran = subprocess.run([sys.executable, "-c", code, plain, path], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "torchao.optim.subclass_8bit.OptimState8bit", ran.stderr


def test_a_file_made_of_other_things_is_exported(tmp_path):
    tree: dict[str, Any] = {
        "w": np.arange(70_000, dtype=np.float32).reshape(100, 700),
        "h": [np.ones(3, np.float16), (1, "a")],
        "n": 2,
    }
    tricomp.save(tmp_path / "base.tri", tree)
    tree["w"] = tree["w"] * np.float32(1.001)
    tricomp.save(tmp_path / "a.tri", tree, reference=str(tmp_path / "base.tri"))
    with tricomp.open(tmp_path / "a.tri", reference=str(tmp_path / "base.tri")) as file:
        n_bytes = formats.write("torch", file, str(tmp_path / "a.pt"))
    assert os.path.getsize(tmp_path / "a.pt") == n_bytes
    back = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    assert back["w"].numpy().tobytes() == tree["w"].tobytes()
    assert back["h"][0].dtype == torch.float16
    assert back["h"][1] == (1, "a")
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


def test_what_torch_cannot_hold_is_refused_before_the_first_byte(tmp_path):
    import ml_dtypes

    Point = collections.namedtuple("Point", "x y")
    cases = [({"a": [Point(np.ones(2), 1)]}, r"node 'a/0': a named tuple \(Point\) cannot be read back"),
             ({"a": np.ones(2, ml_dtypes.float8_e3m4)}, "leaf 'a': torch has no dtype 'float8_e3m4'")]  # fmt: skip
    for tree, text in cases:
        tricomp.save(tmp_path / "a.tri", tree)
        with tricomp.open(tmp_path / "a.tri") as file, pytest.raises(InvalidArgument, match=text):
            formats.exported("torch", file)


def test_a_small_part_that_no_leaf_holds_goes_into_the_skeleton(tmp_path):
    path = saved(tmp_path / "x.pt", [torch.arange(100.0)[3:50], torch.arange(64.0).reshape(8, 8)[::2, ::2]])
    packed, is_exact = compressed(path)
    assert is_exact
    assert restored(packed) == (tmp_path / "x.pt").read_bytes()


def test_ties_noted_of_leaves_that_differ_are_refused(tmp_path):
    notes = {NOTES_KEY: {"ties": {"b": "a"}}}
    tricomp.save(tmp_path / "a.tri", {"a": np.ones(4), "b": np.zeros(4)}, metadata=notes)
    with tricomp.open(tmp_path / "a.tri") as file, pytest.raises(TricompError, match="noted as tied to 'a'"):
        formats.exported("torch", file)


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    tricomp.save(tmp_path / "a.tri", {"a": np.ones((50, 50)), "b": np.ones(0)})
    with tricomp.open(tmp_path / "a.tri") as file:
        pieces = formats.exported("torch", file)
        assert os.listdir(folder) == []
        b"".join(pieces)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(tricomp.errors.StorageError, match="no temporary file can be written in .* Set TMPDIR"):
            formats.exported("torch", file)


def test_checksums_are_those_of_the_bytes(tmp_path):
    tricomp.save(tmp_path / "a.tri", {"a": np.arange(5000.0), "b": np.ones((), np.int64)})
    with tricomp.open(tmp_path / "a.tri") as file:
        data = b"".join(formats.exported("torch", file))
    found = zipfile.ZipFile(io.BytesIO(data)).getinfo("archive/data/0").CRC
    assert found == zlib.crc32(np.arange(5000.0).tobytes())


def test_an_origin_of_torch_is_restored_without_torch(tmp_path):
    import subprocess

    path = saved(tmp_path / "x.pt", Tied().state_dict())
    packed, _ = compressed(path)
    code = (
        "import sys; sys.modules['torch'] = None\nimport tricomp; from tricomp import formats\n"
        "file = tricomp.open(sys.argv[1]); (origin,) = formats.origins(file)\n"
        "sys.stdout.buffer.write(b''.join(formats.restored(file, origin)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, packed], capture_output=True, check=False)
    assert ran.stdout == (tmp_path / "x.pt").read_bytes(), ran.stderr


def test_notes_make_the_object_again(tmp_path):
    path = saved(tmp_path / "x.pt", obj := {"x": conv(), "n": collections.Counter("ab")})
    with FORMAT.read(path) as opened:
        assert exact(unflatten(Flat(opened.tree, opened.metadata[NOTES_KEY]))) == exact(obj)


def test_a_fine_tune_against_its_base_in_either_form(tmp_path):
    weights = {"w": torch.randn(200, 300, generator=torch.Generator().manual_seed(3)), "b": torch.ones(40)}
    saved(tmp_path / "base.pt", weights)
    weights["w"].view(-1)[::150] *= 1.5
    saved(tmp_path / "tuned.pt", weights)
    archive.compress(tmp_path / "base.pt")
    archive.compress(tmp_path / "tuned.pt", base=tmp_path / "base.pt")
    assert os.path.getsize(tmp_path / "tuned.pt.tri") < 0.03 * os.path.getsize(tmp_path / "tuned.pt")
    for base in ("base.pt", "base.pt.tri"):
        archive.decompress(tmp_path / "tuned.pt.tri", tmp_path / "again.pt", base=tmp_path / base, overwrite=True)
        assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "tuned.pt").read_bytes()


@pytest.mark.parametrize("is_zip", [True, False])
def test_parameters_come_back_as_parameters(tmp_path, is_zip):
    buffer = torch.arange(40_000, dtype=torch.float32)
    obj = {
        "weight": torch.nn.Parameter(buffer[:33].clone()),
        "frozen": torch.nn.Parameter(buffer[:3].clone(), requires_grad=False),
        "tracked": buffer[5:9].clone().requires_grad_(),
        "plain": buffer[7:20_000],  # part of its storage: an equal file is written
    }
    path = tmp_path / "x.pt"
    torch.save(obj, path, _use_new_zipfile_serialization=is_zip)
    archive.compress(path)
    found = tricomp_torch.load(f"{path}.tri")
    path.unlink()
    archive.decompress(f"{path}.tri")
    for back in (torch.load(path, weights_only=True), found):
        for name, tensor in obj.items():
            assert type(back[name]) is type(tensor)
            assert back[name].requires_grad is tensor.requires_grad
            assert torch.equal(back[name], tensor)


@pytest.mark.parametrize("note", ["Parameter", "module", 3])
def test_a_note_on_gradients_that_cannot_be_is_refused(note):
    flat = Flat({"x": np.arange(3)}, {"gradients": {"x": note}})
    with pytest.raises(tricomp.CorruptFile, match="noted as|damaged at 'gradients'"):
        unflatten(flat)
