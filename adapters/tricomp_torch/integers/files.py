"""save_file and load_file: a converted model in a `.tri` file, with its graph where it could be traced. No pickle.

The codes stand in the file as the core keeps them (FORMAT.md, "Integers"), so that it is read without torch as well.
The hard thing: loading builds no float weights. A graph needs no code of the model; without one, the model's modules
are made on the meta device and get their tensors from the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import msgpack
import torch
from torch import nn

import tricomp
from tricomp import bounds
from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode, UnsupportedVersion
from tricomp.integers.files import taken_apart
from tricomp.integers.form import KEY as CORE_KEY
from tricomp.integers.form import note_of
from tricomp.notes import notes_of, with_notes
from tricomp_torch.integers import describing, program
from tricomp_torch.integers.contents import Contents
from tricomp_torch.integers.convert import with_integers
from tricomp_torch.integers.examples import Batch, batches_of
from tricomp_torch.integers.forms import prepare
from tricomp_torch.integers.graph import export
from tricomp_torch.integers.nodes import NodePlan, Plan
from tricomp_torch.integers.reading import APART, apart
from tricomp_torch.integers.weights import IntegerWeight
from tricomp_torch.tensors import to_array
from tricomp_torch.ties import TieFinder

KEY = "tricomp_integer_model"
"""The key of a file's metadata with {"version": 1, "packed": ...}: deflated msgpack of {"plan", "graph", "ties"}."""
_VERSION = 1
_log = logging.getLogger("tricomp")


def save_file(
    model: nn.Module,
    filename: str | os.PathLike[str],
    example_inputs: Any = None,
    metadata: Mapping[str, str] | None = None,
    *,
    dynamic_shapes: Any = None,
    threads: int | None = None,
) -> tricomp.Report:
    """Write a converted model to a `.tri` file, atomically: entropy-coded integers, other tensors bit for bit.

    model: what `convert` returned. example_inputs: as for `plan`; with them the file holds the graph too, and needs no
    code of the model to be loaded. Give at least two rows: torch takes an axis of one for one of that size. A model
    that cannot be traced, or that calls what files may not name, is written without a graph, with a warning; outputs
    that are no tensors nor numbers, such as caches of keys and values, become None. metadata: text by text key.
    dynamic_shapes: which sizes of inputs the graph is to leave open, as torch.export.export takes them; None: the first
    axis of each. threads: see tricomp.open.
    Raises InvalidArgument for a model that `convert` did not make; StorageError.
    """
    plan = getattr(model, "integer_plan", None)
    if not isinstance(plan, Plan):
        raise InvalidArgument(
            f"save_file: expected a model from integers.convert, got a {type(model).__name__}. For float models use "
            "tricomp_torch.save_file."
        )
    graph: dict[str, Any] | None = None
    constants: dict[str, torch.Tensor] = {}
    if example_inputs is not None:
        graph, constants = _graph_of(model, batches_of(example_inputs)[0], dynamic_shapes)
    entries, ties = _entries(model, constants)
    packed, forms = taken_apart(entries)
    told = msgpack.packb({"plan": plan.to_dict(), "graph": graph, "ties": ties})
    note = {"version": _VERSION, "packed": bounds.deflate(told)}
    notes = with_notes(with_notes(metadata, note_of(forms), CORE_KEY), note, KEY)
    return tricomp.save(filename, packed, metadata=notes, threads=threads)


def load_file(
    filename: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    *,
    threads: int | None = None,
) -> nn.Module:
    """The converted model of a file, in eval mode, its weights straight to integers.

    model: the float model that was planned, made anew; best on the meta device (`with torch.device("meta")`), since its
    weights are not used. It is not changed. None: the file's graph is run, as a `Program`. threads: see tricomp.open.
    Raises InvalidArgument for a file without a graph if no model is given, for a model of other names or shapes, and
    for a file that save_file did not write; CorruptFile, CorruptFrame, UnsupportedVersion.
    """
    with tricomp.open(os.fspath(filename), threads=threads) as file:
        note = _told(file)
        if model is None and note.get("graph") is None:
            raise InvalidArgument(
                f"{file.name}: holds no graph. Give model=, the float model that was planned, or save it with "
                "example_inputs=."
            )
        contents = Contents(file, torch.device(device))
        for alias, first in note["ties"].items():
            contents.tie(alias, first)
        name = file.name
    if model is None:
        return program.read(note["graph"], contents.tensors, device, name, note["plan"])
    return _filled(model, note["plan"], contents, name)


