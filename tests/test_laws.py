"""The laws of the layout: who may import whom, what a wheel holds, what may stand at the top. Reads source, runs none
but in processes of its own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import native_build

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"tricomp": ROOT / "tricomp", **{p: ROOT / "adapters" / p for p in ("tricomp_torch", "tricomp_jax")}}
BACKENDS = ("tricomp.reference", "tricomp.native", "tricomp.kernels")
GROUND = ("tricomp.errors", "tricomp.dtypes", "tricomp.layout", "tricomp.plan", "tricomp.bounds", "tricomp.job")
FRAMEWORKS = ("torch", "jax", "triton")
PICKLES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")


def _modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


MODULES = dict(_modules())
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def _imported(module: str) -> Iterator[str]:
    """Every module named in an import of a module, at its top or deeper; "from a import b" names a.b if that is one."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source


IMPORTS = {module: set(_imported(module)) for module in MODULES}


def _is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _reached(module: str) -> set[str]:
    """Every module that importing this one leads to, packages' own __init__ left out where only a part is named."""
    seen, waiting = set(), {module}
    while waiting:
        seen |= waiting
        waiting = {name for known in waiting for name in IMPORTS.get(known, ())} - seen
    return seen - {module}


def _breaches(importers: tuple[str, ...], forbidden: tuple[str, ...], *, deep: bool = False) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in MODULES
        if _is_in(module, *importers)
        for name in sorted(_reached(module) if deep else IMPORTS[module])
        if _is_in(name, *forbidden)
    ]


def _python(code: str, cwd: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


def test_the_graph_sees_imports() -> None:
    assert "tricomp.errors" in IMPORTS["tricomp.dtypes"]
    assert "tricomp.errors" in _reached("tricomp.layout")


def test_importing_tricomp_loads_no_framework(tmp_path: Path) -> None:
    done = _python(f"import sys, tricomp; print(sorted(set({FRAMEWORKS}) & set(sys.modules)))", tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_never_import_each_other(backend: str) -> None:
    assert _breaches((backend,), tuple(other for other in BACKENDS if other != backend), deep=True) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_import_ground_alone(backend: str) -> None:
    others = tuple(m for m in MODULES if m not in ("tricomp", *GROUND) and not _is_in(m, backend))
    assert _breaches((backend,), others) == []
    named = {name.partition(".")[0] for module in MODULES if _is_in(module, backend) for name in IMPORTS[module]}
    allowed = {"tricomp", "numpy", "xxhash"} | ({"torch", "triton"} if backend == "tricomp.kernels" else set())
    assert named - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("module", ["tricomp.storage", "tricomp.chain"])
def test_storage_and_chain_know_no_codec(module: str) -> None:
    assert module in MODULES
    assert _breaches((module,), ("tricomp.codec", *BACKENDS), deep=True) == []


def test_core_never_imports_an_adapter() -> None:
    assert _breaches(("tricomp",), ("tricomp_torch", "tricomp_jax", "adapters")) == []


def test_adapters_do_not_import_each_other() -> None:
    assert _breaches(("tricomp_torch",), ("tricomp_jax", "jax")) == []
    assert _breaches(("tricomp_jax",), ("tricomp_torch", "torch")) == []


def test_codec_is_the_only_importer_of_backends() -> None:
    others = tuple(
        module for module in MODULES if module != "tricomp" and not _is_in(module, "tricomp.codec", *BACKENDS)
    )
    assert _breaches(others, BACKENDS) == []
    assert not any(_is_in(name, *BACKENDS) for name in IMPORTS["tricomp"])


def test_ground_imports_ground_alone() -> None:
    own = tuple(module for module in MODULES if module.startswith("tricomp.") and module not in GROUND)
    assert _breaches(GROUND, own) == []
    assert _breaches(GROUND, (*FRAMEWORKS, "io", "mmap", "pathlib", "shutil", "tempfile")) == []


def test_only_kernels_import_torch_or_triton_in_the_core() -> None:
    core = tuple(
        module for module in MODULES if module.startswith("tricomp.") and not _is_in(module, "tricomp.kernels")
    )
    assert _breaches(core, FRAMEWORKS) == []
    assert not IMPORTS["tricomp"] & set(FRAMEWORKS)


# Packages of others that one place each may import, so that the rest works without them.
DOORS = {
    "fsspec": ("tricomp.far",),
    "numcodecs": ("tricomp.numcodecs",),
    "zarr": ("tricomp.zarr",),
    "tqdm": ("tricomp.cli.progress",),
    "shtab": ("tricomp.cli.completion",),
    "transformers": ("tricomp_torch.transformers",),
    "accelerate": ("tricomp_torch.accelerate",),
}


@pytest.mark.parametrize("package", DOORS)
def test_an_optional_package_has_one_door(package: str) -> None:
    assert {module for module in MODULES if any(_is_in(name, package) for name in IMPORTS[module])} == {*DOORS[package]}


def test_formats_need_no_library_of_theirs() -> None:
    assert _breaches(("tricomp.formats",), (*FRAMEWORKS, "safetensors", "flax", "orbax", "transformers")) == []


def test_the_library_knows_nothing_of_its_command() -> None:
    library = tuple(module for module in MODULES if module != "tricomp" and not _is_in(module, "tricomp.cli"))
    assert _breaches(library, ("tricomp.cli", "argparse")) == []
    assert not any(_is_in(name, "tricomp.cli") for name in IMPORTS["tricomp"])


@pytest.mark.parametrize("module", ["container", "folder", "bucket", "memory", "tail"])
def test_what_moves_bytes_knows_no_codec(module: str) -> None:
    assert f"tricomp.{module}" in MODULES
    assert _breaches((f"tricomp.{module}",), ("tricomp.codec", *BACKENDS), deep=True) == []


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "x.tri"], ["compress", "x.npy"]], ids=lambda a: a[0])
def test_the_command_loads_no_more_than_it_needs(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, numpy, tricomp; from tricomp.cli import main; numpy.save('x.npy', numpy.arange(33));"
        "tricomp.save('x.tri', {'w': numpy.arange(33)})\n"
        f"try: code = main({arguments!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print(sorted({{*{FRAMEWORKS}, *{tuple(DOORS)}}} & set(sys.modules)), code)"
    )
    done = _python(code, tmp_path)
    assert done.stdout.split("\n")[-2] in ("[] 0", "[] None"), done.stderr


