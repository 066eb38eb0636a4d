"""Tensor subclasses that are made of plain tensors, torchao's say: taken apart into those and put together again.

A subclass tells its parts by `__tensor_flatten__`: names of inner tensors and a *context*, the rest. The inner tensors
go into the tree as a dict at the tensor's path; class, context, dtype, shape and strides go into the notes. Imports no
file code. The hard thing: a class name that comes from a file must lead to no import and no call that was not foreseen,
so names are looked up in the tables here, or among the classes that the program itself has registered.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from tricomp.errors import CorruptFile, InvalidArgument, UnsupportedNode
from tricomp_torch.tensors import PLAIN

_KNOWN_TENSORS = frozenset(
    {
        "torchao.optim.subclass_4bit.OptimState4bit",
        "torchao.optim.subclass_8bit.OptimState8bit",
        "torchao.optim.subclass_fp8.OptimStateFp8",
        "torchao.quantization.Float8Tensor",
        "torchao.quantization.Int4PlainInt32Tensor",
        "torchao.quantization.Int4Tensor",
        "torchao.quantization.Int8Tensor",
        "torchao.quantization.IntxUnpackedToInt8Tensor",
    }
)
# Enums, dataclasses and named tuples of plain values, in the contexts of the above.
_KNOWN_VALUES = frozenset(
    {
        "torchao.float8.inference.Float8MMConfig",
        "torchao.quantization.granularity.PerAxis",
        "torchao.quantization.granularity.PerBlock",
        "torchao.quantization.granularity.PerGroup",
        "torchao.quantization.granularity.PerRow",
        "torchao.quantization.granularity.PerTensor",
        "torchao.quantization.granularity.PerToken",
        "torchao.quantization.quant_primitives.MappingType",
        "torchao.quantization.quantize_.common.kernel_preference.KernelPreference",
        "torchao.quantization.quantize_.workflows.float8.float8_tensor.QuantizeTensorToFloat8Kwargs",
        "torchao.quantization.quantize_.workflows.int8.int8_tensor.QuantizeTensorToInt8Kwargs",
    }
)
_registered: dict[str, type[torch.Tensor]] = {}
_SCALARS = (bool, int, float, str, bytes)
_FIELDS = {"class", "context", "dtype", "shape", "strides"}


def register_tensor(cls: type[torch.Tensor]) -> type[torch.Tensor]:
    """Let trees hold tensors of exactly this subclass, and files that name it be loaded. Returns cls, so it decorates.

    cls needs `__tensor_flatten__` and the static or class method `__tensor_unflatten__`, as PyTorch describes them;
    what they leave out is lost. The context must be of plain values, torch dtypes and sizes. A file names the class by
    module and qualified name, so the program that loads must register it too. Raises InvalidArgument if cls is none.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.Tensor)):
        raise InvalidArgument(f"register_tensor: expected a subclass of torch.Tensor, got {cls!r}.")
    if not hasattr(cls, "__tensor_flatten__") or not hasattr(cls, "__tensor_unflatten__"):
        raise InvalidArgument(
            f"register_tensor: {cls.__name__} lacks __tensor_flatten__ or __tensor_unflatten__. "
            "Store the plain tensors it is made of."
        )
    _registered[_name(cls)] = cls
    return cls


