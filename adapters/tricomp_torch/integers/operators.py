"""The operators that a graph in a file may name, to text and back. Imports torch and errors.

The hard thing: a file may come from anybody, so only operators that compute tensors from tensors and plain numbers are
looked up: none that reads files, resizes or exchanges storages, runs other code, or is torch's own internal affair.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from tricomp.errors import CorruptFile, UnsupportedNode

Operator = Callable[..., Any]

OWN = "tricomp"
_NAMESPACES = ("aten", OWN)
# Arithmetic on sizes, which torch.export writes as Python's operators.
_PLAIN: dict[str, Operator] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "abs"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "getitem"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite")
    },
}
_NAMES = {function: name for name, function in _PLAIN.items()}
# Functions of torch that begin with an underscore are its own, and do not all check what they are given; these do.
_INTERNAL = {
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_log_softmax",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_softmax",
    "_to_copy",
    "_weight_norm",
}
_REFUSED = re.compile(
    r"^(from_file|set_|set_data|resize|record_stream|unsafe_|sym_storage|data$|backward|retain_grad|requires_grad_|rename)"
)
_REFUSED_TYPES = re.compile(r"Storage|Stream|__torch__|Capsule|PyObject")


def name_of(target: Any, where: str) -> str:
    """The name of a graph's operator, such as 'aten.linear.default'. Raises UnsupportedNode if no file may name it."""
    name = _NAMES.get(target) or (str(target) if isinstance(target, torch._ops.OpOverload) else None)
    if name is None or not _is_allowed(name):
        raise UnsupportedNode(
            f"{where}: the graph calls {target}, which a file may not name. Save without the graph, load with model=."
        )
    return name


def operator_of(name: str, where: str) -> Operator:
    """The operator of a name in a file. Raises CorruptFile for what name_of would not have written."""
    if not isinstance(name, str) or not _is_allowed(name):
        raise CorruptFile(
            f"{where}: the graph in the file calls {name!r}, which is none of the operators a file may name. Load with "
            "model=, or save the model again."
        )
    found = _PLAIN.get(name) or _of_torch(name)
    if found is None:
        lacks, other = f"torch {torch.__version__}", "the version of torch that wrote it"
        if name.startswith(f"{OWN}."):
            lacks, other = "this tricomp", "a newer one"
        raise CorruptFile(
            f"{where}: the graph in the file calls {name!r}, which {lacks} does not have. Load it with {other}, or "
            "with model=."
        )
    return found


@functools.lru_cache(4096)
def _of_torch(name: str) -> Operator | None:
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return found if isinstance(found, torch._ops.OpOverload) and not _takes_refused(found) else None


@functools.lru_cache(4096)
def _is_allowed(name: str) -> bool:
    if name in _PLAIN:
        return True
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in _NAMESPACES:
        return False
    packet = parts[1]
    is_internal = packet.startswith("_") and not packet.startswith("__")
    return not _REFUSED.match(packet) and (not is_internal or packet in _INTERNAL)


def _takes_refused(found: torch._ops.OpOverload) -> bool:
    return any(_REFUSED_TYPES.search(str(argument.type)) for argument in found._schema.arguments)