def test_nothing_imports_pickle() -> None:
    assert _breaches(tuple(PACKAGES), PICKLES) == []


def test_nothing_asks_a_library_to_unpickle() -> None:
    asked = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if (keyword.arg, getattr(keyword.value, "value", None)) in {("allow_pickle", True), ("weights_only", False)}
    ]
    assert asked == []


def test_names_are_nouns_of_the_design() -> None:
    stems = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "process", "ctx", "core"}
    assert [module for module in MODULES if module.rpartition(".")[2].strip("_") in stems] == []
    classes = [
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name in classes if re.search("Manager|Helper|Util", name)] == []


def test_every_module_opens_with_its_purpose() -> None:
    assert [module for module, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_adapters_is_no_package() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()


@pytest.mark.parametrize("adapter", ["tricomp_torch", "tricomp_jax"])
def test_an_adapter_refuses_to_be_imported_through_its_folder(adapter: str) -> None:
    done = _python(f"import adapters.{adapter}", ROOT)
    assert done.returncode == 1
    assert f"ImportError: import {adapter}" in done.stderr


def test_the_top_level_holds_the_agreed_names() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {path.partition("/")[0] for path in listed if path and not path.startswith(".")}
    assert top - {"pyproject.toml", "README.md", "LICENSE", "tricomp", "adapters", "tests", "notebooks"} == set()


def test_the_version_stands_in_one_place() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = _python("import tricomp; print(tricomp.__version__)", ROOT)
    assert (done.stdout.strip(), done.stderr) == (declared, "")


@pytest.fixture(scope="module", params=["pure", "native"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "native":
        if not native_build.has_compiler():
            pytest.skip("no C++ compiler here")
        return native_build.wheel()
    return native_build.package("build_wheel", tmp_path_factory.mktemp("wheel"), TRICOMP_BUILD="pure")


def _is_native(wheel: Path) -> bool:
    return "-cp311-abi3-" in wheel.name


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: Path) -> None:
    """Of the extension: one shared library, and none of what it is made of."""
    assert wheel.name.endswith("-py3-none-any.whl") != _is_native(wheel)
    names = zipfile.ZipFile(wheel).namelist()
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, info}
    expected = {f"{path.relative_to(folder.parent)}" for folder in PACKAGES.values() for path in folder.rglob("*.py")}
    expected |= {f"{package}/py.typed" for package in PACKAGES} | {"tricomp/FORMAT.md", "tricomp/CHANGELOG.md"}
    expected |= {"tricomp/native/_core.abi3.so"} if _is_native(wheel) else set()
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_works_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import numpy, tricomp; from tricomp import native; array = numpy.arange(33, dtype='f4');"
        "assert (tricomp.decode(tricomp.encode(array)) == array).all(); print(tricomp.__file__, native.is_there())"
    )
    paths = [str(tmp_path / "site"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # -S: an editable install is not seen.
    done = _python(code, tmp_path, "-S", PYTHONPATH=os.pathsep.join(paths), TRICOMP_NATIVE="")
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    assert done.stdout.split()[-1] == str(_is_native(wheel))


def test_the_sources_hold_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    with tarfile.open(native_build.package("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = {f"{path.relative_to(ROOT)}" for path in (ROOT / "tricomp" / "native").iterdir() if path.is_file()}
    assert {name for name in listed if not name.endswith((".so", ".new"))} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")]
