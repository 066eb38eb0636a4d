"""Files by URL and by paths with a tilde: tricomp.save, load and open take both; what is neither is told."""

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import tricomp_torch

import tricomp
from tests.cases import equal
from tricomp.errors import InvalidArgument, MissingFile


@pytest.fixture
def url():
    yield "memory://files"
    fsspec.filesystem("memory").rm("/files", recursive=True)


def tree(k=1):
    return {"w": (np.arange(33_003, dtype=np.float32) + k) ** 2, "step": k}


def test_files_by_url(url):
    tricomp.save(f"{url}/a.tri", tree(1))
    report = tricomp.save(f"{url}/b.tri", tree(2), reference=f"{url}/a.tri")
    assert report.path == f"{url}/b.tri"
    assert report.parent is not None
    assert equal(tricomp.load(f"{url}/b.tri", reference=f"{url}/a.tri"), tree(2))
    with tricomp.open(f"{url}/a.tri") as file:
        assert file.elements("w", 5, 9).tolist() == tree(1)["w"][5:9].tolist()
    with pytest.raises(MissingFile, match=r"memory://files/c\.tri: there is no such file"):
        tricomp.load(f"{url}/c.tri")
    with pytest.raises(InvalidArgument, match=r"a\.tri: would replace its own reference"):
        tricomp.save(f"{url}/a.tri", tree(2), reference=f"{url}/a.tri")


def test_a_reference_may_be_elsewhere(url, tmp_path):
    tricomp.save(tmp_path / "a.tri", tree(1))
    tricomp.save(f"{url}/b.tri", tree(2), reference=tmp_path / "a.tri", storage_options={"skip_instance_cache": True})
    found = tricomp.load(f"{url}/b.tri", tmp_path / "a.tri", storage_options={"skip_instance_cache": True})
    assert equal(found, tree(2))


def test_torch_trees_by_url(url):
    tricomp_torch.save({"w": torch.arange(7)}, f"{url}/t.tri")
    assert tricomp_torch.load(f"{url}/t.tri")["w"].tolist() == list(range(7))


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    tricomp.save("~/x.tri", tree(3))
    assert os.path.exists(tmp_path / "x.tri")
    assert equal(tricomp.load("~/x.tri"), tree(3))
    assert equal(tricomp.load(f"file://{tmp_path}/x.tri"), tree(3))


@pytest.mark.parametrize("bad", [3, None, b"x.tri", "", "a\0b"])
def test_what_is_no_path_is_told(bad):
    for action in (tricomp.load, tricomp.open, lambda path: tricomp.save(path, tree())):
        with pytest.raises(InvalidArgument, match="expected a path"):
            action(bad)


def test_options_of_a_storage_and_broken_urls_are_refused():
    with pytest.raises(InvalidArgument, match="storage_options are for URLs"):
        tricomp.load("x.tri", storage_options={"key": "k"})
    with pytest.raises(InvalidArgument, match="storage_options are for URLs"):
        tricomp.save("x.tri", tree(), storage_options={"key": "k"})
    with pytest.raises(InvalidArgument, match="lost a slash in a Path"):
        tricomp.save(Path("memory://files/x.tri"), tree())
    with pytest.raises(InvalidArgument, match="lost a slash in a Path"):
        tricomp.load(Path("memory://files/x.tri"))