def _told(file: tricomp.File) -> dict[str, Any]:
    """What save_file told of a model: plan, graph and ties. Raises what load_file raises."""
    note = notes_of(file.metadata, KEY)
    if not note:
        raise InvalidArgument(
            f"{file.name}: holds no model of integers.save_file. Use tricomp.integers.load_file for weights of tricomp "
            "quantize, tricomp_torch.load for other files."
        )
    what = f"{file.name}: what it tells of its model"
    if note.get("version") != _VERSION:
        raise UnsupportedVersion(f"{what} is of version {note.get('version')!r}, not {_VERSION}. Upgrade tricomp.")
    told = bounds.unpack(bounds.inflate(note.get("packed"), bounds.DEFAULTS, what), what)
    if not isinstance(told, dict) or not isinstance(told.get("ties"), dict) or not isinstance(told.get("plan"), dict):
        raise CorruptFile(f"{what} is no plan, graph and ties. Fetch the file again.")
    return told


def _graph_of(model: nn.Module, batch: Batch, shapes: Any) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    try:
        with apart(model):
            graph, tensors = describing.describe(
                export(model, batch, shapes), lambda name: name.replace(f"{APART}.", ".")
            )
    except UnsupportedNode as error:
        why = str(error)
    except Exception as error:  # torch.export raises whatever the model or its own passes raise
        lines = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0][:200]}"
    else:
        for leaf in graph["inputs"]["leaves"]:
            if leaf.get("shape") and leaf["shape"][0] is not None:
                text = "the graph of %s takes %s of exactly %d rows: the model's code reads that size as a plain number"
                _log.warning(text, type(model).__name__, leaf["name"], leaf["shape"][0])
        return graph, tensors
    _log.warning("%s is saved without its graph, load it with model=: %s", type(model).__name__, why)
    return None, {}


def _entries(model: nn.Module, constants: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file holds by name, and which names are others' too."""
    entries: dict[str, Any] = {}
    weights: dict[int, str] = {}
    ties: dict[str, str] = {}
    inside: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, IntegerWeight):
            inside.update(f"{path}.{name}" for name in ("codes", "scales"))
            first = weights.setdefault(id(module), path)
            if first != path:
                ties[path] = first
            else:
                entries[path] = module.quantized()
    finder = TieFinder()
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
        *constants.items(),
    ]
    for name, tensor in dict(named).items():
        if name not in inside:
            finder.add(name, tensor.detach())
            if name not in finder.ties:
                entries[name] = to_array(tensor.detach(), name)
    return entries, {**ties, **finder.ties}


def _filled(model: nn.Module, told: Any, contents: Contents, where: str) -> nn.Module:
    """The model in its preset form, with the file's integers and other tensors in it."""
    plan = Plan.from_dict(told)

    def weight_of(name: str, node: NodePlan, held: torch.Tensor) -> IntegerWeight:
        if name not in contents.forms or contents.forms[name].bits != node.bits:
            raise CorruptFile(
                f"{where}: {name!r} is planned as int{node.bits}, but the file holds none. Fetch it again."
            )
        made = contents.weight(name, is_turned=name in node.turned)
        if made.shape != held.shape:
            raise InvalidArgument(
                f"{where}: {name!r} is {list(made.shape)} in the file, {list(held.shape)} in the model. Give the model "
                "that was planned."
            )
        return made

    made = with_integers(prepare(model, plan, needs_data=False), plan, weight_of)
    inside = {
        f"{path}.{part}"
        for path, module in made.named_modules(remove_duplicate=False)
        for part in ("codes", "scales")
        if isinstance(module, IntegerWeight)
    }
    parameters: dict[int, nn.Parameter] = {}
    missing = []
    for table, named in (("_parameters", made.named_parameters), ("_buffers", made.named_buffers)):
        for name, held in list(named(remove_duplicate=False)):
            if name in inside:
                continue
            tensor = contents.tensors.get(name)
            if tensor is None or tensor.shape != held.shape:
                missing.append(f"{name} {list(held.shape)}")
                continue
            if table == "_parameters":
                tensor = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            owner, _, last = name.rpartition(".")
            getattr(made.get_submodule(owner), table)[last] = tensor
    if missing:
        raise InvalidArgument(
            f"{where}: the model has {', '.join(missing[:5])}, which the file does not. Give the model that was "
            "planned."
        )
    made.integer_plan = plan  # type: ignore[assignment]
    return made.eval()
