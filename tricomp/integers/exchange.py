"""Quantised arrays in safetensors files, in the layout of the compressed-tensors library, which others read too.

    <name>         int8 codes, at more than 4 bits ("int-quantized")
    <name>_packed  int32 [out, ceil(n / 8)]: at 4 bits, codes plus 8, eight a word, the first lowest ("pack-quantized"),
    <name>_shape   int64: and the array's shape
    <name>_scale   scales [out, 1], or [out, groups]

The file's metadata says in "quantization_config" what a model's config.json needs, and in "tricomp.integers" the Forms.
The hard thing: memory. Tensors are decoded one by one as they are written, and codes are packed on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from tricomp import archive_output, dtypes, tree
from tricomp.bounds import Bytes
from tricomp.errors import InvalidArgument
from tricomp.file import File
from tricomp.formats.safetensors import head_of, texts_of
from tricomp.integers import files
from tricomp.integers.exchange_reader import NOTE, PACKED, SCALE, SHAPE
from tricomp.integers.form import CODES, SCALES, Form
from tricomp.integers.packing import PER_WORD, pack_words
from tricomp.integers.quantized import Quantized, dequantize
from tricomp.layout import Leaf
from tricomp.tensors import Path, require_text

Array = np.ndarray[Any, Any]

CONFIG = "quantization_config"


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written: its name, dtype and shape, and what makes it when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


def to_safetensors(
    path: Path, arrays: Mapping[str, Quantized | Array], metadata: Mapping[str, str] | None = None
) -> int:
    """Write a flat dict of quantised and other arrays to a safetensors file, atomically. Returns its bytes.

    Raises UnsupportedNode, InvalidArgument (naming the entry), StorageError.
    """
    packed, _ = files.taken_apart(arrays)
    known = {name: _form(array) if isinstance(array, Quantized) else None for name, array in arrays.items()}

    def part(name: str, which: str | None) -> Array:
        return np.asarray(packed[name] if which is None else packed[name][which])

    def about(name: str, which: str | None) -> tuple[str, tuple[int, ...]]:
        array = part(name, which)
        return dtypes.of(array, name).name, array.shape

    tensors = _tensors(known, about, part)
    return archive_output.put(str(path), _pieces(tensors, known, require_text(metadata), str(path)))


def exported(file: File, patterns: list[str] | None = None, is_dequantized: bool = False) -> Iterator[Bytes]:
    """The bytes of a safetensors file with the entries of an open `.tri` file, decoded as they are written.

    patterns: names or fnmatch patterns of entries; None: all. is_dequantized: floats in the place of integers.
    Raises what load_file raises, before anything is decoded.
    """
    known = files.names_of(file)
    if patterns is not None:
        known = files.chosen(known, patterns, file.name)

    def path(name: str, which: str | None) -> str:
        found = tree.join(None, name)
        return found if which is None else f"{found}/{which}"

    def about(name: str, which: str | None) -> tuple[str, tuple[int, ...]]:
        leaf = file.leaf(path(name, which))
        return leaf.dtype.name, leaf.shape

    def part(name: str, which: str | None) -> Array:
        return file[path(name, which)]

    for name, form in known.items():  # whatever the file tells, codes and scales must fit
        if form is not None:
            files.check_parts(file.name, name, form, *about(name, CODES), *about(name, SCALES))
    if not is_dequantized:
        return _pieces(_tensors(known, about, part), known, texts_of(file.metadata), file.name)

    def floats(name: str, form: Form) -> Array:
        return dequantize(files.quantized(file.name, name, form, part(name, CODES), part(name, SCALES)))

    tensors = [
        _Tensor(name, *about(name, None), partial(part, name, None))
        if form is None
        else _Tensor(name, form.dtype, about(name, CODES)[1], partial(floats, name, form))
        for name, form in known.items()
    ]
    return _pieces(tensors, {}, texts_of(file.metadata), file.name)


def quantization_config(forms: Mapping[str, Form]) -> dict[str, Any]:
    """What the config.json of a model with these arrays says of them, for libraries that read compressed-tensors."""
    kinds: dict[tuple[int, int | None], list[str]] = {}
    for name, form in forms.items():
        kinds.setdefault((4 if form.bits == 4 else 8, form.group), []).append(name.removesuffix(".weight"))
    groups = {
        f"group_{i}": {
            "targets": sorted(names),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if group is None else "group",
                "group_size": group,
                "dynamic": False,
            },
            "format": "pack-quantized" if bits == 4 else "int-quantized",
        }
        for i, ((bits, group), names) in enumerate(sorted(kinds.items(), key=lambda each: (each[0][0], str(each[0]))))
    }
    found = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": found.pop() if len(found) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [],
    }


def _form(array: Quantized) -> Form:
    return Form(array.bits, array.group, array.dtype)


def _tensors(
    known: Mapping[str, Form | None],
    about: Callable[[str, str | None], tuple[str, tuple[int, ...]]],
    part: Callable[[str, str | None], Array],
) -> list[_Tensor]:
    """What entries become. about: dtype and shape of an entry, or of a part of it; part: itself."""

    def scales_of(name: str, shape: tuple[int, ...]) -> Array:
        return part(name, SCALES).reshape(shape)

    def packed(name: str) -> Array:
        return pack_words(part(name, CODES))

    found: list[_Tensor] = []
    for name, form in known.items():
        if form is None:
            found.append(_Tensor(name, *about(name, None), partial(part, name, None)))
            continue
        shape = about(name, CODES)[1]
        scale_dtype, scales = about(name, SCALES)
        scales = (*scales, 1) if len(scales) == 1 else scales
        found.append(_Tensor(name + SCALE, scale_dtype, scales, partial(scales_of, name, scales)))
        if form.bits > 4:
            found.append(_Tensor(name, "int8", shape, partial(part, name, CODES)))
        else:
            words = shape[0], -(-math.prod(shape[1:]) // PER_WORD)
            found.append(_Tensor(name + PACKED, "int32", words, partial(packed, name)))
            found.append(_Tensor(name + SHAPE, "int64", (len(shape),), partial(np.array, shape, np.int64)))
    names = [tensor.name for tensor in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f"entry {twice!r}: two tensors would get that name. Rename the entry.")
    return found


def _pieces(
    tensors: list[_Tensor], known: Mapping[str, Form | None], metadata: Mapping[str, str], where: str
) -> Iterator[Bytes]:
    forms = {name: form for name, form in known.items() if form is not None}
    texts = {key: text for key, text in metadata.items() if key not in (NOTE, CONFIG)}
    if forms:
        texts[NOTE] = json.dumps({name: asdict(form) for name, form in forms.items()}, separators=(",", ":"))
        texts[CONFIG] = json.dumps(quantization_config(forms), separators=(",", ":"))
    leaves = [(each.name, Leaf(each.name, dtypes.by_name(each.dtype, each.name), each.shape)) for each in tensors]
    head, placed = head_of(leaves, texts, where)
    makers = {tensor.name: tensor.make for tensor in tensors}

    def written() -> Iterator[Bytes]:
        yield head
        for name, leaf in placed:
            words = dtypes.to_words(makers[name](), name)
            if words.nbytes != leaf.n_bytes:
                raise InvalidArgument(f"entry {name!r}: expected {leaf.n_bytes} bytes, got {words.nbytes}.")
            yield words.view(np.uint8).data

    return written()
