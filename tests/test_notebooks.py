"""Notebooks: each runs from top to bottom, small; as committed it shows its results, and nothing of the machine.

`python -m tests.test_notebooks` executes them in full, a minute or two, and writes them back, clean.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
for _needed in ("ipykernel", "matplotlib", "torch"):
    pytest.importorskip(_needed)

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = "TRICOMP_NOTEBOOK_QUICK"
WITHOUT_PEERS = 'import sys; sys.modules.update(dict.fromkeys(("zipnn", "backports.zstd", "compression.zstd")))\n'
NEEDED = {"02_a_model_as_integers": ("safetensors", "sklearn")}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MOST_BYTES = 1_000_000
FOREIGN = re.compile(
    r"(?<![\w.:])/(home|root|tmp|Users|opt|work|var|mnt|usr|data|srv)/|\b[A-Z]:\\|localhost|site-packages"
)


def _execute(path: Path, folder: Path, before: str = "") -> Any:
    """The notebook with the outputs of a run in that folder, after the code `before`. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = before + first.source
    where = {"metadata": {"path": str(folder)}}
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "resources": where}
    nbclient.NotebookClient(notebook, **options).execute()
    return notebook


def _outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def _texts(notebook: Any) -> Iterator[str]:
    """Every source, and every output that is text."""
    for cell in notebook.cells:
        yield cell.source
    for output in _outputs(notebook):
        yield output.get("text", "")
        yield from (content for kind, content in output.get("data", {}).items() if kind.startswith("text/"))


def _figures(notebook: Any) -> list[bytes]:
    found = [output.get("data", {}).get("image/png") for output in _outputs(notebook)]
    return [base64.b64decode(figure) for figure in found if figure]


def _befores(path: Path) -> list[str]:
    """Code to run a notebook after. Those that measure peers must do without them too."""
    return ["", WITHOUT_PEERS] if "zipnn" in path.read_text() else [""]


def _id_of(value: Path | str) -> str:
    return value.stem if isinstance(value, Path) else "without peers" if value else "as it is"


@pytest.fixture
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without the settings of whoever runs it, and a small model."""
    monkeypatch.setenv(QUICK, "1")
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("path", "before"), [(path, before) for path in NOTEBOOKS for before in _befores(path)], ids=_id_of
)
def test_a_notebook_runs_and_leaves_nothing_behind(path: Path, before: str, tmp_path: Path) -> None:
    for needed in NEEDED.get(path.stem, ()):
        pytest.importorskip(needed)
    folder = tmp_path / "here"
    folder.mkdir()
    notebook = _execute(path, folder, before)
    assert not [output for output in _outputs(notebook) if output.get("name") == "stderr"]
    assert len(_figures(notebook)) == len(_figures(nbformat.read(path, as_version=4))) > 0
    assert ("ZipNN |" in "".join(_texts(notebook))) == (not before and len(_befores(path)) > 1)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_shows_its_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "execute it from top to bottom"
    kinds = {output.output_type for output in _outputs(notebook)}
    assert kinds <= {"display_data", "execute_result", "stream"}
    assert not [output for output in _outputs(notebook) if output.get("name") == "stderr"]
    assert all(figure.startswith(b"\x89PNG") for figure in _figures(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_small_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata == METADATA
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]
    assert not [output.metadata for output in _outputs(notebook) if output.get("metadata")]
    assert not [found[0] for text in _texts(notebook) if (found := FOREIGN.search(text))]


@pytest.mark.parametrize("text", ["/home/a/b.tri", "in /tmp/x", "C:\\Users", "'/opt/py'", "lib/site-packages/torch"])
def test_the_path_of_a_machine_is_noticed(text: str) -> None:
    assert FOREIGN.search(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    targets = [
        target for text in _texts(nbformat.read(path, as_version=4)) for target in re.findall(r"\]\((.+?)\)", text)
    ]
    assert [target for target in targets if "://" not in target]
    assert not [target for target in targets if "://" not in target and not (path.parent / target).exists()]


def _with_few_colours(png: bytes) -> bytes:
    """The picture with a palette of 256 colours: a third of the bytes, and no difference that one sees."""
    from PIL import Image

    picture, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _refresh(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = _execute(path, Path(folder))
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    for output in _outputs(notebook):
        if "metadata" in output:
            output.metadata = nbformat.from_dict({})
        if "image/png" in output.get("data", {}):
            figure = _with_few_colours(base64.b64decode(output.data["image/png"]))
            output.data["image/png"] = base64.b64encode(figure).decode()
    nbformat.write(notebook, path)
    sys.stderr.write(f"{path.name}: {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    for _path in NOTEBOOKS:
        _refresh(_path)