def take_apart(tensor: torch.Tensor, path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inner tensors by name, and the note that `put_together` needs. Raises UnsupportedNode, naming the path."""
    cls = type(tensor)
    _require_known(cls, path)
    try:
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: getattr(tensor, name) for name in names}
    except Exception as error:  # a file may have made it without what its class relies on
        raise UnsupportedNode(f"leaf {path!r}: this {cls.__name__} cannot be taken apart ({error}).") from error
    for name, value in inner.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise UnsupportedNode(f"leaf {path!r}: its inner tensor {name!r} is a {kind}. Store its plain tensors.")
    note = {
        "class": _name(cls),
        "context": _pack(context, path, cls.__name__),
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
    }
    try:
        put_together(inner, note, path)
    except CorruptFile as error:  # now, not when it is to be loaded
        raise UnsupportedNode(
            f"leaf {path!r}: {cls.__name__} cannot be made again of what its __tensor_flatten__ gives "
            f"({error.__cause__ or 'its shape or dtype differs'}). Store the plain tensors it is made of."
        ) from error
    return inner, note


def put_together(inner: Mapping[str, Any], note: Mapping[str, Any], path: str) -> torch.Tensor:
    """The tensor that was taken apart, of inner tensors made anew.

    Raises UnsupportedNode if the class is in no table or is not installed, CorruptFile if the note does not fit.
    """
    cls = _find(note["class"], path)
    context = _unpack(note["context"], path)
    shape, strides = tuple(note["shape"]), tuple(note["strides"])
    if not all(isinstance(value, torch.Tensor) for value in inner.values()):
        raise _misfit(path, note, "an inner tensor is none")
    try:
        made = cls.__tensor_unflatten__(dict(inner), context, torch.Size(shape), strides)
        found = type(made), tuple(made.shape), str(made.dtype)
    except Exception as error:  # a class may raise anything on parts that are not its own
        raise _misfit(path, note, f"{type(error).__name__}: {error}") from error
    if found != (cls, shape, note["dtype"]):
        raise _misfit(path, note, f"what came is a {found[2]} of shape {list(found[1])}")
    return made  # type: ignore[no-any-return]


def parts_of(tensor: torch.Tensor, path: str) -> Any:
    """What must be equal for one tensor to take over the data of another, both of a subclass; None for plain ones."""
    if type(tensor) in PLAIN:
        return None
    inner, note = take_apart(tensor, path)
    sizes = [(name, part.dtype, part.shape, parts_of(part, path)) for name, part in inner.items()]
    return {key: note[key] for key in ("class", "context", "dtype", "shape")}, sizes


def require_notes(notes: Mapping[str, Any]) -> None:
    """Raise CorruptFile unless notes are such as `take_apart` gives, by path."""
    for path, note in notes.items():
        is_note = isinstance(note, Mapping) and set(note) >= _FIELDS
        if is_note:
            numbers = [note["shape"], note["strides"]]
            is_note = isinstance(note["class"], str) and all(is_sizes(entry) for entry in numbers)
        if not is_note:
            raise CorruptFile(f"the file's note on the tensor at {path!r} is damaged. Read the file with tricomp.load.")


def is_sizes(value: Any) -> bool:
    """Whether value is a list of integers such as shapes and strides hold."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def known_classes(names: set[str]) -> dict[str, Any]:
    """Those classes of the tables that are among the names, imported; without those that are not installed."""
    found = {}
    for name in sorted(names & (_KNOWN_TENSORS | _KNOWN_VALUES)):
        try:
            found[name] = _import(name)
        except (ImportError, AttributeError):
            continue
    return found


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _require_known(cls: type, path: str) -> None:
    name = _name(cls)
    if _registered.get(name) is cls or (name in _KNOWN_TENSORS and _import(name) is cls):
        return
    what = f"leaf {path!r}: expected a torch.Tensor, got its subclass {cls.__name__}"
    if name.startswith("torch.distributed."):
        raise UnsupportedNode(f"{what}. Save it with tricomp_torch.dcp, or store its full_tensor().")
    if name.startswith("torch.nested."):
        raise UnsupportedNode(f"{what}, a nested tensor. Store the list of its parts, unbind().")
    if name.startswith("torch.nn.parameter.Uninitialized"):
        raise UnsupportedNode(f"{what}, which has no data yet. Run the module once before saving.")
    if hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__"):
        raise UnsupportedNode(
            f"{what}, which is not known here. Call tricomp_torch.register_tensor({cls.__name__}) first."
        )
    raise UnsupportedNode(f"{what}. Store the plain tensors it is made of.")


def _find(name: str, path: str) -> Any:
    if name in _registered:
        return _registered[name]
    if name not in _KNOWN_TENSORS:
        raise UnsupportedNode(
            f"leaf {path!r}: the file names the tensor subclass {name!r}, which is not known here. If it is yours, "
            "call tricomp_torch.register_tensor on it first; tricomp.load reads the plain tensors it is made of."
        )
    return _installed(name, path)


def _installed(name: str, path: str) -> Any:
    try:
        return _import(name)
    except (ImportError, AttributeError) as error:
        package = name.partition(".")[0]
        raise UnsupportedNode(
            f"leaf {path!r}: the file names {name!r}, which this environment lacks ({error}). Install the {package} it "
            "was saved with, or read the plain tensors with tricomp.load."
        ) from error


def _misfit(path: str, note: Mapping[str, Any], what: str) -> CorruptFile:
    return CorruptFile(
        f"leaf {path!r}: its parts do not make the {note['class']!r} that is noted ({what}). Read the file with "
        "tricomp.load, which gives the parts."
    )


def _pack(value: Any, path: str, owner: str) -> Any:
    """A context as plain values: scalars stand for themselves, all else is a map of one key that says what it is."""

    def inner(entries: Any) -> list[Any]:
        return [_pack(entry, path, owner) for entry in entries]

    kind = type(value)
    name = _name(kind)
    if value is None or kind in _SCALARS:
        return value
    if kind in (list, tuple, torch.Size):
        return {kind.__name__: inner(value)}
    if kind is dict:
        return {"dict": [inner(item) for item in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if name in _KNOWN_VALUES:
        if isinstance(value, Enum):
            return {"enum": [name, value.name]}
        fields = kind._fields if hasattr(kind, "_fields") else [field.name for field in dataclasses.fields(value)]
        return {"record": [name, {field: _pack(getattr(value, field), path, owner) for field in fields}]}
    raise UnsupportedNode(
        f"leaf {path!r}: {owner} holds a {name} beside its tensors, which is not plain data. "
        "Store the plain tensors it is made of."
    )


def _unpack(packed: Any, path: str) -> Any:
    if packed is None or type(packed) in _SCALARS:
        return packed
    try:
        ((kind, value),) = packed.items()
        if kind in ("list", "tuple", "Size"):
            made = [_unpack(entry, path) for entry in value]
            return made if kind == "list" else tuple(made) if kind == "tuple" else torch.Size(made)
        if kind == "dict":
            return {_unpack(key, path): _unpack(entry, path) for key, entry in value}
        if kind == "dtype" and isinstance(getattr(torch, value), torch.dtype):
            return getattr(torch, value)
        if kind in ("enum", "record"):
            name, rest = value
            if name in _KNOWN_VALUES:
                cls = _installed(name, path)
                return (
                    cls[rest] if kind == "enum" else cls(**{key: _unpack(entry, path) for key, entry in rest.items()})
                )
    except UnsupportedNode:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"leaf {path!r}: the note on its class is damaged ({type(error).__name__}).") from error
    raise CorruptFile(f"leaf {path!r}: the note on its class is damaged: {packed!r}.")
