"""Integer weights in pytrees: chosen arrays become codes and scales, which jit takes, and matmuls run on int8.

Imported by name, not by `tricomp_jax`; imports flax only where a linen model is run. The codes are those of
`tricomp.integers`, bit for bit. The hard thing: a kernel of JAX is [..., in, out] or an attention's [in, heads, width],
its codes are [out, in]: which axes are outputs is said once, when it is quantised, and kept with it.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from tricomp import dtypes
from tricomp import integers as core
from tricomp.errors import BackendError, InvalidArgument
from tricomp.layout import DeviceArray
from tricomp_jax.arrays import from_device_array, name_of, to_host, to_leaf

_log = logging.getLogger("tricomp")

Activations = str
DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_Shape: Any = jax.ShapeDtypeStruct
_finfo: Any = ml_dtypes.finfo
_LONGEST = 1 << 17  # products of 127 * 127 that an int32 surely holds


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("bits", "group", "dtype", "shape", "axes"),
)
@dataclass(frozen=True)
class Quantized:
    """An array of floats as integers, a pytree of two arrays: the value of an element is its code times its scale.

    codes: int8 or int4 [out, n]: the output axes moved to the front and made one, as are all others. scales: float32 or
    bfloat16, [out] or [out, n_groups]. shape, dtype: the array's. axes: which of its axes are outputs.
    """

    codes: jax.Array
    scales: jax.Array
    bits: int
    group: int | None
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """The array's."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, two a byte at 4 bits, and of the scales."""
        return -(-math.prod(self.shape) * self.bits // 8) + self.scales.size * self.scales.dtype.itemsize


def quantize(
    tree: Any,
    select: str | Sequence[str] | Callable[[str, Any], bool] = "*kernel",
    *,
    bits: int = 8,
    group: int | None = None,
    scale_dtype: str = "float32",
    clip: bool = True,
    axes: Callable[[str, Any], Sequence[int]] | None = None,
    threads: int | None = None,
) -> Any:
    """A pytree with chosen float arrays of two and more dimensions replaced by `Quantized`. The given one stays as is.

    select: patterns of key paths, such as "params/*/kernel", or a function of path and array. bits, group, scale_dtype,
    clip: see tricomp.integers.quantize; a group divides what a row has, all but the output axes. axes: a function of
    path and array that says which axes are outputs; without it `output_axes`.
    Raises InvalidArgument if nothing is selected, naming the paths there are; for elements that are not finite, naming
    the path.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_of(keys) for keys, _ in flat]
    is_selected = _selector(select)
    chosen = [_is_weight(leaf) and is_selected(path, leaf) for path, (_, leaf) in zip(paths, flat)]
    if not any(chosen):
        candidates = [path for path, (_, leaf) in zip(paths, flat) if _is_weight(leaf)]
        raise InvalidArgument(
            f"quantize: select={select!r} matches none of the arrays of two or more dimensions: {_some(candidates)}. "
            "Patterns are matched with whole paths; '*' matches '/' too."
        )
    say = axes or output_axes
    make = partial(_quantized, bits=bits, group=group, scale_dtype=scale_dtype, clip=clip, threads=threads)
    leaves = [
        make(leaf, path, tuple(say(path, leaf))) if is_chosen else leaf
        for path, (_, leaf), is_chosen in zip(paths, flat, chosen)
    ]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def load_file(
    path: str | os.PathLike[str], names: Iterable[str] | None = None, *, threads: int | None = None
) -> dict[str, Any]:
    """What `tricomp quantize` or tricomp.integers.save_file wrote, by name: a `Quantized` or an array of jax.

    The codes come straight from the file, no floats are made; the first axis of each is its output. names, threads, and
    what is raised: tricomp.integers.load_file. Pytrees with `Quantized` in them go through tricomp_jax.save and load.
    """
    found = core.load_file(path, names, threads=threads)
    return {
        name: _from_core(entry) if isinstance(entry, core.Quantized) else jnp.asarray(entry)
        for name, entry in found.items()
    }


def _from_core(found: core.Quantized) -> Quantized:
    codes = np.ascontiguousarray(found.codes).reshape(len(found.codes), -1 if len(found.codes) else 0)
    placed = jax.device_put(codes.astype(jnp.int4) if found.bits == 4 else codes)
    return Quantized(
        placed, jax.device_put(found.scales), found.bits, found.group, found.dtype, found.codes.shape, (0,)
    )


def output_axes(path: str, array: Any) -> tuple[int, ...]:
    """The output axes by Flax's names: an embedding's first; heads and width of query, key and value; else the last.

    path: key path with '/' between keys. array: anything with a shape.
    """
    parts = path.split("/")
    if parts[-1] == "embedding":
        return (0,)
    if len(parts) > 1 and parts[-2] in ("query", "key", "value", "qkv") and len(array.shape) >= 3:
        return tuple(range(1, len(array.shape)))
    return (len(array.shape) - 1,)


def dequantize(tree: Any) -> Any:
    """The pytree with every `Quantized` as the floats that it stands for; bit for bit those of tricomp.integers.

    Inside jit the floats are made where they are used, and no copy of them is kept.
    """
    return jax.tree.map(lambda leaf: _floats(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)


def is_quantized(value: Any) -> bool:
    """Whether a node of a pytree is a `Quantized`: an is_leaf for jax.tree.map."""
    return isinstance(value, Quantized)


def dot_general(
    lhs: jax.Array,
    rhs: Any,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    activations: Activations = "dynamic",
    **options: Any,
) -> jax.Array:
    """lax.dot_general with a `Quantized` on the right: on int8 where that can be, else on floats made on the way.

    On int8 if what is contracted is all of rhs but its output axes, without batch dimensions. activations: "dynamic"
    quantises every row of lhs to int8 as well, symmetric, by its largest magnitude; "float" keeps lhs in floats. The
    result has lhs's dtype, or preferred_element_type. Another rhs goes to lax.dot_general as it is.
    Raises InvalidArgument for other activations.
    """
    if activations not in ("dynamic", "float"):
        raise InvalidArgument(f"dot_general: expected activations 'dynamic' or 'float', got {activations!r}.")
    if not is_quantized(rhs):
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **options)
    (over_lhs, over_rhs), batch = dimension_numbers
    rows = tuple(axis for axis in range(rhs.ndim) if axis not in rhs.axes)
    is_whole = not any(map(len, batch)) and set(over_rhs) == set(rows)
    if not is_whole:
        floats = _floats(rhs).astype(lhs.dtype)
        return lax.dot_general(lhs, floats, dimension_numbers, precision, preferred_element_type, **options)
    # The contracted axes of lhs, in the order in which rhs's codes have them, come last and become one.
    over = [int(over_lhs[list(over_rhs).index(axis)]) % lhs.ndim for axis in rows]
    kept = [axis for axis in range(lhs.ndim) if axis not in over]
    rearranged = lhs.transpose(*kept, *over).reshape(*(lhs.shape[axis] for axis in kept), rhs.codes.shape[1])
    found = _matmul(rearranged, rhs, activations == "dynamic")
    out = tuple(rhs.shape[axis] for axis in sorted(rhs.axes))
    return found.reshape(*found.shape[:-1], *out).astype(preferred_element_type or lhs.dtype)


def dot(lhs: jax.Array, rhs: Any, *, activations: Activations = "dynamic") -> jax.Array:
    """lhs [..., *n] times the weights, over all axes of rhs that are not outputs. Returns [..., *outputs].

    lhs's last axes are those that are contracted, its dtype is the result's. activations: see dot_general.
    """
    if not is_quantized(rhs):
        return jnp.matmul(lhs, rhs)
    rows = [axis for axis in range(rhs.ndim) if axis not in rhs.axes]
    over = list(range(lhs.ndim - len(rows), lhs.ndim))
    return dot_general(lhs, rhs, ((over, rows), ((), ())), activations=activations)


def take(rhs: Any, indices: jax.Array) -> jax.Array:
    """Rows of an embedding [n, ...]: jnp.take of axis 0; only the rows that are asked for become floats."""
    if not is_quantized(rhs):
        return jnp.take(rhs, indices, axis=0)
    if rhs.axes != (0,):
        raise InvalidArgument(
            f"take: rows are read of axis 0, but the outputs are axes {rhs.axes}. Quantise with axes=(0,)."
        )
    some = Quantized(
        jnp.take(rhs.codes, indices, axis=0).reshape(-1, rhs.codes.shape[1]),
        jnp.take(rhs.scales, indices, axis=0).reshape(-1, *rhs.scales.shape[1:]),
        rhs.bits, rhs.group, rhs.dtype, (indices.size, *rhs.shape[1:]), (0,),
    )  # fmt: skip
    return _floats(some).reshape(*indices.shape, *rhs.shape[1:])


def apply(model: Any, variables: Any, *args: Any, activations: Activations = "dynamic", **kwargs: Any) -> Any:
    """model.apply of a Flax linen model whose variables hold `Quantized`: its Dense layers run on int8.

    Dense and DenseGeneral without batch dimensions (attention's projections are such) run on the codes; what any other
    module owns becomes floats on the way, inside jit only for as long as it is used. Arguments as for model.apply.
    """
    import flax.linen as nn

    if not any(map(is_quantized, jax.tree.leaves(variables, is_leaf=is_quantized))):
        return model.apply(variables, *args, **kwargs)
    layers = (nn.Dense, nn.DenseGeneral)
    own: set[tuple[str, ...]] = set()

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, layers) and not getattr(module, "batch_dims", ()):
            own.add(("params", *module.path, "kernel"))
        return next_fun(*args, **kwargs)

    def run(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_own = context.method_name == "__call__" and ("params", *module.path, "kernel") in own
        kernel = module.get_variable("params", "kernel") if is_own else None
        if not isinstance(kernel, Quantized):
            return next_fun(*args, **kwargs)
        return _dense(module, kernel, args[0] if args else kwargs["inputs"], activations)

    shapes = jax.tree.map(
        lambda leaf: _Shape(leaf.shape, leaf.dtype) if is_quantized(leaf) else leaf,
        variables,
        is_leaf=is_quantized,
    )
    with nn.intercept_methods(note):  # which modules own what, known only by a run, of shapes alone
        jax.eval_shape(lambda variables: model.apply(variables, *args, **kwargs), shapes)
    ready = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _floats(leaf) if is_quantized(leaf) and _names(keys) not in own else leaf,
        variables,
        is_leaf=is_quantized,
    )
    with nn.intercept_methods(run):
        return model.apply(ready, *args, **kwargs)


def _dense(module: Any, kernel: Quantized, inputs: jax.Array, activations: Activations) -> jax.Array:
    """What Dense and DenseGeneral compute."""
    axis = getattr(module, "axis", -1)
    over = [a % inputs.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    bias = module.get_variable("params", "bias") if module.use_bias else None
    empty = jnp.zeros((), kernel.dtype)
    inputs, _, bias = module.promote_dtype(inputs, empty, bias, dtype=module.dtype)
    numbers = ((over, list(range(len(over)))), ((), ()))
    out = dot_general(inputs, kernel, numbers, activations=activations)
    return out if bias is None else out + bias


def path_of(keys: Sequence[Any]) -> str:
    """A key path of jax.tree_util as text, with '/' between the keys."""
    return "/".join(_names(keys))


def _names(keys: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _selector(select: Any) -> Callable[[str, Any], bool]:
    if callable(select):
        return lambda path, leaf: bool(select(path, leaf))
    patterns = [select] if isinstance(select, str) else list(select)
    return lambda path, _: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _is_weight(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and len(leaf.shape) >= 2 and name_of(leaf.dtype) in _FLOATS


def _some(paths: Sequence[str]) -> str:
    return (
        ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "") if paths else "there is none"
    )


def _quantized(
    leaf: Any, path: str, axes: tuple[int, ...], bits: int, group: int | None, threads: int | None, **options: Any
) -> Quantized:
    axes = tuple(sorted(axis % leaf.ndim for axis in axes))
    if not 0 < len(set(axes)) == len(axes) < leaf.ndim:
        raise InvalidArgument(
            f"leaf {path!r}: axes {axes} of {leaf.ndim} cannot be the outputs: one must be left, and none twice."
        )
    is_jax = isinstance(leaf, jax.Array)
    n_out = math.prod(leaf.shape[axis] for axis in axes)
    moved = (jnp if is_jax else np).moveaxis(leaf, axes, range(len(axes))).reshape(n_out, -1 if n_out else 0)
    rows = to_leaf(moved, path) if is_jax else np.ascontiguousarray(moved)
    codes, scales = None, None
    if isinstance(rows, DeviceArray):  # on a GPU, and stays there
        try:
            made = core.quantize_on_device(rows, bits, group=group, leaf=path, **options)
            codes, scales = map(from_device_array, made)
        except BackendError as error:
            _log.warning("%s is quantised on the host: %s", path, error)
    if codes is None or scales is None:
        found = core.quantize(to_host(rows), bits, group=group, leaf=path, threads=threads, **options)
        devices = leaf.devices() if is_jax else ()
        device = next(iter(devices)) if len(devices) == 1 else None
        codes, scales = jax.device_put(found.codes, device), jax.device_put(found.scales, device)
    codes = codes.astype(jnp.int4) if bits == 4 else codes
    return Quantized(codes, scales, bits, group, name_of(leaf.dtype), tuple(leaf.shape), axes)


def _floats(quantized: Quantized) -> jax.Array:
    n = quantized.codes.shape[1]
    scales = quantized.scales.astype(jnp.float32)
    if quantized.group is None:
        scales = scales[:, None]
    else:
        scales = jnp.repeat(scales, quantized.group, axis=1, total_repeat_length=scales.shape[1] * quantized.group)[
            :, :n
        ]
    largest = _largest(quantized.dtype)
    floats = jnp.clip(quantized.codes.astype(jnp.float32) * scales, -largest, largest).astype(quantized.dtype)
    axes = quantized.axes
    rest = [axis for axis in range(quantized.ndim) if axis not in axes]
    moved = floats.reshape([quantized.shape[axis] for axis in (*axes, *rest)])
    return jnp.moveaxis(moved, range(len(axes)), axes)


def _largest(name: str) -> np.float32:
    dtype = dtypes.by_name(name).numpy
    return np.float32(min(float(_finfo(dtype).max), float(np.finfo(np.float32).max)))


def _matmul(lhs: jax.Array, rhs: Quantized, is_dynamic: bool) -> jax.Array:
    """lhs [..., n] times rhs.codes [out, n], scaled: float32 [..., out]."""
    n_out, n = rhs.codes.shape
    codes, scales = rhs.codes, rhs.scales.astype(jnp.float32)
    group = n if rhs.group is None else min(rhs.group, n)
    is_dynamic = is_dynamic and group <= _LONGEST
    rows = lhs.astype(jnp.float32)
    row_scales = None
    if is_dynamic:
        largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True, initial=0)
        # A row with infinities or NaN has such a scale, and so a product that is not finite either, as in floats.
        row_scales = jnp.where(largest == 0, 1, largest / 127)
        rows = jnp.round(rows / row_scales).astype(jnp.int8)
        codes, preferred = codes.astype(jnp.int8), jnp.int32
    else:
        rows, codes, preferred = rows.astype(lhs.dtype), codes.astype(lhs.dtype), jnp.float32
    if rhs.group is None or n <= rhs.group:
        numbers: DimensionNumbers = (((rows.ndim - 1,), (1,)), ((), ()))
        sums = lax.dot_general(rows, codes, numbers, preferred_element_type=preferred).astype(jnp.float32)
        found = sums * scales.reshape(n_out)
    else:
        n_groups = scales.shape[1]
        missing = n_groups * group - n
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]).reshape(*lhs.shape[:-1], n_groups, group)
        codes = jnp.pad(codes, [(0, 0), (0, missing)]).reshape(n_out, n_groups, group)
        sums = jnp.einsum("...gk,ogk->...go", rows, codes, preferred_element_type=preferred)
        found = jnp.einsum("...go,og->...o", sums.astype(jnp.float32), scales)
    return found if row_scales is None else found * row_scales
